"""Wrong versions of attention, with one fault each, which `verify` must find and name.

`attention` is the definition as one writes it by hand, forward and backward. `pick(right, a=wrong)`
is `right`, unless the fault `a` is planted. Each fault of FAULTS is a function of this module.
"""

import math
from functools import partial

import torch

from fused_attention.reference import dropout_keep_mask


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    key_padding_mask=None,
    causal=False,
    window_size=(-1, -1),
    scale=None,
    softcap=0.0,
    alibi_slopes=None,
    sinks=None,
    dropout_p=0.0,
    philox_seed=None,
    return_lse=False,
    fault="",
):
    """Has all features of `fused_attention.attention` for dense inputs."""
    if fault == "strides":  # reads memory as if it were contiguous
        query, key, value = (x.as_strided(x.shape, _dense(x)) for x in (query, key, value))
    if fault == "reads_bshd":
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if fault == "bias_detached" and bias is not None:
        bias = bias.detach()
    options = (mask, key_padding_mask, causal, window_size, scale, softcap, alibi_slopes)
    random = (dropout_p, philox_seed)
    out, lse = Attention.apply(query, key, value, bias, sinks, *options, *random, fault)
    if fault in ("reads_bshd", "out_bshd"):
        out = out.transpose(1, 2)
    if fault == "written":
        query.detach().add_(1)
    return (out, lse) if return_lse else out


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, query, key, value, bias, sinks, mask, padding, causal, window, scale, softcap, slopes,
        dropout_p, philox_seed, fault,
    ):  # fmt: skip
        def pick(right, **wrong):
            return wrong.get(fault, right)

        dtype = torch.promote_types(query.dtype, torch.float32)
        (B, Hq, Sq, D), (Hkv, Sk) = query.shape, key.shape[1:3]
        group = Hq // Hkv

        # Visibility
        i, j = torch.arange(Sq).view(-1, 1), torch.arange(Sk)
        off = corner = Sk - Sq
        if causal != "bottom_right":
            off = pick(0, bottom_right=corner if causal else 0)
        elif fault in ("top_left", "offset_clamped"):
            off = pick(off, top_left=0, offset_clamped=max(off, 0))
        left, right = (math.inf if side < 0 else side for side in window)
        if fault == "window_exchanged":
            left, right = right, left
        if window != (-1, -1):
            left = pick(left, left_long=left + 1, left_clamped=min(left, Sk), no_window=math.inf)
            right = pick(right, right_short=right - 1, no_window=math.inf)
        if causal:
            right = pick(0, causal_ignored=right, diagonal=-1)
        if fault == "right_clamped":  # a kernel for bottom-right only, with its side clamped first
            right = min(right + off - corner, Sk) + corner - off
        ahead = j - i - off
        first = j - i - pick(off, window_corner=0 if causal == "bottom_right" else corner)
        if not causal:
            ahead = first
        seen = ((first >= -left) & (ahead <= right)).expand(B, Hq, Sq, Sk)
        if mask is not None:
            b, h, m, n = mask.shape
            seen = seen & pick(
                mask,
                mask_inverted=~mask,
                mask_transposed=mask.reshape(b, h, n, m).mT if min(m, n) > 1 else mask,
                mask_axis=mask.mT if m == 1 and n == Sq else mask,
                mask_head=mask[:, :1],
            )
        if padding is not None:
            hidden = pick(padding, padding_inverted=~padding, padding_batch=padding[:1])
            seen = seen & ~hidden[:, None, None, :]
        if fault == "edge_ignored" and Sk > 32:
            seen = seen & (j < Sk // 32 * 32)
        sees = seen.any(-1, keepdim=True)

        # Logits
        def heads(x):
            x = x.to(dtype)
            repeated = x.repeat_interleave(group, 1)
            repeated = pick(repeated, gqa_modulo=x.repeat(1, group, 1, 1))
            used = seen.any(-2).unsqueeze(-1)  # keys that no query sees may be NaN
            clean = torch.where(used, repeated, 0.0)
            return pick(clean, hidden_nan=repeated, bias_after_softmax=repeated)

        q, k, v = query.to(dtype), heads(key), heads(value)
        if scale is None or fault == "scale_ignored":
            scale = pick(D**-0.5, scale_of_d=1 / D)
        scale = pick(scale, no_scale=1.0, scale_twice=scale * scale)

        def cap(x):
            if not softcap or fault == "no_softcap":
                return x
            return pick(softcap, cap_not_multiplied=1.0) * torch.tanh(x / softcap)

        raw = q @ k.mT
        raw = pick(
            raw,
            rounded=raw.to(torch.bfloat16).to(dtype),
            mask_before_scale=raw if softcap else raw.masked_fill(~seen, -math.inf),
        )
        s = cap(scale * raw) if fault != "cap_before_scale" else scale * cap(raw)
        if fault in ("cap_after_bias", "cap_after_mask"):
            s = scale * raw
        slope = None if softcap == 0 else 1 - torch.tanh(scale * raw / softcap).square()
        if bias is not None and fault not in ("no_bias", "bias_after_softmax"):
            added = bias.to(dtype)
            added = pick(
                added,
                bias_before_scale=scale * added,
                bias_subtracted=-added,
                bias_head=added[:, :1],
                bias_transposed=added.mT if Sq == Sk == added.shape[2] == added.shape[3] else added,
            )
            s = s + added
        if slopes is not None and fault != "no_alibi":
            a = slopes.to(dtype).expand(B, Hq)[:, :, None, None]
            a = pick(a, alibi_sign=-a, alibi_head=a.roll(1, 1))
            one = pick(0, alibi_off_by_one=1)
            away = pick(off, alibi_corner=corner - off)
            s = s - a * (j - i - away + one).abs()
        if fault == "cap_after_bias":
            s = cap(s)
        if fault != "mask_before_scale" or softcap:
            s = s.masked_fill(~seen, pick(-math.inf, average=-1e9))
        if fault == "cap_after_mask":
            s = cap(s)

        # Softmax
        row_max = s.amax(-1, keepdim=True)
        if sinks is not None:
            row_max = row_max.maximum(sinks.to(dtype).view(-1, 1, 1))
        row_max = pick(
            row_max.masked_fill(row_max.isinf(), 0.0), overflow=torch.zeros_like(row_max)
        )
        p = torch.exp(s - row_max)
        terms = p[..., :64] if fault == "not_divided" else p
        row_sum = terms.sum(-1, keepdim=True)
        if fault == "zeros_counted":
            row_sum = row_sum + -Sk % 16 * torch.exp(-row_max)
        if sinks is not None and fault != "no_sinks":
            z = sinks.to(dtype).view(-1, 1, 1)
            z = pick(z, sinks_scaled=scale * z)
            weight = torch.exp(z - row_max)
            row_sum = row_sum + weight
            if fault == "sinks_numerator":
                p = torch.where(seen, p + weight, 0.0)
        lse = pick(row_max, lse_without_max=0.0) + row_sum.log()
        lse = pick(lse, lse_log2=lse / math.log(2), lse_not_inf=lse.clamp_min(-1e9)).squeeze(-1)
        p = p / row_sum
        if fault not in ("empty", "average"):
            p = torch.where(sees, p, 0.0)
        if fault == "bias_after_softmax" and bias is not None:
            p = p + bias.to(dtype)

        # Dropout, and the values
        kept = torch.ones((), dtype=dtype)
        if dropout_p:
            threshold = round(dropout_p * 65536)
            if philox_seed is None:
                keep = torch.rand(B, Hq, Sq, Sk) >= dropout_p
            else:
                keep = dropout_keep_mask(philox_seed, dropout_p, B, Hq, Sq, Sk)
            factor = 65536 / max(65536 - threshold, 1)
            keep = keep.to(dtype)
            kept = pick(keep * factor, dropout_not_scaled=keep, no_dropout=kept)
        dropped = p * kept
        if fault == "dropout_before_sum" and dropout_p:
            sink = 1 - p.sum(-1, keepdim=True)
            dropped = (p * keep) / ((p * keep).sum(-1, keepdim=True) + sink)
            dropped = torch.where(sees, dropped, 0.0).nan_to_num()
        out = dropped @ v
        out = pick(
            out,
            inaccurate=out * 1.001,
            nan_swallowed=out.nan_to_num(),
            random=out * (1 + torch.finfo(query.dtype).eps * torch.rand_like(out)),
        )
        out = pick(out.to(query.dtype), float32=out)
        ctx.save_for_backward(query, key, value, bias, sinks)
        ctx.rest = (q, k, v, p, kept, dropped, out, lse, scale, slope, group, fault)
        return out, lse

    @staticmethod
    def backward(ctx, do, dlse):
        query, key, value, bias, sinks = ctx.saved_tensors
        q, k, v, p, kept, dropped, out, lse, scale, slope, group, fault = ctx.rest

        def pick(right, **wrong):
            return wrong.get(fault, right)

        do = do.to(q.dtype)
        dlse = pick(dlse, grad_lse=0 * dlse).masked_fill(lse.isinf(), 0.0).unsqueeze(-1)
        delta = (do * out).sum(-1, keepdim=True)
        delta = pick(delta, grad_delta=0 * delta) - dlse
        ds = p * ((do @ v.mT) * pick(kept, grad_dropout=1.0) - delta)
        dlogits = pick(ds, grad_bias=scale * ds)
        if slope is not None:
            ds = ds * pick(slope, grad_softcap=1.0)

        def of_group(x):
            x = x.unflatten(1, (-1, group))
            return pick(x.sum(2), grad_group=x[:, :, -1])

        dq = pick(scale, grad_scale=1.0) * (ds @ k)
        dk = of_group(pick(scale, grad_scale=1.0) * (ds.mT @ q))
        dv = of_group(dropped.mT @ do) * pick(1.0, grad_value=3.0)
        db = dz = None
        if bias is not None:
            db = dlogits.sum_to_size(bias.shape).to(bias.dtype)
        if sinks is not None:
            weight = torch.exp(sinks.view(-1, 1, 1) - lse.unsqueeze(-1))
            dz = pick(-1, grad_sinks=1) * (weight * delta).sum((0, 2, 3)).to(sinks.dtype)
        grads = (x.to(y.dtype) for x, y in ((dq, query), (dk, key), (dv, value)))
        return *grads, db, dz, *[None] * 10


def _dense(x):
    return torch.empty(x.shape, device="meta").stride()


# The name that `verify` gives to each fault.
FAULTS = {
    "bottom_right": "causal aligned bottom-right instead of top-left",
    "top_left": "causal aligned top-left instead of bottom-right",
    "offset_clamped": "offset of bottom-right clamped to 0",
    "causal_ignored": "causal ignored",
    "diagonal": "causal hides the diagonal",
    "no_window": "window_size ignored",
    "window_exchanged": "window_size: left and right exchanged",
    "window_corner": "window_size aligned at the other corner",
    "left_long": "window_size: left side one token too long",
    "right_short": "window_size: right side one token too short",
    "left_clamped": "left side clamped to Sk before the alignment",
    "right_clamped": "right side clamped to Sk before the alignment",
    "mask_inverted": "mask inverted: True taken for hidden",
    "mask_transposed": "mask transposed",
    "mask_axis": "mask broadcast along the wrong axis",
    "mask_head": "mask: that of the first head is used for all",
    "padding_inverted": "key_padding_mask inverted: True taken for visible",
    "padding_batch": "key_padding_mask: that of the first batch is used for all",
    "no_scale": "scale missing",
    "scale_ignored": "scale ignored",
    "scale_twice": "scale 1/D instead of 1/sqrt(D), or applied twice",
    "scale_of_d": "scale 1/D instead of 1/sqrt(D), or applied twice",
    "mask_before_scale": "mask applied before the scale",
    "no_softcap": "softcap ignored",
    "cap_before_scale": "softcap applied before the scale",
    "cap_after_bias": "softcap applied after the bias",
    "cap_after_mask": "softcap applied after the mask",
    "cap_not_multiplied": "softcap: tanh not multiplied by the cap",
    "no_alibi": "alibi_slopes ignored",
    "alibi_sign": "alibi_slopes with the wrong sign",
    "alibi_head": "alibi_slopes of the wrong head",
    "alibi_corner": "alibi_slopes: distance from the wrong corner",
    "alibi_off_by_one": "alibi_slopes: distance off by one",
    "no_bias": "bias ignored",
    "bias_before_scale": "bias added before the scale",
    "bias_after_softmax": "bias added after the softmax",
    "bias_subtracted": "bias subtracted",
    "bias_head": "bias: that of the first head is used for all",
    "bias_transposed": "bias transposed",
    "bias_detached": "no gradient of bias",
    "no_sinks": "sinks ignored",
    "sinks_scaled": "sinks multiplied by the scale",
    "sinks_numerator": "sinks added to the numerator",
    "no_dropout": "dropout ignored",
    "dropout_not_scaled": "dropout not scaled",
    "dropout_before_sum": "dropout before the softmax's sum",
    "gqa_modulo": "GQA heads interleaved: h reads h % Hkv",
    "edge_ignored": "keys of the ragged edge ignored",
    "zeros_counted": "padding of the last tile takes part in the softmax",
    "not_divided": "output not divided by the sum of all weights",
    "lse_log2": "lse in base 2",
    "lse_without_max": "lse without the maximum",
    "lse_not_inf": "lse of fully masked rows is not -inf",
    "empty": "fully masked rows are not 0 but NaN",
    "average": "fully masked rows are not 0",
    "hidden_nan": "NaN in padding leaks (key_padding_mask)",
    "overflow": "softmax not max-subtracted: overflow",
    "nan_swallowed": "a visible NaN is swallowed",
    "random": "not deterministic: a second call has other bits",
    "rounded": "not accurate enough (out, float32)",
    "inaccurate": "not accurate enough (out, float32)",
    "float32": "out: torch.float32, expected torch.bfloat16",
    "strides": "strides of the inputs ignored",
    "reads_bshd": "layout: takes [B, S, H, D] instead of [B, H, S, D]",
    "out_bshd": "layout: out is [B, S, H, D] instead of [B, H, S, D]",
    "written": "query was written to",
    "grad_scale": "the gradient forgets the scale",
    "grad_softcap": "the gradient forgets the derivative of softcap",
    "grad_group": "the gradient of key and value is not summed over the group",
    "grad_lse": "the gradient forgets that of lse",
    "grad_delta": "the gradient forgets delta",
    "grad_dropout": "the gradient forgets dropout",
    "grad_bias": "the gradient of bias is multiplied by the scale",
    "grad_sinks": "the gradient of sinks has the wrong sign",
    "grad_value": "dvalue is 3 times what it should be",
}
for _name in FAULTS:
    globals()[_name] = partial(attention, fault=_name)


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Has PyTorch's signature, and a causal mask that is one key too narrow."""
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(-1)
    mask = causal[None, None] if is_causal else attn_mask
    boolean = mask is not None and mask.dtype == torch.bool
    options = {"mask": mask} if boolean else {"bias": mask}
    return attention(query, key, value, **options, dropout_p=dropout_p, scale=scale)

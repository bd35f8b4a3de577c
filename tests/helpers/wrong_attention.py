"""Wrong versions of attention, with one fault each, which `verify` must find and name."""

import math
from functools import partial

import torch
import torch.nn.functional as F


def attention(
    query,
    key,
    value,
    *,
    mask=None,
    bias=None,
    key_padding_mask=None,
    causal=False,
    scale=None,
    return_lse=False,
    dropout_p=0.0,
    fault="",
):
    """Computes the definition in float32 at least; `fault` names what is done wrong."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    Sq, Sk, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]

    def heads(x):
        repeated = x.repeat(1, group, 1, 1) if fault == "gqa" else x.repeat_interleave(group, 1)
        return repeated.to(dtype)

    seen = torch.ones(*query.shape[:3], Sk, dtype=torch.bool)
    if causal:
        top_left = causal == "top_left" and fault != "alignment"
        seen = seen.tril(0 if top_left else Sk - Sq)
    if mask is not None:
        seen = seen & (~mask if fault == "mask" else mask)
    if key_padding_mask is not None:
        seen = seen & ~key_padding_mask[:, None, None, :]
    k, v = heads(key), heads(value)
    if fault != "padding":  # keys that no query sees may be NaN
        k, v = (torch.where(seen.any(-2).unsqueeze(-1), x, 0.0) for x in (k, v))
    s = query.to(dtype) @ k.mT
    if fault == "detached":
        s = s.detach()
    if fault == "rounding":
        s = s.to(torch.bfloat16).to(dtype)
    if scale is None or fault == "scale argument":
        scale = query.shape[-1] ** -0.5
    if fault != "scale":
        s = s * scale
    if bias is not None and fault != "bias":
        s = s + (bias.detach() if fault == "bias gradient" else bias)
    s = s.masked_fill(~seen, -1e9 if fault == "average" else -math.inf)
    if fault == "overflow":
        p = s.exp() / s.exp().sum(-1, keepdim=True)
    else:
        p = s.softmax(-1)
    if fault not in ("empty", "average"):
        p = torch.where(seen.any(-1, keepdim=True), p, 0.0)
    if dropout_p and fault == "dropout":
        p = p * (torch.rand_like(p) >= dropout_p)
    elif dropout_p:
        p = F.dropout(p, dropout_p)
    if fault == "gradient":  # the gradient of value is three times too large
        v = 3 * v - 2 * v.detach()
    out = p @ v
    if fault == "swallow":
        out = out.nan_to_num()
    if fault == "random":
        out = out * (1 + 1e-6 * torch.rand(()))
    if fault == "write":
        query.detach().add_(1)
    lse = s.logsumexp(-1)
    out = out if fault == "dtype" else out.to(query.dtype)
    return (out, lse) if return_lse else out


# The message of `verify` for each fault, by the name of the function.
FAULTS = {
    "alignment": "causal aligned bottom-right instead of top-left",
    "scale": "scale missing",
    "scale argument": "scale ignored",
    "mask": "mask inverted: True taken for hidden",
    "bias": "bias ignored",
    "bias gradient": "no gradient of bias",
    "gqa": "GQA heads interleaved: h reads h % Hkv",
    "empty": "fully masked rows are not 0 but NaN",
    "average": "fully masked rows are not 0",
    "padding": "NaN in padding leaks (key_padding_mask)",
    "overflow": "softmax not max-subtracted: overflow",
    "dropout": "dropout not scaled",
    "gradient": "dvalue is 3 times what it should be",
    "detached": "no gradient of query",
    "rounding": "not accurate enough (out, float32)",
    "swallow": "a visible NaN is swallowed",
    "random": "not deterministic: a second call has other bits",
    "dtype": "out: torch.float32, expected torch.bfloat16",
    "write": "query was written to",
}
for _name in FAULTS:
    globals()[_name.replace(" ", "_")] = partial(attention, fault=_name)


def sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """Has PyTorch's signature, and a causal mask that is one key too narrow."""
    causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(-1)
    mask = causal[None, None] if is_causal else attn_mask
    boolean = mask is not None and mask.dtype == torch.bool
    options = {"mask": mask} if boolean else {"bias": mask}
    return attention(query, key, value, **options, dropout_p=dropout_p, scale=scale)

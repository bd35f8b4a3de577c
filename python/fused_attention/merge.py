"""Attention over all keys, from attention over disjoint parts of them.

    lse = log Σ exp(lse_n),   out = Σ exp(lse_n - lse) · out_n

This is attention over the parts, with score lse_n and value out_n (FlashDecoding; Dao et al. 2023).
Time and memory O(parts · out).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call.problem import DTYPES, check_shape, check_tensor, shape_of
from .errors import wrong_value


def merge_attention_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (out, lse) of attention over all keys, from (out, lse) over disjoint parts of them.

    outs: [B, Hq, Sq, Dv] each, lses: [B, Hq, Sq] each, as `attention(return_lse=True)` gives them
    (or packed: [Tq, Hq, Dv] and [Hq, Tq]), computed without sinks; sinks [Hq] enter here, once.
    lse is log Σ exp lse_n, out is Σ exp(lse_n - lse) out_n. A part whose lse is -inf contributes
    nothing; if all are, out is 0 and lse -inf (or the sink). Differentiable in everything.

    Raises ArgumentValueError if shapes or dtypes do not fit together, ArgumentTypeError for an
    argument that is not a tensor.
    """
    if not outs or len(outs) != len(lses):
        wrong_value("lses", f"as many as outs, at least one: {len(outs)}", len(lses))
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        for name, x in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            check_tensor(name, x)
            if x.dtype not in DTYPES:
                allowed = ", ".join(str(dtype) for dtype in DTYPES)
                wrong_value(name, f"a dtype out of {allowed}", x.dtype)
        if out.dim() not in (3, 4) or out.shape != outs[0].shape or out.dtype != outs[0].dtype:
            expected = f"shape [B, Hq, Sq, Dv] and dtype of outs[0]: {shape_of(outs[0])}"
            wrong_value(f"outs[{i}]", expected, f"{shape_of(out)}, {out.dtype}")
        rows = out.shape[:-1] if out.dim() == 4 else (out.shape[1], out.shape[0])
        check_shape(f"lses[{i}]", lse, "[B, Hq, Sq] (packed: [Hq, Tq])", tuple(rows))
    if sinks is not None:
        check_tensor("sinks", sinks)
        check_shape("sinks", sinks, "[Hq]", (outs[0].shape[1],))
    return _merge(outs, lses, sinks)


def _merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    packed = outs[0].dim() == 3
    dtype = torch.promote_types(outs[0].dtype, torch.float32)
    with torch.autocast(outs[0].device.type, enabled=False):
        logits = [lse.to(dtype) for lse in lses]
        if sinks is not None:
            logits.append(sinks.to(dtype).unsqueeze(-1).expand_as(logits[0]))
        stacked = torch.stack(logits)
        top = stacked.detach().amax(0)
        top = torch.where(top == -torch.inf, 0.0, top)  # -inf - -inf would be NaN
        terms = (stacked - top).exp()
        total = terms.sum(0)
        nothing = total == 0
        total = torch.where(nothing, 1.0, total)
        lse = torch.where(nothing, -torch.inf, top + total.log())
        out = torch.zeros((), dtype=dtype, device=outs[0].device)
        for part, logit, term in zip(outs, logits, terms / total, strict=False):
            p, seen = ((x.transpose(0, 1) if packed else x).unsqueeze(-1) for x in (term, logit))
            # A part that saw no key contributes nothing, whatever its out holds.
            out = out + torch.where(seen == -torch.inf, 0.0, p * part.to(dtype))
        return out.to(outs[0].dtype), lse

"""What is compared: naive maths, PyTorch's scaled_dot_product_attention, and ours.

Each is a callable (query, key, value, *, mask, bias, causal, dropout_p) -> out. To measure another
implementation, add it to PEERS.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_attention
from shapes import Case, Inputs


def naive(query, key, value, *, mask=None, bias=None, causal=False, dropout_p=0.0) -> Tensor:
    """The formula as it is written in textbooks: holds the whole score matrix, several times."""
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~visible, -math.inf)
    return F.dropout(torch.softmax(scores, -1), dropout_p) @ value


# Bound now: what is measured stays PyTorch's own, whatever is patched later.
_torch_sdpa = F.scaled_dot_product_attention


def torch_sdpa(query, key, value, *, mask=None, bias=None, causal=False, dropout_p=0.0) -> Tensor:
    attn_mask = mask if bias is None else bias
    if mask is not None and bias is not None:
        attn_mask = bias.masked_fill(~mask, -math.inf)
    gqa = query.shape[1] != key.shape[1]
    return _torch_sdpa(query, key, value, attn_mask, dropout_p, causal, enable_gqa=gqa)


def ours(query, key, value, *, mask=None, bias=None, causal=False, dropout_p=0.0) -> Tensor:
    return fused_attention.attention(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        causal="top_left" if causal else False,
        dropout_p=dropout_p,
    )


PEERS: dict[str, Callable[..., Tensor]] = {
    "naive maths": naive,
    "PyTorch SDPA": torch_sdpa,
    "fused_attention": ours,
}


def bind(peer: Callable[..., Tensor], case: Case, inputs: Inputs) -> Callable[[], object]:
    """A call without arguments that runs the case once: forward, and backward if it has one."""

    def forward() -> Tensor:
        return peer(
            inputs.query,
            inputs.key,
            inputs.value,
            mask=inputs.mask,
            bias=inputs.bias,
            causal=case.causal,
            dropout_p=case.dropout_p,
        )

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs.differentiated, inputs.grad_out)

    return forward_and_backward if case.backward else forward

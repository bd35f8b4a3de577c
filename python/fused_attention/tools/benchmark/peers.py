"""What is compared. A peer is given a case and its inputs and returns a call without arguments that
runs it forward; what can be prepared once (a block mask, a compilation) is prepared before. A case
that it does not offer raises NotOffered, there or in the call.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...attention import attention
from ..foreign import Implementation, NotOffered
from .onnx_runtime import onnx_runtime
from .shapes import Case, Inputs

Forward = Callable[[], Tensor]
Peer = Callable[[Case, Inputs], Forward]

# Bound now: what is measured stays PyTorch's own, whatever is patched later.
_torch_sdpa = F.scaled_dot_product_attention


def naive(case: Case, inputs: Inputs) -> Forward:
    """The formula as it is written in textbooks: holds the whole score matrix, several times."""
    seen = None if case.causal or case.window_size == (-1, -1) else case.band()

    def forward() -> Tensor:
        query, key, value = inputs.query, inputs.key, inputs.value
        if case.Hq != case.Hkv:
            group = case.Hq // case.Hkv
            key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT / math.sqrt(case.D)
        if inputs.bias is not None:
            scores = scores + inputs.bias
        if inputs.mask is not None:
            scores = scores.masked_fill(~inputs.mask, -math.inf)
        if seen is not None or case.causal:
            band = case.band() if seen is None else seen
            scores = scores.masked_fill(~band, -math.inf)
        return F.dropout(torch.softmax(scores, -1), case.dropout_p) @ value

    return forward


def torch_sdpa(case: Case, inputs: Inputs) -> Forward:
    """PyTorch's own, with the kernel that it chooses."""
    mask, is_causal = inputs.mask, case.causal
    masked = mask is not None or inputs.bias is not None  # then is_causal must not be set
    if case.window_size != (-1, -1) or (case.causal and masked):
        mask, is_causal = case.band() if mask is None else mask & case.band(), False
    gqa = case.Hq != case.Hkv

    def forward() -> Tensor:
        attn_mask = mask if inputs.bias is None else inputs.bias
        if mask is not None and inputs.bias is not None:
            attn_mask = inputs.bias.masked_fill(~mask, -math.inf)
        tensors = inputs.query, inputs.key, inputs.value
        return _torch_sdpa(*tensors, attn_mask, case.dropout_p, is_causal, enable_gqa=gqa)

    return forward


def torch_kernel(backend: SDPBackend) -> Peer:
    """PyTorch held to one kernel; choosing it is part of the call, some microseconds."""

    def peer(case: Case, inputs: Inputs) -> Forward:
        call = torch_sdpa(case, inputs)

        def forward() -> Tensor:
            with sdpa_kernel(backend):
                try:
                    return call()
                except RuntimeError as error:
                    if "No available kernel" in str(error):
                        raise NotOffered("no such kernel for this case") from error
                    raise

        return forward

    return peer


@functools.cache
def _compiled_flex() -> tuple[Any, Any]:
    from torch._dynamo import config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    config.recompile_limit = max(config.recompile_limit, 256)  # one compilation a case
    return torch.compile(flex_attention, dynamic=False), create_block_mask


def flex(case: Case, inputs: Inputs) -> Forward:
    """PyTorch's FlexAttention, compiled; its block mask is made beforehand."""
    if case.dropout_p:
        raise NotOffered("no dropout")
    if case.backward:
        raise NotOffered("no backward on the CPU")
    call, create_block_mask = _compiled_flex()
    left, right = case.window_size
    right = 0 if case.causal else right
    # With tensors as all of its indices: PyTorch 2.10 takes no numbers among them.
    keys = None if inputs.mask is None else inputs.mask[:, 0, 0]
    bias = None if inputs.bias is None else inputs.bias[0]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = j >= 0
        if left >= 0:
            visible = visible & (j >= i - left)
        if right >= 0:
            visible = visible & (j <= i + right)
        if keys is not None:
            visible = visible & keys[b, j]
        return visible

    options: dict[str, Any] = {"enable_gqa": case.Hq != case.Hkv}
    if left >= 0 or right >= 0 or keys is not None:
        batch = None if keys is None else case.B
        options["block_mask"] = create_block_mask(seen, batch, None, case.Sq, case.Sk, "cpu")
    if bias is not None:
        options["score_mod"] = lambda score, b, h, i, j: score + bias[h, i, j]
    return lambda: call(inputs.query, inputs.key, inputs.value, **options)


def with_keywords(function: Callable[..., Tensor]) -> Peer:
    """Ours, and what has its keywords (see `foreign`)."""

    def peer(case: Case, inputs: Inputs) -> Forward:
        options = {
            "mask": inputs.mask,
            "bias": inputs.bias,
            "causal": "top_left" if case.causal else False,
            "dropout_p": case.dropout_p,
            "window_size": case.window_size,
        }
        if case.precision is not None:
            options["precision"] = case.precision
        return lambda: function(inputs.query, inputs.key, inputs.value, **options)

    return peer


OURS = "fused_attention"
PEERS: dict[str, Peer] = {  # of the demo
    "naive maths": naive,
    "PyTorch SDPA": torch_sdpa,
    OURS: with_keywords(attention),
}


def bench_peers(implementation: Implementation | None = None) -> dict[str, Peer]:
    """Those of `bench`, ours first."""
    peers = {
        OURS: PEERS[OURS],
        "PyTorch flash": torch_kernel(SDPBackend.FLASH_ATTENTION),
        "PyTorch maths": torch_kernel(SDPBackend.MATH),
        "FlexAttention": flex,
        "naive maths": naive,
    }
    if importlib.util.find_spec("onnxruntime"):
        peers["ONNX Runtime"] = onnx_runtime
    if implementation is not None:
        peers[implementation.name] = with_keywords(implementation)
    return peers


def bind(peer: Peer, case: Case, inputs: Inputs) -> Callable[[], object]:
    """A call without arguments that runs the case once: forward, and backward if it has one."""
    forward = peer(case, inputs)

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs.differentiated, inputs.grad_out)

    return forward_and_backward if case.backward else forward

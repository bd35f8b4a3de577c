"""The implementations that are compared.

A peer takes a case and its inputs and returns a call without arguments that runs the forward; what
can be prepared once (a block mask, a compilation, packed sequences) is prepared before. A peer that
does not offer a case raises NotOffered, when it prepares the call or in the call.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...attention import attention
from ..foreign import Implementation, NotOffered
from .onnx_runtime import onnx_runtime
from .shapes import Case, Inputs
from .vllm_cpu import vllm
from .zentorch import zentorch

Forward = Callable[[], Tensor]
Peer = Callable[[Case, Inputs], Forward]

# Bound now, so that PyTorch's own function is measured whatever is patched later.
_torch_sdpa = F.scaled_dot_product_attention


MOST_SCORES = 2**30  # bytes; peers that hold the score matrix several times refuse larger ones


def refuse_large_scores(case: Case) -> None:
    if case.bytes_of_scores() > MOST_SCORES:
        raise NotOffered(f"a score matrix of {case.bytes_of_scores() / 2**30:.1f} GiB")


def naive(case: Case, inputs: Inputs) -> Forward:
    """Computes the formula of textbooks, which holds the whole score matrix, several times."""
    refuse_large_scores(case)
    device = inputs.query.device
    seen = None if case.causal or case.window_size == (-1, -1) else case.band().to(device)

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
            band = case.band().to(device) if seen is None else seen
            scores = scores.masked_fill(~band, -math.inf)
        return F.dropout(torch.softmax(scores, -1), case.dropout_p) @ value

    return forward


def torch_sdpa(case: Case, inputs: Inputs) -> Forward:
    """Runs PyTorch's scaled_dot_product_attention with the kernel that it chooses."""
    mask, is_causal = inputs.mask, case.causal
    masked = mask is not None or inputs.bias is not None  # then is_causal must not be set
    if case.window_size != (-1, -1) or (case.causal and masked):
        band = case.band().to(inputs.query.device)
        mask, is_causal = band if mask is None else mask & band, False
    gqa = case.Hq != case.Hkv

    def forward() -> Tensor:
        attn_mask = mask if inputs.bias is None else inputs.bias
        if mask is not None and inputs.bias is not None:
            attn_mask = inputs.bias.masked_fill(~mask, -math.inf)
        tensors = inputs.query, inputs.key, inputs.value
        return _torch_sdpa(*tensors, attn_mask, case.dropout_p, is_causal, enable_gqa=gqa)

    return forward


def torch_kernel(name: str) -> Peer:
    """Limits PyTorch to one kernel; choosing it is part of the call, some microseconds."""

    def peer(case: Case, inputs: Inputs) -> Forward:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if name == "MATH":
            refuse_large_scores(case)
        call, backend = torch_sdpa(case, inputs), getattr(SDPBackend, name)

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

    config.recompile_limit = max(config.recompile_limit, 256)  # each case is compiled
    return torch.compile(flex_attention, dynamic=False), create_block_mask


def flex(case: Case, inputs: Inputs) -> Forward:
    """Runs PyTorch's FlexAttention, compiled; its block mask is made beforehand."""
    device = inputs.query.device
    if case.dropout_p:
        raise NotOffered("no dropout")
    if case.backward and device.type == "cpu":
        raise NotOffered("no backward on the CPU")
    call, create_block_mask = _compiled_flex()
    left, right = case.window_size
    right = 0 if case.causal else right
    # Only tensors are indices: PyTorch 2.10 takes no numbers among them.
    mask = None if inputs.mask is None else inputs.mask[:, 0]
    keys = None if mask is None or mask.shape[1] > 1 else mask[:, 0]
    bias = None if inputs.bias is None else inputs.bias[0]

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        visible = j >= 0
        if left >= 0:
            visible = visible & (j >= i - left)
        if right >= 0:
            visible = visible & (j <= i + right)
        if keys is not None:
            visible = visible & keys[b, j]
        elif mask is not None:
            visible = visible & mask[b, i, j]
        return visible

    options: dict[str, Any] = {"enable_gqa": case.Hq != case.Hkv}
    if left >= 0 or right >= 0 or mask is not None:
        batch = None if mask is None else case.B
        options["block_mask"] = create_block_mask(seen, batch, None, case.Sq, case.Sk, device)
    if bias is not None:
        options["score_mod"] = lambda score, b, h, i, j: score + bias[h, i, j]
    return lambda: call(inputs.query, inputs.key, inputs.value, **options)


def _packed(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Returns x [B, H, S, D] without its padding: [sum of lengths, H, D]."""
    return torch.cat([row[:, :n].transpose(0, 1) for row, n in zip(x, lengths, strict=True)])


def in_pages(x: Tensor, page_size: int, order: Tensor) -> Tensor:
    """Returns x [B, H, S, D] as pages [pages, page_size, H, D]; the n-th is at order[n]."""
    pages = x.transpose(1, 2).flatten(0, 1).unflatten(0, (-1, page_size))
    return torch.empty_like(pages).index_copy_(0, order, pages)


def with_keywords(function: Callable[..., Tensor]) -> Peer:
    """Runs our attention, or a function that takes its keywords (see `foreign`)."""

    def takes(keyword: str) -> bool:
        if not isinstance(function, Implementation):
            return True
        return function.signature == "attention" and function.takes(keyword)

    def peer(case: Case, inputs: Inputs) -> Forward:
        tensors = inputs.query, inputs.key, inputs.value
        options: dict[str, Any] = {
            "mask": inputs.mask,
            "bias": inputs.bias,
            "causal": "top_left" if case.causal else False,
            "dropout_p": case.dropout_p,
            "window_size": case.window_size,
        }
        if case.precision is not None:
            options["precision"] = case.precision
        if case.lengths and takes("cu_seqlens_q"):
            query, key, value = (_packed(x, case.lengths) for x in tensors)
            offsets = torch.tensor([0, *case.lengths]).cumsum(0).to(query.device, torch.int32)
            options |= {"mask": None, "cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        elif case.page_size and takes("block_table"):
            pages = case.B * case.Sk // case.page_size
            order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
            order = order.to(inputs.query.device)
            query = inputs.query
            key, value = (in_pages(x, case.page_size, order) for x in tensors[1:])
            options["block_table"] = order.to(torch.int32).view(case.B, -1)
        else:
            query, key, value = tensors
        return lambda: function(query, key, value, **options)

    return peer


OURS = "fused_attention"
PEERS: dict[str, Peer] = {  # the peers of the demo
    "naive maths": naive,
    "PyTorch SDPA": torch_sdpa,
    OURS: with_keywords(attention),
}
# The packages of other libraries, whose peers `bench` has only where they are installed.
PACKAGES: dict[str, tuple[str, str, Peer]] = {  # peer: (module, distribution, peer)
    "ONNX Runtime": ("onnxruntime", "onnxruntime", onnx_runtime),
    "zentorch": ("zentorch", "zentorch", zentorch),
    "vLLM": ("vllm", "vllm-cpu", vllm),
}


def versions() -> dict[str, str]:
    """Returns the version of each installed library among the peers, by the peer's name."""
    found = {"PyTorch": str(torch.__version__)}
    for name, (module, distribution, _) in PACKAGES.items():
        if importlib.util.find_spec(module):
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown version"
    return found


def bench_peers(implementation: Implementation | None = None) -> dict[str, Peer]:
    """Returns the peers of `bench`: ours first, then those that are installed."""
    peers = {
        OURS: PEERS[OURS],
        "PyTorch flash": torch_kernel("FLASH_ATTENTION"),
        "PyTorch math": torch_kernel("MATH"),
        "FlexAttention": flex,
        "naive maths": naive,
    }
    for name, (module, _, peer) in PACKAGES.items():
        if importlib.util.find_spec(module):
            peers[name] = peer
    if implementation is not None:
        peers[implementation.name] = with_keywords(implementation)
    return peers


def whole(forward: Forward, case: Case, inputs: Inputs) -> Callable[[], object]:
    """Returns a call that runs the case once: forward, and backward if the case has one."""

    def forward_and_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), inputs.differentiated, inputs.grad_out)

    return forward_and_backward if case.backward else forward

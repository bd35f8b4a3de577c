"""torch.nn.attention.varlen on a CPU: kernels for the operators of varlen_attn, varlen_attn_out.

    from torch.nn.attention.varlen import varlen_attn
    varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size=(-1, 0))

PyTorch defines these operators and their gradients when that module is imported, and has kernels
for GPUs only. Importing this module registers CPU kernels of the same names. The dispatcher accepts
them before the operators are defined, so Dynamo, which PyTorch's module imports, is not loaded.

Queries and keys are aligned at the bottom right, as in FlashAttention. Every dtype and head_dim of
the CPU backend is served. lse is float32 also for float64, as PyTorch's shapes promise it, and -inf
for a query that sees no key; such a query gives 0. num_splits=1, values of another width than keys,
and arguments of other versions of PyTorch raise NotImplementedError.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import operators as ops
from ..call.backends import CPU, Request
from ..call.problem import check_dtype, check_shape, precision_number
from ..errors import ArgumentValueError, argument_error, wrong_value
from ..operators.arguments import BOTTOM_RIGHT_ONLY, Arguments

_NO_WINDOW = (-1, -1)


def _varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: list[int] | None = None,
    enable_gqa: bool = False,  # varlen_attn checks the numbers of heads
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if num_splits == 1:
        raise NotImplementedError(
            "varlen_attn: num_splits=1, results that do not depend on the other sequences of the "
            "batch, is not built on a CPU; other values change nothing"
        )
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table)
    arguments = _arguments(query, value, is_causal, scale, window_size, *lengths)
    out, lse = ops.forward(query, key, value, *arguments)
    random_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # unused
    return _in_memory_like(query, out), lse.float(), random_state


def _varlen_attn_out(out: Tensor, query: Tensor, **call: Any) -> Tensor:
    check_dtype("out", out, query.dtype)
    check_shape("out", out, "that of query", tuple(query.shape))
    result, lse, _ = _varlen_attn(query, **call)
    out.copy_(result)
    return lse


def _varlen_attn_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (cu_seq_q, cu_seq_k, max_q, max_k)
    arguments = _arguments(query, value, is_causal, scale, window_size, *lengths)
    if query.dtype == torch.float64:  # the float32 lse of the forward has too few digits
        out, lse = ops.forward(query, key, value, *arguments)
    gradients = ops.backward(grad_out, None, query, key, value, out, lse, *arguments)
    dq, dk, dv = map(_in_memory_like, (query, key, value), gradients)
    return dq, dk, dv


def _arguments(
    query: Tensor,
    value: Tensor,
    is_causal: bool,
    scale: float | None,
    window_size: list[int] | None,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Arguments:
    head_dim = query.shape[-1]
    reasons = CPU.refuses(Request(query.device, query.dtype, {"query": head_dim}))
    if value.shape[-1] != head_dim:  # out would not have the shape that PyTorch promises
        reasons.append(f"value's head_dim {value.shape[-1]}: only query's {head_dim}")
    if reasons:
        raise NotImplementedError(f"varlen_attn: {'; '.join(reasons)}")
    window = _NO_WINDOW if window_size is None else window_size
    if len(window) != 2 or min(window) < -1:
        wrong_value("window_size", "(left, right) in tokens, each an int >= -1", window)
    for name, longest in (("max_q", max_q), ("max_k", max_k)):
        if longest < 0:
            wrong_value(name, "an int >= 0", longest)
    return Arguments(
        scale=head_dim**-0.5 if scale is None else scale,
        causal=BOTTOM_RIGHT_ONLY,
        window_left=window[0],
        window_right=0 if is_causal else window[1],
        precision=precision_number(None, query.dtype),
        cu_seqlens_q=cu_seq_q,
        cu_seqlens_k=cu_seq_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        seqused_k=seqused_k,
        block_table=block_table,
    )


def _in_memory_like(x: Tensor, result: Tensor) -> Tensor:
    """Returns `result` with the strides of empty_like(x), which PyTorch's fake kernels promise."""
    strides = torch.empty_like(x, device="meta").stride()
    return result if result.stride() == strides else torch.empty_like(x).copy_(result)


# -- Registration ------------------------------------------------------------------------

_KERNELS: dict[str, Callable[..., Any]] = {
    "_varlen_attn": _varlen_attn,
    "_varlen_attn_out": _varlen_attn_out,
    "_varlen_attn_backward": _varlen_attn_backward,
}
_BUILT = {name for kernel in _KERNELS.values() for name in inspect.signature(kernel).parameters}


def _by_name(name: str) -> Callable[..., Any]:
    """Returns the kernel of an operator. It passes the arguments on by name, because versions of
    PyTorch differ in their order and number."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        op = getattr(torch.ops.torch_attn, name).default
        call = ops.arguments(op, args, kwargs)
        for unknown in call.keys() - _BUILT:
            if call.pop(unknown) is not None:
                raise NotImplementedError(f"varlen_attn: {unknown} is not built on a CPU")
        try:
            return _KERNELS[name](**call)
        except RuntimeError as error:
            refusal = argument_error(error)
            if refusal is error:
                raise
            message = str(refusal).replace("cu_seqlens_", "cu_seq_").replace("max_seqlen_", "max_")
            raise ArgumentValueError(message) from None

    return kernel


_library = torch.library.Library("torch_attn", "IMPL")
for _name in _KERNELS:
    _library.impl(_name, _by_name(_name), "CPU")

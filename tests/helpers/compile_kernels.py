"""Compiles Triton kernels ahead of time, without a GPU, as the JIT would for a call.

`measured(request)` returns figures of the compiled code: registers, spills, shared memory,
instructions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import main_loop
from compile_launch import CompiledLaunch, compile_launch

# Patterns that are counted in the assembly.
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]\.shared",
    "tma": r"\bcp\.async\.bulk\.tensor",
    "mfma": r"\bv_mfma",
    "tf32": r"\.tf32\.",
}


@dataclass(frozen=True)
class Request:
    """One compilation: a kernel for a target, and the call that it serves."""

    target: str  # a key of tiles.ARCHS
    kernel: str  # the name of the function
    dtype: str = "float16"
    D: int = 64
    Dv: int = 0  # 0: D
    Hkv: int = 4  # of 4 query heads
    Sq: int = 1024
    Sk: int = 1024
    causal: int = 0
    window: tuple[int, int] = (-1, -1)
    mask: str = ""  # a broadcast shape such as "B1QK"
    bias: str = ""
    key_padding: bool = False
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    scale: float = 0.125
    precision: int = 0
    packed: bool = False
    used: bool = False  # seqused_k
    page_size: int = 0
    weights: bool = False  # returned, with a gradient


def launches(request: Request) -> list[Any]:
    """Returns the launches of such a call, made from tensors without memory."""
    import torch

    from fused_attention.kernels import launch, operators, tiles
    from fused_attention.kernels.primitives import SoftmaxState
    from fused_attention.operators.arguments import Arguments

    arch, dtype = tiles.ARCHS[request.target], getattr(torch, request.dtype)
    B, Hq, D, Dv = 2, 4, request.D, request.Dv or request.D
    sizes = {"B": B, "H": Hq, "Q": request.Sq, "K": request.Sk, "1": 1}

    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def broadcast(letters: str, dtype: torch.dtype) -> torch.Tensor | None:
        return meta(*(sizes[x] for x in letters), dtype=dtype) if letters else None

    if "softmax" in request.kernel:
        x, columns = meta(B, Hq, request.Sq, request.Sk), request.Sk
        mask, bias = broadcast(request.mask, torch.bool), broadcast(request.bias, dtype)
        heads, rows = meta(Hq, dtype=torch.float32), meta(B * Hq * request.Sq, dtype=torch.float32)
        philox, p = meta(2, dtype=torch.int64), request.dropout_p
        sinks = heads if request.sinks else None
        call = launch.softmax_params(x.shape, request.scale, request.causal, sinks, philox, p)
        weights = x if p else None
        sink_weight = rows if request.sinks else None
        started = [
            launch.softmax_launch(x, x, weights, mask, bias, sink_weight, call),
            launch.softmax_backward_launch(x, x, x, rows, sink_weight, sink_weight, call),
            launch.softmax_dsinks_launch(rows, heads, call),
        ]
        if bias is not None:
            row_tiles = tiles.softmax_tiles(columns)
            work = launch.RowGroups.of(bias, x.shape, row_tiles.block)
            parts = meta(work.chunks, *bias.shape, dtype=torch.float32)
            started.append(launch.softmax_dbias_launch(x, x, rows, parts, work, call, row_tiles))
        return started
    if "kv_cache" in request.kernel:
        new, lengths = meta(B, Hq, request.Sq, D), meta(B, dtype=torch.int32)
        cache, table = meta(B, Hq, request.Sk, D), None
        if request.page_size:
            cache = meta(99, request.page_size, Hq, D).transpose(1, 2)
            table = meta(B, 9, dtype=torch.int32)
        return [launch.cache_append_launch(cache, cache, new, new, lengths, table)]
    lengths = meta(B + 1, dtype=torch.int32) if request.packed else None
    used = meta(B, dtype=torch.int32) if request.used else None
    layout = operators.Layout(request.packed)
    query, out, key, value = (
        layout.queries(meta(B * S, H, width) if request.packed else meta(B, H, S, width))
        for H, S, width in (
            *((Hq, request.Sq, D), (Hq, request.Sq, Dv)),
            *((request.Hkv, request.Sk, D), (request.Hkv, request.Sk, Dv)),
        )
    )
    table, users = None, (None, None)
    if request.page_size:
        key, value = (
            meta(99, request.page_size, request.Hkv, width).transpose(1, 2) for width in (D, Dv)
        )
        table = meta(B, request.Sk // request.page_size, dtype=torch.int32)
        users = (meta(99, dtype=torch.int64), meta(100, dtype=torch.int64))
    lse, heads = meta(*query.shape[:3], dtype=torch.float32), meta(Hq, dtype=torch.float32)
    bias = broadcast(request.bias, dtype)
    call = launch.describe(
        query,
        key,
        Arguments(
            request.scale,
            request.causal,
            *request.window,
            request.precision,
            mask=broadcast(request.mask, torch.bool),
            bias=bias,
            key_padding_mask=meta(B, request.Sk, dtype=torch.bool) if request.key_padding else None,
            alibi_slopes=heads if request.alibi else None,
            sinks=heads if request.sinks else None,
            philox=meta(2, dtype=torch.int64),
            softcap=request.softcap,
            dropout_p=request.dropout_p,
            cu_seqlens_q=lengths,
            cu_seqlens_k=lengths,
            seqused_k=used,
            block_table=table,
        ),
    )
    rest = (call, request.precision, arch)
    dsinks = heads if request.sinks else None
    started = []
    if request.weights:
        weights = meta(B, 1, request.Sq, request.Sk)
        started.append(launch.weights_launch(query, key, lse, weights, *rest))
        gradient = launch.weights_gradient(weights[:, 0], True, Hq)
        rest = (call._replace(weights=gradient), *rest[1:])
    splits = launch.decode_splits(B, Hq, request.Hkv, request.Sq, request.Sk, request.window)
    if splits == 0:
        started.append(launch.forward_launch(query, key, value, out, lse, *rest))
    else:
        acc = meta(splits, lse.numel(), Dv, dtype=torch.float32)
        partials = SoftmaxState(acc, lse, lse) if splits > 1 else None
        operands = (query, key, value, out, lse, splits, partials, request.Sq)
        started += launch.decode_launches(*operands, *rest)
    gradients = (query, key, value, dsinks)
    started += launch.backward_launches(
        query, key, value, out, out, lse, lse, lse, *gradients, *rest, users=users
    )
    if bias is not None:
        parts = meta(2, *bias.shape, dtype=torch.float32)
        started.append(launch.dbias_launch(query, key, value, out, lse, lse, parts, 2, *rest))
    if request.dropout_p:
        keep = meta(B, Hq, request.Sq, request.Sk, dtype=torch.bool)
        started.append(launch.keep_mask_launch(keep, call.dropout))
    return started


def compiled(request: Request) -> tuple[Any, CompiledLaunch]:
    """Returns the launch and its compiled code; raises RuntimeError if it does not compile."""
    one = next(x for x in launches(request) if x.kernel.fn.__name__ == request.kernel)
    return one, compile_launch(request.target, one)


def instruction_counts(assembly: str) -> dict[str, int]:
    return {name: len(re.findall(pattern, assembly)) for name, pattern in INSTRUCTIONS.items()}


def measured(request: Request) -> dict[str, Any]:
    """Returns figures of the kernel as the JIT would compile it at the launch.

    Raises RuntimeError if it does not compile.
    """
    one, code = compiled(request)
    is_amd = request.target.startswith("gfx")
    resources = (
        main_loop.gcn_resources(code.assembly) if is_amd else main_loop.resources(code.binary)
    )
    return {
        "shared": code.shared,
        "warps": one.num_warps,
        "tiles": {k: v for k, v in one.constants.items() if isinstance(v, int)},
        **resources,
        **instruction_counts(code.assembly),
    }

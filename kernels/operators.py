"""torch.ops.fused_attention.* for CUDA and HIP tensors: allocation, then the launches in order.

Arguments, results and memory formats are those of the operators of the CPU (operators.h) and of
their fake kernels (operators/fake.py). With TRITON_INTERPRET=1 these functions also take CPU
tensors, which is how the tests run them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import operators
from ..errors import ArgumentValueError, describe_error
from ..operators.arguments import DIFFERENTIABLE, INPUTS, Arguments
from ..operators.memory import has_shared_elements, share_memory
from . import launch
from .primitives import SoftmaxState
from .tiles import Arch, arch_of

HIGHEST = 0  # the precision of float32 products


def empty_like_format(like: Tensor, last: int) -> Tensor:
    """Returns an empty, dense [B, H, S, last] in the memory format of `like`, BSHD or BHSD."""
    batch, heads, seqlen, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty((batch, seqlen, heads, last)).transpose(1, 2)
    return like.new_empty((batch, heads, seqlen, last))


def is_dense(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def dense(x: Tensor) -> Tensor:
    """Returns x itself if its last stride is 1, else a contiguous copy."""
    return x if is_dense(x) else x.contiguous()


def copies(**tensors: Tensor) -> dict[str, Tensor]:
    """Returns the tensors that `dense` copies, as named buffers."""
    return {f"a copy of {name}": x for name, x in tensors.items() if not is_dense(x)}


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


# -- Attention -----------------------------------------------------------------------------


class Layout(NamedTuple):
    """How tokens lie: packed sequences are [T, H, D], pages [pages, page size, Hkv, D]."""

    packed: bool = False
    paged: bool = False

    @staticmethod
    def of(arguments: Arguments) -> Layout:
        return Layout(arguments.cu_seqlens_q is not None, arguments.block_table is not None)

    def queries(self, x: Tensor) -> Tensor:
        """Returns a view [B, H, S, D], packed [1, H, T, D]."""
        return x.transpose(0, 1).unsqueeze(0) if self.packed else x

    def keys(self, x: Tensor) -> Tensor:
        """Returns a view [B, H, S, D], packed [1, H, T, D], paged [pages, Hkv, page size, D]."""
        return x.transpose(1, 2) if self.paged else self.queries(x)

    def new(self, like: Tensor, last: int) -> Tensor:
        """Returns an empty tensor like `like`, except for its last size."""
        if self.packed:
            return like.new_empty((*like.shape[:-1], last))
        return empty_like_format(like, last)

    def new_keys(self, like: Tensor) -> Tensor:
        return like.new_empty(like.shape) if self.paged else self.new(like, like.shape[-1])


class Schedule(NamedTuple):
    """The launches of one call in order, its results, and its buffers by name, all allocated."""

    launches: list[launch.Launch]
    results: tuple[Tensor, ...]
    buffers: dict[str, Tensor]
    reason: str = ""  # why these kernels were chosen

    def run(self) -> None:
        for each in self.launches:
            each.run()


def schedule_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: Arguments,
    with_lse: bool,
    arch: Arch | None = None,
) -> Schedule:
    """Results: out and, if asked for, lse. arch: by default that of query's device."""
    layout = Layout.of(arguments)
    buffers = copies(query=query, key=key, value=value)
    result = layout.new(query, value.shape[-1])
    query, out = layout.queries(dense(query)), layout.queries(result)
    key, value = layout.keys(dense(key)), layout.keys(dense(value))
    lse = query.new_empty(query.shape[:-1], dtype=torch.float32) if with_lse else None
    call = launch.describe(query, key, arguments)
    arch = arch or arch_of(query.device)
    splits = launch.splits_of(call, key.shape[1], arguments)
    operands = (query, key, value, out, lse)
    if splits == 0:
        launches = [launch.forward_launch(*operands, call, arguments.precision, arch)]
    else:
        partials = None
        if splits > 1:
            sizes = (splits, out.shape[:-1].numel())
            acc = out.new_empty((*sizes, out.shape[-1]), dtype=torch.float32)
            row_max, row_sum = limits = out.new_empty((2, *sizes), dtype=torch.float32)
            buffers |= {"partial sums of the splits": acc, "maxima and sums of the splits": limits}
            partials = SoftmaxState(acc, row_max, row_sum)
        longest_q, _ = launch.longest_sequences(call, arguments)
        launches = launch.decode_launches(
            *operands, splits, partials, longest_q, call, arguments.precision, arch
        )
    reason = f"few queries a key head; its keys in {splits} splits" if splits else ""
    if lse is None:
        return Schedule(launches, (result,), buffers, reason)
    return Schedule(launches, (result, lse.squeeze(0) if layout.packed else lse), buffers, reason)


def _run_forward(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], with_lse: bool) -> Any:
    call = operators.arguments(op, args, kwargs)
    query, key, value = (call.pop(name) for name in INPUTS)
    plan = schedule_forward(query, key, value, Arguments(**call), with_lse)
    plan.run()
    return plan.results


def attention_forward_plain(*args: Any, **kwargs: Any) -> Tensor:
    return _run_forward(operators.forward_plain, args, kwargs, with_lse=False)[0]


def attention_forward_plain_lse(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(operators.forward_plain_lse, args, kwargs, with_lse=True)


def attention_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return _run_forward(operators.forward, args, kwargs, with_lse=True)


def schedule_backward(call: dict[str, Any], arch: Arch | None = None) -> Schedule:
    """call: the arguments of attention_backward by name. Results: its results, in order."""
    arguments = Arguments(**{name: call[name] for name in Arguments._fields})
    query, key, value = call["query"], call["key"], call["value"]
    lse, grad_lse = call["lse"], call["grad_lse"]
    layout = Layout.of(arguments)
    grad_query = layout.new(query, query.shape[-1])
    grad_key, grad_value = layout.new_keys(key), layout.new_keys(value)
    dq, dk, dv = layout.queries(grad_query), layout.keys(grad_key), layout.keys(grad_value)
    query, out, grad_out = (
        layout.queries(dense(x)) for x in (query, call["out"], call["grad_out"])
    )
    key, value = layout.keys(dense(key)), layout.keys(dense(value))
    if layout.packed:
        lse = lse.unsqueeze(0)
        grad_lse = None if grad_lse is None else grad_lse.unsqueeze(0)
    described = launch.describe(query, key, arguments)
    weights = launch.weights_gradient(call["grad_weights"], call["average_weights"], described.Hq)
    described = described._replace(weights=weights)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    buffers = copies(query=call["query"], key=call["key"], value=call["value"])
    buffers["delta"] = delta
    dsinks, dbias = lse.new_empty(0), query.new_empty(0)
    if call["sinks_grad"]:
        assert arguments.sinks is not None
        dsinks = lse.new_zeros(arguments.sinks.shape)
    arch = arch or arch_of(query.device)
    users = page_users(described)
    if users[0] is not None:
        buffers |= {"users of the pages": users[0], "first users of the pages": users[1]}
    launches = launch.backward_launches(
        query, key, value, out, grad_out, grad_lse, lse, delta, dq, dk, dv,
        dsinks if call["sinks_grad"] else None, described, arguments.precision, arch, users=users,
    )  # fmt: skip
    if call["bias_grad"]:
        bias = arguments.bias
        assert bias is not None
        dbias = bias.new_empty(bias.shape)
        operands = (query, key, value, grad_out, lse, delta)
        of_bias = _schedule_bias_gradient(dbias, *operands, described, arguments.precision, arch)
        launches, buffers = launches + of_bias.launches, buffers | of_bias.buffers
    return Schedule(launches, (grad_query, grad_key, grad_value, dbias, dsinks), buffers)


def attention_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    plan = schedule_backward(operators.arguments(operators.backward, args, kwargs))
    plan.run()
    parts = plan.buffers.get("parts of the bias' gradient")
    if parts is not None:
        dbias = plan.results[DIFFERENTIABLE.index("bias")]
        dbias.copy_(parts.sum(0))
    return plan.results


def page_users(call: launch.AttentionParams) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Returns the entries b * (pages of a sequence) + n of the table, sorted by page, those in use
    first, and where the entries of each page begin: int64 [entries], [pages + 1]."""
    if call.pages is None:
        return None, None
    table, size, count = call.pages.table, call.pages.size, call.pages.count
    first_key = torch.arange(table.shape[1], device=table.device) * size
    used = first_key.new_full((call.B,), call.Sk)
    if call.seqused_k is not None:
        used = call.seqused_k
    elif call.cu_seqlens_k is not None:
        used = call.cu_seqlens_k.diff()
    in_use = first_key < used.unsqueeze(1)
    pages = torch.where(in_use, table.clamp(0, count - 1), count).flatten()
    pages, users = pages.sort(stable=True)
    every = torch.arange(count + 1, device=table.device, dtype=pages.dtype)
    return users, torch.searchsorted(pages, every)


def _schedule_bias_gradient(
    dbias: Tensor, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, lse: Tensor,
    delta: Tensor, call: launch.AttentionParams, precision: int, arch: Arch,
) -> Schedule:  # fmt: skip
    B, Hq, Sq, D = query.shape
    Sk = call.Sk
    if B * Hq * Sq * Sk == 0:
        dbias.zero_()
        return Schedule([], (dbias,), {})
    head_dim = max(D, value.shape[-1])
    tiles = launch.attention_tiles("dq", arch, query.dtype, head_dim, per_score=True)
    blocks = (launch.ceil_div(Sq, tiles.block_m), launch.ceil_div(Sk, tiles.block_n))
    chunks = launch.BiasGradient.of(dbias.shape, B, Hq, *blocks).chunks
    parts, buffers = dbias, {}
    if chunks > 1:
        parts = dbias.new_empty((chunks, *dbias.shape), dtype=torch.float32)
        buffers = {"parts of the bias' gradient": parts}
    operands = (query, key, value, grad_out, lse, delta, parts, chunks, call, precision, arch)
    return Schedule([launch.dbias_launch(*operands, tiles)], (dbias,), buffers)


def schedule_weights(call: dict[str, Any], arch: Arch | None = None) -> Schedule:
    """call: the arguments of attention_weights by name."""
    given = {name: call[name] for name in Arguments._fields if name in call}
    arguments = Arguments(**given)
    query, key, average = dense(call["query"]), dense(call["key"]), call["average"]
    described = launch.describe(query, key, arguments)
    shape = (described.B, 1 if average else described.Hq, described.Sq, described.Sk)
    weights = query.new_empty(shape)
    result = weights.squeeze(1) if average else weights
    if described.Hq == 0:
        weights.zero_()
        return Schedule([], (result,), {})
    operands = (query, key, call["lse"].contiguous(), weights, described)
    arch = arch or arch_of(query.device)
    each = launch.weights_launch(*operands, HIGHEST, arch)
    return Schedule([each], (result,), {})


def attention_weights(*args: Any, **kwargs: Any) -> Tensor:
    plan = schedule_weights(operators.arguments(operators.weights, args, kwargs))
    plan.run()
    return plan.results[0]


def dropout_keep_mask(
    philox: Tensor, dropout_p: float, batch: int, heads: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    keep = torch.ones((batch, heads, seqlen_q, seqlen_k), dtype=torch.bool, device=philox.device)
    if dropout_p > 0.0 and keep.numel():
        launch.keep_mask_launch(keep, launch.dropout_of(dropout_p, philox)).run()
    return keep


def kv_cache_append_(
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor,
    value: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
) -> None:
    for name, x in (("key_cache", key_cache), ("value_cache", value_cache)):
        if has_shared_elements(x):
            expected, got = "memory of its own for each element", "overlapping strides"
            raise ArgumentValueError(describe_error(name, expected, got))
    if share_memory(key_cache, value_cache):
        expected = "memory apart from key_cache's"
        raise ArgumentValueError(describe_error("value_cache", expected, "a view of the same"))

    def apart(x: Any) -> Any:
        """Returns x, copied if it shares memory with a cache, which is overwritten."""
        shared = x is not None and (share_memory(x, key_cache) or share_memory(x, value_cache))
        return x.clone() if shared else x

    key, value, cache_seqlens, block_table = map(apart, (key, value, cache_seqlens, block_table))
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[key.dtype.itemsize]
    caches = [Layout(paged=block_table is not None).keys(x) for x in (key_cache, value_cache)]
    tensors = (x.view(bits) for x in (*caches, key, value))
    launch.cache_append_launch(*tensors, *map(contiguous, (cache_seqlens, block_table))).run()


# -- Masked softmax ------------------------------------------------------------------------


def _two_dimensional(x: Tensor) -> Tensor:
    return x if x.dim() > 1 else x.unsqueeze(0)


def masked_softmax_forward(
    input: Tensor,
    scale: float,
    causal: int,
    save: bool,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    out = torch.empty_like(input, memory_format=torch.contiguous_format)
    save_weights, save_sinks = save and dropout_p > 0.0, save and sinks is not None
    weights = torch.empty_like(out) if save_weights else out.new_empty(0)
    sink_weight = out.new_empty(out.shape[:-1] if save_sinks else 0, dtype=torch.float32)
    rows = _two_dimensional(input)
    call = launch.softmax_params(rows.shape, scale, causal, sinks, philox, dropout_p)
    launch.softmax_launch(
        rows,
        _two_dimensional(out),
        weights if save_weights else None,
        mask,
        bias,
        sink_weight if save_sinks else None,
        call,
    ).run()
    return out, weights, sink_weight


def masked_softmax_(
    input: Tensor,
    scale: float,
    causal: int,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
) -> None:
    if has_shared_elements(input):
        expected = "memory of its own for each element"
        raise ArgumentValueError(describe_error("input", expected, "overlapping strides"))
    for name, x in (("mask", mask), ("bias", bias), ("sinks", sinks), ("philox", philox)):
        if x is not None and share_memory(input, x):
            expected = "memory apart from input's, which is overwritten"
            raise ArgumentValueError(describe_error(name, expected, "a view of the same"))
    rows = _two_dimensional(input)
    call = launch.softmax_params(rows.shape, scale, causal, sinks, philox, dropout_p)
    launch.softmax_launch(rows, rows, None, mask, bias, None, call).run()


def masked_softmax_backward(
    grad_out: Tensor,
    weights: Tensor,
    scale: float,
    causal: int,
    bias: Tensor | None = None,
    sink_weight: Tensor | None = None,
    philox: Tensor | None = None,
    dropout_p: float = 0.0,
    bias_grad: bool = False,
    sinks_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(weights, memory_format=torch.contiguous_format)
    rows, grads = _two_dimensional(weights), _two_dimensional(grad_out)
    call = launch.softmax_params(rows.shape, scale, causal, None, philox, dropout_p)
    count = call.rows if rows.numel() else 0
    delta = dx.new_empty(count, dtype=torch.float32) if bias_grad else None
    terms = dx.new_empty(count, dtype=torch.float32) if sinks_grad else None
    launch.softmax_backward_launch(
        rows, grads, _two_dimensional(dx), delta, sink_weight, terms, call
    ).run()
    dbias, dsinks = dx.new_empty(0), dx.new_empty(0, dtype=torch.float32)
    if terms is not None:
        dsinks = dx.new_zeros(call.heads, dtype=torch.float32)
        if rows.numel():
            launch.softmax_dsinks_launch(terms, dsinks, call).run()
    if delta is not None:
        assert bias is not None
        dbias = bias.new_zeros(bias.shape)
        if rows.numel():
            sizes = launch.softmax_tiles(call.columns)
            work = launch.RowGroups.of(bias, rows.shape, sizes.block)
            several = work.chunks > 1
            parts = dbias
            if several:
                parts = dx.new_empty((work.chunks, *bias.shape), dtype=torch.float32)
            launch.softmax_dbias_launch(rows, grads, delta, parts, work, call, sizes).run()
            dbias = parts.sum(0).to(bias.dtype) if several else dbias
    return dx, dbias, dsinks

"""`attention_statistics`: what is asked about the attention weights, without holding them.

    mass_j = Σ_i w_ij    entropy_i = -Σ_j w_ij log w_ij    top_i = the largest w_ij and their keys j

The weights w are those of `attention_weights`. Each follows from the lse of the fused forward alone
(Dao 2023, FlashAttention-2, Alg. 2), so a tile (on a GPU a block of queries) is computed, reduced
and forgotten. The gradient of the mass is a gradient of the weights that all rows share:
attention's backward takes it with stride 0. Memory beyond inputs and results is O(B·Hq·(Sq + Sk)),
forward and backward; time is O(B·Hq·Sq·Sk·D).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import pad

from . import operators as ops
from .attention_weights import no_value, read_call, weights_by_reference
from .call.backends import REFERENCE, Backend, choose
from .call.problem import Problem, arguments_of
from .derivatives import autograd
from .derivatives.tangents import attention_gradients
from .errors import argument_error, wrong_type, wrong_value
from .operators._torch import check_transforms, is_compiling, is_tracing
from .operators.arguments import BOTTOM_RIGHT_ONLY, CAUSAL, Arguments, split
from .operators.handles import library
from .operators.traced import signature_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .call.options import Keywords

OUTPUTS = ("mass", "entropy", "top")
# On a GPU: the weights in a block, unless that would be fewer rows of each head than MIN_ROWS.
BLOCK_ELEMENTS = 1 << 24
MIN_ROWS = 32


class Statistics(NamedTuple):
    """What `attention_statistics` returns; None is what was not asked for."""

    mass: Tensor | None
    entropy: Tensor | None
    top_weights: Tensor | None
    top_keys: Tensor | None


def attention_statistics(
    query: Tensor,
    key: Tensor,
    *,
    outputs: Sequence[str] = OUTPUTS,
    num_top: int = 8,
    **options: Unpack[Keywords],
) -> Statistics:
    """Returns statistics of `attention_weights(query, key, **options)` in linear memory.

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D] and the options as in `attention`. The result is a
    NamedTuple; a field that `outputs` does not ask for is None. Numbers are float32 (float64 for
    float64), also for 16-bit inputs, whose weights are never rounded to 16 bits.

    mass: [B, Hq, Sk], the sum of the weights of each key over all queries; differentiable once with
        respect to query, key, bias and sinks.
    entropy: [B, Hq, Sq], -Σ_j w_ij log w_ij in nats: log n for n keys of equal weight. Sinks have
        no term of their own.
    top_weights, top_keys (outputs has "top"): [B, Hq, Sq, num_top], the largest weights of each
        query in falling order, and the numbers of their keys, int64. A place without a weight above
        0 holds weight 0 and key -1. The order of keys of equal weight is not specified.

    Packed sequences (cu_seqlens_q): entropy is [Hq, Tq], the top fields are [Hq, Tq, num_top], and
    mass is [Hq, Tk]. With block_table mass is [B, Hq, max_pages · page_size]. Keys are numbered
    within their sequence. Tokens of no sequence and keys not in use have mass and entropy 0. The
    lengths are read on the host, and sequences are served one after another.

    A row that sees no key has mass, entropy and top weights 0; with sinks, weights sum to less than
    1. dropout_p applies to the weights, as in `attention_weights`. NaN that a row sees is in all of
    its weights. Deterministic, for any number of threads. Entropy and top fields never require a
    gradient. In 16 bits the gradient of mass is rounded to query's dtype.

    Raises as `attention` does; ArgumentValueError for unknown outputs or num_top < 1.
    """
    asked = _asked(outputs, num_top)
    query, key, given, backend = read_call("attention_statistics", query, key, options)
    value = no_value(key)
    problem = Problem.from_call(query, key, value, given)
    dense = dataclasses.replace(problem, features=problem.features - _PACKED)
    row = choose(dense, backend, task="attention_weights")
    try:
        said = arguments_of(query, key, split(problem.numbers)[1], given)
        if not problem.features.isdisjoint(_PACKED):
            ops.check_sequences(query, key, *said)
    except RuntimeError as error:
        raise argument_error(error) from None
    call = Call(query, key, Arguments(*said))
    if problem.features.isdisjoint(_PACKED):
        results = _serve(call, asked, dense, row)
    else:
        results = _serve_sequences(call, asked, dense, row)
    mass, entropy, weights, keys = results
    return Statistics(
        mass if asked.mass else None,
        entropy if asked.entropy else None,
        *((weights, keys) if asked.num_top else (None, None)),
    )


_PACKED = frozenset({"varlen", "seqused_k", "block_table"})
Results = tuple[Tensor, Tensor, Tensor, Tensor]  # mass, entropy, top weights, top keys


class Asked(NamedTuple):
    """What was asked for; num_top is 0 without "top". Other results have no element."""

    mass: bool
    entropy: bool
    num_top: int


class Call(NamedTuple):
    query: Tensor
    key: Tensor
    arguments: Arguments


def _asked(outputs: Any, num_top: Any) -> Asked:
    expected = f"names out of {', '.join(OUTPUTS)}"
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        wrong_type("outputs", expected, repr(outputs), f"a tuple, as in outputs={OUTPUTS[:1]}")
    if not outputs or not all(name in OUTPUTS for name in outputs):
        wrong_value("outputs", expected, repr(outputs))
    if isinstance(num_top, bool) or not isinstance(num_top, int):
        wrong_type("num_top", "an int", type(num_top).__name__)
    if num_top < 1:
        wrong_value("num_top", "an int >= 1", num_top)
    return Asked("mass" in outputs, "entropy" in outputs, num_top if "top" in outputs else 0)


# -- One dense call ----------------------------------------------------------------------


def _serve(call: Call, asked: Asked, problem: Problem, row: Backend) -> Results:
    if row is REFERENCE:
        return _by_reference(call, asked)
    *_, mass, entropy, weights, keys = _function(problem)(
        asked, call.query, call.key, no_value(call.key), *call.arguments
    )
    return mass, entropy, weights, keys


def _function(problem: Problem) -> Callable[..., Any]:
    """Chooses the function that maps the inputs of `WithStatistics` to its results."""
    check_transforms("attention_statistics")
    if is_tracing():
        return traced_statistics
    if not problem.differentiable:
        return forward_with_statistics
    if is_compiling():
        return lambda *inputs: WithStatistics.apply(*autograd.distinct(inputs))
    return WithStatisticsForwardMode.apply


def _by_reference(call: Call, asked: Asked) -> Results:
    """Reduces the whole weights of the reference, which autograd differentiates."""
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query, key = call.query.to(dtype), call.key.to(dtype)
    _, p = weights_by_reference(query, key, no_value(key), False, call.arguments)
    results = _no_results(query, key, asked, dtype)
    mass = p.sum(2) if asked.mass else results[0]
    p = p.detach()
    entropy = torch.special.entr(p).sum(-1) if asked.entropy else results[1]
    return mass, entropy, *(_top(p, asked.num_top) if asked.num_top else results[2:])


class WithStatistics(Function):
    """Computes (out, lse, mass, entropy, top weights, top keys), of which the mass alone is
    differentiable. Inputs: an `Asked`, then those of `Attention`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(asked: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
        return forward_with_statistics(asked, *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out, lse, mass, *rest = output
        autograd.AttentionWithWeights.setup_context(ctx, (False, *inputs[1:]), (out, lse, mass))
        ctx.mark_non_differentiable(out, lse, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> autograd.Gradients:
        dw = grads[2]
        if dw is not None:
            query, key = ctx.saved_tensors[2:4]
            B, Hq, Sq, _ = query.shape
            dw = dw.to(query.dtype).unsqueeze(2).expand(B, Hq, Sq, key.shape[2])
        # Dynamo does not trace the backward of another Function.
        needs = ctx.needs_input_grad[1:]  # without `asked`
        return None, *autograd.input_gradients(attention_gradients, ctx, needs, (None, None, dw))


class WithStatisticsForwardMode(WithStatistics):
    """`WithStatistics` where forward mode may be on, which raises."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError("attention_statistics: forward mode is not built")


def forward_with_statistics(asked: Sequence[int], *inputs: Any) -> tuple[Tensor, ...]:
    """Returns (out, lse, mass, entropy, top weights, top keys), without gradients."""
    query, key, value, *said = inputs
    arguments = Arguments(*said)
    out, lse = ops.forward(query, key, value, *arguments._replace(philox=None, dropout_p=0.0))
    mass, entropy, num_top = asked
    return (
        out,
        lse,
        *ops.statistics(query, key, lse, bool(mass), bool(entropy), num_top, *arguments),
    )


# -- The operator on a GPU: blocks of queries ----------------------------------------------


def _no_results(query: Tensor, key: Tensor, asked: Asked, dtype: torch.dtype) -> Results:
    """Returns the results for no query: zeros, and no top keys."""
    B, Hq, Sq, _ = query.shape
    mass = query.new_zeros((B, Hq, key.shape[2]) if asked.mass else (B, 0), dtype=dtype)
    entropy = query.new_zeros((B, Hq, Sq) if asked.entropy else (B, 0), dtype=dtype)
    weights = query.new_zeros((B, Hq, Sq, asked.num_top), dtype=dtype)
    return mass, entropy, weights, torch.full_like(weights, -1, dtype=torch.long)


def statistics_by_blocks(
    query: Tensor, key: Tensor, lse: Tensor, mass: bool, entropy: bool, num_top: int, *said: Any
) -> Results:
    """Computes and reduces a block of queries at a time, by the operator attention_weights."""
    asked, arguments = Asked(mass, entropy, num_top), Arguments(*said)
    results = _no_results(query, key, asked, lse.dtype)
    B, Hq, Sq, _ = query.shape
    call = Call(query, key.to(lse.dtype), arguments)
    sums = torch.zeros_like(results[0], dtype=torch.float64)
    size = BLOCK_ELEMENTS // max(1, B * Hq * key.shape[2])
    for begin, end in blocks(Sq if key.shape[2] else 0, max(MIN_ROWS, size)):
        p = rows_of_weights(call, lse, begin, end)
        if num_top:
            results[2][:, :, begin:end], results[3][:, :, begin:end] = _top(p, num_top)
        if entropy:
            results[1][:, :, begin:end] = _add_up(torch.special.entr(p), 3)
        if mass:
            sums += _add_up(p, 2)
    return sums.to(lse.dtype), *results[1:]


def blocks(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of blocks of at most `size` out of `count`."""
    for begin in range(0, count, size):
        yield begin, min(begin + size, count)


def rows_of_weights(
    call: Call, lse: Tensor, begin: int, end: int, row: Backend | None = None
) -> Tensor:
    """Returns the weights of queries [begin, end) of a dense call, in the dtype of its lse.

    row: REFERENCE, or one that has kernels.
    """
    query, key, a = call
    Sq, Sk = query.shape[2], key.shape[2]

    def part(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.shape[2] == 1 else x[:, :, begin:end]

    # These rows are a call of their own, whose diagonal is moved from its top left.
    off = Sk - Sq if a.causal in (CAUSAL["bottom_right"], BOTTOM_RIGHT_ONLY) else 0
    is_causal = a.causal in (CAUSAL["top_left"], CAUSAL["bottom_right"])
    rows = a._replace(
        causal=CAUSAL["top_left"] if is_causal else CAUSAL[False],
        mask=part(a.mask),
        bias=part(a.bias),
        q_start=begin + max(off, 0),
        k_start=max(-off, 0),
        philox=None,
        dropout_p=0.0,
    )
    q, k = (x.to(lse.dtype) for x in (query[:, :, begin:end], key))
    if row is REFERENCE:
        _, p = weights_by_reference(q, k, no_value(k), False, rows)
    else:
        p = ops.weights(q, k, lse[:, :, begin:end], False, *rows)
    if a.dropout_p:  # its bits are numbered by row and column, which the moved diagonal shifts
        from .reference import dropout

        assert a.philox is not None
        p = dropout(p, a.dropout_p, a.philox, q_start=begin, head_start=a.head_start)
    return p


def _top(p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    weights, keys = p.topk(min(count, p.shape[-1]))
    missing = (0, count - keys.shape[-1])
    return pad(weights, missing), pad(keys.masked_fill(weights == 0, -1), missing, value=-1)


def _add_up(x: Tensor, dim: int) -> Tensor:
    """Returns the sum along a dimension that has elements, and overwrites x.

    The order of additions depends on the size alone. That of torch.sum depends on the threads.
    """
    count = x.shape[dim]
    while count > 1:
        half = count // 2
        x.narrow(dim, 0, half).add_(x.narrow(dim, count - half, half))
        count -= half
    return x.select(dim, 0)


library.impl("attention_statistics", statistics_by_blocks, "CUDA")

traced_statistics = ops.define_traced(
    "attention_statistics",
    signature_of(ops.forward)
    .replace("(", "(int[] asked, ", 1)
    .replace("-> (Tensor, Tensor)", "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"),
    forward_with_statistics,
    WithStatistics,
    ops.arguments(ops.forward, (), {}),
)


# -- Sequences: packed, in pages, or with keys that are not in use -------------------------------


def _serve_sequences(call: Call, asked: Asked, problem: Problem, row: Backend) -> Results:
    """Serves each sequence as a dense call of its own, and joins the results."""
    query, key, a = call
    packed = a.cu_seqlens_q is not None
    keys_packed = packed and a.block_table is None
    *queries, rest_of_queries = _sequences_of(query, a.cu_seqlens_q)
    keys, rooms, rest = _keys_of(key, a, len(queries))
    alone = a._replace(
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        seqused_k=None,
        block_table=None,
    )
    parts = []
    for b, (q, k) in enumerate(zip(queries, keys, strict=True)):
        own = _options_of(alone, b, q.shape[1], k.shape[2])
        mass, *of_rows = _serve(Call(q, k, own), asked, problem, row)
        parts.append((pad(mass, (0, rooms[b] - k.shape[2])) if asked.mass else mass, *of_rows))
    like = torch.promote_types(query.dtype, torch.float32)
    # Tokens of no sequence. If there are none, these are no sequences, which have shapes.
    rest_of_keys = key.new_empty((int(keys_packed), 1, rest, 1))
    of_rest = _no_results(rest_of_queries, rest_of_keys, asked, like)
    no_mass = of_rest[0].new_zeros(int(keys_packed), query.shape[1], rest)
    masses, entropies, weights, numbers = zip(*parts, of_rest, strict=True)

    def join(along_tokens: bool, pieces: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(pieces), 2)[0] if along_tokens else torch.cat(tuple(pieces))

    return (
        join(keys_packed, [*masses[:-1], no_mass]) if asked.mass else no_mass,
        join(packed, entropies) if asked.entropy else of_rest[1],
        join(packed, weights),
        join(packed, numbers),
    )


def _sequences_of(x: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
    """Returns [1, H, S, D] of each sequence, and of the tokens of none ([0, H, S, D] if dense)."""
    if cu_seqlens is None:
        return [*(x.split(1) if len(x) else ()), x[:0]]
    lengths = cu_seqlens.diff().tolist()
    pieces = x.split([*lengths, len(x) - sum(lengths)])
    return [piece.transpose(0, 1).unsqueeze(0) for piece in pieces]


def _keys_of(key: Tensor, a: Arguments, batch: int) -> tuple[list[Tensor], list[int], int]:
    """Returns the keys in use [1, Hkv, S, D] of each sequence, how many it has room for, and the
    number of packed keys that belong to none, or else the room of one."""
    used = a.seqused_k
    if a.block_table is not None:
        table, page_size = a.block_table, key.shape[1]
        room = table.shape[1] * page_size
        if used is None and a.cu_seqlens_k is not None:
            used = a.cu_seqlens_k.diff()
        lengths = [room] * batch if used is None else used.tolist()
        counts = [-(-n // page_size) for n in lengths]
        pages = [table[b, :count] for b, count in enumerate(counts)]
        # All pages are gathered at once, for one scatter in the backward.
        gathered = key[torch.cat([table.new_empty(0), *pages]).long()].split(counts)
        sequences = [x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in gathered]
        rooms, rest = [room] * batch, room
    else:
        *sequences, rest_of_keys = _sequences_of(key, a.cu_seqlens_k)
        rooms, rest = [x.shape[2] for x in sequences], rest_of_keys.shape[2]
        lengths = rooms if used is None else used.tolist()
    return [x[:, :, :n] for x, n in zip(sequences, lengths, strict=True)], rooms, rest


def _options_of(a: Arguments, b: int, heads: int, count: int) -> Arguments:
    """Returns the options of sequence b, whose first `count` keys are in use."""

    def part(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        own = x if x.shape[0] == 1 else x[b : b + 1]
        return own if own.shape[-1] == 1 else own[..., :count]

    slopes = a.alibi_slopes
    return a._replace(
        mask=part(a.mask),
        bias=part(a.bias),
        key_padding_mask=part(a.key_padding_mask),
        alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b].contiguous(),
        head_start=b * heads,
    )

"""The public functions: they rename and reshape, describe the call, and hand it to a backend.

A call whose kind (shapes, dtypes, options, gradient mode) was seen before skips validation and
choice: `PLANS` remembers what serves it. Exact attention (Vaswani et al. 2017, section 3.2.1) in
tiles with an online softmax (Dao 2023, FlashAttention-2): time O(B·Hq·Sq·Sk·(D + Dv)), memory
O(B·Hq·Sq) beyond inputs and outputs on every backend but the reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention.bias import CausalBias, CausalVariant

from . import operators as ops
from .call.backends import LEFT, MAX_PLANS, PLANS, TRITON, choose, plan_of_kernel
from .call.problem import (
    DTYPES,
    Plan,
    Problem,
    as_4d,
    as_vector,
    cast_for_autocast,
    check_number,
    check_philox_seed,
    check_shape,
    check_tensor,
    looks_at_sizes,
    plain_sizes,
    shape_of,
    wrong_type,
    wrong_value,
)
from .errors import ArgumentTypeError, ArgumentValueError, argument_error, is_of_operator

# Bound once: looking these up costs as much as calling them.
_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_is_grad_enabled = torch.is_grad_enabled
_is_any_autocast_enabled = torch._C._is_any_autocast_enabled
_len_torch_function_stack = torch._C._len_torch_function_stack
_ORDINARY = frozenset({Tensor, torch.nn.Parameter})
_are_transforms_active = torch._C._are_functorch_transforms_active
_get_float32_matmul_precision = torch._C._get_float32_matmul_precision

_NO_WINDOW = (-1, -1)


# -- Plans -------------------------------------------------------------------------------


def _kind(
    query: Tensor, key: Tensor, value: Tensor, draws: bool, options: Any
) -> tuple[Any, ...] | None:
    """What a call has in common with others that the same plan serves: numbers and kinds only.

    None if a tuple cannot identify the call: unless `is_direct`, which this repeats, and while
    torch.jit.trace runs, where sizes are tensors. Not in it: strides, which the operators look at
    and no backend refuses; dtype, device and layout of key and value, which the operators compare
    with query's, unless the call `draws` random numbers before its operator could refuse it.
    """
    if (
        type(query) not in _ORDINARY
        or type(key) not in _ORDINARY
        or type(value) not in _ORDINARY
        or _are_transforms_active()
        or forward_ad._current_level >= 0
        or _len_torch_function_stack() != 0
        or _is_tracing()
    ):
        return None
    try:
        shapes = query.shape, key.shape, value.shape
    except RuntimeError:  # nested tensors have none
        return None
    try:
        precision = _get_float32_matmul_precision()
    except RuntimeError:  # see float32_matmul_precision
        precision = "highest"
    if draws:
        options += tuple((x.dtype, x.device, x.layout) for x in (key, value))
        options += (query.layout,)
    return (
        shapes,
        query.dtype,
        query.device,
        _is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        precision,
        options,
    )


def _kind_of_option(x: Any) -> Any:
    if isinstance(x, Tensor) and not x.is_nested:
        requires_grad = _is_grad_enabled() and x.requires_grad
        return type(x), x.shape, x.dtype, x.device, x.layout, requires_grad
    return type(x)


def _types(x: Any) -> Any:
    """Types belong into a kind beside values: 2 == 2.0 == True, but not all of them are valid."""
    return tuple(map(type, x)) if isinstance(x, tuple) else type(x)


def _make_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    backend: str,
    may_leave: bool = False,
    **options: Any,
) -> Plan:
    """Validates and chooses; LEFT instead of the reference, and of a refusal, if `may_leave`."""
    problem = Problem.from_call(query, key, value, **options)
    if may_leave:
        return plan_of_kernel(problem)
    make = choose(problem, backend).plan
    assert make is not None  # a row without one supports nothing
    return make(problem)


def _remember(kind: tuple[Any, ...] | None, plan: Plan) -> None:
    if kind is None or not plan.may_be_kept:
        return
    if len(PLANS) >= MAX_PLANS:
        PLANS.clear()
    PLANS[kind] = plan


def _may_be_refusal(error: RuntimeError) -> bool:
    """Whether an operator may have refused a call that was not validated, its kind being known.

    Validation then says it better. Everything else is the caller's own (hooks, modes, memory) and
    passes through as it is. Nothing is run again.
    """
    return is_of_operator(error) or isinstance(error, (ArgumentValueError, NotImplementedError))


def _run(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    philox_seed: int | Tensor | None = None,
    packed: tuple[Any, ...] = (),
) -> Any:
    if plan.is_plain:
        return plan.operator(query, key, value, *plan.numbers)
    softcap, dropout_p, max_seqlen_q, max_seqlen_k = plan.limits
    if packed:
        packed = (*packed[:2], max_seqlen_q, max_seqlen_k, *packed[2:])
        if dropout_p and not _is_compiling():
            ops.check_sequences(query, key, *packed)
    return plan.operator(
        query,
        key,
        value,
        *plan.numbers,
        as_4d(mask),
        as_4d(bias),
        key_padding_mask,
        as_vector(alibi_slopes, torch.float32),
        as_vector(sinks, torch.promote_types(query.dtype, torch.float32)),
        ops.philox_state(query, key, value, philox_seed) if dropout_p else None,
        softcap,
        dropout_p,
        *packed,
    )


# -- attention ---------------------------------------------------------------------------


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool | str = False,
    window_size: tuple[int, int] = _NO_WINDOW,
    scale: float | None = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    return_lse: bool = False,
    philox_seed: int | Tensor | None = None,
    precision: str | None = None,
    backend: str = "auto",
) -> Any:
    """softmax(scale · query keyᵀ + bias, over the visible keys) value, never holding the scores.

    Shapes: query [B, Hq, Sq, D], key [B, Hkv, Sk, D], value [B, Hkv, Sk, Dv], Hq a multiple of Hkv
    (query head h reads key head h // (Hq / Hkv)). One dtype out of float32, bfloat16, float16 and
    float64, one device, any strides (an input whose last stride is not 1 is copied). Returns out
    [B, Hq, Sq, Dv] in query's dtype and memory order (BHSD or BSHD); with return_lse (out, lse).

    mask: bool, broadcasts to [B, Hq, Sq, Sk], never expanded. True = may attend.
    bias: floating, broadcasts likewise, added to the scores; differentiable. Both may be given.
    key_padding_mask: bool [B, Sk]. True = padding, no query attends to it.
    causal: "top_left" (query i sees keys j <= i: scaled_dot_product_attention), "bottom_right"
        (j <= i + Sk - Sq: flash_attn, key/value caches), or True where Sq = Sk, so that they agree.
    window_size: (left, right) in tokens: i + off - left <= j <= i + off + right, where off is 0, or
        Sk - Sq for "bottom_right". -1 = no limit.
    scale: a number, default 1/sqrt(D).
    softcap: in logits, 0 = none: scores become softcap · tanh(scores / softcap), before the bias.
        2^96 and more (float64: 2^992) is none too.
    alibi_slopes: [Hq] or [B, Hq]: adds -slope · |i + off - j|. Not differentiable.
    sinks: [Hq] logits that take part in the denominator only; differentiable.
    dropout_p: probability in [0, 1], rounded to 1/65536, applied to the weights. Random bits follow
        torch.manual_seed, or philox_seed (an int, or an int64 tensor (seed, offset)); the same on
        every backend, and not those of torch's own dropout. `dropout_mask` gives the mask.
    cu_seqlens_q, cu_seqlens_k: int32 [B + 1], packed sequences: query [Tq, Hq, D], key
        [Tk, Hkv, D], value [Tk, Hkv, Dv], lse [Hq, Tq]. Sequence b is tokens cu[b] to cu[b + 1];
        those behind the last give 0 (lse: -inf). max_seqlen_q, max_seqlen_k: hints.
    seqused_k: int32 [B], only so many keys are used, and Sk in `off` is this length.
    block_table: int32 [B, max_pages]; key and value are pages [pages, page_size, Hkv, D or Dv] of
        any size then: key n of sequence b is row n % page_size of page block_table[b, n //
        page_size]. Numbers of pages past those in use may be anything. See `kv_cache_append_`.
    return_lse: also lse [B, Hq, Sq], float32 (float64 for float64): the natural logarithm of the
        denominator, sinks included; differentiable.
    precision: of float32 products, "highest", "high" or "medium"; None is
        torch.get_float32_matmul_precision().
    backend: "auto", or a name, which then never falls back. See `explain`.

    A row that sees no key gives 0 (lse: -inf, or its sink) and zero gradients. A key that no query
    of its batch and head sees influences nothing, whatever bits it holds. Under autocast query,
    key, value and bias are cast. Deterministic, for any number of threads. Differentiable twice and
    in forward mode on a CPU, unless sequences are packed.

    Raises ArgumentValueError (ValueError, RuntimeError) and ArgumentTypeError (TypeError,
    RuntimeError) for wrong arguments, NotImplementedError for what the named backend cannot serve.
    """
    compiling = _is_compiling()
    if compiling or _is_any_autocast_enabled():
        query, key, value, bias = cast_for_autocast(query, key, value, bias)
    is_dense = (
        cu_seqlens_q is None and cu_seqlens_k is None and seqused_k is None and block_table is None
    )
    tensors = (mask, bias, key_padding_mask, alibi_slopes, sinks, philox_seed)
    packed: tuple[Any, ...] = ()
    if not is_dense:
        packed = (cu_seqlens_q, cu_seqlens_k, seqused_k, block_table)
    kind = plan = None
    if not compiling:
        options: tuple[Any, ...] = (
            causal,
            type(causal),
            window_size,
            scale,
            type(scale),
            precision,
            backend,
        )
        if window_size is not _NO_WINDOW:
            options += (_types(window_size),)
        if (
            mask is not None
            or bias is not None
            or key_padding_mask is not None
            or alibi_slopes is not None
            or sinks is not None
            or return_lse
            or softcap != 0.0
            or dropout_p != 0.0
        ):
            options += (softcap, type(softcap), dropout_p, type(dropout_p), bool(return_lse))
            options += tuple(map(_kind_of_option, tensors))
        if not is_dense:
            options += (max_seqlen_q, type(max_seqlen_q), max_seqlen_k, type(max_seqlen_k))
            options += (cu_seqlens_q is cu_seqlens_k,)
            options += tuple(map(_kind_of_option, packed))
        kind = _kind(query, key, value, dropout_p != 0.0, options)
        try:
            plan = PLANS.get(kind)
        except TypeError:  # an unhashable option, say window_size=[1, 1]
            kind = None
    refusal = None
    if plan is not None:
        try:
            if plan.is_plain:
                return plan.operator(query, key, value, *plan.numbers)
            return _run(plan, query, key, value, *tensors, packed)
        except RuntimeError as error:
            if not _may_be_refusal(error):
                raise
            refusal = error
    plan = _make_plan(
        query,
        key,
        value,
        backend,
        mask=mask,
        bias=bias,
        key_padding_mask=key_padding_mask,
        causal=causal,
        window_size=window_size,
        scale=scale,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=max_seqlen_k,
        seqused_k=seqused_k,
        block_table=block_table,
        return_lse=return_lse,
        philox_seed=philox_seed,
        precision=precision,
    )
    if refusal is not None:
        raise argument_error(refusal)
    _remember(kind, plan)
    if compiling or is_dense:
        return _run(plan, query, key, value, *tensors, packed)
    try:  # lengths and pages are values, which only the operator sees
        return _run(plan, query, key, value, *tensors, packed)
    except RuntimeError as error:
        if is_of_operator(error):
            raise argument_error(error) from None
        raise


# -- scaled_dot_product_attention --------------------------------------------------------


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`: same arguments, meaning and errors.

    query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] -> [..., Hq, L, Ev], from two
    dimensions up; leading dimensions broadcast. Hq != H needs enable_gqa, unless H is 1.

    attn_mask: broadcasts to [..., Hq, L, S], from one dimension up, never expanded. bool: True =
        may attend. float32 or query's dtype: added to the scores, with a gradient. A `CausalBias`
        of torch.nn.attention.bias: causal, nothing is materialised.
    is_causal: top-left; RuntimeError together with attn_mask, as PyTorch documents.
    dropout_p: applied whenever it is not 0; torch.manual_seed decides, but other bits than
        PyTorch's.

    More than the original keeps: memory linear in L with dropout, a bias that needs its gradient,
    Ev != E, any rank and any mask. A row that sees no key gives 0; NaN in a query stays NaN.
    Raises what PyTorch raises (RuntimeError, TypeError), see `attention`.
    """
    return sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    original: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`scaled_dot_product_attention`; if `original` is given, it gets what no kernel here serves.

    `original` is what a patch replaced. Calls without a meaning here go there too: they may have
    one there, and if they have none, the error is the one that the caller knows.
    """
    q, k, v, mask, number = query, key, value, attn_mask, scale
    compiling = _is_compiling()
    if compiling or _is_any_autocast_enabled():
        q, k, v, mask = cast_for_autocast(q, k, v, mask)
    if number is not None and type(number) is not float:
        number = _scale_number(number)
    kind = plan = None
    if not compiling and (is_causal is False or is_causal is True):
        options: tuple[Any, ...] = (
            "sdpa",
            original is None,
            is_causal,
            number,
            type(number),
            enable_gqa,
        )
        if mask is not None or dropout_p != 0.0:
            options += (dropout_p, type(dropout_p), _kind_of_option(mask))
        kind = _kind(q, k, v, dropout_p != 0.0, options)
        try:
            plan = PLANS.get(kind)
        except TypeError:  # an unhashable option
            kind = None
    refusal = call = None
    if plan is not None and plan is not LEFT:
        try:
            if plan.is_plain:
                return plan.operator(q, k, v, *plan.numbers)
            return _run(plan, q, k, v, *_mask_and_bias(mask))
        except RuntimeError as error:
            if not _may_be_refusal(error):
                raise
            refusal = error
    if plan is None or refusal is not None:
        try:
            call = _describe_sdpa(q, k, v, mask, dropout_p, is_causal, number, enable_gqa)
            plan = _make_plan(*call.tensors, "auto", original is not None, **call.options)
        except (ArgumentValueError, ArgumentTypeError):
            if original is None:
                raise
            plan = LEFT
        else:
            if refusal is not None:
                raise argument_error(refusal)
            if call.is_as_given:
                _remember(kind, plan)
    if call is None or plan.is_left:
        assert original is not None
        inputs = (query, key, value, attn_mask, dropout_p, is_causal)
        return original(*inputs, scale=scale, enable_gqa=enable_gqa)
    if call.rank > 4:
        out = _with_leading(*call.tensors, call.leading, call.attn_mask, call.options)
        return out.unflatten(0, call.leading)
    out = _run(plan, *call.tensors, *_mask_and_bias(call.attn_mask))
    return out if call.rank == 4 else out[0] if call.rank == 3 else out[0, 0]


def _scale_number(scale: Any) -> Any:
    """As PyTorch's parser: a tensor without dimensions or a gradient stands for its value."""
    if isinstance(scale, Tensor):
        return scale if scale.dim() > 0 or scale.requires_grad else scale.item()
    return float(scale) if isinstance(scale, Real) and not isinstance(scale, int) else scale


class _SdpaCall(NamedTuple):
    """A valid call of `scaled_dot_product_attention` as `attention` takes it, but for the mask."""

    tensors: tuple[Tensor, Tensor, Tensor]  # [B, H, S, E]
    leading: tuple[int, ...]  # dimensions that B stands for
    attn_mask: Tensor | None
    options: dict[str, Any]
    rank: int
    is_as_given: bool


def _describe_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> _SdpaCall:
    _check_sdpa(query, key, value, is_causal, enable_gqa)
    causal: bool | str = "top_left" if is_causal else False
    is_causal_bias = isinstance(attn_mask, CausalBias)
    if isinstance(attn_mask, CausalBias):
        causal, attn_mask = _causal_of(attn_mask, query, key, is_causal), None
    elif attn_mask is not None:
        _check_attn_mask(attn_mask, query, is_causal)
    rank = max(query.dim(), key.dim(), value.dim())
    if attn_mask is not None and attn_mask.dim() > rank:
        wrong_value("attn_mask", f"at most {rank} dimensions", shape_of(attn_mask))
    options: dict[str, Any] = {"causal": causal, "scale": scale, "dropout_p": dropout_p}
    if rank <= 4:
        options["mask"], options["bias"] = _mask_and_bias(attn_mask)
    q, k, v, leading = _four_dimensional(query, key, value, enable_gqa)
    # The lengths of a CausalBias are not in the kind of a call.
    is_as_given = q is query and k is key and v is value and not is_causal_bias
    return _SdpaCall((q, k, v), leading, attn_mask, options, rank, is_as_given)


def _check_sdpa(query: Any, key: Any, value: Any, is_causal: Any, enable_gqa: Any) -> None:
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() < 2:
            wrong_value(name, "at least 2 dimensions [..., S, E]", f"{x.dim()}: {shape_of(x)}")
        if enable_gqa and x.dim() < 3:
            got = f"{x.dim()}: {shape_of(x)}"
            wrong_value(name, "at least 3 dimensions [H, S, E] with enable_gqa", got)
    if not isinstance(is_causal, bool):
        wrong_type("is_causal", "a bool", type(is_causal).__name__)


@looks_at_sizes
def _check_attn_mask(attn_mask: Any, query: Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ArgumentValueError(
            "attn_mask: Explicit attn_mask should not be set when is_causal=True. "
            "Hint: attention(mask=..., causal=...) applies both"
        )
    check_tensor("attn_mask", attn_mask)
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        expected = f"dtype torch.bool, torch.float32 or {query.dtype}, as query has"
        wrong_value("attn_mask", expected, attn_mask.dtype)


@looks_at_sizes
def _causal_of(bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """The alignment that a CausalBias stands for."""
    if is_causal:
        raise ArgumentValueError("attn_mask: CausalBias should not be used with is_causal=True")
    sizes = (bias.seq_len_q, bias.seq_len_kv)
    if bias.variant == CausalVariant.UPPER_LEFT or sizes[0] == sizes[1]:
        return "top_left"
    if sizes != (query.shape[-2], key.shape[-2]):
        expected = f"a CausalBias for lengths {(query.shape[-2], key.shape[-2])}"
        wrong_value("attn_mask", expected, f"one for {sizes}")
    return "bottom_right"


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query, key and value as [B, H, S, E], and the leading dimensions that B stands for.

    Views, with two exceptions that copy keys and values: five or more dimensions of which some but
    not all are broadcast, and enable_gqa with different numbers of heads in key and value.
    """
    q_shape, k_shape, v_shape = (plain_sizes(x) for x in (query, key, value))
    if len(q_shape) == len(k_shape) == len(v_shape) == 4 and q_shape[0] == k_shape[0]:
        same_heads = q_shape[1] == k_shape[1] or enable_gqa or k_shape[1] == 1
        if k_shape[:3] == v_shape[:3] and same_heads:
            return query, key, value, (q_shape[0],)
    tensors = [x if x.dim() > 2 else x.unsqueeze(0) for x in (query, key, value)]
    heads_q, heads_k, heads_v = (plain_sizes(x)[-3] for x in tensors)
    if enable_gqa and heads_k != heads_v:
        for i, heads in ((1, heads_k), (2, heads_v)):
            if heads == 0 or heads_q % heads != 0:
                wrong_value(("query", "key", "value")[i], f"heads that divide {heads_q}", heads)
            tensors[i] = tensors[i].repeat_interleave(heads_q // heads, dim=-3)
    elif not enable_gqa and (heads_k, heads_v) not in ((heads_q, heads_q), (1, 1)):
        heads = _broadcast("heads (-3)", [(heads_q,), (heads_k,), (heads_v,)])[0]
        tensors = [x.expand(*x.shape[:-3], heads, -1, -1) for x in tensors]
    leading = _broadcast("leading", [tuple(plain_sizes(x)[:-3]) for x in tensors])
    for i, x in enumerate(tensors):
        if tuple(plain_sizes(x)[:-3]) != leading:
            x = x.expand(*leading, *x.shape[-3:])
        if len(leading) != 1:
            x = x.reshape(math.prod(leading), *x.shape[-3:])
        tensors[i] = x
    return tensors[0], tensors[1], tensors[2], leading


def _broadcast(which: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """torch.broadcast_shapes with a message."""
    rank = max(len(shape) for shape in shapes)
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    result = []
    for sizes in zip(*padded, strict=True):
        others = [size for size in sizes if size != 1]
        if any(size != others[0] for size in others):
            names = "query, key, value"
            hint = "fewer heads in key and value need enable_gqa=True" if "heads" in which else ""
            wrong_value(names, f"{which} dimensions that broadcast", shapes, hint)
        result.append(others[0] if others else 1)
    return tuple(result)


def _mask_and_bias(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return attn_mask, None
    return None, attn_mask


def _with_leading(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    leading: tuple[int, ...],
    attn_mask: Tensor | None,
    options: dict[str, Any],
) -> Tensor:
    """`attention` where the batch stands for several dimensions, and attn_mask has them too.

    Where attn_mask is broadcast along some of them only, one call per element of the outermost.
    """
    if attn_mask is None or query.shape[0] == 0:
        return attention(query, key, value, **options)
    attn_mask = attn_mask.view((1,) * (len(leading) + 3 - attn_mask.dim()) + attn_mask.shape)
    own = tuple(attn_mask.shape[:-3])
    if any(size not in (1, full) for size, full in zip(own, leading, strict=True)):
        wrong_value("attn_mask", f"leading dimensions that broadcast to {leading}", own)
    if math.prod(own) == 1:
        attn_mask = attn_mask.view(attn_mask.shape[-3:])
    elif own == leading:
        attn_mask = attn_mask.flatten(0, -4)
    else:
        n = leading[0]
        masks = attn_mask.unbind() * (n if own[0] == 1 else 1)
        parts = zip(query.chunk(n), key.chunk(n), value.chunk(n), masks, strict=True)
        return torch.cat([_with_leading(q, k, v, leading[1:], m, options) for q, k, v, m in parts])
    mask, bias = _mask_and_bias(attn_mask)
    return attention(query, key, value, mask=mask, bias=bias, **options)


# -- Companions --------------------------------------------------------------------------


def dropout_mask(
    batch: int,
    heads: int,
    seqlen_q: int,
    seqlen_k: int,
    dropout_p: float,
    philox_seed: int | Tensor,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The mask that `attention(dropout_p=, philox_seed=)` applies: bool, True = kept.

    [batch, heads, seqlen_q, seqlen_k], with `heads` query heads. Kept weights are scaled by
    65536 / (65536 - round(65536 · dropout_p)). Philox4x32-10, see `attention`.

    Raises ArgumentValueError and ArgumentTypeError, as `attention` does.
    """
    sizes = (batch, heads, seqlen_q, seqlen_k)
    for name, size in zip(("batch", "heads", "seqlen_q", "seqlen_k"), sizes, strict=True):
        if not isinstance(size, (int, torch.SymInt)):
            wrong_type(name, "an int", type(size).__name__)
        if size < 0:
            wrong_value(name, "a size >= 0", size)
        if size >= 2**63:
            wrong_value(name, "a size below 2^63", size)
    check_number("dropout_p", dropout_p)
    if not 0.0 <= dropout_p <= 1.0:
        wrong_value("dropout_p", "a probability in [0, 1]", dropout_p)
    try:
        like = torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # unknown, or not in this build
        wrong_value("device", "a device of this PyTorch", f"{device!r} ({error})")
    if philox_seed is None:
        wrong_type("philox_seed", "an int or an int64 tensor", "NoneType")
    check_philox_seed(philox_seed, like.device)
    philox = ops.philox_state(like, like, like, philox_seed)
    if like.device.type == "cpu" or (like.device.type == "cuda" and not TRITON.missing()):
        return ops.dropout_keep_mask(philox, dropout_p, *sizes)
    from .reference import dropout_keep_mask

    return dropout_keep_mask(philox, dropout_p, *sizes)


def merge_attention_states(
    outs: Sequence[Tensor], lses: Sequence[Tensor], sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of attention over all keys, from (out, lse) over disjoint parts of them.

    outs: [B, Hq, Sq, Dv] each, lses: [B, Hq, Sq] each, as `attention(return_lse=True)` gives them
    (or packed: [Tq, Hq, Dv] and [Hq, Tq]), computed without sinks; sinks [Hq] enter here, once.
    lse is log Σ exp lse_n, out is Σ exp(lse_n - lse) out_n. A part whose lse is -inf contributes
    nothing; if all are, out is 0 and lse -inf (or the sink). Differentiable in everything.

    Raises ArgumentValueError where shapes or dtypes do not fit together, ArgumentTypeError for
    what is no tensor.
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
    from .reference import merge_attention_states as merge

    return merge(outs, lses, sinks)

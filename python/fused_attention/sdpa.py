"""`scaled_dot_product_attention`: PyTorch's call, translated into a call of `attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .call.backends import choose, plan_of_kernel
from .call.options import Options
from .call.plan import (
    LEAVE,
    find,
    kind_of_call,
    kind_of_option,
    may_be_refusal,
    remember,
    run,
    run_new,
)
from .call.problem import Problem, cast_for_autocast, check_tensor, shape_of
from .call.serve import serve
from .errors import (
    ArgumentTypeError,
    ArgumentValueError,
    argument_error,
    wrong_type,
    wrong_value,
)
from .nested import (
    Packed,
    any_nested,
    check_nested,
    check_same_sequences,
    nest,
    not_served,
    options_of,
    pack,
)
from .operators._torch import (
    int_sizes,
    is_any_autocast_enabled,
    is_compiling,
    looks_at_sizes,
    ragged_dim,
)


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
    dropout_p: applied whenever it is not 0. Random bits follow torch.manual_seed, but are not
        PyTorch's.

    Nested tensors [B, H, j, E] or [B, j, E], ragged along j, of jagged or strided layout: each
    sequence is a call of its own, is_causal included. Jagged ones are packed sequences of
    `attention`, neither padded nor copied; key may be ragged unlike query; out has query's ragged
    size. attn_mask raises NotImplementedError.

    Memory is linear in L in more cases than the original's: with dropout, a bias that requires a
    gradient, Ev != E, any rank and any mask. A row that sees no key gives 0; NaN in a query stays
    NaN.
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
    """`scaled_dot_product_attention`; `original`, if given, gets calls that no kernel here serves.

    `original` is the function that a patch replaced. It also gets the calls that are invalid here:
    it may serve them, and if it does not, it raises the error that the caller knows.
    """
    q, k, v, mask, number = query, key, value, attn_mask, scale
    compiling = is_compiling()
    if compiling or is_any_autocast_enabled():
        q, k, v, mask = cast_for_autocast(q, k, v, mask)
    if number is not None and type(number) is not float:
        number = _scale_number(number)
    kind = plan = refusal = call = None
    if not compiling and (is_causal is False or is_causal is True):
        said: tuple[Any, ...] = ("sdpa", original is None, is_causal, number, type(number))
        said += (enable_gqa,)
        if mask is not None or dropout_p != 0.0:
            said += (kind_of_option(dropout_p), kind_of_option(mask))
        kind, plan = find(kind_of_call(q, k, v, dropout_p != 0.0, said))
    if plan is not None and plan is not LEAVE:
        try:
            if plan.plain is not None:
                return plan.operator(q, k, v, *plan.plain)
            return run(plan, q, k, v, _options(mask))
        except RuntimeError as error:
            if not may_be_refusal(error):
                raise
            refusal = error
    if plan is None and any_nested(q, k, v):
        out = _nested(q, k, v, mask, dropout_p, is_causal, number, enable_gqa, original)
        if out is not None:
            return out
        plan = LEAVE
    if plan is None or refusal is not None:
        try:
            call = describe(q, k, v, mask, dropout_p, is_causal, number, enable_gqa)
            problem = Problem.from_call(*call.tensors, call.options)
            if original is None:
                plan = choose(problem).plan(problem)
            else:
                plan = plan_of_kernel(problem)
        except (ArgumentValueError, ArgumentTypeError):
            if original is None:
                raise
            plan = LEAVE
        else:
            if refusal is not None:
                raise argument_error(refusal)
            if call.is_as_given:
                remember(kind, plan)
    if call is None or plan.leaves_call:
        assert original is not None
        inputs = (query, key, value, attn_mask, dropout_p, is_causal)
        return original(*inputs, scale=scale, enable_gqa=enable_gqa)
    if call.rank > 4:
        out = _with_leading(*call.tensors, call.leading, call.attn_mask, call.options)
        return out.unflatten(0, call.leading)
    out = run(plan, *call.tensors, call.options)
    return out if call.rank == 4 else out[0] if call.rank == 3 else out[0, 0]


def _nested(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
    original: Callable[..., Tensor] | None,
) -> Tensor | None:
    """Serves nested tensors; returns None for a call that a patch leaves to `original`."""
    try:
        packed = _pack(query, key, value, attn_mask, is_causal, enable_gqa)
        q, k, v = (x.rows for x in packed)
        if packed[0].dim == 1 and query.dim() == 4:  # heads in any number, of one length
            out = sdpa(q, k, v, None, dropout_p, is_causal, scale, enable_gqa, original)
            return nest(out, packed[0])
        if query.dim() == 3:
            q, k, v = (x.unsqueeze(1) for x in (q, k, v))
        options = Options(
            causal="top_left" if is_causal else False,
            scale=scale,
            dropout_p=dropout_p,
            **options_of(packed[0], packed[1]),
        )
        plan = None
        if original is not None:
            plan = plan_of_kernel(Problem.from_call(q, k, v, options))
    except (ArgumentValueError, ArgumentTypeError, NotImplementedError):
        if original is None:
            raise
        return None
    if plan is not None and plan.leaves_call:
        return None
    out = serve(q, k, v, options) if plan is None else run_new(plan, q, k, v, options)
    return nest(out.squeeze(1) if query.dim() == 3 else out, packed[0])


def _pack(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: Any,
    enable_gqa: bool,
) -> tuple[Packed, Packed, Packed]:
    """Returns query, key and value as packed sequences [T, H, E] ([T, E] if there are no heads),
    or as packed heads [T, S, E] where the dimension of the heads is the ragged one."""
    tensors = {"query": query, "key": key, "value": value}
    check_nested(tensors)
    rank = query.dim()
    if attn_mask is not None:
        not_served("attn_mask")
    if rank not in (3, 4):
        not_served(f"query, key and value of {rank} dimensions")
    if not isinstance(is_causal, bool):
        wrong_type("is_causal", "a bool", type(is_causal).__name__)
    heads_are_ragged = rank == 4 and query.layout == torch.jagged and ragged_dim(query) == 1
    dim = 1 if heads_are_ragged else rank - 2
    q, k, v = (pack(name, x, dim) for name, x in tensors.items())
    check_same_sequences("value", v, "key", k)
    if heads_are_ragged:
        check_same_sequences("key", k, "query", q)
    elif rank == 4 and not enable_gqa:
        heads_q, heads_k, heads_v = (x.rows.shape[1] for x in (q, k, v))
        if (heads_k, heads_v) not in ((heads_q, heads_q), (1, 1)):
            hint = "fewer heads in key and value need enable_gqa=True"
            wrong_value("key, value", f"{heads_q} heads", (heads_k, heads_v), hint)
    return q, k, v


def _scale_number(scale: Any) -> Any:
    """Like PyTorch's parser, takes a 0-d tensor that requires no gradient for its value."""
    if isinstance(scale, Tensor):
        return scale if scale.dim() > 0 or scale.requires_grad else scale.item()
    return float(scale) if isinstance(scale, Real) and not isinstance(scale, int) else scale


class _Translated(NamedTuple):
    """A valid call of `scaled_dot_product_attention` as `attention` takes it, but for the mask."""

    tensors: tuple[Tensor, Tensor, Tensor]  # [B, H, S, E]
    leading: tuple[int, ...]  # the dimensions that B stands for
    attn_mask: Tensor | None
    options: Options
    rank: int
    is_as_given: bool


def describe(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: Any,
    enable_gqa: bool,
) -> _Translated:
    _check(query, key, value, is_causal, enable_gqa)
    causal: bool | str = "top_left" if is_causal else False
    # Importing the class takes a second, because Dynamo comes with it.
    is_causal_bias = type(attn_mask).__name__ == "CausalBias"
    if is_causal_bias:
        causal, attn_mask = _causal_of(attn_mask, query, key, is_causal), None
    elif attn_mask is not None:
        _check_attn_mask(attn_mask, query, is_causal)
    rank = max(query.dim(), key.dim(), value.dim())
    if attn_mask is not None and attn_mask.dim() > rank:
        wrong_value("attn_mask", f"at most {rank} dimensions", shape_of(attn_mask))
    of_rank = attn_mask if rank <= 4 else None  # for a higher rank see _with_leading
    options = _options(of_rank, causal=causal, scale=scale, dropout_p=dropout_p)
    q, k, v, leading = _four_dimensional(query, key, value, enable_gqa)
    # The lengths of a CausalBias are not in the kind of a call.
    is_as_given = q is query and k is key and v is value and not is_causal_bias
    return _Translated((q, k, v), leading, attn_mask, options, rank, is_as_given)


def _check(query: Any, key: Any, value: Any, is_causal: Any, enable_gqa: Any) -> None:
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
    allowed = dict.fromkeys((torch.bool, torch.float32, query.dtype))
    if attn_mask.dtype not in allowed:
        *others, last = map(str, allowed)
        hint = ""
        if not attn_mask.is_floating_point():
            hint = (
                "True = may attend: Hugging Face's attention_mask [B, S], 1 for a token, becomes"
                " attention_mask.bool()[:, None, None, :]"
            )
        expected = f"dtype {', '.join(others)} or {last}"
        wrong_value("attn_mask", expected, attn_mask.dtype, hint)


@looks_at_sizes
def _causal_of(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> str:
    """Returns the alignment that a CausalBias stands for."""
    if is_causal:
        raise ArgumentValueError(
            "attn_mask: CausalBias should not be used with causal=True. Hint: drop is_causal"
        )
    sizes = (bias.seq_len_q, bias.seq_len_kv)
    if bias.variant.name == "UPPER_LEFT" or sizes[0] == sizes[1]:
        return "top_left"
    if sizes != (query.shape[-2], key.shape[-2]):
        expected = f"a CausalBias for lengths {(query.shape[-2], key.shape[-2])}"
        wrong_value("attn_mask", expected, f"one for {sizes}")
    return "bottom_right"


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """Returns query, key and value as [B, H, S, E], and the leading dimensions that B stands for.

    They are views, with two exceptions. Five or more dimensions are copied if their strides do not
    let them fold into B, as when only some of them are broadcast; key and value are copied for
    enable_gqa if their numbers of heads differ.
    """
    q_shape, k_shape, v_shape = (int_sizes(x) for x in (query, key, value))
    if len(q_shape) == len(k_shape) == len(v_shape) == 4 and q_shape[0] == k_shape[0]:
        same_heads = q_shape[1] == k_shape[1] or enable_gqa or k_shape[1] == 1
        if k_shape[:3] == v_shape[:3] and same_heads:
            return query, key, value, (q_shape[0],)
    tensors = [x if x.dim() > 2 else x.unsqueeze(0) for x in (query, key, value)]
    heads_q, heads_k, heads_v = (int_sizes(x)[-3] for x in tensors)
    if enable_gqa and heads_k != heads_v:
        for i, heads in ((1, heads_k), (2, heads_v)):
            if heads == 0 or heads_q % heads != 0:
                wrong_value(("query", "key", "value")[i], f"heads that divide {heads_q}", heads)
            tensors[i] = tensors[i].repeat_interleave(heads_q // heads, dim=-3)
    elif not enable_gqa and (heads_k, heads_v) not in ((heads_q, heads_q), (1, 1)):
        heads = _broadcast("heads (-3)", [(heads_q,), (heads_k,), (heads_v,)])[0]
        tensors = [x.expand(*x.shape[:-3], heads, -1, -1) for x in tensors]
    leading = _broadcast("leading", [tuple(int_sizes(x)[:-3]) for x in tensors])
    for i, x in enumerate(tensors):
        if tuple(int_sizes(x)[:-3]) != leading:
            x = x.expand(*leading, *x.shape[-3:])
        if len(leading) != 1:
            x = x.reshape(math.prod(leading), *x.shape[-3:])
        tensors[i] = x
    return tensors[0], tensors[1], tensors[2], leading


def _broadcast(which: str, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    """Like torch.broadcast_shapes, with an error that names the arguments."""
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


def _options(attn_mask: Tensor | None, **others: Any) -> Options:
    """Returns options with attn_mask as a mask if it is boolean, else as a bias."""
    if attn_mask is None or attn_mask.dtype == torch.bool:
        return Options(mask=attn_mask, **others)
    return Options(bias=attn_mask, **others)


def _with_leading(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    leading: tuple[int, ...],
    attn_mask: Tensor | None,
    options: Options,
) -> Tensor:
    """Serves a call whose batch stands for several dimensions, which attn_mask has too.

    If attn_mask is broadcast along only some of them, makes one call per element of the outermost.
    """
    if attn_mask is None or query.shape[0] == 0:
        return serve(query, key, value, options)
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
    if attn_mask.dtype == torch.bool:
        return serve(query, key, value, options._replace(mask=attn_mask))
    return serve(query, key, value, options._replace(bias=attn_mask))

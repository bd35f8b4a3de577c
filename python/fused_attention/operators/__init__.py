"""The operators torch.ops.fused_attention.*: handles, fake kernels, vmap rules, state of dropout.

Importing `fused_attention._native` defines the operators and registers their kernels; here is what
is written in Python: shapes and strides for tracing (`register_fake`), rules for `torch.vmap` (the
mapped dimension is folded into the batch; of packed sequences, and on a GPU of dropout and mapped
sinks, one call per sample), and `philox_state`, which draws the seed of dropout.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd.graph import increment_version

from .. import _native as _native  # defines the operators
from ..call.problem import check_philox_seed
from ..errors import ArgumentValueError

forward_plain = torch.ops.fused_attention.attention_forward_plain.default
forward_plain_lse = torch.ops.fused_attention.attention_forward_plain_lse.default
forward = torch.ops.fused_attention.attention_forward.default
backward = torch.ops.fused_attention.attention_backward.default
weights = torch.ops.fused_attention.attention_weights.default
jvp = torch.ops.fused_attention.attention_jvp.default
backward_jvp = torch.ops.fused_attention.attention_backward_jvp.default
dropout_keep_mask = torch.ops.fused_attention.dropout_keep_mask.default


def _direct(op: Any) -> Callable[..., Any]:
    """`op` straight into the dispatcher: saves 1 us, and __torch_function__ does not see it."""
    handle = torch._C._dispatch_find_schema_or_throw(op._schema.name, op._schema.overload_name)
    return functools.partial(torch._C._dispatch_call_boxed, handle)


class Operators(NamedTuple):
    """What serves attention on the backends of one library; `direct_*`: see `_direct`."""

    forward_plain: Callable[..., Any]
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    direct_forward_plain: Callable[..., Any]
    direct_forward_plain_lse: Callable[..., Any]
    direct_forward: Callable[..., Any]

    @staticmethod
    def of(namespace: str) -> Operators:
        library = getattr(torch.ops, namespace)
        plain, full = library.attention_forward_plain.default, library.attention_forward.default
        return Operators(
            plain,
            full,
            library.attention_backward.default,
            _direct(plain),
            _direct(library.attention_forward_plain_lse.default),
            _direct(full),
        )


OPERATORS = Operators.of("fused_attention")

# -- The state of dropout ----------------------------------------------------------------

# `like` only tells the device. `call_site` tells the calls of one graph apart: without it, common
# subexpression elimination would give two layers the same mask. Opaque, because a traced
# torch.randint gives other numbers than eager; tagged, so that activation checkpointing replays it.
_library = torch.library.Library("fused_attention", "FRAGMENT")
_library.define(
    "philox_state(Tensor like, int call_site) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)


def _draw_philox_state(like: Tensor, call_site: int) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=like.device).random_()


_library.impl("philox_state", _draw_philox_state, "CompositeExplicitAutograd")
draw_philox_state = torch.ops.fused_attention.philox_state.default
_call_sites = itertools.count()


@torch.compiler.assume_constant_result
def _next_call_site() -> int:
    return next(_call_sites)


def philox_state(
    query: Tensor, key: Tensor, value: Tensor, philox_seed: int | Tensor | None = None
) -> Tensor:
    """(seed, offset), int64 [2]: of `philox_seed`, else drawn from torch's generator of the device.

    In a compiled graph independent branches may draw in another order than in eager mode; branches
    that depend on each other, as layers do, draw in the same.
    """
    if isinstance(philox_seed, Tensor):
        return philox_seed.contiguous()
    if philox_seed is not None:
        check_philox_seed(philox_seed, query.device)
        wraps = 2**63 <= philox_seed < 2**64
        signed = philox_seed - 2**64 if wraps else philox_seed
        return torch.tensor([signed, 0], dtype=torch.int64, device=query.device)
    like = query
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        like = _mapped_by_every_vmap(query.device)
    return draw_philox_state(like, _next_call_site())


def _mapped_by_every_vmap(device: torch.device) -> Tensor:
    """vmap asks the rule below only about an argument that is mapped, which no input need be."""
    levels = [x for x in retrieve_all_functorch_interpreters() if isinstance(x, VmapInterpreter)]
    with temporarily_clear_interpreter_stack():
        like = torch.empty([x.batch_size() for x in levels], device=device)
        for x in levels:
            like = torch._C._functorch._add_batch_dim(like, 0, x.level())
    return like


# -- Fake kernels ------------------------------------------------------------------------


def arguments(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `op` by name, defaults included."""
    named = {argument.name: argument.default_value for argument in op._schema.arguments}
    named.update(zip(named, args, strict=False))
    named.update(kwargs)
    return named


def check_devices(*inputs: Any) -> None:
    """The dispatcher does not: it comes here with a mask on "meta" and a query on a CPU."""
    devices = {str(x.device) for x in inputs if isinstance(x, Tensor)}
    if len(devices) > 1:
        raise ArgumentValueError(
            f"attention: expected one device, got {', '.join(sorted(devices))}"
        )


def empty_like_layout(like: Tensor, last: Any) -> Tensor:
    """[B, H, S, last] in like's dtype: dense BSHD memory if that is how `like` lies, else BHSD."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    batch, heads, seqlen, _ = like.shape
    if guard_or_false(like.stride(1) < like.stride(2)):
        return like.new_empty((batch, seqlen, heads, last)).transpose(1, 2)
    return like.new_empty((batch, heads, seqlen, last))


def _fake_forward_plain(query: Tensor, key: Tensor, value: Tensor, *numbers: Any) -> Tensor:
    check_devices(query, key, value)
    return empty_like_layout(query, value.shape[-1])


def _fake_forward(
    query: Tensor, key: Tensor, value: Tensor, *options: Any, **named_options: Any
) -> tuple[Tensor, Tensor]:
    check_devices(query, key, value, *options, *named_options.values())
    lse_dtype = torch.promote_types(query.dtype, torch.float32)
    if query.dim() == 3:  # packed sequences, [Tq, Hq, D]
        tokens, heads, _ = query.shape
        return (
            query.new_empty((tokens, heads, value.shape[-1])),
            query.new_empty((heads, tokens), dtype=lse_dtype),
        )
    return empty_like_layout(query, value.shape[-1]), query.new_empty(
        query.shape[:-1], dtype=lse_dtype
    )


def _fake_gradients(call: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_devices(*call.values())
    query, bias, sinks = call["query"], call["bias"], call["sinks"]

    def like(x: Tensor) -> Tensor:
        in_pages = x is not query and call["block_table"] is not None
        return (
            x.new_empty(x.shape) if x.dim() == 3 or in_pages else empty_like_layout(x, x.shape[-1])
        )

    dq, dk, dv = (like(x) for x in (query, call["key"], call["value"]))
    dbias = bias.new_empty(bias.shape) if call["bias_grad"] else query.new_empty(0)
    dsinks = call["lse"].new_empty(sinks.shape if call["sinks_grad"] else 0)
    return dq, dk, dv, dbias, dsinks


def _fake_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments(backward, args, kwargs))


@torch.library.register_fake("fused_attention::attention_backward_jvp")
def _fake_backward_jvp(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    return _fake_gradients(arguments(backward_jvp, args, kwargs))


@torch.library.register_fake("fused_attention::attention_jvp")
def _fake_jvp(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(jvp, args, kwargs)
    return (
        empty_like_layout(call["query"], call["value"].shape[-1]),
        call["lse"].new_empty(call["lse"].shape),
    )


@torch.library.register_fake("fused_attention::attention_weights")
def _fake_weights(*args: Any, **kwargs: Any) -> Tensor:
    check_devices(*args, *kwargs.values())
    call = arguments(weights, args, kwargs)
    B, Hq, Sq, _ = call["query"].shape
    heads = () if call["average"] else (Hq,)
    return call["query"].new_empty((B, *heads, Sq, call["key"].shape[2]))


@torch.library.register_fake("fused_attention::dropout_keep_mask")
def _fake_dropout_keep_mask(philox: Tensor, dropout_p: float, *sizes: Any) -> Tensor:
    return philox.new_empty(sizes, dtype=torch.bool)


@torch.library.register_fake("fused_attention::philox_state")
def _fake_philox_state(like: Tensor, call_site: int) -> Tensor:
    return like.new_empty(2, dtype=torch.int64)


check_sequences = torch.ops.fused_attention.check_sequences.default
kv_cache_append = torch.ops.fused_attention.kv_cache_append_.default


def _check_nothing(*args: Any) -> None:
    """On a GPU lengths and pages are not looked at: that would wait for it."""


torch.library.register_fake("fused_attention::check_sequences", _check_nothing)
_library.impl("check_sequences", _check_nothing, "CUDA")


@torch.library.register_fake("fused_attention::kv_cache_append_")
def _fake_kv_cache_append(*args: Any, **kwargs: Any) -> None:
    check_devices(*args, *kwargs.values())


# -- Writing to arguments ----------------------------------------------------------------

WRITES = {"kv_cache_append_": ("key_cache", "value_cache"), "masked_softmax_": ("input",)}


def _count_versions(library: torch.library.Library, name: str) -> None:
    """Autograd then notices if a tensor that it kept was written to, as after PyTorch's own
    in-place operators, whose kernels for this dispatch key do the same."""
    op = getattr(getattr(torch.ops, library.ns), name).default

    def write(keys: Any, *args: Any, **kwargs: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args, **kwargs)
        call = arguments(op, args, kwargs)
        increment_version([call[written] for written in WRITES[name]])

    library.impl(name, write, "ADInplaceOrView", with_keyset=True)


for _name in WRITES:
    _count_versions(_library, _name)


# -- torch.jit.trace -----------------------------------------------------------------------


def schema_of(op: Any) -> str:
    """Returns the arguments and results of an operator, without its name."""
    return "(" + str(op._schema).split("(", 1)[1]


def define_traced(
    name: str, schema: str, forward: Callable[..., Any], function: Any
) -> Callable[..., Any]:
    """The operator `traced_<name>`: `forward` with the gradients of a Function.

    What torch.jit.trace records must be an operator, for a Function cannot be saved; and the same
    one with and without gradients, for it traces twice and compares. PyTorch's registration of
    gradients costs 34 us a call, so only traces use it. It leaves out arguments that have their
    defaults, so there are no defaults here: the last ones that are not given are None.
    """
    schema = re.sub(r"=[^,)]*", "", schema)
    _library.define(f"traced_{name}{schema}", tags=torch.Tag.pt2_compliant_tag)
    _library.impl(f"traced_{name}", forward, "CompositeExplicitAutograd")
    torch.library.register_autograd(
        f"fused_attention::traced_{name}", function.backward, setup_context=function.setup_context
    )
    op = getattr(torch.ops.fused_attention, f"traced_{name}").default
    count = len(op._schema.arguments)

    def call(*inputs: Any) -> Any:
        return op(*inputs, *(None,) * (count - len(inputs)))

    return call


# -- CUDA and HIP ------------------------------------------------------------------------

# Of attention itself, `backends.BACKENDS` chooses between Triton and the CUDA library, and calls
# that one's operators.
IN_CUDA_LIBRARY = ("masked_softmax_forward", "masked_softmax_", "masked_softmax_backward")


@functools.cache
def gpu_kernel(name: str) -> Callable[..., Any]:
    """What serves the operator on a GPU: the CUDA library as far as it is there and can, else
    Triton. They are imported by the first call."""
    from . import cuda

    if name in IN_CUDA_LIBRARY and not cuda.missing():
        return getattr(getattr(torch.ops, cuda.NAMESPACE), name)
    from ..kernels import operators

    return getattr(operators, name)


def _register_on_gpu(name: str) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors.
        inputs = (*args, *kwargs.values())
        with torch.cuda.device(next(x.device for x in inputs if isinstance(x, Tensor))):
            return gpu_kernel(name)(*args, **kwargs)

    _library.impl(name, call, "CUDA")


for _name in (
    *("attention_forward_plain", "attention_forward_plain_lse", "attention_forward"),
    *("attention_backward", "dropout_keep_mask", "attention_weights", "kv_cache_append_"),
    *IN_CUDA_LIBRARY,
):
    _register_on_gpu(_name)


def _refuse_on_triton(name: str, what: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"attention: {what} on a GPU not built; backend='reference' has them"
        )

    _library.impl(name, refuse, "CUDA")


_refuse_on_triton("attention_jvp", "forward mode and second derivatives are")
_refuse_on_triton("attention_backward_jvp", "second derivatives are")

# -- vmap --------------------------------------------------------------------------------


# Where sequences of different lengths lie
SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")


# A row for each sample, where they differ or heads are numbered anew for each
_ROWS = ("philox", "sinks", "tangent_sinks")


def _fold_batch(
    name: str, x: Any, dim: int | None, samples: int, batch: int, own: frozenset[str]
) -> Any:
    """Argument `x`, mapped along `dim`, for a call whose batch is samples * batch.

    own: the arguments of which each sample gets one of its own although all have the same.
    """
    if not isinstance(x, Tensor):
        return x
    if name in _ROWS:
        if name not in own:
            return x
        x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x if x.dim() == 3 else x.unsqueeze(1)  # [samples, samples of an inner vmap, ...]
        return x.flatten(0, 1).contiguous()
    if name in ("mask", "bias", "tangent_bias") and dim is None and x.shape[0] == 1:
        if name not in own:
            return x  # stays broadcast
    if name == "alibi_slopes":  # [Hq] or [B, Hq] of each sample, or [B, Hq] of all
        if dim is None and x.dim() == 1:
            return x
        slopes = x.unsqueeze(0) if dim is None else x.movedim(dim, 0)
        slopes = slopes.unsqueeze(1) if slopes.dim() == 2 else slopes
        return slopes.expand(samples, batch, -1).flatten(0, 1).contiguous()
    x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.expand(samples, batch, *x.shape[2:]).flatten(0, 1)


def _vmap_rule(op: Any, batched_outputs: int) -> Callable[..., Any]:
    """The rule for an attention operator, of whose outputs so many have the batch in front."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        call = arguments(op, args, kwargs)
        dims = dict(zip(call, in_dims, strict=False))
        samples = info.batch_size
        query, query_dim = call["query"], dims["query"]
        batch = query.shape[0] if query_dim is None else query.movedim(query_dim, 0).shape[1]
        bias_grad, sinks_grad = call.get("bias_grad"), call.get("sinks_grad")
        own: set[str] = {"bias"} if bias_grad else set()
        sinks_are_mapped = any(dims.get(name) is not None for name in _ROWS)
        if call.get("philox") is not None or sinks_are_mapped or sinks_grad:
            own |= set(_ROWS)
        packed = any(call.get(name) is not None for name in SEQUENCES)
        on_gpu = query.device.type == "cuda" or op.namespace != "fused_attention"
        if packed or samples == 0 or (_ROWS[0] in own and on_gpu):
            results = [op(**_sample(call, dims, i)) for i in range(max(samples, 1))]
            if isinstance(results[0], Tensor):
                return torch.stack(results)[:samples], 0
            stacked = tuple(torch.stack(x)[:samples] for x in zip(*results, strict=True))
            return stacked, (0,) * len(stacked)
        result = op(
            **{
                name: _fold_batch(name, x, dims.get(name), samples, batch, frozenset(own))
                for name, x in call.items()
            }
        )
        if isinstance(result, Tensor):
            return result.unflatten(0, (samples, batch)), 0
        outputs = [
            x.unflatten(0, (samples, batch)) if i < batched_outputs else x
            for i, x in enumerate(result)
        ]
        mapped: list[int | None] = [0] * batched_outputs + [None] * (len(outputs) - batched_outputs)
        if bias_grad:  # summed over the batch of a sample where that shares a bias
            dbias = outputs[3].unflatten(0, (samples, batch))
            bias, dim = call["bias"], dims["bias"]
            shared = (bias if dim is None else bias.movedim(dim, 0)[0]).shape[0] == 1
            outputs[3], mapped[3] = dbias.sum(1, keepdim=True) if shared else dbias, 0
        if sinks_grad:
            sinks, dim = call["sinks"], dims["sinks"]
            shape = (sinks if dim is None else sinks.movedim(dim, 0)[0]).shape
            outputs[4], mapped[4] = outputs[4].view(samples, *shape), 0
        return tuple(outputs), tuple(mapped)

    return rule


def _sample(call: dict[str, Any], dims: dict[str, Any], i: int) -> dict[str, Any]:
    """The arguments of sample i; zeros where there are no samples, for the shapes."""

    def select(x: Tensor, dim: int) -> Tensor:
        return x.select(dim, i) if x.shape[dim] else x.sum(dim, dtype=x.dtype)

    sample = {
        name: x if dims.get(name) is None else select(x, dims[name]) for name, x in call.items()
    }
    for name in ("alibi_slopes", "sinks", "tangent_sinks", "philox"):
        if isinstance(sample.get(name), Tensor):
            sample[name] = sample[name].contiguous()
    return sample


@functools.cache
def register_tracing(namespace: str) -> None:
    """Fake kernels and rules of vmap, for the attention operators of a library; once."""
    library = getattr(torch.ops, namespace)
    if namespace != "fused_attention":
        _count_versions(_library_of(namespace), "masked_softmax_")
    for name, fake, outputs in (
        ("attention_forward_plain", _fake_forward_plain, 1),
        ("attention_forward_plain_lse", _fake_forward, 2),
        ("attention_forward", _fake_forward, 2),
        ("attention_backward", _fake_backward, 3),
    ):
        op = getattr(library, name).default
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_vmap(f"{namespace}::{name}", _vmap_rule(op, batched_outputs=outputs))


@functools.cache
def _library_of(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "IMPL")


register_tracing("fused_attention")
torch.library.register_vmap("fused_attention::attention_jvp", _vmap_rule(jvp, batched_outputs=2))
torch.library.register_vmap(
    "fused_attention::attention_backward_jvp", _vmap_rule(backward_jvp, batched_outputs=3)
)
torch.library.register_vmap(
    "fused_attention::attention_weights", _vmap_rule(weights, batched_outputs=1)
)


def dropout_keep_masks(
    info: Any, in_dims: tuple[Any, ...], philox: Tensor, dropout_p: float, batch: int, *sizes: int
) -> tuple[Tensor, int]:
    """The rule of vmap: a mask for each sample, also where all have the same seed."""
    samples = info.batch_size
    if samples == 0 or philox.device.type == "cuda":
        call, dims = {"philox": philox}, {"philox": in_dims[0]}
        masks = [
            dropout_keep_mask(_sample(call, dims, i)["philox"], dropout_p, batch, *sizes)
            for i in range(max(samples, 1))
        ]
        return torch.stack(masks)[:samples], 0
    states = _fold_batch("philox", philox, in_dims[0], samples, batch, frozenset(_ROWS))
    keep = dropout_keep_mask(states, dropout_p, samples * batch, *sizes)
    return keep.unflatten(0, (samples, batch)), 0


torch.library.register_vmap("fused_attention::dropout_keep_mask", dropout_keep_masks)


@torch.library.register_vmap("fused_attention::philox_state")
def _vmap_philox_state(
    info: Any, in_dims: tuple[Any, ...], like: Tensor, call_site: int
) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: dropout in attention is random; pass randomness='same' or 'different' to vmap"
        )
    if info.randomness == "same":
        return draw_philox_state(like, call_site), None
    draws = [draw_philox_state(like, call_site) for _ in range(max(info.batch_size, 1))]
    return torch.stack(draws)[: info.batch_size], 0


# -- Masked softmax ----------------------------------------------------------------------

softmax_forward = torch.ops.fused_attention.masked_softmax_forward.default
softmax_in_place = torch.ops.fused_attention.masked_softmax_.default
softmax_backward = torch.ops.fused_attention.masked_softmax_backward.default


@torch.library.register_fake("fused_attention::masked_softmax_forward")
def _fake_softmax_forward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(softmax_forward, args, kwargs)
    x, save = call["input"], call["save"]
    weights = x.new_empty(x.shape if save and call["dropout_p"] > 0 else 0)
    sink_weight = x.new_empty(
        x.shape[:-1] if save and call["sinks"] is not None else 0,
        dtype=torch.promote_types(x.dtype, torch.float32),
    )
    return x.new_empty(x.shape), weights, sink_weight


@torch.library.register_fake("fused_attention::masked_softmax_")
def _fake_softmax_in_place(*args: Any, **kwargs: Any) -> None:
    check_devices(*args, *kwargs.values())


@torch.library.register_fake("fused_attention::masked_softmax_backward")
def _fake_softmax_backward(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
    check_devices(*args, *kwargs.values())
    call = arguments(softmax_backward, args, kwargs)
    weights, bias = call["weights"], call["bias"]
    dbias = bias.new_empty(bias.shape) if call["bias_grad"] else weights.new_empty(0)
    dsinks = weights.new_empty(
        weights.shape[-3] if call["sinks_grad"] else 0,
        dtype=torch.promote_types(weights.dtype, torch.float32),
    )
    return weights.new_empty(weights.shape), dbias, dsinks


def _softmax_vmap_rule(
    op: Any, main: str, mapped: Callable[[dict[str, Any]], tuple[bool, bool, bool]]
) -> Callable[..., Any]:
    """The rule for an operator on rows: the samples are one more dimension in front of them.

    main: the argument whose shape is that of the rows. mapped: which results there are for each
    sample; the others are empty.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
        call = arguments(op, args, kwargs)
        dims = dict(zip(call, in_dims, strict=False))
        samples, own_grad = info.batch_size, bool(call.get("bias_grad"))
        if call.get("sinks_grad"):
            from ..derivatives.softmax_tangents import gradients_of_samples

            gradients = gradients_of_samples(info, call, dims)
            return gradients, tuple(
                0 if of_sample else None for of_sample in (True, own_grad, True)
            )
        own_rows = call.get("philox") is not None or dims.get("sinks") is not None
        if samples == 0 or (own_rows and call[main].device.type == "cuda"):
            each = [op(**_sample(call, dims, i)) for i in range(max(samples, 1))]
            stacked = tuple(torch.stack(x)[:samples] for x in zip(*each, strict=True))
            return stacked, (0, 0, 0)
        x, dim = call[main], dims[main]
        shape = x.shape if dim is None else x.movedim(dim, 0).shape[1:]
        # The dimensions of a head and its queries, if they are counted
        padding = (1,) * (3 - len(shape)) if own_rows else ()
        rank = len(padding) + len(shape)

        def fold(name: str, x: Any) -> Any:
            if not isinstance(x, Tensor):
                return x
            dim = dims.get(name)
            if name in ("philox", "sinks"):
                return _fold_batch(name, x, dim, samples, 1, frozenset(_ROWS if own_rows else ()))
            broadcasts = name in ("mask", "bias")
            if dim is None and broadcasts and not (name == "bias" and own_grad):
                return x
            x = x.expand(samples, *x.shape) if dim is None else x.movedim(dim, 0)
            ones = (1,) * (rank + 1 - x.dim()) if broadcasts else padding
            return x.reshape(samples, *ones, *x.shape[1:])

        results = list(op(**{name: fold(name, x) for name, x in call.items()}))
        if padding:
            results[0] = results[0].view(samples, *shape)
            if main == "input" and results[1].dim() > 1:
                results[1] = results[1].view(samples, *shape)
        if own_grad:
            bias, dim = call["bias"], dims["bias"]
            bias_shape = bias.shape if dim is None else bias.movedim(dim, 0).shape[1:]
            results[1] = results[1].view(samples, *bias_shape)
        return tuple(results), tuple(0 if of_sample else None for of_sample in mapped(call))

    return rule


torch.library.register_vmap(
    "fused_attention::masked_softmax_forward",
    _softmax_vmap_rule(
        softmax_forward,
        "input",
        lambda call: (
            True,
            call["save"] and call["dropout_p"] > 0,
            call["save"] and call["sinks"] is not None,
        ),
    ),
)
torch.library.register_vmap(
    "fused_attention::masked_softmax_backward",
    _softmax_vmap_rule(
        softmax_backward, "weights", lambda call: (True, bool(call["bias_grad"]), False)
    ),
)

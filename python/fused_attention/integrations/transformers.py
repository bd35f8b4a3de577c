"""The attention of Hugging Face models: `attn_implementation="fused_attention"` of transformers.

transformers looks up two functions under that name: one computes attention, the other makes the
masks of a model. Both are registered, since without the second transformers passes no mask, and
padding is lost without a word. The mask function reads the pattern that transformers asks for.
Causal masks, sliding windows, packed sequences and their intersections become keywords of
`attention`, which a `LazyMask` carries to the attention function; padding stays [B, Sk]. Any other
pattern becomes the complete mask that transformers makes for "sdpa". So the ordinary mask takes
O(B·Sk) time and memory, and attention is exact (Dao 2023, FlashAttention-2) in all cases.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import attention
from ..attention_weights import attention_with_weights
from ..call.options import NO_WINDOW
from ..errors import wrong_type, wrong_value
from ..operators._torch import assume_constant_result, is_compiling, without_torch_function
from .handle import Handle

# -- The pattern of a mask ---------------------------------------------------------------


class _Pattern(NamedTuple):
    """Query at position i sees key at position j iff i - left <= j <= i + right, and both are of
    one sequence. Positions are indices in the row, counted from the start of the text."""

    left: float = math.inf
    right: float = math.inf
    sequences: Tensor | None = None  # [B, S], the number of the sequence of each token
    positions: Tensor | None = None  # [B, S], what transformers uses in place of the indices


def _left_window(sliding_window: int) -> _Pattern | None:
    return _Pattern(left=sliding_window - 1) if sliding_window > 0 else None


def _intersection(mask_functions: tuple[Callable[..., Any], ...]) -> _Pattern | None:
    """Returns the pattern of what all `mask_functions` show, or None if one of them is not known,
    or if two of them pack."""
    result = _Pattern()
    for pattern in map(_pattern_of, mask_functions):
        if pattern is None or _both(result.sequences, pattern.sequences):
            return None
        if _both(result.positions, pattern.positions):
            return None
        result = _Pattern(
            min(result.left, pattern.left),
            min(result.right, pattern.right),
            pattern.sequences if result.sequences is None else result.sequences,
            pattern.positions if result.positions is None else result.positions,
        )
    return result


def _both(x: Tensor | None, y: Tensor | None) -> bool:
    return x is not None and y is not None


def _remapped(mask_function: Callable[..., Any], position_ids: Tensor) -> _Pattern | None:
    inner = _pattern_of(mask_function)
    if inner is None or inner.sequences is not None or inner.positions is not None:
        return None
    return inner._replace(positions=position_ids)


# Names in transformers.masking_utils. Those with arguments return a closure; its variables, in
# alphabetical order, are the parameters of the function that reads them.
_READERS: tuple[tuple[str, tuple[Any, ...] | None, Callable[..., _Pattern | None]], ...] = (
    ("causal_mask_function", None, lambda: _Pattern(right=0)),
    ("bidirectional_mask_function", None, lambda: _Pattern()),
    ("sliding_window_overlay", (1,), _left_window),
    (
        "sliding_window_bidirectional_overlay",
        (1,),
        lambda sliding_window: _Pattern(sliding_window, sliding_window),
    ),
    ("and_masks", (), _intersection),
    (
        "packed_sequence_mask_function",
        (None,),
        lambda packed_sequence_mask: _Pattern(sequences=packed_sequence_mask),
    ),
    ("remap_positions_for_packed_sequence", (None, None), _remapped),
)


@functools.cache
def _readers() -> tuple[tuple[CodeType, Callable[..., _Pattern | None]], ...]:
    """Returns the code of each mask function whose pattern is known, and what reads its closure.

    A function that this transformers lacks, or whose closure has other variables, is left out.
    """
    from transformers import masking_utils

    known = []
    for name, arguments, read in _READERS:
        function = getattr(masking_utils, name, None)
        if function is not None and arguments is not None:
            function = function(*arguments)
        code = getattr(function, "__code__", None)
        if code is not None and code.co_freevars == tuple(inspect.signature(read).parameters):
            known.append((code, read))
    return tuple(known)


def _pattern_of(mask_function: Callable[..., Any]) -> _Pattern | None:
    """Returns the pattern of a mask function of transformers, or None if it is not known."""
    code = getattr(mask_function, "__code__", None)
    for known, read in _readers():
        if code is known:  # equal code of another file would have another meaning
            return read(*(cell.cell_contents for cell in mask_function.__closure__ or ()))
    return None


class _Request(NamedTuple):
    """What transformers asks of a mask function."""

    mask_function: Callable[..., Any]
    batch_size: int
    q_length: int
    kv_length: int
    offset: int  # query i and key i + offset are at the same position
    kv_offset: int
    attention_mask: Tensor | None


class _Structure(NamedTuple):
    """What hides the same keys as a mask: keywords of `attention`, given the first `keys` keys.

    No query sees the other keys, which are the free room of a static cache.
    """

    options: dict[str, Any]
    keys: int
    causal: bool


def _structure_of(request: _Request) -> _Structure | None:
    """Returns the structure of the mask, or None if it has none that is known here."""
    pattern, mask = _pattern_of(request.mask_function), request.attention_mask
    if pattern is None:
        return None
    structure = _placed(pattern, request)
    if structure is None:
        return None
    packed = pattern.sequences is not None or pattern.positions is not None
    added: dict[str, Any] | None = None
    if mask is None:
        added = _packing(pattern, request) if packed else {}
    elif not packed and mask.dtype == torch.bool and mask.shape[:-1] == (request.batch_size,):
        added = _padding(mask[:, request.kv_offset :], structure.keys)
    return None if added is None else structure._replace(options=structure.options | added)


def _placed(pattern: _Pattern, request: _Request) -> _Structure | None:
    """Returns the structure of windows, or None if their diagonal starts at no corner of the
    scores. Windows that hide nothing are left out."""
    q_length, offset = request.q_length, request.offset
    causal = pattern.right == 0
    keys = min(request.kv_length, offset + q_length) if causal else request.kv_length
    if keys <= 0:
        return None
    left = pattern.left if pattern.left < offset + q_length - 1 else math.inf
    right = pattern.right if pattern.right < keys - 1 - offset else math.inf
    if left == right == math.inf:
        return _Structure({}, keys, causal)
    if offset == 0:
        diagonal = "top_left"
    elif offset + q_length == keys:
        diagonal = "bottom_right"
    else:
        return None
    options: dict[str, Any] = {"causal" if right == 0 else "diagonal": diagonal}
    window = tuple(-1 if x == math.inf else int(x) for x in (left, right or math.inf))
    if window != NO_WINDOW:
        options["window_size"] = window
    return _Structure(options, keys, causal)


def _padding(attention_mask: Tensor, keys: int) -> dict[str, Any]:
    """attention_mask: [B, tokens], True = a token. Keys after its end are hidden."""
    visible = attention_mask[:, :keys]
    missing = keys - visible.shape[1]
    if missing:
        visible = F.pad(visible, (0, missing))
    return {} if visible.all() else {"key_padding_mask": ~visible}


def _packing(pattern: _Pattern, request: _Request) -> dict[str, Any] | None:
    """Returns the offsets of the sequences in the flattened rows. Returns None unless each sequence
    is in one place, with consecutive positions."""
    shape = (request.batch_size, request.q_length)
    sequences, positions = pattern.sequences, pattern.positions
    if sequences is None or sequences.shape != shape or request.offset != 0:
        return None
    step = sequences.diff(dim=1)
    in_place = step >= 0
    if positions is not None:
        if positions.shape != shape:
            return None
        in_place &= (step > 0) | (positions.diff(dim=1) == 1)
    if request.kv_length != request.q_length or not in_place.all():
        return None
    starts = F.pad(step > 0, (1, 0), value=True).flatten().nonzero().flatten()
    cu_seqlens = F.pad(starts, (0, 1), value=math.prod(shape)).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": longest,
        "max_seqlen_k": longest,
    }


# -- Masks -------------------------------------------------------------------------------


class LazyMask(Tensor):
    """A boolean mask [B, 1, Sq, Sk], True = attend, whose elements are made when they are needed.

    The attention function reads `options` and `keys`. Every other use makes the complete mask once
    and goes on with it, so that models may slice, combine, move, copy and save their masks. Shape,
    dtype and device are known without it. After a write, or a view that could be written to, the
    mask is an ordinary one: `options` is None.

    options: keywords of `attention` that hide the same keys from the same queries, or None.
    keys: the number of keys to pass; no query sees the keys after them.
    """

    options: dict[str, Any] | None
    keys: int
    _make: Callable[[], Tensor]

    # Operators reach __torch_dispatch__; what only asks for the shape and the like does not.
    __torch_function__ = without_torch_function

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        device: torch.device,
        make: Callable[[], Tensor],
        options: dict[str, Any] | None = None,
        keys: int = 0,
    ) -> LazyMask:
        mask = Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask._make, mask.options, mask.keys = make, options, keys
        return mask

    @functools.cached_property
    def complete(self) -> Tensor:
        return self._make()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            for x in (*args, *kwargs.values()):
                if isinstance(x, LazyMask):
                    x.options = None
        return func(*_completed(args), **{name: _completed(x) for name, x in kwargs.items()})

    # What PyTorch does not do by operators.

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        return self.complete.numpy(*args, **kwargs)

    def tolist(self) -> Any:
        return self.complete.tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.complete, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.complete.__reduce_ex__(protocol)

    # Code that torch.compile made gets the complete mask.

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["complete"], None

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: None, outer_size: Any, outer_stride: Any
    ) -> LazyMask:
        complete = inner["complete"]
        return LazyMask(complete.shape, complete.device, lambda: complete)


def _completed(x: Any) -> Any:
    if isinstance(x, LazyMask):
        return x.complete
    return type(x)(map(_completed, x)) if isinstance(x, (tuple, list)) else x


def fused_attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **others: Any,
) -> Tensor | None:
    """The mask function that `register` gives to transformers; arguments as of its `sdpa_mask`.

    Returns None where `sdpa_mask` does: the mask is causal and the attention function knows it, or
    it hides nothing. Else returns a `LazyMask` if the pattern of `mask_function` is known and the
    values may be read, and the complete mask of `sdpa_mask` if not: for other patterns (chunked,
    blockwise, unions, a user's own), while a graph is traced or compiled, for fake tensors, and for
    a `q_offset` on another device than a CPU.

    Raises NotImplementedError if `config` belongs to a model that computes attention by itself.
    """
    from transformers import masking_utils

    if config is not None:
        _check_uses_interface(type(config))
    if mask_function is None:
        mask_function = masking_utils.causal_mask_function
    sdpa_mask: Any = masking_utils.sdpa_mask
    complete = functools.partial(
        sdpa_mask,
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        use_vmap=use_vmap,
        device=device,
        **others,
    )
    structure = None
    if _may_read(attention_mask, q_offset):
        # A static cache counts on in its tensor before a lazy mask is made: keep the number.
        q_offset, kv_offset = int(q_offset), int(kv_offset)
        offset, sizes = q_offset - kv_offset, (batch_size, q_length, kv_length)
        request = _Request(mask_function, *sizes, offset, kv_offset, attention_mask)
        structure = _structure_of(request)
    if structure is None:
        return complete(
            q_offset=q_offset,
            allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        )
    options, keys, causal = structure
    if local_size is None or kv_length < local_size:
        # Without a mask, attention is causal from the top left, and a single query sees all keys.
        same = keys == kv_length if q_length == 1 else offset == 0
        if causal and allow_is_causal_skip and same and options.keys() <= {"causal"}:
            return None
        if not causal and allow_is_bidirectional_skip and not options:
            return None
    make = functools.partial(
        complete, q_offset=q_offset, allow_is_causal_skip=False, allow_is_bidirectional_skip=False
    )
    shape = (batch_size, 1, q_length, kv_length)
    return LazyMask(shape, torch.device(device), lambda: make().contiguous(), options, keys)


def _may_read(attention_mask: Tensor | None, q_offset: int | Tensor) -> bool:
    """Whether the tensors have values now, and reading the offset makes no device wait."""
    from transformers.utils.import_utils import is_tracing

    if isinstance(q_offset, Tensor) and q_offset.device.type != "cpu":
        return False
    known = (type(None), int, Tensor)  # no fake tensor, and no proxy
    return not is_tracing() and type(attention_mask) in known and type(q_offset) in known


@assume_constant_result
def _check_uses_interface(config: type) -> None:
    """Raises NotImplementedError for models that add masks to their scores themselves.

    transformers does not ask whether a model calls its AttentionInterface. Such a model would add
    a boolean mask, or miss that it is causal.
    """
    if not _uses_interface(config):
        raise NotImplementedError(
            f"attn_implementation: {config.__name__.removesuffix('Config')} computes attention by "
            'itself and does not call the AttentionInterface of transformers. Hint: use "eager", '
            'or "sdpa" with patch_sdpa() if the model supports it'
        )


@functools.cache
def _uses_interface(config: type) -> bool:
    """Whether each module of the model that has attention of its own asks the interface for it."""
    package = config.__module__.rpartition(".")[0]
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{package}.modeling_") and config in vars(module).values():
            own = any(
                isinstance(x, type) and issubclass(x, nn.Module) and x.__module__ == name
                for title, x in vars(module).items()
                if "Attention" in title
            )
            if own and not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
                return False
    return True


# -- Attention ---------------------------------------------------------------------------

_SELECTED = (
    'are not built. Hint: register("sdpa") and attn_implementation="sdpa", for which the model '
    "puts them into its mask"
)
_PAGED = "paged caches (continuous batching) are not built"

# What models of transformers ask for by keyword and is not built here.
_REFUSED = {
    "indices": f"keys selected for each query {_SELECTED}",
    "block_indices": f"blocks of keys selected for each query {_SELECTED}",
    "sinks": "sinks of each token are not built. Hint: s_aux holds those of each head",
    "write_index": _PAGED,
    "block_table": _PAGED,
}


def fused_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that `register` gives to transformers; returns (out, weights).

    query [B, Hq, Sq, D], key [B, Hkv, Sk, D] and value [B, Hkv, Sk, Dv], as `attention` takes them;
    a batch of 1 broadcasts. out [B, Sq, Hq, Dv], contiguous. weights [B, Hq, Sq, Sk] if the model
    was called with output_attentions=True, else None; they are computed by tiles.

    attention_mask: None, a `LazyMask`, or a tensor. 4-D bool: True = attend. 4-D floating: added to
        the scores, differentiable. Columns after the Sk-th are left out. A 4-D mask says all that
        is hidden, windows included, as for "sdpa". 2-D, bool or int [B, Sk], 0 = padding: as
        for flash attention, causality (bottom-right) and sliding_window apply too.
    is_causal: only without a mask or with a 2-D one; default is module.is_causal, or True. Without
        a mask it is top-left over the first Sq keys (an empty static cache), and nothing for a
        single query.
    position_bias: [1 or B, Hq, Sq, Sk], added to the scores, differentiable.
    sliding_window: in tokens, the query included. Without a mask it hides nothing, since a mask
        is left out only where no window matters.
    scaling, softcap, dropout, s_aux [Hq]: scale, softcap, dropout_p and sinks of `attention`.
        dropout is applied if it is not 0; models pass 0 in evaluation.
    kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, as for flash attention:
        packed sequences. output_attentions: whether to return weights.

    A row that sees no key gives 0. transformers' own "eager" gives the mean of all values there;
    such rows belong to padding tokens.

    Raises NotImplementedError for keys selected for each query, sinks of each token and paged
    caches, ArgumentValueError and ArgumentTypeError as `attention` does.
    """
    for name, why in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name}: {why}")
    if query.shape[0] != key.shape[0]:
        batch = max(query.shape[0], key.shape[0])
        query, key, value = (x.expand(batch, -1, -1, -1) for x in (query, key, value))
    length = key.shape[2]
    options, keys = _visible(
        module, query, length, attention_mask, is_causal, sliding_window, kwargs
    )
    wants_weights = _wants_weights(kwargs)
    packed = "cu_seqlens_q" in options
    if packed and (wants_weights or position_bias is not None):
        if not isinstance(attention_mask, LazyMask):
            given = "output_attentions" if wants_weights else "position_bias"
            wrong_value("cu_seq_lens_q", f"None together with {given}", "a tensor")
        options, packed = {"mask": attention_mask.complete}, False
    if keys < length:
        key, value = key[:, :, :keys], value[:, :, :keys]
    options = {"scale": scaling, "dropout_p": dropout, **options}
    if position_bias is not None:
        bias = position_bias[..., :keys]
        options["bias"] = bias + options["bias"] if "bias" in options else bias
    if softcap is not None:
        options["softcap"] = softcap
    if s_aux is not None:
        options["sinks"] = s_aux
    if wants_weights:
        out, weights = attention_with_weights(query, key, value, average=False, **options)
        if keys < length:
            weights = F.pad(weights, (0, length - keys))
        return out.transpose(1, 2).contiguous(), weights
    if packed:
        rows = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        out = attention(*rows, **options)
        return out.unflatten(0, (query.shape[0], query.shape[2])).contiguous(), None
    return attention(query, key, value, **options).transpose(1, 2).contiguous(), None


def _visible(
    module: nn.Module,
    query: Tensor,
    length: int,
    attention_mask: Any,
    is_causal: bool | None,
    sliding_window: int | None,
    kwargs: dict[str, Any],
) -> tuple[dict[str, Any], int]:
    """Returns keywords of `attention` that hide keys, and the number of keys to pass."""
    seqlen = query.shape[2]
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if isinstance(attention_mask, LazyMask):
        options = None if is_compiling() else attention_mask.options
        if options is not None and attention_mask.shape[2:] == (seqlen, length):
            if cu_seqlens is None or "cu_seqlens_q" in options:
                return options, attention_mask.keys
        attention_mask = attention_mask.complete
    if attention_mask is not None and cu_seqlens is not None:
        hint = "position_ids that start again at 0 separate packed sequences as well"
        wrong_value("cu_seq_lens_q", "None together with an attention_mask", "a tensor", hint)
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        return _four_dimensional(attention_mask, length), length
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is None and cu_seqlens is None:
        if seqlen > 1 and is_causal:
            return {"causal": "top_left"}, min(seqlen, length)
        return {}, length
    options = {"causal": "bottom_right" if is_causal else False}
    if sliding_window is not None and sliding_window < length:
        options["window_size"] = (sliding_window - 1, sliding_window - 1)
        options["diagonal"] = "bottom_right"
    if cu_seqlens is not None:
        return options | _packed(cu_seqlens, kwargs), length
    return options | _two_dimensional(attention_mask), length


def _four_dimensional(attention_mask: Tensor, length: int) -> dict[str, Any]:
    mask = attention_mask
    if mask.shape[-1] > length:
        mask = mask[..., :length]
    if mask.dtype == torch.bool:
        return {"mask": mask}
    if mask.is_floating_point():
        return {"bias": mask}
    hint = "attention_mask.bool(), if not 0 means attend"
    wrong_value("attention_mask", "a bool or floating dtype", mask.dtype, hint)


def _two_dimensional(attention_mask: Any) -> dict[str, Any]:
    if not isinstance(attention_mask, Tensor):
        hint = "a BlockMask belongs to flex_attention"
        wrong_type("attention_mask", "None or a tensor", type(attention_mask).__name__, hint)
    if attention_mask.dim() != 2 or attention_mask.is_floating_point():
        expected = "bool or int [B, Sk], or bool or floating [B, Hq, Sq, Sk]"
        got = f"{attention_mask.dtype} {tuple(attention_mask.shape)}"
        wrong_value("attention_mask", expected, got)
    return {"key_padding_mask": attention_mask == 0}


def _packed(cu_seqlens: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keywords for the packed sequences that flash attention's keywords describe."""
    q = k = cu_seqlens.to(torch.int32)
    of_keys = kwargs.get("cu_seq_lens_k")
    if of_keys is not None and of_keys is not cu_seqlens:
        k = of_keys.to(torch.int32)
    options: dict[str, Any] = {"cu_seqlens_q": q, "cu_seqlens_k": k}
    for side in ("q", "k"):
        longest = kwargs.get(f"max_length_{side}")
        if longest is not None:
            options[f"max_seqlen_{side}"] = int(longest)
    return options


def _wants_weights(kwargs: dict[str, Any]) -> bool:
    """Whether the model is called with output_attentions=True.

    Some models do not hand the keyword on, so the recorder of transformers is asked too.
    """
    if kwargs.get("output_attentions"):
        return True
    if is_compiling():
        return False
    recorder = _recorder()
    recorded = recorder.get() if recorder is not None else None
    return recorded is not None and any("attentions" in name for name in recorded)


@functools.cache
def _recorder() -> Any:
    """Returns where transformers keeps the outputs that it records, or None if that is gone."""
    try:
        from transformers.utils.output_capturing import _active_collector
    except ImportError:
        return None
    return _active_collector


# -- Registration ------------------------------------------------------------------------


def _interfaces() -> tuple[tuple[Any, Callable[..., Any]], ...]:
    """Returns the two interfaces of transformers, each with the function to register there."""
    needed = "fused_attention.integrations.transformers needs transformers 5.4 or newer"
    hint = "Hint: pip install -U 'transformers>=5.4'"
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"{needed}. {hint}") from error
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
        from transformers.utils.import_utils import is_tracing  # noqa: F401

        arguments = set(inspect.signature(masking_utils.sdpa_mask).parameters)
    except (ImportError, AttributeError):
        arguments = set()
    if not {"q_length", "q_offset", "kv_offset", "mask_function"} <= arguments:
        raise ImportError(f"{needed}, got {transformers.__version__}. {hint}")
    return (
        (AttentionInterface, fused_attention_forward),
        (AttentionMaskInterface, fused_attention_mask),
    )


class _Registration:
    """The functions of one name: counts who registered them, and knows what was there before."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.count = 0
        self.before: list[Any] = []

    def apply(self) -> None:
        if self.count == 0:
            mappings = [interface._global_mapping for interface, _ in _interfaces()]
            self.before = [mapping.get(self.name) for mapping in mappings]
            for interface, function in _interfaces():
                interface.register(self.name, function)
        self.count += 1

    def undo(self) -> None:
        for interface, function in _interfaces():
            present = interface._global_mapping.get(self.name)
            if self.count == 1 and present is not function:
                raise RuntimeError(
                    f"register: cannot undo, {interface.__name__} has {present!r} as "
                    f"{self.name!r} since. Hint: undo that first"
                )
        self.count -= 1
        if self.count == 0:
            for (interface, _), before in zip(_interfaces(), self.before, strict=True):
                if before is None:
                    del interface._global_mapping[self.name]
                else:
                    interface.register(self.name, before)


_registration = functools.cache(_Registration)


def register(name: str = "fused_attention") -> Handle:
    """Makes `attn_implementation=name` run models of transformers on fused attention, at once.

        register()
        model = AutoModel.from_pretrained(path, attn_implementation="fused_attention")

        with register():
            model.set_attn_implementation("fused_attention")
            model(**inputs)

    Models need their functions on every call: undo the handle only when they are done. Handles
    nest, and restore what was registered before. `register("sdpa")` takes the place of
    transformers' own function, and with it all models that choose "sdpa" by default.

    `model(..., output_attentions=True)` and `generate(..., output_attentions=True)` return the
    weights, computed by tiles. transformers refuses only the same setting in a config
    (`config.output_attentions = True`) for any name but "eager". While compiling, weights are
    returned where the model hands the keyword on to its attention.

    Supports what the models give to the attention function of transformers, see
    `fused_attention_forward`; softcapping (Gemma 2) and sinks (GPT-OSS) included, for which
    transformers refuses "sdpa". Continuous batching is refused by transformers, which serves it
    with its own names only.

    Raises ImportError without transformers 5.4 or newer, ArgumentTypeError for a name that is no
    string, and ArgumentValueError for one that transformers takes for another implementation.
    """
    if not isinstance(name, str):
        wrong_type("name", "a string", type(name).__name__)
    if name == "eager" or any(part in name for part in ("flash", "flex_attention", "/", "|")):
        expected = "a name that transformers does not take for eager, flash or flex attention"
        wrong_value("name", expected, repr(name), 'for example "fused_attention"')
    _interfaces()
    registration = _registration(name)
    return Handle(registration.apply, registration.undo)

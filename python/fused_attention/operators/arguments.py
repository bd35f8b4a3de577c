"""The options of a call as every operator of attention takes them: one list.

After its tensors, an operator (forward, backward, tangents) takes the fields of `Arguments`, under
these names and in this order; csrc/arguments.h has the same list in C++, from which the schemas are
made, and a test compares the two.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from ._torch import is_compiling


class Arguments(NamedTuple):
    """Numbers and tensors in the form that operators take; made by `call.problem.arguments_of`."""

    scale: float
    causal: int  # see CAUSAL
    window_left: int  # tokens, -1 for no limit
    window_right: int
    precision: int  # of float32 products, see PRECISION
    mask: Tensor | None = None  # bool, [B or 1, Hq or 1, Sq or 1, Sk or 1]
    bias: Tensor | None = None  # floating, likewise
    key_padding_mask: Tensor | None = None  # bool [B, Sk]
    alibi_slopes: Tensor | None = None  # float32 [Hq] or [B, Hq], contiguous
    sinks: Tensor | None = None  # float32 (float64 for float64) [Hq], contiguous
    philox: Tensor | None = None  # int64 [2]: seed and offset
    softcap: float = 0.0
    dropout_p: float = 0.0
    cu_seqlens_q: Tensor | None = None  # int32 [B + 1]
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None
    seqused_k: Tensor | None = None  # int32 [B]
    block_table: Tensor | None = None  # int32 [B, pages]
    # For a part of a larger call: the positions of its first query and key, for causal, window,
    # ALiBi and dropout (then k_start is a multiple of 8), and the number of its first head.
    q_start: int = 0
    k_start: int = 0
    head_start: int = 0

    def plain(self) -> tuple[Any, ...]:
        """Returns the numbers of a call without options, for operators that take no more."""
        return self[:_OPTIONS]

    def starts(self) -> tuple[int, int, int]:
        return self.q_start, self.k_start, self.head_start


# The numbers that stand for options that are words.
CAUSAL: dict[Any, int] = {False: 0, "top_left": 1, "bottom_right": 2}
BOTTOM_RIGHT_ONLY = 3  # not causal, but window and ALiBi are measured from the bottom right
PRECISION = {"highest": 0, "high": 1, "medium": 2}

INPUTS = ("query", "key", "value")  # before the arguments, in a forward
DIFFERENTIABLE = (*INPUTS, "bias", "sinks")  # in the order of the results of a backward
SEQUENCES = ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")
TENSORS = ("mask", "bias", "key_padding_mask", "alibi_slopes", "sinks", "philox", *SEQUENCES)

_OPTIONS = Arguments._fields.index("mask")
_PACKED = Arguments._fields.index("cu_seqlens_q")
NUMBERS = tuple(name for name in Arguments._fields if name not in TENSORS)
NAMES = (*INPUTS, *Arguments._fields)  # the inputs of a forward


def _places(names: tuple[str, ...], among: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(among.index(name) for name in names)


_TENSORS_AT = _places(TENSORS, Arguments._fields)
_NUMBERS_AT = _places(NUMBERS, Arguments._fields)
_FIELDS_AT = _places(Arguments._fields, (*TENSORS, *NUMBERS))
_tensors_of, _numbers_of, _in_order, _dense_in_order = map(
    lambda places: itemgetter(*places),
    (_TENSORS_AT, _NUMBERS_AT, _FIELDS_AT, _FIELDS_AT[:_PACKED]),
)


def split(arguments: tuple[Any, ...]) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """Returns the tensors, which autograd saves, and the numbers, as in TENSORS and NUMBERS."""
    if is_compiling():  # Dynamo cannot trace an itemgetter
        numbers = tuple([arguments[i] for i in _NUMBERS_AT])
        return tuple([arguments[i] for i in _TENSORS_AT]), numbers
    return _tensors_of(arguments), _numbers_of(arguments)


def joined(tensors: Any, numbers: Any) -> tuple[Any, ...]:
    """Joins what `split` took apart, in the order of the operators."""
    both = (*tensors, *numbers)
    if is_compiling():
        return tuple([both[i] for i in _FIELDS_AT])
    return _in_order(both)


def joined_if_dense(tensors: Any, numbers: Any) -> tuple[Any, ...]:
    """`joined` for a whole call of dense tensors, without the arguments from cu_seqlens_q on: they
    have their defaults, and passing each would cost time."""
    if is_compiling():
        return joined(tensors, numbers)[:_PACKED]
    return _dense_in_order((*tensors, *numbers))

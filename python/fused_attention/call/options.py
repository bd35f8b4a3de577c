"""The options that a caller of `attention` gives: one record, built once per call.

Names and order are those of the keywords of `attention()`, where their meaning is given. `Problem`
checks the options, and `problem.arguments_of` brings them into the form of the operators
(`operators.arguments`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.bias import CausalVariant

# Defaults that are recognized by identity.
NO_WINDOW = (-1, -1)
NONE = 0.0


class Options(NamedTuple):
    """The options as they came, unchecked."""

    mask: Tensor | None = None
    bias: Tensor | None = None
    key_padding_mask: Tensor | None = None
    causal: Any = False
    diagonal: Any = None
    window_size: Any = NO_WINDOW
    scale: Any = None
    softcap: Any = NONE
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    dropout_p: Any = NONE
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: Any = None
    max_seqlen_k: Any = None
    seqused_k: Tensor | None = None
    block_table: Tensor | None = None
    return_lse: Any = False
    philox_seed: int | Tensor | None = None
    precision: Any = None
    # Not keywords of `attention()`: see `operators.arguments`.
    q_start: int = 0
    k_start: int = 0
    head_start: int = 0


DEFAULTS = Options()


class Keywords(TypedDict, total=False):
    """Types of the options and of `backend`, for type checkers. The overloads have `return_lse`."""

    mask: Tensor | None
    bias: Tensor | None
    key_padding_mask: Tensor | None
    causal: bool | str | CausalVariant
    diagonal: str | None
    window_size: tuple[int, int]
    scale: float | None
    softcap: float
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    dropout_p: float
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqused_k: Tensor | None
    block_table: Tensor | None
    philox_seed: int | Tensor | None
    precision: str | None
    backend: str

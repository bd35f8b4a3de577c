"""The softmax of Megatron-LM (megatron.core.fusions.fused_softmax, 0.16) on `masked_softmax`.

    p = softmax(scale · input, over what mask, causal and window_size leave), [b, np, sq, sk]

Signatures and meaning are the original's: a mask is True (or 1) where masked out, a causal mask
needs sq = sk or sq = 1, and a window is measured from the bottom right. Time and memory are those
of `masked_softmax`. The original's fused kernels serve 16-bit inputs with 16 < sk <= 4096, and sq,
sk and b · np that are multiples of 4; here every size, dtype and device is fused, and so are
softmax_offset and window_size.

Masked elements are exactly 0, and so is a row that is masked out everywhere. The original adds
-10000 to them, which leaves such a row at 1/sk in its unfused path. All that is given applies: its
unfused path drops the mask where there is a window, and the causal mask where there is another
mask; its fused path drops the window, and the mask where there is a causal one. -1 in window_size
is no limit. AttnMaskType.padding_causal is causal here, and causal_bottom_right is too, for any sq
and sk; the original takes both for `padding`. mask_func is called only with the caller's mask, and
only if it is another function than Megatron's attention_mask_func.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..call.problem import check_tensor, shape_of, window_numbers
from ..errors import wrong_value
from ..softmax import (
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
    masked_softmax,
    visible_of,
)

__all__ = [
    "AttnMaskType",
    "FusedScaleMaskSoftmax",
    "ScaledMaskedSoftmax",
    "ScaledSoftmax",
    "ScaledUpperTriangMaskedSoftmax",
    "SoftmaxOne",
]


class AttnMaskType(enum.Enum):
    """Megatron's kinds of masks: those with "causal" in their name are causal, and a mask that is
    given applies to all."""

    padding = 1
    causal = 2
    no_mask = 3
    padding_causal = 4
    arbitrary = 5
    causal_bottom_right = 6


class SoftmaxOne(nn.Module):
    """Softmax over the last dimension of x [b, np, sq, sk] with exp(denominator_offset) added to
    the denominator. denominator_offset: [np] or a number; 0 is softmax off by one."""

    def __init__(self, dim: int | None = None, denominator_offset: Tensor | float = 1.0) -> None:
        super().__init__()
        if dim not in (None, -1):
            raise NotImplementedError(f"dim: expected None or -1, got {dim!r}")
        self.dim = dim
        self.denominator_offset = denominator_offset

    def forward(self, x: Tensor) -> Tensor:
        offset = torch.as_tensor(self.denominator_offset, dtype=x.dtype, device=x.device)
        return masked_softmax(x, sinks=offset.expand(x.shape[-3]))


class FusedScaleMaskSoftmax(nn.Module):
    """Scale, mask and softmax of attention scores.

    input_in_fp16, input_in_bf16: the dtype that the result is cast to if softmax_in_fp32; not both.
    attn_mask_type: an `AttnMaskType`, that of Megatron or apex, or the name or number of one.
    scaled_masked_softmax_fusion: False computes in PyTorch operations, with the same meaning.
    mask_func: mask_func(scale · input, mask) returns the masked scores. None is Megatron's.
    softmax_in_fp32: always is. False: the result keeps the dtype of input.
    scale: multiplies input; None is 1. Needs softmax_in_fp32, as in the original.
    window_size: (left, right) in tokens: row i sees sk - sq - left <= j - i <= sk - sq + right.
    """

    def __init__(
        self,
        input_in_fp16: bool,
        input_in_bf16: bool,
        attn_mask_type: Any,
        scaled_masked_softmax_fusion: bool,
        mask_func: Callable[[Tensor, Tensor], Tensor] | None,
        softmax_in_fp32: bool,
        scale: float | None,
        window_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if input_in_fp16 and input_in_bf16:
            wrong_value("input_in_bf16", "False, since input_in_fp16 is True", True)
        if scale is not None and not softmax_in_fp32:
            wrong_value("softmax_in_fp32", "True where scale is given", softmax_in_fp32)
        self.input_in_fp16 = input_in_fp16
        self.input_in_bf16 = input_in_bf16
        self.input_in_float16 = input_in_fp16 or input_in_bf16
        self.attn_mask_type = attn_mask_type
        self.scaled_masked_softmax_fusion = scaled_masked_softmax_fusion
        self.mask_func = mask_func
        self.softmax_in_fp32 = softmax_in_fp32
        self.scale = scale
        self.window_size = window_size
        _mask_type(attn_mask_type)

    def forward(
        self, input: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None
    ) -> Tensor:
        """Returns the probabilities of input [b, np, sq, sk], contiguous.

        mask: bool or uint8, True (or 1) = masked out, broadcasts to input's shape, or None. Another
        mask_func may take other masks. softmax_offset: [np], exp of it is added to the denominator;
        differentiable. See `masked_softmax` for all else.
        """
        _check_input(input)
        if self.is_kernel_available(mask, *input.shape):
            return self.forward_fused_softmax(input, mask, softmax_offset)
        return self.forward_torch_softmax(input, mask, softmax_offset)

    def is_kernel_available(self, mask: Tensor | None, b: int, np: int, sq: int, sk: int) -> bool:
        """Returns scaled_masked_softmax_fusion: there are no other limits."""
        return self.scaled_masked_softmax_fusion

    def forward_fused_softmax(
        self, input: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None
    ) -> Tensor:
        input, seen, options = self._arguments(input, mask, softmax_offset)
        return self._rounded(masked_softmax(input, seen, **options))

    def forward_torch_softmax(
        self, input: Tensor, mask: Tensor | None, softmax_offset: Tensor | None = None
    ) -> Tensor:
        from ..reference import masked_softmax_reference

        input, seen, options = self._arguments(input, mask, softmax_offset)
        return self._rounded(masked_softmax_reference(input, seen, **options))

    def _arguments(
        self, input: Tensor, mask: Any, softmax_offset: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
        """Returns scores, what is visible, and the options of `masked_softmax`."""
        _check_input(input)
        sq, sk = input.shape[2:]
        options: dict[str, Any] = {"scale": 1.0 if self.scale is None else self.scale}
        options["causal"] = self._causal(sq, sk, mask is not None)
        if softmax_offset is not None:
            options["sinks"] = softmax_offset.to(input.device)
        function, seen = self.mask_func, None
        if mask is None or getattr(function, "__name__", "") == "attention_mask_func":
            function = None
        if function is None:
            seen = visible_of(mask)
        else:
            scores = input.float() if self.input_in_float16 and self.softmax_in_fp32 else input
            scores = scores if self.scale is None else scores * self.scale
            input, options["scale"] = function(scores, mask), 1.0
        if self.window_size is not None:
            window = _window(sq, sk, self.window_size, input.device)
            seen = window if seen is None else seen & window
        return input, seen, options

    def _causal(self, sq: int, sk: int, has_mask: bool) -> bool | str:
        """Returns `causal` of `masked_softmax`; where sq != sk, a mask or window may say it."""
        kind = _mask_type(self.attn_mask_type)
        if kind is AttnMaskType.causal_bottom_right:
            return "bottom_right"
        if "causal" not in kind.name or sq == 1:
            return False
        if sq == sk:
            return "top_left"
        if not has_mask and self.window_size is None:
            hint = "AttnMaskType.causal_bottom_right is for others"
            wrong_value("input", f"sq = sk or sq = 1, as it is {kind.name}", f"{sq} and {sk}", hint)
        return False

    def _rounded(self, probs: Tensor) -> Tensor:
        if not (self.input_in_float16 and self.softmax_in_fp32):
            return probs
        return probs.to(torch.float16 if self.input_in_fp16 else torch.bfloat16)


def _check_input(input: Any) -> None:
    check_tensor("input", input)
    if input.dim() != 4:
        wrong_value("input", "[b, np, sq, sk]", shape_of(input))


def _mask_type(x: Any) -> AttnMaskType:
    name = getattr(x, "name", x)
    for kind in AttnMaskType:
        if name in (kind.name, kind.value):
            return kind
    wrong_value("attn_mask_type", f"one of {', '.join(AttnMaskType.__members__)}", repr(x))


def _window(sq: int, sk: int, window_size: Any, device: torch.device) -> Tensor:
    """Returns what the window leaves visible, bool [sq, sk]."""
    left, right = window_numbers(window_size)
    rows, columns = (torch.arange(n, device=device) for n in (sq, sk))
    ahead = columns - (rows.unsqueeze(1) + sk - sq)
    return (ahead >= (-left if left >= 0 else -sk)) & (ahead <= (right if right >= 0 else sk + sq))

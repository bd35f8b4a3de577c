"""The shapes that are measured: one table, and the inputs made from a row of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One call to measure. Sizes are named as in the documentation of `attention`."""

    name: str
    B: int
    Hq: int
    Hkv: int
    Sq: int
    Sk: int
    D: int
    Dv: int
    dtype: torch.dtype = torch.float32
    causal: bool = False  # only with Sq = Sk, where every library means the same by it
    mask: Literal["", "padding"] = ""
    bias: Literal["", "per head"] = ""  # [1, Hq, Sq, Sk]; its gradient is wanted if backward is
    dropout_p: float = 0.0
    window_size: tuple[int, int] = (-1, -1)  # tokens to the left and right, -1 = all
    backward: bool = False

    def flops(self) -> int:
        """Multiplications and additions of the two (with backward, seven) matrix products."""
        forward = 2 * self.B * self.Hq * (self.D + self.Dv) * self.visible_scores()
        return int(forward * (3.5 if self.backward else 1.0))

    def visible_scores(self) -> int:
        """Of one head, before masks: half of them (by convention) if causal."""
        if self.window_size == (-1, -1):
            return self.Sq * self.Sk // (2 if self.causal else 1)
        left, right = self.window_size
        right = 0 if self.causal else right
        first = [0 if left < 0 else max(i - left, 0) for i in range(self.Sq)]
        last = [self.Sk if right < 0 else min(i + right + 1, self.Sk) for i in range(self.Sq)]
        return sum(max(b - a, 0) for a, b in zip(first, last, strict=True))

    def band(self, first_query: int = 0) -> Tensor:
        """Who sees whom by `causal` and `window_size`: bool [1, 1, Sq - first_query, Sk]."""
        left, right = self.window_size
        right = 0 if self.causal else right
        ahead = torch.arange(self.Sk) - torch.arange(first_query, self.Sq).unsqueeze(1)
        seen = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            seen &= ahead >= -left
        if right >= 0:
            seen &= ahead <= right
        return seen[None, None]


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; those in `differentiated` are what a backward pass is asked for."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    grad_out: Tensor | None
    differentiated: tuple[Tensor, ...]


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Standard normal inputs; a padding mask leaves each sequence between half and all its keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, generator=generator).to(case.dtype)
        return tensor.requires_grad_(case.backward)

    query = normal(case.B, case.Hq, case.Sq, case.D)
    key = normal(case.B, case.Hkv, case.Sk, case.D)
    value = normal(case.B, case.Hkv, case.Sk, case.Dv)
    mask = bias = grad_out = None
    if case.mask:
        lengths = torch.randint(case.Sk // 2, case.Sk + 1, (case.B, 1, 1, 1), generator=generator)
        mask = torch.arange(case.Sk) < lengths  # [B, 1, 1, Sk], True = may attend
    if case.bias:
        bias = normal(1, case.Hq, case.Sq, case.Sk)
    if case.backward:
        grad_out = normal(case.B, case.Hq, case.Sq, case.Dv).detach()
    wanted = (query, key, value) if bias is None else (query, key, value, bias)
    return Inputs(query, key, value, mask, bias, grad_out, wanted if case.backward else ())


def square(name: str, B: int, H: int, S: int, D: int, **options: Any) -> Case:
    return Case(name, B, H, H, S, S, D, D, **options)


DEMO = [
    square("float32", 1, 8, 1024, 64),
    square("float32, causal", 1, 8, 1024, 64, causal=True),
    square("padding mask", 8, 12, 256, 64, mask="padding"),
    square("bfloat16", 1, 8, 1024, 64, dtype=torch.bfloat16),
    square("float16", 1, 8, 1024, 64, dtype=torch.float16),
    square("causal, fwd+bwd", 1, 8, 1024, 64, causal=True, backward=True),
    square("dropout, fwd+bwd", 1, 8, 1024, 64, dropout_p=0.1, backward=True),
    square("bias grad, fwd+bwd", 1, 8, 1024, 64, bias="per head", backward=True),
]

FORWARD_FLOAT32 = [
    square(f"{B}x{H}x{S}x{D}" + (", causal" if causal else ""), B, H, S, D, causal=causal)
    for B, H, S, D in [(1, 8, 1024, 64), (1, 8, 4096, 64), (8, 12, 512, 64), (32, 12, 128, 64)]
    for causal in (False, True)
]

# `bench --quick`: one of each kind, small.
QUICK = [
    square("float32", 1, 8, 1024, 64),
    square("float32, causal", 1, 8, 1024, 64, causal=True),
    square("bfloat16, causal", 1, 8, 1024, 64, dtype=torch.bfloat16, causal=True),
    square("padding mask", 8, 12, 256, 64, mask="padding"),
    square("window 128", 1, 8, 2048, 64, window_size=(128, 0)),
    Case("GQA decode", 4, 32, 8, 1, 4096, 128, 128, dtype=torch.bfloat16),
    square("causal, fwd+bwd", 1, 8, 512, 64, causal=True, backward=True),
    square("dropout, fwd+bwd", 1, 8, 512, 64, dropout_p=0.1, backward=True),
    square("bias grad, fwd+bwd", 1, 8, 512, 64, bias="per head", backward=True),
]
FULL = [
    *FORWARD_FLOAT32,
    *(square(f"bfloat16, {S}", 1, 8, S, 64, dtype=torch.bfloat16) for S in (1024, 4096)),
    square("float16, 1024", 1, 8, 1024, 64, dtype=torch.float16),
    square("head_dim 128", 1, 16, 2048, 128, causal=True),
    square("padding mask, 512", 8, 12, 512, 64, mask="padding"),
    square("bias, 512", 8, 12, 512, 64, bias="per head"),
    square("window 256, 4096", 1, 8, 4096, 64, window_size=(256, 0)),
    Case("GQA, 2048", 1, 32, 8, 2048, 2048, 128, 128, causal=True),
    *(Case(f"GQA decode, {S}", 1, 32, 8, 1, S, 128, 128) for S in (4096, 16384)),
    *(case for case in DEMO if case.backward),
]

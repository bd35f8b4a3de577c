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
    precision: str | None = None  # of float32, ours; what others compute is their default

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


@dataclass(frozen=True)
class CaseClass:
    """Cases whose ratios to PyTorch are judged together, by their geometric mean."""

    name: str
    must: float  # the floor, and what the ceilings of a machine with AMX allow
    aim: float
    cases: list[Case]
    isa: str = ""  # both sides held to it; "": each with the best it has


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_LONG_64 = [(1, 8, 1024, 64), (1, 8, 4096, 64), (8, 12, 512, 64)]
_LONG = [*_LONG_64, (1, 16, 2048, 128)]


def _squares(shapes: list[tuple[int, int, int, int]], dtype: torch.dtype, **options: Any) -> list:
    return [square("x".join(map(str, shape)), *shape, dtype=dtype, **options) for shape in shapes]


def _gqa(dtype: torch.dtype) -> list[Case]:
    return [Case("1x32/8x2048x128", 1, 32, 8, 2048, 2048, 128, 128, dtype=dtype, causal=True)]


_RAGGED = [
    (1, 8, 1024, 32),
    (1, 8, 1024, 80),
    (1, 8, 1024, 96),
    (1, 8, 1024, 256),
    (1, 8, 1000, 64),
]

# Of attention forward.
CLASSES = [
    CaseClass("bf16 full, D 64", 2.3, 3.5, _squares(_LONG_64, BF16)),
    CaseClass("bf16 full, D 128", 1.9, 3.0, _squares(_LONG[3:], BF16)),
    CaseClass("bf16 causal", 2.6, 4.0, _squares(_LONG, BF16, causal=True)),
    CaseClass("fp16 full", 3.0, 5.0, _squares(_LONG, FP16)),
    CaseClass("fp16 causal", 3.9, 6.0, _squares(_LONG, FP16, causal=True)),
    CaseClass("fp32 highest full", 1.8, 2.5, _squares(_LONG, FP32)),
    CaseClass("fp32 highest causal", 2.3, 3.2, _squares(_LONG, FP32, causal=True)),
    CaseClass("fp32 high full", 2.8, 4.0, _squares(_LONG, FP32, precision="high")),
    CaseClass("fp32 high causal", 3.5, 5.0, _squares(_LONG, FP32, precision="high", causal=True)),
    CaseClass("fp32 full, AVX-512", 1.25, 1.5, _squares(_LONG, FP32), isa="avx512"),
    CaseClass("fp32 causal, AVX-512", 1.6, 2.2, _squares(_LONG, FP32, causal=True), isa="avx512"),
    CaseClass("fp32 full, AVX2", 1.0, 1.15, _squares(_LONG_64, FP32), isa="avx2"),
    CaseClass(
        "fp32 causal S 1024, AVX2", 1.4, 1.7, _squares(_LONG_64[:1], FP32, causal=True), isa="avx2"
    ),
    CaseClass(
        "fp32 causal S 512, AVX2", 1.9, 2.3, _squares(_LONG_64[2:], FP32, causal=True), isa="avx2"
    ),
    CaseClass("bf16 full, AVX2", 1.0, 1.2, _squares(_LONG_64, BF16), isa="avx2"),
    *(
        CaseClass(f"{kind}, {name}", must, aim, _squares([shape], dtype))
        for kind, shape, bars in [
            ("short", (32, 12, 128, 64), [(2.0, 4.0), (2.8, 4.0), (1.4, 2.0)]),
            ("tiny", (64, 12, 32, 64), [(2.5, 3.0), (1.9, 3.0), (1.1, 1.5)]),
        ]
        for name, dtype, (must, aim) in zip(
            ("bf16", "fp16", "fp32"), (BF16, FP16, FP32), bars, strict=True
        )
    ),
    CaseClass("padding mask, bf16", 2.5, 4.0, _squares(_LONG_64[2:], BF16, mask="padding")),
    CaseClass("padding mask, fp32", 2.0, 3.0, _squares(_LONG_64[2:], FP32, mask="padding")),
    CaseClass("bias, bf16", 1.8, 3.0, _squares(_LONG_64[2:], BF16, bias="per head")),
    CaseClass("bias, fp32", 1.5, 2.2, _squares(_LONG_64[2:], FP32, bias="per head")),
    CaseClass("window 256, bf16", 12.0, 25.0, _squares(_LONG_64[1:2], BF16, window_size=(256, 0))),
    CaseClass("other D, ragged S, bf16", 1.7, 3.0, _squares(_RAGGED, BF16)),
    CaseClass("GQA causal, bf16", 2.2, 3.0, _gqa(BF16)),
    CaseClass("GQA causal, fp32", 2.1, 3.0, _gqa(FP32)),
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

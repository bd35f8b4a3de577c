"""The shapes that are measured: tables of cases, and the inputs made from a row of them."""

from __future__ import annotations

import math
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
    mask: Literal["", "padding", "random"] = ""  # random: [B, 1, Sq, Sk], a fifth is hidden
    bias: Literal["", "per head"] = ""  # [1, Hq, Sq, Sk]; its gradient is wanted if backward is
    dropout_p: float = 0.0
    window_size: tuple[int, int] = (-1, -1)  # tokens to the left and right, -1 = all
    backward: bool = False
    precision: str | None = None  # how ours computes float32; others use their default
    # The lengths of B sequences, the longest first. Whoever takes packed sequences gets them
    # packed; the others get them padded to Sq = Sk = lengths[0] tokens, with a padding mask.
    lengths: tuple[int, ...] = ()
    page_size: int = 0  # whoever takes pages gets keys and values in pages, in random order

    @property
    def decodes(self) -> bool:
        """Says whether few queries read a long cache, so that memory limits the speed."""
        return self.Sq <= 16 and self.Sk >= 16 * self.Sq

    def flops(self) -> int:
        """Returns the operations of the two (with backward, seven) matrix products."""
        scores = self.B * self.visible_scores()
        if self.lengths:
            scores = sum(n * n for n in self.lengths) // (2 if self.causal else 1)
        forward = 2 * self.Hq * (self.D + self.Dv) * scores
        return int(forward * (3.5 if self.backward else 1.0))

    def bytes_of_cache(self) -> int:
        """Returns the bytes of keys and values."""
        return self.B * self.Hkv * self.Sk * (self.D + self.Dv) * self.dtype.itemsize

    def bytes_of_scores(self) -> int:
        """Returns the bytes of one matrix of all scores."""
        return self.B * self.Hq * self.Sq * self.Sk * self.dtype.itemsize

    def visible_scores(self) -> int:
        """Returns the scores of one head before masks: half of them (by convention) if causal."""
        if self.window_size == (-1, -1):
            return self.Sq * self.Sk // (2 if self.causal else 1)
        left, right = self.window_size
        right = 0 if self.causal else right
        first = [0 if left < 0 else max(i - left, 0) for i in range(self.Sq)]
        last = [self.Sk if right < 0 else min(i + right + 1, self.Sk) for i in range(self.Sq)]
        return sum(max(b - a, 0) for a, b in zip(first, last, strict=True))

    def band(self, first_query: int = 0) -> Tensor:
        """Returns who sees whom by `causal` and `window_size`: [1, 1, Sq - first_query, Sk]."""
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
    """The tensors of one call; a backward pass computes the gradients of `differentiated`."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    grad_out: Tensor | None
    differentiated: tuple[Tensor, ...]


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Draws normal inputs; a padding mask leaves each sequence between half and all its keys."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        tensor = torch.randn(*shape, generator=generator).to(device, case.dtype)
        return tensor.requires_grad_(case.backward)

    query = normal(case.B, case.Hq, case.Sq, case.D)
    key = normal(case.B, case.Hkv, case.Sk, case.D)
    value = normal(case.B, case.Hkv, case.Sk, case.Dv)
    mask = bias = grad_out = None
    if case.mask == "random":
        mask = torch.rand(case.B, 1, case.Sq, case.Sk, generator=generator) > 0.2
        mask[..., 0] = True  # every query sees a key
    elif case.mask or case.lengths:
        lengths = torch.randint(case.Sk // 2, case.Sk + 1, (case.B, 1, 1, 1), generator=generator)
        if case.lengths:
            lengths = torch.tensor(case.lengths).view(-1, 1, 1, 1)
        mask = torch.arange(case.Sk) < lengths  # [B, 1, 1, Sk], True = may attend
    if case.bias:
        bias = normal(1, case.Hq, case.Sq, case.Sk)
    if case.backward:
        grad_out = normal(case.B, case.Hq, case.Sq, case.Dv).detach()
    mask = None if mask is None else mask.to(device)
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
    must: float  # the ratio that must be reached
    aim: float  # the ratio that the ceilings of a machine with AMX allow
    cases: list[Case]
    isa: str = ""  # both sides are limited to it; "": each uses the best that it has


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

# The classes of attention forward.
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

# The cases of `bench --quick` are small, one of each kind.
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
_DTYPES = {"float32": FP32, "bfloat16": BF16, "float16": FP16}
_OTHER_DTYPES = (("float32", FP32), ("float16", FP16))
_BACKWARD: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "dropout": {"dropout_p": 0.1},
    "bias": {"bias": "per head"},
}


def _lengths(count: int, longest: int) -> tuple[int, ...]:
    """Returns lengths from `longest` down to 16 tokens in a geometric series."""
    steps = torch.linspace(math.log2(longest), 4, count)
    return tuple(steps.exp2().round().int().tolist())


# The suites of attention. `--quick` takes the first QUICK_CASES cases of each.
QUICK_CASES = 3
FORWARD = [
    *(square(f"{name}, 1024", 1, 8, 1024, 64, dtype=d) for name, d in _DTYPES.items()),
    *FORWARD_FLOAT32[1:],
    square("bfloat16, 4096", 1, 8, 4096, 64, dtype=BF16),
    square("head_dim 128", 1, 16, 2048, 128, causal=True),
    Case("GQA, 2048", 1, 32, 8, 2048, 2048, 128, 128, causal=True),
]
BACKWARD = [
    square(f"{kind}, {name}", 8, 12, 512, 64, dtype=dtype, backward=True, **options)
    for name, dtype in (("float32", FP32), ("bfloat16", BF16))
    for kind, options in _BACKWARD.items()
]
DECODE = [
    *(Case(f"bfloat16, {S} keys", 1, 32, 8, 1, S, 128, 128, BF16) for S in (4096, 512, 16384)),
    *(Case(f"{name}, 4096 keys", 1, 32, 8, 1, 4096, 128, 128, d) for name, d in _OTHER_DTYPES),
    Case("4 queries, bfloat16", 1, 32, 8, 4, 4096, 128, 128, BF16),
    Case("16 sequences, bfloat16", 16, 32, 8, 1, 2048, 128, 128, BF16),
    *(
        Case(f"pages of {n}, bfloat16", 1, 32, 8, 1, 4096, 128, 128, BF16, page_size=n)
        for n in (16, 256)
    ),
]
VARLEN = [
    Case(f"{len(n)} sequences, {name}", len(n), 8, 8, n[0], n[0], 64, 64, dtype, lengths=n)
    for n in (_lengths(8, 512), _lengths(32, 2048))
    for name, dtype in _DTYPES.items()
]
MASKS = [
    square("padding mask, 512", 8, 12, 512, 64, mask="padding"),
    square("bias, 512", 8, 12, 512, 64, bias="per head"),
    square("window 256, 4096", 1, 8, 4096, 64, window_size=(256, 0)),
    square("random mask, 512", 8, 12, 512, 64, mask="random"),
    square("causal, padding, 512", 8, 12, 512, 64, mask="padding", causal=True),
    square("bias, padding, 512", 8, 12, 512, 64, mask="padding", bias="per head"),
    square("padding, bfloat16", 8, 12, 512, 64, mask="padding", dtype=BF16),
    square("window, bfloat16", 1, 8, 4096, 64, window_size=(256, 0), dtype=BF16),
]

# The cases of `bench` without a suite.
FULL = [*FORWARD, *MASKS[:3], *DECODE[:3], *(case for case in DEMO if case.backward)]

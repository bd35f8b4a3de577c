"""Inputs, exact answers and tolerances: shared by the tests, `verify` and the benchmarks.

A `Case` describes a call; `make_inputs` draws its tensors; `exact` gives the answer in float64 from
`reference.py`; `naive` gives the answer of the same maths done plainly in the inputs' dtype; and
`mismatches` applies the correctness rule: the maximum and the rms of an error may be twice those of
the naive error, plus four units in the last place of the largest (or rms) exact value. Gradients of
logits sum to zero over a row, so sums of them cancel: dbias, and dsinks of masked softmax, whose
rows are long, may be off by one more unit in the last place of the sum of their magnitudes.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _native, reference
from ..attention import attention
from ..call.problem import DTYPES as DTYPES

Results = dict[str, Tensor]  # out, lse and the gradients, by name


@contextlib.contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Inside, the CPU kernels are those of `name`: "avx512", "avx2", "baseline" or "auto"."""
    before = _native.active_isa()
    _native.set_isa(name)
    try:
        yield
    finally:
        _native.set_isa(before)


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Inside, torch uses `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Case:
    """A call of `attention()` without its tensors, by the names of its arguments."""

    dtype: torch.dtype = torch.float32
    B: int = 2
    Hq: int = 2
    Hkv: int = 2
    Sq: int = 17
    Sk: int = 23
    D: int = 16
    Dv: int = 16
    causal: bool | str = False
    diagonal: str | None = None
    window_size: tuple[int, int] = (-1, -1)
    mask: str | None = None  # a broadcast shape such as "1H1K", see `broadcast_shape`
    bias: str | None = None
    bias_dtype: torch.dtype | None = None  # None: dtype
    key_padding: bool = False
    scale: float | None = None
    softcap: float = 0.0
    alibi: str | None = None  # "H" or "BH"
    sinks: bool = False
    dropout_p: float = 0.0
    memory_format: str = "BHSD"  # "BHSD", "BSHD", or "strided" (last stride 2)
    seed: int = 0

    @property
    def offset(self) -> int:
        """The key that query 0 is aligned with."""
        bottom_right = "bottom_right" in (self.causal, self.diagonal)
        return self.Sk - self.Sq if bottom_right else 0

    def broadcast_shape(self, letters: str) -> tuple[int, ...]:
        """Returns the sizes that the letters stand for: (1, Hq, Sq, 1) for "1HQ1"."""
        sizes = {"B": self.B, "H": self.Hq, "Q": self.Sq, "K": self.Sk, "1": 1}
        return tuple(sizes[letter] for letter in letters)


@dataclass(frozen=True)
class Inputs:
    """The tensors of a call: differentiable inputs, other options, and incoming gradients."""

    tensors: Results  # query, key, value and, where used, bias and sinks
    options: dict[str, Any]
    grad_out: Tensor
    grad_lse: Tensor

    @property
    def keywords(self) -> dict[str, Any]:
        """The options as `attention()` names them."""
        names = {"philox": "philox_seed"}
        return {names.get(name, name): option for name, option in self.options.items()}

    def differentiable(self, dtype: torch.dtype | None = None) -> Results:
        """Returns new leaves, cast to `dtype` if given (sinks are never below float32)."""
        return {
            name: x.detach().to(dtype or x.dtype).requires_grad_()
            for name, x in self.tensors.items()
        }


def _laid_out(x: Tensor, memory_format: str) -> Tensor:
    """Returns the same values in another memory format."""
    if memory_format == "BSHD":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if memory_format == "strided":
        wide = torch.empty(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]
    return x


def make_inputs(case: Case) -> Inputs:
    """Draws normal random tensors; a mask hides about 40 %, key padding about 30 %."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def hidden(p: float, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) < p

    B, Hq, Hkv, Sq, Sk, D, Dv = (
        case.B, case.Hq, case.Hkv, case.Sq, case.Sk, case.D, case.Dv
    )  # fmt: skip
    accumulated = torch.promote_types(case.dtype, torch.float32)
    tensors = {
        "query": _laid_out(randn(B, Hq, Sq, D), case.memory_format),
        "key": _laid_out(randn(B, Hkv, Sk, D), case.memory_format),
        "value": _laid_out(randn(B, Hkv, Sk, Dv), case.memory_format),
    }
    if case.bias:
        shape = case.broadcast_shape(case.bias)
        tensors["bias"] = randn(*shape, dtype=case.bias_dtype or case.dtype)
    if case.sinks:
        tensors["sinks"] = randn(Hq, dtype=accumulated)
    options: dict[str, Any] = {
        "causal": case.causal,
        "diagonal": case.diagonal,
        "window_size": case.window_size,
        "scale": case.scale,
        "softcap": case.softcap,
        "dropout_p": case.dropout_p,
    }
    if case.mask:
        options["mask"] = ~hidden(0.4, *case.broadcast_shape(case.mask))
    if case.key_padding:
        options["key_padding_mask"] = hidden(0.3, B, Sk)
    if case.alibi:
        options["alibi_slopes"] = torch.rand(
            case.broadcast_shape(case.alibi), generator=generator, dtype=torch.float32
        )
    if case.dropout_p:
        options["philox"] = torch.tensor([0x123456789ABCDEF + case.seed, 5])
    return Inputs(tensors, options, randn(B, Hq, Sq, Dv), randn(B, Hq, Sq, dtype=accumulated))


def _differentiate(out: Tensor, lse: Tensor, leaves: Results, inputs: Inputs) -> Results:
    """Returns a call's results and the gradients of sum(out * grad_out) + sum(lse * grad_lse)."""
    # A row that sees nothing has lse = -inf, whose gradient has no meaning.
    grad_lse = inputs.grad_lse.to(lse.dtype).masked_fill(lse.detach().isinf(), 0.0)
    gradients = torch.autograd.grad(
        (out, lse), list(leaves.values()), (inputs.grad_out.to(out.dtype), grad_lse)
    )
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def run(inputs: Inputs, **options: Any) -> Results:
    """Runs `attention()` forward and backward on these inputs."""
    leaves: dict[str, Any] = inputs.differentiable()
    out, lse = attention(**leaves, **inputs.keywords, return_lse=True, **options)
    return _differentiate(out, lse, leaves, inputs)


def exact(inputs: Inputs) -> Results:
    """Runs the definition, `reference.py`, forward and backward in float64."""
    leaves: dict[str, Any] = inputs.differentiable(torch.float64)
    out, lse = reference.attention_reference(**leaves, **inputs.options, return_lse=True)
    return _differentiate(out, lse, leaves, inputs)


def naive(inputs: Inputs) -> tuple[Results, Results]:
    """Runs the plain maths in two orders of summation, because one may be accurate by luck."""
    return _naive(inputs, backwards=False), _naive(inputs, backwards=True)


def _naive(inputs: Inputs, backwards: bool) -> Results:
    """Computes whole matrices in the inputs' dtype: FlashAttention-2 (Dao 2023, Algorithm 2).

    With 16-bit inputs, products accumulate and the softmax runs in float32; weights, their gradient
    and the results are rounded once.
    """
    tensors, options = inputs.tensors, inputs.options
    query, key, value = (tensors[name] for name in ("query", "key", "value"))
    dtype = query.dtype
    accumulated = torch.promote_types(dtype, torch.float32)
    B, Hq, Sq, D = query.shape
    Hkv, Sk = key.shape[1], key.shape[2]
    group = Hq // Hkv

    def rounded(x: Tensor) -> Tensor:
        return x.to(dtype).to(accumulated)

    # All sums, of products and of the softmax, run from the first term or from the last.
    def turned(x: Tensor, *dims: int) -> Tensor:
        return x.flip(dims) if backwards else x

    def product(a: Tensor, b: Tensor) -> Tensor:
        return turned(a, -1) @ turned(b, -2)

    def per_key_head(x: Tensor) -> Tensor:
        return x.unflatten(1, (Hkv, group)).sum(2)

    q = query.to(accumulated)
    k, v = (x.to(accumulated).repeat_interleave(group, 1) for x in (key, value))
    do = inputs.grad_out.to(accumulated)
    scale = options["scale"] if options["scale"] is not None else 1.0 / math.sqrt(D)
    used = torch.full((B,), Sk)
    off = reference.diagonal_offset(options["causal"], Sq, used, options.get("diagonal"))
    seen = reference.visible(
        (B, Hq, Sq, Sk),
        off,
        used,
        options["causal"],
        options["window_size"],
        options.get("mask"),
        options.get("key_padding_mask"),
    )
    softcap = options["softcap"]
    rest = {"bias": tensors.get("bias"), "alibi_slopes": options.get("alibi_slopes")}
    s = reference.scores(turned(q, -1), turned(k, -1), off, scale=scale, softcap=softcap, **rest)
    sinks = tensors.get("sinks")
    p, lse = reference.softmax(turned(torch.where(seen, s, -math.inf), -1), sinks)
    p = turned(p, -1)
    kept = torch.ones_like(p)
    if options["dropout_p"]:
        kept = reference.dropout(kept, options["dropout_p"], options["philox"])
    dropped = rounded(p * kept)
    out = rounded(product(dropped, v))

    # A backward computes p from lse, and delta from the rounded output.
    p = torch.exp(torch.where(seen, s, -math.inf) - lse.unsqueeze(-1)).nan_to_num(0.0)
    grad_lse = inputs.grad_lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)
    delta = turned(do * out, -1).sum(-1, keepdim=True) - grad_lse
    ds = p * (product(do, v.mT) * kept - delta)
    dlogits = ds
    if softcap:
        ds = ds * (1 - torch.tanh(scale * product(q, k.mT) / softcap) ** 2)
    results = {
        "out": out.to(dtype),
        "lse": lse,
        "dquery": (scale * product(rounded(ds), k)).to(dtype),
        "dkey": per_key_head(scale * product(rounded(ds).mT, q)).to(dtype),
        "dvalue": per_key_head(product(dropped.mT, do)).to(dtype),
    }
    if "bias" in tensors:
        bias = tensors["bias"]
        results["dbias"] = dlogits.sum_to_size(bias.shape).to(bias.dtype)
        results["magnitude of dbias"] = dlogits.abs().sum_to_size(bias.shape)
    if sinks is not None:
        weight = torch.exp(sinks.view(-1, 1, 1) - lse.unsqueeze(-1))
        results["dsinks"] = -(weight.nan_to_num(0.0) * delta).sum((0, 2, 3))
    return results


# The relative error that is always allowed: four units in the last place. float64 is allowed more,
# because the exact answer, in another order of sums, has rounding errors of its own.
FLOOR = {dtype: 4 * torch.finfo(dtype).eps for dtype in DTYPES} | {torch.float64: 1e-13}


@dataclass(frozen=True)
class Error:
    """The error of one result by one measure, and how large it may be."""

    result: str
    measure: str  # "max", "rms"; "shape", "dtype" or "NaN and infinity", which are right or wrong
    error: float
    allowed: float
    message: str

    @property
    def is_wrong(self) -> bool:
        return not self.error <= self.allowed

    @property
    def ratio(self) -> float:
        """Returns error / allowed; above 1 the result is wrong."""
        if self.error == 0:
            return 0.0
        return self.error / self.allowed if self.allowed and self.error == self.error else math.inf


def _wrong(result: str, measure: str, message: str) -> Error:
    return Error(result, measure, math.inf, 0.0, f"{result}: {message}")


def errors(
    got: Results, exact: Results, naive: tuple[Results, ...], factor: float = 2.0
) -> Iterator[Error]:
    """Yields the errors of `got`, which may lack some of the results, by the correctness rule.

    factor: how many times the naive error is allowed. Among thousands of random cases a few exceed
    twice the naive error by chance.
    """
    for name, want in exact.items():
        if name not in got:
            continue
        mine = got[name]
        if mine.shape != want.shape:
            shapes = f"shape {tuple(mine.shape)}, expected {tuple(want.shape)}"
            yield _wrong(name, "shape", shapes)
            continue
        if mine.dtype != naive[0][name].dtype:
            yield _wrong(name, "dtype", f"{mine.dtype}, expected {naive[0][name].dtype}")
            continue
        floor = FLOOR[(mine if name == "lse" else got["out"]).dtype]
        mine = mine.double()
        special = ~want.isfinite()
        if not torch.equal(mine[special].nan_to_num(), want[special].nan_to_num()) or not bool(
            mine[~special].isfinite().all()
        ):
            message = "NaN or infinity at other places than expected"
            yield _wrong(name, "NaN and infinity", message)
            continue
        plain = [answer[name].double()[~special] for answer in naive]
        mine, want = mine[~special], want[~special]
        if want.numel() == 0:
            continue
        measures: dict[str, Callable[[Tensor], float]] = {
            "max": lambda x: x.abs().max().item(),
            "rms": lambda x: x.square().mean().sqrt().item(),
        }
        for measure, of in measures.items():
            error, naive_error = of(mine - want), max(of(x - want) for x in plain)
            # A relative error of the denominator is an absolute error of lse, its logarithm.
            size = max(of(want), 1.0) if name == "lse" else of(want)
            allowed = factor * naive_error + floor * size
            if f"magnitude of {name}" in naive[0]:
                allowed += floor / 4 * of(naive[0][f"magnitude of {name}"])
            message = f"{name}: {measure} error {error:.3g}, allowed {allowed:.3g}"
            yield Error(name, measure, error, allowed, message)


def mismatches(
    got: Results, exact: Results, naive: tuple[Results, ...], factor: float = 2.0
) -> list[str]:
    """Returns a message for each way in which `got` breaks the correctness rule."""
    missing = [f"{name}: missing" for name in exact if name not in got]
    return missing + [e.message for e in errors(got, exact, naive, factor) if e.is_wrong]


# An error of up to CHANCE times the allowed one may be chance, since the naive error varies too.
# Then other inputs decide, in at most DRAWS draws altogether.
CHANCE, DRAWS = 3.0, 3


def luck_aside(check_draw: Callable[[int], list[str] | None]) -> list[str]:
    """Returns the faults of draw 0 or, if they may be chance (None), of the DRAWS - 1 after it."""
    wrong = check_draw(0)
    if wrong is not None:
        return wrong
    again = [check_draw(draw) for draw in range(1, DRAWS)]
    return [text for wrong in again for text in (["missed again"] if wrong is None else wrong)]


def check_answers(
    case: Case,
    answer: Callable[[Case], tuple[Results, Results, tuple[Results, ...]]],
    factor: float = 2.0,
) -> list[str]:
    """Returns the `mismatches` of the results (got, exact, naive) that `answer` gives for the case.

    A near miss is repeated with other inputs, all of which must pass.
    """

    def draw(number: int) -> list[str] | None:
        got, want, plain = answer(replace(case, seed=case.seed + number * 1_000_000))
        wrong = mismatches(got, want, plain, factor)
        near = all(e.ratio <= CHANCE for e in errors(got, want, plain, factor))
        return None if wrong and near and len(got) >= len(want) else wrong

    return luck_aside(draw)


def check(case: Case, factor: float = 2.0, **options: Any) -> list[str]:
    """Runs `check_answers` on `attention()` for one case."""

    def answer(case: Case) -> tuple[Results, Results, tuple[Results, ...]]:
        inputs = make_inputs(case)
        return run(inputs, **options), exact(inputs), naive(inputs)

    return check_answers(case, answer, factor)


# -- The matrix --------------------------------------------------------------------------

# (B, Hq, Hkv, Sq, Sk, D, Dv). Tiles are 48, 24, 12 or 6 queries by 96 keys: no multiples of these.
SHAPES = {
    "tiny": (1, 1, 1, 1, 1, 1, 1),
    "decode": (2, 4, 2, 1, 197, 32, 32),
    "one key": (2, 2, 1, 51, 1, 8, 8),
    "ragged": (2, 3, 3, 53, 101, 33, 33),
    "long query": (1, 2, 2, 131, 19, 16, 16),
    "gqa": (2, 6, 2, 50, 98, 64, 64),
    "mqa narrow value": (1, 5, 1, 49, 200, 80, 17),
    "wide value": (1, 2, 2, 20, 33, 3, 70),
}
AXES: dict[str, list[Any]] = {
    "shape": list(SHAPES),
    "dtype": list(DTYPES),
    "causal": [False, "top_left", "bottom_right"],
    "window_size": [(-1, -1), (7, -1), (-1, 3), (40, 0), (5, 60)],
    "mask": [None, "BHQK", "11QK", "B11K", "1HQ1", "1111"],
    "bias": [None, "BHQK", "1HQK", "11QK", "B1QK", "BH1K", "1H1K", "111K", "BHQ1", "11Q1", "1H11"],
    "bias_dtype": [None, torch.float32],
    "key_padding": [False, True],
    "scale": [None, -0.4],
    "softcap": [0.0, 3.0],
    "alibi": [None, "H", "BH"],
    "sinks": [False, True],
    "dropout_p": [0.0, 0.25, 1.0],
    "memory_format": ["BHSD", "BSHD", "strided"],
}


# Changes of the plain case in which faults are visible that no feature shows alone.
TOGETHER: tuple[dict[str, Any], ...] = (
    {"Sq": 131, "Sk": 19, "causal": "top_left"},
    {"Sq": 131, "Sk": 19, "causal": "bottom_right", "window_size": (5, 60)},
    {"Sq": 131, "Sk": 19, "window_size": (40, 60)},
    {"causal": "bottom_right", "window_size": (7, -1)},
    {"Sq": 40, "Sk": 40},
    {"Sq": 40, "Sk": 40, "mask": "BHQK"},
    {"Sq": 40, "Sk": 40, "mask": "B11K"},
    {"Sq": 40, "Sk": 40, "bias": "BHQK"},
    {"softcap": 3.0, "bias": "BHQK"},
    {"softcap": 3.0, "mask": "BHQK"},
    {"softcap": 3.0, "scale": -0.4},
    {"Hq": 6, "Hkv": 2, "softcap": 3.0, "bias": "1HQK"},
    {"alibi": "H", "causal": "bottom_right"},
    {"alibi": "H", "causal": "top_left"},
    {"sinks": True, "mask": "BHQK"},
    {"dropout_p": 0.25, "Hq": 6, "Hkv": 2},
    # What PyTorch's signature can say, in 16 bits
    {"dtype": torch.bfloat16, "causal": "top_left", "Hq": 6, "Hkv": 2},
    {"dtype": torch.bfloat16, "mask": "B11K", "memory_format": "BSHD"},
    {"dtype": torch.bfloat16, "bias": "BHQK"},
    {"dtype": torch.float16, "causal": "top_left", "scale": 0.3},
    {"dtype": torch.float16, "mask": "BHQK", "Hq": 6, "Hkv": 2},
    {"dtype": torch.float16, "bias": "1HQK", "memory_format": "BSHD"},
    # diagonal means something only without causal, so it is no axis of its own.
    {"diagonal": "bottom_right", "window_size": (7, 3)},
    {
        "diagonal": "bottom_right",
        "window_size": (7, -1),
        "Hq": 6,
        "Hkv": 2,
        "dtype": torch.bfloat16,
    },
    {"diagonal": "bottom_right", "window_size": (-1, 3), "alibi": "BH", "key_padding": True},
    {"diagonal": "bottom_right", "alibi": "H", "Sq": 1, "Sk": 197},
    {"diagonal": "bottom_right", "window_size": (40, 60), "Sq": 131, "Sk": 19},
)


def case_of(values: Sequence[Any], seed: int) -> Case:
    """Returns the case that has these values, one for each of AXES."""
    options = dict(zip(AXES, values, strict=True))
    B, Hq, Hkv, Sq, Sk, D, Dv = SHAPES[options.pop("shape")]
    return Case(B=B, Hq=Hq, Hkv=Hkv, Sq=Sq, Sk=Sk, D=D, Dv=Dv, **options, seed=seed)


def single_features() -> list[Case]:
    """Returns a case for each value of each axis, all else plain, and the cases of TOGETHER.

    These name a fault best.
    """
    plain = [values[0] for values in AXES.values()]
    plain[0] = "ragged"
    cases: dict[tuple[Any, ...], None] = {}
    for axis, values in enumerate(AXES.values()):
        for value in values:
            cases[tuple(plain[:axis] + [value] + plain[axis + 1 :])] = None
    alone = [case_of(values, seed) for seed, values in enumerate(cases, 1)]
    more = enumerate(TOGETHER, len(alone) + 1)
    return alone + [replace(case_of(plain, seed), **changes) for seed, changes in more]


def pairs_of_features() -> list[Case]:
    """Returns a covering set: any two values of two axes meet in some case. Deterministic.

    Greedy (Cohen et al. 1997, "The AETG System"): a row starts with a missing pair, and takes
    on each other axis, in random order, the value that covers the most missing pairs.
    """
    shuffled = random.Random(2)
    sizes = [len(values) for values in AXES.values()]
    count = len(sizes)

    def pair(a: tuple[int, int], b: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        return (a, b) if a < b else (b, a)

    missing = {  # pairs of (axis, index of its value); a dict keeps their order
        ((a, i), (b, j)): None
        for b in range(count)
        for a in range(b)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        axes = [axis for axis in range(count) if axis not in row]
        shuffled.shuffle(axes)
        for axis in axes:

            def gain(value: int, axis: int = axis, row: dict[int, int] = row) -> int:
                return sum(pair((axis, value), chosen) in missing for chosen in row.items())

            values = list(range(sizes[axis]))
            shuffled.shuffle(values)
            row[axis] = max(values, key=gain)
        for a in row.items():
            for b in row.items():
                missing.pop((a, b), None)
        rows.append([values[row[axis]] for axis, values in enumerate(AXES.values())])
    return [case_of(values, seed) for seed, values in enumerate(rows, 1)]


def random_features(count: int, seed: int) -> Iterator[Case]:
    """Yields cases drawn from all combinations."""
    choose = random.Random(seed).choice
    for number in range(count):
        yield case_of([choose(values) for values in AXES.values()], 1000 * seed + number)

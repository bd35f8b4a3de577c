"""Checks an implementation of attention, ours or another one, against the correctness matrix.

Every case of `testing` (each feature alone, every pair of features, random combinations) is
compared with the definition in float64, forward and backward, under the rule of `testing.errors`.
A few probes test what random inputs do not show: overflow, NaN in the padding, other bits in a
second call, and dropout that cannot be seeded.

A failure is named by imitation: the definition is given one fault at a time (a mask inverted, the
scale forgotten, ...), and the fault that reproduces the wrong result is reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..attention import attention
from ..call.backends import BACKENDS, NAMES
from ..errors import ArgumentValueError
from . import testing
from .console import Progress, table
from .foreign import Implementation, NotOffered
from .testing import CHANCE, DRAWS, Case, Error, Inputs, Results

RANDOM_CASES = 2000  # in the whole matrix; none with --quick
RANDOM_FACTOR = 4.0  # times the naive error, instead of 2: see testing.errors
IMITATED = 0.1  # a result is this much closer to its imitation than to the truth

AttentionFunction = Callable[..., Any]  # called like `attention()`; may raise NotOffered


# -- Targets -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """An implementation, and how to call it."""

    name: str
    call: AttentionFunction
    isa: str | None = None
    has_lse: bool = True

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        return testing.cpu_isa(self.isa) if self.isa else contextlib.nullcontext()


def own_targets(backend: str | None = None, isa: str | None = None) -> list[Target]:
    """Returns every usable backend and instruction set, or only the named one."""
    if backend is not None and backend not in NAMES:
        raise ArgumentValueError(f"--backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    if isa is not None and isa not in _native.isas():
        usable = ", ".join(_native.isas())
        raise ArgumentValueError(f"--isa: expected one of {usable} on this machine, got {isa!r}")
    if isa is not None and backend not in (None, "cpu"):
        raise ArgumentValueError(f"--isa: only the backend cpu has any, not {backend!r}")

    def call_of(name: str) -> AttentionFunction:
        def call(*tensors: Tensor, **options: Any) -> Any:
            try:
                return attention(*tensors, **options, backend=name)
            except NotImplementedError as error:
                raise NotOffered(str(error)) from error

        return call

    targets = []
    for row in BACKENDS:
        missing = row.missing()
        if missing:
            if row.name == backend:
                raise ArgumentValueError(f"--backend: {backend!r} cannot run here: {missing}")
        elif row.name == "cpu" and backend in (None, "cpu"):
            isas = [isa] if isa else _native.isas()
            targets += [Target(f"cpu, {name}", call_of("cpu"), isa=name) for name in isas]
        elif backend in (None, row.name) and isa is None:
            targets.append(Target(row.name, call_of(row.name)))
    return targets


def foreign_target(implementation: Implementation) -> Target:
    return Target(
        implementation.name,
        implementation,
        has_lse=implementation.signature == "attention" and implementation.takes("return_lse"),
    )


def call(target: Target, inputs: Inputs, backward: bool) -> tuple[Results, list[str]]:
    """Returns the results of a call, with gradients, and its faults other than wrong numbers."""
    leaves = inputs.differentiable() if backward else inputs.tensors
    before = {name: x.detach().clone() for name, x in leaves.items()}
    lse_wanted = {"return_lse": True} if target.has_lse else {}
    answer = target.call(**leaves, **inputs.keywords, **lse_wanted)
    out, lse = answer if target.has_lse else (answer, None)
    results = {"out": out.detach()}
    outputs, incoming = [out], [inputs.grad_out.to(out.dtype)]
    faults = []
    for name, x in before.items():
        if not torch.equal(x, leaves[name].detach()):
            faults.append(f"{name} was written to")
            leaves[name].detach().copy_(x)
    if faults:
        return results, faults
    if lse is not None:
        results["lse"] = lse.detach()
        if lse.requires_grad:
            outputs.append(lse)
            # A row that sees nothing has lse = -inf, whose gradient has no meaning.
            zero = lse.detach().isinf()
            incoming.append(inputs.grad_lse.to(lse.dtype).masked_fill(zero, 0.0))
        elif backward and bool(inputs.grad_lse.any()):
            faults.append("lse is not differentiable")
    if backward and out.shape == inputs.grad_out.shape:
        if not out.requires_grad:
            faults.append("out is not differentiable")
        else:
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), incoming, allow_unused=True
            )
            for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
                if gradient is None and x.numel():
                    faults.append(f"no gradient of {name}")
                elif gradient is not None:
                    results[f"d{name}"] = gradient
    return results, faults


# -- Faults ------------------------------------------------------------------------------


def imitations(case: Case, inputs: Inputs) -> Iterator[tuple[str, Inputs, float]]:
    """Yields (fault, inputs for which the definition shows it, factor of its result)."""
    tensors, options = inputs.tensors, inputs.options
    scale = options["scale"] if options["scale"] is not None else case.D**-0.5

    def with_options(**changed: Any) -> Inputs:
        return replace(inputs, options={**options, **changed})

    def with_tensors(**changed: Tensor) -> Inputs:
        return replace(inputs, tensors={**tensors, **changed})

    def without(name: str) -> Inputs:
        return replace(
            inputs,
            tensors={n: x for n, x in tensors.items() if n != name},
            options={n: x for n, x in options.items() if n != name},
        )

    if case.causal:
        other, wrong = ("bottom_right", "bottom-right instead of top-left")
        if case.causal == "bottom_right":
            other, wrong = ("top_left", "top-left instead of bottom-right")
        yield f"causal aligned {wrong}", with_options(causal=other), 1.0
        yield "causal ignored", with_options(causal=False), 1.0
        off = case.Sk - case.Sq if case.causal == "bottom_right" else 0
        diagonal = torch.ones(1, 1, case.Sq, case.Sk, dtype=torch.bool).tril(off - 1)
        mask = options["mask"] & diagonal if case.mask else diagonal
        yield "causal hides the diagonal", with_options(mask=mask), 1.0
    if case.mask:
        yield "mask inverted: True taken for hidden", with_options(mask=~options["mask"]), 1.0
        yield "mask ignored", without("mask"), 1.0
    if case.key_padding:
        padding = options["key_padding_mask"]
        yield (
            "key_padding_mask inverted: True taken for visible",
            with_options(key_padding_mask=~padding),
            1.0,
        )
        yield "key_padding_mask ignored", without("key_padding_mask"), 1.0
    left, right = case.window_size
    if (left, right) != (-1, -1):
        yield "window_size ignored", with_options(window_size=(-1, -1)), 1.0
        yield "window_size: left and right exchanged", with_options(window_size=(right, left)), 1.0
        for name, change in (("long", 1), ("short", -1)):
            sides = tuple(max(side + change, 0) if side >= 0 else -1 for side in (left, right))
            yield f"window one token too {name}", with_options(window_size=sides), 1.0
    if case.scale is not None:
        yield "scale ignored", with_options(scale=None), 1.0
    yield "scale missing", with_options(scale=1.0), 1.0
    yield "scale applied twice", with_options(scale=scale * scale), 1.0
    if case.softcap:
        yield "softcap ignored", with_options(softcap=0.0), 1.0
    if case.bias:
        bias = tensors["bias"]
        yield "bias ignored", with_tensors(bias=0 * bias), 1.0
        yield "bias multiplied by the scale", with_tensors(bias=scale * bias), 1.0
        yield "bias subtracted", with_tensors(bias=-bias), 1.0
    if case.alibi:
        slopes = options["alibi_slopes"]
        yield "alibi_slopes ignored", without("alibi_slopes"), 1.0
        yield "alibi_slopes with the wrong sign", with_options(alibi_slopes=-slopes), 1.0
    if case.sinks:
        yield "sinks ignored", with_tensors(sinks=tensors["sinks"] - 1e9), 1.0
        yield "sinks multiplied by the scale", with_tensors(sinks=scale * tensors["sinks"]), 1.0
    if case.dropout_p:
        yield "dropout not scaled", inputs, 1.0 - round(case.dropout_p * 65536) / 65536
        yield "dropout ignored", with_options(dropout_p=0.0), 1.0
    if case.Hq != case.Hkv > 1:
        repeated = {n: tensors[n].repeat(1, case.Hq // case.Hkv, 1, 1) for n in ("key", "value")}
        yield "GQA heads interleaved: h reads h % Hkv", with_tensors(**repeated), 1.0


def distance(got: Tensor, want: Tensor) -> float:
    """Returns the rms of the difference; infinite if NaN or infinity are at other places."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return math.inf
    finite = want.isfinite()
    if not bool(finite.any()):
        return 0.0
    return (got - want)[finite].square().mean().sqrt().item()


def multiple(got: Tensor, want: Tensor) -> float | None:
    """Returns the factor, other than 1, by which `got` is a multiple of `want`, or None."""
    got, want = got.double().flatten(), want.double().flatten()
    norm = want.dot(want).item()
    factor = got.dot(want).item() / norm if norm > 0 else math.nan
    if not abs(factor - 1) > 0.01:
        return None
    return factor if distance(got, factor * want) < 0.01 * distance(got, want) else None


def name_of_fault(
    target: Target, case: Case, inputs: Inputs, got: Results, exact: Results, wrong: list[Error]
) -> str:
    """Names the fault that makes these results wrong, as far as it can be told."""
    for measure in ("shape", "dtype"):
        named = [error.message for error in wrong if error.measure == measure]
        if named:
            return named[0]
    names = {error.result for error in wrong}
    forward = "out" in names
    judged = "out" if forward else sorted(names)[0]
    mine, truth = got[judged], exact[judged]
    where = "" if forward or judged == "lse" else f", in the backward only ({judged})"

    for fault, changed, factor in imitations(case, inputs):
        imitated = testing.exact(changed).get(judged)
        if imitated is None or imitated.shape != mine.shape:
            continue
        to_truth, to_imitation = distance(mine, truth), distance(mine, factor * imitated)
        if to_imitation < IMITATED * to_truth:
            return fault + where

    blind = exact["lse"].isneginf() if not case.sinks else torch.zeros_like(exact["lse"]).bool()
    if forward and bool(blind.any()) and distance(mine[~blind], truth[~blind]) < 1e-2:
        bad = " but NaN" if bool(mine[blind].isnan().any()) else ""
        return f"fully masked rows are not 0{bad}"
    if not forward and bool(blind.any()) and bool(mine.isnan().any()):
        return f"NaN in the gradient of fully masked rows ({judged})"
    if bool((truth.isfinite() & ~mine.isfinite()).any()):
        return f"NaN or infinity without a reason ({judged})"
    if case.layout != "BHSD" and passes(target, replace(case, layout="BHSD"), not forward):
        return f"strides ignored: wrong for {case.layout} memory"
    times = multiple(mine, truth)
    if times is not None:
        return f"{judged} is {times:.3g} times what it should be"
    size = truth[truth.isfinite()].double().square().mean().sqrt().item()
    if distance(mine, truth) < 0.02 * size:
        return f"not accurate enough ({judged}, {str(case.dtype).removeprefix('torch.')})"
    return f"wrong result ({judged}), the cause could not be told"


def passes(target: Target, case: Case, backward: bool) -> bool:
    inputs, exact, naive = answers_to(target, case)
    try:
        got, faults = call(target, inputs, backward)
    except Exception:  # the function may raise anything
        return False
    return not faults and not any(e.is_wrong for e in testing.errors(got, exact, naive))


# -- Probes ------------------------------------------------------------------------------


def random_call(seed: int = 0, B: int = 2, H: int = 2, S: int = 40, D: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, H, S, D, generator=generator) for _ in range(3)]


def probe_overflow(call: AttentionFunction) -> str | None:
    """Tests scores of about 1000, whose exponentials overflow float32."""
    query, key, value = random_call()
    out = call(query * 100, key * 10, value)
    return None if bool(out.isfinite().all()) else "softmax not max-subtracted: overflow"


def probe_padding(call: AttentionFunction, **hidden: Tensor) -> str | None:
    """Tests that NaN in hidden keys and values does not change the result."""
    query, key, value = random_call()
    clean = call(query, key, value, **hidden)
    key[:, :, -5:] = value[:, :, -5:] = math.nan
    same = torch.allclose(call(query, key, value, **hidden), clean)
    return None if same else f"NaN in padding leaks ({', '.join(hidden)})"


def probe_key_padding(call: AttentionFunction) -> str | None:
    return probe_padding(call, key_padding_mask=(torch.arange(40) >= 35).expand(2, 40))


def probe_mask_padding(call: AttentionFunction) -> str | None:
    return probe_padding(call, mask=(torch.arange(40) < 35).view(1, 1, 1, 40))


def probe_padding_gradients(call: AttentionFunction, **options: Any) -> str | None:
    """Tests that NaN in hidden keys and values does not reach the gradients."""
    query, key, value = random_call()
    key[:, :, -5:] = value[:, :, -5:] = math.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out = call(*leaves, key_padding_mask=(torch.arange(40) >= 35).expand(2, 40), **options)
    gradients = torch.autograd.grad(out, leaves, torch.ones_like(out))
    clean = all(bool(gradient.isfinite().all()) for gradient in gradients)
    return (
        None
        if clean
        else "NaN in padding leaks into gradients" + "".join(f" with {name}" for name in options)
    )


def probe_padding_softcap(call: AttentionFunction) -> str | None:
    return probe_padding_gradients(call, softcap=2.0)


def probe_nan(call: AttentionFunction) -> str | None:
    """Tests that a visible NaN reaches the result."""
    query, key, value = random_call()
    value[:, :, 3] = math.nan
    return None if bool(call(query, key, value).isnan().all()) else "a visible NaN is swallowed"


def probe_repeat(call: AttentionFunction) -> str | None:
    tensors = random_call(B=4, S=200)
    bits = [call(*tensors) for _ in range(3)]
    same = all(torch.equal(bits[0], other) for other in bits)
    return None if same else "not deterministic: a second call has other bits"


def probe_dropout(call: AttentionFunction) -> str | None:
    """Tests unseeded dropout by statistics: with values of 1, results vary around 1."""
    query, key, value = random_call(S=100)
    torch.manual_seed(0)
    p, ones = 0.25, torch.ones_like(value)
    if torch.allclose(call(query, key, value, dropout_p=p), call(query, key, value)):
        return "dropout ignored"
    total = call(query, key, ones, dropout_p=p)
    if torch.allclose(total, ones):
        return "dropout before the softmax's sum: weights still add up to 1"
    if abs(total.mean().item() - (1 - p)) < 0.03:
        return "dropout not scaled"
    if abs(total.mean().item() - 1) > 0.03:
        return f"dropout changes the sum of weights to {total.mean():.2f} on average"
    first = call(query, key, ones, dropout_p=p)
    return "dropout drops the same every time" if torch.equal(first, total) else None


PROBES: dict[str, Callable[[AttentionFunction], str | None]] = {
    "overflow": probe_overflow,
    "NaN behind key_padding_mask": probe_key_padding,
    "NaN behind mask": probe_mask_padding,
    "gradients and NaN behind key_padding_mask": probe_padding_gradients,
    "gradients and NaN behind key_padding_mask, softcap": probe_padding_softcap,
    "visible NaN": probe_nan,
    "repetition": probe_repeat,
    "dropout statistics": probe_dropout,
}


# -- The run -----------------------------------------------------------------------------


def features_of(case: Case) -> list[str]:
    """Returns the rows of the table of errors to which a case belongs."""
    used = {
        "mask": case.mask,
        "bias": case.bias,
        "key_padding_mask": case.key_padding,
        "causal": case.causal,
        "window_size": case.window_size != (-1, -1),
        "scale": case.scale is not None,
        "softcap": case.softcap,
        "alibi_slopes": case.alibi,
        "sinks": case.sinks,
        "dropout": case.dropout_p,
        "GQA": case.Hq != case.Hkv,
        "Dv != D": case.Dv != case.D,
        "strided inputs": case.layout != "BHSD",
    }
    return [name for name, is_used in used.items() if is_used] or ["plain"]


@dataclass
class Fault:
    count: int
    example: str
    message: str


@dataclass
class Report:
    """The results of one target."""

    target: str
    calls: int = 0
    checks: int = 0
    worst: dict[tuple[str, str], Error] = field(default_factory=dict)  # by (feature, dtype)
    faults: dict[str, Fault] = field(default_factory=dict)
    not_offered: Counter[str] = field(default_factory=Counter)

    def add_fault(self, name: str, example: str, message: str) -> None:
        fault = self.faults.setdefault(name, Fault(0, example, message))
        fault.count += 1

    def add_error(self, case: Case, error: Error) -> None:
        self.checks += 1
        if not error.is_wrong and error.result not in ("out", "dquery", "dkey", "dvalue"):
            return  # its dtype may differ from the case's
        dtype = str(case.dtype).removeprefix("torch.")
        for feature in features_of(case):
            known = self.worst.get((feature, dtype))
            if known is None or error.ratio > known.ratio:
                self.worst[feature, dtype] = error

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "calls": self.calls,
            "checks": self.checks,
            "not_offered": dict(self.not_offered),
            "faults": [
                {"fault": name, **dataclasses.asdict(fault)} for name, fault in self.faults.items()
            ],
            "worst": [
                {"feature": feature, "dtype": dtype, "result": e.result, "measure": e.measure,
                 "error": finite(e.error), "allowed": e.allowed}
                for (feature, dtype), e in sorted(self.worst.items())
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        dtypes = [str(dtype).removeprefix("torch.") for dtype in testing.DTYPES]
        features = dict.fromkeys(feature for feature, _ in self.worst)

        def cell(feature: str, dtype: str) -> str:
            error = self.worst.get((feature, dtype))
            if error is None:
                return "-"
            if not math.isfinite(error.error):
                return f"{error.measure} !"
            wrong = " !" if error.is_wrong else ""
            return f"{error.measure} {error.error:.1e}/{error.allowed:.1e}{wrong}"

        rows = [[feature, *(cell(feature, dtype) for dtype in dtypes)] for feature in features]
        lines = [f"{self.target}: {self.calls} calls, {self.checks} measures"]
        lines += [table(["worst error/allowed", *dtypes], rows)] if rows else []
        if self.not_offered:
            reasons = [f"{name} ({count})" for name, count in self.not_offered.most_common(8)]
            lines.append(f"not offered, not checked: {', '.join(reasons)}")
        for name, fault in self.faults.items():
            lines.append(f"FAILED  {name}: {fault.count} calls, such as {fault.example}")
            lines.append(f"        {fault.message}")
        lines.append("" if self.faults else "passed\n")
        return "\n".join(lines)


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no infinity


def describe(case: Case) -> str:
    """Describes the call, without options at their default."""
    sizes = f"B{case.B} Hq{case.Hq} Hkv{case.Hkv} Sq{case.Sq} Sk{case.Sk} D{case.D} Dv{case.Dv}"
    shown = {f.name for f in dataclasses.fields(Case)} - {*"B Hq Hkv Sq Sk D Dv seed".split()}
    defaults = Case()
    changed = [
        f"{f.name}={getattr(case, f.name)}"
        for f in dataclasses.fields(Case)
        if f.name in shown and getattr(case, f.name) != getattr(defaults, f.name)
    ]
    return " ".join([sizes, *changed, f"seed={case.seed}"]).replace("torch.", "")


def answers_to(target: Target, case: Case) -> tuple[Inputs, Results, tuple[Results, ...]]:
    """Returns inputs, exact and naive answers; for a target without lse, grad_lse is 0."""
    inputs = testing.make_inputs(case)
    if not target.has_lse:
        inputs = replace(inputs, grad_lse=0 * inputs.grad_lse)
    return inputs, testing.exact(inputs), testing.naive(inputs)


def matrix(quick: bool) -> list[tuple[Case, float]]:
    """Returns the cases, each with the allowed factor of the naive error."""
    cases = [(case, 2.0) for case in testing.single_features() + testing.pairs_of_features()]
    if not quick:
        more = testing.random_features(RANDOM_CASES, seed=1)
        cases += [(case, RANDOM_FACTOR) for case in more]
    return cases


def check_case(
    target: Target, case: Case, factor: float, backward: bool, answers: Any, report: Report
) -> None:
    report.calls += 1
    try:
        for draw in range(1, DRAWS + 1):
            inputs, exact, naive = answers
            got, faults = call(target, inputs, backward)
            found = list(testing.errors(got, exact, naive, factor))
            if max((error.ratio for error in found), default=0.0) <= 1.0 or any(
                error.ratio > CHANCE for error in found
            ):
                break
            if draw < DRAWS:
                answers = answers_to(target, replace(case, seed=case.seed + draw * 1_000_000))
    except NotOffered as reason:
        report.calls -= 1
        report.not_offered[str(reason)] += 1
        return
    except Exception as exception:  # the function may raise anything
        message = (str(exception).strip().splitlines() or [""])[0]
        report.add_fault(f"raises {type(exception).__name__}", describe(case), message)
        return
    for fault in faults:
        report.add_fault(fault, describe(case), fault)
    for error in found:
        report.add_error(case, error)
    wrong = [error for error in found if error.is_wrong]
    if wrong:
        name = name_of_fault(target, case, inputs, got, exact, wrong)
        report.add_fault(name, describe(case), "; ".join(error.message for error in wrong[:3]))


def verify(
    targets: Iterable[Target],
    *,
    quick: bool = False,
    backward: bool = True,
    step: Progress = lambda text: None,
) -> list[Report]:
    """Runs the matrix and the probes on each target; `step` is called after each case."""
    targets = list(targets)
    reports = [Report(target.name) for target in targets]
    for case, factor in matrix(quick):
        answers = answers_to(targets[0], case)  # --impl, which may lack lse, is the only target
        for target, report in zip(targets, reports, strict=True):
            with target.in_force():
                check_case(target, case, factor, backward, answers, report)
        step(describe(case))
    for target, report in zip(targets, reports, strict=True):
        for name, probe in PROBES.items():
            try:
                with target.in_force(), torch.no_grad():
                    fault = probe(target.call)
            except NotOffered as reason:
                report.not_offered[str(reason)] += 1
                continue
            except Exception as exception:  # the function may raise anything
                fault = f"raises {type(exception).__name__}"
            report.calls += 1
            if fault:
                report.add_fault(fault, f"the probe of {name}", fault)
    return reports

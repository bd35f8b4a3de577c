"""Checks an implementation of attention, ours or another one, against the correctness matrix.

Every case of `testing` (each feature alone, every pair of features, random combinations) is
compared with the definition in float64, forward and backward, under the rule of `testing.errors`.
The probes of `contracts` test what random inputs do not show. The contract says what is demanded,
`faults` names what is wrong, and `reproduce` writes scripts that show it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ArgumentValueError
from . import reproduce, targets, testing
from .console import Progress, table
from .contracts import (
    CHOICE,
    CLAUSES,
    MASKED_LSE,
    MASKED_ROWS,
    NUMBERS,
    PROBES,
    UNWRITTEN,
    Probe,
    demanded,
)
from .faults import blind_rows, forgiven, layout_taken, name_of_fault
from .foreign import NotOffered
from .targets import Target
from .testing import CHANCE, Case, Error, Results

RANDOM_CASES = 2000  # in the whole matrix; none with --quick
# A near miss (see testing.CHANCE) is drawn again until one draw passes. With one query, 4 of 60
# draws of a right kernel missed by chance: three in a row happen among thousands of cases.
DRAWS = 5
RANDOM_FACTOR = 4.0  # times the naive error, instead of 2: see testing.errors


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- Checks ------------------------------------------------------------------------------

Checks = dict[str, Case | Probe]  # by id, such as "pair/7"; the number of a case is its seed

FEATURES: dict[str, Callable[[Case], Any]] = {
    "mask": lambda case: case.mask,
    "bias": lambda case: case.bias,
    "key_padding_mask": lambda case: case.key_padding,
    "causal": lambda case: case.causal,
    "diagonal": lambda case: case.diagonal,
    "window_size": lambda case: case.window_size != (-1, -1),
    "scale": lambda case: case.scale is not None,
    "softcap": lambda case: case.softcap,
    "alibi_slopes": lambda case: case.alibi,
    "sinks": lambda case: case.sinks,
    "dropout": lambda case: case.dropout_p,
    "gqa": lambda case: case.Hq != case.Hkv,
    "value_head_dim": lambda case: case.Dv != case.D,
    "strides": lambda case: case.memory_format != "BHSD",
}
DTYPES = [name_of(dtype) for dtype in testing.DTYPES]
SKIPPABLE = (*FEATURES, *DTYPES)


def features_of(case: Case) -> list[str]:
    """Returns the rows of the table of errors to which a case belongs."""
    return [name for name, is_used in FEATURES.items() if is_used(case)] or ["plain"]


def skippable(check: Case | Probe) -> set[str]:
    """Returns the features and the dtype of a check."""
    if isinstance(check, Probe):
        return {*check.features, name_of(check.case.dtype)}
    return {*features_of(check), name_of(check.dtype)}


def all_checks() -> Checks:
    checks: Checks = {f"single/{case.seed}": case for case in testing.single_features()}
    checks |= {f"pair/{case.seed}": case for case in testing.pairs_of_features()}
    checks |= {
        f"random/{case.seed}": case for case in testing.random_features(RANDOM_CASES, seed=1)
    }
    return checks | {f"probe/{name}": probe for name, probe in PROBES.items()}


def selected(quick: bool = False, *, cases: Sequence[str] = (), skip: Sequence[str] = ()) -> Checks:
    """Returns the checks to run: all of them, without random cases if quick, or those in `cases`.

    skip: features and dtypes; checks that use one of them are left out.
    """
    for name in skip:
        if name not in SKIPPABLE:
            expected = ", ".join(SKIPPABLE)
            raise ArgumentValueError(f"--skip: expected one of {expected}, got {name!r}")
    checks = all_checks()
    require_ids("--case", cases, checks)
    if cases:
        checks = {name: checks[name] for name in cases}
    elif quick:
        checks = {name: check for name, check in checks.items() if not is_random(name)}
    return {name: check for name, check in checks.items() if not skippable(check) & set(skip)}


def is_random(name: str) -> bool:
    return name.startswith("random/")


def require_ids(option: str, names: Iterable[str], checks: Checks | None = None) -> None:
    """Raises ArgumentValueError for an unknown id, with the ids that are valid."""
    checks = all_checks() if checks is None else checks
    for name in names:
        if name not in checks:
            valid = []
            for kind in ("single", "pair", "random"):
                ids = [x for x in checks if x.startswith(kind + "/")]
                valid.append(f"{ids[0]} to {ids[-1]}")
            valid += [x for x in checks if x.startswith("probe/")]
            raise ArgumentValueError(f"{option}: expected one of {', '.join(valid)}, got {name!r}")


def structure_of(check: Case | Probe) -> dict[str, Any]:
    """Returns the seed, dtype, shapes and options of a call as data for JSON.

    Options at their default are left out; `Case(**shapes, **options)` is the case again but for
    dtypes, which are names here.
    """
    if isinstance(check, Probe):
        return structure_of(check.case) | {"options": dict(check.options)}
    sizes = "B Hq Hkv Sq Sk D Dv".split()
    plain, options = Case(), {}
    for name in (f.name for f in dataclasses.fields(Case)):
        value = getattr(check, name)
        if name not in (*sizes, "dtype", "seed") and value != getattr(plain, name):
            options[name] = name_of(value) if isinstance(value, torch.dtype) else value
    return {
        "seed": check.seed,
        "dtype": name_of(check.dtype),
        "shapes": {name: getattr(check, name) for name in sizes},
        "options": options,
    }


def describe(check: Case | Probe) -> str:
    """Describes a call in one line."""
    structure = structure_of(check)
    sizes = [f"{name}{size}" for name, size in structure["shapes"].items()]
    options = [f"{name}={option}" for name, option in structure["options"].items()]
    return " ".join([*sizes, structure["dtype"], *options, f"seed={structure['seed']}"])


# -- Reports -----------------------------------------------------------------------------


@dataclass
class Fault:
    """What is wrong in some checks. All but `checks` belongs to the first of them."""

    clause: str
    result: str  # the wrong result, or the input that was written to
    check: Case | Probe
    message: str
    error: Error | None
    checks: list[str] = field(default_factory=list)  # ids

    def as_json(self) -> dict[str, Any]:
        return {
            "clause": self.clause,
            "count": len(self.checks),
            "cases": self.checks,
            "first": {"id": self.checks[0], **structure_of(self.check), "result": self.result},
            "message": self.message,
        }


@dataclass
class Report:
    """The results of one target under a contract."""

    target: str
    contract: str
    total: int  # checks to run
    done: int = 0
    calls: int = 0
    checks: int = 0
    worst: dict[tuple[str, str], Error] = field(default_factory=dict)  # by (feature, dtype)
    faults: dict[str, Fault] = field(default_factory=dict)
    allowed: dict[str, Fault] = field(default_factory=dict)  # faults of checks that may fail
    not_offered: Counter[str] = field(default_factory=Counter)
    clauses: set[str] = field(default_factory=set)  # those that were checked
    not_compared: int = 0  # calls with fully masked rows, if the contract demands nothing of them
    interrupted: bool = False

    @property
    def passed(self) -> bool:
        return not self.faults and self.calls > 0 and not self.interrupted

    def add_error(self, case: Case, error: Error) -> None:
        self.checks += 1
        if not error.is_wrong and error.result not in ("out", "dquery", "dkey", "dvalue"):
            return  # its dtype may differ from the case's
        for feature in features_of(case):
            known = self.worst.get((feature, name_of(case.dtype)))
            if known is None or error.ratio > known.ratio:
                self.worst[feature, name_of(case.dtype)] = error

    def outcome(self, clause: str) -> str:
        if any(fault.clause == clause for fault in self.faults.values()):
            return "FAILED"
        if any(fault.clause == clause for fault in self.allowed.values()):
            return "allowed to fail"
        return "holds" if clause in self.clauses else "not checked"

    def as_json(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "contract": self.contract,
            "passed": self.passed,
            "interrupted": self.interrupted,
            "calls": self.calls,
            "checks": self.checks,
            "clauses": {name: self.outcome(name) for name in demanded(self.contract)},
            "fully_masked_not_compared": self.not_compared,
            "not_offered": dict(self.not_offered),
            "faults": [{"fault": name, **x.as_json()} for name, x in self.faults.items()],
            "allowed": [{"fault": name, **x.as_json()} for name, x in self.allowed.items()],
            "worst": [
                {"feature": feature, "dtype": dtype, "result": e.result, "measure": e.measure,
                 "error": finite(e.error), "allowed": e.allowed}
                for (feature, dtype), e in sorted(self.worst.items())
            ],
        }  # fmt: skip

    def __str__(self) -> str:
        features = dict.fromkeys(feature for feature, _ in self.worst)

        def cell(feature: str, dtype: str) -> str:
            error = self.worst.get((feature, dtype))
            if error is None:
                return "-"
            if not math.isfinite(error.error):
                return f"{error.measure} !"
            wrong = " !" if error.is_wrong else ""
            return f"{error.measure} {error.error:.1e}/{error.allowed:.1e}{wrong}"

        rows = [[feature, *(cell(feature, dtype) for dtype in DTYPES)] for feature in features]
        lines = [f"{self.target}: {self.calls} calls, {self.checks} measures"]
        lines += [table(["worst error/allowed", *DTYPES], rows)] if rows else []
        lines.append(f"contract {self.contract} (of {CHOICE}):")
        for name, clause in demanded(self.contract).items():
            lines.append(f"  {self.outcome(name):<16}{clause.text}")
        if self.not_compared:
            lines.append(
                f"fully masked rows: not compared in {self.not_compared} calls, which are checked"
                " without gradients"
            )
        if self.not_offered:
            reasons = [f"{name} ({count})" for name, count in self.not_offered.most_common(8)]
            lines.append(f"not offered, not checked: {', '.join(reasons)}")
        for title, faults in (("allowed", self.allowed), ("FAILED ", self.faults)):
            for name, fault in faults.items():
                ids = ", ".join(fault.checks[:6]) + ", ..." * (len(fault.checks) > 6)
                lines.append(f"{title} {name}: {len(fault.checks)} of {self.done} cases ({ids})")
                lines.append(f"        {fault.checks[0]}: {describe(fault.check)}")
                lines.append(f"        {fault.message}")
        lines.append(self.verdict() + "\n")
        return "\n".join(lines)

    def verdict(self) -> str:
        if self.interrupted:
            return f"interrupted after {self.done} of {self.total} cases"
        if self.faults:
            return "failed; --case ID runs one case again"
        return "passed" if self.calls else "nothing was checked"


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None  # JSON has no infinity


# -- The run -----------------------------------------------------------------------------


class Run:
    """Checks one target, and fills its report."""

    def __init__(self, target: Target, contract: str, total: int, allow: Collection[str]) -> None:
        self.target, self.allow = target, allow
        self.demanded = demanded(contract)
        self.report = Report(target.name, contract, total)

    def add_fault(self, name: str, id: str, fault: Fault) -> None:
        faults = self.report.allowed if id in self.allow else self.report.faults
        checks = faults.setdefault(name, fault).checks
        if id not in checks:
            checks.append(id)

    def check_case(self, id: str, case: Case, backward: bool, answers: Any) -> None:
        report, factor = self.report, RANDOM_FACTOR if is_random(id) else 2.0
        for draw in range(1, DRAWS + 1):
            inputs, exact, naive = answers
            blind = bool(blind_rows(exact).any())
            not_compared = blind and MASKED_ROWS not in self.demanded
            gradients = backward and not not_compared  # NaN in a row reaches all of dkey
            try:
                got, other_faults = targets.call(self.target, inputs, gradients)
            except NotOffered as reason:
                report.not_offered[str(reason)] += 1
                return
            except Exception as exception:  # the function may raise anything
                report.calls += 1
                name = layout_taken(self.target, inputs, exact, math.inf)
                name = name or f"raises {type(exception).__name__}"
                message = (str(exception).strip().splitlines() or [""])[0]
                result = "dquery" if gradients else "out"
                self.add_fault(name, id, Fault(NUMBERS, result, case, message, None))
                return
            got = self.without_undemanded(got, exact)
            found = list(testing.errors(got, exact, naive, factor))
            ratios = [error.ratio for error in found]
            if draw == DRAWS or max(ratios, default=0.0) <= 1.0 or max(ratios) > CHANCE:
                break
            case = replace(case, seed=case.seed + 1_000_000)
            answers = targets.answers_to(self.target, case)
        report.calls += 1
        report.not_compared += not_compared
        report.clauses |= {NUMBERS, UNWRITTEN}
        if blind:
            report.clauses |= {MASKED_ROWS} | ({MASKED_LSE} if "lse" in got else set())
        for text in other_faults:
            written = text.endswith("was written to")
            result = text.split()[0] if written else f"d{text.split()[-1]}"
            if "differentiable" in text:
                result = "dquery"
            clause = UNWRITTEN if written else NUMBERS
            self.add_fault(text, id, Fault(clause, result, case, text, None))
        for error in found:
            report.add_error(case, error)
        wrong = [error for error in found if error.is_wrong]
        wrong = [error for error in wrong if error.ratio > CHANCE] or wrong
        if wrong:
            seen = report.faults | report.allowed
            known = sorted(seen, key=lambda name: -len(seen[name].checks))
            name, clause, result = name_of_fault(
                self.target, case, inputs, got, exact, naive, wrong, factor, known
            )
            error = next(error for error in wrong if error.result == result)
            message = "; ".join(error.message for error in wrong[:3])
            self.add_fault(name, id, Fault(clause, result, case, message, error))

    def without_undemanded(self, got: Results, exact: Results) -> Results:
        clauses = {"out": MASKED_ROWS, "lse": MASKED_LSE}
        names = [name for name, clause in clauses.items() if clause not in self.demanded]
        return forgiven(got, exact, names)

    def check_probe(self, id: str, probe: Probe) -> None:
        if probe.clause not in self.demanded:
            return
        tensors = testing.make_inputs(probe.case).tensors
        try:
            with torch.no_grad():
                fault = probe.check(self.target.call, **tensors, **probe.options)
        except NotOffered as reason:
            self.report.not_offered[str(reason)] += 1
            return
        except Exception as exception:  # the function may raise anything
            fault = f"raises {type(exception).__name__}"
        self.report.calls += 1
        self.report.clauses.add(probe.clause)
        if fault:
            message = CLAUSES[probe.clause].text + ": this does not hold"
            self.add_fault(fault, id, Fault(probe.clause, "out", probe, message, None))


def verify(
    implementations: Sequence[Target],
    checks: Checks,
    *,
    contract: str | None = None,
    backward: bool = True,
    allow: Sequence[str] = (),
    step: Progress = lambda text: None,
) -> list[Report]:
    """Runs the checks on each implementation, and returns a report for each.

    contract: None is the default of the implementation. allow: ids of checks that may fail. step is
    called after each check. An interrupt (Ctrl-C) ends the run; the reports say so.
    """
    require_ids("--allow", allow)
    runs = [Run(x, contract or x.contract, len(checks), allow) for x in implementations]
    try:
        for id, check in checks.items():
            if isinstance(check, Case):
                # --impl, which may lack lse, is the only target.
                answers = targets.answers_to(implementations[0], check)
            for run in runs:
                with run.target.in_force():
                    if isinstance(check, Case):
                        run.check_case(id, check, backward, answers)
                    else:
                        run.check_probe(id, check)
                run.report.done += 1
            step(f"{id} {describe(check)}")
    except KeyboardInterrupt:
        for run in runs:
            run.report.interrupted = True
    return [run.report for run in runs]


def write_reproductions(
    folder: Path, implementations: Sequence[Target], reports: Sequence[Report]
) -> list[Path]:
    """Writes a script for each fault, FAULT.py, in a folder for each target if there are several.

    Returns the files.
    """
    files = []
    for target, report in zip(implementations, reports, strict=True):
        inside = folder / reproduce.slug(target.name) if len(reports) > 1 else folder
        for name, fault in (report.allowed | report.faults).items():
            title = f"{name}: {fault.checks[0]} of {target.name}, contract {report.contract}"
            files.append(inside / f"{reproduce.slug(name)}.py")
            files[-1].parent.mkdir(parents=True, exist_ok=True)
            files[-1].write_text(
                reproduce.probe_script(title, target, fault.check)
                if isinstance(fault.check, Probe)
                else reproduce.script(
                    title, target, fault.check, fault.result, fault.error, report.contract
                )
            )
    return files

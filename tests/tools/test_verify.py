"""Tests python -m fused_attention verify: right implementations pass, wrong ones fail by name."""

import contextlib
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import wrong_attention
from fused_attention import _native
from fused_attention.errors import ArgumentValueError
from fused_attention.tools import cli, contracts, foreign, reproduce, targets, testing, verify
from fused_attention.tools import faults as naming
from paths import ROOT

ANSWERS_TO = targets.answers_to
SDPA = ["--impl", "torch.nn.functional:scaled_dot_product_attention", "--signature", "sdpa"]


@pytest.fixture(scope="module", autouse=True)
def answers_once():
    """Caches the exact answers of a case, which are the same for every wrong implementation."""
    answers = functools.cache(
        lambda has_lse, case: ANSWERS_TO(targets.Target("", print, has_lse=has_lse), case)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "answers_to", lambda target, case: answers(target.has_lse, case))
        yield


def implementation(function: str) -> targets.Target:
    return targets.foreign_target(foreign.load(f"wrong_attention:{function}"))


def faults(function: str, *cases: str, **options) -> dict[str, verify.Fault]:
    checks = verify.selected(quick=True, cases=cases)
    (report,) = verify.verify([implementation(function)], checks, **options)
    return report.faults


def run(capsys, *arguments) -> tuple[int, str, str]:
    try:
        code = cli.main(["verify", *arguments])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# -- The cases ---------------------------------------------------------------------------


def test_the_pairs_are_all_covered_and_always_the_same():
    cases = testing.pairs_of_features()
    assert cases == testing.pairs_of_features() and len(cases) < 100

    def value(case, axis):
        if axis == "shape":
            sizes = (case.B, case.Hq, case.Hkv, case.Sq, case.Sk, case.D, case.Dv)
            return next(name for name, shape in testing.SHAPES.items() if shape == sizes)
        return getattr(case, axis)

    axes = list(testing.AXES)
    for number, a in enumerate(axes):
        for b in axes[:number]:
            met = {(value(case, a), value(case, b)) for case in cases}
            assert len(met) == len(testing.AXES[a]) * len(testing.AXES[b]), (a, b)


def test_ids_are_unique_and_describe_their_case():
    checks = verify.selected()
    cases = {id: check for id, check in checks.items() if isinstance(check, testing.Case)}
    assert len(set(cases.values())) == len(cases) > verify.RANDOM_CASES
    for id, case in cases.items():
        structure = verify.structure_of(case)
        assert id.split("/")[1] == str(structure["seed"]) == str(case.seed)
        options = structure["options"]
        if "bias_dtype" in options:
            options["bias_dtype"] = getattr(torch, options["bias_dtype"])
        dtype = getattr(torch, structure["dtype"])
        same = testing.Case(**structure["shapes"], **options, dtype=dtype, seed=structure["seed"])
        assert same == case
    assert cases.keys() - verify.selected(quick=True).keys() == {
        id for id in cases if id.startswith("random/")
    }


# -- Right implementations -----------------------------------------------------------------


def test_ours_passes_on_every_backend_and_isa(capsys, tmp_path):
    code, out, _ = run(capsys, "--quick", "--json", str(tmp_path / "report.json"))
    assert code == 0 and "FAILED" not in out
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["passed"] and not document["interrupted"]
    names = [target["target"] for target in document["targets"]]
    assert names == [*(f"cpu, {isa}" for isa in _native.isas()), "reference"]
    for target in document["targets"]:
        assert target["checks"] > 1000 and not target["not_offered"]
        assert target["contract"] == "strict"
        assert target["clauses"] == dict.fromkeys(contracts.CLAUSES, "holds")
        worst = {(row["feature"], row["dtype"]): row for row in target["worst"]}
        assert {dtype for _, dtype in worst} == {str(d).split(".")[1] for d in testing.DTYPES}
        for feature in ("plain", "bias", "causal", "dropout", "gqa", "strides"):
            assert 0 < worst[feature, "float32"]["allowed"] < 1e-3
            assert worst[feature, "float32"]["error"] <= worst[feature, "float32"]["allowed"]


def test_one_backend_one_isa_forward_only(capsys):
    isa = _native.isas()[-1]
    cases = [x for id in ("single/2", "pair/7") for x in ("--case", id)]
    code, out, _ = run(capsys, "--backend", "cpu", "--isa", isa, "--forward-only", *cases)
    assert code == 0 and out.startswith(f"cpu, {isa}: 2 calls") and "reference" not in out


def test_a_right_implementation_of_everything_passes():
    assert faults("attention") == {}


def test_pytorch_s_own_function_passes_its_contract(capsys, tmp_path):
    code, out, _ = run(capsys, "--quick", *SDPA, "--json", str(tmp_path / "report.json"))
    assert code == 0 and "contract torch" in out and "no sinks (" in out
    (target,) = json.loads((tmp_path / "report.json").read_text())["targets"]
    assert target["clauses"] == dict.fromkeys(contracts.demanded("torch"), "holds")
    assert target["calls"] > 30 and target["fully_masked_not_compared"] > 0


def test_naive_maths_passes_the_contract_of_torch_and_not_that_of_flash_attn(capsys):
    naive = ["--quick", "--skip", "bias", "--impl", "other_attention:naive"]
    code, out, _ = run(capsys, *naive, "--contract", "torch")
    assert code == 0 and "fully masked rows: not compared in 1 calls" in out
    code, out, _ = run(capsys, *naive, "--contract", "flash_attn")
    assert code == 1 and re.search("FAILED +fully masked rows are 0", out)
    assert re.findall("^FAILED  (.*?):", out, re.M) == ["fully masked rows are not 0 but NaN"]


FLEX_CASES = ("single/2", "single/13", "single/16", "single/21", "single/32", "probe/repetition")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "cases", [FLEX_CASES, pytest.param((), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_flex_attention_passes_the_contract_of_torch(capsys, cases):
    arguments = ["--quick", "--forward-only", "--contract", "torch"]
    arguments += [x for id in cases for x in ("--case", id)]
    code, out, _ = run(capsys, *arguments, "--impl", "other_attention:flex")
    assert code == 0 and "not compared" in out


# -- Wrong implementations -----------------------------------------------------------------


# The cases that show these faults, which are of every kind.
SHOWN = {
    "right_clamped": ("single/44",),
    "offset_clamped": ("single/13", "single/45"),
    "window_corner": ("single/47",),
    "mask_axis": ("single/50",),
    "cap_after_mask": ("single/36", "single/53"),
    "alibi_off_by_one": ("single/37",),
    "bias_after_softmax": ("single/23",),
    "sinks_numerator": ("single/39",),
    "dropout_before_sum": ("single/40",),
    "dropout_not_scaled": ("probe/dropout",),
    "not_divided": ("single/2",),
    "lse_log2": ("single/1",),
    "inaccurate": ("single/21",),
    "empty": ("single/21",),
    "hidden_nan": ("probe/padding",),
    "strides": ("single/42",),
    "reads_bshd": ("single/2", "single/48"),
    "grad_group": ("single/6",),
    "grad_softcap": ("single/36",),
}


@pytest.mark.parametrize("function", SHOWN)
def test_a_fault_is_named_by_the_case_that_shows_it(function):
    assert set(faults(function, *SHOWN[function])) == {wrong_attention.FAULTS[function]}


# Dropout and sinks spread the NaN of this fault in ways of their own.
NOT_MOSTLY = ("mask_before_scale",)


@pytest.mark.slow
@pytest.mark.parametrize("function", wrong_attention.FAULTS)
def test_each_fault_is_caught_named_and_reproduced(function, tmp_path):
    """Its name is the most frequent one, and each name has a script that shows it."""
    target = implementation(function)
    (report,) = verify.verify([target], verify.selected(quick=True))
    counts = {name: len(fault.checks) for name, fault in report.faults.items()}
    count = counts[wrong_attention.FAULTS[function]]
    assert count == max(counts.values()) or function in NOT_MOSTLY, counts
    for file in verify.write_reproductions(tmp_path, [target], [report]):
        assert exit_code(file.read_text()) == 1, file.name


def test_the_page_lists_the_faults():
    page = (ROOT / "docs" / "verify.md").read_text()
    assert len(wrong_attention.FAULTS) >= 40
    assert [name for name in wrong_attention.FAULTS.values() if name not in page] == []


@pytest.mark.slow
@pytest.mark.parametrize("function", ["bottom_right", "no_scale", "no_bias", "gqa_modulo", "empty"])
def test_nothing_else_is_blamed(function):
    assert set(faults(function, backward=False)) == {wrong_attention.FAULTS[function]}


@pytest.mark.slow
def test_each_imitation_is_named():
    """Every name can be given: in some case, the imitated results get just that name."""
    unnamed, named = set(), set()
    for case in testing.single_features() + testing.pairs_of_features():
        inputs, exact, naive = ANSWERS_TO(implementation("attention"), case)
        for name, changes in [*naming.imitations(case, inputs), *naming.of_gradients(case)]:
            if name in named or case.dtype != torch.float32:
                continue
            got = naming.Definition(case, inputs, changes).results(exact.keys())
            wrong = {
                e.result for e in testing.errors(as_of(got, naive), exact, naive) if e.is_wrong
            }
            judged = [x for x in ("out", "lse") if x in wrong][:1] or sorted(wrong)
            if judged and naming.imitation_of(case, inputs, got, exact, judged, ()) == name:
                named.add(name)
            else:
                unnamed.add(name)
    assert len(named) > 70 and not unnamed - named, unnamed - named


def as_of(results, naive):
    """Rounds float64 results to the dtypes of an implementation."""
    return {name: x.to(naive[0][name].dtype) for name, x in results.items()}


def test_pytorch_s_signature_is_recognised():
    loaded = foreign.load("wrong_attention:sdpa")
    assert loaded.signature == "sdpa" and not loaded.takes("enable_gqa")
    assert set(faults("sdpa", "single/12", backward=False)) == {"causal hides the diagonal"}


def test_an_implementation_that_raises():
    def broken(query, key, value, causal=False):
        if causal:
            raise ZeroDivisionError("by zero\nsecond line")
        raise NotImplementedError("only causal")

    broken = foreign.Implementation("broken", broken, "attention", frozenset({"causal"}))
    (report,) = verify.verify([targets.foreign_target(broken)], verify.selected(quick=True))
    assert report.not_offered["only causal"] > 0
    fault = report.faults["raises ZeroDivisionError"]
    assert fault.message == "by zero" and fault.check.causal


# -- The command -----------------------------------------------------------------------------


def test_as_a_command_with_somebody_else_s(tmp_path):
    command = [sys.executable, "-m", "fused_attention", "verify", "--quick", "--impl", "mine:f"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    (tmp_path / "mine.py").write_text(
        "def f(query, key, value, causal=False):\n    return (query @ key.mT).softmax(-1) @ value\n"
    )
    again = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    result = subprocess.run([*command, "--repro", "scripts"], **again)
    assert result.returncode == 1, result.stderr
    assert "FAILED  scale missing" in result.stdout and "no mask (" in result.stdout
    result = subprocess.run([sys.executable, "scripts/scale_missing.py"], **again)
    assert result.returncode == 1 and re.match(r"out: error \S+, allowed \S+\n", result.stdout)


def test_an_interrupt_keeps_what_is_known(capsys, tmp_path, monkeypatch):
    (tmp_path / "interrupting.py").write_text(
        "import os, signal\n"
        "def f(query, key, value, softcap=0.0, scale=None):\n"
        "    if softcap:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return (query @ key.mT).softmax(-1) @ value\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "report.json"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        code, out, err = run(capsys, "--quick", "--impl", "interrupting:f", "--json", str(file))
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and "Traceback" not in err
    assert "FAILED  scale missing" in out and re.search(
        r"interrupted after \d\d of 1\d\d cases$", out.rstrip()
    )
    document = json.loads(file.read_text())
    assert document["interrupted"] and not document["passed"]
    (target,) = document["targets"]
    assert target["interrupted"] and "scale missing" in [x["fault"] for x in target["faults"]]


def test_allowed_cases_may_fail(capsys, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--case", "single/21", "--case", "single/2", "--json", str(file)]
    arguments += ["--impl", "wrong_attention:empty"]
    assert run(capsys, *arguments)[0] == 1
    code, out, _ = run(capsys, *arguments, "--allow", "single/21")
    assert code == 0 and "allowed fully masked rows are not 0 but NaN: 1 of 2 cases" in out
    (target,) = json.loads(file.read_text())["targets"]
    (fault,) = target["allowed"]
    assert target["faults"] == [] and target["clauses"]["masked rows"] == "allowed to fail"
    assert fault["count"] == 1 and fault["cases"] == ["single/21"]
    first = fault["first"]
    assert first["id"] == "single/21" and first["seed"] == 21 and first["result"] == "out"
    assert first["shapes"]["Sk"] == 101 and first["options"] == {"mask": "1HQ1"}


def test_skipped_features_are_not_called(capsys):
    called = []

    def f(query, key, value, **options):
        called.append((query.dtype, options))
        raise NotImplementedError("counted")

    target = targets.Target("f", foreign.Implementation("f", f, "attention", None), has_lse=False)
    checks = verify.selected(quick=True, skip=["softcap", "float64", "dropout", "key_padding_mask"])
    verify.verify([target], checks)
    assert len(called) > 20
    assert all(
        dtype != torch.float64 and not {"softcap", "dropout_p", "key_padding_mask"} & options.keys()
        for dtype, options in called
    )
    assert any("sinks" in options for _, options in called)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--case", "pair/0"],
            r"--case: expected one of single/1 to single/\d+, pair/1 to .*probe",
        ),
        (["--case", "pair/0"], r"random/1000 to random/2999, .*got 'pair/0'"),
        (["--quick", "--allow", "nothing"], r"--allow: expected one of single/1 to .*'nothing'"),
        (["--skip", "rope"], r"--skip: expected one of mask, bias, .*float64, got 'rope'"),
        (["--contract", "lax"], r"invalid choice: 'lax'"),
        (["--repro", os.devnull], rf"--repro: expected a folder, got '{os.devnull}'"),
        (["--impl", "raising:f"], r"cannot import 'raising:f': not today"),
    ],
)
def test_an_invalid_choice_is_exit_code_2(capsys, tmp_path, monkeypatch, arguments, message):
    (tmp_path / "raising.py").write_text("raise OSError('not today')")
    monkeypatch.syspath_prepend(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and re.search(message, err.splitlines()[-1])


def test_nothing_checked_is_exit_code_2(capsys):
    code, out, _ = run(capsys, "--case", "single/39", *SDPA)
    assert code == 2 and "nothing was checked" in out and "no sinks (1)" in out


def test_a_random_case_is_run_again(capsys):
    code, out, _ = run(capsys, "--quick", "--case", "random/1033", "--backend", "cpu")
    assert code == 0 and all(line in out for line in (f"cpu, {x}: 1 calls" for x in _native.isas()))


def test_a_report_that_cannot_be_written(capsys, tmp_path):
    code, _, err = run(capsys, "--json", str(tmp_path / "no" / "report.json"))
    assert code == 2 and "--json" in err


# -- Reproductions ---------------------------------------------------------------------------


def exit_code(script: str) -> int:
    """Runs a script in this process. A wrong shape or dtype stops it with an error."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            exec(script, {})
    except SystemExit as exit:
        return int(exit.code)
    except (AssertionError, RuntimeError):
        return 1
    raise AssertionError("the script has no result")


@pytest.mark.parametrize("part", [0, *(pytest.param(x, marks=pytest.mark.slow) for x in (1, 2, 3))])
def test_scripts_find_nothing_wrong_with_a_right_implementation(part):
    """Compares the inputs and the definition of the scripts with those of `testing`."""
    target = implementation("attention")
    cases = [case for _, case in verify.selected(quick=True).items()]
    chosen = cases[part::4] if part else cases[-len(contracts.PROBES) - 60 :: 6]
    for check in chosen:
        if isinstance(check, contracts.Probe):
            assert exit_code(reproduce.probe_script("", target, check)) == 0
            continue
        _, exact, naive = targets.answers_to(target, check)
        errors = {e.result: e for e in testing.errors(as_of(exact, naive), exact, naive, 6.0)}
        for result in exact:
            error = errors.get(result)
            script = reproduce.script("", target, check, result, error, "strict")
            assert exit_code(script) == 0, (result, check)


@pytest.mark.parametrize(
    "function", ["mask_axis", "offset_clamped", "hidden_nan", "grad_group", "lse_log2", "strides"]
)
def test_a_script_reproduces_a_fault(function, tmp_path):
    target = implementation(function)
    (report,) = verify.verify([target], verify.selected(cases=SHOWN[function]))
    (file,) = verify.write_reproductions(tmp_path, [target], [report])
    assert file.name == reproduce.slug(wrong_attention.FAULTS[function]) + ".py"
    assert exit_code(file.read_text()) == 1


def test_scripts_for_pytorch_s_signature(tmp_path):
    target = targets.foreign_target(foreign.load(*SDPA[1::2]))
    checks = verify.selected(quick=True)
    chosen = [f"single/{number}" for number in (2, 6, 12, 18, 22, 23, 34, 35, 42)]
    for id in chosen:
        _, exact, naive = targets.answers_to(target, checks[id])
        errors = {e.result: e for e in testing.errors(as_of(exact, naive), exact, naive, 6.0)}
        for result in ("out", "dkey", "dvalue"):
            script = reproduce.script("", target, checks[id], result, errors[result], "torch")
            assert exit_code(script) == 0, (id, result)
    hidden = reproduce.probe_script("", target, contracts.PROBES["padding"])
    assert exit_code(hidden) == 1


def test_no_signature_at_all_is_an_error():
    with pytest.raises(ArgumentValueError, match="--signature"):
        foreign.load("torch._C._nn:scaled_dot_product_attention")
    loaded = foreign.load("torch._C._nn:scaled_dot_product_attention", "sdpa")
    query = torch.randn(1, 2, 3, 4)
    expected = torch.nn.functional.scaled_dot_product_attention(query, query, query, scale=2.0)
    assert torch.equal(loaded(query, query, query, scale=2.0), expected)


def test_measures_that_are_not_numbers():
    exact = {"out": torch.tensor([1.0, -math.inf])}
    for got in (torch.tensor([math.nan, -math.inf]), torch.tensor([1.0, 0.0])):
        (error,) = testing.errors({"out": got}, exact, (exact,))
        assert error.is_wrong and error.measure == "NaN and infinity" and error.ratio == math.inf

"""Tests python -m fused_attention verify: ours passes, 20 wrong implementations fail by name."""

import functools
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import wrong_attention
from fused_attention import _native
from fused_attention.errors import ArgumentValueError
from fused_attention.tools import cli, foreign, testing, verify

ANSWERS_TO = verify.answers_to


@pytest.fixture(scope="module", autouse=True)
def answers_once():
    """Caches the exact answers of a case, which are the same for every wrong implementation."""
    answers = functools.cache(
        lambda has_lse, case: ANSWERS_TO(verify.Target("", print, has_lse=has_lse), case)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "answers_to", lambda target, case: answers(target.has_lse, case))
        yield


def faults(function: str, **options) -> dict[str, verify.Fault]:
    target = verify.foreign_target(foreign.load(f"wrong_attention:{function}"))
    (report,) = verify.verify([target], quick=True, **options)
    return report.faults


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


def test_ours_passes_on_every_backend_and_isa(capsys, tmp_path):
    code = cli.main(["verify", "--quick", "--json", str(tmp_path / "report.json")])
    out = capsys.readouterr().out
    assert code == 0 and "FAILED" not in out
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["passed"]
    names = [target["target"] for target in document["targets"]]
    assert names == [*(f"cpu, {isa}" for isa in _native.isas()), "reference"]
    for target in document["targets"]:
        assert target["checks"] > 1000 and not target["not_offered"]
        worst = {(row["feature"], row["dtype"]): row for row in target["worst"]}
        assert {dtype for _, dtype in worst} == {str(d).split(".")[1] for d in testing.DTYPES}
        for feature in ("plain", "bias", "causal", "dropout", "GQA", "strided inputs"):
            assert 0 < worst[feature, "float32"]["allowed"] < 1e-3
            assert worst[feature, "float32"]["error"] <= worst[feature, "float32"]["allowed"]


def test_one_backend_one_isa_forward_only(capsys):
    isa = _native.isas()[-1]
    arguments = ["verify", "--quick", "--backend", "cpu", "--isa", isa, "--forward-only"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"cpu, {isa}: ") and "reference" not in out


def test_a_right_implementation_of_a_part_passes():
    assert faults("attention") == {}


@pytest.mark.parametrize("function", wrong_attention.FAULTS)
def test_a_wrong_implementation_fails_with_the_name_of_its_fault(function):
    found = faults(function.replace(" ", "_"))
    assert wrong_attention.FAULTS[function] in found, found


@pytest.mark.parametrize("function", ["alignment", "scale", "bias", "gqa", "empty"])
def test_nothing_else_is_blamed(function):
    assert set(faults(function, backward=False)) == {wrong_attention.FAULTS[function]}


def test_pytorch_s_signature_is_recognised():
    implementation = foreign.load("wrong_attention:sdpa")
    assert implementation.signature == "sdpa" and not implementation.takes("enable_gqa")
    assert "causal hides the diagonal" in faults("sdpa", backward=False)


def test_an_implementation_that_raises():
    def broken(query, key, value, causal=False):
        if causal:
            raise ZeroDivisionError("by zero\nsecond line")
        raise NotImplementedError("only causal")

    implementation = foreign.Implementation("broken", broken, "attention", frozenset({"causal"}))
    (report,) = verify.verify([verify.foreign_target(implementation)], quick=True)
    assert report.not_offered["only causal"] > 0
    fault = report.faults["raises ZeroDivisionError"]
    assert fault.message == "by zero" and "causal=" in fault.example


def test_as_a_command_with_somebody_else_s(tmp_path):
    command = [sys.executable, "-m", "fused_attention", "verify", "--quick", "--impl"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    (tmp_path / "mine.py").write_text(
        "def f(query, key, value, causal=False):\n    return (query @ key.mT).softmax(-1) @ value\n"
    )
    result = subprocess.run(
        [*command, "mine:f"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 1, result.stderr
    assert "FAILED  scale missing" in result.stdout and "no mask (" in result.stdout


def test_a_report_that_cannot_be_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "matrix", lambda quick: [])
    with pytest.raises(SystemExit) as exit:
        cli.main(["verify", "--json", str(tmp_path / "no" / "report.json")])
    assert exit.value.code == 2 and "--json" in capsys.readouterr().err


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

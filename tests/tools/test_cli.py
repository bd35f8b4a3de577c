"""Tests python -m fused_attention: doctor, explain, features; exit codes and errors."""

import json
import os
import subprocess
import sys

import pytest
import torch

from fused_attention import _native
from fused_attention.call import backends
from fused_attention.call.problem import FEATURES, Problem
from fused_attention.tools import cli
from paths import ROOT


def run(capsys, *arguments):
    """Runs a command and returns its exit code, stdout and stderr."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def in_a_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "fused_attention", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m fused_attention features | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.stdout == f"{cli.CLOSED}\n" and result.stderr == ""


def test_doctor(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code == 0
    for word in (
        torch.__version__,
        _native.active_isa(),
        "backend cuda",
        backends.CUDA.missing().split(":")[0],
        "usable",
    ):
        assert word in out


def test_doctor_json(capsys, isa):
    code, out, _ = run(capsys, "doctor", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["cpu"]["isa_active"] == isa and isa in report["cpu"]["isas_usable"]
    assert set(report["cpu"]["isas_usable"]) <= set(report["cpu"]["isas_compiled"])
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert list(report["backends"]) == list(backends.NAMES)
    assert report["backends"]["cpu"] == {"usable": True, "reason": ""}
    assert report["backends"]["cuda"]["reason"] == backends.CUDA.missing()
    assert report["backends"]["triton"]["reason"] == backends.TRITON.missing()


def test_as_a_module_with_its_environment():
    result = in_a_process(
        "doctor", FUSED_ATTENTION_CPU_ISA="baseline", FUSED_ATTENTION_BACKEND="reference"
    )
    assert result.returncode == 0, result.stderr
    assert "baseline in force" in result.stdout
    assert "FUSED_ATTENTION_BACKEND reference" in " ".join(result.stdout.split())
    result = in_a_process("doctor", FUSED_ATTENTION_BACKEND="gpu")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "FUSED_ATTENTION_BACKEND: expected auto or one of" in result.stderr


@pytest.mark.parametrize("module", [["-m", "fused_attention"], ["-mfused_attention"]])
def test_a_wrong_isa_in_the_environment_is_one_line_and_exit_code_2(module):
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": "z80"}
    command = [sys.executable, *module, "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("python -m fused_attention: FUSED_ATTENTION_CPU_ISA: expected")
    assert "baseline" in line and '"z80"' in line


@pytest.mark.parametrize("arguments", [["-c", "import fused_attention"], ["-m", "importer"]])
def test_a_wrong_isa_in_the_environment_fails_the_import(arguments, tmp_path):
    (tmp_path / "importer").mkdir()
    (tmp_path / "importer" / "__init__.py").write_text("import fused_attention")
    environment = os.environ | {"FUSED_ATTENTION_CPU_ISA": "z80"}
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert "ValueError: FUSED_ATTENTION_CPU_ISA" in result.stderr and "baseline" in result.stderr


def test_explain(capsys):
    code, out, _ = run(capsys, "explain", "--shape", "1,8,128,64")
    assert code == 0
    assert "cpu" in out and "attention_forward" in out and _native.active_isa() in out


EVERYTHING = """--kv-heads 2 --sk 96 --dv 32 --dtype bfloat16 --causal bottom_right --window 16 -1
    --softcap 5 --dropout 0.1 --mask 1,1,128,96 --bias 8,128,96 --bias-grad --key-padding --alibi
    --sinks --grad --lse""".split()


def test_explain_takes_every_option(capsys, monkeypatch):
    problems = []
    original = Problem.from_call

    def from_call(*args, **kwargs):
        problems.append(original(*args, **kwargs))
        return problems[-1]

    monkeypatch.setattr(Problem, "from_call", staticmethod(from_call))
    code, out, _ = run(capsys, "explain", "--shape", "1,8,128,64", *EVERYTHING)
    assert code == 0 and "+ attention_backward" in out
    (problem,) = problems
    assert problem.features == set(FEATURES) - {
        "varlen",
        "seqused_k",
        "block_table",
        "sinks_gradient",
    }
    assert (problem.heads_kv, problem.seqlen_k, problem.head_dim_v) == (2, 96, 32)
    assert problem.dtype == torch.bfloat16 and problem.numbers[2:4] == (16, -1)


def test_explain_needs_no_memory_for_its_tensors(capsys):
    code, out, _ = run(
        capsys, "explain", "--shape", "64,64,1000000,512", "--mask", "1000000,1000000"
    )
    assert code == 0 and "cpu" in out


@pytest.mark.parametrize("short, dtype", cli.SHORT_NAMES.items())
def test_explain_takes_short_names_of_dtypes(capsys, short, dtype):
    shape = ("explain", "--shape", "1,8,64,64", "--dtype")
    assert run(capsys, *shape, short) == run(capsys, *shape, dtype)


def test_explain_of_what_only_the_reference_serves(capsys):
    code, out, _ = run(capsys, "explain", "--shape", "1,8,16,600")
    assert code == 0 and "reference" in out and "head_dim 600" in out
    code, out, _ = run(capsys, "explain", "--shape", "1,8,16,64", "--device", "cuda")
    assert code == 0 and "not cuda" in out and "not cpu" not in out


def test_features_is_the_table_of_the_rows(capsys):
    code, out, _ = run(capsys, "features")
    assert code == 0
    lines, _, sentence = (part.splitlines() for part in out.partition("\n\n"))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0][1:] == list(backends.NAMES) and set(rows[1]) == {"---"}
    table = {row[0]: row[1:] for row in rows[2:]}
    assert table["second derivatives and forward mode"] == ["–", "–", "yes", "yes"]
    assert table["appending to a key/value cache"][2:] == ["yes", "–"]
    title = "second derivatives and forward mode: packed sequences (cu_seqlens)"
    assert table[title] == ["–", "–", "–", "yes"]
    assert all(meaning in " ".join(sentence) for meaning in FEATURES.values())  # all serve them
    assert table["head_dim"] == ["1 to 256", "1 to 256", "1 to 512", "any"]
    assert "float16" in table["dtype"][2] and table["device"][2:] == ["cpu", "cpu, cuda, meta"]


def test_the_table_in_the_readme_is_the_printed_one(capsys):
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- feature table: begin -->\n", "<!-- feature table: end -->"
    code, out, _ = run(capsys, "features")
    assert code == 0 and readme.partition(begin)[2].partition(end)[0] == out

"""Tests the parts of `tune` that need no GPU."""

import pytest
import torch

pytest.importorskip("triton")

from fused_attention.kernels import tiles
from fused_attention.tools import tune
from fused_attention.tools.cli import main
from paths import ROOT

ARCH, SPECIAL = tiles.ARCHS["sm_80"], tiles.ARCHS["sm_100"]
A, B, C = tiles.Tiles(64, 64, 4, 2), tiles.Tiles(128, 64, 4, 2), tiles.Tiles(128, 32, 8, 1)


def test_best_is_the_least_sum_relative_to_the_fastest():
    assert tune.best({A: (1.0, 10.0), B: (2.0, 8.0)}) == A  # 1 + 1.25 against 2 + 1
    assert tune.best({A: (1.0, 10.0), B: (1.1, 8.0)}) == B
    assert tune.best({C: (1.0, 1.0), A: (1.0, 1.0)}) == C


@pytest.mark.parametrize("kernel", tune.KERNELS)
@pytest.mark.parametrize("head_dim", tune.HEAD_DIMS)
def test_candidates_fit(kernel, head_dim):
    found = tune.candidates(kernel, ARCH, head_dim)
    assert 5 < len(found) < 120 and len(set(found)) == len(found)
    assert all(tune.shared_bytes(kernel, x, head_dim, 2) <= ARCH.shared_bytes for x in found)
    assert any(x.warp_specialize for x in tune.candidates(kernel, SPECIAL, head_dim)) == (
        kernel == "forward"
    )
    fewer = tune.candidates(kernel, tiles.SMALLEST, head_dim)
    assert fewer and set(fewer) <= set(found)


def test_the_tiles_of_the_table_are_candidates():
    for arch in (tiles.ARCHS["sm_80"], tiles.ARCHS["sm_90"]):
        for kernel in tune.KERNELS:
            for head_dim in (64, 128):
                own = tiles.attention_tiles(kernel, arch, torch.bfloat16, head_dim)
                assert own in tune.candidates(kernel, arch, head_dim), (arch, kernel, head_dim)


def test_rows_are_python_for_the_table():
    results = [
        tune.Tuned("dq", 128, tuple(B), (1.0, 2.0), (1.5, 2.5)),
        tune.Tuned("dq", 64, tuple(A), (1.0, 2.0), (1.5, 2.5)),
        tune.Tuned("forward", 64, tuple(C), (1.0, 2.0), (1.5, 2.5)),
    ]
    text = tune.rows(results, "sm_90", 2)
    assert eval(f"{{{text}}}", {"Tiles": tiles.Tiles}) == {
        ("forward", "sm_90", 16): {64: C},
        ("dq", "sm_90", 16): {64: A, 128: B},
    }
    assert "was 2" in tune.as_text(results[0]) and tune.report(results)[0]["head_dim"] == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_refuses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune"])
    assert stop.value.code == 2
    assert "expected a GPU" in capsys.readouterr().err


# -- The report of `make gpu` --------------------------------------------------------------


@pytest.fixture
def gpu_script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import gpu

    return gpu


def test_the_status_in_the_readme_is_that_of_the_reports(gpu_script):
    readme = (ROOT / "README.md").read_text()
    begin, end = "<!-- gpu status: begin -->\n", "<!-- gpu status: end -->"
    own = gpu_script.status(gpu_script.committed_reports())
    assert readme.partition(begin)[2].partition(end)[0] == own


def test_status(gpu_script):
    assert "ever run on hardware" in gpu_script.status([])
    about = {"device": "H9", "date": "2027-01-02T03:04"}
    tests = {"step": "tests", "case": "not all passed", "note": "7 passed, 1 failed"}
    fast = {"step": "benchmarks", "case": "8192 tokens, head size 128, causal"}
    triton, cuda = gpu_script.OURS.values()
    ours = fast | {"peer": triton, "TFLOP/s": "301.4", "TFLOP/s with backward": "99.6"}
    missing = fast | {"peer": cuda, "note": "not built"}
    theirs = fast | {"peer": "PyTorch SDPA", "TFLOP/s": "299.6"}
    text = gpu_script.status([(about, [tests, ours, missing, theirs])])
    assert "| H9 | 7 passed, 1 failed | Triton 301, CUDA –, PyTorch 300 | 2027-01-02 |" in text
    assert "| 8192 tokens, head size 128, causal | 301 / 100 | – / – | 300 / – |" in text
    failed = fast | {"peer": triton, "note": "no"}
    assert "| Triton –, CUDA –, PyTorch – |" in gpu_script.status([(about, [tests, failed])])
    assert "| 0 passed, 0 failed | – |" in gpu_script.status([(about, [])])


def test_two_scripts_at_a_time_keep_the_steps_of_both(gpu_script, tmp_path, monkeypatch):
    """The second script, with another --only, ends while the first is in the middle of a step."""

    def run_tiles():
        monkeypatch.setattr("sys.argv", ["gpu.py", "--only", "sanitizer"])
        assert gpu_script.main() == 0
        return [{"case": "forward", "us": 1.5}]

    monkeypatch.setattr(gpu_script, "REPORTS", tmp_path)
    monkeypatch.setattr(gpu_script, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_script.tune, "require_gpu", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H9 X")
    monkeypatch.setattr(gpu_script, "status", lambda reports: "")
    monkeypatch.setattr(gpu_script, "run_sanitizer", lambda: [{"case": "memcheck"}])
    monkeypatch.setattr(gpu_script, "run_tiles", run_tiles)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--only", "tiles"])
    assert gpu_script.main() == 0
    ((about, rows),) = gpu_script.committed_reports()
    assert about["device"] == "H9 X" and all(row.pop("date") for row in rows)
    assert [{name: text for name, text in row.items() if text} for row in rows] == [
        {"step": "sanitizer", "case": "memcheck"},
        {"step": "tiles", "case": "forward", "us": "1.5"},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["h9-x.csv"]


def test_outcome_of_pytest(gpu_script):
    text = "....\n3 passed, 1 failed, 2 skipped in 4.00s\n"
    assert gpu_script.outcome(text) == {"passed": 3, "failed": 1, "skipped": 2}
    assert gpu_script.outcome("") == {}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_script_refuses_without_a_gpu(gpu_script, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py"])
    assert gpu_script.main() == 2
    assert "expected a GPU" in capsys.readouterr().err

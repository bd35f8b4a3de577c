"""Tests python -m fused_attention bench: tiny cases, refusals, and the measuring itself."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention

from fused_attention.tools import cli, foreign
from fused_attention.tools.benchmark import bench, harness, peers, shapes
from fused_attention.tools.benchmark.harness import Timing
from fused_attention.tools.benchmark.onnx_runtime import onnx_runtime
from fused_attention.tools.foreign import NotOffered
from paths import HELPERS, ROOT

TINY = {
    "plain": shapes.square("plain", 1, 2, 40, 8),
    "causal": shapes.square("causal", 1, 2, 40, 8, causal=True),
    "window": shapes.square("window", 1, 2, 40, 8, window_size=(5, 0)),
    "causal window": shapes.square("causal window", 1, 2, 40, 8, window_size=(5, 9), causal=True),
    "padding": shapes.square("padding", 3, 2, 40, 8, mask="padding"),
    "padding and window": shapes.square("", 3, 2, 40, 8, mask="padding", window_size=(25, 3)),
    "bias": shapes.square("bias", 1, 2, 40, 8, bias="per head", causal=True, backward=True),
    "bias and padding": shapes.square("", 2, 2, 40, 8, bias="per head", mask="padding"),
    "gqa": shapes.Case("gqa", 2, 4, 2, 9, 300, 8, 8),
}
EAGER = [name for name in peers.bench_peers() if name != "FlexAttention"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", EAGER)
@pytest.mark.parametrize("name", TINY)
def test_every_peer_computes_the_same(name, peer):
    case = TINY[name]
    inputs = shapes.make_inputs(case)
    try:
        out = peers.bench_peers()[peer](case, inputs)()
    except NotOffered as reason:
        assert (peer, str(reason)) in {
            ("PyTorch flash", "no such kernel for this case"),
            ("ONNX Runtime", "no backward, dropout or window"),
        }
        return
    assert bench.error_of(out, case, bench.exact(case, inputs)) < 1e-5
    other = bench.exact(case, shapes.make_inputs(case, seed=1))
    assert bench.error_of(out, case, other) > 0.01


def test_flex_attention_computes_the_same():
    case = TINY["padding and window"]
    inputs = shapes.make_inputs(case)
    with pytest.MonkeyPatch.context() as patch:  # uncompiled: it is the same function
        functions = flex_attention.flex_attention, flex_attention.create_block_mask
        patch.setattr(peers, "_compiled_flex", lambda: functions)
        out = peers.flex(case, inputs)()
    assert bench.error_of(out, case, bench.exact(case, inputs)) < 1e-5


def test_flex_attention_says_what_it_cannot_do():
    for name, change in (("dropout", {"dropout_p": 0.5}), ("backward", {"backward": True})):
        with pytest.raises(NotOffered, match=name):
            peers.flex(replace(TINY["plain"], **change), shapes.make_inputs(TINY["plain"]))


def test_onnx_runtime_says_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotOffered, match="not installed"):
        onnx_runtime(TINY["plain"], shapes.make_inputs(TINY["plain"]))
    monkeypatch.undo()
    pytest.importorskip("onnxruntime")
    for case in (TINY["window"], replace(TINY["plain"], dropout_p=0.5), TINY["bias"]):
        with pytest.raises(NotOffered, match="no backward, dropout or window"):
            onnx_runtime(case, shapes.make_inputs(case))


def test_flops_count_what_is_visible():
    for case in TINY.values():
        if case.window_size != (-1, -1):
            assert case.visible_scores() == case.band().sum()
    assert shapes.square("", 1, 2, 40, 8).flops() == 4 * 2 * 40 * 40 * 8
    assert shapes.square("", 1, 2, 40, 8, causal=True).flops() == 2 * 2 * 40 * 40 * 8
    assert shapes.square("", 1, 2, 40, 8, backward=True).flops() == 14 * 2 * 40 * 40 * 8


def test_names_of_cases_are_unique():
    for table in (shapes.QUICK, shapes.FULL, shapes.DEMO):
        assert len({case.name for case in table}) == len(table)


def test_a_ratio_is_refused_when_the_machine_was_busy():
    calm, busy = Timing(2.0, 1.5, 0.1, 9), Timing(4.0, 2.7, 0.5, 9)
    assert not calm.disturbed and busy.disturbed
    assert bench.compare(calm, replace(calm, median=3.0, minimum=2.9)) == (1.5, "")
    for pair in ((calm, busy), (busy, calm)):
        assert bench.compare(*pair) == (None, "refused: min is 0.68 of median")
    assert bench.compare(calm, calm) == (None, "") and bench.compare(None, calm) == (None, "")


def test_extra_memory_is_what_is_not_returned():
    megabyte = 2**20  # malloc always maps tensors above 32 MiB, and unmaps them when they are freed

    def call():
        torch.empty(48 * megabyte, dtype=torch.uint8).fill_(1)
        return torch.ones(72 * megabyte, dtype=torch.uint8)

    measured = harness.extra_memory(call)
    assert measured is not None and measured < 4 * megabyte  # the first tensor was freed before

    def hold():
        kept = torch.empty(48 * megabyte, dtype=torch.uint8).fill_(1)
        return torch.ones(72 * megabyte, dtype=torch.uint8), kept[:1].clone()

    assert 44 * megabyte < harness.extra_memory(hold) < 52 * megabyte


def test_real_time_priority_is_given_back():
    before = os.sched_getscheduler(0)
    with harness.real_time_priority() as granted:
        assert (os.sched_getscheduler(0) == os.SCHED_FIFO) == granted
    assert os.sched_getscheduler(0) == before


def broken(query, key, value, mask=None):
    raise ZeroDivisionError("not today")


@pytest.fixture
def tiny_bench(monkeypatch):
    cases = [TINY["plain"], replace(TINY["plain"], name="dropout", dropout_p=0.1)]
    monkeypatch.setattr(shapes, "QUICK", cases)
    monkeypatch.setattr(peers, "flex", refuse)


def refuse(case, inputs):
    raise NotOffered("not in this test")


def test_the_command(capsys, tmp_path, tiny_bench, monkeypatch):
    monkeypatch.chdir(HELPERS)
    file = tmp_path / "bench.json"
    arguments = ["bench", "--quick", "--seconds", "0.02", "--threads", "1", "--json", str(file)]
    assert cli.main([*arguments, "--impl", "wrong_attention:attention"]) == 0
    out = capsys.readouterr().out
    assert "1 threads, interleaved, at " in out and "ZeroDivision" not in out
    document = json.loads(file.read_text())
    rows = {(row["case"], row["peer"]): row for row in document["measurements"]}
    assert len(rows) == 2 * (len(peers.bench_peers()) + 1) and document["threads"] == 1
    for peer in ("fused_attention", "PyTorch flash", "PyTorch maths", "naive maths"):
        row = rows["plain", peer]
        timing = row["timing"]
        assert 0 < timing["minimum"] <= timing["median"] and timing["rounds"] >= 7
        assert row["gflops"] > 0 and row["error"] < 1e-5 and row["extra_bytes"] >= 0
        refused = row["reason"].startswith("refused")
        assert (row["ratio"] is None) == (refused or peer == "fused_attention")
    assert rows["plain", "wrong_attention:attention"]["error"] < 1e-5
    assert rows["plain", "FlexAttention"]["reason"] == "not in this test"
    assert rows["dropout", "PyTorch flash"]["reason"] == "no such kernel for this case"
    assert rows["dropout", "fused_attention"]["error"] is None


def test_an_implementation_that_raises_has_no_time(tiny_bench):
    implementation = foreign.Implementation("broken", broken, "attention", None)
    report = bench.bench(
        [TINY["plain"]], peers.bench_peers(implementation), seconds=0.01, threads=1
    )
    row = report.measurements[-1]
    assert row.timing is None and row.reason == "ZeroDivisionError: not today"
    assert "not today" in str(report)
    assert len(report.measurements) == len(peers.bench_peers()) + 1


def test_the_suite_for_pytest_benchmark_collects():
    pytest.importorskip("pytest_benchmark")
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:xdist"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    count = len(shapes.QUICK) * len(peers.bench_peers())
    assert result.stdout.count("test_speed.py::test_speed[") == count

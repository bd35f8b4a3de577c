"""Tests python -m fused_attention bench: what it measures, prints, writes, compares and refuses."""

import html.parser
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import flex_attention

from fused_attention.tools import cli, console, foreign
from fused_attention.tools.benchmark import (
    bench,
    compare,
    harness,
    peers,
    report,
    shapes,
    suites,
    trial,
    vllm_cpu,
    workloads,
)
from fused_attention.tools.benchmark.harness import Timing
from fused_attention.tools.benchmark.onnx_runtime import onnx_runtime
from fused_attention.tools.foreign import NotOffered
from paths import ROOT

TINY = {
    "plain": shapes.square("plain", 1, 2, 40, 8),
    "causal": shapes.square("causal", 1, 2, 40, 8, causal=True),
    "causal, D 32": shapes.square("causal, D 32", 2, 2, 300, 32, causal=True),
    "window": shapes.square("window", 1, 2, 40, 32, window_size=(5, 0)),
    "causal window": shapes.square("causal window", 1, 2, 40, 8, window_size=(5, 9), causal=True),
    "padding": shapes.square("padding", 3, 2, 40, 8, mask="padding"),
    "padding and window": shapes.square("", 3, 2, 40, 8, mask="padding", window_size=(25, 3)),
    "random mask": shapes.square("random mask", 2, 2, 40, 8, mask="random"),
    "bias": shapes.square("bias", 1, 2, 40, 8, bias="per head", causal=True, backward=True),
    "bias and padding": shapes.square("", 2, 2, 40, 8, bias="per head", mask="padding"),
    "gqa": shapes.Case("gqa", 2, 4, 2, 9, 300, 32, 32),
    "pages": shapes.Case("pages", 2, 4, 2, 1, 96, 32, 32, page_size=16),
    "packed": shapes.Case("packed", 3, 2, 2, 50, 50, 32, 32, lengths=(50, 17, 1)),
    "packed, causal": shapes.Case("", 2, 2, 2, 50, 50, 32, 32, causal=True, lengths=(50, 20)),
}
EAGER = [name for name in peers.bench_peers() if name != "FlexAttention"]
NO_KERNEL = "no such kernel for this case"
REFUSALS = {
    "PyTorch flash": {NO_KERNEL},
    "ONNX Runtime": {"no backward, dropout or window", "no mask beside causal"},
    "zentorch": {"no backward or dropout"},
    "vLLM": {
        "no backward or dropout",
        "no mask or bias",
        "no window that looks ahead",
        "no head_dim 8",
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("peer", EAGER)
@pytest.mark.parametrize("name", TINY)
def test_every_peer_computes_the_same(name, peer):
    case = TINY[name]
    inputs = shapes.make_inputs(case)
    try:
        out = peers.bench_peers()[peer](case, inputs)()
    except NotOffered as reason:
        assert str(reason) in REFUSALS[peer]
        return
    assert trial.error_of(out, case, trial.exact(case, inputs)) < 1e-5
    other = trial.exact(case, shapes.make_inputs(case, seed=1))
    assert trial.error_of(out, case, other) > 0.01


@pytest.fixture
def uncompiled_flex(monkeypatch):
    """FlexAttention without a compilation, which takes seconds: it is the same function."""
    functions = flex_attention.flex_attention, flex_attention.create_block_mask
    monkeypatch.setattr(peers, "_compiled_flex", lambda: functions)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["padding and window", "random mask", "packed, causal"])
def test_flex_attention_computes_the_same(name, uncompiled_flex):
    case = TINY[name]
    inputs = shapes.make_inputs(case)
    out = peers.flex(case, inputs)()
    assert trial.error_of(out, case, trial.exact(case, inputs)) < 1e-5


def test_packed_and_paged_calls_are_what_they_say():
    seen = {}

    def spy(query, key, value, **options):
        seen.update(options, query=query, key=key)
        return query

    for name in ("packed", "pages"):
        case = TINY[name]
        peers.with_keywords(spy)(case, shapes.make_inputs(case))()
        if name == "packed":
            assert seen["query"].shape == (68, 2, 32) and seen["mask"] is None
            assert seen["cu_seqlens_k"].tolist() == [0, 50, 67, 68]
        else:
            assert seen["key"].shape == (12, 16, 2, 32) and seen["block_table"].shape == (2, 6)


def test_a_function_without_packed_sequences_gets_them_padded():
    implementation = foreign.Implementation("x", lambda q, k, v, mask: q, "attention", {"mask"})
    case = TINY["packed"]
    out = peers.with_keywords(implementation)(case, shapes.make_inputs(case))()
    assert out.shape == (3, 2, 50, 32)


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


def test_a_peer_that_cannot_be_loaded_is_listed_with_its_reason(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    case = TINY["causal, D 32"]
    for library in ("_C.abi3.so", "_C_AVX512.abi3.so"):
        found = trial.attention_trial(case, {"vLLM": vllm_cpu.vllm})
        assert found.reasons["vLLM"].startswith("cannot be loaded: ")
        (tmp_path / "vllm" / library).write_text("no library")
    assert "vLLM" in peers.bench_peers() and peers.versions()["vLLM"]


def test_flops_count_what_is_visible():
    for case in TINY.values():
        if case.window_size != (-1, -1):
            assert case.visible_scores() == case.band().sum()
    assert shapes.square("", 1, 2, 40, 8).flops() == 4 * 2 * 40 * 40 * 8
    assert shapes.square("", 1, 2, 40, 8, causal=True).flops() == 2 * 2 * 40 * 40 * 8
    assert shapes.square("", 1, 2, 40, 8, backward=True).flops() == 14 * 2 * 40 * 40 * 8
    assert TINY["packed"].flops() == 4 * 2 * 32 * (50**2 + 17**2 + 1)
    assert TINY["pages"].bytes_of_cache() == 2 * 2 * 2 * 96 * 32 * 4


def test_names_of_cases_are_unique():
    tables = [shapes.QUICK, shapes.FULL, shapes.DEMO]
    tables += [make() for make in suites.SUITES.values()]
    for table in tables:
        assert table and len({case.name for case in table}) == len(table)


def first_case_runs(suite, found):
    item = suites.chosen([suite], quick=True)[suite][0]
    prepared = bench.prepare(item, found, "cpu")
    offered = set(prepared.calls)
    assert peers.OURS in offered and len(offered) >= 2
    for peer, reason in prepared.reasons.items():
        known = {"no backward on the CPU", "no kernel for bfloat16", *REFUSALS.get(peer, ())}
        assert reason in known
    assert not any(judged.wrong for judged in prepared.judged.values())
    assert prepared.flops or prepared.ceiling
    if suite not in ("training", "models", "frontend"):
        assert set(prepared.judged) == offered


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suite", suites.SUITES)
def test_the_first_case_of_a_suite_runs(suite, monkeypatch):
    monkeypatch.setattr(workloads, "TOKENS", 200)
    found = peers.bench_peers()
    first_case_runs(suite, {name: found[name] for name in found if name != "FlexAttention"})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suite", suites.SUITES)
def test_the_first_case_of_a_suite_runs_with_every_peer(suite):
    first_case_runs(suite, peers.bench_peers())


# -- The measuring -------------------------------------------------------------------------


class Clock:
    """Time that passes only in the calls: each takes what its distribution gives."""

    def __init__(self):
        self.now, self.random = 0.0, random.Random(1)

    def __call__(self):
        return self.now

    def call(self, seconds, result=None):
        def run():
            self.now += seconds * self.random.uniform(0.9, 1.1)
            return result

        return run


def test_interleaving_rotates_and_stops_after_the_budget():
    clock, order = Clock(), []
    calls = {name: clock.call(0.1) for name in "abc"}
    noted = {
        name: (lambda name=name, call=call: order.append(name) or call())
        for name, call in calls.items()
    }
    timings = harness.interleave(noted, budget=3.0, warmup=0, clock=clock)
    assert "".join(order[:9]) == "abcbcacab"
    (rounds,) = {timing.rounds for timing in timings.values()}
    assert rounds in (10, 11)  # of 0.3 s each
    assert all(len(timing.passes) == 1 for timing in timings.values())
    assert all(90 <= value <= 110 for timing in timings.values() for value in timing.passes[0])


@pytest.fixture
def faked_time(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(bench, "interleave", partial(harness.interleave, clock=clock))
    monkeypatch.setattr(bench, "extra_memory", lambda call: 0)
    monkeypatch.setattr(harness, "ceiling", lambda dtype, threads: 100.0)
    return clock


def faked(clock, **seconds):
    """Returns peers that take so many seconds, and give the right result."""

    def peer(duration):
        return lambda case, inputs: clock.call(duration, peers.naive(case, inputs)())

    return {name: peer(duration) for name, duration in seconds.items()}


def run_bench(found, *cases, threads=(1,), seconds=5.0):
    return bench.bench({"tiny": [*cases]}, found, seconds=seconds, threads=threads)


def test_a_ratio_within_its_noise_is_level(faked_time):
    found = faked(faked_time, fused_attention=0.01, same=0.01, slow=0.02, fast=0.005)
    result = run_bench(found, TINY["plain"])
    ours, same, slow, fast = result.measurements
    assert ours.verdict == "-" and ours.ratio is None
    assert same.verdict == "level" and same.interval[0] < 1 < same.interval[1]
    assert len(same.timing.passes) == bench.PASSES
    assert slow.verdict == f"{slow.ratio:.2f}x" and 1.8 < slow.interval[0] < slow.interval[1] < 2.2
    assert fast.interval[1] < 0.6 and not result.wrong


def test_the_ceiling_is_that_of_products_or_of_a_read(faked_time, monkeypatch):
    monkeypatch.setattr(harness, "ceiling", lambda dtype, threads: 3.0 * threads)
    found = faked(faked_time, fused_attention=0.01)
    for threads in (1, 2):
        (m,) = run_bench(found, TINY["plain"], threads=[threads]).measurements
        assert m.gflops == pytest.approx(TINY["plain"].flops() / 0.01 / 1e9, rel=0.1)
        assert m.of_ceiling == pytest.approx(m.gflops / 3.0 / threads)
    made = trial.attention_trial(TINY["pages"], found)
    assert not made.flops and made.ceiling() is not None
    made.ceiling = faked_time.call(0.005)
    (m,) = run_bench({}, suites.Workload("decode", lambda: made)).measurements
    assert m.gflops is None and m.of_ceiling == pytest.approx(0.5, rel=0.1)


def passes_of(medians):
    """Returns a timing with a pass for each of these medians, in milliseconds."""
    return harness.timing_of([[0.9 * x, x, 1.2 * x] for x in medians])


def test_two_runs_agree_where_the_machine_drifts_between_passes():
    draw = random.Random(0)

    def level(factor):
        runs = [[draw.gauss(math.log(x), 0.05) for _ in range(5)] for x in (factor, 1.0)]
        return harness.level(harness.change_interval(*runs))

    assert sum(level(1.0) for _ in range(400)) >= 370  # 380 are expected, with a deviation of 4.4
    assert sum(level(1.3) for _ in range(100)) <= 5


def test_a_ratio_is_taken_within_each_pass():
    below = passes_of([1.0, 3.0, 2.0])
    above = passes_of([2.0, 6.0, 4.0])
    assert harness.ratio_interval(above, below) == pytest.approx((2.0, 2.0))
    low, high = harness.change_interval(above.logarithms, below.logarithms)
    assert low < 1 and high > 4
    assert above.median / below.median == pytest.approx(2.0)
    assert below.median == pytest.approx(6 ** (1 / 3)) and below.rounds == 9


def test_the_interval_is_that_of_students_t():
    # mean 0, deviation 0.1: t for 4 degrees of freedom is 2.776
    logs = [x * 0.1 / math.sqrt(2.5) for x in (-2, -1, 0, 1, 2)]
    margin = 2.776 * 0.1 / math.sqrt(5)
    assert harness.interval(logs) == pytest.approx((math.exp(-margin), math.exp(margin)))
    assert harness.interval([0.0]) is None and harness.change_interval([0.0], logs) is None
    # Welch: equal variances and sizes give 8 degrees of freedom, a constant run 4.
    margin = 2.306 * 0.1 * math.sqrt(2 / 5)
    assert harness.change_interval(logs, logs) == pytest.approx(
        (math.exp(-margin), math.exp(margin))
    )
    margin = 2.776 * 0.1 / math.sqrt(5)
    assert harness.change_interval(logs, [0.0] * 5)[1] == pytest.approx(math.exp(margin))
    assert harness.change_interval([0.0, 0.0], [0.0, 0.0]) == (1.0, 1.0)


def test_a_peer_that_fails_in_a_later_pass_has_a_reason(faked_time):
    calls = []

    def sometimes(case, inputs):
        calls.append(case)
        if len(calls) > 3:
            raise RuntimeError("worn out")
        return faked_time.call(0.01, peers.naive(case, inputs)())

    found = faked(faked_time, fused_attention=0.01) | {"sometimes": sometimes}
    ours, other = run_bench(found, TINY["plain"]).measurements
    assert len(ours.timing.passes) == bench.PASSES
    assert other.timing is None and other.reason == "RuntimeError: worn out"


def test_a_result_that_is_wrong_in_one_pass_is_wrong(faked_time):
    found = faked(faked_time, fused_attention=0.01, racy=0.01)
    right, calls = found["racy"], []

    def racy(case, inputs):
        calls.append(case)
        wrong = len(calls) == 2
        return lambda: right(case, inputs)() + (1 if wrong else 0)

    _, other = run_bench(found | {"racy": racy}, TINY["plain"]).measurements
    assert other.verdict == "WRONG" and other.error > other.allowed


def test_a_ratio_is_refused_when_the_machine_was_busy():
    passes = ((2.0,) * 3,) * 3
    calm, busy = Timing(2.0, 1.5, 0.1, 9, passes), Timing(4.0, 2.7, 0.5, 9, passes)
    assert not calm.disturbed and busy.disturbed
    slower = replace(calm, median=3.0, minimum=2.9, passes=((3.0,) * 3,) * 3)
    ratio, interval, reason = bench.compare(calm, slower)
    assert (ratio, reason) == (1.5, "") and interval == pytest.approx((1.5, 1.5))
    for pair in ((calm, busy), (busy, calm)):
        assert bench.compare(*pair) == (None, None, "busy: min is 0.68 of median")
    assert bench.compare(calm, calm) == bench.compare(None, calm) == (None, None, "")


def test_extra_memory_is_what_is_not_returned():
    megabyte = 2**20  # malloc always maps tensors above 32 MiB, and unmaps them when they are freed

    def call():
        torch.empty(48 * megabyte, dtype=torch.uint8).fill_(1)
        return torch.ones(72 * megabyte, dtype=torch.uint8)

    # Other threads of this process can only add to the peak.
    measured = min(harness.extra_memory(call) for _ in range(3))
    assert measured < 4 * megabyte  # the first tensor was freed before

    def hold():
        kept = torch.empty(48 * megabyte, dtype=torch.uint8).fill_(1)
        return torch.ones(72 * megabyte, dtype=torch.uint8), kept[:1].clone()

    assert 44 * megabyte < harness.extra_memory(hold) < 52 * megabyte


def test_real_time_priority_is_given_back():
    before = os.sched_getscheduler(0)
    with harness.real_time_priority() as granted:
        assert (os.sched_getscheduler(0) == os.SCHED_FIFO) == granted
    assert os.sched_getscheduler(0) == before


def test_the_rule_judges_maximum_and_rms():
    want = torch.randn(1, 1, 50, 8, dtype=torch.float64)
    near = want.float()
    assert not trial.judge(near, want, (near,)).wrong
    one_off = near.clone()
    one_off[0, 0, 3, 3] += 0.25
    judged = trial.judge(one_off, want, (near,))
    assert judged.wrong and judged.error == pytest.approx(0.25, rel=1e-3)
    assert judged.allowed < 1e-5
    for broken in (near.masked_fill(near > 1, torch.nan), near.bfloat16(), near[..., :4]):
        assert trial.judge(broken, want, (near,)).wrong
    # An error that is small everywhere breaks the rule for the rms only.
    spread = near + 1.5e-6 * torch.randn_like(near).sign()
    naive = near.clone()
    naive[0, 0, 0, 0] += 1e-6
    judged = trial.judge(spread, want, (naive,))
    assert judged.wrong and judged.error < judged.allowed
    assert not trial.judge(spread, want, (near,), high=True).wrong


# -- What is printed and written -----------------------------------------------------------


def broken(query, key, value, mask=None):
    raise ZeroDivisionError("not today")


def refuse(case, inputs):
    raise NotOffered("not in this test")


SOMEONE = """
def right(query, key, value):
    return (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1) @ value

def wrong(query, key, value):
    return (query @ key.mT).softmax(-1) @ value
"""


@pytest.fixture
def tiny_bench(monkeypatch, tmp_path):
    cases = [TINY["plain"], replace(TINY["plain"], name="dropout", dropout_p=0.1)]
    monkeypatch.setattr(shapes, "QUICK", cases)
    monkeypatch.setattr(peers, "flex", refuse)
    monkeypatch.setattr(harness, "ceiling", lambda dtype, threads: 100.0)
    (tmp_path / "someone.py").write_text(SOMEONE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


QUICK = ["bench", "--quick", "--seconds", "0.02", "--threads", "1"]


def test_the_command(capsys, tmp_path, tiny_bench):
    file = tmp_path / "bench.json"
    arguments = [*QUICK, "--json", str(file), "--impl", "someone:right"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "threads: 1;" in out and "ZeroDivision" not in out and "WRONG" not in out
    document = json.loads(file.read_text())
    assert document["right"] and not document["interrupted"]
    rows = {(row["case"], row["peer"]): row for row in document["measurements"]}
    assert len(rows) == 2 * (len(peers.bench_peers()) + 1) and document["threads"] == [1]
    for peer in ("fused_attention", "PyTorch flash", "PyTorch math", "naive maths"):
        row = rows["plain", peer]
        timing = row["timing"]
        assert 0 < timing["minimum"] <= timing["median"] and timing["rounds"] >= bench.PASSES
        assert len(timing["passes"]) == bench.PASSES
        assert sum(map(len, timing["passes"])) == timing["rounds"]
        assert row["gflops"] > 0 and row["of_ceiling"] == pytest.approx(row["gflops"] / 100)
        assert row["error"] <= row["allowed"] < 1e-5 and row["extra_bytes"] >= 0
        refused = row["reason"].startswith("busy")
        assert (row["ratio"] is None) == (refused or peer == "fused_attention")
        assert (row["interval"] is None) == (row["ratio"] is None)
    assert rows["plain", "someone:right"]["error"] < 1e-5
    assert rows["plain", "FlexAttention"]["reason"] == "not in this test"
    assert rows["dropout", "PyTorch flash"]["reason"] == NO_KERNEL
    assert rows["dropout", "fused_attention"]["error"] is None


class Page(html.parser.HTMLParser):
    """Collects what a page refers to, and checks that its elements are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.counts, self.references = [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        names = ("src", "href", "xlink:href", "data", "action")
        self.references += [value for name, value in attributes if name in names]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_a_wrong_kernel_is_marked_everywhere(capsys, tmp_path, tiny_bench):
    files = {kind: tmp_path / f"bench.{kind}" for kind in ("json", "markdown", "html")}
    options = [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
    name = "someone:wrong"
    assert cli.main([*QUICK, *options, "--impl", name]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^ *{name} .*WRONG", out, re.MULTILINE)
    assert re.search(rf"WRONG: {name}, plain: error \d\.\de[+-]\d\d, allowed \d\.\de-0[67]", out)
    (row,) = [
        row
        for row in json.loads(files["json"].read_text())["measurements"]
        if (row["case"], row["peer"]) == ("plain", name)
    ]
    assert row["wrong"] and row["verdict"] == "WRONG" and row["error"] > row["allowed"]
    assert row["ratio"] is None and row["interval"] is None
    assert "**WRONG**" in files["markdown"].read_text()
    page = files["html"].read_text()
    assert '<tr class="wrong">' in page and "WRONG</td>" in page and ", WRONG</text>" in page


def test_no_time_is_compared_with_that_of_a_wrong_result_of_ours(faked_time):
    found = faked(faked_time, fused_attention=0.01, other=0.5)
    right = found["fused_attention"]
    found["fused_attention"] = lambda case, inputs: lambda: right(case, inputs)() + 1
    result = run_bench(found, TINY["plain"])
    assert [m.verdict for m in result.measurements] == ["WRONG", "-"]
    assert "50.00x" not in report.as_text(result, 120)


def test_wrong_rows_are_red_on_a_terminal_only(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = "a  WRONG\nb  1.00x"
    assert console.marked(text, "WRONG") == text
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert console.marked(text, "WRONG") == "\x1b[31ma  WRONG\x1b[0m\nb  1.00x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert console.marked(text, "WRONG") == text


@pytest.fixture(scope="module")
def example():
    """A report with a wrong result, a reason, long names and two numbers of threads."""
    clock = Clock()
    found = faked(clock, fused_attention=0.01, **{"somebody.elses_module:attention": 0.03})
    found["naive maths"] = lambda case, inputs: clock.call(1.0, torch.zeros(1, 2, 40, 8))
    found["refusing"] = refuse
    case = replace(TINY["plain"], name="a case | of <a long & unusual> name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "interleave", partial(harness.interleave, clock=clock))
        patch.setattr(harness, "ceiling", lambda dtype, threads: 100.0)
        return run_bench(found, case, replace(TINY["plain"], name="b"), threads=[1, 2])


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_the_table_fits_the_terminal(width, example, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert console.width() == max(60, width)
    lines = report.as_text(example, console.width()).splitlines()
    assert max(map(len, lines)) <= console.width()
    table = [line for line in lines if " WRONG" in line]
    assert len(table) == 4 and all(re.search(r" 1\d{3}\.\d{3} | 9\d\d\.\d{3} ", x) for x in table)
    titles = re.split(" {2,}", lines[0].strip())
    order = ["95 %", "ceiling", "error", "GF/s", "extra MiB", "min", "spread"]
    shown = [title for title in order if title in titles]
    assert shown == order[: len(shown)]  # the least important are dropped first
    assert set(titles) == {"case", "threads", "peer", "median ms", "ratio", *shown}
    assert len(shown) == {60: 0, 80: 0, 120: 2, 200: 7}[console.width()]
    (start,) = [n for n, line in enumerate(lines) if n and line.startswith("case ")]
    assert "2: ms" in lines[start] and "speed-up" in lines[start]
    assert re.search(r" (9|10)\.\d{3} +(9|10)\.\d{3} +(0\.9|1\.0)\dx", lines[start + 2])


def test_cells_are_cut_in_the_middle():
    rows = [["a name of many letters", "1.0"], ["b", "2.0"]]
    lines = console.fitting_table(["case", "ms"], rows, [0, 0], 15).splitlines()
    assert lines[2:] == ["a nam…ters   1.0", "b            2.0"] or max(map(len, lines)) == 15
    assert lines[2] == "a nam…ters  1.0" and lines[3] == "b           2.0"


def test_the_markdown_table_is_well_formed(example):
    lines = report.as_markdown(example).splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 2 + len(report.measured(example)) == 14
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table]
    assert {len(row) for row in cells} == {len(report.COLUMNS)}
    assert all(re.fullmatch(" -{3}:? ", cell) for cell in cells[1])
    assert all(line.startswith("- ") for line in lines[lines.index("") + 1 :])


def test_the_page_is_self_contained(example):
    text = report.as_html(example)
    page = Page(text)
    assert not page.open and not page.references
    assert not re.search(r"https?://|url\(|@import|<script|<link", text)
    assert page.counts["section"] == page.counts["svg"] == page.counts["table"] == 4
    assert page.counts["rect"] == page.counts["path"] == len(report.measured(example)) == 12
    assert "of &lt;a long &amp; unusual&gt; name" in text and "@media print" in text


def test_the_picture(example, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    report.save_png(example, str(path))
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_without_matplotlib_a_picture_is_refused_before_anything_runs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        cli.main([*QUICK, "--png", "bench.png"])
    assert "--png: matplotlib is not installed" in capsys.readouterr().err


def test_an_interrupt_gives_a_partial_table(capsys, tmp_path, tiny_bench, monkeypatch):
    def interrupted(case, inputs):
        if case.dropout_p:
            raise KeyboardInterrupt
        return peers.naive(case, inputs)

    monkeypatch.setattr(peers, "naive", interrupted)
    file = tmp_path / "bench.json"
    bound = peers.bench_peers
    monkeypatch.setattr(peers, "bench_peers", lambda impl: bound() | {"stops": interrupted})
    assert cli.main([*QUICK, "--json", str(file)]) == 130
    out = capsys.readouterr().out
    assert "INTERRUPTED" in out and re.search(r"^plain +fused_attention", out, re.MULTILINE)
    document = json.loads(file.read_text())
    assert document["interrupted"]
    assert {row["case"] for row in document["measurements"]} == {"plain"}
    assert all(row["interval"] is None for row in document["measurements"])
    assert compare.read(str(file)).passes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sideways"], "--suite: expected one of forward, "),
        (["--threads", "1,0"], "expected numbers >= 1"),
        (["--device", "meta"], "--device"),
        (["--json", "/no/such/folder/x.json"], "expected a file in a folder that exists"),
        (["--impl", "nowhere:f"], "--impl: cannot import"),
        (["compare", "nothing.json", "nothing.json"], "expected a file written by bench --json"),
        (["compare", "x.json", "y.json", "--threshold", "-1"], "expected a percentage >= 0"),
    ],
)
def test_invalid_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *arguments])
    assert message in " ".join(capsys.readouterr().err.split())


def test_the_help_names_every_suite(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    words = set(re.findall(r"\w+", capsys.readouterr().out))
    assert set(suites.SUITES) <= words


def test_only_attention_runs_on_other_devices():
    suites.require_attention(suites.chosen(["forward", "masks"], quick=False))
    with pytest.raises(ValueError, match="--device: expected cpu with --suite softmax"):
        suites.require_attention(suites.chosen(["forward", "softmax"], quick=False))


def test_suites_can_be_combined(capsys, tmp_path, monkeypatch, tiny_bench):
    monkeypatch.setattr(shapes, "MASKS", [TINY["padding"]])
    monkeypatch.setattr(shapes, "VARLEN", [TINY["packed"], TINY["pages"]])
    file = tmp_path / "bench.json"
    arguments = ["--suite", "masks", "--suite", "varlen", "--json", str(file)]
    assert cli.main([*QUICK, *arguments]) == 0
    rows = json.loads(file.read_text())["measurements"]
    found = {(row["suite"], row["case"]) for row in rows}
    assert found == {("masks", "padding"), ("varlen", "packed"), ("varlen", "pages")}


# -- Comparing reports ---------------------------------------------------------------------


def written(path, result):
    path.write_text(json.dumps(report.as_json(result)))
    return str(path)


def test_a_report_does_not_differ_from_itself(example, tmp_path, capsys):
    file = written(tmp_path / "a.json", example)
    assert cli.main(["bench", "compare", file, file]) == 0
    out = capsys.readouterr().out
    assert out.count("no difference") == 12 + 1 and "12 rows compared; 0 slower" in out
    assert "slower " not in out.partition("12 rows")[0] and "faster" not in out


LIBRARIES = {"PyTorch math": 0.03, "zentorch": 0.02, "vLLM": 0.015}


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_slowdown_fails(width, faked_time, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    before = {"fused_attention": 0.01, "a:f": 0.02} | LIBRARIES
    after = {"fused_attention": 0.013, "a:f": 0.01} | LIBRARIES
    runs = [run_bench(faked(faked_time, **x), TINY["plain"]) for x in (before, after)]
    files = [written(tmp_path / f"{n}.json", run) for n, run in enumerate(runs)]
    assert cli.main(["bench", "compare", *files]) == 1
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[2].endswith("slower") and lines[3].endswith("faster")
    assert "1.3" in lines[2] and "0.5" in lines[3]
    assert "of the other libraries of the case" in " ".join(out.split())
    assert cli.main(["bench", "compare", *files, "--threshold", "50"]) == 0
    assert "0 slower by more than 50 %" in capsys.readouterr().out


def test_a_slower_machine_is_no_slowdown(faked_time, tmp_path, capsys):
    times = {"fused_attention": 0.01} | LIBRARIES
    slower = {name: 1.3 * x for name, x in times.items()}
    runs = [run_bench(faked(faked_time, **x), TINY["plain"]) for x in (times, slower)]
    rows = compare.changes(*(compare.read(written(tmp_path / "x.json", run)) for run in runs))
    assert all(0.9 < row.interval[0] < row.interval[1] < 1.1 for row in rows)
    assert all(1.25 < row.after / row.before < 1.35 for row in rows)
    # With another version, or on another machine, nothing is divided.
    for change in ({"versions": {"PyTorch": "9"}}, {"isa": "avx9"}):
        other = replace(runs[1], **change)
        files = [written(tmp_path / f"{n}.json", run) for n, run in enumerate((runs[0], other))]
        assert cli.main(["bench", "compare", *files]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert "differ" in out and "B / A is that of the times alone" in out


def test_rows_of_one_report_only_are_counted(faked_time, tmp_path, capsys):
    both = run_bench(faked(faked_time, fused_attention=0.01, other=0.02), TINY["plain"])
    one = run_bench(faked(faked_time, fused_attention=0.01), TINY["plain"])
    files = written(tmp_path / "a.json", both), written(tmp_path / "b.json", one)
    cli.main(["bench", "compare", *files])
    assert "1 rows are in one of the reports only" in capsys.readouterr().out
    other = run_bench(faked(faked_time, fused_attention=0.01), TINY["causal"])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", "compare", files[0], written(tmp_path / "c.json", other)])
    assert "no case and peer in common" in capsys.readouterr().err


# -- The rest ------------------------------------------------------------------------------


def test_an_implementation_that_raises_has_no_time(tiny_bench):
    implementation = foreign.Implementation("broken", broken, "attention", None)
    result = run_bench(peers.bench_peers(implementation), TINY["plain"], seconds=0.01)
    (row,) = [m for m in result.measurements if m.peer == "broken"]
    assert row.timing is None and row.reason == "ZeroDivisionError: not today"
    assert "not today" in report.as_text(result, 80)
    assert len(result.measurements) == len(peers.bench_peers()) + 1


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


@pytest.mark.slow
@pytest.mark.serial
def test_the_quick_run_takes_under_three_minutes():
    result = subprocess.run(
        [sys.executable, "-m", "fused_attention", "bench", "--quick"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr

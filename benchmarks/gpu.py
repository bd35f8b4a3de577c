"""Runs tests, memory checks, tile sizes and benchmarks on a machine with a GPU (`make gpu`).

It writes results/gpu/<device>.csv, a report to commit. `python benchmarks/gpu.py --status` prints
the README's table of hardware from these reports, and a test compares the two. A step that fails is
recorded too; `--only tests benchmarks` leaves the results of other steps as they are. The peers are
PyTorch's scaled_dot_product_attention, by its own choice and with FlashAttention-2, FlexAttention,
and flash-attn where it is installed. compute-sanitizer runs over a few tests if it is on PATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import result_tables
from fused_attention import attention, masked_softmax
from fused_attention.call import backends
from fused_attention.errors import ArgumentValueError
from fused_attention.tools import tune
from fused_attention.tools.benchmark.harness import machine

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "benchmarks" / "results" / "gpu"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
TESTS = "tests/gpu"
NEVER = "Neither the Triton nor the CUDA kernels have ever run on hardware."
# Backends and their names in the reports.
OURS = {"triton": "fused_attention (Triton)", "cuda": "fused_attention (CUDA)"}
SDPA = "PyTorch SDPA"


# -- Steps: each returns rows of the report, whose column `step` main() fills ----------------

Row = result_tables.Row
Report = tuple[dict[str, str], list[dict[str, str]]]  # the device and machine; the rows


def outcome(output: str) -> dict[str, int]:
    """Returns {"passed": 12, "failed": 1, …} from pytest's last line or a row's note."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}


def pytest(*arguments: str, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the GPU tests. There Triton compiles; in other tests it interprets."""
    command = [*prefix, *PYTEST, TESTS, *arguments]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run_tests(jobs: int) -> list[Row]:
    """Returns a row with the counts, then a row for each test that failed."""
    done = pytest("-n", str(jobs))
    counts = ", ".join(f"{n} {word}" for word, n in outcome(done.stdout).items())
    failures = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
    case = "all passed" if done.returncode == 0 else "not all passed"
    return [{"case": case, "note": counts}, *({"case": "failed", "note": x} for x in failures)]


def run_sanitizer() -> list[Row]:
    """Runs compute-sanitizer (memcheck, racecheck) over the tests of head sizes."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"case": "skipped", "note": "compute-sanitizer is not on PATH"}]
    results = []
    for check in ("memcheck", "racecheck"):
        prefix = (tool, "--tool", check, "--error-exitcode", "9")
        done = pytest("-k", "head_dims", prefix=prefix)
        verdict = "ok" if done.returncode == 0 else "failed"
        note = " | ".join([verdict, *done.stdout.splitlines()[-3:]])
        results.append({"case": check, "note": note})
    return results


def run_tiles() -> list[Row]:
    """Returns the times of the best tiles and of the tiles in the table now."""
    return [
        {"case": f"{x.kernel}, head size {x.head_dim}, {problem}", "peer": peer, "us": us[i]}
        for x in tune.tune(torch.bfloat16, tune.HEAD_DIMS)
        for i, problem in enumerate(("causal", "full"))
        for peer, us in ((f"tiles {' '.join(map(str, x.tiles))}", x.microseconds),
                         ("tiles now", x.before))
    ]  # fmt: skip


# -- Benchmarks ----------------------------------------------------------------------------

Timed = Callable[[], Any]


def medians(calls: dict[str, Timed], rounds: int) -> dict[str, dict[str, Any]]:
    """Returns the microseconds of each call, by events of the device, in turn; or its error."""
    results: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        try:
            for _ in range(3):  # compile, allocate
                call()
            torch.cuda.synchronize()
        except Exception as error:  # a peer's error is part of the report
            results[name] = {"note": f"{type(error).__name__}: {error}"[:300]}
    names = [name for name in calls if name not in results]
    times: dict[str, list[float]] = {name: [] for name in names}
    for done in range(rounds):
        shift = done % max(len(names), 1)
        pairs = {}
        for name in names[shift:] + names[:shift]:
            pairs[name] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pairs[name][0].record()
            calls[name]()
            pairs[name][1].record()
        torch.cuda.synchronize()
        for name, (start, end) in pairs.items():
            times[name].append(start.elapsed_time(end) * 1e3)
    return results | {name: {"us": statistics.median(x)} for name, x in times.items()}


def present() -> list[str]:
    """Returns our backends that are usable here."""
    return [row.name for row in backends.BACKENDS if row.name in OURS and not row.missing()]


def ours(call: Callable[[str], Any]) -> dict[str, Timed]:
    return {OURS[name]: lambda name=name: call(name) for name in present()}


def flash(*x: torch.Tensor, **options: Any) -> torch.Tensor:
    """Calls PyTorch's copy of FlashAttention-2, where PyTorch might choose cuDNN's kernels."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*x, **options)


def flex(length: int, causal: bool) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = None
    if causal:
        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, length, length, device="cuda"
        )
    return lambda *x: compiled(*x, block_mask=mask)


def randn(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=grad)


def measured(case: Row, results: dict[str, dict[str, Any]]) -> list[Row]:
    """Prints and returns a row for each peer."""
    rows = [case | {"peer": name} | got for name, got in results.items()]
    print(*rows, sep="\n", flush=True)
    return rows


def shape_of(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def forward_and_backward(
    calls: dict[str, Timed], leaves: tuple[torch.Tensor, ...], rounds: int
) -> dict[str, dict[str, Any]]:
    """Returns the microseconds of each call, and of the call with the gradients of all leaves."""
    grad = torch.randn_like(next(iter(calls.values()))())

    def forward(call: Timed) -> None:
        with torch.no_grad():
            call()

    def both(call: Timed) -> None:
        torch.autograd.grad(call(), leaves, grad)

    results: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for run, column in ((forward, "us"), (both, "us with backward")):
        timed = {name: lambda c=call, r=run: r(c) for name, call in calls.items()}
        for name, got in medians(timed, rounds).items():
            results[name] |= {column: got["us"]} if "us" in got else got
    return results


# The cases (S, D, causal) of FlexAttention. To compile it for all would take longer than the rest.
FLEX = ((2048, 64, False), (8192, 128, True))


def attention_benchmarks(rounds: int) -> list[Row]:
    """Times forward, and forward with backward: 16384 tokens, 2048 channels, bfloat16.

    TFLOP/s counts 4 B H S^2 D FLOP forward, half if causal, 3.5 times as many with the backward.
    """
    results: list[Row] = []
    sdpa = F.scaled_dot_product_attention
    for D, S, causal in itertools.product((64, 128), (512, 2048, 8192), (False, True)):
        B, H, side = 16384 // S, 2048 // D, "top_left" if causal else False
        x = tuple(randn(B, H, S, D, grad=True) for _ in range(3))
        calls: dict[str, Timed] = {
            SDPA: lambda x=x, c=causal: sdpa(*x, is_causal=c),
            f"{SDPA} (flash)": lambda x=x, c=causal: flash(*x, is_causal=c),
            **ours(lambda name, x=x, c=side: attention(*x, causal=c, backend=name)),
        }
        if (S, D, causal) in FLEX:
            compiled = flex(S, causal)
            calls["FlexAttention"] = lambda x=x, c=compiled: c(*x)
        if importlib.util.find_spec("flash_attn"):
            from flash_attn import flash_attn_func

            calls["flash-attn"] = lambda x=x, c=causal: flash_attn_func(
                *(t.transpose(1, 2) for t in x), causal=c
            ).transpose(1, 2)
        timings = forward_and_backward(calls, x, rounds)
        flop = 4 * B * H * S * S * D * (0.5 if causal else 1.0)
        for got in timings.values():
            for suffix, work in (("", flop), (" with backward", 3.5 * flop)):
                if f"us{suffix}" in got:
                    got[f"TFLOP/s{suffix}"] = work / got[f"us{suffix}"] * 1e-6
        case = f"{S} tokens, head size {D}, {'causal' if causal else 'full'}"
        results += measured({"case": case, "shape": shape_of(B, H, S, D)}, timings)
    return results


def decode_benchmarks(rounds: int) -> list[Row]:
    """Times one query of 32 heads against a cache of 8 key heads, head size 128, bfloat16.

    GB/s counts the keys and values, read once.
    """
    results: list[Row] = []
    for B, Sk in ((1, 8192), (1, 131072), (64, 8192)):
        query, key, value = randn(B, 32, 1, 128), randn(B, 8, Sk, 128), randn(B, 8, Sk, 128)
        calls = {
            SDPA: lambda q=query, k=key, v=value: F.scaled_dot_product_attention(
                q, k, v, enable_gqa=True
            ),
            f"{SDPA} (flash)": lambda q=query, k=key, v=value: flash(q, k, v, enable_gqa=True),
            **ours(lambda name, x=(query, key, value): attention(*x, backend=name)),
        }
        size = (key.numel() + value.numel()) * 2
        case = {"case": f"{Sk} keys", "shape": shape_of(B, 32, 8, Sk, 128)}
        results += measured(case, with_rates(medians(calls, rounds), size))
    return results


def softmax_benchmarks(rounds: int) -> list[Row]:
    """Times masked softmax of [8192, columns], bfloat16. GB/s: of reading and writing once."""
    results: list[Row] = []
    for columns in (1024, 4096, 32768):
        x, hidden = randn(1, 1, 8192, columns), torch.rand(8192, columns, device="cuda") < 0.3
        seen = ~hidden
        calls = {
            "torch.softmax(masked_fill)": lambda x=x, m=hidden: torch.softmax(
                x.masked_fill(m, -float("inf")), -1
            ),
            "fused_attention": lambda x=x, m=seen: masked_softmax(x, m),
        }
        size = x.numel() * 4 + hidden.numel()
        case = {"case": f"{columns} columns", "shape": shape_of(*x.shape)}
        results += measured(case, with_rates(medians(calls, rounds), size))
    return results


def feature_benchmarks(rounds: int) -> list[Row]:
    """Times forward, and forward with backward, in bfloat16, with options that slow others down."""
    results: list[Row] = []
    for B, H, S, D in ((4, 16, 2048, 64), (2, 16, 256, 64)):
        x = tuple(randn(B, H, S, D, grad=True) for _ in range(3))
        bias = randn(1, H, S, S, grad=True)
        mask = torch.rand(B, 1, S, S, device="cuda") > 0.1
        padding = torch.arange(S, device="cuda").expand(B, S) > S - S // 7
        cases: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
            "causal": ({"is_causal": True}, {"causal": "top_left"}),
            "dropout 0.1, causal": (
                {"is_causal": True, "dropout_p": 0.1},
                {"causal": "top_left", "dropout_p": 0.1},
            ),
            "bias with a gradient": ({"attn_mask": bias}, {"bias": bias}),
            "mask": ({"attn_mask": mask}, {"mask": mask}),
            "key padding": (
                {"attn_mask": (~padding)[:, None, None, :]},
                {"key_padding_mask": padding},
            ),
        }
        for name, (theirs, own) in cases.items():
            calls: dict[str, Timed] = {
                SDPA: lambda x=x, o=theirs: F.scaled_dot_product_attention(*x, **o),
                **ours(lambda name, x=x, o=own: attention(*x, **o, backend=name)),
            }
            leaves = (*x, bias) if "bias" in own else x
            timings = forward_and_backward(calls, leaves, rounds)
            results += measured({"case": name, "shape": shape_of(B, H, S, D)}, timings)
    return results


def with_rates(timings: dict[str, dict[str, Any]], size: int) -> dict[str, dict[str, Any]]:
    for got in timings.values():
        if "us" in got:
            got["GB/s"] = size / got["us"] * 1e-3
    return timings


# -- The table in the README ---------------------------------------------------------------


def status(reports: list[Report]) -> str:
    """Returns Markdown from the reports, or one sentence if there are none."""
    if not reports:
        return f"{NEVER}\n"
    lines = [
        "| GPU | tests | TFLOP/s forward, head size 128, 8192 tokens, causal | date |",
        "| --- | --- | --- | --- |",
    ]
    for about, rows in reports:
        tests = outcome(next((row["note"] for row in of_step("tests", rows)), ""))
        result = f"{tests.get('passed', 0)} passed, {tests.get('failed', 0)} failed"
        lines.append(f"| {about['device']} | {result} | {speed(rows)} | {about['date'][:10]} |")
    for about, rows in reports:
        lines += rates(about["device"], of_step("benchmarks", rows))
    return "\n".join(lines) + "\n"


def of_step(step: str, rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if row["step"] == step]


def tflops(row: dict[str, str], suffix: str = "") -> str:
    figure = row.get(f"TFLOP/s{suffix}")
    return f"{float(figure):.0f}" if figure else "–"


def rates(device: str, benchmarks: list[dict[str, str]]) -> list[str]:
    """Returns a table of the TFLOP/s of each peer: forward / forward and backward."""
    peers = list(result_tables.by("peer", benchmarks))
    lines = ["", f"| {device}, TFLOP/s | {' | '.join(peers)} |"]
    lines.append("| --- |" + " --- |" * len(peers))
    for case, group in result_tables.by("case", benchmarks).items():
        found = {row["peer"]: row for row in group}
        cells = [found.get(name, {}) for name in peers]
        figures = [f"{tflops(cell)} / {tflops(cell, ' with backward')}" for cell in cells]
        lines.append(f"| {case} | {' | '.join(figures)} |")
    return lines if benchmarks else []


def speed(rows: list[dict[str, str]]) -> str:
    case = "8192 tokens, head size 128, causal"
    found = {row["peer"]: row for row in of_step("benchmarks", rows) if row["case"] == case}
    names = {"Triton": OURS["triton"], "CUDA": OURS["cuda"], "PyTorch": SDPA}
    figures = [f"{k} {tflops(found.get(name, {}))}" for k, name in names.items()]
    return ", ".join(figures) if found else "–"


def committed_reports() -> list[Report]:
    return [result_tables.read(path) for path in sorted(REPORTS.glob("*.csv"))]


STEPS = ("tests", "sanitizer", "tiles", "benchmarks", "decode", "softmax", "features")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--status", action="store_true", help="only print the README's table")
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each benchmark")
    parser.add_argument("--jobs", type=int, default=2, help="test processes")
    options = parser.parse_args()
    if options.status:
        print(status(committed_reports()), end="")
        return 0
    try:
        device = tune.require_gpu()
    except ArgumentValueError as error:
        print(str(error).replace("tune:", "make gpu:", 1), file=sys.stderr)
        return 2
    name, about = torch.cuda.get_device_name(device), machine()
    path = REPORTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.csv"
    passed = True
    steps: dict[str, Callable[[], list[Row]]] = {
        "tests": lambda: run_tests(options.jobs),
        "sanitizer": run_sanitizer,
        "tiles": run_tiles,
        "benchmarks": lambda: attention_benchmarks(options.rounds),
        "decode": lambda: decode_benchmarks(options.rounds),
        "softmax": lambda: softmax_benchmarks(options.rounds),
        "features": lambda: feature_benchmarks(options.rounds),
    }
    for step in options.only:
        rows = [{"step": step, **row} for row in steps[step]()]
        result_tables.update(path, {"device": name, **about}, rows, "step")
        if step == "tests":
            passed = rows[0]["case"] == "all passed"
            print("tests:", rows[0]["note"], flush=True)
    print(f"{path.relative_to(ROOT)}: commit it, and put this into the README:\n")
    print(status(committed_reports()))
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

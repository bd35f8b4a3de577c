"""What only a person with a GPU can run (`make gpu`): tests, tile sizes, benchmarks, memory checks.

It writes results/gpu/<device>.json, to be committed; the README's table of hardware is printed from
these reports by `python benchmarks/gpu.py --status`, and a test compares the two. Each step is
recorded also when it fails. Peers: PyTorch's scaled_dot_product_attention, FlexAttention, and
flash-attn where it is installed. compute-sanitizer runs over a few tests where it is on PATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fused_attention import attention, tune
from fused_attention.benchmark.harness import machine
from fused_attention.errors import ArgumentValueError

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "benchmarks" / "results" / "gpu"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
NEVER = "Neither the Triton nor the CUDA kernels have ever run on hardware."
# Backends and their names in the reports.
OURS = {"triton": "fused_attention (Triton)", "cuda": "fused_attention (CUDA)"}


# -- Steps ---------------------------------------------------------------------------------


def outcome(output: str) -> dict[str, int]:
    """{"passed": 12, "failed": 1, …} from pytest's last line."""
    last = output.strip().splitlines()[-1] if output.strip() else ""
    return {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}


def run_tests() -> dict[str, Any]:
    done = subprocess.run(PYTEST, cwd=ROOT, capture_output=True, text=True)
    failures = re.findall(r"^FAILED (\S+)", done.stdout, re.M)
    return {**outcome(done.stdout), "failures": failures, "ok": done.returncode == 0}


def run_sanitizer() -> dict[str, Any]:
    """compute-sanitizer (memcheck, racecheck) over the sizes test."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not on PATH"}
    results = {}
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", *PYTEST, "-k", "head_dims"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        results[check] = {"ok": done.returncode == 0, "summary": done.stdout.splitlines()[-3:]}
    return results


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def peers() -> dict[str, Callable[[Tensors, bool], torch.Tensor]]:
    """name -> f((query, key, value), causal), [B, H, S, D]."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def flex(x: Tensors, causal: bool) -> torch.Tensor:
        length = x[0].shape[2]
        if causal and length not in masks:
            masks[length] = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, length, length, device="cuda"
            )
        return compiled(*x, block_mask=masks[length] if causal else None)

    def ours(backend: str) -> Callable[[Tensors, bool], torch.Tensor]:
        return lambda x, causal: attention(
            *x, causal="top_left" if causal else False, backend=backend
        )

    found: dict[str, Callable[[Tensors, bool], torch.Tensor]] = {
        **{name: ours(backend) for backend, name in OURS.items()},
        "PyTorch SDPA": lambda x, causal: F.scaled_dot_product_attention(*x, is_causal=causal),
        "FlexAttention": flex,
    }
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_func

        found["flash-attn"] = lambda x, causal: flash_attn_func(
            *(t.transpose(1, 2) for t in x), causal=causal
        ).transpose(1, 2)
    return found


def run_benchmarks(rounds: int) -> list[dict[str, Any]]:
    """Forward, and forward with backward: 16384 tokens, 2048 channels, bfloat16."""
    results = []
    for head_dim in (64, 128):
        for length in (512, 2048, 8192):
            for causal in (False, True):
                shape = (16384 // length, 2048 // head_dim, length, head_dim)
                results.append(
                    {"shape": shape, "causal": causal, **benchmark(shape, causal, rounds)}
                )
                print(results[-1], flush=True)
    return results


def benchmark(shape: tuple[int, ...], causal: bool, rounds: int) -> dict[str, Any]:
    """Microseconds and TFLOP/s by peer: 4 B H S^2 D FLOP forward, half if causal; 2.5 times as many
    backward."""
    query, key, value, grad = (
        torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=n < 3)
        for n in range(4)
    )
    B, H, S, D = shape
    flop = 4 * B * H * S * S * D * (0.5 if causal else 1.0)
    timings: dict[str, Any] = {}
    for name, peer in peers().items():

        def forward(peer: Any = peer) -> torch.Tensor:
            with torch.no_grad():
                return peer((query, key, value), causal)

        def both(peer: Any = peer) -> None:
            out = peer((query, key, value), causal)
            torch.autograd.grad(out, (query, key, value), grad)

        try:
            for call in (forward, both):  # compile
                call()
            one, two = tune.microseconds(forward, rounds), tune.microseconds(both, rounds)
        except Exception as error:  # a peer that cannot is part of the report
            timings[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
            continue
        timings[name] = {
            "forward_us": one,
            "forward_tflops": flop / one * 1e-6,
            "both_us": two,
            "both_tflops": 3.5 * flop / two * 1e-6,
        }
    return timings


# -- The table in the README ---------------------------------------------------------------


def status(reports: list[dict[str, Any]]) -> str:
    """Markdown, from the reports; one sentence without any."""
    if not reports:
        return f"{NEVER}\n"
    lines = [
        "| GPU | tests | TFLOP/s forward, head size 128, 8192 tokens, causal | date |",
        "| --- | --- | --- | --- |",
    ]
    for report in reports:
        tests = report["tests"]
        result = f"{tests.get('passed', 0)} passed, {tests.get('failed', 0)} failed"
        lines.append(f"| {report['device']} | {result} | {speed(report)} | {report['date'][:10]} |")
    return "\n".join(lines) + "\n"


def speed(report: dict[str, Any]) -> str:
    for one in report["benchmarks"]:
        if list(one["shape"][2:]) == [8192, 128] and one["causal"]:
            names = {"Triton": OURS["triton"], "CUDA": OURS["cuda"], "PyTorch": "PyTorch SDPA"}
            figures = {k: one.get(name, {}).get("forward_tflops") for k, name in names.items()}
            return ", ".join(f"{k} {x:.0f}" if x else f"{k} –" for k, x in figures.items())
    return "–"


def committed_reports() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(REPORTS.glob("*.json"))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--status", action="store_true", help="print the README's table, no more")
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each benchmark")
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
    report = {"device": name, "date": about["date"], "machine": about, "tests": run_tests()}
    print("tests:", report["tests"], flush=True)
    report["sanitizer"] = run_sanitizer()
    report["tiles"] = tune.report(tune.tune(torch.bfloat16, tune.HEAD_DIMS))
    report["benchmarks"] = run_benchmarks(options.rounds)
    REPORTS.mkdir(parents=True, exist_ok=True)
    path = REPORTS / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{path.relative_to(ROOT)}: commit it, and put this into the README:\n")
    print(status(committed_reports()))
    return 0 if report["tests"]["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())

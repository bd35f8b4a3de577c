"""Second derivatives and forward mode beside forward + backward: results/tangents.csv.

    python benchmarks/bench_tangents.py [--rounds 15]

B1 H8 S3072 D64 on 2 threads. Times are medians of rounds that run every row once, in turn; use
real-time priority (chrt -f 10) on a busy machine. Memory is the peak beyond the inputs, without the
results, each row in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import result_tables
from fused_attention import attention
from fused_attention.tools.benchmark.harness import machine

RESULTS = Path(__file__).resolve().parent / "results" / "tangents.csv"
B, H, S, D = 1, 8, 3072, 64
CASES = {
    "float32": {},
    "float32 causal": {"causal": True},
    "float32 dropout 0.1": {"dropout_p": 0.1},
    "bfloat16": {"dtype": torch.bfloat16},
}
LIMITS = {"ratio at most": 4.0, "MiB at most": 80.0}


def rows(case, seqlen=S):
    """Returns name -> a function that computes the row once and returns its results."""
    options = dict(CASES[case])
    dtype = options.pop("dtype", torch.float32)
    torch.manual_seed(0)
    *qkv, grad_out, t_q, t_k, t_v = (torch.randn(B, H, seqlen, D, dtype=dtype) for _ in range(7))
    directions = (t_q, t_k, t_v)
    leaves = [x.requires_grad_() for x in qkv]
    primals = tuple(x.detach() for x in leaves)
    grad_out.requires_grad_()

    def function(*tensors):
        return attention(*tensors, **options)

    def backward(create_graph=False):
        out = function(*leaves)
        return torch.autograd.grad(out, leaves, grad_out, create_graph=create_graph)

    def double_backward():
        """Includes the forward and backward that it needs."""
        return torch.autograd.grad(backward(True), [*leaves, grad_out], directions)

    def jvp():
        return torch.func.jvp(function, primals, directions)

    def hessian_product():
        fixed = grad_out.detach()
        gradient = torch.func.grad(lambda *x: (function(*x) * fixed).sum(), (0, 1, 2))
        return torch.func.jvp(gradient, primals, directions)

    return {
        "forward + backward": backward,
        "double backward, all": double_backward,
        "jvp, with forward": jvp,
        "jvp of grad": hessian_product,
    }


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def peak_mib(case, name):
    """Returns the working memory of one row, measured in this process."""
    rows(case, 256)[name]()
    function = rows(case)[name]
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    results = torch.utils._pytree.tree_leaves(function())
    returned = sum(x.nbytes for x in results if isinstance(x, torch.Tensor)) / 2**20
    return resident("VmHWM") - before - returned


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "ROW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.memory_of:
        print(peak_mib(*arguments.memory_of))
        return
    table = []
    for case in CASES:
        functions = rows(case)
        times = {name: [] for name in functions}
        for number in range(arguments.rounds + 1):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                if number:  # the first is a warm-up
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(x) for name, x in times.items()}
        base = medians["forward + backward"]
        print(case)
        for name, median in medians.items():
            command = [sys.executable, __file__, "--memory-of", case, name]
            child = subprocess.run(command, capture_output=True, text=True, check=True)
            found = {
                "ms": round(median * 1e3, 1),
                "min ms": round(min(times[name]) * 1e3, 1),
                "ratio": round(median / base, 2),
                "MiB": round(float(child.stdout), 1),
            }
            table.append({"case": case, "call": name, **found})
            print(f"  {name:22}", *(f"{key} {value:<8}" for key, value in found.items()))
    result_tables.write(RESULTS, machine() | {"threads": 2} | LIMITS, table)


if __name__ == "__main__":
    main()

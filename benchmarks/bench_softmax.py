"""masked_softmax against plain PyTorch and against copying the bytes: results/softmax.csv.

About 17 million elements in rows of several lengths, with a boolean mask [B, 1, M, N] that hides a
fifth. The same run measures two ceilings, which move the same bytes: with new memory for the result
(clone; for the backward, which reads two tensors, their sum), and with existing memory (copy_), for
`masked_softmax_`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

import fused_attention as fa
import result_tables
from fused_attention import _native
from fused_attention import operators as ops
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "softmax.csv"
SHAPES = ((32, 32, 128, 128), (2, 8, 1024, 1024), (1, 4, 1024, 4096), (1, 8, 64, 32768))
DTYPES = (torch.float32, torch.bfloat16)
SCALE = 0.125
OURS = "fused_attention"


def calls(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Returns the calls to time; backward calls run what autograd would, without its graph."""
    x, grad = (torch.randn(shape).to(dtype) for _ in range(2))
    mask = torch.rand(shape[0], 1, *shape[2:]) > 0.2
    mask[..., 0] = True  # no fully masked row, which would be NaN in PyTorch
    weights = torch.softmax(x.masked_fill(~mask, -torch.inf) * SCALE, -1)
    in_place, target = x.clone(), torch.empty_like(x)

    def pytorch_backward() -> torch.Tensor:
        ds = torch._softmax_backward_data(grad, weights, -1, dtype)
        return (ds * SCALE).masked_fill(~mask, 0.0)

    return {
        "forward": lambda: fa.masked_softmax(x, mask, scale=SCALE),
        "forward, PyTorch": lambda: torch.softmax(x.masked_fill(~mask, -torch.inf) * SCALE, -1),
        "forward, clone": lambda: x.clone(),
        "in place": lambda: fa.masked_softmax_(in_place, mask, scale=SCALE),
        "in place, copy_": lambda: target.copy_(x),
        "backward": lambda: ops.softmax_backward(grad, weights, SCALE, 0),
        "backward, PyTorch": pytorch_backward,
        "backward, sum": lambda: grad + weights,
    }


# The output has our time divided by these; below 1 ours is faster.
RATIOS = {
    "forward": ("PyTorch", "clone"),
    "in place": ("copy_",),
    "backward": ("PyTorch", "sum"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=4.0, help="seconds a case")
    options = parser.parse_args()
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time, torch.no_grad():
        for shape in SHAPES:
            for dtype in DTYPES:
                timings = interleave(calls(shape, dtype), budget=options.budget)
                ratios = {
                    f"{ours} / {peer}": timings[ours].median / timings[f"{ours}, {peer}"].median
                    for ours, peers in RATIOS.items()
                    for peer in peers
                }
                name = str(dtype).removeprefix("torch.")
                case = {"shape": "x".join(map(str, shape)), "dtype": name}
                for ours, peers in RATIOS.items():
                    own = {OURS: timings[ours]}
                    own |= {peer: timings[f"{ours}, {peer}"] for peer in peers}
                    rows += result_tables.beside(case | {"call": ours}, own, OURS)
                disturbed = any(timing.disturbed for timing in timings.values())
                print(
                    f"rows of {shape[-1]:5} {name:8} "
                    + "  ".join(f"{pair} {ratio:.2f}" for pair, ratio in ratios.items())
                    + ("  (disturbed)" if disturbed else ""),
                    flush=True,
                )
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    result_tables.write(RESULTS, about | {"real_time": real_time}, rows)
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()

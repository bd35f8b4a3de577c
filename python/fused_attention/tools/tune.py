"""Measures the tile sizes of the Triton attention kernels on a GPU, for `kernels/tiles.py`.

Each kernel is timed alone, at each head size, on a causal and on a full problem. The best tiles
have the least sum of the two times, each relative to the fastest time of its problem. Tiles that do
not compile, do not fit, or give another result than the tiles in the table are left out.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentValueError
from ..operators.arguments import Arguments

if TYPE_CHECKING:
    from ..kernels.tiles import Arch, Tiles

KERNELS = ("forward", "dkdv", "dq")
HEAD_DIMS = (64, 128, 256)
SEQLEN, TOKENS = 4096, 16384


@dataclass(frozen=True)
class Tuned:
    """The best tiles of a kernel at one head size.

    microseconds: their times on the causal and on the full problem. before: the times of the tiles
    in the table now.
    """

    kernel: str
    head_dim: int
    tiles: tuple[int, ...]
    microseconds: tuple[float, float]
    before: tuple[float, float]


# -- Candidates, and the best of them ------------------------------------------------------


def shared_bytes(kernel: str, tiles: Tiles, head_dim: int, itemsize: int) -> int:
    """Returns a lower bound: the tiles that stay, and the tiles of the stages of a loop."""
    turning = tiles.block_m if kernel == "dkdv" else tiles.block_n
    staying = tiles.block_m if kernel == "forward" else 0
    return (staying + 2 * turning * max(1, tiles.num_stages - 1)) * head_dim * itemsize


def candidates(kernel: str, arch: Arch, head_dim: int, itemsize: int = 2) -> list[Tiles]:
    """Returns the tiles whose scores and accumulators fit the registers of their warps, and which
    fit the shared memory of a thread block."""
    from ..kernels.tiles import Tiles

    found = []
    blocks, warps, stages = (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
    specialized = (False, True) if kernel == "forward" and arch.name == "sm_100" else (False,)
    for values in itertools.product(blocks, blocks, warps, stages, specialized):
        tiles = Tiles(*values)
        scores = tiles.block_m * tiles.block_n * (1 if kernel == "forward" else 2)
        kept = tiles.block_n * 2 if kernel == "dkdv" else tiles.block_m
        registers = (scores + kept * head_dim) / (32 * tiles.num_warps)
        fits = shared_bytes(kernel, tiles, head_dim, itemsize) <= arch.shared_bytes
        if fits and 16 <= registers <= 256:
            found.append(tiles)
    return found


def best(times: Mapping[Tiles, Sequence[float]]) -> Tiles:
    """Returns the first tiles with the least sum over the problems of time / fastest time."""
    fastest = [min(column) for column in zip(*times.values(), strict=True)]
    return min(times, key=lambda t: sum(x / y for x, y in zip(times[t], fastest, strict=True)))


def rows(results: Sequence[Tuned], arch: str, itemsize: int) -> str:
    """Returns the lines for `_TABLE` in kernels/tiles.py."""
    lines = []
    for kernel in KERNELS:
        own = {r.head_dim: r.tiles for r in results if r.kernel == kernel}
        if own:
            entries = ", ".join(
                f"{head_dim}: Tiles({', '.join(map(str, own[head_dim]))})"
                for head_dim in sorted(own)
            )
            lines.append(f'    ("{kernel}", "{arch}", {8 * itemsize}): {{{entries}}},')
    return "\n".join(lines)


# -- Measuring -----------------------------------------------------------------------------


def require_gpu() -> torch.device:
    """Returns the current CUDA or HIP device. Raises ArgumentValueError if there is none."""
    if not torch.cuda.is_available():
        raise ArgumentValueError(
            "tune: expected a GPU that PyTorch can use, got torch.cuda.is_available() = False; "
            "tiles can be measured only on the hardware that they are for"
        )
    return torch.device("cuda", torch.cuda.current_device())


def microseconds(call: Callable[[], object], rounds: int) -> float:
    """Returns the median of `rounds` calls, by events of the device. Caches are not flushed."""
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def problem(
    device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool
) -> tuple[Callable[[str, Any], Any], dict[str, Sequence[Tensor]]]:
    """Returns a function that gives the launch of a kernel with some tiles, for a call of TOKENS
    tokens and 2048 channels; and the tensors that each kernel writes."""
    from ..kernels import launch, operators
    from ..kernels.tiles import arch_of

    heads = 2048 // head_dim
    shape = (TOKENS // SEQLEN, heads, SEQLEN, head_dim)
    query, key, value, grad_out = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    scale, arch = 1.0 / math.sqrt(head_dim), arch_of(device)
    numbers = Arguments(scale, int(causal), -1, -1, 0)
    call = launch.describe(query, key, numbers)
    out, lse = operators.attention_forward(query, key, value, *numbers)
    assert lse is not None
    delta = (out.float() * grad_out.float()).sum(-1)
    dq, dk, dv = (torch.empty_like(x) for x in (query, key, value))

    def launched(kernel: str, tiles: Any) -> Any:
        if kernel == "forward":
            return launch.forward_launch(query, key, value, out, lse, call, 0, arch, tiles)
        _, dkdv, dq_ = launch.backward_launches(
            query, key, value, out, grad_out, None, lse, delta, dq, dk, dv, None, call, 0, arch,
            tiles,
        )  # fmt: skip
        return dkdv if kernel == "dkdv" else dq_

    return launched, {"forward": (out, lse), "dkdv": (dk, dv), "dq": (dq,)}


def times_of(
    launched: Callable[[str, Any], Any],
    written: Sequence[Tensor],
    kernel: str,
    tried: Sequence[Tiles | None],
    rounds: int,
) -> dict[Tiles | None, float]:
    """Returns the times of the tiles that work, that is, whose result is close to that of None.

    None stands for the tiles of the table.
    """
    times: dict[Tiles | None, float] = {}
    launched(kernel, None).run()
    expected = [x.clone() for x in written]
    for tiles in tried:
        one = launched(kernel, tiles)
        try:
            one.run()
            torch.cuda.synchronize()
        except Exception as error:  # any error of the compiler or the driver
            print(f"  {kernel} {tiles}: {type(error).__name__}", flush=True)
            continue
        same = (torch.allclose(x, y, 2e-2, 2e-2) for x, y in zip(written, expected, strict=True))
        if all(same):
            times[tiles] = microseconds(one.run, rounds)
    return times


def tune(dtype: torch.dtype, head_dims: Sequence[int], rounds: int = 20) -> list[Tuned]:
    """Finds the best tiles for the current GPU. Raises ArgumentValueError without one."""
    device = require_gpu()
    from ..kernels.tiles import arch_of

    results = []
    for head_dim in head_dims:
        problems = [problem(device, dtype, head_dim, causal) for causal in (True, False)]
        for kernel in KERNELS:
            tried = [None, *candidates(kernel, arch_of(device), head_dim, dtype.itemsize)]
            columns = [
                times_of(launched, written[kernel], kernel, tried, rounds)
                for launched, written in problems
            ]
            times = {
                tiles: tuple(column[tiles] for column in columns)
                for tiles in tried
                if tiles is not None and all(tiles in column for column in columns)
            }
            chosen = best(times)
            causal, full = times[chosen]
            before = (columns[0][None], columns[1][None])
            results.append(Tuned(kernel, head_dim, tuple(chosen), (causal, full), before))
            print(as_text(results[-1]), flush=True)
    return results


def as_text(result: Tuned) -> str:
    block_m, block_n, num_warps, num_stages, specialized = result.tiles
    causal, full = result.microseconds
    return (
        f"{result.kernel} head_dim {result.head_dim}: {block_m} x {block_n}, {num_warps} warps, "
        f"{num_stages} stages{', specialized' if specialized else ''}: "
        f"{causal:.0f} us causal (was {result.before[0]:.0f}), "
        f"{full:.0f} us full (was {result.before[1]:.0f})"
    )


def report(results: Sequence[Tuned]) -> list[dict[str, Any]]:
    return [asdict(result) for result in results]

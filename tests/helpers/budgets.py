"""Measures the code of the main configurations: committed limits, and a page of tables.

    python tests/helpers/budgets.py [--only TEXT] [--missing]   writes the two files below
    python tests/helpers/budgets.py --page                      writes the page, from known limits

data/triton_budgets.json has, for each {target, kernel, head size, causal or not, feature} that the
pinned Triton compiles: tiles, registers, bytes of stack, shared memory, the counts of instructions
that must be there, and the mix of the main loop per 1024 scores (main_loop.py). The limits are
measured for bfloat16 and hold for float16 as well. test_budgets.py compares a selection of them,
and all of them with --full. docs/triton_code.md shows the mixes beside those of a tutorial kernel,
and every figure that misses its goal, with the cause.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from importlib import metadata
from typing import Any

import main_loop
from compile_kernels import Request, compiled, instruction_counts
from compile_launch import CompiledLaunch, compile_launch
from paths import DATA, ROOT

LIMITS = DATA / "triton_budgets.json"
PAGE = ROOT / "docs" / "triton_code.md"

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KERNELS = ("forward", "dkdv", "dq")
HEAD_DIMS = (64, 128, 256)
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": "1HQK"},
    "mask": {"mask": "B1QK"},
    "dropout": {"dropout_p": 0.1},
}
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def name_of(target: str, kernel: str, D: int, causal: bool, feature: str) -> str:
    return f"{target} {kernel} {D} {'causal' if causal else 'full'} {feature}"


CONFIGURATIONS: dict[str, tuple[Any, ...]] = {
    name_of(*axes): axes
    for axes in itertools.product(TARGETS, KERNELS, HEAD_DIMS, (False, True), FEATURES)
}


def measure(name: str, dtype: str = "bfloat16") -> dict[str, Any]:
    """Returns the entry of a configuration; raises RuntimeError if the kernel does not compile.

    "main" is the mix of the shortest loop over tiles: the main loop, or the only loop. "masked" has
    the totals of the other loops.
    """
    target, kernel, D, causal, feature = CONFIGURATIONS[name]
    function = f"attention_{kernel}_kernel"
    options = {"causal": int(causal), **FEATURES[feature]}
    launch, code = compiled(Request(target, function, dtype, D, **options))
    return {
        "tiles": [*(launch.constants[x] for x in ("BLOCK_M", "BLOCK_N")), launch.num_warps,
                  launch.num_stages],
        **entry_of(target, code, launch.constants["BLOCK_M"] * launch.constants["BLOCK_N"],
                   launch.num_warps),
    }  # fmt: skip


def entry_of(target: str, code: CompiledLaunch, tile: int, num_warps: int) -> dict[str, Any]:
    """Returns the entry of compiled code. tile: scores of a tile, which num_warps warps share."""
    is_amd = target.startswith("gfx")
    if is_amd:
        instructions, resources = (
            f(code.assembly) for f in (main_loop.gcn, main_loop.gcn_resources)
        )
    else:
        instructions, resources = (f(code.binary) for f in (main_loop.sass, main_loop.resources))
    loops = main_loop.score_loops(instructions, tile // num_warps)
    loops.sort(key=lambda loop: len(loop.instructions))
    counts, main = instruction_counts(code.assembly), loops[0]
    entry: dict[str, Any] = {
        **resources,
        "shared": code.shared,
        "matrix": counts[MATRIX[target]],
        "async": counts["cp.async"] + counts["tma"],
        "main": main.per_1024_scores(),
        "masked": [loop.per_1024_scores()["total"] for loop in loops[1:]],
    }
    if target in main_loop.MODELLED:
        cycles = main.cycles(target)
        entry["cycles"] = {unit: cycles[unit] for unit in ("tensor", "shared")}
        entry["exposed"] = main.softmax_exposed(target)
    return entry


# As in Triton's tutorial: (tile sizes, num_warps, num_stages).
PLAIN_TILES = {
    "tutorial forward": ({"BLOCK_M": 128, "BLOCK_N": 64}, 4, 3),
    "tutorial backward": ({"BLOCK": 128, "STEP": 32}, 4, 2),
}


def measure_tutorial(name: str, target: str, D: int) -> list[dict[str, Any]]:
    """Returns an entry for each loop, in order, of a kernel of tutorial_kernels.py in bfloat16."""
    import torch

    import tutorial_kernels
    from fused_attention.kernels.launch import Launch

    blocks, num_warps, num_stages = PLAIN_TILES[name]
    x = torch.empty(16, 1024, D, dtype=torch.bfloat16, device="meta")
    row = torch.empty(16, 1024, device="meta")
    tensors, scales = (
        ((x,) * 4 + (row,), 1)
        if name == "tutorial forward"
        else ((x, x, x, x, row, row, x, x, x), 2)
    )
    kernel = getattr(tutorial_kernels, name.replace(" ", "_"))
    args = (*tensors, 1024, *[0.125] * scales)
    launch = Launch(kernel, (1,), args, blocks | {"D": D}, num_warps, num_stages)
    code = compile_launch(target, launch)
    return [
        {**main_loop.resources(code.binary), "tiles": [*blocks.values(), num_warps, num_stages],
         "main": loop.per_1024_scores(), "cycles": loop.cycles(target),
         "exposed": loop.softmax_exposed(target)}
        for loop in main_loop.score_loops(
            main_loop.sass(code.binary), math.prod(blocks.values()) // num_warps
        )
    ]  # fmt: skip


def load() -> dict[str, Any]:
    """Returns {"triton": version, "limits": {name: entry}, "tutorial": {name: entries of loops}}.

    A name in "tutorial" is for example "sm_80 tutorial forward 64".
    """
    return json.loads(LIMITS.read_text()) if LIMITS.exists() else {"limits": {}, "tutorial": {}}


def excesses(entry: dict[str, Any], limit: dict[str, Any]) -> list[str]:
    """Lists the limits that a measured entry exceeds. Fewer instructions are no fault."""
    wrong = []
    for what, slack in (("registers", 8), ("stack", 16), ("shared", 0)):
        if entry[what] > limit[what] + slack:
            wrong.append(f"{what}: {entry[what]}, limit {limit[what]}")
    for what in ("matrix", "async"):
        if limit[what] and not entry[what]:
            wrong.append(f"{what}: no such instruction any more")
    for what in ("total", "spill"):
        mine, most = entry["main"].get(what, 0.0), limit["main"].get(what, 0.0)
        if mine > 1.02 * most + 1:
            wrong.append(f"{what} of the main loop: {mine} per 1024 scores, limit {most}")
    for mine, most in zip(entry["masked"], limit["masked"], strict=False):
        if mine > 1.02 * most + 1:
            wrong.append(f"total of a masked loop: {mine} per 1024 scores, limit {most}")
    return wrong


# -- Goals ---------------------------------------------------------------------------------

# Goals per 1024 scores of the main loop: what the best known kernels of each kind need when they
# are compiled the same way, and about 10 % on top. The goals of the backward in two kernels on
# sm_90, and on sm_80 at head size 128, are the best of the tutorial's backward over its tile sizes,
# and as much on top. "int+move" counts instructions that are neither products nor softmax, and
# "shared" counts cycles.
GOALS: dict[tuple[str, str, int], dict[str, float]] = {
    ("sm_80", "forward", 64): {"total": 330, "int+move": 40, "shared": 450, "exposed": 0.64},
    ("sm_80", "forward", 128): {"total": 520, "int+move": 60, "shared": 850, "exposed": 0.71},
    ("sm_80", "dkdv", 64): {"total": 620, "shared": 1230, "exposed": 0.60},
    ("sm_80", "dkdv", 128): {"total": 980, "shared": 2650},
    ("sm_80", "dq", 64): {"total": 380, "shared": 760, "exposed": 0.74},
    ("sm_80", "dq", 128): {"total": 660, "shared": 2340},
    ("sm_90", "forward", 64): {"total": 270, "int+move": 46, "shared": 230, "exposed": 0.48},
    ("sm_90", "forward", 128): {"total": 270, "int+move": 56, "shared": 340, "exposed": 0.65},
    ("sm_90", "dkdv", 64): {"total": 361, "shared": 726},
    ("sm_90", "dkdv", 128): {"total": 469, "shared": 1223},
    ("sm_90", "dq", 64): {"total": 288, "shared": 488},
    ("sm_90", "dq", 128): {"total": 382, "shared": 915},
}
ACCEPTED_STACK = 64  # bytes: values that live across the loops and are not used in them
ACCEPTED_SPILLS = 20.0  # loads and stores per 1024 scores in a main loop, as in FlashAttention-2's


def misses(name: str, entry: dict[str, Any]) -> list[str]:
    """Lists the goals that a configuration misses. Goals for stack, spills and the target's own
    matrix instructions hold for every configuration, the others without bias, mask and dropout."""
    target, kernel, D, _, feature = CONFIGURATIONS[name]
    missed = []
    if entry["stack"] > ACCEPTED_STACK:
        missed.append("stack")
    if figure(entry, "spill") > ACCEPTED_SPILLS:
        missed.append("spill")
    if not entry["matrix"]:
        missed.append("matrix")
    if feature == "plain":
        for what, goal in GOALS.get((target, kernel, D), {}).items():
            reached = figure(entry, what)
            if reached < goal if what == "exposed" else reached > goal:
                missed.append(what)
    return missed


ALL_GOALS = ("total", "int+move", "shared", "exposed")


def figure(entry: dict[str, Any], what: str) -> float:
    """Returns the figure of an entry that a goal limits."""
    main = entry["main"]
    if what == "int+move":
        return round(main.get("integer", 0.0) + main.get("move", 0.0), 1)
    if what == "shared":
        return entry["cycles"]["shared"]
    return entry[what] if what in ("exposed", "stack", "matrix") else main.get(what, 0.0)


# Why a goal is missed: (regular expression for the configuration, goals, cause).
CAUSES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    (
        r"^sm_80 forward 128 \w+ plain",
        ("shared", "exposed"),
        "8 warps of 16 queries each read all keys and values from shared memory, where 4 warps of "
        "32 would read them half as often; those need more registers than there are, and spill "
        "about 40 times per 1024 scores",
    ),
    (
        r"^sm_90 \w+ (64|128) \w+ plain",
        ("total", "int+move", "shared", "exposed"),
        "tiles of at most 64 queries, so that several blocks share a multiprocessor: on an H200 "
        "they take a tenth to a third less time than the tiles with which the goals were set",
    ),
    (
        r"^sm_90 forward 64 causal plain",
        ("int+move",),
        "the loop counts the stages and phases of the barriers at which TMA's copies arrive, and "
        "keeps the values that the loop over masked blocks needs",
    ),
    (
        r" (bias|mask|dropout)$",
        ("stack", "spill"),
        "values that each score needs for itself (addresses, random words), beside accumulators "
        "that fill the registers",
    ),
    (
        r"^sm_90 dkdv 256 ",
        ("matrix",),
        "with the 64 x 64 scores that wgmma needs, accumulators of dk and dv fill the registers "
        "and spill 278 times per 1024 scores; 64 x 32 keeps to mma.sync and spills nothing",
    ),
    (
        r" 256 ",
        ("stack", "spill"),
        "accumulators of 256 columns fill the registers at any tile that still uses the tensor "
        "cores",
    ),
    (
        r" causal ",
        ("stack",),
        "addresses of the loop over masked blocks, kept on the stack during the main loop",
    ),
)


def cause(name: str, what: str) -> str:
    """Returns the cause in CAUSES; raises KeyError if CAUSES names none."""
    for pattern, goals, text in CAUSES:
        if what in goals and re.search(pattern, name):
            return text
    raise KeyError(f"{name} misses {what}: no cause in CAUSES")


# -- Files ---------------------------------------------------------------------------------


def write(document: dict[str, Any]) -> None:
    """Writes the limits as JSON, one line per entry."""

    def lines(entries: dict[str, Any]) -> str:
        return ",\n".join(f"  {json.dumps(k)}: {json.dumps(x)}" for k, x in entries.items())

    limits = {
        name: document["limits"][name] for name in CONFIGURATIONS if name in document["limits"]
    }
    LIMITS.write_text(
        f'{{\n "triton": {json.dumps(metadata.version("triton"))},\n'
        f' "limits": {{\n{lines(limits)}\n }},\n'
        f' "tutorial": {{\n{lines(document["tutorial"])}\n }}\n}}\n'
    )


def write_limits(names: Sequence[str]) -> None:
    """Measures these configurations again, one after another, and keeps the other limits."""
    document = load()
    for number, name in enumerate(names, 1):
        document["limits"][name] = measure(name)
        print(f"{number}/{len(names)} {name}: {misses(name, document['limits'][name])}", flush=True)
        write(document)


def write_tutorial() -> None:
    document = load()
    for name, target, D in itertools.product(PLAIN_TILES, ("sm_80", "sm_90"), (64, 128)):
        document["tutorial"][f"{target} {name} {D}"] = measure_tutorial(name, target, D)
    write(document)


def table(rows: list[list[Any]]) -> Iterator[str]:
    """Yields the lines of a Markdown table; the first row is its header."""
    yield "| " + " | ".join(map(str, rows[0])) + " |"
    yield "| --- " * len(rows[0]) + "|"
    for row in rows[1:]:
        yield "| " + " | ".join(map(str, row)) + " |"


PAGE_HEAD = """# What the Triton kernels compile to

Generated by `python tests/helpers/budgets.py`; `main_loop.py` beside it tells how
instructions are counted.
This page has no times: it shows what the compiler of the pinned Triton emits.

Counts are warp instructions of the main loop, the one over tiles that no mask touches, per 1024
scores (a quarter of a 64 x 64 tile), in bfloat16 with a causal mask. *shared / tensor cycles* is
how long one scheduler's share of the shared memory and of the tensor cores is busy by the
documented throughputs, and *exposed* an estimate of the tensor cores' utilisation if data movement
overlaps with them and the softmax does not. Both compare variants of one kernel; they say nothing
of time.

*tutorial* is attention as a Triton tutorial writes it (`tests/helpers/tutorial_kernels.py`: even
sizes, one layout, no features, a backward of two passes in one kernel), with the tutorial's tile
sizes.

## Inner loops, side by side
"""
PAGE_GOALS = """## Goals

The goals are what the best known kernels need when they are compiled the same way, and about 10 %
on top. For comparison, the totals of the forward: FlashAttention-2 on sm_80 takes 296 instructions
at head size 64 and 470 at 128, and Triton's tutorial 324 and 540 to 587; on sm_90, FlashAttention-3
takes 205 to 210 and 209 to 229, and a Triton kernel with tensor descriptors 262 and 262. A backward
in one kernel with atomic additions takes 564 and 891 on sm_80 (FlashAttention-2), 354 and 406 to
484 on sm_90 (FlashAttention-3), for five products per score; ours does seven, in two kernels
without atomics.
"""
PAGE_MISSES = """A stack of up to 64 bytes, and up to 20 spills per 1024 scores in the main loop (as
in FlashAttention-2's), are accepted. The goals above are those of calls without bias, mask and
dropout.

## What misses a goal, and why
"""

# Columns of the comparison, and the kinds of instructions that each of them adds up.
COLUMNS: dict[str, tuple[str, ...]] = {
    "matrix": ("matrix",),
    "exp2": ("exp2",),
    "FMA, mul, add, max": ("fma", "mul", "add", "max"),
    "convert": ("convert",),
    "load, store": (
        *("load matrix", "load shared", "store shared", "copy", "load global", "store global"),
    ),
    "integer, move": ("integer", "move"),
    "spill": ("spill",),
    "total": ("total",),
}


def mix_row(title: str, entry: dict[str, Any]) -> list[Any]:
    block_m, block_n, num_warps, num_stages = entry["tiles"]
    counts = [sum(entry["main"].get(k, 0.0) for k in kinds) for kinds in COLUMNS.values()]
    cycles = f"{entry['cycles']['shared']:.0f} / {entry['cycles']['tensor']:.0f}"
    tile = f"{block_m} x {block_n}, {num_warps} warps, {num_stages} stages"
    return [title, tile, entry["registers"], entry["stack"], *(f"{n:g}" for n in counts), cycles,
            f"{entry['exposed']:.2f}"]  # fmt: skip


def comparison(document: dict[str, Any], target: str, D: int) -> Iterator[str]:
    rows = [
        ["kernel", "tiles", "registers", "stack", *COLUMNS, "shared / tensor cycles", "exposed"]
    ]
    for kernel in KERNELS:
        rows.append(
            mix_row(
                f"ours, {kernel}", document["limits"][name_of(target, kernel, D, True, "plain")]
            )
        )
    (forward,) = document["tutorial"][f"{target} tutorial forward {D}"]
    dkdv, dq = document["tutorial"][f"{target} tutorial backward {D}"]
    for title, entry in (("forward", forward), ("dkdv", dkdv), ("dq", dq)):
        rows.append(mix_row(f"tutorial, {title}", entry))
    yield from table(rows)


def page(document: dict[str, Any]) -> str:
    limits = document["limits"]
    lines = [PAGE_HEAD]
    for target, D in itertools.product(main_loop.MODELLED, (64, 128)):
        lines += [f"### {target}, head size {D}", "", *comparison(document, target, D), ""]
    lines += [PAGE_GOALS, *table(
        [["target", "kernel", "head size", *(f"{what}" for what in ALL_GOALS)]]
        + [[*key, *(f"{goals[x]:g}" if x in goals else "–" for x in ALL_GOALS)]
           for key, goals in GOALS.items()]
    ), "", PAGE_MISSES]  # fmt: skip
    rows = [["configuration", "misses", "cause"]]
    for name, entry in limits.items():
        for what in misses(name, entry):
            rows.append([name, f"{what}: {figure(entry, what):g}", cause(name, what)])
    lines += [*table(rows), "", f"{len(limits)} of {len(CONFIGURATIONS)} configurations measured."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--only",
        default="",
        metavar="TEXT",
        help="measure only configurations whose name contains TEXT",
    )
    parser.add_argument(
        "--missing", action="store_true", help="measure only configurations without a limit"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, only write the page")
    arguments = parser.parse_args()
    if not arguments.page:
        write_tutorial()
        known = load()["limits"] if arguments.missing and LIMITS.exists() else {}
        only = [name for name in CONFIGURATIONS if arguments.only in name and name not in known]
        write_limits(only)
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()

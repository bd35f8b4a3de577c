"""Measures the code of the CUDA kernels: committed limits, and a page of tables.

    python tests/helpers/cuda_budgets.py          measures, and writes the two files below

data/cuda_budgets.json has, for each architecture and kernel, registers, bytes of stack, and the mix
of the main loop per 1024 scores (main_loop.py); test_cuda_budgets.py compares them.
docs/cuda_code.md shows the mixes, and every figure that misses a goal of budgets.py, with its
cause.
"""

from __future__ import annotations

import json
import re
from typing import Any

import budgets
import cuda_interpreter
import main_loop
from paths import DATA, ROOT

LIMITS = DATA / "cuda_budgets.json"
PAGE = ROOT / "docs" / "cuda_code.md"

# Scores that a warp computes in an iteration: rows times columns (launch.h).
SCORES = {
    "attention_forward_kernel<BFloat16, 64, true>": 32 * 64,
    "attention_forward_kernel<BFloat16, 128, true>": 32 * 64,
    "attention_backward_kernel<BFloat16, 64, true, Gradient::kKeyValue>": 32 * 32,
    "attention_backward_kernel<BFloat16, 64, true, Gradient::kQuery>": 32 * 32,
    "attention_backward_kernel<BFloat16, 128, true, Gradient::kKeyValue>": 16 * 32,
    "attention_backward_kernel<BFloat16, 128, true, Gradient::kQuery>": 16 * 32,
    "attention_forward_hopper_kernel<BFloat16, 64>": 16 * 128,
    "attention_forward_hopper_kernel<BFloat16, 128>": 16 * 128,
    "attention_backward_hopper_kernel<BFloat16, 64, true>": 16 * 64,
    "attention_backward_hopper_kernel<BFloat16, 64, false>": 16 * 64,
    "attention_backward_hopper_kernel<BFloat16, 128, true>": 16 * 64,
    "attention_backward_hopper_kernel<BFloat16, 128, false>": 16 * 64,
}
# Kernels without a loop over unmasked tiles, or without matrix products: only registers and stack
# are measured.
OTHERS = (
    *(f"attention_decode_kernel<{x}>" for x in ("BFloat16, 64", "BFloat16, 128", "float, 128")),
    *("attention_forward_kernel<float, 64, false>", "attention_combine_kernel<BFloat16>"),
    *(f"masked_softmax_kernel<BFloat16, {x}>" for x in ("32, true", "256, true", "256, false")),
    *(f"masked_softmax_backward_kernel<BFloat16, {x}>" for x in ("32, true", "256, true")),
)
ARCHS = ("sm_80", "sm_90", "sm_100")


def archs_of(kernel: str) -> tuple[str, ...]:
    if cuda_interpreter.is_hopper(kernel):
        return ("sm_90",)
    return ARCHS if kernel in SCORES else ARCHS[:1]


CONFIGURATIONS = [f"{arch} {kernel}" for kernel in (*SCORES, *OTHERS) for arch in archs_of(kernel)]


def measure(name: str) -> dict[str, Any]:
    arch, kernel = name.split(" ", 1)
    number = arch.removeprefix("sm_") + "a" * cuda_interpreter.is_hopper(kernel)
    cubin = cuda_interpreter.cubin_of(kernel, number)
    entry: dict[str, Any] = main_loop.resources(cubin)
    if kernel in SCORES:
        loops = main_loop.score_loops(main_loop.sass(cubin), SCORES[kernel])
        loops.sort(key=lambda loop: len(loop.instructions))
        main, *masked = loops
        entry["main"] = main.per_1024_scores()
        entry["masked"] = [loop.per_1024_scores()["total"] for loop in masked]
        if arch in main_loop.MODELLED:
            cycles = main.cycles(arch)
            entry["cycles"] = {unit: cycles[unit] for unit in ("tensor", "shared")}
            entry["exposed"] = main.softmax_exposed(arch)
    return entry


def excesses(entry: dict[str, Any], limit: dict[str, Any], same_compiler: bool = True) -> list[str]:
    """Lists the limits that a measured entry exceeds. Fewer instructions are no fault; another
    version of nvcc may need somewhat more."""
    wrong = [
        f"{what}: {entry[what]}, limit {limit[what]}"
        for what, slack, other in (("registers", 8, 255), ("stack", 16, 128))
        if entry[what] > limit[what] + (slack if same_compiler else other)
    ]
    for what in ("total", "spill") if "main" in limit else ():
        mine, most = entry["main"].get(what, 0.0), limit["main"].get(what, 0.0)
        if mine > (1.02 if same_compiler else 1.15) * most + 1:
            wrong.append(f"{what} of the main loop: {mine} per 1024 scores, limit {most}")
    return wrong


def copier_registers(kernel: str) -> tuple[int, int]:
    """Returns how many registers the copying warps of a kernel for sm_90 keep, and how many they
    use."""
    code = main_loop.sass(cuda_interpreter.cubin_of(kernel, "90a"))
    flow = main_loop.graph(code)
    (start,) = (
        i
        for i, x in enumerate(code.instructions)
        if x.opcode == "USETMAXREG" and "DEALLOC" in x.modifiers
    )
    (first,) = (k for k, (begin, end) in enumerate(flow.blocks) if begin <= start < end)
    reached, ahead = {first}, [first]
    while ahead:
        new = flow.successors[ahead.pop()] - reached
        reached |= new
        ahead += new
    used = 0
    for begin, end in (flow.blocks[k] for k in reached):
        for x in code.instructions[max(begin, start) if begin <= start < end else begin : end]:
            # each name may be the first register of a pair
            used = max([used, *(int(n) + 2 for n in re.findall(r"\bR(\d+)\b", x.operands))])
    return int(code.instructions[start].operands, 16), used


# -- Goals ---------------------------------------------------------------------------------

# Why a goal is missed: (regular expression for the configuration, cause).
CAUSES = (
    (
        r"BFloat16, 128, true, Gradient::kKeyValue",
        "a warp owns 16 keys, so that four warps read every tile of queries four times; 32 keys a "
        "warp would read it twice, and their accumulators of dk and dv alone are 256 registers",
    ),
)


def cause(name: str) -> str:
    """Returns the cause in CAUSES; raises KeyError if CAUSES names none."""
    for pattern, text in CAUSES:
        if re.search(pattern, name):
            return text
    raise KeyError(f"{name}: no cause in CAUSES")


def goals_of(name: str) -> dict[str, float]:
    """Returns the goals of budgets.py: the CUDA backward has two kernels, as Triton's has."""
    arch, kernel = name.split(" ", 1)
    if "BFloat16" not in kernel or kernel not in SCORES:
        return {}
    if arch == "sm_90" and not cuda_interpreter.is_hopper(kernel):
        return {}  # this kernel serves only calls that the Hopper kernels do not
    of_keys = "kKeyValue" in kernel or kernel.endswith("true>")
    part = "forward" if "forward" in kernel else "dkdv" if of_keys else "dq"
    head_dim = int(re.search(r"BFloat16, (\d+)", kernel)[1])  # type: ignore[index]
    return budgets.GOALS.get((arch, part, head_dim), {})


def misses(name: str, entry: dict[str, Any]) -> list[str]:
    return [
        f"{what}: {budgets.figure(entry, what):g}, goal {goal:g}"
        for what, goal in goals_of(name).items()
        if (budgets.figure(entry, what) < goal) == (what == "exposed")
        and budgets.figure(entry, what) != goal
    ]


# -- Files ---------------------------------------------------------------------------------

HEAD = """# What the CUDA kernels compile to

Generated by `python tests/helpers/cuda_budgets.py`, counted as on [the page of the Triton kernels](
triton_code.md): warp instructions of the loop over tiles that no mask touches, per 1024 scores, in
bfloat16, by nvcc {version}. This page has no times.

For comparison, counted the same way: FlashAttention-2's forward on sm_80 takes 296 instructions at
head size 64 and 470 at 128, its backward, in one kernel with atomic additions, 564 and 891;
FlashAttention-3's forward on sm_90 205 to 210 and 209 to 229, its backward 354 and 406 to 484. Our
backward is two kernels without atomics, with seven products a score in place of five.

"""


def page(document: dict[str, Any]) -> str:
    rows: list[list[Any]] = [
        ["kernel", "built for", "registers", "stack", *budgets.COLUMNS, "shared / tensor cycles",
         "exposed"]
    ]  # fmt: skip
    others: list[list[Any]] = [["kernel", "built for", "registers", "stack"]]
    missed: list[list[Any]] = [["kernel", "misses", "cause"]]
    for name, entry in document["limits"].items():
        arch, kernel = name.split(" ", 1)
        start = [f"`{kernel}`", arch, entry["registers"], entry["stack"]]
        if "main" not in entry:
            others.append(start)
            continue
        counts = [
            sum(entry["main"].get(k, 0.0) for k in kinds) for kinds in budgets.COLUMNS.values()
        ]
        cycles = exposed = "–"
        if "cycles" in entry:
            cycles = f"{entry['cycles']['shared']:.0f} / {entry['cycles']['tensor']:.0f}"
            exposed = f"{entry['exposed']:.2f}"
        rows.append([*start, *(f"{n:g}" for n in counts), cycles, exposed])
        missed += [[f"`{name}`", what, cause(name)] for what in misses(name, entry)]
    lines = [HEAD.format(version=document["nvcc"]), *budgets.table(rows), "", "## Others", ""]
    lines += [*budgets.table(others), "", "## What misses a goal", ""]
    return "\n".join([*lines, *budgets.table(missed)]) + "\n"


def load() -> dict[str, Any]:
    return json.loads(LIMITS.read_text())


def main() -> None:
    limits = {}
    for name in CONFIGURATIONS:
        limits[name] = measure(name)
        print(name, misses(name, limits[name]), flush=True)
    lines = ",\n".join(f"  {json.dumps(k)}: {json.dumps(x)}" for k, x in limits.items())
    version = json.dumps(cuda_interpreter.nvcc_version())
    LIMITS.write_text(f'{{\n "nvcc": {version},\n "limits": {{\n{lines}\n }}\n}}\n')
    PAGE.write_text(page(load()))


if __name__ == "__main__":
    main()

"""Faults to plant in the PTX of our kernels, as `faults.py` has them for the example kernels.

An edit takes the compiled launch, whose `parameters` tell which parameter an argument has become.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from compile_launch import CompiledLaunch
from fused_attention.kernels.primitives import AttentionParams

from .faults import BAR, WAIT_COPIES, drop, everywhere, only_half_a_warp, replace

Edit = Callable[[CompiledLaunch], str]


@dataclass(frozen=True)
class KernelFault:
    """caught_by: a kind of finding, or "numbers" if only the result shows the fault."""

    name: str
    target: str
    kernel: str  # key of WHERE in test_kernel_faults.py
    edit: Edit
    caught_by: str


def text(edit: Callable[[str], str]) -> Edit:
    """Makes an edit from a function of the PTX."""
    return lambda compiled: edit(compiled.assembly)


def other_argument(field: str, instruction: str) -> Edit:
    """Replaces the ld.param of a field of `AttentionParams` by `instruction`, with \\1 for the
    register, so that the field has another value."""

    def edit(compiled: CompiledLaunch) -> str:
        (position,) = (
            n
            for n, path in enumerate(compiled.parameters)
            if len(path) == 2 and path[1] == AttentionParams._fields.index(field) and path[0] >= 4
        )
        pattern = rf"ld\.param\.b32\s+(%r\d+), \[{compiled.name}_param_{position}\];"
        return replace(pattern, instruction)(compiled.assembly)

    return edit


LOAD = r"@!?%p\d+ (ld\.global)"
STORE = r"@!?%p\d+ (st\.global)"
# A masked copy reads 0 bytes where the mask is off.
MASKED_COPY = r"(cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x(?:10|8|4)), %r\d+;"
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\], %r\d+;"
SIXTEENTH = "mov.b32 \\1, 0f3D800000;"  # in place of 1/8

BOTH = ("sm_80", "sm_90")
MAIN = ("forward", "dkdv", "dq")


def numbered(
    name: str, pattern: str, caught_by: str, places: dict[tuple[str, str], tuple[int, ...]]
) -> list[KernelFault]:
    """Drops an instruction at each of some places of a kernel, all of which need it.

    At other places the instruction is not needed: another of its kind follows before a thread can
    be too early, or the case does not enter the loop.
    """
    return [
        KernelFault(f"{name} {n} dropped", target, kernel, text(drop(pattern, n)), caught_by)
        for (target, kernel), numbers in places.items()
        for n in numbers
    ]


FAULTS = [
    *numbered(
        "barrier", BAR, "shared race",
        {
            ("sm_80", "forward"): (0, 4, 7, 11), ("sm_80", "dkdv"): (1, 4, 10),
            ("sm_80", "dq"): (0, 3, 10), ("sm_80", "dbias"): (1, 3),
            ("sm_90", "forward"): (15, 18, 21), ("sm_90", "dkdv"): (0, 7, 16),
            ("sm_90", "dq"): (12, 13, 15),
        },
    ),
    *numbered(
        "wait for a product", r"wgmma\.wait_group\.sync\.aligned[^;]*;", "missing async wait",
        {
            ("sm_90", "forward"): (0, 2, 3), ("sm_90", "dkdv"): (0, 2, 5),
            ("sm_90", "dq"): (1, 4, 5),
        },
    ),
    *numbered(
        "fence before a product", r"wgmma\.fence\.sync\.aligned;", "missing wgmma fence",
        {("sm_90", "forward"): (0, 3), ("sm_90", "dkdv"): (0, 3), ("sm_90", "dq"): (0, 2)},
    ),
    *numbered(
        "fence between the proxies", r"fence\.proxy\.async\.shared::cta;", "missing proxy fence",
        {("sm_90", "forward"): (0, 2), ("sm_90", "dkdv"): (1, 6), ("sm_90", "dq"): (0, 1)},
    ),
    *numbered(
        "arrival for a copy by TMA", r"@%p\d+ mbarrier\.arrive\.expect_tx[^;]*;", "deadlock",
        {("sm_90", "forward"): (0, 3), ("sm_90", "dkdv"): (0, 1), ("sm_90", "dq"): (0, 1)},
    ),
    *numbered(
        "copy by TMA", r"@%p\d+ cp\.async\.bulk\.tensor[^;]*;", "deadlock",
        {("sm_90", "forward"): (0, 3), ("sm_90", "dkdv"): (0, 3), ("sm_90", "dq"): (0, 3)},
    ),
    *[
        KernelFault("wait for a copy by TMA dropped", "sm_90", kernel,
                    text(replace(TRY_WAIT, "mov.pred complete, -1;")), "missing async wait")
        for kernel in MAIN
    ],
    *[
        KernelFault(f"wait for copies {n} loosened", target, kernel,
                    text(replace(WAIT_COPIES, "cp.async.wait_group 7;", n)), "missing async wait")
        for target, kernel, numbers in (
            *[("sm_80", kernel, (0, 1)) for kernel in MAIN],
            ("sm_90", "dkdv", (0, 1)), ("sm_90", "dq", (0,)),
        )
        for n in numbers
    ],
    *[
        KernelFault("bounds check of copies removed", target, kernel,
                    text(everywhere(MASKED_COPY, r"\1;")), "out of bounds")
        for target, kernel in [("sm_80", "forward"), *itertools.product(BOTH, ("dkdv", "dq"))]
    ],
    *[
        KernelFault("bounds check of loads removed", target, kernel,
                    text(everywhere(LOAD, r"\1")), "out of bounds")
        for target, kernel in [
            ("sm_90", "forward"),
            *[("sm_80", x) for x in (*MAIN, "delta", "dbias", "dsinks")],
            *[("sm_80", x) for x in ("softmax", "softmax backward")],
        ]
    ],
    *[
        KernelFault("bounds check of stores removed", target, kernel,
                    text(everywhere(STORE, r"\1")), "out of bounds")
        for target in BOTH
        for kernel in (*MAIN, "delta", "dbias", "softmax", "softmax backward", "keep mask")
    ],
    *[
        KernelFault("wrong scale", target, kernel, other_argument("scale", SIXTEENTH), "numbers")
        for target in BOTH for kernel in (*MAIN, "dbias")
    ],
    *[
        KernelFault("diagonal moved by 3", target, kernel,
                    other_argument("right", "mov.b32 \\1, 3;"), "numbers")
        for target in BOTH for kernel in MAIN
    ],
    *[
        KernelFault("wrong multiplier of Philox", "sm_80", kernel,
                    text(replace(r"-766435501", "-766435503")), "numbers")
        for kernel in ("dbias", "keep mask", "softmax", "softmax backward")
    ],
    *[
        KernelFault("wrong distance of a shuffle", target, kernel,
                    text(replace(r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), 2,", r"\1, 1,")),
                    "numbers")
        for target in BOTH for kernel in ("forward", "delta", "softmax backward")
    ],
    *[
        KernelFault("program does the work of another", "sm_80", kernel,
                    text(everywhere(r"mov\.u32\s+(%r\d+), %ctaid\.x", r"mov.u32 \1, 0")),
                    "overlapping global writes")
        for kernel in (*MAIN, "delta", "dbias", "dsinks", "softmax", "softmax dsinks")
    ],
    *[
        KernelFault("product in half of a warp", "sm_80", kernel,
                    text(only_half_a_warp(r"mma\.sync[^;]*;", 3)), "divergence")
        for kernel in MAIN
    ],
    *[
        KernelFault("tile not written to shared memory", "sm_80", kernel,
                    text(drop(r"cp\.async\.cg\.shared\.global [^;]*;")),
                    "uninitialised shared memory")
        for kernel in MAIN
    ],
]  # fmt: skip

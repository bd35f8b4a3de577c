"""Faults to plant in the PTX of real kernels: small edits of the text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

Edit = Callable[[str], str]

BAR = r"bar\.sync\s+0;"
WAIT_COPIES = r"cp\.async\.wait_group\s+(?:0x)?\d+\s*;"
GUARDED_LOAD = r"@!?%p\d+ (ld\.global\.v4)"
GUARDED_STORE = r"@!?%p\d+ (st\.global\.v4)"


def replace(pattern: str, by: str, occurrence: int = 0) -> Edit:
    """Replaces one occurrence of a regular expression (-1: the last); IndexError without it."""

    def edit(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[occurrence]
        return ptx[: match.start()] + match.expand(by) + ptx[match.end() :]

    return edit


def drop(pattern: str, occurrence: int = 0) -> Edit:
    return replace(pattern, "", occurrence)


def everywhere(pattern: str, by: str) -> Edit:
    def edit(ptx: str) -> str:
        changed, count = re.subn(pattern, by, ptx)
        assert count, pattern
        return changed

    return edit


def only_half_a_warp(pattern: str, occurrence: int = 0) -> Edit:
    """Lets only lanes 0 to 15 execute the instruction."""
    return replace(
        f"({pattern})",
        r"{ .reg .pred half; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 half, lane, 16; "
        r"@!half bra SKIP; \1 SKIP: }",
        occurrence,
    )


@dataclass(frozen=True)
class Fault:
    """`caught_by`: a kind of finding, or "numbers" if only the result shows the fault."""

    name: str
    kernel: str  # key of EXAMPLES in test_faults.py
    edit: Edit
    caught_by: str


FAULTS = [
    *[
        Fault(f"barrier {n} dropped", kernel, drop(BAR, n), "shared race")
        for kernel, places in (
            ("forward sm_80", (0, 1, 3, 4, 5)),
            ("backward sm_80", (0, 1, 3, 4, 5)),
            ("cuda sm_80", (0, 1)),
            ("forward sm_90", (0, 1, 3, 4, 5)),
            ("tma sm_90", (2, 18)),
        )
        for n in places
    ],
    Fault("barrier of the warp dropped", "device tma sm_90", drop(r"bar\.warp\.sync[^;]*;"),
          "lane race"),
    Fault("wait for the first copies dropped", "forward sm_80", drop(WAIT_COPIES),
          "missing async wait"),
    Fault("wait in the loop dropped", "forward sm_80", drop(WAIT_COPIES, 1), "missing async wait"),
    Fault("wait for copies loosened", "forward sm_80",
          replace(WAIT_COPIES, "cp.async.wait_group 7;"), "missing async wait"),
    Fault("wait for copies loosened", "backward sm_80",
          replace(WAIT_COPIES, "cp.async.wait_group 3;"), "missing async wait"),
    Fault("wait for copies loosened", "cuda sm_80",
          replace(WAIT_COPIES, "cp.async.wait_group 2;"), "missing async wait"),
    Fault("wait for copies loosened", "forward sm_90",
          replace(WAIT_COPIES, "cp.async.wait_group 7;"), "missing async wait"),
    Fault("commit dropped", "cuda sm_80", drop(r"cp\.async\.commit_group;", 1),
          "missing async wait"),
    Fault("bounds check of loads removed", "forward sm_80", everywhere(GUARDED_LOAD, r"\1"),
          "out of bounds"),
    Fault("bounds check of stores removed", "forward sm_80", everywhere(GUARDED_STORE, r"\1"),
          "out of bounds"),
    Fault("bounds check removed", "backward sm_80", everywhere(GUARDED_STORE, r"\1"),
          "out of bounds"),
    Fault("row too many stored", "softmax sm_80",
          everywhere(r"@%p\d+ (st\.global)", r"\1"), "out of bounds"),
    Fault("program stores the rows of another", "forward sm_80",
          replace(r"mov\.u32\s+(%r\d+), %ctaid\.y", r"mov.u32 \1, 0"), "overlapping global writes"),
    Fault("program stores the rows of another", "cuda sm_80",
          everywhere(r"mov\.u32\s+(%r\d+), %ctaid\.x", r"mov.u32 \1, 0"),
          "overlapping global writes"),
    Fault("shared memory not written", "forward sm_80", drop(r"st\.shared\.v4\.b32[^;]*;"),
          "uninitialised shared memory"),
    Fault("shared memory not written", "cuda sm_80",
          everywhere(r"cp\.async\.cg\.shared\.global \[(%r\d+)\][^;]*;", ""),
          "uninitialised shared memory"),
    Fault("misaligned ldmatrix", "forward sm_80",
          replace(r"(ldmatrix[^;]*\[%r\d+)(?:\+\d+)?\]", r"\1+8]"), "misaligned"),
    Fault("misaligned vector load", "forward sm_80",
          replace(r"(ld\.global\.v4\.b32[^;]*\[ %rd\d+ \+ )0", r"\g<1>4"), "misaligned"),
    Fault("barrier in half of the warp", "forward sm_80", only_half_a_warp(BAR), "divergence"),
    Fault("shuffle in half of the warp", "cuda sm_80",
          only_half_a_warp(r"shfl\.sync\.bfly[^;]*;"), "divergence"),
    Fault("mma in half of the warp", "forward sm_80", only_half_a_warp(r"mma\.sync[^;]*;"),
          "divergence"),
    Fault("barrier that a warp never reaches", "forward sm_80",
          replace(BAR, "{ .reg .pred first; .reg .b32 t; mov.u32 t, %tid.x; "
                  "setp.lt.u32 first, t, 32; @first bra SKIP; bar.sync 0, 128; SKIP: }", -1),
          "deadlock"),
    Fault("wrong scale", "forward sm_80",
          replace(r"ld\.param\.b32\s+(%r\d+), \[attention_forward_param_9\];",
                  r"mov.b32 \1, 0f3E000000;"), "numbers"),
    Fault("wrong swizzle", "forward sm_80",
          replace(r"(ldmatrix\.sync\.aligned\.m8n8\.x4\.trans[^;]*\[%r\d+)(?:\+\d+)?\]",
                  r"\1+64]"), "numbers"),
    Fault("wrong shuffle distance", "forward sm_80",
          replace(r"(shfl\.sync\.bfly\.b32[^;]*?), 2, ", r"\1, 4, "), "numbers"),
    Fault("transposed matrix read straight", "cuda sm_80",
          everywhere(r"\.x2\.trans\.", ".x2."), "numbers"),
    *[
        Fault(f"wait {n} for wgmma dropped", kernel,
              drop(r"wgmma\.wait_group\.sync\.aligned\s+\d+;", n), "missing async wait")
        for kernel in ("forward sm_90", "tma sm_90", "specialised sm_90")
        for n in (0, 1)
    ],
    Fault("wait for wgmma loosened", "tma sm_90",
          replace(r"wgmma\.wait_group\.sync\.aligned\s+\d+;",
                  "wgmma.wait_group.sync.aligned 1;"), "missing async wait"),
    *[
        Fault(f"fence {n} of wgmma dropped", "tma sm_90",
              drop(r"wgmma\.fence\.sync\.aligned;", n), "missing wgmma fence")
        for n in (0, 1)
    ],
    Fault("proxy fence before wgmma dropped", "forward sm_90", drop(r"fence\.proxy\.async[^;]*;"),
          "missing proxy fence"),
    Fault("proxy fence before the store dropped", "tma sm_90",
          drop(r"fence\.proxy\.async[^;]*;", 1), "missing proxy fence"),
    Fault("wait for the bulk store dropped", "tma sm_90",
          drop(r"cp\.async\.bulk\.wait_group[^;]*;"), "missing async wait"),
    *[
        Fault(f"arrive {n} dropped", kernel,
              drop(r"@%p\d+ mbarrier\.arrive\.[^;]*;", n), "deadlock")
        for kernel, places in (("tma sm_90", (0, 3)), ("specialised sm_90", (0, 4, 5, 6, 7)))
        for n in places
    ],
    Fault("expect_tx too small", "tma sm_90",
          replace(r"(expect_tx[^;]*), 8192;", r"\1, 4096;"), "deadlock"),
    Fault("expect_tx too large", "tma sm_90",
          replace(r"(expect_tx[^;]*), 8192;", r"\1, 16384;"), "deadlock"),
    Fault("no bytes expected", "tma sm_90",
          replace(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, (\[%r\d+\]), 8192;",
                  r"mbarrier.arrive.shared::cta.b64 _, \1;"), "missing async wait"),
    Fault("wait at the mbarrier dropped", "tma sm_90",
          replace(r"mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\], %r\d+;",
                  "setp.eq.u32 complete, 0, 0;"), "missing async wait"),
    Fault("wrong parity", "tma sm_90",
          replace(r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\]), %r\d+;",
                  r"\1, 1;"), "missing async wait"),
    Fault("mbarrier not initialised", "tma sm_90", drop(r"@%p\d+ mbarrier\.init[^;]*;"), "barrier"),
    Fault("wrong matrix descriptor", "tma sm_90",
          replace(r"(or\.b64\s+%rd\d+, %rd\d+), 4611686293305294848", r"\1, 4611686293305295360"),
          "numbers"),
]  # fmt: skip

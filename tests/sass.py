"""What ptxas makes of a kernel: registers, spills, and the instructions of its main loop.

nvdisasm comes with Triton. Counts are per 1024 scores of one warp, a quarter of a tile of 64 x 64.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Integer and address arithmetic, and moves.
INTEGER = (
    "IADD IADD3 IMAD LEA LOP3 SHF ISETP IMNMX IABS PLOP3 SEL PRMT MOV UMOV R2UR S2R S2UR CS2R "
    "UIADD3 UIMAD ULEA ULOP3 USHF UISETP ULDC VOTE P2R R2P"
).split()
GROUPS = {
    "mma": ("HMMA",),
    "ldsm": ("LDSM",),
    "spill": ("LDL", "STL"),
    "copies": ("LDGSTS",),
    "integer": tuple(INTEGER),
}


def nvdisasm() -> Path | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm"
    return path if path.exists() else None


@dataclass(frozen=True)
class Loop:
    """Instructions per 1024 scores: all of them, and those of `GROUPS`."""

    total: float
    groups: dict[str, float]


def disassembled(cubin: Path) -> str:
    command = [str(nvdisasm()), "-c", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def product_loops(text: str) -> list[list[str]]:
    """The opcodes of each loop with matrix products and none inside that has, but idle ones."""
    labels: dict[str, int] = {}
    opcodes: list[str] = []
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            labels[label[1]] = len(opcodes)
        elif code := re.match(r"\s*/\*\w+\*/\s+(@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            if target := re.search(r"\((\.L_x_\w+)\)", code[3]) if code[2] == "BRA" else None:
                jumps.append((len(opcodes), target[1]))
            # ptxas separates copies by reads that never happen.
            nothing = code[2] == "NOP" or (code[1] or "").strip() == "@!PT"
            opcodes.append("" if nothing else code[2])
    loops = {(labels[to], at + 1) for at, to in jumps if labels[to] <= at}
    loops = {(a, b) for a, b in loops if "HMMA" in opcodes[a:b]}

    def holds_another(a: int, b: int) -> bool:
        return any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)

    inner = sorted(loop for loop in loops if not holds_another(*loop))
    return [[code for code in opcodes[a:b] if code] for a, b in inner]


def main_loop(text: str, scores: int) -> Loop:
    """The shortest of the loops with matrix products: the others have masks. scores: of a warp."""
    counts = Counter(min(product_loops(text), key=len))
    per = 1024 / scores
    groups = {name: per * sum(counts[code] for code in codes) for name, codes in GROUPS.items()}
    return Loop(per * counts.total(), groups)


def resources(report: str) -> dict[str, int]:
    """From what `ptxas -v` prints of one kernel."""
    numbers = {
        "registers": r"Used (\d+) registers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "spill_bytes": r"(\d+) bytes spill stores",
    }
    found = {name: re.search(pattern, report) for name, pattern in numbers.items()}
    return {name: int(match[1]) for name, match in found.items() if match}

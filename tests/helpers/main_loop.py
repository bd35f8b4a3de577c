"""Counts the instructions of a kernel's loops over tiles of scores, from its machine code.

A kernel is disassembled (NVIDIA: nvdisasm, which comes with Triton; AMD: the compiler's assembly),
cut into basic blocks, and searched for natural loops (Aho, Sethi, Ullman 1986, "Compilers", section
10.4) that hold matrix instructions, and no inner loop with such instructions. The instructions of
such a loop are counted by kind, per 1024 scores of a warp: one sub-partition's share of a tile of
64 x 64. A conditional block is counted in full; out-of-line retries of a wait are left out.

`cycles` estimates from the counts how long each unit of a sub-partition is busy. The throughputs
are those of the vendor's documents; nothing here was measured, and the estimate leaves out
latencies, barriers and the clock. It compares variants of one kernel and says nothing about time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Kinds of instructions, in the order of the tables.
KINDS = (
    *("matrix", "exp2", "other function", "fma", "mul", "add", "max", "compare", "convert"),
    *("half2", "move", "integer", "load matrix", "load shared", "store shared", "copy"),
    *("load global", "store global", "tensor memory", "shuffle", "synchronise", "branch", "spill"),
    "other",
)


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "HMMA", "v_exp_f32"
    modifiers: str  # ".16816.F32.BF16"
    operands: str
    guard: str = ""  # the predicate, "@!P0"


@dataclass(frozen=True)
class Loop:
    """A loop over tiles.

    instructions: of one iteration. scores: those that one warp computes in an iteration.
    """

    instructions: tuple[Instruction, ...]
    scores: int

    def per_1024_scores(self) -> dict[str, float]:
        """Returns the count of each kind that occurs, and at the end the "total"."""
        counts = Counter(kind(x) for x in self.instructions)
        mix = {k: round(1024 * counts[k] / self.scores, 1) for k in KINDS if counts[k]}
        return mix | {"total": round(1024 * len(self.instructions) / self.scores, 1)}

    def cycles(self, target: str) -> dict[str, float]:
        """Returns the busy cycles of each unit of a sub-partition per 1024 scores, for MODELLED
        targets only."""
        busy: Counter[str] = Counter()
        for x in self.instructions:
            busy["issue"] += 1
            for unit, cycles in _cost(x, target):
                busy[unit] += cycles
        return {unit: round(1024 * n / self.scores, 1) for unit, n in busy.items()}

    def softmax_exposed(self, target: str) -> float:
        """Estimates the utilisation of the tensor cores if only data movement overlaps with them:
        tensor / (max(tensor, shared) + the busiest of the other units)."""
        busy = self.cycles(target)
        tensor, shared = busy.pop("tensor", 0.0), busy.pop("shared", 0.0)
        matrix = self.per_1024_scores().get("matrix", 0.0)
        rest = max([busy.pop("issue") - matrix, *busy.values()])
        return round(tensor / (max(tensor, shared) + rest), 3)


# -- Kinds ---------------------------------------------------------------------------------

_SASS = {
    "matrix": "HMMA HGMMA UTCHMMA",
    "fma": "FFMA FFMA2",
    "mul": "FMUL FMUL2",
    "add": "FADD FADD2 FHADD",
    "max": "FMNMX FMNMX3",
    "compare": "FSETP FSEL FCHK",
    "convert": "F2FP F2F F2I I2F I2FP FRND",
    "half2": "HADD2 HMUL2 HFMA2 HMNMX2 HSETP2 HSET2",
    "move": "MOV PRMT SEL UMOV R2UR S2R CS2R S2UR UPRMT MOVM LDC ULDC LDCU VOTE VOTEU CS2UR UR2R",
    "integer": "IADD3 IADD IADD3X IMAD IMUL LEA LOP3 LOP SHF SHL SHR ISETP IMNMX IABS VIADD VIMNMX "
    "VIADDMNMX PLOP3 POPC FLO BMSK SGXT UIADD3 UIMAD ULEA ULOP3 USHF UISETP UPLOP3 USEL UIADD3X "
    "USGXT UBMSK UIMNMX UFLO UPOPC P2R R2P IDP VIMNMX3 UIADD UVIADD UVIMNMX UFSETP",
    "load matrix": "LDSM",
    "load shared": "LDS",
    "store shared": "STS STSM ATOMS",
    "copy": "LDGSTS UTMALDG UTMASTG UTMAREDG UBLKCP",
    "load global": "LDG LD",
    "store global": "STG ST RED ATOM ATOMG",
    "tensor memory": "LDTM STTM UTCCP UTCBAR UTCATOMSWS",
    "shuffle": "SHFL REDUX CREDUX",
    "synchronise": "BAR SYNCS DEPBAR LDGDEPBAR ARRIVES WARPGROUP WARPSYNC FENCE MEMBAR ELECT "
    "NANOSLEEP UTMACMDFLUSH USETMAXREG CCTL UTMACCTL UTMAPF ERRBAR WARPGROUPDEPBAR FENCEVIEW",
    "branch": "BRA BSSY BSYNC EXIT CALL RET BREAK YIELD BMOV JMP BRX",
    "spill": "LDL STL",
}
_SASS_KIND = {opcode: k for k, names in _SASS.items() for opcode in names.split()}
_GCN = (
    (r"v_mfma|v_smfmac", "matrix"),
    (r"v_exp_f32", "exp2"),
    (r"v_(log|rcp|rsq|sqrt|sin|cos)_", "other function"),
    (r"v_(pk_)?fma|v_(pk_)?mac_f|v_dot", "fma"),
    (r"v_(pk_)?mul_f|v_ldexp", "mul"),
    (r"v_(pk_)?(add|sub|subrev)_f", "add"),
    (r"v_(pk_)?(max|min)3?_f", "max"),
    (r"v_cmpx?_\w+_f\d|v_cndmask", "compare"),
    (r"v_(pk_)?cvt", "convert"),
    (
        r"v_mov|v_accvgpr|v_perm|v_bfi|v_swap|v_readl|v_readf|v_writel|s_mov|s_cselect|s_load",
        "move",
    ),
    (r"scratch_", "spill"),
    (r"ds_read|ds_load", "load shared"),
    (r"ds_write|ds_store", "store shared"),
    (r"ds_bpermute|ds_swizzle|ds_permute", "shuffle"),
    (r"buffer_load\w* .*lds|global_load_lds", "copy"),
    (r"(global|buffer|flat)_load", "load global"),
    (r"(global|buffer|flat)_(store|atomic)", "store global"),
    (r"s_barrier|s_waitcnt|s_sleep|s_setprio", "synchronise"),
    (r"s_c?branch|s_endpgm|s_setpc|s_swappc", "branch"),
    (r"[vs]_", "integer"),
)


def kind(x: Instruction) -> str:
    if x.opcode[0].islower():
        text = f"{x.opcode} {x.operands}"
        return next((k for pattern, k in _GCN if re.match(pattern, text)), "other")
    if x.opcode == "MUFU":
        return "exp2" if ".EX2" in x.modifiers else "other function"
    if x.opcode == "IMAD" and ".MOV" in x.modifiers:
        return "move"
    return _SASS_KIND.get(x.opcode, "other")


# -- Cost ----------------------------------------------------------------------------------

# Per clock and sub-partition: FMAs of the tensor cores (16-bit operands), and float32 lanes.
_TENSOR, _LANES = {"sm_80": 256, "sm_90": 512}, {"sm_80": 16, "sm_90": 32}
MODELLED = tuple(_TENSOR)
_SHARED_BYTES = 32  # per clock and sub-partition; the whole multiprocessor has 128
_HMMA_FMAS = {"16816": 2048, "1688": 1024}


def _matrix_fmas(x: Instruction) -> int:
    """Returns the multiply-adds that one instruction does per warp; the four warps of a warpgroup
    share a wgmma."""
    shape = re.search(r"\.(\d+)x(\d+)x(\d+)", x.modifiers)
    if shape:
        m, n, k = map(int, shape.groups())
        return m * n * k // 4
    return _HMMA_FMAS[re.search(r"\.(\d{4,5})\b", x.modifiers)[1]]  # type: ignore[index]


def _cost(x: Instruction, target: str) -> Iterator[tuple[str, float]]:
    """Yields the units that an instruction of a warp uses, with cycles, on sm_80 and sm_90."""
    name, what = x.opcode, kind(x)
    width = 16 if ".128" in x.modifiers else 8 if ".64" in x.modifiers else 4
    if what == "matrix":
        yield "tensor", _matrix_fmas(x) / _TENSOR[target]
        if name == "HGMMA":
            # reads N x K of B from shared memory, and M x K of A unless that is in registers
            m, n, k = map(int, re.search(r"\.(\d+)x(\d+)x(\d+)", x.modifiers).groups())  # type: ignore[union-attr]
            in_registers = not re.match(r"\s*R\d+\s*,\s*gdesc", x.operands)
            yield "shared", 2 * k * (n if in_registers else n + m) / 4 / _SHARED_BYTES
    elif what in ("exp2", "other function"):
        yield "function", 32 / 4
    elif name == "IMAD":
        yield "fma", 2
    elif what in ("fma", "mul", "add", "half2"):
        yield "fma", 32 / _LANES[target]
    elif name.startswith("U") and what != "copy":
        yield "uniform", 1
    elif what in ("max", "compare", "convert", "integer", "move"):
        yield "alu", 32 / 16
    elif name in ("LDSM", "STSM", "MOVM"):
        matrices = 4 if ".4" in x.modifiers else 2 if ".2" in x.modifiers else 1
        yield "shared", matrices * 128 / _SHARED_BYTES
    elif what in ("load shared", "store shared") or name == "LDGSTS":
        yield "shared", 32 * width / _SHARED_BYTES
    elif what in ("shuffle", "spill"):
        yield "shared", 32 * width / _SHARED_BYTES


# -- Disassembly ---------------------------------------------------------------------------

_SASS_LINE = re.compile(
    r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)((?:\.[\w]+)*)\s*(.*?)\s*;"
)
_GCN_LINE = re.compile(r"^\s+([a-z]\w+)\s*([^;]*)")


def nvidia_tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin" / name


def run_on_cubin(cubin: bytes, tool: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [nvidia_tool(tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@dataclass(frozen=True)
class Code:
    """A function; labels: name -> index of the instruction that follows."""

    instructions: list[Instruction]
    labels: dict[str, int]


def sass(cubin: bytes) -> Code:
    """Disassembles the one kernel in a cubin."""
    code = Code([], {})
    for line in run_on_cubin(cubin, "nvdisasm", "-c").splitlines():
        if label := re.match(r"^(\.L_[\w.]+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif match := _SASS_LINE.match(line):
            guard, opcode, modifiers, operands = match.groups()
            code.instructions.append(
                Instruction(opcode, modifiers, operands, (guard or "").strip())
            )
    return code


def gcn(assembly: str) -> Code:
    """Reads the one kernel in the assembly."""
    code = Code([], {})
    body = assembly[: assembly.index(".section\t.rodata")]
    for line in body.splitlines():
        if label := re.match(r"^(\.LBB[\w.]+):", line):
            code.labels[label[1]] = len(code.instructions)
        elif match := _GCN_LINE.match(line):
            code.instructions.append(Instruction(match[1], "", match[2].strip()))
    return code


# -- Loops ---------------------------------------------------------------------------------


def _jump(code: Code, i: int) -> tuple[list[int], bool] | None:
    """Returns the jump targets of instruction i, and whether it never falls through; None if it is
    no jump."""
    x = code.instructions[i]
    targets = [
        code.labels[name]
        for name in re.findall(r"\.L[\w.]+", x.operands)
        if code.labels.get(name, len(code.instructions)) < len(code.instructions)
    ]
    if x.opcode in ("BRA", "JMP"):
        always = not x.guard and not re.search(r"(^|\s)!?U?P\d", x.operands)
        return targets, always and ".DIV" not in x.modifiers
    if x.opcode in ("EXIT", "RET", "BRX", "CALL"):
        return [], not x.guard and x.opcode != "CALL"
    if x.opcode == "BSYNC":  # jumps to the point that its BSSY named: the nearest one ahead
        barrier = x.operands.split(",")[0].strip()
        named = [
            code.labels[name]
            for y in code.instructions
            if y.opcode == "BSSY" and y.operands.split(",")[0].strip() == barrier
            for name in re.findall(r"\.L[\w.]+", y.operands)
        ]
        ahead = [target for target in named if target > i]
        return ([min(ahead)], not x.guard) if ahead else None
    if x.opcode == "s_branch":
        return targets, True
    if x.opcode.startswith("s_cbranch"):
        return targets, False
    if x.opcode in ("s_endpgm", "s_setpc_b64"):
        return [], True
    return None


@dataclass(frozen=True)
class Graph:
    """blocks: (first, last + 1) of the instructions; successors: of each block."""

    blocks: list[tuple[int, int]]
    successors: list[set[int]]


def graph(code: Code) -> Graph:
    count = len(code.instructions)
    jumps = {i: jump for i in range(count) if (jump := _jump(code, i)) is not None}
    leaders = {0}
    for i, (targets, _) in jumps.items():
        leaders |= {*targets, i + 1}
    starts = sorted(x for x in leaders if x < count)
    number = {start: k for k, start in enumerate(starts)}
    blocks = list(zip(starts, [*starts[1:], count], strict=True))
    successors = []
    for k, (_, end) in enumerate(blocks):
        targets, ends = jumps.get(end - 1, ([], False))
        onward = set() if ends or k + 1 == len(blocks) else {k + 1}
        successors.append({number[target] for target in targets} | onward)
    return Graph(blocks, successors)


def _dominators(flow: Graph) -> list[int]:
    """Returns for each block a bit set of the blocks that every path to it passes."""
    count = len(flow.blocks)
    before: list[list[int]] = [[] for _ in range(count)]
    for a, successors in enumerate(flow.successors):
        for b in successors:
            before[b].append(a)
    everything = (1 << count) - 1
    dominators = [1] + [everything] * (count - 1)
    changed = True
    while changed:
        changed = False
        for b in range(1, count):
            common = everything
            for a in before[b]:
                common &= dominators[a]
            common |= 1 << b
            changed |= common != dominators[b]
            dominators[b] = common
    return dominators


def natural_loops(flow: Graph) -> list[set[int]]:
    """Returns the blocks of each loop; loops with the same head count as one."""
    dominators = _dominators(flow)
    reachable, ahead = {0}, [0]
    while ahead:
        new = flow.successors[ahead.pop()] - reachable
        reachable |= new
        ahead += new
    loops: dict[int, set[int]] = {}
    for tail in sorted(reachable):
        for head in flow.successors[tail]:
            if dominators[tail] >> head & 1:
                body = loops.setdefault(head, {head})
                ahead = [tail]
                while ahead:
                    block = ahead.pop()
                    if block not in body:
                        body.add(block)
                        ahead += [a for a in reachable if block in flow.successors[a]]
    return list(loops.values())


def score_loops(code: Code, tile_scores: int) -> list[Loop]:
    """Returns the innermost loops with matrix instructions and exponentials, in code order.

    tile_scores: the scores of a tile that one warp computes; an iteration handles one tile.
    """
    flow = graph(code)

    def instructions(blocks: set[int]) -> list[Instruction]:
        return [x for b in sorted(blocks) for x in code.instructions[slice(*flow.blocks[b])]]

    def count(blocks: set[int], what: str) -> int:
        return sum(kind(x) == what for x in instructions(blocks))

    def waits(block: int) -> bool:
        """Whether the block is an out-of-line retry of a wait."""
        own = instructions({block})
        return len(own) <= 6 and any(x.opcode == "SYNCS" for x in own)

    candidates = [blocks for blocks in natural_loops(flow) if count(blocks, "matrix")]
    found = []
    for blocks in candidates:
        if any(other < blocks for other in candidates):
            continue
        own = {b for b in blocks if not waits(b)}
        kept = [x for x in instructions(own) if x.opcode not in ("NOP", "s_nop")]
        if count(own, "exp2"):
            found.append((min(blocks), Loop(tuple(kept), tile_scores)))
    return [loop for _, loop in sorted(found, key=lambda pair: pair[0])]


# -- Resources -----------------------------------------------------------------------------


def gcn_resources(assembly: str) -> dict[str, int]:
    """Returns the vector registers of a lane, and as "stack" how many of them were spilled."""
    names = {"registers": "vgpr_count", "stack": "vgpr_spill_count"}
    return {k: int(re.search(rf"\.{x}:\s*(\d+)", assembly)[1]) for k, x in names.items()}  # type: ignore[index]


def resources(cubin: bytes) -> dict[str, int]:
    """Returns the registers of a thread and the bytes of its stack (STACK and LOCAL)."""
    usage = run_on_cubin(cubin, "cuobjdump", "--dump-resource-usage")
    read: Sequence[int] = [
        int(re.search(rf"{x}:(\d+)", usage)[1]) for x in ("REG", "STACK", "LOCAL")
    ]  # type: ignore[index]
    return {"registers": read[0], "stack": read[1] + read[2]}

"""The code of the main configurations stays within the committed limits.

A selection, in which every two values of two axes meet, is compiled alternately in bfloat16 and
float16; with --full every configuration is compiled in both. After a change of the kernels or their
tiles, run `python tests/helpers/budgets.py`.
"""

import itertools
import re

import pytest

import budgets
import main_loop
from main_loop import Code, Instruction, score_loops
from paths import ROOT

pytest.importorskip("triton")

pytestmark = pytest.mark.timeout(3600)  # a cold cache on a busy machine
LIMITS = budgets.load()["limits"]
PRODUCTS = {"forward": 2, "dkdv": 4, "dq": 3}  # products per score


def selection() -> list[str]:
    """Returns names in which all pairs of axis values that occur meet; greedy."""

    def pairs(name):
        return set(itertools.combinations(enumerate(budgets.CONFIGURATIONS[name]), 2))

    missing = set().union(*map(pairs, LIMITS))
    chosen = []
    while missing:
        chosen.append(max(LIMITS, key=lambda name: len(pairs(name) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


SELECTED = [(name, ("bfloat16", "float16")[number % 2]) for number, name in enumerate(selection())]
ALL = [one for one in itertools.product(LIMITS, ("bfloat16", "float16")) if one not in SELECTED]


@pytest.mark.parametrize(
    "name, dtype", [*SELECTED, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL)]
)
def test_limit(name, dtype):
    entry = budgets.measure(name, dtype)
    assert not budgets.excesses(entry, LIMITS[name]), "regenerate with tests/helpers/budgets.py"
    assert entry["tiles"] == LIMITS[name]["tiles"]
    assert entry["main"]["matrix"] > 0


def test_limits_are_of_the_pinned_compiler_and_known_configurations():
    pins = (ROOT / "constraints.txt").read_text()
    assert f"triton=={budgets.load()['triton']};" in pins
    assert LIMITS.keys() <= budgets.CONFIGURATIONS.keys()
    for target, kernel, D in budgets.GOALS:
        for causal in (False, True):
            assert budgets.name_of(target, kernel, D, causal, "plain") in LIMITS


def test_the_page_is_that_of_the_limits():
    """The page names a cause for each missed goal; without a cause it cannot be made."""
    assert budgets.PAGE.read_text() == budgets.page(budgets.load())


def test_no_cause_is_left_over():
    missed = [(n, what) for n, entry in LIMITS.items() for what in budgets.misses(n, entry)]
    for pattern, goals, _ in budgets.CAUSES:
        assert any(what in goals and re.search(pattern, name) for name, what in missed), pattern


def test_a_limit_that_is_broken_is_noticed():
    entry = LIMITS["sm_80 dq 64 causal plain"]
    assert not budgets.excesses(entry, entry)
    main = entry["main"]
    for worse in (
        {"stack": entry["stack"] + 100},
        {"registers": entry["registers"] + 20},
        {"shared": entry["shared"] + 1},
        {"matrix": 0},
        {"async": 0},
        {"main": main | {"total": main["total"] * 1.1}},
        {"main": main | {"spill": 30.0}},
        {"masked": [1.1 * x for x in entry["masked"]]},
    ):
        assert budgets.excesses(entry | worse, entry), worse
    assert budgets.misses("sm_80 dq 64 causal plain", entry | {"stack": 1000}) == ["stack"]
    assert "exposed" in budgets.misses("sm_80 dq 64 causal plain", entry | {"exposed": 0.1})


# -- How instructions are counted ----------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LIMITS if n.startswith("sm_80")])
def test_counted_products_are_those_of_the_formula(name):
    """One m16n8k16 does 2048 multiply-adds, and a tile that fills its warps needs no more of them
    than products x scores x head size."""
    _, kernel, D, _, _ = budgets.CONFIGURATIONS[name]
    needed = PRODUCTS[kernel] * 1024 * D / 2048
    block_m, block_n, warps, _ = LIMITS[name]["tiles"]
    own = LIMITS[name]["main"]["matrix"]
    assert own == needed if D < 256 and warps == 4 else own >= needed
    assert LIMITS[name]["main"]["exp2"] >= 32  # one per score, for 32 lanes


def code(*lines: str) -> Code:
    """Returns code from lines: "name:" is a label, "@P0 BRA .L_1" has a guard."""
    found = Code([], {})
    for line in lines:
        if line.endswith(":"):
            found.labels[line[:-1]] = len(found.instructions)
            continue
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        opcode, _, operands = rest.partition(" ")
        base, *modifiers = opcode.split(".")
        suffix = "".join(f".{x}" for x in modifiers)
        found.instructions.append(Instruction(base, suffix, operands, guard))
    return found


INNER = ("HMMA.16816.F32 R0", "MUFU.EX2 R1, R1", "FFMA R2", "@P0 BRA .L_inner")


def test_the_innermost_loops_with_products_are_found():
    nested = code(
        *("MOV R0", ".L_outer:", "IADD3 R1", ".L_inner:", *INNER, "STG.E R2", "@P1 BRA .L_outer"),
        *(".L_copy:", "LDG.E R5", "@P2 BRA .L_copy", "EXIT"),
    )
    (loop,) = score_loops(nested, 32)
    assert [x.opcode for x in loop.instructions] == ["HMMA", "MUFU", "FFMA", "BRA"]
    assert loop.per_1024_scores() == {
        **{"matrix": 32.0, "exp2": 32.0, "fma": 32.0, "branch": 32.0, "total": 128.0}
    }
    # HMMA 2048 / 256; EX2 32 lanes / 4; FFMA 32 lanes / 16
    assert loop.cycles("sm_80") == {"issue": 128.0, "tensor": 256.0, "function": 256.0, "fma": 64.0}
    assert loop.softmax_exposed("sm_80") == 0.5  # 256 / (256 + 256)


def test_conditional_blocks_count_and_retries_of_a_wait_do_not():
    waiting = code(
        *(".L_inner:", "SYNCS.TRYWAIT P3", "@!P3 BRA .L_retry", ".L_on:", "@P5 BRA .L_skip"),
        *("FADD R7", ".L_skip:", *INNER, "EXIT", ".L_retry:", "SYNCS.TRYWAIT P3", "BRA .L_on"),
    )
    (loop,) = score_loops(waiting, 32)
    opcodes = [x.opcode for x in loop.instructions]
    assert opcodes.count("FADD") == 1 and "HMMA" in opcodes
    assert opcodes.count("SYNCS") <= 1


def test_wgmma_reads_its_operands_from_shared_memory():
    both = Instruction("HGMMA", ".64x128x16.F32.BF16", "R24, gdesc[UR8], R24")
    one = Instruction("HGMMA", ".64x128x16.F32.BF16", "R24, R4, gdesc[UR8], R24")
    cycles = [main_loop.Loop((x,), 1024).cycles("sm_90") for x in (both, one)]
    # 128 x 16 and 64 x 16 numbers of 2 bytes, a quarter each, 32 bytes a cycle
    assert [c["shared"] for c in cycles] == [48.0, 32.0]
    assert [c["tensor"] for c in cycles] == [64.0, 64.0]


def test_amd_assembly():
    text = """
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16 v[0:15], v[0:1], v[2:3], v[0:15]
\tv_exp_f32_e32 v1, v1
\tscratch_store_dword off, v1, s0 ; 4-byte Folded Spill
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\t.section\t.rodata
\t.vgpr_count:     130
\t.vgpr_spill_count: 2
"""
    (loop,) = score_loops(main_loop.gcn(text), 64)
    mix = loop.per_1024_scores()
    assert mix == {"matrix": 16.0, "exp2": 16.0, "branch": 16.0, "spill": 16.0, "total": 64.0}
    assert main_loop.gcn_resources(text) == {"registers": 130, "stack": 2}


def test_every_instruction_of_a_kernel_has_a_kind():
    for name, entry in LIMITS.items():
        assert entry["main"].get("other", 0.0) <= 0.03 * entry["main"]["total"], name

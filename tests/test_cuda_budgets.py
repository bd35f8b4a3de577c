"""What ptxas makes of the CUDA kernels stays within tests/data/cuda_budgets.json.

Per 1024 scores of the loop without masks; FlashAttention-2 needs 296 instructions forward at
head_dim 64 and 470 at 128, and spills 20 and 6 of them. Counts say nothing about time, but a
kernel that leaves its budget has lost something.
"""

import json
from pathlib import Path

import pytest

import cuda_interpreter
import sass

BUDGETS = json.loads(Path(__file__).with_name("data").joinpath("cuda_budgets.json").read_text())


@pytest.mark.skipif(cuda_interpreter.NVCC is None, reason="nvcc not found")
@pytest.mark.skipif(sass.nvdisasm() is None, reason="nvdisasm comes with Triton")
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget["kernel"])
def test_main_loop_and_registers(budget):
    cubin, report = cuda_interpreter.cubin_of(budget["kernel"], "80")
    loop = sass.main_loop(sass.disassembled(cubin), budget["scores"])
    measured = {"total": loop.total, **loop.groups, **sass.resources(report)}
    over = {
        name: (measured[name], limit)
        for name, limit in budget["limits"].items()
        if measured[name] > limit
    }
    assert not over, f"(measured, limit): {over}"
    # Two products forward, five and two more (s and dp again) backward: nothing else is multiplied.
    head_dim = int(budget["kernel"].split(", ")[1])
    products = {"kKeyValue": 4, "kQuery": 3}.get(budget["kernel"].split("::")[-1].rstrip(">"), 2)
    assert measured["mma"] == products * head_dim / 2
    assert measured["copies"] > 0


LOOPS = """
.L_x_1:
        /*0010*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
.L_x_2:
        /*0020*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0030*/              @!PT LDS RZ, [RZ] ;
        /*0040*/                   IMAD.IADD R1, R2, 0x1, R3 ;
        /*0050*/               @P1 LDL R9, [R1] ;
        /*0060*/               @P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0070*/                   FADD R1, R1, R2 ;
        /*0080*/               @P0 BRA `(.L_x_3) ;
        /*0090*/              @!P2 BRA `(.L_x_1) ;
"""


def test_the_counter_itself():
    """The innermost loop with products, without what does nothing; a spill in it is seen."""
    assert sass.product_loops(LOOPS) == [["HMMA", "IMAD", "LDL", "BRA"]]
    loop = sass.main_loop(LOOPS, 512)
    assert loop.total == 8 and loop.groups["spill"] == loop.groups["integer"] == 2
    assert sass.resources("ptxas info : Used 24 registers, 8 bytes spill stores") == {
        "registers": 24, "spill_bytes": 8,
    }  # fmt: skip

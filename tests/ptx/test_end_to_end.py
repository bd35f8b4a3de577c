"""Real kernels of two compilers, against float64, with no finding, under every warp schedule."""

import numpy as np
import pytest
import torch

from ptx import SCHEDULES

pytest.importorskip("triton", reason="triton is not installed: nothing to compile the kernels with")

from ptx import example_kernels as kernels
from ptx.triton_compile import compile_triton

LOG2_E = float(np.log2(np.e))
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Largest error seen is about a third of each; fp32 products run in TF32 (10 bits of mantissa).
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 8e-3}


def check(report):
    assert not report.findings, "\n".join(map(str, report.findings))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("target", [80])
def test_attention_forward(target, dtype, schedule):
    heads, seqlen_q, seqlen_k, dim = 2, 70, 130, 64
    compiled = compile_triton(
        kernels.attention_forward,
        {
            **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}"),
            "lse_ptr": "*fp32",
            "seed_ptr": "*i64",
            **dict.fromkeys(("seqlen_q", "seqlen_k", "stride"), "i32"),
            "scale_log2": "fp32",
        },
        {"CAUSAL": False, "DROPOUT": False, "BLOCK_M": 64, "BLOCK_N": 64, "D": dim},
        target,
        divisible_by_16=["q_ptr", "k_ptr", "v_ptr", "out_ptr", "lse_ptr", "seed_ptr", "stride"],
    )
    q, k, v = (torch.randn(heads, n, dim).to(TYPES[dtype]) for n in (seqlen_q, seqlen_k, seqlen_k))
    out, lse = torch.full_like(q, torch.nan), torch.full((heads, seqlen_q), torch.nan)
    report = compiled.launch(
        (2, heads),
        {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": lse,
            "seed_ptr": torch.zeros(1, dtype=torch.int64), "seqlen_q": seqlen_q,
            "seqlen_k": seqlen_k, "stride": dim, "scale_log2": dim**-0.5 * LOG2_E,
        },
        schedule,
    )  # fmt: skip
    check(report)
    scores = q.double() @ k.double().mT * dim**-0.5
    expected = torch.softmax(scores, -1) @ v.double()
    assert (out.double() - expected).abs().max() < TOLERANCE[dtype]
    assert (lse.double() / LOG2_E - scores.logsumexp(-1)).abs().max() < 4e-3

"""Evaluates every row of docs/migration.md: the expressions of its two columns are equal."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

import fused_attention
from fused_attention.integrations import flash_attn, megatron, xformers
from paths import ROOT

PAGE = (ROOT / "docs" / "migration.md").read_text()
ROW = re.compile(r"^\| `([^`]+)` \| `([^`]+)` \|$", re.MULTILINE)
ROWS = ROW.findall(PAGE)


def names():
    """Returns what the expressions refer to."""
    torch.manual_seed(0)
    B, H, Sq, Sk, D = 2, 4, 5, 7, 16
    q, k, v = (torch.randn(B, H, S, D) for S in (Sq, Sk, Sk))
    mask = torch.rand(B, 1, Sq, Sk) > 0.3
    mask[..., 0] = True
    padding = torch.arange(Sk) >= torch.tensor([[7], [4]])
    found = {
        "q": q, "k": k, "v": v, "k2": k[:, :2], "v2": v[:, :2], "Sq": Sq, "Sk": Sk,
        "mask": mask, "bias": torch.randn(1, H, Sq, Sk), "padding": padding,
        "attention_mask": (~padding).long(), "scores": torch.randn(B, H, Sq, Sk),
        "layer": nn.MultiheadAttention(16, 2, batch_first=True), "x": torch.randn(B, Sk, 16),
        "slopes": torch.rand(H), "used": torch.tensor([9, 6], dtype=torch.int32),
        "k_cache": torch.randn(B, 12, H, D), "v_cache": torch.randn(B, 12, H, D),
        "cu_q": torch.tensor([0, 5, 8], dtype=torch.int32),
        "cu_k": torch.tensor([0, 7, 9], dtype=torch.int32),
        "pages": torch.tensor([[4, 0, 5], [2, 3, 1]], dtype=torch.int32), "sinks": torch.randn(H),
        "H": H, "D": D,
        "qp": torch.randn(8, H, D), "kp": torch.randn(9, H, D), "vp": torch.randn(9, H, D),
    }  # fmt: skip
    found |= {f"{name}_bshd": found[name].transpose(1, 2) for name in "qkv"}
    found["q_5d"] = found["q_bshd"].unflatten(2, (2, 2))
    found |= {
        f"{n}_5d": found[f"{n}2"].transpose(1, 2).unsqueeze(3).expand(-1, -1, -1, 2, -1)
        for n in "kv"
    }
    found |= {"F": F, "math": math, "torch": torch, "causal_lower_right": causal_lower_right}
    own = {name: getattr(fused_attention, name) for name in fused_attention.__all__}
    others = {n: x for n, x in vars(flash_attn).items() if n.startswith("flash_attn_")}
    others |= {n: x for n, x in vars(xformers).items() if n.startswith("memory_") or "Mask" in n}
    return found | own | others | {n: getattr(megatron, n) for n in megatron.__all__}


def test_every_row_of_the_tables_is_read():
    tables = PAGE[PAGE.index("## From PyTorch") :].splitlines()
    assert len(ROWS) == sum(line.startswith("| `") for line in tables) > 25


@pytest.mark.parametrize(("theirs", "ours"), ROWS, ids=[theirs for theirs, _ in ROWS])
def test_both_columns_are_equal(theirs, ours):
    assert theirs != ours
    expected, got = (eval(text, names()) for text in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6)

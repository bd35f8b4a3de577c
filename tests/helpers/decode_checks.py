"""Checks of calls with few queries and many keys, which attention_decode serves.

test_gpu.py puts a function that computes on a GPU in place of `attention`.
"""

import dataclasses

import torch

from fused_attention import attention, explain
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

DECODE = Case(B=1, Hq=8, Hkv=2, Sq=1, Sk=1100, D=64, Dv=64)

# 1100 keys and values make two splits at head size 64, and seven at 300.
CASES = {
    "one query": DECODE,
    "one head a group": dataclasses.replace(DECODE, Hq=2),
    "three heads a group": dataclasses.replace(DECODE, Hq=6),
    "five heads, one group": dataclasses.replace(DECODE, Hq=5, Hkv=1),
    "eight rows": dataclasses.replace(DECODE, Sq=2, causal="bottom_right"),
    "several queries": dataclasses.replace(DECODE, Hq=2, Sq=7, causal="bottom_right"),
    "seven splits": dataclasses.replace(DECODE, B=2, Hq=4, D=300, Dv=300),
    "narrow": dataclasses.replace(DECODE, Sk=300, D=3, Dv=1),
    "ragged width": dataclasses.replace(DECODE, D=33, Dv=81),
    "window": dataclasses.replace(
        DECODE, Hq=4, Sq=3, Sk=3000, causal="bottom_right", window_size=(1500, 0)
    ),
    "top left": dataclasses.replace(DECODE, Hq=2, Sq=5, causal="top_left"),
    "everything": Case(
        B=2, Hq=4, Hkv=2, Sq=3, Sk=2300, D=48, Dv=40, causal="bottom_right",
        window_size=(2100, 0), mask="BHQK", bias="1HQK", key_padding=True, softcap=4.0, alibi="BH",
        sinks=True, dropout_p=0.3, memory_format="BSHD",
    ),
    "masks of heads": dataclasses.replace(DECODE, B=2, mask="BHQK", bias="BH1K"),
    "strided": dataclasses.replace(DECODE, memory_format="strided", scale=-0.3),
}  # fmt: skip


def check_forward(case: Case) -> None:
    """Checks out and lse by the correctness rule, and that attention_decode serves the case."""
    inputs = testing.make_inputs(case)
    tensors = {name: x.detach() for name, x in inputs.tensors.items()}
    details = explain(**tensors, **inputs.keywords, return_lse=True).details
    assert details.kernel == "attention_decode"
    out, lse = attention(**tensors, **inputs.keywords, return_lse=True, backend="cpu")
    got = {"out": out, "lse": lse}
    wrong = testing.errors(got, testing.exact(inputs), testing.naive(inputs))
    assert not [e.message for e in wrong if e.is_wrong]


def rows_served() -> int:
    """Returns how many rows the kernel takes at most, found with query heads of one key head."""

    def kernel(heads: int) -> str:
        query, key = torch.empty(1, heads, 1, 8), torch.empty(1, 1, 100, 8)
        return explain(query, key, key).details.kernel

    return next(n for n in range(1, 100) if kernel(n + 1) != "attention_decode")


def check_case(name: str, dtype: torch.dtype) -> None:
    """Checks a case, with fewer queries if the kernel does not take all of them."""
    case = dataclasses.replace(CASES[name], dtype=dtype)
    if case.Hq // case.Hkv * case.Sq > rows_served():
        case = dataclasses.replace(case, Sq=rows_served() // (case.Hq // case.Hkv))
    check_forward(case)

"""Cases that between them start every kernel of attention, for the tests of compiled kernels."""

import dataclasses

import torch

from fused_attention.tools.testing import Case

# Several tiles of queries and of keys, the last ones ragged.
SCALE_ONLY = Case(dtype=torch.float16, B=1, Hq=2, Hkv=2, Sq=150, Sk=140, D=64, Dv=64)


def case(**changes) -> Case:
    return dataclasses.replace(SCALE_ONLY, **changes)


COVERING = {
    "causal, gqa": case(causal="bottom_right", Hkv=1, Sk=300),
    "even": case(dtype=torch.bfloat16, Sq=128, Sk=128, memory_format="BSHD"),
    "everything": case(
        **{"dtype": torch.bfloat16, "Sq": 70, "D": 40, "mask": "B1QK", "bias": "1HQK"},
        **{"key_padding": True, "window_size": (60, -1), "softcap": 3.0, "alibi": "H"},
        **{"sinks": True, "dropout_p": 0.25, "causal": "top_left"},
    ),
    "float32": case(dtype=torch.float32, Sq=90, Sk=70, D=16, Dv=33, sinks=True, key_padding=True),
    "window, dropout": case(window_size=(30, 20), dropout_p=0.1, bias="1H1K", scale=-0.2),
}

"""A small call for every feature and its variants, for the tests of gradients and transforms."""

import torch

from fused_attention import testing
from fused_attention.problem import Problem
from fused_attention.testing import Case

_VARIANTS = {
    "plain": {},
    **{f"mask {shape}": {"mask": shape} for shape in ("BHQK", "11QK", "B11K", "1111")},
    "fully masked rows": {"mask": "1HQ1"},
    **{
        f"bias {shape}": {"bias": shape}
        for shape in ("BHQK", "1HQK", "11QK", "B1QK", "BH1K", "111K", "BHQ1", "1111")
    },
    "mask and bias": {"mask": "B1QK", "bias": "1HQK"},
    "key padding": {"key_padding": True},
    "causal top_left": {"causal": "top_left"},
    "causal bottom_right": {"causal": "bottom_right"},
    "window": {"window_size": (1, 1)},
    "window and causal": {"window_size": (2, -1), "causal": "bottom_right"},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 0.8},
    "alibi H": {"alibi": "H"},
    "alibi BH": {"alibi": "BH", "causal": "bottom_right"},
    "sinks": {"sinks": True},
    "sinks of rows that see nothing": {"sinks": True, "mask": "1HQ1"},
    "dropout": {"dropout_p": 0.4},
    "dropout of everything": {"dropout_p": 1.0},
    "gqa": {"Hq": 4},
    "value_head_dim": {"Dv": 3},
    "BSHD": {"layout": "BSHD"},
    "strided": {"layout": "strided"},
    "everything": {
        **{"Hq": 4, "Dv": 3, "layout": "BSHD", "mask": "B1QK", "bias": "1HQK", "key_padding": True},
        **{"causal": "bottom_right", "window_size": (3, -1), "softcap": 1.5, "alibi": "H"},
        **{"sinks": True, "dropout_p": 0.3},
    },
}
_SMALL = {"dtype": torch.float64, "B": 2, "Hq": 2, "Hkv": 2, "Sq": 3, "Sk": 5, "D": 4, "Dv": 4}
CASES = {name: Case(**_SMALL | fields, seed=3) for name, fields in _VARIANTS.items()}


def features_of(case: Case, **options) -> frozenset[str]:
    """The names in `problem.FEATURES` that a call of this case uses."""
    inputs = testing.make_inputs(case)
    return Problem.from_call(**inputs.differentiable(), **inputs.keywords, **options).features


def finite(results):
    """lse is -inf where a row sees nothing, and differences of it have no meaning."""
    if isinstance(results, torch.Tensor):
        return results
    out, lse = results
    return out, lse.masked_fill(lse.isinf(), 0.0)

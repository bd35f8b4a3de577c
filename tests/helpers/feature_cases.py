"""A small call for every feature and its variants, for the tests of gradients and transforms."""

import dataclasses

import torch

from fused_attention.call.options import Options
from fused_attention.call.problem import Problem
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

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
    "window and diagonal": {"window_size": (2, 1), "diagonal": "bottom_right"},
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
    "BSHD": {"memory_format": "BSHD"},
    "strided": {"memory_format": "strided"},
    "everything": {
        **{
            "Hq": 4,
            "Dv": 3,
            "memory_format": "BSHD",
            "mask": "B1QK",
            "bias": "1HQK",
            "key_padding": True,
        },
        **{"causal": "bottom_right", "window_size": (3, -1), "softcap": 1.5, "alibi": "H"},
        **{"sinks": True, "dropout_p": 0.3},
    },
}
_SMALL = {"dtype": torch.float64, "B": 2, "Hq": 2, "Hkv": 2, "Sq": 3, "Sk": 5, "D": 4, "Dv": 4}
CASES = {name: Case(**_SMALL | fields, seed=3) for name, fields in _VARIANTS.items()}


def _offsets(*starts):
    return torch.tensor(starts, dtype=torch.int32)


def _sequences(keys, **options):
    """Returns query, key and value (the latter two of shape `keys` x width), and the options."""
    draw = torch.Generator().manual_seed(5)

    def randn(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    packed = "cu_seqlens_q" in options
    query = randn(7, 2, 4) if packed else randn(2, 2, 3, 4)
    return {"query": query, "key": randn(*keys, 4), "value": randn(*keys, 3)}, options


# Calls with sequences of different lengths, which a `Case` does not describe.
SEQUENCES = {
    "packed": _sequences(
        (9, 1), cu_seqlens_q=_offsets(0, 2, 6), cu_seqlens_k=_offsets(0, 5, 8), causal="top_left",
        sinks=torch.tensor([0.3, -0.2], dtype=torch.float64), dropout_p=0.3, philox_seed=7,
    ),
    "packed, used lengths": _sequences(
        (9, 2), cu_seqlens_q=_offsets(0, 4, 7), cu_seqlens_k=_offsets(0, 5, 9),
        seqused_k=_offsets(4, 2), window_size=(2, 1),
    ),
    "used lengths": _sequences(
        (2, 1, 5), seqused_k=_offsets(5, 3), causal="bottom_right",
        bias=torch.linspace(-1, 1, 30, dtype=torch.float64).view(1, 2, 3, 5),
    ),
    "pages, one of two sequences": _sequences(
        (4, 3, 2), block_table=_offsets(2, 0, 1, 2).view(2, 2), seqused_k=_offsets(5, 6),
    ),
    "packed, pages": _sequences(
        (5, 2, 1), cu_seqlens_q=_offsets(0, 3, 7), cu_seqlens_k=_offsets(0, 3, 7),
        block_table=_offsets(3, 0, 1, 4).view(2, 2), causal="bottom_right",
    ),
}  # fmt: skip


def case_id(case: Case) -> str:
    """Returns the fields that differ from the default case, as the id of a parameter."""
    defaults = Case()
    changed = {
        field.name: getattr(case, field.name)
        for field in dataclasses.fields(Case)
        if getattr(case, field.name) != getattr(defaults, field.name) and field.name != "seed"
    }
    text = ",".join(f"{k}={v}" for k, v in changed.items() if k not in ("B", "Hq", "Hkv", "Dv"))
    return f"{case.seed}:{text}".replace("torch.", "").replace(" ", "")


def problem_of(query, key, value, **options) -> Problem:
    """Returns the problem that `attention` makes of a call with these arguments."""
    return Problem.from_call(query, key, value, Options(**options))


def features_of_sequences(name: str, **options) -> frozenset[str]:
    """Returns the names in `problem.FEATURES` that a call of SEQUENCES uses."""
    tensors, given = SEQUENCES[name]
    leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    return problem_of(**leaves, **given, **options).features


def features_of(case: Case, **options) -> frozenset[str]:
    """Returns the names in `problem.FEATURES` that a call of this case uses."""
    inputs = testing.make_inputs(case)
    return problem_of(**inputs.differentiable(), **inputs.keywords, **options).features


def finite(results):
    """Replaces an infinite lse by 0: fully masked rows have -inf, whose differences have no
    meaning."""
    if isinstance(results, torch.Tensor):
        return results
    out, lse = results
    return out, lse.masked_fill(lse.isinf(), 0.0)

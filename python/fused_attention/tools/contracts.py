"""What `verify` demands of an implementation: contracts, each of which extends the one before.

The numbers of ordinary calls are compared under every contract, by the cases of `testing`. The
other clauses that random inputs do not show have probes, which are functions of a call and its
tensors. A probe uses nothing but torch, so that `reproduce` can copy its source into a script.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .testing import Case

Call = Callable[..., Any]  # called like `attention()`; may raise NotOffered

LEVELS = ("core", "torch", "flash_attn", "strict")
CHOICE = f"{', '.join(LEVELS)}; default: torch for --signature sdpa, else strict"


@dataclass(frozen=True)
class Clause:
    level: str
    text: str


NUMBERS, LARGE, UNWRITTEN = "numbers", "large scores", "inputs"
VISIBLE_NAN, REPETITION, DROPOUT = "visible NaN", "repetition", "dropout"
MASKED_ROWS, MASKED_LSE, HIDDEN_NAN = "masked rows", "masked lse", "hidden NaN"
NEGATIVE_SCALE = "negative scale"

CLAUSES = {
    NUMBERS: Clause("core", "out, gradients and lse are right for rows that see a key"),
    LARGE: Clause("core", "scores of 1000 do not overflow"),
    UNWRITTEN: Clause("core", "inputs are not written to"),
    VISIBLE_NAN: Clause("torch", "a visible NaN reaches the result"),
    REPETITION: Clause("torch", "a second call has the same bits"),
    DROPOUT: Clause("torch", "dropout is unbiased, and differs between calls"),
    MASKED_ROWS: Clause("flash_attn", "fully masked rows are 0, and so are their gradients"),
    MASKED_LSE: Clause("strict", "lse of fully masked rows is -inf"),
    HIDDEN_NAN: Clause("strict", "NaN in keys that no query sees reaches no result or gradient"),
    NEGATIVE_SCALE: Clause("strict", "a causal mask hides keys if the scale is negative, too"),
}


def demanded(contract: str) -> dict[str, Clause]:
    """Returns the clauses of a contract, by name."""
    levels = LEVELS[: LEVELS.index(contract) + 1]
    return {name: clause for name, clause in CLAUSES.items() if clause.level in levels}


# -- Probes ------------------------------------------------------------------------------


def overflow(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tests scores of about 1000, whose exponentials overflow float32."""
    out = call(query * 100, key * 10, value)
    return None if bool(out.isfinite().all()) else "softmax not max-subtracted: overflow"


def visible_nan(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tests that a visible NaN reaches the result."""
    value[:, :, 3] = math.nan
    return None if bool(call(query, key, value).isnan().all()) else "a visible NaN is swallowed"


def repetition(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tests that equal calls return equal bits."""
    bits = [call(query, key, value) for _ in range(3)]
    same = all(torch.equal(bits[0], other) for other in bits)
    return None if same else "not deterministic: a second call has other bits"


def dropout(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tests unseeded dropout by statistics: with values of 1, results vary around 1."""
    torch.manual_seed(0)
    p, ones = 0.25, torch.ones_like(value)
    if torch.allclose(call(query, key, value, dropout_p=p), call(query, key, value)):
        return "dropout ignored"
    total = call(query, key, ones, dropout_p=p)
    if torch.allclose(total, ones):
        return "dropout before the softmax's sum"
    if abs(total.mean().item() - (1 - p)) < 0.03:
        return "dropout not scaled"
    if abs(total.mean().item() - 1) > 0.03:
        return "dropout changes the sum of weights on average"
    first = call(query, key, ones, dropout_p=p)
    return "dropout drops the same every time" if torch.equal(first, total) else None


def padding(call: Call, query: Tensor, key: Tensor, value: Tensor, name: str) -> str | None:
    """Tests that NaN in keys and values behind a mask does not change the result."""
    seen = torch.arange(key.shape[2]) < key.shape[2] - 5
    hide = {"mask": seen.view(1, 1, 1, -1), "key_padding_mask": ~seen.expand(key.shape[0], -1)}
    clean = call(query, key, value, **{name: hide[name]})
    key[:, :, -5:] = value[:, :, -5:] = math.nan
    same = torch.allclose(call(query, key, value, **{name: hide[name]}), clean)
    return None if same else f"NaN in padding leaks ({name})"


def gradients(call: Call, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> str | None:
    """Tests that NaN in hidden keys and values does not reach the gradients."""
    hidden = (torch.arange(key.shape[2]) >= key.shape[2] - 5).expand(key.shape[0], -1)
    key[:, :, -5:] = value[:, :, -5:] = math.nan
    leaves = [x.requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        out = call(*leaves, key_padding_mask=hidden, **options)
    found = torch.autograd.grad(out, leaves, torch.ones_like(out))
    if all(bool(gradient.isfinite().all()) for gradient in found):
        return None
    return "NaN in padding leaks into gradients" + "".join(f" with {name}" for name in options)


def negative_scale(call: Call, query: Tensor, key: Tensor, value: Tensor) -> str | None:
    """Tests that the mask follows the scale, which would turn its -inf into +inf."""
    out = call(query, key, value, causal="top_left", scale=-0.4)
    return None if bool(out.isfinite().all()) else "NaN with a causal mask and a negative scale"


@dataclass(frozen=True)
class Probe:
    """A test of a clause. `check(call, query, key, value, **options)` returns a fault, or None."""

    clause: str
    check: Callable[..., str | None]
    features: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    case: Case = Case(Sq=40, Sk=40)  # whose query, key and value it gets


_LONG = Case(B=4, Sq=200, Sk=200)
PROBES = {
    "overflow": Probe(LARGE, overflow),
    "visible-nan": Probe(VISIBLE_NAN, visible_nan),
    "repetition": Probe(REPETITION, repetition, case=_LONG),
    "dropout": Probe(DROPOUT, dropout, ("dropout",), case=_LONG),
    "padding": Probe(HIDDEN_NAN, padding, ("key_padding_mask",), {"name": "key_padding_mask"}),
    "masked-padding": Probe(HIDDEN_NAN, padding, ("mask",), {"name": "mask"}),
    "negative-scale": Probe(NEGATIVE_SCALE, negative_scale, ("causal", "scale")),
    "gradients": Probe(HIDDEN_NAN, gradients, ("key_padding_mask",)),
    "gradients-softcap": Probe(
        HIDDEN_NAN, gradients, ("key_padding_mask", "softcap"), {"softcap": 2.0}
    ),
}

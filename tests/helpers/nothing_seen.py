"""Checks for the kernels of both GPU backends: NaN and infinity beside queries that see no key and
beside keys that no query sees, and sizes of 0.

A backend is a function that takes `testing.Inputs` and returns results by name, as `testing.run`
does.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch

from fused_attention import reference
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

INF, NAN = math.inf, math.nan
Run = Callable[[testing.Inputs], testing.Results]

BASE = Case(B=1, Hq=2, Hkv=1, Sq=21, Sk=43, D=16, Dv=16)
HIDING = {
    "key padding": dataclasses.replace(BASE, key_padding=True),
    "key padding, causal": dataclasses.replace(BASE, key_padding=True, causal="bottom_right"),
    "mask": dataclasses.replace(BASE, mask="1HQK", bias="BHQK"),
    "mask, float16": dataclasses.replace(BASE, mask="11QK", dtype=torch.float16, sinks=True),
    "causal, longer keys": dataclasses.replace(BASE, causal="top_left", dtype=torch.float16),
    "causal, longer queries": dataclasses.replace(
        BASE, causal="bottom_right", dtype=torch.float16, Sq=43, Sk=21
    ),
    "window": dataclasses.replace(BASE, window_size=(3, 2), dtype=torch.bfloat16),
    "window of the last": dataclasses.replace(BASE, causal="bottom_right", window_size=(4, 0)),
}


# UNSEEN: cases with keys that no query sees. BLIND: cases with queries that see no key.
UNSEEN = [name for name in HIDING if name != "causal, longer queries"]
BLIND = ["mask", "mask, float16", "causal, longer queries"]


def make(name: str) -> testing.Inputs:
    """Returns inputs in which key padding or the mask hides a third of the keys from all queries,
    and the mask hides all keys from a fifth of the queries."""
    case = HIDING[name]
    inputs = testing.make_inputs(case)
    options = inputs.options
    if case.key_padding:
        options["key_padding_mask"] = torch.arange(case.Sk).expand(1, -1) % 3 == 1
    if case.mask:
        shown = options["mask"] | (torch.arange(case.Sk) % 3 == 0)
        shown = shown & (torch.arange(case.Sk) % 3 != 1)
        options["mask"] = shown & (torch.arange(case.Sq).view(-1, 1) % 5 != 2)
    return inputs


def seen_of(inputs: testing.Inputs) -> torch.Tensor:
    """Returns which query sees which key, bool [B, Hq, Sq, Sk]."""
    query, key = inputs.tensors["query"], inputs.tensors["key"]
    B, Hq, Sq, _ = query.shape
    Sk = key.shape[2]
    used = torch.full((B,), Sk)
    names = ("causal", "window_size", "mask", "key_padding_mask")
    options = {name: inputs.options[name] for name in names if name in inputs.options}
    off = reference.diagonal_offset(
        inputs.options["causal"], Sq, used, inputs.options.get("diagonal")
    )
    return reference.visible((B, Hq, Sq, Sk), off, used, **options)


def parts_of(inputs: testing.Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which queries see a key, bool [B, Hq, Sq], and which keys a query sees, bool
    [B, Hkv, Sk]."""
    seen = seen_of(inputs)
    B, Hkv, Sk, _ = inputs.tensors["key"].shape
    return seen.any(3), seen.any(2).view(B, Hkv, -1, Sk).any(2)


def check_gradients_of_unseen_keys(run: Run, name: str, bad: float) -> None:
    """Gradients of unseen keys are 0 beside NaN or infinity in queries that see other keys."""
    inputs = make(name)
    sees, seen = parts_of(inputs)
    assert seen.any() and not seen.all()
    rows = sees.all(0).all(0).nonzero().flatten()
    inputs.tensors["query"][:, :, rows[0]] = bad
    inputs.grad_out[:, :, rows[-1]] = bad
    got = run(inputs)
    for gradient in (got["dkey"], got["dvalue"]):
        assert (gradient[~seen] == 0).all()
        assert not gradient[seen].isfinite().all()
    if "dbias" in got:
        assert (got["dbias"][~seen_of(inputs)] == 0).all()


def check_results_of_blind_queries(run: Run, name: str, bad: float) -> None:
    """Results of queries that see no key are 0 whatever these queries hold, also beside NaN or
    infinity in a key that other queries see."""
    inputs = make(name)
    sees, seen = parts_of(inputs)
    want = testing.exact(inputs)
    blind = ~sees
    assert blind.any() and not blind.all()
    inputs.tensors["query"][blind] = bad
    if "sinks" not in inputs.tensors:  # the gradient of sinks has a test of its own
        inputs.grad_out[blind] = bad
    got = run(inputs)
    for key in got:  # the values of blind queries have no influence
        tolerance = {"rtol": 0, "atol": 64 * torch.finfo(inputs.grad_out.dtype).eps}
        torch.testing.assert_close(got[key].double(), want[key], msg=key, **tolerance)
    column = seen.all(0).all(0).nonzero().flatten()[-1]
    inputs.tensors["key"][:, :, column] = bad
    inputs.tensors["value"][:, :, column] = bad
    got = run(inputs)
    assert (got["out"][blind] == 0).all() and (got["dquery"][blind] == 0).all()
    sinks = inputs.tensors.get("sinks")
    expected = torch.tensor(-INF) if sinks is None else sinks.view(1, -1, 1)
    torch.testing.assert_close(got["lse"][blind], expected.expand_as(blind)[blind])
    assert not got["out"][sees].isfinite().all()


WINDOWS = ("causal, longer keys", "key padding", "window", "mask", "mask, float16")
PLACES = ("query", "key", "value", "row of a bias", "slope")


def check_nan_stays(run: Run, name: str, where: str) -> None:
    """As in the definition, every row that sees a NaN gives NaN, also beside keys that it does not
    see. Other rows show the NaN only in the gradients of keys and values that they share."""
    case = HIDING[name]
    if where == "row of a bias":
        case = dataclasses.replace(case, bias="BHQK")
    inputs = make(name)
    tensors, options = inputs.tensors, inputs.options
    sees, seen = parts_of(inputs)
    row = int(sees.all(0).all(0).nonzero().flatten()[0])
    first = int(seen_of(inputs)[0, :, row].all(0).nonzero().flatten()[0])
    if where == "query":
        tensors["query"].fill_(NAN)
    elif where in ("key", "value"):
        tensors[where][:, :, first] = NAN  # the first key of the first row that sees any
    elif where == "slope":
        options["alibi_slopes"] = torch.full((case.Hq,), NAN)
    else:
        tensors["bias"] = testing.make_inputs(case).tensors["bias"]
        tensors["bias"][:, :, row] = NAN
    got, want = run(inputs), testing.exact(inputs)
    # Results of queries from which a non-finite key or value is hidden are unspecified.
    specified = sees if where not in ("key", "value") else seen_of(inputs)[..., first] | ~sees
    for key in ("out", "lse", "dquery"):
        mine, theirs = got[key][specified], want[key][specified]
        assert torch.equal(mine.isnan(), theirs.isnan()), key
        assert key == "lse" and where == "value" or theirs.isnan().any()
    assert torch.equal(
        got["out"].isnan().any(-1)[specified], want["out"].isnan().any(-1)[specified]
    )
    for key in ("dkey", "dvalue"):
        assert not got[key][~seen].isnan().any()
        if where == "query":
            assert got[key][seen].isnan().all()
    if "dbias" in got:
        assert (got["dbias"][~seen_of(inputs)] == 0).all()


def check_logits_of_minus_infinity(run: Run, dtype: torch.dtype, **fields) -> None:
    """A row that sees keys whose logits are all -inf is a row that sees nothing."""
    inputs = testing.make_inputs(dataclasses.replace(BASE, dtype=dtype, **fields))
    row = 7
    inputs.tensors["query"][:, :, row] = 0
    inputs.tensors["query"][:, :, row, 0] = INF
    inputs.tensors["key"][..., 0] = -inputs.tensors["key"][..., 0].abs() - 0.1
    got, want = run(inputs), testing.exact(inputs)
    for key in ("out", "lse"):
        tolerance = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(got[key].double(), want[key], rtol=tolerance, atol=tolerance)
    assert (got["out"][:, :, row] == 0).all()


# -- Sizes of 0 ----------------------------------------------------------------------------

SIZES = {"B": 1, "Hq": 2, "Hkv": 1, "Sq": 5, "Sk": 7, "D": 8, "Dv": 8}
EMPTY = [
    zero
    for count in range(1, len(SIZES) + 1)
    for zero in itertools.combinations(SIZES, count)
    if "Hkv" not in zero or "Hq" in zero
]
# The sizes that run each time; the others wait for --full.
OFTEN = [("Hq",), ("D",), ("Dv",), ("Sk",), ("B", "Sk"), ("Sq", "D"), tuple(SIZES)]


def check_empty(run: Run, zero: tuple[str, ...], **fields) -> None:
    """With sizes of 0, results match the definition, and none of them stays uninitialised."""
    inputs = testing.make_inputs(Case(**SIZES | dict.fromkeys(zero, 0), scale=0.3, **fields))
    torch.use_deterministic_algorithms(True)  # this fills new memory with NaN
    try:
        got = run(inputs)
    finally:
        torch.use_deterministic_algorithms(False)
    want = testing.exact(inputs)
    for name, x in got.items():
        torch.testing.assert_close(x, want[name].to(x.dtype), msg=name, rtol=1e-2, atol=1e-2)


HUGE = 2**50  # batch size of expanded tensors without elements


def check_huge(operators: Any) -> None:
    """Checks that the operators answer at once. The caller checks what they launch."""

    def empty(seqlen: int) -> torch.Tensor:
        return torch.empty(1, 2, seqlen, 8).half().expand(HUGE, 2, seqlen, 8)

    call = (0.3, 0, -1, -1, 0, *(None,) * 4, torch.zeros(2), None, 0.0, 0.0)
    for key in (empty(7), empty(0)):
        out, lse = operators.attention_forward(empty(0), key, key, *call)
        assert out.shape == (HUGE, 2, 0, 8)
    inputs = (empty(0), key, key, out, lse)
    grads = operators.attention_backward(
        out, None, *inputs, *call, *(None,) * 6, 0, 0, 0, False, True
    )
    assert [x.shape[0] for x in grads[:3]] == [HUGE] * 3 and grads[4].shape == (2,)
    rows = torch.empty(HUGE, 0)
    assert operators.masked_softmax_forward(rows, 1.0, 0, True)[0].shape == rows.shape
    operators.masked_softmax_(rows, 1.0, 0)
    assert operators.masked_softmax_backward(rows, rows, 1.0, 0)[0].shape == rows.shape


# Senseless cu_seqlens of four packed sequences, for 40 tokens.
HOSTILE = [
    [-(2**31), 2**31 - 1, 7, -9, 40],
    [0, -(2**31), -(2**31), 2**31 - 1, 2**31 - 1],
    [2**31 - 1, 0, 40, 3, 1],
    [0, 40, 0, 40, 2**31 - 1],
]

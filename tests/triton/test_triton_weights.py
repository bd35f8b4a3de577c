"""Compares attention weights of the Triton kernels, interpreted, with the reference's: its output
if value is the identity."""

import math

import pytest
import torch

pytest.importorskip("triton")

from feature_cases import case_id
from fused_attention.kernels import launch, operators, tiles
from fused_attention.operators.arguments import Arguments
from fused_attention.tools.testing import Case
from selection import quick
from triton_calls import DTYPES, PAIRS, run_weights, weights_mismatches
from triton_interpreter import use_tiles
from weights_checks import weights_inputs

pytestmark = [
    pytest.mark.usefixtures("interpreter", "small_tiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, about log(0) and 1/0
]


@pytest.mark.covering(1)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.float32, torch.bfloat16), ids=str)
def test_every_dtype(dtype, average):
    case = Case(
        dtype=dtype, B=2, Hq=4, Hkv=2, Sq=20, Sk=37, D=20, causal="bottom_right", key_padding=True
    )
    assert weights_mismatches(case, average) == []


# One case in thirty runs each time
COVERING = [
    pytest.param(
        case, number % 2 == 0, id=case_id(case), marks=[pytest.mark.slow] if number % 30 else []
    )
    for number, case in enumerate(case for case in PAIRS if case.Hq > 0)
]


@pytest.mark.parametrize("case, average", COVERING)
def test_pairs_of_features(case, average):
    """The cases are averaged or not, in turn."""
    assert weights_mismatches(case, average) == []


@pytest.mark.parametrize("average", quick([True, False], True))
def test_hidden_keys_and_blind_rows_may_hold_anything(average):
    B, H, Sq, Sk = 2, 2, 10, 24
    query, key = torch.randn(B, H, Sq, 8), torch.randn(B, H, Sk, 8)
    padding = torch.zeros(B, Sk, dtype=torch.bool)
    padding[0, 12:] = padding[1] = True
    mask = torch.ones(1, 1, Sq, Sk, dtype=torch.bool)
    mask[..., 7, :] = False
    numbers, philox = (0.3, 2, -1, -1), torch.tensor([1, 2])
    masks = (mask, None, padding, None)
    options = (*masks, None, philox, 0.0, 0.1)
    results = []
    for filling in (0.0, math.nan):
        k = key.masked_fill(padding[:, None, :, None], filling)
        q = query.clone()
        q[:, :, 7] = filling  # sees nothing
        out, lse = operators.attention_forward(q, k, k, *numbers, 0, *options)
        weights = operators.attention_weights(q, k, lse, average, *numbers, 0, *options)
        # The gradient of a weight that is 0 because it is hidden may be anything, too.
        grad = torch.linspace(-1, 1, weights.numel()).view_as(weights)
        grad = grad.masked_fill(weights == 0, filling)
        saved = (torch.zeros_like(out), None, q, k, k, out, lse, *numbers, 0, *options)
        gradients = operators.attention_backward(
            *saved, *(None,) * 6, 0, 0, 0, False, False, grad, average
        )
        results.append((weights, *gradients[:2]))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    weights, dq, dk = results[0]
    assert weights[..., 7, :].count_nonzero() == weights[1].count_nonzero() == 0
    assert weights[0, ..., 12:].count_nonzero() == 0 and weights[0].count_nonzero() > 0
    assert dq[:, :, 7].count_nonzero() == dq[1].count_nonzero() == dk[1].count_nonzero() == 0


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0), (2, 0, 3, 4)])
@pytest.mark.parametrize("average", [True, False])
def test_nothing_to_weigh(sizes, average):
    B, H, Sq, Sk = sizes
    query, key = (torch.randn(B, H, n, 8) for n in (Sq, Sk))
    lse = torch.full((B, H, Sq), -math.inf)
    weights = operators.attention_weights(query, key, lse, average, 0.3, 0, -1, -1, 0)
    assert weights.shape == ((B, Sq, Sk) if average else (B, H, Sq, Sk))
    assert weights.count_nonzero() == 0


@pytest.mark.slow
def test_wide_offsets_change_nothing(monkeypatch):
    case = Case(mask="B1QK", bias="1HQK", key_padding=True, Hq=4, sinks=True)
    inputs = weights_inputs(case, True)
    narrow = run_weights(inputs, True)
    monkeypatch.setattr(launch, "LIMIT", 1)
    for name, x in run_weights(inputs, True).items():
        assert torch.equal(x, narrow[name]), name


def test_a_launch_is_a_function_of_shapes_and_strides(monkeypatch):
    use_tiles(monkeypatch, None)
    query = torch.empty(2, 8, 1000, 64, dtype=torch.float16, device="meta")
    weights = torch.empty(2, 1, 1000, 1000, dtype=torch.float16, device="meta")
    arch = tiles.ARCHS["sm_90"]
    call = launch.describe(query, query, Arguments(0.125, 1, -1, -1, 0))
    lse = torch.empty(2, 8, 1000, device="meta")
    averaged = launch.weights_launch(query, query, lse, weights, call, 0, arch)
    sizes = tiles.attention_tiles("dq", arch, torch.float16, 64)
    blocks = -(-1000 // sizes.block_m) * -(-1000 // sizes.block_n)
    assert averaged.grid == (2 * blocks,) and averaged.args[3].stride_h == 0
    of_heads = weights.expand(2, 8, 1000, 1000)
    assert launch.weights_launch(query, query, lse, of_heads, call, 0, arch).grid == (16 * blocks,)
    assert launch.weights_gradient(None, True, 8) is None
    assert launch.weights_gradient(weights[:, 0], True, 8).share == 1 / 8

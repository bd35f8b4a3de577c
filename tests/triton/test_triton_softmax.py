"""Tests the Triton kernels of masked softmax, interpreted, through the public functions."""

import functools

import pytest
import torch

pytest.importorskip("triton")

from fused_attention import operators as ops
from fused_attention.kernels import launch, masked_softmax, operators, tiles
from softmax_checks import check, randn
from softmax_suite import (  # noqa: F401
    DTYPES,
    test_a_visible_nan_propagates_in_its_row_only,
    test_any_rank,
    test_dropout_bits_are_those_of_the_cpu,
    test_empty,
    test_every_broadcast_shape,
    test_features_together,
    test_gradient_of_a_bias_in_any_number_of_parts,
    test_hidden_values_influence_nothing,
    test_in_place,
    test_large_logits,
)

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, about log(0) and 1/0
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """Puts the operators of the Triton kernels in place of the CPU's."""
    monkeypatch.setattr(ops, "softmax_forward", operators.masked_softmax_forward)
    monkeypatch.setattr(ops, "softmax_backward", operators.masked_softmax_backward)
    monkeypatch.setattr(ops, "softmax_in_place", operators.masked_softmax_)
    monkeypatch.setattr(launch, "DBIAS_PROGRAMS", 8)


@pytest.fixture(params=["one block", "several blocks"])
def blocks(request, monkeypatch):
    """Divides rows into one block or into several, and checks that the kernels did so."""
    several = request.param == "several blocks"
    if several:
        narrow = functools.partial(tiles.softmax_tiles, max_block=16)
        monkeypatch.setattr(launch, "softmax_tiles", narrow)
    ran = set()
    run = launch.Launch.run

    def noted(self):
        ran.add(self.constants.get("ONE_BLOCK"))
        run(self)

    monkeypatch.setattr(launch.Launch, "run", noted)
    yield
    assert several != (True in ran) and several == (False in ran)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_lengths(blocks, dtype):
    for N in (17, 33, 70):
        mask = torch.rand(3, N) > 0.3
        assert not check(randn(3, N, dtype=dtype), mask, scale=0.7), N


def test_rows_longer_than_the_largest_block():
    N = tiles.MAX_SOFTMAX_BLOCK + 77
    x = randn(2, N)
    x[0, N // 2 :] += 5  # the maximum grows on the way
    assert not check(x, torch.rand(2, N) > 0.3)
    assert not check(x, bias=randn(N))
    assert not check(randn(1, 1, 1))


def test_launches_are_functions_of_shapes_and_strides():
    x = torch.empty(2, 3, 5, 20000, device="meta", dtype=torch.float16)
    call = launch.softmax_params(x.shape, 0.5, 2)
    assert (call.rows, call.columns, call.queries, call.heads) == (30, 20000, 5, 3)
    assert call.offset == 19995 and call.sizes == (2, 3, 5)
    bias = torch.empty(3, 1, 20000, device="meta")
    one = launch.softmax_launch(x, x, None, None, bias, None, call)
    assert one.kernel is masked_softmax.masked_softmax_kernel
    assert one.args[4].strides == (0, 20000, 0) and one.args[4].stride_k == 1
    assert one.grid == (30,) and not one.constants["ONE_BLOCK"]
    work = launch.RowGroups.of(bias, x.shape, one.constants["BLOCK"])
    assert work.order == (1, 0, 2) and (work.groups, work.group_rows) == (3, 10)

"""The backends of a GPU, on one, through the public functions: the cases of everywhere else."""

import dataclasses

import pytest
import torch

import fused_attention as fa
from fused_attention import attention, backends, ops, testing
from fused_attention.testing import Case
from test_features import case_id
from test_softmax import PHILOX, check, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[backends.TRITON, backends.CUDA], ids=lambda row: row.name)
def backend(request):
    if reason := request.param.missing():
        pytest.skip(reason)
    return request.param


def on_gpu(x):
    return x.cuda() if isinstance(x, torch.Tensor) else x


def moved(inputs: testing.Inputs) -> testing.Inputs:
    return testing.Inputs(
        {name: on_gpu(x) for name, x in inputs.tensors.items()},
        {name: on_gpu(x) for name, x in inputs.options.items()},
        inputs.grad_out.cuda(),
        inputs.grad_lse.cuda(),
    )


def wrong(case: Case, backend: backends.Backend) -> list[str]:
    def answer(case: Case):
        inputs = testing.make_inputs(case)
        got = testing.run(moved(inputs), backend=backend.name)
        got = {name: x.cpu() for name, x in got.items()}
        return got, testing.exact(inputs), testing.naive(inputs)

    return testing.check_answers(case, answer)


CASES = [
    dataclasses.replace(case, dtype=DTYPES[number % 3])
    for number, case in enumerate(testing.pairs_of_features())
]


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_pairs_of_features(case, backend):
    assert not wrong(case, backend)


@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_head_dims_and_lengths(dtype, head_dim, backend):
    for Sq, Sk in ((512, 512), (1000, 777), (1, 3000)):
        sizes = {"Sq": Sq, "Sk": Sk, "D": head_dim, "Dv": head_dim, "Hq": 4}
        assert not wrong(Case(dtype=dtype, **sizes, causal="bottom_right"), backend)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_bits_are_those_of_the_cpu(p):
    expected = fa.dropout_mask(PHILOX, p, 2, 3, 170, 333)
    got = ops.dropout_keep_mask(PHILOX.cuda(), p, 2, 3, 170, 333)
    assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("columns", [17, 1000, 8192 + 77])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype, columns):
    x = randn(2, 3, 5, columns, dtype=dtype).cuda()
    assert not check(x, (torch.rand(2, 1, 5, columns) > 0.4).cuda(), scale=0.7)


def test_twice_the_same_bits(backend):
    inputs = moved(testing.make_inputs(Case(dtype=torch.bfloat16, Sq=500, Sk=600, bias="11QK")))
    first, second = (testing.run(inputs, backend=backend.name) for _ in range(2))
    assert all(torch.equal(x, second[name]) for name, x in first.items())


def test_streams_and_graphs(backend):
    """Launches go to the current stream, and a CUDA graph replays them."""
    query, key, value = (
        torch.randn(2, 4, 256, 64, device="cuda", dtype=torch.float16) for _ in range(3)
    )
    expected = attention(query, key, value, backend=backend.name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = attention(query, key, value, backend=backend.name)
    stream.synchronize()
    assert torch.equal(got, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attention(query, key, value, backend=backend.name)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, expected)

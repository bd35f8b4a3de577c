"""Runs the cases of the other tests on a GPU, with its backends, through the public functions.

TRITON_INTERPRET=0 pytest tests/gpu
"""

import dataclasses
import functools
import itertools
import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

import cache_checks
import corner_checks
import decode_checks
import fused_attention as fa
import varlen_checks
import weights_checks
from feature_cases import case_id
from fused_attention import attention, kv_cache_append_, patch_sdpa
from fused_attention.attention_weights import attention_with_weights
from fused_attention.call import backends
from fused_attention.models.attend import pad
from fused_attention.models.generate import generate
from fused_attention.operators import gpu
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from small_transformers import SOURCES, TARGETS, model_of
from softmax_checks import PHILOX, check, randn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that PyTorch can use"),
    pytest.mark.skipif(
        os.environ["TRITON_INTERPRET"] == "1", reason="Triton interprets: set TRITON_INTERPRET=0"
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(params=[backends.TRITON, backends.CUDA], ids=lambda row: row.name)
def backend(request):
    if reason := request.param.missing():
        pytest.skip(reason)
    return request.param


def on_gpu(x):
    """Copies x with its strides, which Tensor.cuda() does not keep for views with gaps."""
    if not isinstance(x, torch.Tensor) or x.is_cuda:
        return x
    if 0 in x.stride() or x.numel() == 0:
        return x.cuda()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x)


def on_cpu(x):
    return x.cpu() if isinstance(x, torch.Tensor) else x


def there(function, **fixed):
    """Returns `function` run on the GPU for tensors on the CPU, differentiable as before."""

    def call(*args, **options):
        args, options = tree_map(on_gpu, (args, options | fixed))
        return tree_map(on_cpu, function(*args, **options))

    return call


def moved(inputs: testing.Inputs) -> testing.Inputs:
    return testing.Inputs(
        tree_map(on_gpu, inputs.tensors),
        tree_map(on_gpu, inputs.options),
        on_gpu(inputs.grad_out),
        on_gpu(inputs.grad_lse),
    )


def wrong(case: Case, backend: backends.Backend) -> list[str]:
    def answer(case: Case):
        inputs = testing.make_inputs(case)
        got = testing.run(moved(inputs), backend=backend.name)
        return tree_map(on_cpu, got), testing.exact(inputs), testing.naive(inputs)

    return testing.check_answers(case, answer)


# -- Features and sizes ------------------------------------------------------------------

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


# Calls for the kernels without per-score options, among them the kernels with TMA and wgmma.
SCALE_ONLY = {
    "full": {},
    "causal": {"causal": "top_left"},
    "causal, more queries": {"causal": "bottom_right", "Sq": 700},
    "window": {"window_size": (200, 100)},
    "narrow window": {"window_size": (3, -1), "causal": "bottom_right"},
    "sinks": {"sinks": True, "causal": "bottom_right"},
    "one key head": {"Hkv": 1},
    "BSHD": {"memory_format": "BSHD", "causal": "bottom_right"},
    "other width of values": {"Dv": 40},
    "few keys": {"Sk": 5},
    "no row sees a key": {"causal": "bottom_right", "Sq": 900, "Sk": 70},
}


@pytest.mark.parametrize("name", SCALE_ONLY)
@pytest.mark.parametrize("dtype, head_dim", list(itertools.product(DTYPES[1:], (64, 128))), ids=str)
def test_kernels_without_options(dtype, head_dim, name, backend):
    case = Case(dtype=dtype, Hq=4, Hkv=2, Sq=391, Sk=523, D=head_dim, Dv=head_dim)
    assert not wrong(dataclasses.replace(case, **SCALE_ONLY[name]), backend)


@pytest.mark.parametrize(
    "precision, allowed", [("highest", 1e-5), ("high", 2e-4), ("medium", 5e-2)]
)
def test_precisions_of_float32(precision, allowed, backend):
    inputs = testing.make_inputs(Case(Sq=300, Sk=400, D=64, Dv=64, Hq=4))
    torch.set_float32_matmul_precision(precision)
    try:
        got = testing.run(moved(inputs), backend=backend.name)
    finally:
        torch.set_float32_matmul_precision("highest")
    want = testing.exact(inputs)
    for name, x in got.items():
        assert (x.cpu() - want[name]).abs().max() < allowed * want[name].abs().max(), name


@pytest.mark.parametrize("Sq", [3, 200])
def test_more_than_2_to_the_31_elements(Sq, backend):
    """The last head gives what it gives alone."""
    Sk = 2**23 + 70
    query = torch.randn(1, 4, Sq, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(1, 4, Sk, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    window = {"causal": "bottom_right", "window_size": (5000, 0)}
    for options in ({}, window):
        out = attention(query, key, value, backend=backend.name, **options)
        alone = [x[:, 3:].contiguous() for x in (query, key, value)]
        want = attention(*alone, backend=backend.name, **options)
        torch.testing.assert_close(out[:, 3:], want, atol=1e-5, rtol=2e-2)
        assert want.abs().max() > 0


# -- Sequences, decoding, caches, weights ------------------------------------------------


@pytest.fixture
def elsewhere(backend, monkeypatch):
    """Makes the checks of other tests call the backend on the GPU."""
    for module in (varlen_checks, decode_checks, cache_checks, corner_checks):
        monkeypatch.setattr(module, "attention", there(attention, backend=backend.name))
    monkeypatch.setattr(testing, "DTYPES", (*DTYPES, torch.bfloat16))  # float64 is not served


def one_dtype(*parameters):
    """Returns a dtype that depends on the parameters, so that each dtype occurs."""
    return DTYPES[sum(map(len, map(str, parameters))) % 3]


@pytest.mark.parametrize("page_size", [None, 7, 64])
@pytest.mark.parametrize("lengths", ["prompts", "decode"])
@pytest.mark.parametrize("name", varlen_checks.OPTIONS)
def test_packed(name, lengths, page_size, elsewhere):
    each = varlen_checks.LENGTHS if lengths == "prompts" else varlen_checks.DECODED
    dtype = one_dtype(name, lengths, page_size)
    varlen_checks.check_packed(name, dtype, each, page_size)


@pytest.mark.parametrize("page_size", [None, 7])
@pytest.mark.parametrize("name", varlen_checks.OPTIONS)
def test_gradients_of_packed(name, page_size, elsewhere):
    varlen_checks.check_gradients_of_packed(name, page_size)


@pytest.mark.parametrize("page_size", [None, 128])
@pytest.mark.parametrize("dtype, head_dim", list(itertools.product(DTYPES[1:], (64, 128))), ids=str)
def test_long_packed_sequences(dtype, head_dim, page_size, elsewhere, monkeypatch):
    """Uses whole tiles, which TMA copies on a GPU that has it."""
    wide = dataclasses.replace(varlen_checks.SCALE_ONLY, dtype=dtype, D=head_dim, Dv=head_dim)
    options = {"full": wide, "causal": dataclasses.replace(wide, causal="bottom_right")}
    monkeypatch.setattr(varlen_checks, "OPTIONS", options)
    monkeypatch.setattr(varlen_checks, "LENGTHS", [(300, 450), (0, 9), (129, 700), (257, 256)])
    monkeypatch.setattr(testing, "DTYPES", (dtype,) * 4)
    for name in options:
        varlen_checks.check_packed(name, dtype, varlen_checks.LENGTHS, page_size)
        varlen_checks.check_gradients_of_packed(name, page_size)


@pytest.mark.parametrize("page_size", [None, 5])
@pytest.mark.parametrize("Sq", [1, 60])
@pytest.mark.parametrize("name", varlen_checks.OPTIONS | varlen_checks.SCORES)
def test_used_lengths_and_pages(name, Sq, page_size, elsewhere):
    varlen_checks.check_used_lengths_and_pages(name, Sq, page_size)


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("name", varlen_checks.OPTIONS | varlen_checks.SCORES)
def test_gradients_of_used_lengths_and_pages(name, page_size, elsewhere):
    varlen_checks.check_gradients_of_used_lengths_and_pages(name, page_size)


@pytest.mark.parametrize("name", [x for x, case in decode_checks.CASES.items() if case.D <= 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_cases(dtype, name, elsewhere):
    decode_checks.check_case(name, dtype)


@pytest.mark.parametrize("paged", [False, True])
def test_generation_from_a_cache(paged, elsewhere, monkeypatch):
    monkeypatch.setattr(cache_checks, "kv_cache_append_", append)
    cache_checks.check_generation(paged)


def append(*tensors):
    """kv_cache_append_ on the GPU; its first two arguments are changed."""
    given = [on_gpu(x) for x in tensors]
    kv_cache_append_(*given)
    for x, changed in zip(tensors[:2], given, strict=False):
        x.copy_(changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cache_append(dtype, monkeypatch):
    monkeypatch.setattr(cache_checks, "kv_cache_append_", append)
    cache_checks.check_dense(dtype, 4)
    for page_size in (1, 3, 256):
        cache_checks.check_paged(page_size, 40)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("number", range(0, len(weights_checks.COVERING), 3))
def test_weights_of_pairs_of_features(number, average, monkeypatch):
    monkeypatch.setattr(weights_checks, "attention_with_weights", there(attention_with_weights))
    case = dataclasses.replace(weights_checks.COVERING[number], dtype=DTYPES[number % 3])
    assert weights_checks.mismatches(case, average) == []


# -- Corner cases ------------------------------------------------------------------------


@pytest.mark.parametrize("how", corner_checks.NOT_SEEN)
@pytest.mark.parametrize("junk", [float("nan"), float("inf")])
def test_keys_that_nobody_sees_influence_nothing(how, junk, elsewhere):
    for dtype in DTYPES:
        corner_checks.check_unseen_keys(how, junk, dtype)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_see_nothing(sinks, elsewhere):
    for dtype in DTYPES:
        corner_checks.check_blind_rows(dtype, sinks)


# -- Softmax and dropout -----------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_bits_are_those_of_the_cpu(p):
    expected = fa.dropout_mask(2, 3, 170, 333, p, PHILOX)
    got = fa.dropout_mask(2, 3, 170, 333, p, PHILOX.cuda(), device="cuda")
    assert got.is_cuda
    assert torch.equal(got.cpu(), expected)


@pytest.fixture(params=["cuda", "triton"])
def softmax_there(request, monkeypatch):
    """Makes softmax_checks call masked_softmax with the kernels of one library on the GPU."""
    if request.param == "triton":
        from fused_attention.kernels import operators

        monkeypatch.setattr(gpu, "gpu_kernel", functools.partial(getattr, operators))
    elif backends.CUDA.missing():
        pytest.skip(backends.CUDA.missing())
    monkeypatch.setattr(fa, "masked_softmax", there(fa.masked_softmax))


@pytest.mark.parametrize("columns", [17, 1000, 4096, 8192 + 77, 40000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_softmax(dtype, columns, softmax_there):
    x = randn(2, 3, 5, columns, dtype=dtype)
    assert not check(x, torch.rand(2, 1, 5, columns) > 0.4, scale=0.7)
    bias, sinks = randn(1, 3, 5, columns), randn(3)
    assert not check(x, bias=bias, sinks=sinks, causal="bottom_right")
    assert not check(x, dropout_p=0.3)


# -- Determinism, streams, graphs --------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"bias": "11QK"}, {}, {"causal": "top_left", "sinks": True}], ids=str
)
def test_twice_the_same_bits(options, backend):
    case = Case(dtype=torch.bfloat16, Sq=500, Sk=600, D=64, Dv=64, Hq=4, **options)
    inputs = moved(testing.make_inputs(case))
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


def test_memory_is_linear_in_the_length(backend):
    def peak(S):
        tensors = [
            torch.randn(1, 4, S, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        ]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*tensors, causal="top_left", backend=backend.name).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 4.5 * peak(2048)


# -- Features of PyTorch around a call ---------------------------------------------------


def test_compile(backend):
    """Inductor compiles a call without graph breaks, gradients included."""
    leaves = [
        torch.randn(2, 4, 200, 64, device="cuda", dtype=torch.float16, requires_grad=True)
        for _ in range(3)
    ]

    def function(query, key, value):
        x = attention(query * 2, key, value, causal="top_left", backend=backend.name)
        return x * 3

    results = []
    for call in (function, torch.compile(function, fullgraph=True)):
        out = call(*leaves)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_autocast(backend):
    query = torch.randn(1, 2, 70, 32, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(query, query, query, backend=backend.name)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert query.grad.dtype == torch.float32 and query.grad.isfinite().all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention(need_weights):
    torch.manual_seed(3)
    theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True, device="cuda")
    own = fa.MultiheadAttention.from_torch(theirs)
    x = torch.randn(3, 50, 64, device="cuda", requires_grad=True)
    padding = (torch.arange(50) > 40).expand(3, 50).cuda()
    results = []
    for module in (theirs, own):
        out, weights = module(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        gradients = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
        results.append([out, *gradients, *([weights] if need_weights else [])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-3)


def test_patch_sdpa():
    x = [torch.randn(2, 4, 60, 32, device="cuda", dtype=torch.float16) for _ in range(3)]
    expected = F.scaled_dot_product_attention(*x, is_causal=True)
    with patch_sdpa():
        got = F.scaled_dot_product_attention(*x, is_causal=True)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_generation_of_a_model():
    """Greedy generation with a growing cache gives the tokens of naive attention on the CPU."""
    tokens = []
    for kind, device in (("naive", "cpu"), ("fused", "cuda")):
        model = model_of("norm first", kind).to(device)
        source, layout = pad(SOURCES)
        layout = dataclasses.replace(layout, lengths=layout.lengths.to(device))
        memory = model.encode(source.to(device), layout)
        tokens.append(generate(model, TARGETS, memory, max_new_tokens=6))
    assert tokens[0] == tokens[1]

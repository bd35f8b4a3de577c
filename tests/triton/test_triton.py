"""Compares the Triton kernels, in Triton's interpreter, with the definition.

The tiles are small, so that small problems have several blocks in each direction.
test_triton_compile.py tests what the interpreter cannot show: what the compiler accepts and emits.
"""

import itertools
import math
import os

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

import nothing_seen
from feature_cases import case_id
from fused_attention import operators as ops
from fused_attention import reference
from fused_attention.kernels import launch, operators, tiles
from fused_attention.kernels.primitives import packed_block, visible_block_range
from fused_attention.operators import fake
from fused_attention.operators.arguments import Arguments
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments
from selection import quick
from triton_calls import DTYPES, PAIRS, SMALL, run, smaller
from triton_interpreter import use_tiles

INF, NAN = math.inf, math.nan
pytestmark = [
    pytest.mark.usefixtures("interpreter", "small_tiles"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, about log(0) and 1/0
]


# The multiple of the naive error that is allowed in float32; it is 2 otherwise. The interpreter's
# products and exponentials are numpy's, those of the naive computation are PyTorch's, and how they
# compare depends on the machine. test_kernels.py holds the compiled kernels to 2.
FACTOR_FLOAT32 = 3.0


def check(case: Case) -> None:
    def answer(case: Case):
        inputs = testing.make_inputs(case)
        return run(inputs), testing.exact(inputs), testing.naive(inputs)

    factor = FACTOR_FLOAT32 if case.dtype == torch.float32 else 2.0
    assert not testing.check_answers(case, answer, factor)


def forward(query, key, value, **options):
    """Calls the operator with the argument names of `attention`, and returns (out, lse)."""
    inputs = testing.Inputs(
        {"query": query, "key": key, "value": value}
        | {name: options.pop(name) for name in ("bias", "sinks") if name in options},
        {"causal": False, "window_size": (-1, -1), "scale": None, "softcap": 0.0, "dropout_p": 0.0}
        | options,
        torch.empty(0),
        torch.empty(0),
    )
    return operators.attention_forward(query, key, value, *arguments(inputs))


def gradients(out, lse, query, key, value, grad_out=None, **options):
    names = ("mask", "bias", "key_padding_mask", "alibi_slopes", "sinks")
    rest = [options.get(name) for name in names]
    causal = {False: 0, "top_left": 1, "bottom_right": 2}[options.get("causal", False)]
    numbers = (query.shape[-1] ** -0.5, causal, *options.get("window_size", (-1, -1)), 0)
    grad_out = torch.randn_like(out) if grad_out is None else grad_out
    return operators.attention_backward(
        grad_out, None, query, key, value, out, lse, *numbers, *rest
    )[:3]


# -- The matrix of features ----------------------------------------------------------------


@pytest.mark.parametrize("case", quick(PAIRS, *PAIRS[::4]), ids=case_id)
def test_pairs_of_features(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_random_combinations_of_features(part):
    for case in testing.random_features(20, seed=part):
        inputs = testing.make_inputs(smaller(case))
        wrong = testing.mismatches(run(inputs), testing.exact(inputs), testing.naive(inputs), 4.0)
        assert not wrong, case


@pytest.mark.parametrize("head_dim", [1, 5, 16, 17, 96, 128, 200, 256])
def test_head_dims(head_dim):
    check(Case(dtype=torch.float16, B=1, Hq=1, Hkv=1, Sq=9, Sk=18, D=head_dim, Dv=head_dim))


TILES = [(16, 32), (32, 16), (64, 64), (128, 32)]


@pytest.mark.parametrize(
    "block_m, block_n",
    [pytest.param(*x, marks=() if x == (16, 32) else pytest.mark.slow) for x in TILES],
)
def test_tiles(monkeypatch, block_m, block_n):
    """Every tile gives the right answer, also if one block holds everything."""
    use_tiles(monkeypatch, tiles.Tiles(block_m, block_n, 4, 1))
    for causal, window in (("bottom_right", (-1, -1)), (False, (9, 5)), (False, (-1, -1))):
        sizes = {"B": 1, "Hq": 2, "Hkv": 1, "Sq": 64, "Sk": 96}
        check(Case(**sizes, causal=causal, window_size=window, dropout_p=0.2, bias="11QK"))


def test_the_tiles_of_the_table(monkeypatch):
    use_tiles(monkeypatch, None)
    for dtype in DTYPES:
        check(Case(dtype=dtype, B=1, Hq=2, Hkv=1, Sq=100, Sk=130, D=40, Dv=40, causal="top_left"))


# -- Dropout -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed, offset", [(0, 0), (-1, 2**32 + 5), (0x123456789ABCDEF, 2**31)])
def test_dropout_bits_are_those_of_the_cpu(seed, offset):
    philox = torch.tensor([seed, offset])
    for p, sizes in itertools.product([0.0, 0.1, 0.5, 1.0], [(2, 3, 17, 133), (1, 1, 1, 1)]):
        expected = ops.dropout_keep_mask(philox, p, *sizes)
        assert torch.equal(operators.dropout_keep_mask(philox, p, *sizes), expected)


def test_the_weights_that_attention_drops_are_those_of_the_mask():
    """With value = 1 on the diagonal, out is the weights themselves."""
    philox = torch.tensor([7, 3])
    query, key = torch.randn(2, 2, 20, 8), torch.randn(2, 2, 40, 8)
    value = torch.eye(40).expand(2, 2, 40, 40)
    out, _ = forward(query, key, value, dropout_p=0.3, philox=philox)
    assert torch.equal(out != 0, ops.dropout_keep_mask(philox, 0.3, 2, 2, 20, 40))


# -- Hidden keys and blind queries ---------------------------------------------------------

Sq, Sk = 21, 43
NOT_SEEN = {
    "key padding": {"key_padding_mask": torch.arange(Sk).expand(2, Sk) % 3 == 1},
    "mask column": {"mask": (torch.arange(Sk) % 3 != 1).expand(1, 1, Sq, Sk).contiguous()},
    "broadcast mask column": {"mask": (torch.arange(Sk) % 3 != 1).view(1, 1, 1, Sk)},
    "right of a causal mask": {"causal": "top_left"},
    "left of a window": {"causal": "bottom_right", "window_size": (4, 0)},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("how", quick(NOT_SEEN, "mask column", "left of a window"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_nobody_sees_influence_nothing(how, dtype):
    options = NOT_SEEN[how]
    query, key, value, grad = (
        torch.randn(2, 2, S, D).to(dtype) for S, D in ((Sq, 20), (Sk, 20), (Sk, 12), (Sq, 12))
    )
    used = torch.full((2,), Sk)
    off = reference.diagonal_offset(options.get("causal", False), Sq, used)
    names = ("causal", "window_size", "mask", "key_padding_mask")
    chosen = {name: options[name] for name in names if name in options}
    hidden = ~reference.visible((2, 2, Sq, Sk), off, used, **chosen).any(2)
    assert hidden.any() and not hidden.all()
    results = []
    for fill in (0.0, NAN, INF):
        k, v = (x.masked_fill(hidden.unsqueeze(-1), fill) for x in (key, value))
        out, lse = forward(query, k, v, **options)
        results.append((out, lse, *gradients(out, lse, query, k, v, grad, **options)))
    for clean, *dirty in zip(*results, strict=True):
        assert all(torch.equal(clean, x) for x in dirty)
    dk, dv = results[1][3:]
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all()


@pytest.mark.covering(1)
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(dtype, sinks):
    query, key, value = (torch.randn(2, 2, S, 12).to(dtype) for S in (Sq, Sk, Sk))
    blind = torch.arange(Sq) % 5 == 2
    mask = (torch.rand(1, 1, Sq, Sk) < 0.8) & ~blind.view(Sq, 1)
    query[:, :, blind] = NAN  # must not reach the results of other rows
    sink = torch.randn(2) if sinks else None
    options = {"mask": mask, "sinks": sink} if sinks else {"mask": mask}
    out, lse = forward(query, key, value, **options)
    assert (out[:, :, blind] == 0).all()
    expected = torch.full_like(lse, -INF) if sink is None else sink.view(1, 2, 1).expand_as(lse)
    torch.testing.assert_close(lse[:, :, blind], expected[:, :, blind])
    grad = torch.randn_like(out)
    grad[:, :, blind] = NAN
    dq, dk, dv = gradients(out, lse, query, key, value, grad, **options)
    assert (dq[:, :, blind] == 0).all()
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))


def test_a_fully_padded_sample_is_zero():
    query, key, value = (torch.randn(2, 2, S, 12) for S in (Sq, Sk, Sk))
    padding = torch.tensor([[False], [True]]).expand(2, Sk)
    out, lse = forward(query, key, value, key_padding_mask=padding)
    assert (out[1] == 0).all() and (out[0] != 0).any()
    for gradient in gradients(out, lse, query, key, value, key_padding_mask=padding):
        assert (gradient[1] == 0).all() and gradient[0].isfinite().all()


@pytest.mark.parametrize("bad", quick([NAN, INF], NAN))
@pytest.mark.parametrize("name", quick(nothing_seen.UNSEEN, "mask"))
def test_gradients_of_unseen_keys_are_zero_beside_nan(name, bad):
    nothing_seen.check_gradients_of_unseen_keys(run, name, bad)


@pytest.mark.parametrize("bad", quick([NAN, INF], INF))
@pytest.mark.parametrize("name", quick(nothing_seen.BLIND, nothing_seen.BLIND[1]))
def test_results_of_blind_queries_are_zero_beside_nan(name, bad):
    nothing_seen.check_results_of_blind_queries(run, name, bad)


# -- Visible NaN, infinity and large numbers -----------------------------------------------


@pytest.mark.parametrize("special", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key", "value", "bias"])
def test_nan_and_infinity_propagate_as_in_the_definition(special, where):
    inputs = testing.make_inputs(Case(Sq=20, Sk=37, bias="1HQK"))
    inputs.tensors[where][0, 1, 11, 2] = special
    got = forward(**inputs.tensors)[0]
    exact = reference.attention_reference(**{k: x.double() for k, x in inputs.tensors.items()})
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got[got.isinf()].double(), exact[exact.isinf()])
    fine = exact.isfinite()
    torch.testing.assert_close(got[fine].double(), exact[fine], atol=1e-5, rtol=1e-5)


def test_a_nan_in_a_query_stays():
    query, key, value = (torch.randn(1, 2, S, 12) for S in (Sq, Sk, Sk))
    query[0, 1, 7, 3] = NAN
    out, lse = forward(query, key, value)
    expected = torch.zeros_like(lse, dtype=torch.bool)
    expected[0, 1, 7] = True
    assert torch.equal(lse.isnan(), expected)
    assert torch.equal(out.isnan(), expected.unsqueeze(-1).expand_as(out))


@pytest.mark.parametrize("where", quick(nothing_seen.PLACES, "query"))
@pytest.mark.parametrize("name", quick(nothing_seen.WINDOWS, "window"))
def test_nan_stays_beside_hidden_keys(name, where):
    nothing_seen.check_nan_stays(run, name, where)


@pytest.mark.parametrize(
    "fields", quick([{"Sk": 32}, {}, {"sinks": True}, {"bias": "11QK"}], {"Sk": 32}), ids=str
)
def test_logits_of_minus_infinity(fields):
    nothing_seen.check_logits_of_minus_infinity(run, torch.float32, **fields)


@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
def test_the_lowest_number_as_a_bias_is_a_number(dtype):
    inputs = testing.make_inputs(Case(dtype=dtype, Sq=20, Sk=40, bias="11QK"))
    bias = inputs.tensors["bias"]
    bias[..., 20:] = torch.finfo(dtype).min
    bias[..., 7, :] = torch.finfo(dtype).min
    got, tolerance = run(inputs), 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        got["out"].double(), testing.exact(inputs)["out"], atol=tolerance, rtol=tolerance
    )
    assert all(x.isfinite().all() for name, x in got.items() if name != "lse")


def test_large_scores_do_not_overflow():
    query, key, value = (torch.randn(1, 1, S, 12) for S in (Sq, Sk, Sk))
    out, _ = forward(query * 1e4, key * 1e4, value)
    exact = reference.attention_reference(query.double() * 1e4, key.double() * 1e4, value.double())
    torch.testing.assert_close(out, exact.float(), atol=1e-4, rtol=1e-4)


# -- Sizes and memory ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [{"B": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0}, {"Sk": 0}], ids=str)
@pytest.mark.parametrize("bias", [None, "BHQK", "1H1K"])
def test_empty(shape, bias):
    sizes = {"B": 2, "Hq": 3, "Hkv": 3, "Sq": 5, "Sk": 7, "D": 8, "Dv": 8} | shape
    inputs = testing.make_inputs(Case(**sizes, bias=bias, sinks=True))
    got = run(inputs)
    for name, want in testing.exact(inputs).items():
        torch.testing.assert_close(got[name], want.to(got[name].dtype), msg=name)


@pytest.mark.parametrize("zero", quick(nothing_seen.EMPTY, *nothing_seen.OFTEN), ids="-".join)
@pytest.mark.parametrize("few", quick([False, True], True))
def test_sizes_of_0(monkeypatch, zero, few):
    """few: attention_decode serves the call, in two splits if there are keys."""
    if few:
        monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 64)
        monkeypatch.setattr(tiles, "MIN_SPLIT_KEYS", 3)
    nothing_seen.check_empty(run, zero, sinks=True, bias="1H1K", mask="11QK")


def test_a_huge_batch_of_nothing_starts_nothing(monkeypatch):
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 64)
    started = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: started.append(self.grid[0]))
    nothing_seen.check_huge(operators)
    rows, philox = torch.empty(nothing_seen.HUGE, 0), torch.tensor([1, 2])
    operators.masked_softmax_backward(rows, rows, 1.0, 0, rows, bias_grad=True)
    keep = operators.dropout_keep_mask(philox, 0.5, 1, nothing_seen.HUGE, 1, 0)
    assert keep.shape == (1, nothing_seen.HUGE, 1, 0)
    caches = [torch.empty(2, 3, 9, 0), torch.empty(2, 3, 9, 0)]
    operators.kv_cache_append_(*caches, *caches, torch.zeros(2, dtype=torch.int32))
    assert len(started) > 8 and set(started) == {0}


def test_outputs_lie_in_memory_as_the_fake_kernels_say():
    for layout in ("BHSD", "BSHD", "strided"):
        inputs = testing.make_inputs(Case(memory_format=layout, Dv=8, Hkv=1))
        got = run(inputs)
        for name, like in (("out", "query"), ("dquery", "query"), ("dkey", "key")):
            expected = fake.empty_like_format(inputs.tensors[like], got[name].shape[-1])
            assert got[name].stride() == expected.stride()


def test_offsets_beyond_2_to_the_31():
    """Offsets of rows, also of rows in one tile, exceed 2^31. Untouched pages cost nothing."""
    stride = 2**30
    pool = torch.empty(5 * stride + 64, dtype=torch.float16)
    key = pool.as_strided((1, 1, 5, 16), (0, 0, stride, 1))
    key.copy_(torch.randn(1, 1, 5, 16))
    value = key.flip(2).contiguous()
    query = torch.randn(1, 1, 2, 16).half()
    call = launch.describe(query, key, Arguments(1.0, 0, -1, -1, 0))
    wide = launch.forward_launch(query, key, value, query, None, call, 0, tiles.INTERPRETER, SMALL)
    assert wide.constants["INDEX"] is tl.int64
    out, lse = forward(query, key, value)
    expected = forward(query, key.contiguous(), value)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    got = gradients(out, lse, query, key, value, torch.ones_like(out))
    want = gradients(out, lse, query, key.contiguous(), value, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_wide_offsets_change_nothing(monkeypatch):
    inputs = testing.make_inputs(Case(mask="B1QK", bias="1HQK", key_padding=True, Hq=4))
    narrow = run(inputs)
    monkeypatch.setattr(launch, "LIMIT", 1)
    for name, x in run(inputs).items():
        assert torch.equal(x, narrow[name]), name


def test_masks_and_biases_of_any_stride():
    query, key, value = (torch.randn(2, 2, S, 12) for S in (Sq, Sk, Sk))
    mask = (torch.rand(2, 1, Sk, Sq) > 0.3).mT
    bias = torch.randn(1, 2, Sq, 2 * Sk)[..., 1::2]
    padding = (torch.rand(Sk, 2) > 0.5).T
    strided = {"mask": mask, "bias": bias, "key_padding_mask": padding}
    contiguous = {name: x.contiguous() for name, x in strided.items()}
    for a, b in zip(
        forward(query, key, value, **strided),
        forward(query, key, value, **contiguous),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.covering(1)
@pytest.mark.parametrize("programs", [1, 3, 512])
@pytest.mark.parametrize("bias", ["BHQK", "1HQK", "111K", "11Q1", "1111"])
def test_the_gradient_of_a_bias_in_any_number_of_parts(monkeypatch, programs, bias):
    monkeypatch.setattr(launch, "DBIAS_PROGRAMS", programs)
    check(Case(Sq=21, Sk=35, bias=bias, causal="bottom_right"))


# -- Launches ------------------------------------------------------------------------------


def meta(*shape, dtype=torch.float16):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_launch_is_a_function_of_shapes_and_strides(monkeypatch):
    use_tiles(monkeypatch, None)
    query, key = meta(2, 8, 1000, 64), meta(2, 2, 777, 64)
    lse = meta(2, 8, 1000, dtype=torch.float32)
    call = launch.describe(query, key, Arguments(0.125, 2, -1, -1, 0))
    assert (call.Hq, call.group, call.Sq, call.Sk) == (8, 4, 1000, 777)
    assert (call.offset, call.left, call.right, call.softcap) == (None, None, 0, None)
    arch = tiles.ARCHS["sm_80"]
    one = launch.forward_launch(query, key, key, query, lse, call, 0, arch)
    sizes = tiles.attention_tiles("forward", arch, torch.float16, 64)
    assert one.grid == (2 * 8 * -(-1000 // sizes.block_m),)
    assert one.num_warps == sizes.num_warps and one.num_stages == sizes.num_stages
    assert one.constants["SCALE_ONLY"] and not one.constants["EVEN_N"]
    assert one.constants["BLOCK_D"] == 64 and one.constants["INDEX"] is tl.int32
    assert one == launch.forward_launch(query, key, key, query, lse, call, 0, arch)
    windows = launch.describe(query, key, Arguments(0.125, 0, 5, 10**6, 0))
    assert (windows.left, windows.right) == (5, None)
    assert not launch.forward_launch(
        query, key, key, query, lse, call._replace(scale=-1.0), 0, arch
    ).constants["SCALE_ONLY"]


@pytest.mark.parametrize("before", [None, "0"])
@pytest.mark.parametrize("lacks_fences", [False, True])
def test_old_versions_compile_without_wgmma(monkeypatch, lacks_fences, before):
    class Kernel:
        seen = ()

        def __getitem__(self, grid):
            return lambda **options: setattr(self, "seen", os.environ.get("DISABLE_MMA_V3"))

    monkeypatch.setattr(launch, "LACKS_FENCES", lacks_fences)
    if before is None:
        monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
    else:
        monkeypatch.setenv("DISABLE_MMA_V3", before)
    kernel = Kernel()
    launch.Launch(kernel, (1,), (), {}, 4, 1).run()
    assert kernel.seen == ("1" if lacks_fences else before)
    assert os.environ.get("DISABLE_MMA_V3") == before


BY_DESCRIPTOR = {
    "dense": ({}, True),
    "other layout": ({"memory_format": "BSHD", "dtype": torch.bfloat16}, True),
    "head size 40": ({"D": 40}, True),
    "one head": ({"H": 1, "B": 1, "D": 100}, False),  # rows of 200 bytes
    "one row": ({"S": 1, "H": 1, "B": 1, "D": 100}, True),  # the stride of rows is not used
    "head size 36": ({"D": 36}, False),
    "float32": ({"dtype": torch.float32}, False),
    "sm_80": ({"arch": "sm_80"}, False),
    "AMD": ({"arch": "gfx942"}, False),
    "the same head for all": ({"expand": 1}, False),
    "an address between": ({"first": 1}, False),
    "no row": ({"S": 0}, False),
    "mask": ({"mask": meta(1, 1, 9, 300, dtype=torch.bool)}, False),
    "key padding": ({"key_padding": meta(2, 300, dtype=torch.bool)}, False),
}


@pytest.mark.parametrize("name", BY_DESCRIPTOR)
def test_whose_tiles_come_by_descriptor(name):
    how, expected = BY_DESCRIPTOR[name]
    how = {"B": 2, "H": 4, "S": 300, "D": 64, "dtype": torch.float16, "arch": "sm_90"} | how
    B, H, S, D = (how[x] for x in "BHSD")
    x = meta(B, S, H, D + how.get("first", 0), dtype=how["dtype"])[..., how.get("first", 0) :]
    x = (
        x.transpose(1, 2)
        if how.get("memory_format")
        else meta(*x.transpose(1, 2).shape, dtype=x.dtype)
    )
    if "first" in how:
        x = torch.empty(B * H * S * D + 1, dtype=x.dtype)[1:].view(B, H, S, D)
    if "expand" in how:
        x = x[:, :1].expand(-1, H, -1, -1)
    masks = {"mask": how.get("mask"), "key_padding_mask": how.get("key_padding")}
    call = launch.describe(x, x, Arguments(0.125, 0, -1, -1, 0, **masks))
    one = launch.descriptor(x, 128, call, tiles.ARCHS[how["arch"]])
    assert (one is not None) == expected
    if one is not None:
        assert one.shape == list(x.shape)
        assert one.block_shape == [1, 1, 128, tiles.padded_head_dim(D)]
        assert all(own == x.stride(i) for i, own in enumerate(one.strides) if x.shape[i] > 1)


def test_tiles_that_cross_pages_do_not_come_by_descriptor():
    query, pages = meta(2, 4, 9, 64), meta(99, 48, 2, 64).transpose(1, 2)
    table = meta(2, 7, dtype=torch.int32)
    call = launch.describe(query, pages, Arguments(0.125, 0, -1, -1, 0, block_table=table))
    for block, expected in ((16, True), (32, False)):
        own = launch.for_tiles(call, tiles.Tiles(64, block, 4, 2))
        one = launch.descriptor(pages, block, own, tiles.ARCHS["sm_90"])
        assert (one is not None) == expected


def test_warps_are_specialized_only_where_the_compiler_takes_it():
    x, lse = meta(2, 4, 1024, 64), meta(2, 4, 1024, dtype=torch.float32)
    special = tiles.Tiles(128, 128, 8, 2, warp_specialize=True)

    def is_special(x, causal, arch, chosen=special):
        call = launch.describe(x, x, Arguments(0.125, causal, -1, -1, 0))
        one = launch.forward_launch(x, x, x, x, lse, call, 0, tiles.ARCHS[arch], chosen)
        return one.constants["SPECIALIZE"]

    assert is_special(x, 0, "sm_100")
    assert not is_special(x, 0, "sm_100", special._replace(warp_specialize=False))
    assert not is_special(x, 1, "sm_100") and not is_special(x, 0, "sm_90")
    assert not is_special(x[:, :, :1000], 0, "sm_100")  # a ragged end
    assert not is_special(x.float(), 0, "sm_100")  # no descriptor


def test_strides_of_broadcast_operands_are_zero():
    x = launch.score_view(meta(1, 8, 1, 777))
    assert (x.stride_b, x.stride_h, x.stride_q, x.stride_k) == (0, 777, 0, 1)


@pytest.mark.parametrize("arch", sorted(tiles.ARCHS))
def test_precision_of_float32_products(arch):
    """Precision "highest" never uses TF32."""
    query = meta(1, 1, 64, 64, dtype=torch.float32)
    call = launch.describe(query, query, Arguments(0.125, 0, -1, -1, 0))
    names = [
        launch.forward_launch(
            query, query, query, query, None, call, precision, tiles.ARCHS[arch]
        ).constants["PRECISION"]
        for precision in range(3)
    ]
    assert names[0] == "bf16x6" and "tf32" not in names[0]
    assert len(set(names)) > 1


def test_six_products_of_bfloat16_are_as_exact_as_float32():
    """Computes by hand what "bf16x6" stands for."""
    a, b = torch.randn(64, 256), torch.randn(256, 64)

    def parts(x):
        high = x.bfloat16().float()
        middle = (x - high).bfloat16().float()
        return high, middle, (x - high - middle).bfloat16().float()

    exact = a.double() @ b.double()
    total = torch.zeros_like(exact)
    for (i, x), (j, y) in itertools.product(enumerate(parts(a)), enumerate(parts(b))):
        if i + j <= 2:
            total += x.double() @ y.double()
    size = exact.abs().max()
    assert (total - exact).abs().max() < torch.finfo(torch.float32).eps * size


@triton.jit
def _range_kernel(start, end, offset, left, right, length, result, BLOCK: tl.constexpr):
    begin, full_begin, full_end, stop = visible_block_range(
        start, end, offset, left, right, length, BLOCK
    )
    tl.store(result, begin)
    tl.store(result + 1, full_begin)
    tl.store(result + 2, full_end)
    tl.store(result + 3, stop)


@pytest.mark.covering(1)
@pytest.mark.parametrize("left", [None, 0, 3, 20])
@pytest.mark.parametrize("right", [None, 0, 2, 30])
def test_visible_block_range(left, right):
    """By brute force, no visible key is left out, and every full block is full."""
    result = torch.zeros(4, dtype=torch.int32)
    for start, length, offset in itertools.product((0, 8, 24), (1, 5, 16, 33), (-9, 0, 7)):
        end = start + 8
        _range_kernel[(1,)](start, end, offset, left, right, length, result, BLOCK=4)
        begin, full_begin, full_end, stop = result.tolist()
        i, j = torch.arange(start, end).view(-1, 1), torch.arange(length)
        ahead = j - i - offset
        seen = torch.ones_like(ahead, dtype=torch.bool)
        seen = seen if left is None else seen & (ahead >= -left)
        seen = seen if right is None else seen & (ahead <= right)
        assert 0 <= begin <= full_begin <= full_end and begin % 4 == 0
        assert not seen[:, :begin].any() and not seen[:, max(stop, full_end) :].any()
        assert seen[:, full_begin:full_end].all()
        if full_end > full_begin:
            assert full_begin % 4 == 0 and full_end % 4 == 0 and full_end <= length


@triton.jit
def _packed_block_kernel(cu_seqlens, B, total, result, BLOCK: tl.constexpr):
    b, start = packed_block(cu_seqlens, B, total, tl.program_id(0), BLOCK)
    tl.store(result + 2 * tl.program_id(0), b)
    tl.store(result + 2 * tl.program_id(0) + 1, start)


@pytest.mark.parametrize("cu_seqlens", nothing_seen.HOSTILE, ids=str)
def test_blocks_of_senseless_lengths_are_blocks_of_the_tensor(cu_seqlens):
    B, total, BLOCK = 4, 40, 16
    result = torch.full((total // BLOCK + B + 1, 2), -7)
    lengths = torch.tensor(cu_seqlens, dtype=torch.int32)
    _packed_block_kernel[(len(result),)](lengths, B, total, result, BLOCK=BLOCK)
    b, start = result.T
    assert (b >= 0).all() and (b <= B).all()
    assert (start >= 0).all() and (start <= total + BLOCK).all()


# -- Triton's interpreter itself -----------------------------------------------------------


@triton.jit
def _bfloat16_kernel(a, b, product, total, rounded, x):
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    left, right = tl.load(a + 16 * i + j), tl.load(b + 16 * i + j)
    tl.store(product + 16 * i + j, tl.dot(left, right))
    tl.store(total + 16 * i + j, left + right)
    tl.store(rounded + 16 * i + j, tl.load(x + 16 * i + j).to(tl.bfloat16))


def bfloat16_operations():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    x = torch.randn(16, 16)
    product, total = torch.empty(16, 16), torch.empty(16, 16).bfloat16()
    rounded = torch.empty(16, 16).bfloat16()
    _bfloat16_kernel[(1,)](a, b, product, total, rounded, x)
    return {
        "product": torch.allclose(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5),
        "sum": torch.equal(total, a + b),
        "rounding": torch.equal(rounded, x.bfloat16()),
    }


def test_bfloat16_is_repaired():
    assert all(bfloat16_operations().values())


def test_bfloat16_still_needs_repair(monkeypatch):
    """Fails when Triton's own interpreter is right: then `repaired_bfloat16` can go."""
    import importlib

    repaired = {}
    from triton.runtime import interpreter

    original = importlib.util.find_spec("triton.runtime.interpreter")
    fresh = importlib.util.module_from_spec(original)
    original.loader.exec_module(fresh)
    for name in ("_get_np_dtype", "_validate_np_data_size"):
        repaired[name] = getattr(fresh, name)
        monkeypatch.setattr(interpreter, name, repaired[name])
    for name in ("cast_impl", "create_fp_to_fp", "create_masked_load", "create_masked_store"):
        monkeypatch.setattr(
            interpreter.InterpreterBuilder, name, getattr(fresh.InterpreterBuilder, name)
        )
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "binary_op", fresh.InterpreterBuilder.binary_op
    )
    assert not any(bfloat16_operations().values())


# -- Values and memory at the edge --------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("softcap", [1e300, 3e38, 1e-300, 5e-324])
@pytest.mark.parametrize("Sq", [2, 40])
def test_a_cap_that_float32_cannot_hold(softcap, Sq):
    q, k, v = (torch.randn(1, 2, s, 16) for s in (Sq, 50, 50))
    q[0, 0, 0] = 0  # 0 * inf
    numbers = (0.25, 0, -1, -1, 0)
    out, lse = operators.attention_forward(q, k, v, *numbers, softcap=softcap)
    expected = (0.25 if softcap > 1 else 0.0, *numbers[1:])
    want, want_lse = operators.attention_forward(q, k, v, *expected)
    torch.testing.assert_close((out, lse), (want, want_lse))
    grad = torch.randn_like(out)
    gradients = operators.attention_backward(
        grad, None, q, k, v, out, lse, *numbers, softcap=softcap
    )
    assert all(x.isfinite().all() for x in gradients)
    if softcap > 1:
        same = operators.attention_backward(grad, None, q, k, v, want, want_lse, *expected)
        torch.testing.assert_close(gradients, same)


def test_tokens_and_lengths_that_lie_in_a_cache():
    cache, other = torch.arange(10.0).view(1, 1, 10, 1), torch.zeros(1, 1, 10, 1)
    lengths = torch.tensor([2]).int()
    operators.kv_cache_append_(cache, other, cache[:, :, :4], other[:, :, :4], lengths)
    assert cache.flatten().tolist() == [0, 1, 0, 1, 2, 3, 6, 7, 8, 9]
    inside = cache.view(torch.int32).flatten()[1:2]
    inside.fill_(1)
    operators.kv_cache_append_(cache, other, torch.full((1, 1, 2, 1), 9.0), other[:, :, :2], inside)
    assert cache.flatten().tolist() == [0, 9, 9, 1, 2, 3, 6, 7, 8, 9]


def test_what_would_be_written_twice_is_refused():
    cache, token, lengths = torch.zeros(1, 2, 9, 4), torch.ones(1, 2, 1, 4), torch.zeros(1).int()
    for caches in ((cache, cache), (cache.as_strided(cache.shape, (72, 4, 4, 1)), cache + 1)):
        with pytest.raises(ValueError, match="memory"):
            operators.kv_cache_append_(*caches, token, token, lengths)
    x = torch.zeros(2, 3, 4)
    for name, other in (("bias", x), ("mask", x.view(torch.bool)[..., :4]), ("sinks", x[0, 0, :2])):
        options = dict.fromkeys(("mask", "bias", "sinks")) | {name: other}
        with pytest.raises(ValueError, match=name):
            operators.masked_softmax_(x, 1.0, 0, **options)


@pytest.mark.parametrize("special", [math.nan, math.inf])
def test_a_row_that_sees_nothing_has_no_part_in_the_gradient_of_sinks(special):
    q, k, v, grad = (torch.randn(1, 2, 40, 16) for _ in range(4))
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[..., 1, :] = False
    grad[:, :, 1] = special
    call = {"mask": mask, "sinks": torch.randn(2)}
    out, lse = operators.attention_forward(q, k, v, 0.25, 0, -1, -1, 0, **call)
    inputs = (grad, None, q, k, v, out, lse, 0.25, 0, -1, -1, 0)
    gradients = operators.attention_backward(*inputs, **call, sinks_grad=True)
    assert all(x.isfinite().all() for x in gradients)

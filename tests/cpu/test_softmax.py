"""Compares masked_softmax and its other names with the definition in float64 and plain PyTorch."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck

import fused_attention as fa
from fused_attention import _native, reference
from fused_attention import operators as ops
from fused_attention.call import backends
from fused_attention.tools import testing
from softmax_checks import CASES, PHILOX, check, randn

DTYPES = testing.DTYPES
# -- Values ------------------------------------------------------------------------------

LENGTHS = [*range(1, 71), 127, 128, 1000, 4096, 4097, 8200]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_row_length(isa, dtype):
    for N in LENGTHS:
        mask = torch.rand(3, N) > 0.3
        assert not check(randn(2, 3, N, dtype=dtype), mask, scale=0.7), N


@pytest.mark.covering
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [32768, 32769, 100003])
def test_rows_longer_than_a_block(isa, dtype, N):
    mask = torch.rand(2, N) > 0.3
    mask[1, 4096 : 3 * 4096] = False  # whole blocks
    mask[1, :4096] = False
    x = randn(2, N, dtype=dtype)
    x[0, 50_000 % N :] += 5  # the maximum grows along the row
    assert not check(x, mask)
    assert not check(x, bias=randn(N, dtype=dtype))


def test_row_of_a_million(isa):
    assert not check(randn(1 << 20), torch.rand(1 << 20) > 0.5, scale=2.0)


SHAPE = (2, 3, 5, 70)
BROADCASTS = [
    tuple(size if full else 1 for size, full in zip(SHAPE, bits, strict=True))
    for bits in itertools.product((False, True), repeat=4)
]


@pytest.mark.parametrize("shape", [*BROADCASTS, (70,), (5, 1), (3, 5, 70), (1,), ()], ids=str)
def test_every_broadcast_shape(isa, shape):
    for dtype, bias_dtype in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        x = randn(*SHAPE, dtype=dtype)
        assert not check(x, torch.rand(shape) > 0.4)
        assert not check(x, bias=torch.randn(shape, dtype=bias_dtype))


@pytest.mark.covering
@pytest.mark.parametrize("shape", [(700,), (1, 700), (300, 1), (1, 1), (4, 1, 700)], ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gradient_of_a_bias_summed_in_chunks(isa, shape, bias_dtype):
    x = randn(4, 300, 700)
    assert not check(x, bias=randn(*shape, dtype=bias_dtype), causal="top_left", scale=0.3)


ISAS = _native.isas()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_features_together(isa, dtype):
    ran = 0
    for i, (mask, bias, sinks, causal, dropout_p, scale) in enumerate(CASES):
        # Each case runs with one of the dtypes, on one of the instruction sets.
        if i % (4 * len(ISAS)) != 4 * ISAS.index(_native.active_isa()) + DTYPES.index(dtype):
            continue
        x = randn(2, 3, 40, 50, dtype=dtype)
        wrong = check(
            x,
            None if mask is None else torch.rand(mask) > 0.4,
            None if bias is None else randn(*bias, dtype=dtype),
            randn(3, dtype=torch.promote_types(dtype, torch.float32)) if sinks else None,
            causal=causal,
            dropout_p=dropout_p,
            scale=scale,
        )
        assert not wrong, CASES[i]
        ran += 1
    assert ran >= len(CASES) // (4 * len(ISAS))


@pytest.mark.parametrize("shape", [(7,), (4, 9), (2, 3, 4, 2, 5, 70)], ids=str)
def test_any_rank(shape):
    x = randn(*shape)
    assert not check(x, torch.rand(shape[-2:]) > 0.3, causal="bottom_right", dropout_p=0.2)


def test_dropout_is_that_of_attention(isa):
    for N in (1, 8, 63, 64, 65, 200):
        x = torch.zeros(2, 3, 5, N)
        out = fa.masked_softmax(x, dropout_p=0.4, philox_seed=PHILOX)
        keep = ops.dropout_keep_mask(PHILOX, 0.4, 2, 3, 5, N)
        assert torch.equal(out != 0, keep)
        torch.testing.assert_close(
            out[keep], torch.full_like(out[keep], 1 / N / 0.6), rtol=1e-4, atol=0
        )


def test_large_logits(isa):
    """The lowest number as a mask, which transformers uses, does not act as -inf."""
    lowest = torch.finfo(torch.float32).min
    x = randn(3, 200)
    bias = torch.zeros(3, 200)
    bias[0, :100], bias[1], bias[2] = lowest, lowest, -1e9
    torch.testing.assert_close(
        fa.masked_softmax(x, bias), torch.softmax(x + bias, -1), rtol=1e-5, atol=1e-8
    )
    for size in (1e3, 1e6, 1e7, 1e30):
        x = randn(4, 5000) * size
        assert not check(x)


# -- NaN, infinities, empty --------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N", [5, 70, 40_000])
def test_hidden_values_influence_nothing(isa, dtype, N):
    x, grad, bias = randn(4, N, dtype=dtype), randn(4, N, dtype=dtype), randn(N, dtype=dtype)
    mask = torch.rand(4, N) > 0.4
    mask[2] = False
    dirty, dirty_grad = x.masked_fill(~mask, math.nan), grad.masked_fill(~mask, math.inf)
    outs = []
    for a, g in ((x, grad), (dirty, dirty_grad)):
        a = a.clone().requires_grad_()
        b = bias.clone().requires_grad_()
        out, _, _ = ops.softmax_forward(a.detach(), 1.0, 0, False, mask, b.detach())
        dx, db, _ = ops.softmax_backward(g, out, 1.0, 0, b.detach(), bias_grad=True)
        outs.append((out, dx, db))
    for clean, other in zip(*outs, strict=True):
        tolerance = 1e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
        torch.testing.assert_close(other, clean, rtol=tolerance, atol=tolerance)
    assert outs[1][0][2].eq(0).all() and outs[1][1][2].eq(0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("N", [3, 70, 40_000])
def test_visible_nan_propagates_in_its_row_only(isa, bad, N):
    x = randn(3, N)
    x[1, N // 2] = bad
    mask = torch.rand(3, N) > 0.4
    mask[:, N // 2] = True
    sinks = randn(1)
    for sink in (None, sinks, torch.tensor([-math.inf])):
        out = fa.masked_softmax(x[None], mask, sinks=sink)[0]
        expected = reference.masked_softmax_reference(x[None], mask, sinks=sink)[0]
        torch.testing.assert_close(out, expected, equal_nan=True)
        assert torch.equal(out[1].isnan(), mask[1]) and not out[0].isnan().any()
        assert out[1][~mask[1]].eq(0).all()
    leaf = x.clone().requires_grad_()
    fa.masked_softmax(leaf, mask).sum().backward()
    assert torch.equal(leaf.grad[1].isnan(), mask[1])
    assert not leaf.grad[0].isnan().any()


def test_rows_that_see_nothing(isa):
    x = randn(2, 3, 4, 70).requires_grad_()
    out = fa.masked_softmax(x, torch.zeros(4, 1, dtype=torch.bool))
    assert out.eq(0).all()
    out.sum().backward()
    assert x.grad.eq(0).all()
    assert fa.masked_softmax(torch.full((2, 5), -math.inf)).eq(0).all()
    # Sk < Sq, bottom-right: the first rows see nothing
    out = fa.masked_softmax(torch.zeros(5, 3), causal="bottom_right")
    assert out[:2].eq(0).all() and torch.equal(out[2:].sum(-1), torch.ones(3))
    sinks = randn(3).requires_grad_()
    out = fa.masked_softmax(x, torch.zeros(70, dtype=torch.bool), sinks=sinks)
    assert out.eq(0).all()
    (gradient,) = torch.autograd.grad(out, sinks, torch.ones_like(out))
    assert gradient.eq(0).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 5), (2, 0, 3, 7), (2, 3, 0, 7), (2, 3, 4, 0)])
def test_empty(isa, shape):
    x = torch.zeros(shape, requires_grad=True)
    bias = torch.zeros(shape[-1], requires_grad=True)
    sinks = torch.zeros(shape[-3], requires_grad=True) if len(shape) > 2 else None
    out = fa.masked_softmax(x, bias, sinks=sinks)
    assert out.shape == shape
    out.sum().backward()
    assert x.grad.shape == shape and bias.grad.eq(0).all()
    assert sinks is None or sinks.grad.eq(0).all()
    fa.masked_softmax_(x.detach())


# -- Memory order, in place, threads ------------------------------------------------------


def strided(shape, dtype, kind):
    if kind == "transposed":
        return randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT
    if kind == "every other":
        return randn(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., ::2]
    if kind == "padded":
        return randn(*shape[:-1], shape[-1] + 5, dtype=dtype)[..., 3:-2]
    if kind == "BSHD":
        return randn(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
    return randn(1, 1, 1, shape[-1], dtype=dtype).expand(shape)


KINDS = ["transposed", "every other", "padded", "BSHD", "expanded"]


@pytest.mark.parametrize("kind", KINDS)
def test_strides(isa, kind):
    for dtype in (torch.float32, torch.bfloat16):
        x, bias = (strided((2, 3, 5, 70), dtype, kind) for _ in range(2))
        mask = strided((2, 3, 5, 70), dtype, kind) > -0.5
        mask = mask.expand(2, 3, 5, 70)
        assert not check(x, mask)
        assert not check(x, bias=bias, grad=strided((2, 3, 5, 70), dtype, kind))
        assert fa.masked_softmax(x).is_contiguous()


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("N", [70, 40_000])
def test_in_place(isa, kind, N):
    x = strided((2, 2, 3, N), torch.float32, kind)
    neighbours = x._base.clone()
    mask = torch.rand(2, 1, 3, N) > 0.3
    options = {"scale": 0.3, "causal": "top_left", "dropout_p": 0.2, "philox_seed": 3}
    expected = fa.masked_softmax(x, mask, sinks=torch.zeros(2), **options)
    untouched = torch.ones_like(x._base, dtype=torch.bool)
    untouched.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(False)
    assert fa.masked_softmax_(x, mask, sinks=torch.zeros(2), **options) is x
    assert torch.equal(x, expected)
    assert torch.equal(x._base[untouched], neighbours[untouched])


def test_any_number_of_threads_gives_the_same_bits(isa):
    x, grad = randn(3, 2, 40, 3000), randn(3, 2, 40, 3000)
    mask, bias, sinks = torch.rand(3, 1, 40, 3000) > 0.3, randn(3000), randn(2)

    def call():
        leaves = [t.clone().requires_grad_() for t in (x, bias, sinks)]
        seed = {"dropout_p": 0.1, "philox_seed": 1}
        out = fa.masked_softmax(leaves[0], leaves[1], sinks=leaves[2], **seed)
        masked = fa.masked_softmax(x, mask)
        return out, masked, *torch.autograd.grad(out, leaves, grad)

    runs = []
    for threads in (1, 2, 3):
        with testing.num_threads(threads):
            runs.append(call())
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


# -- Autograd, compile, vmap --------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"causal": "top_left"}, {"dropout_p": 0.3}], ids=str)
def test_gradcheck(isa, options):
    x = randn(2, 3, 4, 5, dtype=torch.float64).requires_grad_()
    bias = randn(3, 1, 5, dtype=torch.float64).requires_grad_()
    sinks = randn(3, dtype=torch.float64).requires_grad_()

    def call(x, bias, sinks):
        return fa.masked_softmax(x, bias, scale=0.5, sinks=sinks, philox_seed=2, **options)

    assert gradcheck(call, (x, bias, sinks))


def test_gradients_only_where_asked():
    x, bias = randn(2, 5), randn(5).requires_grad_()
    fa.masked_softmax(x, bias).sum().backward()
    assert bias.grad is not None and x.grad is None
    with torch.no_grad():
        assert not fa.masked_softmax(x, bias).requires_grad


def test_torch_func_grad():
    x = randn(4, 7)
    gradients = torch.func.vmap(torch.func.grad(lambda row: fa.masked_softmax(row)[0]))(x)
    leaf = x.clone().requires_grad_()
    torch.softmax(leaf, -1)[:, 0].sum().backward()
    torch.testing.assert_close(gradients, leaf.grad)


def test_opcheck():
    x, mask = randn(2, 3, 4, 70), torch.rand(2, 1, 4, 70) > 0.3
    bias, sinks = randn(3, 1, 70), randn(3)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for rest in ((), (mask, bias, sinks, PHILOX, 0.2), (None, None, sinks)):
        for save in (False, True):
            torch.library.opcheck(ops.softmax_forward, (x, 0.5, 1, save, *rest), test_utils=tests)
        torch.library.opcheck(ops.softmax_in_place, (x.clone(), 0.5, 2, *rest), test_utils=tests)
    out, _, sink_weight = ops.softmax_forward(x, 0.5, 1, True, mask, bias, sinks)
    for rest in ((), (bias, sink_weight, PHILOX, 0.2, True, True), (bias, None, None, 0.0, True)):
        arguments = (torch.randn_like(x), out, 0.5, 1, *rest)
        torch.library.opcheck(ops.softmax_backward, arguments, test_utils=tests)


def test_meta():
    x = torch.empty(2, 3, 4, 70, device="meta", requires_grad=True)
    out = fa.masked_softmax(x, sinks=torch.empty(3, device="meta"), dropout_p=0.1)
    assert out.shape == x.shape and out.device.type == "meta"
    with pytest.raises(fa.ArgumentValueError, match="mask: expected device meta"):
        fa.masked_softmax(x, torch.ones(70, dtype=torch.bool))


def test_compile():
    def step(x, mask, bias, sinks):
        a = fa.masked_softmax(x, mask, scale=0.5, causal="top_left", dropout_p=0.2)
        b = fa.masked_softmax(x * 2, bias, sinks=sinks)
        return a + b + fa.scaled_masked_softmax(x, ~mask, 0.3) + fa.masked_softmax(x, x)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for N in (9, 70, 33):
        mask, bias, sinks = torch.rand(2, 1, 4, N) > 0.2, randn(4, 1), randn(3)
        x, runs = randn(2, 3, 4, N), []
        for function in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in (x, bias, sinks)]
            torch.manual_seed(7)
            out = function(leaves[0], mask, leaves[1], leaves[2])
            runs.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        for eager, other in zip(*runs, strict=True):
            torch.testing.assert_close(other, eager)


def test_compile_in_place():
    def step(x, mask):
        y = x * 2
        fa.masked_softmax_(y, mask)
        return y + 1

    x, mask = randn(3, 40), torch.rand(3, 40) > 0.2
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, mask), step(x, mask))


@pytest.mark.parametrize("own", ["x", "x mask", "mask", "x bias", "bias", "x sinks", "all"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_vmap(own, dropout_p):
    S = 3
    own = {"x", "mask", "bias", "sinks"} if own == "all" else set(own.split())
    tensors = {
        "x": randn(S, 2, 3, 4, 20) if "x" in own else randn(2, 3, 4, 20),
        "mask": torch.rand(*([S] if "mask" in own else []), 4, 20) > 0.3,
        "bias": randn(*([S] if "bias" in own else []), 3, 1, 20),
        "sinks": randn(*([S] if "sinks" in own else []), 3),
    }

    def function(x, mask, bias, sinks):
        def loss(x, bias, sinks):
            seed = {"dropout_p": dropout_p, "philox_seed": 4}
            a = fa.masked_softmax(x, mask, **seed)
            b = fa.masked_softmax(x, bias, sinks=sinks, causal="top_left", **seed)
            return (a * b).sum() + (b * x).sum()

        return torch.func.grad(loss, argnums=(0, 1, 2))(x, bias, sinks)

    dims = tuple(0 if name in own else None for name in tensors)
    got = torch.func.vmap(function, in_dims=dims)(*tensors.values())
    for i in range(S):
        sample = [x[i] if name in own else x for name, x in tensors.items()]
        for a, b in zip(got, function(*sample), strict=True):
            torch.testing.assert_close(a[i], b)


def test_vmap_randomness_and_in_place():
    x = torch.zeros(4, 3, 200)

    def call(x):
        return fa.masked_softmax(x, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(x)
    same = torch.func.vmap(call, randomness="same")(x)
    assert torch.equal(same[0], same[1])
    different = torch.func.vmap(call, randomness="different")(x)
    assert not torch.equal(different[0], different[1])
    y = randn(4, 3, 20)
    expected = torch.softmax(y, -1)
    torch.func.vmap(fa.masked_softmax_)(y)
    torch.testing.assert_close(y, expected)


def test_autocast():
    x = randn(3, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = fa.masked_softmax(x, scale=0.3)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, fa.masked_softmax(x.bfloat16(), scale=0.3))


def test_what_no_kernel_serves_the_reference_does(monkeypatch, caplog):
    x, sinks = randn(2, 3, 4, 5), randn(3)
    options = {"causal": "top_left", "sinks": sinks, "dropout_p": 0.2, "philox_seed": PHILOX}
    expected = fa.masked_softmax(x, scale=0.5, **options)
    others = {name: x for name, x in backends.CPU.services.items() if name != "masked_softmax"}
    with monkeypatch.context() as patch:
        patch.setitem(backends.CPU.__dict__, "services", others)
        backends.read_environment()
        with caplog.at_level("WARNING", logger=backends.logger.name):
            for _ in range(2):
                out = fa.masked_softmax(x, scale=0.5, **options)
                assert fa.masked_softmax_(x.clone(), scale=0.5, **options).equal(out)
    backends.read_environment()
    assert len(caplog.records) == 1 and "cpu: masked softmax: not built" in caplog.text
    torch.testing.assert_close(out, expected)


# -- Megatron-LM and apex ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_megatron_names(dtype):
    x = randn(2, 3, 6, 9, dtype=dtype)
    wide = x.float() * 0.5
    mask = torch.rand(2, 1, 6, 9) > 0.5
    mask[0, 0, 2] = True
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-6}
    masked = torch.softmax(wide.masked_fill(mask, -math.inf), -1).nan_to_num(0.0)
    for form in (fa.scaled_masked_softmax, fa.ScaledMaskedSoftmax.apply):
        torch.testing.assert_close(form(x, mask, 0.5).float(), masked, **close)
        torch.testing.assert_close(form(x, mask.byte(), 0.5).float(), masked, **close)
        expanded = mask.expand(2, 3, 6, 9)
        torch.testing.assert_close(form(x, expanded, 0.5).float(), masked, **close)
    for form in (fa.scaled_softmax, fa.ScaledSoftmax.apply):
        torch.testing.assert_close(form(x, 0.5).float(), torch.softmax(wide, -1), **close)
    unmasked = fa.scaled_masked_softmax(x, None, torch.tensor([0.5]))
    torch.testing.assert_close(unmasked, fa.scaled_softmax(x, 0.5))
    square = x[..., :6].flatten(0, 1)
    causal = torch.ones(6, 6).triu(1).bool()
    expected = torch.softmax((square.float() * 0.5).masked_fill(causal, -math.inf), -1)
    for form in (
        fa.scaled_upper_triang_masked_softmax,
        fa.ScaledUpperTriangMaskedSoftmax.apply,
    ):
        torch.testing.assert_close(form(square, 0.5).float(), expected, **close)
    leaf = x.clone().requires_grad_()
    fa.ScaledMaskedSoftmax.apply(leaf, mask, None).sum().backward()
    assert leaf.grad.abs().max() < 1e-2  # rows sum to a constant


# -- Wrong calls --------------------------------------------------------------------------


X = torch.zeros(2, 3, 4, 5)


def test_operators_refuse_what_would_read_out_of_bounds():
    forward, backward, in_place = ops.softmax_forward, ops.softmax_backward, ops.softmax_in_place
    long, wrong = torch.zeros(6), torch.zeros(2, 3, 4, 4)
    for call in (
        lambda: forward(X, 1.0, 0, False, long.bool()),
        lambda: forward(X, 1.0, 0, False, X),
        lambda: forward(X, 1.0, 0, False, None, torch.zeros(1, 2, 3, 4, 5)),
        lambda: forward(X, 1.0, 0, False, None, None, torch.zeros(2)),
        lambda: forward(X, 1.0, 0, False, None, None, torch.zeros(3).double()),
        lambda: forward(X, 1.0, 0, False, None, None, None, None, 0.5),
        lambda: forward(X, 1.0, 3, False),
        lambda: forward(torch.zeros(()), 1.0, 0, False),
        lambda: forward(torch.zeros([2] * 18), 1.0, 0, False),
        lambda: in_place(torch.zeros(1).expand(4), 1.0, 0),
        lambda: backward(wrong, X, 1.0, 0),
        lambda: backward(X.double(), X, 1.0, 0),
        lambda: backward(X, X, 1.0, 0, long, None, None, 0.0, True),
        lambda: backward(X, X, 1.0, 0, None, None, None, 0.0, True),
        lambda: backward(X, X, 1.0, 0, None, long, None, 0.0, False, True),
    ):
        with pytest.raises(RuntimeError):
            call()

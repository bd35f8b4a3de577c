"""Compares second derivatives and forward mode of `masked_softmax` with finite differences and the
definition in float64, in every way in which PyTorch can be asked for them, and block by block."""

import math

import pytest
import torch

from fused_attention import masked_softmax, reference
from fused_attention.derivatives import softmax_tangents
from fused_attention.tools import testing
from selection import quick
from ways_to_differentiate import ENDS, WAYS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:There is a performance drop"),
]

B, H, M, N = 2, 2, 3, 5
PHILOX = torch.tensor([0x123456789ABCDEF, 5])


def bool_mask(*shape):
    return {"mask": torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4}


def bias(*shape):
    generator = torch.Generator().manual_seed(2)
    return {"mask": torch.randn(shape, generator=generator, dtype=torch.float64)}


SINKS = {"sinks": torch.tensor([0.3, -0.9], dtype=torch.float64)}
CASES = {
    "plain": {},
    "scale": {"scale": -0.7},
    "mask": bool_mask(B, 1, M, N),
    "rows that see nothing": bool_mask(1, 1, M, 1),
    "causal": {"causal": "bottom_right"},
    "dropout": {"dropout_p": 0.4},
    "dropout of everything": {"dropout_p": 1.0},
    "sinks": SINKS,
    "bias": bias(1, H, M, N),
    "bias of a batch": bias(B, 1, 1, N),
    "bias of rows": bias(M, 1),
    "bias, sinks": {**bias(B, 1, M, N), **SINKS, "scale": 0.4},
    "everything": {**bias(B, 1, M, N), **SINKS, "dropout_p": 0.3, "causal": "top_left"},
}


def split(options):
    """Returns (the options that are differentiated, the other options)."""
    floating = {
        n: x for n, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    return floating, {n: x for n, x in options.items() if n not in floating}


def function_of(floating, rest):
    def function(*tensors):
        named = dict(zip(["input", *floating], tensors, strict=True))
        return masked_softmax(**named, **rest, philox_seed=PHILOX)

    return function


def definition_of(floating, rest):
    names = {"mask": "bias"}

    def function(*tensors):
        named = dict(zip(["input", *(names.get(n, n) for n in floating)], tensors, strict=True))
        return reference.masked_softmax_reference(**named, **rest, philox=PHILOX)

    return function


@pytest.mark.parametrize(
    "name", quick(CASES, "mask", "rows that see nothing", "causal", "bias, sinks", "everything")
)
def test_against_finite_differences(name):
    floating, rest = split(CASES[name])
    function = function_of(floating, rest)
    x = torch.randn(B, H, M, N, dtype=torch.float64)
    tensors = tuple(t.clone().requires_grad_() for t in (x, *floating.values()))
    assert torch.autograd.gradcheck(
        *(function, tensors),
        **{"check_forward_ad": True, "check_batched_forward_grad": True},
        check_batched_grad=True,
    )
    assert torch.autograd.gradgradcheck(
        function, tensors, check_fwd_over_rev=True, check_batched_grad=True
    )


@pytest.mark.parametrize("shape", [(N,), (M, N), (0, N), (M, 0), (2, 1, 2, M, N)], ids=str)
def test_other_shapes(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"dropout_p": 0.5, "philox_seed": 3}):
        assert torch.autograd.gradgradcheck(
            lambda x, o=options: masked_softmax(x, **o), x, check_fwd_over_rev=True
        )


def second(function, tensors, grad_out, directions, grad_direction):
    """Returns the tangents of out and of the gradients, by name."""
    out = torch.func.jvp(function, tensors, directions)[1]

    def backward(grad_out, *tensors):
        return torch.func.vjp(function, *tensors)[1](grad_out)

    _, gradients = torch.func.jvp(backward, (grad_out, *tensors), (grad_direction, *directions))
    names = ["input", "bias", "sinks"]
    return {"out": out} | {f"tangent of d{n}": x for n, x in zip(names, gradients, strict=True)}


def naive(options, tensors, grad_out, directions, grad_direction):
    """Computes the formulas on whole matrices; weights and results are rounded once."""
    dtype, wide = tensors[0].dtype, torch.promote_types(tensors[0].dtype, torch.float32)
    x, mask, sinks = (t.to(wide) for t in tensors)
    tx, tmask, tsinks = (t.to(wide) for t in directions)
    scale = options["scale"]
    s = scale * x + mask
    full = torch.cat([s, sinks.view(-1, 1, 1).expand(*s.shape[:-1], 1)], -1).softmax(-1)
    p, p_sink = full[..., :-1].to(dtype).to(wide), full[..., -1:]
    z = reference.dropout(torch.ones_like(p), options["dropout_p"], PHILOX)
    ts, tsink = scale * tx + tmask, tsinks.view(-1, 1, 1)
    t_lse = (p * ts).sum(-1, keepdim=True) + p_sink * tsink
    tp, tp_sink = p * (ts - t_lse), p_sink * (tsink - t_lse)
    dp, tdp = z * grad_out.to(wide), z * grad_direction.to(wide)
    delta = (p * dp).sum(-1, keepdim=True)
    t_delta = (tp * dp + p * tdp).sum(-1, keepdim=True)
    tds = tp * (dp - delta) + p * (tdp - t_delta)
    return {
        "out": (z * tp).to(dtype),
        "tangent of dinput": (scale * tds).to(dtype),
        "tangent of dbias": tds.sum_to_size(mask.shape).to(tensors[1].dtype),
        "tangent of dsinks": -(tp_sink * delta + p_sink * t_delta).sum((0, 2, 3)),
    }


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 17, 210), (1, 2, 3, 70_000)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_against_the_definition(shape, dtype, dropout_p):
    heads, columns = shape[1], shape[-1]
    wide = torch.promote_types(dtype, torch.float32)
    options = {"scale": 1.5, "dropout_p": dropout_p}

    def draw():
        generator = torch.Generator().manual_seed(9)
        sizes = shape, (1, heads, 1, columns), (heads,)
        both = [
            tuple(
                torch.randn(size, generator=generator, dtype=torch.float64).to(t)
                for size, t in zip(sizes, (dtype, dtype, wide), strict=True)
            )
            for _ in range(2)
        ]
        grads = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        return *both, *(x.to(dtype) for x in grads)

    tensors, directions, grad_out, grad_direction = draw()
    floating, rest = {"mask": None, "sinks": None}, options
    got = second(function_of(floating, rest), tensors, grad_out, directions, grad_direction)

    def double(*lists):
        return [tuple(x.double() for x in xs) for xs in lists]

    want = second(
        definition_of(floating, rest),
        *double(tensors)[:1],
        grad_out.double(),
        *double(directions),
        grad_direction.double(),
    )
    plain = naive(options, tensors, grad_out, directions, grad_direction)
    assert not testing.mismatches(got, want, (plain,), factor=3.0)


@pytest.mark.parametrize("name", ["plain", "bias, sinks", "everything"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_what_the_definition_gives(way, name):
    floating, rest = split(CASES[name])
    floating = {n: x[:1, :, :2, :3] if n == "mask" else x for n, x in floating.items()}
    x = torch.randn(1, H, 2, 3, dtype=torch.float64)

    def derivative(function):
        return WAYS[way](lambda x: function(x, *floating.values()), x.clone().requires_grad_())

    got = derivative(function_of(floating, rest))
    torch.testing.assert_close(got, derivative(definition_of(floating, rest)))


@pytest.mark.parametrize("way", ENDS)
def test_what_is_not_built_raises(way):
    x = torch.randn(2, 3, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="masked_softmax: .* not built"):
        ENDS[way](masked_softmax, x)


@pytest.mark.parametrize("block", [1, 7, 10, 31])
def test_a_block_at_a_time_gives_the_same_bits(monkeypatch, block):
    floating, rest = split(CASES["everything"])
    function = function_of(floating, rest)
    tensors = (torch.randn(B, H, M, N, dtype=torch.float64), *floating.values())
    directions = tuple(map(torch.ones_like, tensors))
    grads = torch.randn(B, H, M, N, dtype=torch.float64), torch.randn(B, H, M, N).double()

    def results():
        return torch.func.jvp(
            lambda g, *x: torch.func.vjp(function, *x)[1](g),
            (grads[0], *tensors),
            (grads[1], *directions),
        )[1]

    expected = results()
    monkeypatch.setattr(softmax_tangents, "_BLOCK", block)
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


def test_what_is_hidden_influences_nothing():
    x, direction, grad = (torch.randn(B, H, M, N) for _ in range(3))
    seen = bool_mask(B, 1, M, N)["mask"]

    def results():
        def function(x):
            return masked_softmax(x, seen)

        return [
            torch.func.jvp(function, (x,), (direction,))[1],
            torch.func.jvp(lambda x: torch.func.vjp(function, x)[1](grad)[0], (x,), (direction,))[
                1
            ],
        ]

    expected = results()
    for tensor in (x, direction, grad):
        tensor.masked_fill_(~seen, math.nan)
    for got, want in zip(results(), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", ["given", "same", "different"])
def test_vmap_of_second_derivatives_is_a_loop(name, seed):
    floating, rest = split(CASES[name])
    if "dropout_p" not in rest and seed != "given":
        pytest.skip("nothing is random")
    samples = [torch.stack([x, 2 * x, x - 1]) for x in floating.values()]
    x = torch.randn(3, B, H, M, N, dtype=torch.float64)
    philox = {"philox_seed": PHILOX} if seed == "given" else {}

    def scalar(x, *others):
        named = dict(zip(floating, others, strict=True))
        return masked_softmax(x, **named, **rest, **philox).sin().sum()

    def product(*tensors):  # of the Hessian with the inputs' cosines
        every = tuple(range(len(tensors)))
        directions = tuple(x.cos() for x in tensors)
        return torch.func.jvp(torch.func.grad(scalar, every), tensors, directions)[1]

    torch.manual_seed(3)
    randomness = "error" if seed == "given" else seed
    got = torch.vmap(product, randomness=randomness)(x, *samples)
    torch.manual_seed(3)
    if seed == "same":
        state = torch.random.get_rng_state()
    for i in range(3):
        if seed == "same":
            torch.random.set_rng_state(state)
        for a, b in zip(got, product(x[i], *(s[i] for s in samples)), strict=True):
            torch.testing.assert_close(a[i], b)

"""Compares second derivatives and forward mode of `attention()` with finite differences and the
definition in float64, in every way in which PyTorch can be asked for them. Derivatives that are not
built raise an error that names them."""

import math

import pytest
import torch

from feature_cases import CASES, SEQUENCES, finite
from fused_attention import _native, attention, reference
from fused_attention import operators as ops
from fused_attention.attention_weights import attention_with_weights
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from ways_to_differentiate import ENDS, WAYS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("error:There is a performance drop"),
]

NAMES = ("query", "key", "value", "bias", "sinks")


def call_of(inputs, names, **options):
    """Returns (out, lse) as a function of the tensors `names`."""

    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return finite(attention(**named, **inputs.keywords, return_lse=True, **options))

    return function


# -- Derivatives are right ---------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_against_finite_differences(name):
    inputs = testing.make_inputs(CASES[name])
    leaves = inputs.differentiable(torch.float64)
    function, tensors = call_of(inputs, leaves, backend="cpu"), tuple(leaves.values())
    assert torch.autograd.gradcheck(
        function, tensors, fast_mode=True, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(
        function, tensors, fast_mode=True, check_fwd_over_rev=True, check_batched_grad=True
    )


def directions_like(leaves, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype)
        for x in leaves.values()
    ]


def operators(inputs, directions, grad_direction):
    """Returns all results of the two operators, computed through the public functions."""
    leaves = inputs.differentiable()
    function = call_of(inputs, leaves)
    tensors = tuple(x.detach() for x in leaves.values())
    (out, lse), changes = torch.func.jvp(function, tensors, tuple(directions))
    grads = inputs.grad_out, inputs.grad_lse.masked_fill(lse.isinf(), 0.0)

    def backward(grad_out, *tensors):
        return torch.func.vjp(function, *tensors)[1]((grad_out, grads[1]))

    _, gradients = torch.func.jvp(
        backward, (inputs.grad_out, *tensors), (grad_direction, *directions)
    )
    names = [f"tangent of d{name}" for name in leaves]
    return {
        "out": changes[0],  # its dtype says how precise the others can be
        "lse": changes[1],
        **dict(zip(names, gradients, strict=True)),
    }


def exact(inputs, directions, grad_direction):
    """Differentiates the definition in float64."""
    names, options = list(inputs.tensors), dict(inputs.options)

    def function(*tensors):
        named = dict(zip(names, tensors, strict=True))
        return finite(reference.attention_reference(**named, **options, return_lse=True))

    tensors = tuple(x.double() for x in inputs.tensors.values())
    directions = tuple(x.double() for x in directions)
    (_, lse), changes = torch.func.jvp(function, tensors, directions)
    grad_lse = inputs.grad_lse.double().masked_fill(lse.isinf(), 0.0)

    def backward(grad_out, *tensors):
        return torch.func.vjp(function, *tensors)[1]((grad_out, grad_lse))

    _, gradients = torch.func.jvp(
        backward,
        (inputs.grad_out.double(), *tensors),
        (grad_direction.double(), *directions),
    )
    results = {f"tangent of d{name}": x for name, x in zip(names, gradients, strict=True)}
    return {"out": changes[0], "lse": changes[1], **results}


def naive(inputs, directions, grad_direction, backwards):
    """Computes the formulas of attention_tangents.inl on whole matrices in the inputs' dtype. For
    16-bit inputs products accumulate in float32, and operands and results are rounded once."""
    tensors, options = inputs.tensors, inputs.options
    tangents = dict(zip(tensors, directions, strict=True))
    dtype = tensors["query"].dtype
    wide = torch.promote_types(dtype, torch.float32)
    B, Hq, Sq, D = tensors["query"].shape
    Hkv, Sk = tensors["key"].shape[1:3]

    def turned(x, *dims):  # `backwards` sums from the last term on
        return x.flip(dims) if backwards else x

    def product(a, b):
        return turned(a, -1) @ turned(b, -2)

    def rounded(x):
        return x.to(dtype).to(wide)

    def of_heads(x):
        return x.to(wide).repeat_interleave(Hq // Hkv, 1)

    def per_key_head(x):
        return x.unflatten(1, (Hkv, -1)).sum(2).to(dtype)

    q, tq = (x["query"].to(wide) for x in (tensors, tangents))
    k, tk, v, tv = (of_heads(x[n]) for n in ("key", "value") for x in (tensors, tangents))
    do, tdo = inputs.grad_out.to(wide), grad_direction.to(wide)
    scale = options["scale"] if options["scale"] is not None else 1 / math.sqrt(D)
    used = torch.full((B,), Sk)
    off = reference.diagonal_offset(options["causal"], Sq, used, options.get("diagonal"))
    seen = reference.visible(
        *((B, Hq, Sq, Sk), off, used, options["causal"], options["window_size"]),
        *(options.get("mask"), options.get("key_padding_mask")),
    )
    said = {"scale": scale, "softcap": options["softcap"], "bias": tensors.get("bias")}
    said["alibi_slopes"] = options.get("alibi_slopes")
    s = reference.scores(turned(q, -1), turned(k, -1), off, **said)
    s = torch.where(seen, s, -math.inf)
    p, lse = reference.softmax(turned(s, -1), tensors.get("sinks"))
    p, lse = turned(p, -1), lse.unsqueeze(-1)
    z = torch.ones_like(p)
    if options["dropout_p"]:
        z = reference.dropout(z, options["dropout_p"], options["philox"])
    out = rounded(product(rounded(z * p), v))
    u = scale * product(q, k.mT)
    tu = scale * (product(tq, k.mT) + product(q, tk.mT))
    slope, bend = torch.ones_like(u), torch.zeros_like(u)
    if options["softcap"]:
        tanh = torch.tanh(u / options["softcap"])
        slope = 1 - tanh**2
        bend = -2 / options["softcap"] * tanh * slope * tu
    ts = slope * tu + (tangents["bias"].to(wide) if "bias" in tangents else 0.0)
    tlse, p_sink, tsink = turned(p * ts, -1).sum(-1, keepdim=True), 0.0, 0.0
    if "sinks" in tensors:
        p_sink = torch.exp(tensors["sinks"].view(-1, 1, 1) - lse).nan_to_num(0.0)
        tsink = tangents["sinks"].view(-1, 1, 1)
        tlse = tlse + p_sink * tsink
    tout = rounded(product(rounded(z * p * ts), v) + product(rounded(z * p), tv) - tlse * out)
    grad_lse = inputs.grad_lse.masked_fill(lse[..., 0].isinf(), 0.0).unsqueeze(-1)
    delta = turned(do * out, -1).sum(-1, keepdim=True) - grad_lse
    tdelta = turned(tdo * out + do * tout, -1).sum(-1, keepdim=True)
    dp, tdp = z * product(do, v.mT), z * (product(tdo, v.mT) + product(do, tv.mT))
    ds = p * (dp - delta)
    tp = p * (ts - tlse)
    tds = tp * (dp - delta) + p * (tdp - tdelta)
    e, te = rounded(slope * ds), rounded(slope * tds + bend * ds)
    results = {
        "out": tout.to(dtype),
        "lse": tlse.squeeze(-1),
        "tangent of dquery": (scale * (product(te, k) + product(e, tk))).to(dtype),
        "tangent of dkey": per_key_head(scale * (product(te.mT, q) + product(e.mT, tq))),
        "tangent of dvalue": per_key_head(
            product(rounded(z * tp).mT, do) + product(rounded(z * p).mT, tdo)
        ),
    }
    if "bias" in tensors:
        bias = tensors["bias"]
        results["tangent of dbias"] = tds.sum_to_size(bias.shape).to(bias.dtype)
    if "sinks" in tensors:
        sums = p_sink * ((tsink - tlse) * delta + tdelta)
        results["tangent of dsinks"] = -sums.sum((0, 2, 3))
    return results


def answer(case):
    inputs = testing.make_inputs(case)
    leaves = inputs.differentiable()
    drawn = directions_like(leaves, case.seed + 1), torch.randn_like(inputs.grad_out)
    plain = tuple(naive(inputs, *drawn, backwards) for backwards in (False, True))
    return operators(inputs, *drawn), exact(inputs, *drawn), plain


BOTH_HALVES = {"B": 2, "Hq": 4, "Hkv": 2, "Sq": 101, "Sk": 205, "D": 33, "Dv": 17}
RULE = {
    "plain": {},
    "causal": {"causal": "bottom_right", "mask": "B1QK"},
    "window": {"window_size": (40, 20), "memory_format": "BSHD"},
    "softcap": {"softcap": 3.0, "alibi": "BH", "key_padding": True},
    "bias": {"bias": "1HQK", "dropout_p": 0.25},
    "bias of keys": {"bias": "111K", "sinks": True, "bias_dtype": torch.float32},
    "bias of queries": {"bias": "BHQ1", "memory_format": "strided", "scale": -0.4},
    "sinks": {"sinks": True, "dropout_p": 0.3, "causal": "top_left"},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("name", RULE)
def test_against_the_definition(name, dtype):
    case = Case(dtype=dtype, **BOTH_HALVES, **RULE[name], seed=5)
    assert not testing.check_answers(case, answer)


@pytest.mark.parametrize("isa", [n for n in _native.isas() if n != "avx512"])
@pytest.mark.parametrize("name", ["softcap", "bias"])
def test_against_the_definition_on_other_instruction_sets(isa, name):
    with testing.cpu_isa(isa):
        case = Case(**BOTH_HALVES, **RULE[name], seed=6)
        assert not testing.check_answers(case, answer)


@pytest.mark.slow
@pytest.mark.parametrize("case", testing.pairs_of_features(), ids=str)
def test_pairs_of_features(case):
    assert not testing.check_answers(case, answer)


@pytest.mark.parametrize("empty", [{"B": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0}, {"Sk": 0}], ids=str)
def test_empty(empty):
    sizes = {"Sq": 3, "Sk": 5, "D": 4, "Dv": 4} | empty
    for options in ({"bias": "11QK", "sinks": True}, {"bias": "111K"}, {}):
        inputs = testing.make_inputs(Case(dtype=torch.float64, **sizes, **options))
        drawn = directions_like(inputs.tensors, 1), inputs.grad_out
        for name, x in operators(inputs, *drawn).items():
            want = exact(inputs, *drawn)[name]
            torch.testing.assert_close(x, want, msg=name)


def test_the_same_bits_for_any_number_of_threads():
    inputs = testing.make_inputs(Case(**BOTH_HALVES, bias="1HQK", sinks=True, dropout_p=0.1))
    drawn = directions_like(inputs.tensors, 1), torch.randn_like(inputs.grad_out)
    results = []
    for count in (1, 2, 3):
        with testing.num_threads(count):
            results.append(operators(inputs, *drawn))
    for other in results[1:]:
        for name, x in other.items():
            assert torch.equal(x, results[0][name]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_keys_that_nobody_sees_influence_nothing(value):
    """Hidden keys and values, and their tangents, may hold anything."""
    inputs = testing.make_inputs(Case(**BOTH_HALVES, key_padding=True, softcap=2.0))
    directions = directions_like(inputs.tensors, 1)
    expected = operators(inputs, directions, inputs.grad_out)
    hidden = inputs.options["key_padding_mask"][:, None, :, None]
    dirty = [inputs.tensors["key"], inputs.tensors["value"], *directions[1:3]]
    for x in dirty:
        x.masked_fill_(hidden, value)
    for name, x in operators(inputs, directions, inputs.grad_out).items():
        assert torch.equal(x, expected[name]), name
        assert x.isfinite().all()


def test_a_query_that_sees_nothing_influences_nothing():
    inputs = testing.make_inputs(Case(**BOTH_HALVES, mask="1HQ1", dropout_p=0.1))
    directions = directions_like(inputs.tensors, 1)
    expected = operators(inputs, directions, inputs.grad_out)
    blind = ~inputs.options["mask"]
    for x in (inputs.tensors["query"], directions[0], inputs.grad_out):
        x.masked_fill_(blind, math.nan)
    for name, x in operators(inputs, directions, inputs.grad_out).items():
        assert torch.equal(x, expected[name]), name


# -- Every way to ask for derivatives ----------------------------------------------------


WITH_RESPECT_TO = {
    "query": lambda x, y, **o: attention(x, y, y, **o),
    "key": lambda x, y, **o: attention(y, x, y, **o),
    "value": lambda x, y, **o: attention(y, y, x, **o),
    "all three": lambda x, y, **o: attention(x, x, x, **o),
    "bias": lambda x, y, **o: attention(y, y, y, bias=x, **o),
    "sinks": lambda x, y, **o: attention(y, y, y, sinks=x[0, :, 0, 0], **o),
    "lse": lambda x, y, **o: attention(x, y, y, return_lse=True, **o)[1],
}


@pytest.mark.covering
@pytest.mark.parametrize("of", WITH_RESPECT_TO)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("batch", [1, 2])
def test_every_way_gives_what_the_definition_gives(way, of, batch):
    x, y = (torch.randn(batch, 2, 2, 2, dtype=torch.float64) for _ in range(2))

    def derivative(backend):
        return WAYS[way](
            lambda x: WITH_RESPECT_TO[of](x, y, backend=backend), x.clone().requires_grad_()
        )

    torch.testing.assert_close(derivative("cpu"), derivative("reference"))


@pytest.mark.parametrize("names", [("query",), ("key", "value"), ("bias",), ("sinks", "value")])
def test_of_some_of_the_inputs(names):
    inputs = testing.make_inputs(CASES["everything"])
    leaves = inputs.differentiable()
    held = {n: x.detach() for n, x in leaves.items() if n not in names}

    def function(*tensors):
        named = held | dict(zip(names, tensors, strict=True))
        return finite(attention(**named, **inputs.keywords, return_lse=True, backend="cpu"))

    tensors = tuple(leaves[n] for n in names)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, check_fwd_over_rev=True)


def test_a_double_backward_computes_no_gradients_of_zeros():
    """A double backward must not run the backward for a gradient of out that is zero."""
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fused_attention":
                calls.append(func)
            return func(*args, **kwargs or {})

    for options in ({}, {"return_lse": True}):
        x = torch.randn(1, 2, 5, 4, requires_grad=True)
        result = attention(x, x + 1, x + 2, **options)
        out = result[0] if options else result
        (gradient,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        calls.clear()
        with Recorder():
            torch.autograd.grad(gradient.sum(), x)
        # ops.backward runs once, for the gradient that out gets through sin.
        assert sorted(map(str, calls)) == sorted(
            map(str, (ops.jvp, ops.backward_jvp, ops.backward))
        )


# -- Derivatives that are not built ------------------------------------------------------


@pytest.mark.parametrize("of", WITH_RESPECT_TO)
@pytest.mark.parametrize("way", ENDS)
def test_what_is_not_built_raises(way, of):
    x, y = (torch.randn(1, 2, 2, 2, dtype=torch.float64) for _ in range(2))
    with pytest.raises(NotImplementedError, match="attention: .* not built.*reference"):
        ENDS[way](lambda x: WITH_RESPECT_TO[of](x, y), x)


@pytest.mark.parametrize("way", ["create_graph", "dual numbers", "jvp"])
def test_weights_raise(way):
    x = torch.randn(1, 2, 3, 4, requires_grad=True)
    with pytest.raises(NotImplementedError, match="weights.* not built"):
        WAYS[way](lambda x: attention_with_weights(x, x, x)[1], x)


@pytest.mark.parametrize("way", ["dual numbers", "jvp"])
def test_tangents_of_alibi_slopes_raise(way):
    x, y = torch.rand(2, requires_grad=True), torch.randn(1, 2, 3, 4)
    with pytest.raises((NotImplementedError, RuntimeError), match="alibi_slopes"):
        WAYS[way](lambda x: attention(y, y, y, alibi_slopes=x), x)


@pytest.mark.parametrize("way", ["create_graph", "dual numbers", "jvp"])
@pytest.mark.parametrize("name", SEQUENCES)
def test_packed_sequences_raise(name, way):
    tensors, options = SEQUENCES[name]
    with pytest.raises(NotImplementedError, match="packed sequences.* not built.*reference"):
        WAYS[way](
            lambda x: attention(x, tensors["key"], tensors["value"], **options, backend="cpu"),
            tensors["query"].detach().requires_grad_(),
        )

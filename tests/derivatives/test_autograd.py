"""Gradients through `attention()` are right (gradcheck in float64), only those that are needed are
computed, and no more than necessary is saved. test_tangents.py tests second derivatives and forward
mode."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import feature_cases
from feature_cases import CASES, SEQUENCES, finite
from fused_attention import attention
from fused_attention import operators as ops
from fused_attention.call.backends import BACKENDS
from fused_attention.call.problem import FEATURES
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

pytestmark = pytest.mark.usefixtures("one_thread")

LSE = {"return_lse": True}
# Options for the Function of plain calls, and for that of all others.
BOTH_FUNCTIONS = {"plain": {}, "full": LSE}


def both_functions(test):
    return pytest.mark.parametrize("options", BOTH_FUNCTIONS.values(), ids=BOTH_FUNCTIONS)(test)


def leaves_of(case=CASES["plain"], **changes):
    inputs = testing.make_inputs(case)
    return list(inputs.differentiable(**changes).values())


def first(results):
    return results if isinstance(results, torch.Tensor) else results[0]


def total(results):
    """Returns a scalar that depends on each result in a different way."""
    results = [results] if isinstance(results, torch.Tensor) else results
    return sum((x.sin() * (n + 1)).sum() for n, x in enumerate(results))


def attend(*leaves, **options):
    """Returns `total` of the results of a call."""
    return total(attention(*leaves, **options))


def assert_all_equal(got, expected):
    assert len(got) == len(expected)
    for n, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), n


# -- Gradients are right -----------------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name, return_lse):
    inputs = testing.make_inputs(CASES[name])
    leaves = inputs.differentiable(torch.float64)

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return finite(attention(**named, **inputs.keywords, return_lse=return_lse, backend="cpu"))

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, tensors, fast_mode=not return_lse)
    # check_batched_grad runs vmap over the backward.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_batched_grad=True)


@pytest.mark.parametrize("name", SEQUENCES)
def test_gradcheck_of_sequences(name):
    tensors, options = SEQUENCES[name]
    leaves = tensors | {x: options[x] for x in ("bias", "sinks") if x in options}
    leaves = {x: tensor.detach().requires_grad_() for x, tensor in leaves.items()}

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return finite(attention(**options | named, return_lse=True, backend="cpu"))

    tensors = tuple(leaves.values())
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True, check_batched_grad=True)
    for got, want in zip(function(*tensors), reference_of(leaves, options), strict=True):
        torch.testing.assert_close(got, want)


def reference_of(leaves, options):
    return finite(attention(**options | leaves, return_lse=True, backend="reference"))


def test_every_feature_of_a_fused_backend_has_a_gradcheck():
    checked = set().union(
        *(feature_cases.features_of(case, **o) for case in CASES.values() for o in ({}, LSE)),
        *map(feature_cases.features_of_sequences, SEQUENCES),
    )
    rows = [row for row in BACKENDS if row.name != "reference"]
    built = set().union(*(set(FEATURES) - row.services["attention"].lacks for row in rows))
    assert checked <= set(FEATURES)
    assert built <= checked, "needs a case in feature_cases.py"


def test_the_cases_are_what_they_are_called():
    seen = testing.run(testing.make_inputs(CASES["fully masked rows"]))["lse"]
    assert 0 < seen.isinf().sum() < seen.numel()
    for name, bshd, last in (("BSHD", True, 1), ("strided", False, 2)):
        for leaf in leaves_of(CASES[name]):
            assert (leaf.stride(1) < leaf.stride(2)) == bshd and leaf.stride(-1) == last


def _packed(x):
    """Attends with views of one tensor [B, S, 3, H, D] as query, key and value, as models do."""
    return attention(*x.permute(2, 0, 3, 1, 4).unbind(), causal=True)


VIEWS = {
    "one tensor three times": ((1, 2, 4, 3), lambda x: attention(x, x, x)),
    "key is value": ((2, 2, 4, 3), lambda x: attention(x[:1] * 2, x[1:], x[1:])),
    "packed projection": ((1, 3, 3, 2, 4), _packed),
    "expanded heads": ((1, 1, 4, 3), lambda x: attention(*[x.expand(2, 3, 4, 3)] * 3)),
    "every other token": ((1, 2, 6, 3), lambda x: attention(x[:, :, ::2], x, x, causal="top_left")),
    "flipped dimensions": ((3, 4, 2, 1), lambda x: attention(*[x.permute(3, 2, 1, 0)] * 3)),
    "expanded bias": (
        (1, 2, 1, 4),
        lambda x: attention(*[x.mT.expand(2, 2, 4, 3)] * 3, bias=x.expand(2, 2, 4, 4)),
    ),
    "expanded gradient": ((1, 2, 4, 3), lambda x: attention(x, x, x).sum((0, 3))),
}


@pytest.mark.parametrize("name", VIEWS)
def test_gradcheck_through_views(name):
    shape, function = VIEWS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, x)


@pytest.mark.parametrize("name", ["plain", "sinks", "bias 1HQK", "mask BHQK"])
@pytest.mark.parametrize("used", ["out", "lse", "both"])
def test_outputs_that_nobody_uses(name, used):
    inputs = testing.make_inputs(CASES[name])
    gradients = []
    for backend in ("cpu", "reference"):
        leaves = inputs.differentiable()
        out, lse = finite(attention(**leaves, **inputs.keywords, **LSE, backend=backend))
        results = {"out": [out], "lse": [lse], "both": [out, lse]}[used]
        gradients.append(
            torch.autograd.grad(total(results), list(leaves.values()), materialize_grads=True)
        )
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "philox_seed": 4}], ids=str)
def test_a_second_backward_gives_the_same_bits(options):
    leaves = leaves_of(Case(Hq=4, Sq=67, Sk=131, bias="1HQK"))
    named = dict(zip(("query", "key", "value", "bias"), leaves, strict=True))
    loss, again = (total(attention(**named, **options, **LSE)) for _ in range(2))
    expected = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_all_equal(torch.autograd.grad(loss, leaves), expected)
    assert_all_equal(torch.autograd.grad(again, leaves), expected)


# -- Only the gradients that are needed --------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the arguments (bias_grad, sinks_grad) of all calls of attention_backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is ops.backward:
            call = ops.arguments(func, args, kwargs or {})
            self.calls.append((call["bias_grad"], call["sinks_grad"]))
        return func(*args, **kwargs or {})


NAMES = ("query", "key", "value", "bias", "sinks")


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_only_what_requires_a_gradient_gets_one(name, count):
    inputs = testing.make_inputs(CASES[name])
    leaves = inputs.differentiable()
    names = [n for n in NAMES if n in leaves]
    everything = torch.autograd.grad(
        attention(**leaves, **inputs.keywords).sin().sum(), [leaves[n] for n in names]
    )
    expected = dict(zip(names, everything, strict=True))
    for wanted in itertools.combinations(names, count):
        fresh = {n: x.detach().requires_grad_(n in wanted) for n, x in leaves.items()}
        out = attention(**fresh, **inputs.keywords)
        with Recorder() as recorder:
            out.sin().sum().backward()
        assert recorder.calls == [("bias" in wanted, "sinks" in wanted)]
        for n in names:
            if n in wanted:
                assert torch.equal(fresh[n].grad, expected[n]), (wanted, n)
            else:
                assert fresh[n].grad is None


@both_functions
def test_nothing_requires_a_gradient(options):
    tensors = [x.detach() for x in leaves_of()]
    assert not first(attention(*tensors, **options)).requires_grad
    leaves = leaves_of()
    with torch.no_grad():
        assert not first(attention(*leaves, **options)).requires_grad


@both_functions
def test_gradients_accumulate(options):
    leaves = leaves_of()
    expected = torch.autograd.grad(attend(*leaves, **options), leaves)
    for times in (1, 2, 3):
        attend(*leaves, **options).backward()
        for leaf, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_gradients_have_the_dtype_and_memory_order_of_their_inputs(dtype):
    for layout in ("BHSD", "BSHD"):
        case = Case(dtype=dtype, Hq=4, bias="11QK", sinks=True, memory_format=layout)
        inputs = testing.make_inputs(dataclasses.replace(case, bias_dtype=torch.float32))
        leaves = inputs.differentiable()
        attention(**leaves, **inputs.keywords).float().sum().backward()
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == leaf.dtype, name
            assert leaf.grad.shape == leaf.shape and leaf.grad.stride() == leaf.stride(), name


# -- Tensors saved for the backward ------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"causal": "top_left"},
        {"dropout_p": 0.2},
        {"mask": "11QK"},
        {"bias": "1H1K"},
        {"softcap": 2.0, "key_padding": True, "alibi": "H", "sinks": True},
        {"Hq": 4, "Dv": 8},
    ],
    ids=str,
)
@both_functions
def test_saved_are_the_inputs_out_and_lse(fields, options):
    inputs = testing.make_inputs(Case(Sq=300, Sk=310, **fields))
    leaves = inputs.differentiable()
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        results = attention(**leaves, **inputs.keywords, **options)
    given = [*leaves.values(), *inputs.keywords.values()]
    own = first(results).nbytes + inputs.grad_lse.nbytes  # out and lse
    assert saved, "nothing was saved: the hooks saw nothing"
    assert sum(saved.values()) <= sum(x.nbytes for x in given if isinstance(x, torch.Tensor)) + own
    assert {x.data_ptr() for x in leaves.values() if x.dim() == 4} <= set(saved)  # not copies


IN_PLACE = ["query", "key", "value", "bias", "sinks", "mask", "key_padding_mask", "alibi_slopes"]


@pytest.mark.parametrize("which", [*IN_PLACE, "philox_seed", "out", "lse"])
def test_changing_a_saved_tensor_in_place_raises(which):
    inputs = testing.make_inputs(
        Case(mask="11QK", bias="11QK", key_padding=True, alibi="H", sinks=True, dropout_p=0.1)
    )
    tensors = {**inputs.tensors, **inputs.keywords}
    weight = torch.ones((), requires_grad=True)  # so that query is no leaf
    out, lse = attention(**tensors | {"query": tensors["query"] * weight}, **LSE)
    plain = attention(*(tensors[n] * weight for n in ("query", "key", "value")))
    loss = out.sum() + lse.exp().sum()
    if which == "query":  # the call above saved the product, not the query
        query = tensors["query"] * weight
        loss = attention(query, tensors["key"], tensors["value"]).sum()
        tensors["query"] = query
    changed = {"out": plain, "lse": lse}.get(which, tensors.get(which))
    with torch.no_grad():
        changed.copy_(torch.zeros_like(changed))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (plain.sum() if which == "out" else loss).backward()


# -- Activation checkpointing, autocast, inference mode ----------------------------------


class Layer(torch.nn.Module):
    """Attention with learned projections, bias and sinks, and optional dropout."""

    def __init__(self, heads=2, width=8, **options):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.bias = torch.nn.Parameter(torch.randn(heads, 1, 1))
        self.sinks = torch.nn.Parameter(torch.randn(heads))
        self.heads, self.options = heads, options

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        options = {"bias": self.bias, "sinks": self.sinks, "causal": True, **self.options}
        return x + attention(q, k, v, **options).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_checkpointed_layers_have_the_same_gradients(use_reentrant, dropout_p):
    layers = torch.nn.Sequential(*(Layer(dropout_p=dropout_p) for _ in range(3)))
    x = torch.randn(2, 9, 8, requires_grad=True)

    def checkpointed(x):
        for layer in layers:
            x = checkpoint(layer, x, use_reentrant=use_reentrant)
        return x

    results = []
    for function in (layers, checkpointed, layers):
        torch.manual_seed(11)
        out = function(x)
        torch.rand(5)  # other code draws between forward and backward
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layers.parameters())])
        x.grad = None
        layers.zero_grad()
    assert_all_equal(results[1], results[0])
    assert_all_equal(results[2], results[0])
    torch.manual_seed(12)
    assert torch.equal(layers(x), results[0][0]) == (dropout_p == 0)


@pytest.mark.parametrize("lowest", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_autocast_casts_and_gradients_come_back_in_the_dtypes_of_the_leaves(lowest, cached):
    inputs = testing.make_inputs(Case(bias="1HQK", sinks=True, alibi="H"))
    leaves = inputs.differentiable()
    leaves["key"] = leaves["key"].detach().to(lowest).requires_grad_()
    with torch.autocast("cpu", lowest):
        for _ in range(1 + cached):
            out, lse = attention(**leaves, **inputs.keywords, **LSE)
    assert out.dtype == lowest and lse.dtype == torch.float32
    gradients = torch.autograd.grad(out.float().sum() + lse.sum(), list(leaves.values()))
    assert [x.dtype for x in gradients] == [x.dtype for x in leaves.values()]
    cast = {n: x.to(x.dtype if n == "sinks" else lowest) for n, x in leaves.items()}
    explicit = attention(**cast, **inputs.keywords, **LSE)
    assert_all_equal((out, lse), explicit)
    loss = explicit[0].float().sum() + explicit[1].sum()
    assert_all_equal(gradients, torch.autograd.grad(loss, list(leaves.values())))


def test_autocast_leaves_float64_alone():
    leaves = leaves_of()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*leaves)
    assert out.dtype == torch.float64
    assert [x.dtype for x in torch.autograd.grad(out.sum(), leaves)] == [torch.float64] * 3


@both_functions
def test_inference_mode(options):
    leaves = leaves_of()
    expected = first(attention(*leaves, **options))
    with torch.inference_mode():
        copies = [x.clone() for x in leaves]
        for tensors in (leaves, copies):
            out = first(attention(*tensors, **options))
            assert out.is_inference() and torch.equal(out, expected)
    assert torch.equal(first(attention(*copies, **options)), expected)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        attention(leaves[0], *copies[1:], **options)


# -- torch.func --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain", "everything", "gqa", "fully masked rows"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_functional_gradients_are_those_of_backward(name, return_lse):
    inputs = testing.make_inputs(CASES[name])
    leaves = inputs.differentiable()

    def loss(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return total(finite(attention(**named, **inputs.keywords, return_lse=return_lse)))

    expected = torch.autograd.grad(loss(*leaves.values()), list(leaves.values()))
    tensors = [x.detach() for x in leaves.values()]
    every = tuple(range(len(tensors)))
    assert_all_equal(torch.func.grad(loss, argnums=every)(*tensors), expected)
    value, vjp = torch.func.vjp(loss, *tensors)
    assert torch.equal(value, loss(*tensors))
    assert_all_equal(vjp(torch.ones_like(value)), expected)
    for n in every:
        assert torch.equal(torch.func.grad(loss, argnums=n)(*tensors), expected[n])


def test_jacrev_is_the_jacobian():
    tensors = [x.detach() for x in leaves_of()]
    every = (0, 1, 2)
    got = torch.func.jacrev(attention, argnums=every)(*tensors)
    expected = torch.autograd.functional.jacobian(
        lambda *x: attention(*x, backend="reference"), tuple(tensors)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_call_and_gradients_per_sample():
    layer = Layer().double()
    parameters = dict(layer.named_parameters())
    x = torch.randn(4, 5, 8, dtype=torch.float64)

    def loss(parameters, sample):
        return torch.func.functional_call(layer, parameters, (sample[None],)).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        expected = torch.autograd.grad(loss(parameters, x[i]), list(parameters.values()))
        for (name, got), want in zip(per_sample.items(), expected, strict=True):
            torch.testing.assert_close(got[i], want, msg=f"sample {i}, {name}")

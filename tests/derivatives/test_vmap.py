"""Compares torch.vmap of the public functions with a loop over the samples."""

import functools
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from feature_cases import CASES, finite
from fused_attention import attention, dropout_mask, scaled_dot_product_attention
from fused_attention.tools import testing

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # PyTorch warns of "a performance drop" where an operator has no vmap rule.
    pytest.mark.filterwarnings("error:There is a performance drop"),
]

SAMPLES = 3


def samples_of(x, dim):
    """Stacks x and tensors like it along dimension `dim`; returns x if `dim` is None."""
    if dim is None:
        return x
    others = [x.flatten()[torch.randperm(x.numel())].view(x.shape) for _ in range(SAMPLES - 1)]
    return torch.stack([x, *others], dim)


def sample(args, in_dims, i):
    pairs = zip(args, in_dims, strict=True)
    return [x if dim is None else x.select(dim, i) for x, dim in pairs]


def assert_as_loop(function, in_dims, *args, **options):
    results = [function(*sample(args, in_dims, i)) for i in range(SAMPLES)]
    if isinstance(results[0], torch.Tensor):
        expected = torch.stack(results)
    else:
        expected = tuple(torch.stack(x) for x in zip(*results, strict=True))
    got = torch.vmap(function, in_dims, **options)(*args)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64)


def tensors_like(*tensors, in_dims):
    return [samples_of(x, dim) for x, dim in zip(tensors, in_dims, strict=True)]


def repeated(count, dim, x):
    """Returns `count` times x along dimension `dim`, as a view, or x if `dim` is None."""
    return x if dim is None else x.expand(count, *x.shape).movedim(0, dim)


def patterns(count, dims):
    """Returns every choice of in_dims in which something is mapped."""
    return [p for p in itertools.product((None, *dims), repeat=count) if p != (None,) * count]


# -- query, key and value ----------------------------------------------------------------

FUNCTIONS = {
    "attention": attention,
    "with lse": lambda q, k, v: attention(q, k, v, return_lse=True),
    "gqa": lambda q, k, v: attention(q, k[:, :1], v[:, :1], causal="bottom_right"),
    "sdpa": lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True),
    "sdpa 3-D": lambda q, k, v: scaled_dot_product_attention(q[0], k[0], v[0]),
    "sdpa, batch broadcast": lambda q, k, v: scaled_dot_product_attention(q, k[:1], v[:1]),
    "one tensor three times": lambda q, k, v: attention(k, k, k),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_pattern_of_query_key_value(name, batch):
    q, k, v = randn(batch, 2, 3, 4), randn(batch, 2, 5, 4), randn(batch, 2, 5, 6)
    for in_dims in patterns(3, (0, -2)):
        assert_as_loop(FUNCTIONS[name], in_dims, *tensors_like(q, k, v, in_dims=in_dims))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_chunks(chunk_size):
    args = tensors_like(randn(2, 2, 3, 4), *[randn(2, 2, 5, 4)] * 2, in_dims=(0, 0, 0))
    assert_as_loop(attention, (0, 0, 0), *args, chunk_size=chunk_size)


@pytest.mark.parametrize("empty", [{"B": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0}, {"Sk": 0}], ids=str)
def test_empty(empty):
    sizes = {"B": 2, "Hq": 2, "Hkv": 2, "Sq": 3, "Sk": 5, "D": 4, "Dv": 4} | empty
    inputs = testing.make_inputs(testing.Case(**sizes, dtype=torch.float64))
    args = list(inputs.tensors.values())
    for in_dims in patterns(3, (0,)):
        assert_as_loop(
            attention, in_dims, *map(functools.partial(repeated, SAMPLES), in_dims, args)
        )


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, None), (None, 1, None)], ids=str)
def test_operators_take_no_samples(in_dims):
    """The vmap rules accept a mapped dimension of size 0 where PyTorch does."""
    tensors = randn(2, 2, 3, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 4)
    args = list(map(functools.partial(repeated, 0), in_dims, tensors))
    for options in ({}, {"sinks": randn(2)}, {"dropout_p": 0.5}):
        function = functools.partial(attention, **options)
        out = torch.vmap(function, in_dims, randomness="different")(*args)
        assert out.shape == (0, 2, 2, 3, 4)


# -- Every feature, forward and gradients ------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_feature(name):
    """Maps all tensors, each one alone, and all but one, tensor options included."""
    inputs = testing.make_inputs(CASES[name])
    keywords = inputs.keywords
    mappable = {n: x for n, x in keywords.items() if isinstance(x, torch.Tensor)}
    given = {**inputs.tensors, **mappable}
    floating = tuple(range(len(inputs.tensors)))

    def function(*args):
        call = keywords | dict(zip(given, args, strict=True))
        return finite(attention(**call, return_lse=True, backend="cpu"))

    def loss(*args):
        out, lse = function(*args)
        return out.sin().sum() + lse.sin().sum()

    gradients = torch.func.grad(loss, argnums=floating)
    count = len(given)
    alone = [tuple(0 if i == j else None for i in range(count)) for j in range(count)]
    all_but = [tuple(None if i == j else -1 for i in range(count)) for j in range(count)]
    for in_dims in [(0,) * count, *alone, *all_but]:
        args = tensors_like(*given.values(), in_dims=in_dims)
        assert_as_loop(gradients, in_dims, *args)
    for in_dims in [(0,) * count, *all_but]:
        assert_as_loop(function, in_dims, *tensors_like(*given.values(), in_dims=in_dims))


class Calls(TorchDispatchMode):
    """Records the names of our operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fused_attention":
            self.names.append(func._schema.name.removeprefix("fused_attention::"))
        return func(*args, **kwargs or {})


@pytest.mark.covering(1)
@pytest.mark.parametrize("in_dim", [0, None])
@pytest.mark.parametrize("name", CASES)
def test_one_call_for_all_samples(name, in_dim):
    """Each operator runs once, in both modes and the backward, whatever is mapped besides value."""
    inputs = testing.make_inputs(CASES[name])
    keywords = {n: x for n, x in inputs.keywords.items() if not isinstance(x, torch.Tensor)}
    options = {n: x for n, x in inputs.keywords.items() if n not in keywords}
    given = {**inputs.tensors, **options}

    def loss(*args):
        call = keywords | dict(zip(given, args, strict=True))
        out, lse = finite(attention(**call, return_lse=True, backend="cpu"))
        return out.sin().sum() + lse.sin().sum()

    floating = tuple(range(len(inputs.tensors)))
    gradients = torch.func.grad(loss, argnums=floating)

    def product(*args):
        tensors, rest = args[: len(floating)], args[len(floating) :]
        return torch.func.jvp(lambda *x: gradients(*x, *rest), tensors, tensors)[1]

    in_dims = tuple(0 if n == "value" else in_dim for n in given)
    args = tensors_like(*given.values(), in_dims=in_dims)
    with Calls() as calls:
        torch.vmap(product, in_dims)(*args)
    expected = ["attention_backward", "attention_backward_jvp", "attention_forward"]
    assert sorted(calls.names) == [*expected, "attention_jvp"]
    assert_as_loop(product, in_dims, *args)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (1, 1, 5), (2, 2, 3, 5), (2, 1, 1, 1)])
@pytest.mark.parametrize("kind", ["bool", "bias"])
@pytest.mark.parametrize("in_dims", patterns(2, (0,)), ids=str)
def test_masks_of_sdpa(shape, kind, in_dims):
    q, k = randn(2, 2, 3, 4), randn(2, 2, 5, 4)
    mask = torch.rand(shape) > 0.5 if kind == "bool" else randn(*shape)
    args = tensors_like(q, mask, in_dims=in_dims)
    assert_as_loop(lambda q, mask: scaled_dot_product_attention(q, k, k, mask), in_dims, *args)


def test_gradients_of_a_mapped_function():
    """grad of vmap, and backward through it, sum gradients of shared tensors over the samples."""
    q, k, v = tensors_like(
        randn(2, 2, 3, 4), randn(2, 2, 5, 4), randn(2, 2, 5, 4), in_dims=(0, None, 0)
    )
    mapped = torch.vmap(attention, (0, None, 0))

    def looped(q, k, v):
        return torch.stack([attention(q[i], k, v[i]) for i in range(SAMPLES)])

    results = []
    for function in (mapped, looped):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        results.append(torch.autograd.grad(out.sin().sum(), leaves))
    every = (0, 1, 2)
    results.append(torch.func.grad(lambda *x: mapped(*x).sin().sum(), every)(q, k, v))
    for got in (results[0], results[2]):
        for a, b in zip(got, results[1], strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"mask": "11QK", "bias": "1HQK"}])
@pytest.mark.parametrize("inner, outer", [((0, None, 0), (0, 0, None)), ((1, 1, 1), (2, None, 0))])
def test_nested(options, inner, outer):
    case = testing.Case(dtype=torch.float64, Sq=3, Sk=5, D=4, Dv=4, **options)
    inputs = testing.make_inputs(case)
    names = ("query", "key", "value")

    def function(*args):
        return attention(**inputs.tensors | inputs.keywords | dict(zip(names, args, strict=True)))

    args = tensors_like(*(inputs.tensors[n] for n in names), in_dims=inner)
    args = tensors_like(*args, in_dims=outer)
    assert_as_loop(torch.vmap(function, inner), outer, *args)
    gradient = torch.func.grad(lambda *x: function(*x).sin().sum())
    assert_as_loop(torch.vmap(gradient, inner), outer, *args)


# -- Dropout -----------------------------------------------------------------------------

Q, K, V = randn(1, 2, 6, 4), randn(1, 2, 40, 4), torch.eye(40, dtype=torch.float64)


def dropped(query, bias):
    """Returns the dropout mask that was drawn, bool [1, 2, 6, 40]."""
    value = V.expand(1, 2, 40, 40)
    return attention(query, K, value, bias=bias, dropout_p=0.5) != 0


RANDOM = {
    "query mapped": (lambda q, b: dropped(q, b), (0, None)),
    "only bias mapped": (lambda q, b: dropped(q, b), (None, 0)),
    "nothing mapped": (lambda q, b: dropped(Q, b[:1]) | (q != q).any(), (0, None)),
    "gradient, only bias mapped": (
        lambda q, b: torch.func.grad(
            lambda q: attention(q, K, V.expand(1, 2, 40, 40), bias=b, dropout_p=0.5).sin().sum()
        )(q),
        (None, 0),
    ),
}


def random_call(name, randomness):
    function, in_dims = RANDOM[name]
    args = list(map(functools.partial(repeated, SAMPLES), in_dims, (Q, randn(40))))
    torch.manual_seed(5)
    mapped = torch.vmap(function, in_dims, randomness=randomness)(*args)
    torch.manual_seed(5)
    return mapped, [function(*sample(args, in_dims, i)) for i in range(SAMPLES)]


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_needs_a_randomness(name):
    with pytest.raises(RuntimeError, match="randomness"):
        random_call(name, "error")


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_that_differs_draws_as_a_loop_does(name):
    mapped, looped = random_call(name, "different")
    assert torch.equal(mapped, torch.stack(looped))
    assert not torch.equal(mapped[0], mapped[1]) and not torch.equal(mapped[1], mapped[2])


@pytest.mark.parametrize("name", RANDOM)
def test_the_same_dropout_for_every_sample(name):
    mapped, looped = random_call(name, "same")
    assert torch.equal(mapped, looped[0].expand_as(mapped))


@pytest.mark.parametrize("inner", ["same", "different"])
@pytest.mark.parametrize("outer", ["same", "different"])
def test_nested_randomness(inner, outer):
    q = Q.expand(2, 3, *Q.shape)
    mapped = torch.vmap(torch.vmap(lambda q: dropped(q, None), randomness=inner), randomness=outer)(
        q
    )
    distinct = {tuple(x.flatten().tolist()) for x in mapped.flatten(0, 1)}
    assert len(distinct) == (2 if outer == "different" else 1) * (3 if inner == "different" else 1)


@pytest.mark.parametrize("seed", [7, torch.tensor([7, 1])], ids=str)
def test_a_given_seed_needs_no_randomness(seed):
    def function(q):
        return attention(q, K, V.expand(1, 2, 40, 40), dropout_p=0.5, philox_seed=seed)

    assert_as_loop(function, (0,), samples_of(Q, 0))


def test_dropout_mask_of_mapped_seeds():
    seeds = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert_as_loop(lambda seed: dropout_mask(1, 2, 3, 40, 0.5, seed), (0,), seeds)
    assert_as_loop(lambda seed: dropout_mask(1, 2, 3, 40, 0.5, seed), (1,), seeds.T)

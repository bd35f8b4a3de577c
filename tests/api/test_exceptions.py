"""A caller's exception passes through a call once, and random numbers are drawn once."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention import attention, masked_softmax, patch_sdpa, scaled_dot_product_attention
from fused_attention.attention_weights import attention_with_weights
from fused_attention.errors import ArgumentTypeError, ArgumentValueError
from fused_attention.modules import MultiheadAttention


class Custom(RuntimeError):
    pass


class Notimplemented(NotImplementedError):
    pass


EXCEPTIONS = [
    Custom, RuntimeError, ValueError, KeyError, TypeError, AttributeError, Notimplemented,
    torch.OutOfMemoryError, KeyboardInterrupt, MemoryError,
]  # fmt: skip


class Hook:
    """Raises at its `at`-th call."""

    def __init__(self, error, at):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


def saving(hook):
    def pack(x):
        hook()
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


def dispatching(hook):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "fused_attention":
                hook()
            return function(*args, **(kwargs or {}))

    return Mode()


def overriding(hook):
    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if "fused_attention" in str(function):
                hook()
            return function(*args, **(kwargs or {}))

    return Mode()


WAYS = {"saving": saving, "dispatching": dispatching, "overriding": overriding}


def qkv(*shape, **options):
    return [torch.randn(shape or (2, 2, 5, 8), requires_grad=True, **options) for _ in range(3)]


def patched(*inputs, **options):
    with patch_sdpa():
        return F.scaled_dot_product_attention(*inputs, **options)


_module = MultiheadAttention(16, 2, dropout=0.5, batch_first=True)


def module(query, key, value, dropout_p=0.0):
    _module.dropout = dropout_p
    return _module(*(x.transpose(1, 2).flatten(2) for x in (query, key, value)))[0]


def packed(query, key, value, **options):
    cu_seqlens = torch.tensor([0, 3, 10]).int()
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    return attention(*flat, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options)


DOORS = {
    "attention": attention,
    "attention, lse": lambda *x, **o: attention(*x, **o, return_lse=True)[0],
    "packed": packed,
    "sdpa": scaled_dot_product_attention,
    "patch": patched,
    "weights": lambda *x, **o: attention_with_weights(*x, **o)[0],
    "module": module,
    "softmax": lambda q, k, v, **o: masked_softmax(q, **o),
}


@given(
    way=st.sampled_from(sorted(WAYS)),
    door=st.sampled_from(sorted(DOORS)),
    kind=st.sampled_from(EXCEPTIONS),
    at=st.integers(1, 3),
    dropout_p=st.sampled_from([0.0, 0.5]),
    is_known=st.booleans(),
)
def test_an_exception_passes_through_once(way, door, kind, at, dropout_p, is_known):
    inputs = qkv()
    options = {"dropout_p": dropout_p} if dropout_p else {}
    if is_known:  # there is a plan for this kind of call
        DOORS[door](*inputs, **options)
    hook = Hook(kind("stop"), at)
    torch.manual_seed(5)
    caught = None
    try:
        with WAYS[way](hook):
            DOORS[door](*inputs, **options)
    except BaseException as error:
        caught = error
    assert hook.calls <= at
    assert (caught is hook.error) == (hook.calls == at), caught
    drawn = torch.get_rng_state()
    torch.manual_seed(5)
    states = [torch.get_rng_state()]
    if dropout_p:
        torch.empty(2, dtype=torch.int64).random_()
        states.append(torch.get_rng_state())
    assert any(torch.equal(drawn, state) for state in states)
    if caught is None:
        assert torch.equal(drawn, states[-1])


class Raising(torch.Tensor):
    error: BaseException

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "fused_attention" in str(function):
            raise cls.error
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_a_tensor_of_the_caller_raises(kind):
    Raising.error = kind("stop")
    inputs = [torch.randn(1, 2, 5, 8).as_subclass(Raising) for _ in range(3)]
    for door in (attention, scaled_dot_product_attention):
        for _ in range(2):
            with pytest.raises(kind) as caught:
                door(*inputs)
            assert caught.value is Raising.error


WRONG = {
    "dtype of key": lambda q, k, v: ((q, k.double(), v), {}),
    "dtype of value": lambda q, k, v: ((q, k, v.double()), {}),
    "device of key": lambda q, k, v: ((q, k.to("meta"), v), {}),
    "layout of key": lambda q, k, v: ((q, k.to_sparse(), v), {}),
    "no tensor": lambda q, k, v: ((q, k.tolist(), v), {}),
    "lengths": lambda q, k, v: ((q, k, v), {"seqused_k": torch.tensor([9, 2]).int()}),
    "pages": lambda q, k, v: (
        (q, k.transpose(1, 2), v.transpose(1, 2)),
        {"block_table": torch.tensor([[0], [7]]).int(), "seqused_k": torch.tensor([2, 2]).int()},
    ),
}
RIGHT_OPTIONS = {
    "lengths": {"seqused_k": torch.tensor([5, 2]).int()},
    "pages": {
        "block_table": torch.tensor([[0], [1]]).int(),
        "seqused_k": torch.tensor([2, 2]).int(),
    },
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_refused_call_draws_nothing(what, is_known, requires_grad):
    with contextlib.nullcontext() if requires_grad else torch.no_grad():
        query, key, value = qkv()
        if is_known:
            right = (query, key, value)
            if what == "pages":
                right = (query, key.transpose(1, 2), value.transpose(1, 2))
            attention(*right, **RIGHT_OPTIONS.get(what, {}), dropout_p=0.5)
        inputs, options = WRONG[what](query, key, value)
        state = torch.get_rng_state()
        with pytest.raises((ArgumentValueError, ArgumentTypeError)):
            attention(*inputs, **options, dropout_p=0.5)
        assert torch.equal(torch.get_rng_state(), state)


def test_validation_says_it_better_than_an_operator():
    query, key, value = qkv()
    for _ in range(2):  # the second round has plans
        attention(query, key, value)
        with pytest.raises(ArgumentValueError, match="key: expected dtype torch.float32"):
            attention(query, key.double(), value)
        scaled_dot_product_attention(query, key, value)
        with pytest.raises(ArgumentValueError, match="value: expected dtype torch.float32"):
            scaled_dot_product_attention(query, key, value.double())
        with pytest.raises(ArgumentValueError, match="key: expected device cpu"):
            attention(query, key.to("meta"), value)


def test_memory_that_lacks_is_no_wrong_argument():
    huge = torch.empty(1, 1, 1, 8).expand(2**45, 1, 1, 8)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not enough memory") as caught:
            attention(huge, huge, huge)
        assert type(caught.value) is RuntimeError

"""Compares MultiheadAttention with torch.nn's, and tests where it differs on purpose."""

import copy
import inspect
import io
import itertools
import json
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.utils import parametrizations, parametrize, prune

from attention_modules import HEADS, E, L, N, S, pair, sequence
from fused_attention import MultiheadAttention, attention, modules, replace_multihead_attention
from fused_attention.tools import testing
from fused_attention.tools.testing import cpu_isa
from selection import quick

causal_mask = nn.Transformer.generate_square_subsequent_mask
pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched",  # a warning of the original; ours accepts such masks
    "ignore:The PyTorch API of nested tensors",
    "ignore:enable_nested_tensor is True",
)


def run(module, inputs, masks, **options):
    """Returns output, weights and all gradients, computed from new leaves."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    masks = {
        name: x.detach().clone().requires_grad_() if x.is_floating_point() else x
        for name, x in masks.items()
    }
    out, weights = module(**leaves, **masks, **options)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    if weights is not None:
        loss = loss + (weights * torch.linspace(1, 3, weights.numel()).view(weights.shape)).sum()
    wanted = dict(module.named_parameters())
    wanted |= {name: x for name, x in (leaves | masks).items() if x.requires_grad}
    gradients = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    named = dict(zip(wanted, gradients, strict=True))
    results = {"out": out, "weights": weights} | {f"d{name}": x for name, x in named.items()}
    return {name: x for name, x in results.items() if x is not None}


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            got[name], x, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- The original's contract -------------------------------------------------------------


def test_signatures_are_the_original_ones():
    for method in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(cls, method)).parameters
            for cls in (MultiheadAttention, nn.MultiheadAttention)
        )
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


CONSTRUCTIONS = {
    "default": {},
    "no bias": {"bias": False},
    "batch_first": {"batch_first": True},
    "kdim and vdim": {"kdim": 10, "vdim": 14},
    "kdim, no bias, batch_first": {"kdim": 10, "bias": False, "batch_first": True},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "vdim": 14},
}


def with_one_tensor(module, self_attention):
    """Returns `module` with one object as key and value, and as query too if `self_attention`."""

    def call(query, key, value, **rest):
        return module(key if self_attention else query, key, key, **rest)

    call.named_parameters = module.named_parameters
    return call


ATTN_MASKS = (None, "2-D bool", "2-D float", "3-D bool", "3-D float")
PADDINGS = (None, "bool", "float")


def make_masks(attn, padding, batched):
    torch.manual_seed(1)
    masks = {}
    if attn:
        shape = (L, S) if attn.startswith("2-D") else ((N if batched else 1) * HEADS, L, S)
        floating = torch.randn(shape, dtype=torch.float64)
        masks["attn_mask"] = floating if "float" in attn else floating > 0.5
        masks["attn_mask"][..., 0] = False  # no row without a key
    if padding:
        floating = torch.randn(*((N,) if batched else ()), S, dtype=torch.float64)
        masks["key_padding_mask"] = floating if padding == "float" else floating > 0.5
        masks["key_padding_mask"][..., 0] = False
    return masks


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
@pytest.mark.parametrize("inputs_are", ["self", "key is value", "distinct", "unbatched"])
def test_forward_and_gradients(construction, inputs_are):
    options = CONSTRUCTIONS[construction]
    theirs, ours = pair(**options)
    batched, batch_first = inputs_are != "unbatched", options.get("batch_first", False)
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)
    query, key, value = (
        sequence(length, features, batch_first, batched)
        for length, features in ((L, E), (S, kdim), (S, vdim))
    )
    if inputs_are == "self" and kdim == vdim == E:
        query = key = value = sequence(S, E, batch_first)
    elif inputs_are == "key is value" and kdim == vdim:
        value = key
    rows = query.shape[1] if batch_first and batched else query.shape[0]
    kinds = itertools.product(ATTN_MASKS, PADDINGS, ((True, True), (True, False), (False, True)))
    part = list(CONSTRUCTIONS).index(construction) + len(inputs_are)
    for attn, padding, (need_weights, average) in list(kinds)[part % 4 :: 4]:
        masks = make_masks(attn, padding, batched)
        if attn and rows != L:
            masks["attn_mask"] = masks["attn_mask"].repeat_interleave(2, -2)[..., :rows, :]
        keywords = {"need_weights": need_weights, "average_attn_weights": average}
        for module in (theirs, ours):
            module.train(need_weights)

        inputs = {"query": query, "key": key, "value": value}
        results = []
        for module in (ours, theirs):
            if key is value:
                module = with_one_tensor(module, query is key)
            results.append(run(module, inputs, masks, **keywords))
        assert_same(*results, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("need_weights", [True, False])
def test_precision(dtype, need_weights):
    """The error against float64 is at most about twice that of the original."""
    assert not testing.luck_aside(lambda draw: imprecise(dtype, need_weights, draw))


def imprecise(dtype, need_weights, draw):
    torch.manual_seed(draw)
    exact, _ = pair(batch_first=True)
    exact = exact.to(dtype).double()
    theirs = nn.MultiheadAttention(E, HEADS, batch_first=True, dtype=dtype)
    theirs.load_state_dict(exact.state_dict())
    ours = MultiheadAttention.from_torch(theirs)
    x = torch.randn(4, 130, E, dtype=dtype)
    masks = {"attn_mask": torch.randn(130, 130, dtype=dtype)}

    def results(module, dtype):
        inputs = {name: x.to(dtype) for name in ("query", "key", "value")}
        typed = {name: mask.to(dtype) for name, mask in masks.items()}
        return run(module, inputs, typed, need_weights=need_weights)

    want, torch_got, got = (
        results(module, d) for module, d in ((exact, torch.float64), (theirs, dtype), (ours, dtype))
    )
    ratios = {}
    for name, x in want.items():
        assert got[name].dtype == torch_got[name].dtype == dtype
        error, torch_error = ((y[name].double() - x).abs().max() for y in (got, torch_got))
        floor = 4 * torch.finfo(dtype).eps * x.abs().max()
        ratios[name] = error / (2 * torch_error + floor) if error else 0.0
    wrong = [f"{name}: {ratio} of what is allowed" for name, ratio in ratios.items() if ratio > 1]
    return None if wrong and max(ratios.values()) <= testing.CHANCE else wrong


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("need_weights", [False, True])
def test_is_causal(batch_first, padding, need_weights):
    theirs, ours = pair(batch_first=batch_first)
    x = sequence(L, batch_first=batch_first)
    masks = {"attn_mask": torch.ones(L, L, dtype=torch.bool).triu(1)}
    if padding:
        masks["key_padding_mask"] = torch.tensor([[False] * 5, [False] * 3 + [True] * 2] * 2)[:N]
    inputs = {"query": x, "key": x, "value": x}
    expected = run(theirs, inputs, masks, need_weights=need_weights)
    for hint in (False, True):
        assert_same(run(ours, inputs, masks, need_weights=need_weights, is_causal=hint), expected)


def test_is_causal_for_other_lengths_is_top_left():
    _, ours = pair()
    mask = torch.ones(L, S, dtype=torch.bool).triu(1)
    for query, key, attn_mask in ((L, S, mask), (S, L, torch.ones(S, L).bool().triu(1))):
        q, k = sequence(query), sequence(key)
        torch.testing.assert_close(
            ours(q, k, k, attn_mask=attn_mask, is_causal=True), ours(q, k, k, attn_mask=attn_mask)
        )


@pytest.mark.parametrize("lengths", [(L, L), (L, S), (S, L)])
@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("construction", ["default", "batch_first", "bias_kv and zero_attn"])
def test_is_causal_needs_no_mask(construction, need_weights, lengths):
    """The original raises then. Extra keys are seen by every query."""
    theirs, ours = pair(**CONSTRUCTIONS[construction] | {"vdim": None})
    batch_first = construction == "batch_first"
    for batched in (True, False):
        query, key = (sequence(n, E, batch_first, batched) for n in lengths)
        inputs = {"query": query, "key": key, "value": key}
        mask = torch.ones(*lengths, dtype=torch.bool).triu(1)
        for padding in (None, torch.arange(lengths[1]) > 3):
            masks = {} if padding is None else {"key_padding_mask": padding}
            if masks and batched:
                masks["key_padding_mask"] = padding.expand(N, -1)
            expected = run(theirs, inputs, masks | {"attn_mask": mask}, need_weights=need_weights)
            got = run(ours, inputs, masks, need_weights=need_weights, is_causal=True)
            assert_same(got, expected)
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        theirs(query, key, key, is_causal=True)


def test_extra_keys_are_seen_in_causal_attention_too():
    """The original hides them if it need not return weights, and shows them if it must."""
    theirs, ours = pair(add_bias_kv=True, add_zero_attn=True)
    x, mask = sequence(L), causal_mask(L, dtype=torch.float64)
    expected, _ = theirs(x, x, x, attn_mask=mask, is_causal=True)
    for need_weights in (False, True):
        out, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        torch.testing.assert_close(out, expected)


def test_a_mask_that_requires_a_gradient_gets_it_whatever_the_hint():
    _, ours = pair()
    x = sequence(L)
    mask = causal_mask(L, dtype=torch.float64).requires_grad_()
    out, _ = ours(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)
    (gradient,) = torch.autograd.grad(out.square().sum(), mask)
    assert gradient.tril().count_nonzero() > 0 and gradient.triu(1).count_nonzero() == 0


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [(0, L, S), (2, L, 0), (2, 0, S), (0, 0, 0)])
def test_empty(sizes, need_weights):
    batch, rows, keys = sizes
    theirs, ours = pair(batch_first=True)
    query, key = (torch.randn(batch, n, E, dtype=torch.float64) for n in (rows, keys))
    expected = theirs(query, key, key, need_weights=need_weights)
    out, weights = ours(query, key, key, need_weights=need_weights)
    torch.testing.assert_close(out, expected[0])
    assert (weights is None) == (not need_weights)
    if weights is not None:
        torch.testing.assert_close(weights, expected[1])


def test_autocast():
    theirs, ours = pair(torch.float32)
    x = sequence(L, dtype=torch.float32)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = (
                module(x, x, x, attn_mask=causal_mask(L), need_weights=need_weights)
                for module in (ours, theirs)
            )
        for a, b in zip(got, expected, strict=True):
            if b is not None:
                assert a.dtype == b.dtype
                torch.testing.assert_close(a, b, atol=0.05, rtol=0.05)


def test_the_results_are_laid_out_as_modules_expect():
    for batch_first in (False, True):
        _, ours = pair(batch_first=batch_first)
        x = sequence(L, batch_first=batch_first)
        assert all(y.is_contiguous() for y in ours(x, x, x))


# -- Samples without a visible key -------------------------------------------------------


@pytest.mark.parametrize("floating", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("need_weights", [True, False])
def test_a_fully_padded_sample_gives_the_bias_in_every_mode(floating, training, need_weights):
    _, ours = pair(batch_first=True, dropout=0.3)
    ours.train(training)
    x = sequence(L, batch_first=True)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[1] = True
    padding[2, 3:] = True
    if floating:
        padding = torch.zeros(N, L, dtype=torch.float64).masked_fill(padding, float("-inf"))
    results = run(
        ours,
        {"query": x, "key": x, "value": x},
        {},
        key_padding_mask=padding,
        need_weights=need_weights,
    )
    assert all(x.isfinite().all() for x in results.values())
    with torch.no_grad():
        out, weights = ours(x, x, x, key_padding_mask=padding, need_weights=need_weights)
    assert torch.equal(out[1], ours.out_proj.bias.expand(L, E))
    if need_weights:
        assert weights[1].count_nonzero() == 0 and weights[2, :, 3:].count_nonzero() == 0


def test_rows_hidden_by_attn_mask_give_the_bias():
    _, ours = pair()
    x = sequence(L)
    for mask in (torch.zeros(L, L).bool(), torch.zeros(L, L, dtype=torch.float64)):
        mask[2] = True if mask.dtype == torch.bool else float("-inf")
        out, weights = ours(x, x, x, attn_mask=mask)
        torch.testing.assert_close(out[2], ours.out_proj.bias.expand(N, E))
        assert weights[:, 2].count_nonzero() == 0 and weights.isfinite().all()


@pytest.mark.parametrize("need_weights", [True, False])
def test_padding_may_hold_nan(need_weights):
    _, ours = pair(batch_first=True)
    query, key = sequence(L, batch_first=True).requires_grad_(), sequence(S, batch_first=True)
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[:, 4:] = True
    poisoned = key.masked_fill(padding.unsqueeze(-1), float("nan"))
    keywords = {"key_padding_mask": padding, "need_weights": need_weights}
    results = []
    for given in (key, poisoned):
        out, weights = ours(query, given, given, **keywords)
        loss = out.square().sum() + (0 if weights is None else weights.square().sum())
        results.append((out, weights, *torch.autograd.grad(loss, query)))
    for a, b in zip(*results, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


# -- Dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_output_and_returned_weights_share_one_dropout_mask(p):
    _, ours = pair(dropout=p, batch_first=True)
    x = sequence(L, batch_first=True)
    torch.manual_seed(3)
    out, weights = ours(x, x, x, average_attn_weights=False)
    v = (x @ ours.in_proj_weight.T + ours.in_proj_bias).chunk(3, -1)[2]
    v = v.unflatten(-1, (HEADS, -1)).transpose(1, 2)
    again = ours.out_proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(again, out)
    dropped = (weights == 0).double().mean()
    assert dropped == 1 if p == 1 else 0.1 < dropped < 0.4
    torch.manual_seed(3)
    averaged_out, averaged = ours(x, x, x)
    assert torch.equal(averaged_out, out)
    torch.testing.assert_close(averaged, weights.mean(1))
    ours.eval()
    assert (ours(x, x, x)[1] > 0).all()


def test_dropout_without_weights_follows_the_seed_and_ends_in_evaluation():
    _, ours = pair(dropout=0.5)
    x = sequence(L)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ours(x, x, x, need_weights=False)[0])
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    ours.eval()
    assert torch.equal(*(ours(x, x, x, need_weights=False)[0] for _ in range(2)))


# -- Returned weights (test_weights.py has more) -----------------------------------------


def test_weights_gradcheck():
    _, ours = pair()
    x = torch.randn(4, 2, E, dtype=torch.float64, requires_grad=True)
    mask = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    for average in (True, False):
        torch.autograd.gradcheck(
            lambda x, mask, average=average: ours(
                x, x, x, attn_mask=mask, average_attn_weights=average
            ),
            (x, mask),
            fast_mode=True,
        )


def test_second_derivatives_of_the_weights_raise():
    _, ours = pair()
    x = sequence(L).requires_grad_()
    _, weights = ours(x, x, x)
    (gradient,) = torch.autograd.grad(weights.square().sum(), x, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="twice|double|not built"):
        gradient.sum().backward()


def test_nothing_of_the_size_of_all_heads_is_saved():
    _, ours = pair()
    x = sequence(64)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        ours(x, x, x, attn_mask=torch.zeros(64, 64, dtype=torch.float64))
    assert max(sizes) < N * 64 * 64


# -- torch.compile and torch.func --------------------------------------------------------


@pytest.mark.covering(1)
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(need_weights, backend):
    torch._dynamo.reset()
    _, ours = pair(torch.float32, batch_first=True, dropout=0.3)
    compiled = torch.compile(ours, fullgraph=True, backend=backend)
    for length in (5, 6):
        x = sequence(length, batch_first=True, dtype=torch.float32)
        masks = {"key_padding_mask": torch.arange(length).expand(N, -1) > 3}
        masks["attn_mask"] = torch.randn(length, length)
        inputs = {"query": x, "key": x, "value": x}
        results = []
        for module in (compiled, ours):
            torch.manual_seed(7)
            results.append(run(module, inputs, masks, need_weights=need_weights))
        names = [{n.replace("_orig_mod.", ""): y for n, y in r.items()} for r in results]
        assert_same(*names, atol=1e-5, rtol=1e-4)


def test_one_compilation_serves_all_lengths():
    torch._dynamo.reset()
    counter = CompileCounter()
    _, ours = pair(torch.float32, batch_first=True)
    compiled = torch.compile(ours, fullgraph=True, backend=counter, dynamic=True)
    for length in (5, 8, 13):
        x = sequence(length, batch_first=True, dtype=torch.float32)
        with torch.no_grad():
            for a, b in zip(compiled(x, x, x), ours(x, x, x), strict=True):
                torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


def test_torch_func_gradients_of_parameters():
    theirs, ours = pair()
    x = sequence(L)

    def loss(module):
        def of(parameters):
            out, weights = torch.func.functional_call(module, parameters, (x, x, x))
            return out.square().sum() + weights.square().sum()

        return torch.func.grad(of)({n: p.detach() for n, p in module.named_parameters()})

    assert_same(loss(ours), loss(theirs))


# -- Modules and parameters that others changed ----------------------------------------------


def random_nested(lengths, features, layout):
    samples = [torch.randn(n, features, dtype=torch.float64) for n in lengths]
    return torch.nested.nested_tensor(samples, layout=layout)


def many_calls(construction):
    """Yields (query, key, value) of every kind that a module of this construction takes."""
    options = CONSTRUCTIONS[construction]
    batch_first = options.get("batch_first", False)
    kdim, vdim = options.get("kdim", E), options.get("vdim", E)
    for batched in (True, False):
        yield tuple(
            sequence(length, features, batch_first, batched)
            for length, features in ((L, E), (S, kdim), (S, vdim))
        )
    if kdim == vdim == E:
        x, key = (sequence(n, E, batch_first) for n in (L, S))
        yield from ((x, x, x), (x, key, key))
    if batch_first:
        for layout in (torch.strided, torch.jagged):
            if kdim == vdim == E:
                x = random_nested((3, 5, 1), E, layout)
                yield (x, x, x)
            key = random_nested((4, 2, 6), kdim, layout)
            value = key if kdim == vdim else random_nested((4, 2, 6), vdim, layout)
            if layout == torch.strided or key is value:
                yield (random_nested((3, 5, 1), E, layout), key, value)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_hooks_of_out_proj_run_once_per_call(construction, one_thread):
    _, ours = pair(**CONSTRUCTIONS[construction])
    ran = []
    ours.out_proj.register_forward_pre_hook(lambda *_: ran.append("before"))
    ours.out_proj.register_forward_hook(lambda *_: ran.append("after"))
    ours.out_proj.register_full_backward_pre_hook(lambda *_: ran.append("gradient before"))
    ours.out_proj.register_full_backward_hook(lambda *_: ran.append("gradient after"))
    for query, key, value in many_calls(construction):
        for training, need_weights in itertools.product((True, False), repeat=2):
            ran.clear()
            out, _ = ours.train(training)(query, key, value, need_weights=need_weights)
            assert ran == ["before", "after"]
            out = torch.cat(out.unbind()) if out.is_nested else out
            out.square().sum().backward()
            assert ran == ["before", "after", "gradient before", "gradient after"]
            with torch.no_grad():
                ours(query, key, value, need_weights=need_weights)
            assert ran[4:] == ["before", "after"]


def test_hooks_of_out_proj_run_once_per_call_under_autocast():
    _, ours = pair(torch.float32)
    seen = []
    ours.out_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    x = sequence(L, dtype=torch.float32)
    for need_weights in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = ours(x, x, x, need_weights=need_weights)
        assert len(seen) == 1 and seen.pop() is out and out.dtype == torch.bfloat16


def test_hooks_of_out_proj_may_change_what_passes():
    theirs, ours = pair(batch_first=True)
    x = sequence(L, batch_first=True)
    for need_weights in (True, False):
        expected, _ = theirs(x, x, x, need_weights=need_weights)
        doubled = ours.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
        torch.testing.assert_close(ours(x, x, x, need_weights=need_weights)[0], 2 * expected)
        doubled.remove()
        silenced = ours.out_proj.register_forward_pre_hook(lambda module, args: (0 * args[0],))
        out, _ = ours(x, x, x, need_weights=need_weights)
        torch.testing.assert_close(out, ours.out_proj.bias.expand_as(out))
        silenced.remove()


class Masked(nn.Module):
    """Computes what pruning computes, as a parametrization."""

    def __init__(self, mask):
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, x):
        return x * self.mask


PRUNED = ("out_proj.weight", "out_proj.bias", "in_proj_weight", "in_proj_bias", "q_proj_weight")
PRUNED += ("k_proj_weight", "v_proj_weight", "bias_k", "bias_v")


def owner(module, name):
    return module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]


@pytest.mark.parametrize("when", ["pruned", "pruned, then replaced"])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_pruned_modules_train_as_the_original(construction, when, one_thread):
    """The original never runs the hook that prunes out_proj, so it gets a parametrization."""
    theirs, ours = pair(**CONSTRUCTIONS[construction])
    if when == "pruned, then replaced":
        ours = copy.deepcopy(theirs)
    names = [name for name in PRUNED if name in theirs.state_dict()]
    for name in names:
        mask = (torch.rand_like(theirs.state_dict()[name]) < 0.6).double()
        prune.custom_from_mask(*owner(ours, name), mask)
        parametrize.register_parametrization(*owner(theirs, name), Masked(mask))
    if when == "pruned, then replaced":
        ours = MultiheadAttention.from_torch(ours)
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (ours, theirs)]
    calls = [call for call in many_calls(construction) if not call[0].is_nested]
    for step, inputs in enumerate(calls * 2):
        for module, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            out, weights = module(*inputs, need_weights=step % 2 == 0)
            (out.square().mean() + (0 if weights is None else weights.square().sum())).backward()
            optimizer.step()
    with torch.no_grad():
        for name in names:
            prune.remove(*owner(ours, name))
            parametrize.remove_parametrizations(*owner(theirs, name))
        for name, x in ours.state_dict().items():
            if name in names:
                assert 0 < (x == 0).double().mean() < 1
    assert_same(ours.state_dict(), dict(theirs.state_dict()), atol=1e-10, rtol=1e-10)


PARAMETRIZATIONS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}


@pytest.mark.parametrize("kind", PARAMETRIZATIONS)
@pytest.mark.parametrize("construction", ["default", "kdim, no bias, batch_first"])
def test_parametrizations(kind, construction, one_thread):
    theirs, ours = pair(**CONSTRUCTIONS[construction])
    names = [n for n in PRUNED if n in theirs.state_dict() and theirs.state_dict()[n].dim() == 2]
    for module in (theirs, ours):
        for name in names:
            PARAMETRIZATIONS[kind](*owner(module, name))
    ours.load_state_dict(theirs.state_dict())
    # In training each read advances spectral_norm, and the original reads more than once.
    for training in (False,) if kind == "spectral_norm" else (False, True):
        for module in (theirs, ours):
            module.train(training)
        for query, key, value in many_calls(construction):
            if query is not key and not query.is_nested:
                inputs = {"query": query, "key": key, "value": value}
                for need_weights in (True, False):
                    results = (
                        run(x, inputs, {}, need_weights=need_weights) for x in (ours, theirs)
                    )
                    assert_same(*results, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_parametrization_is_computed_once_per_call(construction, one_thread):
    computed = []

    class Counted(nn.Module):
        def forward(self, x):
            computed.append(self)
            return x

    _, ours = pair(**CONSTRUCTIONS[construction])
    names = [name for name in PRUNED if name in ours.state_dict()]
    for name in names:
        parametrize.register_parametrization(*owner(ours, name), Counted())
    for inputs in many_calls(construction):
        computed.clear()
        ours(*inputs)
        assert len(computed) == len(set(computed)) == len(names)


class LowRank(nn.Module):
    """LoRA (Hu et al. 2021): W x + B A x, with or without an attribute `weight`."""

    def __init__(self, base, has_weight):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(2, base.in_features, dtype=base.weight.dtype))
        self.b = nn.Parameter(torch.randn(base.out_features, 2, dtype=base.weight.dtype))
        if has_weight:
            self.weight = base.weight

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_a_wrapper_in_the_place_of_out_proj(construction, has_weight, one_thread):
    theirs, ours = pair(**CONSTRUCTIONS[construction])
    wrapper = ours.out_proj = LowRank(ours.out_proj, has_weight)
    merged = theirs.out_proj.weight + wrapper.b @ wrapper.a
    for inputs in many_calls(construction):
        for training, need_weights in itertools.product((True, False), repeat=2):
            results = []
            for module, changed in ((ours, {}), (theirs, {"out_proj.weight": merged})):
                if inputs[0].is_nested and module is theirs:
                    continue
                module.train(training)
                out, _ = torch.func.functional_call(
                    module, changed, inputs, {"need_weights": need_weights}
                )
                out = torch.cat(out.unbind()) if out.is_nested else out
                loss = out.square().sum()
                grads = torch.autograd.grad(loss, (wrapper.a, wrapper.b), retain_graph=True)
                results.append((out, *grads))
            if inputs[0].is_nested:
                assert all(gradient.count_nonzero() for gradient in results[0])
            else:
                torch.testing.assert_close(*results)
        if not inputs[0].is_nested:
            ours.explain(*inputs)


@pytest.mark.parametrize("has_weight", [True, False])
def test_a_wrapper_in_pytorch_transformers(has_weight, one_thread):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    original = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 32, **options), 2)
    ours, x = copy.deepcopy(original), sequence(S, batch_first=True)
    for mine, layer in zip(ours.layers, original.layers, strict=True):
        mine.self_attn.out_proj = LowRank(mine.self_attn.out_proj, has_weight)
        with torch.no_grad():
            layer.self_attn.out_proj.weight += mine.self_attn.out_proj.b @ mine.self_attn.out_proj.a
    replace_multihead_attention(ours)
    for training in (True, False):
        with torch.no_grad():
            for padding in padding_masks().values():
                out = ours.train(training)(x, src_key_padding_mask=padding)
                expected = original.train()(x, src_key_padding_mask=padding)
                torch.testing.assert_close(out, expected)


def test_out_proj_may_have_another_width():
    theirs, ours = pair()
    ours.out_proj = theirs.out_proj = nn.Linear(E, 10, dtype=torch.float64)
    for inputs in many_calls("default"):
        torch.testing.assert_close(ours(*inputs), theirs(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="no quantized kernels")
def test_out_proj_may_be_quantized():
    quantization = pytest.importorskip("torch.ao.quantization")
    from torch.ao.nn.quantized import dynamic

    _, ours = pair(torch.float32, batch_first=True)
    quantized = quantization.quantize_dynamic(
        copy.deepcopy(ours),
        {type(ours.out_proj)},
        mapping={type(ours.out_proj): dynamic.Linear},
    )
    assert type(quantized.out_proj) is dynamic.Linear and callable(quantized.out_proj.weight)
    heads = []
    ours.out_proj.register_forward_pre_hook(lambda module, args: heads.append(*args))
    x = sequence(L, batch_first=True, dtype=torch.float32)
    padding = torch.arange(L).expand(N, -1) > 3
    for need_weights in (True, False):
        options = {"key_padding_mask": padding, "need_weights": need_weights}
        exact, _ = ours(x, x, x, **options)
        with torch.no_grad():
            out, _ = quantized(x, x, x, **options)
        assert torch.equal(out, quantized.out_proj(heads.pop()))
        assert 0 < (out - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_wrapper_with_a_hook_compiles():
    torch._dynamo.reset()
    _, ours = pair(torch.float32, batch_first=True)
    ours.out_proj = LowRank(ours.out_proj, has_weight=False)
    ours.out_proj.register_forward_hook(lambda module, args, out: 2 * out)
    prune.random_unstructured(ours, "in_proj_weight", 0.5)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = sequence(L, batch_first=True, dtype=torch.float32)
    with torch.no_grad():
        out, expected = (f(x, x, x, need_weights=False)[0] for f in (compiled, ours))
    torch.testing.assert_close(out, expected)


# -- Inside PyTorch's transformers -------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """Lists the modules whose forward ran, once for each call."""
    count = []
    forward = MultiheadAttention.forward

    def counted(self, *args, **kwargs):
        count.append(self)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MultiheadAttention, "forward", counted)
    return count


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("mask", [None, "padding", "causal"])
def test_the_fast_path_of_encoder_layers_does_not_bypass_it(calls, activation, mask):
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, activation=activation, batch_first=True)
    layer.eval()
    x = sequence(L, batch_first=True, dtype=torch.float32)
    options = {}
    if mask == "padding":
        options["src_key_padding_mask"] = torch.arange(L).expand(N, -1) > 2
    if mask == "causal":
        options = {"src_mask": causal_mask(L), "is_causal": True}
    with torch.no_grad():
        expected = layer(x, **options)
        assert replace_multihead_attention(layer) is layer
        out = layer(x, **options)
    assert len(calls) == 1
    torch.testing.assert_close(out, expected)


class OwnEncoder(nn.TransformerEncoder):
    """A subclass, as models define them."""


def replaced_then_built(original):
    layer = replace_multihead_attention(copy.deepcopy(original.layers[0]))
    return nn.TransformerEncoder(layer, 2, copy.deepcopy(original.norm))


def built_by_hand_then_replaced(original):
    layer = copy.deepcopy(original.layers[0])
    layer.self_attn = MultiheadAttention.from_torch(layer.self_attn)
    return replace_multihead_attention(
        nn.TransformerEncoder(layer, 2, copy.deepcopy(original.norm))
    )


def half_replaced(original):
    """Only the second layer is ours, and the encoder is passed afterwards."""

    class Other(nn.MultiheadAttention):
        """A subclass, which is not replaced."""

    model = copy.deepcopy(original)
    model.layers[0].self_attn.__class__ = Other
    model.layers[0].register_forward_hook(lambda *_: None)  # its own native path misreads masks too
    return replace_multihead_attention(model)


def pickled(original):
    buffer = io.BytesIO()
    torch.save(replace_multihead_attention(copy.deepcopy(original)), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


ENCODERS = {
    "replaced": lambda original: replace_multihead_attention(copy.deepcopy(original)),
    "replaced, then copied": lambda original: copy.deepcopy(
        replace_multihead_attention(copy.deepcopy(original))
    ),
    "replaced, then pickled": pickled,
    "inside a model": lambda original: replace_multihead_attention(
        nn.ModuleDict({"encoder": copy.deepcopy(original)})
    )["encoder"],
    "layer replaced, then built": replaced_then_built,
    "built by hand, then replaced": built_by_hand_then_replaced,
    "half replaced": half_replaced,
}


def padding_masks():
    """Returns padding masks by name; none of them hides all keys of a sample."""
    lengths = torch.tensor([[S], [2], [5]])
    ends = torch.arange(S) >= lengths
    scattered = torch.rand(N, S) < 0.5
    scattered[:, torch.randint(S, ())] = False
    zeros, finite = torch.zeros(N, S, dtype=torch.float64), torch.randn(N, S, dtype=torch.float64)
    return {
        "none": None,
        "bool": ends,
        "bool, scattered": scattered,
        "0 and -inf": zeros.masked_fill(ends, float("-inf")),
        "a value at the end": zeros.masked_fill(ends, torch.randn(()).double().item()),
        "no value is 0": finite,
        "values and -inf": finite.masked_fill(scattered, float("-inf")),
    }


@pytest.mark.parametrize("built", ENCODERS)
def test_encoders_in_evaluation_read_padding_masks_as_in_training(built, calls, one_thread):
    """The nested tensors of the original encoder take every nonzero value for padding."""
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    for cls, norm_first in ((nn.TransformerEncoder, False), (OwnEncoder, True)):
        layer = nn.TransformerEncoderLayer(E, HEADS, 32, norm_first=norm_first, **options)
        original = cls(layer, 2, nn.LayerNorm(E, dtype=torch.float64))
        ours = ENCODERS[built](original).eval()
        assert ours.state_dict().keys() == original.state_dict().keys()
        ours.load_state_dict(original.state_dict())
        x = sequence(S, batch_first=True)
        for name, padding in padding_masks().items():
            calls.clear()
            with torch.no_grad():
                expected = original.train()(x, src_key_padding_mask=padding)
                out = ours(x, src_key_padding_mask=padding)
            assert_same({name: out}, {name: expected})
            assert len(calls) == (1 if built == "half replaced" else 2)
        with torch.no_grad():
            mask = causal_mask(S, dtype=torch.float64)
            torch.testing.assert_close(ours(x, mask=mask), original(x, mask=mask))


def test_the_encoder_of_a_whole_transformer_reads_padding_masks_as_in_training(one_thread):
    options = {"dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    original = nn.Transformer(E, HEADS, 2, 1, 32, **options)
    ours = replace_multihead_attention(copy.deepcopy(original)).eval()
    src, tgt = sequence(S, batch_first=True), sequence(L, batch_first=True)
    for name, padding in padding_masks().items():
        masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding}
        with torch.no_grad():
            assert_same({name: ours(src, tgt, **masks)}, {name: original(src, tgt, **masks)})


def test_what_a_replacement_changes_in_parents():
    """It changes only what bypasses the module, and nothing where no module was replaced."""

    class Other(nn.MultiheadAttention):
        pass

    layer = nn.TransformerEncoderLayer(E, HEADS, 32, activation="gelu", batch_first=True)
    model = nn.ModuleDict({"ours": nn.TransformerEncoder(layer, 2)})
    layer.self_attn.__class__ = Other
    model["other"] = nn.TransformerEncoder(layer, 2)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    replace_multihead_attention(model)
    changed = {}
    for name, module in model.named_modules():
        if type(module) is not MultiheadAttention:
            now = {key: x for key, x in vars(module).items() if key != "_modules"}
            assert now.keys() | {"_modules"} == before[name].keys()
            new = {key: x for key, x in now.items() if x is not before[name][key]}
            changed |= {name: new} if new else {}
    assert changed == {
        "ours": {"enable_nested_tensor": False, "use_nested_tensor": False},
        "ours.layers.0": {"activation_relu_or_gelu": 0},
        "ours.layers.1": {"activation_relu_or_gelu": 0},
    }


def test_an_encoder_around_a_replaced_layer_is_built_without_a_warning(recwarn):
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True)
    nn.TransformerEncoder(replace_multihead_attention(layer), 2, enable_nested_tensor=False)
    assert not recwarn.list


def test_a_fully_padded_sample_in_an_encoder_is_finite():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True), 2)
    replace_multihead_attention(encoder)
    x = sequence(S, batch_first=True, dtype=torch.float32)
    padding = torch.arange(S) >= torch.tensor([[7], [0], [5]])
    for training in (True, False):
        encoder.train(training)
        assert encoder(x, src_key_padding_mask=padding).isfinite().all()


def test_decoder_layer_and_whole_transformer(calls):
    options = {"dim_feedforward": 32, "dropout": 0.0, "dtype": torch.float64}
    theirs = nn.Transformer(E, HEADS, 2, 2, **options)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    src, tgt = sequence(S), sequence(L)
    keywords = {
        "tgt_mask": causal_mask(L, dtype=torch.float64),
        "src_key_padding_mask": torch.arange(S).expand(N, -1) > 4,
        "memory_key_padding_mask": torch.arange(S).expand(N, -1) > 4,
    }
    for training in (True, False):
        calls.clear()
        results = []
        for model in (ours, theirs):
            model.train(training)
            out = model(src, tgt, **keywords)
            results.append([out, *torch.autograd.grad(out.square().sum(), model.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
        assert len(calls) == 2 + 2 * 2


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    _, ours = pair(batch_first=True)
    queries = [torch.randn(n, E, dtype=torch.float64) for n in (3, 5, 1)]
    keys = [torch.randn(n, E, dtype=torch.float64) for n in (4, 2, 6)]
    query, key = (torch.nested.nested_tensor(x, layout=layout) for x in (queries, keys))
    out, weights = ours(query, key, key)
    assert out.is_nested and out.layout == layout and weights.shape == (3, 5, 6)
    for i, (q, k) in enumerate(zip(queries, keys, strict=True)):
        expected, expected_weights = ours(q, k, k)
        torch.testing.assert_close(out[i], expected)
        torch.testing.assert_close(weights[i, : len(q), : len(k)], expected_weights)
        assert weights[i, len(q) :].count_nonzero() == weights[i, :, len(k) :].count_nonzero() == 0
    with pytest.raises(AssertionError, match="masks"):
        ours(query, key, key, key_padding_mask=torch.zeros(3, 6).bool())
    with pytest.raises(AssertionError, match="key: expected all three nested"):
        ours(query, torch.randn(3, 6, E, dtype=torch.float64), query)


# -- As an object ------------------------------------------------------------------------


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_state_dicts_are_the_original_ones(construction):
    theirs, ours = pair(**CONSTRUCTIONS[construction])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())


def test_same_initial_parameters_for_a_seed():
    states = []
    for cls in (MultiheadAttention, nn.MultiheadAttention):
        torch.manual_seed(0)
        states.append(cls(E, HEADS, add_bias_kv=True).state_dict())
    assert_same(*states)


def test_from_torch_shares_parameters_mode_and_hooks():
    theirs, _ = pair(dropout=0.5, kdim=10)
    theirs.eval()
    seen = []
    theirs.register_forward_hook(lambda module, args, output: seen.append(module))
    ours = MultiheadAttention.from_torch(theirs)
    assert [id(p) for p in ours.parameters()] == [id(p) for p in theirs.parameters()]
    assert not ours.training and ours.dropout == 0.5 and repr(ours) == repr(theirs)
    query, key, value = sequence(L), sequence(S, 10), sequence(S)
    torch.testing.assert_close(ours(query, key, value), theirs(query, key, value))
    assert seen == [ours, theirs]
    ours.train()
    assert not theirs.training and not theirs._forward_pre_hooks


def test_from_torch_refuses_what_may_compute_something_else():
    class Other(nn.MultiheadAttention):
        pass

    for module in (Other(E, HEADS), MultiheadAttention(E, HEADS), nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="module: expected a torch.nn.MultiheadAttention"):
            MultiheadAttention.from_torch(module)


def test_replace_multihead_attention():
    shared = nn.MultiheadAttention(E, HEADS)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(1, 1))})
    before = list(model.state_dict())
    assert replace_multihead_attention(model) is model
    assert type(model["a"]) is MultiheadAttention and model["b"][0] is model["a"]
    assert list(model.state_dict()) == before
    assert type(replace_multihead_attention(shared)) is MultiheadAttention


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies(how, calls):
    layer = nn.TransformerEncoderLayer(E, HEADS, 32, batch_first=True, dtype=torch.float64).eval()
    replace_multihead_attention(layer)
    if how == "deepcopy":
        other = copy.deepcopy(layer)
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    x = sequence(L, batch_first=True)
    with torch.no_grad():
        assert torch.equal(other(x), layer(x))
    assert calls == [other.self_attn, layer.self_attn]


def test_meta_device_and_dtype():
    ours = MultiheadAttention(E, HEADS, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in ours.parameters()} == {("meta", torch.bfloat16)}


# -- Arguments that reach the kernel -----------------------------------------------------


def test_explain_says_what_serves_the_call():
    _, ours = pair(torch.float32, dropout=0.1)
    x = sequence(64, dtype=torch.float32)
    with_weights = ours.explain(x, x, x)
    without = ours.explain(x, x, x, need_weights=False)
    assert with_weights.backend == without.backend == "cpu"
    assert "attention_weights" in str(with_weights) and "attention_weights" not in str(without)
    assert with_weights.details.extra_bytes >= without.details.extra_bytes > 0
    longer = sequence(640, dtype=torch.float32)
    extra = ours.explain(longer, longer, longer).details.extra_bytes
    assert extra - with_weights.details.extra_bytes < 576 * 576  # no memory grows with the square
    with pytest.raises(AssertionError, match="query"):
        ours.explain(x[None], x, x)


@pytest.mark.parametrize(
    "masks, expected",
    [
        ({"attn_mask": None}, ("causal",)),
        ({"attn_mask": "causal", "key_padding_mask": "bool"}, ("padding", "causal")),
        ({"attn_mask": "causal", "key_padding_mask": "0 and -inf"}, ("padding", "causal")),
        ({"key_padding_mask": "float"}, ((N, 1, 1, L),)),
        ({"attn_mask": "2-D"}, ((1, 1, L, L),)),
        ({"attn_mask": "3-D", "key_padding_mask": "bool"}, ("padding", (N, HEADS, L, L))),
        ({"attn_mask": "2-D", "key_padding_mask": "0 and -inf"}, ("padding", (1, 1, L, L))),
        ({"attn_mask": "2-D", "key_padding_mask": "float"}, ((N, 1, L, L),)),
    ],
)  # fmt: skip
def test_masks_reach_the_kernel_unexpanded(masks, expected, monkeypatch):
    hidden = torch.arange(L).expand(N, -1) > 3
    tensors = {
        "causal": causal_mask(L),
        "2-D": torch.randn(L, L),
        "3-D": torch.randn(N * HEADS, L, L),
        "bool": hidden,
        "0 and -inf": torch.zeros(N, L).masked_fill(hidden, float("-inf")),
        "float": torch.randn(N, L),
    }
    seen = {}

    def recorded(*args, **options):
        seen.update(options)
        return attention(*args, **options)

    monkeypatch.setattr(modules, "attention", recorded)
    _, ours = pair(torch.float32)
    x = sequence(L, dtype=torch.float32)
    keywords = {name: tensors.get(mask, mask) for name, mask in masks.items()}
    is_causal = masks.get("attn_mask", "none") in ("causal", None)
    ours(x, x, x, need_weights=False, is_causal=is_causal, **keywords)
    got = []
    if seen["key_padding_mask"] is not None:
        assert seen["key_padding_mask"].shape == (N, L)
        assert seen["key_padding_mask"].dtype == torch.bool
        got.append("padding")
    if seen["causal"]:
        assert seen["causal"] == "top_left"
        got.append("causal")
    got += [tuple(seen[name].shape) for name in ("mask", "bias") if seen[name] is not None]
    assert tuple(got) == expected


def test_every_isa(isa):
    theirs, ours = pair(torch.float32)
    x = sequence(L, dtype=torch.float32)
    with cpu_isa(isa):
        for a, b in zip(ours(x, x, x), theirs(x, x, x), strict=True):
            torch.testing.assert_close(a, b)


# -- Memory ------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
from torch import nn
import fused_attention

torch.set_num_threads(1)
ours, need_weights = json.loads(sys.argv[1])


def make(S):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(128, 8, batch_first=True)
    module = fused_attention.MultiheadAttention.from_torch(module) if ours else module
    x = torch.randn(4, S, 128).requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(S)
    padding = torch.arange(S) >= torch.tensor([[S], [S * 3 // 4]] * 2)
    padding = torch.zeros(4, S).masked_fill(padding, float("-inf"))
    return module, x, {"attn_mask": mask, "key_padding_mask": padding, "is_causal": True}


def step(module, x, masks):
    out, weights = module(x, x, x, need_weights=need_weights, **masks)
    loss = out.sum() if weights is None else out.sum() + weights.square().sum()
    loss.backward()
    return out, weights


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


step(*make(64))
inputs = make(1024)
with open("/proc/self/clear_refs", "w") as clear_refs:
    clear_refs.write("5")
before = resident("VmRSS")
step(*inputs)
print(json.dumps((resident("VmHWM") - before) / 2**20))
"""


@pytest.mark.serial
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("need_weights", quick([False, True], True))
def test_a_causal_padded_training_step_takes_a_fifth_of_the_memory(need_weights):
    mib = []
    for ours in (True, False):
        child = subprocess.run(
            [sys.executable, "-c", CHILD, json.dumps([ours, need_weights])],
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        mib.append(json.loads(child.stdout))
    print(f"need_weights={need_weights}: ours {mib[0]:.0f} MiB, PyTorch {mib[1]:.0f} MiB")
    assert mib[0] <= mib[1] / 5

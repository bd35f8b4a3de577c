"""Nested tensors in scaled_dot_product_attention, through a patch, and in the modules: every
sequence is computed as if it were alone."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from attention_modules import E, pair
from fused_attention import patch_sdpa, sdpa
from fused_attention import scaled_dot_product_attention as ours
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")

QUERIES, KEYS = (3, 130, 1, 0, 49), (7, 33, 0, 5, 49)
STARTS = (2, 9, 141, 143, 150)  # of the queries, if rows lie between the sequences


def jagged(parts, dim=2):
    """Returns a jagged tensor [B, H, j, D] of parts [H, S, D]; its buffer is [T, H, D], or
    [H, T, D] if `dim` is 2."""
    values = torch.cat([x.transpose(0, 1) for x in parts])
    offsets = torch.tensor([0, *itertools.accumulate(x.shape[1] for x in parts)])
    if dim == 2:
        values = values.transpose(0, 1).contiguous()
        return torch.nested.nested_tensor_from_jagged(values, offsets, jagged_dim=2)
    return torch.nested.nested_tensor_from_jagged(values, offsets).transpose(1, 2)


def with_holes(parts, starts=STARTS):
    """Returns a jagged tensor of parts [H, S, D] with NaN between and around the sequences."""
    (H, _, D), dtype = parts[0].shape, parts[0].dtype
    values = torch.full((starts[-1] + parts[-1].shape[1] + 4, H, D), float("nan"), dtype=dtype)
    for start, part in zip(starts, parts, strict=True):
        values[start : start + part.shape[1]] = part.transpose(0, 1)
    offsets = torch.tensor([*starts, len(values)])
    lengths = torch.tensor([part.shape[1] for part in parts])
    return torch.nested.nested_tensor_from_jagged(values, offsets, lengths).transpose(1, 2)


def random_parts(lengths, heads=4, width=8, dtype=torch.float64):
    return [torch.randn(heads, n, width, dtype=dtype) for n in lengths]


def gradients(out, leaves, weights):
    """Returns the gradients of the sum of out · weights, which are lists of components."""
    loss = sum((x * w).sum() for x, w in zip(out.unbind(), weights, strict=True))
    return torch.autograd.grad(loss, leaves)


LAYOUTS = {
    "BSHD": lambda parts: jagged(parts, 1),
    "BHSD": lambda parts: jagged(parts, 2),
    "strided": lambda parts: torch.nested.nested_tensor(parts, layout=torch.strided),
    "holes": with_holes,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads, width_v", [(4, 8), (2, 6)])
def test_each_sequence_is_a_call_of_its_own(layout, is_causal, heads, width_v):
    """Output and gradients, with other lengths of the keys, fewer heads, and Ev != E."""
    options = {"is_causal": is_causal, "enable_gqa": heads != 4}
    parts = [random_parts(QUERIES), random_parts(KEYS, heads), random_parts(KEYS, heads, width_v)]
    weights = random_parts(QUERIES, 4, width_v)
    leaves = [LAYOUTS[layout](x).requires_grad_() for x in parts]
    with torch.no_grad():
        assert ours(*leaves, **options).shape[3] == width_v if layout != "strided" else True
    out = ours(*leaves, **options)
    assert out.is_nested and out.layout == leaves[0].layout
    grads = gradients(out, leaves, weights)
    for i, components in enumerate(zip(*parts, strict=True)):
        dense = [x.clone().requires_grad_() for x in components]
        expected = ours(*dense, **options)
        torch.testing.assert_close(out.unbind()[i], expected, atol=1e-13, rtol=1e-12)
        for got, x in zip(
            grads, torch.autograd.grad((expected * weights[i]).sum(), dense), strict=True
        ):
            torch.testing.assert_close(got.unbind()[i], x, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, "top_left"])
def test_precision(dtype, causal):
    """The correctness rule holds for each sequence, gradients included."""
    case = Case(B=1, D=24, Dv=24, dtype=dtype, causal=causal)
    each = [
        testing.make_inputs(dataclasses.replace(case, Sq=Sq, Sk=Sk, seed=seed))
        for seed, (Sq, Sk) in enumerate(((130, 200), (5, 7), (49, 100)))
    ]
    each = [dataclasses.replace(x, grad_lse=torch.zeros_like(x.grad_lse)) for x in each]
    leaves = [x.differentiable() for x in each]
    names = ("query", "key", "value")
    nested = [jagged([x[name][0] for x in leaves], 1) for name in names]
    outs = ours(*nested, is_causal=bool(causal)).unbind()
    for inputs, own, out in zip(each, leaves, outs, strict=True):
        wanted = [own[name] for name in names]
        grads = torch.autograd.grad(out[None], wanted, inputs.grad_out, retain_graph=True)
        got = {"out": out[None].detach()}
        got |= {f"d{name}": x for name, x in zip(names, grads, strict=True)}
        exact = testing.exact(inputs)
        assert got.keys() == exact.keys() - {"lse"}
        wrong = testing.errors(got, exact, testing.naive(inputs))
        assert not [error.message for error in wrong if error.is_wrong]


def test_the_result_has_the_ragged_size_of_query():
    for layout in ("BSHD", "BHSD", "holes"):
        query = LAYOUTS[layout](random_parts(QUERIES))
        key = jagged(random_parts(KEYS))
        out = ours(query, key, key)
        assert out.shape == query.shape and out.offsets() is query.offsets()
        torch.testing.assert_close((out + query).unbind()[1], out.unbind()[1] + query.unbind()[1])
    query = jagged(random_parts(QUERIES), 1)
    assert ours(query, query, query).transpose(1, 2).flatten(-2).is_contiguous()


def test_inputs_are_packed_without_a_copy():
    """The operator gets the buffers of query, key and value, whatever the order of dimensions."""
    for dim in (1, 2):
        tensors = [jagged(random_parts(QUERIES), dim) for _ in range(3)]
        for x, packed in zip(tensors, sdpa._pack(*tensors, None, False, False), strict=True):
            assert packed.rows.data_ptr() == x.values().data_ptr()
            assert packed.rows.shape == (sum(QUERIES), 4, 8)
            assert packed.offsets is x.offsets()


def test_equal_lengths_in_two_tensors_of_offsets():
    key, value = (jagged(random_parts(KEYS)) for _ in range(2))
    query = jagged(random_parts(QUERIES))
    outs = ours(query, key, value).unbind()
    parts = zip(query.unbind(), key.unbind(), value.unbind(), outs, strict=True)
    for q, k, v, out in parts:
        torch.testing.assert_close(out, ours(q, k, v))


def test_without_heads():
    parts = [torch.randn(n, 8, dtype=torch.float64) for n in QUERIES]
    for layout in (torch.jagged, torch.strided):
        x = torch.nested.nested_tensor(parts, layout=layout)
        for got, part in zip(ours(x, x, x, is_causal=True).unbind(), parts, strict=True):
            torch.testing.assert_close(got, ours(part, part, part, is_causal=True))


@pytest.mark.parametrize("is_causal", [False, True])
def test_heads_in_any_number(is_causal):
    """The dimension of the heads may be the ragged one; PyTorch serves that too."""
    parts = [torch.randn(heads, 9, 8, dtype=torch.float64) for heads in (3, 1, 5)]
    x = torch.nested.nested_tensor(parts, layout=torch.jagged)
    out = ours(x, x, x, is_causal=is_causal)
    expected = F.scaled_dot_product_attention(x, x, x, is_causal=is_causal)
    torch.testing.assert_close(out.values(), expected.values())
    assert out.shape == x.shape and (out + x).is_nested


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}], ids=str)
def test_results_are_pytorchs_where_it_has_one(options):
    query, key = jagged(random_parts(QUERIES), 1), jagged(random_parts((7, 33, 9, 5, 49)), 1)
    out = ours(query, key, key, **options)
    expected = F.scaled_dot_product_attention(query, key, key, **options)
    assert out.shape == expected.shape and out.values().stride() == expected.values().stride()
    torch.testing.assert_close(out.values(), expected.values())


def test_dropout():
    query = jagged(random_parts((64, 3, 40), width=64))
    eyes = jagged([torch.eye(64, dtype=torch.float64)[:n].expand(4, -1, -1) for n in (64, 3, 40)])
    torch.manual_seed(3)
    first, second = (ours(query, query, eyes, dropout_p=0.25) for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ours(query, query, eyes, dropout_p=0.25).values(), first.values())
    assert not torch.equal(first.values(), second.values())
    weights = ours(query, query, eyes)
    for got, exact in zip(first.unbind(), weights.unbind(), strict=True):
        kept = got != 0
        torch.testing.assert_close(got[kept], exact[kept] / 0.75)
    kept = (first.values() != 0).sum() / (weights.values() != 0).sum()
    assert abs(kept - 0.75) < 0.02


def test_autocast():
    query = jagged(random_parts(QUERIES, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(query, query, query)
    assert out.dtype == torch.bfloat16 and out.shape == query.shape
    exact = ours(query, query, query)
    torch.testing.assert_close(out.float().values(), exact.values(), atol=0.03, rtol=0.03)


# -- What is refused ---------------------------------------------------------------------

NOT_SERVED = {
    "attn_mask": (lambda x: (x, x, x), {"attn_mask": torch.ones(3, 3).bool()}),
    "5 dimensions": (lambda x: (x.unsqueeze(1),) * 3, {}),
    "ragged dimension is 3": (lambda x: (x.transpose(2, 3),) * 3, {}),
}
WRONG = {
    "key: expected query, key and value to be nested tensors.*dense": lambda x: (
        x,
        torch.randn(5, 4, 9, 8).double(),
        x,
    ),
    "value: expected.* of layout torch.jagged.*got one of layout torch.strided": lambda x: (
        x,
        x,
        torch.nested.nested_tensor(random_parts(QUERIES), layout=torch.strided),
    ),
    "key: expected batch size 5": lambda x: (x, *[jagged(random_parts(KEYS[:4]))] * 2),
    "value: expected the offsets and lengths of key": lambda x: (x, x, jagged(random_parts(KEYS))),
    "key, value: expected 4 heads.*enable_gqa": lambda x: (
        x,
        *[jagged(random_parts(QUERIES, heads=2))] * 2,
    ),
    "key: expected.*dtype": lambda x: (x, x.float(), x),
    "key: .*8": lambda x: (x, jagged(random_parts(QUERIES, width=6)), x),
}


@pytest.mark.parametrize("name", NOT_SERVED)
def test_what_is_not_served_is_named(name):
    inputs, options = NOT_SERVED[name]
    with pytest.raises(NotImplementedError, match=f"{name}.*not supported for nested tensors"):
        ours(*inputs(jagged(random_parts(QUERIES))), **options)


@pytest.mark.parametrize("message", WRONG)
def test_wrong_nested_tensors_are_named(message):
    query = jagged(random_parts(QUERIES))
    with pytest.raises((ValueError, TypeError), match=message):
        ours(*WRONG[message](query))


def test_strided_tensors_must_be_ragged_along_the_sequence():
    x = torch.nested.nested_tensor([torch.randn(n, 5, 8) for n in (2, 3)], layout=torch.strided)
    with pytest.raises(NotImplementedError, match="query.*ragged"):
        ours(x, x, x)


def test_is_causal_must_be_a_bool():
    query = jagged(random_parts(QUERIES))
    with pytest.raises(TypeError, match="is_causal"):
        ours(query, query, query, is_causal=1.0)


# -- Through a patch ---------------------------------------------------------------------


def test_a_patch_serves_jagged_tensors(monkeypatch):
    query = jagged(random_parts(QUERIES))
    with pytest.raises(RuntimeError, match="No viable backend"):
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    expected = ours(query, query, query, is_causal=True)
    with patch_sdpa():
        for _ in range(2):
            out = F.scaled_dot_product_attention(query, query, query, is_causal=True)
            assert torch.equal(out.values(), expected.values()) and out.shape == query.shape


def test_a_patch_leaves_other_nested_tensors_to_pytorch():
    query = jagged(random_parts(QUERIES), 1)
    strided = torch.nested.nested_tensor(random_parts(QUERIES), layout=torch.strided)
    wide = jagged(random_parts((3, 5), heads=1, width=600), 1)
    expected = [F.scaled_dot_product_attention(x, x, x) for x in (strided, wide)]
    with patch_sdpa():
        with pytest.raises(ValueError, match="Masks are not yet supported"):
            F.scaled_dot_product_attention(query, query, query, attn_mask=torch.ones(3, 3).bool())
        with pytest.raises(ValueError, match="to be nested tensors"):
            F.scaled_dot_product_attention(query, torch.randn(5, 4, 9, 8).double(), query)
        for x, want in zip((strided, wide), expected, strict=True):
            out = F.scaled_dot_product_attention(x, x, x)
            for got, part in zip(out.unbind(), want.unbind(), strict=True):
                torch.testing.assert_close(got, part)


# -- torch.compile -----------------------------------------------------------------------


def split_heads(x, heads=4):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend):
    def block(x, y):
        query, key = split_heads(x), split_heads(y)
        return ours(query, key, key, is_causal=True).transpose(1, 2).flatten(-2) + x

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    for lengths_q, lengths_k in (((3, 50, 1), (4, 7, 60)), ((5, 6), (8, 9))):
        leaves = [
            torch.nested.nested_tensor(
                [torch.randn(n, 32) for n in lengths], layout=torch.jagged, requires_grad=True
            )
            for lengths in (lengths_q, lengths_k)
        ]
        out, expected = compiled(*leaves), block(*leaves)
        torch.testing.assert_close(out.values(), expected.values())
        results = (torch.autograd.grad(x.values().square().sum(), leaves) for x in (out, expected))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got.values(), want.values())


# -- MultiheadAttention ------------------------------------------------------------------


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("layout", ["jagged", "strided", "holes"])
@pytest.mark.parametrize("extra", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
def test_modules_attend_within_each_sequence(need_weights, is_causal, layout, extra):
    _, module = pair(batch_first=True, **extra)
    make = {
        "jagged": lambda parts: torch.nested.nested_tensor(parts, layout=torch.jagged),
        "strided": lambda parts: torch.nested.nested_tensor(parts, layout=torch.strided),
        "holes": lambda parts: rows_with_holes(parts),
    }[layout]
    queries, keys = (
        [torch.randn(n, E, dtype=torch.float64) for n in lengths] for lengths in (QUERIES, KEYS)
    )
    options = {"need_weights": need_weights, "is_causal": is_causal}
    for query, key in ((make(queries), make(keys)), (make(queries),) * 2):
        of_keys = queries if query is key else keys
        out, weights = module(query, key, key, **options)
        for i, (q, k, got) in enumerate(zip(queries, of_keys, out.unbind(), strict=True)):
            expected, expected_weights = module(q, k, k, **options)
            torch.testing.assert_close(got, expected)
            if need_weights:
                own = torch.cat(
                    [weights[i, :, : len(k)], weights[i, :, max(map(len, of_keys)) :]], 1
                )
                torch.testing.assert_close(own[: len(q)], expected_weights)
                assert own[len(q) :].count_nonzero() == 0
        if layout != "strided":
            assert (out + query).is_nested


def rows_with_holes(parts):
    x = with_holes([part[None] for part in parts])
    values = x.values().squeeze(0)
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), x.lengths())


def test_jagged_modules_do_not_pad(monkeypatch):
    def refuse(*args):
        raise AssertionError("padded")

    monkeypatch.setattr("fused_attention.modules.pad", refuse)
    _, module = pair(batch_first=True)
    x = torch.nested.nested_tensor(
        [torch.randn(n, E).double() for n in (3, 7)], layout=torch.jagged
    )
    module(x, x, x, need_weights=False)
    with pytest.raises(AssertionError, match="padded"):
        module(x, x, x)


def test_dropout_of_modules_is_that_of_padded_sequences():
    """Random bits depend on the place of a score in its sequence, not on the padding."""
    _, module = pair(batch_first=True, dropout=0.4)
    x = torch.nested.nested_tensor(
        [torch.randn(n, E).double() for n in (3, 40)], layout=torch.jagged
    )
    outs = []
    for need_weights in (False, True):
        torch.manual_seed(5)
        outs.append(module(x, x, x, need_weights=need_weights)[0].values())
    torch.testing.assert_close(*outs)

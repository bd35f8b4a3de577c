"""Tests which calls patch_sdpa reaches, and that undoing it restores everything."""

import copy
import sys
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as bound_before

from fused_attention import patch_sdpa
from fused_attention.call import backends
from fused_attention.integrations import patch

ORIGINAL = F.scaled_dot_product_attention
HAS_REGISTRY = hasattr(torch.nn.attention, "restore_flash_attention_impl")
needs_registry = pytest.mark.skipif(
    not HAS_REGISTRY, reason="this PyTorch has no restore_flash_attention_impl"
)


def implementation():
    return torch.nn.attention.current_flash_attention_impl() if HAS_REGISTRY else None


@pytest.fixture(autouse=True)
def everything_is_as_it_was():
    before = (ORIGINAL, torch.backends.mha.get_fastpath_enabled(), implementation())
    yield
    after = (
        F.scaled_dot_product_attention,
        torch.backends.mha.get_fastpath_enabled(),
        implementation(),
    )
    assert after == before
    assert not patch._state.on and not patch._state.replaced and patch._state.patches == 0


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls that ours served, as a function and as the operator below PyTorch's."""
    count = {"function": 0, "operator": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        return call

    function = counted("function", patch.sdpa)
    monkeypatch.setattr(patch, "sdpa", function)
    monkeypatch.setattr(patch, "_flash", counted("operator", patch._flash))
    return count


def qkv(*shape, dtype=torch.float32):
    shape = shape or (2, 4, 9, 16)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3)]


# -- Applying and undoing ----------------------------------------------------------------


def test_context_manager(calls):
    tensors = qkv()
    expected = F.scaled_dot_product_attention(*tensors, is_causal=True)
    with patch_sdpa() as handle:
        assert handle.active
        out = F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert calls["function"] == 1 and not handle.active
    F.scaled_dot_product_attention(*tensors)
    assert calls == {"function": 1, "operator": 0}
    torch.testing.assert_close(out, expected)


def test_plain_call_and_undo(calls):
    handle = patch_sdpa()
    F.scaled_dot_product_attention(*qkv())
    handle.undo()
    handle.undo()  # there is nothing left to undo
    F.scaled_dot_product_attention(*qkv())
    assert calls["function"] == 1


def test_exceptions_restore():
    with pytest.raises(KeyError), patch_sdpa():
        assert F.scaled_dot_product_attention is not ORIGINAL
        raise KeyError


def test_nesting():
    with patch_sdpa():
        ours = F.scaled_dot_product_attention
        with patch_sdpa():
            assert F.scaled_dot_product_attention is ours
        assert F.scaled_dot_product_attention is ours


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_undo_in_any_order(order):
    handles = [patch_sdpa() for _ in range(3)]
    for i in order:
        assert F.scaled_dot_product_attention is not ORIGINAL
        handles[i].undo()
    assert F.scaled_dot_product_attention is ORIGINAL


def test_one_handle_entered_again():
    handle = patch_sdpa()
    with handle:
        with handle:
            assert F.scaled_dot_product_attention is not ORIGINAL
        assert F.scaled_dot_product_attention is not ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL
    with handle:
        assert F.scaled_dot_product_attention is not ORIGINAL
        handle.undo()
        assert F.scaled_dot_product_attention is ORIGINAL
    assert F.scaled_dot_product_attention is ORIGINAL


def test_undo_refuses_to_remove_what_somebody_else_put_there():
    def theirs(*args, **kwargs):
        pass

    handle = patch_sdpa()
    ours = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = theirs
    with pytest.raises(RuntimeError, match="replaced by .*theirs.*undo that first"):
        handle.undo()
    assert F.scaled_dot_product_attention is theirs and handle.active
    F.scaled_dot_product_attention = ours
    handle.undo()


def test_somebody_elses_patch_from_before_comes_back(monkeypatch):
    def theirs(*args, **kwargs):
        return "theirs"

    with monkeypatch.context() as patched:
        patched.setattr(F, "scaled_dot_product_attention", theirs)
        with patch_sdpa():
            assert F.scaled_dot_product_attention is not theirs
            assert F.scaled_dot_product_attention(*(x.to("meta") for x in qkv())) == "theirs"
        assert F.scaled_dot_product_attention is theirs


@pytest.mark.parametrize("enabled", [True, False])
def test_the_state_of_the_fast_path_comes_back(enabled):
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with patch_sdpa(), patch_sdpa():
            assert not torch.backends.mha.get_fastpath_enabled()
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_reference_taken_inside_is_harmless_outside(calls):
    with patch_sdpa():
        taken = F.scaled_dot_product_attention
    tensors = qkv()
    assert torch.equal(taken(*tensors), ORIGINAL(*tensors))
    assert calls == {"function": 0, "operator": 0}


def test_threads():
    errors = []

    def work():
        try:
            for _ in range(20):
                with patch_sdpa():
                    assert F.scaled_dot_product_attention is not ORIGINAL
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# -- Calls that the patch reaches --------------------------------------------------------


def test_multihead_attention_and_encoder_layers(calls):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    x = torch.randn(3, 7, 32)
    padding = torch.arange(7).expand(3, -1) > 4
    for options in ({}, {"src_key_padding_mask": padding}):
        with torch.no_grad():
            expected = layer(x, **options)
            calls["function"] = 0
            with patch_sdpa():
                out = layer(x, **options)
                layer.self_attn(x, x, x, need_weights=False)
        assert calls["function"] == 2
        torch.testing.assert_close(out, expected)


def test_encoders_that_would_make_nested_tensors(calls):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
    encoder.eval()
    x, padding = torch.randn(3, 7, 32), torch.arange(7).expand(3, -1) > 4
    with torch.no_grad(), patch_sdpa():
        out = encoder(x, src_key_padding_mask=padding)
    assert calls["function"] == 2
    torch.testing.assert_close(out, encoder(x, src_key_padding_mask=padding))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_code(calls, backend):
    torch._dynamo.reset()

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True) * 2

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    tensors = qkv()
    expected = compiled(*tensors)
    expected_gradients = torch.autograd.grad(expected.square().sum(), tensors)
    with patch_sdpa():
        out = compiled(*tensors)
        gradients = torch.autograd.grad(out.square().sum(), tensors)
    assert calls["function"] > 0  # while it was traced
    torch.testing.assert_close(out, expected)
    # Two float32 computations of numbers near 10 differ by at most 1e-5 of them.
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)
    calls["function"] = 0
    assert torch.equal(compiled(*tensors), expected)
    assert calls["function"] == 0


def test_compiled_code_is_not_compiled_again_by_nesting():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(lambda *x: F.scaled_dot_product_attention(*x), backend=counter)
    tensors = qkv()
    with patch_sdpa():
        compiled(*tensors)
        with patch_sdpa():
            compiled(*tensors)
    with patch_sdpa():
        compiled(*tensors)
    assert counter.frame_count == 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_of_transformers(calls, family):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "attn_implementation": "sdpa",
    }
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    else:
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2)
        model = transformers.LlamaModel(config)
    model.eval()
    tokens = torch.randint(0, 50, (2, 10))
    options = {"attention_mask": torch.tensor([[1] * 10, [1] * 6 + [0] * 4])}
    results = []
    for patched in (False, True):
        with patch_sdpa() if patched else torch.enable_grad():
            out = model(tokens, **options).last_hidden_state
        out = out[options["attention_mask"].bool()]
        gradients = torch.autograd.grad(out.square().sum(), list(model.parameters())[:5])
        results.append([out, *gradients])
    assert calls["function"] == 2
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


# -- Names that were bound before --------------------------------------------------------


@needs_registry
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "bool 2-D", "float", "fully masked"])
def test_the_operator_serves_names_that_were_bound_before(calls, mask, dtype):
    options = {"is_causal": mask == "causal"}
    if mask == "bool":
        options["attn_mask"] = torch.rand(2, 1, 9, 9) > 0.3
    elif mask == "bool 2-D":
        options["attn_mask"] = torch.rand(9, 9) > 0.3
    elif mask == "float":
        options["attn_mask"] = torch.randn(2, 4, 9, 9, dtype=dtype)
    elif mask == "fully masked":
        options["attn_mask"] = torch.ones(9, 9).bool()
        options["attn_mask"][3] = False
    tensors = qkv(dtype=dtype)
    out = bound_before(*tensors, **options)
    expected = [out, *torch.autograd.grad(out.square().sum(), tensors)]
    with patch_sdpa():
        out = bound_before(*tensors, **options)
        gradients = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    assert calls == {"function": 0, "operator": 1}
    after = torch.autograd.grad(out.square().sum(), tensors)  # PyTorch's backward, our forward
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {}
    for got in ([out, *gradients], [out, *after]):
        torch.testing.assert_close(got, expected, **tolerance)


@needs_registry
def test_backward_inside_of_a_forward_outside():
    tensors = qkv()
    mask = torch.ones(9, 9).bool()
    mask[3] = False
    out = bound_before(*tensors, mask)
    expected = torch.autograd.grad(out.square().sum(), tensors, retain_graph=True)
    with patch_sdpa():
        gradients = torch.autograd.grad(out.square().sum(), tensors)
    torch.testing.assert_close(gradients, expected)


@needs_registry
@pytest.mark.parametrize("layout", ["BHSD", "BSHD", "packed"])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_operator_in_compiled_code(calls, backend, layout):
    torch._dynamo.reset()
    x = torch.randn(2, 9, 3, 4, 16, requires_grad=True)

    def function(x):
        q, k, v = x.unbind(2) if layout == "packed" else (y.clone() for y in x.unbind(2))
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if layout == "BHSD":
            q, k, v = (y.contiguous() for y in (q, k, v))
        return bound_before(q, k, v, is_causal=True).transpose(1, 2).flatten(2).square()

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    for patched in (True, False):
        calls["operator"] = 0
        with patch_sdpa() if patched else torch.enable_grad():
            (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
        torch.testing.assert_close(gradient, expected)
        assert calls["operator"] == patched


@needs_registry
def test_head_dims_beyond_ours_go_to_the_native_operator(calls):
    tensors = qkv(1, 2, 5, 600)
    expected = bound_before(*tensors)
    with patch_sdpa():
        out = bound_before(*tensors)
        gradients = torch.autograd.grad(out.sum(), tensors)
    assert calls["operator"] == 0
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), tensors))


@needs_registry
def test_the_registry_by_itself_and_other_implementations(calls):
    torch.nn.attention.activate_flash_attention_impl(patch.NAME)
    try:
        bound_before(*qkv())
        assert calls["operator"] == 1
        with patch_sdpa():
            bound_before(*qkv())
        assert implementation() == patch.NAME  # the user activated it, not the patch
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    bound_before(*qkv())
    assert calls == {"function": 0, "operator": 2}

    class Handle:
        def remove(self):
            pass

    torch.nn.attention.register_flash_attention_impl("another", register_fn=Handle)
    torch.nn.attention.activate_flash_attention_impl("another")
    try:
        with patch_sdpa():
            assert implementation() == "another"
        assert implementation() == "another"
    finally:
        torch.nn.attention.restore_flash_attention_impl()
        del torch.nn.attention._registry._FLASH_ATTENTION_IMPLS["another"]


def test_modules_that_bound_the_name_before(calls):
    module = types.ModuleType("somebody")
    module.sdpa = bound_before
    q, k, v = qkv()
    with patch_sdpa(modules=[module, F]):
        with patch_sdpa(modules=[module]):
            module.sdpa(q, k, v, dropout_p=0.5)
        module.sdpa(q, k, v, dropout_p=0.5)
    assert calls["function"] == 2 and module.sdpa is ORIGINAL
    with pytest.raises(ValueError, match="modules: expected .* got sys"):
        patch_sdpa(modules=[sys])


# -- Calls that the patch does not reach -------------------------------------------------


def test_other_devices_and_nested_tensors_go_where_they_went(calls):
    meta = [x.to("meta") for x in qkv()]
    nested = torch.nested.nested_tensor([torch.randn(4, 3, 8)] * 2, layout=torch.strided)
    with patch_sdpa():
        assert F.scaled_dot_product_attention(*meta).shape == meta[0].shape
        out = F.scaled_dot_product_attention(nested, nested, nested)
    assert out.is_nested and calls["function"] == 0


def test_the_model_is_not_changed():
    model = nn.MultiheadAttention(32, 4)
    before = copy.deepcopy(model.__dict__)
    with patch_sdpa():
        x = torch.randn(5, 2, 32)
        model(x, x, x, need_weights=False)
    assert model.__dict__.keys() == before.keys()


# -- Calls that no kernel serves ---------------------------------------------------------


def wide(dtype=torch.float32):
    return [torch.randn(1, 2, 5, 600, dtype=dtype, requires_grad=True) for _ in range(3)]


LEAVE = {
    "head_dim": lambda: (wide(), {}),
    "head_dim, causal": lambda: (wide(torch.float64), {"is_causal": True}),
    "head_dim, mask": lambda: (wide(), {"attn_mask": torch.rand(5, 5) > 0.3}),
    "value's head_dim": lambda: ([*qkv(1, 2, 5, 8)[:2], wide()[0]], {}),
    "head_dim, 3-D": lambda: ([x[0] for x in wide()], {}),
    "head_dim, 5-D": lambda: ([x[None] for x in wide()], {}),
    "head_dim 0": lambda: ([torch.randn(1, 2, 5, 0) for _ in range(2)] + qkv(1, 2, 5, 8)[:1], {}),
    "complex": lambda: (qkv(1, 2, 5, 8, dtype=torch.complex64), {}),
    "a mask of another dtype": lambda: (
        qkv(dtype=torch.float64),
        {"attn_mask": torch.zeros(9, 9, dtype=torch.float16)},
    ),
    "no tensor": lambda: ([[1.0], [2.0], [3.0]], {}),
    "no tensor as key": lambda: ([qkv()[0], [2.0], qkv()[0]], {}),
    "a scale with a gradient": lambda: (
        qkv(),
        {"scale": torch.tensor(0.1, requires_grad=True)},
    ),
    "a scale of one element": lambda: (qkv(), {"scale": torch.tensor([0.1])}),
    "heads": lambda: ([*qkv()[:1], *qkv(2, 3, 9, 16)[:2]], {}),
    "mask and causal": lambda: (qkv(), {"attn_mask": torch.ones(9, 9).bool(), "is_causal": True}),
    "meta": lambda: ([x.to("meta") for x in qkv()], {}),
}


def outcome(function, inputs, options):
    try:
        return function(*inputs, **options)
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("what", LEAVE)
@pytest.mark.parametrize("strict", [False, True])
def test_a_patch_leaves_what_no_kernel_serves(what, strict, monkeypatch):
    monkeypatch.setenv("FUSED_ATTENTION_STRICT", str(int(strict)))
    backends.read_environment()
    monkeypatch.setattr(
        "fused_attention.reference.attention_reference", lambda *x, **y: pytest.fail("reference")
    )
    inputs, options = LEAVE[what]()
    expected = outcome(ORIGINAL, inputs, options)
    with patch_sdpa():
        for _ in range(2):
            got = outcome(F.scaled_dot_product_attention, inputs, options)
            if isinstance(expected, torch.Tensor):
                assert got.shape == expected.shape and got.dtype == expected.dtype
                if not got.is_meta:  # the operator below may be ours
                    torch.testing.assert_close(got, expected)
            else:
                assert got == expected
    monkeypatch.undo()
    backends.read_environment()


def test_a_patch_leaves_it_in_compiled_code_too():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *x: F.scaled_dot_product_attention(*x), backend="aot_eager", fullgraph=True
    )
    inputs = wide()
    with patch_sdpa():
        torch.testing.assert_close(compiled(*inputs), ORIGINAL(*inputs))


def test_the_backend_that_the_environment_asks_for_serves_a_patch(monkeypatch):
    inputs = qkv()
    for name, head_dim in (("reference", 16), ("cpu", 16), ("cpu", 600)):
        monkeypatch.setenv("FUSED_ATTENTION_BACKEND", name)
        backends.read_environment()
        inputs = qkv(1, 2, 5, head_dim)
        with patch_sdpa():
            out = F.scaled_dot_product_attention(*inputs)
        torch.testing.assert_close(out, ORIGINAL(*inputs), atol=1e-5, rtol=1e-5)
    monkeypatch.undo()
    backends.read_environment()

"""What PyTorch's own tests expect of attention: the samples that ship with torch (OpInfo and
ModuleInfo) through ours beside PyTorch's, and the errors that test_multihead_attention.py and
test_transformers.py match. EXCEPTIONS are the calls in which ours differs on purpose.
"""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_upper_left

from fused_attention import MultiheadAttention, modules, replace_multihead_attention
from fused_attention import scaled_dot_product_attention as sdpa
from fused_attention.tools import testing

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # those of the originals
    pytest.mark.usefixtures("one_thread"),
]
SDPA, MHA = (
    f"nn.functional.{name}"
    for name in ("scaled_dot_product_attention", "multi_head_attention_forward")
)

# -- The samples -------------------------------------------------------------------------

# Importing PyTorch's test package changes torch, so another process does that. The package takes
# the base class of its test cases from expecttest, which torch does not install, and no more.
CHILD = """
import importlib.util, sys, types, unittest
import torch

if importlib.util.find_spec("expecttest") is None:
    sys.modules["expecttest"] = types.ModuleType("expecttest")
    sys.modules["expecttest"].TestCase = unittest.TestCase
from torch.testing._internal import common_methods_invocations, common_modules


def call(x):
    return x.args, x.kwargs


samples = {}
for op in common_methods_invocations.op_db:
    if op.name in sys.argv[2:]:
        assert op.error_inputs_func is None
        for dtype in op.dtypes:
            for grad in (False, True):
                torch.manual_seed(0)
                drawn = op.sample_inputs("cpu", dtype, requires_grad=grad)
                samples[op.name, dtype, grad] = [((x.input, *x.args), x.kwargs) for x in drawn]
for info in common_modules.module_db:
    if info.name in sys.argv[2:]:
        assert info.module_error_inputs_func is None
        for dtype in info.dtypes:
            for training in (True, False):
                torch.manual_seed(0)
                drawn = info.module_inputs_func(info, "cpu", dtype, True, training)
                samples[info.name, dtype, training] = [
                    (call(x.constructor_input), call(x.forward_input)) for x in drawn
                ]
torch.save(samples, sys.argv[1])
"""
MODULES = {
    "nn.MultiheadAttention": MultiheadAttention,
    "nn.TransformerEncoderLayer": modules.TransformerEncoderLayer,
    "nn.TransformerDecoderLayer": modules.TransformerDecoderLayer,
    "nn.TransformerEncoder": None,  # PyTorch's, with layers that were replaced
    "nn.Transformer": None,
}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    path = tmp_path_factory.mktemp("samples") / "samples.pt"
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(path), SDPA, MHA, *MODULES]
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return torch.load(path, weights_only=False)


def tensors_in(args, kwargs):
    return [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]


def cast(args, kwargs, dtype, factor=1.0):
    """Returns the call with new leaves of another dtype, multiplied by `factor`."""

    def leaf(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        return (x.detach() * factor).to(dtype).requires_grad_(x.requires_grad)

    return tuple(map(leaf, args)), {name: leaf(x) for name, x in kwargs.items()}


def outcome(function, args, kwargs, parameters=()):
    """Returns the output, and the gradients of what requires one."""
    out = function(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    leaves = [x for x in (*tensors_in(args, kwargs), *parameters) if x.requires_grad]
    if not leaves or not out.requires_grad:
        return [out]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, leaves, weights, allow_unused=True)]


MEASURES = (lambda x: x.abs().max(), lambda x: x.square().mean().sqrt())


def wrong(got, naive, exact):
    """Returns the results that break the correctness rule, and by what factor.

    naive: what PyTorch gives in the same dtype, with two kernels, as one may be accurate by luck.
    Gradients may be 0 because large terms cancel, so the floor of their errors is relative to the
    largest gradient of the sample.
    """
    found = []
    largest = max((x.abs().max() for x in exact[1:] if x is not None and x.numel()), default=None)
    for i, (mine, want, *others) in enumerate(zip(got, exact, *naive, strict=True)):
        if want is None:
            assert mine is None and others == [None, None]
            continue
        assert mine.shape == want.shape and mine.dtype == others[0].dtype
        if want.numel() == 0:
            continue
        for measure in MEASURES:
            size = largest if i else measure(want)
            error, *theirs = (measure(x.double() - want) for x in (mine, *others))
            allowed = 2 * max(theirs) + testing.FLOOR[mine.dtype] * size
            if not error <= allowed:
                found.append((i, float(error / allowed)))
    return found


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def with_math(function):
    """Returns `function` on PyTorch's unfused kernel of scaled_dot_product_attention."""

    def call(*args, **kwargs):
        with sdpa_kernel(SDPBackend.MATH):
            return function(*args, **kwargs)

    return call


def factor_of(dtype, grad):
    """Returns the factor of the inputs. PyTorch draws from [-9, 9], so scores reach 200. A backward
    that recomputes the weights from a float32 log-sum-exp then loses 8 bits of them."""
    return 0.25 if grad and dtype == torch.float32 else 1.0


def fused(query, key, value, **options):
    """PyTorch's fused kernel, which takes four dimensions only."""
    tensors = (query, key, value)
    leading = torch.broadcast_shapes(*(x.shape[:-2] for x in tensors))
    heads = (1,) if len(leading) == 1 else ()
    q, k, v = (x.expand(*leading, *x.shape[-2:]).unflatten(0, (-1, *heads)) for x in tensors)
    return F.scaled_dot_product_attention(q, k, v, **options).view(*leading, *query.shape[-2:])


def compare(ours, theirs, args, kwargs, dtype):
    """Returns what is wrong with the results of `ours`; theirs: two functions of PyTorch."""
    got, *naive = (outcome(f, *cast(args, kwargs, dtype)) for f in (ours, *theirs))
    return wrong(got, naive, outcome(theirs[1], *cast(args, kwargs, torch.float64)))


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@by_dtype
def test_samples_of_scaled_dot_product_attention(samples, dtype, grad):
    drawn = samples[SDPA, dtype, grad]
    assert len(drawn) >= 25
    theirs = fused, with_math(F.scaled_dot_product_attention)
    for args, kwargs in drawn:
        args, kwargs = cast(args, kwargs, dtype, factor_of(dtype, grad))
        if kwargs["dropout_p"]:
            assert_drops(lambda p, a=args, o=kwargs: sdpa(*a, **o | {"dropout_p": p}))
            kwargs = kwargs | {"dropout_p": 0.0}
        assert not compare(sdpa, theirs, args, kwargs, dtype)


@pytest.mark.slow
@pytest.mark.xfail(
    raises=AssertionError, strict=True, reason="weights are computed again from a float32 lse"
)
def test_float32_gradients_of_the_samples_as_drawn(samples):
    theirs = fused, with_math(F.scaled_dot_product_attention)
    for args, kwargs in samples[SDPA, torch.float32, True]:
        kwargs = kwargs | {"dropout_p": 0.0}
        assert not compare(sdpa, theirs, args, kwargs, torch.float32)


def assert_drops(call):
    """Asserts that dropout follows the seed and changes the result. Its bits are our own."""
    torch.manual_seed(4)
    first = call(0.5)
    torch.manual_seed(4)
    assert torch.equal(call(0.5), first) and not torch.equal(call(0.0), first)
    assert first.isfinite().all()


def through_the_module(
    query, key, value, embed_dim, heads, in_proj_weight, in_proj_bias, bias_k, bias_v,
    add_zero_attn, dropout, out_weight, out_bias, training=True, use_separate_proj_weight=False,
    q_proj_weight=None, k_proj_weight=None, v_proj_weight=None, attn_mask=None,
):  # fmt: skip
    """multi_head_attention_forward as a call of our module with these parameters."""
    options = {"add_bias_kv": True, "add_zero_attn": add_zero_attn, "dtype": query.dtype}
    if use_separate_proj_weight:
        options["kdim"] = embed_dim + 1
    module = MultiheadAttention(embed_dim, heads, dropout, **options)
    module.kdim = module.vdim = embed_dim
    parameters = {
        "in_proj_weight": in_proj_weight,
        "q_proj_weight": q_proj_weight,
        "k_proj_weight": k_proj_weight,
        "v_proj_weight": v_proj_weight,
        "in_proj_bias": in_proj_bias,
        "bias_k": bias_k.view(1, 1, -1),
        "bias_v": bias_v.view(1, 1, -1),
        "out_proj.weight": out_weight,
        "out_proj.bias": out_bias,
    }
    own = dict(module.named_parameters())
    parameters = {name: x for name, x in parameters.items() if x is not None}
    assert parameters.keys() == own.keys()
    return torch.func.functional_call(
        module.train(training), parameters, (query, key, value), {"attn_mask": attn_mask}
    )


def without_weights(*args, **kwargs):
    return F.multi_head_attention_forward(*args, **kwargs, need_weights=False)


@pytest.mark.slow
@pytest.mark.parametrize("grad", [False, True])
@by_dtype
def test_samples_of_multi_head_attention_forward(samples, dtype, grad):
    drawn = samples[MHA, dtype, grad]
    assert len(drawn) == (1 if grad else 192)
    for args, kwargs in drawn:
        if args[10]:
            assert kwargs["training"]
            assert_drops(
                lambda p, a=args, o=kwargs: through_the_module(*a[:10], p, *a[11:], **o)[0]
            )
            args = (*args[:10], 0.0, *args[11:])
        theirs = F.multi_head_attention_forward, without_weights
        assert not compare(through_the_module, theirs, args, kwargs, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_modules(samples, name, dtype, training):
    """In training and evaluation, with gradients and without: there PyTorch has another path."""
    drawn = samples[name, dtype, training]
    assert len(drawn) >= 32
    original = getattr(nn, name.removeprefix("nn."))
    for (args, kwargs), (inputs, options) in drawn:
        torch.manual_seed(0)
        typed = kwargs if name == "nn.TransformerEncoder" else kwargs | {"dtype": dtype}
        theirs = original(*args, **typed)
        if MODULES[name]:
            ours = MODULES[name](*args, **typed)
            ours.load_state_dict(theirs.state_dict())
        else:
            ours = replace_multihead_attention(copy.deepcopy(theirs))
        exact = copy.deepcopy(theirs).double()
        for grad in (True, False):
            # Without gradients PyTorch's evaluation has paths of its own: see
            # test_evaluation_is_training_without_dropout.
            theirs.train(training or (not grad and name == "nn.Transformer"))
            ours.train(training)
            results = []
            with torch.set_grad_enabled(grad):
                for module, call, of in (
                    (ours, ours, dtype),
                    (theirs, theirs, dtype),
                    (theirs, with_math(theirs), dtype),
                    (exact, exact, torch.float64),
                ):
                    call_args = cast(*cast(inputs, options, dtype, factor_of(dtype, grad)), of)
                    results.append(outcome(call, *call_args, tuple(module.parameters())))
            got, *naive, want = results
            assert not wrong(got, naive, want)


def test_evaluation_is_training_without_dropout():
    """In evaluation PyTorch's nn.Transformer nests a padded src, and so gives the decoder zeros for
    the padding, which it attends to without memory_key_padding_mask."""
    theirs = nn.Transformer(8, 2, 1, 1, 16, 0.0, batch_first=True, dtype=torch.float64)
    ours = replace_multihead_attention(copy.deepcopy(theirs))
    src, tgt = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    options = {"src_key_padding_mask": torch.tensor([[False, False, True]])}
    with torch.no_grad():
        in_training = theirs.train()(src, tgt, **options)
        torch.testing.assert_close(ours.eval()(src, tgt, **options), in_training)
        assert not torch.allclose(theirs.eval()(src, tgt, **options), in_training, atol=1e-3)


# -- Errors that PyTorch's tests match ---------------------------------------------------

x3, x2 = torch.randn(4, 4, 4), torch.randn(4, 4)
padding = torch.tensor([False, False, True, True])


def attends(*args, **kwargs):
    return lambda surface: surface.mha(4, 4)(*args, **kwargs)


def sdpa_of(*args, **kwargs):
    return lambda surface: surface.sdpa(*args, **kwargs)


def encodes(padding, dtype):
    """What test_train_with_pad_and_catch_error expects of masks of other dtypes."""

    def call(surface):
        layer = surface.encoder_layer(2, 2, 4, 0.0, "gelu", batch_first=True).eval()
        encoder = nn.TransformerEncoder(layer, 2)
        with torch.no_grad():
            encoder(torch.randn(1, 4, 2), src_key_padding_mask=padding.unsqueeze(0).to(dtype))

    return call


class Ours:
    mha, sdpa = MultiheadAttention, staticmethod(sdpa)
    encoder_layer = modules.TransformerEncoderLayer
    decoder_layer = modules.TransformerDecoderLayer


class Theirs:
    mha, sdpa = nn.MultiheadAttention, staticmethod(F.scaled_dot_product_attention)
    encoder_layer, decoder_layer = nn.TransformerEncoderLayer, nn.TransformerDecoderLayer


QKV = [torch.randn(1, 2, 8, 16) for _ in range(3)]
ACTIVATION = "activation should be relu/gelu, not tanh"
JAGGED = torch.nested.nested_tensor([torch.randn(2, n, 16) for n in (3, 5)], layout=torch.jagged)


def ranks(expected, key, value):
    found = f"found {key}-D and {value}-D tensors respectively"
    return f"expected `key` and `value` to be {expected}-D but {found}"


def mask_ranks(name, allowed, found):
    return f"expected `{name}` to be {allowed} but found {found}-D tensor instead"


# What is called on a surface, PyTorch's or ours, the error, and a part of its message.
ERRORS = {
    # test_multihead_attention.py: test_multihead_attn_invalid_shape, with and without fast path
    "key 2-D": (attends(x3, x2, x3), AssertionError, ranks(3, 2, 3)),
    "value 2-D": (attends(x3, x3, x2), AssertionError, ranks(3, 3, 2)),
    "key 3-D": (attends(x2, x3, x2), AssertionError, ranks(2, 3, 2)),
    "value 3-D": (attends(x2, x2, x3), AssertionError, ranks(2, 2, 3)),
    "padding 1-D": (
        attends(x3, x3, x3, key_padding_mask=padding),
        AssertionError,
        mask_ranks("key_padding_mask", "`None` or 2-D", 1),
    ),
    "padding 2-D": (
        attends(x2, x2, x2, key_padding_mask=padding.expand(1, 4)),
        AssertionError,
        mask_ranks("key_padding_mask", "`None` or 1-D", 2),
    ),
    "mask 1-D": (
        attends(x3, x3, x3, attn_mask=padding),
        AssertionError,
        mask_ranks("attn_mask", "`None`, 2-D or 3-D", 1),
    ),
    "mask 1-D, unbatched": (
        attends(x2, x2, x2, attn_mask=padding),
        AssertionError,
        mask_ranks("attn_mask", "`None`, 2-D or 3-D", 1),
    ),
    "mask 3-D, unbatched": (
        lambda surface: surface.mha(4, 2)(x2, x2, x2, attn_mask=torch.ones(4, 4, 4).bool()),
        AssertionError,
        r"Expected `attn_mask` shape to be \(2, 4, 4\)",
    ),
    "heads do not divide": (
        lambda surface: surface.mha(4, 3),
        AssertionError,
        "embed_dim must be divisible by num_heads",
    ),
    "no heads": (lambda surface: surface.mha(4, 0), ValueError, "must be greater than 0"),
    # test_transformers.py
    "padding uint8": (encodes(padding, torch.uint8), AssertionError, "only bool and floating"),
    "padding int64": (encodes(padding, torch.int64), AssertionError, "only bool and floating"),
    "activation": (
        lambda surface: surface.encoder_layer(4, 2, activation="tanh"),
        RuntimeError,
        ACTIVATION,
    ),
    "activation of a decoder": (
        lambda surface: surface.decoder_layer(4, 2, activation="tanh"),
        RuntimeError,
        ACTIVATION,
    ),
    "dtypes differ": (sdpa_of(QKV[0], QKV[1].double(), QKV[2]), RuntimeError, "dtype"),
    "1-D inputs": (sdpa_of(*(x[0, 0, 0] for x in QKV)), RuntimeError, "dim"),
    "mask and is_causal": (
        sdpa_of(*QKV, attn_mask=torch.zeros(8, 8, requires_grad=True), is_causal=True),
        RuntimeError,
        "Explicit attn_mask should not be set when is_causal=True",
    ),
    "CausalBias and is_causal": (
        sdpa_of(*QKV, attn_mask=causal_upper_left(8, 8), is_causal=True),
        ValueError,
        "CausalBias should not be used with causal=True",
    ),
    # torch/nested/_internal/sdpa.py
    "nested and dense": (sdpa_of(JAGGED, *QKV[1:]), ValueError, "to be nested tensors"),
}
nested = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])
# Calls that raise in PyTorch, as its tests expect, and are served here: what was not built there.
EXCEPTIONS = {
    "is_causal without attn_mask": (
        attends(x3, x3, x3, is_causal=True),
        RuntimeError,
        "Need attn_mask if specifying the is_causal hint",
    ),
    "nested tensors with gradients": (
        lambda surface: surface.mha(4, 2, batch_first=True).eval()(nested, nested, nested),
        AssertionError,
        "MultiheadAttention does not support NestedTensor outside of its fast path",
    ),
    "causal jagged tensors": (
        sdpa_of(JAGGED, JAGGED, JAGGED, is_causal=True),
        RuntimeError,
        "No viable backend for scaled_dot_product_attention was found",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_are_the_ones_that_pytorchs_tests_match(name):
    call, error, message = ERRORS[name]
    for surface in (Theirs, Ours):
        with pytest.raises(error, match=message):
            call(surface)


@pytest.mark.parametrize("name", EXCEPTIONS)
def test_documented_exceptions(name):
    call, error, message = EXCEPTIONS[name]
    with pytest.raises(error, match=message):
        call(Theirs)
    call(Ours)


def test_a_mask_beside_is_causal_is_refused_as_documented():
    """PyTorch's kernel for CPUs takes both, against its documentation, if the mask needs no
    gradient."""
    call = sdpa_of(*QKV, attn_mask=torch.ones(8, 8).bool(), is_causal=True)
    call(Theirs)
    with pytest.raises(RuntimeError, match="Explicit attn_mask should not be set"):
        call(Ours)

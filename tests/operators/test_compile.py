"""Compiles and exports the public functions: no graph break, one compilation for every length, and
the results, gradients and dropout of eager mode."""

import io
import itertools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from feature_cases import CASES, finite
from fused_attention import attention, scaled_dot_product_attention
from fused_attention.tools import testing
from selection import quick

pytestmark = pytest.mark.usefixtures("one_thread")

sdpa = scaled_dot_product_attention


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch, tmp_path_factory):
    torch._dynamo.reset()
    caches = tmp_path_factory.getbasetemp() / "inductor"  # shared by the tests of this run
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(caches))


def compiled(function, backend="aot_eager", dynamic=False):
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)


def results_of(function, *tensors, seed=None):
    """Returns the outputs, and the gradients of the floating-point tensors."""
    if seed is not None:
        torch.manual_seed(seed)
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in tensors]
    outs = function(*leaves)
    outs = [outs] if isinstance(outs, torch.Tensor) else list(outs)
    loss = sum((x.sin() * (n + 1)).sum() for n, x in enumerate(outs))
    wanted = [x for x in leaves if x.requires_grad]
    return [x.detach() for x in outs], torch.autograd.grad(loss, wanted)


def assert_as_eager(function, compiled_function, *tensors, seed=None, tolerance=0.0):
    """Asserts equal values and strides of the outputs, bit for bit unless there is a tolerance, and
    close gradients: those of a tensor that is used twice are summed in another order."""
    outs, gradients = results_of(function, *tensors, seed=seed)
    compiled_outs, compiled_gradients = results_of(compiled_function, *tensors, seed=seed)
    for x, want in zip(compiled_outs, outs, strict=True):
        torch.testing.assert_close(x, want, rtol=tolerance, atol=tolerance)
        assert x.stride() == want.stride()
    for x, want in zip(compiled_gradients, gradients, strict=True):
        eps = 64 * torch.finfo(want.dtype).eps
        torch.testing.assert_close(x, want, rtol=eps, atol=eps)


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype)


# -- Every feature -----------------------------------------------------------------------


# Each kind of tensor that a graph hands to an operator, and all of them together.
ONE_OF_A_KIND = ["plain", "mask 11QK", "bias 1HQK", "key padding", "window and causal", "softcap"]
ONE_OF_A_KIND += ["alibi BH", "sinks", "dropout", "gqa", "everything"]


@pytest.mark.parametrize("name", quick(CASES, *ONE_OF_A_KIND))
def test_gradcheck_of_compiled(name):
    inputs = testing.make_inputs(CASES[name])
    leaves = inputs.differentiable(torch.float64)

    def function(*tensors):
        named = dict(zip(leaves, tensors, strict=True))
        return finite(attention(**named, **inputs.keywords, return_lse=True, backend="cpu"))

    graph = compiled(function)
    with torch._functorch.config.patch(donated_buffer=False):  # gradcheck repeats each backward
        assert_as_eager(function, graph, *leaves.values())
        assert torch.autograd.gradcheck(graph, tuple(leaves.values()), fast_mode=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_without_gradient(name, dtype):
    inputs = testing.make_inputs(CASES[name])
    tensors = {n: x.to(dtype) for n, x in inputs.tensors.items()}
    call = tensors | inputs.keywords
    graph = compiled(attention)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(graph(**call), attention(**call))


# -- The same tensor more than once ------------------------------------------------------

REPEATED = {
    "sdpa(x, x, x)": lambda x, y: sdpa(x, x, x),
    "sdpa(q, kv, kv)": lambda x, y: sdpa(x, y, y),
    "sdpa(x, x, y)": lambda x, y: sdpa(x, x, y),
    "sdpa(x, y, x)": lambda x, y: sdpa(x, y, x),
    "attention(x, x, x)": lambda x, y: attention(x, x, x, causal=True, return_lse=True),
    "bias is query": lambda x, y: attention(x, y, y, bias=x),
}


@pytest.mark.parametrize(
    "name, dynamic",
    [(name, False) for name in REPEATED] + [("sdpa(x, x, x)", True), ("sdpa(q, kv, kv)", True)],
)
def test_repeated_inputs(name, dynamic):
    function = REPEATED[name]

    def used(x, y):  # uses y in any case
        return *torch.utils._pytree.tree_leaves(function(x, y)), y.cos()

    x, y = randn(2, 3, 8, 8), randn(2, 3, 8, 8)
    assert_as_eager(used, compiled(used, dynamic=dynamic), x, y)


# -- One compilation for every length ----------------------------------------------------

# Dynamo takes sizes that are equal in the first call for one size, so B differs from the heads.
LENGTHS = [(3, 9, 11), (5, 17, 40), (3, 33, 6), (7, 130, 257)]
no_recompile = torch._dynamo.config.patch(error_on_recompile=True)
OPTIONS = {
    "plain": lambda B, Sq, Sk: {},
    "causal": lambda B, Sq, Sk: {"causal": "bottom_right", "window_size": (7, -1)},
    "mask": lambda B, Sq, Sk: {"mask": torch.rand(Sq, Sk) > 0.3},
    "bias and padding": lambda B, Sq, Sk: {
        "bias": randn(1, 4, 1, Sk),
        "key_padding_mask": torch.rand(B, Sk) > 0.7,
    },
    "dropout": lambda B, Sq, Sk: {"dropout_p": 0.3, "softcap": 2.0, "return_lse": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_compilation_serves_every_length(name):
    graph = compiled(attention, dynamic=True)
    with no_recompile:
        for B, Sq, Sk in LENGTHS:
            options = OPTIONS[name](B, Sq, Sk)
            tensors = randn(B, 4, Sq, 8), randn(B, 2, Sk, 8), randn(B, 2, Sk, 8)
            eager_and_compiled = [
                lambda q, k, v, f=f, options=options: f(q, k, v, **options)
                for f in (attention, graph)
            ]
            assert_as_eager(*eager_and_compiled, *tensors, seed=B)


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_one_compilation_of_sdpa_serves_every_length(kind):
    graph = compiled(sdpa, dynamic=True)
    with no_recompile:
        for B, Sq, Sk in LENGTHS:
            tensors = [randn(B, s, 4, 8).transpose(1, 2) for s in (Sq, Sk, Sk)]
            mask = randn(B, 1, Sq, Sk)
            assert_as_eager(sdpa, graph, *tensors, mask if kind == "bias" else mask > 0)


def test_lengths_that_turn_dynamic_recompile_once():
    """Without dynamic=True the second length makes the graph general, and no other recompiles."""
    graph = torch.compile(sdpa, backend="aot_eager", fullgraph=True)

    def call(length):
        x = randn(1, 2, length, 8)
        assert torch.equal(graph(x, x, x), sdpa(x, x, x))

    call(9)
    with no_recompile, pytest.raises(torch._dynamo.exc.RecompileError):
        call(12)
    call(12)
    with no_recompile:
        for length in (31, 64, 5):
            call(length)


def test_no_graph_breaks():
    def model(q, k, v, bias):
        out, lse = attention(q, k, v, bias=bias, causal=True, dropout_p=0.1, return_lse=True)
        return sdpa(out, k, v).sum() + lse.sum()

    x = randn(1, 2, 8, 8)
    explained = torch._dynamo.explain(model)(x, x + 1, x + 2, randn(8, 8))
    assert explained.graph_break_count == 0 and explained.graph_count == 1


def test_wrong_arguments_are_told_while_compiling():
    x = randn(1, 2, 8, 8)
    with pytest.raises(Exception, match="window_size"):
        compiled(lambda x: attention(x, x, x, window_size=(-2, 0)))(x)


# -- Dropout -----------------------------------------------------------------------------


def two_layers(x):
    hidden = x + attention(x, x, x, dropout_p=0.4)
    return hidden + attention(hidden, hidden, hidden, dropout_p=0.4)


def two_draws(x, y):
    """Makes two calls with the same inputs, which no compiler may merge into one."""
    return [attention(x, y, y, dropout_p=0.5) for _ in range(2)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_dropout_is_that_of_eager_mode(dynamic):
    x = randn(2, 2, 19, 8)
    graph = compiled(two_layers, dynamic=dynamic)
    for seed in (1, 2, 1):
        assert_as_eager(two_layers, graph, x, seed=seed)
    first, second = graph(x), graph(x)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", ["aot_eager", "aot_eager_decomp_partition"])
def test_two_calls_in_one_graph_draw_two_masks(backend):
    """The second backend removes common subexpressions in training, as Inductor does."""
    x, y = randn(1, 2, 16, 4), randn(1, 2, 16, 4)
    assert_as_eager(two_draws, compiled(two_draws, backend), x, y, seed=3)
    first, second = two_draws(x, y)
    assert not torch.equal(first, second)


def test_a_given_seed_decides_in_compiled_code_too():
    def function(x):
        return attention(x, x, x, dropout_p=0.5, philox_seed=2**63 + 5)

    x = randn(1, 2, 9, 4)
    assert_as_eager(function, compiled(function), x)


# -- Modules -----------------------------------------------------------------------------


class Block(torch.nn.Module):
    """Pre-norm self-attention with a learned bias and a two-layer MLP."""

    def __init__(self, width=16, heads=2, dropout_p=0.0, checkpointed=False):
        super().__init__()
        self.norm, self.qkv = torch.nn.LayerNorm(width), torch.nn.Linear(width, 3 * width)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(width, 2 * width), torch.nn.GELU(), torch.nn.Linear(2 * width, width)
        )
        self.bias = torch.nn.Parameter(torch.randn(heads, 1, 1))
        self.heads, self.dropout_p, self.checkpointed = heads, dropout_p, checkpointed

    def attend(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = attention(q, k, v, bias=self.bias, causal=True, dropout_p=self.dropout_p)
        return out.transpose(1, 2).flatten(2)

    def forward(self, x):
        if self.checkpointed:
            x = x + checkpoint(self.attend, x, use_reentrant=False)
        else:
            x = x + self.attend(x)
        return x + self.mlp(x)


def model(**options):
    torch.manual_seed(0)
    return torch.nn.Sequential(Block(**options), Block(**options))


def parameter_gradients(module, x, seed, **forward):
    torch.manual_seed(seed)
    module.zero_grad()
    module(x, **forward).square().mean().backward()
    return [p.grad.clone() for p in module.parameters()]


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_checkpointed_modules(dropout_p):
    x = randn(2, 9, 16)
    expected = parameter_gradients(model(dropout_p=dropout_p), x, 5)
    module = model(dropout_p=dropout_p, checkpointed=True)
    for got in (
        parameter_gradients(module, x, 5),
        parameter_gradients(compiled(module), x, 5),
    ):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outside", [False, True])
def test_autocast(outside):
    def inner(q, k, v, bias):
        return attention(q, k, v, bias=bias, causal=True)

    def function(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return inner(*tensors)

    if outside:
        graph = compiled(inner)

        def called(*tensors):
            with torch.autocast("cpu", torch.bfloat16):
                return graph(*tensors)
    else:
        called = compiled(function)
    q, k, v = (randn(2, 2, 9, 8) for _ in range(3))
    assert called(q, k, v, randn(9, 9)).dtype == torch.bfloat16
    assert_as_eager(function, called, q, k, v, randn(9, 9))


# -- Inductor (each compilation takes its C++ compiler 10 s or so) -------------------------


@pytest.mark.slow  # takes half a minute; the next test compiles a smaller call
def test_inductor_serves_a_model_at_every_length():
    module = model(dropout_p=0.2)
    graph = compiled(module, "inductor", dynamic=True)
    with no_recompile:
        for B, S in ((3, 9), (5, 33), (4, 130)):
            x = randn(B, S, 16)
            expected = parameter_gradients(module, x, B)
            for got, want in zip(parameter_gradients(graph, x, B), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_inductor_serves_repeated_inputs_and_two_draws():
    def function(x, y):
        return sdpa(x, x, x) + y, sdpa(x, y, y) * 2, *two_draws(x, y)

    x, y = (randn(2, 9, 3, 8).transpose(1, 2) for _ in range(2))
    assert_as_eager(function, compiled(function, "inductor"), x, y, seed=4, tolerance=1e-6)


def test_inductor_serves_everything():
    inputs = testing.make_inputs(CASES["everything"])

    def function(*tensors):
        named = dict(zip(inputs.tensors, tensors, strict=True))
        out, lse = attention(**named, **inputs.keywords, return_lse=True)
        return out, lse.exp()

    graph = compiled(function, "inductor")
    assert_as_eager(function, graph, *inputs.tensors.values(), tolerance=1e-12)


# -- Export ------------------------------------------------------------------------------


def saved_and_loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize("strict", [False, True])
def test_exported_modules_round_trip_at_every_length(strict):
    module = model().eval()
    B, S = torch.export.Dim("B", min=2, max=64), torch.export.Dim("S", min=2, max=1024)
    program = torch.export.export(
        module, (randn(3, 10, 16),), dynamic_shapes=({0: B, 1: S},), strict=strict
    )
    graphs = [m.graph for m in program.graph_module.modules() if hasattr(m, "graph")]
    targets = [str(node.target) for node in itertools.chain(*(g.nodes for g in graphs))]
    assert sum("fused_attention.attention_forward" in target for target in targets) == 2
    loaded = saved_and_loaded(program)
    for sizes in ((3, 10, 16), (2, 77, 16), (5, 2, 16)):
        x = randn(*sizes)
        with torch.no_grad():
            torch.testing.assert_close(loaded(x), module(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["plain", "sinks", "dropout", "everything"])
def test_exported_features_round_trip(name):
    inputs = testing.make_inputs(CASES[name])

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return attention(**tensors, **inputs.keywords, return_lse=True)

    program = torch.export.export(Module(), (inputs.tensors,))
    got = saved_and_loaded(program)(inputs.tensors)
    for x, want in zip(got, Module()(inputs.tensors), strict=True):
        assert torch.equal(x, want)


def test_exported_dropout_follows_the_generator():
    module = model(dropout_p=0.5)
    x = randn(2, 9, 16)
    loaded = saved_and_loaded(torch.export.export(module, (x,)))
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = module(x)
        torch.manual_seed(seed)
        torch.testing.assert_close(loaded(x), expected)


# -- Limits of compiled code -------------------------------------------------------------


INSIDE = {
    "grad": torch.func.grad(lambda x: attention(x, x, x).sum()),
    "jvp": lambda x: torch.func.jvp(lambda x: attention(x, x, x), (x,), (x,)),
    "vmap": torch.vmap(lambda x: x + sdpa(x, x, x)),
    "vmap of grad": torch.vmap(torch.func.grad(lambda x: sdpa(x, x, x).sum())),
}


@pytest.mark.parametrize("name", INSIDE)
def test_transforms_inside_a_graph_raise_where_gradients_would_be_lost(name):
    x = randn(*[3] * ("vmap" in name), 1, 2, 5, 4).requires_grad_()
    with pytest.raises(Exception, match="not built yet"):
        compiled(INSIDE[name])(x)


def test_vmap_inside_a_graph_without_gradients():
    graph, x = compiled(INSIDE["vmap"]), randn(3, 2, 5, 4)
    with torch.no_grad():
        assert torch.equal(graph(x), INSIDE["vmap"](x))


def test_double_backward_of_compiled_code_raises():
    x = randn(1, 2, 5, 4).requires_grad_()
    graph = compiled(lambda x: sdpa(x, x, x).sin())
    (gradient,) = torch.autograd.grad(graph(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        gradient.sum().backward()

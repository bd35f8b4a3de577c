"""TransformerEncoderLayer and TransformerDecoderLayer beside torch.nn's, and the training of layers
whose attention others changed: hooks, pruning, LoRA, weight norm."""

import copy
import inspect
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from attention_modules import HEADS, E, L, N, S, sequence
from fused_attention import MultiheadAttention, attention, modules
from fused_attention.modules import TransformerDecoderLayer, TransformerEncoderLayer

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor is True"
    ),
    pytest.mark.usefixtures("one_thread"),
]
causal_mask = nn.Transformer.generate_square_subsequent_mask
PAIRS = {
    "encoder": (TransformerEncoderLayer, nn.TransformerEncoderLayer),
    "decoder": (TransformerDecoderLayer, nn.TransformerDecoderLayer),
}


def layers(kind, **options):
    """Returns our layer and torch.nn's with the same random parameters."""
    options = {"dim_feedforward": 32, "dropout": 0.0, "dtype": torch.float64} | options
    ours, theirs = (cls(E, HEADS, **options) for cls in PAIRS[kind])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def inputs(kind, batch_first=True):
    tensors = sequence(S, batch_first=batch_first), sequence(L, batch_first=batch_first)
    return tensors[:1] if kind == "encoder" else tensors[::-1]


def results(layer, tensors, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    out = layer(*leaves, **options)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()
    return [out, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.fixture
def seen(monkeypatch):
    """Lists the options of each call of `attention` in a module."""
    calls = []

    def recorded(*tensors, **options):
        calls.append(options)
        return attention(*tensors, **options)

    monkeypatch.setattr(modules, "attention", recorded)
    return calls


# -- The originals' contract -------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_signatures_and_state_dicts_are_the_original_ones(kind):
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(c, method)).parameters for c in PAIRS[kind])
        assert list(ours) == list(theirs)
        assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    states = []
    for cls in PAIRS[kind]:
        torch.manual_seed(0)
        layer = cls(E, HEADS)
        assert isinstance(layer, PAIRS[kind][1]) and layer.linear1.out_features == 2048
        states.append(layer.state_dict())
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())
    for bias, (a, b) in itertools.product((True, False), (PAIRS[kind], PAIRS[kind][::-1])):
        a, b = a(E, HEADS, 32, bias=bias), b(E, HEADS, 32, bias=bias)
        b.load_state_dict(a.state_dict())
        assert all(torch.equal(b.state_dict()[name], x) for name, x in a.state_dict().items())


@pytest.mark.parametrize("kind", PAIRS)
def test_every_attention_inside_is_ours(kind):
    layer = PAIRS[kind][0](E, HEADS, 32, 0.25, layer_norm_eps=0.125, dtype=torch.bfloat16)
    inside = [x for x in layer.modules() if isinstance(x, nn.MultiheadAttention)]
    assert {type(x) for x in inside} == {MultiheadAttention}
    assert len(inside) == (1 if kind == "encoder" else 2)
    assert all(x.dropout == 0.25 for x in inside) and layer.dropout1.p == 0.25
    assert layer.norm1.eps == layer.norm2.eps == 0.125
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    meta = PAIRS[kind][0](E, HEADS, device="meta")
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.covering(2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_forward_and_gradients(kind, norm_first, batch_first, bias):
    activation = "relu" if norm_first else F.gelu if batch_first else torch.tanh
    ours, theirs = layers(
        kind, norm_first=norm_first, batch_first=batch_first, bias=bias, activation=activation
    )
    tensors = inputs(kind, batch_first)
    padding = torch.arange(S) >= torch.tensor([[S], [2], [5]])
    if kind == "encoder":
        masks = {"src_mask": torch.randn(S, S).double(), "src_key_padding_mask": padding}
    else:
        masks = {
            "tgt_mask": torch.randn(L, L).double(),
            "memory_mask": torch.rand(L, S) > 0.7,
            "tgt_key_padding_mask": padding[:, :L],
            "memory_key_padding_mask": torch.randn(N, S).double(),
        }
        masks["memory_mask"][:, 0] = False
    kinds = ({}, *({name: mask} for name, mask in masks.items()))
    for options in kinds:
        for training in (True, False):
            got, expected = (
                results(layer.train(training), tensors, **options) for layer in (ours, theirs)
            )
            assert_same(got, expected)
    unbatched = [x[0] if batch_first else x[:, 0] for x in tensors]
    assert_same(results(ours, unbatched), results(theirs, unbatched))


def test_dropout():
    layer = TransformerEncoderLayer(E, HEADS, 32, 0.5, batch_first=True, dtype=torch.float64)
    (x,) = inputs("encoder")
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)
    assert torch.equal(layer.eval()(x), layer(x))


# -- Hints -------------------------------------------------------------------------------


def is_only_causal(options):
    return options["causal"] == "top_left" and options["mask"] is options["bias"] is None


def test_the_hint_of_an_encoder_layer_reaches_the_kernel(seen):
    ours, theirs = layers("encoder", batch_first=True)
    tensors, mask = inputs("encoder"), causal_mask(S, dtype=torch.float64)
    expected = results(theirs, tensors, src_mask=mask)
    for options in ({}, {"src_mask": mask}):
        for training in (True, False):
            seen.clear()
            got = results(ours.train(training), tensors, is_causal=True, **options)
            assert_same(got, expected)
            assert len(seen) == 1 and is_only_causal(seen[0])


def test_the_hints_of_a_decoder_layer_reach_the_kernel(seen):
    ours, theirs = layers("decoder", batch_first=True)
    tensors = inputs("decoder")
    tgt_mask = causal_mask(L, dtype=torch.float64)
    memory_mask = torch.ones(L, S, dtype=torch.bool).triu(1)  # top-left, as L != S
    expected = results(theirs, tensors, tgt_mask=tgt_mask, memory_mask=memory_mask)
    for masks in ({}, {"tgt_mask": tgt_mask, "memory_mask": memory_mask}):
        seen.clear()
        got = results(ours, tensors, tgt_is_causal=True, memory_is_causal=True, **masks)
        assert_same(got, expected)
        assert len(seen) == 2 and all(map(is_only_causal, seen))
    seen.clear()
    ours(*tensors, tgt_is_causal=True)
    assert [options["causal"] for options in seen] == ["top_left", False]


# -- In PyTorch's stacks -----------------------------------------------------------------


def through(how, module):
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return copy.deepcopy(module) if how == "deepcopy" else module


@pytest.mark.parametrize("how", ["as it is", "deepcopy", "torch.save"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoders(how, norm_first, seen):
    """Every padding mask means in evaluation what it means in training, and the masks none of
    whose values is 0 do not fail, as they do in PyTorch's nested path."""
    ours, theirs = (
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested)
        for layer, nested in zip(
            layers("encoder", batch_first=True, norm_first=norm_first), (False, True), strict=True
        )
    )
    ours = through(how, ours)
    x = sequence(S, batch_first=True)
    ends = torch.arange(S) >= torch.tensor([[S], [2], [5]])
    zeros = torch.zeros(N, S, dtype=torch.float64)
    for padding in (None, ends, zeros.masked_fill(ends, -math.inf), zeros + 0.5, zeros - 0.5):
        expected = theirs.train()(x, src_key_padding_mask=padding)
        for training, grad in itertools.product((True, False), repeat=2):
            seen.clear()
            with torch.set_grad_enabled(grad):
                out = ours.train(training)(x, src_key_padding_mask=padding)
            torch.testing.assert_close(out, expected)
            assert len(seen) == 2
    mask = causal_mask(S, dtype=torch.float64)
    seen.clear()
    torch.testing.assert_close(ours(x, is_causal=True), theirs(x, mask=mask))
    assert all(map(is_only_causal, seen))


@pytest.mark.parametrize("how", ["as it is", "deepcopy", "torch.save"])
def test_decoders(how):
    ours, theirs = (nn.TransformerDecoder(x, 2) for x in layers("decoder", batch_first=True))
    ours = through(how, ours)
    tensors = inputs("decoder")
    expected = results(theirs, tensors, tgt_mask=causal_mask(L, dtype=torch.float64))
    assert_same(results(ours, tensors, tgt_is_causal=True), expected)


def test_stacks_interchange_state_dicts():
    (ours, theirs), (ours2, theirs2) = layers("encoder"), layers("decoder")
    mine, original = (
        nn.Transformer(
            E,
            HEADS,
            custom_encoder=nn.TransformerEncoder(a, 2, enable_nested_tensor=False),
            custom_decoder=nn.TransformerDecoder(b, 2),
            dtype=torch.float64,
        )
        for a, b in ((ours, ours2), (theirs, theirs2))
    )
    for source, target in ((original, mine), (mine, original)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_(std=0.3)
        target.load_state_dict(source.state_dict())
        assert list(target.state_dict()) == list(source.state_dict())
        tensors = sequence(S), sequence(L)
        assert_same(results(mine, tensors), results(original, tensors))


# -- Jagged tensors ----------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_jagged_tensors(kind, is_causal, seen):
    layer, _ = layers(kind, batch_first=True)
    lengths = ((3, 40, 1), (7, 2, 30))[: 1 if kind == "encoder" else 2]
    parts = [[torch.randn(n, E, dtype=torch.float64) for n in each] for each in lengths]
    hint = {"is_causal" if kind == "encoder" else "tgt_is_causal": is_causal}
    nested = [torch.nested.nested_tensor(x, layout=torch.jagged, requires_grad=True) for x in parts]
    for training in (True, False):
        seen.clear()
        out = layer.train(training)(*nested, **hint)
        assert all("cu_seqlens_q" in options for options in seen)
        for got, x in zip(out.unbind(), zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(got, layer(*x, **hint))
        assert out.shape == nested[0].shape
    grads = torch.autograd.grad(out.values().square().sum(), nested)
    for i, x in enumerate(zip(*parts, strict=True)):
        leaves = [part.clone().requires_grad_() for part in x]
        expected = torch.autograd.grad(layer(*leaves, **hint).square().sum(), leaves)
        assert_same([gradient.unbind()[i] for gradient in grads], expected)


@pytest.mark.parametrize("is_causal", [False, True])
def test_jagged_tensors_in_pytorchs_encoder(is_causal):
    layer, _ = layers("encoder", batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    parts = [torch.randn(n, E, dtype=torch.float64) for n in (3, 40, 1)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    for training in (True, False):
        out = encoder.train(training)(nested, is_causal=is_causal)
        for got, x in zip(out.unbind(), parts, strict=True):
            torch.testing.assert_close(got, encoder(x, is_causal=is_causal))


@pytest.mark.slow
def test_a_jagged_layer_compiles():
    layer, _ = layers("encoder", batch_first=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for lengths in ((3, 40, 1), (8, 9)):
        parts = [torch.randn(n, E, dtype=torch.float64) for n in lengths]
        x = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        results = []
        for function in (compiled, layer):
            out = function(x, is_causal=True).values()
            results.append([out, torch.autograd.grad(out.square().sum(), x)[0].values()])
        assert_same(*results)


# -- Layers that others changed ----------------------------------------------------------


class Unfused(nn.MultiheadAttention):
    """Self-attention as PyTorch computes it without a fused kernel: one product after the other.
    It calls out_proj; PyTorch's own layer reads the weight and passes hooks and wrappers by."""

    def forward(self, query, key, value, attn_mask=None, **ignored):
        x = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        q, k, v = x.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(E / HEADS) + attn_mask).softmax(-1)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(-2)), None


class LowRank(nn.Module):
    """A LoRA layer (Hu et al. 2021) as adapter libraries build it: it holds the frozen layer, has
    its attributes `weight` and `bias`, and can be merged into it."""

    def __init__(self, base_layer, rank=2, alpha=6.0):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False, dtype=torch.float64)
        self.scaling, self.merged = alpha / rank, False

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    @torch.no_grad()
    def merge(self):
        self.base_layer.weight += self.scaling * self.lora_B.weight @ self.lora_A.weight
        self.merged = True

    def forward(self, x):
        out = self.base_layer(x)
        return out if self.merged else out + self.scaling * self.lora_B(self.lora_A(x))


def add_hooks(attn):
    attn.out_proj.register_forward_pre_hook(lambda module, args: (args[0] + 0.25,))
    attn.out_proj.register_forward_hook(lambda module, args, out: out + 0.5 * out.tanh())
    attn.out_proj.register_full_backward_hook(lambda module, grad_in, grad_out: (2 * grad_in[0],))


def add_pruning(attn):
    prune.l1_unstructured(attn.out_proj, "weight", 0.4)
    prune.l1_unstructured(attn.out_proj, "bias", 0.4)
    prune.l1_unstructured(attn, "in_proj_weight", 0.3)


def add_lora(attn):
    torch.manual_seed(2)
    attn.in_proj_weight.requires_grad_(False)
    attn.in_proj_bias.requires_grad_(False)
    attn.out_proj = LowRank(attn.out_proj)


def add_weight_norm(attn):
    parametrizations.weight_norm(attn.out_proj, "weight")
    parametrizations.weight_norm(attn, "in_proj_weight")


def add_all(attn):
    prune.l1_unstructured(attn.out_proj, "weight", 0.4)
    parametrizations.weight_norm(attn, "in_proj_weight")
    torch.manual_seed(2)
    attn.out_proj = LowRank(attn.out_proj)
    add_hooks(attn)


CHANGES = {
    "nothing": lambda attn: None,
    "hooks": add_hooks,
    "pruning": add_pruning,
    "LoRA": add_lora,
    "weight norm": add_weight_norm,
    "pruning, weight norm, LoRA and hooks": add_all,
}


def trained(change, cls):
    """Returns the losses of eight steps, and the parameters after them."""
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(
        E, HEADS, 32, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    nn.init.normal_(layer.self_attn.in_proj_bias)
    nn.init.normal_(layer.self_attn.out_proj.bias)
    if cls is not MultiheadAttention:
        layer.self_attn.__class__ = cls
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for copied in model.layers:
        change(copied.self_attn)
    x, target = torch.randn(2, N, S, E, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 0.01)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        out = model(x, mask=causal_mask(S, dtype=torch.float64), is_causal=True)
        loss = F.mse_loss(out, target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), model


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers_train_as_unfused_ones(name):
    losses, model = trained(CHANGES[name], MultiheadAttention)
    expected, unfused = trained(CHANGES[name], Unfused)
    torch.testing.assert_close(losses, expected, atol=0, rtol=1e-10)
    assert losses[-1] < losses[0]
    for (a, x), (b, y) in zip(model.named_parameters(), unfused.named_parameters(), strict=True):
        assert a == b
        torch.testing.assert_close(x, y, atol=1e-9, rtol=1e-8)
    if name in ("nothing", "hooks"):
        torch_losses, _ = trained(CHANGES[name], nn.MultiheadAttention)
        # The unfused layer is PyTorch's, except that PyTorch's runs no hook of out_proj.
        assert torch.allclose(torch_losses, expected, atol=0, rtol=1e-10) == (name == "nothing")


def test_what_was_trained_can_be_made_permanent():
    """Pruned and normalized weights become plain ones, and adapters are merged: same results, and
    the layer's state dict is PyTorch's again."""
    x = sequence(S, batch_first=True)
    for name in ("pruning", "weight norm", "LoRA"):
        _, model = trained(CHANGES[name], MultiheadAttention)
        expected = model.eval()(x)
        for layer in model.layers:
            attn = layer.self_attn
            if name == "pruning":
                prune.remove(attn.out_proj, "weight")
                prune.remove(attn.out_proj, "bias")
                prune.remove(attn, "in_proj_weight")
            elif name == "weight norm":
                parametrize.remove_parametrizations(attn.out_proj, "weight")
                parametrize.remove_parametrizations(attn, "in_proj_weight")
            else:
                attn.out_proj.merge()
                attn.out_proj = attn.out_proj.base_layer
        torch.testing.assert_close(model(x), expected)
        layer = nn.TransformerEncoderLayer(E, HEADS, 32, 0.0, batch_first=True, dtype=torch.float64)
        original = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        original.load_state_dict({name: x.clone() for name, x in model.state_dict().items()})
        torch.testing.assert_close(original(x), expected)

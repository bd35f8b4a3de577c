"""The reference transformer equals torch.nn's, with three attentions, packed and cached."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from fused_attention.errors import ArgumentValueError
from fused_attention.models.attend import IMPLEMENTATIONS, Packed, Padded, pack, pad
from fused_attention.models.transformer import Transformer, rotary_angles, rotate, sinusoids
from small_transformers import KINDS, SMALL, SOURCES, TARGETS, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

KIND_WITH_OWN_LOGITS = "rotary, one key head, own logits"


def run(model, batch=pad):
    """Returns the outputs of the tokens without padding, [T, ...]."""
    if model.decoder is None:
        tokens, layout = batch(SOURCES)
        out = model.encode(tokens, layout).hidden
    elif model.encoder is None:
        tokens, layout = batch(TARGETS)
        out = model(tokens, layout)
    else:
        tokens, layout = batch(TARGETS)
        out = model(tokens, layout, *batch(SOURCES))
    if isinstance(layout, Packed):
        return out
    return out[~layout.padding(tokens.shape[1])]


# -- The same numbers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_three_attentions_padded_and_packed_give_the_same(kind):
    model = model_of(kind).double()
    expected = run(model.use_attention("naive"))
    assert expected.std() > 0.1
    for attention in IMPLEMENTATIONS:
        for batch in (pad, pack):
            with torch.no_grad():  # packed sequences then have a kernel of their own
                out = run(model.use_attention(attention), batch)
            torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("batch", [pad, pack])
@pytest.mark.parametrize("kind", ["as in the paper", "decoder only"])
def test_gradients_are_the_same(kind, batch):
    model = model_of(kind).double()
    gradients = {}
    for attention in IMPLEMENTATIONS:
        out = run(model.use_attention(attention), batch if attention == "fused" else pad)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        gradients[attention] = torch.autograd.grad((out * weights).sum(), list(model.parameters()))
    for name, *three in zip(dict(model.named_parameters()), *gradients.values(), strict=True):
        scale = three[2].abs().max()
        assert scale > 0 or name.endswith("key.bias"), name  # softmax ignores that bias
        for gradient in three[:2]:
            torch.testing.assert_close(gradient, three[2], atol=1e-9, rtol=1e-9, msg=name)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm_first", [False, True])
def test_equals_torch_nn_transformer(norm_first):
    model = Transformer(dataclasses.replace(SMALL, norm_first=norm_first)).double().eval()
    theirs = nn.Transformer(32, 4, 2, 2, 48, 0.0, batch_first=True, norm_first=norm_first)
    theirs = theirs.double().eval()
    for stack, other in ((model.encoder, theirs.encoder), (model.decoder, theirs.decoder)):
        for block, layer in zip(stack.blocks, other.layers, strict=True):
            attentions = [(block.self_attention, layer.self_attn)]
            norms = [(block.self_norm, layer.norm1), (block.feed_forward_norm, layer.norm2)]
            if stack is model.decoder:
                attentions.append((block.cross_attention, layer.multihead_attn))
                norms = [*norms[:1], (block.cross_norm, layer.norm2)]
                norms.append((block.feed_forward_norm, layer.norm3))
            for ours, their in attentions:
                weights = their.in_proj_weight.chunk(3), their.in_proj_bias.chunk(3)
                projections = (ours.query, ours.key, ours.value)
                for projection, weight, bias in zip(projections, *weights, strict=True):
                    projection.load_state_dict({"weight": weight, "bias": bias})
                ours.output.load_state_dict(their.out_proj.state_dict())
            for ours, their in norms:
                nn.init.normal_(their.weight)
                ours.load_state_dict(their.state_dict())
            block.feed_forward.up.load_state_dict(layer.linear1.state_dict())
            block.feed_forward.down.load_state_dict(layer.linear2.state_dict())
        if not norm_first:  # torch has a last norm, ours only with norm_first
            other.norm = None
    source, source_layout = pad(SOURCES)
    target, layout = pad(TARGETS)
    embed = model.tokens
    positions = sinusoids(8, 32).double()
    padding = source_layout.padding(7)
    hidden = theirs(
        embed(source) * math.sqrt(32) + positions[:7],
        embed(target) * math.sqrt(32) + positions[:5],
        tgt_mask=nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64),
        src_key_padding_mask=padding,
        memory_key_padding_mask=padding,
    )
    expected = hidden @ embed.weight.T
    there = ~layout.padding(5)
    out = model(target, layout, source, source_layout)
    torch.testing.assert_close(out[there], expected[there], atol=1e-10, rtol=1e-10)


def test_positions():
    table = sinusoids(50, 8)
    assert table[7, 4] == pytest.approx(math.sin(7 / 10000 ** (4 / 8)), abs=1e-6)
    assert table[7, 5] == pytest.approx(math.cos(7 / 10000 ** (4 / 8)), abs=1e-6)
    # Rotary: a product depends on the distance only.
    angles = rotary_angles(50, 8, 10000.0)
    q, k = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    product = [
        (rotate(q, angles[i : i + 1]) * rotate(k, angles[j : j + 1])).sum().item()
        for i, j in ((3, 1), (42, 40), (3, 2))
    ]
    assert product[0] == pytest.approx(product[1], abs=1e-4)
    assert abs(product[0] - product[2]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_padding_influences_nothing(kind):
    model = model_of(kind)
    plain = run(model)
    other = run(model, lambda sequences: pad(sequences, fill=17))
    assert torch.equal(plain, other)


def test_a_decoder_does_not_look_ahead():
    model = model_of("decoder only")
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    changed = tokens.clone()
    changed[0, 3] = 9
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3:] - after[:, 3:]).abs().max() > 1e-2


# -- Cache ------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["as in the paper", "decoder only"])
@torch.no_grad()
def test_step_by_step_equals_all_at_once(kind, attention):
    """Continues prompts of different lengths by three tokens, two of them in one step."""
    model = model_of(kind).double().use_attention(attention)
    memory = None if model.encoder is None else model.encode(*pad(SOURCES))
    more = torch.tensor([[5, 6, 7], [8, 9, 10], [11, 12, 13]])
    prompts, layout = pad(TARGETS)
    cache = model.start(memory, 3, 12)
    steps = [model.step(prompts, cache, layout.lengths)]
    steps.append(model.step(more[:, :1], cache))
    steps.append(model.step(more[:, 1:], cache))
    assert cache.lengths.tolist() == [len(prompt) + 3 for prompt in TARGETS]
    whole = [[*prompt, *row.tolist()] for prompt, row in zip(TARGETS, more, strict=True)]
    logits = model.use_attention("naive").decode(*pad(whole), memory)
    for seen, step in zip((0, 1, 3), steps, strict=True):
        for b, prompt in enumerate(TARGETS):
            expected = logits[b, len(prompt) - 1 + seen]
            torch.testing.assert_close(step[b], expected, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_a_cache_is_reordered_and_its_memory_is_shared():
    """Four sequences of two memories: each must go on as the one it comes from."""
    model = model_of("as in the paper").double()
    memory = model.encode(*pad(SOURCES[:2]))
    cache = model.start(memory, 2, 12)
    model.step(*pad(TARGETS[:2])[:1], cache, pad(TARGETS[:2])[1].lengths)
    cache.reorder(torch.tensor([0, 0, 1, 1]))
    model.step(torch.tensor([[5], [6], [7], [8]]), cache)
    cache.reorder(torch.tensor([1, 0, 3, 3]))
    logits = model.step(torch.tensor([[9]] * 4), cache)
    whole = [[1, 2, 6, 9], [1, 2, 5, 9], [3, 4, 5, 6, 7, 8, 9], [3, 4, 5, 6, 7, 8, 9]]
    sources = [SOURCES[0], SOURCES[0], SOURCES[1], SOURCES[1]]
    tokens, layout = pad(whole)
    expected = model(tokens, layout, *pad(sources))[torch.arange(4), layout.lengths.long() - 1]
    torch.testing.assert_close(logits, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("kind", ["as in the paper", "decoder only", KIND_WITH_OWN_LOGITS])
@torch.no_grad()
def test_a_cache_under_autocast_equals_all_at_once(kind):
    model = model_of(kind)
    tokens, layout = pad(TARGETS)
    exact = model(tokens, layout, *(pad(SOURCES) if model.encoder else ()))
    with torch.autocast("cpu", torch.bfloat16):
        memory = None if model.encoder is None else model.encode(*pad(SOURCES))
        cache = model.start(memory, 3, 12)
        cache.reorder(torch.arange(3))
        model.step(tokens[:, :1], cache)
        cache.reorder(torch.tensor([0, 1, 2]))
        logits = model.step(tokens[:, 1:], cache, layout.lengths - 1)
        expected = model.decode(tokens, layout, memory)
    last = torch.arange(3), layout.lengths.long() - 1
    assert logits.dtype == expected.dtype
    # Twice what rounding to bfloat16 costs all at once: the steps may round in other places.
    bound = 2 * (expected - exact)[last].abs().max() + 0.01 * exact.abs().max()
    assert (logits - expected[last]).abs().max() <= bound


class Wrapper(nn.Module):
    """Stands in for a layer, without its attributes: W x + B A x (LoRA, Hu et al. 2021)."""

    def __init__(self, layer, out_features, in_features):
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(torch.randn(2, in_features, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(out_features, 2, dtype=torch.float64))

    def forward(self, x):
        if x.is_floating_point():
            return self.layer(x) + x @ self.a.T @ self.b.T
        return self.layer(x) + self.a.T[x] @ self.b.T


def test_layers_may_be_wrapped_and_hooked():
    """Every layer is called as a module, once a step, and no other module is asked for a weight."""
    model, merged = (model_of(KIND_WITH_OWN_LOGITS).double() for _ in range(2))
    ran = []
    for name, layer in merged.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Embedding)):
            continue
        sizes = layer.weight.shape
        sizes = sizes if isinstance(layer, nn.Linear) else sizes[::-1]
        wrapper = Wrapper(model.get_submodule(name), *sizes)
        model.set_submodule(name, wrapper)
        wrapper.register_forward_hook(lambda *_, name=name: ran.append(name))
        with torch.no_grad():
            low_rank = wrapper.b @ wrapper.a
            layer.weight += low_rank if isinstance(layer, nn.Linear) else low_rank.T
    out, expected = run(model), run(merged)
    torch.testing.assert_close(out, expected, atol=1e-8, rtol=1e-8)
    layers = [x for x in model.modules() if isinstance(x, Wrapper)]
    assert len(ran) == len(layers) + 1  # the embedding serves both stacks
    gradients = torch.autograd.grad(
        out.square().sum(), [x for layer in layers for x in (layer.a, layer.b)]
    )
    assert all(x.count_nonzero() for x in gradients)
    with torch.no_grad():
        memory = model.encode(*pad(SOURCES))
        tokens, layout = pad(TARGETS)
        logits = model.step(tokens, model.start(memory, 3, 8), layout.lengths)
        expected = merged.decode(tokens, layout, merged.encode(*pad(SOURCES)))
    last = torch.arange(3), layout.lengths.long() - 1
    torch.testing.assert_close(logits, expected[last], atol=1e-8, rtol=1e-8)


# -- Dropout, errors ---------------------------------------------------------------------------


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
def test_dropout_is_there_in_training_only(attention):
    model = model_of("norm first", attention, attention_dropout=0.5)
    assert torch.equal(run(model), run(model))
    model.train()
    assert not torch.equal(run(model), run(model))
    torch.manual_seed(3)
    first = run(model)
    torch.manual_seed(3)
    assert torch.equal(run(model), first)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"activation": "tanh"}, "activation: expected one of relu, gelu, swiglu, got tanh"),
        ({"norm": "batch"}, "norm: expected one of layer, rms"),
        ({"positions": "none"}, "positions: expected one of"),
        ({"heads": 5}, "heads: expected a divisor of dim 32, got 5"),
        ({"kv_heads": 3}, "kv_heads: expected a divisor of heads 4, got 3"),
        ({"encoder_layers": 0, "decoder_layers": 0}, "decoder_layers: expected at least one"),
    ],
)
def test_a_wrong_config(changes, message):
    with pytest.raises(ArgumentValueError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_wrong_calls():
    model = model_of("norm first", max_positions=8)
    tokens = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ArgumentValueError, match="attention: expected one of fused, sdpa, naive"):
        model.use_attention("flash")
    with pytest.raises(ArgumentValueError, match="memory: expected what encode"):
        model.decode(tokens)
    with pytest.raises(ArgumentValueError, match="tokens: expected at most 8 positions, got 9"):
        model.encode(torch.ones(1, 9, dtype=torch.long))
    with pytest.raises(ArgumentValueError, match="tokens: expected \\[T\\]"):
        model.encode(tokens, pack(SOURCES)[1])
    with pytest.raises(ArgumentValueError, match="tokens: expected \\[B, S\\]"):
        model.encode(tokens[0], Padded())
    decoder, encoder = model_of("decoder only"), model_of("encoder only")
    with pytest.raises(ArgumentValueError, match="source: expected nothing"):
        decoder(tokens, source=tokens)
    with pytest.raises(ArgumentValueError, match="memory: expected None, without an encoder"):
        decoder.start(model.encode(tokens), 1, 4)
    with pytest.raises(ArgumentValueError, match="tokens: expected nothing"):
        encoder(tokens)
    with pytest.raises(ArgumentValueError, match="nothing: this model has no decoder"):
        encoder.start(None, 1, 4)

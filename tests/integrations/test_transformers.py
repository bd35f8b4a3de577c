"""Tests models of transformers on fused attention against the same models on its "eager"."""

import copy
import pickle
import subprocess
import sys
import types

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention import ArgumentTypeError, ArgumentValueError, attention
from fused_attention.integrations import transformers as door
from fused_attention.integrations.transformers import (
    LazyMask,
    fused_attention_forward,
    fused_attention_mask,
    register,
)

hf = pytest.importorskip("transformers")
masking = pytest.importorskip("transformers.masking_utils")
from tiny_transformers import (  # noqa: E402
    BUILDERS,
    DECODERS,
    DEFINITION,
    GENERATING,
    LENGTH,
    PADDED,
    VOCABULARY,
    fill,
    inputs_of,
    padding_mask,
    real_tokens,
    tiny,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FUSED = "fused_attention"
F64 = torch.float64


@pytest.fixture(autouse=True)
def registered():
    with register():
        yield


@pytest.fixture
def made(monkeypatch):
    """Collects the results of the mask function."""
    results = []

    def recorded(**arguments):
        results.append(fused_attention_mask(**arguments))
        return results[-1]

    monkeypatch.setitem(hf.AttentionMaskInterface._global_mapping, FUSED, recorded)
    return results


def main_output(outputs):
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


def floating(inputs, dtype):
    return {
        name: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


# The exact result, that of the naive way, and ours.
RUNS = ((DEFINITION, torch.float64), ("eager", torch.float32), (FUSED, torch.float32))


def assert_as_exact(exact, naive, actual, largest=0.0):
    """Compares with float64: at most twice eager's error, or what the last few bits amount to.

    The floor is 32 units in the last place of the largest value: a unit of error in the attention
    of the first layer is amplified by all that follows, whose weights are larger than trained ones.
    """
    error, allowed = (actual - exact).abs().max(), 2 * (naive - exact).abs().max()
    floor = 32 * torch.finfo(actual.dtype).eps * max(exact.abs().max(), largest)
    assert torch.isfinite(actual).all() and error <= allowed + floor


def run(name, implementation, inputs, dtype=torch.float32, **kwargs):
    with torch.no_grad():
        model = tiny(name, implementation, dtype)
        return model(**floating(inputs, dtype), **kwargs)


# -- Whole models ------------------------------------------------------------------------

CASES = [(name, None) for name in BUILDERS]
CASES += [(name, side) for name in PADDED for side in ("left", "right")]


def trained(name, implementation, dtype, padded, checkpointing=None):
    """Returns the output at real tokens, and the gradients of all parameters for a random one."""
    model = tiny(name, implementation, dtype)
    if checkpointing is not None:
        model.train()  # without dropout; transformers checkpoints in training only
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    outputs = model(**floating(inputs_of(name, padded), dtype))
    out = main_output(outputs)[real_tokens(name, padded)]
    generator = torch.Generator().manual_seed(3)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().backward()
    gradients = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    return out.detach(), gradients


def assert_trained_as_exact(*results):
    """The gradient of a key's bias is 0; its error is that of sums of other gradients."""
    outs, (exact, naive, actual) = zip(*results, strict=True)
    assert_as_exact(*outs)
    largest = max(x.abs().max() for x in exact.values())
    assert actual.keys() == exact.keys()
    for key, value in actual.items():
        assert_as_exact(exact[key], naive[key], value, largest)


@pytest.mark.parametrize("name, padded", CASES)
def test_outputs_and_gradients(name, padded):
    assert_trained_as_exact(*(trained(name, *way, padded) for way in RUNS))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["Llama", "T5"])
def test_gradient_checkpointing(name, reentrant):
    exact = trained(name, DEFINITION, F64, "left")
    plain = trained(name, FUSED, torch.float32, "left")
    checkpointed = trained(name, FUSED, torch.float32, "left", checkpointing=reentrant)
    assert_trained_as_exact(exact, plain, checkpointed)


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS", "T5", "ModernBERT"])
def test_outputs_in_bfloat16(name):
    inputs = inputs_of(name, "left")
    rows = real_tokens(name, "left")
    exact_model = tiny(name, DEFINITION, torch.bfloat16).double()  # the same rounded weights
    with torch.no_grad():
        exact = main_output(exact_model(**inputs))[rows]
    naive, actual = (
        main_output(run(name, x, inputs, torch.bfloat16))[rows].double() for x in ("eager", FUSED)
    )

    def rms(x):
        return (x - exact).square().mean().sqrt()

    assert rms(actual) <= 1.5 * rms(naive)


@pytest.mark.parametrize("name, padded", CASES)
def test_a_wrong_mask_is_seen(name, padded, monkeypatch):
    """The tests of this file would notice attention that ignores its mask."""

    def blind(module, query, key, value, attention_mask, *args, **kwargs):
        kwargs["is_causal"] = False
        return fused_attention_forward(module, query, key, value, None, *args, **kwargs)

    inputs, rows = inputs_of(name, padded), real_tokens(name, padded)
    right = main_output(run(name, FUSED, inputs))[rows]
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, FUSED, blind)
    wrong = main_output(run(name, FUSED, inputs))[rows]
    nothing_to_hide = padded is None and name in ("BERT", "ViT")
    assert nothing_to_hide == bool((wrong - right).abs().max() < 1e-2 * right.abs().max())


# -- Generation --------------------------------------------------------------------------


def generated(name, implementation, dtype, padded, **options):
    model = tiny(name, implementation, dtype)
    inputs = inputs_of(name, padded)
    inputs.pop("decoder_input_ids", None)
    model.generation_config.pad_token_id = 0
    limits = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    returned = {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**floating(inputs, dtype), **limits, **returned, **options)


GENERATIONS = [
    (name, padded, cache, beams)
    for name in GENERATING
    for padded in (None, "left")
    for cache in ("dynamic", "static")
    for beams in (1, 3)
    if not (padded and name == "Whisper")
]


@pytest.mark.covering
@pytest.mark.parametrize("name, padded, cache, beams", GENERATIONS)
def test_generation(name, padded, cache, beams):
    options = {"cache_implementation": cache, "num_beams": beams, "num_return_sequences": beams}
    if beams > 1 and name in DECODERS:
        options["length_penalty"] = 0.0
    exact, naive, actual = (generated(name, *way, padded, **options) for way in RUNS)
    assert torch.equal(actual.sequences, exact.sequences)
    for logits in zip(exact.logits, naive.logits, actual.logits, strict=True):
        assert_as_exact(*logits)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-OSS"])
def test_a_prompt_in_two_parts(name, static, made):
    """The second part begins at an offset, and in Mistral beyond the window."""
    inputs, room = inputs_of(name, "left"), 24
    outputs = []
    for way in RUNS:
        model = tiny(name, *way)
        if static:
            cache = hf.StaticCache(config=model.config, max_cache_len=room)
        else:
            cache = hf.DynamicCache(config=model.config)
        parts = []
        with torch.no_grad():
            for start, stop in ((0, 8), (8, LENGTH)):
                arguments = {
                    "input_ids": inputs["input_ids"][:, start:stop],
                    "attention_mask": inputs["attention_mask"][:, :stop],
                    "past_key_values": cache,
                }
                parts.append(model(**arguments).logits)
        outputs.append(torch.cat(parts, 1)[real_tokens(name, "left")])
    assert_as_exact(*outputs)
    assert made and all(isinstance(mask, LazyMask) and mask.options for mask in made)
    assert not any("complete" in vars(mask) for mask in made)


# -- Attention weights -------------------------------------------------------------------

KINDS_OF_WEIGHTS = (
    "attentions",
    "encoder_attentions",
    "decoder_attentions",
    "cross_attentions",
)


@pytest.mark.parametrize("name", BUILDERS)
def test_output_attentions(name):
    padded = "right" if name in PADDED else None
    inputs = inputs_of(name, padded)
    outputs = [run(name, x, inputs, dtype, output_attentions=True) for x, dtype in RUNS]
    rows = real_tokens(name, padded)
    assert_as_exact(*(main_output(x)[rows] for x in outputs))
    kinds = [kind for kind in KINDS_OF_WEIGHTS if kind in outputs[0]]
    assert kinds
    for kind in kinds:
        for weights in zip(*(x[kind] for x in outputs), strict=True):
            if padded and kind in ("attentions", "encoder_attentions"):
                weights = [x.transpose(1, 2)[padding_mask(padded).bool()] for x in weights]
            assert_as_exact(*weights)


def test_weights_of_a_static_cache_have_all_columns():
    options = {"cache_implementation": "static", "output_attentions": True}
    exact, actual = (generated("Llama", x, F64, "left", **options) for x in (DEFINITION, FUSED))
    for of_step, expected in zip(actual.attentions[1:], exact.attentions[1:], strict=True):
        for weights, others in zip(of_step, expected, strict=True):
            torch.testing.assert_close(weights, others)


def test_a_config_refuses_output_attentions():
    """As transformers does for any name but "eager"; the documentation says so."""
    config = tiny("BERT", FUSED).config
    with pytest.raises(ValueError, match="output_attentions"):
        config.output_attentions = True


# -- Masks that users and models make ----------------------------------------------------


def test_packed_rows_equal_the_sequences_apart(made):
    lengths = [[5, 1, 7], [3, 10]]
    model = tiny("Mistral", FUSED)  # with a window that crosses no border
    ids = torch.randint(3, VOCABULARY, (2, LENGTH))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    with torch.no_grad():
        together = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        packed = [mask.options for mask in made]
        for row, of_row in enumerate(lengths):
            parts = zip(ids[row].split(of_row), together[row].split(of_row), strict=True)
            for tokens, logits in parts:
                alone = model(input_ids=tokens[None], use_cache=False).logits[0]
                torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-4)
    assert packed and all(
        options["cu_seqlens_q"].tolist() == [0, 5, 6, 13, 16, 26] for options in packed
    )


def test_packed_rows_by_the_keywords_of_flash_attention():
    model = tiny("Llama", FUSED)
    ids = torch.randint(3, VOCABULARY, (1, LENGTH))
    cu_seqlens = torch.tensor([0, 4, 13])
    positions = torch.cat([torch.arange(4), torch.arange(9)])[None]
    packing = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
    packing |= {"max_length_q": 9, "max_length_k": 9}
    with torch.no_grad():
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        both = model(input_ids=ids, position_ids=positions, use_cache=False, **packing).logits
        different = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(both, expected) and not torch.allclose(different, expected)


@pytest.mark.parametrize("additive", [False, True])
def test_four_dimensional_masks(additive):
    """Everything up to the query, and two random keys more; the second row is padded."""
    visible = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    visible |= torch.rand(visible.shape) < 0.1
    visible[1, :, :, 10:] = False
    inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH))}

    outputs = []
    for implementation, dtype in RUNS:
        mask = visible
        if additive or implementation == "eager":
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -1e9)
        mask = {"attention_mask": mask}
        outputs.append(run("Llama", implementation, inputs | mask, dtype).logits)
    assert_as_exact(*outputs)


def test_chunked_attention(made):
    """Llama 4 attends within chunks, which no keyword of `attention` says."""
    config = hf.Llama4TextConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=37, intermediate_size_mlp=37,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        num_local_experts=2, attention_chunk_size=5, max_position_embeddings=64, pad_token_id=0,
        no_rope_layers=[1, 0],
    )  # fmt: skip
    model = hf.Llama4ForCausalLM(config).eval()
    fill(model)
    inputs = inputs_of("Llama", "left")
    outputs = []
    for implementation, dtype in RUNS:
        of_dtype = copy.deepcopy(model).to(dtype)
        of_dtype.set_attn_implementation(implementation)
        with torch.no_grad():
            outputs.append(of_dtype(**inputs).logits[real_tokens("Llama", "left")])
    assert_as_exact(*outputs)
    assert {type(mask) for mask in made} == {LazyMask, torch.Tensor}


def config_of(implementation=FUSED, **changes):
    config = hf.LlamaConfig(**changes)
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize("union", ["image tokens", "a user's own"])
def test_unions_become_complete_masks(union):
    ids = torch.tensor([[-1, 0, 0, -1, 1, 1, 1], [0, 0, -1, -1, -1, 1, 1]])
    if union == "image tokens":
        changes = {"block_sequence_ids": ids}
    else:
        changes = {"or_mask_function": lambda b, h, q, k: (q == 2) & (k == 5)}
    arguments = {"inputs_embeds": torch.empty(2, 7, 8), "attention_mask": None}
    masks = [
        masking.create_causal_mask(config_of(x), past_key_values=None, **arguments, **changes)
        for x in ("sdpa", FUSED)
    ]
    assert type(masks[1]) is torch.Tensor and torch.equal(*masks)
    assert masks[0].sum() > 2 * 28


# -- The mask function -------------------------------------------------------------------


def attention_of(module, query, key, value, mask, **options):
    return fused_attention_forward(module, query, key, value, mask, **options)[0]


def naive_attention(query, key, value, visible, scale=None, bias=0.0):
    """softmax(scale · query keyᵀ + bias) value over the visible keys, with copies for every head;
    0 where none is visible."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5) + bias
    weights = torch.softmax(scores.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2)


PATTERNS = {
    "causal": lambda: masking.causal_mask_function,
    "bidirectional": lambda: masking.bidirectional_mask_function,
    "window 1": lambda: masking.sliding_window_causal_mask_function(1),
    "window 4": lambda: masking.sliding_window_causal_mask_function(4),
    "window 50": lambda: masking.sliding_window_causal_mask_function(50),
    "half window": lambda: masking.sliding_window_overlay(3),
    "both sides": lambda: masking.sliding_window_bidirectional_mask_function(2),
    "two windows": lambda: masking.and_masks(
        masking.sliding_window_bidirectional_mask_function(5),
        masking.sliding_window_causal_mask_function(3),
    ),
}

# q_length, kv_length, q_offset, kv_offset
PLACES = {
    "a text": (7, 7, 0, 0),
    "cross attention": (7, 11, 0, 0),
    "a second part": (5, 9, 4, 0),
    "two more": (2, 6, 4, 0),
    "a step": (1, 9, 8, 0),
    "static, first part": (5, 16, 0, 0),
    "static, second part": (5, 16, 4, 0),
    "static, a step": (1, 16, 9, 0),
    "past a window": (4, 7, 10, 7),
    "a step past a window": (1, 4, 10, 7),
    "fewer keys": (6, 4, 0, 0),
    "keys from later on": (6, 4, 0, 2),
    "room on both sides": (3, 16, 6, 2),
}

PADDINGS = {
    "none": lambda length: None,
    "no padding": lambda length: torch.ones(2, length, dtype=torch.bool),
    "left": lambda length: torch.arange(length) >= torch.tensor([[3], [0]]),
    "right": lambda length: torch.arange(length) < torch.tensor([[length - 2], [length]]),
    "shorter": lambda length: torch.ones(2, max(length - 2, 1), dtype=torch.bool),
    "longer": lambda length: torch.arange(length + 3) >= torch.tensor([[1], [2]]),
    "everything": lambda length: torch.arange(length) < torch.tensor([[0], [length]]),
}


def request_of(pattern, place, padding):
    """Returns arguments of a mask function for two rows."""
    q_length, kv_length, q_offset, kv_offset = PLACES[place]
    return {
        "batch_size": 2,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": PATTERNS[pattern](),
        "attention_mask": PADDINGS[padding](kv_offset + kv_length),
    }


def tensors_of(q_length, kv_length):
    """Returns query, key and value with two rows, four query heads and two key heads."""
    shapes = ((2, 4, q_length, 8), (2, 2, kv_length, 8), (2, 2, kv_length, 5))
    return [torch.randn(shape, dtype=F64) for shape in shapes]


SKIPS = ("allow_is_causal_skip", "allow_is_bidirectional_skip")
AFTER_THE_FIRST = ("static, second part", "static, a step")
UNALIGNED = ("keys from later on", "room on both sides")


@pytest.mark.covering(2)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_mask_hides_what_the_complete_mask_hides(pattern, place, padding):
    request = request_of(pattern, place, padding) | dict.fromkeys(SKIPS, False)
    complete = masking.sdpa_mask(**request)
    counted = torch.tensor(request["q_offset"])
    mask = fused_attention_mask(**request | {"q_offset": counted})
    counted.add_(1)  # as a static cache counts on before its mask may be made
    assert mask.shape == complete.shape and mask.dtype == torch.bool
    if isinstance(mask, LazyMask):
        tensors = tensors_of(request["q_length"], request["kv_length"])
        out = attention_of(nn.Module(), *tensors, mask)
        torch.testing.assert_close(out, naive_attention(*tensors, complete))
        assert out.is_contiguous() and "complete" not in vars(mask)
    else:
        assert place in UNALIGNED or (
            pattern in ("half window", "both sides") and place in AFTER_THE_FIRST
        )
    assert torch.equal(mask & torch.tensor(True), complete)


@pytest.mark.covering(2)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "pattern, local_size",
    [("causal", None), ("bidirectional", None), ("bidirectional", 6), ("window 4", 4)]
    + [("window 50", 50)],
)
def test_masks_are_left_out_where_transformers_leaves_them_out(pattern, local_size, place, padding):
    request = request_of(pattern, place, padding)
    complete = masking.sdpa_mask(**request, **dict.fromkeys(SKIPS, False))
    causal = pattern != "bidirectional"
    request |= {"local_size": local_size} | dict(zip(SKIPS, (causal, not causal), strict=True))
    mask = fused_attention_mask(**request)
    # These would show more than the mask. transformers does not ask for them.
    unsafe = place in ("static, a step", *UNALIGNED)
    assert mask is None or unsafe or masking.sdpa_mask(**request) is not None
    assert mask is not None or local_size is None or request["kv_length"] < local_size
    module = nn.Module()
    module.is_causal = causal
    tensors = tensors_of(request["q_length"], request["kv_length"])
    expected = naive_attention(*tensors, complete)
    torch.testing.assert_close(attention_of(module, *tensors, mask), expected)


def test_what_no_query_sees_is_not_read():
    """Free room of a static cache, and padding, hold whatever bits."""
    padding = torch.arange(16) >= torch.tensor([[3], [0]])
    padding[:, 9:] = False  # as transformers extends masks to the room
    request = {"batch_size": 2, "q_length": 4, "kv_length": 16, "q_offset": 5}
    mask = fused_attention_mask(**request, attention_mask=padding)
    tensors = tensors_of(4, 16)
    expected = naive_attention(*tensors, mask.complete)
    for x in tensors[1:]:
        x[:, :, 9:], x[0, :, :3] = torch.nan, torch.nan
    torch.testing.assert_close(attention_of(nn.Module(), *tensors, mask), expected)


@pytest.mark.parametrize("mask", ["none", "lazy"])
def test_free_room_is_not_passed_on(mask, monkeypatch):
    passed = []

    def recorded(query, key, value, **options):
        passed.append((key.shape[2], value.shape[2]))
        return attention(query, key, value, **options)

    monkeypatch.setattr(door, "attention", recorded)
    given = None if mask == "none" else fused_attention_mask(2, 5, 16, allow_is_causal_skip=False)
    attention_of(MODULE, *tensors_of(5, 16), given)
    assert passed == [(5, 5)]


@pytest.mark.parametrize("queries, keys", [(5, 6), (3, 9)])
def test_a_mask_of_another_size_is_complete(queries, keys):
    """Models may take a part of the keys, or use the mask of other queries."""
    mask = fused_attention_mask(2, 5, 9, q_offset=4)
    tensors = tensors_of(5, keys)
    if queries == 5:
        visible = mask.complete[..., :keys]
        out = attention_of(nn.Module(), *tensors, mask)
        torch.testing.assert_close(out, naive_attention(*tensors, visible))
    else:
        with pytest.raises(ArgumentValueError, match="mask: expected a shape that broadcasts"):
            attention_of(nn.Module(), tensors[0][:, :, :queries], *tensors[1:], mask)


PACKINGS = {
    # numbers of the sequences, positions
    "two rows": ([[0, 0, 0, 1, 1], [0, 1, 1, 2, 3]], [[0, 1, 2, 0, 1], [7, 0, 1, 0, 0]]),
    "without positions": ([[0, 0, 0, 0, 1], [3, 3, 4, 4, 4]], None),
    "a sequence in two places": ([[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]], None),
    "positions with gaps": ([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], [[0, 1, 3, 0, 1], [0, 1, 2, 3, 4]]),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_sequences(packing, pattern):
    numbers, positions = PACKINGS[packing]
    function = PATTERNS[pattern]()
    if positions is not None:
        positions = torch.tensor(positions)
        function = masking.remap_positions_for_packed_sequence(function, positions)
    numbers = torch.tensor(numbers)
    function = masking.and_masks(function, masking.packed_sequence_mask_function(numbers))
    request = {"batch_size": 2, "q_length": 5, "kv_length": 5, "mask_function": function}
    request |= dict.fromkeys(SKIPS, False)
    complete = masking.sdpa_mask(**request)
    mask = fused_attention_mask(**request)
    known = packing in ("two rows", "without positions")
    assert known == isinstance(mask, LazyMask) == hasattr(mask, "options")
    tensors = tensors_of(5, 5)
    bias = torch.randn(1, 4, 5, 5, dtype=F64)
    module = nn.Module()
    out = attention_of(module, *tensors, mask)
    assert not known or "complete" not in vars(mask)
    torch.testing.assert_close(out, naive_attention(*tensors, complete))
    # Packed attention takes no bias, and returns no weights.
    out = attention_of(module, *tensors, mask, position_bias=bias)
    torch.testing.assert_close(out, naive_attention(*tensors, complete, bias=bias))
    out, weights = fused_attention_forward(module, *tensors, mask, output_attentions=True)
    torch.testing.assert_close(out, naive_attention(*tensors, complete))
    assert torch.equal(weights > 0, complete.expand(2, 4, 5, 5))
    assert torch.equal(mask & torch.tensor(True), complete)


PACKED = masking.packed_sequence_mask_function(torch.tensor([[0, 0, 0, 0, 1, 1, 1]] * 2))


CAUSAL_FUNCTION = masking.causal_mask_function


def remapped(function, step=1, length=7):
    positions = step * torch.arange(length).expand(2, length)
    return masking.remap_positions_for_packed_sequence(function, positions)


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.ones(3, 7, dtype=torch.bool)},
        {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
        {"mask_function": masking.sliding_window_causal_mask_function(0)},
        {"mask_function": masking.chunked_causal_mask_function(3, torch.zeros(2, dtype=int))},
        {"mask_function": lambda b, h, q, k: k <= q},
        {"q_length": 0},
        {"mask_function": remapped(CAUSAL_FUNCTION)},
        {"mask_function": remapped(PACKED)},
        {"mask_function": masking.and_masks(PACKED, remapped(remapped(CAUSAL_FUNCTION)))},
        {
            "mask_function": masking.and_masks(
                PACKED, remapped(CAUSAL_FUNCTION), remapped(CAUSAL_FUNCTION, 2)
            )
        },
        {"mask_function": masking.and_masks(PACKED, PACKED)},
        {"mask_function": masking.and_masks(PACKED, remapped(CAUSAL_FUNCTION, length=9))},
        {"mask_function": masking.packed_sequence_mask_function(torch.zeros(2, 9))},
        {"mask_function": PACKED, "kv_length": 6},
        {"mask_function": PACKED, "attention_mask": torch.ones(2, 7, dtype=torch.bool)},
    ],
)
def test_what_is_not_known_becomes_a_complete_mask(change):
    request = {"batch_size": 2, "q_length": 7, "kv_length": 7} | dict.fromkeys(SKIPS, False)
    mask = fused_attention_mask(**request | change)
    assert type(mask) is torch.Tensor
    assert torch.equal(mask, masking.sdpa_mask(**request | change))


def test_packed_sequences_at_an_offset():
    """transformers asks for none: its own mask function leaves the tensor of the sequences."""
    arguments = {"q_offset": 1, "mask_function": PACKED, "allow_is_causal_skip": False}
    with pytest.raises(IndexError):
        fused_attention_mask(2, 7, 7, **arguments)


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("function", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_the_memory_of_a_mask_is_linear(function, padded):
    length = 4096
    arguments = {"config": config_of(sliding_window=512), "past_key_values": None}
    arguments["inputs_embeds"] = torch.empty(2, length, 1)
    arguments["attention_mask"] = padding = torch.ones(2, length)
    padding[0, : 100 if padded else 0] = 0
    with Largest() as largest:
        mask = getattr(masking, function)(**arguments)
        assert (mask is None) == (not padded and function == "create_causal_mask")
        assert padded == (mask is not None and "key_padding_mask" in mask.options)
    assert largest.elements <= 2 * length


# -- LazyMask ----------------------------------------------------------------------------


def lazy(attention_mask=None):
    request = {"batch_size": 2, "q_length": 5, "kv_length": 5, "attention_mask": attention_mask}
    complete = masking.sdpa_mask(**request, allow_is_causal_skip=False)
    return fused_attention_mask(**request, allow_is_causal_skip=False), complete


READS = {
    "slice": lambda x: x[:, :, :, :3],
    "index": lambda x: x[0, 0, 2],
    "to": lambda x: x.to(torch.float32),
    "expand": lambda x: x.expand(2, 4, 5, 5),
    "cat": lambda x: torch.cat([x, x], -1),
    "and": lambda x: x & ~x.roll(1),
    "where": lambda x: torch.where(x, 0.0, -1.0),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "tolist": lambda x: torch.tensor(x.tolist()),
    "clone": lambda x: x.clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "repeat": lambda x: x.repeat_interleave(3, 0),
    "detach": lambda x: x.detach(),
    "iterate": lambda x: torch.stack(list(x)),
    "sum": lambda x: x.sum(),
    "out": lambda x: torch.logical_not(x, out=torch.empty(0, dtype=torch.bool)),
}


@pytest.mark.parametrize("read", READS)
def test_what_is_done_with_a_mask_is_done_with_the_complete_mask(read):
    mask, complete = lazy()
    out, expected = READS[read](mask), READS[read](complete)
    assert type(out) is torch.Tensor and torch.equal(out, expected)


def test_questions_do_not_make_the_mask():
    mask, complete = lazy()
    assert mask.shape == complete.shape and mask.size(-1) == 5 and mask.dim() == mask.ndim == 4
    assert mask.dtype == torch.bool and mask.device == complete.device and not mask.requires_grad
    assert mask.to("cpu", torch.bool) is mask and mask.contiguous() is mask and mask.is_contiguous()
    assert not mask.is_floating_point() and mask.numel() == 50 and len(mask) == 2
    assert "complete" not in vars(mask)


@pytest.mark.parametrize("through_a_view", [False, True])
def test_writes_are_seen(through_a_view):
    mask, complete = lazy()
    if through_a_view:
        mask[:, :, 3:, 0] = False
    else:
        mask.masked_fill_(torch.arange(5) == 0, False)
    complete = complete.clone()
    complete[:, :, 3 if through_a_view else 0 :, 0] = False
    tensors = tensors_of(5, 5)
    out = attention_of(nn.Module(), *tensors, mask)
    torch.testing.assert_close(out, naive_attention(*tensors, complete))


# -- The attention function --------------------------------------------------------------

MODULE = nn.Module()  # has no is_causal, which means that it is causal
EVERYTHING = torch.ones(7, 7, dtype=torch.bool)
CAUSAL = EVERYTHING.tril()
PADDING = torch.arange(7) < torch.tensor([[7], [4]])
OF_KEYS = PADDING[:, None, None]
ANY = torch.rand(2, 1, 7, 7) < 0.6


def additive(visible):
    return torch.zeros(visible.shape, dtype=F64).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize(
    "mask, options, visible",
    [
        (None, {}, CAUSAL),
        (None, {"is_causal": False}, EVERYTHING),
        (None, {"sliding_window": 3}, CAUSAL),  # as for "sdpa"
        (PADDING, {}, CAUSAL & OF_KEYS),
        (PADDING.long(), {"is_causal": False}, EVERYTHING & OF_KEYS),
        (PADDING, {"sliding_window": 3}, CAUSAL.triu(-2) & OF_KEYS),
        (PADDING, {"sliding_window": 3, "is_causal": False}, EVERYTHING.triu(-2).tril(2) & OF_KEYS),
        (PADDING, {"sliding_window": 6}, CAUSAL.triu(-5) & OF_KEYS),
        (PADDING, {"sliding_window": 7}, CAUSAL & OF_KEYS),
        (ANY, {"sliding_window": 3}, ANY),
        (torch.cat([ANY, ANY], -1), {}, ANY),
        (additive(ANY), {}, ANY),
    ],
)  # fmt: skip
@pytest.mark.parametrize("queries", [7, 3, 1])
def test_explicit_masks(queries, mask, options, visible):
    """With fewer queries than keys they are the last ones, unless there is no mask."""
    visible = visible[..., 7 - queries :, :]
    if mask is None and options.get("is_causal", True):
        visible = EVERYTHING[:queries] if queries == 1 else CAUSAL[:queries]
    if mask is not None and mask.dim() == 4:
        mask = mask[:, :, 7 - queries :]
    tensors = tensors_of(queries, 7)
    out = attention_of(MODULE, *tensors, mask, **options)
    torch.testing.assert_close(out, naive_attention(*tensors, visible))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, ANY, additive(ANY)], ids=["none", "bool", "additive"])
def test_position_bias_and_its_gradient(mask, causal):
    tensors = tensors_of(7, 9)  # two keys are free room of a static cache
    bias = torch.randn(1, 4, 7, 9, dtype=F64, requires_grad=True)
    visible = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    if mask is not None:
        mask = nn.functional.pad(mask, (0, 2), value=-torch.inf if mask.is_floating_point() else 0)
        visible = mask == 0 if mask.is_floating_point() else mask
    elif causal:
        visible = visible.tril()
    out = attention_of(MODULE, *tensors, mask, is_causal=causal, position_bias=bias)
    expected = naive_attention(*tensors, visible, bias=bias)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad((x * weight).sum(), bias)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_numbers_and_sinks():
    """Compared with a row's denominator that counts the sink, for capped scores."""
    query, key, value = tensors_of(7, 7)
    sinks = torch.randn(4, dtype=F64)
    out, weights = fused_attention_forward(
        MODULE, query, key, value, None, scaling=0.3, softcap=1.5, s_aux=sinks,
        output_attentions=True,
    )  # fmt: skip
    key, value = (x.repeat_interleave(2, 1) for x in (key, value))
    scores = 1.5 * torch.tanh(query @ key.transpose(-1, -2) * 0.3 / 1.5)
    terms = scores.exp().masked_fill(~CAUSAL, 0.0)
    expected = terms / (terms.sum(-1, keepdim=True) + sinks.exp()[:, None, None])
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ value).transpose(1, 2))


def test_dropout_is_applied_as_given():
    tensors = tensors_of(7, 7)
    whole = attention_of(MODULE, *tensors, None)
    outs = [attention_of(MODULE, *tensors, None, dropout=0.4) for _ in range(2000)]
    assert not torch.allclose(outs[0], whole)
    mean = torch.stack(outs).mean(0)
    # Each output is a mean of 2000 draws whose deviation is at most that of one dropped weight.
    deviation = torch.stack(outs).std(0) / 2000**0.5
    assert ((mean - whole).abs() <= 6 * deviation + 1e-9).all()


@pytest.mark.parametrize("of_query", [False, True])
def test_a_batch_of_one_broadcasts(of_query):
    query, key, value = tensors_of(7, 7)
    if of_query:
        query = query[:1]
    else:
        key, value = key[:1], value[:1]
    out = attention_of(MODULE, query, key, value, None)
    expected = naive_attention(query, key, value, CAUSAL)
    torch.testing.assert_close(out, expected)


def test_packed_queries_and_keys_of_different_lengths():
    """The queries of each sequence are its last ones, and the window is measured from there."""
    query, key, value = (x[:1] for x in tensors_of(5, 9))
    out = attention_of(
        MODULE, query, key, value, None, sliding_window=3, cu_seq_lens_q=torch.tensor([0, 2, 5]),
        cu_seq_lens_k=torch.tensor([0, 5, 9]), max_length_q=3, max_length_k=torch.tensor(5),
    )  # fmt: skip
    for q, k in ((slice(0, 2), slice(0, 5)), (slice(2, 5), slice(5, 9))):
        part = (query[:, :, q], key[:, :, k], value[:, :, k])
        Sq, Sk = part[0].shape[2], part[1].shape[2]
        visible = torch.ones(Sq, Sk, dtype=torch.bool).tril(Sk - Sq).triu(Sk - Sq - 2)
        torch.testing.assert_close(out[:, q], naive_attention(*part, visible))


def test_all_kinds_of_memory_order_give_a_contiguous_result():
    dense = [torch.randn(2, n, h, 8, dtype=F64) for n, h in ((7, 4), (7, 2), (7, 2))]
    views = [x.transpose(1, 2) for x in dense]
    for tensors in (views, [x.contiguous() for x in views]):
        out = attention_of(MODULE, *tensors, None)
        assert out.shape == (2, 7, 4, 8) and out.is_contiguous()


@pytest.mark.parametrize(
    "options, error, words",
    [
        ({"indices": torch.zeros(2, 7, 3)}, NotImplementedError, "indices: keys selected"),
        ({"block_indices": torch.zeros(2, 7, 3)}, NotImplementedError, "block_indices: blocks"),
        ({"sinks": torch.zeros(2, 4, 7, 1)}, NotImplementedError, "s_aux"),
        ({"block_table": torch.zeros(2, 7)}, NotImplementedError, "block_table: paged caches"),
        ({"write_index": [torch.zeros(7)]}, NotImplementedError, "write_index: paged caches"),
        ({"attention_mask": "a BlockMask"}, ArgumentTypeError, "BlockMask"),
        ({"attention_mask": ANY[:, 0]}, ArgumentValueError, r"bool or int \[B, Sk\]"),
        ({"attention_mask": additive(ANY)[:, 0, 0]}, ArgumentValueError, r"bool or int \[B, Sk\]"),
        ({"attention_mask": ANY.long()}, ArgumentValueError, "bool or floating"),
        (
            {"attention_mask": ANY, "cu_seq_lens_q": torch.tensor([0, 14])},
            ArgumentValueError,
            "cu_seq_lens_q: expected None together with an attention_mask",
        ),
        (
            {
                "attention_mask": fused_attention_mask(2, 7, 7, attention_mask=PADDING),
                "cu_seq_lens_q": torch.tensor([0, 14]),
            },
            ArgumentValueError,
            "cu_seq_lens_q: expected None together with an attention_mask",
        ),
        (
            {"output_attentions": True, "cu_seq_lens_q": torch.tensor([0, 14])},
            ArgumentValueError,
            "cu_seq_lens_q: expected None together with output_attentions",
        ),
    ],
)
def test_refusals(options, error, words):
    options = {"attention_mask": None} | options
    with pytest.raises(error, match=words):
        fused_attention_forward(MODULE, *tensors_of(7, 7), **options)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=1, n_head=4)
        ),
        lambda: (
            hf.BlipForConditionalGeneration(
                hf.BlipConfig(
                    text_config={
                        "vocab_size": VOCABULARY,
                        "num_hidden_layers": 1,
                        "hidden_size": 24,
                    },
                    vision_config={
                        "num_hidden_layers": 1,
                        "hidden_size": 24,
                        "intermediate_size": 9,
                    },
                )
            ).text_decoder
        ),
    ],
    ids=["BLOOM", "BLIP"],
)
def test_models_that_do_not_ask_for_attention_are_refused(make):
    """They add masks to their scores: a boolean mask would be wrong, and None not causal."""
    model = make()
    model.config._attn_implementation = FUSED
    with pytest.raises(NotImplementedError, match="(Bloom|BlipText) computes attention by itself"):
        model(input_ids=torch.tensor([[3, 4, 5]]))


def test_other_models_of_the_package_do_not_matter(monkeypatch):
    """A package may hold a model that asks for attention and one that computes it."""
    configs = {}
    for name in ("asking", "computing"):
        module = types.ModuleType(f"package.modeling_{name}")
        configs[name] = type("Config", (), {"__module__": f"package.configuration_{name}"})
        module.Config = configs[name]
        module.Attention = type("Attention", (nn.Module,), {"__module__": module.__name__})
        monkeypatch.setitem(sys.modules, module.__name__, module)
    sys.modules["package.modeling_asking"].ALL_ATTENTION_FUNCTIONS = {}
    masks = fused_attention_mask(2, 7, 7, config=configs["asking"]())
    assert masks is None  # causal, with nothing else to hide
    with pytest.raises(NotImplementedError, match="computes attention by itself"):
        fused_attention_mask(2, 7, 7, config=configs["computing"]())


# -- Modes of PyTorch --------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, padded",
    [
        ("Llama", "left"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("Llama", None), ("Mistral", None), ("Mistral", "left"), ("T5", "left"))
        ),
    ],
)
def test_compiled_models(name, padded):
    torch.compiler.reset()
    model = tiny(name, FUSED)
    inputs = inputs_of(name, padded)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = main_output(model(**inputs, use_cache=False))
        actual = main_output(compiled(**inputs, use_cache=False))
    rows = real_tokens(name, padded)
    torch.testing.assert_close(actual[rows], expected[rows])


def test_masks_made_outside_of_compiled_code():
    """generate makes the masks of static caches before it calls a forward that may be compiled."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *inputs: attention_of(MODULE, *inputs), fullgraph=True, backend=counter
    )
    for offset in (4, 9, 11):
        mask = fused_attention_mask(2, 1, 16, q_offset=offset, allow_is_causal_skip=False)
        assert mask.keys == offset + 1
        tensors = tensors_of(1, 16)
        expected = naive_attention(*tensors, mask.complete)
        torch.testing.assert_close(compiled(*tensors, mask), expected)
    assert counter.frame_count == 1


def test_inference_mode_and_autocast():
    inputs, rows = inputs_of("Llama", "left"), real_tokens("Llama", "left")
    model = tiny("Llama", FUSED)
    with torch.no_grad():
        expected = model(**inputs).logits[rows]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**inputs).logits[rows]
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits[rows], expected)
    assert 0 < (rounded - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_tensors_without_memory():
    with torch.device("meta"):
        model = BUILDERS["Mistral"]()
        model.set_attn_implementation(FUSED)
        out = model(input_ids=torch.zeros(2, LENGTH, dtype=torch.long)).logits
    assert out.shape == (2, LENGTH, VOCABULARY)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = BUILDERS["Mistral"]()
        model.set_attn_implementation(FUSED)
        padding = torch.ones(2, LENGTH, dtype=torch.bool)
        for mask in (None, padding):
            ids = torch.zeros(2, LENGTH, dtype=torch.long)
            assert model(input_ids=ids, attention_mask=mask).logits.shape == (2, LENGTH, VOCABULARY)
        offset = torch.zeros((), dtype=torch.long)
        assert fused_attention_mask(2, 3, 16, q_offset=offset).shape == (2, 1, 3, 16)


# -- Registration ------------------------------------------------------------------------


def registrations(name):
    interfaces = (hf.AttentionInterface, hf.AttentionMaskInterface)
    return tuple(interface._global_mapping.get(name) for interface in interfaces)


def test_handles_nest_and_restore():
    before = registrations("sdpa")
    ours = (fused_attention_forward, fused_attention_mask)
    first, second = register("sdpa"), register("sdpa")
    assert registrations("sdpa") == ours != before
    first.undo()
    assert registrations("sdpa") == ours and second.active and not first.active
    second.undo()
    assert registrations("sdpa") == before


def test_a_new_name_is_gone_after_the_handle():
    with register("another name") as handle:
        assert handle.active
        model = tiny("Llama", "another name")
        model(**inputs_of("Llama"))
    assert registrations("another name") == (None, None)
    with pytest.raises(KeyError):
        model(**inputs_of("Llama"))


def test_a_later_registration_must_be_undone_first():
    handle = register("shared")
    hf.AttentionInterface.register("shared", sdpa := lambda *args: None)
    with pytest.raises(RuntimeError, match="cannot undo, AttentionInterface has"):
        handle.undo()
    assert handle.active and registrations("shared") == (sdpa, fused_attention_mask)
    hf.AttentionInterface.register("shared", fused_attention_forward)
    handle.undo()
    assert registrations("shared") == (None, None)


def test_in_place_of_sdpa():
    """Models that choose "sdpa" by default run fused without a change."""
    inputs = inputs_of("Mistral", "left")
    expected = run("Mistral", FUSED, inputs).logits
    native = run("Mistral", "sdpa", inputs).logits
    with register("sdpa"):
        actual = run("Mistral", "sdpa", inputs).logits
    assert torch.equal(actual, expected) and not torch.equal(native, expected)


@pytest.mark.parametrize("name", ["eager", "my_flash", "kernels-community/attention", "paged|x"])
def test_names_that_transformers_takes_for_others(name):
    with pytest.raises(ArgumentValueError, match="name: expected a name that transformers"):
        register(name)


def test_a_name_is_a_string():
    with pytest.raises(ArgumentTypeError, match="name: expected a string, got NoneType"):
        register(None)


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match="needs transformers 5.4 or newer. Hint: pip install"):
        register("a name")


def test_with_an_older_transformers(monkeypatch):
    """Masks of transformers before 5.4 have a cache_position instead of a q_offset."""
    old = lambda batch_size, cache_position, kv_length, **kwargs: None  # noqa: E731
    monkeypatch.setattr(masking, "sdpa_mask", old)
    with pytest.raises(ImportError, match=f"5.4 or newer, got {hf.__version__}"):
        register("a name")


@pytest.mark.slow
def test_importing_the_package_imports_no_transformers():
    module = "fused_attention.integrations.transformers"
    code = f"import sys, {module}; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""Pre-trained models of transformers with our attention, against the same models on "eager".

MiniLM (BertModel), Whisper base (WhisperForConditionalGeneration) and SmolLM2-135M
(LlamaForCausalLM) read real texts and recordings, which `run.py` fetches. Outputs, gradients and
attention weights are compared by the correctness rule of `fused_attention.tools.testing`: exact is
attention's definition in float64, with the parameters that the dtype has, and naive is "eager".
"""

import copy
import functools
import gc
import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer

from fused_attention.integrations.transformers import fused_attention_forward, register
from fused_attention.models import pretrained
from fused_attention.models.fetch import directory
from fused_attention.models.speech import END, PROMPT, read_wav, spectra
from fused_attention.tools.testing import CHANCE, errors, mismatches
from tiny_transformers import DEFINITION

FUSED = "fused_attention"
register(FUSED)

CACHE = Path(__file__).resolve().parents[2] / ".cache"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])

TEXTS = (
    "He was not an ill-disposed young man, unless to be rather cold hearted and rather selfish is"
    " to be ill-disposed: but he was, in general, well respected.",
    "An annuity is a very serious business; it comes over and over every year, and there is no"
    " getting rid of it. You are not aware of what you are doing. I have known a great deal of the"
    " trouble of annuities.",
    "The family of Dashwood had long been settled in Sussex. Their estate was large, and their"
    " residence was at Norland Park.",
)
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about a dog that lives near the sea.",
    "Which of these is a fruit: a chair, an apple, or the moon? Explain your choice briefly.",
)
RECORDINGS = {
    "0880": "he was not an ill disposed young man",
    "0890": "unless to be rather cold hearted and rather selfish is to be ill disposed",
}


# -- Models ------------------------------------------------------------------------------


def minilm():
    path = directory("minilm", CACHE)
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.no_padding()
    return hf.BertModel.from_pretrained(path, **no_dropout), tokenizer


def smollm2():
    path = directory("smollm2", CACHE)
    config, state, _ = pretrained.read_gguf(next(path.glob("*.gguf")))
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = hf.LlamaConfig(**config, rope_parameters=rope, **ends)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return filled(hf.LlamaForCausalLM, config, state), pretrained.load_smollm2(path)[1]


def whisper():
    path = directory("whisper", CACHE)
    content = b"".join(part.read_bytes() for part in sorted(path.glob("model.bin.part*")))
    config, state = pretrained.read_ctranslate2_whisper(content)
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    model = filled(hf.WhisperForConditionalGeneration, hf.WhisperConfig(**config), state)
    lists = json.loads((path / "config.json").read_text())
    start, english, transcribe, without_times = PROMPT
    model.generation_config = hf.GenerationConfig(
        is_multilingual=True,
        lang_to_id={"<|en|>": english},
        task_to_id={"transcribe": transcribe},
        no_timestamps_token_id=without_times,
        decoder_start_token_id=start,
        suppress_tokens=lists["suppress_ids"],
        begin_suppress_tokens=lists["suppress_ids_begin"],
        pad_token_id=END,
        eos_token_id=END,
    )
    return model, Tokenizer.from_file(str(path / "tokenizer.json"))


def filled(model_class, config, state):
    model = model_class(config)
    model.load_state_dict(state)  # strict
    return model


LOADERS = {"MiniLM": minilm, "SmolLM2": smollm2, "Whisper": whisper}


@functools.cache
def loaded(name):
    """Returns the model in float32 and its tokenizer (tokenizers.Tokenizer)."""
    model, tokenizer = LOADERS[name]()
    return model.eval(), tokenizer


def model_of(name, way, dtype):
    """Returns the model whose attention is `way`, with parameters of `dtype`; if `way` is the
    definition, they are rounded to `dtype`, but computed with in float64. Buffers stay float32."""
    gc.collect()  # models are in reference cycles
    model = copy.deepcopy(loaded(name)[0])
    model.set_attn_implementation(way)
    for parameter in model.parameters():
        rounded = parameter.data.to(dtype)
        parameter.data = rounded.double() if way == DEFINITION else rounded
    return model


WAYS = (DEFINITION, "eager", FUSED)  # exact, naive, got: the largest first


def assert_right(exact, naive, got):
    """Compares results by name."""
    assert mismatches(got, exact, (naive,)) == []


# -- Inputs ------------------------------------------------------------------------------


def batch_of(rows, padded):
    """Returns tokens and their mask [B, S], 1 for a token. padded: "left", "right", or None to cut
    the rows to one length."""
    lengths = [len(row) for row in rows]
    size = max(lengths) if padded else min(lengths)
    ids, mask = torch.zeros(2, len(rows), size, dtype=torch.long)
    for row, tokens in enumerate(rows):
        tokens = torch.tensor(tokens[:size])
        place = slice(size - len(tokens), None) if padded == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


@functools.cache
def sounds():
    paths = sorted((directory("speech", CACHE) / "librivox").glob("*.wav"))
    return spectra([read_wav(path) for path in paths if path.stem[-4:] in RECORDINGS])


@functools.cache
@torch.no_grad()
def heard(way, dtype):
    """Returns the hidden states of Whisper's encoder [2, 1500, 512]."""
    encoder = model_of("Whisper", way, dtype).get_encoder()
    one_by_one = sounds().to(encoder.dtype).split(1)
    return torch.cat([encoder(x).last_hidden_state for x in one_by_one])


def inputs_of(name, padded):
    """Returns keyword arguments for the model, without sounds, and the mask of its tokens."""
    encode = loaded(name)[1].encode
    if name == "Whisper":
        rows = [PROMPT + encode(f" {x}", add_special_tokens=False).ids for x in RECORDINGS.values()]
    else:
        rows = [encode(text).ids for text in TEXTS]
    ids, mask = batch_of(rows, padded)
    prefix = "decoder_" if name == "Whisper" else ""
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": mask}, mask.bool()


def main_output(outputs):
    return outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]


# -- Outputs and gradients ---------------------------------------------------------------


def cases(*chosen):
    """Marks a test with (name, padded); all cases of a model run in one process."""
    named = [
        pytest.param(*case, marks=pytest.mark.xdist_group(case[0]), id="-".join(map(str, case)))
        for case in chosen
    ]
    return pytest.mark.parametrize("name, padded", named)


SIDES = (None, "left", "right")


@torch.no_grad()
def output(name, way, dtype, padded):
    inputs, tokens = inputs_of(name, padded)
    if name == "Whisper":
        inputs["encoder_outputs"] = (heard(way, dtype),)
    return {"out": main_output(model_of(name, way, dtype)(**inputs))[tokens]}


def blind(module, query, key, value, attention_mask, *args, **kwargs):
    """Ignores the mask."""
    kwargs["is_causal"] = False
    return fused_attention_forward(module, query, key, value, None, *args, **kwargs)


@DTYPES
@cases(*((name, side) for name in LOADERS for side in SIDES))
def test_outputs(name, padded, dtype, monkeypatch):
    exact, naive, got = (output(name, way, dtype, padded) for way in WAYS)
    assert_right(exact, naive, got)
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, FUSED, blind)
    wrong = output(name, FUSED, dtype, padded)
    nothing_to_hide = name == "MiniLM" and padded is None
    assert (mismatches(wrong, exact, (naive,)) == []) == nothing_to_hide


@DTYPES
@cases(("Whisper", None))
def test_encoder(name, padded, dtype):
    assert_right(*({"out": heard(way, dtype)} for way in WAYS))


def gradients(name, way, dtype, padded):
    """Returns the gradients of all parameters for a random gradient of the output, and the output.

    The exact gradient of a key's bias is 0, since the softmax cancels it: its error is that of a
    sum, so the sum of magnitudes is returned too.
    """
    model = model_of(name, way, dtype)
    found = {}
    for key, module in model.named_modules():
        if key.endswith(".self.key"):
            module.register_full_backward_hook(magnitude_into(found, f"{key}.bias"))
    model.train().gradient_checkpointing_enable({"use_reentrant": False})  # none has dropout
    inputs, tokens = inputs_of(name, padded)
    if name == "Whisper":
        inputs, tokens = with_one_sound(inputs, tokens, model.dtype)
    out = main_output(model(**inputs, use_cache=False))[tokens]
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    for key, x in model.named_parameters():
        if x.grad is not None:
            found |= parts_of(key, x.grad)
    return found | {"out": out.detach()}


def parts_of(name, x, rows=8192):
    """Cuts large embeddings: a comparison makes several copies of a result in float64."""
    if len(x) <= rows:
        return {name: x}
    return {f"{name} {i}": part for i, part in enumerate(x.split(rows))}


def magnitude_into(found, name):
    def hook(module, inputs_grad, outputs_grad):
        found[f"magnitude of {name}"] = outputs_grad[0].double().abs().sum((0, 1))

    return hook


def with_one_sound(inputs, tokens, dtype):
    inputs = {key: x[:1] for key, x in inputs.items()}
    return inputs | {"input_features": sounds()[:1].to(dtype)}, tokens[:1]


@DTYPES
@cases(*(("MiniLM", side) for side in SIDES), ("SmolLM2", "left"), ("Whisper", "right"))
def test_gradients(name, padded, dtype):
    """Few channels have large activations, so that the error of a parameter may be that of one
    element. refusals.py lists the models of which a few parameters break the rule by that; no error
    is above CHANCE times the rule in any.
    """
    exact, naive, got = (gradients(name, way, dtype, padded) for way in WAYS)
    assert got.keys() == exact.keys()
    found = list(errors(got, exact, (naive,)))
    if far := [x.message for x in found if not x.ratio <= CHANCE]:
        pytest.fail(f"beyond what refusals.py allows: {far}")
    assert [x.message for x in found if x.ratio > 1] == []


# -- Attention weights -------------------------------------------------------------------

KINDS = ("attentions", "decoder_attentions", "cross_attentions", "encoder_attentions")


@torch.no_grad()
def weights(name, way, dtype, padded):
    """Returns the weights of each layer, and the output. Of the weights of Whisper's encoder, which
    are 900 MB in float64, it returns those of every eighth query."""
    model = model_of(name, way, dtype)
    inputs, tokens = inputs_of(name, padded)
    if name == "Whisper":
        inputs, tokens = with_one_sound(inputs, tokens, model.dtype)
    outputs = model(**inputs, use_cache=False, output_attentions=True)
    found = {"out": main_output(outputs)[tokens]}
    for kind in KINDS:
        for layer, of_layer in enumerate(outputs.get(kind) or ()):
            if kind == "encoder_attentions":
                found[f"{kind} {layer}"] = of_layer[:, :, ::8].clone()
            else:
                found[f"{kind} {layer}"] = of_layer.transpose(1, 2)[tokens]
    return found


LAYERS = {"MiniLM": 6, "SmolLM2": 30, "Whisper": 3 * 6}


@DTYPES
@cases(("MiniLM", "right"), ("SmolLM2", "left"), ("Whisper", "right"))
def test_output_attentions(name, padded, dtype):
    exact, naive, got = (weights(name, way, dtype, padded) for way in WAYS)
    assert len(got) == LAYERS[name] + 1
    if wrong := mismatches(got, exact, (naive,), factor=20):  # what no rounding explains
        pytest.fail(f"far beyond the rule: {wrong}")
    assert_right(exact, naive, got)


# -- Generation --------------------------------------------------------------------------


def prompts_of(name, padded):
    """Returns what generate() takes, without sounds. padded: "left" for several prompts."""
    if name == "Whisper":
        return {"language": "en", "task": "transcribe", "force_unique_generate_call": True}
    prompts = [pretrained.chat_prompt([("user", x)]) for x in QUESTIONS]
    rows = [loaded(name)[1].encode(prompt).ids for prompt in prompts]
    ids, mask = batch_of(rows if padded else rows[:1], padded)
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def generated(name, way, dtype, padded, **options):
    model, inputs = model_of(name, way, dtype), prompts_of(name, padded)
    if name == "Whisper":
        inputs["input_features"] = sounds().to(dtype)
    returned = {"return_dict_in_generate": True, "output_logits": True}
    limits = {"max_new_tokens": 24, "do_sample": False}
    return model.generate(**inputs, **limits, **returned, **options)


def written(name, result):
    """Returns the new tokens [B, T], and which of them come before the end or are the end."""
    tokens = result.sequences[:, -len(result.logits) :]
    end = loaded(name)[0].generation_config.eos_token_id
    return tokens, (tokens == end).cumsum(1) - (tokens == end).long() == 0


@torch.no_grad()
def exact_logits(name, dtype, padded, sequences, count):
    """Returns the logits [B, count, V] of the last tokens, read at once in float64."""
    model = model_of(name, DEFINITION, dtype)
    if name == "Whisper":
        states = (heard(DEFINITION, dtype),)
        logits = model(decoder_input_ids=sequences, encoder_outputs=states).logits
    else:
        mask = prompts_of(name, padded)["attention_mask"]
        mask = torch.cat((mask, torch.ones(len(mask), count, dtype=torch.long)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # as generate() counts them
        inputs = {"input_ids": sequences, "attention_mask": mask, "position_ids": positions}
        logits = model(**inputs, use_cache=False, logits_to_keep=count + 1).logits
    return logits[:, -count - 1 : -1]


GENERATING = (("SmolLM2", None), ("SmolLM2", "left"), ("Whisper", None))
CACHES = pytest.mark.parametrize("cache", ["dynamic", "static"])


@DTYPES
@CACHES
@cases(*GENERATING)
def test_greedy_generation(name, padded, cache, dtype):
    """Of each row, the logits are compared up to the first token that differs. That obeys the rule
    only if the two tokens are as good within the error of the dtype; in float32, none differs."""
    got, naive = (
        generated(name, way, dtype, padded, cache_implementation=cache) for way in (FUSED, "eager")
    )
    (tokens, is_written), (others, _) = written(name, got), written(name, naive)
    if dtype == torch.float32:
        assert torch.equal(got.sequences, naive.sequences)
    count = min(len(got.logits), len(naive.logits))
    same = tokens[:, :count] == others[:, :count]
    compared = is_written[:, :count].clone()
    compared[:, 1:] &= same.cumprod(1)[:, :-1].bool()  # after the same tokens
    assert compared.sum() >= 0.5 * is_written.sum()
    exact = exact_logits(name, dtype, padded, got.sequences, len(got.logits))[:, :count]
    results = [torch.stack(x.logits[:count], 1) for x in (got, naive)]
    got, naive = ({"out": x[compared].to(dtype)} for x in results)
    assert_right({"out": exact[compared]}, naive, got)


@CACHES
@cases(*GENERATING)
def test_beam_search(name, padded, cache):
    options = {"cache_implementation": cache, "num_beams": 3}
    if name != "Whisper":  # its generate() would search again for each returned sequence
        options["num_return_sequences"] = 3
    got, naive = (
        generated(name, way, torch.float32, padded, **options) for way in (FUSED, "eager")
    )
    assert torch.equal(got.sequences, naive.sequences)


# -- What the models are known to do -----------------------------------------------------


def words(text):
    return "".join(x if x.isalpha() else " " for x in text.lower()).split()


@cases(("Whisper", None))
def test_whisper_writes_what_was_said(name, padded):
    tokens, is_written = written(name, generated(name, FUSED, torch.float32, None))
    said = [
        loaded(name)[1].decode(row[row_written].tolist())
        for row, row_written in zip(tokens, is_written, strict=True)
    ]
    assert [words(x) for x in said] == [words(x) for x in RECORDINGS.values()]


@cases(("SmolLM2", None))
def test_smollm2_knows_a_capital(name, padded):
    tokens, _ = written(name, generated(name, FUSED, torch.float32, None))
    assert "Paris" in loaded(name)[1].decode(tokens[0].tolist())

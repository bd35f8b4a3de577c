"""Our models equal transformers' own classes when they have the same weights.

Tiny models with random weights always run; real models run only if `python -m fused_attention
fetch` has fetched them.
"""

import os

import pytest
import torch
from torch import nn

from fused_attention.errors import ArgumentValueError
from fused_attention.models import pretrained
from fused_attention.models.attend import IMPLEMENTATIONS, pad
from fused_attention.models.fetch import directory
from fused_attention.models.generate import generate

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs the extra `models`")
pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = [[3, 4, 5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15]]


def random_weights(model):
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def compare_texts(ours, theirs, layout, size=1e-5):
    there = ~layout.padding(theirs.shape[1])
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours[there], theirs[there], atol=size, rtol=size)


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_bert(attention):
    config = transformers.BertConfig(
        vocab_size=31,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
    )
    theirs = random_weights(transformers.BertModel(config))
    ours = pretrained.from_bert(config.to_dict(), theirs.state_dict(), attention)
    tokens, layout = pad(TEXTS)
    mask = (~layout.padding(7)).long()
    expected = theirs(tokens, attention_mask=mask).last_hidden_state
    compare_texts(ours.encode(tokens, layout).hidden, expected, layout)


LLAMA = {
    "vocab_size": 31,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_llama(attention, tied):
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied, eos_token_id=None)
    theirs = transformers.LlamaForCausalLM(config)
    theirs = random_weights(theirs)
    ours = pretrained.from_llama(config.to_dict(), theirs.state_dict(), attention)
    tokens, layout = pad(TEXTS)
    compare_texts(ours(tokens, layout), theirs(tokens).logits, layout, 1e-4)
    for text, new in zip(TEXTS, generate(ours, TEXTS, max_new_tokens=9), strict=True):
        options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        expected = theirs.generate(torch.tensor([text]), **options)
        assert [*text, *new] == expected[0].tolist()


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@torch.no_grad()
def test_whisper(attention):
    config = transformers.WhisperConfig(
        vocab_size=31,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=40,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
    )
    theirs = random_weights(transformers.WhisperForConditionalGeneration(config))
    ours = pretrained.from_whisper(config.to_dict(), theirs.state_dict(), attention)
    spectrum = torch.randn(3, 8, 40)
    tokens, layout = pad(TEXTS)
    expected = theirs(input_features=spectrum, decoder_input_ids=tokens).logits
    compare_texts(ours(tokens, layout, spectrum), expected, layout, 1e-4)


def test_what_is_not_the_same_model_is_refused():
    config = transformers.LlamaConfig(**LLAMA)
    state = transformers.LlamaForCausalLM(config).state_dict()
    with pytest.raises(ArgumentValueError, match="hidden_act: expected 'silu' in config"):
        pretrained.from_llama({**config.to_dict(), "hidden_act": "gelu"}, state)
    with pytest.raises(ArgumentValueError, match="state: expected names of such a model"):
        pretrained.from_llama(config.to_dict(), {**state, "model.extra.weight": torch.ones(1)})
    state.pop("model.norm.weight")
    with pytest.raises(RuntimeError, match="decoder.norm.weight"):
        pretrained.from_llama(config.to_dict(), state)


# -- Real models --------------------------------------------------------------------------------


def fetched(name):
    try:
        return directory(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@torch.no_grad()
def test_minilm():
    path = fetched("minilm")
    texts = ["A man is eating food.", "Someone has a meal.", "The train leaves at seven."]
    theirs = transformers.AutoModel.from_pretrained(path)
    batch = transformers.AutoTokenizer.from_pretrained(path)(
        texts, padding=True, return_tensors="pt"
    )
    expected = theirs(**batch).last_hidden_state
    model, tokenizer = pretrained.load_minilm(path)
    tokens, layout = pad([tokenizer.encode(text).ids for text in texts])
    assert torch.equal(tokens, batch["input_ids"])
    compare_texts(model.encode(tokens, layout).hidden, expected, layout)


@pytest.mark.slow
@torch.no_grad()
def test_smollm2():
    """Compares with transformers' own reader of GGUF files, if it can be imported."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    path = fetched("smollm2")
    (file,) = path.glob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=file.name)
    model, tokenizer = pretrained.load_smollm2(path)
    text = pretrained.chat_prompt([("user", "What is the capital of France, in 1 word?")])
    tokens = tokenizer.encode(text).ids
    assert tokens == their_tokenizer(text).input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=False) == text
    expected = theirs(torch.tensor([tokens])).logits
    torch.testing.assert_close(model(torch.tensor([tokens])), expected, atol=2e-3, rtol=1e-3)
    (new,) = generate(model, [tokens], max_new_tokens=12, end=tokenizer.token_to_id("<|im_end|>"))
    options = {
        "max_new_tokens": 12,
        "do_sample": False,
        "attention_mask": torch.ones(1, len(tokens)),
    }
    whole = theirs.generate(torch.tensor([tokens]), **options)[0].tolist()
    assert whole[len(tokens) :][: len(new)] == new
    assert "Paris" in tokenizer.decode(new)


@pytest.mark.slow
@torch.no_grad()
def test_whisper_base():
    path = fetched("whisper")
    model, tokenizer, lists = pretrained.load_whisper(path)
    content = b"".join(file.read_bytes() for file in sorted(path.glob("model.bin.part*")))
    config, state = pretrained.read_ctranslate2_whisper(content)
    theirs = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**config))
    missing, unexpected = theirs.load_state_dict(
        {name: tensor.float() for name, tensor in state.items()}, strict=False
    )
    assert not unexpected and missing == ["proj_out.weight"]
    theirs.tie_weights()
    spectrum = torch.randn(1, 80, 3000)
    tokens = torch.tensor([[50258, 50259, 50359, 50363, 440, 1002]])
    expected = theirs.eval()(input_features=spectrum, decoder_input_ids=tokens).logits
    ours = model(tokens, None, spectrum)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)
    assert tokenizer.decode([440, 1002]).strip() and len(lists["alignment_heads"]) == 8

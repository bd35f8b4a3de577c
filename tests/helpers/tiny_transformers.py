"""Tiny models of transformers with random weights, inputs for them, and attention's definition.

The weights are so large that attention is far from uniform: a wrong mask changes the outputs.
"""

import copy
import functools

import torch
import transformers as hf
from transformers import masking_utils

VOCABULARY = 99
LENGTH = 13  # of texts; larger than the sliding windows below
NO_DROPOUT = {"attention_dropout": 0.0}
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = COMMON | NO_DROPOUT | {
    "num_hidden_layers": 2, "intermediate_size": 37, "max_position_embeddings": 64
}  # fmt: skip

BUILDERS = {
    "BERT": lambda: hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=37, max_position_embeddings=64, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    ),
    "GPT-2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            **COMMON, n_positions=64, n_embd=40, n_layer=2, n_head=5, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )
    ),
    "Llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**DECODER, hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    ),
    "Llama, one key head": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**DECODER, hidden_size=60, num_attention_heads=3, num_key_value_heads=1)
    ),
    "Mistral": lambda: hf.MistralForCausalLM(
        hf.MistralConfig(
            **DECODER, hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
            sliding_window=5,
        )
    ),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            **DECODER, hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=12
        )
    ),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(
            **DECODER, hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
            query_pre_attn_scalar=12, sliding_window=4, attn_logit_softcapping=3.0,
        )
    ),
    "GPT-OSS": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **DECODER, hidden_size=36, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
            num_local_experts=3, num_experts_per_tok=2, sliding_window=4,
            experts_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY, d_model=40, d_kv=8, d_ff=37, num_layers=2, num_heads=5,
            relative_attention_num_buckets=8, relative_attention_max_distance=11, dropout_rate=0.0,
            pad_token_id=0, decoder_start_token_id=1, eos_token_id=None,
        )
    ),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(
            **COMMON, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, dropout=0.0,
            max_position_embeddings=64, decoder_start_token_id=1, forced_eos_token_id=None,
        )
    ),
    "Whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **COMMON, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
            decoder_attention_heads=4, encoder_ffn_dim=37, decoder_ffn_dim=37, dropout=0.0,
            num_mel_bins=6, max_source_positions=17, max_target_positions=40,
            decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None,
        )
    ),
    "ModernBERT": lambda: hf.ModernBertForMaskedLM(
        hf.ModernBertConfig(
            vocab_size=VOCABULARY, hidden_size=48, num_hidden_layers=3, num_attention_heads=4,
            intermediate_size=37, local_attention=6, global_attn_every_n_layers=2,
            max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        )
    ),
    "ViT": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=37,
            image_size=30, patch_size=6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    ),
}  # fmt: skip

DECODERS = ("GPT-2", "Llama", "Llama, one key head", "Mistral", "Qwen3", "Gemma 2", "GPT-OSS")
ENCODERS = ("BERT", "ModernBERT")
ENCODER_DECODERS = ("T5", "BART")
GENERATING = (*DECODERS, *ENCODER_DECODERS, "Whisper")
PADDED = (*ENCODERS, *DECODERS, *ENCODER_DECODERS)


def fill(model):
    """Gives every parameter random weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
            else:
                parameter.uniform_(0.5, 1.5)


@functools.cache
def _model(name):
    torch.manual_seed(1)
    model = BUILDERS[name]().eval()
    fill(model)
    return model


def tiny(name, implementation="eager", dtype=torch.float32):
    """Returns the model in evaluation mode; the weights depend only on `name`."""
    model = copy.deepcopy(_model(name))
    model.set_attn_implementation(implementation)
    return model.to(dtype)


def padding_mask(side, lengths=(LENGTH, 9, 4)):
    """Returns [B, LENGTH], 1 for a token."""
    places = torch.arange(LENGTH)
    of_row = torch.tensor(lengths)[:, None]
    return (places < of_row if side == "right" else places >= LENGTH - of_row).long()


def inputs_of(name, padded=None):
    """Returns keyword arguments for the model. padded: None, "left" or "right"."""
    generator = torch.Generator().manual_seed(2)

    def tokens(length):
        return torch.randint(3, VOCABULARY, (3, length), generator=generator)

    if name == "ViT":
        return {"pixel_values": torch.randn(3, 3, 30, 30, generator=generator)}
    if name == "Whisper":
        features = torch.randn(3, 6, 34, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens(7)}
    inputs = {"input_ids": tokens(LENGTH)}
    if name in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = tokens(7)
    if padded:
        inputs["attention_mask"] = padding_mask(padded)
    return inputs


def real_tokens(name, padded=None):
    """Returns which rows of the output belong to tokens, as an index into the output."""
    if padded and name not in ENCODER_DECODERS:
        return padding_mask(padded).bool()
    return slice(None)


# -- Attention by its definition ---------------------------------------------------------

DEFINITION = "definition"  # as attn_implementation; "eager" has a float32 softmax in float64 models


def definition(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
    position_bias=None, softcap=None, s_aux=None, **kwargs,
):  # fmt: skip
    """Returns (out, weights), as every attention function of transformers does.

    softmax(scaling · query keyᵀ) value, of capped scores plus a bias, over the visible keys and the
    sinks. A row without a visible key and a sink gives 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and query.shape[2] > 1:
            attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    # A row of -inf alone: 0 before the softmax and after it, so that its gradient is 0 too.
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)
    weights = weights[..., : key.shape[2]]
    return (weights @ value).transpose(1, 2), weights


def complete_mask(**arguments):
    skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return masking_utils.sdpa_mask(**arguments | skips)


hf.AttentionInterface.register(DEFINITION, definition)
hf.AttentionMaskInterface.register(DEFINITION, complete_mask)

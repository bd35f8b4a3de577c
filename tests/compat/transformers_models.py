"""The tests that transformers has for attention, on tiny models, with our attention for "sdpa".

`ModelTesterMixin` of transformers' own test_modeling_common.py compares "sdpa" with "eager"; here
"sdpa" is fused_attention.integrations.transformers. The mixin wants a tester for each architecture,
which transformers keeps in tests/models; that folder is not in its source distribution, so the
testers are here.
"""

import functools
import re
import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers_tests.test_modeling_common import (
    ModelTesterMixin,
    floats_tensor,
    global_rng,
    ids_tensor,
    random_attention_mask,
)

from fused_attention.integrations.transformers import fused_attention_forward, register

register("sdpa")

# The tests of the mixin that call attention by the name "sdpa".
SELECTED = re.compile(
    "test_(eager_matches_sdpa_inference|sdpa_can_dispatch_non_composite_models"
    "|can_set_attention_dynamically$|config_attn_implementation_setter|batching_equivalence"
    "|determinism|training|enable_input_require_grads|model_outputs_equivalence"
    "|hidden_states_output|inputs_embeds_matches_input_ids|capture_outputs_decorator"
    "|feed_forward_chunking|causal_lm_loss|encoder_decoder_loss)"
)

BATCH, LENGTH, FRAMES, PATCHES = 7, 11, 26, 16
VOCABULARY, HIDDEN, HEADS, LAYERS = 99, 32, 4, 2


def tokens():
    return {
        "input_ids": ids_tensor([BATCH, LENGTH], VOCABULARY),
        "attention_mask": random_attention_mask([BATCH, LENGTH]),
    }


def texts():
    decoder = {f"decoder_{name}": x for name, x in tokens().items()}
    return tokens() | decoder


def sounds():
    decoder = {f"decoder_{name}": x for name, x in tokens().items()}
    return {"input_features": floats_tensor([BATCH, 8, FRAMES])} | decoder


def images():
    return {"pixel_values": floats_tensor([BATCH, 3, 8, 8])}


class Architecture(NamedTuple):
    config: dict[str, Any]
    models: tuple[str, ...]  # without the name of the architecture
    inputs: Callable[[], dict[str, Any]] = tokens
    length: int = LENGTH  # of what the encoder, or the only stack, attends to


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,  # with the usual 0.02, attention is nearly uniform
}
DECODER = COMMON | {"num_key_value_heads": 2}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "init_std": 0.2,
}

ARCHITECTURES = {
    "Bert": Architecture(COMMON, ("Model", "ForMaskedLM", "ForSequenceClassification")),
    "GPT2": Architecture(COMMON, ("Model", "LMHeadModel")),
    "Llama": Architecture(DECODER, ("Model", "ForCausalLM")),
    "Mistral": Architecture(DECODER | {"head_dim": 20}, ("Model", "ForCausalLM")),
    "Qwen3": Architecture(DECODER | {"head_dim": 16}, ("Model", "ForCausalLM")),
    "Gemma2": Architecture(
        DECODER | {"head_dim": 16, "attn_logit_softcapping": 0.5, "sliding_window": 3},
        ("Model", "ForCausalLM"),
    ),
    "GptOss": Architecture(
        DECODER
        # All experts take part: rounding cannot choose another one.
        | {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 3},
        ("Model", "ForCausalLM"),
    ),
    "ModernBert": Architecture(
        COMMON | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 4},
        ("Model", "ForMaskedLM"),
    ),
    "T5": Architecture(
        {
            "vocab_size": VOCABULARY,
            "d_model": HIDDEN,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "pad_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 0,
        },
        ("Model", "ForConditionalGeneration"),
        texts,
    ),
    "Bart": Architecture(ENCODER_DECODER, ("Model", "ForConditionalGeneration"), texts),
    "Whisper": Architecture(
        ENCODER_DECODER
        | {"num_mel_bins": 8, "max_source_positions": FRAMES // 2, "begin_suppress_tokens": None},
        ("Model", "ForConditionalGeneration"),
        sounds,
        FRAMES // 2,
    ),
    "ViT": Architecture(
        {
            "hidden_size": HIDDEN,
            "intermediate_size": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "image_size": 8,
            "patch_size": 2,
            "initializer_range": 0.2,
        },
        ("Model", "ForImageClassification"),
        images,
        PATCHES + 1,
    ),
}

# transformers switches "sdpa" off for these, since PyTorch's function has no softcap and no sinks.
for name in ("Gemma2", "GptOss"):
    getattr(transformers, f"{name}PreTrainedModel")._supports_sdpa = True


class Tester:
    """What the mixin asks about the models of an architecture."""

    batch_size, is_training = BATCH, True
    num_hidden_layers, num_attention_heads, hidden_size = LAYERS, HEADS, HIDDEN
    num_masks, mask_length = PATCHES // 2, PATCHES  # of an image

    def __init__(self, name, architecture):
        self.config_class = getattr(transformers, f"{name}Config")
        self.architecture = architecture
        self.seq_length = self.encoder_seq_length = self.key_length = architecture.length
        self.decoder_seq_length = LENGTH

    def get_config(self):
        return self.config_class(**self.architecture.config)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), self.architecture.inputs()


class AttentionTests(ModelTesterMixin):
    """The mixin, with the selected tests only."""

    def setUp(self):
        global_rng.seed(0)  # makes the inputs
        self.model_tester = self.make_tester()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels and model_class is transformers.WhisperForConditionalGeneration:
            inputs["labels"] = inputs["decoder_input_ids"]  # the mixin has none for speech
        return inputs


for name in dir(ModelTesterMixin):
    if name.startswith("test_") and callable(getattr(ModelTesterMixin, name)):
        if not SELECTED.match(name):
            setattr(AttentionTests, name, None)


def make_test_case(name, architecture):
    members = {
        "all_model_classes": tuple(getattr(transformers, name + x) for x in architecture.models),
        "is_encoder_decoder": architecture.inputs in (texts, sounds),
        "make_tester": staticmethod(functools.partial(Tester, name, architecture)),
    }
    return type(f"Test{name}", (AttentionTests, unittest.TestCase), members)


globals().update({f"Test{name}": make_test_case(name, x) for name, x in ARCHITECTURES.items()})


def test_sdpa_is_ours():
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is fused_attention_forward

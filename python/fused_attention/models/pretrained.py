"""Pre-trained weights of BERT, Llama and Whisper in the reference transformer.

Each `from_*` takes a configuration and a state dict under the names that Hugging Face gives them,
and loads them into a `Transformer` of the same mathematics. An unknown or missing name is an error.
Readers of two other formats, GGUF (with the package gguf) and CTranslate2, return the same names.
Parameters become float32.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import wrong_value
from .transformer import Config, Transformer

State = dict[str, Tensor]


def _fill(model: Transformer, state: Mapping[str, Tensor], names: Mapping[str, str]) -> Transformer:
    """Loads state under new names; `names` has regular expressions and their replacements.

    The first expression that matches a whole name counts. An empty replacement drops the tensor.
    """
    renamed: State = {}
    for name, tensor in state.items():
        for pattern, replacement in names.items():
            if match := re.fullmatch(pattern, name):
                if replacement:
                    renamed[match.expand(replacement)] = tensor.float()
                break
        else:
            wrong_value("state", "names of such a model", name)
    model.load_state_dict(renamed)  # strict
    return model.eval()


def _known(config: Mapping[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if config.get(name, value) != value:
            wrong_value(name, f"{value!r} in config", repr(config[name]))


# -- BERT --------------------------------------------------------------------------------------


def from_bert(config: Mapping[str, Any], state: State, attention: str = "fused") -> Transformer:
    """Loads BERT (Devlin et al. 2019) as an encoder of single texts: all tokens are of type 0.

    The pooler is left out.
    """
    _known(config, hidden_act="gelu", position_embedding_type="absolute")
    state = {name.removeprefix("bert."): tensor for name, tensor in state.items()}
    # The embedding of type 0 is added at every position, so it is added to the positions here.
    types = state.pop("embeddings.token_type_embeddings.weight")
    positions = state["embeddings.position_embeddings.weight"] + types[0]
    state["embeddings.position_embeddings.weight"] = positions
    model = Transformer(
        Config(
            config["vocab_size"],
            encoder_layers=config["num_hidden_layers"],
            decoder_layers=0,
            dim=config["hidden_size"],
            heads=config["num_attention_heads"],
            hidden=config["intermediate_size"],
            activation="gelu",
            norm_first=False,
            norm_eps=config["layer_norm_eps"],
            positions="learned",
            max_positions=config["max_position_embeddings"],
            scale_embedding=False,
            embedding_norm=True,
        ),
        attention,
    )
    layer, block = r"encoder\.layer\.(\d+)\.", r"encoder.blocks.\1."
    return _fill(
        model,
        state,
        {
            r"embeddings\.word_embeddings\.weight": "tokens.weight",
            r"embeddings\.position_embeddings\.weight": "encoder.positions.table",
            r"embeddings\.LayerNorm\.(\w+)": r"encoder.positions.norm.\1",
            layer + r"attention\.self\.(\w+)\.(\w+)": block + r"self_attention.\2.\3",
            layer + r"attention\.output\.dense\.(\w+)": block + r"self_attention.output.\2",
            layer + r"attention\.output\.LayerNorm\.(\w+)": block + r"self_norm.\2",
            layer + r"intermediate\.dense\.(\w+)": block + r"feed_forward.up.\2",
            layer + r"output\.dense\.(\w+)": block + r"feed_forward.down.\2",
            layer + r"output\.LayerNorm\.(\w+)": block + r"feed_forward_norm.\2",
            r"pooler\..+|embeddings\.position_ids": "",
        },
    )


# -- Llama -------------------------------------------------------------------------------------


def from_llama(config: Mapping[str, Any], state: State, attention: str = "fused") -> Transformer:
    """Loads Llama (Touvron et al. 2023) or a model like it, without scaled rotary positions."""
    rope = config.get("rope_parameters") or {}
    _known(config, hidden_act="silu", attention_bias=False, mlp_bias=False, rope_scaling=None)
    _known(config, head_dim=config["hidden_size"] // config["num_attention_heads"])
    _known(rope, rope_type="default")
    tied = config.get("tie_word_embeddings", False)
    model = Transformer(
        Config(
            config["vocab_size"],
            encoder_layers=0,
            decoder_layers=config["num_hidden_layers"],
            dim=config["hidden_size"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            hidden=config["intermediate_size"],
            activation="swiglu",
            norm="rms",
            norm_eps=config["rms_norm_eps"],
            positions="rotary",
            max_positions=config["max_position_embeddings"],
            rope_theta=rope.get("rope_theta") or config["rope_theta"],
            bias=False,
            tied=tied,
            scale_embedding=False,
        ),
        attention,
    )
    layer, block = r"model\.layers\.(\d+)\.", r"decoder.blocks.\1."
    return _fill(
        model,
        state,
        {
            r"model\.embed_tokens\.weight": "tokens.weight",
            r"model\.norm\.weight": "decoder.norm.weight",
            r"lm_head\.weight": "" if tied else "to_logits.weight",
            layer + r"self_attn\.q_proj\.weight": block + "self_attention.query.weight",
            layer + r"self_attn\.k_proj\.weight": block + "self_attention.key.weight",
            layer + r"self_attn\.v_proj\.weight": block + "self_attention.value.weight",
            layer + r"self_attn\.o_proj\.weight": block + "self_attention.output.weight",
            layer + r"mlp\.(\w+)_proj\.weight": block + r"feed_forward.\2.weight",
            layer + r"input_layernorm\.weight": block + "self_norm.weight",
            layer + r"post_attention_layernorm\.weight": block + "feed_forward_norm.weight",
        },
    )


# -- Whisper -----------------------------------------------------------------------------------


class SoundFront(nn.Module):
    """Two convolutions, from the log-mel spectrum [B, mel, T] to [B, T / 2, dim]."""

    def __init__(self, mel: int, dim: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(mel, dim, 3, padding=1)
        self.conv2 = nn.Conv1d(dim, dim, 3, stride=2, padding=1)

    def forward(self, spectrum: Tensor) -> Tensor:
        return F.gelu(self.conv2(F.gelu(self.conv1(spectrum)))).transpose(1, 2)


def from_whisper(config: Mapping[str, Any], state: State, attention: str = "fused") -> Transformer:
    """Loads Whisper (Radford et al. 2022). Its input is log-mel spectra [B, mel, 2 · positions]."""
    _known(config, activation_function="gelu", scale_embedding=False)
    _known(config, decoder_attention_heads=config["encoder_attention_heads"])
    _known(config, decoder_ffn_dim=config["encoder_ffn_dim"])
    dim = config["d_model"]
    model = Transformer(
        Config(
            config["vocab_size"],
            encoder_layers=config["encoder_layers"],
            decoder_layers=config["decoder_layers"],
            dim=dim,
            heads=config["encoder_attention_heads"],
            hidden=config["encoder_ffn_dim"],
            activation="gelu",
            positions="learned",
            max_positions=config["max_target_positions"],
            max_source_positions=config["max_source_positions"],
            scale_embedding=False,
        ),
        attention,
        SoundFront(config["num_mel_bins"], dim),
    )
    # Whisper's keys have no bias. A zero is the same, as is any bias: the softmax cancels it.
    for name in [name for name in state if name.endswith("k_proj.weight")]:
        state = {**state, name.removesuffix("weight") + "bias": torch.zeros(dim)}
    layer, block = r"model\.(\w+)\.layers\.(\d+)\.", r"\1.blocks.\2."
    names = {
        r"model\.encoder\.(conv\d)\.(\w+)": r"front.\1.\2",
        r"model\.decoder\.embed_tokens\.weight": "tokens.weight",
        r"model\.(\w+)\.embed_positions\.weight": r"\1.positions.table",
        r"model\.(\w+)\.layer_norm\.(\w+)": r"\1.norm.\2",
        r"proj_out\.weight": "",  # tied
        layer + r"fc1\.(\w+)": block + r"feed_forward.up.\3",
        layer + r"fc2\.(\w+)": block + r"feed_forward.down.\3",
        layer + r"final_layer_norm\.(\w+)": block + r"feed_forward_norm.\3",
    }
    for theirs, ours in (("self_attn", "self"), ("encoder_attn", "cross")):
        for short, name in (("k", "key"), ("v", "value"), ("q", "query"), ("out", "output")):
            pattern = layer + rf"{theirs}\.{short}_proj\.(\w+)"
            names[pattern] = block + rf"{ours}_attention.{name}.\3"
        names[layer + rf"{theirs}_layer_norm\.(\w+)"] = block + rf"{ours}_norm.\3"
    return _fill(model, state, names)


# -- Files ---------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict[str, Any], State, dict[str, Any]]:
    """Reads the configuration and state of a Llama from a GGUF file, and all fields of the file.

    Quantised tensors are dequantised to float32.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        wrong_value("path", "a GGUF file of a Llama", fields["general.architecture"])

    config = {
        "vocab_size": fields["llama.vocab_size"],
        "num_hidden_layers": fields["llama.block_count"],
        "hidden_size": fields["llama.embedding_length"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
        "max_position_embeddings": fields["llama.context_length"],
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": not any(t.name == "output.weight" for t in reader.tensors),
    }
    parts = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    state: State = {}
    for tensor in reader.tensors:
        weights = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        name = tensor.name.removesuffix(".weight")
        if match := re.fullmatch(r"blk\.(\d+)\.(\w+)", name):
            layer, part = match.groups()
            if part in heads:  # the pairs to rotate are adjacent in GGUF, half a head apart here
                pairs = weights.view(config[heads[part]], -1, 2, weights.shape[-1])
                weights = pairs.transpose(1, 2).reshape(weights.shape)
            state[f"model.layers.{layer}.{parts[part]}.weight"] = weights
        else:
            state[f"{whole[name]}.weight"] = weights
    return config, state, fields


def read_ctranslate2_whisper(content: bytes) -> tuple[dict[str, Any], State]:
    """Reads the configuration and state of a Whisper in CTranslate2's format, float16 or float32.

    The file has version, kind, revision, number of variables; for each variable its name, rank,
    sizes, type, number of bytes and data; then aliases. Numbers are little-endian. A string is its
    length, then its bytes with a zero at the end.
    """
    at = 0

    def read(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, content, at)
        at += struct.calcsize("<" + code)
        return value

    def read_string() -> str:
        nonlocal at
        length = read("H")
        at += length
        return content[at - length : at - 1].decode()

    dtypes = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}
    read("I")  # version of the format
    kind = read_string()
    if kind != "WhisperSpec":
        wrong_value("content", "a WhisperSpec", kind)
    read("I")  # revision of the kind
    variables: State = {}
    for _ in range(read("I")):
        name = read_string()
        shape = [read("I") for _ in range(read("B"))]
        dtype, size = dtypes[read("B")], read("I")
        data = bytearray(content[at : at + size])
        variables[name] = torch.frombuffer(data, dtype=dtype).view(shape)
        at += size

    state: State = {}
    for name, tensor in variables.items():
        if match := re.fullmatch(r"(\w+)/layer_(\d+)/(\w+)/(\w+)/(\w+)", name):
            side, number, module, part, what = match.groups()
            layer = f"model.{side}.layers.{number}."
            state.update(_whisper_layer(layer, module, part, what, tensor))
        elif match := re.fullmatch(r"(\w+)/(conv\d)/(\w+)", name):
            state[f"model.{match[1]}.{match[2]}.{match[3]}"] = tensor
        elif match := re.fullmatch(r"(\w+)/layer_norm/(\w+)", name):
            state[f"model.{match[1]}.layer_norm.{_AFFINE[match[2]]}"] = tensor
        elif name.endswith("position_encodings/encodings"):
            state[f"model.{name.split('/')[0]}.embed_positions.weight"] = tensor
        elif name == "decoder/embeddings/weight":
            state["model.decoder.embed_tokens.weight"] = tensor

    def layers(side: str) -> int:
        return len({name.split(".")[3] for name in state if f"{side}.layers" in name})

    vocab_size, dim = state["model.decoder.embed_tokens.weight"].shape
    config = {
        "vocab_size": vocab_size,
        "d_model": dim,
        "encoder_layers": layers("encoder"),
        "decoder_layers": layers("decoder"),
        "encoder_attention_heads": int(variables["encoder/num_heads"]),
        "decoder_attention_heads": int(variables["decoder/num_heads"]),
        "encoder_ffn_dim": state["model.encoder.layers.0.fc1.weight"].shape[0],
        "decoder_ffn_dim": state["model.decoder.layers.0.fc1.weight"].shape[0],
        "max_source_positions": state["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": state["model.decoder.embed_positions.weight"].shape[0],
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
    }
    return config, state


_AFFINE = {"gamma": "weight", "beta": "bias"}


def _whisper_layer(layer: str, module: str, part: str, what: str, tensor: Tensor) -> State:
    """Returns one variable of a layer by Hugging Face's names; joint projections are split."""
    if module == "ffn":
        names = {"layer_norm": "final_layer_norm", "linear_0": "fc1", "linear_1": "fc2"}
        return {f"{layer}{names[part]}.{_AFFINE.get(what, what)}": tensor}
    theirs = {"self_attention": "self_attn", "attention": "encoder_attn"}[module]
    if part == "layer_norm":
        return {f"{layer}{theirs}_layer_norm.{_AFFINE[what]}": tensor}
    fused = {"self_attention": ("qkv", "o"), "attention": ("q", "kv", "o")}[module]
    projections = fused[int(part.removeprefix("linear_"))]
    pieces = zip(projections, tensor.chunk(len(projections)), strict=True)
    return {
        f"{layer}{theirs}.{'out' if letter == 'o' else letter}_proj.{what}": piece
        for letter, piece in pieces
        if (letter, what) != ("k", "bias")  # zeros
    }


# -- Models --------------------------------------------------------------------------------------
# Each `load_*` takes a directory that `fetch` returned.


def load_minilm(directory: Path, attention: str = "fused") -> tuple[Transformer, Any]:
    """Loads all-MiniLM-L6-v2, an encoder of sentences, and its tokenizer (tokenizers.Tokenizer)."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer

    config = json.loads((directory / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return from_bert(config, load_file(directory / "model.safetensors"), attention), tokenizer


def load_smollm2(directory: Path, attention: str = "fused") -> tuple[Transformer, Any]:
    """Loads SmolLM2-135M-Instruct, a decoder, and its tokenizer (tokenizers.Tokenizer)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    (path,) = directory.glob("*.gguf")
    config, state, fields = read_gguf(path)
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # the type of control tokens in tokenizer.ggml.token_type
    types = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    special = [token for token, kind in types if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return from_llama(config, state, attention), tokenizer


def load_whisper(
    directory: Path, attention: str = "fused"
) -> tuple[Transformer, Any, dict[str, Any]]:
    """Loads Whisper base, its tokenizer (tokenizers.Tokenizer), and its lists of special tokens."""
    from tokenizers import Tokenizer

    content = b"".join(path.read_bytes() for path in sorted(directory.glob("model.bin.part*")))
    config, state = read_ctranslate2_whisper(content)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    lists = json.loads((directory / "config.json").read_text())
    return from_whisper(config, state, attention), tokenizer, lists


def chat_prompt(messages: Sequence[tuple[str, str]]) -> str:
    """Formats (role, text) messages as SmolLM2-Instruct was trained, and begins its answer."""
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in messages)
    if not messages or messages[0][0] != "system":
        system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
        said = f"<|im_start|>system\n{system}<|im_end|>\n{said}"
    return said + "<|im_start|>assistant\n"

"""The transformer of "Attention Is All You Need", with fused attention in all three places.

    encoder block   x + SelfAttention(x);               x + FeedForward(x)
    decoder block   x + MaskedSelfAttention(x);  x + CrossAttention(x, memory);  x + FeedForward(x)

Vaswani et al. 2017, section 3, with later variants as options: normalisation first (Xiong et al.
2020), RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, section 3.2.2), fewer key
heads (Ainslie et al. 2023), SwiGLU (Shazeer 2020), a key/value cache for generation. With layers in
both stacks it is the encoder-decoder, with layers in one only an encoder (BERT) or a decoder (GPT,
Llama). Everything but attention works on single tokens, so the same code serves padded batches
[B, S] and packed ones [T]. The memory of fused attention is linear in S (`attend.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache import kv_cache_append_
from ..call.problem import shape_of
from ..errors import wrong_value
from .attend import IMPLEMENTATIONS, Attend, Cached, Layout, Packed, Padded


@dataclass(frozen=True)
class Config:
    """Sizes and kinds of a model. The defaults are the paper's model, smaller."""

    vocab_size: int
    encoder_layers: int = 3
    decoder_layers: int = 3
    dim: int = 256
    heads: int = 4
    kv_heads: int | None = None  # of keys and values, a divisor of heads; None: heads
    hidden: int = 1024  # width of the feed-forward layers
    activation: str = "relu"  # "relu", "gelu", "swiglu"
    norm: str = "layer"  # "layer", "rms"
    norm_first: bool = True  # x + f(norm(x)), else norm(x + f(x))
    norm_eps: float = 1e-5
    positions: str = "sinusoidal"  # "sinusoidal", "rotary", "learned"
    max_positions: int = 2048
    max_source_positions: int | None = None  # the encoder's; None: max_positions
    rope_theta: float = 10000.0
    bias: bool = True
    tied: bool = True  # the logits use the matrix of the embedding
    scale_embedding: bool = True  # by sqrt(dim)
    embedding_norm: bool = False  # as in BERT
    dropout: float = 0.0  # of embeddings and of the layers before they are added to x
    attention_dropout: float = 0.0  # of the attention weights

    def __post_init__(self) -> None:
        choices = {
            "activation": ("relu", "gelu", "swiglu"),
            "norm": ("layer", "rms"),
            "positions": ("sinusoidal", "rotary", "learned"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                wrong_value(name, f"one of {', '.join(allowed)}", getattr(self, name))
        if self.dim % self.heads:
            wrong_value("heads", f"a divisor of dim {self.dim}", self.heads)
        if self.heads % self.key_heads:
            wrong_value("kv_heads", f"a divisor of heads {self.heads}", self.kv_heads)
        if self.encoder_layers + self.decoder_layers == 0:
            wrong_value("decoder_layers", "at least one layer in encoder or decoder", 0)

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def key_heads(self) -> int:
        return self.heads if self.kv_heads is None else self.kv_heads


# -- Parts -----------------------------------------------------------------------------------


def make_norm(config: Config) -> nn.Module:
    make = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}[config.norm]
    return make(config.dim, eps=config.norm_eps)


class FeedForward(nn.Module):
    """W₂ act(W₁ x); SwiGLU: W₂ (silu(W₁ x) · W₃ x)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.activation: nn.Module
        self.activation = {"relu": nn.ReLU, "gelu": nn.GELU, "swiglu": nn.SiLU}[config.activation]()
        self.up = nn.Linear(config.dim, config.hidden, config.bias)
        self.gate: nn.Linear | None = None
        if config.activation == "swiglu":
            self.gate = nn.Linear(config.dim, config.hidden, config.bias)
        self.down = nn.Linear(config.hidden, config.dim, config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


def sinusoids(positions: int, dim: int) -> Tensor:
    """[positions, dim]: sin(t / 10000^(2i / dim)) at 2i and the cosine at 2i + 1 (section 3.5)."""
    angles = rotary_angles(positions, dim, 10000.0)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def rotary_angles(positions: int, dim: int, theta: float) -> Tensor:
    """[positions, dim / 2]: t / theta^(2i / dim)."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return torch.arange(positions, dtype=torch.float32)[:, None] * frequencies


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotates each pair (x_i, x_{i + D/2}) of x [..., S, H, D] by its angle [..., S, D/2]."""
    cos, sin = angles.cos().unsqueeze(-2).to(x.dtype), angles.sin().unsqueeze(-2).to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Positions(nn.Module):
    """The positions of a stack's tokens: added to its input, or angles for its attention."""

    angles: Tensor | None
    table: Tensor | None

    def __init__(self, config: Config, positions: int) -> None:
        super().__init__()
        self.max_positions = positions
        angles = table = None
        if config.positions == "rotary":
            angles = rotary_angles(positions, config.head_dim, config.rope_theta)
        elif config.positions == "sinusoidal":
            table = sinusoids(positions, config.dim)
        self.register_buffer("angles", angles, persistent=False)
        if config.positions == "learned":
            self.table = nn.Parameter(torch.randn(positions, config.dim) * config.dim**-0.5)
        else:
            self.register_buffer("table", table, persistent=False)
        self.norm = make_norm(config) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """Returns x [B, S, dim] or [T, dim] with positions added, and the rotary angles or None."""
        packed = isinstance(layout, Packed)
        if x.dim() != (2 if packed else 3):
            expected = "[T] in a packed batch" if packed else "[B, S]"
            wrong_value("tokens", expected, shape_of(x[..., 0]))
        longest = layout.max_seqlen if isinstance(layout, Packed) else x.shape[1]
        longest += layout.longest if isinstance(layout, Cached) else 0
        if longest > self.max_positions:
            wrong_value("tokens", f"at most {self.max_positions} positions", longest)
        positions = layout.positions(x)
        if self.table is not None:
            x = x + self.table[positions].to(x.dtype)
        angles = None if self.angles is None else self.angles[positions]
        return self.dropout(self.norm(x)), angles


# -- Memory and cache -----------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """An encoder's result for a decoder: hidden [B, S, dim] or [T, dim], and its layout."""

    hidden: Tensor
    layout: Layout


class KeysValues(NamedTuple):
    """key and value: [B, Hkv, S, D], packed [T, Hkv, D]."""

    key: Tensor
    value: Tensor


class LayerCache:
    """Keys and values of one layer, [batch, Hkv, room, D], written in place.

    The first `append` allocates them, in the dtype of what the projections return: under autocast
    no parameter has that dtype, and a module that replaces a projection need not have a weight.
    """

    def __init__(self, batch: int, room: int) -> None:
        self.batch, self.room = batch, room
        self.stored: KeysValues | None = None

    def append(self, key: Tensor, value: Tensor, before: Tensor) -> KeysValues:
        """Writes key and value [batch, Hkv, S, D] behind the `before` tokens of each sequence.

        Returns all keys and values, including the unused room.
        """
        if self.stored is None:
            self.stored = KeysValues(*(self._allocate(x, self.batch) for x in (key, value)))
        kv_cache_append_(*self.stored, key, value, before)
        return self.stored

    def reorder(self, rows: Tensor, used: int) -> None:
        """Does `Cache.reorder` for one layer, whose first `used` tokens are in use."""
        self.batch = len(rows)
        if self.stored is None:
            return
        old = self.stored
        if len(rows) != len(old.key):
            self.stored = KeysValues(*(self._allocate(x, len(rows)) for x in old))
        for source, target in zip(old, self.stored, strict=True):
            target[:, :, :used] = source[rows, :, :used]

    def _allocate(self, like: Tensor, batch: int) -> Tensor:
        return like.new_zeros(batch, like.shape[1], self.room, like.shape[3])


class Cache:
    """Keys and values of the tokens so far, written in place, and of the memory, computed once.

    Each layer has room for `room` tokens of each of `batch` sequences: [batch, Hkv, room, D]. With
    a memory of B sequences, batch is a multiple of B: the first of them serves the first batch / B.
    """

    def __init__(self, model: Transformer, memory: Memory | None, batch: int, room: int) -> None:
        assert model.decoder is not None
        self.memory = memory
        self.layers: list[LayerCache] = []
        self.known: list[KeysValues | None] = []
        for block in model.decoder.blocks:
            assert isinstance(block, Block)
            self.layers.append(LayerCache(batch, room))
            self.known.append(None if memory is None else block.cross_attention.keys_values(memory))
        device = next(model.parameters()).device
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.longest = 0  # an upper bound of lengths, known without reading the tensor

    def advance(self, lengths: Tensor | int, longest: int) -> None:
        self.lengths = self.lengths + lengths
        self.longest += longest

    def reorder(self, rows: Tensor) -> None:
        """Sequence b continues sequence rows[b]; the number of sequences may change."""
        self.lengths = self.lengths[rows]
        for layer in self.layers:
            layer.reorder(rows, self.longest)


# -- Attention --------------------------------------------------------------------------------


class Projections(nn.Module):
    """The parts of both kinds of attention: W_q, W_k, W_v, W_o, heads, and `attend`."""

    def __init__(self, config: Config, attention: str) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.key_heads * config.head_dim
        self.query = nn.Linear(config.dim, config.dim, config.bias)
        self.key = nn.Linear(config.dim, width, config.bias)
        self.value = nn.Linear(config.dim, width, config.bias)
        self.output = nn.Linear(config.dim, config.dim, config.bias)
        self.attend = Attend(attention, config.attention_dropout)

    def split(self, x: Tensor) -> Tensor:
        """[..., H, D] from [..., H · D]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def merge(self, heads: Tensor) -> Tensor:
        """W_o concat(heads), [B, S, dim] from [B, H, S, D], packed [T, dim] from [T, H, D]."""
        return self.output(heads_inward(heads).flatten(-2))


def heads_inward(x: Tensor) -> Tensor:
    """[B, H, S, D] from [B, S, H, D] and back; packed [T, H, D] stays as it is."""
    return x.transpose(1, 2) if x.dim() == 4 else x


class SelfAttention(Projections):
    def __init__(self, config: Config, attention: str, causal: bool) -> None:
        super().__init__(config, attention)
        self.causal = causal

    def forward(
        self, x: Tensor, layout: Layout, angles: Tensor | None, cache: LayerCache | None = None
    ) -> Tensor:
        q, k, v = (self.split(project(x)) for project in (self.query, self.key, self.value))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = heads_inward(q), heads_inward(k), heads_inward(v)
        if cache is not None:
            assert isinstance(layout, Cached)
            k, v = cache.append(k, v, layout.before)
        return self.merge(self.attend(q, k, v, layout, layout, self.causal))


class CrossAttention(Projections):
    def keys_values(self, memory: Memory) -> KeysValues:
        key, value = self.split(self.key(memory.hidden)), self.split(self.value(memory.hidden))
        return KeysValues(heads_inward(key), heads_inward(value))

    def forward(
        self, x: Tensor, layout: Layout, memory: Memory, known: KeysValues | None = None
    ) -> Tensor:
        """known: `keys_values` of memory, if they were computed before.

        Several sequences per memory, as in beam search, become more queries of the same keys, so
        nothing is copied for them.
        """
        q = heads_inward(self.split(self.query(x)))
        k, v = self.keys_values(memory) if known is None else (known.key, known.value)
        if isinstance(layout, Packed):
            return self.merge(self.attend(q, k, v, layout, memory.layout, False))
        B, H, S, D = q.shape
        q = q.view(len(k), -1, H, S, D).transpose(1, 2).reshape(len(k), H, -1, D)
        heads = self.attend(q, k, v, Padded(), memory.layout, False)
        heads = heads.view(len(k), H, -1, S, D).transpose(1, 2).reshape(B, H, S, D)
        return self.merge(heads)


class Block(nn.Module):
    """Self-attention, cross-attention if `cross`, feed-forward: each with its residual and norm."""

    def __init__(self, config: Config, attention: str, causal: bool, cross: bool) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.dropout = nn.Dropout(config.dropout)
        self.self_norm = make_norm(config)
        self.self_attention = SelfAttention(config, attention, causal)
        if cross:
            self.cross_norm = make_norm(config)
            self.cross_attention = CrossAttention(config, attention)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        angles: Tensor | None = None,
        memory: Memory | None = None,
        cache: LayerCache | None = None,
        known: KeysValues | None = None,
    ) -> Tensor:
        x = self.residual(
            x, self.self_norm, lambda y: self.self_attention(y, layout, angles, cache)
        )
        if memory is not None:
            x = self.residual(
                x, self.cross_norm, lambda y: self.cross_attention(y, layout, memory, known)
            )
        return self.residual(x, self.feed_forward_norm, self.feed_forward)

    def residual(self, x: Tensor, norm: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            return x + self.dropout(layer(norm(x)))
        return norm(x + self.dropout(layer(x)))


class Stack(nn.Module):
    """Positions and blocks: an encoder, or with causal a decoder."""

    def __init__(
        self, config: Config, layers: int, positions: int, attention: str, causal: bool
    ) -> None:
        super().__init__()
        cross = causal and config.encoder_layers > 0
        self.positions = Positions(config, positions)
        self.blocks = nn.ModuleList(Block(config, attention, causal, cross) for _ in range(layers))
        self.norm = make_norm(config) if config.norm_first else nn.Identity()

    def forward(
        self, x: Tensor, layout: Layout, memory: Memory | None = None, cache: Cache | None = None
    ) -> Tensor:
        x, angles = self.positions(x, layout)
        for i, block in enumerate(self.blocks):
            kept = (None, None) if cache is None else (cache.layers[i], cache.known[i])
            x = block(x, layout, angles, memory, *kept)
        return self.norm(x)


class Transformer(nn.Module):
    """Encoder, decoder or both, as config says.

    attention: "fused", "sdpa" or "naive"; `use_attention` changes it. front: the module that turns
    the encoder's inputs into [B, S, dim] if they are not tokens (sound, images).
    """

    def __init__(
        self, config: Config, attention: str = "fused", front: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.scale = math.sqrt(config.dim) if config.scale_embedding else 1.0
        self.tokens = nn.Embedding(config.vocab_size, config.dim)
        self.front = front
        self.encoder: Stack | None = None
        self.decoder: Stack | None = None
        self.to_logits: nn.Linear | None = None
        if config.encoder_layers:
            positions = config.max_source_positions or config.max_positions
            self.encoder = Stack(config, config.encoder_layers, positions, attention, causal=False)
        if config.decoder_layers:
            positions = config.max_positions
            self.decoder = Stack(config, config.decoder_layers, positions, attention, causal=True)
            if not config.tied:
                self.to_logits = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.apply(self._initialise)
        self.use_attention(attention)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.dim**-0.5)

    def use_attention(self, attention: str) -> Transformer:
        """Computes attention in this way from now on, with the same parameters."""
        if attention not in IMPLEMENTATIONS:
            wrong_value("attention", f"one of {', '.join(IMPLEMENTATIONS)}", repr(attention))
        for module in self.modules():
            if isinstance(module, Attend):
                module.implementation = attention
        return self

    def encode(self, source: Tensor, layout: Layout | None = None) -> Memory:
        """Returns the hidden states of source: tokens [B, S] or [T], or the input of `front`."""
        if self.encoder is None:
            wrong_value("source", "nothing: this model has no encoder", "a tensor")
        layout = layout or Padded()
        x = self.embed(source) if self.front is None else self.front(source)
        return Memory(self.encoder(x, layout), layout)

    def decode(
        self, tokens: Tensor, layout: Layout | None = None, memory: Memory | None = None
    ) -> Tensor:
        """Returns the logits of the token after each token ([B, S] or [T]): [..., vocab_size]."""
        if self.decoder is None:
            wrong_value("tokens", "nothing: this model has no decoder", "a tensor")
        self._check_memory(memory)
        return self.logits(self.decoder(self.embed(tokens), layout or Padded(), memory))

    def forward(
        self,
        tokens: Tensor,
        layout: Layout | None = None,
        source: Tensor | None = None,
        source_layout: Layout | None = None,
    ) -> Tensor:
        """Decodes tokens, with the encoded source if there is one."""
        memory = None if source is None else self.encode(source, source_layout)
        return self.decode(tokens, layout, memory)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) * self.scale

    def logits(self, hidden: Tensor) -> Tensor:
        if self.to_logits is not None:
            return self.to_logits(hidden)
        return F.linear(hidden, self.tokens.weight)

    # -- Generating, token after token (generate.py) --

    @torch.no_grad()
    def start(self, memory: Memory | None, batch: int, room: int) -> Cache:
        """Returns an empty cache for `batch` sequences of at most `room` tokens."""
        if self.decoder is None:
            wrong_value("memory", "nothing: this model has no decoder", memory)
        self._check_memory(memory)
        return Cache(self, memory, batch, room)

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: Cache, lengths: Tensor | None = None) -> Tensor:
        """Appends tokens [B, S], and returns the logits of the next token: [B, vocab_size].

        lengths: int32 [B], the number of tokens in each row, at least 1; the rest is padding.
        """
        assert self.decoder is not None
        layout = Cached(cache.lengths, cache.longest)
        hidden = self.decoder(self.embed(tokens), layout, cache.memory, cache)
        seqlen = tokens.shape[1]
        if lengths is None:
            last = hidden[:, -1]
        else:
            last = hidden[torch.arange(len(tokens), device=tokens.device), lengths.long() - 1]
        cache.advance(seqlen if lengths is None else lengths, seqlen)
        return self.logits(last)

    def _check_memory(self, memory: Memory | None) -> None:
        if (memory is None) != (self.encoder is None):
            expected = "what encode() gave" if memory is None else "None, without an encoder"
            wrong_value("memory", expected, memory)

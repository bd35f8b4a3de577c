"""A recurrent translation network, with which the transformer is compared.

    h = LSTM(source), both directions;  g = LSTM(target so far)
    c_t = softmax(g_t W h^T) h;  logits = E tanh(W_c [c_t; g_t])

Sutskever et al. 2014 with the global attention of Luong et al. 2015 (section 3.1, "general").
It is called as `Transformer` is, and generates with the same `generate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ..errors import wrong_value
from .attend import Attend, Layout, Padded
from .transformer import Memory

States = tuple[Tensor, Tensor]  # h and c, [layers, B, dim] each


@dataclass
class LSTMState:
    """The encoded source, and the decoder's states of each sequence."""

    memory: Memory
    states: States

    def reorder(self, rows: Tensor) -> None:
        h, c = self.states
        per_memory = len(rows) // len(self.memory.hidden)
        if len(rows) != h.shape[1]:  # one prefix for each source becomes several
            lengths = self.memory.layout.lengths if isinstance(self.memory.layout, Padded) else None
            if lengths is not None:
                lengths = lengths.repeat_interleave(per_memory)
            hidden = self.memory.hidden.repeat_interleave(per_memory, dim=0)
            self.memory = Memory(hidden, Padded(lengths))
        self.states = h[:, rows], c[:, rows]


class LSTMTranslator(nn.Module):
    """Encoder and decoder of `layers` layers of width dim, embeddings of width dim / 2, tied."""

    def __init__(self, vocab_size: int, dim: int = 512, layers: int = 2, dropout: float = 0.0):
        super().__init__()
        width, between = dim // 2, dropout if layers > 1 else 0.0
        self.tokens = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)
        self.encoder = nn.LSTM(
            width, width, layers, batch_first=True, dropout=between, bidirectional=True
        )
        self.decoder = nn.LSTM(width, dim, layers, batch_first=True, dropout=between)
        self.bridge = nn.Linear(dim, 2 * layers * dim)  # the decoder's first state
        self.score = nn.Linear(dim, dim, bias=False)
        self.combine = nn.Linear(2 * dim, width)
        self.attend = Attend("fused")
        self.dropout = nn.Dropout(dropout)
        self.layers, self.dim = layers, dim

    def encode(self, source: Tensor, layout: Layout | None = None) -> Memory:
        """Encodes source: tokens [B, S], padded."""
        layout = layout or Padded()
        if not isinstance(layout, Padded):
            wrong_value("layout", "Padded", layout)
        x = self.dropout(self._embed(source))
        lengths = layout.lengths
        if lengths is None:
            lengths = torch.full((len(source),), source.shape[1], dtype=torch.int32)
        packed = pack_padded_sequence(x, lengths.long().cpu(), True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(
            self.encoder(packed)[0], batch_first=True, total_length=source.shape[1]
        )
        return Memory(hidden, layout)

    def forward(
        self, tokens: Tensor, layout: Layout, source: Tensor, source_layout: Layout
    ) -> Tensor:
        """Returns the logits of the token after each of tokens [B, S]: [B, S, vocab_size]."""
        memory = self.encode(source, source_layout)
        hidden, _ = self._decode(tokens, self._first(memory))
        return self._logits(hidden, memory)

    @torch.no_grad()
    def start(self, memory: Memory, batch: int, room: int) -> LSTMState:
        return LSTMState(memory, self._first(memory))

    @torch.no_grad()
    def step(self, tokens: Tensor, cache: LSTMState, lengths: Tensor | None = None) -> Tensor:
        if lengths is not None and int(lengths.min()) != tokens.shape[1]:
            wrong_value("lengths", "prompts of one length", lengths.tolist())
        hidden, cache.states = self._decode(tokens, cache.states)
        return self._logits(hidden[:, -1:], cache.memory)[:, 0]

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) * self.tokens.embedding_dim**0.5

    def _first(self, memory: Memory) -> States:
        """Makes the decoder's first state from the source's mean hidden state; padding is 0."""
        lengths = memory.layout.lengths if isinstance(memory.layout, Padded) else None
        count = memory.hidden.shape[1] if lengths is None else lengths[:, None]
        states = torch.tanh(self.bridge(memory.hidden.sum(1) / count))
        h, c = states.view(-1, 2, self.layers, self.dim).permute(1, 2, 0, 3).contiguous().unbind()
        return h, c

    def _decode(self, tokens: Tensor, states: States) -> tuple[Tensor, States]:
        hidden, states = self.decoder(self.dropout(self._embed(tokens)), states)
        return hidden, states

    def _logits(self, hidden: Tensor, memory: Memory) -> Tensor:
        q, k = self.score(hidden)[:, None], memory.hidden[:, None]  # one head
        context = self.attend(q * self.dim**0.5, k, k, Padded(), memory.layout, False)[:, 0]
        combined = torch.tanh(self.combine(torch.cat([context, hidden], dim=-1)))
        return F.linear(self.dropout(combined), self.tokens.weight)

"""Generating: greedy, sampling, and beam search, for any model that has `start` and `step`.

    greedy     the most probable token                             temperature 0, the default
    sampling   softmax(logits / temperature), of the top_k most probable tokens, or of the fewest
               that have probability top_p together (Holtzman et al. 2020, section 3.1)
    beams      the sequences with the largest log p / ((5 + length) / 6)^length_penalty
               (Wu et al. 2016, equation 14), searched among the best `beams` prefixes

A batch is generated together; tokens after the end of a sequence are dropped. Tokens are chosen on
the CPU, wherever the model is, so a seed draws the same tokens everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import wrong_value
from .attend import pad


class State(Protocol):
    """The state of a model after the tokens so far (transformer.Cache)."""

    def reorder(self, rows: Tensor) -> None: ...


class Generator(Protocol):
    """A model that can be asked for the next token (transformer.Transformer)."""

    def start(self, memory: Any, batch: int, room: int) -> Any: ...

    def step(self, tokens: Tensor, cache: Any, lengths: Tensor | None = None) -> Tensor: ...


def _step(model: Generator, tokens: Tensor, cache: Any, lengths: Tensor | None = None) -> Tensor:
    """Calls `model.step` with tokens on the CPU; returns logits [B, V] on the CPU."""
    device = tokens.device
    if isinstance(model, nn.Module):
        device = next(model.parameters()).device
    lengths = None if lengths is None else lengths.to(device)
    return model.step(tokens.to(device), cache, lengths).cpu()


@torch.no_grad()
def generate(
    model: Generator,
    prompts: Sequence[Sequence[int]],
    memory: Any = None,
    *,
    max_new_tokens: int,
    end: int | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    beams: int = 1,
    length_penalty: float = 0.6,
    forbidden: Sequence[int] = (),
    forbidden_first: Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Returns the continuation of each prompt: at most max_new_tokens tokens, without `end`.

    prompts: B sequences of at least one token. memory: the B encoded sources of an encoder-decoder.
    end: the token that ends a sequence. forbidden: tokens that are never chosen; forbidden_first:
    tokens that are not chosen first.
    """
    if not prompts or not all(prompts):
        wrong_value("prompts", "sequences of at least one token", prompts)
    if temperature < 0:
        wrong_value("temperature", "a number >= 0", temperature)
    if not 0 < top_p <= 1:
        wrong_value("top_p", "a probability in (0, 1]", top_p)
    for name, value in (("top_k", top_k), ("beams", beams), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            wrong_value(name, "an int >= 1", value)
    if beams > 1 and temperature:
        wrong_value("temperature", "0 with beams", temperature)
    tokens, layout = pad(prompts)
    cache = model.start(memory, len(prompts), tokens.shape[1] + max_new_tokens)
    logits = _step(model, tokens, cache, layout.lengths)
    logits = logits.index_fill(-1, torch.tensor(forbidden_first, dtype=torch.long), -math.inf)
    hide = torch.tensor(forbidden, dtype=torch.long)
    if beams > 1:
        return _beam_search(model, cache, logits, max_new_tokens, end, beams, length_penalty, hide)
    new: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    for n in range(max_new_tokens):
        logits = logits.index_fill(-1, hide, -math.inf)
        chosen = _choose(logits, temperature, top_k, top_p, generator)
        for b, token in enumerate(chosen.tolist()):
            running[b] = running[b] and token != end
            if running[b]:
                new[b].append(token)
        if not any(running) or n == max_new_tokens - 1:
            break
        logits = _step(model, chosen[:, None], cache)
    return new


def _choose(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
    generator: torch.Generator | None,
) -> Tensor:
    """Chooses a token for each row of logits [B, V]."""
    if temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits, temperature, top_k, top_p)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0
) -> Tensor:
    """Returns the distribution to sample: [..., V], float32. The most probable token remains."""
    ranked, order = (logits.float() / temperature).sort(dim=-1, descending=True, stable=True)
    p = ranked.softmax(-1)
    if top_k is not None:
        p[..., top_k:] = 0
    p = p / p.sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = p.masked_fill(before >= top_p, 0)
    return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


def length_norm(length: int, length_penalty: float) -> float:
    """Returns the divisor of log p for a sequence of `length` tokens."""
    return ((5 + length) / 6) ** length_penalty


def _beam_search(
    model: Generator,
    cache: Any,
    logits: Tensor,
    max_new_tokens: int,
    end: int | None,
    beams: int,
    length_penalty: float,
    hide: Tensor,
) -> list[list[int]]:
    """Returns the best sequence found for each prompt.

    logits: [B, V], after the prompts, which are in the cache. Each step keeps the `beams` best
    prefixes that have not ended, and the best sequence that has ended, until no prefix can become
    better than that. `end` counts as a token of the length.
    """
    B, V = logits.shape
    rows = torch.arange(B).repeat_interleave(beams)
    cache.reorder(rows)
    logits = logits[rows]
    history = torch.zeros(B, beams, 0, dtype=torch.long)
    scores = torch.full((B, beams), -math.inf)  # log p of each prefix
    scores[:, 0] = 0  # all prefixes are still the same
    best: list[list[int]] = [[] for _ in range(B)]
    best_score = [-math.inf] * B
    for length in range(1, max_new_tokens + 1):
        log_p = logits.float().log_softmax(-1).index_fill(-1, hide, -math.inf)
        total = (scores[:, :, None] + log_p.view(B, beams, V)).flatten(1)
        # A prefix can end in one way only, so among twice as many candidates enough go on.
        candidates, index = total.topk(min(2 * beams, beams * V))
        parents, tokens = index // V, index % V
        history = history.gather(1, parents[..., None].expand(-1, -1, length - 1))
        history = torch.cat([history, tokens[..., None]], dim=-1)
        ends = torch.full_like(index, length == max_new_tokens, dtype=torch.bool)
        if end is not None:
            ends |= tokens == end
        norm = length_norm(length, length_penalty)
        ended = (candidates / norm).masked_fill(~ends, -math.inf).max(-1)
        for b, (score, which) in enumerate(zip(*map(Tensor.tolist, ended), strict=True)):
            if score > best_score[b]:
                best_score[b] = score
                best[b] = [token for token in history[b, which].tolist() if token != end]
        # An upper bound of what a prefix can reach: log p only falls, and no later norm is larger.
        norm = max(length_norm(n, length_penalty) for n in (length + 1, max_new_tokens))
        scores, kept = candidates.masked_fill(ends, -math.inf).topk(beams)
        if all(
            hope <= b for hope, b in zip((scores[:, 0] / norm).tolist(), best_score, strict=True)
        ):
            break
        history = history.gather(1, kept[..., None].expand(-1, -1, length))
        cache.reorder((torch.arange(B)[:, None] * beams + parents.gather(1, kept)).flatten())
        logits = _step(model, tokens.gather(1, kept).view(-1, 1), cache)
    return best

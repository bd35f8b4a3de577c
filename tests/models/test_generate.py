"""Compares greedy, sampling and beam search with a plain loop and an exhaustive search."""

import itertools

import pytest
import torch

from fused_attention.errors import ArgumentValueError
from fused_attention.models.attend import IMPLEMENTATIONS, pad
from fused_attention.models.generate import generate, length_norm, probabilities
from selection import quick
from small_transformers import SOURCES, TARGETS, model_of

pytestmark = pytest.mark.usefixtures("one_thread")


def lengthy(kind, attention="fused", **changes):
    """Returns a model with random parameters, and the memory of its encoder."""
    model = model_of(kind, attention, **changes).double()
    return model, None if model.encoder is None else model.encode(*pad(SOURCES))


def next_logits(model, memory, tokens, b):
    """Computes the next logits without a cache or a batch."""
    if memory is not None:
        memory = model.encode(torch.tensor([SOURCES[b]]))
    return model.decode(torch.tensor([tokens]), None, memory)[0, -1]


@pytest.mark.parametrize("attention", IMPLEMENTATIONS)
@pytest.mark.parametrize("kind", ["norm first", "decoder only"])
@torch.no_grad()
def test_greedy(kind, attention):
    model, memory = lengthy(kind, attention)
    expected = []
    for b, prompt in enumerate(TARGETS):
        tokens = list(prompt)
        for _ in range(8):
            logits = next_logits(model, memory, tokens, b)
            logits[[4, 5]] = -float("inf")
            tokens.append(int(logits.argmax()))
        expected.append(tokens[len(prompt) :])
    options = {"max_new_tokens": 8, "forbidden": [4, 5]}
    assert generate(model, TARGETS, memory, **options) == expected
    end = expected[0][2]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len(cut[0]) < 8
    assert generate(model, TARGETS, memory, end=end, **options) == cut


@pytest.mark.parametrize("length_penalty", quick([0.0, 0.6, 2.0, -1.0], 0.6, -1.0))
@torch.no_grad()
def test_a_beam_that_is_wide_enough_finds_the_best_sequence(length_penalty):
    model, memory = lengthy("norm first", vocab_size=15)
    end, longest, forbidden = 3, 3, list(range(5, 15))  # five tokens remain
    results = generate(
        model,
        TARGETS_SMALL,
        memory,
        max_new_tokens=longest,
        end=end,
        beams=40,
        length_penalty=length_penalty,
        forbidden=forbidden,
    )
    for b, prompt in enumerate(TARGETS_SMALL):
        found = {}
        for length in range(1, longest + 1):
            for tokens in itertools.product([t for t in range(5) if t != end], repeat=length - 1):
                for last in range(5):
                    if last != end and length < longest:
                        continue
                    total, so_far = 0.0, list(prompt)
                    for token in (*tokens, last):
                        logits = next_logits(model, memory, so_far, b)
                        log_p = logits.log_softmax(-1)
                        total += log_p[token].item()
                        so_far.append(token)
                    kept = tuple(t for t in (*tokens, last) if t != end)
                    found[kept] = total / length_norm(length, length_penalty)
        best = max(found, key=found.__getitem__)
        assert tuple(results[b]) == best


TARGETS_SMALL = [[1, 2], [3, 4, 2, 1], [0]]


class Bigrams:
    """A model that reads p(next | last) from a table, with the methods that `generate` needs."""

    def __init__(self, table):
        self.log_p = torch.tensor(table).log()

    def start(self, memory, batch, room):
        return self

    def reorder(self, rows):
        pass

    def step(self, tokens, cache, lengths=None):
        return self.log_p[tokens[:, -1]]


def test_a_beam_does_not_fall_for_the_first_token():
    """After 0, the likelier token is 1, but any token may follow 1, and only 3 may follow 2."""
    garden_path = Bigrams(
        [[0.0, 0.6, 0.4, 0.0], [0.25] * 4, [0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]]
    )
    assert generate(garden_path, [[0]], max_new_tokens=2) == [[1, 0]]
    assert generate(garden_path, [[0], [0]], max_new_tokens=2, beams=2) == [[2, 3]] * 2


def test_probabilities():
    logits = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    torch.testing.assert_close(probabilities(logits), logits.exp())
    torch.testing.assert_close(probabilities(logits, top_k=2), torch.tensor([[0, 2 / 3, 0, 1 / 3]]))
    torch.testing.assert_close(
        probabilities(logits, top_p=0.7), torch.tensor([[0, 2 / 3, 0, 1 / 3]])
    )
    assert probabilities(logits, top_p=0.01).tolist() == [[0, 1, 0, 0]]
    cold = probabilities(logits, temperature=0.5)
    torch.testing.assert_close(cold, logits.exp() ** 2 / (logits.exp() ** 2).sum())
    both = probabilities(logits, top_k=3, top_p=0.8)  # 5/9 + 2.5/9 > 0.8
    torch.testing.assert_close(both, torch.tensor([[0, 2 / 3, 0, 1 / 3]]))


@torch.no_grad()
def test_sampling_draws_from_the_distribution():
    model, _ = lengthy("decoder only")
    prompt = [3, 4, 5]
    n = 4000
    drawn = generate(
        model,
        [prompt] * n,
        max_new_tokens=1,
        temperature=20.0,
        top_k=5,
        generator=torch.Generator().manual_seed(0),
    )
    counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=23)
    p = probabilities(next_logits(model, None, prompt, 0), 20.0, 5)
    assert (p > 0).sum() == 5 and p.max() < 0.5
    deviation = (counts - n * p) / (n * p * (1 - p)).clamp(min=1e-9).sqrt()
    assert deviation[p > 0].abs().max() < 4.5 and counts[p == 0].sum() == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "prompts: expected sequences of at least one token"),
        ({"prompts": [[1], []]}, "prompts: expected sequences of at least one token"),
        ({"temperature": -1.0}, "temperature: expected a number >= 0"),
        ({"top_p": 0.0}, "top_p: expected a probability in"),
        ({"top_k": 0}, "top_k: expected an int >= 1"),
        ({"beams": 0}, "beams: expected an int >= 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected an int >= 1"),
        ({"beams": 2, "temperature": 1.0}, "temperature: expected 0 with beams"),
    ],
)
def test_wrong_options(options, message):
    model, _ = lengthy("decoder only")
    with pytest.raises(ArgumentValueError, match=message):
        generate(model, **{"prompts": [[1]], "max_new_tokens": 2, **options})

"""The tasks of `python -m fused_attention train`: data, model, recipe and measure of each.

A run is a directory with settings.json, tokenizer.json, checkpoint.pt (see `training.py`) and
results.json. The settings determine all of it except the seconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import wrong_value
from . import captions, files, texts
from .attend import pack, pad
from .fetch import directory
from .generate import generate
from .lstm import LSTMTranslator
from .pretrained import load_minilm
from .texts import BEGIN, END, Text
from .training import History, Pair, Recipe, pair_loss, token_loss, train
from .transformer import Config, Transformer

VOCABULARY = 4000
# The largest learning rate. A pre-trained encoder with a fresh decoder gets a fifth of it.
PEAKS = {"translate": 2e-3, "summarize": 1.5e-3, "lm": 2e-3, "classify": 3e-4, "caption": 1e-3}
LONGEST = 128  # tokens of an example; longer ones are cut


@dataclass(frozen=True)
class Settings:
    """What to train, and how. The fields of `Recipe` mean the same here."""

    task: str  # one of TASKS
    language: str = "de"  # translate: the source language
    model: str = "transformer"  # translate: or "lstm"
    pretrained: bool = False  # summarize, classify: starts from all-MiniLM-L6-v2's encoder
    attention: str = "fused"
    seed: int = 0
    steps: int = 860
    tokens: int = 1600
    peak: float | None = None  # None: PEAKS
    dropout: float = 0.1
    packed: bool = False
    examples: int | None = None  # training examples, at most; for a trial

    def recipe(self) -> Recipe:
        warmup = min(150, max(1, self.steps // 4))
        smoothing = 0.0 if self.task in ("lm", "classify") else 0.1
        return Recipe(
            self.steps,
            self.tokens,
            PEAKS[self.task] if self.peak is None else self.peak,
            0.2 if self.task == "summarize" and self.pretrained else 1.0,
            warmup,
            smoothing=smoothing,
            seed=self.seed,
            packed=self.packed,
        )


@dataclass
class Prepared:
    """A task before its training."""

    model: nn.Module
    tokenizer: Any  # tokenizers.Tokenizer, or None
    examples: Sequence[Any]
    size: Callable[[Any], int]
    loss: Callable[[nn.Module, list[Any], Recipe], Tensor]
    evaluate: Callable[[nn.Module], dict[str, Any]]


def pair_size(pair: Pair) -> int:
    return max(len(pair.source), len(pair.target))


def some(examples: Sequence[Text], count: int | None) -> Sequence[Text]:
    """Returns `count` random examples, or all for None."""
    if count is None or count >= len(examples):
        return examples
    return random.Random(0).sample(examples, count)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids[:LONGEST]


def to_pairs(tokenizer: Any, examples: Sequence[Text], begin: int, end: int) -> list[Pair]:
    def encode_all(some: list[str]) -> list[list[int]]:
        found = tokenizer.encode_batch(some, add_special_tokens=False)
        return [x.ids[:LONGEST] for x in found]

    sources = encode_all([x.source for x in examples])
    targets = encode_all([x.target for x in examples])
    return [
        Pair([*source, end] if source else [], [begin, *target, end])
        for source, target in zip(sources, targets, strict=True)
    ]


def write(
    model: Any, tokenizer: Any, sources: Sequence[str], begin: int, end: int, **options: Any
) -> list[str]:
    """Returns what an encoder-decoder writes for each text; options are those of `generate`."""
    options = {"max_new_tokens": 60, **options}
    written: list[str] = []
    for at in range(0, len(sources), 50):
        batch = [[*encode(tokenizer, source), end] for source in sources[at : at + 50]]
        with torch.no_grad():
            memory = model.encode(*pad(batch))
        tokens = generate(model, [[begin]] * len(batch), memory, end=end, **options)
        written += tokenizer.decode_batch(tokens)
    return written


def ends(tokenizer: Any) -> tuple[int, int]:
    """Returns the tokens that begin and end a written text; BERT has other names for them."""
    if tokenizer.token_to_id("[CLS]") is not None:
        return tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    return BEGIN, END


# -- Models ------------------------------------------------------------------------------------


def make_model(settings: Settings, vocab_size: int) -> nn.Module:
    """Makes the model of a task that writes texts, with random or pre-trained parameters."""
    if settings.model == "lstm":
        return LSTMTranslator(vocab_size, dropout=settings.dropout)
    if settings.task == "summarize" and settings.pretrained:
        encoder, _ = load_minilm(directory("minilm"))
        return with_decoder(encoder, 3, settings)
    config = Config(vocab_size, dropout=settings.dropout)
    if settings.task == "lm":
        config = dataclasses.replace(
            config,
            encoder_layers=0,
            decoder_layers=4,
            kv_heads=2,
            hidden=704,
            activation="swiglu",
            norm="rms",
            positions="rotary",
            bias=False,
            scale_embedding=False,
        )
    return Transformer(config, settings.attention)


def with_decoder(encoder: Transformer, layers: int, settings: Settings) -> Transformer:
    """Returns a pre-trained encoder with its token embedding, and an untrained decoder."""
    config = dataclasses.replace(
        encoder.config, decoder_layers=layers, dropout=settings.dropout, tied=True
    )
    model = Transformer(config, settings.attention)
    missing, unexpected = model.load_state_dict(encoder.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("decoder.") for name in missing)
    return model


# -- The tasks ---------------------------------------------------------------------------------


def translate(settings: Settings) -> Prepared:
    """Prepares translation from German or French; measures BLEU (lower case) by kind of pair."""
    split = texts.translation(settings.language)
    texts_of_both = [text for x in split.training for text in (x.source, x.target)]
    tokenizer = texts.train_tokenizer(texts_of_both, VOCABULARY)
    model = make_model(settings, tokenizer.get_vocab_size())

    def evaluate(model: nn.Module) -> dict[str, Any]:
        import sacrebleu

        results: dict[str, Any] = {"samples": []}
        for kind in sorted({x.kind for x in split.held_out}):
            some = [x for x in split.held_out if x.kind == kind]
            written = write(model, tokenizer, [x.source for x in some], BEGIN, END)
            right = [x.target for x in some]
            bleu = sacrebleu.corpus_bleu(written, [right], lowercase=True)
            chrf = sacrebleu.corpus_chrf(written, [right])
            exact = sum(w == r for w, r in zip(written, right, strict=True)) / len(some)
            results[kind] = {"bleu": bleu.score, "chrf": chrf.score, "exact": exact}
            results["samples"] += [[*x[:2], w] for x, w in zip(some[:5], written, strict=False)]
        return results

    pairs = to_pairs(tokenizer, some(split.training, settings.examples), BEGIN, END)
    return Prepared(model, tokenizer, pairs, pair_size, pair_loss, evaluate)


def summarize(settings: Settings) -> Prepared:
    """Prepares summaries, from descriptions to synopses; measures ROUGE-L beside first sentences.

    It writes by beam search: greedy output of a model of so few steps repeats itself.
    """
    split = texts.summaries()
    if settings.pretrained:
        _, tokenizer = load_minilm(directory("minilm"))
    else:
        texts_of_both = [text for x in split.training[:20000] for text in (x.source, x.target)]
        tokenizer = texts.train_tokenizer(texts_of_both, VOCABULARY)
    begin, end = ends(tokenizer)
    model = make_model(settings, tokenizer.get_vocab_size())

    def evaluate(model: nn.Module) -> dict[str, Any]:
        written = write(model, tokenizer, [x.source for x in split.held_out], begin, end, beams=4)
        first = [x.source.partition(". ")[0] for x in split.held_out]
        right = [x.target for x in split.held_out]
        return {
            "rouge_l": mean(map(rouge_l, written, right)),
            "rouge_l_of_first_sentence": mean(map(rouge_l, first, right)),
            "samples": [[*x[:2], w] for x, w in zip(split.held_out[:10], written, strict=False)],
        }

    pairs = to_pairs(tokenizer, some(split.training, settings.examples), begin, end)
    return Prepared(model, tokenizer, pairs, pair_size, pair_loss, evaluate)


def lm(settings: Settings) -> Prepared:
    """Prepares a language model of English paragraphs; measures the perplexity of a token."""
    split = texts.language_model_texts()
    tokenizer = texts.train_tokenizer([x.target for x in split.training[:30000]], VOCABULARY)
    model = make_model(settings, tokenizer.get_vocab_size())

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, Any]:
        total, count = 0.0, 0
        held_out = to_pairs(tokenizer, split.held_out, BEGIN, END)
        for at in range(0, len(held_out), 20):
            batch = held_out[at : at + 20]
            tokens, layout = pad([pair.target[:-1] for pair in batch])
            nexts, _ = pad([pair.target[1:] for pair in batch])
            here = sum(len(pair.target) - 1 for pair in batch)
            total += token_loss(model(tokens, layout), nexts, layout).item() * here
            count += here
        return {"perplexity": math.exp(total / count), "tokens": count}

    pairs = to_pairs(tokenizer, some(split.training, settings.examples), BEGIN, END)
    return Prepared(model, tokenizer, pairs, pair_size, pair_loss, evaluate)


class Classifier(nn.Module):
    """An encoder, the mean of its hidden states, and a linear layer over it."""

    def __init__(self, encoder: Transformer, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.linear = nn.Linear(encoder.config.dim, classes)

    def forward(self, sequences: Sequence[Sequence[int]], packed: bool = False) -> Tensor:
        """Returns logits [B, classes]."""
        return self.linear(mean_of_hidden(self.encoder, sequences, packed))


def mean_of_hidden(
    encoder: Transformer, sequences: Sequence[Sequence[int]], packed: bool = False
) -> Tensor:
    """Returns the mean hidden state over the tokens of each sequence: [B, dim]."""
    if packed:
        hidden = encoder.encode(*pack(sequences)).hidden
        return torch.stack([part.mean(0) for part in hidden.split([len(s) for s in sequences])])
    tokens, layout = pad(sequences)
    lengths = torch.tensor([[len(sequence)] for sequence in sequences])
    padding = torch.arange(tokens.shape[1]) >= lengths
    hidden = encoder.encode(tokens, layout).hidden
    return hidden.masked_fill(padding[..., None], 0).sum(1) / lengths


def classify(settings: Settings) -> Prepared:
    """Prepares finding the section of a package; measures accuracy on packages of other sources.

    pretrained: all-MiniLM-L6-v2 is fine-tuned. Otherwise the same model learns from random
    parameters.
    """
    split, names = texts.sections()
    encoder, tokenizer = load_minilm(directory("minilm"), settings.attention)
    config = dataclasses.replace(encoder.config, dropout=settings.dropout)
    fresh = Transformer(config, settings.attention)
    if settings.pretrained:
        fresh.load_state_dict(encoder.state_dict())

    def examples(some: Sequence[Text]) -> list[tuple[list[int], int]]:
        return [(tokenizer.encode(x.source).ids[:LONGEST], names.index(x.target)) for x in some]

    def loss(model: nn.Module, batch: list[Any], recipe: Recipe) -> Tensor:
        logits = model([tokens for tokens, _ in batch], recipe.packed)
        return F.cross_entropy(logits, torch.tensor([label for _, label in batch]))

    @torch.no_grad()
    def evaluate(model: nn.Module) -> dict[str, Any]:
        held_out = sorted(examples(split.held_out), key=lambda x: len(x[0]))
        right = 0
        for at in range(0, len(held_out), 32):
            tokens, labels = zip(*held_out[at : at + 32], strict=True)
            right += int((model(tokens).argmax(-1) == torch.tensor(labels)).sum())
        largest = max(sum(x.target == name for x in split.held_out) for name in names)
        return {
            "accuracy": right / len(held_out),
            "accuracy_of_largest_class": largest / len(held_out),
            "classes": names,
            "held_out": len(held_out),
        }

    training = examples(some(split.training, settings.examples))
    model = Classifier(fresh, len(names))
    return Prepared(model, tokenizer, training, lambda x: len(x[0]), loss, evaluate)


def caption(settings: Settings) -> Prepared:
    """Prepares captions of drawn images; measures the share of right captions of new images."""
    config = Config(
        len(captions.WORDS), 2, 2, dim=128, heads=4, hidden=256, dropout=settings.dropout
    )
    model = Transformer(config, settings.attention, captions.PatchFront(config.dim))

    def target(image: captions.Image) -> list[int]:
        return [BEGIN, *captions.encode_caption(image.caption), END]

    def loss(model: nn.Module, batch: list[Any], recipe: Recipe) -> Tensor:
        tokens, layout = pad([target(image)[:-1] for image in batch])
        nexts, _ = pad([target(image)[1:] for image in batch])
        logits = model(tokens, layout, torch.stack([image.pixels for image in batch]))
        return token_loss(logits, nexts, layout, recipe.smoothing)

    def evaluate(model: Any) -> dict[str, Any]:
        images = captions.draw_many(200, seed=-1)
        with torch.no_grad():
            memory = model.encode(torch.stack([image.pixels for image in images]))
        found = generate(model, [[BEGIN]] * len(images), memory, max_new_tokens=12, end=END)
        written = [captions.decode_caption(tokens) for tokens in found]
        pairs = list(zip([image.caption for image in images], written, strict=True))
        exact = sum(right == w for right, w in pairs) / len(images)
        return {"exact": exact, "samples": pairs[:10]}

    images = captions.draw_many(settings.examples or 20000, seed=settings.seed)
    return Prepared(model, None, images, lambda image: 16, loss, evaluate)


TASKS: dict[str, Callable[[Settings], Prepared]] = {
    "translate": translate,
    "summarize": summarize,
    "lm": lm,
    "classify": classify,
    "caption": caption,
}


# -- Measures ----------------------------------------------------------------------------------


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def rouge_l(written: str, right: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004, section 3.1).

    Words are runs of letters and digits in lower case, as in the rouge-score package.
    """
    a, b = (re.findall("[a-z0-9]+", text.lower()) for text in (written, right))
    longest = [0] * (len(b) + 1)
    for x in a:
        before = longest[:]
        for j, y in enumerate(b):
            longest[j + 1] = before[j] + 1 if x == y else max(before[j + 1], longest[j])
    if longest[-1] == 0:
        return 0.0
    return 2 * longest[-1] / (len(a) + len(b))


def word_errors(said: str, right: str) -> tuple[int, int]:
    """Returns (wrong, missing and superfluous words, words of `right`); their ratio is the rate."""
    a, b = said.split(), right.split()
    distance = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, distance[0] = distance[:], i
        for j, y in enumerate(b, 1):
            distance[j] = min(before[j - 1] + (x != y), before[j] + 1, distance[j - 1] + 1)
    return distance[-1], len(b)


# -- Runs --------------------------------------------------------------------------------------


def prepare(settings: Settings) -> Prepared:
    """Prepares a task; the seed determines the model's random parameters."""
    if settings.task not in TASKS:
        wrong_value("task", f"one of {', '.join(TASKS)}", settings.task)
    before = torch.random.get_rng_state()
    torch.manual_seed(settings.seed)
    try:
        return TASKS[settings.task](settings)
    finally:
        torch.random.set_rng_state(before)


def run(
    settings: Settings,
    out: Path,
    seconds: float = math.inf,
    after_step: Callable[[int, History], None] = lambda step, history: None,
) -> dict[str, Any]:
    """Trains and measures; resumes an interrupted run that has these settings.

    Raises BlockingIOError, and leaves the directory alone, while another run writes to it.
    """
    with files.locked(out / "settings.json", wait=False):
        return _run(settings, out, seconds, after_step)


def _run(
    settings: Settings, out: Path, seconds: float, after_step: Callable[[int, History], None]
) -> dict[str, Any]:
    """Does the work of `run`. The caller holds the lock of the directory."""
    prepared = prepare(settings)
    files.write_json(out / "settings.json", dataclasses.asdict(settings))
    if prepared.tokenizer is not None:
        files.write_text(out / "tokenizer.json", prepared.tokenizer.to_str(pretty=True))
    history = train(
        prepared.model,
        prepared.examples,
        prepared.loss,
        prepared.size,
        settings.recipe(),
        out / "checkpoint.pt",
        after_step,
        seconds,
    )
    last = history.losses[-100:]
    results = {
        "settings": dataclasses.asdict(settings),
        "parameters": sum(p.numel() for p in prepared.model.parameters()),
        "examples": len(prepared.examples),
        "steps": len(history.losses),
        "training_seconds": sum(history.seconds),
        "loss": sum(last) / len(last),
        "results": prepared.evaluate(prepared.model),
        "losses": history.losses,
    }
    files.write_json(out / "results.json", results)
    return results


def load_run(out: Path, attention: str = "fused") -> tuple[Any, Any, Settings]:
    """Loads (model, tokenizer, settings) of a trained run."""
    if not (out / "checkpoint.pt").exists():
        raise FileNotFoundError(f"{out}: no run; `python -m fused_attention train` makes one")
    from tokenizers import Tokenizer

    stored = json.loads((out / "settings.json").read_text("utf-8"))
    settings = Settings(**{**stored, "attention": attention})
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    model = make_model(settings, tokenizer.get_vocab_size())
    model.load_state_dict(torch.load(out / "checkpoint.pt", weights_only=True)["model"])
    return model.eval(), tokenizer, settings

"""Training: batches of about equal size in tokens, a schedule, checkpoints that survive a kill.

    learning rate = peak · min(step / warmup, sqrt(warmup / step))

Adam with the paper's betas, warm-up and decay (Vaswani et al. 2017, section 5.3), label smoothing
(section 5.4). Everything random follows from the seed, and the batch of step n does not depend on
interruptions: a run that was killed and resumed gives the same losses as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import wrong_value
from . import files
from .attend import Layout, Packed, Padded, pack, pad


@dataclass(frozen=True)
class Recipe:
    """How a model is trained."""

    steps: int = 860
    tokens: int = 1600  # of a batch: its longest example times the number of examples
    peak: float = 2e-3
    encoder_factor: float = 1.0  # times the learning rate, for all but the decoder: see `groups`
    warmup: int = 150
    smoothing: float = 0.1
    clip: float = 1.0  # the largest norm of the gradient
    seed: int = 0
    checkpoint_every: int = 100  # steps
    packed: bool = False  # no padding: only "fused" gains by it

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of step 1, 2, ..."""
        return self.peak * min(step / self.warmup, (self.warmup / step) ** 0.5)


# -- Batches and losses ----------------------------------------------------------------------------


def batches(sizes: Sequence[int], tokens: int, seed: int) -> Iterator[list[int]]:
    """Yields batches of indices without end: every example once an epoch, similar sizes together.

    sizes: the tokens of each example. A batch holds at most `tokens`, padding included, or one
    example. The batches depend on the arguments only.
    """
    epoch = 0
    while True:
        random = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(sizes), generator=random).tolist()
        chunk = 100 * max(1, tokens * len(sizes) // max(1, sum(sizes)))  # about a hundred batches
        found: list[list[int]] = []
        for start in range(0, len(order), chunk):
            batch: list[int] = []
            for index in sorted(order[start : start + chunk], key=lambda i: sizes[i]):
                if batch and sizes[index] * (len(batch) + 1) > tokens:
                    found.append(batch)
                    batch = []
                batch.append(index)
            found.append(batch)
        for i in torch.randperm(len(found), generator=random).tolist():
            yield found[i]
        epoch += 1


def collate(sequences: Sequence[Sequence[int]], packed: bool) -> tuple[Tensor, Packed | Padded]:
    return pack(sequences) if packed else pad(sequences)


def token_loss(logits: Tensor, targets: Tensor, layout: Layout, smoothing: float = 0.0) -> Tensor:
    """Returns the mean cross-entropy, without padding. logits [..., V], targets [...]."""
    if isinstance(layout, Padded):
        padding = layout.padding(targets.shape[1])
        if padding is not None:
            targets = targets.masked_fill(padding, -100)
    return F.cross_entropy(
        logits.flatten(0, -2).float(), targets.flatten(), label_smoothing=smoothing
    )


@dataclass(frozen=True)
class Pair:
    """Tokens to read (none for a language model), and to write, with `begin` and `end`."""

    source: list[int]
    target: list[int]


def pair_loss(model: nn.Module, pairs: Sequence[Pair], recipe: Recipe) -> Tensor:
    """Returns the loss of each target token, given the tokens before it and the source."""
    tokens, layout = collate([pair.target[:-1] for pair in pairs], recipe.packed)
    nexts, _ = collate([pair.target[1:] for pair in pairs], recipe.packed)
    source: tuple[Any, ...] = ()
    if pairs[0].source:
        source = collate([pair.source for pair in pairs], recipe.packed)
    return token_loss(model(tokens, layout, *source), nexts, layout, recipe.smoothing)


def groups(model: nn.Module, encoder_factor: float) -> list[dict[str, Any]]:
    """Returns groups for the optimiser: a pre-trained encoder learns slower than a new decoder.

    Liu & Lapata 2019, "Text Summarization with Pretrained Encoders", section 3.2.
    """
    fast: list[nn.Parameter] = []
    slow: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (fast if name.startswith("decoder.") else slow).append(parameter)
    return [
        {"params": parameters, "factor": factor}
        for parameters, factor in ((fast, 1.0), (slow, encoder_factor))
        if parameters
    ]


# -- The loop -----------------------------------------------------------------------------------


@dataclass
class History:
    """The loss of each step of a run, and the seconds that it took."""

    losses: list[float]
    seconds: list[float]


def train(
    model: nn.Module,
    examples: Sequence[Any],
    loss: Callable[[nn.Module, list[Any], Recipe], Tensor],
    size: Callable[[Any], int],
    recipe: Recipe,
    checkpoint: Path | None = None,
    after_step: Callable[[int, History], None] = lambda step, history: None,
    seconds: float = float("inf"),
) -> History:
    """Trains model in place, for at most recipe.steps steps and `seconds` seconds of training.

    checkpoint: the file to resume from, if it exists, and to write to. It belongs to one recipe,
    of which only `steps` and `checkpoint_every` may change. It is replaced as a whole, so a kill or
    a full disk leaves the previous one. If it is a symbolic link, the run resumes from the file
    that the link points to, leaves that file as it is, and replaces the link; links to folders are
    followed.

    Raises BlockingIOError if another run, in this process or another one, writes to that file now.
    """
    with contextlib.nullcontext() if checkpoint is None else files.locked(checkpoint, wait=False):
        return _train(model, examples, loss, size, recipe, checkpoint, after_step, seconds)


def _train(
    model: nn.Module,
    examples: Sequence[Any],
    loss: Callable[[nn.Module, list[Any], Recipe], Tensor],
    size: Callable[[Any], int],
    recipe: Recipe,
    checkpoint: Path | None,
    after_step: Callable[[int, History], None],
    seconds: float,
) -> History:
    """Does the work of `train`. The caller holds the lock of the checkpoint."""
    random = torch.random.get_rng_state()
    torch.manual_seed(recipe.seed)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(groups(model, recipe.encoder_factor), betas=(0.9, 0.98), eps=1e-9)
    history = History([], [])
    if checkpoint is not None and checkpoint.exists():
        history = _resume(checkpoint, model, optimiser, recipe)
    order = batches([size(example) for example in examples], recipe.tokens, recipe.seed)
    for step in range(1, recipe.steps + 1):
        batch = next(order)
        if step <= len(history.losses):
            continue
        if sum(history.seconds) >= seconds:
            break
        began = time.perf_counter()
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate(step) * group["factor"]
        value = loss(model, [examples[i] for i in batch], recipe)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(parameters, recipe.clip)
        optimiser.step()
        history.losses.append(value.item())
        history.seconds.append(time.perf_counter() - began)
        if checkpoint is not None and step % recipe.checkpoint_every == 0:
            _save(checkpoint, model, optimiser, recipe, history)
        after_step(step, history)
    if checkpoint is not None:
        _save(checkpoint, model, optimiser, recipe, history)
    model.eval()
    torch.random.set_rng_state(random)
    return history


def _save(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe, history: History
) -> None:
    """Writes a checkpoint. The caller holds the lock of the path."""
    document = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "random": torch.random.get_rng_state(),
        "recipe": dataclasses.asdict(recipe),
        "history": dataclasses.asdict(history),
    }
    with files.new_file(path) as file:
        torch.save(document, file)


def _resume(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, recipe: Recipe
) -> History:
    document = torch.load(path, weights_only=True)
    asked = dataclasses.asdict(recipe) | {"steps": 0, "checkpoint_every": 0}
    had = document["recipe"] | {"steps": 0, "checkpoint_every": 0}
    if asked != had:
        wrong_value("recipe", f"that of {path}: {had}", asked, "another folder, or delete it")
    model.load_state_dict(document["model"])
    optimiser.load_state_dict(document["optimiser"])
    torch.random.set_rng_state(document["random"])
    return History(**document["history"])

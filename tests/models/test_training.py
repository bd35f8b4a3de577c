"""Trains on generated tasks: models learn, equally with three attentions, and runs resume."""

import dataclasses
import multiprocessing
import os
import signal

import pytest
import torch

from fused_attention.errors import ArgumentValueError
from fused_attention.models import training
from fused_attention.models.attend import IMPLEMENTATIONS, pad
from fused_attention.models.generate import generate
from fused_attention.models.training import Pair, Recipe, batches, pair_loss, token_loss, train
from fused_attention.models.transformer import Config, Transformer
from training_tasks import BEGIN, END, SYMBOLS, make_pairs, size

pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(attention="fused", **changes):
    torch.manual_seed(0)
    config = Config(2 + SYMBOLS, encoder_layers=1, decoder_layers=1, dim=64, heads=4, hidden=128)
    return Transformer(dataclasses.replace(config, **changes), attention)


RECIPE = Recipe(steps=250, tokens=600, peak=3e-3, warmup=50, smoothing=0.0)


@pytest.mark.parametrize(
    "task, changes",
    [
        pytest.param("copy", {"norm_first": False}, marks=pytest.mark.slow),
        pytest.param("reverse", {}, marks=pytest.mark.slow),
        ("sort", {"positions": "rotary", "kv_heads": 2, "activation": "swiglu", "norm": "rms"}),
    ],
)
def test_it_learns(task, changes):
    model = make_model(**changes)
    history = train(model, make_pairs(task, 4000, seed=1), pair_loss, size, RECIPE)
    assert history.losses[0] > 1.5
    unseen = make_pairs(task, 100, seed=2)
    with torch.no_grad():
        memory = model.encode(*pad([pair.source for pair in unseen]))
    options = {"max_new_tokens": 9, "end": END}
    results = generate(model, [[BEGIN]] * 100, memory, **options)
    right = sum(r == pair.target[1:-1] for r, pair in zip(results, unseen, strict=True))
    print(f"{task}: loss {sum(history.losses[-10:]) / 10:.4f}, {right} of 100 right")
    assert sum(history.losses[-10:]) / 10 < 0.3
    assert right >= 75


def test_a_language_model_learns_to_copy():
    """A decoder alone learns sequences of a source, BEGIN and the source again."""
    examples = [
        Pair([], [*pair.source, *pair.target]) for pair in make_pairs("copy", 4000, 1, longest=3)
    ]
    torch.manual_seed(0)
    config = Config(
        2 + SYMBOLS, 0, 2, dim=64, heads=4, hidden=128, positions="rotary", norm="rms", kv_heads=2
    )
    model = Transformer(config)
    train(model, examples, pair_loss, size, dataclasses.replace(RECIPE, steps=250))
    unseen = make_pairs("copy", 100, 2, longest=3)
    prompts = [[*pair.source, BEGIN] for pair in unseen]
    results = generate(model, prompts, max_new_tokens=8, end=END)
    right = sum(r == pair.source for r, pair in zip(results, unseen, strict=True))
    print(f"{right} of 100 right")
    assert right >= 90


def test_the_same_run_with_three_attentions_gives_the_same_losses():
    """Naive float32 attention sums in another order: the losses may differ by rounding only."""
    losses = {}
    recipe = dataclasses.replace(RECIPE, steps=40)
    for attention in IMPLEMENTATIONS:
        model = make_model(attention, dropout=0.1, kv_heads=2)
        pairs = make_pairs("reverse", 500, seed=1)
        losses[attention] = train(model, pairs, pair_loss, size, recipe).losses
    assert losses["naive"][-1] < 0.9 * losses["naive"][0]
    torch.testing.assert_close(losses["fused"], losses["naive"], atol=0, rtol=2e-4)
    torch.testing.assert_close(losses["sdpa"], losses["naive"], atol=0, rtol=2e-4)


def test_packed_batches_give_the_losses_of_padded_ones():
    losses = []
    for packed in (False, True):
        recipe = dataclasses.replace(RECIPE, steps=12, packed=packed, smoothing=0.1)
        losses.append(train(make_model(), make_pairs("sort", 200, 1), pair_loss, size, recipe))
    torch.testing.assert_close(losses[0].losses, losses[1].losses, atol=0, rtol=1e-4)


def test_a_run_that_was_cut_goes_on_as_if_it_was_not(tmp_path):
    pairs = make_pairs("copy", 300, seed=1)
    recipe = dataclasses.replace(RECIPE, steps=30, checkpoint_every=8)
    whole = make_model(dropout=0.2, attention_dropout=0.2)
    expected = train(whole, pairs, pair_loss, size, recipe).losses

    class Killed(Exception):
        pass

    def kill(step, history):
        if step == 21:
            raise Killed

    path = tmp_path / "run" / "checkpoint.pt"
    with pytest.raises(Killed):
        cut = make_model(dropout=0.2, attention_dropout=0.2)
        train(cut, pairs, pair_loss, size, recipe, path, kill)
    again = make_model(dropout=0.2, attention_dropout=0.2)
    seen = []
    history = train(
        again, pairs, pair_loss, size, recipe, path, lambda step, history: seen.append(step)
    )
    assert seen == list(range(17, 31))  # from the checkpoint of step 16 on
    assert history.losses == expected
    for ours, theirs in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(ArgumentValueError, match="recipe: expected that of"):
        train(again, pairs, pair_loss, size, dataclasses.replace(recipe, seed=1), path)


SHORT = dataclasses.replace(RECIPE, steps=2, tokens=60, checkpoint_every=1)


def train_shortly(path, steps=2, after_step=lambda step, history: None):
    recipe = dataclasses.replace(SHORT, steps=steps)
    pairs = make_pairs("copy", 50, seed=1)
    return train(make_model(), pairs, pair_loss, size, recipe, path, after_step)


def test_a_second_run_on_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    refused = []

    def second(step, history):
        before = path.read_bytes()
        with pytest.raises(BlockingIOError) as error:
            train_shortly(path, steps=3)
        refused.append(str(error.value))
        assert path.read_bytes() == before

    train_shortly(path, after_step=second)
    assert len(refused) == 2
    assert all(f"{path}: another run is writing to it; wait until" in text for text in refused)
    assert len(train_shortly(path, steps=3).losses) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_in_another_process_holds_the_checkpoint_until_it_is_killed(tmp_path):
    path = tmp_path / "checkpoint.pt"
    fork = multiprocessing.get_context("fork")
    held, never = fork.Event(), fork.Event()

    def hold():  # torch's threads do not survive a fork, so this only holds the lock of a run
        with training.files.locked(path, wait=False):
            held.set()
            never.wait(100)

    other = fork.Process(target=hold)
    other.start()
    assert held.wait(100)
    with pytest.raises(BlockingIOError, match="checkpoint.pt: another run"):
        train_shortly(path)
    os.kill(other.pid, signal.SIGKILL)
    other.join(100)
    assert len(train_shortly(path).losses) == 2


def test_a_checkpoint_whose_writing_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train_shortly(path)
    before = path.read_bytes()
    save = torch.save

    def full(document, file):
        save(document, file)
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space left"):
        train_shortly(path, steps=3)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    monkeypatch.undo()
    assert len(train_shortly(path, steps=3).losses) == 3


def test_a_checkpoint_is_not_written_through_a_link(tmp_path):
    """A run goes on from the file behind a link, and puts its own file in the place of the link."""
    path, victim = tmp_path / "run" / "checkpoint.pt", tmp_path / "victim"
    train_shortly(tmp_path / "start.pt")
    start = (tmp_path / "start.pt").read_bytes()
    victim.write_text("of somebody else")
    path.parent.mkdir()
    path.symlink_to(tmp_path / "start.pt")
    (path.parent / "checkpoint.partial").symlink_to(victim)
    assert len(train_shortly(path, steps=3).losses) == 3
    assert victim.read_text() == "of somebody else"
    assert (tmp_path / "start.pt").read_bytes() == start and not path.is_symlink()
    (tmp_path / "link").symlink_to(path.parent)
    seen = []
    train_shortly(tmp_path / "link" / path.name, 4, lambda step, history: seen.append(step))
    assert seen == [4] and (tmp_path / "link").is_symlink()


def test_checkpoints_that_differ_in_their_endings_do_not_meet(tmp_path):
    """The second run writes its checkpoints while the first is in the middle of writing."""
    inner = []

    def save(document, file):
        real_save(document, file)
        if not inner:
            inner.append("begun")
            train_shortly(tmp_path / "run.b")

    real_save, torch.save = torch.save, save
    try:
        train_shortly(tmp_path / "run.a")
    finally:
        torch.save = real_save
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.a", "run.b"]
    for name in ("run.a", "run.b"):
        assert len(train_shortly(tmp_path / name, 3).losses) == 3


def test_a_run_stops_when_its_time_is_over():
    history = train(make_model(), make_pairs("copy", 100, 1), pair_loss, size, RECIPE, seconds=0.2)
    assert 0.2 <= sum(history.seconds) < 5 and len(history.losses) < RECIPE.steps


def test_training_leaves_the_random_numbers_of_others_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    recipe = dataclasses.replace(RECIPE, steps=2)
    train(make_model(), make_pairs("copy", 50, 1), pair_loss, size, recipe)
    torch.manual_seed(5)
    train(make_model(dropout=0.5), make_pairs("copy", 50, 1), pair_loss, size, recipe)
    torch.manual_seed(5)
    assert torch.rand(1) == expected


def test_batches():
    sizes = [1 + (7 * i) % 30 for i in range(500)]
    order = batches(sizes, 120, seed=3)
    seen, padding, count = [], 0, 0
    while len(seen) < 500:
        batch = next(order)
        assert max(sizes[i] for i in batch) * len(batch) <= 120
        padding += sum(max(sizes[j] for j in batch) - sizes[i] for i in batch)
        seen += batch
        count += 1
    assert sorted(seen) == list(range(500))  # every example once
    assert padding < 0.2 * sum(sizes)
    second = [i for _ in range(count) for i in next(order)]
    assert second != seen
    again = batches(sizes, 120, seed=3)
    assert [i for _ in range(count) for i in next(again)] == seen
    assert next(batches([500], 120, 0)) == [0]  # larger than a batch may be


def test_the_schedule():
    recipe = Recipe(peak=2e-3, warmup=100)
    rates = [recipe.learning_rate(step) for step in (1, 50, 100, 400)]
    assert rates == pytest.approx([2e-5, 1e-3, 2e-3, 1e-3])


def test_a_pre_trained_encoder_learns_slower_than_the_decoder():
    model = make_model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    recipe = dataclasses.replace(RECIPE, steps=1, encoder_factor=0.25)
    train(model, make_pairs("copy", 100, seed=1), pair_loss, size, recipe)
    rate = recipe.learning_rate(1)  # also Adam's first step, where there is a gradient
    for name, x in model.state_dict().items():
        if name.endswith("key.bias"):
            continue  # its gradient is zero but for rounding: softmax ignores what all keys share
        moved = (x - before[name]).abs().max().item()
        expected = rate if name.startswith("decoder.") else 0.25 * rate
        assert moved == pytest.approx(expected, rel=0.05), name


def test_padding_is_no_target():
    logits = torch.randn(2, 3, 5)
    targets, layout = pad([[1, 2, 3], [4]])
    expected = torch.stack(
        [-logits[0, i].log_softmax(-1)[t] for i, t in enumerate((1, 2, 3))]
        + [-logits[1, 0].log_softmax(-1)[4]]
    ).mean()
    torch.testing.assert_close(token_loss(logits, targets, layout), expected)
    smooth = token_loss(logits, targets, layout, smoothing=0.1)
    assert smooth != expected
    assert training.collate([[1], [2, 3]], packed=True)[0].tolist() == [1, 2, 3]

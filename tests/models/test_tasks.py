"""Tests the parts of the commands on texts and images made here; nothing is fetched."""

import dataclasses
import json
import wave

import pytest
import torch

from fused_attention.errors import ArgumentValueError
from fused_attention.models import captions, speech, tasks, texts
from fused_attention.models.attend import pad
from fused_attention.models.generate import generate
from fused_attention.models.lstm import LSTMTranslator
from fused_attention.models.tasks import Settings
from fused_attention.models.training import Recipe, pair_loss, train
from fused_attention.tools import cli
from training_tasks import BEGIN, END, SYMBOLS, make_pairs, size

pytestmark = pytest.mark.usefixtures("one_thread")


# -- Texts -------------------------------------------------------------------------------------

SUBJECTS = ["editor", "library", "game", "server", "font", "tool"]
THINGS = ["files", "sounds", "images", "mail", "maps", "tables", "clocks"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Writes a small version of what `fetch descriptions` fetches."""
    root = tmp_path / "descriptions"
    root.mkdir()
    lists = {name: [] for name in ("Packages", "Translation-en", "Translation-fr")}
    for i, (subject, thing) in enumerate((s, t) for s in SUBJECTS for t in THINGS):
        body = f"\n This {subject} is made\n for {thing}.\n .\n It is number {i}."
        lists["Translation-en"].append(
            f"Package: p{i}\nDescription-md5: {i}\nDescription-en: {subject} for {thing}{body}\n"
        )
        if i % 7 != 6:
            lists["Translation-fr"].append(
                f"Package: p{i}\nDescription-md5: {i}\n"
                f"Description-fr: {subject} pour {thing}\n Texte.\n"
            )
        section = "games" if subject == "game" else "net"
        source = f"Source: s{i // 2} (1.0)\n" if i % 2 else f"Source: s{i // 2}\n"
        lists["Packages"].append(
            f"Package: p{i}\n{source}Section: {section}\nDescription-md5: {i}\n"
        )
    for name, records in lists.items():
        (root / name).write_text("\n".join(records))
    (root / "fetched").touch()
    monkeypatch.setenv("FUSED_ATTENTION_CACHE", str(tmp_path))
    return tmp_path


def test_reading_descriptions(cache):
    english = texts.descriptions(cache / "descriptions", "en")
    assert len(english) == 42
    assert texts.paragraphs(english["3"]) == ["This editor is made for mail.", "It is number 3."]
    record = next(texts.records(cache / "descriptions" / "Packages"))
    assert record == {
        "Package": "p0", "Source": "s0", "Section": "net", "Description-md5": "0"
    }  # fmt: skip


def test_what_is_held_out_is_not_in_training(cache, monkeypatch):
    pairs = [texts.Text(f"s{i % 40}", f"t{i}", "ab"[i % 2]) for i in range(200)]
    split = texts._split(pairs + pairs, limit=10)
    assert [sum(x.kind == kind for x in split.held_out) for kind in "ab"] == [10, 10]
    sources, targets = {x.source for x in split.held_out}, {x.target for x in split.held_out}
    assert split.training and len(set(split.training)) == len(split.training)
    assert not any(x.source in sources or x.target in targets for x in split.training)
    assert texts._split(pairs[::-1], limit=10).held_out == split.held_out
    split, names = texts.sections(packages=3)
    assert names == ["net", "games"]
    numbers = [{int(x.source.split()[-1][:-1]) // 2 for x in side} for side in split]
    assert numbers[0] and numbers[1] and not numbers[0] & numbers[1]  # no source package is in both


def test_translation_pairs(cache):
    split = texts.translation("fr")
    assert len(split.held_out) == 36 and split.training == []  # all are held out
    assert texts.Text("editor pour files", "editor for files", "synopsis") in split.held_out


# -- Measures ----------------------------------------------------------------------------------


def test_measures():
    assert tasks.rouge_l("The cat sat", "the cat sat") == 1
    assert tasks.rouge_l("a b c d", "x b d y") == pytest.approx(0.5)
    assert tasks.rouge_l("c + + , library.", "C++ library") == 1
    assert tasks.rouge_l("", "a") == tasks.rouge_l("b", "a") == 0
    assert tasks.word_errors("a b c", "a b c") == (0, 3)
    assert tasks.word_errors("a x c d", "a b c") == (2, 3)
    assert tasks.word_errors("", "a b") == (2, 2)


# -- Models ------------------------------------------------------------------------------------


def test_the_lstm_learns_to_copy_and_a_beam_of_it_is_a_beam():
    torch.manual_seed(0)
    model = LSTMTranslator(2 + SYMBOLS, dim=64, layers=1)
    recipe = Recipe(steps=150, tokens=600, peak=1e-2, warmup=20, smoothing=0.0)
    history = train(model, make_pairs("copy", 4000, 1, longest=4), pair_loss, size, recipe)
    assert history.losses[-1] < 0.3 * history.losses[0]
    unseen = make_pairs("copy", 60, 2, longest=4)
    with torch.no_grad():
        memory = model.encode(*pad([pair.source for pair in unseen]))
    for beams in (1, 3):
        found = generate(model, [[BEGIN]] * 60, memory, max_new_tokens=7, end=END, beams=beams)
        right = sum(r == pair.source for r, pair in zip(found, unseen, strict=True))
        print(f"{beams} beams: {right} of 60 right, loss {history.losses[-1]:.3f}")
        assert right >= 45
    alone = model.encode(torch.tensor([unseen[0].source]))
    (one,) = generate(model, [[BEGIN]], alone, max_new_tokens=7, end=END, beams=3)
    assert one == found[0]  # padding and other sequences influence nothing


def test_drawn_images():
    image, again = captions.draw_many(1, seed=3)[0], captions.draw_many(1, seed=3)[0]
    assert torch.equal(image.pixels, again.pixels) and image.caption == again.caption
    for image in captions.draw_many(40, seed=4):
        assert captions.decode_caption(captions.encode_caption(image.caption)) == image.caption
        words = image.caption.split()
        first, second = (torch.tensor(captions.COLOURS[words[i]]) for i in (1, -2))
        places = [
            (image.pixels == colour[:, None, None]).all(0).nonzero().double().mean(0)
            for colour in (first, second)
        ]
        if words[1] != words[-2]:
            axis = 0 if "above" in image.caption else 1
            assert places[0][axis] < places[1][axis] - 8


def test_captions_are_learnt_by_a_run_that_is_saved(tmp_path):
    """Checks the loss only: the captions get right after some hundred steps more."""
    settings = Settings("caption", steps=20, tokens=256, peak=3e-3, dropout=0.0, examples=100)
    results = tasks.run(settings, tmp_path)
    assert results == json.loads((tmp_path / "results.json").read_text()) | {
        "results": results["results"]
    }
    assert sum(results["losses"][-4:]) < 0.7 * sum(results["losses"][:4])
    assert len(results["results"]["samples"]) == 10
    again = tasks.run(settings, tmp_path)  # nothing is left to do
    assert again["losses"] == results["losses"]


def test_a_second_run_in_a_directory_is_refused(tmp_path):
    """It is refused, even with other settings, before it replaces any file of the first run."""
    settings = Settings("caption", steps=1, tokens=64, examples=4, dropout=0.0)
    contents = {}

    def second(step, history):
        contents.update({path: path.read_bytes() for path in tmp_path.iterdir()})
        with pytest.raises(BlockingIOError, match="settings.json: another run is writing to it"):
            tasks.run(dataclasses.replace(settings, steps=2, dropout=0.5), tmp_path)

    tasks.run(settings, tmp_path, after_step=second)
    assert (tmp_path / "settings.json").read_bytes() == contents[tmp_path / "settings.json"]
    assert json.loads((tmp_path / "settings.json").read_text())["steps"] == 1
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint.pt", "results.json", "settings.json"]


def test_wrong_tasks(tmp_path):
    with pytest.raises(ArgumentValueError, match="task: expected one of translate, summarize"):
        tasks.prepare(Settings("juggle"))
    with pytest.raises(FileNotFoundError, match="no run"):
        tasks.load_run(tmp_path)


def test_translation_from_train_to_page(cache, tmp_path, capsys, monkeypatch):
    """Runs the commands on 42 packages."""
    for module in ("tokenizers", "sacrebleu", "matplotlib"):
        pytest.importorskip(module)
    monkeypatch.setattr(texts, "_split", lambda pairs, limit: texts.Split(pairs, pairs[:4]))
    out = str(tmp_path / "run")
    train_it = ["train", "translate", "--from", "fr", "--out", out, "--steps", "30", "--dropout"]
    assert cli.main([*train_it, "0"]) == 0
    said = capsys.readouterr().out
    assert "30 steps in" in said and "synopsis: bleu" in said and f"saved in {out}" in said
    page, plot = tmp_path / "page.html", tmp_path / "map.png"
    show = ["--page", str(page), "--heat-map", str(plot)]
    arguments = ["translate", "editor pour files", "game pour maps", "--run", out, *show]
    assert cli.main(arguments) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert "encoder.blocks.2.self_attention" in page.read_text() and plot.stat().st_size > 1000
    with pytest.raises(SystemExit) as stopped:
        cli.main(["translate", "x", "--run", str(tmp_path)])
    assert stopped.value.code == 1 and "no run" in capsys.readouterr().err


def test_what_was_not_fetched_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FUSED_ATTENTION_CACHE", str(tmp_path))
    for command in (["embed", "x"], ["generate", "x"], ["train", "classify"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main([*command, *(["--out", str(tmp_path / "o")] if "train" in command else [])])
        assert stopped.value.code == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert "run `python -m fused_attention fetch" in line
    assert cli.main(["fetch"]) == 0
    assert "whisper" in capsys.readouterr().out


def test_recordings(tmp_path):
    def write(name, channels=1, rate=16000, seconds=0.5):
        with wave.open(str(tmp_path / name), "wb") as file:
            file.setnchannels(channels)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(b"\x00\x40" * int(rate * seconds) * channels)
        return tmp_path / name

    sound = speech.read_wav(write("good.wav"))
    assert sound.shape == (8000,) and sound.unique().tolist() == [0.5]
    for options, message in (
        ({"channels": 2}, "one channel of 16 bits at 16000 Hz"),
        ({"rate": 8000}, "one channel of 16 bits at 16000 Hz"),
        ({"seconds": 31}, "at most 30 seconds, got 31.0"),
    ):
        with pytest.raises(ArgumentValueError, match=message):
            speech.read_wav(write("bad.wav", **options))
    (tmp_path / "text.wav").write_text("not a sound")
    with pytest.raises(OSError, match="text.wav"):
        speech.read_wav(tmp_path / "text.wav")

"""Trains the reference transformer in long runs, one after the other, and stores two tables.

    python benchmarks/train_models.py            # about two and a half hours on two free cores
    python benchmarks/train_models.py --quick    # three steps of each: does it run?
    python benchmarks/train_models.py --page     # only writes docs/training.md from these tables

The runs are translation with three seeds, with fused attention and PyTorch's; the LSTM, for the
seconds of the quickest of these; French; twenty minutes of translation; transfer learning with and
without pre-trained weights, from 100 examples to all 4100; summaries; a language model; captions;
Whisper's word error rate on ten recordings beside transformers' own implementation. The script
fetches what it needs. It resumes interrupted runs from their directories below `runs/`. Figures go
to results/training.csv, samples to results/training_samples.csv.
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import torch

import result_tables
from fused_attention.models import files, speech
from fused_attention.models.fetch import fetch
from fused_attention.models.pretrained import load_whisper, read_ctranslate2_whisper
from fused_attention.models.tasks import Settings, run, word_errors
from fused_attention.tools import console
from fused_attention.tools.benchmark.harness import machine

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "training.csv"
SAMPLES = HERE / "results" / "training_samples.csv"
PAGE = HERE.parent / "docs" / "training.md"


WORD_ERRORS = "word_error_rate of"  # the prefix of the columns of error rates
Row = result_tables.Row


def plan(quick: bool) -> dict[str, tuple[Settings, float]]:
    """Returns by name the settings of each run, and the most seconds of its training."""
    translate = Settings("translate", dropout=0.0)  # 860 steps
    runs = {}
    for attention in ("fused", "sdpa"):
        for seed in range(3):
            settings = dataclasses.replace(translate, attention=attention, seed=seed)
            runs[f"translate-{attention}-{seed}"] = (settings, math.inf)
    lstm = dataclasses.replace(translate, model="lstm", steps=100_000)
    runs["translate-lstm"] = (lstm, math.nan)  # as long as the quickest of these, see main
    runs["translate-fr"] = (dataclasses.replace(translate, language="fr"), math.inf)
    long = dataclasses.replace(translate, steps=100_000, dropout=0.1)
    runs["translate-20-minutes"] = (long, 1200.0)
    for examples, steps in ((100, 200), (400, 200), (1600, 400), (None, 400)):
        for pretrained in (True, False):
            name = f"classify-{examples or 'all'}-{'pretrained' if pretrained else 'random'}"
            tuning = Settings("classify", examples=examples, steps=steps, pretrained=pretrained)
            runs[name] = (tuning, math.inf)
    summarize = Settings("summarize")
    runs["summarize-pretrained"] = (dataclasses.replace(summarize, pretrained=True), math.inf)
    runs["summarize-random"] = (summarize, math.inf)
    runs["lm"] = (Settings("lm"), math.inf)
    runs["caption"] = (Settings("caption", tokens=320, steps=5000), math.inf)
    if quick:
        small = {"steps": 3, "examples": 100}
        runs = {name: (dataclasses.replace(s, **small), t) for name, (s, t) in runs.items()}
    return runs


def word_error_rates() -> tuple[Row, list[Row]]:
    """Returns the error rates of ours and of transformers' on the ten recordings, in lower case
    without punctuation, and the texts."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    recordings = fetch("speech")
    path = fetch("whisper")
    model, tokenizer, lists = load_whisper(path)
    content = b"".join(part.read_bytes() for part in sorted(path.glob("model.bin.part*")))
    config, state = read_ctranslate2_whisper(content)
    theirs = WhisperForConditionalGeneration(WhisperConfig(**config)).eval()
    theirs.load_state_dict({name: x.float() for name, x in state.items()}, strict=False)
    theirs.tie_weights()
    errors = {"fused_attention": [0, 0], "transformers": [0, 0]}
    texts = []
    for transcription in (
        recordings / "librivox" / "transcription",
        recordings / "cards" / "cards.transcription",
    ):
        for line in transcription.read_text().splitlines():
            words, _, name = line.removeprefix("<s> ").rpartition(" </s> (")
            sound = speech.read_wav(transcription.parent / f"{name.rstrip(')')}.wav")
            (ours,) = speech.hear(model, lists, [sound])
            generated = theirs.generate(
                speech.spectra([sound]),
                decoder_input_ids=torch.tensor([speech.PROMPT]),
                suppress_tokens=lists["suppress_ids"],
                begin_suppress_tokens=lists["suppress_ids_begin"],
                eos_token_id=speech.END,
                do_sample=False,
                max_new_tokens=200,
            )[0].tolist()
            heard = {"fused_attention": ours, "transformers": generated}
            said = {who: tokenizer.decode(tokens) for who, tokens in heard.items()}
            for who, text in said.items():
                wrong, count = word_errors(plain(text), plain(words))
                errors[who][0] += wrong
                errors[who][1] += count
                texts.append({"right": words.strip(), "by": who, "answer": text})
    rates = {f"{WORD_ERRORS} {who}": wrong / count for who, (wrong, count) in errors.items()}
    return rates | {"words": errors["transformers"][1]}, texts


def plain(text: str) -> str:
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return " ".join(kept.split())


# -- The page ------------------------------------------------------------------------------

HEAD = """# What the reference transformer learned

Generated by `python benchmarks/train_models.py --page` from `benchmarks/results/training.csv` and
`training_samples.csv`, on two cores of {cpu}, float32. The texts are translations of Debian's
package descriptions (synopses) and of LibreOffice's interface, see
`python -m fused_attention fetch`; held-out pairs are never seen in training.

## Translation

An encoder-decoder of 3 + 3 layers of 256, 860 steps of about 1600 tokens, from German; BLEU in
lower case on 200 held-out pairs of each kind. Numbers are seeds. `lstm` is a sequence-to-sequence
model of torch.nn.LSTM on the same batches, for the {seconds:.0f} seconds that the quickest of these
took; `fr` is from French, whose data have no interface.
"""


def table(rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(str(x).replace("|", "\\|") for x in row) + " |" for row in rows]
    return [lines[0], "| --- " * len(rows[0]) + "|", *lines[1:], ""]


def quickest(figures: dict[str, Row]) -> float:
    """Returns the seconds of the quickest of the equal runs: others may have slowed the rest."""
    kinds = ("translate-fused-", "translate-sdpa-")
    own = [float(x["training_seconds"]) for name, x in figures.items() if name[:-1] in kinds]
    return min(own, default=300.0)


def page(about: Row, figures: dict[str, Row], samples: dict[str, list[Row]]) -> str:
    """Returns the page in Markdown, from the runs that there are."""
    lines = [HEAD.format(cpu=about["cpu"], seconds=quickest(figures))]
    rows: list[list[Any]] = [["run", "steps", "interface", "synopses"]]

    def bleu(name: str) -> list[float]:  # nan: French has no pairs of the interface
        found = figures[name]
        return [float(found.get(f"{k} bleu") or "nan") for k in ("interface", "synopsis")]

    def shown(scores: list[float]) -> list[str]:
        return ["" if math.isnan(x) else f"{x:.1f}" for x in scores]

    def sample_table(first: str, name: str, title: str, count: int) -> list[str]:
        texts = [[x["given"], x["right"], x["answer"]] for x in samples.get(name, [])[:count]]
        return table([[first, "right", title], *texts])

    translations = [name for name in figures if name.startswith("translate-")]
    for name in translations:
        title = name.removeprefix("translate-")
        rows.append([title, figures[name]["steps"], *shown(bleu(name))])
    for attention in ("fused", "sdpa"):
        seeds = [bleu(n) for n in translations if n.startswith(f"translate-{attention}-")]
        if seeds:
            means = [statistics.mean(x) for x in zip(*seeds, strict=True)]
            rows.append([f"mean of {attention}", "", *shown(means)])
    lines += table(rows)
    for name in ("translate-20-minutes", "translate-fused-0"):
        if name in figures:
            lines += sample_table("German", name, name.removeprefix("translate-"), 8)
            break

    lines += ["## Transfer", ""]
    lines += ["The section of a package, one of ten, from its description; the packages have other"]
    lines += ["sources than those of training. `pretrained` is all-MiniLM-L6-v2, `random` the same"]
    lines += ["model from random weights: what was learned before counts for the more, the fewer"]
    lines += ["the examples are.", ""]
    rows = [["examples", "steps", "pretrained", "random", "difference"]]
    for count in (100, 400, 1600, "all"):
        pair = [figures.get(f"classify-{count}-{kind}") for kind in ("pretrained", "random")]
        if all(pair):
            accuracies = [100 * float(run["accuracy"]) for run in pair]
            shares = [f"{share:.1f} %" for share in accuracies]
            difference = f"{accuracies[0] - accuracies[1]:.1f}"
            rows.append([pair[0]["examples"], pair[0]["steps"], *shares, difference])
    lines += table(rows)

    summaries = [name for name in figures if name.startswith("summarize-")]
    rows = [["run", "steps", "ROUGE-L", "of the first sentence"]]
    for name in summaries:
        run, keys = figures[name], ("rouge_l", "rouge_l_of_first_sentence")
        scores = [f"{float(run[k]):.3f}" for k in keys]
        rows.append([name.removeprefix("summarize-"), run["steps"], *scores])
    if summaries:
        lines += ["## Summaries", ""]
        lines += ["Of descriptions, to synopses, by beam search. `pretrained` is all-MiniLM-L6-v2"]
        lines += ["with a fresh decoder, `random` a model of 3 + 3 layers.", "", *table(rows)]
        name = summaries[0]
        lines += sample_table("description", name, name.removeprefix("summarize-"), 6)
    if "lm" in figures:
        perplexity = float(figures["lm"]["perplexity"])
        lines += ["## Language model", ""]
        lines += [f"Perplexity of a token of held-out paragraphs: {perplexity:.1f}."]
        lines += [f"{figures['lm']['steps']} steps.", ""]
    if "caption" in figures:
        share = float(figures["caption"]["exact"])
        lines += ["## Captions", "", f"Of 200 new drawn images, {share:.1%} are described rightly."]
        lines += [f"{figures['caption']['steps']} steps.", ""]
    if "whisper" in figures:
        run = figures["whisper"]
        rates = ", ".join(
            f"{100 * float(rate):.1f} % ({key.removeprefix(WORD_ERRORS).strip()})"
            for key, rate in run.items()
            if key.startswith(WORD_ERRORS)
        )
        lines += ["## Speech", ""]
        recordings = f"ten recordings, {run['words']} words"
        lines += [f"Word error rate of Whisper base on {recordings}: {rates}."]
    return "\n".join(lines) + "\n"


def load() -> tuple[Row, dict[str, Row], dict[str, list[Row]]]:
    """Returns the machine, figures by run, and samples by run."""
    about, rows = result_tables.read(RESULTS)
    samples = result_tables.read(SAMPLES)[1] if SAMPLES.exists() else []
    return about, {row["run"]: row for row in rows}, result_tables.by("run", samples)


def save_page() -> None:
    with files.locked(PAGE):  # so that the last of several scripts reads all results
        files.write_text(PAGE, page(*load()))


def flat(found: dict[str, Any], prefix: str = "") -> Row:
    """Flattens results into columns: {"synopsis": {"bleu": 26.7}} is {"synopsis bleu": 26.7}."""
    row: Row = {}
    for name, value in found.items():
        if isinstance(value, dict):
            row |= flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            row[prefix + name] = " ".join(map(result_tables.text_of, value))
        else:
            row[prefix + name] = value
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three steps of each")
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--only", help="only runs whose name begins with this")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="their directories")
    options = parser.parse_args()
    if options.page:
        save_page()
        return
    for name in ("descriptions", "interface", "minilm", "whisper", "speech"):
        print(fetch(name))
    figures: dict[str, Row] = {}
    if RESULTS.exists() and not options.quick:
        figures = load()[1]
    about = machine() | {"threads": torch.get_num_threads()}

    def save(name: str, found: Row, samples: list[Row]) -> None:
        """Saves results of a run; those that another script has saved meanwhile stay."""
        figures[name] = found
        if not options.quick:
            result_tables.update(RESULTS, about, [{"run": name, **found}], "run")
            if samples:
                rows = [{"run": name, **sample} for sample in samples]
                result_tables.update(SAMPLES, about, rows, "run")
            figures.update(load()[1])
            save_page()

    for name, (settings, seconds) in plan(options.quick).items():
        if options.only and not name.startswith(options.only):
            continue
        if math.isnan(seconds):
            seconds = quickest(figures)
        directory = options.runs / ("quick" if options.quick else "") / name
        with console.progress(settings.steps) as step:
            found = run(
                settings,
                directory,
                seconds,
                lambda number, history: step(f"step {number}, loss {history.losses[-1]:.3f}"),
            )
        results = found.pop("results")
        samples = results.pop("samples", [])
        losses = found.pop("losses")
        print(
            name,
            found["steps"],
            "steps,",
            round(found["training_seconds"]),
            "s:",
            results,
            flush=True,
        )
        row = flat({**found, **results, "losses_every_20": losses[::20]})
        columns = ("given", "right", "answer")  # the images of captions are no texts
        save(name, row, [dict(zip(columns[-len(x) :], x, strict=True)) for x in samples])
    if not options.only or options.only == "whisper":
        found, texts = word_error_rates()
        print("whisper:", found)
        save("whisper", found, texts)


if __name__ == "__main__":
    main()

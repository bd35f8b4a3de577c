"""The commands that use a transformer: fetch, train, translate, summarize, generate, transcribe,
embed. `cli.py` has the other commands. Imports that take long are delayed until a command runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..models.attend import IMPLEMENTATIONS
from ..models.fetch import SOURCES
from .console import write_json

NEEDS = "pip install 'fused_attention[models]'"
TASK_NAMES = ("translate", "summarize", "lm", "classify", "caption")


class CommandError(Exception):
    """Something is missing: the command prints one line and exits with 1."""


def guarded(command: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Turns the error of a missing module or file into a CommandError of one line."""

    def run(arguments: argparse.Namespace) -> int:
        try:
            return command(arguments)
        except ModuleNotFoundError as error:
            raise CommandError(f"no module {error.name!r}: {NEEDS}") from None
        except OSError as error:
            raise CommandError(str(error)) from None

    return run


# -- fetch and train ---------------------------------------------------------------------------


def fetch_sources(arguments: argparse.Namespace) -> int:
    from ..models.fetch import fetch

    if not arguments.names:
        for name, source in SOURCES.items():
            print(f"{name:<14}{source.about}")
    for name in arguments.names:
        print(f"{name}: {SOURCES[name].about}", flush=True)
        print(f"{'':{len(name)}}  {fetch(name)}")
    return 0


def train_task(arguments: argparse.Namespace) -> int:
    from ..models.tasks import Settings, run
    from . import console

    settings = Settings(
        arguments.task,
        language=arguments.language,
        model=arguments.model,
        pretrained=arguments.pretrained,
        attention=arguments.attention,
        seed=arguments.seed,
        steps=arguments.steps,
        tokens=arguments.tokens,
        peak=arguments.peak,
        dropout=arguments.dropout,
        packed=arguments.packed,
        examples=arguments.examples,
    )
    out = arguments.out or Path("runs") / arguments.task
    with console.progress(settings.steps) as step:
        shown = 0

        def after_step(number: int, history: Any) -> None:
            nonlocal shown
            for _ in range(number - shown):  # more than one step if a run is resumed
                step(f"step {number}, loss {history.losses[-1]:.3f}")
            shown = number

        results = run(settings, out, arguments.seconds, after_step)
    print(
        f"{results['steps']} steps in {results['training_seconds']:.0f} s,"
        f" {results['parameters'] / 1e6:.1f} M parameters, loss {results['loss']:.3f}"
    )
    for name, value in results["results"].items():
        if name == "samples":
            for sample in value:
                print("", *sample, sep="\n  ")
        elif isinstance(value, dict):
            print(f"{name}:", ", ".join(f"{key} {x:.3g}" for key, x in value.items()))
        else:
            print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(f"saved in {out}")
    return 0


# -- Using a trained model -----------------------------------------------------------------------


def write_with_run(arguments: argparse.Namespace) -> int:
    """Runs the commands translate and summarize."""
    from ..models.tasks import ends, load_run, write

    model, tokenizer, _ = load_run(arguments.run_directory, arguments.attention)
    begin, end = ends(tokenizer)
    written = write(model, tokenizer, arguments.texts, begin, end, beams=arguments.beams)
    print(*written, sep="\n")
    if arguments.page or arguments.heat_map:
        _show_attention(model, tokenizer, arguments, written[0], begin, end)
    return 0


def _show_attention(
    model: Any, tokenizer: Any, arguments: argparse.Namespace, written: str, begin: int, end: int
) -> None:
    """Draws what each written token of the first text attended to."""
    import torch

    from ..models.maps import attention_maps
    from ..models.pictures import View, attention_page, heat_map, make_views
    from ..models.tasks import encode

    source = [*encode(tokenizer, arguments.texts[0]), end]
    target = [*encode(tokenizer, written), end]
    # The query that predicts a token is at the position before it.
    inputs = torch.tensor([[begin, *target[:-1]]])
    maps = attention_maps(model, inputs, None, torch.tensor([source]))
    read, said = ([tokenizer.id_to_token(token) for token in side] for side in (source, target))
    views = make_views(maps, read, said)
    if arguments.page:
        Path(arguments.page).write_text(attention_page(views, arguments.texts[0]))
    if arguments.heat_map:
        cross = [view for view in views if "cross" in view.name]
        weights = torch.stack([view.weights for view in cross]).mean(0)
        title = "cross attention, mean of layers and heads"
        heat_map(View(title, weights, said, read), Path(arguments.heat_map))


def generate_text(arguments: argparse.Namespace) -> int:
    import torch

    from ..models.fetch import directory
    from ..models.generate import generate
    from ..models.pretrained import chat_prompt, load_smollm2
    from ..models.tasks import encode, load_run
    from ..models.texts import BEGIN, END

    if arguments.run_directory:
        model, tokenizer, _ = load_run(arguments.run_directory, arguments.attention)
        prompt, end = [BEGIN, *encode(tokenizer, arguments.text)], END
    else:
        model, tokenizer = load_smollm2(directory("smollm2"), arguments.attention)
        text = arguments.text if arguments.plain else chat_prompt([("user", arguments.text)])
        prompt, end = tokenizer.encode(text).ids, tokenizer.token_to_id("<|im_end|>")
    (new,) = generate(
        model,
        [prompt],
        max_new_tokens=arguments.tokens,
        end=end,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        beams=arguments.beams,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    print(tokenizer.decode(new))
    return 0


def transcribe(arguments: argparse.Namespace) -> int:
    from ..models.fetch import directory
    from ..models.pretrained import load_whisper
    from ..models.speech import align_words, hear, read_wav

    model, tokenizer, lists = load_whisper(directory("whisper"), arguments.attention)
    for path in arguments.files:
        sound = read_wav(path)
        tokens = hear(model, lists, [sound])[0]
        print(tokenizer.decode(tokens).strip(), flush=True)
    if arguments.alignment:
        align_words(model, tokenizer, lists, sound, tokens, Path(arguments.alignment))
    return 0


def embed(arguments: argparse.Namespace) -> int:
    import torch
    import torch.nn.functional as F

    from ..models.fetch import directory
    from ..models.pretrained import load_minilm
    from ..models.tasks import mean_of_hidden

    model, tokenizer = load_minilm(directory("minilm"), arguments.attention)
    with torch.no_grad():
        tokens = [tokenizer.encode(text).ids for text in arguments.texts]
        embeddings = F.normalize(mean_of_hidden(model, tokens), dim=-1)
    if arguments.json:
        rows = zip(arguments.texts, embeddings.tolist(), strict=True)
        write_json(arguments.json, {"embeddings": [{"text": t, "embedding": e} for t, e in rows]})
    similarity = embeddings @ embeddings.T
    for i, text in enumerate(arguments.texts):
        print(" ".join(f"{x:6.3f}" for x in similarity[i].tolist()), text)
    return 0


# -- The parsers -------------------------------------------------------------------------------


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected an int >= 1, got {text!r}")
    return int(text)


def add_commands(commands: Any) -> None:
    """Adds the commands to the subparsers of `cli.py`."""

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int]) -> Any:
        made = commands.add_parser(name, help=help)
        made.set_defaults(run=guarded(run))
        return made.add_argument

    def add_attention(add: Any) -> None:
        add("--attention", choices=IMPLEMENTATIONS, default="fused", help="how it is computed")

    add = command("fetch", "downloads models and texts; without a name, lists them", fetch_sources)
    add("names", nargs="*", choices=[*SOURCES, []], metavar="NAME")

    add = command("train", "trains a model on real texts or on drawn images", train_task)
    add("task", choices=TASK_NAMES)
    add("--out", type=Path, metavar="DIR", help="directory of the run; default: runs/TASK")
    add("--from", dest="language", choices=("de", "fr"), default="de", help="translate: from")
    add("--model", choices=("transformer", "lstm"), default="transformer", help="for translate")
    add("--pretrained", action="store_true", help="summarize, classify: start from MiniLM")
    add_attention(add)
    add("--seed", type=int, default=0)
    add("--steps", type=positive, default=860)
    add("--seconds", type=float, default=math.inf, help="training time, at most")
    add("--tokens", type=positive, default=1600, help="per batch, padding included")
    add("--peak", type=float, help="the largest learning rate; default: the task's")
    add("--dropout", type=float, default=0.1)
    add("--packed", action="store_true", help="batches without padding")
    add("--examples", type=positive, help="training examples, at most; for a trial")

    for name, verb in (("translate", "translates"), ("summarize", "summarizes")):
        add = command(name, f"{verb} texts with the model of `train {name}`", write_with_run)
        add("texts", nargs="+", metavar="TEXT")
        where = Path("runs") / name
        add("--run", dest="run_directory", type=Path, default=where, metavar="DIR")
        add("--beams", type=positive, default=4)
        add("--page", metavar="HTML", help="also a page to browse the attention of the first text")
        add("--heat-map", metavar="PNG", help="also draw its cross attention")
        add_attention(add)

    add = command("generate", "answers or goes on with a text (SmolLM2, or a run)", generate_text)
    add("text", metavar="TEXT")
    add("--run", dest="run_directory", type=Path, metavar="DIR", help="a run of `train lm`")
    add("--plain", action="store_true", help="go on with the text, instead of answering it")
    add("--tokens", type=positive, default=100, help="new tokens, at most")
    add("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    add("--top-k", type=positive)
    add("--top-p", type=float, default=1.0)
    add("--beams", type=positive, default=1)
    add("--seed", type=int, default=0)
    add_attention(add)

    add = command("transcribe", "writes what is said in WAV files (Whisper base)", transcribe)
    add("files", nargs="+", metavar="WAV", help="16 kHz, 16 bits, one channel, up to 30 seconds")
    add("--alignment", metavar="PNG", help="also draw when each token of the last file was said")
    add_attention(add)

    add = command("embed", "shows how similar sentences are (all-MiniLM-L6-v2)", embed)
    add("texts", nargs="+", metavar="TEXT")
    add("--json", metavar="FILE", help="also write the embeddings")
    add_attention(add)

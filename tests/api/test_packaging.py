"""Builds the sdist and from it the wheel, installs that in a clean environment, and inspects both.

Nothing here needs the network: every build uses the setuptools and the torch that run the tests.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from paths import DATA, ROOT
from torch_symbols import torch_symbols

TORCH_SYMBOLS = DATA / "torch_symbols.txt"

pytestmark = [
    pytest.mark.serial,
    pytest.mark.timeout(7200),  # minutes of compiling on a quiet machine
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="needs the source tree, not only the tests"
    ),
]


def run(*command, cwd, variables=None, **kwargs) -> str:
    """Returns the command's output, which the assertion shows if the command fails."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "FUSED_ATTENTION"))}
    env |= variables or {}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


def pip(*arguments, cwd, python=sys.executable, **options) -> str:
    isolated = ["--isolated", "--disable-pip-version-check"]
    command = (sys.executable, "-m", "pip", "--python", python, *isolated, *arguments)
    return run(*command, cwd=cwd, **options)


def clean_environment(directory: Path, *, with_torch: bool) -> tuple[Path, Path]:
    """Returns (python, site-packages) of a new environment, which sees torch if `with_torch`."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    purelib = Path(
        run(
            python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=directory
        ).strip()
    )
    if with_torch:
        # A directory that a .pth file names comes after site-packages, and .pth files inside it (of
        # an editable install, say) are not read, so a fused_attention there does no harm.
        (purelib / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    return python, purelib


def files_below(directory: Path) -> set[Path]:
    return {path.relative_to(directory) for path in directory.rglob("*")}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    egg_info = ["egg_info", "--egg-base", out]
    run(sys.executable, "setup.py", "--quiet", *egg_info, "sdist", "-d", out, cwd=ROOT)
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def source_tree(sdist, tmp_path_factory) -> Path:
    """The unpacked sdist."""
    out = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(out)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(source_tree, tmp_path_factory, pytestconfig) -> Path:
    """Builds the wheel in the unpacked sdist; the objects stay in `source_tree / "build"`. Without
    --full the wheel has one instruction set, since each takes a minute to compile."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["--no-build-isolation", "--no-deps", "--no-index"]
    isas = {} if pytestconfig.getoption("--full") else {"FUSED_ATTENTION_ISAS": "baseline"}
    pip("wheel", *options, "--wheel-dir", out, source_tree, cwd=out, variables=isas)
    (path,) = out.glob("*.whl")
    return path


CALL = """
import torch, fused_attention
from fused_attention import _native
q, k, v = (torch.randn(1, 2, 17, 8) for _ in range(3))
out = fused_attention.attention(q, k, v, causal="top_left", backend="cpu")
expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(out, expected)
import fused_attention.tools.benchmark.bench, fused_attention.kernels
print(fused_attention.__file__, fused_attention.kernels.__file__, _native.__file__, sep="\\n")
print(fused_attention.__version__, _native.build_info()["version"], sep="\\n")
"""


def test_wheel_of_the_sdist_installs_works_and_uninstalls(wheel, tmp_path):
    python, purelib = clean_environment(tmp_path / "clean", with_torch=True)
    before = files_below(purelib)
    pip("install", "--no-index", "--no-deps", wheel, cwd=tmp_path, python=python)

    *modules, version, native_version = run(
        python, "-W", "ignore", "-c", CALL, cwd=tmp_path
    ).split()
    for module in modules:
        assert Path(module).is_relative_to(purelib), f"{module} is not the installed one"
    assert version == native_version == wheel.name.split("-")[1]

    pip("uninstall", "--yes", "fused_attention", cwd=tmp_path, python=python)
    assert files_below(purelib) == before


def test_wheel_ships_types_and_licence_and_no_sources(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fused_attention/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    assert not [name for name in names if name.endswith((".cpp", ".h", ".inl"))]
    tops = {name.split("/")[0] for name in names}
    assert len(tops) == 2 and "fused_attention" in tops, f"top-level names in the wheel: {tops}"


def test_sdist_ships_every_source(source_tree):
    suffixes = {".py", ".cpp", ".h", ".inl", ".txt"}
    for top in ("csrc", "kernels", "python", "tests", "benchmarks"):
        for path in (ROOT / top).rglob("*"):
            if (
                path.suffix in suffixes
                and ".egg-info" not in str(path)
                and "results" not in str(path)
            ):
                assert (source_tree / path.relative_to(ROOT)).exists(), f"{path} is missing"


def objects(source_tree: Path) -> dict[str, Path]:
    found = (source_tree / "build").glob("native-*/csrc/cpu/kernels_*.o")
    return {path.stem: path for path in found}


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_kernel_objects_define_no_weak_symbols(wheel, source_tree, pytestconfig):
    """The linker could keep only the AVX-512 copy of an inline function, for every CPU."""
    compiled = objects(source_tree)
    cpu = source_tree / "csrc" / "cpu"
    isas = {path.stem.removeprefix("simd_") for path in cpu.glob("simd_*.inl")}
    sources = {path.stem for path in cpu.glob("kernels_*.cpp")}
    baseline = {f"{source}-baseline" for source in sources}
    everything = {f"{source}-{isa}" for source in sources for isa in isas}
    assert baseline <= set(compiled) <= everything
    if not pytestconfig.getoption("--full"):  # also check what `make build` compiled
        compiled = objects(ROOT) | compiled
    elif sysconfig.get_platform() == "linux-x86_64":
        emulated = {f"{source}-amx_emulated" for source in sources}  # these are for tests
        assert set(compiled) == everything - emulated
    for path in compiled.values():
        lines = run("nm", "--demangle", "--defined-only", path, cwd=source_tree).splitlines()
        assert lines, f"{path.name} defines nothing"
        weak = [line for line in lines if re.search(r"\s[WwVvu]\s", line) and "DW.ref." not in line]
        assert not weak, f"{path.name} defines weak symbols:\n" + "\n".join(weak)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
def test_torch_symbols_are_those_committed(wheel, tmp_path):
    """The library uses only torch's stable C functions, so no upgrade gives "undefined symbol".

    If a new symbol is used, check that it is a stable one, then run:
    python tests/helpers/torch_symbols.py > tests/data/torch_symbols.txt
    """
    (member,) = [n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".so")]
    library = Path(zipfile.ZipFile(wheel).extract(member, tmp_path))
    used = torch_symbols(library)
    assert "torch_parallel_for" in used, "the filter took everything away"
    unknown = used - set(TORCH_SYMBOLS.read_text().split())
    assert not unknown, f"not in {TORCH_SYMBOLS.name}: {sorted(unknown)}"


@pytest.mark.parametrize("command", [["build_ext"], ["dist_info"]], ids=" ".join)
def test_without_torch_the_build_stops_with_one_line(source_tree, tmp_path, command):
    python, purelib = clean_environment(tmp_path / "bare", with_torch=False)
    setuptools = Path(importlib.util.find_spec("setuptools").origin).parent
    for path in (*setuptools.parent.glob("setuptools*"), setuptools.parent / "_distutils_hack"):
        (purelib / path.name).symlink_to(path)
    done = subprocess.run(
        [python, "setup.py", "--quiet", *command],
        cwd=source_tree,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("fused_attention: ") and "pip install 'torch>=2.10'" in line

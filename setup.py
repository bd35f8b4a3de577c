"""Builds the shared object, fused_attention/_native*.so; the rest is in pyproject.toml.

The operators, the CPU kernels of every instruction set, their dispatch and the introspection module
are compiled into one library. Each instruction set is one row of ISAS: one source file with its own
flags. A unit is compiled again only when its command line or a file it includes has changed, so
`python setup.py build_ext --inplace` is quick after an edit.

PyTorch is used as it is installed and never downloaded: only its headers and libraries are needed,
so it is found on the path and not imported. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are respected.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

# Paths are relative to this directory: no path of the build machine gets into the library.
os.chdir(Path(__file__).resolve().parent)
CSRC = Path("csrc")
OBJECTS = Path(f"build/objects-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
VERSION = re.findall(
    r'^__version__ = "(.+)"$', Path("python/fused_attention/_version.py").read_text(), re.MULTILINE
)[0]


@dataclass(frozen=True)
class Isa:
    """One instruction set: csrc/cpu/isa_<name>.cpp, its own flags, the machines that have it."""

    name: str
    flags: str
    machines: str  # "" = all


AVX2 = "-mavx2 -mfma -mf16c"
AVX512 = (
    f"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd {AVX2}"
    # g++ 12 warns about its own AVX-512 headers.
    " -Wno-uninitialized -Wno-maybe-uninitialized"
)
ISAS = [
    Isa("baseline", "", machines=""),
    Isa("avx2", AVX2, machines="x86_64 amd64"),
    Isa("avx512", AVX512, machines="x86_64 amd64"),
    Isa("avx512_bf16", f"-mavx512bf16 {AVX512}", machines="x86_64 amd64"),
    Isa("amx", AVX512, machines="x86_64 amd64"),
    Isa("amx_emulated", AVX512, machines="x86_64 amd64"),
]
COMPILED_ISAS = [
    isa for isa in ISAS if not isa.machines or platform.machine().lower() in isa.machines.split()
]

# Never -march=native (the library must run on other machines than the one that built it) and never
# -ffast-math (NaN and infinity have a meaning here).
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra".split()
DEFINES = [
    "-DNDEBUG",
    f'-DFUSED_ATTENTION_VERSION="{VERSION}"',
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the LibTorch stable ABI of PyTorch 2.10
    *(f"-DFUSED_ATTENTION_ISA_{isa.name.upper()}" for isa in COMPILED_ISAS),
]


def find_torch() -> Path:
    """The installed torch package, also where pip's build environment hides it from import."""
    for path in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]:
        spec = PathFinder.find_spec("torch", [path])
        if spec and spec.origin and (Path(spec.origin).parent / "include").is_dir():
            return Path(spec.origin).parent
    sys.exit(
        "fused_attention: building needs an installed PyTorch; run `pip install 'torch>=2.10'`,"
        " then try again (if there is one already, `pip install --no-build-isolation .` finds it)"
    )


def run(command: list[str]) -> None:
    try:
        status = subprocess.call(command)
    except FileNotFoundError:
        sys.exit(
            f"fused_attention: no C++ compiler {command[0]!r}; install one (such as g++) or set CXX"
        )
    if status != 0:
        sys.exit(f"fused_attention: exit status {status} from: {shlex.join(command)}")


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


@dataclass(frozen=True)
class Unit:
    """One source file and the object compiled from it."""

    source: Path
    flags: list[str]

    @property
    def object(self) -> Path:
        return OBJECTS / self.source.relative_to(CSRC).with_suffix(".o")

    def is_current(self, command: list[str]) -> bool:
        """Whether this command made the object after the last change of every file it read."""
        depfile, stamp = self.object.with_suffix(".d"), self.object.with_suffix(".cmd")
        if not (self.object.exists() and depfile.exists() and stamp.exists()):
            return False
        if stamp.read_text() != shlex.join(command):
            return False
        inputs = shlex.split(depfile.read_text().replace("\\\n", " ").partition(":")[2])
        built = self.object.stat().st_mtime
        return all(os.path.exists(path) and os.path.getmtime(path) <= built for path in inputs)

    def compile(self) -> bool:
        """Compiles the unit unless its object is current; returns whether it did."""
        command = [*compiler(), *self.flags, "-c", str(self.source), "-o", str(self.object)]
        command += ["-MMD", "-MF", str(self.object.with_suffix(".d"))]
        if self.is_current(command):
            return False
        print(f"compiling {self.source}\n", end="", flush=True)  # one write: jobs run in parallel
        self.object.parent.mkdir(parents=True, exist_ok=True)
        run(command)
        self.object.with_suffix(".cmd").write_text(shlex.join(command))
        return True


def units(torch: Path) -> list[Unit]:
    """Every unit, in link order: baseline before the other instruction sets."""
    common = [*FLAGS, *DEFINES, f"-I{CSRC}", *shlex.split(os.environ.get("CXXFLAGS", ""))]
    # Only two units see PyTorch (and the pybind11 headers that it ships) or Python; -isystem: no
    # warnings from there; the prefix map keeps torch's location out of error messages.
    include = torch / "include"
    foreign = [f"-isystem{include}", f"-isystem{sysconfig.get_path('include')}"]
    foreign.append(f"-ffile-prefix-map={include}/=")
    return [
        Unit(CSRC / "ops.cpp", common + foreign),
        Unit(CSRC / "introspection.cpp", common + foreign),
        Unit(CSRC / "cpu/dispatch.cpp", common),
        *(
            Unit(CSRC / f"cpu/isa_{isa.name}.cpp", common + isa.flags.split())
            for isa in COMPILED_ISAS
        ),
    ]


class BuildNative(build_ext):
    """Compiles the units in parallel and links them.

    There is no rpath: `import torch` has loaded its libraries before ours is imported.
    """

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        all_units = units(torch)
        # The kernels take longest: first, so that the jobs end at about the same time.
        slowest_first = sorted(all_units, key=lambda unit: unit.source.parent == CSRC)
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            compiled = list(pool.map(Unit.compile, slowest_first))
        target = Path(self.get_ext_fullpath(ext.name))
        newest = max(unit.object.stat().st_mtime for unit in all_units)
        if not any(compiled) and target.exists() and target.stat().st_mtime >= newest:
            return
        print("linking", target.name, flush=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [*compiler(), "-shared", *(str(unit.object) for unit in all_units)]
        link += ["-Wl,--as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
        link += shlex.split(os.environ.get("LDFLAGS", ""))
        run([*link, "-o", str(target)])


class MetadataNeedsTorch(dist_info):
    """pip asks for metadata first: stop there, before it downloads a torch the build can't see."""

    def run(self) -> None:
        find_torch()
        super().run()


if __name__ == "__main__":  # tests/native/sanitize.py reads the flags
    setup(
        version=VERSION,
        # Old setuptools and new ones want different spellings in pyproject.toml.
        license="Apache-2.0",
        packages=[
            "fused_attention",
            "fused_attention.benchmark",
            "fused_attention.kernels",
            "fused_attention.models",
        ],
        package_dir={
            "fused_attention": "python/fused_attention",
            "fused_attention.kernels": "kernels",
        },
        package_data={
            "fused_attention": ["py.typed", "*.pyi"],
            "fused_attention.models": ["page.html"],
        },
        ext_modules=[Extension("fused_attention._native", sources=[])],
        cmdclass={"build_ext": BuildNative, "dist_info": MetadataNeedsTorch},
    )

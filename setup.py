"""Builds the shared object, fused_attention/_native*.so; the rest is in pyproject.toml.

The operators, the CPU kernels, their dispatch and the introspection module are one library.
csrc/cpu/build.py has the flags of each instruction set, and csrc/cuda/build.py describes a second,
optional library, fused_attention/_cuda.so. This file writes build.ninja and compile_commands.json,
and ninja compiles the sources that have changed. The build uses the installed PyTorch and never
downloads one. It respects CXX, CXXFLAGS, LDFLAGS and MAX_JOBS.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

# Paths are relative to this directory: no path of the build machine gets into the library.
os.chdir(Path(__file__).resolve().parent)
BUILD = Path(f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
VERSION = runpy.run_path("python/fused_attention/_version.py")["__version__"]
CPU, CUDA = runpy.run_path("csrc/cpu/build.py"), runpy.run_path("csrc/cuda/build.py")
stop = CUDA["stop"]

# Never -march=native (the library must run on other machines than the one that built it) and never
# -ffast-math (NaN and infinity have a meaning here).
FLAGS = "-std=c++20 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra -Icsrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's stable ABI of PyTorch 2.10


def from_environment(name: str, default: str = "") -> list[str]:
    return shlex.split(os.environ.get(name) or default)


def compiler() -> list[str]:
    command = from_environment("CXX", "c++")
    if shutil.which(command[0]) is None:
        stop(f"no C++ compiler {command[0]!r}; install one (such as g++) or set CXX")
    return command


def find_torch() -> Path:
    """Returns the folder of the installed torch package. If an isolated build hides it from import,
    looks next to the programs on PATH, which belong to the environment that started the build."""
    here = f"lib/python{sysconfig.get_python_version()}/site-packages"
    hidden = [str(Path(x).parent / here) for x in os.environ.get("PATH", "").split(os.pathsep)]
    for path in [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *hidden]:
        spec = PathFinder.find_spec("torch", [path])
        if spec and spec.origin and (Path(spec.origin).parent / "include").is_dir():
            return Path(spec.origin).parent
    stop(
        "building needs an installed PyTorch; run `pip install 'torch>=2.10'`, then try again (if"
        " it is installed: pass --no-build-isolation to pip or uv, --no-isolation to build)"
    )


@dataclass(frozen=True)
class Unit:
    """One source file and an object made from it. `variant` tells objects of one source apart."""

    source: Path
    flags: list[str]
    variant: str = ""
    compiler: str = "cxx"  # or "nvcc": a rule of build.ninja

    @property
    def object(self) -> Path:
        stem = "-".join(filter(None, (self.source.stem, self.variant)))
        return BUILD / self.source.with_name(f"{stem}.o")


def operator_units(torch: Path, folder: str) -> list[Unit]:
    """Returns the units that include headers of PyTorch (with the pybind11 that it ships): those
    that both libraries share, and the operators of one. The prefix map keeps torch's location out
    of error messages."""
    include = torch / "include"
    foreign = [f"-isystem{include}", f"-isystem{sysconfig.get_path('include')}", STABLE_ABI]
    foreign += [f"-ffile-prefix-map={include}/=", *from_environment("CXXFLAGS")]
    own = {
        # It sees pybind11 only, whose headers in PyTorch 2.10 refuse the stable ABI.
        "introspection.cpp": [f'-DFUSED_ATTENTION_VERSION="{VERSION}"', "-UTORCH_TARGET_VERSION"],
        "dispatch.cpp": [f"-DFUSED_ATTENTION_ISA_{name.upper()}" for name in CPU["chosen_isas"]()],
    }
    sources = [*sorted(Path("csrc").glob("*.cpp")), *sorted(Path(folder).glob("*.cpp"))]
    sources = [source for source in sources if not source.name.startswith("kernels_")]
    return [Unit(x, [*FLAGS.split(), *foreign, *own.get(x.name, [])]) for x in sources]


def libraries(torch: Path, name: str) -> dict[Path, tuple[list[Unit], list[str]]]:
    """Returns, for each library, its units in link order (the baseline before the other instruction
    sets) and its linker flags."""
    common = [*FLAGS.split(), *from_environment("CXXFLAGS")]
    units = [Unit(x, [*common, *flags], isa) for x, flags, isa in CPU["kernel_units"]()]
    found = {BUILD / name: ([*units, *operator_units(torch, "csrc/cpu")], ["-pthread"])}
    if CUDA["is_wanted"](torch):
        units = [Unit(*unit, "nvcc") for unit in CUDA["kernel_units"]()]
        units += operator_units(torch, "csrc/cuda")
        found[BUILD / "_cuda.so"] = (units, CUDA["link_flags"](CUDA["find_nvcc"]()))
    return found


def run_ninja(torch: Path, built: dict[Path, tuple[list[Unit], list[str]]]) -> None:
    """Builds the libraries. They have no rpath: `import torch` loads PyTorch's before ours."""
    try:
        from ninja import BIN_DIR, ninja_syntax
    except ImportError:
        stop("building needs ninja; run `pip install ninja`, then try again")
    torch_flags = ["-Wl,--as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10"]
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.ninja").open("w") as file:
        ninja = ninja_syntax.Writer(file, width=1 << 20)
        ninja.variable("builddir", str(BUILD))
        ninja.variable("cxx", shlex.join(compiler()))
        ninja.variable("nvcc", str(CUDA["find_nvcc"]()))
        for name in ("cxx", "nvcc"):
            command = f"${name} $flags -MMD -MF $out.d -c $in -o $out"
            ninja.rule(name, command, "compiling $in $variant", depfile="$out.d", deps="gcc")
        ninja.rule("link", "$cxx -shared -o $out $in $flags", "linking $out")
        units = {unit.object: unit for units, _ in built.values() for unit in units}
        for target, unit in units.items():
            own = {"flags": shlex.join(unit.flags).replace("$", "$$"), "variant": unit.variant}
            ninja.build(str(target), unit.compiler, str(unit.source), variables=own)
        for library, (units, flags) in built.items():
            flags = shlex.join([*torch_flags, *flags, *from_environment("LDFLAGS")])
            objects = [str(unit.object) for unit in units]
            ninja.build(str(library), "link", objects, variables={"flags": flags})
    command = [str(Path(BIN_DIR) / "ninja"), "-f", str(BUILD / "build.ninja")]
    jobs = [f"-j{x}" for x in from_environment("MAX_JOBS")]
    if subprocess.call([*command, *jobs]) != 0:
        stop("the build failed; what the compiler says is above")
    database = subprocess.check_output([*command, "-t", "compdb", "cxx", "nvcc"])
    Path("compile_commands.json").write_bytes(database)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        torch, target = find_torch(), Path(self.get_ext_fullpath(ext.name))
        self.built = libraries(torch, target.name)
        run_ninja(torch, self.built)
        target.parent.mkdir(parents=True, exist_ok=True)
        for library in self.built:
            shutil.copy2(library, target.parent)

    def copy_extensions_to_source(self) -> None:
        """Serves --inplace. Unlinks the old file first: a process that has it mapped keeps it."""
        for library in self.built:
            target = Path("python/fused_attention") / library.name
            target.unlink(missing_ok=True)
            shutil.copy2(library, target)


class MetadataNeedsTorch(dist_info):
    """pip asks for metadata first: stops here, before pip downloads a torch the build can't see."""

    def run(self) -> None:
        find_torch()
        super().run()


if __name__ == "__main__":  # tests import this file for its flags
    setup(
        version=VERSION,
        license="Apache-2.0",  # setuptools versions disagree on its spelling in pyproject.toml
        ext_modules=[Extension("fused_attention._native", sources=[])],
        cmdclass={"build_ext": BuildNative, "dist_info": MetadataNeedsTorch},
    )

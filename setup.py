"""Builds the shared object, fused_attention/_native*.so; the rest is in pyproject.toml.

The operators, the CPU kernels of every instruction set, their dispatch and the introspection module
are compiled into one library. Each instruction set is one row of ISAS: one source file with its own
flags. A unit is compiled again only when its command line or a file it includes has changed, so
`python setup.py build_ext --inplace` is quick after an edit.

A second, optional library, fused_attention/_cuda.so, has the CUDA kernels: nvcc compiles them, and
neither CUDA's runtime nor a CUDA build of PyTorch is needed to load it. It is built where there are
both nvcc and a CUDA build of PyTorch, or if FUSED_ATTENTION_CUDA=1 asks for it (0: never).
FUSED_ATTENTION_CUDA_ARCHS ("80 90 100") are the compute capabilities to compile for; the first is
included as PTX too, which newer GPUs compile when they load it.

PyTorch is used as it is installed and never downloaded: only its headers and libraries are needed,
so it is found on the path and not imported. CXX, CXXFLAGS, LDFLAGS and MAX_JOBS are respected.
"""

import os
import platform
import re
import shlex
import shutil
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
OPERATORS = ("ops", "introspection")  # the sources that are not kernels
COMPILED_ISAS = [
    isa for isa in ISAS if not isa.machines or platform.machine().lower() in isa.machines.split()
]

# Never -march=native (the library must run on other machines than the one that built it) and never
# -ffast-math (NaN and infinity have a meaning here).
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -fno-math-errno -Wall -Wextra".split()
DEFINES = [
    "-DNDEBUG",
    f'-DFUSED_ATTENTION_VERSION="{VERSION}"',
    *(f"-DFUSED_ATTENTION_ISA_{isa.name.upper()}" for isa in COMPILED_ISAS),
]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # LibTorch's, of PyTorch 2.10


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
    """One source file and the object compiled from it, one of several if there is a variant."""

    source: Path
    flags: list[str]
    variant: str = ""
    compiler: list[str] | None = None  # None: the C++ compiler

    @property
    def object(self) -> Path:
        name = self.source.relative_to(CSRC).with_suffix("")
        return OBJECTS / f"{name}{self.variant and '-' + self.variant}.o"

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
        command = [*(self.compiler or compiler()), *self.flags]
        command += ["-c", str(self.source), "-o", str(self.object)]
        command += ["-MMD", "-MF", str(self.object.with_suffix(".d"))]
        if self.is_current(command):
            return False
        # One write: jobs run in parallel.
        print(f"compiling {self.source} {self.variant}".rstrip() + "\n", end="", flush=True)
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
        Unit(CSRC / "ops.cpp", [*common, *foreign, STABLE_ABI]),
        Unit(CSRC / "introspection.cpp", common + foreign),
        Unit(CSRC / "cpu/dispatch.cpp", common),
        *(
            Unit(CSRC / f"cpu/isa_{isa.name}.cpp", common + isa.flags.split())
            for isa in COMPILED_ISAS
        ),
    ]


# -- the CUDA library ----------------------------------------------------------------------

# Units: csrc/cuda/<kernel>.cu for each type and head size, FA_TYPE and FA_HEAD_DIM there; the
# slowest first. Those of HOPPER are for compute capability 9.0 alone, and of 16 bits.
CUDA_TYPES = ("Half", "BFloat16", "float")
CUDA_HEAD_DIMS = (256, 128, 96, 64, 32)
CUDA_KERNELS = {
    "attention_backward": CUDA_HEAD_DIMS,
    "attention_forward": CUDA_HEAD_DIMS,
    "attention_decode": CUDA_HEAD_DIMS,
    "masked_softmax": (0,),
}
HOPPER = {"attention_backward_hopper": (128, 64), "attention_forward_hopper": (128, 64)}
CUDA_ARCHS = "80 90 100"


def cuda_homes() -> list[Path]:
    """CUDA_HOME or its usual place, and the packages of the extra cuda-build."""
    homes = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")]
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        homes += sorted(Path(path).glob("nvidia/cu*"), reverse=True)
    return homes


def find_nvcc() -> Path | None:
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=h / "bin") for h in cuda_homes())]
    return next((Path(path) for path in found if path), None)


def wants_cuda(torch: Path) -> bool:
    asked = os.environ.get("FUSED_ATTENTION_CUDA", "")
    if asked not in ("", "0", "1"):
        sys.exit(f"fused_attention: FUSED_ATTENTION_CUDA: expected 0 or 1, got {asked!r}")
    return asked == "1" or (asked == "" and (torch / "lib/libtorch_cuda.so").exists())


def cuda_archs() -> list[str]:
    archs = re.split(r"[\s,;]+", os.environ.get("FUSED_ATTENTION_CUDA_ARCHS") or CUDA_ARCHS)
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            sys.exit(
                "fused_attention: FUSED_ATTENTION_CUDA_ARCHS: expected compute capabilities from 80"
                f" on, such as {CUDA_ARCHS!r}, got {arch!r}"
            )
    return archs


def cuda_operators(torch: Path) -> Unit:
    """The operators of the CUDA library, which need no CUDA to be compiled and loaded."""
    include = torch / "include"
    foreign = [f"-isystem{include}", f"-ffile-prefix-map={include}/="]
    return Unit(CSRC / "cuda/ops.cpp", [*FLAGS, *DEFINES, f"-I{CSRC}", *foreign, STABLE_ABI])


def cuda_kernels(nvcc: Path) -> list[Unit]:
    archs = cuda_archs()
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", f"-I{CSRC}"]
    general = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    general += [f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]

    def units_of(
        kernels: dict[str, tuple[int, ...]], targets: list[str], types: tuple[str, ...]
    ) -> list[Unit]:
        return [
            Unit(
                CSRC / f"cuda/{kernel}.cu",
                [
                    *(*flags, *targets, f"-DFA_TYPE={type_}", f"-DFA_HEAD_DIM={head_dim}"),
                    f"-DFA_FLOAT={int(type_ == 'float')}",
                ],
                variant=f"{type_}-{head_dim}" if head_dim else type_,
                compiler=[str(nvcc)],
            )
            for kernel, head_dims in kernels.items()
            for head_dim in head_dims
            for type_ in types
        ]

    units = units_of(CUDA_KERNELS, general, CUDA_TYPES)
    if "90" in archs:
        hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
        units += units_of(HOPPER, hopper, CUDA_TYPES[:2])
    return units


def cudart(nvcc: Path) -> Path:
    for home in (nvcc.resolve().parent.parent, *cuda_homes()):
        for path in sorted(home.glob("lib*/**/libcudart_static.a")):
            return path
    sys.exit(
        "fused_attention: no libcudart_static.a, which belongs to the CUDA toolkit; set CUDA_HOME,"
        " or FUSED_ATTENTION_CUDA=0 to build without CUDA kernels"
    )


# -- building ------------------------------------------------------------------------------


def build_library(all_units: list[Unit], target: Path, torch: Path, *libraries: str) -> None:
    """Compiles the units in parallel and links them.

    There is no rpath: `import torch` has loaded its libraries before ours.
    """
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        # The kernels take longest: first, so that the jobs end at about the same time.
        slowest_first = sorted(all_units, key=lambda unit: unit.source.stem in OPERATORS)
        compiled = list(pool.map(Unit.compile, slowest_first))
    newest = max(unit.object.stat().st_mtime for unit in all_units)
    if not any(compiled) and target.exists() and target.stat().st_mtime >= newest:
        return
    print("linking", target.name, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    link = [*compiler(), "-shared", *(str(unit.object) for unit in all_units)]
    link += ["-Wl,--as-needed", f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", *libraries]
    link += shlex.split(os.environ.get("LDFLAGS", ""))
    run([*link, "-o", str(target)])


class BuildNative(build_ext):
    cuda_library: Path | None = None

    def copy_extensions_to_source(self) -> None:
        """--inplace: setuptools copies what it knows."""
        super().copy_extensions_to_source()
        if self.cuda_library is not None:
            shutil.copy2(self.cuda_library, "python/fused_attention")

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        target = Path(self.get_ext_fullpath(ext.name))
        build_library(units(torch), target, torch)
        if wants_cuda(torch):
            nvcc = find_nvcc()
            if nvcc is None:
                print("fused_attention: no nvcc found, so no CUDA kernels are built", flush=True)
                return
            cuda_units = [*cuda_kernels(nvcc), cuda_operators(torch)]
            system = ["-lpthread", "-ldl", "-lrt"]
            self.cuda_library = target.parent / "_cuda.so"
            build_library(cuda_units, self.cuda_library, torch, str(cudart(nvcc)), *system)


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
            "fused_attention.call",
            "fused_attention.derivatives",
            "fused_attention.integrations",
            "fused_attention.kernels",
            "fused_attention.models",
            "fused_attention.operators",
            "fused_attention.tools",
            "fused_attention.tools.benchmark",
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

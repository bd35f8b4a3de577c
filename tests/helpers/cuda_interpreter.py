"""The CUDA library without a GPU: its operators take CPU tensors, nvcc compiles the kernels that
they launch to PTX, and the PTX interpreter runs them.

    with interpreted() as launches:
        out = torch.ops.fused_attention_cuda.attention_forward_plain(q, k, v, 0.125, 0, -1, -1, 0)
    assert launches[0].kernel == "attention_forward_kernel<Half, 64, true>"

Compiled files are kept in .cache, by the hash of everything that they are made from.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import runpy
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cuda_params import KernelParams, SoftmaxKernelParams
from fused_attention.operators import cuda
from paths import CACHE, ROOT
from ptx import Report, TensorMap, launch

SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
NVCC = SETUP["CUDA"]["find_nvcc"]()
# The header that defines each kernel.
HEADERS = {
    "attention_forward": "attention_forward",
    **{name: name for name in ("attention_forward_hopper", "attention_backward_hopper")},
    **dict.fromkeys(("attention_decode", "attention_combine"), "attention_decode"),
    **dict.fromkeys(
        (
            f"attention_{name}"
            for name in ("delta", "backward", "dbias", "dsinks", "page_gradients")
        ),
        "attention_backward",
    ),
    **dict.fromkeys(
        (f"masked_softmax{name}" for name in ("", "_backward", "_dbias", "_dbias_sum", "_dsinks")),
        "masked_softmax",
    ),
}
SUBSTITUTE = ctypes.CFUNCTYPE(
    ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
)


KERNELS = ("cuda/*.cu*", "cuda/*.h", "attention_params.h")  # what kernels are compiled from
OPERATORS = ("*.cpp", "*.h", "cuda/*.cpp", "cuda/*.h")


def kept(name: str, sources: tuple[str, ...], extra: str, make: Callable[[Path], None]) -> Path:
    """Returns a file made from the sources (patterns in csrc), and makes it if it is missing."""
    files = sorted(path for pattern in sources for path in (ROOT / "csrc").glob(pattern))
    text = b"".join(path.name.encode() + path.read_bytes() for path in files)
    digest = hashlib.sha256(text + extra.encode()).hexdigest()[:16]
    path = CACHE / "cuda" / digest / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{os.getpid()}-{name}")  # other processes may make it too
        make(partial)
        partial.rename(path)
    return path


@functools.cache
def nvcc_version() -> str:
    """Returns the version of nvcc, such as "13.0"."""
    text = subprocess.run([NVCC, "--version"], capture_output=True, text=True, check=True).stdout
    return text.split("release ")[1].split(",")[0]


def compile_kernel(kernel: str, arch: str, *options: str) -> Path:
    """Compiles a template-id such as "attention_forward_kernel<Half, 64, true>" with nvcc."""
    header = HEADERS[kernel.split("_kernel")[0]]
    types = [params_of(kernel).__name__, *["TensorMap"] * len(boxes_of(kernel))]
    parameters = [f"const __grid_constant__ {type_}" for type_ in types]
    text = (
        f'#include "cuda/{header}.cuh"\n'
        "namespace fused_attention::cuda {\n"
        f"template __global__ void {kernel}({', '.join(parameters)});\n"
        "}\n"
    )
    kind = "cubin" if "-cubin" in options else "ptx"
    safe = "".join(c if c.isalnum() else "_" for c in kernel)

    def make(path: Path) -> None:
        source = path.with_suffix(path.suffix + ".cu")
        source.write_text(text)
        command = [NVCC, "-std=c++20", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", *options]
        done = subprocess.run([*command, source, "-o", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        source.unlink()

    return kept(f"{safe}_{arch}.{kind}", KERNELS, " ".join([nvcc_version(), *options]), make)


def params_of(kernel: str) -> type[KernelParams] | type[SoftmaxKernelParams]:
    return SoftmaxKernelParams if kernel.startswith("masked_softmax") else KernelParams


def is_hopper(kernel: str) -> bool:
    return "_hopper_" in kernel


@functools.cache
def ptx_of(kernel: str) -> str:
    arch = "90a" if is_hopper(kernel) else "80"
    return compile_kernel(kernel, arch, "-ptx", "-lineinfo").read_text()


def boxes_of(kernel: str) -> list[tuple[str, int]]:
    """Lists (tensor, rows of a box) for each tensor map of a kernel, as the .cu files encode it."""
    if kernel.startswith("attention_forward_hopper"):
        return [("query", 128), ("key", 128), ("value", 128)]
    if not is_hopper(kernel):
        return []
    of_queries, of_keys = ["query", "grad_out"], ["key", "value"]
    rows, columns = (of_keys, of_queries) if "true" in kernel else (of_queries, of_keys)
    return [*((name, 128) for name in rows), *((name, 64) for name in columns)]


def tensor_maps(kernel: str, call: KernelParams) -> list[TensorMap]:
    operands = call.operands()
    return [
        TensorMap(operands[name], (1, 1, rows, 64), swizzle=128) for name, rows in boxes_of(kernel)
    ]


def cubin_of(kernel: str, arch: str) -> bytes:
    return compile_kernel(kernel, arch, "-cubin").read_bytes()


@functools.cache
def library() -> ctypes.CDLL:
    """Builds and loads the operators without kernels, in place of the library that was built."""
    where = SETUP["find_torch"]()
    units = SETUP["operator_units"](where, "csrc/cuda")

    def make(path: Path) -> None:
        flags = [flag.replace("-Icsrc", f"-I{ROOT / 'csrc'}") for flag in units[0].flags]
        sources = [str(ROOT / unit.source) for unit in units]
        command = [*SETUP["compiler"](), *flags, "-O1", "-shared", *sources]
        libraries = [f"-L{where / 'lib'}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*command, *libraries, "-o", str(path)], check=True)

    cuda.LIBRARY = kept("_cuda.so", OPERATORS, torch.__version__, make)
    cuda.load.cache_clear()
    assert not cuda.load()
    return ctypes.CDLL(str(cuda.LIBRARY))


@dataclass
class Run:
    """A launch, and the report of the interpreter."""

    kernel: str
    blocks: int
    threads: int
    shared_bytes: int
    report: Report


@dataclass
class Interpreter:
    """The substitute for a launch. edit: changes the PTX, to plant a fault."""

    schedule: str = "lockstep"
    edit: Callable[[str], str] | None = None
    runs: list[Run] = field(default_factory=list)
    error: bytes = b""

    def __call__(
        self, kernel: bytes, blocks: int, threads: int, shared_bytes: int, params: int
    ) -> bytes | None:
        try:
            name = kernel.decode()
            ptx = ptx_of(name)
            arguments = [params_of(name).from_address(params)]
            if is_hopper(name):
                arguments += tensor_maps(name, arguments[0])
            report = launch(
                self.edit(ptx) if self.edit else ptx, None, [blocks], threads, arguments,
                shared_bytes, self.schedule,
            )  # fmt: skip
            self.runs.append(Run(name, blocks, threads, shared_bytes, report))
        except Exception as error:  # no exception may pass through C++
            self.error = repr(error).encode()  # kept alive for the caller
            return self.error
        return None


@contextlib.contextmanager
def interpreted(
    schedule: str = "lockstep",
    edit: Callable[[str], str] | None = None,
    compute_capability: int = 80,
) -> Iterator[list[Run]]:
    """Interprets the launches of torch.ops.fused_attention_cuda, and lists them.

    compute_capability: of the GPU that the operators believe to run on.
    """
    interpreter = Interpreter(schedule, edit)
    substitute = SUBSTITUTE(interpreter)
    set_substitute = library().fused_attention_cuda_substitute
    set_substitute(substitute, compute_capability)
    try:
        yield interpreter.runs
    finally:
        set_substitute(None, 0)

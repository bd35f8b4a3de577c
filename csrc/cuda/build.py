"""The units of the CUDA library, _cuda.so, for setup.py: kernels for each type and head size.

FUSED_ATTENTION_CUDA         1: with this library, 0: without it; by default with it if there are
                             both nvcc and a CUDA build of PyTorch
FUSED_ATTENTION_CUDA_ARCHS   compute capabilities ("80 90 100"); the first is included as PTX too,
                             which newer GPUs compile when they load it
"""

import os
import re
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

# The head sizes (FA_HEAD_DIM) that each csrc/cuda/<kernel>.cu is compiled for, for each of TYPES
# (FA_TYPE); the slowest units come first. The kernels of HOPPER are for compute capability 9.0 and
# 16-bit types alone.
TYPES = ("Half", "BFloat16", "float")
HEAD_DIMS = (256, 128, 96, 64, 32)
KERNELS = {
    "attention_backward": HEAD_DIMS,
    "attention_forward": HEAD_DIMS,
    "attention_decode": HEAD_DIMS,
    "masked_softmax": (0,),
}
HOPPER = {"attention_backward_hopper": (128, 64), "attention_forward_hopper": (128, 64)}


def stop(message: str) -> NoReturn:
    sys.exit(f"fused_attention: {message}")


def homes() -> list[Path]:
    """Returns where CUDA may be: CUDA_HOME or its usual place, and the packages of the extra
    cuda-build."""
    found = [Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda")]
    for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        found += sorted(Path(path).glob("nvidia/cu*"), reverse=True)
    return found


def find_nvcc() -> Path | None:
    found = [shutil.which("nvcc"), *(shutil.which("nvcc", path=h / "bin") for h in homes())]
    return next((Path(path) for path in found if path), None)


def is_wanted(torch: Path) -> bool:
    asked = os.environ.get("FUSED_ATTENTION_CUDA", "")
    if asked not in ("", "0", "1"):
        stop(f"FUSED_ATTENTION_CUDA: expected 0 or 1, got {asked!r}")
    is_default = asked == "" and (torch / "lib/libtorch_cuda.so").exists()
    if is_default and find_nvcc() is None:
        print("fused_attention: no nvcc found, so no CUDA kernels are built", flush=True)
        return False
    if asked == "1" and find_nvcc() is None:
        stop("FUSED_ATTENTION_CUDA=1: no nvcc; set CUDA_HOME or install the extra cuda-build")
    return asked == "1" or is_default


def archs() -> list[str]:
    asked = os.environ.get("FUSED_ATTENTION_CUDA_ARCHS") or "80 90 100"
    found = re.split(r"[\s,;]+", asked.strip())
    for arch in found:
        if not re.fullmatch(r"\d{2,3}[af]?", arch) or int(arch.rstrip("af")) < 80:
            stop(
                "FUSED_ATTENTION_CUDA_ARCHS: expected compute capabilities from 80 on, such as"
                f" '80 90 100', got {arch!r}"
            )
    return found


def kernel_units() -> list[tuple[Path, list[str], str]]:
    """Returns the source and flags of each unit, and the variant that tells units of one source
    apart."""
    flags = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Icsrc"]
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs()]
    targets += [f"-gencode=arch=compute_{archs()[0]},code=compute_{archs()[0]}"]
    rows = [(kernel, dims, targets, TYPES) for kernel, dims in KERNELS.items()]
    if "90" in archs():
        hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
        rows += [(kernel, dims, hopper, TYPES[:2]) for kernel, dims in HOPPER.items()]
    units = []
    for kernel, dims, own, types in rows:
        for head_dim in dims:
            for type_ in types:
                defines = [f"-DFA_TYPE={type_}", f"-DFA_HEAD_DIM={head_dim}"]
                defines += [f"-DFA_FLOAT={int(type_ == 'float')}"]
                variant = f"{type_}-{head_dim}" if head_dim else type_
                units.append((Path(f"csrc/cuda/{kernel}.cu"), [*flags, *own, *defines], variant))
    return units


def link_flags(nvcc: Path) -> list[str]:
    """Links the CUDA runtime statically, so that the library loads where CUDA is not installed."""
    for home in (nvcc.resolve().parent.parent, *homes()):
        for path in sorted(home.glob("lib*/**/libcudart_static.a")):
            return [str(path), "-lpthread", "-ldl", "-lrt"]
    stop(
        "no libcudart_static.a, which belongs to the CUDA toolkit; set CUDA_HOME, or"
        " FUSED_ATTENTION_CUDA=0 to build without CUDA kernels"
    )

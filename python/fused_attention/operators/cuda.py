"""The optional library of the CUDA C++ kernels, `_cuda.so`: torch.ops.fused_attention_cuda.

Its operators take the arguments of those in torch.ops.fused_attention. The library loads without
CUDA, so shapes and graphs can be traced with fake tensors anywhere.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from . import handles, vmap, writes
from ._torch import assume_constant_result

LIBRARY = Path(__file__).parents[1] / "_cuda.so"
NAMESPACE = "fused_attention_cuda"
OPERATORS: handles.Operators | None = None  # once they are loaded


@functools.cache
def load() -> str:
    """Defines the operators; returns the reason if that fails, else ""."""
    if not LIBRARY.exists():
        return "CUDA kernels not built: install with nvcc and FUSED_ATTENTION_CUDA=1"
    try:
        torch.ops.load_library(str(LIBRARY))
    except OSError as error:
        return f"CUDA kernels not loaded by PyTorch {torch.__version__}: {error}"
    vmap.register_tracing(NAMESPACE)
    writes.count_versions(NAMESPACE, "masked_softmax_")
    global OPERATORS
    OPERATORS = handles.Operators.of(NAMESPACE)
    return ""


@assume_constant_result
def missing() -> str:
    """Returns what keeps the kernels from running here, or ""."""
    if not LIBRARY.exists():
        return load()
    if not torch.cuda.is_available() or torch.version.hip:
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor}: only 8.0 and newer"
    return load()


def operators() -> handles.Operators:
    """Returns the operators; raises RuntimeError if they cannot be loaded."""
    if OPERATORS is None and (reason := load()):
        raise RuntimeError(reason)
    assert OPERATORS is not None
    return OPERATORS

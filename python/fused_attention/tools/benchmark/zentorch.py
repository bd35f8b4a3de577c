"""AMD's zentorch (ZenDNN) as a peer, where it is installed: its operator for attention.

Loading the library is enough; importing the package would change PyTorch's own behaviour.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..foreign import NotOffered
from .shapes import Case, Inputs


def library(package: str, *names: str) -> None:
    """Loads the first of these shared libraries that is in the folder of the package.

    Raises NotOffered with the loader's reason, such as a build for another PyTorch.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise NotOffered("not installed")
    folder = Path(spec.submodule_search_locations[0])
    found = [folder / name for name in names if (folder / name).exists()]
    if not found:
        raise NotOffered(f"cannot be loaded: no {' or '.join(names)}")
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        raise NotOffered(f"cannot be loaded: {error}") from error


def zentorch(case: Case, inputs: Inputs) -> Callable[[], Tensor]:
    """Runs the forward in float32 and bfloat16, with any mask and bias, without dropout."""
    if inputs.query.device.type != "cpu":
        raise NotOffered("CPU only")
    if case.backward or case.dropout_p:
        raise NotOffered("no backward or dropout")
    if case.dtype == torch.float16:
        raise NotOffered("float16 goes to PyTorch's kernel")
    if case.D != case.Dv:
        raise NotOffered("no head_dim of value other than that of query")
    library("zentorch", "libzentorch.so")
    mask, causal = inputs.mask, case.causal
    masked = mask is not None or inputs.bias is not None
    if case.window_size != (-1, -1) or (causal and masked):
        mask, causal = case.band() if mask is None else mask & case.band(), False
    additive = inputs.bias
    if mask is not None:  # the operator takes additive masks only
        zero = torch.zeros((), dtype=case.dtype) if additive is None else additive
        additive = torch.where(mask, zero, -math.inf).to(case.dtype)
    query, key, value = inputs.query, inputs.key, inputs.value
    if case.Hq != case.Hkv:  # repeated beforehand, which costs the operator memory but no time
        key, value = (x.repeat_interleave(case.Hq // case.Hkv, 1) for x in (key, value))
    operator = torch.ops.zentorch.zentorch_sdpa
    return lambda: operator(query, key, value, 0.0, causal, attn_mask=additive)[0]

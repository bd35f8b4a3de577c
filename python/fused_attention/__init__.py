"""Exact attention that stays on the fused path: the same call and meaning on every backend.

`attention` has all options; `scaled_dot_product_attention` has PyTorch's signature; `explain` says
how a call is served, and why no faster backend serves it. `python -m fused_attention doctor` shows
what works on this machine.
"""

import sys as _sys

import torch as _torch  # noqa: F401  # before _native, which finds PyTorch's libraries through it

try:
    from . import _native as _native  # the operators register themselves
except ImportError as error:
    if "FUSED_ATTENTION_CPU_ISA" in str(error):
        # `python -m fused_attention` imports the package before cli.py could catch anything.
        if _sys.argv[:1] == ["-m"] and {__name__, f"-m{__name__}"} & set(_sys.orig_argv):
            print(f"python -m {__name__}: {error}", file=_sys.stderr)
            raise SystemExit(2) from None
        raise ValueError(str(error)) from None
    raise ImportError(
        "fused_attention: the compiled part (fused_attention._native) is missing or does not load: "
        f"{error}. Build it with `pip install .`, or in a checkout with "
        "`python setup.py build_ext --inplace`"
    ) from error

from ._version import __version__
from .attention import attention, dropout_mask
from .attention_statistics import attention_statistics
from .attention_weights import attention_weights
from .cache import kv_cache_append_
from .call.explain import explain
from .call.record import record_calls
from .errors import ArgumentTypeError, ArgumentValueError
from .integrations import torch_varlen as _torch_varlen  # noqa: F401  # kernels of PyTorch's
from .integrations.patch import patch_sdpa
from .merge import merge_attention_states
from .modules import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
    replace_multihead_attention,
)
from .operators import flops as _flops  # noqa: F401  # for FlopCounterMode
from .sdpa import scaled_dot_product_attention
from .softmax import (
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
    masked_softmax,
    masked_softmax_,
    scaled_masked_softmax,
    scaled_softmax,
    scaled_upper_triang_masked_softmax,
)

__all__ = [
    "ArgumentTypeError",
    "ArgumentValueError",
    "MultiheadAttention",
    "ScaledMaskedSoftmax",
    "ScaledSoftmax",
    "ScaledUpperTriangMaskedSoftmax",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "__version__",
    "attention",
    "attention_statistics",
    "attention_weights",
    "dropout_mask",
    "explain",
    "kv_cache_append_",
    "masked_softmax",
    "masked_softmax_",
    "merge_attention_states",
    "patch_sdpa",
    "record_calls",
    "replace_multihead_attention",
    "scaled_dot_product_attention",
    "scaled_masked_softmax",
    "scaled_softmax",
    "scaled_upper_triang_masked_softmax",
]

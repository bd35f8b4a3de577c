"""CUDA and HIP tensors: the library that serves an operator on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .handles import library

# The operators that the CUDA library serves in the place of Triton. Those of attention are not
# listed: call/backends.py chooses between the two libraries, and calls the operators of that one.
IN_CUDA_LIBRARY = ("masked_softmax_forward", "masked_softmax_", "masked_softmax_backward")


@functools.cache
def gpu_kernel(name: str) -> Callable[..., Any]:
    """Returns the kernel of an operator on a GPU: that of the CUDA library if it works here and has
    one, else Triton's. The first call imports the library."""
    if name in IN_CUDA_LIBRARY and not cuda.missing():
        return getattr(getattr(torch.ops, cuda.NAMESPACE), name)
    from ..kernels import operators

    return getattr(operators, name)


def _register_on_gpu(name: str) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        # Triton launches on the current device, which need not be that of the tensors.
        inputs = (*args, *kwargs.values())
        with torch.cuda.device(next(x.device for x in inputs if isinstance(x, Tensor))):
            return gpu_kernel(name)(*args, **kwargs)

    library.impl(name, call, "CUDA")


for _name in (
    *("attention_forward_plain", "attention_forward_plain_lse", "attention_forward"),
    *("attention_backward", "dropout_keep_mask", "attention_weights", "kv_cache_append_"),
    *IN_CUDA_LIBRARY,
):
    _register_on_gpu(_name)


def _refuse_on_triton(name: str, what: str) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"attention: {what} not built on a GPU; backend='reference' has them"
        )

    library.impl(name, refuse, "CUDA")


_refuse_on_triton("attention_jvp", "forward mode and second derivatives are")
_refuse_on_triton("attention_backward_jvp", "second derivatives are")

"""FLOPs of the attention operators, for torch.utils.flop_counter.FlopCounterMode.

The counts follow PyTorch's for its own attention: two for each multiply-add of the matrix products,
those of hidden scores included, and none for masks, softmax and dropout. A forward has the products
q kᵀ and p v. A backward computes q kᵀ again, then do vᵀ, pᵀ do, ds k and dsᵀ q. Packed sequences
count by their lengths, and used lengths count as the lengths of keys. Forward mode and second
derivatives are not counted.

torch.utils.flop_counter takes a quarter of a second to import, so the formulas are registered when
other code imports it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .arguments import SEQUENCES
from .handles import arguments, library

COUNTER = "torch.utils.flop_counter"

# The multiply-adds for one score, by the head sizes of keys and values.
MULTIPLY_ADDS: dict[str, Callable[[int, int], int]] = {
    "attention_forward_plain": lambda D, Dv: D + Dv,
    "attention_forward_plain_lse": lambda D, Dv: D + Dv,
    "attention_forward": lambda D, Dv: D + Dv,
    "traced_attention": lambda D, Dv: D + Dv,
    "attention_backward": lambda D, Dv: 3 * D + 2 * Dv,
    "attention_weights": lambda D, Dv: D,
}


def _lengths(lengths: Tensor, longest: int) -> list[int]:
    """Returns the values of `lengths`, or the longest length where fake tensors have no values."""
    if type(lengths) is Tensor and not lengths.is_meta:
        return lengths.tolist()
    return [longest] * lengths.shape[0]


def _count_scores(call: dict[str, Any]) -> int:
    """Returns the sum of Hq · Sq · Sk over all sequences."""
    query, key = call["query"], call["key"]
    cu_seqlens_q, cu_seqlens_k, seqused_k, block_table = (call.get(name) for name in SEQUENCES)
    if block_table is not None:
        Sk = block_table.shape[1] * key.shape[1]
    elif cu_seqlens_q is not None:
        Sk = call["max_seqlen_k"] or key.shape[0]
    else:
        Sk = key.shape[2]
    if cu_seqlens_q is not None:
        lengths_q = _lengths(cu_seqlens_q.diff(), call["max_seqlen_q"] or query.shape[0])
    elif seqused_k is not None:
        lengths_q = [query.shape[2]] * query.shape[0]
    else:
        B, Hq, Sq, _ = query.shape
        return B * Hq * Sq * Sk
    if seqused_k is not None:
        lengths_k = _lengths(seqused_k, Sk)
    elif cu_seqlens_k is not None:
        lengths_k = _lengths(cu_seqlens_k.diff(), Sk)
    else:
        lengths_k = [Sk] * len(lengths_q)
    return query.shape[1] * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))


def _formula(packet: Any, multiply_adds: Callable[[int, int], int]) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        call = arguments(packet.default, args, kwargs)
        D, Dv = (call[name].shape[-1] for name in ("key", "value" if "value" in call else "key"))
        return 2 * _count_scores(call) * multiply_adds(D, Dv)

    return count


# -- Registration ------------------------------------------------------------------------


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for namespace in (library.ns, cuda.NAMESPACE):
        operators = getattr(torch.ops, namespace)
        for name, multiply_adds in MULTIPLY_ADDS.items():
            if hasattr(operators, name):  # the CUDA library has fewer, or is not loaded
                packet = getattr(operators, name)
                register_flop_formula(packet, get_raw=True)(_formula(packet, multiply_adds))


class _AfterImport(MetaPathFinder):
    """Finds PyTorch's module as Python would, and registers the formulas after it has run."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == COUNTER else None
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if COUNTER in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterImport())

"""The state of dropout, (seed, offset): drawn once a call, from torch's generator of the device."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..errors import wrong_value
from . import _torch
from .handles import library

# `like` only tells the device. `call_site` tells the calls of one graph apart: without it, common
# subexpression elimination would give two layers the same mask. Opaque, because a traced
# torch.randint gives other numbers than eager; tagged, so that activation checkpointing replays it.
library.define(
    "philox_state(Tensor like, int call_site) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
)


def _draw(like: Tensor, call_site: int) -> Tensor:
    return torch.empty(2, dtype=torch.int64, device=like.device).random_()


library.impl("philox_state", _draw, "CompositeExplicitAutograd")
draw_philox_state = torch.ops.fused_attention.philox_state.default
_call_sites = itertools.count()


@_torch.assume_constant_result
def _next_call_site() -> int:
    return next(_call_sites)


def check_bits(philox_seed: int | torch.SymInt) -> None:
    if not -(2**63) <= philox_seed < 2**64:
        wrong_value("philox_seed", "64 bits", philox_seed)


def philox_state(query: Tensor, philox_seed: int | Tensor | None = None) -> Tensor:
    """Returns (seed, offset), int64 [2], from `philox_seed` or else from the device's generator.

    In a compiled graph independent branches may draw in another order than in eager mode; branches
    that depend on each other, as layers do, draw in the same.
    """
    if isinstance(philox_seed, Tensor):
        return philox_seed.contiguous()
    if philox_seed is not None:
        check_bits(philox_seed)
        wraps = 2**63 <= philox_seed < 2**64
        signed = philox_seed - 2**64 if wraps else philox_seed
        return torch.tensor([signed, 0], dtype=torch.int64, device=query.device)
    like = query
    if not _torch.is_compiling():
        watched = _torch.len_torch_dispatch_stack() != 0 or _torch.is_jit_tracing()
        if not watched and _torch.is_direct(query):
            return _draw(query, 0)  # what the operator does, without the time to call it
        if _torch.are_transforms_active():
            mapped = _torch.mapped_by_every_vmap(query.device)
            like = query if mapped is None else mapped
    return draw_philox_state(like, _next_call_site())


@torch.library.register_fake("fused_attention::philox_state")
def _fake(like: Tensor, call_site: int) -> Tensor:
    return like.new_empty(2, dtype=torch.int64)


@torch.library.register_vmap("fused_attention::philox_state")
def _vmap(
    info: Any, in_dims: tuple[int | None, ...], like: Tensor, call_site: int
) -> tuple[Tensor, int | None]:
    if info.randomness == "error":
        raise RuntimeError(
            "vmap: dropout in attention is random; pass randomness='same' or 'different' to vmap"
        )
    if info.randomness == "same":
        return draw_philox_state(like, call_site), None
    draws = [draw_philox_state(like, call_site) for _ in range(max(info.batch_size, 1))]
    return torch.stack(draws)[: info.batch_size], 0

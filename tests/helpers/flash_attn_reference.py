"""flash-attn's definition in plain PyTorch, one sequence at a time: [S, H, D], whole matrices.

`exact` computes in float64, `naive` in the inputs' dtype as 16-bit kernels round. Which keys a
query sees is written down row by row, from the documentation and the checks of flash-attn's C++.
"""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selection import covering

DROPOUT_P = 11141 / 65536  # about 0.17, and exactly what the kernels use


class Sequence(NamedTuple):
    """One sequence: q [Sq, Hq, D], k [Sk, Hkv, D], v [Sk, Hkv, Dv], and what comes back."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor | None = None  # [Hq]
    keep: Tensor | None = None  # [Hq, Sq, Sk], False where dropout drops
    grad_out: Tensor | None = None
    grad_lse: Tensor | None = None


class Options(NamedTuple):
    """room: the length that limits of the window are compared with. version: of flash-attn."""

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    softmax_scale: float | None = None
    room: int = 0
    version: int = 2


def visible(Sq: int, Sk: int, o: Options) -> Tensor:
    """Returns which keys each query sees, [Sq, Sk]."""
    left, right = o.window_size
    right = 0 if o.causal else right
    left_is_none = left < 0 or (o.version == 2 and left >= o.room)
    right_is_none = right < 0 or (o.version == 2 and right >= o.room)
    if o.version == 2 and right_is_none and not left_is_none:
        right, right_is_none = o.room, False
    seen = torch.zeros(Sq, Sk, dtype=torch.bool)
    for i in range(Sq):
        own = i + Sk - Sq
        first = 0 if left_is_none else max(own - left, 0)
        last = Sk - 1 if right_is_none else min(own + right, Sk - 1)
        if first <= last:
            seen[i, first : last + 1] = True
    return seen


def scores(q: Tensor, k: Tensor, x: Sequence, o: Options) -> Tensor:
    """Returns the logits [Hq, Sq, Sk] of q [Hq, Sq, D] and k [Hq, Sk, D], hidden keys included."""
    (Sq, D), Sk = q.shape[1:], k.shape[1]
    s = scale_of(D, o) * (q @ k.mT)
    if o.softcap > 0:
        s = o.softcap * torch.tanh(s / o.softcap)
    if x.slopes is not None:
        distance = torch.arange(Sq).view(Sq, 1) + Sk - Sq - torch.arange(Sk)
        s = s - x.slopes.to(s.dtype).view(-1, 1, 1) * distance.abs()
    return s


def scale_of(D: int, o: Options) -> float:
    return D**-0.5 if o.softmax_scale is None else o.softmax_scale


def softmax(s: Tensor, seen: Tensor, o: Options) -> tuple[Tensor, Tensor]:
    """Returns the weights, and lse [Hq, Sq]."""
    sees_any = seen.any(1, keepdim=True)
    s = torch.where(seen, s, -torch.inf)
    lse = torch.where(sees_any, s, 0.0).logsumexp(2) if s.shape[2] else s.sum(2)
    p = torch.where(seen, (s - lse.unsqueeze(2)).exp(), 0.0)
    return p, torch.where(sees_any[:, 0], lse, torch.inf if o.version == 2 else -torch.inf)


def heads_first(x: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v as [Hq, S, D]."""
    group = x.q.shape[1] // x.k.shape[1]
    k, v = (t.transpose(0, 1).repeat_interleave(group, 0) for t in (x.k, x.v))
    return x.q.transpose(0, 1), k, v


def attend(x: Sequence, o: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Returns out [Sq, Hq, Dv], lse [Hq, Sq] and the weights without dropout [Hq, Sq, Sk]."""
    q, k, v = heads_first(x)
    p, lse = softmax(scores(q, k, x, o), visible(q.shape[1], k.shape[1], o), o)
    kept = p if x.keep is None else torch.where(x.keep, p, 0.0) / (1 - DROPOUT_P)
    return (kept @ v).transpose(0, 1), lse, p


def _exact(x: Sequence, o: Options) -> dict[str, Tensor]:
    q, k, v = (t.detach().double().requires_grad_() for t in (x.q, x.k, x.v))
    out, lse, _ = attend(x._replace(q=q, k=k, v=v), o)
    results = {"out": out.detach(), "lse": lse.detach()}
    if x.grad_out is None or x.grad_lse is None:
        return results
    grads = (x.grad_out.double(), x.grad_lse.double().masked_fill(lse.isinf(), 0.0))
    gradients = torch.autograd.grad((out, lse), (q, k, v), grads)
    return results | dict(zip(("dq", "dk", "dv"), gradients, strict=True))


def _naive(x: Sequence, o: Options, backwards: bool) -> dict[str, Tensor]:
    """Computes in the inputs' dtype as FlashAttention-2 (Dao 2023, Algorithms 1 and 2) rounds.

    backwards: every product is summed from its last term to its first.
    """
    dtype = x.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    (Sq, Hq, D), Hkv = x.q.shape, x.k.shape[1]

    def rounded(t: Tensor) -> Tensor:
        return t.to(dtype).to(wide)

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.flip(-1) @ b.flip(-2) if backwards else a @ b

    def per_key_head(t: Tensor) -> Tensor:
        return t.unflatten(0, (Hkv, Hq // Hkv)).sum(1).transpose(0, 1).to(dtype)

    q, k, v = (t.to(wide) for t in heads_first(x))
    seen = visible(Sq, k.shape[1], o)
    turned = (q.flip(-1), k.flip(-1)) if backwards else (q, k)
    p, lse = softmax(scores(*turned, x, o), seen, o)
    kept = torch.ones_like(p) if x.keep is None else x.keep / (1 - DROPOUT_P)
    dropped = rounded(p * kept)
    out = rounded(product(dropped, v))
    results = {"out": out.transpose(0, 1).to(dtype), "lse": lse}
    if x.grad_out is None or x.grad_lse is None:
        return results
    do = x.grad_out.transpose(0, 1).to(wide)
    delta = (do * out).sum(-1, keepdim=True) - x.grad_lse.to(wide).unsqueeze(-1)
    ds = p * (product(do, v.mT) * kept - delta)
    if o.softcap > 0:
        ds = ds * (1 - torch.tanh(scale_of(D, o) * product(q, k.mT) / o.softcap) ** 2)
    ds = scale_of(D, o) * rounded(ds)
    dq = product(ds, k).transpose(0, 1).to(dtype)
    dk, dv = per_key_head(product(ds.mT, q)), per_key_head(product(dropped.mT, do))
    return results | {"dq": dq, "dk": dk, "dv": dv}


def _together(answers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([x[name].flatten() for x in answers]) for name in answers[0]}


def exact(sequences: list[Sequence], o: Options) -> dict[str, Tensor]:
    """Returns the results of all sequences, flattened: out, lse and, if asked for, gradients."""
    return _together([_exact(x, o) for x in sequences])


def naive(sequences: list[Sequence], o: Options) -> tuple[dict[str, Tensor], ...]:
    """Returns the answers of plain maths in two orders of summation: one may be lucky."""
    return tuple(_together([_naive(x, o, turn) for x in sequences]) for turn in (False, True))


def rotated(x: Tensor, cos: Tensor, sin: Tensor, positions: Any, interleaved: bool) -> Tensor:
    """Rotates x [S, H, D] as complex numbers, in float64."""
    wide = cos.shape[1]
    turns = torch.complex(cos.double(), sin.double())[positions].unsqueeze(1)
    x, rest = x.double()[..., : 2 * wide], x.double()[..., 2 * wide :]
    if interleaved:
        pairs = torch.view_as_complex(x.unflatten(-1, (wide, 2)).contiguous()) * turns
        return torch.cat((torch.view_as_real(pairs).flatten(-2), rest), -1)
    pairs = torch.complex(x[..., :wide], x[..., wide:]) * turns
    return torch.cat((pairs.real, pairs.imag, rest), -1)


def drawn_cases(axes: dict[str, list[Any]], count: int, is_valid: Any) -> list[tuple[Any, bool]]:
    """Draws `count` combinations of the values of `axes`; tells for each whether those that cover
    all pairs need it."""
    choose = random.Random(1).choice
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        row = {name: choose(values) for name, values in axes.items()}
        if is_valid(row):
            rows.append(row)
    needed = set(covering(rows))
    return [(row, n in needed) for n, row in enumerate(rows)]

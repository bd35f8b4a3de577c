"""Names the fault of a wrong result by imitation.

`Definition` computes attention in float64 in steps. An imitation replaces some of the steps by
wrong ones: a mask inverted, the scale forgotten, softcap applied after the mask. The first
imitation that reproduces the wrong result gives the fault its name. Gradients are those of
autograd, so that a step which detaches a tensor imitates a backward that forgets a term.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import reference
from . import targets, testing
from .contracts import MASKED_LSE, MASKED_ROWS, NUMBERS
from .targets import Target
from .testing import Case, Error, Inputs, Results

IMITATED = 0.1  # a result is this much closer to its imitation than to the truth
VAGUE = ("wrong result", "NaN or infinity without a reason")  # names that an imitation replaces
TILES = (8, 16, 32, 64, 128)

Changes = dict[str, Callable[..., Any]]  # steps of `Definition`, called with the definition first


# -- The definition in steps ---------------------------------------------------------------


class Definition:
    """The definition, `reference.py`, of one call. Each method is a step that may be replaced."""

    def __init__(self, case: Case, inputs: Inputs, changes: Changes) -> None:
        self.case, self.inputs, self.given = case, inputs, inputs.options
        self.leaves: dict[str, Any] = inputs.differentiable(torch.float64)
        i, j = torch.arange(case.Sq).view(-1, 1), torch.arange(case.Sk)
        self.i, self.j, self.s = i, j, torch.empty(0)
        for name, step in changes.items():
            setattr(self, name, partial(step, self))

    def read(self, name: str) -> Tensor:
        return self.leaves[name]

    def repeat(self, x: Tensor) -> Tensor:
        return x.repeat_interleave(self.case.Hq // self.case.Hkv, 1)

    def scale(self) -> float:
        return self.case.D**-0.5 if self.case.scale is None else self.case.scale

    def offset(self) -> int:
        return self.case.offset

    def left_offset(self) -> int:
        return self.offset()

    def sides(self) -> tuple[float, float]:
        """Returns how far query i sees to the left and to the right of key i + offset."""
        left, right = (math.inf if side < 0 else side for side in self.case.window_size)
        return left, 0 if self.case.causal else right

    def mask(self) -> Tensor:
        return self.given["mask"]

    def padding(self) -> Tensor:
        return self.given["key_padding_mask"]

    def visible(self) -> Tensor:
        left, right = self.sides()
        case, ahead = self.case, self.j - self.i
        seen = (ahead >= self.left_offset() - left) & (ahead <= self.offset() + right)
        seen = seen.expand(case.B, case.Hq, case.Sq, case.Sk)
        if case.mask:
            seen = seen & self.mask()
        if case.key_padding:
            seen = seen & ~self.padding().view(-1, 1, 1, case.Sk)
        return seen

    def product(self, q: Tensor, k: Tensor) -> Tensor:
        return self.scale() * (q @ k.mT)

    def cap(self, s: Tensor) -> Tensor:
        return self.case.softcap * torch.tanh(s / self.case.softcap) if self.case.softcap else s

    def bias(self) -> Tensor:
        return self.leaves["bias"]

    def slopes(self) -> Tensor:
        """Returns the slopes as [B or 1, Hq]."""
        return self.given["alibi_slopes"].double().view(-1, self.case.Hq)

    def distance(self) -> Tensor:
        return (self.i + self.offset() - self.j).abs()

    def added(self, s: Tensor) -> Tensor:
        if self.case.bias:
            s = s + self.bias()
        if self.case.alibi:
            s = s - self.slopes()[:, :, None, None] * self.distance()
        return s

    def hide(self, s: Tensor) -> Tensor:
        return torch.where(self.visible(), s, -math.inf)

    def logits(self, q: Tensor, k: Tensor) -> Tensor:
        return self.hide(self.added(self.cap(self.product(q, k))))

    def sinks(self) -> Tensor | None:
        return self.leaves.get("sinks")

    def softmax(self, s: Tensor) -> tuple[Tensor, Tensor]:
        return reference.softmax(s, self.sinks())

    def drop(self, p: Tensor) -> Tensor:
        if not self.case.dropout_p:
            return p
        return reference.dropout(p, self.case.dropout_p, self.given["philox"])

    def multiply(self, p: Tensor, v: Tensor) -> Tensor:
        return p @ v

    def log(self, lse: Tensor, s: Tensor) -> Tensor:
        return lse

    def results(self, names: Collection[str]) -> Results:
        """Returns out, lse and the gradients that are named."""
        leaves = {n: x for n, x in self.leaves.items() if f"d{n}" in names}
        with torch.set_grad_enabled(bool(leaves)):
            k, v = self.repeat(self.read("key")), self.repeat(self.read("value"))
            s = self.logits(self.read("query"), k)
            p, lse = self.softmax(s)
            out, lse = self.multiply(self.drop(p), v), self.log(lse, s)
        results = {"out": out.detach(), "lse": lse.detach()}
        if leaves:
            grad_lse = self.inputs.grad_lse.double().masked_fill(lse.detach().isinf(), 0.0)
            incoming = (self.inputs.grad_out.double(), grad_lse)
            outputs = [(x, dx) for x, dx in zip((out, lse), incoming, strict=True) if x.grad_fn]
            xs, dxs = zip(*outputs, strict=True)
            found = torch.autograd.grad(xs, list(leaves.values()), dxs, materialize_grads=True)
            results |= {f"d{name}": gradient for name, gradient in zip(leaves, found, strict=True)}
        return results


# -- Imitations ------------------------------------------------------------------------------


def of_window(case: Case) -> Iterator[tuple[str, Changes]]:
    """Yields the imitated faults of causal and window_size."""
    left, right = (math.inf if side < 0 else side for side in case.window_size)
    corner = case.Sk - case.Sq
    bottom = "bottom_right" in (case.causal, case.diagonal)
    if bottom and corner < 0:
        yield "offset of bottom-right clamped to 0", {"offset": lambda d: 0}
    if case.causal:
        names = ("bottom-right instead of top-left", "top-left instead of bottom-right")
        yield f"causal aligned {names[bottom]}", {"offset": lambda d: 0 if bottom else corner}
        yield "causal ignored", {"sides": lambda d: (left, right)}
        yield "causal hides the diagonal", {"sides": lambda d: (left, -1)}
    own_right = 0 if case.causal else right
    # A kernel that aligns everything bottom-right says top-left by a shifted window.
    shift = 0 if bottom else -corner
    yield (
        "right side clamped to Sk before the alignment",
        {
            "offset": lambda d: corner,
            "sides": lambda d: (left - shift, min(own_right + shift, case.Sk)),
            "distance": lambda d: (d.i + Definition.offset(d) - d.j).abs(),
        },
    )
    if case.window_size == (-1, -1):
        return
    everything = (math.inf, 0 if case.causal else math.inf)
    yield "window_size ignored", {"sides": lambda d: everything}
    exchanged = (right, 0 if case.causal else left)
    yield "window_size: left and right exchanged", {"sides": lambda d: exchanged}
    other = 0 if bottom else corner
    step = "left_offset" if case.causal else "offset"
    yield "window_size aligned at the other corner", {step: lambda d: other}
    clamped = min(left, case.Sk)
    yield "left side clamped to Sk before the alignment", {"sides": lambda d: (clamped, own_right)}
    for text, change in (("long", 1), ("short", -1)):
        yield (
            f"window_size: left side one token too {text}",
            {"sides": lambda d, x=left + change: (x, own_right)},
        )
        if not case.causal:
            yield (
                f"window_size: right side one token too {text}",
                {"sides": lambda d, x=right + change: (left, x)},
            )
            yield (
                f"window_size: both sides one token too {text}",
                {"sides": lambda d, x=change: (left + x, right + x)},
            )


def broadcast(x: Tensor, name: str, case: Case) -> Iterator[tuple[str, Tensor]]:
    """Yields (fault, tensor) for a mask or a bias whose dimensions are read wrongly."""
    for dim, part in enumerate(("batch", "head", "query", "key")):
        if x.shape[dim] > 1:
            yield f"{name}: that of the first {part} is used for all", x.narrow(dim, 0, 1)
    B, H, Q, K = x.shape
    if Q > 1 and K > 1:
        yield f"{name} transposed", x.reshape(B, H, K, Q).mT
    elif (K > 1 and case.Sq == K) or (Q > 1 and case.Sk == Q):
        yield f"{name} broadcast along the wrong axis", x.mT
    if B != H and {B, H} <= {1, case.B, case.Hq} and case.B == case.Hq:
        yield f"{name}: batch and heads exchanged", x.transpose(0, 1)


def of_scores(case: Case, inputs: Inputs) -> Iterator[tuple[str, Changes]]:
    """Yields the imitated faults of masks, scale, softcap, bias and ALiBi."""
    scale = case.D**-0.5 if case.scale is None else case.scale
    cap = Definition.cap
    if case.mask:
        mask = inputs.options["mask"]
        yield "mask inverted: True taken for hidden", {"mask": lambda d: ~mask}
        yield "mask ignored", {"mask": lambda d: torch.ones_like(mask)}
        for name, x in broadcast(mask, "mask", case):
            yield name, {"mask": lambda d, x=x: x}
    if case.key_padding:
        hidden = inputs.options["key_padding_mask"]
        yield "key_padding_mask inverted: True taken for visible", {"padding": lambda d: ~hidden}
        yield "key_padding_mask ignored", {"padding": lambda d: torch.zeros_like(hidden)}
        first = "key_padding_mask: that of the first batch is used for all"
        yield first, {"padding": lambda d: hidden[:1]}
    if case.scale is not None:
        yield "scale ignored", {"scale": lambda d: case.D**-0.5}
    yield "scale missing", {"scale": lambda d: 1.0}
    twice = "scale applied twice"
    if case.scale is None:  # two faults with the same result
        twice = "scale 1/D instead of 1/sqrt(D), or applied twice"
    yield twice, {"scale": lambda d: scale * scale}
    if scale < 0:  # a positive one leaves -inf as it is
        yield (
            "mask applied before the scale",
            {"logits": lambda d, q, k: d.added(cap(d, scale * d.hide(q @ k.mT)))},
        )
    if case.Dv != case.D:
        yield "scale 1/sqrt(Dv) instead of 1/sqrt(D)", {"scale": lambda d: case.Dv**-0.5}
    if case.softcap:
        yield "softcap ignored", {"cap": lambda d, s: s}
        yield (
            "softcap applied before the scale",
            {
                "product": lambda d, q, k: q @ k.mT,
                "cap": lambda d, s: scale * cap(d, s),
            },
        )
        yield (
            "softcap: tanh not multiplied by the cap",
            {"cap": lambda d, s: torch.tanh(s / case.softcap)},
        )
        yield (
            "softcap: scores not divided by the cap",
            {"cap": lambda d, s: case.softcap * torch.tanh(s)},
        )
        yield (
            "softcap applied after the bias",
            {"logits": lambda d, q, k: d.hide(cap(d, d.added(d.product(q, k))))},
        )
        yield (
            "softcap applied after the mask",
            {"logits": lambda d, q, k: cap(d, d.hide(d.added(d.product(q, k))))},
        )
        yield (
            "softcap applied after the mask and before the bias",
            {"logits": lambda d, q, k: d.added(cap(d, d.hide(d.product(q, k))))},
        )
    if case.bias:
        yield "bias ignored", {"bias": lambda d: 0 * d.leaves["bias"]}
        yield "bias added before the scale", {"bias": lambda d: scale * d.leaves["bias"]}
        yield "bias subtracted", {"bias": lambda d: -d.leaves["bias"]}
        yield (
            "bias added after the softmax",
            {
                "bias": lambda d: 0 * d.leaves["bias"],
                "drop": lambda d, p: Definition.drop(d, p + d.leaves["bias"]),
            },
        )
        for name, x in broadcast(inputs.tensors["bias"].double(), "bias", case):
            yield name, {"bias": lambda d, x=x: x}
    if case.alibi:
        slopes, corner = Definition.slopes, case.Sk - case.Sq
        yield "alibi_slopes ignored", {"slopes": lambda d: 0 * slopes(d)}
        yield "alibi_slopes with the wrong sign", {"slopes": lambda d: -slopes(d)}
        yield "alibi_slopes multiplied by the scale", {"slopes": lambda d: scale * slopes(d)}
        other = corner - case.offset
        ahead = "alibi_slopes: distance from the wrong corner"
        yield ahead, {"distance": lambda d: (d.i + other - d.j).abs()}
        for one in (1, -1):
            yield (
                "alibi_slopes: distance off by one",
                {"distance": lambda d, one=one: (d.i + d.offset() - d.j + one).abs()},
            )
            yield (
                "alibi_slopes of the wrong head",
                {"slopes": lambda d, one=one: slopes(d).roll(one, 1)},
            )
        yield "alibi_slopes of the wrong head", {"slopes": lambda d: slopes(d).flip(1)}
        if case.Hq != case.Hkv:
            yield (
                "alibi_slopes of the wrong head",
                {"slopes": lambda d: d.repeat(slopes(d)[:, : case.Hkv])},
            )
        first = "alibi_slopes: those of the first batch are used for all"
        yield first, {"slopes": lambda d: slopes(d)[:1]}
        signed = "alibi_slopes: distance without its absolute value"
        yield signed, {"distance": lambda d: d.i + d.offset() - d.j}


def of_the_rest(case: Case, inputs: Inputs) -> Iterator[tuple[str, Changes]]:
    """Yields the imitated faults of sinks, dropout, heads, lse, ragged edges and memory."""
    scale = case.D**-0.5 if case.scale is None else case.scale
    if case.sinks:
        yield "sinks ignored", {"sinks": lambda d: None}
        yield "sinks multiplied by the scale", {"sinks": lambda d: scale * d.leaves["sinks"]}
        yield "sinks of the wrong head", {"sinks": lambda d: d.leaves["sinks"].roll(1)}

        def in_numerator(d: Definition, s: Tensor) -> tuple[Tensor, Tensor]:
            p, lse = Definition.softmax(d, s)
            weight = torch.exp(d.leaves["sinks"].view(-1, 1) - lse)
            return torch.where(d.visible(), p + weight[..., None], 0.0), lse

        yield "sinks added to the numerator", {"softmax": in_numerator}
        yield "lse without the sinks", {"log": lambda d, lse, s: s.logsumexp(-1)}
    if case.dropout_p:
        kept = 1 - round(case.dropout_p * 65536) / 65536
        drop = Definition.drop
        yield "dropout not scaled", {"drop": lambda d, p: kept * drop(d, p)}
        yield "dropout ignored", {"drop": lambda d, p: p}

        def kept_only(d: Definition, s: Tensor) -> Tensor:
            return torch.where(drop(d, torch.ones_like(s)) > 0, Definition.hide(d, s), -math.inf)

        before = "dropout before the softmax's sum"
        yield before, {"hide": kept_only, "drop": lambda d, p: p}
        yield (
            "dropout keeps what it should drop",
            {
                "drop": lambda d, p: torch.where(
                    drop(d, torch.ones_like(p)) > 0, 0.0, p / (1 - kept)
                )
            },
        )
    group = case.Hq // case.Hkv
    if case.Hq != case.Hkv > 1:
        modulo = "GQA heads interleaved: h reads h % Hkv"
        yield modulo, {"repeat": lambda d, x: x.repeat(1, group, 1, 1)}
    if case.Hkv > 1:
        first = "key and value of the first head are used for all"
        yield first, {"repeat": lambda d, x: x[:, :1].expand(-1, case.Hq, -1, -1)}
    if case.B > 1:
        first = "key and value of the first batch are used for all"
        yield first, {"repeat": lambda d, x: Definition.repeat(d, x[:1].expand_as(x))}
    yield "lse in base 2", {"log": lambda d, lse, s: lse / math.log(2)}

    def without_maximum(d: Definition, lse: Tensor, s: Tensor) -> Tensor:
        highest = s.amax(-1)
        return lse - torch.where(highest.isinf(), 0.0, highest).detach()

    def without_any_maximum(d: Definition, lse: Tensor, s: Tensor) -> Tensor:
        return lse - torch.maximum(s.amax(-1), d.leaves["sinks"].view(-1, 1)).detach()

    yield "lse without the maximum", {"log": without_maximum}
    if case.sinks:
        yield "lse without the maximum", {"log": without_any_maximum}
    yield "lse without its logarithm", {"log": lambda d, lse, s: lse.exp()}
    for tile in TILES:
        whole, padded = case.Sk // tile * tile, -case.Sk % tile
        if 0 < whole < case.Sk:
            yield (
                "keys of the ragged edge ignored",
                {
                    "hide": lambda d, s, n=whole: torch.where(
                        d.j < n, Definition.hide(d, s), -math.inf
                    )
                },
            )
        if padded:
            yield (
                "padding of the last tile takes part in the softmax",
                {"softmax": lambda d, s, n=padded: padded_softmax(d, s, n)},
            )
        rows = case.Sq // tile * tile
        if 0 < rows < case.Sq:
            yield (
                "queries of the ragged edge are 0",
                {"multiply": lambda d, p, v, n=rows: torch.where(d.i < n, p @ v, 0.0)},
            )
    if case.Hq > 1 < case.Sq:

        def misread(d: Definition, name: str) -> Tensor:
            x = d.leaves[name]
            return x.reshape(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

        name = "layout: query, key and value are read as [B, S, H, D]"
        yield name, {"read": misread}
        yield (
            name,
            {
                "read": misread,
                "multiply": lambda d, p, v: (p @ v).transpose(1, 2).reshape(*p.shape[:3], -1),
            },
        )


def padded_softmax(d: Definition, s: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    s = torch.cat([s, s.new_zeros(*s.shape[:-1], zeros)], -1)
    p, lse = reference.softmax(s, d.sinks())
    return p[..., : d.case.Sk], lse


def of_gradients(case: Case) -> Iterator[tuple[str, Changes]]:
    """Yields the imitated faults of the backward: wrong gradients of a right result.

    y + (x - y).detach() has the value of x and the gradient of y.
    """

    def as_if(x: Tensor, y: Tensor) -> Tensor:
        return y + (x - y).detach()

    cap = Definition.cap

    def unscaled(d: Definition, q: Tensor, k: Tensor) -> Tensor:
        return as_if(d.scale() * (q @ k.mT), q @ k.mT)

    yield "the gradient forgets the scale", {"product": unscaled}
    if case.softcap:
        yield (
            "the gradient forgets the derivative of softcap",
            {"cap": lambda d, s: as_if(cap(d, s), s)},
        )

    group = case.Hq // case.Hkv
    if group > 1:
        for head in (0, group - 1):

            def of_one(d: Definition, x: Tensor, head: int = head) -> Tensor:
                repeated = x.repeat_interleave(group, 1)
                mine = torch.arange(case.Hq).view(-1, 1, 1) % group == head
                return torch.where(mine, repeated, repeated.detach())

            yield "the gradient of key and value is not summed over the group", {"repeat": of_one}

        def mean(d: Definition, x: Tensor) -> Tensor:
            repeated = x.repeat_interleave(group, 1)
            return as_if(repeated, repeated / group)

        yield "the gradient of key and value is averaged over the group", {"repeat": mean}
    yield "the gradient forgets that of lse", {"log": lambda d, lse, s: lse.detach()}

    def without_delta(d: Definition, s: Tensor) -> tuple[Tensor, Tensor]:
        d.s = s
        p, lse = Definition.softmax(d, s)
        return torch.exp(s - torch.where(lse.isinf(), 0.0, lse).detach()[..., None]), lse

    yield "the gradient forgets delta", {"softmax": without_delta}
    if case.dropout_p:
        forgets: Changes = {"drop": lambda d, p: as_if(Definition.drop(d, p), p)}
        yield "the gradient forgets dropout", forgets

        def with_right_delta(d: Definition, p: Tensor, v: Tensor) -> Tensor:
            out = p @ v
            lse = Definition.softmax(d, d.s)[1]
            lse = torch.where(lse.isinf(), 0.0, lse)[..., None]
            return out - (lse - lse.detach()) * out.detach()

        delta: Changes = {"softmax": without_delta, "multiply": with_right_delta}
        yield "the gradient forgets dropout", forgets | delta
    if case.bias:

        def scaled(d: Definition) -> Tensor:
            return as_if(d.leaves["bias"], d.scale() * d.leaves["bias"])

        yield "the gradient of bias is multiplied by the scale", {"bias": scaled}
    if case.sinks:
        yield (
            "the gradient of sinks has the wrong sign",
            {"sinks": lambda d: as_if(d.leaves["sinks"], -d.leaves["sinks"])},
        )


def imitations(case: Case, inputs: Inputs) -> list[tuple[str, Changes]]:
    """Returns the imitated faults of a forward."""
    return [*of_window(case), *of_scores(case, inputs), *of_the_rest(case, inputs)]


# -- Naming ----------------------------------------------------------------------------------


def distance(got: Tensor, want: Tensor) -> float:
    """Returns the rms of the difference; infinite if NaN or infinity are at other places."""
    got, want = got.double(), want.double()
    if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
        return math.inf
    finite = want.isfinite()
    if not bool(finite.any()):
        return 0.0
    return (got - want)[finite].square().mean().sqrt().item()


def rms(x: Tensor) -> float:
    x = x[x.isfinite()].double()
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def multiple(got: Tensor, want: Tensor) -> float | None:
    """Returns the factor, other than 1, by which `got` is a multiple of `want`, or None."""
    got, want = got.double().flatten(), want.double().flatten()
    norm = want.dot(want).item()
    factor = got.dot(want).item() / norm if norm > 0 else math.nan
    if not abs(factor - 1) > 0.01:
        return None
    return factor if distance(got, factor * want) < 0.01 * distance(got, want) else None


def blind_rows(exact: Results) -> Tensor:
    """Returns which rows see no key, and have no sink: bool [B, Hq, Sq]."""
    return exact["lse"].isneginf()


def forgiven(got: Results, exact: Results, names: Collection[str]) -> Results:
    """Returns the results with those of fully masked rows, of out or lse, replaced by the truth."""
    blind = blind_rows(exact)
    changed = dict(got)
    for name in names:
        if name in got and got[name].shape == exact[name].shape:
            rows = blind[..., None] if name == "out" else blind
            changed[name] = torch.where(rows, exact[name].to(got[name].dtype), got[name])
    return changed


def is_imitated(imitation: Results, got: Results, exact: Results, judged: Collection[str]) -> bool:
    """Returns whether the judged results are those of the imitation, and not the true ones."""
    seeing = ~blind_rows(exact)
    if "lse" in judged:  # out is right
        right, out = exact["out"][seeing], imitation["out"][seeing]
        if distance(out, right) > IMITATED * rms(right):
            return False
    for name in judged:
        mine, truth, imitated = got[name], exact[name], imitation[name]
        if imitated.shape != mine.shape:
            return False
        if name not in ("out", "lse"):
            if not is_closer(mine, imitated, truth):
                return False
            continue
        # Fully masked rows are another fault: those of the truth, perhaps those of the imitation.
        both = seeing & ~blind_rows(imitation)
        if not any(is_closer(mine[x], imitated[x], truth[x]) for x in (seeing, both)):
            return False
    return True


def is_closer(mine: Tensor, imitated: Tensor, truth: Tensor) -> bool:
    """Returns whether a result is that of an imitation. Zeros are not, if they are only nearer."""
    error = distance(mine, imitated)
    noise = max(IMITATED * rms(imitated), 0.01 * rms(truth))
    return error < IMITATED * distance(mine, truth) and error <= noise


def imitation_of(
    case: Case,
    inputs: Inputs,
    got: Results,
    exact: Results,
    judged: Collection[str],
    known: Sequence[str],
) -> str | None:
    """Returns the name of the first imitation that reproduces the results; known ones go first."""
    order = {name: number for number, name in enumerate(known)}
    candidates = imitations(case, inputs)
    if not {"out", "lse"} & set(judged):
        where = f", in the backward only ({', '.join(judged)})"
        candidates = [(name + where, changes) for name, changes in candidates]
        candidates = [*of_gradients(case), *candidates]
    for name, changes in sorted(candidates, key=lambda x: order.get(x[0], len(order))):
        if is_imitated(Definition(case, inputs, changes).results(judged), got, exact, judged):
            return name
    return None


LAYOUTS = {"[B, S, H, D]": (0, 2, 1, 3), "[S, B, H, D]": (2, 0, 1, 3), "[B, H, D, S]": (0, 1, 3, 2)}


def layout_of(out: Tensor, truth: Tensor) -> str | None:
    """Names the layout of a result that is right but for the order of its dimensions."""
    for name, order in LAYOUTS.items():
        want = truth.permute(order)
        if out.numel() == want.numel():
            error = distance(out, want.reshape(out.shape))
            if error <= 0.02 * rms(truth) and error < IMITATED * distance(out, truth):
                return f"layout: out is {name} instead of [B, H, S, D]"
    return None


def layout_taken(target: Target, inputs: Inputs, exact: Results, error: float) -> str | None:
    """Names the layout of the inputs with which the function returns the right result.

    error: the distance of its result from the truth in the layout that is expected.
    """
    for name, order in list(LAYOUTS.items())[:2]:
        changed = dict(inputs.tensors)
        for part in ("query", "key", "value"):
            changed[part] = changed[part].permute(order)
        try:
            out = target.call(**changed, **inputs.keywords)
        except Exception:  # the function may raise anything
            continue
        want = exact["out"].permute(order)
        if not isinstance(out, Tensor):
            continue
        if distance(out, want) <= min(0.02 * rms(want), IMITATED * error):
            return f"layout: takes {name} instead of [B, H, S, D]"
    return None


def passes(target: Target, case: Case, backward: bool) -> bool:
    inputs, exact, naive = targets.answers_to(target, case)
    try:
        got, faults = targets.call(target, inputs, backward)
    except Exception:  # the function may raise anything
        return False
    return not faults and not any(e.is_wrong for e in testing.errors(got, exact, naive))


def rows_are_multiples(mine: Tensor, truth: Tensor) -> bool:
    """Returns whether each row is the true one times a factor of its own, all above 1."""
    if truth.shape[-1] < 8:
        return False
    mine, truth = mine.double(), truth.double()
    factors = (mine * truth).sum(-1, keepdim=True) / truth.square().sum(-1, keepdim=True)
    factors = torch.where(truth.square().sum(-1, keepdim=True) > 0, factors, 1.0)
    near = distance(mine, factors * truth) < 0.01 * distance(mine, truth)
    return near and bool((factors > 0.999).all())


def name_of_fault(
    target: Target,
    case: Case,
    inputs: Inputs,
    got: Results,
    exact: Results,
    naive: tuple[Results, ...],
    wrong: list[Error],
    factor: float,
    known: Sequence[str] = (),
) -> tuple[str, str, str]:
    """Returns (fault, broken clause, wrong result), as far as the fault can be told.

    factor: how many times the naive error is allowed. known: faults that this implementation has
        shown before, which are tried first.
    """
    names = {error.result for error in wrong}
    judged = sorted(names)
    if {"out", "lse"} & names:
        judged = ["out" if "out" in names else "lse"]
    first = judged[0]
    forward = first in ("out", "lse")
    mine, truth = got[first], exact[first]

    def found(name: str, clause: str = NUMBERS) -> tuple[str, str, str]:
        return name, clause, first

    for measure in ("shape", "dtype"):
        messages = [error.message for error in wrong if error.measure == measure]
        if messages:
            return found((measure == "shape" and layout_of(mine, truth)) or messages[0])
    blind = blind_rows(exact)
    if bool(blind.any()):
        others = testing.errors(forgiven(got, exact, ["out", "lse"]), exact, naive, factor)
        if forward and not any(e.is_wrong for e in others if e.result == first):
            if first == "lse":
                return found("lse of fully masked rows is not -inf", MASKED_LSE)
            nan = " but NaN" if bool(mine[blind].isnan().any()) else ""
            return found(f"fully masked rows are not 0{nan}", MASKED_ROWS)
        if not forward and bool(mine.isnan().any()):
            return found(f"NaN in the gradient of fully masked rows ({first})", MASKED_ROWS)
    if case.memory_format != "BHSD" and passes(
        target, replace(case, memory_format="BHSD"), not forward
    ):
        return found("strides of the inputs ignored")
    rough = rough_name(case, first, mine, truth)
    if rough in known and not rough.startswith(VAGUE):  # saves the imitations
        return found(rough)
    name = imitation_of(case, inputs, got, exact, judged, known)
    if name is not None:
        return found(name)
    if first == "out":
        error = distance(mine, truth)
        name = layout_of(mine, truth) or layout_taken(target, inputs, exact, error)
        if name is not None:
            return found(name)
    return found(rough)


def rough_name(case: Case, name: str, mine: Tensor, truth: Tensor) -> str:
    """Names what the numbers of one result have in common."""
    if bool((truth.isfinite() & ~mine.isfinite()).any()):
        return f"{VAGUE[1]} ({name})"
    times = multiple(mine, truth)
    if times is not None:
        return f"{name} is {times:.2g} times what it should be"
    if distance(mine, truth) < 0.02 * rms(truth):
        dtype = str(case.dtype).removeprefix("torch.")
        return f"not accurate enough ({name}, {dtype})"
    if name == "out" and rows_are_multiples(mine, truth):
        return "output not divided by the sum of all weights"
    return f"{VAGUE[0]} ({name}), the cause could not be told"

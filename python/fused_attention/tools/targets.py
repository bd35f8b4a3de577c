"""The implementations that `verify` checks, ours or another one, and how to call them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..attention import attention
from ..call.backends import BACKENDS, NAMES
from ..errors import ArgumentValueError
from . import testing
from .contracts import Call
from .foreign import Implementation, NotOffered
from .testing import Case, Inputs, Results


@dataclass(frozen=True)
class Target:
    """An implementation, and how to call it.

    call: takes the arguments of `attention()`. isa: of the backend cpu, in force during calls.
    source: lines of Python that define the function as `f`; signature: the arguments `f` takes.
    contract: the one that it is checked under if none is chosen.
    """

    name: str
    call: Call
    isa: str | None = None
    has_lse: bool = True
    source: str = ""
    signature: str = "attention"

    @property
    def contract(self) -> str:
        return "torch" if self.signature == "sdpa" else "strict"

    def in_force(self) -> contextlib.AbstractContextManager[None]:
        return testing.cpu_isa(self.isa) if self.isa else contextlib.nullcontext()


def own_targets(backend: str | None = None, isa: str | None = None) -> list[Target]:
    """Returns every usable backend and instruction set, or only the named one."""
    if backend is not None and backend not in NAMES:
        raise ArgumentValueError(f"--backend: expected one of {', '.join(NAMES)}, got {backend!r}")
    if isa is not None and isa not in _native.isas():
        usable = ", ".join(_native.isas())
        raise ArgumentValueError(f"--isa: expected one of {usable} on this machine, got {isa!r}")
    if isa is not None and backend not in (None, "cpu"):
        raise ArgumentValueError(f"--isa: only the backend cpu has any, not {backend!r}")

    def target(name: str, isa: str | None = None) -> Target:
        def call(*tensors: Tensor, **options: Any) -> Any:
            try:
                return attention(*tensors, **options, backend=name)
            except NotImplementedError as error:
                raise NotOffered(str(error)) from error

        source = (
            f"from fused_attention import attention\n\nf = partial(attention, backend={name!r})"
        )
        if isa:
            variable = 'os.environ["FUSED_ATTENTION_CPU_ISA"]'
            source = f"{variable} = {isa!r}\n{source}"
        return Target(f"{name}, {isa}" if isa else name, call, isa=isa, source=source)

    targets = []
    for row in BACKENDS:
        missing = row.missing()
        if missing:
            if row.name == backend:
                raise ArgumentValueError(f"--backend: {backend!r} cannot run here: {missing}")
        elif row.name == "cpu" and backend in (None, "cpu"):
            targets += [target("cpu", name) for name in ([isa] if isa else _native.isas())]
        elif backend in (None, row.name) and isa is None:
            targets.append(target(row.name))
    return targets


def foreign_target(implementation: Implementation) -> Target:
    module, _, path = implementation.name.partition(":")
    return Target(
        implementation.name,
        implementation,
        has_lse=implementation.signature == "attention" and implementation.takes("return_lse"),
        source=f"import {module}\n\nf = {module}.{path}",
        signature=implementation.signature,
    )


def answers_to(target: Target, case: Case) -> tuple[Inputs, Results, tuple[Results, ...]]:
    """Returns inputs, exact and naive answers; for a target without lse, grad_lse is 0."""
    inputs = testing.make_inputs(case)
    if not target.has_lse:
        inputs = replace(inputs, grad_lse=0 * inputs.grad_lse)
    return inputs, testing.exact(inputs), testing.naive(inputs)


def call(target: Target, inputs: Inputs, backward: bool) -> tuple[Results, list[str]]:
    """Returns the results of a call, with gradients, and its faults other than wrong numbers."""
    leaves = inputs.differentiable() if backward else inputs.tensors
    before = {name: x.detach().clone() for name, x in leaves.items()}
    lse_wanted = {"return_lse": True} if target.has_lse else {}
    answer = target.call(**leaves, **inputs.keywords, **lse_wanted)
    out, lse = answer if target.has_lse else (answer, None)
    results = {"out": out.detach()}
    outputs, incoming = [out], [inputs.grad_out.to(out.dtype)]
    faults = []
    for name, x in before.items():
        if not torch.equal(x, leaves[name].detach()):
            faults.append(f"{name} was written to")
            leaves[name].detach().copy_(x)
    if faults:
        return results, faults
    if lse is not None:
        results["lse"] = lse.detach()
        if lse.requires_grad:
            outputs.append(lse)
            # A row that sees nothing has lse = -inf, whose gradient has no meaning.
            zero = lse.detach().isinf()
            incoming.append(inputs.grad_lse.to(lse.dtype).masked_fill(zero, 0.0))
        elif backward and bool(inputs.grad_lse.any()):
            faults.append("lse is not differentiable")
    if backward and out.shape == inputs.grad_out.shape:
        if not out.requires_grad:
            faults.append("out is not differentiable")
        else:
            gradients = torch.autograd.grad(
                outputs, list(leaves.values()), incoming, allow_unused=True
            )
            for (name, x), gradient in zip(leaves.items(), gradients, strict=True):
                if gradient is None and x.numel():
                    faults.append(f"no gradient of {name}")
                elif gradient is not None:
                    results[f"d{name}"] = gradient
    return results, faults

"""Stands in for a GPU: our launches are compiled for it, and the interpreter executes their PTX.

    with PTXDevice("sm_90") as device:
        out, lse = operators.attention_forward(query, key, value, ...)  # CPU tensors
    assert not device.findings()

Everything above `Launch.run` runs as with a GPU: operators, tiles of that architecture, grids,
strides, specialisation of the arguments. New memory holds NaN, which shows the elements that a
kernel leaves out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from compile_launch import CompiledLaunch, compile_launch
from fused_attention.kernels import operators, tiles
from fused_attention.kernels.launch import Launch

from .machine import Finding, Report
from .machine import launch as execute
from .triton_compile import flat_arguments


@dataclass(frozen=True)
class Execution:
    """One launch, its compiled code, and the report of its execution."""

    launch: Launch
    compiled: CompiledLaunch
    report: Report

    @property
    def name(self) -> str:
        return self.compiled.name


@dataclass
class PTXDevice:
    """target: "sm_80" or "sm_90". before: called with each launch before it is executed."""

    target: str
    schedule: str = "lockstep"
    before: Callable[[Launch], None] = lambda launch: None
    executions: list[Execution] = field(default_factory=list)

    def __enter__(self) -> PTXDevice:
        self.exit = contextlib.ExitStack()
        enter = self.exit.enter_context
        enter(mock.patch.object(operators, "arch_of", lambda device: tiles.ARCHS[self.target]))
        enter(mock.patch.object(Launch, "run", lambda launch: self.run(launch)))
        self.exit.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True)  # this fills new memory with NaN
        return self

    def __exit__(self, *exception: Any) -> None:
        self.exit.close()

    def run(self, launch: Launch) -> None:
        if launch.grid[0] > 0:
            self.before(launch)
            compiled = compile_launch(self.target, launch)
            report = execute_launch(launch, compiled, self.schedule)
            self.executions.append(Execution(launch, compiled, report))

    def findings(self) -> list[Finding]:
        return [finding for one in self.executions for finding in one.report.findings]


def execute_launch(
    launch: Launch, compiled: CompiledLaunch, schedule: str = "lockstep", ptx: str | None = None
) -> Report:
    """Executes a compiled launch. ptx: another text in place of the compiled one."""
    scratch = None
    if compiled.scratch:
        scratch = torch.zeros(compiled.scratch * launch.grid[0], dtype=torch.uint8)
    passed = flat_arguments(compiled.arguments(launch.args), compiled.descriptors)
    arguments = [*passed, scratch, None]
    text = compiled.assembly if ptx is None else ptx
    return execute(
        text, compiled.name, launch.grid, compiled.threads, arguments, compiled.shared, schedule
    )

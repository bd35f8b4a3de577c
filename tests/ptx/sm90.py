"""Hopper: mbarriers, TMA and wgmma."""

from .machine import Program
from .opcodes import Run, unknown
from .parser import Instruction


def bulk_copy(program: Program, i: Instruction) -> Run:
    raise unknown(i)


def arrive_after_copies(program: Program, i: Instruction) -> Run:
    raise unknown(i)

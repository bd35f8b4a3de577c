"""cp.async: copies that land when the thread waits for their group, not before.

PTX ISA 9.x, 9.7.9.25. Until a copy lands its bytes hold `POISON`, and touching them is a finding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .load_store import CACHING, address, by_space, check_global_read, place
from .machine import Machine, Program
from .memory import POISON
from .operands import Run, allow, opcode, source, unknown
from .parser import Instruction

ALL = 1 << 60  # a wait for everything, committed or not


@dataclass
class Copy:
    threads: np.ndarray
    destination: np.ndarray  # index into the bytes of all shared memories
    data: np.ndarray  # [threads, words]
    group: np.ndarray  # of each thread


@opcode("cp")
def copy(program: Program, i: Instruction) -> Run:
    if "bulk" in i.modifiers:
        from . import sm90

        return sm90.bulk_copy(program, i)
    if i.modifiers[0] != "async":
        raise unknown(i)
    allow(i, "async", "ca", "cg", "shared", "shared::cta", "global", "commit_group", "wait_group",
          "wait_all", "mbarrier", "arrive", "noinc", CACHING)  # fmt: skip
    if "mbarrier" in i.modifiers:
        from . import sm90

        return sm90.arrive_after_copies(program, i)
    if "commit_group" in i.modifiers:
        return commit
    if "wait_all" in i.modifiers:
        return lambda m: land(m, m.active(), m.copy_group + ALL)
    if "wait_group" in i.modifiers:
        keep = int(i.operands[0].value)
        return lambda m: land(m, m.active(), m.copy_group - keep)
    return start(program, i)


def start(program: Program, i: Instruction) -> Run:
    to, from_ = (address(program, operand) for operand in i.operands[:2])
    size = int(i.operands[2].value)
    if size not in (4, 8, 16):
        raise unknown(i)
    # Bytes beyond the source size become zeros.
    given = source(program, i.operands[3], "u32") if len(i.operands) > 3 else None

    def run(m: Machine) -> None:
        threads = m.active()
        where = to(m, threads)
        good, flat = place(m, "shared", threads, where, size, True)
        threads = threads[good]
        wanted = np.full(len(threads), size, np.int64)
        if given:
            wanted = np.minimum(np.broadcast_to(given(m), m.everyone.shape)[threads], size)
        data = np.zeros((len(threads), size), np.uint8)
        origin = from_(m, threads)
        for amount in np.unique(wanted[wanted > 0]):
            rows = np.flatnonzero(wanted == amount)
            for part, chosen, offset in by_space(m, "global", threads[rows], origin[rows]):
                good, index = place(m, part, threads[rows], offset, int(amount), False, size)
                check_global_read(m, threads[rows[good]], index)
                data[rows[chosen][good], :amount] = m.memory.bytes[
                    index[:, None] + np.arange(amount)
                ]
        m.shared.write(threads, flat, size, asynchronous=True)
        words = flat[:, None] // 4 + np.arange(size // 4)
        m.shared.views[4][words] = POISON * 0x01010101
        m.copies.append(Copy(threads, flat, data.view(np.uint32), m.copy_group[threads]))

    return run


def commit(m: Machine) -> None:
    m.copy_group[m.active()] += 1


def land(m: Machine, threads: np.ndarray, before: np.ndarray) -> None:
    """Delivers to `threads` their copies of all groups with a number less than before[thread]."""
    waits = np.zeros(len(m.everyone), bool)
    waits[threads] = True
    left = []
    for copy_ in m.copies:
        lands = waits[copy_.threads] & (copy_.group < before[copy_.threads])
        if lands.any():
            deliver(m, copy_.threads[lands], copy_.destination[lands], copy_.data[lands])
        if not lands.all():
            stay = ~lands
            left.append(
                Copy(copy_.threads[stay], copy_.destination[stay], copy_.data[stay],
                     copy_.group[stay])
            )  # fmt: skip
    m.copies = left


def deliver(m: Machine, threads: np.ndarray, flat: np.ndarray, data: np.ndarray) -> None:
    words = data.shape[1]
    m.shared.views[4][flat[:, None] // 4 + np.arange(words)] = data
    stamp = m.own_clock[m.flat_warp[threads]] << 12 | m.warp_of[threads] << 5 | m.lane_of[threads]
    m.shared.note_write(m.shared.granules(flat, 4 * words), stamp[:, None], False)

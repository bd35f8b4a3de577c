"""A pytest plugin that runs a part of flash-attn's own tests, on a CPU, with our functions.

Their parameters multiply to more than half a million cases, so pytest must not see them all. Of
each test a case is kept if its size is within `LIMIT`; of these the sample has first one case for
every value of every parameter, then more, in the order of the SHA-256 of their names.
"""

import hashlib
import itertools
import json
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from fused_attention.integrations import flash_attn

# Largest size of a case: how many products of an element of a query and one of a key its attention
# has, in all heads, batches and repetitions. Lengths below 64 count as 64, for the inputs alone.
LIMIT = 2**32


class Grid(NamedTuple):
    """How much of a test to run."""

    heads: int  # batch · heads · repetitions, as the test has them
    sample: int


GRIDS = {
    "flash_attn_2": {
        "test_flash_attn_qkvpacked": Grid(4 * 9, 30),
        "test_flash_attn_varlen_qkvpacked": Grid(5 * 6, 30),
        "test_flash_attn_output": Grid(4 * 6, 40),
        "test_flash_attn_varlen_output": Grid(4 * 6, 40),
        "test_flash_attn_causal": Grid(8 * 9, 20),
        "test_flash_attn_varlen_causal": Grid(8 * 9, 25),
        "test_flash_attn_splitkv": Grid(12, 30),
        "test_flash_attn_kvcache": Grid(2 * 6, 90),
        "test_flash_attn_race_condition": Grid(60 * 4 * 21, 8),
        "test_flash_attn_bwd_overflow": Grid(2 * 5, 10),
        "test_flash_attn_bwd_transpose": Grid(5 * 2, 8),
        "test_flash_attn_bwd_varlen_overflow": Grid(3 * 5, 6),
        "test_flash_attn_deterministic": Grid(4 * 9 * 51, 8),
        "test_flash_attn_varlen_deterministic": Grid(2 * 9 * 51, 8),
        "test_rotary_emb_func": Grid(32 * 4, 12),
        "test_rotary_emb_qkv": Grid(32 * 4, 3),
        "test_rotary_emb_kv": Grid(32 * 4, 3),
        "test_rotary_emb_varlen_func": Grid(32 * 4, 12),
    },
    "flash_attn_3": {
        "test_flash_attn_output": Grid(9 * 6 * 3, 40),
        "test_flash_attn_varlen_output": Grid(9 * 6 * 3, 40),
        "test_flash_attn_kvcache": Grid(5 * 6 * 2, 60),
        "test_flash_attn_cluster": Grid(2 * 16 * 2, 2),
        "test_flash_attn_race_condition": Grid(60 * 4 * 21, 8),
        "test_flash_attn_combine": Grid(5 * 16 * 40, 30),
    },
}


def pytest_addoption(parser):
    parser.addoption("--every-case", action="store_true", help="all cases within the size limit")


def pytest_configure(config):
    # What the tests ask of the GPU. 8.0 is an A100, for which they expect the most without float8.
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=80 * 2**30)
    flash_attn.install()


# -- The sample --------------------------------------------------------------------------


def size(case, grid):
    seqlen = case.get("seqlen", 1)
    seqlen_q = case.get("seqlen_q", seqlen)
    seqlen_k = case.get("seqlen_k", case.get("num_splits", seqlen))
    return grid.heads * max(seqlen_q, 64) * max(seqlen_k, 64) * case.get("d", 64)


def label(value):
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def axes(marks):
    """Yields (names, rows of values) for each parametrize mark."""
    for mark in marks:
        names, rows = mark.args[0], mark.args[1]
        names = [name.strip() for name in names.split(",")]
        yield names, [row if len(names) > 1 else (row,) for row in rows]


def cases(marks):
    """Yields (name, {parameter: value}) of every case."""
    names, rows = zip(*axes(marks), strict=True)
    names = list(itertools.chain(*names))
    for choice in itertools.product(*rows):
        case = dict(zip(names, itertools.chain(*choice), strict=True))
        yield "-".join(f"{key}={label(value)}" for key, value in case.items()), case


def chosen(named_cases, count):
    """Returns `count` of the cases, or as many as it takes to have every value of a parameter."""
    ordered = sorted(named_cases, key=lambda x: hashlib.sha256(x[0].encode()).digest())
    met, first, rest = set(), [], []
    for name, case in ordered:
        values = {(key, label(value)) for key, value in case.items()}
        (rest if values <= met else first).append((name, case))
        met |= values
    return first + rest[: max(count - len(first), 0)]


COUNTS = {}


def narrow(function, grid, count):
    """Replaces the parameters of a test by a sample of its cases."""
    marks = [mark for mark in function.pytestmark if mark.name == "parametrize"]
    total = math.prod(len(rows) for _, rows in axes(marks))
    small = [(name, case) for name, case in cases(marks) if size(case, grid) <= LIMIT]
    sample = chosen(small, count)
    COUNTS[function.__name__] = {"all": total, "small": len(small), "chosen": len(sample)}
    names = list(next(cases(marks))[1])
    rows = [tuple(case[name] for name in names) for _, case in sample]
    mark = pytest.mark.parametrize(names, rows, ids=[name for name, _ in sample])
    function.pytestmark = [mark.mark]


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector, name, obj):
    folder = collector.path.parent
    grid = GRIDS.get(folder.name, {}).get(name)
    if grid is not None and name not in COUNTS:
        everything = collector.config.getoption("--every-case")
        narrow(obj, grid, 10**9 if everything else grid.sample)
        (folder / "counts.json").write_text(json.dumps(COUNTS))

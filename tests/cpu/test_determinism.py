"""The same inputs give the same bits, forward and backward, whatever the number of threads."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fused_attention.tools import testing
from fused_attention.tools.testing import Case

CASES = {
    "plain": Case(B=2, Hq=3, Hkv=3, Sq=150, Sk=201, D=40, Dv=40),
    "causal gqa": Case(B=1, Hq=4, Hkv=2, Sq=170, Sk=170, D=32, Dv=24, causal=True),
    "everything": Case(
        B=2, Hq=4, Hkv=2, Sq=99, Sk=130, D=16, Dv=16, causal="bottom_right", window_size=(60, 0),
        mask="B1QK", bias="1HQK", key_padding=True, softcap=5.0, alibi="H", sinks=True,
        dropout_p=0.2,
    ),
    "bias of all heads": Case(B=2, Hq=3, Hkv=1, Sq=120, Sk=100, bias="11QK", dropout_p=0.1),
    "bias of keys": Case(B=2, Hq=3, Hkv=1, Sq=120, Sk=200, bias="1H1K"),
    "one bias": Case(B=2, Hq=3, Hkv=3, Sq=70, Sk=200, bias="1111"),
    # With 8 tasks or more, one pass computes dq, dk and dv.
    "many heads": Case(B=2, Hq=8, Hkv=4, Sq=110, Sk=130, causal="bottom_right", dropout_p=0.2),
    "bias of all batches": Case(B=2, Hq=8, Hkv=8, Sq=60, Sk=100, bias="1HQK"),
    "bias of keys, all batches": Case(B=2, Hq=16, Hkv=8, Sq=60, Sk=100, bias="1H1K"),
    "bias of a batch": Case(B=8, Hq=2, Hkv=1, Sq=60, Sk=100, bias="B1QK", softcap=2.0),
}  # fmt: skip


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bits_do_not_depend_on_threads(isa, name, dtype):
    case = CASES[name]
    inputs = testing.make_inputs(type(case)(**{**vars(case), "dtype": dtype}))
    results = []
    for threads in (1, 2, 3, 1):
        with testing.num_threads(threads):
            results.append(testing.run(inputs, backend="cpu"))
    for other in results[1:]:
        for key, value in results[0].items():
            assert torch.equal(value, other[key]), key
    assert not testing.mismatches(results[0], testing.exact(inputs), testing.naive(inputs))


def test_every_isa_draws_the_same_dropout():
    from fused_attention import _native, dropout_mask, reference

    philox = torch.tensor([-(2**62) - 12345, 3])
    expected = reference.dropout_keep_mask(philox, 0.3, 2, 3, 50, 203)
    for name in _native.isas():
        with testing.cpu_isa(name):
            keep = torch.ops.fused_attention.dropout_keep_mask(philox, 0.3, 2, 3, 50, 203)
            assert torch.equal(keep, expected), name
    assert torch.equal(dropout_mask(2, 3, 50, 203, 0.3, philox_seed=philox), expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("parent_uses_it_first", [False, True])
def test_a_forked_child_computes_the_same(parent_uses_it_first):
    """Forks a new process, since the test run may have threads. Torch's own ops hang in a child."""
    script = """
import os, signal, sys, torch
from fused_attention import attention
torch.set_num_threads(2)
q = torch.randn(2, 4, 200, 64)
first = attention(q, q, q, causal=True) if sys.argv[1] == "True" else None
pid = os.fork()
if pid == 0:
    signal.alarm(60)
    torch.save(attention(q, q, q, causal=True), sys.argv[2])
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert torch.equal(torch.load(sys.argv[2]), attention(q, q, q, causal=True))
"""
    with tempfile.NamedTemporaryFile() as file:
        arguments = [sys.executable, "-c", script, str(parent_uses_it_first), file.name]
        run = subprocess.run(arguments, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_two_python_threads_at_once():
    inputs = testing.make_inputs(CASES["everything"])
    alone = testing.run(inputs, backend="cpu")
    with ThreadPoolExecutor(4) as pool:
        for together in pool.map(lambda _: testing.run(inputs, backend="cpu"), range(16)):
            for key, value in alone.items():
                assert torch.equal(value, together[key]), key

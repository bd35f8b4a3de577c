"""Lengths, offsets and pages change during a call, which must use the values that it checked.

Another process keeps writing to the tensor's memory: valid values and values that lead out of
bounds, in turn. A call returns the result for the valid values or raises an error; it never touches
memory outside its tensors.
"""

import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_attention import attention, kv_cache_append_, masked_softmax_

# Each program defines `index`, the tensor that changes, its `right` and `wrong` values, and a call.
CALLS = {
    "cu_seqlens_q": """
        index, right, wrong = int32(0, 300, 600), [0, 300, 600], [0, 2**30, 600]
        q, k, v = (torch.randn(600, 2, 64) for _ in range(3))
        def call():
            return attention(q, k, v, cu_seqlens_q=index, cu_seqlens_k=int32(0, 300, 600))
        """,
    "cu_seqlens_k": """
        index, right, wrong = int32(0, 300, 600), [0, 300, 600], [0, 2**30, 600]
        q, k, v = (torch.randn(600, 2, 64) for _ in range(3))
        def call():
            return attention(q, k, v, cu_seqlens_q=int32(0, 300, 600), cu_seqlens_k=index)
        """,
    "seqused_k": """
        index, right, wrong = int32(100, 300), [100, 300], [2**30, 2**30]
        q, k, v = (torch.randn(2, 2, 300, 64) for _ in range(3))
        def call():
            return attention(q, k, v, seqused_k=index)
        """,
    "seqused_k, one query": """
        index, right, wrong = int32(100, 3000), [100, 3000], [2**30, 2**30]
        q, k, v = (torch.randn(2, 2, s, 64) for s in (1, 3000, 3000))
        def call():
            return attention(q, k, v, seqused_k=index)
        """,
    "block_table": """
        index, right, wrong = int32(*range(20)).view(2, 10), list(range(20)), [2**30] * 20
        q, (k, v) = torch.randn(2, 2, 100, 64), (torch.randn(20, 16, 2, 64) for _ in range(2))
        def call():
            return attention(q, k, v, block_table=index, seqused_k=int32(160, 160))
        """,
    "block_table, backward": """
        index, right, wrong = int32(*range(20)).view(2, 10), list(range(20)), [2**30] * 20
        q = torch.randn(2, 2, 50, 64, requires_grad=True)
        k, v = (torch.randn(20, 16, 2, 64, requires_grad=True) for _ in range(2))
        def call():
            out = attention(q, k, v, block_table=index, seqused_k=int32(160, 160))
            return torch.autograd.grad(out.sum(), (q, k, v))[0]
        """,
    "cache_seqlens": """
        index, right, wrong = int32(5, 80), [5, 80], [2**30, 2**30]
        caches = [torch.zeros(2, 4, 100, 64) for _ in range(2)]
        tokens = torch.randn(2, 4, 20, 64)
        def call():
            kv_cache_append_(*caches, tokens, tokens, index)
            return caches[0]
        """,
    "block_table, append": """
        index, right, wrong = int32(*range(20)).view(2, 10), list(range(20)), [2**30] * 20
        caches = [torch.zeros(20, 16, 4, 64) for _ in range(2)]
        tokens = torch.randn(2, 4, 100, 64)
        def call():
            kv_cache_append_(*caches, tokens, tokens, int32(5, 50), index)
            return caches[0]
        """,
}

PROGRAM = """
import ctypes, mmap, os, sys
import torch
from fused_attention import attention, kv_cache_append_

torch.set_num_threads(1)
def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)

shared = mmap.mmap(-1, 4096)  # seen by the child too
for name, text in {calls!r}.items():
    print(name, flush=True)
    exec(text)
    place = torch.frombuffer(shared, dtype=torch.int32, count=index.numel()).view(index.shape)
    place.copy_(index)
    index = place
    expected = call()
    writer = os.fork()
    if writer == 0:
        size, parent = 4 * len(right), os.getppid()
        images = [bytes((ctypes.c_int32 * len(right))(*numbers)) for numbers in (right, wrong)]
        while os.getppid() == parent:
            for image in images:
                shared[:size] = image
        os._exit(0)
    for _ in range({rounds}):
        try:
            out = call()
        except RuntimeError as error:  # the backward may raise it too
            assert "expected" in str(error)
        else:
            assert torch.equal(out, expected), "a result for lengths that nobody gave"
    os.kill(writer, 9)
    os.waitpid(writer, 0)
"""


def test_what_was_checked_is_what_is_used(pytestconfig):
    rounds = 5000 if pytestconfig.getoption("--full") else 60
    calls = {name: textwrap.dedent(text) for name, text in CALLS.items()}
    program = PROGRAM.format(calls=calls, rounds=rounds)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    died = f"killed by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else ""
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {died}{done.stderr}"


@given(
    B=st.integers(1, 3),
    S=st.integers(1, 4),
    at=st.integers(0, 60),
    step=st.sampled_from([1, 2]),
    pages=st.booleans(),
)
def test_lengths_in_the_memory_that_is_written_to(B, S, at, step, pages):
    """One thread suffices: new tokens overwrite the lengths that say where they belong."""
    storage = torch.zeros(2 * B * 16 + 100, dtype=torch.float32)
    size = B * 16
    caches = [storage[i * size : (i + 1) * size] for i in range(2)]
    shape = (B * 4, 4, 1, 1) if pages else (B, 1, 16, 1)
    caches = [x.view(shape) for x in caches]
    numbers = storage.view(torch.int32)[at : at + B * step : step]
    numbers.copy_(torch.arange(B) % 7)
    table = torch.arange(B * 4).int().view(B, 4) if pages else None
    tokens = torch.full((B, 1, S, 1), 2.0**30)  # as an int32 it lies far beyond every cache
    lengths, guard = numbers.tolist(), storage[2 * size :].clone()
    kv_cache_append_(*caches, tokens, tokens, numbers, table)
    for cache in caches:
        rows = cache.view(B, 16)
        for b, length in enumerate(lengths):
            assert (rows[b, length : length + S] == 2.0**30).all()
    if at + B * step <= 2 * size:
        assert torch.equal(storage[2 * size :], guard)
    assert (storage == 2.0**30).sum() == 2 * B * S


def test_a_thread_that_changes_the_random_state_changes_no_address():
    philox = torch.tensor([[1, 2], [3, 4]])
    q = torch.randn(2, 2, 20, 8)
    call = torch.ops.fused_attention.attention_forward
    out, _ = call(q, q, q, 1.0, 0, -1, -1, 0, philox=philox, dropout_p=0.5)
    other, _ = call(q, q, q, 1.0, 0, -1, -1, 0, philox=philox.repeat(1, 2)[:, :2], dropout_p=0.5)
    assert torch.equal(out, other)
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="philox_seed"):
        masked_softmax_(x, dropout_p=0.5, philox_seed=x.view(torch.int64)[0])


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table"])
def test_indices_of_any_stride(name):
    def spread(*numbers):
        wide = torch.full((2 * len(numbers),), 2**30).int()
        wide[::2] = torch.tensor(numbers).int()
        return wide[::2]

    if name.startswith("cu"):
        q = torch.randn(9, 2, 8)
        options = {"cu_seqlens_q": (0, 4, 9), "cu_seqlens_k": (0, 5, 9)}
        inputs = (q, q, q)
    else:
        q, pages = torch.randn(2, 2, 3, 8), torch.randn(4, 5, 2, 8)
        options = {"seqused_k": (3, 9), "block_table": (2, 1, 0, 3)}
        inputs = (q, pages, pages)
    results = []
    for strided in (False, True):
        indices = {
            other: spread(*x) if strided and other == name else torch.tensor(x).int()
            for other, x in options.items()
        }
        if "block_table" in indices:
            indices["block_table"] = indices["block_table"].unflatten(0, (2, 2))
        results.append(attention(*inputs, **indices))
    assert torch.equal(*results)

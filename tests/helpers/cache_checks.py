"""Checks of kv_cache_append_: calls, and what the caches must hold afterwards.

test_gpu.py puts functions that compute on a GPU in place of `attention` and `kv_cache_append_`.
"""

import torch

from fused_attention import attention, kv_cache_append_

int32 = torch.int32


def tokens(dtype=torch.float32, B=3, H=2, S=4, D=5, Dv=7):
    return torch.randn(B, H, S, D).to(dtype), torch.randn(B, H, S, Dv).to(dtype)


def pages_for(B, page_size, room):
    """Returns a number of pages, more than needed, and a block table that hands them out in random
    order."""
    max_pages = -(-room // page_size)
    table = torch.randperm(B * max_pages + 3)[: B * max_pages].view(B, max_pages)
    return B * max_pages + 3, table.to(int32)


def arguments():
    key, value = tokens()
    caches = {"key_cache": torch.zeros(3, 2, 9, 5), "value_cache": torch.zeros(3, 2, 9, 7)}
    return caches | {"key": key, "value": value, "cache_seqlens": torch.zeros(3, dtype=int32)}


def paged_arguments():
    table = torch.arange(9, dtype=int32).view(3, 3)
    caches = {"key_cache": torch.zeros(9, 3, 2, 5), "value_cache": torch.zeros(9, 3, 2, 7)}
    return arguments() | caches | {"block_table": table}


def check_dense(dtype, seqlen):
    key, value = tokens(dtype, S=seqlen)
    lengths = torch.tensor([0, 3, 17], dtype=int32)
    caches = [torch.randn(3, 2, 520, x.shape[-1]).to(dtype) for x in (key, value)]
    want = [x.clone() for x in caches]
    for cache, new in zip(want, (key, value), strict=True):
        for b, n in enumerate(lengths.tolist()):
            cache[b, :, n : n + seqlen] = new[b]
    assert kv_cache_append_(*caches, key, value, lengths) is None
    assert all(torch.equal(x, y) for x, y in zip(caches, want, strict=True))
    assert lengths.tolist() == [0, 3, 17]


def check_paged(page_size, seqlen):
    key, value = tokens(S=seqlen)
    lengths = torch.tensor([0, 15, 31], dtype=int32)
    num_pages, table = pages_for(3, page_size, 80)
    caches = [torch.randn(num_pages, page_size, 2, x.shape[-1]) for x in (key, value)]
    want = [x.clone() for x in caches]
    for cache, new in zip(want, (key, value), strict=True):
        for b in range(3):
            for i in range(seqlen):
                n = int(lengths[b]) + i
                cache[table[b, n // page_size], n % page_size] = new[b, :, i]
    kv_cache_append_(*caches, key, value, lengths, table)
    assert all(torch.equal(x, y) for x, y in zip(caches, want, strict=True))


def check_generation(paged):
    """Compares generation token by token, with caches full of NaN at first, with a single call."""
    query, key, value = (torch.randn(2, heads, 37, 16) for heads in (4, 2, 2))
    want = attention(query, key, value, causal=True)
    table = None
    if paged:
        num_pages, table = pages_for(2, 5, 40)
        shape = (num_pages, 5, 2, 16)
    else:
        shape = (2, 2, 40, 16)
    caches = [torch.full(shape, torch.nan) for _ in range(2)]
    outs, begin = [], 0
    for end in (9, *range(10, 38)):  # a prompt, then single tokens
        new = [x[:, :, begin:end] for x in (key, value)]
        lengths = torch.full((2,), begin, dtype=int32)
        kv_cache_append_(*caches, *new, lengths, table)
        outs.append(
            attention(
                query[:, :, begin:end],
                *caches,
                seqused_k=lengths + (end - begin),
                block_table=table,
                causal="bottom_right",
                backend="cpu",
            )
        )
        begin = end
    torch.testing.assert_close(torch.cat(outs, 2), want)

"""kv_cache_append_: new keys and values go to their places, and nothing else is touched."""

import pytest
import torch
from torch.library import opcheck

from cache_checks import (
    arguments,
    check_dense,
    check_generation,
    check_paged,
    paged_arguments,
    tokens,
)
from fused_attention import ArgumentValueError, attention, kv_cache_append_
from fused_attention.tools import testing

int32 = torch.int32


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [0, 1, 4, 500])
def test_dense(dtype, seqlen):
    check_dense(dtype, seqlen)


@pytest.mark.parametrize("page_size", [1, 3, 16, 256])
@pytest.mark.parametrize("seqlen", [1, 40])
def test_paged(page_size, seqlen):
    check_paged(page_size, seqlen)


def test_any_strides():
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens())
    key = key.repeat_interleave(2, -1)[..., ::2]
    lengths = torch.tensor([1, 9, 2, 9, 3, 9], dtype=int32)[::2]
    caches = [torch.zeros(3, 9, x.shape[-1], 2).permute(0, 3, 1, 2) for x in (key, value)]
    kv_cache_append_(*caches, key, value, lengths)
    for cache, new in zip(caches, (key, value), strict=True):
        for b, n in enumerate((1, 2, 3)):
            assert torch.equal(cache[b, :, n : n + 4], new[b])
            assert not cache[b, :, :n].any() and not cache[b, :, n + 4 :].any()


@pytest.mark.parametrize("paged", [False, True])
def test_generation_is_attention_over_all_tokens(paged):
    """Attention through a cache that begins full of NaN equals attention to all tokens at once."""
    check_generation(paged)


WRONG = {
    "no room": ({"cache_seqlens": torch.tensor([0, 6, 0], dtype=int32)}, "cache_seqlens: .*got 6"),
    "negative": ({"cache_seqlens": torch.tensor([0, -1, 0], dtype=int32)}, "cache_seqlens: .*-1"),
    "int64 lengths": ({"cache_seqlens": torch.zeros(3).long()}, "cache_seqlens: .*int32.*int64"),
    "lengths of 2": ({"cache_seqlens": torch.zeros(2, dtype=int32)}, r"cache_seqlens: .*\(3,\)"),
    "dtype": ({"value": torch.zeros(3, 2, 4, 7).half()}, "value: .*float32.*float16"),
    "integers": ({"key": torch.zeros(3, 2, 4, 5).int()}, "key: .*dtype out of"),
    "value's tokens": ({"value": torch.zeros(3, 2, 3, 7)}, "value: .*Dv"),
    "cache's heads": ({"key_cache": torch.zeros(3, 3, 9, 5)}, "key_cache: .*Hkv"),
    "value_cache's room": ({"value_cache": torch.zeros(3, 2, 8, 7)}, "value_cache: .*room"),
    "rank": ({"key": torch.zeros(3, 2, 5)}, "key: .*4 dimensions"),
    "expanded": ({"key_cache": torch.zeros(3, 2, 1, 5).expand(3, 2, 9, 5)}, "key_cache: .*own"),
    "gradient": ({"key": torch.zeros(3, 2, 4, 5, requires_grad=True)}, "key: .*requires_grad"),
}
WRONG_PAGED = {
    "page": ({"block_table": torch.tensor([[0, 1, 9]] * 3, dtype=int32)}, "block_table: .*got 9"),
    "negative": ({"block_table": torch.tensor([[0, -1, 0]] * 3, dtype=int32)}, "block_table: .*-1"),
    "rows": ({"block_table": torch.zeros(2, 3, dtype=int32)}, r"block_table: .*\(3, 3\)"),
    "no room": ({"cache_seqlens": torch.tensor([0, 6, 0], dtype=int32)}, "cache_seqlens: .*9"),
    "pages": ({"key_cache": torch.zeros(9, 3, 3, 5)}, r"key_cache: .*\[pages"),
}


@pytest.mark.parametrize(
    "valid, changes, message",
    [(arguments, *case) for case in WRONG.values()]
    + [(paged_arguments, *case) for case in WRONG_PAGED.values()],
    ids=[*WRONG, *(f"paged {name}" for name in WRONG_PAGED)],
)
def test_what_does_not_fit_is_refused_and_nothing_written(valid, changes, message):
    if message == "block_table: .*got 9":  # the last of four tokens needs page 9
        changes = changes | {"cache_seqlens": torch.full((3,), 3, dtype=int32)}
    call = valid() | changes
    with pytest.raises(ArgumentValueError, match=message):
        kv_cache_append_(**call)
    assert not call["key_cache"].any() and not call["value_cache"].any()
    kv_cache_append_(**valid())


def test_pages_that_are_not_needed_may_be_anything():
    call = paged_arguments()
    call["block_table"][:, 2] = 99
    kv_cache_append_(**call)
    assert call["key_cache"].any()


@pytest.mark.parametrize("valid", [arguments, paged_arguments])
def test_operator(valid):
    opcheck(torch.ops.fused_attention.kv_cache_append_.default, (), valid())


def test_compiles():
    def step(key_cache, value_cache, key, value, cache_seqlens, query):
        kv_cache_append_(key_cache, value_cache, key, value, cache_seqlens)
        return attention(query, key_cache, value_cache, seqused_k=cache_seqlens + key.shape[2])

    query, results = torch.randn(3, 4, 1, 5), []
    call = arguments()
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        copies = {name: x.clone() for name, x in call.items()}
        results.append((function(**copies, query=query), copies["key_cache"]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert results[0][1].any()

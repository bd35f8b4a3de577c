"""Compares the Triton kernel of kv_cache_append_, in the interpreter, with the CPU's operator."""

import pytest
import torch

pytest.importorskip("triton")

from cache_checks import arguments, paged_arguments, pages_for, tokens
from fused_attention import ArgumentValueError
from fused_attention.kernels import operators
from fused_attention.tools import testing
from triton_calls import check_append

int32 = torch.int32


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("seqlen", [0, 1, 40])
def test_dense(dtype, seqlen):
    key, value = tokens(dtype, S=seqlen, Dv=150)  # a row of value has two blocks
    caches = [torch.randn(3, 2, 60, x.shape[-1]).to(dtype) for x in (key, value)]
    check_append(caches, key, value, torch.tensor([0, 3, 17], dtype=int32))


@pytest.mark.parametrize("page_size", [1, 3, 16])
@pytest.mark.parametrize("seqlen", [1, 20])
def test_paged(page_size, seqlen):
    key, value = tokens(S=seqlen)
    num_pages, table = pages_for(3, page_size, 60)
    caches = [torch.randn(num_pages, page_size, 2, x.shape[-1]) for x in (key, value)]
    check_append(caches, key, value, torch.tensor([0, 15, 31], dtype=int32), table)


def test_any_strides():
    key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tokens())
    key = key.repeat_interleave(2, -1)[..., ::2]
    lengths = torch.tensor([1, 9, 2, 9, 3, 9], dtype=int32)[::2]
    caches = []
    for x in (key, value):
        caches.append(torch.zeros(3, 9, x.shape[-1], 2).permute(0, 3, 1, 2))
    check_append(caches, key, value, lengths)
    _, table = pages_for(3, 3, 9)
    pages = [torch.zeros(12, 2, x.shape[-1], 3).permute(0, 3, 1, 2) for x in (key, value)]
    check_append(pages, key, value, lengths, table.T.contiguous().T)


@pytest.mark.parametrize("lengths", [[0, 6, 0], [-2, 0, 0], [2**31 - 1, 0, 0]])
@pytest.mark.parametrize("valid", [arguments, paged_arguments])
def test_tokens_without_room_are_left_out(valid, lengths):
    """Tokens with room are written, and nothing else is touched."""
    call = valid() | {"cache_seqlens": torch.tensor(lengths, dtype=int32)}
    paged = "block_table" in call
    operators.kv_cache_append_(**call)
    for name in ("key", "value"):
        cache = call[f"{name}_cache"]
        cache = cache.view(3, 9, 2, -1).transpose(1, 2) if paged else cache
        want = torch.zeros_like(cache)
        for b, n in enumerate(lengths):
            for i in range(4):
                if 0 <= n + i < 9:
                    want[b, :, n + i] = call[name][b, :, i]
        assert torch.equal(cache, want)


def test_pages_that_do_not_exist_are_left_out():
    call = paged_arguments()
    call["block_table"][1] = torch.tensor([9, -1, 2**31 - 1], dtype=int32)
    operators.kv_cache_append_(**call)
    cache = call["key_cache"].view(3, 9, 2, 5).transpose(1, 2)
    for b in (0, 2):
        assert torch.equal(cache[b, :, :4], call["key"][b])
    assert not cache[1].any() and not cache[:, :, 4:].any()


def test_an_expanded_cache_is_refused():
    call = arguments() | {"key_cache": torch.zeros(3, 2, 1, 5).expand(3, 2, 9, 5)}
    with pytest.raises(ArgumentValueError, match="key_cache: .*own"):
        operators.kv_cache_append_(**call)

"""Tests operators that write to an argument: overlapping memory, and what autograd notices."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_attention import _native, attention, kv_cache_append_, masked_softmax, masked_softmax_
from fused_attention.errors import ArgumentValueError
from fused_attention.operators.memory import place

# -- Memory that two tensors share -------------------------------------------------------


@st.composite
def views(draw, most_dims=4):
    """Draws sizes, strides and an offset, in elements."""
    dims = draw(st.integers(0, most_dims))
    sizes = draw(st.lists(st.integers(0 if dims else 1, 4), min_size=dims, max_size=dims))
    strides = draw(st.lists(st.integers(0, 13), min_size=dims, max_size=dims))
    return sizes, strides, draw(st.integers(0, 40))


def elements(view):
    sizes, strides, offset = view
    indices = itertools.product(*map(range, sizes))
    return [offset + sum(i * s for i, s in zip(index, strides, strict=True)) for index in indices]


@given(a=views(), b=views(), widths=st.tuples(*(st.sampled_from([1, 2, 4, 8]),) * 2))
def test_overlap_is_exact(a, b, widths):
    def bytes_of(view, width):
        return {width * e + byte for e in elements(view) for byte in range(width)}

    def somewhere(view, width):
        sizes, strides, offset = view
        return offset * width + 4096, width, tuple(sizes), tuple(strides)

    shared = bytes_of(a, widths[0]) & bytes_of(b, widths[1])
    places = [somewhere(view, width) for view, width in zip((a, b), widths, strict=True)]
    assert _native.overlap(*places) == _native.overlap(*reversed(places)) == bool(shared)
    assert _native.overlaps_itself(places[0]) == (len(elements(a)) > len(set(elements(a))))


def test_overlap_of_large_tensors_takes_no_time():
    storage = torch.empty(2, 4096, 8, 2, 64)
    for dim in range(5):
        first, second = storage.unbind(dim)[:2]
        assert not _native.overlap(place(first), place(second))
        assert _native.overlap(place(first), place(storage))
    assert not _native.overlap(place(storage[..., ::2]), place(storage[..., 1::2]))
    assert not _native.overlaps_itself(place(storage.permute(4, 2, 0, 3, 1)))
    assert _native.overlaps_itself(place(storage.view(-1).unfold(0, 100, 50)))


# -- kv_cache_append_ --------------------------------------------------------------------


def appended(key_cache, value_cache, key, value, lengths, table):
    """Returns the caches after an append that reads all inputs before it writes."""
    caches = [x.clone() for x in (key_cache, value_cache)]
    tokens = [x.clone() for x in (key, value)]
    for b, length in enumerate(lengths.tolist()):
        for i in range(key.shape[2]):
            n = length + i
            for cache, new in zip(caches, tokens, strict=True):
                if table is None:
                    cache[b, :, n] = new[b, :, i]
                else:
                    page_size = cache.shape[1]
                    cache[table[b, n // page_size], n % page_size] = new[b, :, i]
    return caches


@st.composite
def appends(draw):
    """Draws caches and tokens anywhere in one storage, lengths (perhaps there too) and pages."""
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    B, H, S, D = (draw(st.integers(1, most)) for most in (2, 2, 3, 3))
    paged = draw(st.booleans())
    storage = torch.arange(400).to(dtype)

    def view(*shape):
        order = draw(st.permutations(range(4)))
        strides, step = [0] * 4, draw(st.sampled_from([1, 1, 2]))
        for dim in order:
            strides[dim] = step
            step *= shape[dim]
        offset = draw(st.integers(0, 400 - step))
        return storage.as_strided(shape, strides, offset)

    if paged:
        pages, page_size, per_sequence = 3, 2, 3
        caches = [view(pages, page_size, H, D) for _ in range(2)]
        room = page_size * per_sequence
        table = torch.randint(0, pages, (B, per_sequence), dtype=torch.int32)
    else:
        room, table = 5, None
        caches = [view(B, H, room, D) for _ in range(2)]
    tokens = [view(B, H, S, D) for _ in range(2)]
    lengths = torch.randint(0, room - S + 1, (B,), dtype=torch.int32)
    if draw(st.booleans()):  # the lengths lie in the storage too
        number = draw(st.integers(0, 100))
        inside = storage.view(torch.int32)[number : number + B]
        inside.copy_(lengths)
        lengths = inside
    return *caches, *tokens, lengths, table


@given(call=appends(), seed=st.integers(0, 2**32))
def test_append_reads_everything_before_it_writes(call, seed):
    torch.manual_seed(seed)
    *tensors, lengths, table = call
    places = [place(x) for x in tensors[:2]]
    written_twice = _native.overlap(*places)
    if table is not None:
        page_size = tensors[0].shape[1]
        rows = [
            (table[b, n // page_size].item(), n % page_size)
            for b, length in enumerate(lengths.tolist())
            for n in range(length, length + tensors[2].shape[2])
        ]
        written_twice |= len(rows) > len(set(rows))
    storage = tensors[0]._base
    before = storage.clone()
    if written_twice:
        with pytest.raises(ArgumentValueError, match="value_cache|block_table"):
            kv_cache_append_(*tensors, lengths, table)
        assert torch.equal(storage, before)
        return
    expected = appended(*tensors, lengths.clone(), table)
    inside = torch.zeros(storage.shape, dtype=torch.bool)
    for cache in tensors[:2]:
        inside.as_strided(cache.shape, cache.stride(), cache.storage_offset()).fill_(True)
    kv_cache_append_(*tensors, lengths, table)
    for cache, want in zip(tensors[:2], expected, strict=True):
        assert torch.equal(cache, want)
    assert torch.equal(storage[~inside], before[~inside])


def test_a_cache_is_shifted_within_itself():
    cache = torch.arange(10.0).view(1, 1, 10, 1)
    other = torch.zeros(1, 1, 10, 1)
    kv_cache_append_(cache, other, cache[:, :, :4], other[:, :, :4], torch.tensor([2]).int())
    assert cache.flatten().tolist() == [0, 1, 0, 1, 2, 3, 6, 7, 8, 9]


def test_keys_and_values_may_lie_side_by_side():
    both = torch.zeros(2, 3, 8, 2, 4)  # [B, H, room, key or value, D]
    key, value = (torch.randn(2, 3, 1, 4) for _ in range(2))
    kv_cache_append_(both[..., 0, :], both[..., 1, :], key, value, torch.tensor([5, 0]).int())
    assert torch.equal(both[0, :, 5, 0], key[0, :, 0])
    assert torch.equal(both[1, :, 0, 1], value[1, :, 0])


@pytest.mark.parametrize("what", ["expanded", "unfolded", "one page twice", "keys are values"])
def test_what_would_be_written_twice_is_refused(what):
    cache = torch.zeros(4, 2, 1, 8)
    caches, table = [cache, cache.clone()], torch.tensor([[0], [1]], dtype=torch.int32)
    if what == "expanded":
        caches[0] = torch.zeros(4, 2, 1, 1).expand(4, 2, 1, 8)
    elif what == "unfolded":
        caches[0] = torch.zeros(100).as_strided((4, 2, 1, 8), (7, 4, 4, 1))
    elif what == "one page twice":
        table = torch.tensor([[3], [3]], dtype=torch.int32)
    else:
        caches[1] = caches[0]
    tokens = torch.ones(2, 1, 1, 8)
    with pytest.raises(ArgumentValueError, match="key_cache|value_cache|block_table"):
        kv_cache_append_(*caches, tokens, tokens, torch.tensor([1, 1]).int(), table)
    assert not any(x.any() for x in caches)


# -- masked_softmax_ ---------------------------------------------------------------------


@st.composite
def softmaxes(draw):
    """Draws an input, and a mask and sinks anywhere in its storage."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    storage = torch.randn(300)

    def view(*shape):
        order = draw(st.permutations(range(3)))
        strides, step = [0] * 3, draw(st.sampled_from([1, 1, 2]))
        for dim in order:
            strides[dim] = step
            step *= shape[dim]
        return storage.as_strided(shape, strides, draw(st.integers(0, 300 - step)))

    H, M, N = (draw(st.integers(1, 4)) for _ in range(3))
    options = {}
    if draw(st.booleans()):
        options["mask"] = view(*(draw(st.sampled_from([1, size])) for size in (H, M, N)))
    if draw(st.booleans()):
        start = draw(st.integers(0, 280))
        options["sinks"] = storage[start : start + H]
    return view(H, M, N), options


@given(call=softmaxes())
def test_softmax_in_place_reads_everything_before_it_writes(call):
    x, options = call
    before = x._base.clone()
    expected = masked_softmax(x.clone(), **{name: y.clone() for name, y in options.items()})
    if any(_native.overlap(place(x), place(y)) for y in options.values()):
        with pytest.raises(ArgumentValueError, match="memory apart"):
            masked_softmax_(x, **options)
        assert torch.equal(x._base, before)
    else:
        assert torch.equal(masked_softmax_(x, **options), expected)


def test_the_operator_itself_refuses_an_overlap():
    x = torch.zeros(2, 3, 4)
    for options in ({"bias": x}, {"mask": x.view(torch.bool)[..., :4]}, {"sinks": x.view(-1)[:2]}):
        call = {"mask": None, "bias": None, "sinks": None, **options}
        with pytest.raises(RuntimeError, match="memory apart"):
            torch.ops.fused_attention.masked_softmax_(x, 1.0, 0, **call)
    philox = torch.zeros(8, dtype=torch.int64)
    y = philox.view(torch.float32).view(2, 8)
    with pytest.raises(ArgumentValueError, match="philox_seed"):
        masked_softmax_(y, dropout_p=0.5, philox_seed=philox[:2])
    with pytest.raises(RuntimeError, match="memory of its own"):
        torch.ops.fused_attention.masked_softmax_(torch.zeros(9).unfold(0, 4, 2), 1.0, 0)


# -- Writes that autograd notices --------------------------------------------------------


def writers():
    cache = [torch.zeros(1, 2, 9, 8) for _ in range(2)]
    token = torch.randn(1, 2, 1, 8)

    def append(x, base):
        kv_cache_append_(x, cache[1], token, token, torch.tensor([3]).int())

    def append_values(x, base):
        kv_cache_append_(cache[0], x, token, token, torch.tensor([3]).int())

    def append_operator(x, base):
        call = torch.ops.fused_attention.kv_cache_append_
        call(key_cache=x, value_cache=cache[1], key=token, value=token,
             cache_seqlens=torch.tensor([3]).int())  # fmt: skip

    def softmax(x, base):
        masked_softmax_(x)

    def softmax_operator(x, base):
        torch.ops.fused_attention.masked_softmax_(x, 1.0, 0)

    return {
        f.__name__: f for f in (append, append_values, append_operator, softmax, softmax_operator)
    }


@pytest.mark.parametrize("writer", writers())
@pytest.mark.parametrize("what", ["itself", "detached", "view", "whole of a view", "no_grad"])
def test_autograd_notices_what_was_written(writer, what):
    write = writers()[writer]
    base = torch.randn(1, 2, 9, 8)
    kept = base[:] if what == "whole of a view" else base
    weight = torch.randn(1, 2, 9, 8, requires_grad=True)
    product = weight * kept  # keeps `kept` for the gradient of weight
    target = {"detached": base.detach(), "view": base.view(1, 2, 9, 8)}.get(what, base)
    version = base._version
    with torch.no_grad() if what == "no_grad" else torch.enable_grad():
        write(target, base)
    assert base._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_a_gradient_through_a_cache_that_moved_on_is_refused():
    query = torch.randn(1, 2, 1, 8, requires_grad=True)
    caches = [torch.randn(1, 2, 9, 8) for _ in range(2)]
    lengths = torch.tensor([4]).int()
    out = attention(query, *caches, seqused_k=lengths)
    token = torch.randn(1, 2, 1, 8)
    kv_cache_append_(*caches, token, token, lengths - 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_softmax_in_place_of_what_exp_keeps_is_refused():
    x = torch.randn(3, 5, requires_grad=True)
    y = x.exp()
    masked_softmax_(y.detach())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_tensors_are_written_too():
    with torch.inference_mode():
        x = torch.randn(2, 3, 5)
        expected = masked_softmax(x)
        assert torch.equal(masked_softmax_(x), expected)
        caches = [torch.zeros(1, 2, 9, 8) for _ in range(2)]
        token = torch.ones(1, 2, 1, 8)
        kv_cache_append_(*caches, token, token, torch.tensor([3]).int())
        assert caches[0][0, :, 3].eq(1).all()

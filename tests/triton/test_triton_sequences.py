"""Tests the Triton kernels on decoding, packed sequences, used lengths and pages, interpreted."""

import dataclasses
import math

import pytest
import torch

pytest.importorskip("triton")

from fused_attention.kernels import launch, operators, tiles
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments
from packed_sequences import DECODED, LENGTHS, OPTIONS, SAME, Packing, check
from selection import quick
from triton_calls import DTYPES, SMALL
from triton_interpreter import use_tiles

NAN = math.nan
int32 = torch.int32
pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, about log(0) and 1/0
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    use_tiles(monkeypatch, SMALL)
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 0)
    monkeypatch.setattr(tiles, "MIN_SPLIT_KEYS", 16)


@pytest.fixture
def decode(monkeypatch):
    """Sends few queries to attention_decode, and returns the names of the kernels that run."""
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", 16)
    return launched(monkeypatch)


def launched(monkeypatch) -> list[str]:
    names: list[str] = []
    run = launch.Launch.run

    def noted(self):
        names.append(self.kernel.__name__)
        run(self)

    monkeypatch.setattr(launch.Launch, "run", noted)
    return names


# -- Sequences of different lengths --------------------------------------------------------

PACKINGS = {
    "packed": Packing(LENGTHS),
    "packed, used": Packing(LENGTHS, used=True),
    "packed, pages of 7": Packing(LENGTHS, page_size=7),
    "packed, pages of 32": Packing(LENGTHS, page_size=32),
    "used": Packing(SAME, packed=False),
    "pages of 5": Packing(SAME, packed=False, page_size=5),
    "pages of 16": Packing(SAME, packed=False, page_size=16),
}


# Every packing with every option; six in seven of these run only with --full
PAIRS = [
    pytest.param(
        *(packing, name, DTYPES[(x + y) % 3]),
        id=f"{how}-{name}",
        marks=[pytest.mark.slow] if (x + 2 * y) % 7 else [],
    )
    for x, (how, packing) in enumerate(PACKINGS.items())
    for y, name in enumerate(OPTIONS)
]


@pytest.mark.parametrize("packing, name, dtype", PAIRS)
def test_sequences(packing, name, dtype):
    check(operators, dataclasses.replace(OPTIONS[name], dtype=dtype), packing)


# -- Decoding ------------------------------------------------------------------------------

DECODE = Case(B=1, Hq=4, Hkv=2, Sq=1, Sk=200, D=20, Dv=20)
CASES = {
    "one query": DECODE,
    "one head a group": dataclasses.replace(DECODE, Hq=2, dtype=torch.float16),
    "five heads, one group": dataclasses.replace(DECODE, Hq=5, Hkv=1, dtype=torch.bfloat16),
    "few keys": dataclasses.replace(DECODE, Sk=15, Sq=2),
    "no keys": dataclasses.replace(DECODE, Sk=0),
    "several queries": dataclasses.replace(DECODE, B=2, Sq=7, causal="bottom_right"),
    "window": dataclasses.replace(DECODE, Sq=3, causal="bottom_right", window_size=(70, 0)),
    "top left": dataclasses.replace(DECODE, Hq=2, Sq=5, causal="top_left"),
    "everything": Case(
        B=2, Hq=4, Hkv=2, Sq=3, Sk=101, D=18, Dv=10, causal="bottom_right",
        window_size=(90, 0), mask="BHQK", bias="1HQK", key_padding=True, softcap=4.0, alibi="BH",
        sinks=True, dropout_p=0.3, memory_format="BSHD",
    ),
    "masks of heads": dataclasses.replace(DECODE, B=2, mask="BHQK", bias="BH1K", sinks=True),
    "strided": dataclasses.replace(DECODE, memory_format="strided", scale=-0.3),
}  # fmt: skip


def forward(case, **changes):
    inputs = testing.make_inputs(case)
    tensors = [(inputs.tensors | changes)[name] for name in ("query", "key", "value")]
    return inputs, operators.attention_forward(*tensors, *arguments(inputs))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_decode(monkeypatch, decode, name, splits):
    heads = CASES[name].B * CASES[name].Hkv
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", splits * heads)
    inputs, (out, lse) = forward(CASES[name])
    several = splits > 1 and CASES[name].Sk > 16
    assert decode == ["attention_decode_kernel", "attention_combine_kernel"][: 1 + several]
    got = {"out": out, "lse": lse}
    assert not [
        e.message
        for e in testing.errors(got, testing.exact(inputs), testing.naive(inputs))
        if e.is_wrong
    ]


def test_any_number_of_splits(monkeypatch, decode):
    """Some splits have no keys, and a last one is cut short."""
    results = []
    for splits in (1, 2, 5, 12):
        monkeypatch.setattr(tiles, "DECODE_PROGRAMS", 2 * splits)
        results.append(forward(DECODE)[1])
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0])
        torch.testing.assert_close(lse, results[0][1])


@pytest.mark.covering(1)
@pytest.mark.parametrize("page_size", [None, 7, 32])
@pytest.mark.parametrize("splits", [1, 3])
def test_decode_of_packed_sequences(monkeypatch, decode, page_size, splits):
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", splits * 2 * len(DECODED))
    name = "top left" if page_size is None else "all the rest"
    check(operators, OPTIONS[name], Packing(DECODED, page_size=page_size))
    assert decode[0] == "attention_decode_kernel"
    assert ("attention_combine_kernel" in decode) == (splits > 1)


@pytest.mark.parametrize("page_size", [None, 5])
def test_decode_of_used_lengths(monkeypatch, decode, page_size):
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", 3 * 2 * 4)
    lengths = [(2, 0), (2, 1), (2, 29), (2, 50)]
    check(operators, OPTIONS["all the rest"], Packing(lengths, packed=False, page_size=page_size))
    assert decode[:2] == ["attention_decode_kernel", "attention_combine_kernel"]


@pytest.mark.parametrize("rows", quick([0, 16], 16))
def test_a_wrong_hint_changes_no_result(monkeypatch, rows):
    """The hints max_seqlen_* are too small: attention_decode gets more queries than they say."""
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", rows)
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", 2 * 2 * len(LENGTHS))
    wrong = Packing(LENGTHS)
    names = launched(monkeypatch)
    with monkeypatch.context() as patch:
        hint = property(lambda self: (*right.fget(self)[:2], 1, 1, *right.fget(self)[4:]))
        right = Packing.arguments
        patch.setattr(Packing, "arguments", hint)
        check(operators, OPTIONS["window"], wrong)
    assert names[0] == ("attention_decode_kernel" if rows else "attention_forward_kernel")


def test_the_choice_is_a_function_of_the_shape(monkeypatch):
    monkeypatch.undo()
    splits = launch.decode_splits
    assert splits(1, 32, 8, 1, 65536, (-1, -1)) == tiles.DECODE_PROGRAMS // 8
    assert splits(1, 32, 8, 1, 1024, (-1, -1)) == 1024 // tiles.MIN_SPLIT_KEYS
    assert splits(64, 32, 8, 1, 65536, (-1, -1)) == 1
    assert splits(1, 32, 8, 1, 65536, (500, 0)) == 501 // tiles.MIN_SPLIT_KEYS
    assert splits(1, 32, 8, 16, 65536, (-1, 0)) > 1 and splits(1, 32, 8, 17, 65536, (-1, 0)) == 0
    assert splits(1, 0, 0, 1, 10, (-1, -1)) == 0
    for rows, block_m in ((1, 16), (16, 16), (17, 32), (64, 64), (1000, 64)):
        sizes = tiles.decode_tiles(tiles.ARCHS["sm_90"], torch.float16, 64, rows)
        assert sizes.block_m == block_m


@pytest.mark.parametrize("where", [0, 100, 199])
def test_visible_nan_and_infinity_reach_the_result(decode, where):
    for junk in (NAN, math.inf):
        query, key, value = (
            testing.make_inputs(DECODE).tensors[x] for x in "query key value".split()
        )
        key[0, 0, where, 0] = junk
        _, (out, lse) = forward(DECODE, query=query.abs(), key=key)
        assert out[0, :2].isnan().all() and not lse[0, :2].isfinite().any()
        assert out[0, 2:].isfinite().all() and lse[0, 2:].isfinite().all()


def test_nan_alone_in_a_split_of_hidden_keys(monkeypatch, decode):
    """The split's maximum is as if it had no key, but the row must not count as fully masked."""
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", 12)
    query, key, value = (torch.randn(1, 1, n, 16) for n in (1, 300, 300))
    mask = torch.zeros(1, 1, 1, 300, dtype=torch.bool)
    mask[..., 200] = True
    key[0, 0, 200] = NAN
    out, lse = operators.attention_forward(query, key, value, 0.3, 0, -1, -1, 0, mask)
    assert decode[1:] == ["attention_combine_kernel"] and out.isnan().all() and lse.isnan().all()


def test_rows_that_see_nothing(monkeypatch, decode):
    monkeypatch.setattr(tiles, "DECODE_PROGRAMS", 6)
    query, key, value = (torch.randn(1, h, n, 16) for h, n in ((4, 2), (2, 150), (2, 150)))
    value[0, 0] = NAN
    mask = torch.ones(1, 4, 2, 150, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 2] = False
    call = (query, key, value, 0.3, 0, -1, -1, 0, mask, None, None, None)
    out, lse = operators.attention_forward(*call)
    assert (out[0, 0, 1] == 0).all() and (out[0, 2] == 0).all() and out[0, 0, 0].isnan().all()
    assert lse[0, 0, 1] == -math.inf and (lse[0, 2] == -math.inf).all()
    out, lse = operators.attention_forward(*call, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert (out[0, 2] == 0).all() and (lse[0, 2] == 3.0).all() and lse[0, 0, 1] == 1.0


# -- Dropout and pages of several sequences ------------------------------------------------


@pytest.mark.parametrize(
    "Sq, rows",
    [pytest.param(20, 0, id="forward", marks=pytest.mark.slow), pytest.param(2, 16, id="decode")],
)
def test_packed_is_dense_where_all_lengths_are_equal(monkeypatch, Sq, rows):
    """Results agree bit for bit, so dropout counts sequences as it counts the batch."""
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", rows)
    query, key, value, grad = (
        torch.randn(3, heads, n, 16) for heads, n in ((4, Sq), (2, 40), (2, 40), (4, Sq))
    )
    philox = torch.tensor([7, 1])
    numbers = (0.25, 2, -1, -1, 0)
    options = (None, None, None, None, None, philox, 0.0, 0.3)
    want = operators.attention_forward(query, key, value, *numbers, *options)
    gradients = operators.attention_backward(
        grad, None, query, key, value, *want, *numbers, *options
    )
    q, k, v, do = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value, grad))
    cu = [torch.arange(4, dtype=int32) * n for n in (Sq, 40)]
    places = (*cu, Sq, 40, None, None)
    out, lse = operators.attention_forward(q, k, v, *numbers, *options, *places)
    packed = operators.attention_backward(do, None, q, k, v, out, lse, *numbers, *options, *places)
    assert torch.equal(lse.unflatten(1, (3, Sq)).transpose(0, 1), want[1])
    for x, like in zip((out, *packed[:3]), (want[0], *gradients[:3]), strict=True):
        assert torch.equal(x.unflatten(0, (3, -1)).transpose(1, 2), like)


@pytest.mark.parametrize("page_size, dropout_p", [(7, 0.3), (16, 0.0)])
def test_pages_that_sequences_share(page_size, dropout_p):
    """The gradient of a page is the sum over the sequences; the rest is as for dense keys."""
    table = torch.tensor([[0, 1], [4, 0], [3, 5]], dtype=int32)
    B, Sq, room = 3, 18, 2 * page_size
    pages = [torch.randn(7, page_size, 1, D) for D in (12, 20)]
    query, grad = torch.randn(B, 2, Sq, 12), torch.randn(B, 2, Sq, 20)
    used = torch.tensor([room, room - 3, page_size], dtype=int32)
    mask, bias = torch.rand(B, 1, Sq, room) > 0.3, torch.randn(1, 2, 1, room)
    numbers = (0.3, 2, -1, -1, 0)
    options = (mask, bias, None, None, None, torch.tensor([3, 5]), 0.0, dropout_p)

    def both(key, value, *places):
        out, lse = operators.attention_forward(query, key, value, *numbers, *options, *places)
        saved = (grad, None, query, key, value, out, lse)
        rest = (*numbers, *options, *places, True)
        return out, lse, *operators.attention_backward(*saved, *rest)[:4]

    dense = [x[table.long()].flatten(1, 2).transpose(1, 2) for x in pages]
    want = both(*dense, *(None,) * 4, used, None)
    got = both(*pages, *(None,) * 4, used, table)
    for name in (0, 1, 2, 5):  # out, lse, dq, dbias
        torch.testing.assert_close(got[name], want[name])
    for dpages, ddense in zip(got[3:5], want[3:5], strict=True):
        parts = ddense.transpose(1, 2).unflatten(1, (2, page_size)).flatten(0, 1)
        summed = torch.zeros_like(dpages).index_add(0, table.flatten(), parts)
        torch.testing.assert_close(dpages, summed)
        assert (dpages[5:] == 0).all() and (dpages[2] == 0).all()  # 5: not used; 2, 6: in no table


# -- Empty and senseless lengths -----------------------------------------------------------


def test_no_sequences_and_no_tokens():
    query, key = torch.randn(5, 2, 8), torch.randn(7, 2, 8)
    none = torch.zeros(1, dtype=int32)
    numbers, rest = (0.3, 0, -1, -1, 0), (None,) * 6
    for cu, q, k in ((none, query, key), (torch.zeros(3, dtype=int32), query[:0], key[:0])):
        call = (*numbers, *rest, 0.0, 0.0, cu, cu)
        out, lse = operators.attention_forward(q, k, k, *call)
        assert out.shape == q.shape and (out == 0).all() and (lse == -math.inf).all()
        dq, dk, dv, *_ = operators.attention_backward(out, None, q, k, k, out, lse, *call)
        assert (dq == 0).all() and (dk == 0).all() and (dv == 0).all() and dk.shape == k.shape


def test_no_pages():
    query, pages = torch.randn(2, 2, 3, 8), torch.randn(0, 4, 2, 8)
    table = torch.zeros(2, 3, dtype=int32)
    call = (0.3, 0, -1, -1, 0, *(None,) * 6, 0.0, 0.0, *(None,) * 5, table)
    out, lse = operators.attention_forward(query, pages, pages, *call)
    assert (out == 0).all() and (lse == -math.inf).all()
    gradients = operators.attention_backward(out, None, query, pages, pages, out, lse, *call)
    assert (gradients[0] == 0).all() and gradients[1].shape == pages.shape


NONSENSE = {
    "falling": {"cu_q": [0, 6, 4], "cu_k": [0, 9, 3]},
    "negative": {"cu_q": [0, -5, 4], "cu_k": [-3, -5, 4]},
    "not 0 first": {"cu_q": [3, 4, 6], "cu_k": [1, 4, 6]},
    "past the end": {"cu_q": [0, 4, 1300], "cu_k": [0, 4, 2**31 - 1]},
    "used": {"used": [-1, 2**31 - 1]},
}


@pytest.mark.parametrize("rows", [0, 16])
@pytest.mark.parametrize("name", NONSENSE)
def test_lengths_that_make_no_sense_lead_nowhere(monkeypatch, name, rows):
    """No kernel reads or writes the memory around the tensors."""
    monkeypatch.setattr(tiles, "MAX_DECODE_ROWS", rows)
    values = {"cu_q": [0, 4, 6], "cu_k": [0, 5, 7], "used": None} | NONSENSE[name]
    cu_q, cu_k, used = (
        None if x is None else torch.tensor(x, dtype=int32) for x in values.values()
    )
    guarded = []

    def guard(shape):
        """Returns zeros between NaN that no kernel may read."""
        pool = torch.full((3 * math.prod(shape),), NAN)
        x = pool.view(3, *shape)[1]
        x.zero_()
        guarded.append(pool)
        return x

    query, key = guard((10, 2, 8)), guard((12, 2, 8))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty(guard))
    call = (0.3, 2, -1, -1, 0, *(None,) * 6, 0.0, 0.0, cu_q, cu_k, 1, 12, used)
    out, lse = operators.attention_forward(query, key, key, *call)
    gradients = operators.attention_backward(query, None, query, key, key, out, lse, *call)
    for x in (out, *gradients[:3]):
        assert not x.isnan().any()
    for pool in guarded:
        outside = pool.view(3, -1)[[0, 2]]
        assert outside.isnan().all()


def guarded_new_empty(guard):
    original = torch.Tensor.new_empty

    def new_empty(self, *shape, **options):
        sizes = shape[0] if isinstance(shape[0], (tuple, torch.Size)) else shape
        sizes = (sizes,) if isinstance(sizes, int) else sizes
        if options.get("dtype", self.dtype) == torch.float32 and math.prod(sizes):
            return guard(tuple(sizes))
        return original(self, *shape, **options)

    return new_empty


def test_pages_that_do_not_exist_lead_nowhere():
    pool = torch.full((8, 4, 2, 8), NAN)
    pages = pool[2:5]
    pages.zero_()
    table = torch.tensor([[0, 2**31 - 1], [-7, 2]], dtype=int32)
    query = torch.randn(2, 2, 18, 8)
    call = (0.3, 0, -1, -1, 0, *(None,) * 6, 0.0, 0.0, *(None,) * 5, table)
    out, lse = operators.attention_forward(query, pages, pages, *call)
    gradients = operators.attention_backward(out, None, query, pages, pages, out, lse, *call)
    assert all(x.isfinite().all() for x in (out, lse, *gradients[:3]))

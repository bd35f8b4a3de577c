"""`attention_weights` and `attention_statistics` agree with the weights of the reference."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from fused_attention import _native
from fused_attention import operators as ops
from fused_attention.attention_statistics import (
    OUTPUTS,
    attention_statistics,
    statistics_by_blocks,
)
from fused_attention.attention_weights import attention_weights, attention_with_weights
from fused_attention.errors import ArgumentTypeError, ArgumentValueError
from fused_attention.reference import attention_reference
from fused_attention.tools import testing
from fused_attention.tools.testing import Case, cpu_isa, num_threads
from selection import quick
from weights_checks import COVERING, weights_inputs

attention_statistics_module = sys.modules[attention_statistics.__module__]
ISAS = _native.isas()
NAN = float("nan")


# -- Against the reference ---------------------------------------------------------------


def statistics_of(weights, num_top):
    """Returns the statistics of weights [..., Hq, Sq, Sk] by PyTorch's functions."""
    return {
        "out": weights.sum(-2),
        "entropy": torch.special.entr(weights).sum(-1),
        "top": weights.topk(min(num_top, weights.shape[-1])).values,
    }


def gradients_of(results):
    """Returns the gradients that the mass has, beside an output that says their dtype."""
    kept = {name: x for name, x in results.items() if name not in ("lse", "dvalue")}
    return kept | {"out": kept["dquery"]}


def check_top(got, weights):
    """Checks that top_keys are different keys with the weights that top_weights says."""
    values, keys = got.top_weights.double(), got.top_keys
    there = keys >= 0
    assert torch.equal(there, values != 0)
    assert (keys[~there] == -1).all() and (values.diff(dim=-1) <= 0).all()
    if weights.shape[-1] == 0:
        assert not there.any()
        return
    found = weights.double().gather(-1, keys.clamp(min=0)).masked_fill(~there, 0.0)
    torch.testing.assert_close(values, found, rtol=1e-4, atol=1e-6)
    own = keys + torch.arange(keys.shape[-1]) * ~there * -1  # a key of its own for each empty place
    assert (own.sort(-1).values.diff(dim=-1) != 0).all()


def answers(case, num_top=5, **options):
    """Yields (got, exact, naive) of the statistics, and of the gradients of the mass."""
    inputs = weights_inputs(case, average=False)
    accumulated = torch.promote_types(case.dtype, torch.float32)
    generator = torch.Generator().manual_seed(case.seed)
    grad_mass = torch.randn(case.B, case.Hq, case.Sk, generator=generator, dtype=torch.float64)
    grad_mass = grad_mass.to(accumulated)
    inputs = dataclasses.replace(
        inputs, grad_out=grad_mass.unsqueeze(2).expand(case.B, case.Hq, case.Sq, case.Sk)
    )
    # The numbers are those of float32 maths on the inputs as they came.
    names = ("query", "key", "value")
    wide = {name: inputs.tensors[name].to(accumulated) for name in names}
    widened = dataclasses.replace(inputs, tensors=inputs.tensors | wide)

    leaves = inputs.differentiable()
    del leaves["value"]
    got = attention_statistics(**leaves, num_top=num_top, **inputs.keywords, **options)
    exact = testing.exact(inputs)
    check_top(got, exact["out"])
    gradients = torch.autograd.grad(got.mass, list(leaves.values()), grad_mass)
    assert not got.entropy.requires_grad and not got.top_weights.requires_grad
    top = got.top_weights[..., : min(num_top, case.Sk)]
    yield (
        {"out": got.mass.detach(), "entropy": got.entropy, "top": top},
        statistics_of(exact["out"], num_top),
        tuple(statistics_of(x["out"], num_top) for x in testing.naive(widened)),
    )
    named = {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
    yield (
        gradients_of(named),
        gradients_of(exact),
        tuple(gradients_of(x) for x in testing.naive(inputs)),
    )


def mismatches(case, **options):
    wrong = []
    for part in range(2):
        wrong += testing.check_answers(
            case, lambda case, part=part: list(answers(case, **options))[part]
        )
    return wrong


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_several_blocks_of_queries_and_keys(dtype, isa):
    case = Case(
        dtype=dtype, B=2, Hq=4, Hkv=2, Sq=101, Sk=205, D=20, causal="bottom_right", key_padding=True
    )
    assert mismatches(case) == []


NUMBERS = range(len(COVERING))


@pytest.mark.parametrize("number", quick(NUMBERS, *NUMBERS[::3]))
def test_every_pair_of_features(number):
    with cpu_isa(ISAS[number % len(ISAS)]):
        assert mismatches(COVERING[number]) == []


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_blocks_of_queries_give_what_the_kernel_gives(dtype, monkeypatch):
    """A GPU computes the weights of a block of queries and reduces them."""
    for more in ({"causal": "bottom_right", "dropout_p": 0.25}, {"Sk": 40, "alibi": "BH"}):
        case = Case(dtype=dtype, Hq=4, Sq=53, bias="1HQK", mask="11QK", window_size=(20, 9))
        inputs = testing.make_inputs(dataclasses.replace(case, diagonal="bottom_right", **more))
        call = {name: x for name, x in inputs.tensors.items() if name != "value"}
        want = attention_statistics(**call, **inputs.keywords, num_top=30)
        with monkeypatch.context() as patch:
            patch.setattr(attention_statistics_module, "BLOCK_ELEMENTS", 1)
            patch.setattr(ops, "statistics", statistics_by_blocks)
            got = attention_statistics(**call, **inputs.keywords, num_top=30)
        assert want.mass.count_nonzero() > 100
        for mine, other in zip(got, want, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_what_only_the_reference_serves():
    assert mismatches(Case(D=513, causal="top_left", sinks=True, bias="1HQK"), num_top=30) == []
    assert mismatches(Case(dropout_p=0.25, softcap=2.0), backend="reference") == []
    meta = torch.empty(2, 3, 5, 8, device="meta")
    got = attention_statistics(meta, meta, num_top=2)
    assert [tuple(x.shape) for x in got] == [(2, 3, 5), (2, 3, 5), (2, 3, 5, 2), (2, 3, 5, 2)]


# -- Sequences ---------------------------------------------------------------------------

LENGTHS = [(5, 7), (0, 3), (33, 20), (1, 34), (18, 0), (2, 9)]
LAYOUTS = ["packed", "packed, keys in use", "packed, paged", "paged", "paged, in use", "in use"]
OPTIONS = {
    "plain": {},
    "bottom right": {"causal": "bottom_right", "window_size": (14, 0), "softcap": 3.0},
    "ALiBi, sinks": {
        "causal": "top_left",
        "alibi_slopes": torch.rand(len(LENGTHS), 4, generator=torch.Generator().manual_seed(1)),
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]),
    },
    "dropout": {"dropout_p": 0.3, "philox_seed": 5, "diagonal": "bottom_right"},
}


def lay_out(layout, lengths=LENGTHS, room=40, page_size=8, H=4, Hkv=2, D=12):
    """Returns (query, key, one-hot values, options, rows of each sequence, its place among keys).

    The values of a sequence are the rows of an identity matrix, so that attention's output are the
    weights, [..., room]. What belongs to no sequence is NaN.
    """
    batch, packed = len(lengths), layout.startswith("packed")
    if not packed:
        lengths = [(9, n) for _, n in lengths]
    used = [n for _, n in lengths]
    rooms = [n + 2 * ("in use" in layout) for n in used] if packed else [room] * batch
    Tq, Tk = sum(m for m, _ in lengths) + 3, sum(rooms) + 2
    options = {}
    if packed:
        starts = torch.tensor([0, *(m for m, _ in lengths)]).cumsum(0).tolist()
        query = torch.full((Tq, H, D), NAN)
        query[: starts[-1]] = torch.randn(starts[-1], H, D)
        options["cu_seqlens_q"] = torch.tensor(starts, dtype=torch.int32)
        rows = [slice(begin, end) for begin, end in zip(starts, starts[1:], strict=False)]
    else:
        query, rows = torch.randn(batch, H, 9, D), list(range(batch))
    k_starts = torch.tensor([0, *rooms]).cumsum(0).tolist()
    if "paged" in layout:
        width = room // page_size
        table = torch.randperm(batch * width + 1)[: batch * width].view(batch, width)
        key = torch.full((batch * width + 1, page_size, Hkv, D), NAN)
        value = torch.full((batch * width + 1, page_size, Hkv, room), NAN)
        used = used if packed or "in use" in layout else [room] * batch
        for b, count in enumerate(used):
            for n in range(count):
                at = table[b, n // page_size], n % page_size
                key[at], value[at] = torch.randn(Hkv, D), torch.eye(room)[n]
            table[b, -(-count // page_size) :] = 2**31 - 1
        options["block_table"] = table.int()
        places = list(range(batch))
    elif packed:
        key, value = torch.full((Tk, Hkv, D), NAN), torch.full((Tk, Hkv, room), NAN)
        for start, count in zip(k_starts, used, strict=False):
            key[start : start + count] = torch.randn(count, Hkv, D)
            value[start : start + count] = torch.eye(room)[:count, None]
        options["cu_seqlens_k"] = torch.tensor(k_starts, dtype=torch.int32)
        places = [slice(begin, end) for begin, end in zip(k_starts, k_starts[1:], strict=False)]
    else:
        key, value = (torch.full((batch, Hkv, room, n), NAN) for n in (D, room))
        for b, count in enumerate(used):
            key[b, :, :count] = torch.randn(Hkv, count, D)
            value[b, :, :count] = torch.eye(room)[:count]
        places = list(range(batch))
    if "in use" in layout or layout == "packed, paged":
        options["seqused_k"] = torch.tensor(used, dtype=torch.int32)
    return query, key, value, options, rows, places


def of_rows(x, rows):
    return x[:, rows] if isinstance(rows, slice) else x[rows]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.covering
def test_sequences(layout, options):
    query, key, value, places, rows, keys = lay_out(layout)
    said = places | OPTIONS[options]
    q, k = query.double().requires_grad_(), key.double().requires_grad_()
    weights = attention_reference(q, k, value.double(), **said)
    weights = weights.transpose(0, 1) if weights.dim() == 3 else weights  # [Hq, Tq, room]
    own_q, own_k = query.double().requires_grad_(), key.double().requires_grad_()
    got = attention_statistics(own_q, own_k, num_top=6, **said)

    room = weights.shape[-1]
    if isinstance(keys[0], slice):
        mass = weights.new_zeros(4, len(key))
        for own, place in zip(rows, keys, strict=True):
            count = place.stop - place.start
            mass[:, place] = of_rows(weights, own).sum(-2)[:, :count]
    else:
        mass = torch.stack([of_rows(weights, own).sum(-2) for own in rows])
    assert mass.count_nonzero() > 100
    torch.testing.assert_close(got.mass, mass)
    torch.testing.assert_close(got.entropy, torch.special.entr(weights).sum(-1))
    torch.testing.assert_close(got.top_weights, weights.topk(6).values)
    check_top(got, weights)
    assert got.top_keys.max() < room

    grad = torch.randn_like(mass)
    ours = torch.autograd.grad(got.mass, (own_q, own_k), grad)
    theirs = torch.autograd.grad(mass, (q, k), grad)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other.nan_to_num(0.0))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_sequences(layout):
    query, key, _, options, _, _ = lay_out(layout, lengths=[])
    got = attention_statistics(query, key, **options)
    packed = layout.startswith("packed")
    assert got.mass.shape == ((4, 2) if packed and "paged" not in layout else (0, 4, 40))
    assert got.entropy.shape == ((4, 3) if packed else (0, 4, 9))
    assert got.mass.count_nonzero() == got.entropy.count_nonzero() == 0
    assert (got.top_keys == -1).all()


def test_lengths_that_do_not_fit_are_refused():
    query, key, _, options, _, _ = lay_out("packed")
    options["cu_seqlens_k"] = options["cu_seqlens_k"] + 50
    for more in ({}, {"dropout_p": 0.5}):
        with pytest.raises(ArgumentValueError, match="cu_seqlens_k"):
            attention_statistics(query, key, **options, **more)


# -- Meaning -----------------------------------------------------------------------------


def test_rows_and_keys_that_see_nothing_may_hold_anything(isa):
    B, H, Sq, Sk, D = 2, 3, 50, 200, 8
    q, k = torch.randn(B, H, Sq, D), torch.randn(B, H, Sk, D)
    padding = torch.zeros(B, Sk, dtype=torch.bool)
    padding[0, 120:] = padding[1] = True
    mask = torch.ones(Sq, Sk, dtype=torch.bool)
    mask[7] = False
    results = []
    for filling in (0.0, NAN):
        own_q, own_k = q.clone(), k.masked_fill(padding[:, None, :, None], filling)
        own_q[:, :, 7] = filling
        own_q.requires_grad_(), own_k.requires_grad_()
        got = attention_statistics(own_q, own_k, mask=mask, key_padding_mask=padding)
        grad = torch.linspace(-1, 1, B * H * Sk).view(B, H, Sk)
        grad = grad.masked_fill(padding.unsqueeze(1), filling)
        results.append((*got, *torch.autograd.grad(got.mass, (own_q, own_k), grad)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    mass, entropy, weights, keys = results[0][:4]
    assert mass[0, :, :120].min() > 0 and mass[0, :, 120:].count_nonzero() == 0
    assert mass[1].count_nonzero() == entropy[1].count_nonzero() == 0
    assert entropy[0, :, 7].count_nonzero() == weights[:, :, 7].count_nonzero() == 0
    assert (keys[:, :, 7] == -1).all() and (keys[0, :, :7] >= 0).all()


def test_nan_that_a_row_sees_stays(isa):
    q, k = torch.randn(1, 2, 60, 8), torch.randn(1, 2, 60, 8)
    k[0, 1, 30] = NAN
    got = attention_statistics(q, k, causal=True, num_top=3)
    for x in (got.entropy, got.top_weights[..., 0]):
        assert x[0, 0].isfinite().all() and x[0, 1, :30].isfinite().all()
        assert x[0, 1, 30:].isnan().all()
    assert got.mass[0, 0].isfinite().all() and got.mass[0, 1].isnan().all()


def test_a_weight_that_is_0_is_no_term_of_the_entropy():
    q, k = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 40, 8)
    bias = torch.full((1, 1, 1, 40), -float("inf"))
    bias[..., 2:6] = 0.0
    got = attention_statistics(q, k, bias=bias, num_top=5)
    torch.testing.assert_close(got.entropy, torch.full((1, 1, 3), 4.0).log())
    assert got.top_weights.tolist() == [[[[0.25] * 4 + [0.0]] * 3]]
    assert (got.top_keys[..., :4].sort(-1).values == torch.arange(2, 6)).all()
    assert (got.top_keys[..., 4] == -1).all()


def test_bits_do_not_depend_on_threads(isa):
    case = Case(B=1, Hq=3, Hkv=3, Sq=150, Sk=900, bias="11QK", causal="top_left")
    tensors = testing.make_inputs(case).tensors
    call = {name: x for name, x in tensors.items() if name != "value"}
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            results.append(attention_statistics(**call, causal="top_left"))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
def test_nothing_to_weigh(sizes):
    B, H, Sq, Sk = sizes
    q, k = (torch.randn(B, H, n, 8, requires_grad=True) for n in (Sq, Sk))
    got = attention_statistics(q, k, num_top=5)
    shapes = [(B, H, Sk), (B, H, Sq), (B, H, Sq, 5), (B, H, Sq, 5)]
    assert [tuple(x.shape) for x in got] == shapes
    assert got.mass.count_nonzero() == got.entropy.count_nonzero() == 0
    for gradient in torch.autograd.grad(got.mass.sum(), (q, k)):
        assert gradient.count_nonzero() == 0


@pytest.mark.parametrize("name", OUTPUTS)
def test_only_what_is_asked_for_is_there(name):
    q = torch.randn(1, 2, 9, 8, requires_grad=True)
    whole, alone = (attention_statistics(q, q, outputs=outputs) for outputs in (OUTPUTS, (name,)))
    for field, x, own in zip(whole._fields, whole, alone, strict=True):
        assert own is None if name not in field else torch.equal(x, own), field
    if name == "mass":
        alone.mass.square().sum().backward()
        assert q.grad.count_nonzero() > 0


def test_autocast():
    q, k = torch.randn(1, 2, 9, 8), torch.randn(1, 2, 11, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cast, weights = attention_statistics(q, k), attention_weights(q, k)
    assert weights.dtype == torch.bfloat16 and cast.mass.dtype == torch.float32
    for mine, other in zip(cast, attention_statistics(q.bfloat16(), k.bfloat16()), strict=True):
        assert torch.equal(mine, other)


# -- Transforms --------------------------------------------------------------------------


def test_gradcheck():
    q, k = (torch.randn(1, 2, n, 3, dtype=torch.float64, requires_grad=True) for n in (5, 4))
    bias = torch.randn(1, 2, 5, 1, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def mass(q, k, bias, sinks):
        options = {"dropout_p": 0.3, "philox_seed": 3, "softcap": 2.0}
        return attention_statistics(q, k, bias=bias, sinks=sinks, outputs=("mass",), **options).mass

    torch.autograd.gradcheck(mass, (q, k, bias, sinks))
    with pytest.raises(NotImplementedError, match="second derivatives of the attention weights"):
        torch.autograd.gradgradcheck(mass, (q, k, bias, sinks))
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda q: mass(q, k, bias, sinks), (q,), (q,))


def test_vmap():
    q, k = torch.randn(3, 2, 4, 9, 8), torch.randn(3, 2, 2, 11, 8)

    def loss(q, k):
        got = attention_statistics(q, k, num_top=2, causal="bottom_right")
        return got.mass.square().sum(), tuple(got)

    run = torch.func.grad(loss, argnums=(0, 1), has_aux=True)
    gradients, results = torch.func.vmap(run)(q, k)
    for i in range(3):
        own_gradients, own = run(q[i], k[i])
        for mapped, single in zip((*gradients, *results), (*own_gradients, *own), strict=True):
            torch.testing.assert_close(mapped[i], single)


def test_operator_passes_opcheck():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8)
    lse, bias = torch.randn(2, 4, 9), torch.randn(1, 1, 9, 11)
    for asked in ((True, False, 3), (False, True, 0)):
        torch.library.opcheck(ops.statistics, (q, k, lse, *asked, 0.5, 1, -1, -1, 0, None, bias))


def test_jit_trace():
    q, k = torch.randn(1, 2, 9, 8, requires_grad=True), torch.randn(1, 2, 11, 8)

    def mass(q, k):
        return attention_statistics(q, k, causal="top_left").mass

    traced = torch.jit.trace(mass, (q, k))
    torch.testing.assert_close(traced(q, k), mass(q, k))
    grads = [torch.autograd.grad(f(q, k).square().sum(), q)[0] for f in (traced, mass)]
    torch.testing.assert_close(*grads)


@pytest.mark.slow  # imports the compiler
def test_one_compilation_serves_all_lengths():
    def loss(q, k):
        got = attention_statistics(q, k, num_top=3, causal="bottom_right")
        return got.mass.square().sum() + got.entropy.sum(), got.top_keys

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for Sq, Sk in ((9, 11), (150, 200)):
        q, k = torch.randn(1, 2, Sq, 8, requires_grad=True), torch.randn(1, 2, Sk, 8)
        (mine, keys), (other, other_keys) = compiled(q, k), loss(q, k)
        torch.testing.assert_close(mine, other)
        assert torch.equal(keys, other_keys)
        torch.testing.assert_close(*(torch.autograd.grad(x, q)[0] for x in (mine, other)))


# -- attention_weights -------------------------------------------------------------------


@pytest.mark.parametrize("reduce", [None, "mean"])
def test_attention_weights_are_those_beside_the_output(reduce):
    """Those are compared with the reference in tests/cpu/test_weights.py."""
    case = Case(Hq=4, causal="bottom_right", bias="1HQK", sinks=True, dropout_p=0.25)
    inputs = testing.make_inputs(case)
    results = []
    for with_output in (True, False):
        leaves = inputs.differentiable()
        value = leaves.pop("value")
        if with_output:
            average = reduce == "mean"
            said = leaves | {"value": value} | inputs.keywords
            _, weights = attention_with_weights(**said, average=average)
        else:
            weights = attention_weights(**leaves, reduce=reduce, **inputs.keywords)
        grad = torch.linspace(-1, 1, weights.numel()).view_as(weights)
        results.append((weights, *torch.autograd.grad(weights, list(leaves.values()), grad)))
    assert results[0][0].dim() == (3 if reduce else 4)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    reference = attention_weights(
        **{name: x.detach() for name, x in leaves.items()},
        **(inputs.keywords | {"backend": "reference"}),
        reduce=reduce,
    )
    torch.testing.assert_close(results[0][0], reference)


@pytest.mark.parametrize("name", ["cu_seqlens_q", "seqused_k", "block_table"])
def test_attention_weights_of_sequences_are_not_built(name):
    layout = {"cu_seqlens_q": "packed", "seqused_k": "in use", "block_table": "paged"}[name]
    query, key, _, options, _, _ = lay_out(layout)
    with pytest.raises(NotImplementedError, match=f"{name}: not built; attention_statistics"):
        attention_weights(query, key, **options)


# -- Wrong calls -------------------------------------------------------------------------

Q = torch.randn(1, 2, 5, 8)


@pytest.mark.parametrize(
    "said, error, message",
    [
        ({"outputs": "mass"}, ArgumentTypeError, r"outputs: .* Hint: a tuple"),
        ({"outputs": ("mass", "sum")}, ArgumentValueError, "outputs: expected names out of mass"),
        ({"outputs": ()}, ArgumentValueError, "outputs"),
        ({"num_top": 0}, ArgumentValueError, "num_top: expected an int >= 1, got 0"),
        ({"num_top": 2.0}, ArgumentTypeError, "num_top: expected an int, got float"),
        ({"num_top": True}, ArgumentTypeError, "num_top"),
        ({"key": Q[0]}, ArgumentValueError, r"key: expected 4 dimensions"),
        ({"key": [1]}, ArgumentTypeError, "key: expected a torch.Tensor"),
        ({"key": Q.double()}, ArgumentValueError, "key: expected dtype torch.float32"),
        ({"query": None}, ArgumentTypeError, "query: expected a torch.Tensor"),
        ({"is_causal": True}, ArgumentTypeError, "is_causal: .*top_left"),
        ({"return_lse": True}, ArgumentTypeError, "return_lse: .*attention_statistics"),
        ({"q_start": 3}, ArgumentTypeError, "q_start: .*attention_statistics"),
        ({"mask": Q[..., :5]}, ArgumentValueError, "mask: expected dtype torch.bool"),
        ({"backend": "cuda"}, NotImplementedError, "returned attention weights: not built"),
        ({"backend": "gpu"}, ArgumentValueError, "backend"),
    ],
)
def test_wrong_calls(said, error, message):
    with pytest.raises(error, match=message):
        attention_statistics(**{"query": Q, "key": Q} | said)


def test_wrong_calls_of_attention_weights():
    with pytest.raises(ArgumentValueError, match="""reduce: expected None or "mean", got 'sum'"""):
        attention_weights(Q, Q, reduce="sum")
    with pytest.raises(ArgumentTypeError, match="return_lse: .*attention_weights"):
        attention_weights(Q, Q, return_lse=True)


# -- Memory ------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
from fused_attention.attention_statistics import attention_statistics

torch.set_num_threads(1)


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


def peak(S):
    q, k = torch.randn(1, 1, S, 8, requires_grad=True), torch.randn(1, 1, S, 8)
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")
    before = resident("VmRSS")
    got = attention_statistics(q, k)
    got.mass.square().sum().backward()
    return (resident("VmHWM") - before) / 2**20


peak(256)
print(json.dumps(peak(8192)))
"""


@pytest.mark.serial
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_no_matrix_of_weights_is_held():
    """One matrix of weights has 256 MiB, forward or backward."""
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    mib = json.loads(child.stdout)
    print(f"statistics and the gradient of the mass: {mib:.0f} MiB")
    assert mib < 40

"""Calls the attention operators of torch.ops.fused_attention directly: opcheck, fake kernels,
refusal of arguments that do not fit together, and the dropout mask."""

import dataclasses
import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.library import opcheck

from feature_cases import CASES
from fused_attention import reference
from fused_attention.call.problem import CAUSAL
from fused_attention.tools import testing
from fused_attention.tools.testing import Case

pytestmark = pytest.mark.usefixtures("one_thread")

ops = torch.ops.fused_attention
FORWARDS = {
    "forward_plain": ops.attention_forward_plain.default,
    "forward_plain_lse": ops.attention_forward_plain_lse.default,
    "forward": ops.attention_forward.default,
}
ATTENTION = FORWARDS | {
    "backward": ops.attention_backward.default,
    "jvp": ops.attention_jvp.default,
    "backward_jvp": ops.attention_backward_jvp.default,
}
ALL = {f"attention_{name}" for name in ATTENTION} | {"dropout_keep_mask", "philox_state"}
# Tested in test_softmax.py, test_weights.py, test_attention_statistics.py, test_cache.py,
# test_tracing.py, test_exceptions.py.
ELSEWHERE = ("masked_softmax_", "attention_weights", "attention_statistics", "kv_cache_", "traced_")
ELSEWHERE += ("check_sequences",)


def arguments(name, case):
    """Returns the arguments of an operator for a case, by name."""
    inputs = testing.make_inputs(case)
    given = {**inputs.tensors, **inputs.options, "precision": 0}
    given |= {"scale": 0.4, "causal": CAUSAL[case.causal]}
    given |= {"window_left": case.window_size[0], "window_right": case.window_size[1]}
    op = ATTENTION[name]
    if name not in FORWARDS:
        given["out"], given["lse"] = ATTENTION["forward"](**arguments("forward", case))
        given |= {"grad_out": inputs.grad_out, "grad_lse": inputs.grad_lse}
        given |= {"bias_grad": "bias" in given, "sinks_grad": "sinks" in given}
    if name in ("jvp", "backward_jvp"):
        directions = testing.make_inputs(dataclasses.replace(case, seed=case.seed + 1))
        tangents = {**directions.tensors, "grad_out": directions.grad_out}
        tangents["grad_lse"] = directions.grad_lse
        given |= {f"tangent_{key}": x for key, x in tangents.items()}
        given |= {f"tangent_{key}": None for key in ("bias", "sinks") if key not in given}
    if name == "backward_jvp":
        changes = ATTENTION["jvp"](**arguments("jvp", case))
        given["tangent_out"], given["tangent_lse"] = changes
    return {x.name: given[x.name] for x in op._schema.arguments if x.name in given}


def as_tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def test_every_operator_is_tested_here():
    names = [name.split("::") for name in torch._C._dispatch_get_all_op_names()]
    ours = {name for namespace, name in names if namespace == "fused_attention"}
    assert {name for name in ours if not name.startswith(ELSEWHERE)} == ALL


# -- opcheck -----------------------------------------------------------------------------

GROUPS = ["plain", "mask 11QK", "bias 1HQK", "key padding", "softcap", "alibi BH", "sinks"]
GROUPS += ["dropout", "gqa", "value_head_dim", "window and causal", "everything"]
MEMORY = ["BHSD", "BSHD", "strided"]
CHECKED = [  # every memory format meets every group and every dtype
    pytest.param(
        *(op, group, dtype, MEMORY[(i + j) % 3]),
        # Without --full each operator meets about half of its groups, and every dtype; those for
        # plain calls have few groups, each of which they meet once.
        marks=pytest.mark.slow if (n + i + j) % 8 and not ("plain" in op and i == j) else (),
    )
    for n, op in enumerate(ATTENTION)
    for i, group in enumerate(["plain", "gqa", "window and causal"] if "plain" in op else GROUPS)
    for j, dtype in enumerate(testing.DTYPES)
]


@pytest.mark.parametrize("op, group, dtype, layout", CHECKED)
def test_opcheck(op, group, dtype, layout):
    case = dataclasses.replace(CASES[group], dtype=dtype, memory_format=layout, Sq=4, Sk=6)
    opcheck(ATTENTION[op], (), arguments(op, case))


def test_opcheck_of_dropout():
    opcheck(ops.dropout_keep_mask.default, (torch.tensor([7, 2]), 0.3, 2, 3, 5, 9))
    # Two draws differ, so no test may compare two runs.
    like = torch.randn(2, 3)
    opcheck(ops.philox_state.default, (like, 0), test_utils=("test_schema", "test_faketensor"))
    state = ops.philox_state(like, 0)
    assert (state.shape, state.dtype) == ((2,), torch.int64)
    assert torch.Tag.nondeterministic_seeded in ops.philox_state.default.tags


# -- Fake kernels ------------------------------------------------------------------------


def in_order(*order):
    """Returns a function that lays a tensor out in this order of dimensions, outermost first."""

    def lay_out(x):
        return x.permute(order).contiguous().permute(torch.tensor(order).argsort().tolist())

    return lay_out


LAYOUTS = {
    "BHSD": in_order(0, 1, 2, 3),
    "BSHD": in_order(0, 2, 1, 3),
    "SBHD": in_order(2, 0, 1, 3),
    "HBSD": in_order(1, 0, 2, 3),
    "SHBD": in_order(2, 1, 0, 3),
    "BHDS": in_order(0, 1, 3, 2),
    "DSHB": in_order(3, 2, 1, 0),
    "sliced": lambda x: x.repeat(1, 2, 2, 2)[:, : x.shape[1], : x.shape[2], : x.shape[3]],
    "strided": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded heads": lambda x: x[:, :1].expand_as(x),
    "expanded tokens": lambda x: x[:, :, :1].expand_as(x),
    "expanded": lambda x: torch.zeros((), dtype=x.dtype).expand_as(x),
}
SIZES = [
    Case(B=B, Hq=H, Hkv=H, Sq=Sq, Sk=Sk, D=D, Dv=Dv, bias="1HQK", sinks=True, dropout_p=0.5)
    for B, H, (Sq, Sk), (D, Dv) in itertools.product(
        (0, 1, 3), (0, 1, 2), ((0, 3), (1, 1), (3, 0), (4, 3)), ((1, 1), (5, 3))
    )
]


def described(x):
    sizes = [tuple(map(int, numbers)) for numbers in (x.shape, x.stride())]
    return (*sizes, x.dtype, x.device, int(x.storage_offset()))


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ATTENTION)
@pytest.mark.parametrize("symbolic", [False, True])
def test_fake_kernels_tell_shapes_strides_and_dtypes(op, layout, symbolic):
    for case in SIZES[:: 11 if symbolic else 5]:
        call = arguments(op, case)
        for name in ("query", "key", "value", "grad_out", "out"):
            if name in call:
                call[name] = LAYOUTS[layout](call[name])
        real = as_tuple(ATTENTION[op](**call))
        mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
        fake_call = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in call.items()
        }
        with mode:
            fake = as_tuple(ATTENTION[op](**fake_call))
        assert list(map(described, fake)) == list(map(described, real)), case


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_kernels_tell_the_dtypes_of_biases_and_lse(dtype, bias_dtype):
    call = arguments("backward", Case(dtype=dtype, bias="11QK", bias_dtype=bias_dtype, sinks=True))
    wide = torch.promote_types(dtype, torch.float32)
    for asked in ({}, {"bias_grad": False}, {"sinks_grad": False}):
        real = ATTENTION["backward"](**call | asked)
        assert [x.dtype for x in real[:3]] == [dtype] * 3 and call["lse"].dtype == wide
        mode = FakeTensorMode()
        fake_call = {
            n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x
            for n, x in (call | asked).items()
        }
        with mode:
            fake = ATTENTION["backward"](**fake_call)
        assert list(map(described, fake)) == list(map(described, real))
        for n, key in ((3, "bias"), (4, "sinks")):
            if (call | asked)[f"{key}_grad"]:
                assert (real[n].shape, real[n].dtype) == (call[key].shape, call[key].dtype)
            else:
                assert real[n].numel() == 0


@pytest.mark.parametrize("op", ATTENTION)
def test_a_symbolic_trace_serves_other_sizes(op):
    small, large = (
        arguments(op, Case(B=b, Hq=h, Hkv=h, Sq=sq, Sk=sk, D=d, Dv=d, memory_format="BSHD"))
        for b, h, sq, sk, d in ((2, 3, 4, 5, 8), (3, 4, 17, 99, 6))
    )
    tensors = [n for n, x in small.items() if isinstance(x, torch.Tensor)]

    def function(*args):
        return ATTENTION[op](**small | dict(zip(tensors, args, strict=True)))

    graph = make_fx(function, tracing_mode="symbolic")(*(small[n] for n in tensors))
    got = as_tuple(graph(*(large[n] for n in tensors)))
    for x, expected in zip(got, as_tuple(ATTENTION[op](**large)), strict=True):
        assert described(x) == described(expected) and torch.equal(x, expected)


# -- Arguments that do not fit are refused -----------------------------------------------


def to(*args):
    return lambda x: x.to(*args)


# Changes that every operator with the argument must refuse.
WRONG = {
    **{f"{n} of 3 dimensions": {n: lambda x: x[0]} for n in ("query", "key", "value")},
    **{f"{n} of 5 dimensions": {n: lambda x: x[None]} for n in ("query", "key", "value", "mask")},
    **{f"{n} int64": {n: to(torch.int64)} for n in ("query", "key", "value", "bias", "sinks")},
    **{f"{n} float64": {n: to(torch.float64)} for n in ("key", "value", "sinks", "alibi_slopes")},
    **{
        f"{n} on meta": {n: to("meta")}
        for n in "query key value mask bias key_padding_mask alibi_slopes sinks philox".split()
    },
    **{
        f"{n} sparse": {n: lambda x: x.to_sparse()}
        for n in ("query", "key", "mask", "bias", "sinks", "philox")
    },
    "query complex": {"query": to(torch.complex64)},
    "all int": {n: to(torch.int32) for n in ("query", "key", "value")},
    "no key": {"key": None},
    "batch of key": {"key": lambda x: x[:1]},
    "batch of value": {"value": lambda x: x[:1]},
    "batch of query": {"query": lambda x: x[:1]},
    "tokens of value": {"value": lambda x: x[:, :, 1:]},
    "heads of value": {"value": lambda x: x[:, :1]},
    "heads of query no multiple": {"query": lambda x: x[:, :3]},
    "no heads of key": {"key": lambda x: x[:, :0], "value": lambda x: x[:, :0]},
    "head_dim of key": {"key": lambda x: x[..., 1:]},
    "causal 4": {"causal": 4},
    "causal -1": {"causal": -1},
    "window -2": {"window_left": -2},
    "window -3": {"window_right": -3},
    "softcap no number": {"softcap": "much"},
    "mask float": {"mask": to(torch.float32)},
    "mask uint8": {"mask": to(torch.uint8)},
    "mask of 2 dimensions": {"mask": lambda x: x[0, 0]},
    "mask of other queries": {"mask": lambda x: x[:, :, 1:]},
    "mask of fewer keys": {"mask": lambda x: x[..., :2]},
    "mask of more keys": {"mask": lambda x: x.repeat(1, 1, 1, 2)},
    "mask of no key": {"mask": lambda x: x[..., :0]},
    "bias bool": {"bias": to(torch.bool)},
    "bias of 3 dimensions": {"bias": lambda x: x[0]},
    "bias of other heads": {"bias": lambda x: x.repeat(1, 2, 1, 1)},
    "key_padding_mask of 1 dimension": {"key_padding_mask": lambda x: x[0]},
    "key_padding_mask of fewer keys": {"key_padding_mask": lambda x: x[:, 1:]},
    "key_padding_mask of one batch": {"key_padding_mask": lambda x: x[:1]},
    "key_padding_mask uint8": {"key_padding_mask": to(torch.uint8)},
    "alibi_slopes of fewer heads": {"alibi_slopes": lambda x: x[1:]},
    "alibi_slopes of 3 dimensions": {"alibi_slopes": lambda x: x.expand(1, 2, 4)},
    "alibi_slopes of 0 dimensions": {"alibi_slopes": lambda x: x[0]},
    "alibi_slopes of more batches": {"alibi_slopes": lambda x: x.repeat(3, 1)},
    "alibi_slopes strided": {"alibi_slopes": lambda x: x.repeat_interleave(2)[::2]},
    "alibi_slopes expanded": {"alibi_slopes": lambda x: x[:1].expand(4)},
    "sinks of fewer heads": {"sinks": lambda x: x[1:]},
    "sinks of 2 dimensions": {"sinks": lambda x: x[None]},
    "sinks strided": {"sinks": lambda x: x.repeat_interleave(2)[::2]},
    "sinks expanded": {"sinks": lambda x: x[:1].expand(4)},
    "philox missing": {"philox": None},
    "philox float": {"philox": to(torch.float32)},
    "philox int32": {"philox": to(torch.int32)},
    "philox of 1": {"philox": lambda x: x[:1]},
    "philox of 3": {"philox": lambda x: x.repeat(2)[:3]},
    "philox of 2 dimensions": {"philox": lambda x: x.view(2, 1)},
    "dropout_p above 1": {"dropout_p": 1.01},
    "dropout_p below 0": {"dropout_p": -0.1},
    "dropout_p NaN": {"dropout_p": float("nan")},
    **{
        f"{n} is not built": {n: torch.zeros(3, dtype=torch.int32)}
        for n in ("cu_seqlens_q", "cu_seqlens_k", "seqused_k", "block_table")
    },
    **{
        f"{n} {what}": {n: change}
        for n in ("grad_out", "out")
        for what, change in {
            "of other queries": lambda x: x[:, :, 1:],
            "of other heads": lambda x: x[:, 1:],
            "of other head_dim": lambda x: x[..., 1:],
            "of 3 dimensions": lambda x: x[0],
            "of one batch": lambda x: x[:1],
            "float64": to(torch.float64),
            "on meta": to("meta"),
        }.items()
    },
    **{
        f"{n} {what}": {n: change}
        for n in ("lse", "grad_lse")
        for what, change in {
            "of other queries": lambda x: x[:, :, 1:],
            "of other heads": lambda x: x[:, 1:],
            "of 4 dimensions": lambda x: x[..., None],
            "of one batch": lambda x: x[:1],
            "float64": to(torch.float64),
            "bfloat16": to(torch.bfloat16),
            "on meta": to("meta"),
        }.items()
    },
    **{
        f"tangent_{n} {what}": {f"tangent_{n}": change}
        for n in ("query", "key", "value", "grad_out", "out", "lse", "grad_lse")
        for what, change in {
            "of another shape": lambda x: x[:, :, 1:],
            "of one batch": lambda x: x[:1],
            "float64": to(torch.float64),
            "on meta": to("meta"),
        }.items()
    },
    "tangent_bias of other heads": {"tangent_bias": lambda x: x.repeat(1, 2, 1, 1)},
    "tangent_bias on meta": {"tangent_bias": to("meta")},
    "tangent_sinks of fewer heads": {"tangent_sinks": lambda x: x[1:]},
    "tangent_sinks float64": {"tangent_sinks": to(torch.float64)},
    "tangent_sinks without sinks": {"sinks": None},
    "bias_grad without bias": {"bias": None, "bias_grad": True},
    "sinks_grad without sinks": {"sinks": None, "sinks_grad": True},
}
REFUSED = Case(
    **{"Hq": 4, "Sq": 3, "Sk": 5, "D": 4, "Dv": 4, "mask": "BHQK", "bias": "BHQK", "sinks": True},
    **{"key_padding": True, "alibi": "H", "dropout_p": 0.5},
)


@pytest.mark.parametrize("wrong", WRONG)
def test_malformed_inputs_are_refused(wrong):
    takers = 0
    for name, op in ATTENTION.items():
        call = arguments(name, REFUSED)
        if wrong == "tangent_sinks without sinks" and "jvp" not in name:
            continue
        if not set(WRONG[wrong]) <= {x.name for x in op._schema.arguments}:
            continue
        takers += 1
        op(**call)  # succeeds
        for key, change in WRONG[wrong].items():
            call[key] = change(call[key]) if callable(change) else change
        with pytest.raises(RuntimeError):
            op(**call)
    assert takers


@pytest.mark.parametrize("D, Dv", [(0, 0), (0, 4), (4, 0), (513, 4), (4, 513), (1000, 1000)])
@pytest.mark.parametrize("op", ATTENTION)
def test_head_dims_out_of_range_are_refused_or_right(op, D, Dv):
    case = Case(Sq=3, Sk=5, D=D, Dv=Dv, dtype=torch.float64)
    inputs = testing.make_inputs(case)
    try:
        got = as_tuple(ATTENTION[op](**arguments(op, case)))
    except RuntimeError as error:
        assert "head_dim" in str(error)
        return
    leaves = [x.requires_grad_() for x in inputs.tensors.values()]
    out, lse = reference.attention_reference(*leaves, scale=0.4, return_lse=True)
    expected = (out, lse)
    grads = inputs.grad_out, inputs.grad_lse
    if op == "backward":
        expected = torch.autograd.grad(expected, leaves, grads)
    if op in ("jvp", "backward_jvp"):
        call = arguments(op, case)

        def forward(*leaves):
            return reference.attention_reference(*leaves, scale=0.4, return_lse=True)

        def backward(*all):
            return torch.func.vjp(forward, *all[2:])[1](all[:2])

        names, function = ["query", "key", "value"], forward
        if op == "backward_jvp":
            names, function = ["grad_out", "grad_lse", *names], backward
        primals, tangents = ([call[prefix + n] for n in names] for prefix in ("", "tangent_"))
        expected = torch.func.jvp(function, tuple(x.detach() for x in primals), tuple(tangents))[1]
    for x, want in zip(got, expected, strict=False):
        torch.testing.assert_close(x, want)


@pytest.mark.parametrize("changes", [{"dropout_p": 2.0}, {"batch": -1}, {"seqlen_k": -5}], ids=str)
def test_dropout_keep_mask_refuses(changes):
    call = {"philox": torch.tensor([1, 2]), "dropout_p": 0.5}
    call |= {"batch": 1, "heads": 1, "seqlen_q": 2, "seqlen_k": 3}
    assert ops.dropout_keep_mask(**call).shape == (1, 1, 2, 3)
    with pytest.raises(RuntimeError):
        ops.dropout_keep_mask(**call | changes)
    for philox in (torch.tensor([1]), torch.tensor([1.0, 2.0]), torch.zeros(1, 1, 2).long()):
        with pytest.raises(RuntimeError):
            ops.dropout_keep_mask(**call | {"philox": philox})


# -- Arguments that fit are served -------------------------------------------------------


@pytest.mark.parametrize("op", ATTENTION)
def test_views_that_stand_for_other_values_are_resolved(op):
    """A tensor with the negative bit, like imaginary parts of conjugates, holds minus itself."""
    call = arguments(op, Case(Sq=3, Sk=5, D=4, Dv=4, bias="11QK"))
    expected = as_tuple(ATTENTION[op](**call))
    for name in ("query", "key", "value", "bias", "grad_out", "out", "lse"):
        if name in call:
            negated = torch._neg_view(-call[name])
            assert negated.is_neg()
            got = as_tuple(ATTENTION[op](**call | {name: negated}))
            for x, want in zip(got, expected, strict=True):
                assert torch.equal(x, want), name


@pytest.mark.parametrize("op", ATTENTION)
def test_operators_do_not_change_or_return_their_inputs(op):
    call = arguments(op, Case(bias="11QK", mask="11QK", sinks=True, D=1, Dv=1))
    tensors = {n: x for n, x in call.items() if isinstance(x, torch.Tensor)}
    before = {n: x.clone() for n, x in tensors.items()}
    results = as_tuple(ATTENTION[op](**call))
    storages = {x.untyped_storage().data_ptr() for x in tensors.values()}
    assert not storages & {x.untyped_storage().data_ptr() for x in results if x.numel()}
    for name, x in tensors.items():
        assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("p", [0.0, 1e-6, 0.1, 0.5, 0.999, 1.0])
def test_dropout_keep_mask_is_the_definition(isa, p):
    for seed, offset in ((0, 0), (1, 7), (-1, 2**32 - 1), (2**63 - 1, -1), (5, 2**40 + 3)):
        philox = torch.tensor([seed, offset])
        for sizes in ((2, 3, 5, 37), (1, 1, 1, 1), (1, 2, 3, 8), (0, 1, 2, 3), (1, 2, 0, 9)):
            got = ops.dropout_keep_mask(philox, p, *sizes)
            assert got.dtype == torch.bool and got.is_contiguous()
            assert torch.equal(got, reference.dropout_keep_mask(philox, p, *sizes))

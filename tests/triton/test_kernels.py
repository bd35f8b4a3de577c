"""Compares our Triton kernels, compiled for sm_80 and sm_90, with the definition; nothing is found.

The PTX interpreter executes the launches that a GPU would get. Errors are judged by the project's
correctness rule; products of float32 in TF32, which `precision="medium"` allows, by the rule for
bfloat16.
"""

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: nothing to compile the kernels with")

import fused_attention as fa
import packed_sequences as sequences
from cache_checks import pages_for, tokens
from feature_cases import case_id
from fused_attention import operators as ops
from fused_attention.kernels import launch, operators
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments
from packed_sequences import Packing
from ptx import SCHEDULES
from ptx.device import PTXDevice
from ptx.kernel_cases import COVERING, case
from selection import quick
from softmax_checks import PHILOX, randn
from softmax_checks import check as softmax_mismatches
from triton_calls import check_append, run, weights_mismatches

pytestmark = pytest.mark.timeout(3600)  # a cold cache on a busy machine
TARGETS = pytest.mark.parametrize("target", ["sm_80", "sm_90"])
slow = pytest.mark.slow


def no_findings(device: PTXDevice) -> None:
    assert device.executions
    assert not device.findings(), "\n".join(map(str, device.findings()))


def check(target: str, case: Case, schedule: str = "lockstep") -> PTXDevice:
    """Checks forward and backward."""

    def answer(case: Case):
        inputs = testing.make_inputs(case)
        return run(inputs), testing.exact(inputs), testing.naive(inputs)

    with PTXDevice(target, schedule) as device:
        assert not testing.check_answers(case, answer)
    no_findings(device)
    return device


# -- Attention -----------------------------------------------------------------------------


# The cases that run each time: Triton's interpreter runs the same kernels in many more.
OFTEN = [("sm_80", "causal, gqa"), ("sm_90", "everything")]


@pytest.mark.parametrize(
    "target, name",
    [
        pytest.param(*one, marks=() if one in OFTEN else slow)
        for one in itertools.product(("sm_80", "sm_90"), COVERING)
    ],
)
def test_covering_set(target, name):
    device = check(target, COVERING[name])
    expected = {"forward", "delta", "dkdv", "dq"}
    if name == "everything":
        expected |= {"dbias", "dsinks"}
    assert {f"attention_{x}_kernel" for x in expected} <= {one.name for one in device.executions}
    if COVERING[name].dtype != torch.float32:
        used = {opcode.split(".")[0] for one in device.executions for opcode in one.report.opcodes}
        assert {"wgmma" if target == "sm_90" else "mma", "cp"} <= used


TMA = {
    "full": case(Sk=300),
    "causal": case(
        dtype=torch.bfloat16, causal="bottom_right", Sq=200, Sk=300, memory_format="BSHD"
    ),
    "window, gqa": case(D=128, Dv=72, Hkv=1, Sq=300, Sk=300, window_size=(280, 200)),
    "dropout, bias": case(Sk=300, D=40, dropout_p=0.2, bias="1HQK"),
}


def copied_by_tma(device: PTXDevice) -> set[str]:
    return {
        one.name
        for one in device.executions
        if any(opcode.startswith("cp.async.bulk.tensor") for opcode in one.report.opcodes)
    }


@pytest.mark.parametrize("name", quick(TMA, "causal"))
def test_tiles_come_by_descriptor(name):
    device = check("sm_90", TMA[name])
    kernels = {"attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"}
    assert copied_by_tma(device) == kernels


@slow
def test_the_same_tiles_come_by_pointers_where_they_must():
    """The results have the same bits if an address is no multiple of 16."""
    inputs = testing.make_inputs(TMA["causal"])
    with PTXDevice("sm_90") as device:
        expected = run(inputs)
    for part, x in inputs.tensors.items():
        memory = torch.empty(x.numel() + 1, dtype=x.dtype)[1:]
        inputs.tensors[part] = memory.as_strided(x.shape, x.stride()).copy_(x)
    with PTXDevice("sm_90") as device:
        got = run(inputs)
    no_findings(device)
    assert copied_by_tma(device) <= {"attention_dkdv_kernel"}  # of grad_out
    assert all(torch.equal(x, expected[name]) for name, x in got.items())


DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FEATURES = [
    dataclasses.replace(
        one, dtype=DTYPES[turn % 3], **({"B": 2, "Sq": 70, "Sk": 100} if one.Sq == 53 else {})
    )
    for number, one in enumerate(testing.single_features())
    for turn in range(number, number + 3)
    if one.dtype == torch.float32
]


@slow
@pytest.mark.parametrize("number", range(len(FEATURES)), ids=[case_id(x) for x in FEATURES])
def test_every_feature_in_every_dtype(number):
    """Covers each feature in each dtype; the targets take turns."""
    check(("sm_80", "sm_90")[number % 2], FEATURES[number])


@slow
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@TARGETS
def test_head_dims(target, dtype, D):
    check(target, case(dtype=dtype, D=D, Dv=D, causal="top_left", Hq=1, Hkv=1))


@slow
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "lockstep"])
@TARGETS
def test_every_order_of_the_warps(target, schedule):
    check(target, COVERING["causal, gqa"], schedule)


@pytest.mark.parametrize(
    "precision, rule",
    [pytest.param(1, "high", marks=slow), (2, "medium")],
)
@TARGETS
def test_precision_of_float32(target, precision, rule):
    """Precision "high" computes three products of TF32, "medium" one, judged as bfloat16."""
    inputs = testing.make_inputs(case(dtype=torch.float32, Hq=1, Hkv=1, Sq=70, Sk=70))
    with PTXDevice(target) as device:
        query, key, value = (inputs.tensors[x] for x in ("query", "key", "value"))
        out, lse = operators.attention_forward(query, key, value, *arguments(inputs, precision))
    no_findings(device)
    exact = testing.exact(inputs)
    if rule == "high":
        for got, want in ((out, exact["out"]), (lse, exact["lse"])):
            error = (got.double() - want).abs()
            assert error.max() <= 6e-5 and error.square().mean().sqrt() <= 2e-6
        return
    rounded = testing.Inputs(
        {name: x.bfloat16() for name, x in inputs.tensors.items()},
        inputs.options,
        inputs.grad_out,
        inputs.grad_lse,
    )
    got = {"out": out, "lse": lse}
    plain = tuple({k: x.float() for k, x in answer.items()} for answer in testing.naive(rounded))
    assert not [e for e in testing.errors(got, exact, plain) if e.is_wrong]


@TARGETS
def test_dropout_bits_are_those_of_the_cpu(target):
    with PTXDevice(target) as device:
        for philox in (torch.tensor([-1, 2**32 + 5]), PHILOX):
            got = operators.dropout_keep_mask(philox, 0.3, 2, 3, 17, 133)
            assert torch.equal(got, ops.dropout_keep_mask(philox, 0.3, 2, 3, 17, 133))
    no_findings(device)


@TARGETS
def test_the_weights_that_attention_drops_are_those_of_the_cpu(target):
    """With value = 1 on the diagonal, out is the weights themselves."""
    inputs = testing.make_inputs(case(dtype=torch.float16, Sk=64, dropout_p=0.3))
    query, key = inputs.tensors["query"] / 4, inputs.tensors["key"] / 4
    value = torch.eye(64).half().expand(1, 2, 64, 64)
    with PTXDevice(target) as device:
        out, _ = operators.attention_forward(query, key, value, *arguments(inputs))
    no_findings(device)
    keep = ops.dropout_keep_mask(inputs.options["philox"], 0.3, 1, 2, 150, 64)
    assert torch.equal(out != 0, keep)


@slow
@TARGETS
def test_hidden_keys_influence_nothing(target):
    """NaN in the padding changes neither forward nor backward."""
    inputs = testing.make_inputs(case(key_padding=True, Sq=70))
    hidden = inputs.options["key_padding_mask"].view(1, 1, -1, 1)
    results = []
    for fill in (0.0, float("nan")):
        for name in ("key", "value"):
            inputs.tensors[name] = inputs.tensors[name].masked_fill(hidden, fill)
        with PTXDevice(target) as device:
            results.append(run(inputs))
        no_findings(device)
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())


# -- Sequences, decoding, weights, caches --------------------------------------------------


def decode(case):
    inputs = testing.make_inputs(case)
    query, key, value = (inputs.tensors[name] for name in ("query", "key", "value"))
    got = dict(
        zip(
            ("out", "lse"),
            operators.attention_forward(query, key, value, *arguments(inputs)),
            strict=True,
        )
    )
    exact, naive = testing.exact(inputs), testing.naive(inputs)
    assert not [e.message for e in testing.errors(got, exact, naive) if e.is_wrong]


def append_to_pages():
    key, value = tokens(S=20)
    pages, table = pages_for(3, 3, 60)
    caches = [torch.randn(pages, 3, 2, x.shape[-1]) for x in (key, value)]
    lengths = torch.tensor([0, 15, 31], dtype=torch.int32)
    check_append(caches, key, value, lengths, table)


def options(name, dtype):
    return dataclasses.replace(sequences.OPTIONS[name], dtype=dtype)


# Name: (the check, the kernels that must have run).
OTHERS = {
    "packed": (
        lambda: sequences.check(
            operators,
            options("all the rest", torch.bfloat16),
            Packing([*sequences.LENGTHS, (70, 90)], used=True),
        ),
        {"attention_forward", "attention_dkdv", "attention_dq", "attention_dsinks"},
    ),
    "packed, by descriptors": (
        lambda: sequences.check(
            operators,
            dataclasses.replace(options("plain", torch.bfloat16), D=64, Dv=64),
            Packing([(70, 90), (64, 100), (33, 140)]),
        ),
        {"attention_forward", "attention_dkdv", "attention_dq"},
    ),
    "pages": (
        lambda: sequences.check(
            operators, options("window", torch.float16), Packing([(70, 45), (66, 50)], page_size=7)
        ),
        {"attention_forward", "attention_dkdv", "attention_dq"},
    ),
    "used lengths": (
        lambda: sequences.check(
            operators, options("plain", torch.float32), Packing(sequences.SAME, packed=False)
        ),
        {"attention_dkdv", "attention_dq"},
    ),
    "decode": (
        lambda: decode(
            case(Hq=4, Sq=3, Sk=600, causal="bottom_right", dropout_p=0.2, sinks=True, bias="1H1K")
        ),
        {"attention_decode", "attention_combine"},
    ),
    "decode from pages": (
        lambda: sequences.check(
            operators,
            options("all the rest", torch.bfloat16),
            Packing(sequences.DECODED, page_size=32),
        ),
        {"attention_decode", "attention_dkdv", "attention_dq"},
    ),
    "decode in float32": (
        lambda: decode(case(dtype=torch.float32, Sq=1, Sk=300, key_padding=True)),
        {"attention_decode"},
    ),
    "weights": (
        lambda: _none(
            weights_mismatches(
                case(Hkv=1, Sq=70, causal="top_left", key_padding=True, dropout_p=0.3), True
            )
        ),
        {"attention_weights", "attention_weights_delta", "attention_dkdv"},
    ),
    "weights of heads": (
        lambda: _none(
            weights_mismatches(case(dtype=torch.float32, Sq=40, Sk=70, mask="B1QK"), False)
        ),
        {"attention_weights", "attention_weights_delta"},
    ),
    "append to pages": (append_to_pages, {"kv_cache_append"}),
}


def _none(mismatches):
    assert not mismatches


FAST = [("packed", "sm_90"), ("decode", "sm_80"), ("pages", "sm_80")]
FAST += [("append to pages", "sm_90")]


@pytest.mark.parametrize(
    "name, target",
    [
        pytest.param(name, target, marks=() if (name, target) in FAST else slow)
        for name in OTHERS
        for target in ("sm_80", "sm_90")
    ],
)
def test_other_kernels(name, target):
    check_it, kernels = OTHERS[name]
    with PTXDevice(target) as device:
        check_it()
    no_findings(device)
    assert {f"{kernel}_kernel" for kernel in kernels} <= {one.name for one in device.executions}


# -- Masked softmax ------------------------------------------------------------------------


@pytest.fixture
def softmax_on(monkeypatch):
    """Returns a function that puts masked_softmax on a PTX device."""

    def on(target):
        monkeypatch.setattr(ops, "softmax_forward", operators.masked_softmax_forward)
        monkeypatch.setattr(ops, "softmax_backward", operators.masked_softmax_backward)
        monkeypatch.setattr(ops, "softmax_in_place", operators.masked_softmax_)
        monkeypatch.setattr(launch, "DBIAS_PROGRAMS", 8)
        return PTXDevice(target)

    return on


def softmax_case(dtype, columns, features):
    mask = bias = sinks = None
    options = {}
    if features:
        mask, bias = torch.rand(2, 1, 5, columns) > 0.4, randn(3, 1, columns, dtype=dtype)
        sinks, options = randn(3), {"causal": "bottom_right", "dropout_p": 0.25, "scale": 0.7}
    return softmax_mismatches(randn(2, 3, 5, columns, dtype=dtype), mask, bias, sinks, **options)


@pytest.mark.parametrize(
    "dtype, columns, features",
    [
        pytest.param(*values, marks=() if fast else slow, id="-".join(map(str, values)))
        for values, fast in (
            ((torch.float16, 70, True), True),
            ((torch.bfloat16, 1000, False), True),
            ((torch.bfloat16, 70, True), False),
            ((torch.float32, 70, True), False),
            ((torch.float32, 1000, False), False),
        )
    ],
)
@TARGETS
def test_softmax(softmax_on, target, dtype, columns, features):
    with softmax_on(target) as device:
        assert not softmax_case(dtype, columns, features)
    no_findings(device)
    names = {one.name.removeprefix("masked_softmax_") for one in device.executions}
    assert ({"dbias_kernel", "dsinks_kernel"} <= names) == features


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        pytest.param(torch.float16, marks=slow),
        pytest.param(torch.bfloat16, marks=slow),
    ],
    ids=str,
)
@TARGETS
def test_softmax_of_rows_longer_than_a_block(softmax_on, target, dtype):
    with softmax_on(target) as device:
        x = randn(1, 2, 1, 8192 + 77, dtype=dtype)
        mask = torch.rand(1, 1, 1, x.shape[-1]) > 0.3
        assert not softmax_mismatches(x, mask, sinks=randn(2))
    no_findings(device)
    assert {one.launch.constants.get("ONE_BLOCK") for one in device.executions} >= {False}


@TARGETS
def test_softmax_drops_the_bits_of_the_cpu(softmax_on, target):
    with softmax_on(target) as device:
        out = fa.masked_softmax(torch.zeros(2, 3, 5, 70), dropout_p=0.4, philox_seed=PHILOX)
    no_findings(device)
    assert torch.equal(out != 0, ops.dropout_keep_mask(PHILOX, 0.4, 2, 3, 5, 70))

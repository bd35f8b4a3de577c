"""Tests of the CUDA kernels without a GPU: the real operators launch them, and the PTX interpreter
runs what nvcc compiles for sm_80 and sm_90a.

The tests compare results with the definition, expect no finding, and check which kernels are
launched. Without nvcc only the operators and their plans are tested.
"""

import dataclasses
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import cuda_interpreter
import nothing_seen
import packed_sequences as sequences
from cuda_calls import OPS, PLAIN_NUMBERS, findings, recording, run, small
from cuda_interpreter import interpreted
from feature_cases import problem_of
from fused_attention import reference
from fused_attention.call import backends
from fused_attention.call.backends import CUDA
from fused_attention.call.explain import details_of
from fused_attention.call.options import Options
from fused_attention.call.plan import run as run_plan
from fused_attention.call.problem import FEATURES
from fused_attention.operators import cuda
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from operator_calls import arguments
from packed_sequences import Packing
from ptx import SCHEDULES, faults
from selection import quick

needs_nvcc = pytest.mark.skipif(cuda_interpreter.NVCC is None, reason="nvcc not found")

PAIRS = [case for case in testing.pairs_of_features() if case.dtype != torch.float64]
# One in OFTEN of the cases that cover all pairs runs each time; the others wait for --full.
OFTEN = 20
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(case, factor=2.0, **how):
    def answer(case):
        inputs = testing.make_inputs(case)
        got, runs = run(inputs, **how)
        assert not findings(runs), "\n".join(findings(runs))
        want = testing.exact(inputs)
        return got, {name: want[name] for name in got}, testing.naive(inputs)

    assert not testing.check_answers(case, answer, factor)


@needs_nvcc
@pytest.mark.parametrize(
    "number",
    [pytest.param(n, marks=() if n % OFTEN == 0 else pytest.mark.slow) for n in range(len(PAIRS))],
)
def test_pairs_of_features(number):
    check(small(PAIRS[number]))


PLAIN = [
    (torch.bfloat16, 64, {}),
    (torch.float16, 64, {"causal": "bottom_right"}),
    (torch.bfloat16, 128, {"causal": "top_left", "sinks": True}),
    (torch.float16, 96, {"window_size": (40, 10)}),
    (torch.bfloat16, 32, {"window_size": (10, -1), "causal": "bottom_right"}),
    (torch.float16, 256, {"causal": "bottom_right"}),
]


@needs_nvcc
@pytest.mark.parametrize(
    "dtype, head_dim, features",
    [pytest.param(*x, marks=() if x is PLAIN[2] else pytest.mark.slow) for x in PLAIN],
)
def test_kernel_without_options(dtype, head_dim, features):
    """Covers ragged tiles, and head sizes with and without padding."""
    for D, Dv in ((head_dim, head_dim), (head_dim - 8, head_dim - 24)):
        case = Case(
            dtype=dtype, B=1, Hq=2, Hkv=1, Sq=140, Sk=200, D=D, Dv=Dv, **features, seed=D
        )  # fmt: skip
        check(case)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_every_schedule_of_warps(head_dim, schedule):
    case = Case(dtype=torch.float16, B=1, Hq=1, Hkv=1, Sq=130, Sk=200, D=head_dim, Dv=head_dim)
    check(case, schedule=schedule)
    check(dataclasses.replace(case, Sq=20, Sk=70, D=head_dim - 3, mask="11QK"), schedule=schedule)


@needs_nvcc
@pytest.mark.parametrize("precision, allowed", [(1, 1e-4), (2, 3e-2)])
def test_float32_by_fewer_products(precision, allowed):
    inputs = testing.make_inputs(Case(Sq=20, Sk=40, D=32, Dv=32))
    got, runs = run(inputs, precision, gradients=False)
    assert not findings(runs)
    error = (got["out"] - testing.exact(inputs)["out"]).abs().max()
    highest = (run(inputs, gradients=False)[0]["out"] - testing.exact(inputs)["out"]).abs().max()
    assert 2 * highest < error < allowed


@needs_nvcc
@pytest.mark.parametrize("dtype", quick([torch.float16, torch.float32], torch.float16))
def test_what_nobody_sees_may_be_nan(dtype):
    case = Case(dtype=dtype, B=2, Sq=20, Sk=90, key_padding=True, mask="111K", causal="top_left")
    inputs = testing.make_inputs(case)
    hidden = inputs.options["key_padding_mask"] | ~inputs.options["mask"][:, 0, 0]
    hidden = hidden | (torch.arange(case.Sk) >= case.Sq)  # causal
    want = testing.exact(inputs)
    for name in ("key", "value"):
        inputs.tensors[name].masked_fill_(hidden[:, None, :, None], torch.nan)
    got, runs = run(inputs)
    assert not findings(runs)
    for name, x in got.items():
        torch.testing.assert_close(x.double(), want[name], rtol=0, atol=1e-2, msg=name)


def on(capability, starts=True):
    """Returns a backend for nothing_seen.py: a GPU of this compute capability.

    starts: whether every call launches kernels, so that the first one can be checked.
    """

    def results(inputs):
        got, runs = run(inputs, capability=capability)
        assert not findings(runs), "\n".join(findings(runs))
        if starts:
            masked = set(inputs.options) & {"mask", "key_padding_mask"}
            assert cuda_interpreter.is_hopper(runs[0].kernel) == (capability == 90 and not masked)
        return got

    return results


@needs_nvcc
@pytest.mark.parametrize("bad", quick([torch.nan, torch.inf], torch.inf))
@pytest.mark.parametrize("name", quick(nothing_seen.UNSEEN, "mask, float16"))
def test_gradients_of_unseen_keys_are_zero_beside_nan(name, bad):
    nothing_seen.check_gradients_of_unseen_keys(on(80), name, bad)


@needs_nvcc
@pytest.mark.parametrize("bad", quick([torch.nan, torch.inf], torch.nan))
@pytest.mark.parametrize("name", quick(nothing_seen.BLIND))
def test_results_of_blind_queries_are_zero_beside_nan(name, bad):
    nothing_seen.check_results_of_blind_queries(on(80), name, bad)


@needs_nvcc
@pytest.mark.parametrize("where", quick(nothing_seen.PLACES, "query"))
@pytest.mark.parametrize("name", quick(nothing_seen.WINDOWS))
def test_nan_stays_beside_hidden_keys(name, where):
    nothing_seen.check_nan_stays(on(80), name, where)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("sinks", [False, True])
def test_logits_of_minus_infinity(sinks):
    """Only 16-bit calls: an infinite float32 beside a term of 0 makes NaN, see `Terms`."""
    nothing_seen.check_logits_of_minus_infinity(on(80), torch.float16, sinks=sinks)


@needs_nvcc
@pytest.mark.parametrize(
    "zero", quick(nothing_seen.EMPTY, ("Hq",), ("B", "Sk")), ids="-".join
)  # fmt: skip
def test_sizes_of_0(zero):
    fields = {"sinks": True, "bias": "1H1K", "mask": "11QK", "dtype": torch.float16}
    nothing_seen.check_empty(on(80, False), zero, **fields)


@needs_nvcc
@pytest.mark.parametrize("capability", quick([80, 90], 80))
@pytest.mark.parametrize("hint", quick([1, -3, 2**62], -3))
@pytest.mark.parametrize(
    "cu_seqlens", quick(nothing_seen.HOSTILE, nothing_seen.HOSTILE[0]), ids=str
)
def test_senseless_lengths_lead_nowhere(cu_seqlens, hint, capability):
    """Forward and backward touch no memory outside the tensors of the call."""
    cuda_interpreter.library()
    lengths = torch.tensor(cu_seqlens, dtype=torch.int32)
    used = torch.tensor([-5, 2**31 - 1, 3, -(2**31)], dtype=torch.int32)
    q, k, v = (x[0].transpose(0, 1) for x in qkv(B=1, Hq=2, Hkv=1, Sq=40, Sk=40))
    with interpreted(compute_capability=capability) as runs:
        seqused = used if hint < 0 else None
        rest = (*(None,) * 6, 0.0, 0.0, lengths, lengths.flip(0), hint, hint, seqused)
        out, lse = OPS.attention_forward(q, k, v, *PLAIN_NUMBERS, *rest)
        OPS.attention_backward(out, None, q, k, v, out, lse, *PLAIN_NUMBERS, *rest)
    found = [x for run in runs for x in run.report.findings if x.kind == "out of bounds"]
    assert runs and not found, "\n".join(map(str, found))


@needs_nvcc
@pytest.mark.parametrize("where", ["key", "value"])
def test_a_visible_nan_propagates(where):
    inputs = testing.make_inputs(Case(dtype=torch.float16, Sq=20, Sk=90, D=64, Dv=64))
    inputs.tensors[where][:, :, 70, 3] = torch.nan
    got, _ = run(inputs, gradients=False)
    assert got["out"].isnan().any(-1).all()
    assert got["lse"].isnan().all() == (where == "key")


@needs_nvcc
def test_dropout_is_that_of_every_backend():
    inputs = testing.make_inputs(Case(dtype=torch.float16, Sq=20, Sk=64, Dv=64, dropout_p=0.3))
    value = torch.eye(64, dtype=torch.float16).expand(2, 2, 64, 64).contiguous()
    inputs.tensors["value"] = value  # the output is the weights
    got, _ = run(inputs, gradients=False)
    kept = reference.dropout(torch.ones(2, 2, 20, 64), 0.3, inputs.options["philox"]) != 0
    assert torch.equal(got["out"] != 0, kept)


# -- Sequences, by the checks of packed_sequences.py ------------------------------------------

PACKINGS = {
    "packed": Packing([*sequences.LENGTHS, (70, 140)]),
    "packed, used": Packing(sequences.LENGTHS, used=True),
    "packed, pages of 7": Packing(sequences.LENGTHS, page_size=7),
    "used": Packing(sequences.SAME, packed=False),
    "pages of 16": Packing(sequences.SAME, packed=False, page_size=16),
}
OPTIONS = {
    "plain": dataclasses.replace(sequences.OPTIONS["plain"], D=16, Dv=24),
    **{name: sequences.OPTIONS[name] for name in ("window", "all the rest")},
    "causal": dataclasses.replace(sequences.OPTIONS["top left"], D=24, Dv=8, sinks=True),
}
SEQUENCES = [
    pytest.param(
        *(packing, name, DTYPES[(x + y) % 3]),
        id=f"{how}-{name}",
        marks=[pytest.mark.slow] if (x + 2 * y) % 7 else [],
    )
    for x, (how, packing) in enumerate(PACKINGS.items())
    for y, name in enumerate(OPTIONS)
]


@needs_nvcc
@pytest.mark.parametrize("packing, name, dtype", SEQUENCES)
def test_sequences(monkeypatch, packing, name, dtype):
    cuda_interpreter.library()
    with interpreted() as runs:
        sequences.check(OPS, dataclasses.replace(OPTIONS[name], dtype=dtype), packing)
    assert not findings(runs), "\n".join(findings(runs))


@needs_nvcc
@pytest.mark.slow
def test_a_page_that_many_share_gets_the_gradients_of_all():
    B, H, size, D = 300, 1, 4, 8
    query, pages = torch.randn(B, H, 1, D), torch.randn(2, size, H, D)
    table = torch.zeros(B, 1, dtype=torch.int32)
    table[1] = 1
    leaves = [x.requires_grad_() for x in (query, pages.clone(), pages.clone())]
    used = torch.full((B,), 3, dtype=torch.int32)
    rest = (*(None,) * 6, 0.0, 0.0, *(None,) * 4, used, table)
    cuda_interpreter.library()
    with torch.no_grad(), interpreted() as runs:
        out, lse = OPS.attention_forward(*leaves, *PLAIN_NUMBERS, *rest)
        grads = OPS.attention_backward(out, None, *leaves, out, lse, *PLAIN_NUMBERS, *rest)
    assert not findings(runs)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    keys, values = (x[table[:, 0].long(), :3].transpose(1, 2) for x in wide[1:])
    weights = (wide[0] @ keys.mT * 0.125).softmax(-1)
    expected = torch.autograd.grad(weights @ values, wide, out.double())
    for got, want in zip(grads, expected, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


# -- Few queries ------------------------------------------------------------------------------

DECODE = Case(B=1, Hq=4, Hkv=2, Sq=1, Sk=200, D=20, Dv=20)
FEW = {
    "one query": DECODE,
    "float16, one head a group": dataclasses.replace(DECODE, Hq=2, dtype=torch.float16, D=128),
    "five heads, one group": dataclasses.replace(
        DECODE, Hq=5, Hkv=1, dtype=torch.bfloat16, Dv=64, D=64
    ),
    "few keys": dataclasses.replace(DECODE, Sk=15, Sq=2),
    "no keys": dataclasses.replace(DECODE, Sk=0),
    "parts": dataclasses.replace(DECODE, Sk=1000, dtype=torch.bfloat16, D=64, Dv=64),
    "parts of several rows": dataclasses.replace(
        DECODE, Sq=9, Sk=600, causal="bottom_right", dtype=torch.float16, D=32, Dv=24, sinks=True
    ),
    "window": dataclasses.replace(DECODE, Sq=3, causal="bottom_right", window_size=(70, 0)),
    "everything": dataclasses.replace(
        DECODE, B=2, Sq=3, Sk=700, Dv=10, causal="bottom_right", window_size=(690, 0),
        mask="BHQK", bias="1HQK", key_padding=True, softcap=4.0, alibi="BH", sinks=True,
        memory_format="BSHD",
    ),
    "wide": dataclasses.replace(DECODE, D=256, Dv=200, dtype=torch.float16),
    "wide float32": dataclasses.replace(DECODE, D=200, Dv=256, scale=-0.3, Sk=40),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", quick(FEW, "parts of several rows", "everything"))
def test_few_queries(name):
    inputs = testing.make_inputs(FEW[name])
    got, runs = run(inputs, gradients=False)
    assert not findings(runs), "\n".join(findings(runs))
    kernels = [run.kernel.split("_kernel")[0] for run in runs]
    assert kernels == ["attention_decode", "attention_combine"]
    splits = runs[0].blocks // (FEW[name].B * FEW[name].Hkv)
    assert splits == max(1, FEW[name].Sk // 256)
    exact, naive = testing.exact(inputs), testing.naive(inputs)
    assert not [e.message for e in testing.errors(got, exact, naive) if e.is_wrong]


@needs_nvcc
@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s != "lockstep"])
def test_few_queries_in_every_order_of_the_warps(schedule):
    inputs = testing.make_inputs(FEW["parts of several rows"])
    got, runs = run(inputs, gradients=False, schedule=schedule)
    assert not findings(runs), "\n".join(findings(runs))
    exact, naive = testing.exact(inputs), testing.naive(inputs)
    assert not [e.message for e in testing.errors(got, exact, naive) if e.is_wrong]


DECODE_FAULTS = {
    "no barrier before keys are read": (faults.drop(faults.BAR, 1), "finding"),
    "no barrier before the warps' results are read": (faults.drop(faults.BAR, -1), "finding"),
    "no wait for keys": (faults.drop(faults.WAIT_COPIES, 0), "finding"),
    "a product is left out": (faults.drop(r"mma\.sync[^;]*;", -1), "numbers"),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", quick(DECODE_FAULTS, *list(DECODE_FAULTS)[1:4:2]))
def test_faults_planted_in_decode_are_caught(name):
    edit, caught_by = DECODE_FAULTS[name]

    def only_decode(ptx):
        return edit(ptx) if "attention_decode_kernel" in ptx else ptx

    inputs = testing.make_inputs(FEW["parts"])
    got, runs = run(inputs, gradients=False, edit=only_decode)
    exact, naive = testing.exact(inputs), testing.naive(inputs)
    wrong = [e for e in testing.errors(got, exact, naive) if e.is_wrong]
    assert findings(runs) if caught_by == "finding" else wrong


@needs_nvcc
@pytest.mark.parametrize("page_size", quick([None, 7], 7))
def test_few_queries_of_sequences(monkeypatch, page_size):
    cuda_interpreter.library()
    name, dtype = (
        ("causal", torch.float16) if page_size is None else ("all the rest", torch.float32)
    )
    with interpreted() as runs:
        sequences.check(
            OPS,
            dataclasses.replace(OPTIONS[name], dtype=dtype),
            Packing(sequences.DECODED, page_size=page_size),
        )
    assert not findings(runs), "\n".join(findings(runs))
    assert runs[0].kernel.startswith("attention_decode_kernel")


@needs_nvcc
def test_a_wrong_hint_changes_no_result(monkeypatch):
    """With max_seqlen_q = 1, attention_decode also serves longer sequences, 16 rows at a time."""
    cuda_interpreter.library()
    right = Packing.arguments
    hint = property(lambda self: (*right.fget(self)[:2], 1, 1, *right.fget(self)[4:]))
    monkeypatch.setattr(Packing, "arguments", hint)
    with interpreted() as runs:
        sequences.check(OPS, OPTIONS["window"], Packing(sequences.LENGTHS))
    assert not findings(runs), "\n".join(findings(runs))
    assert runs[0].kernel.startswith("attention_decode_kernel")


# -- Hopper -----------------------------------------------------------------------------------

ON_HOPPER = {
    "full": Case(dtype=torch.bfloat16, B=1, Hq=2, Hkv=1, Sq=200, Sk=300, D=64, Dv=64),
    "causal": Case(
        dtype=torch.float16, B=1, Hq=1, Hkv=1, Sq=140, Sk=400, D=128, Dv=128,
        causal="bottom_right", sinks=True, memory_format="BSHD",
    ),
    "window": Case(
        dtype=torch.bfloat16, B=1, Hq=1, Hkv=1, Sq=300, Sk=520, D=40, Dv=64, causal="bottom_right",
        window_size=(150, 0),
    ),
    "head size 96": Case(
        dtype=torch.float16, B=1, Hq=1, Hkv=1, Sq=70, Sk=270, D=96, Dv=72, causal="top_left"
    ),
}  # fmt: skip


HOPPER_KERNELS = ["forward_hopper", "delta", "backward_hopper", "backward_hopper"]


def check_on_hopper(case, **how):
    def answer(case):
        inputs = testing.make_inputs(case)
        got, runs = run(inputs, capability=90, **how)
        kernels = [run.kernel.split("_kernel")[0] for run in runs]
        assert kernels[:4] == [f"attention_{name}" for name in HOPPER_KERNELS]
        assert not findings(runs), "\n".join(findings(runs))
        want = testing.exact(inputs)
        return got, {name: want[name] for name in got}, testing.naive(inputs)

    assert not testing.check_answers(case, answer)


@needs_nvcc
@pytest.mark.parametrize("name", quick(ON_HOPPER, "causal"))
def test_hopper(name):
    check_on_hopper(ON_HOPPER[name])


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("dtype, head_dim, features", [x for x in PLAIN if x[1] <= 128])
def test_kernel_without_options_on_hopper(dtype, head_dim, features):
    for D, Dv in ((head_dim, head_dim), (head_dim - 8, head_dim - 24)):
        case = Case(
            dtype=dtype, B=1, Hq=2, Hkv=1, Sq=140, Sk=200, D=D, Dv=Dv, **features, seed=D
        )  # fmt: skip
        check_on_hopper(case)


@needs_nvcc
@pytest.mark.parametrize("schedule", quick(s for s in SCHEDULES if s != "lockstep"))
def test_hopper_in_every_order_of_the_warps(schedule):
    check_on_hopper(ON_HOPPER["causal"], schedule=schedule)


@needs_nvcc
@pytest.mark.parametrize("name", quick(["plain", "causal"], "causal"))
def test_sequences_on_hopper(monkeypatch, name):
    cuda_interpreter.library()
    with interpreted(compute_capability=90) as runs:
        case = dataclasses.replace(OPTIONS[name], dtype=torch.float16)
        sequences.check(OPS, case, Packing([*sequences.LENGTHS, (70, 140)], used=name == "causal"))
    assert not findings(runs), "\n".join(findings(runs))
    assert runs[0].kernel == "attention_forward_hopper_kernel<Half, 64>"
    assert runs[2].kernel == "attention_backward_hopper_kernel<Half, 64, true>"


@needs_nvcc
def test_what_nobody_sees_may_be_nan_on_hopper():
    """TMA copies whole tiles, also rows that no query sees: NaN in these rows must not matter."""
    case = dataclasses.replace(
        ON_HOPPER["window"], Sq=64, Sk=500, D=64, window_size=(100, 0), dtype=torch.float16
    )
    inputs = testing.make_inputs(case)
    unseen = torch.arange(case.Sk) < case.Sk - case.Sq - 100
    want = testing.exact(inputs)
    for name in ("key", "value"):
        inputs.tensors[name].masked_fill_(unseen[:, None], torch.nan)
    got, runs = run(inputs, capability=90)
    assert runs[2].kernel.startswith("attention_backward_hopper") and not findings(runs)
    for name, x in got.items():
        torch.testing.assert_close(x.double(), want[name], rtol=0, atol=2e-2, msg=name)


@needs_nvcc
def test_queries_that_see_nothing_may_be_nan_on_hopper():
    case = dataclasses.replace(
        ON_HOPPER["window"], Sq=200, Sk=90, D=64, window_size=(-1, -1), dtype=torch.float16
    )
    inputs = testing.make_inputs(case)
    want = testing.exact(inputs)
    blind = torch.arange(case.Sq) < case.Sq - case.Sk
    inputs.tensors["query"].masked_fill_(blind[:, None], torch.nan)
    inputs.grad_out.masked_fill_(blind[:, None], torch.nan)
    got, runs = run(inputs, capability=90)
    assert runs[2].kernel.startswith("attention_backward_hopper") and not findings(runs)
    for name in ("dkey", "dvalue"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=0, atol=2e-2, msg=name)


@needs_nvcc
@pytest.mark.parametrize("name", quick(["causal, longer keys", "window"]))
def test_gradients_of_unseen_keys_are_zero_beside_nan_on_hopper(name):
    nothing_seen.check_gradients_of_unseen_keys(on(90), name, torch.nan)


@needs_nvcc
@pytest.mark.slow
def test_nan_and_what_sees_nothing_on_hopper():
    nothing_seen.check_results_of_blind_queries(on(90), "causal, longer queries", torch.nan)
    for name, where in itertools.product(
        ("causal, longer keys", "window"), ("query", "key", "value")
    ):
        nothing_seen.check_nan_stays(on(90), name, where)
    nothing_seen.check_logits_of_minus_infinity(on(90), torch.float16, sinks=True)


TRY_WAIT_PARITY = r"(mbarrier\.try_wait\.parity\.shared::cta\.b64 complete, \[%r\d+\]), %r\d+;"
TRY_WAIT = TRY_WAIT_PARITY.replace("(", "").replace(")", "")
HOPPER_FAULTS = {
    "no wait for k": (faults.replace(TRY_WAIT, "mov.pred complete, -1;", 1), "finding"),
    "wrong parity": (faults.replace(TRY_WAIT_PARITY, r"\1, 1;", 0), "finding"),
    "no arrival for k": (
        faults.drop(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64[^;]*;", 1), "finding"
    ),
    "no word that a stage is empty": (
        faults.drop(r"mbarrier\.arrive\.shared::cta\.b64[^;]*;", -1), "finding"
    ),
    "no fence before a product": (faults.drop(r"wgmma\.fence\.sync\.aligned;", 1), "finding"),
    "no wait for a product": (
        faults.drop(r"wgmma\.wait_group\.sync\.aligned[^;]*;", -1), "finding"
    ),
    "no fence between the proxies": (faults.drop(r"fence\.proxy\.async[^;]*;", 0), "finding"),
    "a product is left out": (faults.drop(r"wgmma\.mma_async[^;]*;", -1), "numbers"),
    "a part of a tile is left out": (
        faults.drop(r"cp\.async\.bulk\.tensor[^;]*;", -1), "finding"
    ),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize(
    "name",
    quick(HOPPER_FAULTS, "wrong parity", "no fence before a product", "a product is left out"),
)
def test_faults_planted_on_hopper_are_caught(name):
    edit, caught_by = HOPPER_FAULTS[name]
    inputs = testing.make_inputs(dataclasses.replace(ON_HOPPER["full"], Sq=100, Sk=420, Hq=1))
    got, runs = run(inputs, gradients=False, edit=edit, capability=90)
    want = testing.exact(inputs)
    wrong = testing.mismatches(got, {n: want[n] for n in got}, testing.naive(inputs))
    assert findings(runs) if caught_by == "finding" else wrong


BACKWARD_FAULTS = {
    "no word that lse and delta are there": (
        "true", faults.drop(r"mbarrier\.arrive\.shared::cta\.b64[^;]*;", 0), "finding"
    ),
    "no wait for the rows": ("false", faults.replace(TRY_WAIT, "mov.pred complete, -1;", 1),
                             "finding"),
    "no wait for a product": (
        "true", faults.drop(r"wgmma\.wait_group\.sync\.aligned[^;]*;", -1), "finding"
    ),
    "no fence before a product": (
        "false", faults.drop(r"wgmma\.fence\.sync\.aligned;", -1), "finding"
    ),
    "a product is left out": ("true", faults.drop(r"wgmma\.mma_async[^;]*;", -1), "numbers"),
    "a copy is left out": (
        "false", faults.drop(r"cp\.async\.bulk\.tensor[^;]*;", -1), "finding"
    ),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", quick(BACKWARD_FAULTS, "no wait for the rows"))
def test_faults_planted_in_the_backward_on_hopper_are_caught(name):
    keys, edit, caught_by = BACKWARD_FAULTS[name]

    def only_one(ptx):
        mine = "attention_backward_hopper_kernel" in ptx and f"Lb{int(keys == 'true')}E" in ptx
        return edit(ptx) if mine else ptx

    case = dataclasses.replace(ON_HOPPER["full"], Sq=200, Sk=200, Hq=1, D=128, Dv=128)
    inputs = testing.make_inputs(case)
    got, runs = run(inputs, edit=only_one, capability=90)
    want = testing.exact(inputs)
    wrong = testing.mismatches(got, {n: want[n] for n in got}, testing.naive(inputs))
    assert findings(runs) if caught_by == "finding" else wrong


@needs_nvcc
def test_a_stage_is_left_when_all_lanes_have_read_lse_and_delta():
    def only_keys(ptx):
        mine = "attention_backward_hopper_kernel" in ptx and "Lb1E" in ptx
        return faults.everywhere(r"bar\.warp\.sync[^;]*;", "")(ptx) if mine else ptx

    inputs = testing.make_inputs(dataclasses.replace(ON_HOPPER["full"], Sq=200, Sk=20, Hq=1))
    _, runs = run(inputs, edit=only_keys, capability=90)
    assert {x.kind for one in runs for x in one.report.findings} == {"shared race"}


def test_what_hopper_serves(recorded_on_hopper):
    """The Hopper kernels serve only calls of the fast path with head sizes up to 128."""
    few = {"Sq": 1, "Sk": 4000}
    for call, kernel in (
        ({}, "attention_forward_hopper_kernel<Half, 64>"),
        ({"D": 72, "dtype": torch.bfloat16}, "attention_forward_hopper_kernel<BFloat16, 128>"),
        ({"D": 256}, "attention_forward_kernel<Half, 256, true>"),
        ({"D": 65}, "attention_forward_kernel<Half, 96, false>"),
        ({"dtype": torch.float32}, "attention_forward_kernel<float, 64, false>"),
        (few, "attention_decode_kernel<Half, 64>"),
    ):
        recorded_on_hopper.clear()
        OPS.attention_forward_plain(*qkv(**call), *PLAIN_NUMBERS)
        assert recorded_on_hopper[0][0] == kernel
    q, k, v = qkv()
    recorded_on_hopper.clear()
    OPS.attention_forward_plain(q, k[:, :1].expand_as(k), v, *PLAIN_NUMBERS)
    assert recorded_on_hopper[0][0] == "attention_forward_kernel<Half, 64, true>"


# Planted faults: (edit of the PTX, what catches the fault: a finding, or only wrong numbers).
FAULTS = {
    "no barrier before v is read": (faults.drop(faults.BAR, -1), "finding"),
    "no barrier before k is read": (faults.drop(faults.BAR, -2), "finding"),
    "no wait for v": (faults.drop(faults.WAIT_COPIES, -2), "finding"),
    "lse written beyond the last query": (
        faults.replace(r"@%p\d+ bra[^;]*;\s+(st\.global\.f32)", r"\1", -1), "finding"
    ),
    "a product is left out": (faults.drop(r"mma\.sync[^;]*;", 40), "numbers"),
    "a maximum of other lanes": (
        faults.replace(r"(shfl\.sync\.bfly\.b32\s+%r\d+\|%p\d+, %r\d+, )%r\d+", r"\g<1>4"),
        "numbers",
    ),
}  # fmt: skip


@needs_nvcc
@pytest.mark.parametrize("name", quick(FAULTS, *list(FAULTS)[::2]))
def test_planted_faults_are_caught(name):
    edit, caught_by = FAULTS[name]
    case = Case(dtype=torch.float16, B=1, Hq=1, Hkv=1, Sq=130, Sk=300, D=64, Dv=64)
    inputs = testing.make_inputs(case)
    got, runs = run(inputs, gradients=False, edit=edit)
    want = testing.exact(inputs)
    wrong = testing.mismatches(got, {n: want[n] for n in got}, testing.naive(inputs))
    assert findings(runs) if caught_by == "finding" else wrong


# -- Operators and launches, mostly without nvcc ---------------------------------------------


@pytest.fixture
def loaded():
    cuda_interpreter.library()
    return OPS


@pytest.fixture
def recorded(loaded):
    with recording(80) as launches:
        yield launches


@pytest.fixture
def recorded_on_hopper(loaded):
    with recording(90) as launches:
        yield launches


def qkv(dtype=torch.float16, B=2, Hq=4, Hkv=2, Sq=130, Sk=200, D=64, Dv=None, device="cpu"):
    def randn(*shape):
        return torch.randn(*shape, device=device).to(dtype)

    return randn(B, Hq, Sq, D), randn(B, Hkv, Sk, D), randn(B, Hkv, Sk, Dv or D)


def registered() -> set[str]:
    """Returns the names under which some of the library's units register their kernels."""
    names: set[str] = set()
    for source, flags, variant in cuda_interpreter.SETUP["CUDA"]["kernel_units"]():
        if variant in ("Half-64", "Half-32", "Half", "float-256", "float-32", "float"):
            flags = [x for x in flags if not x.startswith("-gencode")]
            command = [str(cuda_interpreter.NVCC), *flags, "-E", str(source)]
            done = subprocess.run(
                command, cwd=cuda_interpreter.ROOT, capture_output=True, text=True, check=True
            )
            names |= set(re.findall(r'"(\(?\w+_kernel<[^"]+)"', done.stdout))
    return names


@needs_nvcc
def test_kernels_are_registered_by_the_names_they_are_launched_by(loaded):
    """Only a GPU needs the registry: the interpreter takes the names from the launches."""
    everything = {"bias": "1H1K", "sinks": True, "dropout_p": 0.2, "Sq": 70, "Sk": 300}
    calls = [
        dict(dtype=torch.float16, D=64, Dv=64, Sq=70, Sk=300),
        dict(dtype=torch.float16, D=64, Dv=64, **everything),
        dict(dtype=torch.float16, D=32, Dv=32, Sq=1, Sk=5000),
        dict(dtype=torch.float32, D=256, Dv=256, **everything),
        dict(dtype=torch.float32, D=32, Dv=32, **everything),
    ]
    launched = set()
    for capability, fields in itertools.product((80, 90), calls):
        inputs = testing.make_inputs(Case(**fields))
        q, k, v = (inputs.tensors[name] for name in ("query", "key", "value"))
        call = (*arguments(inputs), *(None,) * 6, 0, 0, 0)
        grads = ["bias" in inputs.tensors, "sinks" in inputs.tensors]
        with recording(capability) as launches:
            out, lse = OPS.attention_forward(q, k, v, *call)
            OPS.attention_backward(inputs.grad_out, None, q, k, v, out, lse, *call, *grads)
            for columns, x in itertools.product((70, 5000, 20000), (q.dtype, torch.float32)):
                rows = torch.zeros(2, 3, 4, columns, dtype=x)
                bias, sinks = torch.zeros(1, 3, 1, 1), torch.zeros(3)
                y, _, weight = OPS.masked_softmax_forward(rows, 0.5, 0, True, None, bias, sinks)
                OPS.masked_softmax_backward(
                    y, y, 0.5, 0, bias, weight, bias_grad=True, sinks_grad=True
                )
        launched |= {name for name, *_ in launches}
    assert len(launched) > 20 and launched <= registered()


def test_the_operators_refuse_tensors_that_are_not_on_a_gpu(loaded):
    with pytest.raises(RuntimeError, match="query: expected a CUDA tensor"):
        OPS.attention_forward_plain(*qkv(), *PLAIN_NUMBERS)


@pytest.mark.parametrize(
    "call, kernel, blocks, threads",
    [
        ({}, "<Half, 64, true>", 2 * 4 * 2, 128),
        ({"dtype": torch.bfloat16, "D": 96}, "<BFloat16, 96, true>", 2 * 4 * 2, 128),
        ({"D": 129}, "<Half, 256, false>", 2 * 4 * 3, 128),  # no whole 16-byte pieces
        ({"D": 64, "Dv": 65}, "<Half, 96, false>", 2 * 4 * 3, 128),
        ({"D": 8, "Dv": 256}, "<Half, 256, true>", 2 * 4 * 3, 128),
        ({"dtype": torch.float32}, "<float, 64, false>", 2 * 4 * 3, 128),
        ({"dtype": torch.float32, "D": 256}, "<float, 256, false>", 2 * 4 * 5, 64),
    ],
)
def test_what_a_forward_launches(recorded, call, kernel, blocks, threads):
    OPS.attention_forward_plain(*qkv(**call), *PLAIN_NUMBERS)
    ((name, *sizes, shared_bytes),) = recorded
    assert name == f"attention_forward_kernel{kernel}" and sizes == [blocks, threads]
    assert shared_bytes <= 99 * 1024  # every GPU since Ampere has as much


def test_an_offset_of_one_element_is_served_without_16_byte_copies(recorded):
    q, k, v = qkv(D=72)
    OPS.attention_forward_plain(q[..., 1:65], k[..., 8:], v[..., :64], *PLAIN_NUMBERS)
    OPS.attention_forward_plain(q[..., 8:], k[..., 8:], v[..., :64], *PLAIN_NUMBERS)
    kernels = [name for name, *_ in recorded]
    assert kernels == [f"attention_forward_kernel<Half, 64, {x}>" for x in ("false", "true")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_what_a_backward_launches(recorded, dtype, head_dim):
    inputs = testing.make_inputs(
        Case(dtype=dtype, D=head_dim, Dv=head_dim, bias="1H1K", sinks=True, Sq=70, Sk=300)
    )
    q, k, v = (inputs.tensors[name] for name in ("query", "key", "value"))
    call = (*arguments(inputs), *(None,) * 6, 0, 0, 0)
    lse = torch.zeros(2, 2, 70)
    dq, dk, dv, dbias, dsinks = OPS.attention_backward(
        inputs.grad_out, None, q, k, v, inputs.grad_out, lse, *call, True, True
    )
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape
    assert dbias.shape == (1, 2, 1, 300) and dsinks.shape == (2,)
    names = [name.split("_kernel")[0] for name, *_ in recorded]
    passes = 2 if head_dim <= 128 else 3  # dk and dv in separate passes
    attention = ["delta", *["backward"] * passes, "dbias", "dsinks"]
    assert names == [f"attention_{name}" for name in attention]
    assert all(shared_bytes <= 99 * 1024 for *_, shared_bytes in recorded)


@pytest.mark.parametrize("capability", [80, 90])
def test_a_huge_batch_of_nothing_starts_nothing(loaded, capability):
    with recording(capability) as launches:
        nothing_seen.check_huge(OPS)
    assert [name for name, *_ in launches] == ["attention_dsinks_kernel<256>"]


def test_hopper_does_not_serve_what_is_empty(recorded_on_hopper):
    """There are no tensor maps without elements."""
    places = [
        torch.tensor([0, 0, 0], dtype=torch.int32),
        torch.tensor([0, 5, 9], dtype=torch.int32),
    ]
    for packed, zero in itertools.product((False, True), ("Sq", "Sk", "Hq", "D", "Dv")):
        q, k, v = qkv(**{zero: 0}) if zero not in ("D", "Dv") else qkv()
        q, k = (x[..., :0] if zero == "D" else x for x in (q, k))
        v = v[..., :0] if zero == "Dv" else v
        rest = []
        if packed:
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            rest = [*(None,) * 6, 0.0, 0.0, *places]
        out, lse = OPS.attention_forward(q, k, v, *PLAIN_NUMBERS, *rest)
        OPS.attention_backward(out, None, q, k, v, out, lse, *PLAIN_NUMBERS, *rest)
    assert recorded_on_hopper and not [x for x, *_ in recorded_on_hopper if "hopper" in x]


def test_nothing_is_launched_for_nothing(recorded):
    for sizes in ({"B": 0}, {"Hq": 0, "Hkv": 0}, {"Sq": 0}):
        OPS.attention_forward_plain(*qkv(**sizes), *PLAIN_NUMBERS)
    assert not recorded


WRONG = [
    ({"D": 257}, "head_dim of at most 256, got 257"),
    ({"dtype": torch.float64}, "expected float32, bfloat16 or float16"),
    ({"Hq": 3}, "3 heads are no multiple of key's 2"),
]


@pytest.mark.parametrize("call, message", WRONG)
def test_wrong_calls_are_refused(recorded, call, message):
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_forward_plain(*qkv(**call), *PLAIN_NUMBERS)


def test_the_schemas_are_those_of_the_cpu(loaded):
    for name in ("forward_plain", "forward_plain_lse", "forward", "backward"):
        ours = getattr(OPS, f"attention_{name}").default._schema
        theirs = getattr(torch.ops.fused_attention, f"attention_{name}").default._schema
        assert str(ours).split("(", 1)[1] == str(theirs).split("(", 1)[1]
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(ours.name, key)


def test_fake_cuda_tensors(loaded):
    with FakeTensorMode():
        q, k, v = qkv(device="cuda")
        out, lse = OPS.attention_forward(q, k, v, *PLAIN_NUMBERS)
        assert out.shape == q.shape and out.device.type == "cuda" and lse.dtype == torch.float32
        dq, dk, dv, _, _ = OPS.attention_backward(out, None, q, k, v, out, lse, *PLAIN_NUMBERS)
        assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape


def test_make_fx_and_export(loaded):
    def call(q, k, v):
        return OPS.attention_forward_plain(q, k, v, *PLAIN_NUMBERS)

    with FakeTensorMode():
        inputs = qkv(device="cuda")
        graph = make_fx(call)(*inputs)
        module = torch.nn.Module()
        module.forward = call
        exported = torch.export.export(module, inputs)
    target = OPS.attention_forward_plain.default
    for nodes in (graph.graph.nodes, exported.graph.nodes):
        assert target in [node.target for node in nodes]


@pytest.mark.covering(1)
@needs_nvcc
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("kind", ["eager", "create_graph", "compiled"])
def test_gradients_go_through_autograd(kind, return_lse):
    """Runs the backend's plan on CPU tensors, which its row of the table would refuse."""
    cuda_interpreter.library()
    case = Case(dtype=torch.float16, B=1, Sq=20, Sk=30, D=32, Dv=32, causal="bottom_right")
    inputs = testing.make_inputs(case)
    leaves = list(inputs.differentiable().values())
    problem = problem_of(*leaves, causal="bottom_right", return_lse=return_lse)

    options = Options(causal="bottom_right", return_lse=return_lse)

    def call(*leaves):
        return run_plan(CUDA.plan(problem), *leaves, options)

    function = torch.compile(call, backend="aot_eager") if kind == "compiled" else call
    with interpreted() as runs:
        out = function(*leaves)
        out = out[0] if return_lse else out
        grads = torch.autograd.grad(
            out, leaves, inputs.grad_out, create_graph=kind == "create_graph"
        )
    names = [run.kernel.split("_kernel")[0] for run in runs]
    assert names == ["attention_forward", "attention_delta", *["attention_backward"] * 2]
    wide = inputs.differentiable(torch.float64)
    expected = reference.attention_reference(*wide.values(), causal="bottom_right")
    wanted = torch.autograd.grad(expected, list(wide.values()), inputs.grad_out.double())
    for got, want in zip((out, *grads), (expected, *wanted), strict=True):
        assert (got - want).abs().max() < 5e-3


# -- The row of the capability table ---------------------------------------------------------


def test_the_row_gives_honest_reasons(loaded, monkeypatch):
    q, k, v = qkv(dtype=torch.float64, D=300, Dv=20)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reasons = CUDA.refuses(problem_of(q, k, v))
    assert [reason.split(":")[0] for reason in reasons] == [
        "no CUDA device", "device cpu", "dtype torch.float64", "query's head_dim 300",
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert CUDA.missing() == "compute capability 7.5: only 8.0 and newer"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert CUDA.missing() == ""
    monkeypatch.setattr(cuda, "LIBRARY", Path("nothing.so"))
    cuda.load.cache_clear()
    assert CUDA.missing().startswith("CUDA kernels not built")
    monkeypatch.undo()
    cuda.load.cache_clear()


def test_the_row_serves_what_is_on_a_gpu(loaded, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    on_gpu = dataclasses.replace(problem_of(*qkv()), device=torch.device("cuda"))
    assert CUDA.refuses(on_gpu) == [] and backends.choose(on_gpu) is CUDA
    assert details_of(CUDA, on_gpu, *qkv(), Options()).kernel.startswith("attention_")
    assert CUDA.plan(on_gpu).operator is cuda.operators().direct_forward_plain
    everything = dataclasses.replace(on_gpu, features=frozenset(FEATURES))
    assert CUDA.refuses(everything) == []
    big = {"batch": 8, "heads_q": 16, "heads_kv": 16, "seqlen_q": 2048, "seqlen_k": 2048}
    few = {"batch": 64, "heads_q": 32, "heads_kv": 8, "seqlen_q": 1, "seqlen_k": 8192}
    for changes, triton in (
        (big | {"features": frozenset({"causal", "sinks", "gradients", "varlen"})}, False),
        (big | {"features": frozenset({"causal", "mask"})}, True),
        (big | {"features": frozenset({"dropout"}), "dtype": torch.float32}, False),
        ({"features": frozenset({"bias", "bias_gradient"})}, False),
        (few, True),
        (few | {"batch": 1}, False),
    ):
        problem = dataclasses.replace(on_gpu, **changes)
        row = backends.TRITON if triton and not backends.TRITON.missing() else CUDA
        assert backends.choose(problem) is row and bool(CUDA.prefers(problem)) == triton
    wide = dataclasses.replace(on_gpu, head_dim=512, dtype=torch.float64)
    reasons = CUDA.refuses(wide)
    assert reasons[0].startswith("dtype torch.float64: only") and "head_dim 512" in reasons[1]

"""Tests how a call finds its backend: validation, choice, environment, plans, explain."""

import dataclasses
import importlib
import itertools
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fused_attention
from feature_cases import problem_of
from fused_attention import ArgumentValueError, attention, explain
from fused_attention import operators as ops
from fused_attention.call import backends, plan
from fused_attention.call.backends import BACKENDS, CPU, NAMES, PLANS, REFERENCE, TASKS
from fused_attention.call.explain import details_of
from fused_attention.call.options import Options
from fused_attention.call.problem import DTYPES, FEATURES, Problem
from fused_attention.operators import cuda
from fused_attention.reference import attention_reference
from small_calls import PACKED, PAGED, qkv


def randn(*shape, dtype=torch.float32, **options):
    return torch.randn(shape, dtype=dtype, **options)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Starts without plans and variables; `environment(NAME=value)` sets and reads variables."""

    def read(**variables):
        for name in ("BACKEND", "STRICT"):
            monkeypatch.delenv(f"FUSED_ATTENTION_{name}", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"FUSED_ATTENTION_{name}", value)
        backends.read_environment()

    read()
    yield read
    read()


# -- Validation --------------------------------------------------------------------------

int32 = torch.int32
WIDE = qkv(D=520)  # only the reference serves it


@pytest.mark.parametrize("valid", [PACKED, PAGED], ids=["packed", "paged"])
def test_packed_and_paged_calls_with_gradients(valid):
    gradients = []
    for backend in ("cpu", "reference"):
        query = valid["query"].clone().requires_grad_()
        out = attention(**valid | {"query": query}, backend=backend)
        gradients += [out.detach(), *torch.autograd.grad(out.square().sum(), query)]
    torch.testing.assert_close(gradients[:2], gradients[2:])
    assert gradients[1].any()


def test_causal_true_where_lengths_agree():
    arguments = qkv(Sk=5)
    expected = attention(**arguments, causal="top_left")
    assert torch.equal(attention(**arguments, causal=True), expected)
    same = PACKED | {"cu_seqlens_k": PACKED["cu_seqlens_q"]}
    expected = attention(**same, causal="top_left")
    assert torch.equal(attention(**same, causal=True), expected)


def test_features_of_a_problem():
    def features(arguments, **options):
        return set(problem_of(**arguments, **options).features)

    plain = qkv(Hkv=4)
    bias, sinks = randn(5, 7, requires_grad=True), randn(4, requires_grad=True)
    uses = {
        "mask": {"mask": torch.ones(7, dtype=torch.bool)},
        "key_padding_mask": {"key_padding_mask": torch.ones(2, 7, dtype=torch.bool)},
        "bias": {"bias": bias.detach()},
        "bias bias_gradient gradients": {"bias": bias},
        "causal": {"causal": "top_left"},
        "window_size": {"window_size": (3, -1)},
        "softcap": {"softcap": 2.0},
        "alibi_slopes": {"alibi_slopes": randn(4)},
        "sinks": {"sinks": sinks.detach()},
        "sinks sinks_gradient gradients": {"sinks": sinks},
        "sinks sinks_gradient gradients return_lse lse_gradient": {
            "sinks": sinks,
            "return_lse": True,
        },
        "dropout": {"dropout_p": 0.5},
        "return_lse": {"return_lse": True},
        "seqused_k": {"seqused_k": torch.ones(2, dtype=int32)},
    }
    assert features(plain) == set()
    seen = set()
    for names, options in uses.items():
        assert features(plain, **options) == set(names.split())
        seen |= set(names.split())
    assert features(qkv(Hkv=2)) == {"gqa"}
    assert features(qkv(Hkv=4, Dv=3)) == {"value_head_dim"}
    assert features(PACKED) == {"varlen", "gqa"}
    assert features(PAGED) == {"block_table", "seqused_k", "gqa"}
    with torch.no_grad():
        assert features(plain, bias=bias, sinks=sinks) == {"bias", "sinks"}
    assert seen | {"gqa", "value_head_dim", "varlen", "block_table"} == set(FEATURES)


# -- Choice ------------------------------------------------------------------------------


def test_table_is_in_order_and_consistent():
    assert NAMES == ("cuda", "triton", "cpu", "reference")
    for row in BACKENDS:
        assert set(row.services) <= set(TASKS) and "attention" in row.services
        for service in row.services.values():
            assert service.lacks <= set(FEATURES) and set(service.dtypes) <= set(DTYPES)


def test_auto_takes_the_first_row_without_a_reason():
    problem = problem_of(**qkv())
    assert CPU.refuses(problem) == []
    assert backends.choose(problem) is CPU
    assert backends.choose(problem_of(**PACKED)) is CPU
    assert backends.choose(problem_of(**WIDE)) is REFERENCE


def test_every_reason_is_given():
    arguments = qkv(D=600, Dv=513)
    on_meta = {name: x.to("meta") for name, x in arguments.items()}
    reasons = CPU.refuses(problem_of(**on_meta))
    assert [reason.split(":")[0] for reason in reasons] == [
        "device meta",
        "query's head_dim 600",
        "value's head_dim 513",
    ]


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(NotImplementedError, match="cuda.*device cpu: only cuda"):
        attention(**qkv(), backend="cuda")
    with pytest.raises(NotImplementedError, match="triton.*device cpu: only cuda"):
        attention(**qkv(), backend="triton")
    with pytest.raises(NotImplementedError, match="cpu.*head_dim 520: only 1 to 512"):
        attention(**WIDE, backend="cpu")
    with pytest.raises(NotImplementedError, match="query's head_dim 520.*; value's head_dim 514"):
        attention(**qkv(D=520, Dv=514), backend="cpu")
    arguments = qkv()
    expected = attention_reference(**arguments)
    assert torch.equal(attention(**arguments, backend="reference"), expected)
    torch.testing.assert_close(attention(**arguments, backend="cpu"), expected)


def test_the_reference_is_logged_once_per_reason(caplog):
    with caplog.at_level(logging.WARNING, "fused_attention"):
        for _ in range(3):
            attention(**WIDE)
        assert len(caplog.records) == 1
        message = caplog.text
        assert "cpu: query's head_dim 520" in message
        assert "cuda" not in message and "triton" not in message  # the tensors are on a CPU
        for _ in range(2):
            attention(**qkv(D=513))
        assert len(caplog.records) == 2 and "head_dim 513" in caplog.text
        attention(**qkv(), backend="reference")  # not logged: the caller asked for it
        attention(**qkv())
        explain(**qkv(D=514))
        assert len(caplog.records) == 2


def test_strict_refuses_the_reference(environment):
    environment(STRICT="1")
    with pytest.raises(NotImplementedError, match=r"STRICT.*:\n  cpu: query's head_dim 520"):
        attention(**WIDE)
    attention(**qkv())
    attention(**PACKED)
    attention(**WIDE, backend="reference")
    environment(STRICT="0")
    attention(**WIDE)


def test_environment_chooses_the_backend(environment):
    arguments = qkv()
    attention(**arguments)  # makes a plan, which the next line drops
    environment(BACKEND="reference")
    assert torch.equal(attention(**arguments), attention_reference(**arguments))
    assert explain(**arguments).backend == "reference"
    assert explain(**arguments, backend="cpu").backend == "cpu"
    environment(BACKEND="triton")
    with pytest.raises(NotImplementedError, match="triton.*device cpu: only cuda"):
        attention(**arguments)
    attention(**arguments, backend="cpu")
    environment(BACKEND="nonsense")
    with pytest.raises(ArgumentValueError, match="FUSED_ATTENTION_BACKEND: .*'nonsense'"):
        attention(**arguments)


# -- Plans -------------------------------------------------------------------------------


@pytest.fixture
def validations(monkeypatch):
    """A list that grows by one for each call that is validated."""
    calls = []
    original = Problem.from_call

    def from_call(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(Problem, "from_call", staticmethod(from_call))
    return calls


OPTIONS = {
    "plain": {},
    "causal": {"causal": "top_left"},
    "window_size": {"window_size": (2, 1)},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    "mask": {"mask": torch.rand(5, 7) > 0.3},
    "bias": {"bias": torch.randn(4, 5, 7)},
    "key_padding_mask": {"key_padding_mask": torch.rand(2, 7) > 0.8},
    "alibi_slopes": {"alibi_slopes": torch.rand(4)},
    "sinks": {"sinks": torch.rand(4)},
    "dropout": {"dropout_p": 0.5, "philox_seed": 3},
    "dropout, other seed": {"dropout_p": 0.5, "philox_seed": 4},
    "dropout, tensor": {"dropout_p": 0.5, "philox_seed": torch.tensor([3, 1])},
    "return_lse": {"return_lse": True},
}


def test_a_second_call_is_not_validated_again(validations):
    arguments = qkv()
    for _ in range(3):
        attention(**arguments)
        fused_attention.scaled_dot_product_attention(*qkv(Hkv=4).values(), is_causal=True)
    assert len(validations) == 2 and len(PLANS) == 2
    for name, options in OPTIONS.items():
        first = attention(**arguments, **options)
        count = len(validations)
        second = attention(**qkv(), **options)
        assert len(validations) == count, name
        torch.testing.assert_close(first, attention(**arguments, **options), atol=0, rtol=0)
        assert not torch.equal(*(x[0] if type(x) is tuple else x for x in (first, second)))


def test_every_option_matters_to_what_is_remembered():
    """Makes each kind of call in turn, then again in another order: each gets its own result."""
    arguments = qkv()
    kinds = list(itertools.product(OPTIONS, (False, True), (False, True)))

    def call(name, grad, wide):
        kwargs = {
            k: x.to(torch.float64 if wide else x.dtype, copy=True).requires_grad_(grad)
            for k, x in arguments.items()
        }
        options = dict(OPTIONS[name])
        result = attention(**kwargs, **options)
        out = result[0] if type(result) is tuple else result
        assert out.requires_grad == grad and out.dtype == kwargs["query"].dtype
        expected = attention_reference(
            **{k: x.detach() for k, x in kwargs.items()}, **_for_reference(options)
        )
        tolerance = {"atol": 1e-5, "rtol": 1e-5}
        torch.testing.assert_close(_detached(result), expected, **tolerance)
        with torch.no_grad():
            again = attention(**kwargs, **options)
        torch.testing.assert_close(again, expected, **tolerance)
        assert not (again[0] if type(again) is tuple else again).requires_grad

    for kind in kinds + kinds[::-1]:
        call(*kind)


def _for_reference(options):
    options = dict(options)
    if isinstance(options.get("philox_seed"), Tensor):
        options["philox"] = options.pop("philox_seed")
    return options


def _detached(result):
    return tuple(x.detach() for x in result) if type(result) is tuple else result.detach()


@pytest.mark.parametrize("name", ["bias", "sinks"])
def test_requires_grad_of_an_option_matters(name):
    arguments = qkv()
    option = OPTIONS[name][name].clone()
    for grad in (False, True, False, True):
        out = attention(**arguments, **{name: option.requires_grad_(grad)})
        assert out.requires_grad == grad
        if grad:
            assert torch.autograd.grad(out.sum(), option)[0].shape == option.shape


def test_strides_need_no_plan_of_their_own(validations):
    arguments = qkv(Hkv=4)
    expected = attention(**arguments)
    strided = {k: x.transpose(1, 2).contiguous().transpose(1, 2) for k, x in arguments.items()}
    spread = {k: torch.stack([x, x], -1)[..., 0] for k, x in arguments.items()}
    for kwargs, stride in ((strided, (160, 8, 32, 1)), (spread, (160, 40, 8, 1))):
        out = attention(**kwargs)
        torch.testing.assert_close(out, expected)
        assert out.stride() == stride
    assert len(validations) == 1


def test_parameters_and_subclasses(validations):
    class Marked(Tensor):
        pass

    arguments = qkv()
    attention(**arguments)
    parameter = torch.nn.Parameter(arguments["query"])
    assert attention(**arguments | {"query": parameter}).requires_grad
    count = len(validations)
    assert attention(**arguments | {"query": parameter}).requires_grad
    assert len(validations) == count
    marked = arguments["query"].as_subclass(Marked)
    for _ in range(2):
        assert type(attention(**arguments | {"query": marked})) is Marked
    assert len(validations) == count + 2


def test_modes_of_torch_function_see_the_operator():
    from torch.overrides import TorchFunctionMode

    class Record(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    arguments = qkv()
    for _ in range(2):
        attention(**arguments)
        seen: list[str] = []
        with Record():
            attention(**arguments)
        assert "fused_attention.attention_forward_plain.default" in seen


def test_autocast_inference_mode_and_transforms_matter():
    arguments = qkv()
    expected = attention(**arguments)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            assert attention(**arguments).dtype == torch.bfloat16
            assert attention(**arguments, bias=randn(5, 7)).dtype == torch.bfloat16
        with torch.inference_mode():
            assert torch.equal(attention(**arguments), expected)
        batch = {name: torch.stack([x, x]) for name, x in arguments.items()}
        mapped = torch.vmap(lambda q, k, v: attention(q, k, v))(*batch.values())
        torch.testing.assert_close(mapped, torch.stack([expected, expected]))
        grad = torch.func.grad(lambda q: attention(q, arguments["key"], arguments["value"]).sum())
        assert grad(arguments["query"]).abs().sum() > 0
        assert torch.equal(attention(**arguments), expected)


def test_float32_precision_reaches_the_operator(monkeypatch):
    numbers = []
    original = backends.CPU.plan
    row = backends.CPU

    def plan(problem):
        numbers.append(problem.numbers.precision)
        return original(problem)

    object.__setattr__(row, "plan", plan)
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "high", "medium", "high"):
            torch.set_float32_matmul_precision(setting)
            attention(**qkv())
        attention(**qkv(), precision="highest")
        attention(**qkv(dtype=torch.float64), precision="medium")
    finally:
        object.__setattr__(row, "plan", original)
        torch.set_float32_matmul_precision(before)
    assert numbers == [0, 1, 2, 0, 0]  # the second "high" finds a plan


def test_plans_are_bounded(monkeypatch):
    monkeypatch.setattr(plan, "MAX_PLANS", 3)
    for n in range(1, 9):
        attention(**qkv(Sq=n))
        assert 0 < len(PLANS) <= 3


def test_unhashable_and_wrongly_typed_options_do_not_break_the_lookup():
    arguments = qkv()
    expected = attention(**arguments, window_size=(2, 1))
    for _ in range(2):
        assert torch.equal(attention(**arguments, window_size=[2, 1]), expected)


def test_threads_share_plans():
    from concurrent.futures import ThreadPoolExecutor

    cases = [qkv(Sq=n) for n in range(1, 9)] * 8
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda kwargs: attention(**kwargs), cases))
    for kwargs, out in zip(cases, results, strict=True):
        assert torch.equal(out, attention(**kwargs))


# -- Explain -----------------------------------------------------------------------------


def test_explain_tells_backend_isa_kernel_tiles_and_memory(isa):
    explanation = explain(**qkv(Sq=50))
    assert explanation.backend == "cpu" and explanation.details.isa == isa
    assert explanation.details.kernel.startswith("attention_forward")
    assert explain(**qkv(Sq=1)).details.kernel == "attention_decode"
    assert explanation.details.block_m > 0 and explanation.details.block_n > 0
    assert explanation.refused == {}  # no reasons of backends for other devices
    text = str(explanation)
    for word in ("cpu", isa, "attention_forward", "MiB", "queries"):
        assert word in text


def test_explain_of_gradients_copies_and_the_reference():
    arguments = qkv(Sq=50)
    with_gradient = explain(**arguments | {"key": arguments["key"].requires_grad_()})
    assert with_gradient.details.kernel == "attention_forward + attention_backward"
    assert with_gradient.details.extra_bytes > explain(**qkv(Sq=50)).details.extra_bytes
    spread = torch.stack([qkv()["value"]] * 2, -1)[..., 0]
    copied = explain(**qkv() | {"value": spread})
    assert copied.copied == ("value",) and "value: last stride is not 1" in str(copied)
    difference = copied.details.extra_bytes - explain(**qkv()).details.extra_bytes
    assert difference == spread.numel() * 4
    slow = explain(**qkv(Sq=100, Sk=100, D=600))
    assert slow.backend == "reference" and slow.details.extra_bytes >= 3 * 2 * 4 * 100 * 100 * 4
    assert any("head_dim 600" in reason for reason in slow.refused["cpu"])


def test_explain_takes_every_argument_of_attention():
    with torch.autocast("cpu", torch.bfloat16):
        options = {"bias": randn(50, 7), "causal": "top_left", "return_lse": True}
        explanation = explain(**qkv(Sq=50), **options)
    assert explanation.details.kernel.startswith("attention_forward")
    assert explain(**PACKED).backend == explain(**PAGED).backend == "cpu"
    assert explain(**WIDE).backend == "reference"
    with pytest.raises(NotImplementedError, match="device cpu: only cuda"):
        explain(**qkv(), backend="cuda")
    with pytest.raises(TypeError, match="nonsense"):
        explain(**qkv(), nonsense=1)


# -- Companions --------------------------------------------------------------------------


def test_dropout_mask_is_the_mask():
    arguments = qkv(Hkv=4, Sq=9, Sk=21, Dv=21) | {"value": torch.eye(21).expand(2, 4, 21, 21)}
    for seed in (5, 2**63 + 1, -1, torch.tensor([7, 2])):
        keep = fused_attention.dropout_mask(2, 4, 9, 21, 0.4, seed)
        out = attention(**arguments, dropout_p=0.4, philox_seed=seed)
        weights = F.scaled_dot_product_attention(*arguments.values())
        kept = 65536 / (65536 - round(0.4 * 65536))
        torch.testing.assert_close(out, weights * keep * kept)
    assert not fused_attention.dropout_mask(1, 1, 4, 9, 1.0, 0).any()
    assert fused_attention.dropout_mask(1, 1, 4, 9, 0.0, 0).all()


def test_states_of_parts_merge_to_the_whole():
    arguments = qkv(Sk=12, dtype=torch.float64, requires_grad=True)
    sinks = randn(4, dtype=torch.float64, requires_grad=True)
    leaves = [*arguments.values(), sinks]
    whole = attention(**arguments, sinks=sinks, return_lse=True)
    query, key, value = arguments.values()
    parts = [
        attention(query, k, v, return_lse=True)
        for k, v in zip(key.split([5, 0, 7], 2), value.split([5, 0, 7], 2), strict=True)
    ]
    merged = fused_attention.merge_attention_states(*zip(*parts, strict=True), sinks=sinks)
    for got, expected in zip(merged, whole, strict=True):
        torch.testing.assert_close(got, expected)
        grads = (
            torch.autograd.grad(x.sin().sum(), leaves, retain_graph=True) for x in (got, expected)
        )
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


# -- Dropout -----------------------------------------------------------------------------


def test_state_of_dropout_follows_the_generator():
    query = randn(1)
    torch.manual_seed(1)
    first, second = (ops.philox_state(query) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(ops.philox_state(query), first)
    assert first.dtype == torch.int64 and first.shape == (2,) and not torch.equal(first, second)


# -- Triton --------------------------------------------------------------------------------


def test_importing_the_package_imports_no_triton_kernel():
    """It does not import Triton either, but PyTorch may."""
    code = "import sys, fused_attention; assert not any('.kernels' in x for x in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_triton_gives_its_reasons(monkeypatch):
    from fused_attention.call.backends import TRITON

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    problem = problem_of(**{k: x.double() for k, x in qkv(D=320, Dv=20).items()})
    first, *others = TRITON.refuses(problem)
    assert first in ("no CUDA device", "triton not installed")
    assert [reason.split(":")[0] for reason in others] == [
        "device cpu",
        "dtype torch.float64",
        "query's head_dim 320",
    ]
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    assert TRITON.missing() == "triton not installed"


def test_triton_serves_what_is_on_a_gpu(monkeypatch):
    """Asks the row of the table only, since this machine may have no GPU."""
    from fused_attention.call.backends import TRITON
    from fused_attention.kernels.tiles import ARCHS

    monkeypatch.setattr(cuda, "LIBRARY", Path("not built"))
    cuda.load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    if TRITON.missing():
        pytest.skip("triton not installed")
    problem = problem_of(**qkv())
    on_gpu = dataclasses.replace(problem, device=torch.device("cuda"))
    assert TRITON.refuses(on_gpu) == [] and backends.choose(on_gpu) is TRITON
    assert "device cpu: only cuda" in TRITON.refuses(problem)
    importlib.import_module("fused_attention.kernels.operators")  # binds the true arch_of first
    monkeypatch.setattr("fused_attention.kernels.tiles.arch_of", lambda device: ARCHS["sm_90"])

    def details(**sizes):
        inputs = qkv(**sizes)
        problem = dataclasses.replace(problem_of(**inputs), device=torch.device("cuda"))
        return details_of(TRITON, problem, *inputs.values(), Options())

    few = details()
    assert few.isa == "sm_90" and few.block_m > 0 and few.block_n > 0
    assert few.kernel == "attention_decode" and "in 1 splits" in few.reason
    long = details(Sq=1, Sk=100_000)
    assert long.kernel == "attention_decode + attention_combine" and long.extra_bytes > 0
    assert dict(long.buffers)["maxima and sums of the splits"] % (4 * 2 * 4 * 2) == 0
    assert details(Sq=1000).kernel == "attention_forward"
    packed = {"query": randn(9, 4, 8), "key": randn(9, 2, 8), "value": randn(9, 2, 8)}
    cu = torch.tensor([0, 4, 9], dtype=torch.int32)
    problem = problem_of(**packed, cu_seqlens_q=cu, cu_seqlens_k=cu, seqused_k=cu[1:])
    assert TRITON.refuses(dataclasses.replace(problem, device=torch.device("cuda"))) == []


def test_fake_cuda_tensors_go_through_the_operators():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from fused_attention import operators as ops

    with FakeTensorMode():
        query = torch.empty(2, 4, 5, 16, device="cuda", dtype=torch.float16)
        key = torch.empty(2, 2, 7, 16, device="cuda", dtype=torch.float16)
        out, lse = ops.forward(query, key, key, 0.25, 0, -1, -1, 0)
        assert out.shape == query.shape and out.device.type == "cuda"
        assert lse.shape == (2, 4, 5) and lse.dtype == torch.float32
        dq, dk, dv, _, _ = ops.backward(out, None, query, key, key, out, lse, 0.25, 0, -1, -1, 0)
        assert dq.shape == query.shape and dk.shape == dv.shape == key.shape


def test_every_operator_has_kernels_for_both_devices():
    names = [name for name in dir(torch.ops.fused_attention) if not name.startswith("_")]
    for name in (
        *("attention_forward_plain", "attention_forward_plain_lse", "attention_forward"),
        *("attention_backward", "dropout_keep_mask", "masked_softmax_forward"),
        *("masked_softmax_", "masked_softmax_backward", "attention_weights", "kv_cache_append_"),
        "attention_statistics",
    ):
        assert name in names
        for key in ("CPU", "CUDA"):
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            assert has(f"fused_attention::{name}", key), (name, key)

"""Tests that `explain` tells what runs: kernel names, tiles, launches and every buffer, for all
generated cases on every backend and instruction set."""

import contextlib
import json

import pytest
import torch

import fused_attention as fa
from feature_cases import SEQUENCES, problem_of
from fused_attention import _native
from fused_attention.call import backends
from fused_attention.call.backends import CUDA, TRITON
from fused_attention.call.explain import details_of, details_of_notes, explain
from fused_attention.call.options import Options
from fused_attention.tools import testing
from fused_attention.tools.testing import Case, cpu_isa

PAIRS = testing.pairs_of_features()
MORE = [
    Case(B=1, Hq=8, Hkv=2, Sq=1, Sk=3000, dtype=torch.float32),  # split-KV decoding
    Case(B=2, Hq=4, Hkv=4, Sq=130, Sk=700, bias="11QK", dtype=torch.bfloat16),  # a shared bias
    Case(B=2, Hq=4, Hkv=4, Sq=300, Sk=300, mask="11QK", dtype=torch.float16),  # a shared mask
    Case(B=9, Hq=8, Hkv=8, Sq=40, Sk=40, dtype=torch.float32),  # many heads
]


def numbers(count):
    """Returns the numbers of all cases; without --full, every third generated case runs."""
    return [
        pytest.param(n, marks=() if n % 3 == 0 or n >= len(PAIRS) else pytest.mark.slow)
        for n in range(count)
    ]


@contextlib.contextmanager
def listening(plan):
    """Collects the notes of the operators that run inside."""
    plan.notes(True)
    notes = []
    try:
        yield notes
    finally:
        text = bytes(plan.notes(False).tolist()).decode()
        notes += [json.loads(line) for line in text.splitlines()]


def passes_of(notes):
    """Groups the notes by operator."""
    passes = []
    for note in notes:
        if "operator" in note:
            passes.append([])
        passes[-1].append(note)
    return passes


def without_gradients_of_outputs(notes):
    """Drops copies of grad_out and out: `explain` cannot know whether the backward makes them."""
    unknown = ("a copy of grad_out", "a copy of out")
    return [note for note in notes if note.get("buffer") not in unknown]


def check_cpu(tensors, options, grads):
    leaves = {name: x for name, x in tensors.items()}
    with listening(torch.ops.fused_attention_dry_run) as notes:
        results = fa.attention(**leaves, **options, backend="cpu")
        results = results if isinstance(results, tuple) else (results,)
        needing = [x for x in leaves.values() if isinstance(x, torch.Tensor) and x.requires_grad]
        torch.autograd.grad(
            [x for x in results[: len(grads)]],
            needing,
            list(grads[: len(results)]),
            allow_unused=True,
        )
    notes = without_gradients_of_outputs(notes)
    ran = details_of_notes(passes_of(notes), options.get("return_lse", False))
    said = explain(**leaves, **options, backend="cpu").details
    assert said == ran
    return said


@pytest.mark.parametrize("isa", _native.isas())
@pytest.mark.parametrize("number", numbers(len(PAIRS) + len(MORE)))
def test_cpu(number, isa):
    case = (PAIRS + MORE)[number]
    inputs = testing.make_inputs(case)
    leaves = inputs.differentiable()
    grads = (inputs.grad_out, torch.zeros_like(inputs.grad_lse))
    with cpu_isa(isa):
        for options in ({}, {"return_lse": True}):
            said = check_cpu(leaves, inputs.keywords | options, grads)
    if min(case.Sq, case.Sk, case.Hq, case.B) > 0:
        assert "attention_backward" in said.kernel and said.extra_bytes > 0


@pytest.mark.parametrize("name", SEQUENCES)
def test_packed_sequences_and_pages(name):
    tensors, options = SEQUENCES[name]
    leaves = {key: x.detach().requires_grad_() for key, x in tensors.items()}
    out = fa.attention(**leaves, **options)
    check_cpu(leaves, options, (torch.zeros_like(out),))


@pytest.mark.parametrize("isa", _native.isas())
def test_plain_calls_keep_nothing(isa):
    q = torch.randn(2, 3, 100, 16)
    with cpu_isa(isa), listening(torch.ops.fused_attention_dry_run) as notes:
        fa.attention(q, q, q)
    with cpu_isa(isa):
        said = explain(q, q, q).details
    assert said == details_of_notes([notes], False)
    assert not any("log-sum-exp" in name for name, _ in said.buffers)


def test_a_dry_run_has_no_memory_and_computes_nothing():
    """A call of 8 TiB is explained at once; fake lengths are taken to cover all tokens."""
    q = torch.empty(1).expand(2**10, 2**10, 2**15, 2**6)
    details = explain(q, q, q, causal=True).details
    assert details.kernel == "attention_forward" and details.block_m > 0
    from fused_attention.operators._torch import fake_tensors

    with fake_tensors():
        tokens = torch.empty(1000, 4, 64)
        cu = torch.empty(5, dtype=torch.int32)
        packed = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 250, "max_seqlen_k": 250}
        assert explain(tokens, tokens, tokens, **packed).details.block_m > 0


def test_weights_are_explained_too():
    layer = fa.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 50, 32)
    with torch.no_grad(), listening(torch.ops.fused_attention_dry_run) as notes:
        layer(x, x, x)
    with torch.no_grad():
        details = layer.explain(x, x, x).details
    assert details == details_of_notes(passes_of(notes), False)
    assert details.kernel == "attention_forward + attention_weights"


def test_weights_are_explained_where_the_environment_sends_them(monkeypatch):
    layer = fa.MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 5, 32)
    with monkeypatch.context() as patch:
        patch.setenv("FUSED_ATTENTION_BACKEND", "reference")
        backends.read_environment()
        assert layer.explain(x, x, x).backend == "reference"
    backends.read_environment()
    assert layer.explain(x, x, x).backend == "cpu"


def meta_details(row, inputs, options):
    call = {**inputs.differentiable(), **inputs.keywords, **options}
    named = {name: call.pop(name) for name in ("query", "key", "value")}
    problem = problem_of(**named, **call)
    return details_of(row, problem, *named.values(), Options(**call))


@pytest.mark.parametrize("number", numbers(len(PAIRS)))
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_triton(number, monkeypatch):
    pytest.importorskip("triton")
    from fused_attention.kernels import launch
    from triton_calls import run

    inputs = testing.make_inputs(PAIRS[number])
    if inputs.tensors["query"].dtype == torch.float64:
        pytest.skip("not served")
    ran = []
    monkeypatch.setattr(launch.Launch, "run", lambda self: ran.append(self))  # runs nothing
    run(inputs)
    details = meta_details(TRITON, inputs, {"return_lse": True})
    assert details.launches == tuple(each.kernel.__name__ for each in ran)
    assert details.block_m == ran[0].constants["BLOCK_M"]
    assert details.block_n == ran[0].constants["BLOCK_N"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("number", numbers(len(PAIRS)))
def test_cuda(number, capability):
    import cuda_interpreter
    from cuda_calls import recording, small, start

    cuda_interpreter.library()
    inputs = testing.make_inputs(small(PAIRS[number]))
    if inputs.tensors["query"].dtype == torch.float64:
        pytest.skip("not served")
    plan = torch.ops.fused_attention_cuda_dry_run
    with recording(capability) as launches:
        with listening(plan) as notes:
            start(inputs)
        ran = list(launches)
        details = meta_details(CUDA, inputs, {"return_lse": True})
    assert details.launches == tuple(name for name, *_ in ran)
    assert details == details_of_notes(passes_of(without_gradients_of_outputs(notes)), True)

"""The options of a call are the same, under the same names and in the same order, in `attention()`,
in its record, in the arguments of the operators, in their schemas, and in C++."""

import inspect
import re
import runpy
from typing import get_type_hints

import pytest
import torch

import fused_attention as fa
from fused_attention import reference
from fused_attention.call import backends, plan
from fused_attention.call.options import DEFAULTS, Keywords, Options
from fused_attention.call.serve import said_by, serve
from fused_attention.operators import _torch, writes
from fused_attention.operators.arguments import (
    DIFFERENTIABLE,
    INPUTS,
    NUMBERS,
    SEQUENCES,
    TENSORS,
    Arguments,
    joined,
    joined_if_dense,
    split,
)
from fused_attention.operators.handles import names_of
from paths import ROOT

STARTS = ("q_start", "k_start", "head_start")
LIBRARY = torch.ops.fused_attention
BEFORE = {  # operands before and behind the common arguments
    "attention_forward": (INPUTS, ()),
    "attention_backward": (
        ("grad_out", "grad_lse", *INPUTS, "out", "lse"),
        ("bias_grad", "sinks_grad", "grad_weights", "average_weights"),
    ),
    "attention_jvp": (
        (*INPUTS, "out", "lse", *(f"tangent_{name}" for name in DIFFERENTIABLE)),
        (),
    ),
    "attention_backward_jvp": (
        (
            *("grad_out", "grad_lse", *INPUTS, "out", "lse"),
            *("tangent_grad_out", "tangent_grad_lse", *(f"tangent_{name}" for name in INPUTS)),
            *("tangent_out", "tangent_lse", "tangent_bias", "tangent_sinks"),
        ),
        ("bias_grad", "sinks_grad"),
    ),
    "attention_weights": (("query", "key", "lse", "average"), ()),
    "attention_statistics": (("query", "key", "lse", "mass", "entropy", "num_top"), ()),
    "check_sequences": (("query", "key"), ()),
}
SCALE_ONLY = ("attention_forward_plain", "attention_forward_plain_lse")


def test_the_record_has_the_keywords_of_attention():
    parameters = inspect.signature(fa.attention).parameters
    keywords = [name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert keywords == [*(name for name in Options._fields if name not in STARTS), "backend"]
    for name in keywords[:-1]:
        # Some options are absent only if they are this very object.
        assert parameters[name].default is getattr(DEFAULTS, name), name
    assert set(Keywords.__annotations__) == {*keywords} - {"return_lse"}


def test_what_is_named_differently_is_named_here():
    renamed = {"window_size": ("window_left", "window_right"), "philox_seed": ("philox",)}
    renamed["diagonal"] = ()  # the number of `causal` says it
    expected = {y for x in Options._fields for y in renamed.get(x, (x,))} - {"return_lse"}
    assert expected == set(Arguments._fields)
    own = set(inspect.signature(reference.attention_reference).parameters)
    assert set(Options._fields) - {"precision"} <= own


@pytest.mark.parametrize("name", [*BEFORE, *SCALE_ONLY])
@pytest.mark.parametrize("library", ["fused_attention", "fused_attention_dry_run"])
def test_schemas(library, name):
    if not hasattr(getattr(torch.ops, library), name):
        pytest.skip("not there")
    op = getattr(getattr(torch.ops, library), name).default
    before, behind = (INPUTS, ()) if name in SCALE_ONLY else BEFORE[name]
    fields = Arguments._fields[: Arguments._fields.index("mask")] if name in SCALE_ONLY else None
    assert names_of(op) == (*before, *(fields or Arguments._fields), *behind)
    hints = get_type_hints(Arguments)
    for argument in _torch.schema_of(op).arguments:
        if argument.name in Arguments._fields:
            of_tensor = "Tensor" in str(argument.type)
            assert (
                of_tensor == (argument.name in TENSORS) == ("Tensor" in str(hints[argument.name]))
            )
            default = Arguments._field_defaults.get(argument.name)
            if argument.name in Arguments._field_defaults:
                assert argument.default_value == default


def test_the_list_in_cpp():
    text = (ROOT / "csrc" / "arguments.h").read_text()
    listed = re.findall(r"X\((\w+), (\w+), \"([^\"]+)\"\)", text)
    assert [name for _, name, _ in listed] == list(Arguments._fields)
    types = {"OptionalTensor": "Tensor?", "OptionalInt": "SymInt?", "double": "float"}
    for kind, name, schema in listed:
        assert schema.split("=")[0].split()[1] == name
        assert schema.split()[0] in (types.get(kind), "int", "SymInt"), name


def test_what_may_be_differentiated():
    leaves = [torch.randn(1, 2, 3, 4, requires_grad=True) for _ in INPUTS]
    more = {"bias": torch.randn(3, 3, requires_grad=True), "sinks": torch.zeros(2).requires_grad_()}
    given = dict(zip(INPUTS, leaves, strict=True)) | more
    assert set(given) == set(DIFFERENTIABLE)
    gradients = torch.autograd.grad(fa.attention(**given).sum(), list(given.values()))
    assert [g.shape for g in gradients] == [x.shape for x in given.values()]
    results = len(_torch.schema_of(LIBRARY.attention_backward.default).returns)
    assert results == len(DIFFERENTIABLE)


def test_taking_apart_and_joining():
    arguments = Arguments(*(f"value of {name}" for name in Arguments._fields))
    tensors, numbers = split(arguments)
    assert tensors == tuple(f"value of {name}" for name in TENSORS)
    assert numbers == tuple(f"value of {name}" for name in NUMBERS)
    assert joined(tensors, numbers) == arguments
    dense = joined_if_dense(tensors, numbers)
    assert dense == arguments[: len(dense)] and not set(SEQUENCES) & set(
        arguments._fields[: len(dense)]
    )


OTHERS = {
    "mask": torch.ones(1, 3, dtype=torch.bool),
    "bias": torch.zeros(3, 3),
    "key_padding_mask": torch.zeros(1, 3, dtype=torch.bool),
    "causal": "top_left",
    "diagonal": "bottom_right",
    "window_size": (1, 1),
    "scale": 0.3,
    "softcap": 2.0,
    "alibi_slopes": torch.ones(2),
    "sinks": torch.ones(2),
    "dropout_p": 0.5,
    "cu_seqlens_q": torch.tensor([0, 3], dtype=torch.int32),
    "cu_seqlens_k": torch.tensor([0, 3], dtype=torch.int32),
    "max_seqlen_q": 3,
    "max_seqlen_k": 3,
    "seqused_k": torch.tensor([3], dtype=torch.int32),
    "block_table": torch.tensor([[0]], dtype=torch.int32),
    "return_lse": True,
    "philox_seed": 5,
    "precision": "high",
    **dict.fromkeys(STARTS, 8),
}


@pytest.mark.parametrize("name", Options._fields)
def test_every_option_tells_one_kind_of_call_from_another(name):
    """`attention` does not take a call with the option for a plain one either: here the plan for
    plain calls is replaced by one that fails."""
    kinds = {said_by(DEFAULTS, "auto"), said_by(DEFAULTS._replace(**{name: OTHERS[name]}), "auto")}
    assert len(kinds) == 2
    if name in STARTS:
        return
    plan.PLANS.clear()
    query = torch.randn(1, 2, 3, 4)
    fa.attention(query, query, query)
    (kind,) = plan.PLANS
    plan.PLANS[kind] = plan.Plan(lambda *inputs: pytest.fail("taken for a plain call"), plain=())
    try:
        fa.attention(query, query, query, **{name: OTHERS[name]})
    except (ValueError, TypeError, NotImplementedError):
        pass  # one option alone makes no packed call
    plan.PLANS.clear()


def test_the_head_sizes_of_cuda_are_the_same_everywhere():
    """Compares the sizes that are compiled (build.py), launched (launch.h) and in the table."""
    build = runpy.run_path(str(ROOT / "csrc" / "cuda" / "build.py"))
    header = (ROOT / "csrc" / "cuda" / "launch.h").read_text()
    (listed,) = re.findall(r"kHeadDims\[\] = \{([^}]*)\}", header)
    sizes = [int(x) for x in listed.split(",")]
    assert sizes == sorted(build["HEAD_DIMS"])
    assert f"kMaxHeadDim = {max(sizes)};" in header
    assert backends.CUDA.head_dims == range(1, max(sizes) + 1)


def test_no_argument_is_found_by_its_number():
    """A new argument moves the others, so code must find arguments by name."""
    numbered = re.compile(
        r"\b(inputs|needed|tangents|needs_input_grad|arguments|call|saved)\[[-0-9:,\s]+\]"
    )
    for path in (ROOT / "python" / "fused_attention").rglob("*.py"):
        if {"derivatives", "operators", "call"} & set(path.parts) or path.name == "softmax.py":
            found = numbered.findall(path.read_text())
            assert not found, f"{path.name}: {found}"


def test_precision_of_the_dry_run_is_that_of_the_call():
    query = torch.randn(1, 2, 600, 64)
    with torch.no_grad():
        for precision in ("highest", "high", "medium"):
            assert serve(query, query, query, Options(precision=precision)).shape == query.shape


def test_dynamo_is_told_as_pytorch_tells_it():
    """`_torch.assume_constant_result` does what PyTorch's does, without importing Dynamo."""

    def theirs():
        return 1

    def ours():
        return 1

    torch.compiler.assume_constant_result(theirs)
    assert vars(_torch.assume_constant_result(ours)) == vars(theirs)


def test_versions_are_counted_where_autograd_s_key_is_out_of_reach(monkeypatch):
    monkeypatch.setattr(writes, "after_writing", lambda op, then: None)
    written = []
    call = writes.noticed(LIBRARY.masked_softmax_.default, "masked_softmax_")
    monkeypatch.setattr(writes, "increment_version", written.extend)
    x = torch.randn(2, 3)
    call(x, 1.0, 0)
    assert any(y is x for y in written) and x.sum(-1).allclose(torch.ones(2))


def test_a_scalar_option_is_named_in_twelve_files():
    """Checks the walk in CONTRIBUTING.md; tools and integrations are not part of it."""
    named = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "kernels", "python")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".h", ".cuh", ".inl", ".cpp", ".cu", ".py")
        and "softcap" in path.read_text()
    }
    others = ("/tools/", "/integrations/")
    assert {name for name in named if not any(folder in name for folder in others)} == {
        "csrc/arguments.h",
        "csrc/attention_params.h",
        "csrc/cpu/scores.inl",
        "csrc/cuda/scores.cuh",
        "csrc/describe.cpp",
        "kernels/launch.py",
        "kernels/primitives.py",
        "python/fused_attention/attention.py",
        "python/fused_attention/call/options.py",
        "python/fused_attention/call/problem.py",
        "python/fused_attention/operators/arguments.py",
        "python/fused_attention/reference.py",
    }

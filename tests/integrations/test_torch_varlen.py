"""torch.nn.attention.varlen on a CPU against the reference in float64, sequence by sequence, and
ours among PyTorch's flash attention implementations."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch.library import opcheck

from fused_attention import ArgumentValueError, attention
from fused_attention.integrations import patch, torch_varlen
from fused_attention.tools import testing
from fused_attention.tools.testing import Case
from packed_sequences import DECODED, LENGTHS, Packing

varlen = pytest.importorskip("torch.nn.attention.varlen")
varlen_attn = varlen.varlen_attn
schema = torch.ops.torch_attn._varlen_attn.default._schema
if "num_splits" not in {argument.name for argument in schema.arguments}:
    pytest.skip("an older varlen_attn, with fewer arguments", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

int32 = torch.int32
AUX = varlen.AuxRequest(lse=True)

MASKS = {
    "all": {},
    "causal": {"causal": "bottom_right"},
    "causal window": {"causal": "bottom_right", "window_size": (14, 0)},
    "window": {"diagonal": "bottom_right", "window_size": (3, 9)},
    "left": {"diagonal": "bottom_right", "window_size": (9, -1)},
    "right": {"diagonal": "bottom_right", "window_size": (-1, 2)},
}
PLAIN = Case(B=1, Hq=4, Hkv=2, D=20, Dv=20)


def case_of(mask, **options):
    return dataclasses.replace(PLAIN, **MASKS[mask], **options)


def inputs_of(case, packing):
    """Returns the dense call of each sequence. PyTorch drops the gradient of lse."""
    each = [
        testing.make_inputs(dataclasses.replace(case, Sq=Sq, Sk=Sk, seed=case.seed + 100 * b))
        for b, (Sq, Sk) in enumerate(packing.lengths)
    ]
    return [dataclasses.replace(x, grad_lse=torch.zeros_like(x.grad_lse)) for x in each]


def options_of(case, packing):
    """Returns the arguments of varlen_attn after value."""
    cu_seq_q, cu_seq_k, max_q, max_k, seqused_k, block_table = packing.arguments
    return {
        "cu_seq_q": cu_seq_q,
        "cu_seq_k": cu_seq_k,
        "max_q": max_q,
        "max_k": max_k,
        "scale": case.scale,
        "window_size": (-1, 0) if case.causal and case.window_size[0] < 0 else case.window_size,
        "enable_gqa": case.Hq != case.Hkv,
        "seqused_k": seqused_k,
        "block_table": block_table,
    }


def tensors_of(each, packing):
    query = packing.queries([x.tensors["query"] for x in each])
    return query, *(packing.keys([x.tensors[name] for x in each]) for name in ("key", "value"))


def split(results, packing, b):
    """Returns the part of one sequence of results that lie packed."""
    rows = {"out": packing.of_queries, "lse": packing.of_rows, "dquery": packing.of_queries}
    return {name: rows.get(name, packing.of_keys)(x, b) for name, x in results.items()}


def check(case, packing, run):
    """Applies the correctness rule to each sequence of the results of `run`, by name."""
    wrong = testing.luck_aside(lambda draw: _wrong(case, packing, run, draw))
    assert not wrong


def _wrong(case, packing, run, draw):
    each = inputs_of(dataclasses.replace(case, seed=1000 * draw), packing)
    results = run(each)
    near = True
    messages = []
    for b, inputs in enumerate(each):
        own = split(results, packing, b)
        exact = testing.exact(inputs)
        if 0 in packing.lengths[b]:
            assert all((x == 0).all() for name, x in own.items() if name != "lse")
            assert torch.equal(own["lse"].double(), exact["lse"].expand_as(own["lse"]))
            continue
        naive = testing.naive(inputs)
        if case.dtype == torch.float64:  # PyTorch says that lse is float32
            torch.testing.assert_close(own.pop("lse"), exact["lse"].float())
        errors = [e for e in testing.errors(own, exact, naive) if e.is_wrong]
        messages += [f"sequence {b}, {e.message}" for e in errors]
        near = near and all(e.ratio <= testing.CHANCE for e in errors)
    end = packing.q_starts[-1]
    assert (results["out"][end:] == 0).all() and (results["lse"][:, end:] == -torch.inf).all()
    return None if messages and near else messages


# -- varlen_attn -------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_forward_and_backward(mask, dtype, heads, scale):
    packing = Packing(LENGTHS)
    case = case_of(mask, dtype=dtype, Hq=heads[0], Hkv=heads[1], scale=scale)

    def run(each):
        leaves = [x.requires_grad_() for x in tensors_of(each, packing)]
        out, lse = varlen_attn(*leaves, **options_of(case, packing), return_aux=AUX)
        assert out.dtype == dtype and lse.dtype == torch.float32
        grad_out = packing.queries([x.grad_out for x in each])
        gradients = torch.autograd.grad(out, leaves, grad_out)
        names = ("dquery", "dkey", "dvalue")
        results = {"out": out.detach(), "lse": lse} | dict(zip(names, gradients, strict=True))
        assert (results["dquery"][packing.q_starts[-1] :] == 0).all()
        return results

    check(case, packing, run)


@pytest.mark.covering
@pytest.mark.parametrize("lengths", [LENGTHS, DECODED], ids=["prompts", "decoded"])
@pytest.mark.parametrize("page_size", [None, 16, 7])
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("writes", [False, True], ids=["returned", "out"])
def test_used_lengths_and_pages(lengths, page_size, used, mask, dtype, writes):
    packing = Packing(lengths, page_size=page_size, used=used)
    case = case_of(mask, dtype=dtype)

    def run(each):
        tensors, options = tensors_of(each, packing), options_of(case, packing)
        if page_size and used:
            options["cu_seq_k"] = None
        if writes:
            given = torch.full_like(tensors[0], torch.nan)
            out, lse = varlen.varlen_attn_out(given, *tensors, **options, return_aux=AUX)
            assert out is given
        else:
            out, lse = varlen_attn(*tensors, **options, return_aux=AUX)
        return {"out": out, "lse": lse}

    check(case, packing, run)


def two_sequences(dtype=torch.float32, D=8):
    q, k, v = (torch.randn(9, 2, D, dtype=dtype) for _ in range(3))
    return q, k, v, torch.tensor([0, 4, 9], dtype=int32), torch.tensor([0, 6, 9], dtype=int32), 5, 6


def test_gradcheck():
    q, k, v, *lengths = two_sequences(torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.autograd.gradcheck(lambda *x: varlen_attn(*x, *lengths, window_size=(2, 1)), leaves)


@pytest.mark.parametrize("layout", ["packed", "HTD", "wide"])
def test_results_lie_in_memory_as_pytorch_promises(layout):
    """Compiled code relies on the strides of PyTorch's fake kernels."""
    *_, cu_q, cu_k, max_q, max_k = two_sequences()
    lengths = (cu_q, cu_k, max_q, max_k)
    if layout == "packed":
        q, k, v = torch.randn(9, 3, 2, 8).unbind(1)
    elif layout == "HTD":
        q, k, v = (torch.randn(2, 9, 8).transpose(0, 1) for _ in range(3))
    else:
        q, k, v = (torch.randn(9, 2, 16)[..., ::2] for _ in range(3))
    out, lse, random_state = torch.ops.torch_attn._varlen_attn(q, k, v, *lengths)
    want = varlen_attn(*(x.contiguous() for x in (q, k, v)), *lengths)
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    arguments = (q, k, v, *lengths)
    tests = ("test_schema", "test_faketensor")
    opcheck(torch.ops.torch_attn._varlen_attn.default, arguments, test_utils=tests)
    given = torch.empty_like(q)
    opcheck(torch.ops.torch_attn._varlen_attn_out.default, (given, *arguments), test_utils=tests)
    backward = (torch.randn_like(out), q, k, v, out, lse, *lengths, False, random_state)
    opcheck(torch.ops.torch_attn._varlen_attn_backward.default, backward, test_utils=tests)


def test_is_causal_of_the_operator_ends_every_window():
    arguments = two_sequences()
    operator = torch.ops.torch_attn._varlen_attn.default
    want = operator(*arguments, False, None, [3, 0])[0]
    assert torch.equal(operator(*arguments, True, None, [3, -1])[0], want)
    want = operator(*arguments, False, None, [-1, 0])[0]
    assert torch.equal(operator(*arguments, True)[0], want)


def test_autocast_leaves_it_alone():
    """As on a GPU, where PyTorch registers no cast."""
    arguments = two_sequences()
    with torch.autocast("cpu", torch.bfloat16):
        out = varlen_attn(*arguments)
    assert torch.equal(out, varlen_attn(*arguments))


def test_no_sequences():
    x, cu = torch.randn(4, 2, 8, requires_grad=True), torch.zeros(1, dtype=int32)
    out = varlen_attn(x, x, x, cu, cu, 0, 0)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert (out == 0).all() and (gradient == 0).all()


def test_out_that_shares_memory_with_query():
    q, *rest = two_sequences()
    want = varlen_attn(q, *rest)
    assert torch.equal(varlen.varlen_attn_out(q, q, *rest), want) and torch.equal(q, want)


WRONG = {
    "cu_seq_q: expected an int32": lambda q, k, v, cu_q, *rest: (q, k, v, cu_q.long(), *rest),
    "cu_seq_k: expected": lambda q, k, v, cu_q, cu_k, *rest: (q, k, v, cu_q, cu_k + 1, *rest),
    "cu_seq_k: expected beside cu_seq_q": lambda *x: (*x[:4], None, *x[5:]),
    "key: expected head_dim": lambda q, k, v, *rest: (q, k[..., :6], v, *rest),
    "query, key: expected one dtype": lambda q, k, v, *rest: (q, k.double(), v, *rest),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_arguments(message):
    with pytest.raises(ArgumentValueError, match=message):
        varlen_attn(*WRONG[message](*two_sequences()))


def test_wrong_windows_lengths_and_out():
    arguments = two_sequences()
    with pytest.raises(ArgumentValueError, match="window_size: expected .* got .-2, 0"):
        varlen_attn(*arguments, window_size=(-2, 0))
    with pytest.raises(ArgumentValueError, match="max_k: expected an int >= 0, got -1"):
        varlen_attn(*arguments[:-1], -1)
    with pytest.raises(ArgumentValueError, match="out: expected shape that of query"):
        varlen.varlen_attn_out(torch.empty(9, 2, 7), *arguments)
    with pytest.raises(ArgumentValueError, match="out: expected dtype torch.float32"):
        varlen.varlen_attn_out(torch.empty(9, 2, 8).double(), *arguments)


def test_what_is_not_served_is_named(monkeypatch):
    q, k, v, *lengths = two_sequences()
    with pytest.raises(NotImplementedError, match="num_splits=1, results that do not depend"):
        varlen_attn(q, k, v, *lengths, num_splits=1)
    assert torch.equal(varlen_attn(q, k, v, *lengths, num_splits=3), varlen_attn(q, k, v, *lengths))
    with pytest.raises(NotImplementedError, match="value's head_dim 6: only query's 8"):
        varlen_attn(q, k, v[..., :6], *lengths)
    with pytest.raises(NotImplementedError, match="query's head_dim 513: only 1 to 512"):
        varlen_attn(*two_sequences(D=513))
    with pytest.raises(NotImplementedError, match="dtype torch.int64"):
        varlen_attn(*(x.long() for x in (q, k, v)), *lengths)
    # An argument that another version of PyTorch has
    monkeypatch.setattr(torch_varlen, "_BUILT", torch_varlen._BUILT - {"block_table"})
    varlen_attn(q, k, v, *lengths)
    table = torch.zeros(2, 1, dtype=int32)
    with pytest.raises(NotImplementedError, match="block_table is not built"):
        varlen_attn(q, k[None], v[None], *lengths, block_table=table)


def test_second_derivatives_are_refused():
    q, *rest = two_sequences(torch.float64)
    q.requires_grad_()
    (gradient,) = torch.autograd.grad(varlen_attn(q, *rest).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), q)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend):
    torch._dynamo.reset()

    def function(x, cu, longest):
        q, k, v = x.unflatten(-1, (3, 2, 8)).unbind(1)
        out, lse = varlen_attn(
            q, k, v, cu, cu, longest, longest, window_size=(4, 0), return_aux=AUX
        )
        return out.sin() * lse.t().unsqueeze(-1)

    compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=True)
    for lengths in ([0, 5, 9], [0, 17, 17, 30]):
        x = torch.randn(lengths[-1], 48, requires_grad=True)
        arguments = (x, torch.tensor(lengths, dtype=int32), 17)
        results = []
        for call in (function, compiled):
            out = call(*arguments)
            results.append((out, *torch.autograd.grad(out.square().sum(), x)))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_the_same_result_as_attention():
    q, k, v, cu_q, cu_k, max_q, max_k = two_sequences()
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": max_q}
    want = attention(q, k, v, **options, max_seqlen_k=max_k, causal="bottom_right")
    assert torch.equal(varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0)), want)


# -- Importing the package ---------------------------------------------------------------

CHILD = """
import sys
from torch.nn.functional import scaled_dot_product_attention as sdpa
import torch, fused_attention, fused_attention.integrations.torch_varlen
import fused_attention.operators.flops

late = {"torch._dynamo", "torch.nn.attention.varlen", "torch.utils.flop_counter"}
assert not late & sys.modules.keys()
from torch.nn.attention.varlen import varlen_attn

x, cu = torch.randn(3, 1, 4), torch.tensor([0, 3], dtype=torch.int32)
assert varlen_attn(x, x, x, cu, cu, 3, 3).shape == x.shape
from torch.nn import attention

if not hasattr(attention, "restore_flash_attention_impl"):
    sys.exit()


def is_active():
    name = "aten::_scaled_dot_product_flash_attention_for_cpu"
    lines = torch._C._dispatch_dump(name).splitlines()
    ours = any(line.startswith("CPU:") and "patch.py" in line for line in lines)
    assert ours == (attention.current_flash_attention_impl() == "fused_attention")
    return ours


assert "fused_attention" in attention.list_flash_attention_impls() and not is_active()
x = torch.randn(2, 3, 5, 8)
expected = sdpa(x, x, x)
attention.activate_flash_attention_impl("fused_attention")
assert is_active()
torch.testing.assert_close(sdpa(x, x, x), expected)
attention.restore_flash_attention_impl()
assert not is_active() and torch.equal(sdpa(x, x, x), expected)
"""


def test_importing_offers_kernels_and_activates_nothing():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not patch._HAS_REGISTRY, reason="this PyTorch restores no implementation")
def test_a_flash_attention_implementation_may_be_removed_more_than_once():
    handle = patch._FlashHandle()
    handle.remove()
    handle.remove()
    x = torch.randn(2, 3, 5, 8)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
    torch.testing.assert_close(out, attention(x, x, x))

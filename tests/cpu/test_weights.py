"""Compares the attention weights with the reference's output for values that are the identity."""

import json
import subprocess
import sys

import pytest
import torch

from feature_cases import problem_of
from fused_attention import _native
from fused_attention import operators as ops
from fused_attention.attention_weights import attention_with_weights
from fused_attention.call import backends
from fused_attention.derivatives import autograd
from fused_attention.tools import testing
from fused_attention.tools.testing import DTYPES, Case, cpu_isa, make_inputs, num_threads
from weights_checks import COVERING, mismatches, run, weights_inputs

ISAS = _native.isas()


@pytest.mark.covering
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_and_dtype(isa, dtype, average):
    """Uses several blocks of queries and of keys, each with a ragged edge."""
    case = Case(
        dtype=dtype, B=2, Hq=4, Hkv=2, Sq=101, Sk=805, D=20, causal="bottom_right", key_padding=True
    )
    with cpu_isa(isa):
        assert mismatches(case, average) == []


def test_beside_the_cuda_library_the_kernels_serve(monkeypatch):
    """The CUDA library returns no weights, and comes first on a GPU; the CPU plays the GPU here."""
    case = Case(B=1, Hq=2, Hkv=2, Sq=5, Sk=7)
    call = testing.make_inputs(case).tensors
    want = attention_with_weights(**call)
    for row, devices in ((backends.CUDA, {"cpu"}), (backends.CPU, {"cpu"})):
        monkeypatch.setitem(row.__dict__, "devices", frozenset(devices))
    monkeypatch.setitem(backends.CUDA.__dict__, "missing", str)
    problem = problem_of(**call)
    assert backends.choose(problem) is backends.CUDA
    assert backends.choose(problem, task="attention_weights") is backends.CPU
    assert all(map(torch.equal, attention_with_weights(**call), want))


@pytest.mark.parametrize("number", range(len(COVERING)))
def test_every_pair_of_features(number):
    """Runs each case on one instruction set, averaged or not, in turn."""
    with cpu_isa(ISAS[number % len(ISAS)]):
        assert mismatches(COVERING[number], average=number // len(ISAS) % 2 == 0) == []


@pytest.mark.parametrize("average", [True, False])
def test_bits_do_not_depend_on_threads(isa, average):
    case = Case(B=1, Hq=3, Hkv=3, Sq=150, Sk=900, bias="11QK", dropout_p=0.25, causal="top_left")
    inputs = weights_inputs(case, average)
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            results.append(run(inputs, average))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize("average", [True, False])
def test_hidden_keys_and_blind_rows_may_hold_anything(isa, average):
    B, H, Sq, Sk, D = 2, 3, 50, 200, 8
    q, k, v = (torch.randn(B, H, n, D) for n in (Sq, Sk, Sk))
    padding = torch.zeros(B, Sk, dtype=torch.bool)
    padding[0, 120:] = padding[1] = True
    mask = torch.ones(Sq, Sk, dtype=torch.bool)
    mask[7] = False
    options = {"mask": mask, "key_padding_mask": padding, "causal": "bottom_right"}
    results = []
    for filling in (0.0, float("nan")):
        poisoned_k = k.masked_fill(padding[:, None, :, None], filling).requires_grad_()
        poisoned_q = q.clone()
        poisoned_q[:, :, 7] = filling  # row 7 is fully masked
        poisoned_q.requires_grad_()
        _, weights = attention_with_weights(
            poisoned_q, poisoned_k, v, average=average, dropout_p=0.1, philox_seed=1, **options
        )
        # The incoming gradients of hidden weights may hold anything, too.
        grad = torch.linspace(-1, 1, weights.numel()).view_as(weights)
        grad = grad.masked_fill(weights == 0, filling)
        gradients = torch.autograd.grad(weights, (poisoned_q, poisoned_k), grad)
        results.append((weights, *gradients))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    weights, dq, dk = results[0]
    assert weights[..., 7, :].count_nonzero() == weights[1].count_nonzero() == 0
    assert weights[0, ..., 120:].count_nonzero() == 0 and weights[0].count_nonzero() > 0
    assert dq[:, :, 7].count_nonzero() == dq[1].count_nonzero() == dk[1].count_nonzero() == 0


def test_nan_that_is_seen_stays(isa):
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    k[0, 1, 10] = float("nan")
    _, of_heads = attention_with_weights(q, k, k, causal=True, average=False)
    assert of_heads[0, 0].isfinite().all() and of_heads[0, 1, :10].isfinite().all()
    assert of_heads[0, 1, 10:].tril(10).isnan().any(-1).all()
    _, averaged = attention_with_weights(q, k, k, causal=True)
    assert torch.equal(averaged.isnan(), of_heads.isnan().any(1))


def test_gradients_through_output_and_weights_together():
    q, k, v = (torch.randn(2, 2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 2, 7, 1, dtype=torch.float64, requires_grad=True)
    for average in (True, False):
        torch.autograd.gradcheck(
            lambda q, k, v, bias, average=average: attention_with_weights(
                q, k, v, bias=bias, average=average, dropout_p=0.3, philox_seed=3, softcap=2.0
            ),
            (q, k, v, bias),
        )


def test_the_lse_is_differentiable_beside_them():
    inputs = [torch.randn(1, 2, 5, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    none = (None,) * 6

    def call(*tensors):
        return autograd.AttentionWithWeights.apply(
            True, *tensors, 0.5, 0, -1, -1, 0, *none, 0.0, 0.0
        )

    torch.autograd.gradcheck(call, inputs)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)])
@pytest.mark.parametrize("average", [True, False])
def test_nothing_to_weigh(sizes, average):
    B, H, Sq, Sk = sizes
    q, k = (torch.randn(B, H, n, 8, requires_grad=True) for n in (Sq, Sk))
    bias = torch.randn(1, 1, Sq, Sk, requires_grad=True)
    out, weights = attention_with_weights(q, k, k, bias=bias, average=average)
    assert weights.shape == ((B, Sq, Sk) if average else (B, H, Sq, Sk))
    assert weights.count_nonzero() == out.count_nonzero() == 0
    for gradient in torch.autograd.grad(weights.sum(), (q, k, bias)):
        assert gradient.count_nonzero() == 0


def test_no_heads():
    q = torch.randn(2, 0, 3, 8)
    of_heads = ops.weights(q, q, torch.zeros(2, 0, 3), False, 1.0, 0, -1, -1, 0)
    averaged = ops.weights(q, q, torch.zeros(2, 0, 3), True, 1.0, 0, -1, -1, 0)
    assert of_heads.shape == (2, 0, 3, 3) and torch.equal(averaged, torch.zeros(2, 3, 3))


@pytest.mark.parametrize("average", [True, False])
def test_vmap(average):
    q, k, v = (torch.randn(3, 2, 4, n, 8) for n in (9, 11, 11))
    bias = torch.randn(3, 1, 1, 9, 11)

    def call(q, k, v, bias):
        def loss(q, k, v, bias):
            out, weights = attention_with_weights(q, k, v, bias=bias, average=average)
            return (weights * torch.arange(11)).sum() + out.square().sum(), weights

        return torch.func.grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    gradients, weights = torch.func.vmap(call)(q, k, v, bias)
    for i in range(3):
        own_gradients, own = call(q[i], k[i], v[i], bias[i])
        torch.testing.assert_close(weights[i], own)
        for mapped, single in zip(gradients, own_gradients, strict=True):
            torch.testing.assert_close(mapped[i], single)
    with torch.no_grad():
        without = torch.func.vmap(
            lambda q, k, v, bias: attention_with_weights(q, k, v, bias=bias, average=average)[1]
        )(q, k, v, bias)
    torch.testing.assert_close(without, weights)


def test_what_the_kernels_do_not_serve_the_reference_does():
    case = Case(B=1, D=513, Dv=513, causal="top_left", key_padding=True, dropout_p=0.25)
    inputs = make_inputs(case)
    for average in (True, False):
        slow = attention_with_weights(**inputs.tensors, average=average, **inputs.keywords)
        narrow = {name: x[..., :512] for name, x in inputs.tensors.items()}
        narrow["query"] = narrow["query"] + 0.0
        rest = (inputs.tensors["query"][..., 512:] @ inputs.tensors["key"][..., 512:].mT) / 513**0.5
        keywords = inputs.keywords | {"scale": 513**-0.5, "bias": rest}
        fast = attention_with_weights(**narrow, average=average, **keywords)
        torch.testing.assert_close(fast[0], slow[0][..., :512])
        torch.testing.assert_close(fast[1], slow[1])


def test_meta_tensors():
    q = torch.empty(2, 3, 5, 8, device="meta")
    out, weights = attention_with_weights(q, q, q)
    assert out.shape == q.shape and weights.shape == (2, 5, 5) and weights.device.type == "meta"


def test_operator_passes_opcheck():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 11, 8)
    lse, bias, philox = torch.randn(2, 4, 9), torch.randn(1, 1, 9, 11), torch.tensor([1, 2])
    padding = torch.rand(2, 11) > 0.5
    for average in (True, False):
        options = (average, 0.5, 1, -1, -1, 0, None, bias, padding, None, None, philox, 0.0, 0.5)
        torch.library.opcheck(ops.weights, (q, k, lse, *options))
        given = (q.clone(), lse, q, k, k, q, lse, 0.5, 1, -1, -1, 0)
        grad = torch.randn(2, 9, 11) if average else torch.randn(2, 4, 9, 11)
        torch.library.opcheck(
            ops.backward, given, {"grad_weights": grad, "average_weights": average}
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lse": torch.zeros(2, 4, 8)}, "lse: expected"),
        ({"lse": torch.zeros(2, 4, 9).double()}, "lse: expected"),
        ({"key": torch.zeros(2, 3, 11, 8)}, "no multiple"),
        ({"key": torch.zeros(2, 2, 11, 7)}, "head_dim"),
        ({"key": torch.zeros(2, 2, 11, 8).double()}, "one dtype"),
        ({"key": torch.zeros(1, 2, 11, 8)}, "batch"),
    ],
)
def test_the_operator_checks_what_it_reads(change, message):
    given = {"query": torch.zeros(2, 4, 9, 8), "key": torch.zeros(2, 2, 11, 8)}
    given |= {"lse": torch.zeros(2, 4, 9)} | change
    with pytest.raises(RuntimeError, match=message):
        ops.weights(
            **given, average=True, scale=1.0, causal=0, window_left=-1, window_right=-1, precision=0
        )


@pytest.mark.parametrize("average", [True, False])
def test_the_backward_operator_checks_the_gradient(average):
    q, lse = torch.zeros(2, 4, 9, 8), torch.zeros(2, 4, 9)
    given = (q, lse, q, q, q, q, lse, 1.0, 0, -1, -1, 0)
    right = (2, 9, 9) if average else (2, 4, 9, 9)
    for grad in (torch.zeros(right[:-1]), torch.zeros(*right[:-1], 8), torch.zeros(right).double()):
        with pytest.raises(RuntimeError, match="grad_weights: expected"):
            ops.backward(*given, grad_weights=grad, average_weights=average)


# -- Memory ------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
import fused_attention

torch.set_num_threads(1)


def make(length):
    torch.manual_seed(0)
    module = fused_attention.MultiheadAttention(128, 16, dropout=0.1, batch_first=True)
    return module, torch.randn(2, length, 128).requires_grad_()


def step(module, x):
    out, weights = module(x, x, x)
    (out.sum() + weights.square().sum()).backward()
    return out, weights


def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) * 1024


step(*make(64))
inputs = make(1024)
with open("/proc/self/clear_refs", "w") as clear_refs:
    clear_refs.write("5")
before = resident("VmRSS")
kept = step(*inputs)
print(json.dumps((resident("VmHWM") - before) / 2**20))
"""


@pytest.mark.serial
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_dropout_of_returned_weights_holds_no_byte_a_weight():
    """The weights [2, 1024, 1024], the gradient of their squares and their own take 8 MiB each."""
    child = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    mib = json.loads(child.stdout)
    print(f"a training step that returns weights: {mib:.0f} MiB")
    a_byte_a_weight = 2 * 16 * 1024 * 1024 / 2**20
    assert mib < 3 * 8 + 24 < 3 * 8 + a_byte_a_weight

"""FusedScaleMaskSoftmax against Megatron-LM's definition in float64."""

import dataclasses
import enum
import inspect
import itertools
from typing import Any

import pytest
import torch

from flash_attn_reference import drawn_cases
from fused_attention import (
    ArgumentTypeError,
    ArgumentValueError,
    ScaledMaskedSoftmax,
    ScaledSoftmax,
    ScaledUpperTriangMaskedSoftmax,
    masked_softmax,
)
from fused_attention.integrations import megatron
from fused_attention.integrations.megatron import AttnMaskType, FusedScaleMaskSoftmax, SoftmaxOne
from fused_attention.tools import testing

pytestmark = pytest.mark.usefixtures("one_thread")
F16, F32, BF16, F64 = torch.float16, torch.float32, torch.bfloat16, torch.float64
H = 3


def attention_mask_func(scores, mask):
    """Megatron's: it writes to scores."""
    scores.masked_fill_(mask, -10000.0)
    return scores


def other_mask_func(scores, mask):
    return scores.masked_fill(mask, -30000.0)


def module_of(kind="padding", dtype=F32, fusion=True, function=None, scale=None, window=None):
    flags = (dtype == F16, dtype == BF16)
    return FusedScaleMaskSoftmax(*flags, AttnMaskType[kind], fusion, function, True, scale, window)


def visible(kind, mask, window, sq, sk):
    """Returns what is visible, [b or 1, 1, sq, sk], from Megatron's documentation."""
    i, j = torch.arange(sq).view(-1, 1), torch.arange(sk)
    seen = torch.ones(1, 1, sq, sk, dtype=torch.bool)
    if "causal" in kind and sq > 1 and (sq == sk or "bottom" in kind):
        seen = seen & (j - sk <= i - sq)
    if mask is not None:
        seen = seen & ~mask.bool()
    if window is not None:
        left, right = (2 * (sq + sk) if x == -1 else x for x in window)
        distance = (sk - j) - (sq - i)  # how far key j is before the key of row i
        seen = seen & (distance <= left) & (distance >= -right)
    return seen


def softmax(x, seen, scale, offset, dtype):
    """Returns the weights by plain maths in `dtype`, 0 where nothing is visible."""
    s = torch.where(seen, x.to(dtype) * (1.0 if scale is None else scale), -torch.inf)
    sink = torch.full((*s.shape[:-1], 1), -torch.inf, dtype=dtype)
    if offset is not None:
        sink = offset.to(dtype).view(-1, 1, 1).expand_as(sink)
    s = torch.cat([s, sink], -1)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    return torch.where(empty, 0.0, torch.where(empty, 0.0, s).softmax(-1))[..., :-1]


@dataclasses.dataclass(frozen=True)
class Draw:
    row: dict[str, Any]
    seed: int = 0


AXES = {
    "kind": list(AttnMaskType.__members__),
    "dtype": [F32, BF16, F16, F64],
    "sizes": [(1, 7), (5, 5), (33, 33), (9, 30), (30, 9), (4, 4100)],
    "mask": [None, "b1", "11", "bn", "uint8"],
    "scale": [None, 0.3, 2],
    "window": [None, (3, 0), (2, 4), (-1, 2), (5, -1)],
    "offset": [False, True],
    "fusion": [True, False],
}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=() if needed else pytest.mark.slow)
        for row, needed in drawn_cases(AXES, 300, lambda row: True)
    ],
    ids=lambda row: "-".join(str(x).removeprefix("torch.") for x in row.values()),
)
def test_against_the_definition(row):
    kind, dtype, sizes, mask, scale, window, offset, fusion = row.values()
    sq, sk = sizes
    needs = kind in ("causal", "padding_causal") and sq not in (1, sk)
    if needs and mask is None and window is None:
        with pytest.raises(ArgumentValueError, match="^input: expected sq = sk or sq = 1"):
            module_of(kind)(torch.zeros(2, H, sq, sk), None)
        return
    module = module_of(kind, dtype, fusion, attention_mask_func, scale, window)

    def answer(draw):
        generator = torch.Generator().manual_seed(draw.seed)

        def randn(*shape):
            return torch.randn(shape, generator=generator, dtype=F64).to(dtype)

        x, grad, sinks = randn(2, H, sq, sk), randn(2, H, sq, sk), randn(H)
        hidden = None
        if mask is not None:
            shape = {"b1": (2, 1), "11": (1, 1), "bn": (2, H), "uint8": (2, 1)}[mask]
            hidden = torch.rand(*shape, sq, sk, generator=generator) < 0.4
            hidden[..., 0, :] = True  # a row that sees nothing
        given = hidden.to(torch.uint8) if mask == "uint8" else hidden
        seen = visible(kind, hidden, window, sq, sk)

        def results(function, to, of_softmax):
            leaves = [t.detach().to(to).requires_grad_() for t in ((x, sinks) if offset else (x,))]
            out = function(*leaves).to(of_softmax or to)
            gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
            named = dict(zip(("dinput", "dsinks"), gradients, strict=False))
            return {"out": out.detach()} | {name: t.to(to) for name, t in named.items()}

        before = x.clone()
        got = results(lambda *leaves: module(leaves[0], given, *leaves[1:]), dtype, None)
        assert torch.equal(x, before)  # mask_func would write to it
        wide = torch.promote_types(dtype, F32)

        def plain(to):
            return lambda *t: softmax(t[0], seen, scale, t[1] if offset else None, to)

        naive = results(plain(wide), dtype, dtype)
        if offset:  # a sum over many rows that cancels
            p = plain(wide)(x.to(wide), sinks.to(wide))
            weight = 1 - p.sum(-1, keepdim=True)
            terms = weight * (p * grad.to(wide)).sum(-1, keepdim=True)
            naive["magnitude of dsinks"] = terms.abs().sum((0, 2, 3))
        return got, results(plain(F64), F64, None), (naive,)

    assert not testing.check_answers(Draw(row), answer)


@pytest.mark.parametrize("kind", ["causal", "padding_causal"])
def test_one_row_sees_everything(kind):
    x = torch.randn(2, H, 1, 7)
    assert torch.equal(module_of(kind)(x, None), masked_softmax(x))


@pytest.mark.parametrize("kind", ["padding", "causal"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_another_mask_func(dtype, kind):
    """It gets the scaled scores, in float32 where asked for, and the caller's mask as it is."""
    x, mask = torch.randn(2, H, 6, 6).to(dtype), torch.rand(2, 1, 6, 6) < 0.4
    mask[:, :, :, 0] = False
    calls = []

    def function(scores, given):
        calls.append(scores)
        assert given is mask
        return other_mask_func(scores, given)

    module = module_of(kind, dtype, function=function, scale=0.3)
    out = module(x, mask)
    assert len(calls) == 1 and calls[0].dtype == F32 and out.dtype == dtype
    torch.testing.assert_close(calls[0], x.float() * 0.3)
    standard = module_of(kind, dtype, scale=0.3)(x, mask)
    torch.testing.assert_close(out, standard, atol=0, rtol=2 * torch.finfo(dtype).eps)
    module(x, None)
    assert len(calls) == 1  # no mask, no call


def test_another_mask_func_without_scale():
    def added(scores, mask):
        return scores + mask

    x, mask = torch.randn(1, H, 4, 6), torch.randn(1, 1, 4, 6)
    out = module_of(function=added)(x, mask)
    torch.testing.assert_close(out, (x + mask).softmax(-1))


def test_a_row_that_sees_nothing():
    x = torch.randn(1, H, 4, 6, requires_grad=True)
    mask = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    mask[:, :, 2] = True
    out = module_of()(x, mask)
    assert not out[:, :, 2].any() and out[:, :, :2].all()
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    assert not gradient[:, :, 2].any() and gradient.isfinite().all()


def test_dtypes_of_the_result():
    x = torch.randn(1, 2, 3, 4)
    for fp16, bf16, in_fp32 in itertools.product([False, True], repeat=3):
        if fp16 and bf16:
            continue
        module = FusedScaleMaskSoftmax(fp16, bf16, 1, True, None, in_fp32, None)
        expected = (F16 if fp16 else BF16) if (fp16 or bf16) and in_fp32 else F32
        out = module(x, None)
        assert out.dtype == expected and torch.equal(out, masked_softmax(x).to(expected))
        assert module.input_in_float16 == (fp16 or bf16)


class Apex(enum.Enum):
    padding = 7
    causal = 8


@pytest.mark.parametrize("kind", [Apex.causal, "causal", 2, AttnMaskType.causal])
def test_mask_types_of_others(kind):
    x = torch.randn(1, 2, 5, 5)
    module = FusedScaleMaskSoftmax(False, False, kind, True, None, True, None)
    assert torch.equal(module(x, None), masked_softmax(x, causal=True))
    assert module.attn_mask_type is kind
    assert [(x.name, x.value) for x in AttnMaskType] == list(
        zip(
            "padding causal no_mask padding_causal arbitrary causal_bottom_right".split(),
            range(1, 7),
            strict=True,
        )
    )


def test_both_ways():
    x, mask = torch.randn(2, H, 5, 7), torch.rand(2, 1, 5, 7) < 0.3
    module = module_of(scale=0.5)
    assert module.is_kernel_available(mask, *x.shape)
    fused, plain = module.forward_fused_softmax(x, mask), module.forward_torch_softmax(x, mask)
    assert torch.equal(module(x, mask), fused)
    torch.testing.assert_close(fused, plain)
    unfused = module_of(scale=0.5, fusion=False)
    assert not unfused.is_kernel_available(mask, *x.shape)
    assert torch.equal(unfused(x, mask), plain)


@pytest.mark.parametrize("learnable", [False, True])
def test_softmax_one(learnable):
    x = torch.randn(2, H, 5, 7)
    offset = torch.nn.Parameter(torch.randn(H)) if learnable else 1.0
    out = SoftmaxOne(-1, offset)(x)
    sink = torch.as_tensor(offset).detach().expand(H).view(1, H, 1, 1).exp()
    expected = x.exp() / (x.exp().sum(-1, keepdim=True) + sink)
    torch.testing.assert_close(out.detach(), expected)
    if learnable:
        assert torch.autograd.grad(out.sum(), offset)[0].all()
    with pytest.raises(NotImplementedError, match="^dim: expected None or -1, got 1"):
        SoftmaxOne(1)


def test_names():
    assert megatron.ScaledMaskedSoftmax is ScaledMaskedSoftmax
    assert megatron.ScaledSoftmax is ScaledSoftmax
    assert megatron.ScaledUpperTriangMaskedSoftmax is ScaledUpperTriangMaskedSoftmax
    assert all(hasattr(megatron, name) for name in megatron.__all__)
    empty = inspect.Parameter.empty
    for function, expected in (
        (
            FusedScaleMaskSoftmax,
            "input_in_fp16, input_in_bf16, attn_mask_type, scaled_masked_softmax_fusion, "
            "mask_func, softmax_in_fp32, scale, window_size=None",
        ),
        (FusedScaleMaskSoftmax.forward, "self, input, mask, softmax_offset=None"),
        (FusedScaleMaskSoftmax.is_kernel_available, "self, mask, b, np, sq, sk"),
        (SoftmaxOne, "dim=None, denominator_offset=1.0"),
    ):
        parameters = inspect.signature(function).parameters.values()
        signature = inspect.Signature([x.replace(annotation=empty) for x in parameters])
        assert str(signature) == f"({expected})"


X = torch.zeros(2, H, 4, 5)
WRONG_CALLS = {
    "input_in_bf16: expected False": lambda: FusedScaleMaskSoftmax(
        True, True, 1, True, None, True, None
    ),
    "softmax_in_fp32: expected True": lambda: FusedScaleMaskSoftmax(
        True, False, 1, True, None, False, 2.0
    ),
    "attn_mask_type: expected one of padding, causal": lambda: FusedScaleMaskSoftmax(
        True, False, "triangle", True, None, False, None
    ),
    r"input: expected \[b, np, sq, sk\]": lambda: module_of()(X[0], None),
    "input: expected a torch.Tensor": lambda: module_of()(None, None),
    "input: expected sq = sk or sq = 1.*bottom_right": lambda: module_of("causal")(X, None),
    "mask: expected bool or uint8": lambda: module_of()(X, X),
    "mask: expected a shape that broadcasts": lambda: module_of()(X, X[..., 1:] == 0),
    "window_size: expected": lambda: module_of(window=(2, -3))(X, None),
    r"sinks: expected shape \[H\]": lambda: module_of()(X, None, torch.zeros(2)),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls(message):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=f"^{message}"):
        WRONG_CALLS[message]()


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_compiled(window):
    module = module_of("causal", scale=0.5, window=window)
    x, mask = torch.randn(2, H, 5, 5), torch.rand(2, 1, 5, 5) < 0.3
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask), module(x, mask))

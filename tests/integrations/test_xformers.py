"""memory_efficient_attention and all masks of xFormers against their definitions in float64."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import inspect
import random
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_attention import ArgumentTypeError, ArgumentValueError, attention
from fused_attention.integrations import xformers
from fused_attention.integrations.xformers import (
    BlockDiagonalMask,
    LowerTriangularMask,
    fmha,
    memory_efficient_attention,
    memory_efficient_attention_backward,
    memory_efficient_attention_forward,
    memory_efficient_attention_forward_requires_grad,
    memory_efficient_attention_partial,
    merge_attentions,
)
from fused_attention.tools import testing

pytestmark = pytest.mark.usefixtures("one_thread")
F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64

# -- The masks, written down key by key from their documentation ---------------------------


class Made(NamedTuple):
    """A mask, the sizes of a call, and which of the keys each query sees, [Mq, Mkv]."""

    mask: Any
    B: int
    seen: torch.Tensor
    keys_of_shape: int  # for materialize, which counts the pages of each sequence


class Sizes(NamedTuple):
    window: int
    left: int
    right: int


def to_end(i, n):
    return n - 1 - i


RULES = {
    "all": lambda i, j, nq, nk, x: True,
    "causal": lambda i, j, nq, nk, x: j <= i,
    "local": lambda i, j, nq, nk, x: i - x.window < j <= i,
    "end": lambda i, j, nq, nk, x: to_end(j, nk) >= to_end(i, nq),
    "end local": lambda i, j, nq, nk, x: 0 <= to_end(j, nk) - to_end(i, nq) < x.window,
    "end window": lambda i, j, nq, nk, x: -x.right <= to_end(j, nk) - to_end(i, nq) <= x.left,
}
# name: the rule within a sequence, the layout of the keys
MASKS = {
    "LowerTriangularMask": ("causal", "dense"),
    "LowerTriangularFromBottomRightMask": ("end", "dense"),
    "LowerTriangularFromBottomRightLocalAttentionMask": ("end local", "dense"),
    "LocalAttentionFromBottomRightMask": ("end window", "dense"),
    "BlockDiagonalMask": ("all", "packed"),
    "BlockDiagonalCausalMask": ("causal", "packed"),
    "BlockDiagonalCausalLocalAttentionMask": ("local", "packed"),
    "BlockDiagonalCausalFromBottomRightMask": ("end", "packed"),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": ("end local", "packed"),
    "BlockDiagonalPaddedKeysMask": ("all", "padded"),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": ("end", "padded"),
    "BlockDiagonalLocalAttentionPaddedKeysMask": ("end window", "padded"),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": ("end local", "padded"),
    "BlockDiagonalGappyKeysMask": ("all", "gappy"),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": ("end", "gappy"),
    "PagedBlockDiagonalPaddedKeysMask": ("all", "paged"),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": ("end", "paged"),
    "PagedBlockDiagonalGappyKeysMask": ("all", "paged gappy"),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": ("end", "paged gappy"),
}


def make_dense(name, r):
    x = Sizes(r.randint(1, 20), r.randint(0, 20), r.randint(0, 20))
    Mq, Mkv = r.randint(1, 50), r.randint(1, 50)
    cls = getattr(xformers, name)
    if "Local" not in name:
        mask = cls()
    elif name.startswith("Lower"):
        mask = r.choice([cls, xformers.LowerTriangularFromBottomRightMask().make_local_attention])(
            x.window
        )
    else:
        mask = cls(x.left, x.right)
    places = [(range(Mq), list(range(Mkv)))]
    return Made(mask, 2, seen_of(name, places, Mq, Mkv, x), Mkv)


def seen_of(name, places, Mq, Mkv, x):
    """places: for each sequence the numbers of its queries and of its keys."""
    rule = RULES[MASKS[name][0]]
    seen = torch.zeros(Mq, Mkv, dtype=torch.bool)
    for rows, columns in places:
        for i, row in enumerate(rows):
            for j, column in enumerate(columns):
                if rule(i, j, len(rows), len(columns), x):
                    seen[row, column] = True
    return seen


def from_packed(name, q, k, x):
    """Makes a mask through the methods of BlockDiagonalMask."""
    mask = BlockDiagonalMask.from_seqlens(q, k)
    return {
        "BlockDiagonalMask": lambda: mask,
        "BlockDiagonalCausalMask": mask.make_causal,
        "BlockDiagonalCausalFromBottomRightMask": mask.make_causal_from_bottomright,
        "BlockDiagonalCausalLocalAttentionMask": lambda: mask.make_local_attention(x.window),
        "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda: (
            mask.make_local_attention_from_bottomright(x.window)
        ),
    }[name]()


def from_padded(cls, q, room, k, x, r):
    if "Local" not in cls.__name__:
        return cls.from_seqlens(q, room, k)
    if "Causal" in cls.__name__:
        return cls.from_seqlens_local(q, room, k, x.window)
    if r.random() < 0.5:
        return cls.from_seqlens_local(q, room, k, x.left, x.right)
    mask = xformers.BlockDiagonalPaddedKeysMask.from_seqlens(q, room, k)
    return mask.make_local_attention(x.left, x.right)


def make_of_sequences(name, r):
    layout, cls = MASKS[name][1], getattr(xformers, name)
    B = r.randint(1, 4)
    q = [r.choice([0, 1, r.randint(1, 30)]) for _ in range(B)]
    k = [r.choice([0, r.randint(1, 40), r.randint(1, 40)]) for _ in range(B)]
    q[0], k[-1] = q[0] + 1, k[-1] + 1  # not everything is empty
    x = Sizes(r.randint(1, 20), r.randint(0, 20), r.randint(0, 20))
    rows = [range(sum(q[:b]), sum(q[: b + 1])) for b in range(B)]
    page_size = r.randint(1, 7)
    starts = [0] * B
    if layout == "packed":
        mask = from_packed(name, q, k, x)
        places, Mkv = [range(sum(k[:b]), sum(k[: b + 1])) for b in range(B)], sum(k)
        keys_of_shape = Mkv
    elif layout == "padded":
        room = max(k) + r.randint(0, 5)
        mask = from_padded(cls, q, room, k, x, r)
        places, Mkv = [range(room * b, room * b + k[b]) for b in range(B)], room * B
        keys_of_shape = Mkv
    elif layout == "gappy":  # in any order, and overlapping
        keys_of_shape = Mkv = max(k) + r.randint(0, 30)
        starts = [r.randint(0, Mkv - n) for n in k]
        mask = cls.from_seqlens(q, [*starts, Mkv], k)
        places = [range(start, start + n) for start, n in zip(starts, k, strict=True)]
    else:
        if layout == "paged gappy":
            starts = [r.randint(0, 9) for _ in range(B)]
        longest = max(start + n for start, n in zip(starts, k, strict=True))
        width = -(-longest // page_size) + r.randint(0, 1)
        pages = list(range(width * B + 2))
        r.shuffle(pages)
        table = [pages[width * b : width * (b + 1)] for b in range(B)]
        places = [
            [
                table[b][n // page_size] * page_size + n % page_size
                for n in range(starts[b], starts[b] + k[b])
            ]
            for b in range(B)
        ]
        tables = torch.tensor(table, dtype=torch.int32)
        mask = paged(cls, q, starts, k, tables, page_size, r)
        Mkv, keys_of_shape = len(pages) * page_size, tables.numel() * page_size
    seen = seen_of(name, list(zip(rows, places, strict=True)), sum(q), Mkv, x)
    return Made(mask, 1, seen, keys_of_shape)


def paged(cls, q, starts, k, tables, page_size, r):
    """Makes a mask of pages by its own class, or from the mask of dense keys."""
    gappy = "Gappy" in cls.__name__
    if r.random() < 0.5:
        lengths = (starts, k) if gappy else (k,)
        return cls.from_seqlens(q, *lengths, tables, page_size, device=torch.device("cpu"))
    room = tables.shape[1] * page_size
    if not gappy:
        mask = xformers.BlockDiagonalPaddedKeysMask.from_seqlens(q, room, k)
        return mask.make_paged(tables, page_size, cls)
    starts = [start + b * room for b, start in enumerate([*starts, 0])]
    mask = xformers.BlockDiagonalGappyKeysMask.from_seqlens(q, starts, k)
    return mask.make_paged(tables, page_size, room, cls)


def make(name, seed, seen=2):
    """seen: how many keys some query sees at least. Where each sees one, all gradients of query and
    key are 0, and the correctness rule allows no rounding error."""
    r = random.Random(f"{name} {seed}")
    while True:
        made = (make_dense if MASKS[name][1] == "dense" else make_of_sequences)(name, r)
        assert type(made.mask).__name__ == name
        if made.seen.sum(1).max() >= seen:
            return made


def test_every_mask_has_a_definition():
    classes = {
        name
        for name, x in vars(xformers).items()
        if inspect.isclass(x) and issubclass(x, xformers.AttentionBias) and name[0] != "_"
    }
    assert classes - {"AttentionBias"} == {*MASKS, "LowerTriangularMaskWithTensorBias"}


@pytest.mark.parametrize("name", MASKS)
def test_materialize(name):
    for seed in range(6):
        made = make(name, seed, seen=0)
        dtype = (F32, BF16, F64)[seed % 3]
        shape = (2, 1, made.seen.shape[0], made.keys_of_shape)
        bias = made.mask.materialize(shape, dtype)
        seen = made.seen
        if "Paged" in name:  # all pages up to the last in use
            seen = seen[:, : (1 + int(made.mask.block_tables.max())) * made.mask.page_size]
        assert bias.dtype == dtype and bias.shape == (*shape[:3], seen.shape[1])
        expected = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -torch.inf)
        assert torch.equal(bias, expected.expand_as(bias))
        if MASKS[name][1] != "dense":
            with pytest.raises(ArgumentValueError, match="^shape: expected .*Mkv"):
                made.mask.materialize((made.seen.shape[0], made.keys_of_shape + 1))


def test_materialize_with_a_bias():
    bias = torch.randn(2, 3, 4, 5)
    mask = LowerTriangularMask().add_bias(bias)
    seen = torch.tensor([[j <= i for j in range(5)] for i in range(4)])
    assert torch.equal(mask.materialize((2, 3, 4, 5)), bias.masked_fill(~seen, -torch.inf))


# -- Attention -----------------------------------------------------------------------------

LAYOUTS = {"BMHK": (3, 3), "BMGHK": (6, 2), "own heads": (6, 6), "BMK": (1, 1), "fewer": (4, 2)}
BIASES = ("LowerTriangularMaskWithTensorBias", "a tensor", "a tensor of sizes 1")


@dataclasses.dataclass(frozen=True)
class Draw:
    row: tuple[Any, ...]
    seed: int = 0


def arranged(x, layout, groups=2):
    """Returns x [B, H, M, K] in a layout of xFormers."""
    x = x.transpose(1, 2)
    if layout == "BMK":
        return x[:, :, 0]
    return x if layout in ("BMHK", "fewer") else x.unflatten(2, (groups, -1))


def arranged_call(leaves, layout):
    """Returns query, key and value in a layout, and the bias or None."""
    query, key, value = (arranged(leaves[name], layout) for name in ("query", "key", "value"))
    if layout == "BMGHK":
        key, value = (x.expand(-1, -1, -1, 3, -1) for x in (key, value))
    bias = leaves.get("bias")
    if bias is not None and layout == "BMK":
        bias = bias[:, 0]
    elif bias is not None and layout in ("BMGHK", "own heads"):
        bias = bias.unflatten(1, (2, 3) if bias.shape[1] == 6 else (1, 1))
    return query, key, value, bias


def called(name, made, leaves, layout, partial, scale):
    """Returns out [B, H, M, K] and lse [B, H, M], or None."""
    query, key, value, bias = arranged_call(leaves, layout)
    if name in MASKS:
        attn_bias = made.mask
    else:
        attn_bias = bias if name.startswith("a tensor") else LowerTriangularMask().add_bias(bias)
    B, Hq, Mq = leaves["query"].shape[:3]
    function = memory_efficient_attention_partial if partial else memory_efficient_attention
    results = function(query, key, value, attn_bias, scale=scale)
    out, lse = results if partial else (results, None)
    assert out.is_contiguous() and out.shape == (*query.shape[:-1], value.shape[-1])
    assert out.dtype == (torch.promote_types(query.dtype, F32) if partial else query.dtype)
    if partial:
        heads = query.shape[2:-1] or (1,)
        assert lse.shape == (B, *heads, Mq)
        lse = lse.reshape(B, Hq, Mq)
    return out.reshape(B, Mq, Hq, -1).transpose(1, 2).to(query.dtype), lse


@pytest.mark.covering
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [*MASKS, *BIASES])
def test_attention(name, layout, dtype, partial):
    scale = 0.31 if partial else None

    def answer(draw):
        made = make(name if name in MASKS else "LowerTriangularMask", draw.seed)
        Mq, Mkv = made.seen.shape
        heads = dict(zip(("Hq", "Hkv"), LAYOUTS[layout], strict=True))
        case = testing.Case(dtype, made.B, Sq=Mq, Sk=Mkv, D=20, Dv=12, scale=scale, **heads)
        biases = {BIASES[0]: "BHQK", BIASES[1]: "BHQK", BIASES[2]: "11QK"}
        case = dataclasses.replace(case, seed=draw.seed, bias=biases.get(name))
        inputs = testing.make_inputs(case)
        if not name.startswith("a tensor"):
            inputs.options["mask"] = made.seen
        grad_lse = inputs.grad_lse if partial else torch.zeros_like(inputs.grad_lse)
        inputs = dataclasses.replace(inputs, grad_lse=grad_lse)
        leaves = inputs.differentiable()
        out, lse = called(name, made, leaves, layout, partial, scale)
        got, outputs, grads = {"out": out.detach()}, [out], [inputs.grad_out]
        if partial:
            got["lse"] = lse.detach()
            outputs.append(lse)
            grads.append(grad_lse.masked_fill(lse.isinf(), 0.0))
        gradients = torch.autograd.grad(outputs, list(leaves.values()), grads)
        got |= {f"d{name}": x for name, x in zip(leaves, gradients, strict=True)}
        exact = testing.exact(inputs)
        return got, {name: exact[name] for name in got}, testing.naive(inputs)

    assert not testing.check_answers(Draw((name, layout, dtype, partial)), answer)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_a_mask(layout):
    Hq, Hkv = LAYOUTS[layout]
    inputs = testing.make_inputs(testing.Case(F64, Hq=Hq, Hkv=Hkv))
    query, key, value, _ = arranged_call(inputs.tensors, layout)
    out = memory_efficient_attention(query, key, value)
    expected = attention(*(inputs.tensors[name] for name in ("query", "key", "value")))
    assert torch.equal(out, arranged(expected, layout))


def drawn(made, dtype=F32, H=2, K=16):
    """Returns query, key and value [B, M, H, K]."""
    Mq, Mkv = made.seen.shape
    return [torch.randn(made.B, M, H, K).to(dtype) for M in (Mq, Mkv, Mkv)]


@pytest.mark.parametrize("name", [name for name in MASKS if MASKS[name][1] != "dense"])
def test_hidden_keys_may_be_nan(name):
    made = make(name, 1)
    query, key, value = drawn(made)
    expected = memory_efficient_attention(query, key, value, made.mask)
    unseen = ~made.seen.any(0)
    if MASKS[name][1] == "packed":  # hidden keys past the last sequence
        key, value = (torch.cat([x, torch.full((1, 3, 2, 16), torch.nan)], 1) for x in (key, value))
    else:
        assert unseen.any()
        key[:, unseen] = value[:, unseen] = torch.nan
    assert torch.equal(memory_efficient_attention(query, key, value, made.mask), expected)


def test_queries_past_the_last_sequence():
    mask = BlockDiagonalMask.from_seqlens([3, 0, 2], [4, 1, 2])
    query, key = torch.randn(1, 9, 2, 8), torch.randn(1, 7, 2, 8)
    out, lse = memory_efficient_attention_partial(query, key, key, mask)
    assert not out[:, 5:].any() and (lse[:, :, 5:] == -torch.inf).all()
    assert torch.equal(out[:, :5], memory_efficient_attention(query[:, :5], key, key, mask))


def test_a_query_without_keys():
    query = torch.randn(2, 7, 2, 8, requires_grad=True)
    key = torch.randn(2, 3, 2, 8, requires_grad=True)
    mask = xformers.LowerTriangularFromBottomRightMask()
    out, lse = memory_efficient_attention_partial(query, key, key, mask)
    assert not out[:, :4].any() and (lse[:, :, :4] == -torch.inf).all()
    dq, dk = torch.autograd.grad(out.sum(), (query, key))
    assert not dq[:, :4].any() and dk.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 2, 8), (2, 0, 2, 8), (2, 5, 0, 8), (2, 5, 3, 0, 8)])
def test_empty_tensors(shape):
    x = torch.zeros(shape, requires_grad=True)
    out = memory_efficient_attention(x, x, x, LowerTriangularMask())
    assert out.shape == shape and torch.autograd.grad(out.sum(), x)[0].shape == shape


def test_no_sequences():
    for mask in (
        BlockDiagonalMask.from_seqlens([]),
        xformers.BlockDiagonalPaddedKeysMask.from_seqlens([], 4, []),
        xformers.BlockDiagonalGappyKeysMask.from_seqlens([], [0], []),
    ):
        x = torch.zeros(1, 0, 2, 8)
        assert memory_efficient_attention(x, x, x, mask).shape == x.shape


def test_the_gradient_of_expanded_keys_is_at_the_first():
    query = torch.randn(1, 5, 2, 3, 8)
    key = torch.randn(1, 7, 2, 1, 8).expand(-1, -1, -1, 3, -1).requires_grad_()
    out = memory_efficient_attention(query, key, key)
    (got,) = torch.autograd.grad(out.sum(), key)
    own = key.detach().contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(memory_efficient_attention(query, own, own).sum(), own)
    assert not got[:, :, :, 1:].any()
    torch.testing.assert_close(got.sum(3), expected.sum(3))


def test_groups_without_expand():
    query, key = torch.randn(2, 5, 2, 3, 8), torch.randn(2, 7, 2, 1, 8)
    expanded = key.expand(-1, -1, -1, 3, -1)
    expected = memory_efficient_attention(query, expanded, expanded)
    assert torch.equal(memory_efficient_attention(query, key, key), expected)
    # Keys with one head for each group, values with all.
    torch.testing.assert_close(
        memory_efficient_attention(query, key, expanded.contiguous()), expected
    )


# -- What runs -----------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records the operators of a call."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removesuffix(".default"))
        return func(*args, **(kwargs or {}))


VIEWS = {"transpose.int", "select.int", "view", "unsqueeze", "expand", "_unsafe_view", "alias"}


@pytest.mark.parametrize("layout", ["BMHK", "BMGHK", "fewer"])
@pytest.mark.parametrize("name", [None, *MASKS])
def test_nothing_is_copied(name, layout):
    """One operator runs; the rest are views, or make the block table of gappy keys."""
    made = make(name or "LowerTriangularMask", 0)
    Hq, Hkv = LAYOUTS[layout]
    Mq, Mkv = made.seen.shape
    tensors = [torch.randn(made.B, M, H, 8).transpose(1, 2) for M, H in ((Mq, Hq), (Mkv, Hkv))]
    query, key, value, _ = arranged_call(
        {"query": tensors[0], "key": tensors[1], "value": tensors[1]}, layout
    )
    with Recorder() as recorder:
        memory_efficient_attention(query, key, value, made.mask if name else None)
    names = [x.removeprefix("aten::") for x in recorder.names]
    kernels = [x for x in names if x.startswith("fused_attention::attention_forward")]
    assert len(kernels) == 1
    if name is None or "Gappy" not in name:
        assert set(names) - VIEWS == set(kernels)


def test_a_bias_is_not_expanded():
    x = torch.randn(2, 5, 4, 8)
    bias = torch.randn(1, 1, 5, 5)
    with Recorder() as recorder:
        memory_efficient_attention(x, x, x, bias)
    assert "aten::expand" not in recorder.names


def foreign(x):
    """Returns a copy of an object of ours as that of another library, by the names of its class and
    attributes."""
    if not type(x).__module__.endswith("integrations.xformers"):
        return x
    attributes = {name: foreign(value) for name, value in vars(x).items()}
    other = type(type(x).__name__, (), {"materialize": None})()
    vars(other).update(attributes)
    return other


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_the_real_package(name):
    made = make(name, 2)
    query, key, value = drawn(made)
    expected = memory_efficient_attention(query, key, value, made.mask)
    other = foreign(made.mask)
    assert not isinstance(other, xformers.AttentionBias)
    assert torch.equal(memory_efficient_attention(query, key, value, other), expected)


def test_dropout_is_that_of_attention():
    made = make("BlockDiagonalCausalMask", 3)
    query, key, value = drawn(made)
    torch.manual_seed(5)
    out = memory_efficient_attention(query, key, value, made.mask, 0.5)
    torch.manual_seed(5)
    q, k = made.mask.q_seqinfo.seqstart, made.mask.k_seqinfo.seqstart
    options = {"cu_seqlens_q": q, "cu_seqlens_k": k, "causal": "top_left", "dropout_p": 0.5}
    assert torch.equal(out[0], attention(query[0], key[0], value[0], **options))
    assert not torch.equal(memory_efficient_attention(query, key, value, made.mask, 0.5), out)
    assert not memory_efficient_attention(query, key, value, p=1.0).any()


def test_autocast():
    x = torch.randn(2, 5, 2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = memory_efficient_attention(x, x, x, LowerTriangularMask())
    half = x.bfloat16()
    assert torch.equal(out, memory_efficient_attention(half, half, half, LowerTriangularMask()))


def test_output_dtype():
    x = torch.randn(2, 5, 2, 8).bfloat16()
    expected = memory_efficient_attention(x, x, x)
    for function in (memory_efficient_attention, memory_efficient_attention_forward):
        out = function(x, x, x, output_dtype=F32)
        assert out.dtype == F32 and torch.equal(out, expected.float())
    out, _ = memory_efficient_attention_partial(x, x, x, output_dtype=BF16)
    assert torch.equal(out, expected)
    out, _ = memory_efficient_attention_partial(x.double(), x.double(), x.double())
    assert out.dtype == F64


# -- The functions without autograd, and partial results -------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["LowerTriangularMask", "PagedBlockDiagonalGappyKeysMask"])
def test_forward_and_backward_apart(name, layout):
    made = make(name, 4)
    Mq, Mkv = made.seen.shape
    Hq, Hkv = LAYOUTS[layout]
    case = testing.Case(F64, made.B, Hq, Hkv, Mq, Mkv)
    leaves = testing.make_inputs(case).differentiable()
    tensors = arranged_call(leaves, layout)[:3]
    expected = memory_efficient_attention(*tensors, made.mask, scale=0.2)
    grad = torch.randn_like(expected)
    out, lse = memory_efficient_attention_forward_requires_grad(*tensors, made.mask, scale=0.2)
    assert torch.equal(out, expected) and not out.requires_grad and not lse.requires_grad
    assert torch.equal(memory_efficient_attention_forward(*tensors, made.mask, scale=0.2), expected)
    got = memory_efficient_attention_backward(grad, out, lse, *tensors, made.mask, scale=0.2)
    wanted = torch.autograd.grad(expected, tensors, grad)
    for x, y in zip(got, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", ["BMHK", "BMGHK"])
def test_backward_of_a_part_of_the_keys(layout):
    """As ring attention does: each part has the results over all keys."""
    leaves = testing.make_inputs(testing.Case(F64, Hq=6, Hkv=6, Sq=9, Sk=13)).differentiable()
    query, key, value, _ = arranged_call(leaves, "BMHK" if layout == "BMHK" else "own heads")
    whole = memory_efficient_attention(query, key, value)
    grad = torch.randn_like(whole)
    wanted = torch.autograd.grad(whole, (query, key, value), grad)
    parts = [(key[:, :5], value[:, :5]), (key[:, 5:], value[:, 5:])]
    partials = [memory_efficient_attention_forward_requires_grad(query, *part) for part in parts]
    out, lse = merge_attentions(*zip(*partials, strict=True))
    torch.testing.assert_close(out, whole)
    got = [memory_efficient_attention_backward(grad, out, lse, query, *part) for part in parts]
    torch.testing.assert_close(got[0][0] + got[1][0], wanted[0])
    for n in (1, 2):
        torch.testing.assert_close(torch.cat([x[n] for x in got], 1), wanted[n])


@pytest.mark.parametrize("layout", ["BMHK", "BMGHK"])
@pytest.mark.parametrize("stacked", [False, True])
def test_merge(layout, stacked):
    query, key, value, _ = arranged_call(
        testing.make_inputs(testing.Case(F64, Hq=6, Hkv=2, Sq=9, Sk=14)).differentiable(),
        "fewer" if layout == "BMHK" else layout,
    )
    parts = [
        memory_efficient_attention_partial(query, key[:, s], value[:, s])
        for s in (slice(0, 7), slice(7, 14))
    ]
    outs, lses = (torch.stack(x) if stacked else list(x) for x in zip(*parts, strict=True))
    out, lse = merge_attentions(outs, lses)
    expected, expected_lse = memory_efficient_attention_partial(query, key, value)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    grad = torch.randn_like(out)
    for got, wanted in zip(
        torch.autograd.grad(out, (query, key), grad, retain_graph=True),
        torch.autograd.grad(expected, (query, key), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    half, nothing = merge_attentions(outs, lses, write_lse=False, output_dtype=torch.float16)
    assert nothing is None and torch.equal(half, out.half())


def test_merge_keeps_what_a_wider_dtype_holds():
    outs = [torch.tensor([1.0]).view(1, 1, 1, 1).bfloat16(), torch.zeros(1, 1, 1, 1).bfloat16()]
    lses = [torch.zeros(1, 1, 1), torch.ones(1, 1, 1)]
    out, _ = merge_attentions(outs, lses, output_dtype=F32)
    torch.testing.assert_close(out.item(), 1 / (1 + torch.e), rtol=1e-6, atol=0)


# -- Tensor lists --------------------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
def test_lists_of_tensors(requires_grad):
    shapes = [(2, 3, 2, 8), (1, 6, 2, 8), (3, 1, 2, 8)]
    tensors = [torch.randn(shape, requires_grad=requires_grad) for shape in shapes]
    mask, x = BlockDiagonalMask.from_tensor_list(tensors)
    assert x.shape == (1, 15, 2, 8)
    assert mask.q_seqinfo.seqstart.tolist() == [0, 3, 6, 12, 13, 14, 15]
    assert (mask.q_seqinfo.max_seqlen, mask.q_seqinfo.min_seqlen) == (6, 1)
    for kind in (mask, mask.make_causal()):
        bias = None if kind is mask else LowerTriangularMask()
        for part, tensor in zip(
            kind.split(memory_efficient_attention(x, x, x, kind)), tensors, strict=True
        ):
            alone = memory_efficient_attention(tensor, tensor, tensor, bias)
            torch.testing.assert_close(part, alone)
    for part, tensor in zip(mask.split_queries(x), tensors, strict=True):
        assert torch.equal(part, tensor)


def test_lists_of_queries_keys_and_values():
    queries = [torch.randn(2, m, 2, 8) for m in (3, 0)]
    keys, values = ([torch.randn(2, m, 2, width) for m in (5, 4)] for width in (8, 6))
    mask, q, k, v = BlockDiagonalMask.from_tensor_lists_qkv(queries, keys, values)
    parts = mask.split_queries(memory_efficient_attention(q, k, v, mask))
    for part, *tensors in zip(parts, queries, keys, values, strict=True):
        torch.testing.assert_close(part, memory_efficient_attention(*tensors))
    for part, tensor in zip(mask.split_kv(k), keys, strict=True):
        assert torch.equal(part, tensor)
    with pytest.raises(ArgumentValueError, match="same lengths.*split_queries"):
        mask.split(q)


@pytest.mark.parametrize("name", MASKS)
def test_to_a_device(name):
    made = make(name, 0)
    moved = made.mask.to("meta")
    assert type(moved) is type(made.mask)
    if MASKS[name][1] != "dense":
        assert moved.q_seqinfo.seqstart.is_meta and moved.k_seqinfo.seqstart.is_meta
        assert vars(moved)["q_seqinfo"].seqstart_py == made.mask.q_seqinfo.seqstart_py
        query = torch.empty(0, device="meta")
        assert xformers._on_device(made.mask, query).k_seqinfo.seqstart.is_meta
    bias = torch.zeros(1, 1, 2, 2)
    assert LowerTriangularMask().add_bias(bias).to("meta")._bias.is_meta


# -- import xformers -----------------------------------------------------------------------


def foreign_code(x):
    """Uses xFormers as other code does."""
    import xformers.ops as xops
    from xformers.ops import fmha, memory_efficient_attention, unbind
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    assert xops.fmha.attn_bias.BlockDiagonalCausalMask is BlockDiagonalCausalMask
    assert fmha.BlockDiagonalMask is BlockDiagonalMask
    query, key, value = unbind(x, 2)
    mask = BlockDiagonalCausalMask.from_seqlens([2, 3])
    return memory_efficient_attention(query, key, value, mask)


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="the real one is here")
def test_code_for_xformers_runs():
    x = torch.randn(1, 5, 3, 2, 8)
    with pytest.raises(ImportError):
        foreign_code(x)
    with xformers.install() as handle:
        out = foreign_code(x)
        package = importlib.import_module("xformers")
        assert importlib.metadata.version("xformers") == package.__version__ == "0.0.33"
        for name in MASKS:
            assert getattr(package.ops.fmha.attn_bias, name) is getattr(xformers, name)
        assert handle.active
    assert importlib.util.find_spec("xformers") is None
    mask = BlockDiagonalMask.from_seqlens([2, 3]).make_causal()
    assert torch.equal(out, memory_efficient_attention(*x.unbind(2), mask))


def test_a_real_xformers_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="^install: xformers is installed or imported"):
        xformers.install()


# -- Signatures and wrong calls --------------------------------------------------------------

CALL = "query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None"
SEQUENCES, PAGES = "q_seqinfo, k_seqinfo", "q_seqinfo, k_seqinfo, block_tables, page_size"
SIGNATURES = {
    "memory_efficient_attention": CALL,
    "memory_efficient_attention_forward": CALL,
    "memory_efficient_attention_forward_requires_grad": CALL,
    "memory_efficient_attention_partial": CALL,
    "memory_efficient_attention_backward": "grad, output, lse, query, key, value, attn_bias=None, "
    "p=0.0, scale=None, *, op=None",
    "merge_attentions": "attn_split, lse_split, write_lse=True, output_dtype=None",
    "LowerTriangularMask": "device=None",
    "LowerTriangularMaskWithTensorBias": "bias",
    "LowerTriangularFromBottomRightMask": "",
    "LowerTriangularFromBottomRightLocalAttentionMask": "_window_size",
    "LocalAttentionFromBottomRightMask": "window_left, window_right",
    "BlockDiagonalMask": f"{SEQUENCES}, _batch_sizes=None",
    "BlockDiagonalCausalMask": f"{SEQUENCES}, _batch_sizes=None",
    "BlockDiagonalCausalLocalAttentionMask": f"{SEQUENCES}, _batch_sizes=None, _window_size=0",
    "BlockDiagonalPaddedKeysMask": SEQUENCES,
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": f"{SEQUENCES}, causal_diagonal=None",
    "BlockDiagonalLocalAttentionPaddedKeysMask": f"{SEQUENCES}, window_left, window_right",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": f"{SEQUENCES}, _window_size",
    "BlockDiagonalGappyKeysMask": SEQUENCES,
    "PagedBlockDiagonalPaddedKeysMask": PAGES,
    "PagedBlockDiagonalGappyKeysMask": PAGES,
    "BlockDiagonalMask.from_seqlens": "q_seqlen, kv_seqlen=None, *, device=None",
    "BlockDiagonalPaddedKeysMask.from_seqlens": "q_seqlen, kv_padding, kv_seqlen, "
    "causal_diagonal=None, *, device=None",
    "BlockDiagonalPaddedKeysMask.make_paged": "self, block_tables, page_size, paged_type",
    "BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local": "q_seqlen, kv_padding, "
    "kv_seqlen, window_left, window_right",
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local": "q_seqlen, kv_padding, "
    "kv_seqlen, window_size",
    "BlockDiagonalGappyKeysMask.from_seqlens": "q_seqlen, kv_seqstarts, kv_seqlen, *, device=None",
    "BlockDiagonalGappyKeysMask.make_paged": "self, block_tables, page_size, notional_padding, "
    "paged_type",
    "PagedBlockDiagonalPaddedKeysMask.from_seqlens": "q_seqlen, kv_seqlen, block_tables, "
    "page_size, *, device=None",
    "PagedBlockDiagonalGappyKeysMask.from_seqlens": "q_seqlen, kv_seqstarts, kv_seqlen, "
    "block_tables, page_size, *, device=None",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_the_originals(name):
    function: Any = fmha.attn_bias
    for part in name.split("."):
        function = getattr(function, part)
    empty = inspect.Parameter.empty
    parameters = inspect.signature(function).parameters.values()
    signature = inspect.Signature([x.replace(annotation=empty) for x in parameters])
    assert str(signature) == f"({SIGNATURES[name]})"


def zeros(*shape, **options):
    return torch.zeros(shape, **options)


X = zeros(1, 6, 2, 8)
PACKED = BlockDiagonalMask.from_seqlens([2, 4])
TABLES = torch.zeros(2, 2, dtype=torch.int32)
WRONG_CALLS = {
    "query: expected dimensions": lambda: memory_efficient_attention(X[0, 0], X, X),
    "query: expected a torch.Tensor": lambda: memory_efficient_attention(None, X, X),
    "key: expected 4 dimensions": lambda: memory_efficient_attention(X, X[0], X),
    "value: expected a torch.Tensor": lambda: memory_efficient_attention(X, X, [X]),
    "value: expected all but": lambda: memory_efficient_attention(X, X, zeros(1, 5, 2, 8)),
    r"key: expected \[B, M, 2, 3, K\]": lambda: memory_efficient_attention(
        zeros(1, 6, 2, 3, 8), zeros(1, 6, 2, 2, 8), zeros(1, 6, 2, 2, 8)
    ),
    "p: expected a probability": lambda: memory_efficient_attention(X, X, X, p=1.5),
    "p: expected a number": lambda: memory_efficient_attention(X, X, X, p=None),
    "attn_bias: expected shape": lambda: memory_efficient_attention(X, X, X, zeros(6, 6)),
    r"attn_bias: expected shape \(1, 2, 6, 6\)": lambda: memory_efficient_attention(
        X, X, X, zeros(1, 6, 6, 2)
    ),
    "attn_bias: expected a floating dtype.*may attend": lambda: memory_efficient_attention(
        X, X, X, zeros(1, 2, 6, 6, dtype=torch.bool)
    ),
    "attn_bias: expected None, a torch.Tensor or": lambda: memory_efficient_attention(
        X, X, X, "causal"
    ),
    "attn_bias: expected a mask for at most 5 queries": lambda: memory_efficient_attention(
        X[:, :5], X, X, PACKED
    ),
    "attn_bias: expected a mask for at most 5 keys": lambda: memory_efficient_attention(
        X, X[:, :5], X[:, :5], PACKED
    ),
    "query: expected batch size 1": lambda: memory_efficient_attention(
        *[X.expand(2, -1, -1, -1)] * 3, PACKED
    ),
    "key: expected batch size 1": lambda: memory_efficient_attention(
        X, *[X.expand(2, -1, -1, -1)] * 2, PACKED
    ),
    "value: expected batch size 1": lambda: memory_efficient_attention(
        X, X, X.expand(2, -1, -1, -1), PACKED
    ),
    "key: expected pages of 4 tokens": lambda: memory_efficient_attention(
        X, X, X, xformers.PagedBlockDiagonalPaddedKeysMask.from_seqlens([2, 4], [1, 1], TABLES, 4)
    ),
    "q_seqlen: expected a list.*tolist": lambda: xformers.BlockDiagonalPaddedKeysMask.from_seqlens(
        torch.ones(2), 3, [1, 1]
    ),
    "seqlens: expected ints >= 0": lambda: BlockDiagonalMask.from_seqlens([2, -1]),
    "kv_seqlen: expected as many": lambda: BlockDiagonalMask.from_seqlens([2, 1], [2]),
    "kv_seqlen: expected lengths of at most kv_padding = 3": lambda: (
        xformers.BlockDiagonalPaddedKeysMask.from_seqlens([2], 3, [4])
    ),
    "kv_seqstarts: expected one number more": lambda: (
        xformers.BlockDiagonalGappyKeysMask.from_seqlens([2], [0], [4])
    ),
    "kv_seqstarts: expected as many": lambda: xformers.PagedBlockDiagonalGappyKeysMask.from_seqlens(
        [2], [0, 1], [4], TABLES, 4
    ),
    "kv_seqlen: expected sequences that end within": lambda: (
        xformers.BlockDiagonalGappyKeysMask.from_seqlens([2], [2, 5], [4])
    ),
    "window_size: expected an int >= 1": lambda: PACKED.make_local_attention(0),
    "window_left: expected an int >= 0": lambda: xformers.LocalAttentionFromBottomRightMask(-1, 1),
    "window_right: expected an int >= 0": lambda: (
        xformers.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local([2], 3, [2], 1, -1)
    ),
    "notional_padding: expected a multiple": lambda: (
        xformers.BlockDiagonalGappyKeysMask.from_seqlens([2], [0, 6], [4]).make_paged(
            TABLES, 4, 6, xformers.PagedBlockDiagonalGappyKeysMask
        )
    ),
    "block_tables: expected room": lambda: xformers.BlockDiagonalGappyKeysMask.from_seqlens(
        [2], [9, 16], [4]
    ).make_paged(TABLES, 4, 16, xformers.PagedBlockDiagonalGappyKeysMask),
    "tensor: expected shape": lambda: PACKED.split(zeros(1, 5, 2)),
    "tensors: expected at least one": lambda: BlockDiagonalMask.from_tensor_list([]),
    "tensors_k: expected tensors of the batch sizes": lambda: (
        BlockDiagonalMask.from_tensor_lists_qkv([X], [X, X])
    ),
    "lse: expected shape": lambda: memory_efficient_attention_backward(
        X, X, zeros(1, 2, 7), X, X, X
    ),
    "output: expected a torch.Tensor": lambda: memory_efficient_attention_backward(
        X, None, zeros(1, 2, 6), X, X, X
    ),
    "grad: expected shape": lambda: memory_efficient_attention_backward(
        X[:, :5], X, zeros(1, 2, 6), X, X, X
    ),
    "output: expected shape": lambda: memory_efficient_attention_backward(
        X, X[:, :5], zeros(1, 2, 6), X, X, X
    ),
    "lse_split: expected tensors of 3 or 4": lambda: merge_attentions([X], [X[0, 0]]),
    "attn_split: expected tensors of 4 or 5": lambda: merge_attentions(
        [X, X.unsqueeze(2)], [zeros(1, 2, 6)] * 2
    ),
    "lses: expected as many": lambda: merge_attentions([X], [zeros(1, 2, 6)] * 2),
    "lses: expected as many as outs, at least one": lambda: merge_attentions([], []),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_calls(message):
    with pytest.raises((ArgumentValueError, ArgumentTypeError), match=f"^{message}"):
        WRONG_CALLS[message]()


class Own(LowerTriangularMask):
    pass


@pytest.mark.parametrize(
    "message, options",
    [
        ("op: expected None, got 'cutlass'.*backend", {"op": "cutlass"}),
        ("op: expected None", {"op": (SimpleNamespace(NAME="fa2F"), None)}),
        ("attn_bias: expected a class of xFormers, got Own.*materialize", {"attn_bias": Own()}),
    ],
)
def test_what_is_not_served(message, options):
    with pytest.raises(NotImplementedError, match=f"^{message}"):
        memory_efficient_attention(X, X, X, **options)
    memory_efficient_attention(X, X, X, op=(None, None))


@pytest.mark.parametrize(
    "function",
    [memory_efficient_attention_partial, memory_efficient_attention_forward_requires_grad],
)
def test_dropout_without_autograd_is_refused(function):
    with pytest.raises(NotImplementedError, match="^p: expected 0.0, as in xFormers"):
        function(X, X, X, p=0.5)
    with pytest.raises(NotImplementedError, match="^p: expected 0.0, as in xFormers"):
        memory_efficient_attention_backward(X, X, zeros(1, 2, 6), X, X, X, p=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, *MASKS])
def test_compiled(name):
    made = make(name or "LowerTriangularMask", 0)
    tensors = [x.requires_grad_() for x in drawn(made)]
    mask = made.mask if name else None

    def call(query, key, value):
        return memory_efficient_attention(query, key, value, mask)

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = compiled(*tensors), call(*tensors)
    torch.testing.assert_close(got, expected)
    for x, y in zip(
        torch.autograd.grad(got.sum(), tensors),
        torch.autograd.grad(expected.sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(x, y)


@pytest.mark.slow
def test_one_compilation_serves_all_lengths():
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    compiled = torch.compile(memory_efficient_attention, fullgraph=True, backend=counter)
    counts = []
    for lengths in ([3, 5], [7, 4, 2], [9, 2, 8], [1, 6, 3, 8], [4, 4, 5, 20, 11]):
        mask = BlockDiagonalMask.from_seqlens(lengths).make_causal()
        x = torch.randn(1, sum(lengths), 2, 8)
        expected = memory_efficient_attention(x, x, x, mask)
        torch.testing.assert_close(compiled(x, x, x, mask), expected)
        counts.append(counter.frame_count)
    assert counts[2] == counts[-1]

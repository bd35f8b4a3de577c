"""FlopCounterMode counts a call of attention as it counts PyTorch's own."""

import importlib
import sys

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from fused_attention import MultiheadAttention, attention, scaled_dot_product_attention
from fused_attention.operators import flops

pytestmark = pytest.mark.usefixtures("one_thread")

aten = torch.ops.aten
int32 = torch.int32


def counted(function, *tensors):
    """Returns the FLOPs of a call, and those of its backward."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    with FlopCounterMode(display=False) as forward:
        out = function(*leaves)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def qkv(B=2, Hq=4, Hkv=4, Sq=9, Sk=13, D=16, Dv=16, device="cpu"):
    shapes = ((B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv))
    return [torch.randn(shape, device=device) for shape in shapes]


@pytest.mark.parametrize("sizes", [{}, {"Hkv": 2}, {"Sq": 1}, {"B": 1, "Sk": 1}], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": "top_left"}, {"window_size": (2, 0)}, {"dropout_p": 0.2}, {"softcap": 2.0}],
    ids=str,
)
def test_as_much_as_the_fused_kernels_of_pytorch(sizes, options):
    """PyTorch has no formula for its fused kernel for CPUs, so its CUDA kernel is counted, without
    a GPU, on meta tensors."""
    theirs = counted(
        lambda *x: aten._scaled_dot_product_flash_attention(*x)[0], *qkv(**sizes, device="meta")
    )
    assert theirs[0] > 0 and 2 * theirs[1] == 5 * theirs[0]
    assert counted(lambda *x: attention(*x, **options), *qkv(**sizes)) == theirs
    with_lse = counted(lambda *x: attention(*x, **options, return_lse=True)[0], *qkv(**sizes))
    assert with_lse == theirs


def test_values_of_another_width():
    tensors = qkv(Dv=24, Hkv=2)
    shapes = [x.shape for x in tensors]
    forward = flop_counter.sdpa_flop_count(*shapes)
    backward = flop_counter.sdpa_backward_flop_count((2, 4, 9, 24), *shapes)
    assert counted(attention, *tensors) == (forward, backward)


class Model(torch.nn.Module):
    """Two layers of attention and an MLP."""

    def __init__(self, function):
        super().__init__()
        self.qkv, self.mlp = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.function = function

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
            x = self.mlp(self.function(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x


def test_a_model_counts_the_same_with_either_function():
    x, counts = torch.randn(2, 11, 32), {}
    for function in (F.scaled_dot_product_attention, scaled_dot_product_attention):
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            Model(function)(x)
        counts[function] = counter.get_total_flops()
        assert counter.get_flop_counts()["Model"]
    theirs, ours = counts.values()
    assert ours == theirs > 0


def test_packed_sequences_count_by_their_lengths():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    import fused_attention.integrations.torch_varlen  # noqa: F401  # kernels for the CPU

    cu_q, cu_k = (torch.tensor(x, dtype=int32) for x in ([0, 4, 4, 9], [0, 6, 8, 20]))
    q, k, v = (torch.randn(n, 4, 8) for n in (9, 20, 20))
    theirs = counted(lambda *x: varlen.varlen_attn(*x, cu_q, cu_k, 5, 12), q, k, v)
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    assert counted(lambda *x: attention(*x, **packed), q, k, v) == theirs
    assert theirs[0] == 4 * 4 * 8 * (4 * 6 + 0 * 2 + 5 * 12)


def test_fake_sequences_count_as_the_longest():
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x = torch.empty(9, 4, 8)
        packed = {"cu_seqlens_q": torch.empty(4, dtype=int32), "max_seqlen_q": 5}
        packed |= {"cu_seqlens_k": torch.empty(4, dtype=int32), "max_seqlen_k": 7}
        attention(x, x, x, **packed)
    assert counter.get_total_flops() == 4 * 4 * 8 * (3 * 5 * 7)


def test_used_lengths_and_pages():
    used = torch.tensor([3, 11], dtype=int32)
    table = torch.arange(4, dtype=int32).view(2, 2)
    q, k, v = qkv(Sq=1)
    pages = torch.randn(4, 8, 4, 16)

    def count(*tensors, **options):
        with FlopCounterMode(display=False) as counter:
            attention(*tensors, **options)
        return counter.get_total_flops() / (4 * 4 * 16)

    assert count(q, k, v, seqused_k=used) == 3 + 11
    assert count(q, pages, pages, seqused_k=used, block_table=table) == 3 + 11
    assert count(q, pages, pages, block_table=table) == 2 * 16
    packed = {"cu_seqlens_q": torch.tensor([0, 1, 2], dtype=int32), "block_table": table}
    assert count(q.squeeze(2), pages, pages, **packed) == 2 * 16


def test_returned_weights_count_the_scores_again():
    module = MultiheadAttention(32, 4, batch_first=True)
    x = torch.randn(2, 9, 32)
    counts = []
    for need_weights in (False, True):
        with FlopCounterMode(display=False) as counter:
            module(x, x, x, need_weights=need_weights)
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == 2 * 2 * 4 * 9 * 9 * 8


def test_traced_modules_count_too():
    q, k, v = qkv()
    traced = torch.jit.trace(lambda *x: attention(*x), (q, k, v))
    assert counted(traced, q, k, v)[0] == counted(attention, q, k, v)[0] > 0


# -- Registration ------------------------------------------------------------------------


def test_every_operator_with_a_matrix_product_has_a_formula():
    for name in flops.MULTIPLY_ADDS:
        assert getattr(torch.ops.fused_attention, name) in flop_counter.flop_registry


def test_formulas_come_with_whichever_is_imported_last(monkeypatch):
    ours = [getattr(torch.ops.fused_attention, name) for name in flops.MULTIPLY_ADDS]
    monkeypatch.setattr(sys, "meta_path", [flops._AfterImport(), *sys.meta_path])
    monkeypatch.setattr(torch.utils, "flop_counter", flop_counter)  # is put back
    monkeypatch.delitem(sys.modules, flops.COUNTER)
    registry = importlib.import_module(flops.COUNTER).flop_registry
    assert registry is not flop_counter.flop_registry and {*ours} <= registry.keys()
    for operator in [x for x in registry if str(x).startswith("fused_attention")]:
        del registry[operator]
    importlib.reload(flops)
    assert {*ours} <= registry.keys()

"""The overhead of a call, with almost nothing to compute (1×1×1×8): results/overhead.csv.

Every surface is called without a gradient and recording one, beside PyTorch's equivalent if there
is one: for functions of other libraries that is scaled_dot_product_attention on views, and for
the function of transformers its own for "sdpa". If `make compat` has fetched flash-attn's source,
its functions are timed too: its own Python, around a stand-in for its CUDA library that computes
nothing and only makes the results. All calls are timed in turn, so that a slow moment affects all.
`--budget 0.5` is quick.
"""

import argparse
import math
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

import result_tables
from fused_attention.integrations import flash_attn, megatron, xformers
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.trial import Call
from fused_attention.tools.benchmark.workloads import REPEATS, repeated, surfaces
from fused_attention.tools.testing import num_threads

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "overhead.csv"
SOURCES = HERE.parent / ".cache" / "compat" / "downloads"  # of `make compat`


class Surface(NamedTuple):
    """The same call of three libraries; `original` is that of the library whose interface it is."""

    ours: Call
    pytorch: Call | None
    original: Call | None = None


def original_flash_attn() -> ModuleType | None:
    """Returns flash_attn.flash_attn_interface around a stand-in, if its source is at hand."""
    found = sorted(SOURCES.glob("flash_attn-*.tar.gz"))
    if not found:
        return None
    with tarfile.open(found[-1]) as files:
        name = f"{found[-1].name.removesuffix('.tar.gz')}/flash_attn/flash_attn_interface.py"
        content = files.extractfile(name)
        assert content is not None
        source = content.read().decode().replace('device_types="cuda"', 'device_types="cpu"')

    def results(lse: tuple[int, ...], *others: int) -> Callable[..., Any]:
        def launch(q: Tensor, *inputs: Any) -> Any:
            return q.new_empty(q.shape), q.new_empty(lse), *(q.new_empty(n) for n in others)

        return launch

    library = ModuleType("flash_attn_2_cuda")
    library.__dict__["fwd"] = results((1, 1, 1), 0, 2)
    library.__dict__["varlen_fwd"] = results((1, 1), 0, 2)
    library.__dict__["fwd_kvcache"] = results((1, 1, 1))
    sys.modules["flash_attn_2_cuda"] = library
    module = ModuleType("flash_attn_interface")
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def of_flash_attn(library: Any, grad: bool) -> dict[str, Call]:
    """Returns calls of flash-attn's functions, which `library` has."""
    q, k, v = (torch.randn(1, 1, 1, 8).requires_grad_(grad) for _ in range(3))
    packed, qkv = (torch.randn(*shape, 8).requires_grad_(grad) for shape in ((1, 1), (1, 1, 3, 1)))
    offset, cache = torch.tensor([0, 1], dtype=torch.int32), torch.randn(2, 1, 4, 1, 8)
    used = {"cache_seqlens": torch.tensor([3], dtype=torch.int32)}
    sequences = (packed, packed, packed, offset, offset, 1, 1)
    calls: dict[str, Call] = {
        "flash_attn_func": lambda: library.flash_attn_func(q, k, v),
        "flash_attn_func, causal": lambda: library.flash_attn_func(q, k, v, causal=True),
        "flash_attn_qkvpacked_func": lambda: library.flash_attn_qkvpacked_func(qkv),
        "flash_attn_varlen_func": lambda: library.flash_attn_varlen_func(*sequences),
        "flash_attn_with_kvcache": lambda: library.flash_attn_with_kvcache(q, *cache, **used),
    }
    if grad:
        del calls["flash_attn_with_kvcache"]  # its results require no gradient
    return calls


class SDPA:
    """flash-attn's functions by PyTorch's scaled_dot_product_attention."""

    @staticmethod
    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)

    @staticmethod
    def flash_attn_qkvpacked_func(qkv: Tensor) -> Tensor:
        return SDPA.flash_attn_func(*qkv.unbind(2))

    @staticmethod
    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *sequences: Any) -> Tensor:
        return SDPA.flash_attn_func(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0))

    @staticmethod
    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor
    ) -> Tensor:
        return SDPA.flash_attn_func(q, k_cache[:, :3], v_cache[:, :3])


def integrations(grad: bool) -> dict[str, Surface]:
    """Returns calls of other libraries' interfaces."""
    libraries = (flash_attn, SDPA, original_flash_attn())
    made = [of_flash_attn(library, grad) if library else {} for library in libraries]
    calls = {
        name: Surface(call, made[1][name], made[2].get(name)) for name, call in made[0].items()
    }
    q, k, v = (torch.randn(1, 1, 1, 8).requires_grad_(grad) for _ in range(3))
    packed = torch.randn(1, 1, 8).requires_grad_(grad)
    sequences = (packed, packed, packed, *[torch.tensor([0, 1], dtype=torch.int32)] * 2, 1, 1)
    mask = xformers.LowerTriangularMask()
    scores = torch.randn(1, 1, 1, 1).requires_grad_(grad)
    softmax = megatron.FusedScaleMaskSoftmax(
        False, False, megatron.AttnMaskType.causal, True, None, True, None
    )
    calls |= {
        "memory_efficient_attention": Surface(
            lambda: xformers.memory_efficient_attention(q, k, v),
            lambda: SDPA.flash_attn_func(q, k, v),
        ),
        "memory_efficient_attention, causal": Surface(
            lambda: xformers.memory_efficient_attention(q, k, v, mask),
            lambda: SDPA.flash_attn_func(q, k, v, causal=True),
        ),
        "torch.nn.attention.varlen_attn": Surface(
            lambda: varlen_attn(*sequences), lambda: SDPA.flash_attn_varlen_func(*sequences)
        ),
        "FusedScaleMaskSoftmax": Surface(
            lambda: softmax(scores, None), lambda: torch.softmax(scores, -1)
        ),
    }
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return calls
    from fused_attention.integrations.transformers import fused_attention_forward

    inputs = nn.Module(), q, k, v, None
    calls["transformers: attention function"] = Surface(
        lambda: fused_attention_forward(*inputs, scaling=0.3, is_causal=True),
        lambda: sdpa_attention_forward(*inputs, scaling=0.3, is_causal=True),
    )
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a surface")
    options = parser.parse_args()
    rows = []
    with num_threads(2), real_time_priority() as real_time:
        for grad in (False, True):
            calls = {}
            measured = {name: Surface(*both) for name, both in surfaces(grad).items()}
            measured |= integrations(grad)
            for name, surface in measured.items():
                for who, call in surface._asdict().items():
                    if call is not None:
                        calls[name, who] = repeated(call)
            timings = interleave(calls, budget=options.budget * len(calls) / 2, max_rounds=4000)
            micros = {call: timing.median * 1e3 / REPEATS for call, timing in timings.items()}
            for name in measured:
                ours, pytorch, original = (
                    micros.get((name, who), math.nan) for who in Surface._fields
                )
                row = {"surface": name, "records a gradient": grad, "us": ours}
                row |= {"PyTorch us": pytorch, "difference us": ours - pytorch}
                rows.append(row | {"original's Python us": original})
                print(
                    f"{name:40} {'gradient' if grad else '':9} {ours:6.2f} us, "
                    f"PyTorch {pytorch:6.2f} us, original's Python {original:6.2f} us"
                )
    result_tables.write(RESULTS, machine() | {"real_time": real_time}, rows)


if __name__ == "__main__":
    main()

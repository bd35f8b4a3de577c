"""The overhead of a call, with almost nothing to compute (1×1×1×8): results/overhead.csv.

Every surface is called without a gradient and recording one, beside PyTorch's equivalent if there
is one: for flash-attn's functions that is scaled_dot_product_attention on transposed views, and for
the function of transformers its own for "sdpa". All calls are timed in turn, so that a slow moment
affects all. `--budget 0.5` is quick.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import result_tables
from fused_attention.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.benchmark.trial import Call
from fused_attention.tools.benchmark.workloads import REPEATS, repeated, surfaces
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.csv"


def integrations(grad: bool) -> dict[str, tuple[Call, Call]]:
    """Returns calls of other libraries' interfaces, and what PyTorch does in the same place."""
    q, k, v = (torch.randn(1, 1, 1, 8).requires_grad_(grad) for _ in range(3))
    packed, qkv = (torch.randn(*shape, 8).requires_grad_(grad) for shape in ((1, 1), (1, 1, 3, 1)))
    offset, cache = torch.tensor([0, 1], dtype=torch.int32), torch.randn(2, 1, 4, 1, 8)
    used = torch.tensor([3], dtype=torch.int32)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    calls: dict[str, tuple[Call, Call]] = {
        "flash_attn_func": (lambda: flash_attn_func(q, k, v), lambda: sdpa(q, k, v)),
        "flash_attn_func, causal": (
            lambda: flash_attn_func(q, k, v, causal=True),
            lambda: sdpa(q, k, v),
        ),
        "flash_attn_qkvpacked_func": (
            lambda: flash_attn_qkvpacked_func(qkv),
            lambda: sdpa(*qkv.unbind(2)),
        ),
        "flash_attn_varlen_func": (
            lambda: flash_attn_varlen_func(packed, packed, packed, offset, offset, 1, 1),
            lambda: sdpa(*(packed.unsqueeze(0) for _ in range(3))),
        ),
    }
    if not grad:
        calls["flash_attn_with_kvcache"] = (
            lambda: flash_attn_with_kvcache(q, *cache, cache_seqlens=used, causal=True),
            lambda: sdpa(q, *cache[:, :, :3]),
        )
    try:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
    except ImportError:
        return calls
    from fused_attention.integrations.transformers import fused_attention_forward

    layer = nn.Module()
    inputs = layer, q, k, v, None
    calls["transformers: attention function"] = (
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
            measured = surfaces(grad) | integrations(grad)
            for name, (ours, theirs) in measured.items():
                calls[name, "ours"] = repeated(ours)
                if theirs is not None:
                    calls[name, "PyTorch"] = repeated(theirs)
            timings = interleave(calls, budget=options.budget * len(calls) / 2, max_rounds=4000)
            micros = {call: timing.median * 1e3 / REPEATS for call, timing in timings.items()}
            for name in measured:
                ours, theirs = micros[name, "ours"], micros.get((name, "PyTorch"), math.nan)
                row = {"surface": name, "records a gradient": grad, "us": ours}
                rows.append(row | {"PyTorch us": theirs, "difference us": ours - theirs})
                print(f"{name:40} {'gradient' if grad else '':9} {ours:6.2f} us {theirs:6.2f} us")
    result_tables.write(RESULTS, machine() | {"real_time": real_time}, rows)


if __name__ == "__main__":
    main()

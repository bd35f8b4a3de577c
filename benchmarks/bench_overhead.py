"""The overhead of a call, with almost nothing to compute (1×1×1×8): results/overhead.csv.

Every surface is called without a gradient and recording one, beside PyTorch's equivalent if there
is one. All calls are timed in turn, so that a slow moment affects all. `--budget 0.5` is quick.
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F

import fused_attention as fa
import result_tables
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "overhead.csv"
REPEATS = 100  # calls per timing, so that the cost of the clock is negligible


def softmax(scores):
    return torch.softmax(scores, -1)


def surfaces(grad):
    """Returns calls by name: ours, and PyTorch's equivalent or None."""
    q, k, v, scores = (torch.randn(1, 1, 1, 8).requires_grad_(grad) for _ in range(4))
    packed = torch.randn(1, 1, 8).requires_grad_(grad)
    offsets = {f"cu_seqlens_{x}": torch.tensor([0, 1], dtype=torch.int32) for x in "qk"}
    mask, bias = torch.ones(1, 1, 1, 1, dtype=torch.bool), torch.zeros(1, 1, 1, 1)
    tokens = torch.randn(1, 1, 8)
    layers = [module(8, 1, batch_first=True) for module in LAYERS]
    for layer in layers:
        layer.requires_grad_(grad).train(grad)

    def sdpa(**options):
        theirs = F.scaled_dot_product_attention
        ours = fa.scaled_dot_product_attention
        return (lambda: ours(q, k, v, **options)), (lambda: theirs(q, k, v, **options))

    def ours(**options):
        return (lambda: fa.attention(q, k, v, **options)), None

    def of_layer(layer):
        return lambda: layer(tokens, tokens, tokens, need_weights=False)

    return {
        "scaled_dot_product_attention": sdpa(),
        "scaled_dot_product_attention, mask": sdpa(attn_mask=mask),
        "scaled_dot_product_attention, dropout": sdpa(dropout_p=0.1),
        "attention": (ours()[0], sdpa()[1]),
        "attention, bias": (ours(bias=bias)[0], sdpa(attn_mask=bias)[1]),
        "attention, dropout": (ours(dropout_p=0.1)[0], sdpa(dropout_p=0.1)[1]),
        "attention, causal and window": ours(causal="top_left", window_size=(3, 0)),
        "attention, softcap": ours(softcap=3.0),
        "attention, return_lse": ours(return_lse=True),
        "attention, packed": (lambda: fa.attention(packed, packed, packed, **offsets), None),
        "masked_softmax": (lambda: fa.masked_softmax(scores), lambda: softmax(scores)),
        "MultiheadAttention": tuple(of_layer(layer) for layer in layers),
    }


LAYERS = (fa.MultiheadAttention, torch.nn.MultiheadAttention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a surface")
    options = parser.parse_args()
    rows = []
    with num_threads(2), real_time_priority() as real_time:
        for grad in (False, True):
            calls = {}
            for name, (ours, theirs) in surfaces(grad).items():
                calls[name, "ours"] = repeated(ours)
                if theirs is not None:
                    calls[name, "PyTorch"] = repeated(theirs)
            timings = interleave(calls, budget=options.budget * len(calls) / 2, max_rounds=4000)
            micros = {call: timing.median * 1e3 / REPEATS for call, timing in timings.items()}
            for name in surfaces(grad):
                ours, theirs = micros[name, "ours"], micros.get((name, "PyTorch"), math.nan)
                row = {"surface": name, "records a gradient": grad, "us": ours}
                rows.append(row | {"PyTorch us": theirs, "difference us": ours - theirs})
                print(f"{name:40} {'gradient' if grad else '':9} {ours:6.2f} us {theirs:6.2f} us")
    result_tables.write(RESULTS, machine() | {"real_time": real_time}, rows)


def repeated(call):
    def run() -> None:
        for _ in range(REPEATS):
            call()

    return run


if __name__ == "__main__":
    main()

"""A training step of an encoder-decoder transformer with PyTorch's attention and with ours:
results/training_step.csv.

nn.Transformer with 3 + 3 layers of width 256 (4 heads of 64, feed-forward 1024), about 4096 tokens
a batch on either side; forward, backward and AdamW. The decoder is causal. "plain" has no dropout
and no padding. The other settings have dropout 0.1, and a quarter of every other sequence is
padding, in float32 and under bfloat16 autocast. Ours is the same model after
`replace_multihead_attention`.
"""

import argparse
import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

import result_tables
from fused_attention import _native, replace_multihead_attention
from fused_attention.tools.benchmark.harness import interleave, machine, real_time_priority
from fused_attention.tools.testing import num_threads

RESULTS = Path(__file__).resolve().parent / "results" / "training_step.csv"
OURS, PYTORCH = "fused_attention", "torch.nn"
WIDTH, TOKENS = 256, 4096
LENGTHS = (40, 128, 512, 1024, 2048)
SETTINGS = {  # (with dropout and padding, with autocast)
    "plain float32": (False, False),
    "dropout and padding, float32": (True, False),
    "dropout and padding, bfloat16 autocast": (True, True),
}


def steps(length: int, regular: bool, autocast: bool) -> dict[str, Callable[[], object]]:
    """Returns a training step of either model, from the same parameters on the same batch."""
    batch = max(2, TOKENS // length)
    theirs = nn.Transformer(
        WIDTH, 4, 3, 3, 4 * WIDTH, dropout=0.1 if regular else 0.0, batch_first=True
    )
    ours = copy.deepcopy(theirs)
    replace_multihead_attention(ours)
    source, target, wanted = (torch.randn(batch, length, WIDTH) for _ in range(3))
    masks = {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(length)}
    masks["tgt_is_causal"] = True
    if regular:
        used = torch.tensor([length, length - length // 4] * batch)[:batch]
        padding = torch.arange(length) >= used.unsqueeze(1)
        padding = torch.zeros(padding.shape).masked_fill(padding, float("-inf"))
        for name in ("src", "tgt", "memory"):
            masks[f"{name}_key_padding_mask"] = padding

    def step_of(model: nn.Module) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step() -> None:
            context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            with context:
                loss = nn.functional.mse_loss(model(source, target, **masks).float(), wanted)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    return {PYTORCH: step_of(theirs), OURS: step_of(ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a case")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    rows = []
    with num_threads(options.threads), real_time_priority() as real_time:
        for setting, (regular, autocast) in SETTINGS.items():
            for length in options.lengths:
                torch.manual_seed(0)
                calls = steps(length, regular, autocast)
                timings = interleave(calls, budget=options.budget, warmup=1)
                ratio = timings[PYTORCH].median / timings[OURS].median
                rows += result_tables.beside({"setting": setting, "length": length}, timings, OURS)
                disturbed = any(timing.disturbed for timing in timings.values())
                print(
                    f"{setting:40} S {length:5} {timings[OURS].median:8.1f} ms"
                    f"  torch.nn / ours {ratio:.2f}",
                    "(disturbed)" if disturbed else "",
                    flush=True,
                )
    about = machine() | {"isa": _native.active_isa(), "threads": options.threads}
    result_tables.write(RESULTS, about | {"real_time": real_time}, rows)
    print("saved", RESULTS.name)


if __name__ == "__main__":
    main()

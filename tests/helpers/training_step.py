"""Training steps of a small torch.nn.Transformer with our attention, in one process or in two.

A process that torch.multiprocessing spawns imports this module and calls `worker`.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fused_attention import MultiheadAttention, replace_multihead_attention

WIDTH, BATCH, LENGTH = 16, 4, 11


def make_model(dropout):
    torch.manual_seed(3)
    model = nn.Transformer(WIDTH, 2, 1, 1, 32, dropout=dropout, batch_first=True)
    replace_multihead_attention(model)
    assert any(isinstance(x, MultiheadAttention) for x in model.modules())
    return model


def make_batch():
    torch.manual_seed(4)
    source, target, wanted = (torch.randn(BATCH, LENGTH, WIDTH) for _ in range(3))
    padding = torch.arange(LENGTH) >= torch.tensor([[11], [8], [9], [11]])
    return source, target, wanted, padding


def loss_of(model, source, target, wanted, padding):
    mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, dtype=torch.bool)
    paddings = {f"{name}_key_padding_mask": padding for name in ("src", "tgt", "memory")}
    out = model(source, target, tgt_mask=mask, tgt_is_causal=True, **paddings)
    return nn.functional.mse_loss(out, wanted)


def train(model, batch, seed):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(seed + step)
        loss_of(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name.removeprefix("module."): x.detach() for name, x in model.named_parameters()}


def worker(rank, port, dropout, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(make_model(dropout))
    half = [x.chunk(2)[rank] for x in make_batch()]
    results[rank] = {name: x.numpy() for name, x in train(model, half, 10 * rank).items()}
    dist.destroy_process_group()

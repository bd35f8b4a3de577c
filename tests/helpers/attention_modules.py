"""Pairs of torch.nn.MultiheadAttention and our module, with the same parameters."""

import torch
from torch import nn

from fused_attention import MultiheadAttention

N, L, S, E, HEADS = 3, 5, 7, 24, 4  # batch, queries, keys, width, heads


def pair(dtype=torch.float64, **options):
    """Returns torch.nn.MultiheadAttention, and our module with the same parameters."""
    theirs = nn.MultiheadAttention(E, HEADS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases start as 0
            parameter.normal_(std=0.3)
    ours = MultiheadAttention(E, HEADS, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def sequence(length, features=E, batch_first=False, batched=True, dtype=torch.float64):
    shape = (N, length) if batch_first else (length, N)
    return torch.randn(*(shape if batched else (length,)), features, dtype=dtype)

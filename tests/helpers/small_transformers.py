"""A small transformer of each kind, and sequences of different lengths for it."""

import dataclasses

import torch
from torch import nn

from fused_attention.models.transformer import Config, Transformer

SMALL = Config(vocab_size=23, encoder_layers=2, decoder_layers=2, dim=32, heads=4, hidden=48)

KINDS = {
    "as in the paper": dataclasses.replace(SMALL, norm_first=False),
    "norm first": SMALL,
    "encoder only": dataclasses.replace(
        SMALL, decoder_layers=0, positions="learned", embedding_norm=True, activation="gelu"
    ),
    "decoder only": dataclasses.replace(
        SMALL,
        encoder_layers=0,
        kv_heads=2,
        norm="rms",
        positions="rotary",
        activation="swiglu",
        bias=False,
        scale_embedding=False,
    ),
    "rotary, one key head, own logits": dataclasses.replace(
        SMALL, positions="rotary", kv_heads=1, tied=False
    ),
}

SOURCES = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13, 14]]

TARGETS = [[1, 2], [3, 4, 5, 6, 7], [8, 9, 10]]


def model_of(kind, attention="fused", **changes):
    torch.manual_seed(1)
    model = Transformer(dataclasses.replace(KINDS[kind], **changes), attention).eval()
    for parameter in model.parameters():  # biases and norms too
        nn.init.normal_(parameter, std=0.3)
    return model

"""Small valid calls of `attention`, by the names of its arguments."""

import torch

int32 = torch.int32


def qkv(B=2, Hq=4, Hkv=2, Sq=5, Sk=7, D=8, Dv=8, **options):
    shapes = [(B, Hq, Sq, D), (B, Hkv, Sk, D), (B, Hkv, Sk, Dv)]
    return {
        name: torch.randn(shape, **options)
        for name, shape in zip(("query", "key", "value"), shapes, strict=True)
    }


PACKED = {
    "query": torch.randn(6, 4, 8),
    "key": torch.randn(9, 2, 8),
    "value": torch.randn(9, 2, 8),
    "cu_seqlens_q": torch.tensor([0, 2, 6], dtype=int32),
    "cu_seqlens_k": torch.tensor([0, 4, 9], dtype=int32),
}

PAGED = {
    "query": torch.randn(2, 4, 3, 8),
    "key": torch.randn(5, 4, 2, 8),
    "value": torch.randn(5, 4, 2, 8),
    "block_table": torch.tensor([[0, 1], [2, 3]], dtype=int32),
    "seqused_k": torch.tensor([5, 8], dtype=int32),
}

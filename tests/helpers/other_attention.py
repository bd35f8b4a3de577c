"""Right implementations of attention by others: `verify --contract torch` must pass them."""

import math

import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def naive(query, key, value, mask=None, causal=False, scale=None):
    """Is what one writes first: a fully masked row is NaN."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    group = query.shape[1] // key.shape[1]
    k, v = (x.repeat_interleave(group, 1).to(dtype) for x in (key, value))
    s = scale * (query.to(dtype) @ k.mT)
    if causal:
        off = s.shape[-1] - s.shape[-2] if causal == "bottom_right" else 0
        s = s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1 + off), -math.inf)
    if mask is not None:
        s = s.masked_fill(~mask, -math.inf)
    return (s.softmax(-1) @ v).to(query.dtype)


def flex(query, key, value, mask=None, bias=None, causal=False, window_size=(-1, -1), scale=None):
    """Is PyTorch's FlexAttention, not compiled."""
    B, Hq, Sq, Sk = *query.shape[:3], key.shape[2]
    off = Sk - Sq if causal == "bottom_right" else 0
    left, right = (Sq + Sk if side < 0 else side for side in window_size)
    right = 0 if causal else right
    mask = torch.tensor(True) if mask is None else mask
    bias = torch.tensor(0, dtype=query.dtype) if bias is None else bias
    mask, bias = (x.expand(B, Hq, Sq, Sk) for x in (mask, bias))

    def visible(b, h, i, j):
        return (j >= i + off - left) & (j <= i + off + right) & mask[b, h, i, j]

    def added(s, b, h, i, j):
        return s + bias[b, h, i, j]

    blocks = create_block_mask(visible, B, Hq, Sq, Sk, device="cpu")
    return flex_attention(query, key, value, added, blocks, scale, Hq != key.shape[1])

"""Calls as a typed program makes them. `make lint` checks them, and so does test_types.py with
`mypy --strict`."""

import torch
from torch import Tensor
from torch.nn.attention.bias import CausalVariant

import fused_attention as fa


def check(query: Tensor, key: Tensor, value: Tensor, flag: bool) -> Tensor:
    out: Tensor = fa.attention(query, key, value)
    out = fa.attention(query, key, value, causal="top_left", window_size=(3, 0), softcap=2)
    out = fa.attention(query, key, value, causal=CausalVariant.LOWER_RIGHT, backend="cpu")
    both: tuple[Tensor, Tensor] = fa.attention(query, key, value, return_lse=True)
    either: Tensor | tuple[Tensor, Tensor] = fa.attention(query, key, value, return_lse=flag)
    out = fa.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.5)
    out = fa.masked_softmax(out, scale=0.5, causal=True)
    out = fa.masked_softmax_(out)
    merged, lse = fa.merge_attention_states([out], [both[1]])
    kept: Tensor = fa.dropout_mask(1, 2, 3, 4, 0.5, philox_seed=7)
    weights: Tensor = fa.attention_weights(query, key, causal="top_left", reduce="mean")
    mass: Tensor | None = fa.attention_statistics(query, key, outputs=("mass",), scale=1.0).mass
    fa.kv_cache_append_(key, value, key, value, torch.zeros(1, dtype=torch.int32))
    print(fa.explain(query, key, value, bias=kept), either, merged, lse, weights, mass)
    with fa.patch_sdpa() as patch:
        print(patch.active)
    return out

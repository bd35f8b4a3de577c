"""Checks of keys that no query sees, and of queries that see no key, beside NaN and infinity.

test_gpu.py puts a function that computes on a GPU in place of `attention`.
"""

import math

import torch

from fused_attention import attention, reference

INF, NAN = math.inf, math.nan


def make(dtype=torch.float32, B=2, Hq=2, Hkv=2, Sq=53, Sk=107, D=20, Dv=12):
    return (
        torch.randn(B, Hq, Sq, D).to(dtype),
        torch.randn(B, Hkv, Sk, D).to(dtype),
        torch.randn(B, Hkv, Sk, Dv).to(dtype),
    )


def gradients(out, *inputs):
    return torch.autograd.grad(out, inputs, torch.randn_like(out))


NOT_SEEN = {
    "key_padding_mask": lambda B, Sq, Sk: {
        "key_padding_mask": torch.arange(Sk).expand(B, Sk) % 3 == 1
    },
    "mask column": lambda B, Sq, Sk: {
        "mask": (torch.arange(Sk) % 3 != 1).expand(1, 1, Sq, Sk).contiguous()
    },
    "broadcast mask column": lambda B, Sq, Sk: {"mask": (torch.arange(Sk) % 3 != 1)},
    "right of a causal mask": lambda B, Sq, Sk: {"causal": "top_left"},
    "left of a window": lambda B, Sq, Sk: {"causal": "bottom_right", "window_size": (4, 0)},
    "mask and causal together": lambda B, Sq, Sk: {
        "mask": torch.arange(Sq).view(Sq, 1) + 20 > torch.arange(Sk),
        "causal": "bottom_right",
        "window_size": (40, 0),
    },
}


def check_unseen_keys(how, junk, dtype):
    query, key, value = make(dtype)
    B, _, Sq, _ = query.shape
    Sk = key.shape[2]
    options = NOT_SEEN[how](B, Sq, Sk)
    seen = reference.visible(
        (B, 2, Sq, Sk),
        reference.diagonal_offset(options.get("causal", False), Sq, torch.full((B,), Sk)),
        torch.full((B,), Sk),
        options.get("causal", False),
        options.get("window_size", (-1, -1)),
        options.get("mask"),
        options.get("key_padding_mask"),
    )
    hidden = ~seen.any(2)
    assert hidden.any() and seen.any()
    results = []
    for fill in (0.0, junk):
        k = torch.where(hidden.unsqueeze(-1), fill, key).to(dtype).requires_grad_()
        v = torch.where(hidden.unsqueeze(-1), fill, value).to(dtype).requires_grad_()
        q = query.clone().requires_grad_()
        torch.manual_seed(1)
        out, lse = attention(q, k, v, **options, return_lse=True, backend="cpu")
        results.append((out, lse, *gradients(out, q, k, v)))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)
    _, _, _, dk, dv = results[1]
    assert (dk[hidden] == 0).all() and (dv[hidden] == 0).all()


def check_blind_rows(dtype, sinks):
    query, key, value = (x.requires_grad_() for x in make(dtype))
    mask = torch.rand(1, 1, 53, 107) < 0.8
    blind = torch.arange(53) % 5 == 2
    mask[:, :, blind] = False
    sink = torch.randn(2, dtype=torch.promote_types(dtype, torch.float32)) if sinks else None
    with torch.no_grad():
        query[:, :, blind] = NAN  # must not reach the results of other rows
    out, lse = attention(query, key, value, mask=mask, sinks=sink, return_lse=True, backend="cpu")
    assert (out[:, :, blind] == 0).all()
    expected = torch.full_like(lse[:, :, blind], -INF) if sink is None else sink.view(1, 2, 1)
    torch.testing.assert_close(lse[:, :, blind], expected.expand_as(lse[:, :, blind]))
    if not sinks:
        dq, dk, dv = gradients(out, query, key, value)
        assert (dq[:, :, blind] == 0).all()
        assert all(x.isfinite().all() for x in (out, dq, dk, dv))

"""Attention maps agree with the naive weights, whatever is asked, in linear memory."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch

from fused_attention.errors import ArgumentValueError
from fused_attention.models import maps
from fused_attention.models.attend import pack, pad
from fused_attention.models.maps import AttentionMap, align, attention_maps
from fused_attention.reference import attention_reference
from small_transformers import SOURCES, TARGETS, model_of

pytestmark = pytest.mark.usefixtures("one_thread")

B, H, SQ, SK, D = 2, 4, 37, 53, 8


def make_cases():
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    padding = torch.arange(SK) >= torch.tensor([[50], [31]])
    return {
        "plain": {},
        "causal, top-left": {"causal": "top_left"},
        "causal, bottom-right": {"causal": "bottom_right"},
        "window": {"causal": "bottom_right", "window_size": (9, 0)},
        "window, bottom-right": {"diagonal": "bottom_right", "window_size": (9, 2)},
        "rows without a key": {"window_size": (3, 3), "key_padding_mask": padding.clone().flip(1)},
        "padding": {"key_padding_mask": padding},
        "mask": {"mask": random(B, 1, SQ, SK) > 0},
        "a mask per head": {"mask": random(H, 1, SK) > 0},
        "bias": {"bias": random(1, H, SQ, SK), "scale": 0.7},
        "softcap and ALiBi": {
            "softcap": 2.0,
            "alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.2]),
            "causal": "bottom_right",
        },
        "ALiBi per sequence": {"alibi_slopes": random(B, H).abs()},
        "sinks": {"sinks": random(H)},
    }


CASES = make_cases()


def naive_weights(query, key, options):
    """Returns what attention gives for values that are the identity."""
    identity = torch.eye(key.shape[2], dtype=key.dtype).expand(*key.shape[:2], -1, -1)
    return attention_reference(query, key, identity, **options)


@pytest.mark.parametrize("name", maps.NOT_OF_MAPS)
def test_what_a_map_has_no_meaning_for_is_refused(name):
    with pytest.raises(TypeError, match=name):
        AttentionMap(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), **{name: 1})


@pytest.mark.parametrize("kv_heads", [H, 2])
@pytest.mark.parametrize("case", CASES)
def test_every_answer_equals_that_of_the_naive_weights(case, kv_heads, monkeypatch):
    monkeypatch.setattr(maps, "BLOCK_ELEMENTS", 5 * B * H * SK)  # blocks of five rows, then of two
    query, key = torch.randn(B, H, SQ, D), torch.randn(B, kv_heads, SK, D)
    expected = naive_weights(query, key, CASES[case])
    found = AttentionMap(query, key, **CASES[case])
    assert found.shape == (B, H, SQ, SK)

    def compare(ours, theirs):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)

    compare(found.rows(), expected)
    compare(found.rows(rows=[30, 2, 36], heads=[3, 1]), expected[:, [3, 1]][:, :, [30, 2, 36]])
    compare(found.key_sums(), expected.sum(2))
    entropy = torch.where(expected > 0, -expected * expected.log(), 0.0).sum(-1)
    compare(found.entropy(), entropy)
    weights, keys = found.top_keys(4)
    compare(weights, expected.topk(4).values)
    compare(weights, expected.gather(-1, keys).masked_fill(weights == 0, 0.0))
    assert len(list(found.blocks())) == 8


def test_float64_and_16_bit():
    query, key = torch.randn(1, 2, 9, D), torch.randn(1, 2, 9, D)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 1e-6)):
        q, k = query.to(dtype), key.to(dtype)
        found = AttentionMap(q, k, causal=True).rows()
        expected = naive_weights(q.double(), k.double(), {"causal": True})
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance * 10)


@pytest.mark.parametrize("kind", ["norm first", "decoder only", "encoder only"])
@pytest.mark.parametrize("batch", [pad, pack])
def test_maps_of_a_model_are_what_its_naive_attention_computes(kind, batch, monkeypatch):
    model = model_of(kind).double()
    inputs = [*batch(TARGETS), *batch(SOURCES)]
    if model.encoder is None:
        inputs = inputs[:2]
    run = model
    if model.decoder is None:
        run, inputs = model, inputs[2:]
        monkeypatch.setattr(model, "forward", lambda *inputs: model.encode(*inputs).hidden)
    found = attention_maps(run, *inputs)
    softmax, expected = torch.Tensor.softmax, []

    def recorded(s, dim):
        expected.append(softmax(s, dim))
        return expected[-1]

    monkeypatch.setattr(torch.Tensor, "softmax", recorded)
    with torch.no_grad():
        run.use_attention("naive")(*inputs)
    names = {
        "norm first": ["encoder.blocks.{}.self_attention"]
        + ["decoder.blocks.{}.self_attention", "decoder.blocks.{}.cross_attention"],
        "decoder only": ["decoder.blocks.{}.self_attention"],
        "encoder only": ["encoder.blocks.{}.self_attention"],
    }[kind]
    assert sorted(found) == sorted(name.format(i) for name in names for i in range(2))
    assert len(expected) == len(found)
    for (name, ours), theirs in zip(found.items(), expected, strict=True):
        assert theirs.std() > 0.05
        for b, sequence in enumerate(SOURCES if name.startswith("encoder") else TARGETS):
            rows = range(len(sequence))
            torch.testing.assert_close(
                ours.rows(rows)[b], theirs[b, :, rows], atol=1e-10, rtol=1e-10, msg=name
            )
    assert not any(module._forward_hooks for module in model.modules())


def test_wrong_calls():
    found = AttentionMap(torch.randn(1, 2, 5, D), torch.randn(1, 2, 7, D))
    with pytest.raises(ArgumentValueError, match=r"rows: expected numbers in \[0, 5\)"):
        found.rows([5])
    with pytest.raises(ArgumentValueError, match=r"heads: expected numbers in \[0, 2\)"):
        found.rows(heads=[-1])
    with pytest.raises(ArgumentValueError, match=r"n: expected an int in \[1, 7\], got 8"):
        found.top_keys(8)
    with pytest.raises(ArgumentValueError, match="model: expected one of fused_attention.models"):
        attention_maps(torch.nn.Linear(2, 2), torch.randn(2))
    model = model_of("decoder only")
    with maps.record_maps(model), pytest.raises(ArgumentValueError, match="not steps with a cache"):
        model.step(torch.ones(1, 2, dtype=torch.long), model.start(None, 1, 4))


def paths(T, S):
    """Yields every monotonic path from (0, 0) to (T - 1, S - 1)."""
    if (T, S) == (1, 1):
        yield [(0, 0)]
    for di, dj in ((1, 1), (1, 0), (0, 1)):
        if T - di >= 1 and S - dj >= 1:
            yield from ([*path, (T - 1, S - 1)] for path in paths(T - di, S - dj))


def test_align_finds_the_best_path():
    for T, S in itertools.product((1, 3, 4), (1, 4, 5)):
        weights = torch.randn(T, S, dtype=torch.float64)
        best = max(paths(T, S), key=lambda path: sum(weights[i, j] for i, j in path))
        assert align(weights) == best


CHILD = """
import json, sys
import torch
from fused_attention.models.maps import AttentionMap

torch.set_num_threads(1)

def peak(S):
    q, k = torch.randn(1, 4, S, 32), torch.randn(1, 4, S, 32)
    with open("/proc/self/clear_refs", "w") as clear_refs:
        clear_refs.write("5")
    before = resident("VmRSS")
    found = AttentionMap(q, k, causal=True)
    found.entropy(), found.key_sums(), found.top_keys(5), found.rows([0, S - 1])
    return resident("VmHWM") - before

def resident(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field)) / 1024

peak(256)
print(json.dumps([peak(2048), peak(4096)]))
"""


@pytest.mark.serial
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_is_linear():
    """All the weights at S = 4096 would be 256 MiB, 64 at 2048."""
    # With a fixed threshold the allocator gives freed memory back at once, instead of keeping some.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    run = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    half, whole = json.loads(run.stdout)
    print(f"S = 2048: {half:.1f} MiB, 4096: {whole:.1f} MiB")
    assert whole < 48 and whole < 2.2 * half

"""Compiles the Triton kernels with the real compiler, for every target, without a GPU.

The interpreter accepts what the compiler refuses, and knows nothing of registers and shared memory.
Kernels for {target, kernel, dtype, head size, features} must compile and fit. With --full they are
a covering set, in which every two values of two axes meet; otherwise the part of it that covers
most. The main configurations must hardly spill, and must use the matrix and copy instructions of
the target.
"""

import itertools
import random

import pytest
import torch

import main_loop
from compile_kernels import Request, compiled, instruction_counts, measured

pytest.importorskip("triton")

from fused_attention.kernels import launch, tiles

TARGETS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]
ATTENTION = ["attention_forward_kernel", "attention_dkdv_kernel", "attention_dq_kernel"]

pytestmark = pytest.mark.timeout(3600)  # a cold cache on a busy machine


def fits(target: str, result) -> bool:
    return result["shared"] <= tiles.ARCHS[target].shared_bytes


# -- The main configurations ---------------------------------------------------------------

MAIN = [
    Request(target, kernel, dtype, D, causal=1)
    for target in ("sm_80", "sm_90")
    for kernel in ATTENTION
    for dtype, D in (("float16", 64), ("bfloat16", 128))
] + [
    Request(target, "attention_forward_kernel", "bfloat16", D, causal=1)
    for target in ("sm_100", "sm_120", "gfx942", "gfx950")
    for D in (64, 128)
]
MAIN += [
    Request(target, "attention_decode_kernel", "bfloat16", 128, Hkv=1, Sq=1, Sk=4096, **places)
    for places, targets in (({}, TARGETS), ({"used": True, "page_size": 16}, ["sm_90", "gfx942"]))
    for target in targets
]


def request_id(request: Request) -> str:
    default = Request("", "")
    changed = {
        name: value for name, value in vars(request).items() if value != getattr(default, name)
    }
    return ",".join(str(value).removesuffix("_kernel") for value in changed.values())


@pytest.mark.parametrize("request_", MAIN, ids=request_id)
def test_main_configurations(request_):
    """Main configurations have hardly a stack, and the instructions that make them fast."""
    result = measured(request_)
    assert fits(request_.target, result), result
    assert result["stack"] <= 80, result
    must_have = {
        "sm_80": ["mma"],
        "sm_90": ["wgmma"],
        "sm_100": ["tcgen05"],
        "sm_120": ["mma"],
    }.get(request_.target, ["mfma"])
    if request_.kernel == "attention_decode_kernel" and request_.target.startswith("sm_"):
        must_have = ["mma"]  # wgmma and tcgen05 have no tiles of 16 rows
    if request_.target.startswith("sm_"):
        if request_.kernel.endswith("decode_kernel") or request_.target == "sm_80":
            must_have.append("cp.async")
        else:
            must_have.append("tma")
    for name in must_have:
        assert result[name] > 0, (name, result)


SPECIAL = tiles.Tiles(128, 128, 8, 2, warp_specialize=True)


def specialized(monkeypatch, target: str, causal: int, D: int = 64, forced: bool = False):
    monkeypatch.setitem(tiles._TABLE, ("forward", target, 16), {D: SPECIAL})
    if forced:
        monkeypatch.setattr(launch, "can_specialize", lambda *rest: True)
    return compiled(Request(target, "attention_forward_kernel", "bfloat16", D, causal=causal))


@pytest.mark.parametrize("D", [64, 128])
def test_warp_specialization(monkeypatch, D):
    """There are more warps than asked for, no stack, and still the target's instructions."""
    one, code = specialized(monkeypatch, "sm_100", 0, D)
    assert code.threads > 32 * one.num_warps
    assert code.shared <= tiles.ARCHS["sm_100"].shared_bytes
    assert main_loop.resources(code.binary)["stack"] == 0
    counts = instruction_counts(code.assembly)
    assert counts["tcgen05"] and counts["tma"]


def test_warp_specialization_is_still_refused_where_it_was(monkeypatch):
    """When this fails, Triton compiles more than before: see `launch.can_specialize`."""

    def is_refused(D):
        try:
            specialized(monkeypatch, "sm_100", 1, D, forced=True)
        except RuntimeError as error:
            return "PassManager" in str(error)
        return False

    # Once in many times Triton 3.9 compiles the same call, and its cache then keeps the result.
    assert any(is_refused(D) for D in (64, 128))
    one, code = specialized(monkeypatch, "sm_90", 0, forced=True)
    assert code.threads == 32 * one.num_warps  # it changes nothing


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_the_highest_precision_of_float32_uses_no_tf32(target):
    highest = measured(Request(target, "attention_forward_kernel", "float32", 64))
    assert highest["tf32"] == 0 and highest["mma"] + highest["wgmma"] > 0
    medium = measured(Request(target, "attention_forward_kernel", "float32", 64, precision=2))
    assert medium["tf32"] > 0


# -- The covering set ----------------------------------------------------------------------

KERNELS = [
    *ATTENTION,
    *("attention_delta_kernel", "attention_dbias_kernel", "attention_dsinks_kernel"),
    *("dropout_keep_mask_kernel", "attention_decode_kernel", "attention_combine_kernel"),
    *("attention_weights_kernel", "attention_weights_delta_kernel"),
]
SOFTMAX = [
    *("masked_softmax_kernel", "masked_softmax_backward_kernel"),
    *("masked_softmax_dbias_kernel", "masked_softmax_dsinks_kernel"),
]
FEATURES = {
    "plain": {},
    "causal": {"causal": 2, "Sq": 1000},
    "window": {"window": (100, 50), "Sk": 777},
    "mask": {"mask": "B1QK"},
    "key padding, gqa": {"key_padding": True, "Hkv": 2},
    "bias": {"bias": "1HQK", "causal": 1},
    "bias of keys, softcap": {"bias": "BH1K", "softcap": 20.0},
    "alibi, sinks": {"alibi": True, "sinks": True},
    "dropout": {"dropout_p": 0.1, "causal": 1},
    "packed": {"packed": True, "causal": 2, "sinks": True},
    "packed, used": {"packed": True, "used": True, "Hkv": 2, "window": (100, 50)},
    "used": {"used": True, "causal": 2, "bias": "1HQK"},
    "pages": {"page_size": 16, "packed": True, "causal": 2, "alibi": True, "dropout_p": 0.1},
    "long pages": {"page_size": 256, "used": True, "causal": 2, "Hkv": 2},
    "everything": {
        **{"mask": "BHQK", "bias": "1HQ1", "key_padding": True, "causal": 2, "softcap": 20.0},
        **{"alibi": True, "sinks": True, "dropout_p": 0.1, "window": (100, -1), "scale": -1.0},
    },
}
DECODE = {"Sq": 1, "Sk": 4096}
NEEDED = {
    "attention_decode_kernel": DECODE,
    "attention_combine_kernel": DECODE,
    "attention_weights_kernel": {"weights": True},
    "attention_weights_delta_kernel": {"weights": True},
    "attention_dbias_kernel": {"bias": "11QK"},
    "attention_dsinks_kernel": {"sinks": True},
    "dropout_keep_mask_kernel": {"dropout_p": 0.1},
    "masked_softmax_dbias_kernel": {"bias": "1H1K"},
}
AXES = {
    "target": TARGETS,
    "kernel": KERNELS,
    "dtype": ["float16", "bfloat16", "float32"],
    "D": [64, 128, 40, 256],
    "features": list(FEATURES),
}


def pairs(row: dict) -> set:
    return set(itertools.combinations(row.items(), 2))


def covering(axes: dict[str, list], seed: int) -> list[dict]:
    """Returns rows in which every two values of two axes meet; greedy, deterministic."""
    choose, names = random.Random(seed), list(axes)
    missing = {
        ((a, x), (b, y))
        for i, a in enumerate(names)
        for b in names[i + 1 :]
        for x in axes[a]
        for y in axes[b]
    }
    rows = []
    while missing:
        candidates = [{n: choose.choice(axes[n]) for n in names} for _ in range(50)]
        (a, x), (b, y) = min(missing, key=str)
        candidates = [row | {a: x, b: y} for row in candidates]

        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append(best)
    return rows


def request_of(row: dict) -> Request:
    kernel, features = row["kernel"], FEATURES[row["features"]]
    # Packed sequences have neither a bias nor returned weights, and used lengths and pages have no
    # returned weights; a window has too few keys to be split.
    missing = {"dbias": ["packed"], "weights": ["packed", "used", "page_size"]}
    missing["combine"] = ["window"]
    without = next((names for part, names in missing.items() if part in kernel), [])
    features = {name: x for name, x in features.items() if name not in without}
    features |= NEEDED.get(kernel, {})
    return Request(row["target"], kernel, row["dtype"], row["D"], **features)


def softmax_request(row: dict) -> Request:
    options = {"mask": "B1QK", "causal": 2, "dropout_p": 0.1, "sinks": True} if row["all"] else {}
    options |= NEEDED.get(row["kernel"], {})
    sizes = {"Sq": 1024, "Sk": row["columns"]}
    return Request(row["target"], row["kernel"], row["dtype"], **sizes, **options)


SOFTMAX_AXES = {
    "target": TARGETS,
    "kernel": SOFTMAX,
    "dtype": ["bfloat16", "float32"],
    "columns": [100, 4096, 20000],
    "all": [False, True],
}
ALL = [request_of(row) for row in covering(AXES, seed=1)]
ALL_SOFTMAX = [softmax_request(row) for row in covering(SOFTMAX_AXES, seed=1)]


APPEND = [
    Request(target, "kv_cache_append_kernel", page_size=page_size)
    for target in TARGETS
    for page_size in (0, 16)
]


def is_cheap(request: Request) -> bool:
    """Whether it compiles fast: float32 with many products takes up to half a minute."""
    return request.dtype != "float32" or request.kernel not in (
        *ATTENTION,
        "attention_dbias_kernel",
    )


DEFAULT = [request for request in ALL if is_cheap(request)][:32] + [
    Request("sm_80", kernel, "float32", 64) for kernel in ATTENTION
]


@pytest.mark.parametrize("request_", DEFAULT + APPEND[:1] + ALL_SOFTMAX[:10], ids=request_id)
def test_covering_set(request_):
    result = measured(request_)
    assert fits(request_.target, result), result


@pytest.mark.slow
@pytest.mark.parametrize("request_", [*ALL, *APPEND, *ALL_SOFTMAX], ids=request_id)
def test_all_pairs(request_):
    result = measured(request_)
    assert fits(request_.target, result), result


def test_the_table_has_an_entry_for_every_call():
    for arch in {*tiles.ARCHS.values(), tiles.SMALLEST, tiles.INTERPRETER}:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for head_dim in range(1, 257):
                for kernel in ("forward", "decode", "dkdv", "dq"):
                    entry = tiles.attention_tiles(kernel, arch, dtype, head_dim)
                    assert min(entry.block_m, entry.block_n) >= 16

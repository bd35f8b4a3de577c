"""Kernels of Triton and nvcc with inputs and a float64 reference, ready to run."""

from __future__ import annotations

import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from paths import CACHE
from philox_numpy import philox4x32
from ptx import Report, launch
from ptx import example_kernels as kernels
from ptx.triton_compile import compile_triton

LOG2_E = float(np.log2(np.e))
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Absolute tolerances for outputs of about 1: two to four times the errors that are seen. Products
# of fp32 run in TF32, whose mantissa has 10 bits.
TOLERANCE = {"fp16": 2e-3, "bf16": 1.6e-2, "fp32": 1e-2}


@dataclass(frozen=True)
class Example:
    """`run(ptx, schedule)` gives the report and the largest error in units of the tolerance."""

    ptx: str
    run: Callable[[str, str], tuple[Report, float]]


def error(pairs: list[tuple[torch.Tensor, torch.Tensor, float]]) -> float:
    """Returns the largest error of (got, expected, tolerance); NaN counts as infinite."""
    worst = 0.0
    for got, expected, tolerance in pairs:
        difference = (got.double() - expected.double()).abs() / tolerance
        worst = max(worst, torch.nan_to_num(difference, nan=torch.inf).max().item())
    return worst


def random(*shape: int, dtype: str = "fp32", seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(TYPES[dtype])


@functools.cache
def forward(
    target: int, dtype: str = "fp16", causal: bool = False, dropout: bool = False,
    heads: int = 2, seqlen_q: int = 70, seqlen_k: int = 150, dim: int = 64,
) -> Example:  # fmt: skip
    pointers = ("q_ptr", "k_ptr", "v_ptr", "out_ptr")
    compiled = compile_triton(
        kernels.attention_forward,
        {
            **dict.fromkeys(pointers, f"*{dtype}"), "lse_ptr": "*fp32", "seed_ptr": "*i64",
            **dict.fromkeys(("seqlen_q", "seqlen_k", "stride"), "i32"), "scale_log2": "fp32",
        },
        {
            "CAUSAL": causal, "DROPOUT": dropout, "BLOCK_M": 64, "D": dim,
            "BLOCK_N": 32 if dropout else 64,
        },
        target, divisible_by_16=[*pointers, "lse_ptr", "seed_ptr", "stride"],
    )  # fmt: skip
    q, k, v = (
        random(heads, n, dim, dtype=dtype, seed=s)
        for s, n in enumerate((seqlen_q, seqlen_k, seqlen_k))
    )
    scores = q.double() @ k.double().mT * dim**-0.5
    if causal:
        scores.masked_fill_(torch.ones(seqlen_q, seqlen_k).tril() == 0, -torch.inf)
    p = torch.softmax(scores, -1)
    seed = 0x1234_5678_9ABC_DEF0
    if dropout:
        key = (seed & 0xFFFFFFFF, seed >> 32)
        bits = [philox4x32((n, 0, 0, 0), key)[0] & 0xFFFF for n in range(p.numel())]
        p = p * (torch.tensor(bits).view(p.shape) >= 16384) * (4 / 3)
    expected, lse = p @ v.double(), scores.logsumexp(-1)

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        out, out_lse = torch.full_like(q, torch.nan), torch.full(lse.shape, torch.nan)
        arguments = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "out_ptr": out, "lse_ptr": out_lse,
            "seed_ptr": torch.tensor([seed]), "seqlen_q": seqlen_q, "seqlen_k": seqlen_k,
            "stride": dim, "scale_log2": dim**-0.5 * LOG2_E,
        }  # fmt: skip
        report = compiled.launch((-(-seqlen_q // 64), heads), arguments, schedule, ptx)
        return report, error(
            [(out, expected, TOLERANCE[dtype]), (out_lse / LOG2_E, lse, TOLERANCE[dtype])]
        )

    return Example(compiled.ptx, run)


@functools.cache
def backward(target: int, dtype: str = "fp16") -> Example:
    seqlen_q, seqlen_k, dim = 100, 70, 64
    pointers = ("q_ptr", "k_ptr", "v_ptr", "do_ptr", "dk_ptr", "dv_ptr")
    statistics = ("lse_ptr", "delta_ptr")
    compiled = compile_triton(
        kernels.attention_backward_dk_dv,
        {
            **dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(statistics, "*fp32"),
            **dict.fromkeys(("seqlen_q", "seqlen_k", "stride"), "i32"),
            **dict.fromkeys(("scale", "scale_log2"), "fp32"),
        },
        {"BLOCK_M": 32, "BLOCK_N": 64, "D": dim},
        target, num_stages=2, divisible_by_16=[*pointers, *statistics, "stride"],
    )  # fmt: skip
    q, do = (random(seqlen_q, dim, dtype=dtype, seed=s) for s in (0, 1))
    k, v = (random(seqlen_k, dim, dtype=dtype, seed=s) for s in (2, 3))
    wide_k, wide_v = (t.double().requires_grad_() for t in (k, v))
    scores = q.double() @ wide_k.T * dim**-0.5
    out = torch.softmax(scores, -1) @ wide_v
    out.backward(do.double())
    lse = (scores.logsumexp(-1) * LOG2_E).detach().float()
    delta = (out * do.double()).sum(-1).detach().float()

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        dk, dv = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
        arguments = {
            "q_ptr": q, "k_ptr": k, "v_ptr": v, "do_ptr": do, "lse_ptr": lse, "delta_ptr": delta,
            "dk_ptr": dk, "dv_ptr": dv, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k, "stride": dim,
            "scale": dim**-0.5, "scale_log2": dim**-0.5 * LOG2_E,
        }  # fmt: skip
        report = compiled.launch((2,), arguments, schedule, ptx)
        tolerance = TOLERANCE[dtype]
        return report, error([(dk, wide_k.grad, tolerance), (dv, wide_v.grad, tolerance)])

    return Example(compiled.ptx, run)


@functools.cache
def softmax(target: int, dtype: str) -> Example:
    rows, columns, stride = 3, 2500, 2512  # no access may touch the bytes between rows
    compiled = compile_triton(
        kernels.softmax_long_rows,
        {"x_ptr": f"*{dtype}", "y_ptr": f"*{dtype}", "columns": "i32", "stride": "i32"},
        {"BLOCK": 1024},
        target,
        divisible_by_16=["x_ptr", "y_ptr", "stride"],
    )
    x = random(rows, stride, dtype=dtype)[:, :columns]

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        y = torch.full((rows, stride), torch.nan, dtype=x.dtype)[:, :columns]
        arguments = {"x_ptr": x, "y_ptr": y, "columns": columns, "stride": stride}
        report = compiled.launch((rows,), arguments, schedule, ptx)
        return report, error([(y, torch.softmax(x.double(), -1), 1e-4)])

    return Example(compiled.ptx, run)


@functools.cache
def descriptors(
    target: int, dtype: str = "fp16", dim: int = 64, host: bool = True, specialized: bool = False
) -> Example:
    from triton.tools.tensor_descriptor import TensorDescriptor

    # With warp specialisation, five tiles of keys go through each ring of three buffers: some of
    # them are used again.
    seqlen_q, seqlen_k, warps = 100, 300 if specialized else 150, 4 if dim == 64 else 8
    block_m, block_n = 16 * warps, 64
    constexprs = {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "D": dim, "WARP_SPECIALIZE": specialized
    }  # fmt: skip
    names, rows = ("q", "k", "v", "out"), (block_m, block_n, block_n, block_m)
    if host:
        kernel = kernels.forward_with_descriptors
        signature = {
            f"{name}_desc": f"tensordesc<{dtype}[{n},{dim}]>"
            for name, n in zip(names, rows, strict=True)
        }
    else:
        kernel = kernels.forward_with_device_descriptors
        signature = {f"{name}_ptr": f"*{dtype}" for name in names} | {"seqlen_q": "i32"}
    compiled = compile_triton(
        kernel, {**signature, "seqlen_k": "i32", "scale_log2": "fp32"}, constexprs, target, warps
    )
    q, k, v = (
        random(n, dim, dtype=dtype, seed=s) for s, n in enumerate((seqlen_q, seqlen_k, seqlen_k))
    )
    expected = torch.softmax(q.double() @ k.double().T * dim**-0.5, -1) @ v.double()

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        out = torch.full_like(q, torch.nan)
        tensors = dict(zip(names, (q, k, v, out), strict=True))
        if host:
            arguments = {
                f"{name}_desc": TensorDescriptor.from_tensor(tensors[name], [n, dim])
                for name, n in zip(names, rows, strict=True)
            }
        else:
            arguments = {f"{n}_ptr": t for n, t in tensors.items()} | {"seqlen_q": seqlen_q}
        arguments |= {"seqlen_k": seqlen_k, "scale_log2": dim**-0.5 * LOG2_E}
        report = compiled.launch((-(-seqlen_q // block_m),), arguments, schedule, ptx)
        return report, error([(out, expected, TOLERANCE[dtype])])

    return Example(compiled.ptx, run)


@functools.cache
def many_operations(target: int) -> Example:
    size, block = 700, 512
    compiled = compile_triton(
        kernels.many_operations,
        {"x_ptr": "*fp32", "y_ptr": "*fp32", "n_ptr": "*i32", "sum_ptr": "*fp32", "size": "i32"},
        {"BLOCK": block},
        target,
    )
    x = random(size) * 3
    x[3] = 85.0
    n = torch.randint(-50, 50, (size,), generator=torch.Generator().manual_seed(1))
    expected = []
    for start in range(0, size, block):
        count = min(block, size - start)
        w, i = torch.zeros(block, dtype=torch.float64), torch.ones(block, dtype=torch.int64)
        w[:count], i[:count] = x[start : start + count], n[start : start + count]
        y = torch.sigmoid(w) + (w.abs() + 1).log() + w.abs().sqrt() + w.exp() + torch.erf(w)
        y += (w.abs() + 1).rsqrt() + w.floor() + w.cumsum(0) + w.sin()
        y += torch.div(i, 7, rounding_mode="trunc") + torch.fmod(i, 5)
        y += (3 * i).sum() + w.argmax() + w.sort(descending=True)[0]
        expected.append(y[:count])
    reference = torch.cat(expected)

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        y, totals = torch.full((size,), torch.nan), torch.zeros(size + 2)
        arguments = {"x_ptr": x, "y_ptr": y, "n_ptr": n.int(), "sum_ptr": totals, "size": size}
        report = compiled.launch((-(-size // block),), arguments, schedule, ptx)
        return report, error(
            [
                ((y - reference) / (100 + reference.abs()), torch.zeros(size), 1e-5),
                (totals[0], x.double().sum(), 1e-3),
                (totals[1], x.max(), 1e-9),
                (totals[2:], x, 1e-9),
            ]
        )

    return Example(compiled.ptx, run)


@functools.cache
def cuda(target: int, causal: bool = False) -> Example | None:
    """Returns attention.cu as nvcc compiles it; None without nvcc."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    source = Path(__file__).with_name("attention.cu")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    text = CACHE / "nvcc" / f"attention_{target}_{digest}.ptx"
    if not text.exists():
        text.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [nvcc, "-ptx", f"-arch=sm_{target}", "-lineinfo", source, "-o", text], check=True
        )
    heads, seqlen_q, seqlen_k, dim = 2, 100, 150, 64
    q, k, v = (
        random(heads, n, dim, dtype="fp16", seed=s)
        for s, n in enumerate((seqlen_q, seqlen_k, seqlen_k))
    )
    scores = q.double() @ k.double().mT * dim**-0.5
    if causal:
        scores.masked_fill_(torch.ones(seqlen_q, seqlen_k).tril() == 0, -torch.inf)
    expected, lse = torch.softmax(scores, -1) @ v.double(), scores.logsumexp(-1)

    def run(ptx: str, schedule: str) -> tuple[Report, float]:
        out, out_lse = torch.full_like(q, torch.nan), torch.full(lse.shape, torch.nan)
        largest = torch.zeros(1, dtype=torch.int32)
        shared = 5 * 64 * 72 * 2  # Q, two of K and V; rows padded to 72 halves
        arguments = [
            q, k, v, out, out_lse, largest, seqlen_q, seqlen_k, dim**-0.5 * LOG2_E, int(causal)
        ]  # fmt: skip
        report = launch(ptx, "attention", (2, heads), 128, arguments, shared, schedule)
        row_max = scores.amax(-1).max() * LOG2_E
        return report, error(
            [
                (out, expected, TOLERANCE["fp16"]),
                (out_lse, lse, 1e-5),
                (largest.view(torch.float32), row_max, 1e-5),
            ]
        )

    return Example(text.read_text(), run)

"""Attention as a Triton tutorial would write it, to compare our compiled kernels with: even sizes,
one layout, no features, a backward in one kernel of two passes. The kernels are never run."""

import triton
import triton.language as tl


@triton.jit
def tutorial_forward(
    q, k, v, out, lse, seqlen, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[heads, seqlen, D], contiguous; a program has BLOCK_M queries of a head."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, D)
    base = tl.program_id(1).to(tl.int64) * seqlen * D
    rows = offs_m[:, None] * D + offs_d[None, :]
    k_pointers = k + base + offs_n[:, None] * D + offs_d[None, :]
    v_pointers = v + base + offs_n[:, None] * D + offs_d[None, :]
    q_tile = tl.load(q + base + rows)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.full([BLOCK_M], 0.0, tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for _ in range(0, seqlen, BLOCK_N):
        s = tl.dot(q_tile, tl.trans(tl.load(k_pointers)))
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v_tile = tl.load(v_pointers)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None])
        row_max = new_max
        k_pointers += BLOCK_N * D
        v_pointers += BLOCK_N * D
    tl.store(out + base + rows, (acc / row_sum[:, None]).to(out.dtype.element_ty))
    tl.store(lse + tl.program_id(1) * seqlen + offs_m, row_max + tl.log2(row_sum))


@triton.jit
def tutorial_backward(
    q, k, v, do, lse, delta, dq, dk, dv, seqlen, scale, scale_log2,
    BLOCK: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """First BLOCK keys against all queries, STEP at a time; then BLOCK queries against all keys."""
    base = tl.program_id(1).to(tl.int64) * seqlen * D
    row_base = tl.program_id(1) * seqlen
    offs, steps, offs_d = tl.arange(0, BLOCK), tl.arange(0, STEP), tl.arange(0, D)
    mine = base + (tl.program_id(0) * BLOCK + offs)[:, None] * D + offs_d[None, :]
    first = base + steps[:, None] * D + offs_d[None, :]

    k_tile, v_tile = tl.load(k + mine), tl.load(v + mine)
    dk_tile, dv_tile = tl.zeros([BLOCK, D], tl.float32), tl.zeros([BLOCK, D], tl.float32)
    q_pointers, do_pointers = q + first, do + first
    for start in range(0, seqlen, STEP):
        q_tile, do_tile = tl.load(q_pointers), tl.load(do_pointers)
        lse_i = tl.load(lse + row_base + start + steps)[None, :]
        delta_i = tl.load(delta + row_base + start + steps)[None, :]
        p = tl.exp2(tl.dot(k_tile, tl.trans(q_tile)) * scale_log2 - lse_i)
        dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile)
        ds = p * (tl.dot(v_tile, tl.trans(do_tile)) - delta_i)
        dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile)
        q_pointers += STEP * D
        do_pointers += STEP * D
    tl.store(dk + mine, (dk_tile * scale).to(dk.dtype.element_ty))
    tl.store(dv + mine, dv_tile.to(dv.dtype.element_ty))

    own_q, own_do = tl.load(q + mine), tl.load(do + mine)
    rows = row_base + tl.program_id(0) * BLOCK + offs
    lse_i, delta_i = tl.load(lse + rows)[:, None], tl.load(delta + rows)[:, None]
    dq_tile = tl.zeros([BLOCK, D], tl.float32)
    k_pointers, v_pointers = k + first, v + first
    for _ in range(0, seqlen, STEP):
        k_step, v_step = tl.load(k_pointers), tl.load(v_pointers)
        p = tl.exp2(tl.dot(own_q, tl.trans(k_step)) * scale_log2 - lse_i)
        ds = p * (tl.dot(own_do, tl.trans(v_step)) - delta_i)
        dq_tile = tl.dot(ds.to(k_step.dtype), k_step, dq_tile)
        k_pointers += STEP * D
        v_pointers += STEP * D
    tl.store(dq + mine, (dq_tile * scale).to(dq.dtype.element_ty))

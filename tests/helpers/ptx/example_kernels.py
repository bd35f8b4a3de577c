"""Triton kernels that the interpreter is tried on: small, and no part of the package."""

import triton
import triton.language as tl


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, seed_ptr, seqlen_q, seqlen_k, stride, scale_log2,
    CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """out = dropout(softmax(q k^T)) v, lse in base 2; a program has BLOCK_M rows of one head."""
    head = tl.program_id(1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, D)
    q_ptr += head * seqlen_q * stride
    k_ptr += head * seqlen_k * stride
    v_ptr += head * seqlen_k * stride
    out_ptr += head * seqlen_q * stride
    rows = offs_m[:, None] < seqlen_q
    q = tl.load(q_ptr + offs_m[:, None] * stride + offs_d[None, :], mask=rows, other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    end = seqlen_k
    if CAUSAL:
        end = tl.minimum(seqlen_k, (tl.program_id(0) + 1) * BLOCK_M)
    if DROPOUT:
        seed = tl.load(seed_ptr)
    for start in range(0, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        columns = offs_n[:, None] < seqlen_k
        where = offs_n[:, None] * stride + offs_d[None, :]
        k = tl.load(k_ptr + where, mask=columns, other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale_log2
        visible = offs_n[None, :] < seqlen_k
        if CAUSAL:
            visible = visible & (offs_n[None, :] <= offs_m[:, None])
        s = tl.where(visible, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        p = tl.exp2(s - safe_max[:, None])
        alpha = tl.exp2(row_max - safe_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if DROPOUT:  # counter = (element, 0, 0, 0); dropped if the low 16 bits are below 1/4
            counter = (head * seqlen_q + offs_m[:, None]) * seqlen_k + offs_n[None, :]
            bits, _, _, _ = tl.randint4x(seed, counter)
            p = tl.where((bits & 0xFFFF) >= 16384, p * (4.0 / 3.0), 0.0)
        v = tl.load(v_ptr + where, mask=columns, other=0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v)
        row_max = new_max
    out = (acc / row_sum[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_m[:, None] * stride + offs_d[None, :], out, mask=rows)
    lse = row_max + tl.log2(row_sum)
    tl.store(lse_ptr + head * seqlen_q + offs_m, lse, mask=offs_m < seqlen_q)


@triton.jit
def attention_backward_dk_dv(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, seqlen_q, seqlen_k, stride,
    scale, scale_log2, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values; lse in base 2."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, D)
    columns = offs_n[:, None] < seqlen_k
    mine = offs_n[:, None] * stride + offs_d[None, :]
    k = tl.load(k_ptr + mine, mask=columns, other=0.0)
    v = tl.load(v_ptr + mine, mask=columns, other=0.0)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for start in range(0, seqlen_q, BLOCK_M):
        offs_m = start + tl.arange(0, BLOCK_M)
        rows = offs_m[:, None] < seqlen_q
        where = offs_m[:, None] * stride + offs_d[None, :]
        q = tl.load(q_ptr + where, mask=rows, other=0.0)
        do = tl.load(do_ptr + where, mask=rows, other=0.0)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < seqlen_q, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < seqlen_q, other=0.0)
        p_t = tl.exp2(tl.dot(k, tl.trans(q)) * scale_log2 - lse[None, :])
        dv += tl.dot(p_t.to(do.dtype), do)
        ds_t = p_t * (tl.dot(v, tl.trans(do)) - delta[None, :])
        dk += tl.dot(ds_t.to(q.dtype), q)
    tl.store(dk_ptr + mine, (dk * scale).to(dk_ptr.dtype.element_ty), mask=columns)
    tl.store(dv_ptr + mine, dv.to(dv_ptr.dtype.element_ty), mask=columns)


@triton.jit
def softmax_long_rows(x_ptr, y_ptr, columns, stride, BLOCK: tl.constexpr):
    """Softmax of rows of any length in two passes, a program a row."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + offs < columns
        x = tl.load(x_ptr + row * stride + start + offs, mask=inside, other=float("-inf"))
        x = x.to(tl.float32)
        new = tl.maximum(maximum, x)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(maximum - safe) + tl.exp(x - safe)
        maximum = new
    row_max = tl.max(maximum, 0)
    row_sum = tl.sum(total * tl.exp(maximum - row_max), 0)
    for start in range(0, columns, BLOCK):
        inside = start + offs < columns
        x = tl.load(x_ptr + row * stride + start + offs, mask=inside, other=float("-inf"))
        y = tl.exp(x.to(tl.float32) - row_max) / row_sum
        tl.store(y_ptr + row * stride + start + offs, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def forward_with_descriptors(
    q_desc, k_desc, v_desc, out_desc, seqlen_k, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """One head through tensor descriptors (TMA on sm_90)."""
    start_m = tl.program_id(0) * BLOCK_M
    q = q_desc.load([start_m, 0])
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in tl.range(0, seqlen_k, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
        k = k_desc.load([start, 0])
        s = tl.dot(q, tl.trans(k)) * scale_log2
        s = tl.where((start + tl.arange(0, BLOCK_N))[None, :] < seqlen_k, s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        p = tl.exp2(s - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        v = v_desc.load([start, 0])
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v)
        row_max = new_max
    out_desc.store([start_m, 0], (acc / row_sum[:, None]).to(out_desc.dtype))


@triton.jit
def forward_with_device_descriptors(
    q_ptr, k_ptr, v_ptr, out_ptr, seqlen_q, seqlen_k, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """The same with descriptors that each program makes."""
    q_desc = tl.make_tensor_descriptor(q_ptr, [seqlen_q, D], [D, 1], [BLOCK_M, D])
    k_desc = tl.make_tensor_descriptor(k_ptr, [seqlen_k, D], [D, 1], [BLOCK_N, D])
    v_desc = tl.make_tensor_descriptor(v_ptr, [seqlen_k, D], [D, 1], [BLOCK_N, D])
    out_desc = tl.make_tensor_descriptor(out_ptr, [seqlen_q, D], [D, 1], [BLOCK_M, D])
    forward_with_descriptors(
        q_desc, k_desc, v_desc, out_desc, seqlen_k, scale_log2, BLOCK_M, BLOCK_N, D,
        WARP_SPECIALIZE,
    )  # fmt: skip


@triton.jit
def many_operations(x_ptr, y_ptr, n_ptr, sum_ptr, size, BLOCK: tl.constexpr):
    """Uses functions, integer division, scan, sort and atomics; the result has no meaning."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    x = tl.load(x_ptr + offs, mask=inside, other=0.0)
    y = tl.sigmoid(x) + tl.log(tl.abs(x) + 1) + tl.sqrt(tl.abs(x)) + tl.exp(x) + tl.erf(x)
    y += tl.rsqrt(tl.abs(x) + 1) + tl.floor(x) + tl.cumsum(x, 0) + tl.sin(x)
    n = tl.load(n_ptr + offs, mask=inside, other=1)
    y += (n // 7).to(tl.float32) + (n % 5).to(tl.float32)
    y += tl.sum(n.to(tl.int64) * 3).to(tl.float32) + tl.argmax(x, 0)
    tl.atomic_add(sum_ptr, tl.sum(x))
    tl.atomic_max(sum_ptr + 1, tl.max(x))
    tl.store(y_ptr + offs, y + tl.sort(x, descending=True), mask=inside)
    tl.atomic_add(sum_ptr + 2 + offs, x, mask=inside)

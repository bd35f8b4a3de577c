// Attention forward in plain CUDA C++ with inline mma.sync, ldmatrix and cp.async: something that
// nvcc compiles, for the PTX interpreter to run. A block has four warps and 64 rows of queries of
// one head; tiles of 64 keys are loaded one ahead (two buffers). float16, head_dim 64.
#include <cuda_fp16.h>

#include <cstdint>

namespace {

constexpr int kDim = 64, kTile = 64, kThreads = 128;
constexpr int kRow = kDim + 8;  // padded: eight rows of a matrix then lie in different banks

__device__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Rows beyond `rows` become zeros.
__device__ void load_tile(half* tile, const half* source, int first_row, int rows) {
  for (int i = threadIdx.x; i < kTile * kDim / 8; i += kThreads) {
    int row = i / (kDim / 8), column = i % (kDim / 8) * 8;
    bool inside = first_row + row < rows;
    const half* from = source + (inside ? int64_t{first_row + row} * kDim + column : 0);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                     shared_address(tile + row * kRow + column)),
                 "l"(from), "r"(inside ? 16 : 0));
  }
}

__device__ void commit() { asm volatile("cp.async.commit_group;"); }

__device__ void load_a(uint32_t (&a)[4], const half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(shared_address(p)));
}

__device__ void load_b(uint32_t (&b)[2], const half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(shared_address(p)));
}

__device__ void load_b_transposed(uint32_t (&b)[2], const half* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(b[0]), "=r"(b[1])
               : "r"(shared_address(p)));
}

__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ uint32_t pack(float low, float high) {
  half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<uint32_t*>(&both);
}

}  // namespace

// lse: natural logarithm; max_bits: the largest row maximum (at least 0), as the bits of a float.
extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const half* q, const half* k, const half* v, half* out, float* lse, int* max_bits,
              int seqlen_q, int seqlen_k, float scale_log2, int causal) {
  extern __shared__ __align__(128) half shared[];
  half* q_tile = shared;
  half* k_tiles = q_tile + kTile * kRow;
  half* v_tiles = k_tiles + 2 * kTile * kRow;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, start_m = blockIdx.x * kTile;
  int64_t head = blockIdx.y;
  q += head * seqlen_q * kDim;
  k += head * seqlen_k * kDim;
  v += head * seqlen_k * kDim;
  out += head * seqlen_q * kDim;
  lse += head * seqlen_q;

  load_tile(q_tile, q, start_m, seqlen_q);
  load_tile(k_tiles, k, 0, seqlen_k);
  load_tile(v_tiles, v, 0, seqlen_k);
  commit();

  float acc[8][4] = {}, row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
  int end = causal ? min(seqlen_k, start_m + kTile) : seqlen_k;
  int tiles = (end + kTile - 1) / kTile;
  for (int t = 0; t < tiles; ++t) {
    half* k_tile = k_tiles + (t & 1) * kTile * kRow;
    half* v_tile = v_tiles + (t & 1) * kTile * kRow;
    if (t + 1 < tiles) {
      load_tile(k_tiles + ((t + 1) & 1) * kTile * kRow, k, (t + 1) * kTile, seqlen_k);
      load_tile(v_tiles + ((t + 1) & 1) * kTile * kRow, v, (t + 1) * kTile, seqlen_k);
    }
    commit();
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();

    // s <- q k^T
    float s[8][4] = {};
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[4], b[2];
      load_a(a, q_tile + (warp * 16 + lane % 16) * kRow + d * 16 + lane / 16 * 8);
      for (int n = 0; n < 8; ++n) {
        load_b(b, k_tile + (n * 8 + lane % 8) * kRow + d * 16 + lane / 8 % 2 * 8);
        multiply_add(s[n], a, b);
      }
    }

    // A lane has two rows, of which four lanes have the columns.
    for (int h = 0; h < 2; ++h) {
      int row = start_m + warp * 16 + lane / 4 + 8 * h;
      float largest = row_max[h];
      for (int n = 0; n < 8; ++n) {
        for (int e = 0; e < 2; ++e) {
          int column = t * kTile + n * 8 + lane % 4 * 2 + e;
          bool visible = column < seqlen_k && (!causal || column <= row);
          float& x = s[n][2 * h + e];
          x = visible ? x * scale_log2 : -INFINITY;
          largest = fmaxf(largest, x);
        }
      }
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      float shift = largest == -INFINITY ? 0.0f : largest;  // a row with nothing visible yet
      float alpha = exp2f(row_max[h] - shift), sum = 0;
      row_max[h] = largest;
      for (int n = 0; n < 8; ++n) {
        for (int e = 0; e < 2; ++e) {
          float& p = s[n][2 * h + e];
          p = exp2f(p - shift);
          sum += p;
          acc[n][2 * h + e] *= alpha;
        }
      }
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      row_sum[h] = row_sum[h] * alpha + sum;
    }

    // acc <- acc + p v
    for (int n16 = 0; n16 < kTile / 16; ++n16) {
      uint32_t a[4], b[2];
      for (int i = 0; i < 4; ++i) {
        const float* p = s[n16 * 2 + i / 2] + i % 2 * 2;
        a[i] = pack(p[0], p[1]);
      }
      for (int d = 0; d < 8; ++d) {
        load_b_transposed(b, v_tile + (n16 * 16 + lane % 16) * kRow + d * 8);
        multiply_add(acc[d], a, b);
      }
    }
    __syncthreads();
  }

  for (int h = 0; h < 2; ++h) {
    int row = start_m + warp * 16 + lane / 4 + 8 * h;
    if (row >= seqlen_q) continue;
    float inverse = row_sum[h] > 0 ? 1.0f / row_sum[h] : 0.0f;
    for (int d = 0; d < 8; ++d) {
      *reinterpret_cast<uint32_t*>(out + int64_t{row} * kDim + d * 8 + lane % 4 * 2) =
          pack(acc[d][2 * h] * inverse, acc[d][2 * h + 1] * inverse);
    }
    if (lane % 4 == 0) {
      lse[row] = (row_max[h] + log2f(row_sum[h])) * 0.69314718f;
      atomicMax(max_bits, __float_as_int(fmaxf(row_max[h], 0.0f)));
    }
  }
}

#include <cuda_fp16.h>
#include <cstdint>
// Forward attention, one warp per 16 query rows, 64 keys a tile, head_dim 64.
__device__ __forceinline__ uint32_t smem_u32(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void cp16(uint32_t d, const void* s, int n) { asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(d), "l"(s), "r"(n)); }
extern "C" __global__ void __launch_bounds__(128) attention(const half* Q, const half* K, const half* V, half* O, float* L, int* maxbits, int sq, int sk, float scale, int causal) {
  extern __shared__ __align__(128) half smem[];
  half* sQ = smem; half* sK = sQ + 64 * 72; half* sV = sK + 2 * 64 * 72;
  int tid = threadIdx.x, warp = tid / 32, lane = tid % 32, m0 = blockIdx.x * 64;
  long head = blockIdx.y; Q += head * sq * 64; K += head * sk * 64; V += head * sk * 64; O += head * sq * 64; L += head * sq;
  auto load = [&](half* dst, const half* src, int row0, int rows) {
    for (int i = tid; i < 64 * 8; i += 128) { int r = i / 8, c = (i % 8) * 8; bool ok = row0 + r < rows;
      cp16(smem_u32(dst + r * 72 + c), src + (ok ? (long)(row0 + r) * 64 + c : 0), ok ? 16 : 0); } };
  load(sQ, Q, m0, sq); load(sK, K, 0, sk); load(sV, V, 0, sk);
  asm volatile("cp.async.commit_group;\n");
  float acc[8][4] = {}; float mi[2] = {-INFINITY, -INFINITY}, li[2] = {0, 0};
  int end = causal ? min(sk, m0 + 64) : sk;
  int tiles = (end + 63) / 64;
  for (int t = 0; t < tiles; ++t) {
    half* k = sK + (t & 1) * 64 * 72; half* v = sV + (t & 1) * 64 * 72;
    if (t + 1 < tiles) { load(sK + ((t + 1) & 1) * 64 * 72, K, (t + 1) * 64, sk); load(sV + ((t + 1) & 1) * 64 * 72, V, (t + 1) * 64, sk); }
    asm volatile("cp.async.commit_group;\n");
    asm volatile("cp.async.wait_group 1;\n" ::: "memory");
    __syncthreads();
    float s[8][4] = {};
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t a[4]; uint32_t addr = smem_u32(sQ + (warp * 16 + lane % 16) * 72 + kk * 16 + (lane / 16) * 8);
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n" : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"(addr));
      for (int n = 0; n < 8; ++n) {
        uint32_t b[2]; uint32_t ad = smem_u32(k + (n * 8 + lane % 8) * 72 + kk * 16 + ((lane / 8) % 2) * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(ad));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" : "+f"(s[n][0]), "+f"(s[n][1]), "+f"(s[n][2]), "+f"(s[n][3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      } }
    for (int h = 0; h < 2; ++h) {
      int row = m0 + warp * 16 + lane / 4 + 8 * h; float mx = mi[h];
      for (int n = 0; n < 8; ++n) for (int e = 0; e < 2; ++e) { int col = t * 64 + n * 8 + (lane % 4) * 2 + e; float& x = s[n][2 * h + e]; x = (col < sk && (!causal || col <= row)) ? x * scale : -INFINITY; mx = fmaxf(mx, x); }
      mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 1)); mx = fmaxf(mx, __shfl_xor_sync(~0u, mx, 2));
      float safe = mx == -INFINITY ? 0.f : mx, alpha = exp2f(mi[h] - safe), sum = 0; mi[h] = mx;
      for (int n = 0; n < 8; ++n) { for (int e = 0; e < 2; ++e) { float& x = s[n][2 * h + e]; x = exp2f(x - safe); sum += x; acc[n][2 * h + e] *= alpha; } }
      sum += __shfl_xor_sync(~0u, sum, 1); sum += __shfl_xor_sync(~0u, sum, 2); li[h] = li[h] * alpha + sum; }
    for (int kk = 0; kk < 4; ++kk) {
      uint32_t a[4]; for (int i = 0; i < 4; ++i) { half2 h2 = __floats2half2_rn(s[kk * 2 + i / 2][(i % 2) * 2], s[kk * 2 + i / 2][(i % 2) * 2 + 1]); a[i] = *(uint32_t*)&h2; }
      for (int n = 0; n < 8; ++n) {
        uint32_t b[2]; uint32_t ad = smem_u32(v + (kk * 16 + lane % 16) * 72 + n * 8);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];\n" : "=r"(b[0]), "=r"(b[1]) : "r"(ad));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n" : "+f"(acc[n][0]), "+f"(acc[n][1]), "+f"(acc[n][2]), "+f"(acc[n][3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      } }
    __syncthreads();
  }
  for (int h = 0; h < 2; ++h) { int row = m0 + warp * 16 + lane / 4 + 8 * h; if (row >= sq) continue; float inv = li[h] > 0 ? 1.f / li[h] : 0.f;
    for (int n = 0; n < 8; ++n) *(half2*)(O + (long)row * 64 + n * 8 + (lane % 4) * 2) = __floats2half2_rn(acc[n][2 * h] * inv, acc[n][2 * h + 1] * inv);
    if (lane % 4 == 0) { L[row] = (mi[h] + log2f(li[h])) * 0.69314718f; atomicMax(maxbits, __float_as_int(fmaxf(mi[h], 0.f))); } }
}

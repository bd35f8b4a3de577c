// Runs every phase of the kernel table without torch, on random shapes, strides, alignments, masks
// and options, and compares the results with plain loops in double precision. The tolerance is
// coarse: the purpose is to run the kernels under sanitizers, with `make sanitize`.
//
//   driver                       prints the instruction sets of this machine, one a line
//   driver ISA CASES SEED THREADS
//
// THREADS > 1: threads draw tasks from a counter; the bits must be those of one thread.
#include <stdio.h>

#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "arrays.h"
#include "cpu/dispatch.h"

namespace driver {
namespace {

using namespace fused_attention;
using Last = Array::Last;

int threads = 1;
std::string what;  // the case, for messages

[[noreturn]] void fail(const std::string& message) {
  printf("FAILED %s\n  %s\n", what.c_str(), message.c_str());
  exit(1);
}

// -- running ----------------------------------------------------------------------------------

template <typename Params>
void run(const PhaseOf<Params>& phase, const Params& p, int count) {
  const int64_t tasks = phase.num_tasks(p);
  const size_t bytes = phase.workspace_bytes(p);
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    void* workspace = nullptr;
    if (posix_memalign(&workspace, 64, bytes) != 0) abort();
    memset(workspace, 0xff, bytes);
    for (int64_t task; (task = next.fetch_add(1)) < tasks;) phase.run(p, task, task + 1, workspace);
    free(workspace);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < count; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

// Runs `phases` on all threads, then on one if there are more: the outputs must have the same bits.
void run_all(const std::vector<std::function<void(int)>>& phases,
             const std::vector<const Array*>& outputs) {
  for (const auto& phase : phases) phase(threads);
  if (threads == 1) return;
  std::vector<std::string> bits;
  for (const Array* x : outputs) bits.emplace_back(x->memory.get(), (size_t)x->bytes);
  for (const auto& phase : phases) phase(1);
  for (size_t i = 0; i < outputs.size(); ++i) {
    if (memcmp(bits[i].data(), outputs[i]->memory.get(), bits[i].size()) != 0) {
      fail("result " + std::to_string(i) + ": other bits on one thread");
    }
  }
}

// -- comparison -------------------------------------------------------------------------------

// The expected values of an array, contiguous.
struct Expected {
  explicit Expected(const Array& like) : size(like.size), value((size_t)like.count(), 0.0) {}
  template <typename... Index>
  double& operator()(Index... index) {
    const int64_t indices[] = {(int64_t)index...};
    int64_t offset = 0;
    for (size_t d = 0; d < size.size(); ++d) {
      offset = offset * size[d] + (size[d] == 1 ? 0 : indices[d]);
    }
    return value[(size_t)offset];
  }
  Sizes size;
  std::vector<double> value;
};

// Compares `got` with `want`. `coarsest` is the least precise type on the way to this result.
void compare(const char* name, const Array& got, const Expected& want, DType coarsest) {
  // The last two are large: a gradient that cancels to 0 keeps the rounding of out, times grad_out.
  const double tolerance = coarsest == DType::kFloat64   ? 1e-9
                           : coarsest == DType::kFloat32 ? 2e-4
                           : coarsest == DType::kFloat16 ? 5e-2
                                                         : 3e-1;
  double largest = 1;
  for (const double x : want.value) largest = std::max(largest, isfinite(x) ? fabs(x) : 0.0);
  size_t i = 0;
  got.each([&](const char* at) {
    const double mine = get(at, got.dtype), exact = want.value[i++];
    if (mine == exact || fabs(mine - exact) <= tolerance * largest) return;
    fail(std::string(name) + "[" + std::to_string(i - 1) + "] is " + std::to_string(mine) +
         ", expected " + std::to_string(exact));
  });
  if (!got.gaps_are_intact()) fail(std::string(name) + ": written to between its elements");
}

DType wide(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }
DType coarser(DType a, DType b) {
  const auto rank = [](DType d) {
    return d == DType::kFloat64 ? 0 : d == DType::kFloat32 ? 1 : d == DType::kFloat16 ? 2 : 3;
  };
  return rank(a) > rank(b) ? a : b;
}

// -- dropout ----------------------------------------------------------------------------------

// Returns the 16-bit value of a column, by Philox4x32-10 one counter at a time.
uint32_t philox(uint64_t seed, uint32_t offset, int64_t head, int64_t row, int64_t column) {
  uint32_t c[4] = {(uint32_t)(column / 8), (uint32_t)row, (uint32_t)head, offset};
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    const uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ key0, (uint32_t)b,
                              (uint32_t)(a >> 32) ^ c[3] ^ key1, (uint32_t)a};
    memcpy(c, next, sizeof c);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return c[column % 8 / 2] >> (column % 2 * 16) & 0xffff;
}

template <typename Params>
void choose_dropout(Random& random, Params& p) {
  if (!random.chance(30)) return;
  p.dropout_threshold = random.chance(20) ? 65536 : (uint32_t)random.range(1, 40000);
  const uint32_t kept = 65536 - p.dropout_threshold;
  p.dropout_scale = kept == 0 ? 0.0 : 65536.0 / kept;
  p.philox_seed = random.bits();
  p.philox_offset = (uint32_t)random.bits();
}
template <typename Params>
double dropout_factor(const Params& p, int64_t head, int64_t row, int64_t column) {
  if (p.dropout_threshold == 0) return 1;
  const uint32_t value = philox(p.philox_seed, p.philox_offset, head, row, column);
  return value >= p.dropout_threshold ? p.dropout_scale : 0;
}

// -- attention --------------------------------------------------------------------------------

TensorView view(const Array& x) { return {x.data, x.stride[0], x.stride[1], x.stride[2]}; }
ScoreView score_view(const Array& x) {
  return {x.data, x.dtype, x.stride[0], x.stride[1], x.stride[2], x.stride[3]};
}

DType any_type(Random& random) { return (DType)random.range(0, 3); }

Array contiguous(Sizes sizes, DType dtype) {
  Array x;
  x.size = std::move(sizes);
  x.dtype = dtype;
  x.width = bytes_of(dtype);
  x.stride.resize(x.size.size());
  int64_t step = 1;
  for (size_t d = x.size.size(); d-- > 0; step *= x.size[d])
    x.stride[d] = x.size[d] == 1 ? 0 : step;
  x.bytes = x.count() * x.width;
  x.memory.reset(new char[(size_t)x.bytes]);
  memset(x.memory.get(), 0xff, (size_t)x.bytes);
  x.data = x.memory.get();
  return x;
}

// Returns a call workspace of `bytes`, to which p.call_workspace points.
std::vector<char> shared_memory(AttentionParams& p, size_t bytes) {
  std::vector<char> shared(bytes + 63);
  p.call_workspace = (void*)(((uintptr_t)shared.data() + 63) / 64 * 64);
  return shared;
}

// Runs the phases of the kernel that serves the call.
void run_forward(AttentionParams& p, const Array& out, const Array& lse) {
  const ForwardKernel& forward = choose_forward(kernel_table(), p);
  const std::vector<char> shared =
      shared_memory(p, forward.call_workspace_bytes ? forward.call_workspace_bytes(p) : 0);
  std::vector<std::function<void(int)>> phases;
  for (const Phase& phase : forward.phases) {
    if (phase.run != nullptr) phases.push_back([&](int count) { run(phase, p, count); });
  }
  run_all(phases, {&out, &lse});
}

void attention_case(Random& random) {
  AttentionParams p;
  p.dtype = any_type(random);
  const DType type = p.dtype, accumulated = wide(type);
  p.B = random.range(1, 2);
  p.Hkv = random.range(1, 2);
  p.Hq = p.Hkv * random.range(1, 3);
  p.Sq = random.chance(5) ? 0 : random.range(1, random.chance(50) ? 20 : 110);
  p.Sk = random.chance(5) ? 0 : random.range(1, random.chance(50) ? 20 : 210);
  const int64_t widest = random.chance(5) ? 512 : 40;
  p.D = random.range(1, widest);
  p.Dv = random.chance(50) ? p.D : random.range(1, widest);
  if (widest > 40) p.B = p.Hkv = p.Hq = 1, p.Sq = std::min<int64_t>(p.Sq, 30);
  if (widest == 40 && random.chance(40)) {  // enough heads for the backward in one pass
    (random.chance(50) ? p.B : p.Hkv) = random.range(8, 9);
    p.Hq = p.Hkv * random.range(1, 2);
    p.Sq = std::min<int64_t>(p.Sq, 60);
  }
  const int64_t B = p.B, Hq = p.Hq, Hkv = p.Hkv, Sq = p.Sq, Sk = p.Sk, D = p.D, Dv = p.Dv;

  const auto tensor = [&](int64_t H, int64_t S, int64_t width) {
    Array x(random, {B, H, S, width}, type, Last::kDense);
    x.randomise(random);
    return x;
  };
  Array q = tensor(Hq, Sq, D), k = tensor(Hkv, Sk, D), v = tensor(Hkv, Sk, Dv);
  Array grad_out = tensor(Hq, Sq, Dv);
  Array out(random, {B, Hq, Sq, Dv}, type, Last::kDense);
  Array dq(random, {B, Hq, Sq, D}, type, Last::kDense);
  Array dk(random, {B, Hkv, Sk, D}, type, Last::kDense);
  Array dv(random, {B, Hkv, Sk, Dv}, type, Last::kDense);
  Array lse = contiguous({B, Hq, Sq}, accumulated), delta = contiguous({B, Hq, Sq}, accumulated);
  Array grad_lse(random, {B, Hq, Sq}, accumulated, Last::kAny);
  grad_lse.randomise(random);
  p.query = view(q), p.key = view(k), p.value = view(v), p.out = view(out);
  p.grad_out = view(grad_out), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  p.delta = delta.data;
  p.lse_stride_b = Hq * Sq, p.lse_stride_h = Sq;
  const bool backward = random.chance(80);
  if (backward || random.chance(50)) p.lse = lse.data;
  const bool through_lse = backward && random.chance(50);
  if (through_lse) {
    p.grad_lse = grad_lse.data;
    p.grad_lse_stride_b = grad_lse.stride[0];
    p.grad_lse_stride_h = grad_lse.stride[1];
    p.grad_lse_stride_s = grad_lse.stride[2];
  }

  p.scale = (double)random.range(-60, 100) / 100;
  if (random.chance(20)) p.softcap = 2;
  const bool causal = random.chance(40);
  p.bottom_right = random.chance(50);
  if (causal) p.window_right = 0;
  if (random.chance(30)) p.window_left = random.range(0, 60);
  if (!causal && random.chance(30)) p.window_right = random.range(0, 60);

  const auto broadcast = [&](int64_t size) { return random.chance(40) ? 1 : size; };
  const auto score_sizes = [&] {
    return Sizes{broadcast(B), broadcast(Hq), broadcast(Sq), broadcast(Sk)};
  };
  Array mask(random, score_sizes(), type, Last::kAny, true, 1);
  mask.each([&](char* at) { *at = random.chance(70); });
  const bool masked = random.chance(40);
  if (masked) p.mask = score_view(mask);
  Array bias(random, score_sizes(), any_type(random), Last::kAny, true);
  bias.randomise(random);
  const bool biased = random.chance(40), bias_gradient = biased && random.chance(70);
  Array dbias = contiguous(bias.size, bias.dtype);
  if (biased) p.bias = score_view(bias);
  if (bias_gradient) p.dbias = score_view(dbias);
  Array padding(random, {B, Sk}, type, Last::kAny, false, 1);
  padding.each([&](char* at) { *at = random.chance(30); });
  const bool padded = random.chance(30);
  if (padded) {
    p.key_padding_mask = (const uint8_t*)padding.data;
    p.key_padding_stride_b = padding.stride[0];
    p.key_padding_stride_k = padding.stride[1];
    for (int64_t b = 0; b < B; ++b) {  // hidden keys may hold anything
      for (int64_t j = 0; j < Sk; ++j) {
        if (!*padding.at(b, j)) continue;
        for (int64_t h = 0; h < Hkv; ++h) {
          for (int64_t d = 0; d < D; ++d) set(k.at(b, h, j, d), type, NAN);
          for (int64_t d = 0; d < Dv; ++d) set(v.at(b, h, j, d), type, NAN);
        }
      }
    }
  }
  Array slopes = contiguous({random.chance(50) ? B : 1, Hq}, DType::kFloat32);
  slopes.each([&](char* at) { set(at, DType::kFloat32, (double)random.range(0, 64) / 256); });
  const bool alibi = random.chance(20);
  if (alibi) {
    p.alibi_slopes = (const float*)slopes.data;
    p.alibi_stride_b = slopes.stride[0];
  }
  Array sinks = contiguous({Hq}, accumulated), dsinks = contiguous({Hq}, accumulated);
  sinks.randomise(random);
  const bool sunk = random.chance(30);
  if (sunk) p.sinks = sinks.data;
  if (sunk && backward) p.dsinks = dsinks.data;
  choose_dropout(random, p);
  p.average_weights = random.chance(50);
  const double share = p.average_weights ? 1.0 / (double)Hq : 1;
  const Sizes weights_sizes{B, p.average_weights ? 1 : Hq, Sq, Sk};
  Array weights(random, weights_sizes, type, Last::kDense, true);
  Array grad_weights(random, weights_sizes, type, Last::kAny, true);
  grad_weights.randomise(random);
  const bool weighed = p.lse != nullptr && random.chance(60);
  const bool through_weights = weighed && backward && random.chance(70);
  const bool reduced = weighed && random.chance(70);
  p.num_top = random.range(0, 5);
  Array mass = contiguous({B, Hq, Sk}, accumulated), entropy = contiguous({B, Hq, Sq}, accumulated);
  Array top_weights = contiguous({B, Hq, Sq, p.num_top}, accumulated);
  Array top_keys = contiguous({B, Hq, Sq, p.num_top}, DType::kFloat64);  // holds int64

  what += " attention B" + std::to_string(B) + " Hq" + std::to_string(Hq) + " Hkv" +
          std::to_string(Hkv) + " Sq" + std::to_string(Sq) + " Sk" + std::to_string(Sk) + " D" +
          std::to_string(D) + " Dv" + std::to_string(Dv) + " dtype " + std::to_string((int)type) +
          (masked ? " mask" : "") + (biased ? " bias" : "") + (bias_gradient ? " dbias" : "") +
          (padded ? " padding" : "") + (alibi ? " alibi" : "") + (sunk ? " sinks" : "") +
          (weighed ? p.average_weights ? " averaged weights" : " weights" : "") +
          (through_weights ? " dweights" : "") + (reduced ? " statistics" : "") +
          (p.softcap > 0 ? " softcap" : "") + (p.dropout_threshold ? " dropout" : "") + " window " +
          std::to_string(p.window_left) + " " + std::to_string(p.window_right);

  // The definition, row by row.
  Expected out_(out), lse_(lse), weights_(weights), dq_(dq), dk_(dk), dv_(dv), dbias_(dbias),
      dsinks_(dsinks), mass_(mass), entropy_(entropy), top_weights_(top_weights);
  std::vector<double> kept_weights, logit((size_t)Sk), slope_of_cap((size_t)Sk), dp((size_t)Sk);
  for (int64_t row = 0; row < B * Hq * Sq; ++row) {
    const int64_t b = row / Sq / Hq, h = row / Sq % Hq, i = row % Sq, g = h / (Hq / Hkv);
    const double sink = sunk ? sinks(h) : -INFINITY;
    double top = sink;
    for (int64_t j = 0; j < Sk; ++j) {
      const int64_t ahead = j - i - (p.bottom_right ? Sk - Sq : 0);
      const bool seen = (p.window_left < 0 || ahead >= -p.window_left) &&
                        (p.window_right < 0 || ahead <= p.window_right) &&
                        !(masked && !*mask.at(b, h, i, j)) && !(padded && *padding.at(b, j));
      double s = -INFINITY;
      if (seen) {
        s = 0;
        for (int64_t d = 0; d < D; ++d) s += q(b, h, i, d) * k(b, g, j, d);
        s *= p.scale;
        const double t = p.softcap > 0 ? tanh(s / p.softcap) : 0;
        slope_of_cap[(size_t)j] = 1 - t * t;
        if (p.softcap > 0) s = p.softcap * t;
        if (biased) s += bias(b, h, i, j);
        if (alibi) s -= slopes(b, h) * (double)llabs(ahead);
      }
      logit[(size_t)j] = s;
      top = std::max(top, s);
    }
    if (top == -INFINITY) {
      lse_(b, h, i) = -INFINITY;
      continue;
    }
    double sum = sunk ? exp(sink - top) : 0;
    for (const double s : logit) sum += exp(s - top);
    lse_(b, h, i) = top + log(sum);
    // delta = sum p dp - dlse, then ds = p (dp - delta)
    double delta_ = through_lse ? -grad_lse(b, h, i) : 0;
    kept_weights.assign((size_t)(Sk + p.num_top), 0.0);
    for (int64_t j = 0; j < Sk; ++j) {
      const double weight = exp(logit[(size_t)j] - lse_(b, h, i));
      if (logit[(size_t)j] == -INFINITY) continue;
      const double kept = dropout_factor(p, b * Hq + h, i, j);
      weights_(b, h, i, j) += weight * kept * share;
      kept_weights[(size_t)j] = weight * kept;
      mass_(b, h, j) += weight * kept;
      if (weight * kept > 0) entropy_(b, h, i) -= weight * kept * log(weight * kept);
      dp[(size_t)j] = through_weights ? kept * share * grad_weights(b, h, i, j) : 0;
      for (int64_t d = 0; d < Dv; ++d) {
        out_(b, h, i, d) += weight * kept * v(b, g, j, d);
        dp[(size_t)j] += kept * grad_out(b, h, i, d) * v(b, g, j, d);
        dv_(b, g, j, d) += weight * kept * grad_out(b, h, i, d);
      }
      delta_ += weight * dp[(size_t)j];
    }
    for (int64_t j = 0; j < Sk; ++j) {
      if (logit[(size_t)j] == -INFINITY) continue;
      double ds = exp(logit[(size_t)j] - lse_(b, h, i)) * (dp[(size_t)j] - delta_);
      if (bias_gradient) dbias_(b, h, i, j) += ds;
      ds *= p.scale * slope_of_cap[(size_t)j];
      for (int64_t d = 0; d < D; ++d) {
        dq_(b, h, i, d) += ds * k(b, g, j, d);
        dk_(b, g, j, d) += ds * q(b, h, i, d);
      }
    }
    if (sunk) dsinks_(h) -= exp(sink - lse_(b, h, i)) * delta_;
    std::sort(kept_weights.rbegin(), kept_weights.rend());
    for (int64_t n = 0; n < p.num_top; ++n) top_weights_(b, h, i, n) = kept_weights[(size_t)n];
  }

  const KernelTable& kernels = kernel_table();
  std::vector<uint8_t> mask_blocks(kernels.mask_blocks_bytes(p));
  if (!mask_blocks.empty()) {
    p.mask_blocks = mask_blocks.data();
    run(kernels.mask_blocks, p, threads);
  }
  run_forward(p, out, lse);
  const auto bound = [&](const Phase& phase) {
    return [&phase, &p](int count) { run(phase, p, count); };
  };
  compare("out", out, out_, type);
  if (p.lse != nullptr) compare("lse", lse, lse_, accumulated);
  if (weighed) {
    p.weights = score_view(weights);
    run_all({bound(kernels.attention_weights.weights)}, {&weights});
    compare("weights", weights, weights_, type);
    p.weights = through_weights ? score_view(grad_weights) : ScoreView();
  }
  if (reduced) {
    p.mass = mass.data, p.entropy = entropy.data;
    p.top_weights = top_weights.data, p.top_keys = (int64_t*)top_keys.data;
    const StatisticsKernels& statistics = kernels.attention_statistics;
    const std::vector<char> shared = shared_memory(p, statistics.call_workspace_bytes(p));
    run_all({bound(statistics.rows), bound(statistics.mass)},
            {&mass, &entropy, &top_weights, &top_keys});
    compare("mass", mass, mass_, accumulated);
    compare("entropy", entropy, entropy_, accumulated);
    compare("top weights", top_weights, top_weights_, accumulated);
  }
  if (!backward) return;
  const std::vector<char> shared =
      shared_memory(p, kernels.attention_backward.call_workspace_bytes(p));
  run_all({bound(kernels.attention_backward.delta), bound(kernels.attention_weights.delta),
           bound(kernels.attention_backward.sinks), bound(kernels.attention_backward.keys),
           bound(kernels.attention_backward.queries), bound(kernels.attention_backward.heads),
           bound(kernels.attention_backward.combine)},
          {&delta, &dq, &dk, &dv, &dbias, &dsinks});
  compare("dq", dq, dq_, type);
  compare("dk", dk, dk_, type);
  compare("dv", dv, dv_, type);
  // If there are no scores, no task may own dbias, and the operator sets it to zero.
  if (bias_gradient && Sq * Sk > 0) compare("dbias", dbias, dbias_, coarser(type, bias.dtype));
  if (sunk) compare("dsinks", dsinks, dsinks_, type);
}

// Runs sequences of different lengths: packed, with used lengths, in pages, in any combination.
// Keys that no sequence uses hold NaN, and the arrays of lengths have no spare elements.
void sequences_case(Random& random) {
  AttentionParams p;
  p.dtype = any_type(random);
  const DType type = p.dtype, accumulated = wide(type);
  const bool packed = random.chance(60), paged = random.chance(50), used = random.chance(50);
  const bool few = random.chance(50), many_keys = few && random.chance(30);
  p.B = random.range(packed ? 0 : 1, 4);
  p.Hkv = random.chance(30) ? 4 : random.range(1, 2);
  p.Hq = p.Hkv * random.range(1, 3);
  p.D = many_keys ? random.range(100, 140) : random.range(1, 40);
  p.Dv = random.chance(50) ? p.D : random.range(1, 40);
  const int64_t B = p.B, Hq = p.Hq, Hkv = p.Hkv, D = p.D, Dv = p.Dv;

  std::vector<int32_t> Sq, Sk, seqused, cu_q{0}, cu_k{0};  // Sk counts unused keys too
  const auto length = [&] { return (int32_t)random.range(0, few ? 3 : 110); };
  const int32_t common = length();
  int64_t longest_q = 0, longest_k = 0, room = 0;
  for (int64_t b = 0; b < B; ++b) {
    Sq.push_back(packed ? length() : common);
    seqused.push_back((int32_t)random.range(0, many_keys ? 2500 : 210));
    if (!packed && !used && b > 0) seqused[(size_t)b] = seqused[0];
    Sk.push_back(seqused.back() + (used ? (int32_t)random.range(0, 9) : 0));
    cu_q.push_back(cu_q.back() + Sq.back());
    cu_k.push_back(cu_k.back() + Sk.back());
    longest_q = std::max<int64_t>(longest_q, Sq.back());
    longest_k = std::max<int64_t>(longest_k, seqused.back());
    room = std::max<int64_t>(room, Sk.back());
  }
  p.Sq = longest_q, p.Sk = longest_k;
  const int64_t page_size = random.chance(50) ? random.range(1, 20) : random.range(60, 100);
  const int64_t max_pages = (room + page_size - 1) / page_size, num_pages = B * max_pages + 1;
  std::vector<int32_t> table;
  for (int64_t n = 0; n < B * max_pages; ++n) table.push_back((int32_t)n);
  for (size_t n = table.size(); n-- > 1;) {
    std::swap(table[n], table[(size_t)random.range(0, (int64_t)n)]);
  }
  // The last sequence may share its first page with the first one.
  if (max_pages > 0 && random.chance(30)) table[(size_t)((B - 1) * max_pages)] = table[0];
  const auto tokens = [&](int64_t H, int64_t width) {  // sizes for queries
    return packed ? Sizes{1, H, cu_q.back(), width} : Sizes{B, H, common, width};
  };
  const auto keys = [&](int64_t width) {
    if (paged) return Sizes{num_pages, Hkv, page_size, width};
    return packed ? Sizes{1, Hkv, cu_k.back(), width} : Sizes{B, Hkv, room, width};
  };
  Array q(random, tokens(Hq, D), type, Last::kDense),
      out(random, tokens(Hq, Dv), type, Last::kDense),
      grad_out(random, tokens(Hq, Dv), type, Last::kDense);
  Array k(random, keys(D), type, Last::kDense), v(random, keys(Dv), type, Last::kDense);
  q.randomise(random), grad_out.randomise(random);
  const Sizes row_sizes = packed ? Sizes{Hq, cu_q.back()} : Sizes{B, Hq, common};
  Array lse = contiguous(row_sizes, accumulated), delta = contiguous(row_sizes, accumulated);
  Array dq(random, tokens(Hq, D), type, Last::kDense);
  Array dk(random, keys(D), type, Last::kDense), dv(random, keys(Dv), type, Last::kDense);
  Array whole_dk = contiguous({B, Hkv, max_pages * page_size, D}, type);
  Array whole_dv = contiguous({B, Hkv, max_pages * page_size, Dv}, type);
  for (Array* x : {&dk, &dv}) x->each([&](char* at) { set(at, type, 0); });
  const auto key_at = [&](const Array& x, int64_t b, int64_t g, int64_t n, int64_t d) {
    if (paged) return x.at(table[(size_t)(b * max_pages + n / page_size)], g, n % page_size, d);
    return packed ? x.at(0, g, cu_k[(size_t)b] + n, d) : x.at(b, g, n, d);
  };
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t g = 0; g < Hkv; ++g) {
      for (int64_t n = 0; n < seqused[(size_t)b]; ++n) {
        for (int64_t d = 0; d < D; ++d) set(key_at(k, b, g, n, d), type, random.value());
        for (int64_t d = 0; d < Dv; ++d) set(key_at(v, b, g, n, d), type, random.value());
      }
    }
    for (int64_t n = (seqused[(size_t)b] + page_size - 1) / page_size; n < max_pages; ++n) {
      if (paged) table[(size_t)(b * max_pages + n)] = -1;  // not in use, so any number
    }
  }
  p.query = view(q), p.key = view(k), p.value = view(v), p.out = view(out);
  if (packed) {
    p.cu_seqlens_q = cu_q.data();
    p.query.stride_b = p.out.stride_b = 0;
    if (!paged) p.key.stride_b = p.value.stride_b = 0;
    if (!paged || !used) p.cu_seqlens_k = cu_k.data();
  }
  if (used || (paged && !packed)) p.seqused_k = seqused.data();
  if (paged) {
    p.block_table = table.data();
    p.block_table_stride_b = max_pages;
    p.page_size = page_size;
  }
  p.grad_out = view(grad_out), p.dq = view(dq), p.dk = view(dk), p.dv = view(dv);
  if (packed) p.grad_out.stride_b = p.dq.stride_b = 0;
  if (packed && !paged) p.dk.stride_b = p.dv.stride_b = 0;
  if (paged) p.page_dk = p.dk, p.page_dv = p.dv, p.dk = view(whole_dk), p.dv = view(whole_dv);
  p.delta = delta.data;
  const bool backward = random.chance(70);
  if (backward || random.chance(50)) p.lse = lse.data;
  p.lse_stride_b = packed ? 0 : Hq * common;
  p.lse_stride_h = packed ? cu_q.back() : common;

  p.scale = (double)random.range(-60, 100) / 100;
  p.bottom_right = random.chance(50);
  if (random.chance(30)) p.window_left = random.range(0, 60);
  if (random.chance(50)) p.window_right = random.chance(50) ? 0 : random.range(0, 60);
  Array sinks = contiguous({Hq}, accumulated), dsinks = contiguous({Hq}, accumulated);
  sinks.randomise(random);
  const bool sunk = random.chance(30);
  if (sunk) p.sinks = sinks.data, p.dsinks = dsinks.data;
  choose_dropout(random, p);

  what += " sequences B" + std::to_string(B) + " Hq" + std::to_string(Hq) + " Hkv" +
          std::to_string(Hkv) + " Sq" + std::to_string(p.Sq) + " Sk" + std::to_string(p.Sk) + " D" +
          std::to_string(D) + " Dv" + std::to_string(Dv) + " dtype " + std::to_string((int)type) +
          (packed ? " packed" : "") + (used ? " used" : "") +
          (paged ? " pages of " + std::to_string(page_size) : "") + (sunk ? " sinks" : "") +
          (p.dropout_threshold ? " dropout" : "") + " window " + std::to_string(p.window_left) +
          " " + std::to_string(p.window_right);

  Expected out_(out), lse_(lse), dq_(dq), dk_(dk), dv_(dv), dsinks_(dsinks);
  std::vector<double> logit((size_t)longest_k), dp((size_t)longest_k);
  for (int64_t b = 0; b < B; ++b) {
    const int64_t queries = Sq[(size_t)b], used_keys = seqused[(size_t)b];
    const int64_t at_b = packed ? 0 : b, first = packed ? cu_q[(size_t)b] : 0;
    for (int64_t row = 0; row < Hq * queries; ++row) {
      const int64_t h = row / queries, i = row % queries, g = h / (Hq / Hkv);
      double top = sunk ? sinks(h) : -INFINITY, sum = 0, delta_ = 0;
      for (int64_t j = 0; j < used_keys; ++j) {
        const int64_t ahead = j - i - (p.bottom_right ? used_keys - queries : 0);
        double s = -INFINITY;
        if ((p.window_left < 0 || ahead >= -p.window_left) &&
            (p.window_right < 0 || ahead <= p.window_right)) {
          s = 0;
          for (int64_t d = 0; d < D; ++d) {
            s += q(at_b, h, first + i, d) * get(key_at(k, b, g, j, d), type);
          }
          s *= p.scale;
        }
        logit[(size_t)j] = s;
        top = std::max(top, s);
      }
      double& row_lse = packed ? lse_(h, first + i) : lse_(b, h, i);
      row_lse = -INFINITY;
      if (top == -INFINITY) continue;
      for (int64_t j = 0; j < used_keys; ++j) sum += exp(logit[(size_t)j] - top);
      row_lse = top + log(sum + (sunk ? exp(sinks(h) - top) : 0));
      const auto place = [&](int64_t j) {  // (batch or page, row) of key j
        const int64_t page = paged ? table[(size_t)(b * max_pages + j / page_size)] : at_b;
        return std::pair(page, paged ? j % page_size : packed ? cu_k[(size_t)b] + j : j);
      };
      for (int64_t j = 0; j < used_keys; ++j) {
        const double kept = dropout_factor(p, b * Hq + h, i, j);
        const double weight = exp(logit[(size_t)j] - row_lse) * kept;
        dp[(size_t)j] = 0;
        for (int64_t d = 0; d < Dv && weight != 0; ++d) {
          const double value = get(key_at(v, b, g, j, d), type);
          out_(at_b, h, first + i, d) += weight * value;
          dp[(size_t)j] += kept * value * grad_out(at_b, h, first + i, d);
          dv_(place(j).first, g, place(j).second, d) += weight * grad_out(at_b, h, first + i, d);
        }
        delta_ += exp(logit[(size_t)j] - row_lse) * dp[(size_t)j];
      }
      for (int64_t j = 0; j < used_keys; ++j) {
        const double ds = p.scale * exp(logit[(size_t)j] - row_lse) * (dp[(size_t)j] - delta_);
        for (int64_t d = 0; d < D && ds != 0; ++d) {
          dq_(at_b, h, first + i, d) += ds * get(key_at(k, b, g, j, d), type);
          dk_(place(j).first, g, place(j).second, d) += ds * q(at_b, h, first + i, d);
        }
      }
      if (sunk) dsinks_(h) -= exp(sinks(h) - row_lse) * delta_;
    }
  }
  run_forward(p, out, lse);
  compare("out", out, out_, type);
  if (p.lse != nullptr) compare("lse", lse, lse_, accumulated);
  if (!backward) return;
  const KernelTable& kernels = kernel_table();
  const auto bound = [&](const Phase& phase) {
    return [&phase, &p](int count) { run(phase, p, count); };
  };
  const auto clear_pages = [&](int) {
    for (Array* x : {&dk, &dv}) x->each([&](char* at) { set(at, type, 0); });
  };
  const std::vector<char> shared =
      shared_memory(p, kernels.attention_backward.call_workspace_bytes(p));
  run_all({bound(kernels.attention_backward.delta), bound(kernels.attention_backward.sinks),
           clear_pages, bound(kernels.attention_backward.keys),
           bound(kernels.attention_backward.queries), bound(kernels.attention_backward.heads),
           bound(kernels.attention_backward.combine), bound(kernels.attention_backward.pages)},
          {&delta, &dq, &dk, &dv, &dsinks});
  compare("dq", dq, dq_, type);
  compare("dk", dk, dk_, type);
  compare("dv", dv, dv_, type);
  if (sunk) compare("dsinks", dsinks, dsinks_, type);
}

void dropout_case(Random& random) {
  AttentionParams p;
  p.B = random.range(0, 2), p.Hq = random.range(1, 3);
  p.Sq = random.range(0, 60), p.Sk = random.range(0, 210);
  while (p.dropout_threshold == 0) choose_dropout(random, p);
  Array keep(random, {p.B * p.Hq * p.Sq * p.Sk}, DType::kFloat32, Last::kDense, false, 1);
  p.dropout_keep = (uint8_t*)keep.data;
  what += " dropout_keep_mask";
  const Phase& phase = kernel_table().dropout_keep_mask;
  run_all({[&](int count) { run(phase, p, count); }}, {&keep});
  for (int64_t n = 0; n < keep.count(); ++n) {
    const int64_t row = n / p.Sk;
    const double factor = dropout_factor(p, row / p.Sq, row % p.Sq, n % p.Sk);
    if (p.dropout_keep[n] != (factor > 0)) fail("keep[" + std::to_string(n) + "]");
  }
}

// -- masked softmax ---------------------------------------------------------------------------

void set_strides(SoftmaxParams& p, SoftmaxParams::Operand operand, const Array& x) {
  for (int d = 0; d < p.dims; ++d)
    p.stride[operand][d] = x.size[(size_t)d] == 1 ? 0 : x.stride[(size_t)d];
}

void softmax_case(Random& random) {
  SoftmaxParams p;
  const DType type = p.dtype = any_type(random), accumulated = wide(type);
  const int64_t G = random.range(1, 3), H = random.range(1, 3), M = random.range(1, 12);
  const int64_t N = random.chance(10) ? random.range(30000, 70000) : random.range(1, 300);
  const int64_t rows = N > 300 ? 1 : G * H * M;
  const Sizes lead = N > 300 ? Sizes{1, 1, 1} : Sizes{G, H, M};
  p.columns = N, p.heads = lead[1], p.queries = lead[2], p.dims = 3;
  const Sizes sizes{lead[0], lead[1], lead[2], N};
  for (int d = 0; d < 3; ++d) p.size[d] = lead[(size_t)d];
  p.stride[SoftmaxParams::kNumber][2] = 1;
  p.stride[SoftmaxParams::kNumber][1] = lead[2];
  p.stride[SoftmaxParams::kNumber][0] = lead[2] * lead[1];

  Array x(random, sizes, type, Last::kDense), y(random, sizes, type, Last::kDense);
  Array grad(random, sizes, type, Last::kDense), dx(random, sizes, type, Last::kDense);
  x.randomise(random), grad.randomise(random);
  Array weights = contiguous({rows, N}, type), sink_weight = contiguous({rows}, accumulated);
  set_strides(p, SoftmaxParams::kInput, x);
  set_strides(p, SoftmaxParams::kOutput, y);
  p.input = x.data, p.output = y.data;
  p.weights = weights.data, p.sink_weight = sink_weight.data;
  p.scale = (double)random.range(-60, 100) / 100;
  p.causal = random.chance(40);
  if (p.causal && random.chance(50)) p.diagonal_offset = N - p.queries;
  const auto score_sizes = [&] {
    Sizes chosen = sizes;
    for (int64_t& size : chosen) size = random.chance(40) ? 1 : size;
    return chosen;
  };
  Array mask(random, score_sizes(), type, Last::kAny, true, 1);
  mask.each([&](char* at) { *at = random.chance(70); });
  const bool masked = random.chance(50), biased = random.chance(50), sunk = random.chance(40);
  if (masked) {
    set_strides(p, SoftmaxParams::kMask, mask);
    p.mask = (const uint8_t*)mask.data;
    p.mask_stride_k = mask.stride[3];
  }
  Array bias(random, score_sizes(), any_type(random), Last::kAny, true);
  bias.randomise(random);
  if (biased) {
    set_strides(p, SoftmaxParams::kBias, bias);
    p.bias = bias.data;
    p.bias_dtype = bias.dtype;
    p.bias_stride_k = bias.stride[3];
  }
  Array sinks = contiguous({p.heads}, accumulated), dsinks = contiguous({p.heads}, accumulated);
  sinks.randomise(random);
  if (sunk) p.sinks = sinks.data;
  choose_dropout(random, p);
  p.groups = rows;
  p.groups_per_task = random.range(1, rows);
  what += " masked_softmax [" + std::to_string(lead[0]) + ", " + std::to_string(lead[1]) + ", " +
          std::to_string(lead[2]) + ", " + std::to_string(N) + "] dtype " +
          std::to_string((int)type) + (masked ? " mask" : "") + (biased ? " bias" : "") +
          (sunk ? " sinks" : "") + (p.causal ? " causal" : "") +
          (p.dropout_threshold ? " dropout" : "");

  // The definition, row by row.
  Array dbias = contiguous(bias.size, bias.dtype);
  Expected y_(y), weights_(weights), dx_(dx), dbias_(dbias), dsinks_(dsinks);
  std::vector<double> logit((size_t)N);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t m = row % p.queries, h = row / p.queries % p.heads, g = row / p.queries / p.heads;
    double top = sunk ? sinks(h) : -INFINITY, sum = 0, delta = 0;
    for (int64_t j = 0; j < N; ++j) {
      const bool seen =
          !(p.causal && j > m + p.diagonal_offset) && !(masked && !*mask.at(g, h, m, j));
      logit[(size_t)j] =
          seen ? p.scale * x(g, h, m, j) + (biased ? bias(g, h, m, j) : 0) : -INFINITY;
      top = std::max(top, logit[(size_t)j]);
    }
    if (top == -INFINITY) continue;
    for (const double s : logit) sum += exp(s - top);
    if (sunk) sum += exp(sinks(h) - top);
    for (int64_t j = 0; j < N; ++j) {
      const double kept = dropout_factor(p, row / p.queries, m, j);
      const double weight = exp(logit[(size_t)j] - top) / sum;
      weights_(row, j) = weight;
      y_(g, h, m, j) = weight * kept;
      delta += weight * kept * grad(g, h, m, j);
    }
    for (int64_t j = 0; j < N; ++j) {
      const double kept = dropout_factor(p, row / p.queries, m, j);
      const double ds = weights_(row, j) * (kept * grad(g, h, m, j) - delta);
      dx_(g, h, m, j) = p.scale * ds;
      if (biased) dbias_(g, h, m, j) += ds;
    }
    if (sunk) dsinks_(h) -= exp(sinks(h) - top) / sum * delta;
  }

  const KernelTable& kernels = kernel_table();
  const auto bound = [&](const SoftmaxPhase& phase) {
    return [&phase, &p](int count) { run(phase, p, count); };
  };
  run_all({bound(kernels.masked_softmax.forward)}, {&y, &weights, &sink_weight});
  compare("out", y, y_, type);
  compare("weights", weights, weights_, type);

  // Backward, from the weights. Rows are visited so that those with the same dbias are neighbours.
  p.input = weights.data, p.output = dx.data, p.grad_out = grad.data;
  set_strides(p, SoftmaxParams::kGradOut, grad);
  set_strides(p, SoftmaxParams::kOutput, dx);
  for (int d = 0; d < 3; ++d) {
    p.stride[SoftmaxParams::kInput][d] = N * p.stride[SoftmaxParams::kNumber][d];
  }
  std::unique_ptr<char[]> partial;
  if (biased) {
    const SoftmaxParams given = p;
    p.groups = p.group_rows = 1;
    int to = 0;
    for (const bool kept : {true, false}) {
      for (int d = 0; d < 3; ++d) {
        if ((bias.size[(size_t)d] != 1) != kept) continue;
        (kept ? p.groups : p.group_rows) *= given.size[d];
        p.size[to] = given.size[d];
        for (int o = 0; o < SoftmaxParams::kOperands; ++o) p.stride[o][to] = given.stride[o][d];
        ++to;
      }
    }
    p.bias_width = bias.size[3];
    p.dbias = dbias.data;
    p.groups_per_task = random.range(1, p.groups);
    p.chunks = random.chance(50) ? random.range(1, p.group_rows) : 1;
    if (p.chunks > 1) {
      const int64_t bytes = p.groups * p.chunks * p.bias_width * bytes_of(accumulated);
      partial.reset(new char[(size_t)bytes]);
      p.partial = partial.get();
    }
  }
  Array sink_terms = contiguous({rows}, accumulated);
  if (sunk) p.dsinks = dsinks.data, p.sink_terms = sink_terms.data;
  std::vector<std::function<void(int)>> phases{bound(kernels.masked_softmax.backward)};
  if (p.chunks > 1) phases.push_back(bound(kernels.masked_softmax.backward_bias));
  if (sunk) phases.push_back(bound(kernels.masked_softmax.backward_sinks));
  run_all(phases, {&dx, &dbias, &dsinks});
  compare("dx", dx, dx_, type);
  if (biased) compare("dbias", dbias, dbias_, coarser(type, bias.dtype));
  if (sunk) compare("dsinks", dsinks, dsinks_, type);
}

// -- elementary functions ---------------------------------------------------------------------

void math_case(Random& random) {
  what += " apply_math";
  const bool is_double = random.chance(50);
  const DType dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  Array in(random, {random.range(0, 40)}, dtype, Last::kDense);
  Array out(random, in.size, dtype, Last::kDense);
  in.each([&](char* at) { set(at, dtype, 20 * random.value()); });
  for (const bool exp2 : {true, false}) {
    const MathFunction function = exp2 ? MathFunction::kExp2 : MathFunction::kTanh;
    kernel_table().apply_math(function, dtype, in.data, out.data, in.count());
    Expected want(out);
    for (int64_t i = 0; i < in.count(); ++i) want(i) = exp2 ? ::exp2(in(i)) : tanh(in(i));
    compare("apply_math", out, want, dtype);
  }
}

}  // namespace
}  // namespace driver

int main(int argc, char** argv) {
  using namespace driver;
  if (argc != 5) {
    const char* names[fused_attention::kMaxIsas];
    bool usable[fused_attention::kMaxIsas];
    const int count = fused_attention::list_isas(names, usable);
    for (int i = 0; i < count; ++i) {
      if (usable[i]) puts(names[i]);
    }
    return argc != 1;
  }
  const int64_t cases = atoll(argv[2]), seed = atoll(argv[3]);
  threads = atoi(argv[4]);
  if (!fused_attention::set_isa(argv[1])) {
    printf("no %s on this machine\n", argv[1]);
    return 1;
  }
  for (int64_t number = 0; number < cases; ++number) {
    Random random((uint64_t)(seed + number));
    what = "seed " + std::to_string(seed + number);
    switch ((seed + number) % 8) {
      case 0:
        dropout_case(random);
        math_case(random);
        break;
      case 1:
      case 2:
      case 3:
        softmax_case(random);
        break;
      case 4:
      case 5:
        sequences_case(random);
        break;
      default:
        attention_case(random);
    }
  }
  printf("%s: %lld cases\n", argv[1], (long long)cases);
}

// The kernels of attention forward, in order of preference (see phases.inl).
#include "attention_forward.inl"
#include "phases.inl"

namespace fused_attention {
namespace {

constexpr ForwardKernel kOnVectors = {
    .name = "attention_forward",
    .reason = "serves every call",
    .serves = [](const AttentionParams&) { return true; },
    .tiles =
        [](const AttentionParams& p) {
          return p.dtype == DType::kFloat64 ? VectorForward<double>::tiles(p)
                                            : VectorForward<float>::tiles(p);
        },
    .call_workspace_bytes = nullptr,
    .phases = {phase<ByType<VectorForward>>()},
};

#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
constexpr ForwardKernel kOnPairs = {
    .name = "attention_forward on pairs",
    .reason = "two bfloat16 products a lane at once",
    .serves = [](const AttentionParams& p) { return p.dtype == DType::kBFloat16; },
    .tiles = AttentionForward<PairProducts>::tiles,
    .call_workspace_bytes = nullptr,
    .phases = {phase<ForwardByHeads<PairProducts>>()},
};
#endif

#ifdef FUSED_ATTENTION_AMX_PRODUCTS
// Whether there are enough keys to make up for decomposing them, and no lse is asked for: kernels
// that read lse compute the scores again, in float, which rounds differently.
bool many_keys(const AttentionParams& p) { return p.Sk >= 128 && p.lse == nullptr; }
template <int kPlanes, int kScoreOrders = kPlanes>
constexpr ForwardKernel amx_forward(const char* reason, bool (*serves)(const AttentionParams&)) {
  using Products = AmxProducts<kPlanes, kScoreOrders>;
  return {.name = "attention_forward on tiles",
          .reason = reason,
          .serves = serves,
          .tiles = AttentionForward<Products>::tiles,
          .call_workspace_bytes = DecomposeKeysAndValues<kPlanes>::call_workspace_bytes,
          .phases = {phase<DecomposeKeysAndValues<kPlanes>>(), phase<ForwardByHeads<Products>>()}};
}

constexpr ForwardKernel kOneProduct =
    amx_forward<1>("bfloat16 products on AMX tiles", [](const AttentionParams& p) {
      return p.dtype == DType::kBFloat16 ||
             (p.dtype == DType::kFloat32 && p.precision == 2 && many_keys(p));
    });
constexpr ForwardKernel kFourProducts =
    amx_forward<2, 3>("4 and 3 products of bfloat16 planes on AMX tiles",
                      [](const AttentionParams& p) { return p.dtype == DType::kFloat16; });
constexpr ForwardKernel kThreeProducts =
    amx_forward<2>("3 products of bfloat16 planes on AMX tiles", [](const AttentionParams& p) {
      return p.dtype == DType::kFloat32 && p.precision == 1 && many_keys(p);
    });
constexpr ForwardKernel kSixProducts = amx_forward<3>(
    "6 products of bfloat16 planes on AMX tiles",
    [](const AttentionParams& p) { return p.dtype == DType::kFloat32 && many_keys(p); });
#endif

}  // namespace

// Best first; the last serves every call.
constinit const ForwardKernel* const FUSED_ATTENTION_ISA::attention_forward[] = {
    &FUSED_ATTENTION_ISA::attention_decode,
#ifdef FUSED_ATTENTION_AMX_PRODUCTS
    &kOneProduct,
    &kFourProducts,
    &kThreeProducts,
    &kSixProducts,
#endif
#ifdef FUSED_ATTENTION_PAIR_PRODUCTS
    &kOnPairs,
#endif
    &kOnVectors,
};

}  // namespace fused_attention

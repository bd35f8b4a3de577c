// The kernel of attention forward for few queries (see phases.inl).
#include "attention_decode.inl"
#include "phases.inl"

namespace fused_attention {

constinit const ForwardKernel FUSED_ATTENTION_ISA::attention_decode = {
    .name = "attention_decode",
    .reason =
        "few queries: keys and values are read once, in place, for all heads that share"
        " them; 17x the ordinary kernel for 1 query of 4 heads against 2048 keys",
    .serves = decode_serves,
    .tiles = decode_tiles,
    .call_workspace_bytes = decode_call_workspace_bytes,
    .phases = {phase<ByType<DecodeSplit>>(), phase<ByType<DecodeCombine>>()},
};

}  // namespace fused_attention

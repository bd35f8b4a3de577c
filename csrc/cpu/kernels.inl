// The kernel table of one instruction set: each phase for the two types that kernels compute in.
// 16-bit tensors compute in float.

template <template <typename> class Kernel>
struct ByType {
  static bool wide(const AttentionParams& p) { return p.dtype == DType::kFloat64; }
  static int64_t num_tasks(const AttentionParams& p) {
    return wide(p) ? Kernel<double>::num_tasks(p) : Kernel<float>::num_tasks(p);
  }
  static size_t workspace_bytes(const AttentionParams& p) {
    return wide(p) ? Kernel<double>::workspace_bytes(p) : Kernel<float>::workspace_bytes(p);
  }
  static void run(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
    wide(p) ? Kernel<double>::run(p, begin, end, workspace)
            : Kernel<float>::run(p, begin, end, workspace);
  }
};
template <typename Kernel>
constexpr Phase phase() {
  return {Kernel::num_tasks, Kernel::workspace_bytes, Kernel::run};
}

TileConfig attention_tiles(DType dtype) {
  return {dtype == DType::kFloat64 ? kBlockM<double> : kBlockM<float>, kBlockN};
}

constexpr KernelTable kKernels = {
    kIsaName,
    phase<ByType<AttentionForward>>(),
    phase<ByType<AttentionBackwardDelta>>(),
    phase<ByType<AttentionBackwardSinks>>(),
    phase<ByType<AttentionBackwardKeys>>(),
    phase<ByType<AttentionBackwardQueries>>(),
    phase<DropoutKeepMask>(),
    attention_tiles,
};

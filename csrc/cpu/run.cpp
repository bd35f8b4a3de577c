#include "run.h"

#include <dirent.h>
#include <pthread.h>
#include <stdlib.h>

#include <atomic>

#include "../describe.h"

namespace fused_attention {
namespace {

// Scratch memory of a thread, kept between calls while it is small.
class Workspace {
 public:
  // Returns null if there is no memory.
  void* at_least(size_t bytes) {
    if (bytes > size_) {
      release();
      data_ = aligned_alloc(64, (bytes + 63) / 64 * 64);
      size_ = data_ == nullptr ? 0 : bytes;
    }
    return data_;
  }
  void trim() {
    if (size_ > kKeptBytes) release();
  }
  ~Workspace() { release(); }

 private:
  static constexpr size_t kKeptBytes = 4 << 20;
  void release() {
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

// Tasks [next, end), which threads draw one by one.
struct alignas(64) TaskRange {
  std::atomic<int64_t> next{0};
  int64_t end = 0;
};
constexpr int64_t kMaxShares = 16;

// Runs the tasks of share `first`, then those that are left in the other shares. Returns false,
// without having drawn a task, if there is no memory for the workspace: other threads may have
// theirs.
template <typename Params>
bool run_tasks(const PhaseOf<Params>& phase, const Params& params, TaskRange* shares, int64_t count,
               int64_t first) {
  static thread_local Workspace workspace;
  const size_t bytes = phase.workspace_bytes(params);
  void* memory = workspace.at_least(bytes);
  if (memory == nullptr && bytes > 0) return false;
  for (int64_t i = 0; i < count; ++i) {
    TaskRange& share = shares[(first + i) % count];
    for (int64_t task; (task = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) {
      phase.run(params, task, task + 1, memory);
    }
  }
  workspace.trim();
  return true;
}

bool had_several_threads = false, forked = false;

bool has_several_threads() {
  int entries = 0;  // of which two are "." and ".."
  if (DIR* tasks = opendir("/proc/self/task")) {
    while (entries < 4 && readdir(tasks) != nullptr) ++entries;
    closedir(tasks);
  }
  return entries > 3;
}

const int fork_handler = pthread_atfork([] { had_several_threads = has_several_threads(); },
                                        nullptr, [] { forked |= had_several_threads; });

}  // namespace

bool forked_from_threads() { return forked; }

namespace {
template <typename Params>
void run_phase(const PhaseOf<Params>& phase, const Params& params, bool own_ranges) {
  const int64_t tasks = phase.num_tasks(params);
  if (tasks == 0) return;
  const int64_t most = forked_from_threads() ? 1 : (int64_t)torch::stable::get_num_threads();
  const int64_t threads = most < tasks ? most : tasks;
  note("{\"tasks\": %lld, \"workspace\": %lld, \"threads\": %lld}", (long long)tasks,
       (long long)phase.workspace_bytes(params), (long long)threads);
  if (is_dry()) return;
  TaskRange shares[kMaxShares];
  shares[0].end = tasks;
  const auto refuse = [&] {
    refuse_for_memory("the workspace of a thread", (double)phase.workspace_bytes(params),
                      "fewer keys, or a bias whose gradient is not asked for, need less");
  };
  if (tasks == 1 || most == 1) {
    if (!run_tasks(phase, params, shares, 1, 0)) refuse();
    return;
  }
  const int64_t count = !own_ranges ? 1 : threads < kMaxShares ? threads : kMaxShares;
  for (int64_t i = 0; i < count; ++i) {
    shares[i].next = tasks * i / count;
    shares[i].end = tasks * (i + 1) / count;
  }
  std::atomic<bool> served = false;  // whether a thread had its workspace: every task was then run
  torch::stable::parallel_for(0, threads, 1, [&](int64_t thread, int64_t) {
    if (run_tasks(phase, params, shares, count, thread % count)) served = true;
  });
  if (!served) refuse();
}
}  // namespace

void run(const Phase& phase, const AttentionParams& params, bool own_ranges) {
  run_phase(phase, params, own_ranges);
}
void run(const SoftmaxPhase& phase, const SoftmaxParams& params, bool own_ranges) {
  run_phase(phase, params, own_ranges);
}

}  // namespace fused_attention

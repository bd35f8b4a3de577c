// Running the phases of a kernel on torch's threads.
#pragma once

#include "dispatch.h"

namespace fused_attention {

// Runs every task of the phase. Threads draw tasks from counters, so that those that got short ones
// take more of them. With one counter, threads work on neighbouring tasks, which read the same
// keys; with a counter for each thread (own_ranges), a thread stays in one part of the memory,
// where no other one takes page faults. In a dry run the phase is noted and not run.
void run(const Phase& phase, const AttentionParams& params, bool own_ranges = false);
void run(const SoftmaxPhase& phase, const SoftmaxParams& params, bool own_ranges = false);

// OpenMP's threads do not survive a fork, and a child that waits for them hangs. Whether this is
// the child of a process that had more than one thread: it then computes on its own one.
bool forked_from_threads();

}  // namespace fused_attention

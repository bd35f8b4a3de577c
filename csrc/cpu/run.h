// Runs the phases of a kernel on torch's threads.
#pragma once

#include "dispatch.h"

namespace fused_attention {

// Runs every task of the phase. Threads draw tasks from counters, so that a thread with short tasks
// takes more of them. With one counter, threads work on neighbouring tasks, which read the same
// keys. With a counter for each thread (own_ranges), a thread stays in one part of the memory,
// where no other thread takes page faults. In a dry run the phase is noted and not run.
void run(const Phase& phase, const AttentionParams& params, bool own_ranges = false);
void run(const SoftmaxPhase& phase, const SoftmaxParams& params, bool own_ranges = false);

// Whether this process was forked from one that had more than one thread. It must then compute on
// its only thread: OpenMP's threads do not survive a fork, and a child that waits for them hangs.
bool forked_from_threads();

}  // namespace fused_attention

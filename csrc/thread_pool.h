// SPDX-License-Identifier: Apache-2.0
// One pool of std::threads for the process, made on first use and made anew after fork.
#pragma once

#include <cstdint>
#include <functional>

namespace knnfast {

// Calls work(thread, task) once for every task in [0, tasks), handed out one at a time to at most
// `threads` threads (0: num_threads()), the caller among them; thread < threads. Rethrows the first
// exception. When another caller holds the pool, everything runs on the caller: many threads that
// search at once need no pool.
void parallel_for(int64_t tasks, const std::function<void(int thread, int64_t task)>& work,
                  int threads = 0);

}  // namespace knnfast

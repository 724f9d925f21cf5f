// SPDX-License-Identifier: Apache-2.0
// One pool of std::threads for the process, made on first use and made anew after fork.
#pragma once

#include <cstdint>
#include <type_traits>

namespace knnfast {

int cores();  // that the process's first thread may run on

// A callable that outlives the call it is handed to: no copy, no allocation.
class TaskRef {
 public:
  template <class F, class = std::enable_if_t<!std::is_same_v<std::decay_t<F>, TaskRef>>>
  TaskRef(F&& f)
      : object_(const_cast<void*>(static_cast<const void*>(&f))),
        call_([](void* object, int thread, int64_t task) {
          (*static_cast<std::remove_reference_t<F>*>(object))(thread, task);
        }) {}
  void operator()(int thread, int64_t task) const { call_(object_, thread, task); }

 private:
  void* object_;
  void (*call_)(void*, int, int64_t);
};

// Calls work(int thread, int64_t task) once for every task in [0, tasks), handed out one at a time
// to at most `threads` threads (0: num_threads()), the caller among them; thread < threads. Where
// the system refuses some of them, those that there are do the work. Rethrows the first exception.
// When another caller holds the pool, everything runs on the caller: many threads that search at
// once need no pool.
void parallel_for(int64_t tasks, TaskRef work, int threads = 0);

}  // namespace knnfast

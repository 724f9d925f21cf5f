// SPDX-License-Identifier: Apache-2.0
#include "common/thread_pool.h"

#include <pthread.h>
#ifdef __linux__
#include <sched.h>
#endif
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <vector>

#include "common/exact_floats.h"
#include "knnfast/index.h"

namespace knnfast {
namespace {

// Linux likes to wake a thread on the core of the one that wakes it, and lets it stand there behind
// its caller for milliseconds while another core is idle. So for its waking a worker is kept off
// the core that the caller is on. Awake, it may run wherever it might before.
class Steering {
#ifdef __linux__
 public:
  void keep_off_this_core(std::thread& worker) {
    const int core = sched_getcpu();
    if (core < 0 || core >= CPU_SETSIZE) return;
    awake(worker.native_handle());  // it slept through its last call
    if (pthread_getaffinity_np(worker.native_handle(), sizeof allowed_, &allowed_) != 0) return;
    others_ = allowed_;
    CPU_CLR(core, &others_);
    if (!CPU_ISSET(core, &allowed_) || CPU_COUNT(&others_) == 0) return;
    narrowed_ = pthread_setaffinity_np(worker.native_handle(), sizeof others_, &others_) == 0;
  }

  // Gives back what was taken, unless somebody has set another mask since.
  void awake(pthread_t worker) {
    cpu_set_t now;
    if (narrowed_ && pthread_getaffinity_np(worker, sizeof now, &now) == 0 &&
        CPU_EQUAL(&now, &others_))
      pthread_setaffinity_np(worker, sizeof allowed_, &allowed_);
    narrowed_ = false;
  }

 private:
  cpu_set_t allowed_{}, others_{};
  bool narrowed_ = false;
#else
 public:
  void keep_off_this_core(std::thread&) {}
  void awake(pthread_t) {}
#endif
};

class Pool {
 public:
  explicit Pool(int workers) : steering_(size_t(workers)) {
    threads_.reserve(size_t(workers));
    try {
      for (int i = 0; i < workers; ++i) threads_.emplace_back([this, i] { serve(i + 1); });
    } catch (const std::exception&) {  // the system gives no more, of threads or of memory
    }
  }

  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& t : threads_) t.join();
  }

  int workers() const { return int(threads_.size()); }

  void run(int64_t tasks, const TaskRef& work) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = &work;
      tasks_ = tasks;
      next_.store(0);
      error_ = nullptr;
      ++round_;
      // Among many cores an idle one is found, and steering every worker would take long.
      for (size_t i = 0; i < threads_.size() && threads_.size() <= kSteered; ++i)
        steering_[i].keep_off_this_core(threads_[i]);
    }
    wake_.notify_all();
    drain(work, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    // A worker that wakes only now finds nothing to do: another library's threads may be spinning
    // on its core, and no task waits for it.
    work_ = nullptr;
    done_.wait(lock, [&] { return active_ == 0; });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void drain(const TaskRef& work, int thread) {
    try {
      for (int64_t task; (task = next_.fetch_add(1)) < tasks_;) work(thread, task);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_.store(tasks_);
    }
  }

  void serve(int thread) {
    set_float_mode(kExactFloats);  // whatever that of the thread is that made this one
    uint64_t seen = 0;
    for (;;) {
      const TaskRef* work;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || (work_ && round_ != seen); });
        if (stop_) return;
        steering_[size_t(thread - 1)].awake(pthread_self());
        seen = round_;
        work = work_;
        ++active_;
      }
      drain(*work, thread);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--active_ == 0) done_.notify_one();
    }
  }

  static constexpr size_t kSteered = 8;
  std::vector<std::thread> threads_;
  std::vector<Steering> steering_;  // each worker's, under the mutex
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const TaskRef* work_ = nullptr;
  int64_t tasks_ = 0;
  std::atomic<int64_t> next_{0};
  uint64_t round_ = 0;
  std::exception_ptr error_;
  int active_ = 0;  // workers inside the present round
  bool stop_ = false;
};

int cores_allowed() {
#ifdef __linux__
  cpu_set_t set;
  if (sched_getaffinity(getpid(), sizeof set, &set) == 0 && CPU_COUNT(&set) > 0)
    return CPU_COUNT(&set);
#endif
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

struct Owner {
  std::mutex mutex;  // held by the caller that is using the pool
  Pool* pool = nullptr;
  int workers = -1;   // that were asked for
  uint64_t call = 0;  // of set_num_threads, before that
};

// Never destroyed: a search may still run while the process ends.
Owner* g_owner = new Owner;
std::atomic<int> g_threads{0};
std::atomic<uint64_t> g_calls{0};  // of set_num_threads: each asks anew for what was refused

// The child of a fork has no workers, and perhaps a mutex locked for ever: both are left behind.
void after_fork() { g_owner = new Owner; }

Owner& owner() {
  static const int registered = pthread_atfork(nullptr, nullptr, after_fork);
  (void)registered;
  return *g_owner;
}

}  // namespace

int cores() {
  static const int allowed = cores_allowed();
  return allowed;
}

int num_threads() {
  const int n = g_threads.load(std::memory_order_relaxed);
  return n > 0 ? n : cores();
}

void set_num_threads(int64_t n) {
  constexpr int kMostThreads = 1024;
  if (n < 1 || n > kMostThreads)
    throw std::invalid_argument("n must be 1 to " + std::to_string(kMostThreads) + ", got " +
                                std::to_string(n));
  g_threads.store(static_cast<int>(n), std::memory_order_relaxed);
  ++g_calls;
}

void parallel_for(int64_t tasks, TaskRef work, int threads) {
  if (threads <= 0) threads = num_threads();
  if (tasks > 1 && threads > 1) {
    Owner& o = owner();
    std::unique_lock<std::mutex> lock(o.mutex, std::try_to_lock);
    if (lock.owns_lock()) {
      const uint64_t call = g_calls.load(std::memory_order_relaxed);
      if (o.workers != threads - 1 || (o.pool->workers() < o.workers && o.call != call)) {
        delete o.pool;
        o.pool = nullptr;
        o.workers = -1;
        o.pool = new Pool(threads - 1);
        o.workers = threads - 1;
        o.call = call;
      }
      o.pool->run(tasks, work);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) work(0, task);
}

}  // namespace knnfast

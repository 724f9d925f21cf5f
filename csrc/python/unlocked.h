// SPDX-License-Identifier: Apache-2.0
// Python's lock given up while C++ works.
#pragma once

#include <pybind11/pybind11.h>
#ifdef __GLIBCXX__
#include <cxxabi.h>
#endif

#include <chrono>
#include <thread>

// While it lives, this thread is without Python's lock. A daemon thread that wants it back when the
// interpreter ends is stopped for ever, as Python 3.14 does itself: older ones end the thread, for
// which C++ unwinds through what must not throw, and the process aborts.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() {
#ifdef __GLIBCXX__
    try {
      PyEval_RestoreThread(state_);
    } catch (abi::__forced_unwind&) {
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
#else
    PyEval_RestoreThread(state_);
#endif
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  PyThreadState* state_;
};

// SPDX-License-Identifier: Apache-2.0
// The Python module: the only file that knows pybind11. It checks nothing that knnfast/ has checked.
#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "knnfast's C++/CUDA core";
  m.attr("has_cuda") = bool(KNNFAST_HAS_CUDA);
}

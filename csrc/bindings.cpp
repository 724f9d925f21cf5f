// SPDX-License-Identifier: Apache-2.0
// The Python module: the only file that knows pybind11. It checks nothing that knnfast/ has checked.
#include <pybind11/pybind11.h>

#include "ops_cpu.h"

namespace py = pybind11;

namespace {

// Tensors arrive as addresses (0: absent); knnfast/ops has checked shapes, types and strides.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_ops(py::module_& m) {
  using namespace knnfast;
  using release = py::call_guard<py::gil_scoped_release>;
  m.def("ops_isa", [] { return ops_kernels().name; });
  m.def(
      "transition_choose",
      [](int64_t B, int64_t L, int K, uintptr_t weights, int64_t weights_stride, uintptr_t images,
         uint64_t seed, uintptr_t x_t, uintptr_t x_s, uintptr_t rows) {
        const StepGrid grid = {B, L, K, at<double>(weights), weights_stride, at<int64_t>(images),
                               seed};
        return transition_choose(grid, at<int64_t>(x_t), at<int64_t>(x_s), at<int64_t>(rows));
      },
      release());
  m.def(
      "transition_rows",
      [](int64_t B, int64_t L, int K, uintptr_t weights, int64_t weights_stride, uintptr_t images,
         uint64_t seed, int dtype, float guidance, float temperature, double top_r, int top_k,
         uintptr_t logits, uintptr_t null, int64_t stride, int64_t null_stride, bool compact,
         uintptr_t x_t, uintptr_t rows, int64_t count, uintptr_t x_s) {
        const StepGrid grid = {B, L, K, at<double>(weights), weights_stride, at<int64_t>(images),
                               seed};
        const RowRule rule = {K, dtype, guidance, temperature, top_r, top_k};
        return transition_rows(grid, rule, at<void>(logits), at<void>(null), stride, null_stride,
                               compact, at<int64_t>(x_t), at<int64_t>(rows), count,
                               at<int64_t>(x_s));
      },
      release());
  m.def(
      "transition_purity",
      [](int64_t B, int64_t L, int K, uintptr_t weights, int64_t weights_stride, uintptr_t images,
         uint64_t seed, int dtype, float guidance, float temperature, double top_r, int top_k,
         double purity, uintptr_t logits, uintptr_t null, int64_t stride, int64_t null_stride,
         uintptr_t x_t, uintptr_t x_s) {
        const StepGrid grid = {B, L, K, at<double>(weights), weights_stride, at<int64_t>(images),
                               seed};
        const RowRule rule = {K, dtype, guidance, temperature, top_r, top_k};
        return transition_purity(grid, rule, purity, at<void>(logits), at<void>(null), stride,
                                 null_stride, at<int64_t>(x_t), at<int64_t>(x_s));
      },
      release());
  m.def(
      "transition_loss",
      [](int64_t B, int64_t L, int K, int dtype, uintptr_t logits, int64_t stride, uintptr_t x_0,
         uintptr_t x_t, uintptr_t steps, uintptr_t weight, uintptr_t auxiliary, uintptr_t grad,
         int64_t grad_stride, uintptr_t loss, uintptr_t kl) {
        return transition_loss(B, L, K, dtype, at<void>(logits), stride, at<int64_t>(x_0),
                               at<int64_t>(x_t), at<double>(steps), at<double>(weight),
                               at<double>(auxiliary), at<void>(grad), grad_stride,
                               at<double>(loss), at<double>(kl));
      },
      release());
  m.def(
      "neighbour_attention",
      [](int64_t B, int64_t L, int D, int N, int H, int dtype, double eps, bool norm,
         bool residual, uintptr_t x, int64_t image_x, int64_t row_x, uintptr_t A, uintptr_t a,
         uintptr_t C, uintptr_t bias, uintptr_t mask, uintptr_t scale, int64_t image_scale,
         uintptr_t shift, int64_t image_shift, uintptr_t y) {
        const int64_t HN = int64_t(H) * N;
        neighbour_attention({{D, N, H, dtype, row_x, D, eps, norm, residual},
                             B, L, at<void>(x), at<void>(A), at<void>(a), at<void>(C),
                             at<void>(bias), at<void>(scale), at<void>(shift), at<bool>(mask),
                             image_x, HN * D, HN, HN * D, image_scale, image_shift, at<void>(y)});
      },
      release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "knnfast's C++/CUDA core";
  m.attr("has_cuda") = bool(KNNFAST_HAS_CUDA);
  bind_ops(m);
}

// SPDX-License-Identifier: Apache-2.0
// The part of the Python module that exists in CUDA builds only. Arrays arrive as addresses,
// streams as cudaStream_t numbers; knnfast/search/cuda_index.py has checked shapes, types and
// devices.
#include "python/bindings_cuda.h"

#include <pybind11/numpy.h>

#include "cuda/cuda_index.h"
#include "knnfast/index.h"
#include "python/unlocked.h"

namespace py = pybind11;

namespace {

using namespace knnfast::cuda;
using Int64s = py::array_t<int64_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Ids (int64) or a bitset (uint8), contiguous; an empty one restricts too. `given` keeps them.
HostIds host_ids(const py::object& given) {
  static const int64_t kNothing = 0;
  HostIds out;
  if (given.is_none()) return out;
  if (py::isinstance<Bytes>(given)) {
    const Bytes a = given.cast<Bytes>();
    out.bits = a.size() ? a.data() : reinterpret_cast<const uint8_t*>(&kNothing);
    out.count = a.size();
  } else {
    if (!py::isinstance<Int64s>(given))
      throw py::type_error("a filter must be a contiguous array of int64 or uint8");
    const Int64s a = given.cast<Int64s>();
    out.ids = a.size() ? a.data() : &kNothing;
    out.count = a.size();
  }
  return out;
}

Int64s to_array(const std::vector<int64_t>& v) {
  return Int64s(static_cast<py::ssize_t>(v.size()), v.data());
}

void append(knnfast::Index& to, const uint16_t* rows, int64_t n, const int64_t* ids) {
  to.add(rows, knnfast::DType::f16, n, ids);
}
void append(CudaIndex& to, const uint16_t* rows, int64_t n, const int64_t* ids) {
  to.add(rows, kF16, n, to.dim(), ids, false, nullptr);
}

// Into an empty index. Ids that count up from 0 stay automatic, without a list of them.
template <class From, class To>
void copy_rows(const From& from, To& to) {
  int64_t next = 0;  // the automatic id; -1 once ids differ
  to.skip_ids(from.each_piece([&](const int64_t* ids, const uint16_t* rows, int64_t n) {
    for (int64_t i = 0; i < n && next >= 0; ++i) next = ids[i] == next ? next + 1 : -1;
    append(to, rows, n, next >= 0 ? nullptr : ids);
  }));
}

}  // namespace

void bind_cuda(py::module_& m) {
  using release = py::call_guard<Unlocked>;
  py::register_exception<CudaError>(m, "CudaError", PyExc_RuntimeError);
  m.def("cuda_device_count", device_count, "CUDA devices a search can use; 0 without a driver");
  m.attr("cuda_max_k") = kMaxK;
  // Without the GIL too: making an index, and freeing its memory, which waits for kernels. A guard
  // of the call would be too wide: pybind11 registers what a factory returns.
  const py::release_gil_before_calling_cpp_dtor release_at_end;
  py::class_<CudaIndex, std::shared_ptr<CudaIndex>>(m, "CudaIndex", release_at_end)
      .def(py::init([](int dim, int metric, int scan, int device, int64_t segment_rows) {
             const Unlocked unlocked;
             return std::make_shared<CudaIndex>(dim, Metric(metric), Scan(scan), device,
                                                segment_rows);
           }),
           py::arg("dim"), py::arg("metric"), py::arg("scan"), py::arg("device"),
           py::arg("segment_rows") = 0)
      .def("add",
           [](CudaIndex& ix, uintptr_t rows, int dtype, int64_t n, int64_t stride,
              const py::object& own, bool on_device, uintptr_t stream) {
             Int64s ids;
             if (!own.is_none()) ids = own.cast<Int64s>();
             const int64_t* given = own.is_none() ? nullptr : ids.data();
             std::vector<int64_t> used;
             {
               const Unlocked unlocked;
               used = ix.add(at<void>(rows), DType(dtype), n, stride, given, on_device,
                             at<void>(stream));
             }
             return to_array(used);
           })
      .def("search",
           [](const CudaIndex& ix, uintptr_t queries, int dtype, int64_t stride, int batch, int k,
              const py::object& allow, const py::object& deny, uintptr_t scores, uintptr_t ids,
              uintptr_t exact, uintptr_t stream, bool on_device) {
             const HostIds allowed = host_ids(allow), denied = host_ids(deny);
             const Unlocked unlocked;
             if (on_device) {
               ix.search({at<void>(queries), DType(dtype), stride}, batch, k, allowed, denied,
                         {at<float>(scores), at<int64_t>(ids), at<double>(exact)},
                         at<void>(stream));
             } else {
               ix.search_host({at<void>(queries), DType(dtype), stride}, batch, k, allowed, denied,
                              at<float>(scores), at<int64_t>(ids));
             }
           })
      .def("range_search",
           [](const CudaIndex& ix, uintptr_t queries, int dtype, int64_t stride, int batch,
              double radius, const py::object& allow, const py::object& deny, uintptr_t stream,
              bool on_device) {
             const HostIds allowed = host_ids(allow), denied = host_ids(deny);
             Ranges r;
             {
               const Unlocked unlocked;
               r = ix.range_search({at<void>(queries), DType(dtype), stride}, on_device, batch,
                                   radius, allowed, denied, at<void>(stream));
             }
             return py::make_tuple(
                 to_array(r.lims),
                 py::array_t<float>(static_cast<py::ssize_t>(r.scores.size()), r.scores.data()),
                 to_array(r.ids));
           })
      .def("vectors",
           [](const CudaIndex& ix, const Int64s& ids, uintptr_t out, bool to_device,
              uintptr_t stream) {
             const int64_t* from = ids.data();
             const int64_t n = ids.size();
             const Unlocked unlocked;
             ix.vectors(from, n, at<uint16_t>(out), to_device, at<void>(stream));
           })
      .def("contains", &CudaIndex::contains, release())
      .def("remove",
           [](CudaIndex& ix, const Int64s& ids) {
             const int64_t* from = ids.data();
             const int64_t n = ids.size();
             const Unlocked unlocked;
             return ix.remove(from, n);
           })
      .def("compact", &CudaIndex::compact, release())
      .def("ids",
           [](const CudaIndex& ix) {
             std::vector<int64_t> ids;
             {
               const Unlocked unlocked;
               ids = ix.ids();
             }
             return to_array(ids);
           })
      .def_property_readonly("dim", &CudaIndex::dim)
      .def_property_readonly("metric", [](const CudaIndex& ix) { return int(ix.metric()); })
      .def_property_readonly("scan", [](const CudaIndex& ix) { return int(ix.scan()); })
      .def_property_readonly("size", &CudaIndex::size)
      .def_property_readonly("nbytes", &CudaIndex::nbytes);
  m.def("copy_rows", copy_rows<knnfast::Index, CudaIndex>, release());
  m.def("copy_rows", copy_rows<CudaIndex, knnfast::Index>, release());
  m.def("copy_rows", copy_rows<CudaIndex, CudaIndex>, release());
  py::class_<CudaIndex::Plan>(m, "CudaPlan", release_at_end)
      .def(py::init([](std::shared_ptr<CudaIndex> ix, int batch, int k) {
        const Unlocked unlocked;
        return CudaIndex::Plan(std::move(ix), batch, k);
      }))
      .def(
          "run",
          [](CudaIndex::Plan& plan, uintptr_t queries, int dtype, int64_t stride,
             uintptr_t stream) {
            plan.run({at<void>(queries), DType(dtype), stride}, at<void>(stream));
          },
          release())
      .def_property_readonly("scores",
                             [](const CudaIndex::Plan& plan) {
                               return reinterpret_cast<uintptr_t>(plan.results().scores);
                             })
      .def_property_readonly("ids",
                             [](const CudaIndex::Plan& plan) {
                               return reinterpret_cast<uintptr_t>(plan.results().ids);
                             })
      .def_property_readonly(
          "scan", [](const CudaIndex::Plan& plan) { return static_cast<int>(plan.scan()); })
      .def_property_readonly("kernel", [](const CudaIndex::Plan& plan) {
        return std::string(plan.plan().kernel == Kernel::kStream  ? "stream"
                           : plan.plan().kernel == Kernel::kTiled ? "tiled"
                                                                  : "sm90");
      });
}

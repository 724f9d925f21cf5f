// SPDX-License-Identifier: Apache-2.0
// The Python module; bindings_cuda.cpp is the part of CUDA builds. It checks nothing that knnfast/
// has checked.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cstring>
#include <system_error>

#include "common/thread_pool.h"
#include "knnfast/index.h"
#include "ops/denoiser.h"
#include "ops/ops_cpu.h"
#include "ops/philox.h"
#include "python/unlocked.h"
#if KNNFAST_HAS_CUDA
#include "python/bindings_cuda.h"
#endif

namespace py = pybind11;

// ---- search ------------------------------------------------------------------------------------
namespace {

using knnfast::DType;
using knnfast::Index;

struct Rows {  // [m, d] or [d], last stride 1
  const void* data;
  DType dtype;
  int64_t m, stride;
  bool single;
  py::array hold;  // whose memory it is: the given array, or a copy where one was needed
};

DType dtype_of(const py::array& a, bool bf16) {
  if (bf16) return DType::bf16;
  return a.itemsize() == 4 ? DType::f32 : DType::f16;
}

py::array contiguous(const py::array& a) {
  return py::array::ensure(py::module_::import("numpy").attr("array")(a, py::arg("order") = "C"));
}

// `bf16`: the array's 16-bit words are bfloat16.
Rows rows_of(const py::array& given, bool bf16, int64_t dim, const char* name) {
  const DType dtype = dtype_of(given, bf16);
  const int64_t rank = given.ndim();
  if ((rank != 1 && rank != 2) || given.shape(rank - 1) != dim)
    throw py::value_error(std::string(name) + " must have shape [n, " + std::to_string(dim) +
                          "] or [" + std::to_string(dim) + "], got " +
                          py::str(given.attr("shape")).cast<std::string>());
  py::array hold = given;
  const int64_t size = hold.itemsize();
  const bool direct =
      (dim == 1 || hold.strides(rank - 1) == size) &&
      (rank == 1 || hold.shape(0) < 2 || (hold.strides(0) > 0 && hold.strides(0) % size == 0));
  if (!direct) hold = contiguous(hold);
  Rows r{hold.data(), dtype, rank == 1 ? 1 : hold.shape(0), dim, rank == 1, std::move(hold)};
  if (r.m > 1) r.stride = r.hold.strides(0) / size;
  return r;
}

using Int64s = py::array_t<int64_t, py::array::c_style>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;

knnfast::IdSet id_set(const py::object& given, py::object& hold) {
  knnfast::IdSet set;
  if (given.is_none()) return set;
  hold = given;
  if (py::isinstance<Bytes>(given)) {
    const Bytes a = given.cast<Bytes>();
    set.bits = a.data();
    set.count = a.size();
  } else {
    const Int64s a = given.cast<Int64s>();
    set.ids = a.data();
    set.count = a.size();
  }
  return set;
}

// `exact`: an array of float64 for the scores before rounding, or None.
py::tuple search(const Index& ix, const py::array& queries, int64_t k, bool bf16,
                 const py::object& allow, const py::object& deny, const py::object& out,
                 const py::object& exact) {
  const Rows q = rows_of(queries, bf16, ix.dim(), "queries");
  py::object hold_allow, hold_deny;
  const knnfast::SearchOptions options{id_set(allow, hold_allow), id_set(deny, hold_deny)};
  py::tuple pair;  // (scores, ids)
  if (out.is_none()) {
    std::vector<py::ssize_t> shape;
    if (!q.single) shape.push_back(q.m);
    shape.push_back(k);
    pair = py::make_tuple(py::array_t<float>(shape), py::array_t<int64_t>(shape));
  } else {
    pair = out;
  }
  float* s = static_cast<float*>(py::reinterpret_borrow<py::array>(pair[0]).mutable_data());
  int64_t* i = static_cast<int64_t*>(py::reinterpret_borrow<py::array>(pair[1]).mutable_data());
  double* e = exact.is_none() ? nullptr : exact.cast<py::array_t<double>>().mutable_data();
  {
    const Unlocked unlocked;
    ix.search(q.data, q.dtype, q.m, k, s, i, options, q.stride, e);
  }
  return pair;
}

py::tuple range_search(const Index& ix, const py::array& queries, double radius, bool bf16,
                       const py::object& allow, const py::object& deny) {
  const Rows q = rows_of(queries, bf16, ix.dim(), "queries");
  py::object hold_allow, hold_deny;
  const knnfast::SearchOptions options{id_set(allow, hold_allow), id_set(deny, hold_deny)};
  knnfast::RangeResult r;
  {
    const Unlocked unlocked;
    r = ix.range_search(q.data, q.dtype, q.m, radius, options, q.stride);
  }
  return py::make_tuple(
      py::array_t<int64_t>(static_cast<py::ssize_t>(r.lims.size()), r.lims.data()),
      py::array_t<float>(static_cast<py::ssize_t>(r.scores.size()), r.scores.data()),
      py::array_t<int64_t>(static_cast<py::ssize_t>(r.ids.size()), r.ids.data()));
}

Int64s add(Index& ix, const py::array& rows, bool bf16, const py::object& ids) {
  const Rows r = rows_of(rows, bf16, ix.dim(), "vectors");
  Int64s given, used(static_cast<py::ssize_t>(r.m));
  if (!ids.is_none()) given = ids.cast<Int64s>();
  const int64_t* own = ids.is_none() ? nullptr : given.data();
  int64_t* out = used.mutable_data();
  {
    const Unlocked unlocked;
    ix.add(r.data, r.dtype, r.m, own, out, r.stride);
  }
  return used;
}

py::array vectors(const Index& ix, const Int64s& ids, const py::object& out) {
  py::array rows = out.is_none()
                       ? py::array(py::dtype("e"), std::vector<py::ssize_t>{ids.size(), ix.dim()})
                       : py::array(out);
  const int64_t n = ids.size();
  const int64_t* from = ids.data();
  uint16_t* to = static_cast<uint16_t*>(rows.mutable_data());
  const Unlocked unlocked;
  ix.vectors(from, n, to);
  return rows;
}

py::dict stats(const Index& ix) {
  const knnfast::Stats s = ix.stats();
  py::dict d;
  d["searches"] = s.searches;
  d["searches_joined"] = s.searches_joined;
  d["queries"] = s.queries;
  d["queries_repeated"] = s.queries_repeated;
  d["rows_scanned"] = s.rows_scanned;
  d["rows_stopped"] = s.rows_stopped;
  d["rows_opened"] = s.rows_opened;
  d["rows_rescored"] = s.rows_rescored;
  d["chunks_int8"] = s.chunks_int8;
  d["chunks_fp16"] = s.chunks_fp16;
  d["chunks_canonical"] = s.chunks_canonical;
  return d;
}

// Text as the file system has it: bytes that are no UTF-8 become what os.fsencode turns back.
py::str path_text(const std::string& text) {
  return py::reinterpret_steal<py::str>(
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<py::ssize_t>(text.size())));
}

std::vector<py::str> verify(const Index& ix) {
  std::vector<std::string> damaged;
  {
    const Unlocked unlocked;
    damaged = ix.verify();
  }
  std::vector<py::str> out;
  for (const std::string& path : damaged) out.push_back(path_text(path));
  return out;
}

void bind_search(py::module_& m) {
  static PyObject* const damaged_file =
      py::exception<knnfast::DamagedFile>(m, "DamagedFile", PyExc_ValueError).release().ptr();
  py::register_exception_translator([](std::exception_ptr p) {  // what() may name any path
    try {
      if (p) std::rethrow_exception(p);
    } catch (const knnfast::DamagedFile& e) {
      PyErr_SetObject(damaged_file, path_text(e.what()).ptr());
    } catch (const std::invalid_argument& e) {
      PyErr_SetObject(PyExc_ValueError, path_text(e.what()).ptr());
    } catch (const std::system_error& e) {
      const py::tuple args = py::make_tuple(e.code().value(), path_text(e.what()));
      PyErr_SetObject(PyExc_OSError, args.ptr());
    }
  });
  using release = py::call_guard<Unlocked>;
  py::class_<Index>(m, "Index")
      .def(py::init([](int64_t dim, int metric, int scan) {
        return Index(dim, knnfast::Metric(metric), knnfast::Scan(scan));
      }))
      .def("add", add)
      .def("search", search, py::arg("queries"), py::arg("k"), py::arg("bf16"), py::arg("allow"),
           py::arg("deny"), py::arg("out"), py::arg("exact") = py::none())
      .def("range_search", range_search)
      .def("vectors", vectors)
      .def("ids",
           [](const Index& ix) {
             std::vector<int64_t> ids;
             {
               const Unlocked unlocked;
               ids = ix.ids();
             }
             return Int64s(static_cast<py::ssize_t>(ids.size()), ids.data());
           })
      .def("contains", &Index::contains, release())
      .def("remove",
           [](Index& ix, const Int64s& ids) {
             const int64_t* from = ids.data();
             const int64_t n = ids.size();
             const Unlocked unlocked;
             return ix.remove(from, n);
           })
      .def("compact", &Index::compact, release())
      .def("save", &Index::save, release())
      .def_static("open", &Index::open, release())
      .def("verify", verify)
      .def_property_readonly("dim", &Index::dim)
      .def_property_readonly("metric", [](const Index& ix) { return int(ix.metric()); })
      .def_property_readonly("scan", [](const Index& ix) { return int(ix.scan()); })
      .def_property_readonly("size", py::cpp_function(&Index::size, release()))
      .def_property_readonly("nbytes", py::cpp_function(&Index::nbytes, release()))
      .def_property_readonly("joins", py::cpp_function(&Index::joins, release()))
      .def("stats", stats);
  m.def("set_num_threads", knnfast::set_num_threads);
  m.def("num_threads", knnfast::num_threads);
  m.def("cores", knnfast::cores);
  m.def("isa", knnfast::isa);
  // What a scan cannot beat without reading less: the benchmarks' floor.
  // So many streams side by side: some memory answers four faster than one, some does not.
  m.def("read_bytes", [](const py::array& a, int64_t streams) {
    const char* data = static_cast<const char*>(a.data());
    constexpr int64_t kStep = 1 << 18, kLine = 64;
    const int64_t length = kStep / streams;
    const int64_t tasks = a.nbytes() / kStep;
    std::atomic<uint64_t> total{0};
    const Unlocked unlocked;
    knnfast::parallel_for(tasks, [&](int, int64_t task) {
      uint64_t sum[8] = {}, word[8];
      for (int64_t at = 0; at < length; at += kLine)
        for (int64_t stream = 0; stream < kStep; stream += length) {
          std::memcpy(word, data + task * kStep + stream + at, kLine);
          for (int i = 0; i < 8; ++i) sum[i] += word[i];
        }
      for (uint64_t s : sum) total += s;
    });
    return total.load();
  });
}

// ---- ops ---------------------------------------------------------------------------------------

// Tensors arrive as addresses (0: absent); knnfast/ops has checked shapes, types and strides.
template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void bind_ops(py::module_& m) {
  using namespace knnfast;
  using release = py::call_guard<Unlocked>;
  m.def("ops_isa", [] { return ops_kernels().name; });
  m.def("unit52", unit52);
  m.def("below", below);
  m.def("gumbel", [](uintptr_t words, int64_t n, uintptr_t out) {
    ops_kernels().noise(at<uint32_t>(words), n, at<float>(out));
  });
  m.def(
      "transition_choose",
      [](int64_t B, int64_t L, int K, uintptr_t weights, int64_t weights_stride, uintptr_t images,
         uint64_t seed, uintptr_t x_t, uintptr_t x_s, uintptr_t rows) {
        const StepGrid grid = {B,   L, K, at<double>(weights), weights_stride, at<int64_t>(images),
                               seed};
        return transition_choose(grid, at<int64_t>(x_t), at<int64_t>(x_s), at<int64_t>(rows));
      },
      release());
  m.def(
      "head_rows",
      [](int dtype, int D, int K, uintptr_t features, uintptr_t rows, int64_t count,
         uintptr_t weight, uintptr_t bias, uintptr_t logits) {
        head_rows({D, K, dtype}, at<void>(features), at<int64_t>(rows), count, at<void>(weight),
                  at<void>(bias), at<float>(logits));
      },
      release());
  m.def(
      "transition_rows",
      [](int64_t B, int64_t L, int K, uintptr_t weights, int64_t weights_stride, uintptr_t images,
         uint64_t seed, int dtype, float guidance, float temperature, double top_r, int top_k,
         uintptr_t logits, uintptr_t null, int64_t stride, int64_t null_stride, bool compact,
         uintptr_t x_t, uintptr_t rows, int64_t count, uintptr_t x_s) {
        const StepGrid grid = {B,   L, K, at<double>(weights), weights_stride, at<int64_t>(images),
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
        const StepGrid grid = {B,   L, K, at<double>(weights), weights_stride, at<int64_t>(images),
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
                               at<double>(auxiliary), at<void>(grad), grad_stride, at<double>(loss),
                               at<double>(kl));
      },
      release());
  using addresses = std::vector<uintptr_t>;
  const auto floats = [](const addresses& from) {
    std::vector<const float*> to;
    for (uintptr_t address : from) to.push_back(at<float>(address));
    return to;
  };
  py::class_<PackedDenoiser>(m, "PackedDenoiser")
      .def(py::init([floats](const std::vector<int>& n, bool source,
                             const std::vector<bool>& canvas, const addresses& weights) {
             return new PackedDenoiser(
                 {n.at(0), n.at(1), n.at(2), n.at(3), n.at(4), n.at(5), n.at(6), n.at(7), n.at(8),
                  n.at(9), n.at(10), n.at(11), n.at(12), source},
                 canvas, floats(weights));
           }),
           release())
      .def(
          "features",
          [](const PackedDenoiser& self, uintptr_t codes,
             const std::vector<const PackedCondition*>& conditions, bool guided,
             uintptr_t modulation, uintptr_t out) {
            return self.features(at<int64_t>(codes), conditions, guided, at<float>(modulation),
                                 at<float>(out));
          },
          release());
  py::class_<PackedCondition>(m, "PackedCondition")
      .def(py::init([floats](const PackedDenoiser& denoiser, int embeddings, uintptr_t mask,
                             const addresses& A, const addresses& a, const addresses& C,
                             const addresses& bias, const addresses& keys, uintptr_t paintings,
                             uintptr_t canvas_bias, uintptr_t tokens, uintptr_t copies) {
             return new PackedCondition(
                 denoiser, {embeddings, at<bool>(mask), floats(A), floats(a), floats(C),
                            floats(bias), floats(keys), at<float>(paintings),
                            at<float>(canvas_bias), at<float>(tokens), at<float>(copies)});
           }),
           release());
  m.def(
      "neighbour_attention",
      [](int64_t B, int64_t L, int D, int N, int H, int dtype, double eps, bool norm, bool residual,
         uintptr_t x, int64_t image_x, int64_t row_x, uintptr_t A, uintptr_t a, uintptr_t C,
         uintptr_t bias, uintptr_t mask, uintptr_t scale, int64_t image_scale, uintptr_t shift,
         int64_t image_shift, uintptr_t y) {
        const int64_t HN = int64_t(H) * N;
        neighbour_attention({{D, N, H, dtype, row_x, D, eps, norm, residual},
                             B,
                             L,
                             at<void>(x),
                             at<void>(A),
                             at<void>(a),
                             at<void>(C),
                             at<void>(bias),
                             at<void>(scale),
                             at<void>(shift),
                             at<bool>(mask),
                             image_x,
                             HN * D,
                             HN,
                             HN * D,
                             image_scale,
                             image_shift,
                             at<void>(y)});
      },
      release());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "knnfast's C++/CUDA core";
  m.attr("has_cuda") = bool(KNNFAST_HAS_CUDA);
#ifdef KNNFAST_NVTX
  m.attr("has_nvtx") = true;
#else
  m.attr("has_nvtx") = false;
#endif
  bind_search(m);
  bind_ops(m);
#if KNNFAST_HAS_CUDA
  bind_cuda(m);
#endif
}

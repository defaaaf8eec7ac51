// dalle2_fast._C: raw addresses, sizes and a stream handle in, no torch. Python allocates and checks, not this
// file. An address is an int (Tensor.data_ptr(), 0 for none); see contrastive.h for what is where.

#include <pybind11/pybind11.h>

#include <cstdint>

#include "build_facts.h"  // written by setup.py
#include "contrastive.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace dalle2_fast;
using Unlocked = py::gil_scoped_release;  // during a long call other Python threads run
using FreeOfPython = py::call_guard<Unlocked>;

// How Python passes a parameter: an address as an int, a dtype as its code, a number as it is.
template <class T>
struct Passed {
    using Type = T;
    static T unpack(T value) { return value; }
};
template <class T>
struct Passed<T*> {
    using Type = std::uintptr_t;
    static T* unpack(std::uintptr_t address) { return reinterpret_cast<T*>(address); }
};
template <>
struct Passed<DType> {
    using Type = int;
    static DType unpack(int code) { return static_cast<DType>(code); }
};
using Address = Passed<void*>::Type;

// A function of contrastive.h as Python calls it: a Tile or Features as their fields, the rest as above.
template <class R, class... Rest>
auto flat(R (*call)(Rest...)) {
    return [call](typename Passed<Rest>::Type... rest) { return call(Passed<Rest>::unpack(rest)...); };
}

#define TILE "products"_a, "stride"_a, "rows"_a, "columns"_a, "own"_a
template <class R, class... Rest>
auto flat(R (*call)(const Tile&, Rest...)) {
    return [call](Address products, int64_t stride, int64_t rows, int64_t columns, int64_t own,
                  typename Passed<Rest>::Type... rest) {
        const Tile tile{Passed<void*>::unpack(products), stride, rows, columns, own};
        return call(tile, Passed<Rest>::unpack(rest)...);
    };
}

#define FEATURES \
    "image"_a, "text"_a, "image_stride"_a, "text_stride"_a, "rows"_a, "columns"_a, "width"_a, "own"_a, \
        "dtype"_a
template <class R, class... Rest>
auto flat(R (*call)(const sm90::Features&, Rest...)) {
    return [call](Address image, Address text, int64_t image_stride, int64_t text_stride, int64_t rows,
                  int64_t columns, int64_t width, int64_t own, int dtype,
                  typename Passed<Rest>::Type... rest) {
        const sm90::Features features{Passed<void*>::unpack(image), Passed<void*>::unpack(text), image_stride,
                                      text_stride, rows, columns, width, own, Passed<DType>::unpack(dtype)};
        return call(features, Passed<Rest>::unpack(rest)...);
    };
}

py::tuple sigmoid_on_cpu(const Tile& tile, DType dtype, double scale, double bias, bool gradient,
                         int threads) {
    double sums[3];
    {
        Unlocked unlocked;
        cpu::sigmoid_epilogue(tile, dtype, scale, bias, gradient, sums, threads);
    }
    return py::make_tuple(sums[0], sums[1], sums[2]);
}

py::tuple soft_on_cpu(const Tile& tile, const void* alike, DType dtype, double scale, const double* row_lse,
                      const double* column_lse, const double* alike_row_lse, const double* alike_column_lse,
                      bool gradient, int threads) {
    double sums[2];
    {
        Unlocked unlocked;
        cpu::soft_epilogue(tile, alike, dtype, scale, row_lse, column_lse, alike_row_lse, alike_column_lse,
                           gradient, sums, threads);
    }
    return py::make_tuple(sums[0], sums[1]);
}

void bind_cpu(py::module_ m) {
    m.def("lse_epilogue", flat(&cpu::lse_epilogue), FreeOfPython(), TILE, "dtype"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "threads"_a);
    m.def("gradient_epilogue", flat(&cpu::gradient_epilogue), FreeOfPython(), TILE, "dtype"_a, "scale"_a,
          "row_lse"_a, "column_lse"_a, "row_weight"_a, "column_weight"_a, "threads"_a,
          "Returns the sum of G P.");
    m.def("sigmoid_epilogue", flat(&sigmoid_on_cpu), TILE, "dtype"_a, "scale"_a, "bias"_a, "gradient"_a,
          "threads"_a, "Returns the three sums.");
    m.def("soft_epilogue", flat(&soft_on_cpu), TILE, "alike"_a, "dtype"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "alike_row_lse"_a, "alike_column_lse"_a, "gradient"_a, "threads"_a,
          "Returns the two sums.");
}

#ifdef DALLE2_FAST_HAS_CONTRASTIVE_CUDA
void bind_cuda(py::module_ m) {
    m.def("workspace_bytes", &cuda::workspace_bytes, "rows"_a, "columns"_a);
    m.def("lse_epilogue", flat(&cuda::lse_epilogue), FreeOfPython(), TILE, "factor"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "workspace"_a, "stream"_a);
    m.def("own_products", flat(&cuda::own_products), FreeOfPython(), "image"_a, "image_stride"_a, "image_step"_a,
          "text"_a, "text_stride"_a, "text_step"_a, "rows"_a, "width"_a, "dtype"_a, "own"_a, "stream"_a);
    m.def("gradient_epilogue", flat(&cuda::gradient_epilogue), FreeOfPython(), TILE, "scale"_a, "row_lse"_a,
          "column_lse"_a, "row_weight"_a, "column_weight"_a, "gradient"_a, "gradient_stride"_a,
          "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
    m.def("sigmoid_epilogue", flat(&cuda::sigmoid_epilogue), FreeOfPython(), TILE, "scale"_a, "bias"_a,
          "gradient"_a, "gradient_stride"_a, "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
    m.def("soft_epilogue", flat(&cuda::soft_epilogue), FreeOfPython(), TILE, "alike"_a, "scale"_a,
          "row_lse"_a, "column_lse"_a, "alike_row_lse"_a, "alike_column_lse"_a, "gradient"_a,
          "gradient_stride"_a, "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
}
#endif

#ifdef DALLE2_FAST_HAS_CONTRASTIVE_SM90
void bind_sm90(py::module_ m) {
    m.def("obstacle", flat(&sm90::obstacle), FEATURES, "None, or why these features cannot run here.");
    m.def("workspace_bytes", &sm90::workspace_bytes, "rows"_a, "columns"_a, "width"_a);
    m.def("lse", flat(&sm90::lse), FreeOfPython(), FEATURES, "scale"_a, "row_lse"_a, "column_lse"_a,
          "own_products"_a, "workspace"_a, "stream"_a);
    m.def("gradient", flat(&sm90::gradient), FreeOfPython(), FEATURES, "scale"_a, "row_lse"_a, "column_lse"_a,
          "row_weight"_a, "column_weight"_a, "gradient"_a, "gradient_stride"_a, "sums"_a, "workspace"_a,
          "stream"_a);
    m.def("sigmoid", flat(&sm90::sigmoid), FreeOfPython(), FEATURES, "scale"_a, "bias"_a, "gradient"_a,
          "gradient_stride"_a, "sums"_a, "workspace"_a, "stream"_a);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def(
        "build_info", [] { return py::module_::import("json").attr("loads")(DALLE2_FAST_FACTS); },
        "How this was built: compiler, cuda (nvcc's version or None), why_no_cuda, targets (of each .cu).");

    py::dict dtypes;  // the codes that the calls below take
    dtypes["float32"] = static_cast<int>(DType::f32);
    dtypes["float64"] = static_cast<int>(DType::f64);
    dtypes["float16"] = static_cast<int>(DType::f16);
    dtypes["bfloat16"] = static_cast<int>(DType::bf16);
    module.attr("DTYPES") = dtypes;

    bind_cpu(module.def_submodule("cpu", "contrastive_cpu.cpp"));
    // Of these two, what was not built is not there.
#ifdef DALLE2_FAST_HAS_CONTRASTIVE_CUDA
    bind_cuda(module.def_submodule("cuda", "contrastive_cuda.cu, for the GPUs that build_info() lists"));
#endif
#ifdef DALLE2_FAST_HAS_CONTRASTIVE_SM90
    bind_sm90(module.def_submodule("sm90", "contrastive_sm90.cu, for compute capability 9.0"));
#endif
}

// dalle2_fast._C: takes raw addresses, sizes and a stream handle, so it needs no torch. Python allocates and
// checks the buffers. An address is an int (Tensor.data_ptr(), 0 for none); contrastive.h documents the
// functions.

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>

#include "build_facts.h"  // written by setup.py
#include "attention.h"
#include "contrastive.h"
#include "convolution.h"
#include "cpu/simd/processor.h"
#include "diffusion.h"
#include "group_norm_silu.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using namespace dalle2_fast;
using WithoutGil = py::gil_scoped_release;  // other Python threads run during a call
using ReleaseGil = py::call_guard<WithoutGil>;

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

// A structure, passed as the tuple of its fields.
template <class Structure, class... Fields>
struct PassedAsTuple {
    using Type = std::tuple<typename Passed<Fields>::Type...>;
    static Structure unpack(const Type& values) {
        return std::apply(
            [](const auto&... value) { return Structure{Passed<Fields>::unpack(value)...}; }, values);
    }
};
template <>
struct Passed<cpu::Prediction> {
    using Type = int;
    static cpu::Prediction unpack(int code) { return static_cast<cpu::Prediction>(code); }
};
template <>
struct Passed<cpu::Strided> : PassedAsTuple<cpu::Strided, void*, DType, int64_t, int64_t, int64_t> {};
template <>
struct Passed<const cpu::Strided&> : Passed<cpu::Strided> {};
template <>
struct Passed<const cpu::Shape&> : PassedAsTuple<cpu::Shape, int64_t, int64_t, int64_t> {};
template <>
struct Passed<const cpu::Seeds&> : PassedAsTuple<cpu::Seeds, const int64_t*, int64_t> {};
template <>
struct Passed<const cpu::StepTensors&>
    : PassedAsTuple<cpu::StepTensors, cpu::Strided, cpu::Strided, cpu::Strided, cpu::Strided, cpu::Strided,
                    cpu::Strided, cpu::Strided> {};
template <>
struct Passed<const cpu::StepOptions&>
    : PassedAsTuple<cpu::StepOptions, const float*, cpu::Prediction, const float*, int64_t, double, double,
                    double, double> {};

// A function of contrastive.h as Python calls it: the fields of a Tile or of Features are separate arguments.
template <class R, class... Rest>
auto flat(R (*call)(Rest...)) {
    return [call](typename Passed<Rest>::Type... rest) { return call(Passed<Rest>::unpack(rest)...); };
}

#define TILE "products"_a, "stride"_a, "rows"_a, "columns"_a, "diagonal_offset"_a
template <class R, class... Rest>
auto flat(R (*call)(const Tile&, Rest...)) {
    return [call](Address products, int64_t stride, int64_t rows, int64_t columns, int64_t diagonal_offset,
                  typename Passed<Rest>::Type... rest) {
        const Tile tile{Passed<void*>::unpack(products), stride, rows, columns, diagonal_offset};
        return call(tile, Passed<Rest>::unpack(rest)...);
    };
}

#define FEATURES                                                                              \
    "image"_a, "text"_a, "image_stride"_a, "text_stride"_a, "rows"_a, "columns"_a, "width"_a, \
        "diagonal_offset"_a, "dtype"_a
template <class R, class... Rest>
auto flat(R (*call)(const sm90::Features&, Rest...)) {
    return [call](Address image, Address text, int64_t image_stride, int64_t text_stride, int64_t rows,
                  int64_t columns, int64_t width, int64_t diagonal_offset, int dtype,
                  typename Passed<Rest>::Type... rest) {
        const sm90::Features features{Passed<void*>::unpack(image),
                                      Passed<void*>::unpack(text),
                                      image_stride,
                                      text_stride,
                                      rows,
                                      columns,
                                      width,
                                      diagonal_offset,
                                      Passed<DType>::unpack(dtype)};
        return call(features, Passed<Rest>::unpack(rest)...);
    };
}

py::tuple sigmoid_on_cpu(const Tile& tile, DType dtype, double scale, double bias, bool gradient,
                         int threads) {
    double sums[3];
    {
        WithoutGil released;
        cpu::sigmoid_epilogue(tile, dtype, scale, bias, gradient, sums, threads);
    }
    return py::make_tuple(sums[0], sums[1], sums[2]);
}

py::tuple soft_on_cpu(const Tile& tile, const void* similarity, DType dtype, double scale,
                      const double* row_lse, const double* column_lse, const double* similarity_row_lse,
                      const double* similarity_column_lse, bool gradient, int threads) {
    double sums[2];
    {
        WithoutGil released;
        cpu::soft_epilogue(tile, similarity, dtype, scale, row_lse, column_lse, similarity_row_lse,
                           similarity_column_lse, gradient, sums, threads);
    }
    return py::make_tuple(sums[0], sums[1]);
}

// A parameter of a group norm: (address, code of its dtype, elements from sample to sample), or None.
cpu::Parameter unpack_parameter(py::handle value) {
    if (value.is_none()) return {nullptr, DType::f32, 0};
    const auto [address, dtype, stride] = value.cast<std::tuple<Address, int, int64_t>>();
    return {Passed<void*>::unpack(address), static_cast<DType>(dtype), stride};
}

// (samples, channels, positions, groups, whether the channels are adjacent, code of the dtype)
using ImageTuple = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, int>;

cpu::Images unpack_images(const ImageTuple& images) {
    const auto [samples, channels, positions, groups, channels_adjacent, dtype] = images;
    return {samples, channels, positions, groups, channels_adjacent, static_cast<DType>(dtype)};
}

// weight, bias, scale, shift
cpu::Affine unpack_affine(const py::tuple& parameters, bool silu) {
    return {unpack_parameter(parameters[0]), unpack_parameter(parameters[1]), unpack_parameter(parameters[2]),
            unpack_parameter(parameters[3]), silu};
}

void group_norm_silu(const ImageTuple& images, Address x, int64_t x_stride, Address y, int64_t y_stride,
                     const py::tuple& parameters, bool silu, double eps, Address mean, Address rstd,
                     int threads) {
    const cpu::Affine affine = unpack_affine(parameters, silu);
    const WithoutGil released;
    cpu::group_norm_silu(unpack_images(images), Passed<void*>::unpack(x), x_stride, Passed<void*>::unpack(y),
                         y_stride, affine, eps, Passed<float*>::unpack(mean), Passed<float*>::unpack(rstd),
                         threads);
}

void group_norm_silu_backward(const ImageTuple& images, Address dy, int64_t dy_stride, Address x,
                              int64_t x_stride, Address mean, Address rstd, const py::tuple& parameters,
                              bool silu, Address dx, int64_t dx_stride, Address sums, int threads) {
    const cpu::Affine affine = unpack_affine(parameters, silu);
    const WithoutGil released;
    cpu::group_norm_silu_backward(unpack_images(images), Passed<void*>::unpack(dy), dy_stride,
                                  Passed<void*>::unpack(x), x_stride, Passed<float*>::unpack(mean),
                                  Passed<float*>::unpack(rstd), affine, Passed<void*>::unpack(dx), dx_stride,
                                  Passed<float*>::unpack(sums), threads);
}

// (address, elements from sample to sample, from head to head, from row to row)
using HeadsTuple = std::tuple<Address, int64_t, int64_t, int64_t>;

cpu::Heads unpack_heads(const HeadsTuple& heads) {
    const auto [address, sample_stride, head_stride, row_stride] = heads;
    return {Passed<void*>::unpack(address), sample_stride, head_stride, row_stride};
}

// (keys, values, their number, address of the mask, elements of the mask from sample to sample)
using KeysTuple = std::tuple<HeadsTuple, HeadsTuple, int64_t, Address, int64_t>;

cpu::Keys unpack_keys(const KeysTuple& keys) {
    const auto& [k, v, count, mask, mask_stride] = keys;
    return {unpack_heads(k), unpack_heads(v), count, Passed<bool*>::unpack(mask), mask_stride};
}

void attention(int64_t samples, int64_t heads, int64_t queries, int64_t width, int dtype, float scale,
               const HeadsTuple& q, const KeysTuple& context, const KeysTuple& image, Address out,
               int threads) {
    const WithoutGil released;
    cpu::attention({samples, heads, queries, width, static_cast<DType>(dtype), scale}, unpack_heads(q),
                   unpack_keys(context), unpack_keys(image), Passed<void*>::unpack(out), threads);
}

void convolution3x3(int64_t samples, int64_t height, int64_t width, int64_t in_channels, int64_t out_channels,
                    bool upsample, Address x, Address filters, Address bias, Address residual, Address y,
                    int threads) {
    const WithoutGil released;
    cpu::convolution3x3({samples, height, width, in_channels, out_channels, upsample},
                        Passed<float*>::unpack(x), Passed<float*>::unpack(filters),
                        Passed<float*>::unpack(bias), Passed<float*>::unpack(residual),
                        Passed<float*>::unpack(y), threads);
}

const char* const INSTRUCTION_SETS[] = {"portable", "AVX2", "AVX-512", "AVX-512 with BF16"};

void bind_cpu(py::module_ m) {
    m.def(
        "instruction_set", [] { return INSTRUCTION_SETS[int(cpu::instruction_set())]; },
        "The vector instructions in use: portable, AVX2, AVX-512 or AVX-512 with BF16.");
    m.def(
        "choose_instruction_set",
        [](int index) { return cpu::choose_instruction_set(static_cast<cpu::InstructionSet>(index)); },
        "index"_a, "Use portable (0), AVX2 (1), AVX-512 (2) or AVX-512 with BF16 (3), for tests. False if this processor "
        "lacks it.");
    m.def("attention", &attention, "samples"_a, "heads"_a, "queries"_a, "width"_a, "dtype"_a, "scale"_a, "q"_a,
          "context"_a, "image"_a, "out"_a, "threads"_a);
    m.def("convolution_filter_size", &cpu::convolution_filter_size, "in_channels"_a, "out_channels"_a);
    m.def("fingerprint", flat(&cpu::fingerprint), "values"_a, "count"_a);
    m.def("transform_filters", flat(&cpu::transform_filters), ReleaseGil(), "weight"_a, "in_channels"_a,
          "out_channels"_a, "filters"_a, "threads"_a);
    m.def("convolution3x3", &convolution3x3, "samples"_a, "height"_a, "width"_a, "in_channels"_a,
          "out_channels"_a, "upsample"_a, "x"_a, "filters"_a, "bias"_a, "residual"_a, "y"_a, "threads"_a);
    m.def("group_norm_silu", &group_norm_silu, "images"_a, "x"_a, "x_stride"_a, "y"_a, "y_stride"_a,
          "parameters"_a, "silu"_a, "eps"_a, "mean"_a, "rstd"_a, "threads"_a);
    m.def("group_norm_silu_backward", &group_norm_silu_backward, "images"_a, "dy"_a, "dy_stride"_a, "x"_a,
          "x_stride"_a, "mean"_a, "rstd"_a, "parameters"_a, "silu"_a, "dx"_a, "dx_stride"_a, "sums"_a,
          "threads"_a);
    m.def("lse_epilogue", flat(&cpu::lse_epilogue), ReleaseGil(), TILE, "dtype"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "threads"_a);
    m.def("gradient_epilogue", flat(&cpu::gradient_epilogue), ReleaseGil(), TILE, "dtype"_a, "scale"_a,
          "row_lse"_a, "column_lse"_a, "row_weight"_a, "column_weight"_a, "threads"_a,
          "Returns the sum of G P.");
    m.def("sigmoid_epilogue", flat(&sigmoid_on_cpu), TILE, "dtype"_a, "scale"_a, "bias"_a, "gradient"_a,
          "threads"_a, "Returns the three sums.");
    m.def("soft_epilogue", flat(&soft_on_cpu), TILE, "similarity"_a, "dtype"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "similarity_row_lse"_a, "similarity_column_lse"_a, "gradient"_a, "threads"_a,
          "Returns the two sums.");
}

void bind_diffusion(py::module_ m) {  // a structure of diffusion.h is passed as the tuple of its fields
    m.def("sample_noise", flat(&cpu::sample_noise), ReleaseGil(), "shape"_a, "noise"_a, "seeds"_a,
          "threads"_a);
    m.def("add_noise", flat(&cpu::add_noise), ReleaseGil(), "shape"_a, "x0"_a, "alpha"_a, "sigma"_a,
          "noise"_a, "seeds"_a, "x_t"_a, "threads"_a);
    m.def("diffusion_step", flat(&cpu::diffusion_step), ReleaseGil(), "shape"_a, "tensors"_a, "seeds"_a,
          "options"_a, "threads"_a);
}

#ifdef DALLE2_FAST_HAS_CUDA_CONTRASTIVE
void bind_cuda(py::module_ m) {
    m.def("workspace_bytes", &cuda::workspace_bytes, "rows"_a, "columns"_a);
    m.def("lse_epilogue", flat(&cuda::lse_epilogue), ReleaseGil(), TILE, "factor"_a, "scale"_a, "row_lse"_a,
          "column_lse"_a, "workspace"_a, "stream"_a);
    m.def("positive_products", flat(&cuda::positive_products), ReleaseGil(), "image"_a, "image_row_stride"_a,
          "image_column_stride"_a, "text"_a, "text_row_stride"_a, "text_column_stride"_a, "rows"_a, "width"_a,
          "dtype"_a, "positives"_a, "stream"_a);
    m.def("gradient_epilogue", flat(&cuda::gradient_epilogue), ReleaseGil(), TILE, "scale"_a, "row_lse"_a,
          "column_lse"_a, "row_weight"_a, "column_weight"_a, "gradient"_a, "gradient_stride"_a,
          "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
    m.def("sigmoid_epilogue", flat(&cuda::sigmoid_epilogue), ReleaseGil(), TILE, "scale"_a, "bias"_a,
          "gradient"_a, "gradient_stride"_a, "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
    m.def("soft_epilogue", flat(&cuda::soft_epilogue), ReleaseGil(), TILE, "similarity"_a, "scale"_a,
          "row_lse"_a, "column_lse"_a, "similarity_row_lse"_a, "similarity_column_lse"_a, "gradient"_a,
          "gradient_stride"_a, "gradient_dtype"_a, "sums"_a, "workspace"_a, "stream"_a);
}
#endif

#ifdef DALLE2_FAST_HAS_SM90_CONTRASTIVE
void bind_sm90(py::module_ m) {
    m.def("why_unavailable", flat(&sm90::why_unavailable), FEATURES,
          "None if these features can run here, otherwise the reason why not.");
    m.def("workspace_bytes", &sm90::workspace_bytes, "rows"_a, "columns"_a, "width"_a);
    m.def("lse", flat(&sm90::lse), ReleaseGil(), FEATURES, "scale"_a, "row_lse"_a, "column_lse"_a,
          "positive_products"_a, "workspace"_a, "stream"_a);
    m.def("gradient", flat(&sm90::gradient), ReleaseGil(), FEATURES, "scale"_a, "row_lse"_a, "column_lse"_a,
          "row_weight"_a, "column_weight"_a, "gradient"_a, "gradient_stride"_a, "sums"_a, "workspace"_a,
          "stream"_a);
    m.def("sigmoid", flat(&sm90::sigmoid), ReleaseGil(), FEATURES, "scale"_a, "bias"_a, "gradient"_a,
          "gradient_stride"_a, "sums"_a, "workspace"_a, "stream"_a);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
    module.def(
        "build_info", [] { return py::module_::import("json").attr("loads")(DALLE2_FAST_FACTS); },
        "How this was built: compiler, cuda (nvcc's version or None), why_no_cuda, and targets (the GPUs "
        "that each .cu file of csrc/ was compiled for).");

    py::dict dtypes;  // the codes that the functions take
    dtypes["float32"] = static_cast<int>(DType::f32);
    dtypes["float64"] = static_cast<int>(DType::f64);
    dtypes["float16"] = static_cast<int>(DType::f16);
    dtypes["bfloat16"] = static_cast<int>(DType::bf16);
    module.attr("DTYPES") = dtypes;

    py::module_ on_cpu = module.def_submodule("cpu", "csrc/cpu");
    bind_cpu(on_cpu);
    bind_diffusion(on_cpu);
    // The submodules cuda and sm90 exist only if their files were compiled.
#ifdef DALLE2_FAST_HAS_CUDA_CONTRASTIVE
    bind_cuda(module.def_submodule("cuda", "csrc/cuda, for the GPUs that build_info() lists"));
#endif
#ifdef DALLE2_FAST_HAS_SM90_CONTRASTIVE
    bind_sm90(module.def_submodule("sm90", "csrc/sm90, for compute capability 9.0"));
#endif
}

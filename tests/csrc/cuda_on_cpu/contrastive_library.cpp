// The unmodified csrc/cuda/contrastive.cu on the CPU, for tests/csrc/test_emulated.py to call by ctypes, and
// kernels with faults that the emulator has to notice.
#include <cuda/contrastive.cu>

using namespace dalle2_fast;

namespace {

template <class Call>
const char* guarded(Call call) {  // the message of what it throws, or nullptr
    static std::string message;
    try {
        call();
        return nullptr;
    } catch (const std::exception& error) {
        message = error.what();
        return message.c_str();
    }
}

constexpr int REVERSED = 64;

template <bool BARRIER>
__global__ void reverse(float* values) {
    __shared__ float shared[REVERSED];
    shared[threadIdx.x] = values[threadIdx.x];
    if (BARRIER) __syncthreads();
    values[threadIdx.x] = shared[REVERSED - 1 - threadIdx.x];
}

__global__ void wait_in_half() {
    // The lower threads of a warp wait for the block, the upper ones for the warp: neither can go on.
    if (threadIdx.x % 32 < 16) __syncthreads();
    else __syncwarp();
}

__global__ void load_misaligned(float* values) { __ldg(reinterpret_cast<const float4*>(values + 1)); }

}  // namespace

extern "C" {

struct Shape {
    void* products;
    int64_t stride, rows, columns, diagonal_offset;
};
Tile tile(const Shape* of) {
    return {of->products, of->stride, of->rows, of->columns, of->diagonal_offset};
}

struct Target {
    void* gradient;
    int64_t stride;
    int dtype;
    double* sums;
    void* workspace;
};
#define TARGET(to) (to)->gradient, (to)->stride, DType((to)->dtype), (to)->sums, (to)->workspace, nullptr

void set_descending(bool descending) { cuda_on_cpu::descending = descending; }

int64_t workspace_bytes(int64_t rows, int64_t columns) { return cuda::workspace_bytes(rows, columns); }

const char* lse(const Shape* shape, float factor, const float* scale, double* row_lse, double* column_lse,
                void* workspace) {
    return guarded([&] {
        cuda::lse_epilogue(tile(shape), factor, scale, row_lse, column_lse, workspace, nullptr);
    });
}
const char* gradient(const Shape* shape, const float* scale, const double* row_lse, const double* column_lse,
                     float row_weight, float column_weight, const Target* to) {
    return guarded([&] {
        cuda::gradient_epilogue(tile(shape), scale, row_lse, column_lse, row_weight, column_weight,
                                TARGET(to));
    });
}
const char* sigmoid(const Shape* shape, const float* scale, const float* bias, const Target* to) {
    return guarded([&] { cuda::sigmoid_epilogue(tile(shape), scale, bias, TARGET(to)); });
}
const char* soft(const Shape* shape, const float* similarity, const float* scale, const double* row_lse,
                 const double* column_lse, const double* similarity_row_lse,
                 const double* similarity_column_lse, const Target* to) {
    return guarded([&] {
        cuda::soft_epilogue(tile(shape), similarity, scale, row_lse, column_lse, similarity_row_lse,
                            similarity_column_lse, TARGET(to));
    });
}

const char* positive_products(const void* image, int64_t image_row_stride, int64_t image_column_stride,
                              const void* text, int64_t text_row_stride, int64_t text_column_stride,
                              int64_t rows, int64_t width, int dtype, float* positives) {
    return guarded([&] {
        cuda::positive_products(image, image_row_stride, image_column_stride, text, text_row_stride,
                                text_column_stride, rows, width, DType(dtype), positives, nullptr);
    });
}

const char* run_reverse(bool barrier, float* values) {
    return guarded([&] {
        cuda_on_cpu::run({1}, {REVERSED}, 0,
                         [&] { barrier ? reverse<true>(values) : reverse<false>(values); });
    });
}
const char* run_wait_in_half() {
    return guarded([&] { cuda_on_cpu::run({1}, {REVERSED}, 0, [] { wait_in_half(); }); });
}
const char* run_load_misaligned(float* values) {
    return guarded([&] { cuda_on_cpu::run({1}, {1}, 0, [&] { load_misaligned(values); }); });
}

}  // extern "C"

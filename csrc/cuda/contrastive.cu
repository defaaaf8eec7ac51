// The epilogues of contrastive.h on every GPU from sm_80 on: one pass over a tile of float32 products, which
// torch's matrix product has just written. This file has the launches; the kernels are in
//
//   contrastive_lse.cuh        sum_tile -> merge_sums, then sum_about_maximum -> merge_about_maximum, which
//                              usually return at once
//   positive_products.cuh      positive_products
//   contrastive_gradients.cuh  split_lse -> apply_epilogue -> add_partials (reductions.cuh)
//
// Why the products are float32, not bfloat16: at scale 100 a cosine of 0.5 rounded to 8 bits moves its logit
// by 0.1, and its term of the gradient by a tenth. That alone is the error of the loss under autocast, of
// which ours may be half. Bytes per element of N^2, and the time for N = 32768 at 4.2 TB/s (of an H200's 4.8;
// an estimate, not a measurement):
//                                                    float32            bfloat16
//   forward   product written, product read          4 + 4   2.0 ms     2 + 2   1.0 ms
//   gradient  the same, G written, G read twice      4+4+2+4 3.6 ms     2+2+2+4 2.6 ms
// So the precision costs 2.0 ms in addition to 5.6 ms of matrix products at width 512.

#include "contrastive.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/contrastive_gradients.cuh"
#include "cuda/contrastive_lse.cuh"
#include "cuda/positive_products.cuh"

namespace dalle2_fast::cuda {
namespace {

constexpr int64_t divide_up(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, void* stream, Arguments... arguments) {
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(THREADS);
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("contrastive loss on CUDA: ") + cudaGetErrorString(error));
}

dim3 grid_of(int64_t rows, int64_t columns, int rows_per_block) {
    return dim3(unsigned(divide_up(columns, BLOCK_COLUMNS)), unsigned(divide_up(rows, rows_per_block)));
}

// Hands out parts of the workspace, each aligned to 256 bytes. Started at address 0, it measures the size.
struct WorkspaceAllocator {
    uintptr_t next;

    template <class T>
    T* allocate(int64_t count) {
        T* part = reinterpret_cast<T*>(next);
        next += divide_up(count * int64_t(sizeof(T)), 256) * 256;
        return part;
    }
};

// The pairs share their memory with the plain sums: they are written after the last read of these.
PartialSums allocate_sums(WorkspaceAllocator& allocator, int64_t rows, int64_t columns) {
    PartialSums sums;
    sums.columns = divide_up(columns, LANES) * LANES;
    const int64_t column_blocks = divide_up(columns, BLOCK_COLUMNS), row_blocks = divide_up(rows, BATCH);
    sums.any_out_of_range = allocator.allocate<int>(1);
    sums.out_of_range = allocator.allocate<unsigned char>(columns + rows);
    sums.row_pairs = allocator.allocate<float2>(column_blocks * rows);
    sums.column_pairs = allocator.allocate<float2>(row_blocks * sums.columns);
    sums.row = reinterpret_cast<float*>(sums.row_pairs);
    sums.column = reinterpret_cast<float*>(sums.column_pairs);
    return sums;
}

Lse allocate_lse(WorkspaceAllocator& allocator, int64_t rows, int64_t columns, const double* row_lse,
                 const double* column_lse, void* stream) {
    float2 *row = allocator.allocate<float2>(rows), *column = allocator.allocate<float2>(columns);
    launch(split_lse, dim3(unsigned(divide_up(rows + columns, THREADS))), stream, row_lse, column_lse, rows,
           columns, row, column);
    return {row, column};
}

LogitTile logits_of(const Tile& tile, const float* scale, float factor = 1) {
    return {static_cast<const float*>(tile.products), tile.stride, tile.rows, tile.columns,
            tile.diagonal_offset, scale, factor};
}

template <class Epilogue, class G>
void launch_epilogue_as(const LogitTile& logits, const Epilogue& epilogue, G* gradient,
                        int64_t gradient_stride, double* sums, WorkspaceAllocator& allocator, void* stream) {
    const dim3 grid = grid_of(logits.rows, logits.columns, EPILOGUE_ROWS);
    const int64_t blocks = int64_t(grid.x) * grid.y;
    const int count = std::is_same_v<G, NoGradient> ? 1 : Epilogue::SUMS;
    float* partials = allocator.allocate<float>(count * blocks);
    launch(apply_epilogue<Epilogue, G>, grid, stream, logits, epilogue, gradient, gradient_stride, partials);
    launch(add_partials, dim3(count), stream, partials, blocks, sums);
}

template <class Epilogue>
void launch_epilogue(const LogitTile& logits, const Epilogue& epilogue, void* gradient,
                     int64_t gradient_stride, DType dtype, double* sums, WorkspaceAllocator& allocator,
                     void* stream) {
    auto launch_as = [&](auto* typed) {
        launch_epilogue_as(logits, epilogue, typed, gradient_stride, sums, allocator, stream);
    };
    if (gradient == nullptr) {
        // ClipEpilogue computes no loss: without its gradient there is nothing left to compute.
        if constexpr (Epilogue::SUMS > 1) launch_as(static_cast<NoGradient*>(nullptr));
        else throw std::runtime_error("contrastive loss on CUDA: expected a gradient to write to, got none");
    } else if (dtype == DType::f32) {
        launch_as(static_cast<float*>(gradient));
    } else if (dtype == DType::f16) {
        launch_as(static_cast<__half*>(gradient));
    } else if (dtype == DType::bf16) {
        launch_as(static_cast<__nv_bfloat16*>(gradient));
    } else {
        throw std::runtime_error(
            "contrastive loss on CUDA: expected a gradient of float32, float16 or bfloat16");
    }
}

}  // namespace

int64_t workspace_bytes(int64_t rows, int64_t columns) {
    WorkspaceAllocator for_lse{0}, for_gradient{0};
    allocate_sums(for_lse, rows, columns);
    // The largest of the three losses: soft_epilogue has two pairs of lse, sigmoid_epilogue three sums.
    for (int pair = 0; pair < 2; ++pair) {
        for_gradient.allocate<float2>(rows);
        for_gradient.allocate<float2>(columns);
    }
    for_gradient.allocate<float>(3 * divide_up(columns, BLOCK_COLUMNS) * divide_up(rows, EPILOGUE_ROWS));
    return int64_t(std::max(for_lse.next, for_gradient.next));
}

void lse_epilogue(const Tile& tile, float factor, const float* scale, double* row_lse, double* column_lse,
                  void* workspace, void* stream) {
    const LogitTile logits = logits_of(tile, scale, factor);
    WorkspaceAllocator allocator{reinterpret_cast<uintptr_t>(workspace)};
    const PartialSums sums = allocate_sums(allocator, tile.rows, tile.columns);
    const dim3 merge_grid(unsigned(divide_up(tile.rows + tile.columns, THREADS)));
    const dim3 sum_grid = grid_of(tile.rows, tile.columns, SUM_ROWS);
    launch(sum_tile, sum_grid, stream, logits, sums);
    launch(merge_sums, merge_grid, stream, logits, sums, int(sum_grid.y), int(sum_grid.x), row_lse,
           column_lse);
    const dim3 pair_grid = grid_of(tile.rows, tile.columns, BATCH);
    launch(sum_about_maximum, pair_grid, stream, logits, sums);
    launch(merge_about_maximum, merge_grid, stream, logits, sums, int(pair_grid.y), int(pair_grid.x), row_lse,
           column_lse);
}

void positive_products(const void* image, int64_t image_row_stride, int64_t image_column_stride,
                       const void* text, int64_t text_row_stride, int64_t text_column_stride, int64_t rows,
                       int64_t width, DType dtype, float* positives, void* stream) {
    auto launch_as = [&](auto typed) {
        using T = decltype(typed);
        launch(positive_products<T>, dim3(unsigned(divide_up(rows, WARPS))), stream,
               StridedRows<T>{static_cast<const T*>(image), image_row_stride, image_column_stride},
               StridedRows<T>{static_cast<const T*>(text), text_row_stride, text_column_stride}, rows, width,
               positives);
    };
    if (dtype == DType::bf16) launch_as(__nv_bfloat16());
    else if (dtype == DType::f16) launch_as(__half());
    else throw std::runtime_error("contrastive loss on CUDA: expected features of float16 or bfloat16");
}

void gradient_epilogue(const Tile& tile, const float* scale, const double* row_lse, const double* column_lse,
                       float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
                       DType gradient_dtype, double* sums, void* workspace, void* stream) {
    WorkspaceAllocator allocator{reinterpret_cast<uintptr_t>(workspace)};
    const Lse lse = allocate_lse(allocator, tile.rows, tile.columns, row_lse, column_lse, stream);
    launch_epilogue(logits_of(tile, scale), ClipEpilogue{lse, row_weight, column_weight}, gradient,
                    gradient_stride, gradient_dtype, sums, allocator, stream);
}

void sigmoid_epilogue(const Tile& tile, const float* scale, const float* bias, void* gradient,
                      int64_t gradient_stride, DType gradient_dtype, double* sums, void* workspace,
                      void* stream) {
    WorkspaceAllocator allocator{reinterpret_cast<uintptr_t>(workspace)};
    launch_epilogue(logits_of(tile, scale), SigmoidEpilogue{bias}, gradient, gradient_stride, gradient_dtype,
                    sums, allocator, stream);
}

void soft_epilogue(const Tile& tile, const float* similarity, const float* scale, const double* row_lse,
                   const double* column_lse, const double* similarity_row_lse,
                   const double* similarity_column_lse, void* gradient, int64_t gradient_stride,
                   DType gradient_dtype, double* sums, void* workspace, void* stream) {
    WorkspaceAllocator allocator{reinterpret_cast<uintptr_t>(workspace)};
    const Lse lse = allocate_lse(allocator, tile.rows, tile.columns, row_lse, column_lse, stream);
    const Lse similarity_lse = allocate_lse(allocator, tile.rows, tile.columns, similarity_row_lse,
                                            similarity_column_lse, stream);
    launch_epilogue(logits_of(tile, scale), SoftEpilogue{similarity, lse, similarity_lse}, gradient,
                    gradient_stride, gradient_dtype, sums, allocator, stream);
}

}  // namespace dalle2_fast::cuda

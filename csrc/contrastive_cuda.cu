// M1 of the contrastive losses: launches of the kernels in contrastive_cuda.cuh, for every GPU from sm_80 on.
#include "contrastive_cuda.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "contrastive.h"

namespace dalle2_fast::cuda {
namespace {

constexpr int64_t blocks_of(int64_t count, int64_t per_block) { return (count + per_block - 1) / per_block; }

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
    return dim3(unsigned(blocks_of(columns, BLOCK_COLUMNS)), unsigned(blocks_of(rows, rows_per_block)));
}

// Hands out parts of the workspace; from address 0 on, it finds the size.
struct Carver {
    uintptr_t next;

    template <class T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(next);
        next += blocks_of(count * int64_t(sizeof(T)), 256) * 256;
        return part;
    }
};

// The pairs are written after the last read of the plain sums, so they share their place.
Sums carve_sums(Carver& carver, int64_t rows, int64_t columns) {
    Sums sums;
    sums.columns = blocks_of(columns, LANES) * LANES;
    const int64_t column_blocks = blocks_of(columns, BLOCK_COLUMNS), row_blocks = blocks_of(rows, BATCH);
    sums.flag = carver.take<int>(1);
    sums.redo = carver.take<unsigned char>(columns + rows);
    sums.along_pairs = carver.take<float2>(column_blocks * rows);
    sums.down_pairs = carver.take<float2>(row_blocks * sums.columns);
    sums.along = reinterpret_cast<float*>(sums.along_pairs);
    sums.down = reinterpret_cast<float*>(sums.down_pairs);
    return sums;
}

Lse carve_lse(Carver& carver, int64_t rows, int64_t columns, const double* row_lse, const double* column_lse,
              void* stream) {
    float2 *row = carver.take<float2>(rows), *column = carver.take<float2>(columns);
    launch(split_lse, dim3(unsigned(blocks_of(rows + columns, THREADS))), stream, row_lse, column_lse, rows, columns,
           row, column);
    return {row, column};
}

Logits logits_of(const Tile& tile, const float* scale, float factor = 1) {
    return {static_cast<const float*>(tile.products), tile.stride, tile.rows, tile.columns, tile.own, scale, factor};
}

template <class Rule, class G>
void launch_epilogue_as(const Logits& logits, const Rule& rule, G* gradient, int64_t gradient_stride, double* sums,
                        Carver& carver, void* stream) {
    const dim3 grid = grid_of(logits.rows, logits.columns, EPILOGUE_ROWS);
    const int64_t blocks = int64_t(grid.x) * grid.y;
    const int count = std::is_same_v<G, Nothing> ? 1 : Rule::SUMS;
    float* parts = carver.take<float>(count * blocks);
    launch(epilogue<Rule, G>, grid, stream, logits, rule, gradient, gradient_stride, parts);
    launch(add_up, dim3(count), stream, parts, blocks, sums);
}

template <class Rule>
void launch_epilogue(const Logits& logits, const Rule& rule, void* gradient, int64_t gradient_stride, DType dtype,
                     double* sums, Carver& carver, void* stream) {
    auto as = [&](auto* typed) {
        launch_epilogue_as(logits, rule, typed, gradient_stride, sums, carver, stream);
    };
    if (gradient == nullptr) {
        // ClipRule has no loss: without its gradient nothing is left to compute.
        if constexpr (Rule::SUMS > 1) as(static_cast<Nothing*>(nullptr));
        else throw std::runtime_error("contrastive loss on CUDA: expected a gradient to write to, got none");
    } else if (dtype == DType::f32) {
        as(static_cast<float*>(gradient));
    } else if (dtype == DType::f16) {
        as(static_cast<__half*>(gradient));
    } else if (dtype == DType::bf16) {
        as(static_cast<__nv_bfloat16*>(gradient));
    } else {
        throw std::runtime_error("contrastive loss on CUDA: expected a gradient of float32, float16 or bfloat16");
    }
}

}  // namespace

int64_t workspace_bytes(int64_t rows, int64_t columns) {
    Carver for_lse{0}, for_gradient{0};
    carve_sums(for_lse, rows, columns);
    for (int halves = 0; halves < 2; ++halves) {  // soft_epilogue has two pairs of lse, and the others' sums are 3
        for_gradient.take<float2>(rows);
        for_gradient.take<float2>(columns);
    }
    for_gradient.take<float>(3 * blocks_of(columns, BLOCK_COLUMNS) * blocks_of(rows, EPILOGUE_ROWS));
    return int64_t(std::max(for_lse.next, for_gradient.next));
}

void lse_epilogue(const Tile& tile, float factor, const float* scale, double* row_lse, double* column_lse,
                  void* workspace, void* stream) {
    const Logits logits = logits_of(tile, scale, factor);
    Carver carver{reinterpret_cast<uintptr_t>(workspace)};
    const Sums sums = carve_sums(carver, tile.rows, tile.columns);
    const dim3 all(unsigned(blocks_of(tile.rows + tile.columns, THREADS)));
    const dim3 plain = grid_of(tile.rows, tile.columns, SUM_ROWS);
    launch(sum_tile, plain, stream, logits, sums);
    launch(merge_sums, all, stream, logits, sums, int(plain.y), int(plain.x), row_lse, column_lse);
    const dim3 pairs = grid_of(tile.rows, tile.columns, BATCH);
    launch(sum_about_maximum, pairs, stream, logits, sums);
    launch(merge_about_maximum, all, stream, logits, sums, int(pairs.y), int(pairs.x), row_lse, column_lse);
}

void own_products(const void* image, int64_t image_stride, int64_t image_step, const void* text, int64_t text_stride,
                  int64_t text_step, int64_t rows, int64_t width, DType dtype, float* own, void* stream) {
    auto as = [&](auto typed) {
        using T = decltype(typed);
        launch(own_products<T>, dim3(unsigned(blocks_of(rows, WARPS))), stream,
               Rows<T>{static_cast<const T*>(image), image_stride, image_step},
               Rows<T>{static_cast<const T*>(text), text_stride, text_step}, rows, width, own);
    };
    if (dtype == DType::bf16) as(__nv_bfloat16());
    else if (dtype == DType::f16) as(__half());
    else throw std::runtime_error("contrastive loss on CUDA: expected features of float16 or bfloat16");
}

void gradient_epilogue(const Tile& tile, const float* scale, const double* row_lse, const double* column_lse,
                       float row_weight, float column_weight, void* gradient, int64_t gradient_stride,
                       DType gradient_dtype, double* sums, void* workspace, void* stream) {
    Carver carver{reinterpret_cast<uintptr_t>(workspace)};
    const Lse lse = carve_lse(carver, tile.rows, tile.columns, row_lse, column_lse, stream);
    launch_epilogue(logits_of(tile, scale), ClipRule{lse, row_weight, column_weight}, gradient, gradient_stride,
                    gradient_dtype, sums, carver, stream);
}

void sigmoid_epilogue(const Tile& tile, const float* scale, const float* bias, void* gradient,
                      int64_t gradient_stride, DType gradient_dtype, double* sums, void* workspace, void* stream) {
    Carver carver{reinterpret_cast<uintptr_t>(workspace)};
    launch_epilogue(logits_of(tile, scale), SigmoidRule{bias}, gradient, gradient_stride, gradient_dtype, sums,
                    carver, stream);
}

void soft_epilogue(const Tile& tile, const float* alike, const float* scale, const double* row_lse,
                   const double* column_lse, const double* alike_row_lse, const double* alike_column_lse,
                   void* gradient, int64_t gradient_stride, DType gradient_dtype, double* sums, void* workspace,
                   void* stream) {
    Carver carver{reinterpret_cast<uintptr_t>(workspace)};
    const Lse lse = carve_lse(carver, tile.rows, tile.columns, row_lse, column_lse, stream);
    const Lse alike_lse = carve_lse(carver, tile.rows, tile.columns, alike_row_lse, alike_column_lse, stream);
    launch_epilogue(logits_of(tile, scale), SoftRule{alike, lse, alike_lse}, gradient, gradient_stride,
                    gradient_dtype, sums, carver, stream);
}

}  // namespace dalle2_fast::cuda

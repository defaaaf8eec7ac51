// The gradient epilogues: split_lse -> apply_epilogue<ClipEpilogue | SigmoidEpilogue | SoftEpilogue> ->
// add_partials.
//
// An epilogue is the formula of one loss. `Columns` is what a thread keeps of its columns in registers, `Row`
// what it reads of a row; `gradient` returns G of one element and adds to SUMS sums. ROWS_IN_FLIGHT rows are
// read before the first is used: to hide a latency of 0.8 us an H200 needs 25 KB of outstanding loads per SM,
// which is 2 rows of 4 blocks.
#pragma once

#include <type_traits>

#include "cuda/math.cuh"
#include "cuda/reductions.cuh"
#include "cuda/tile.cuh"

namespace dalle2_fast::cuda {

constexpr int EPILOGUE_ROWS = 32;  // of a block

struct Lse {  // a float64 lse as (high, low)
    const float2* row;     // [rows]
    const float2* column;  // [columns]
};

// float64 -> (high, low), so that the epilogue does no float64 arithmetic, which runs at 1/64 of the float32
// rate on most GPUs.
__global__ void __launch_bounds__(THREADS) split_lse(const double* row_lse, const double* column_lse,
                                                     int64_t rows, int64_t columns, float2* row,
                                                     float2* column) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= rows + columns) return;
    const double lse = index < columns ? column_lse[index] : row_lse[index - columns];
    const float high = float(lse);
    (index < columns ? column[index] : row[index - columns]) = make_float2(high, float(lse - high));
}

// L - lse; L - high is exact where they are near each other.
__device__ __forceinline__ float subtract_lse(float logit, float2 lse) { return (logit - lse.x) - lse.y; }

__device__ __forceinline__ void load_column_lse(float2 (&to)[LANES], const float2* lse, int64_t column,
                                                int count) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane)
        to[lane] = lane < count ? lse[column + lane] : make_float2(0.0f, 0.0f);
}

// G = row_weight exp(L - row_lse) + column_weight exp(L - column_lse), less row_weight + column_weight for a
// positive pair. 6 bytes per element with G in 16 bits: 1.5 ms for 32768^2.
struct ClipEpilogue {
    static constexpr int SUMS = 1, ROWS_IN_FLIGHT = 8;
    static constexpr bool TREATS_POSITIVES = true;
    Lse lse;
    float row_weight, column_weight;

    struct Columns {
        float2 lse[LANES];
    };
    struct Row {
        float2 lse;
    };
    template <bool COMPLETE>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t column, int count) const {
        load_column_lse(columns.lse, lse.column, column, count);
    }
    template <bool COMPLETE>
    __device__ __forceinline__ void load_row(Row& to, const LogitTile&, int64_t row, int64_t, int) const {
        to.lse = __ldg(lse.row + row);
    }
    __device__ __forceinline__ float gradient(float product, float scale, const Row& row,
                                              const Columns& columns, int lane, bool positive,
                                              float (&sums)[SUMS]) const {
        const float logit = __fmul_rn(scale, product);
        const float row_log_p = subtract_lse(logit, row.lse);
        const float column_log_p = subtract_lse(logit, columns.lse[lane]);
        // exp(x) - 1 of an easy pair is small: expm1 keeps full precision, the difference would not.
        const float gradient =
            positive ? row_weight * expm1f(row_log_p) + column_weight * expm1f(column_log_p)
                     : row_weight * fast_exp(row_log_p) + column_weight * fast_exp(column_log_p);
        sums[0] += gradient * product;
        return gradient;
    }
};

// z = 1 for a positive pair, else -1; y = -z (scale P + bias). The loss is log(1 + exp y),
// G = -z / (1 + exp(-y)).
struct SigmoidEpilogue {
    static constexpr int SUMS = 3, ROWS_IN_FLIGHT = 8;
    static constexpr bool TREATS_POSITIVES = true;
    const float* bias;

    struct Columns {
        float bias;
    };
    struct Row {};
    template <bool COMPLETE>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t, int) const {
        columns.bias = bias[0];
    }
    template <bool COMPLETE>
    __device__ __forceinline__ void load_row(Row&, const LogitTile&, int64_t, int64_t, int) const {}
    __device__ __forceinline__ float gradient(float product, float scale, const Row&, const Columns& columns,
                                              int, bool positive, float (&sums)[SUMS]) const {
        const float logit = fmaf(scale, product, columns.bias), y = positive ? -logit : logit;
        const float u = fast_exp(-fabsf(y));
        sums[0] += fmaxf(y, 0.0f) + log_one_plus(u);
        const float size = __fdividef(y > 0 ? 1.0f : u, 1.0f + u);
        const float gradient = positive ? -size : size;
        sums[1] += gradient * product;
        sums[2] += gradient;
        return gradient;
    }
};

// A = scale / 2 * similarity, p = exp(A - similarity's row lse), q = exp(A - similarity's column lse). The
// loss is p (row_lse - L) + q (column_lse - L), G = exp(L - row_lse) + exp(L - column_lse) - p - q. 10 bytes
// per element: 2.6 ms for 32768^2; its 4 exponentials would take 1.2 ms.
struct SoftEpilogue {
    static constexpr int SUMS = 2, ROWS_IN_FLIGHT = 4;
    static constexpr bool TREATS_POSITIVES = false;
    const float* similarity;  // laid out as LogitTile.products
    Lse lse, similarity_lse;

    struct Columns {
        float2 lse[LANES], similarity_lse[LANES];
    };
    struct Row {
        float2 lse, similarity_lse;
        float similarity[LANES];
    };
    template <bool COMPLETE>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t column, int count) const {
        load_column_lse(columns.lse, lse.column, column, count);
        load_column_lse(columns.similarity_lse, similarity_lse.column, column, count);
    }
    template <bool COMPLETE>
    __device__ __forceinline__ void load_row(Row& to, const LogitTile& tile, int64_t row, int64_t column,
                                             int count) const {
        to.lse = __ldg(lse.row + row);
        to.similarity_lse = __ldg(similarity_lse.row + row);
        load<COMPLETE>(to.similarity, similarity + row * tile.stride + column, count);
    }
    __device__ __forceinline__ float gradient(float product, float scale, const Row& row,
                                              const Columns& columns, int lane, bool,
                                              float (&sums)[SUMS]) const {
        const float logit = __fmul_rn(scale, product);
        const float row_log_p = subtract_lse(logit, row.lse);
        const float column_log_p = subtract_lse(logit, columns.lse[lane]);
        const float target_logit = __fmul_rn(0.5f * scale, row.similarity[lane]);
        const float p = fast_exp(subtract_lse(target_logit, row.similarity_lse));
        const float q = fast_exp(subtract_lse(target_logit, columns.similarity_lse[lane]));
        const float gradient = (fast_exp(row_log_p) - p) + (fast_exp(column_log_p) - q);
        sums[0] -= p * row_log_p + q * column_log_p;
        sums[1] += gradient * product;
        return gradient;
    }
};

// ------------------------------------------------------------------------------------------------ the kernel

struct NoGradient {};  // the type of the output where only the loss is wanted

// COMPLETE: the block lies within the tile and contains no positive pair that the epilogue treats
// differently.
template <bool COMPLETE, class Epilogue, class G>
__device__ __forceinline__ void epilogue_block(const LogitTile& tile, const Epilogue& epilogue, G* gradient,
                                               int64_t gradient_stride, float (&sums)[Epilogue::SUMS]) {
    constexpr int ROWS = COMPLETE ? Epilogue::ROWS_IN_FLIGHT : 1;
    const float scale = tile.logit_scale();
    const int64_t column = thread_column();
    const int64_t first_row = int64_t(blockIdx.y) * EPILOGUE_ROWS;
    const int count = COMPLETE ? LANES : count_columns(tile, column);
    const int rows = COMPLETE ? EPILOGUE_ROWS : int(min(tile.rows - first_row, int64_t(EPILOGUE_ROWS)));
    typename Epilogue::Columns columns;
    epilogue.template load_columns<COMPLETE>(columns, column, count);

#pragma unroll 1  // a longer body takes longer to compile, and enough loads are outstanding
    for (int batch = 0; batch < rows; batch += ROWS) {
        float products[ROWS][LANES];
        typename Epilogue::Row row_values[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = first_row + batch + i;
            load<COMPLETE>(products[i], tile.products + row * tile.stride + column, count);
            epilogue.template load_row<COMPLETE>(row_values[i], tile, row, column, count);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = first_row + batch + i, positive = tile.diagonal_offset + row - column;
            float values[LANES];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                values[lane] = 0;
                if (COMPLETE || lane < count)
                    values[lane] = epilogue.gradient(products[i][lane], scale, row_values[i], columns, lane,
                                                     !COMPLETE && positive == lane, sums);
            }
            if constexpr (!std::is_same_v<G, NoGradient>)
                store<COMPLETE>(gradient + row * gradient_stride + column, values, count);
        }
    }
}

// Turns a tile into G and leaves the sums of each block in partials[SUMS, blocks]; without G only the first
// sum.
template <class Epilogue, class G>
__global__ void __launch_bounds__(THREADS)
apply_epilogue(LogitTile tile, Epilogue epilogue, G* gradient, int64_t gradient_stride, float* partials) {
    constexpr int WANTED = std::is_same_v<G, NoGradient> ? 1 : Epilogue::SUMS;
    __shared__ float warp_sums[WANTED][WARPS];
    float sums[Epilogue::SUMS] = {};
    const bool complete = (blockIdx.x + 1) * int64_t(BLOCK_COLUMNS) <= tile.columns &&
                          (blockIdx.y + 1) * int64_t(EPILOGUE_ROWS) <= tile.rows &&
                          !(Epilogue::TREATS_POSITIVES && has_positives(tile, EPILOGUE_ROWS));
    if (complete) epilogue_block<true>(tile, epilogue, gradient, gradient_stride, sums);
    else epilogue_block<false>(tile, epilogue, gradient, gradient_stride, sums);

#pragma unroll
    for (int k = 0; k < WANTED; ++k) {
        sums[k] = warp_sum(sums[k]);
        if (threadIdx.x % 32 == 0) warp_sums[k][threadIdx.x / 32] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x < WANTED) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += warp_sums[threadIdx.x][warp];
        const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
        partials[threadIdx.x * blocks + blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = sum;
    }
}

}  // namespace dalle2_fast::cuda

// The log-sum-exps of the rows and columns of a tile: sum_tile -> merge_sums, and where sums about one shift
// are out of range sum_about_maximum -> merge_about_maximum.
//
// Positive pairs are left out of all float32 sums; merging adds them in double. The exponential of an easy
// pair is 1e6 times the sum of its negatives, which then is all of the loss, and in one float32 sum with it
// the negatives would be rounded away.
#pragma once

#include "cuda/math.cuh"
#include "cuda/reductions.cuh"
#include "cuda/tile.cuh"

namespace dalle2_fast::cuda {

// Rows of a block. The sums of its columns are 1 / SUM_ROWS of the bytes that it reads; more rows leave a GPU
// idle at the end: 2048 x 32768 are 1024 blocks here, 4 for each that an H200 runs at once.
constexpr int SUM_ROWS = 64;

// Sums of exp(L) 2^-shift outside these bounds may have lost terms. The lower bound is so far above the
// smallest normal number that 1e6 terms flushed to 0 do not count.
constexpr double MIN_SUM = 1e-24, MAX_SUM = 1e37;

// What one lse kernel leaves for the next. `columns` here is rounded up to a multiple of LANES.
struct PartialSums {
    float* row;           // [column blocks, rows]: sum of one row in one block
    float* column;        // [row blocks, columns]: sum of one column in one block
    float2* row_pairs;    // the same about a maximum: (maximum, sum of exp(L - maximum))
    float2* column_pairs;
    unsigned char* out_of_range;  // [tile.columns + rows]: whether this column's, this row's sum is
    int* any_out_of_range;        // whether any is
    int64_t columns;
};

// 2^-shift is about exp(70 - |scale|): exp(L) of unit features stays below exp(70), of which a float32 can
// hold the sum of 1e8.
__device__ __forceinline__ float shift_of(float scale) { return rintf((fabsf(scale) - 70) * LOG2_E); }

// The logit of the positive pair of a row, or of a column; -infinity if this has none in the tile.
__device__ __forceinline__ double positive_logit(const LogitTile& tile, int64_t index, bool is_row) {
    const int64_t row = is_row ? index : index - tile.diagonal_offset, column = row + tile.diagonal_offset;
    if (row < 0 || row >= tile.rows || column < 0 || column >= tile.columns) return -INFINITY;
    return __fmul_rn(tile.logit_scale(), tile.products[row * tile.stride + column]);
}

// ------------------------------------------------------------------------------------------- about one shift

// COMPLETE: the block lies within the tile and contains no positive pair.
template <bool COMPLETE>
__device__ __forceinline__ void sum_block(const LogitTile& tile, const PartialSums& sums,
                                          float (&warp_row_sums)[WARPS][SUM_ROWS]) {
    const float scale = tile.logit_scale(), shift = shift_of(scale);
    const int64_t column = thread_column();
    const int64_t first_row = int64_t(blockIdx.y) * SUM_ROWS;
    const int count = COMPLETE ? LANES : count_columns(tile, column);
    const int rows = COMPLETE ? SUM_ROWS : int(min(tile.rows - first_row, int64_t(SUM_ROWS)));
    const float* first = tile.products + first_row * tile.stride + column;

    float column_sums[LANES] = {};
#pragma unroll 1
    for (int batch = 0; batch < SUM_ROWS; batch += BATCH) {
        float row_sums[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            row_sums[i] = 0;
            if (COMPLETE || batch + i < rows) {
                float products[LANES];
                load<COMPLETE>(products, first + (batch + i) * tile.stride, count);
                const int64_t positive = tile.diagonal_offset + first_row + batch + i - column;
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane) {
                    float term = shifted_exp(__fmul_rn(scale, products[lane]), shift);
                    if (!COMPLETE && (lane >= count || lane == positive)) term = 0;
                    row_sums[i] += term;
                    column_sums[lane] += term;
                }
            }
        }
        warp_row_sums[threadIdx.x / 32][batch + threadIdx.x % 32] = reduce_transposed(row_sums, Add());
    }
    if (column < sums.columns)
        store<true>(sums.column + blockIdx.y * sums.columns + column, column_sums, LANES);

    __syncthreads();
    if (int(threadIdx.x) < rows) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += warp_row_sums[warp][threadIdx.x];
        sums.row[blockIdx.x * tile.rows + first_row + threadIdx.x] = sum;
    }
}

// Sums of exp(L) 2^-shift of each block's rows and columns. Reads 4 bytes per element: 1.0 ms for 32768^2.
__global__ void __launch_bounds__(THREADS) sum_tile(LogitTile tile, PartialSums sums) {
    __shared__ float warp_row_sums[WARPS][SUM_ROWS];
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *sums.any_out_of_range = 0;
    const bool complete = (blockIdx.x + 1) * int64_t(BLOCK_COLUMNS) <= tile.columns &&
                          (blockIdx.y + 1) * int64_t(SUM_ROWS) <= tile.rows && !has_positives(tile, SUM_ROWS);
    if (complete) sum_block<true>(tile, sums, warp_row_sums);
    else sum_block<false>(tile, sums, warp_row_sums);
}

// One thread for each column, then one for each row: adds the sums of its blocks, in their order, and its
// positive pair, and merges the result into the running lse.
__global__ void __launch_bounds__(THREADS)
merge_sums(LogitTile tile, PartialSums sums, int row_blocks, int column_blocks, double* row_lse,
           double* column_lse) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index - tile.columns;
    if (row >= tile.rows) return;
    const bool is_row = row >= 0;
    const float* partials = is_row ? sums.row + row : sums.column + index;
    const int64_t stride = is_row ? tile.rows : sums.columns;
    const double shift = shift_of(tile.logit_scale()) * LOG_2;
    double sum = 0;
#pragma unroll 8
    for (int block = 0; block < (is_row ? column_blocks : row_blocks); ++block)
        sum += partials[block * stride];
    sum += exp(positive_logit(tile, is_row ? row : index, is_row) - shift);

    const bool in_range = sum > MIN_SUM && sum < MAX_SUM;  // false for NaN
    sums.out_of_range[index] = !in_range;
    if (in_range) {
        double* lse = is_row ? row_lse + row : column_lse + index;
        *lse = log_add_exp(*lse, shift + log(sum));
    } else {
        *sums.any_out_of_range = 1;  // every thread that writes here writes the same value
    }
}

// ----------------------------------------------------------------------------------- about their own maximum

// As sum_tile, about maxima: of a column over the thread's BATCH rows, of a row over the warp's columns. The
// logits alone need 128 registers, so that they are read only once; few tiles need this kernel.
__global__ void __launch_bounds__(THREADS) sum_about_maximum(LogitTile tile, PartialSums sums) {
    __shared__ float2 warp_row_pairs[WARPS][BATCH];
    if (*sums.any_out_of_range == 0) return;
    const float scale = tile.logit_scale();
    const int64_t column = thread_column();
    const int64_t first_row = int64_t(blockIdx.y) * BATCH;
    const int count = count_columns(tile, column);
    const int rows = int(min(tile.rows - first_row, int64_t(BATCH)));
    const float* first = tile.products + first_row * tile.stride + column;

    float logits[BATCH][LANES], row_values[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        row_values[i] = -INFINITY;
        float products[LANES] = {};
        if (i < rows) load<false>(products, first + i * tile.stride, count);
        const int64_t positive = tile.diagonal_offset + first_row + i - column;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            const bool counts = i < rows && lane < count && lane != positive;
            logits[i][lane] = counts ? __fmul_rn(scale, products[lane]) : -INFINITY;
            row_values[i] = fmaxf(row_values[i], logits[i][lane]);
        }
    }
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        float maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) maximum = fmaxf(maximum, logits[i][lane]);
        maximum = finite_or_zero(maximum);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum += fast_exp(logits[i][lane] - maximum);
        if (lane < count)
            sums.column_pairs[blockIdx.y * sums.columns + column + lane] = make_float2(maximum, sum);
    }
    // Of row i in lane i of the warp.
    const float maximum = finite_or_zero(reduce_transposed(row_values, Maximum()));
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const float row_maximum = __shfl_sync(~0u, maximum, i);
        row_values[i] = 0;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) row_values[i] += fast_exp(logits[i][lane] - row_maximum);
    }
    warp_row_pairs[threadIdx.x / 32][threadIdx.x % 32] =
        make_float2(maximum, reduce_transposed(row_values, Add()));
    __syncthreads();
    if (int(threadIdx.x) < rows) {
        float2 all = warp_row_pairs[0][threadIdx.x];
        for (int warp = 1; warp < WARPS; ++warp) {
            const float2 next = warp_row_pairs[warp][threadIdx.x];
            // A sum of 0 has no maximum: there were no terms, or all logits were -infinity.
            const float both = next.y == 0 ? all.x : all.y == 0 ? next.x : fmaxf(all.x, next.x);
            all.y = all.y * fast_exp(all.x - both) + (next.y == 0 ? 0 : next.y * fast_exp(next.x - both));
            all.x = both;
        }
        sums.row_pairs[blockIdx.x * tile.rows + first_row + threadIdx.x] = all;
    }
}

// As merge_sums, for the rows and columns that merge_sums has marked.
__global__ void __launch_bounds__(THREADS)
merge_about_maximum(LogitTile tile, PartialSums sums, int row_blocks, int column_blocks, double* row_lse,
                    double* column_lse) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index - tile.columns;
    if (*sums.any_out_of_range == 0 || row >= tile.rows || !sums.out_of_range[index]) return;
    const bool is_row = row >= 0;
    const float2* partials = is_row ? sums.row_pairs + row : sums.column_pairs + index;
    const int64_t stride = is_row ? tile.rows : sums.columns;
    double lse = positive_logit(tile, is_row ? row : index, is_row);
    for (int block = 0; block < (is_row ? column_blocks : row_blocks); ++block) {
        const float2 pair = partials[block * stride];
        lse = log_add_exp(lse, pair.x + log(double(pair.y)));
    }
    double* running = is_row ? row_lse + row : column_lse + index;
    *running = log_add_exp(*running, lse);
}

}  // namespace dalle2_fast::cuda

// Reductions of what the product kernels leave: partial sums to log-sum-exps, and to the sums of a loss.
#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/fragment.cuh"

namespace dalle2_fast::sm90 {

// Adds partial sums one after the other, in double. Those of add() are each about a different maximum.
struct RunningSum {
    double sum = 0, maximum = -INFINITY;
    __device__ __forceinline__ void add(double partial, double about) {
        if (about == -INFINITY && partial == 0) return;
        if (about > maximum) {
            sum = maximum == -INFINITY ? 0.0 : sum * exp(maximum - about);
            maximum = about;
        }
        sum += about == maximum ? partial : partial * exp(about - maximum);
    }
};

struct LseReduction {
    Mask mask;  // of this chunk of rows
    const float* scale;
    int64_t first_row;    // of this chunk
    int64_t rows_so_far;  // including this chunk
    bool last;
    float* positive_products;  // [all rows]
    const float *row_sums, *row_maxima, *column_sums, *column_maxima;
    double *column_total, *column_maximum;  // [columns], carried from chunk to chunk
    double *row_lse, *column_lse;
    int* out_of_range;  // set here: the sums about one shift are out of range

    // The log-sum-exp of the sum and the exponential of the positive pair.
    template <bool ABOUT_MAXIMUM>
    __device__ __forceinline__ double lse(RunningSum total, bool has_positive, int64_t row) const {
        double shift = double(binary_shift(scale[0])) * 0.6931471805599453;
        double logit = has_positive ? double(scale[0] * positive_products[row]) : -INFINITY;
        if (ABOUT_MAXIMUM) {
            if (has_positive) total.add(logit != logit ? logit : 1.0, logit);
            return total.maximum + log(total.sum);
        }
        double sum = total.sum + (has_positive ? exp(logit - shift) : 0.0);
        if (!(sum > 0x1p-60 && sum < 1e300)) *out_of_range = 1;  // near what a float cannot hold, or NaN
        return shift + log(sum);
    }
};

template <bool ABOUT_MAXIMUM>
__global__ void reduce_rows(LseReduction args) {
    int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if ((ABOUT_MAXIMUM && *args.out_of_range == 0) || row >= args.mask.rows) return;
    RunningSum total;
    int tiles = (args.mask.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
#pragma unroll 4
    for (int tile = 0; tile < tiles; ++tile) {
        int64_t slot = int64_t(tile) * args.mask.rows + row;
        if (ABOUT_MAXIMUM) total.add(args.row_sums[slot], args.row_maxima[slot]);
        else total.sum += args.row_sums[slot];
    }
    int64_t column = row + args.mask.diagonal_offset;
    bool has_positive = column >= 0 && column < args.mask.columns;
    if (!has_positive) args.positive_products[args.first_row + row] = NAN;
    args.row_lse[args.first_row + row] =
        args.lse<ABOUT_MAXIMUM>(total, has_positive, args.first_row + row);
}

template <bool ABOUT_MAXIMUM>
__global__ void reduce_columns(LseReduction args) {
    int64_t column = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if ((ABOUT_MAXIMUM && *args.out_of_range == 0) || column >= args.mask.columns) return;
    RunningSum total;
    if (args.first_row > 0) {
        total.sum = args.column_total[column];
        if (ABOUT_MAXIMUM) total.maximum = args.column_maximum[column];
    }
    int row_blocks = (args.mask.rows + CONSUMER_ROWS - 1) / CONSUMER_ROWS;
#pragma unroll 4
    for (int block = 0; block < row_blocks; ++block) {
        int64_t slot = int64_t(block) * args.mask.columns + column;
        if (ABOUT_MAXIMUM) total.add(args.column_sums[slot], args.column_maxima[slot]);
        else total.sum += args.column_sums[slot];
    }
    if (!args.last) {
        args.column_total[column] = total.sum;
        if (ABOUT_MAXIMUM) args.column_maximum[column] = total.maximum;
        return;
    }
    // The mask's diagonal_offset counts from the first row of the chunk.
    int64_t row = column - (args.mask.diagonal_offset - args.first_row);
    args.column_lse[column] = args.lse<ABOUT_MAXIMUM>(total, row >= 0 && row < args.rows_so_far, row);
}

// Block k adds the sum of partials[k, 0 .. count - 1] to sums[k]. Nothing else runs at the same time, hence
// the large blocks: 16 additions per thread for a tile of 8192 x 8192.
constexpr int SUM_THREADS = 1024;
__global__ void __launch_bounds__(SUM_THREADS)
add_partials(const float* partials, int64_t count, double* sums) {
    __shared__ double parts[SUM_THREADS];
    partials += blockIdx.x * count;
    double sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x; i < count; i += SUM_THREADS) sum += partials[i];
    parts[threadIdx.x] = sum;
    for (int half = SUM_THREADS / 2; half >= 1; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) parts[threadIdx.x] += parts[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] += parts[0];
}

}  // namespace dalle2_fast::sm90

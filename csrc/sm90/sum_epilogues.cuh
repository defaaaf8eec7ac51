// The epilogues of the forward pass: sums of exponentials along the rows and columns of a tile.
#pragma once

#include <sm90/hardware.h>

#include <cmath>
#include <cstdint>

#include "sm90/fragment.cuh"

namespace dalle2_fast::sm90 {

// About one shift. Positive pairs are left out: the reductions add them in double, from positive_products.
// The exponential of an easy pair is many times the sum of its negatives, and in one sum the rounding would
// hide 1 - p of it.
struct SumEpilogue {
    struct Arguments {
        Mask mask;
        const float* scale;
        float* positive_products;  // [rows]
        float* row_sums;           // [column tiles, rows]
        float* column_sums;        // [blocks of CONSUMER_ROWS rows, columns]
    };
    static __device__ __forceinline__ bool is_needed(const Arguments&) { return true; }

    const Arguments& args;
    EpilogueBuffers& buffers;
    float factor, shift;

    __device__ __forceinline__ SumEpilogue(const Arguments& arguments, EpilogueBuffers& buffers)
        : args(arguments), buffers(buffers) {
        factor = args.scale[0] * LOG2E;
        shift = binary_shift(args.scale[0]);
    }
    __device__ __forceinline__ void begin(const ConsumerTile&) {}
    __device__ __forceinline__ void finish(const ConsumerTile& tile, float (&products)[FRAGMENT]) {
        if (tile.row >= args.mask.rows) return;  // all four warps do
        if (args.mask.applies_to(tile)) reduce<true>(tile, products);
        else reduce<false>(tile, products);
    }

    template <bool MASKED>
    __device__ __forceinline__ void reduce(const ConsumerTile& tile, float (&products)[FRAGMENT]) {
        int consumer = consumer_index(), thread = thread_in_warpgroup(), lane = lane_in_warp();
        float* warp_sums = buffers[tile.buffer][consumer];  // [4 warps, TILE_COLUMNS]
        int positive[2] = {-1, -1};
        bool inside[2] = {true, true};
        if (MASKED) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = tile.row + fragment_row(half);
                inside[half] = row < args.mask.rows;
                positive[half] = args.mask.positive_column(tile, half);
                if (positive[half] >= 0)
                    args.positive_products[row] = select_element(products, half, positive[half]);
            }
        }
        float row_sums[2] = {0, 0};
#pragma unroll
        for (int part = 0; part < 4; ++part) {
            float column_sums[16], part_sums[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 16; ++i) {
                int j = part * 8 + i / 2, column = fragment_column(j, i % 2);
                float terms[2];
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    terms[half] = fast_exp2(fmaf(products[4 * j + 2 * half + i % 2], factor, -shift));
                    if (MASKED) {
                        bool counts = inside[half] && tile.column + column < args.mask.columns &&
                                      column != positive[half];
                        terms[half] = counts ? terms[half] : 0.0f;
                    }
                    part_sums[half] += terms[half];
                }
                column_sums[i] = terms[0] + terms[1];
            }
            sum_columns(column_sums);
            warp_sums[thread / 32 * TILE_COLUMNS + part * 64 + 2 * lane] = column_sums[0];
            warp_sums[thread / 32 * TILE_COLUMNS + part * 64 + 2 * lane + 1] = column_sums[1];
            row_sums[0] += part_sums[0];
            row_sums[1] += part_sums[1];
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = reduce_row(row_sums[half], Add());
            int row = tile.row + fragment_row(half);
            if (lane % 4 == 0 && (!MASKED || inside[half]))
                args.row_sums[int64_t(tile.column_tile) * args.mask.rows + row] = sum;
        }
        named_barrier_sync(1 + consumer, WARPGROUP);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread + i * WARPGROUP;
            float sum = (warp_sums[column] + warp_sums[TILE_COLUMNS + column]) +
                        (warp_sums[2 * TILE_COLUMNS + column] + warp_sums[3 * TILE_COLUMNS + column]);
            if (!MASKED || tile.column + column < args.mask.columns)
                args.column_sums[int64_t(tile.row / CONSUMER_ROWS) * args.mask.columns + tile.column +
                                 column] = sum;
        }
    }
};

// About the maximum of each row and column, where one shift leaves sums that are out of range: un-normalised
// features, or cosines below about -0.57 at scale 100.
struct SumAboutMaximumEpilogue {
    struct Arguments {
        Mask mask;
        const float* scale;
        const int* out_of_range;             // a flag: sums about one shift are
        float *row_sums, *row_maxima;        // [column tiles, rows]
        float *column_sums, *column_maxima;  // [blocks of CONSUMER_ROWS rows, columns]
    };
    static __device__ __forceinline__ bool is_needed(const Arguments& arguments) {
        return *arguments.out_of_range != 0;
    }

    const Arguments& args;
    EpilogueBuffers& buffers;

    __device__ __forceinline__ SumAboutMaximumEpilogue(const Arguments& arguments, EpilogueBuffers& buffers)
        : args(arguments), buffers(buffers) {}
    __device__ __forceinline__ void begin(const ConsumerTile&) {}

    static __device__ __forceinline__ float finite(float maximum) {
        return maximum == -INFINITY ? 0.0f : maximum;
    }
    static __device__ __forceinline__ float term(float logit, float maximum) {
        return fast_exp2((logit - maximum) * LOG2E);
    }

    __device__ __forceinline__ void finish(const ConsumerTile& tile, float (&logits)[FRAGMENT]) {
        if (tile.row >= args.mask.rows) return;
        int consumer = consumer_index(), thread = thread_in_warpgroup(), lane = lane_in_warp();
        float* sums = buffers[tile.buffer][consumer];  // [4 warps, TILE_COLUMNS], and as many maxima
        float* maxima = sums + 4 * TILE_COLUMNS;
        float scale = args.scale[0];
        // Rounded, as for the gradient. A multiply-add with what follows would make logits of 3e5 wrong by
        // 0.02.
#pragma unroll
        for (int i = 0; i < FRAGMENT; ++i) logits[i] = __fmul_rn(scale, logits[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = tile.row + fragment_row(half);
            int positive = args.mask.positive_column(tile, half);
            float maximum = -INFINITY, sum = 0;
#pragma unroll
            for (int j = 0; j < 32; ++j) {
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = fragment_column(j, bit);
                    bool counts = row < args.mask.rows && tile.column + column < args.mask.columns &&
                                  column != positive;
                    float& logit = logits[4 * j + 2 * half + bit];
                    logit = counts ? logit : -INFINITY;
                    maximum = fmaxf(maximum, logit);
                }
            }
            maximum = reduce_row(maximum, Maximum());
#pragma unroll
            for (int j = 0; j < 32; ++j)
                sum += term(logits[4 * j + 2 * half], finite(maximum)) +
                       term(logits[4 * j + 2 * half + 1], finite(maximum));
            sum = reduce_row(sum, Add());
            if (lane % 4 == 0 && row < args.mask.rows) {
                int64_t slot = int64_t(tile.column_tile) * args.mask.rows + row;
                args.row_sums[slot] = sum;
                args.row_maxima[slot] = maximum;
            }
        }
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            int j = i / 2, column = fragment_column(j, i % 2);
            float upper = logits[4 * j + i % 2], lower = logits[4 * j + 2 + i % 2];
            float maximum = fmaxf(upper, lower);
#pragma unroll
            for (int bit = 4; bit <= 16; bit *= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(~0u, maximum, bit));
            float sum = term(upper, finite(maximum)) + term(lower, finite(maximum));
#pragma unroll
            for (int bit = 4; bit <= 16; bit *= 2) sum += __shfl_xor_sync(~0u, sum, bit);
            if (lane / 4 == j % 8) {
                sums[thread / 32 * TILE_COLUMNS + column] = sum;
                maxima[thread / 32 * TILE_COLUMNS + column] = maximum;
            }
        }
        named_barrier_sync(1 + consumer, WARPGROUP);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread + i * WARPGROUP;
            float maximum = -INFINITY, sum = 0;
#pragma unroll
            for (int warp = 0; warp < 4; ++warp)
                maximum = fmaxf(maximum, maxima[warp * TILE_COLUMNS + column]);
#pragma unroll
            for (int warp = 0; warp < 4; ++warp)
                sum += sums[warp * TILE_COLUMNS + column] *
                       term(maxima[warp * TILE_COLUMNS + column], finite(maximum));
            if (tile.column + column < args.mask.columns) {
                int64_t slot = int64_t(tile.row / CONSUMER_ROWS) * args.mask.columns + tile.column + column;
                args.column_sums[slot] = sum;
                args.column_maxima[slot] = maximum;
            }
        }
    }
};

}  // namespace dalle2_fast::sm90

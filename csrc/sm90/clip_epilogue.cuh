// The epilogue of the backward pass of CLIP's loss: gradients of the logits.
#pragma once

#include <sm90/hardware.h>

#include <cmath>
#include <cstdint>

#include "sm90/fragment.cuh"
#include "sm90/output.cuh"

namespace dalle2_fast::sm90 {

// G = row_weight exp(L - row_lse) + column_weight exp(L - column_lse), less row_weight + column_weight for a
// positive pair. One exponential per element where all lse of the part are near enough to the shift:
//   exp(L - row_lse) = exp(L - shift) exp(shift - row_lse)
template <class Element>
struct ClipEpilogue {
    struct Arguments {
        Mask mask;
        const float* scale;
        const double *row_lse, *column_lse;
        float row_weight, column_weight;
        Output<Element> output;
        float* partials;  // of the sum of G P: one per warp and tile
    };
    static __device__ __forceinline__ bool is_needed(const Arguments&) { return true; }

    const Arguments& args;
    EpilogueBuffers& buffers;
    float scale, shift;
    float row_factor[2];
    bool is_near_shift;

    __device__ __forceinline__ ClipEpilogue(const Arguments& arguments, EpilogueBuffers& buffers)
        : args(arguments), buffers(buffers) {
        scale = args.scale[0];
        shift = binary_shift(scale);
    }

    // A float64 lse as a sum: L - high is exact near it, where a single float32 of an lse of 1e5 would be off
    // by 0.004.
    struct Lse {
        float high, low;
    };
    static __device__ __forceinline__ Lse split(double lse) {
        float high = float(lse);
        return {high, lse - lse == 0 ? float(lse - high) : 0.0f};
    }
    static __device__ __forceinline__ float softmax_term(float logit, Lse lse) {
        return fast_exp2(((logit - lse.high) - lse.low) * LOG2E);
    }

    // factor = weight exp(shift - lse), and whether it and all exp(L - shift) are floats of full precision:
    // terms flushed below 2^-126 must be negligible against 2^-70 of the row, and 2^-122 is not yet
    // subnormal.
    __device__ __forceinline__ void prepare_factor(double lse, float weight, float& factor) {
        double above = lse * 1.4426950408889634 - double(shift);
        is_near_shift = is_near_shift && above >= -70.0 && above <= 122.0;
        factor = weight * exp2f(float(-above));
    }
    __device__ __forceinline__ void begin(const ConsumerTile& tile) {
        float* factors = buffers[tile.buffer][consumer_index()];
        is_near_shift = true;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int column = thread_in_warpgroup() + i * WARPGROUP;
            float factor = 0;
            Lse lse = {INFINITY, 0};
            if (tile.column + column < args.mask.columns) {
                double column_lse = args.column_lse[tile.column + column];
                lse = split(column_lse);
                prepare_factor(column_lse, args.column_weight, factor);
            }
            factors[column] = factor;
            factors[TILE_COLUMNS + column] = lse.high;
            factors[2 * TILE_COLUMNS + column] = lse.low;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int row = tile.row + fragment_row(half);
            row_factor[half] = 0;
            if (row < args.mask.rows) prepare_factor(args.row_lse[row], args.row_weight, row_factor[half]);
        }
    }
    __device__ __forceinline__ void finish(const ConsumerTile& tile, float (&products)[FRAGMENT]) {
        float sum = 0;
        bool fast = named_barrier_all(1 + consumer_index(), WARPGROUP, is_near_shift);
        if (tile.row < args.mask.rows) {
            bool masked = args.mask.applies_to(tile);
            if (fast && !masked) sum = evaluate<true, false>(tile, products);
            else if (fast) sum = evaluate<true, true>(tile, products);
            else sum = evaluate<false, true>(tile, products);
        }
        write_partial(args.partials, tile, sum);
    }

    template <bool FAST, bool MASKED>
    __device__ __forceinline__ float evaluate(const ConsumerTile& tile, float (&products)[FRAGMENT]) {
        const float* factors = buffers[tile.buffer][consumer_index()];
        float factor = scale * LOG2E, sum = 0;
        Lse row_lse[2];
        int positive[2] = {-1, -1};
        float positive_gradient[2] = {0, 0};
        bool inside[2] = {true, true};
        if (MASKED) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                int row = tile.row + fragment_row(half);
                inside[half] = row < args.mask.rows;
                row_lse[half] = split(inside[half] ? args.row_lse[row] : INFINITY);
                positive[half] = args.mask.positive_column(tile, half);
                if (positive[half] >= 0) {  // p - 1 by expm1, which keeps the precision of a small result
                    double logit = __fmul_rn(scale, select_element(products, half, positive[half]));
                    float row_part = expm1f(float(logit - args.row_lse[row]));
                    double column_lse = args.column_lse[row + args.mask.diagonal_offset];
                    float column_part = expm1f(float(logit - column_lse));
                    positive_gradient[half] = args.row_weight * row_part + args.column_weight * column_part;
                }
            }
        }
        Element* const upper = args.output.address(tile, 0);
        Element* const lower = args.output.address(tile, 1);
#pragma unroll
        for (int part = 0; part < 8; ++part) {
            uint32_t pairs[2][4];
            float part_sum = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = part * 4 + i;
                float gradient[2][2];
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = fragment_column(j, bit);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float product = products[4 * j + 2 * half + bit], value;
                        if (FAST) {
                            value = fast_exp2(fmaf(product, factor, -shift)) *
                                    (row_factor[half] + factors[column]);
                        } else {
                            float logit = __fmul_rn(scale, product);
                            Lse lse = {factors[TILE_COLUMNS + column], factors[2 * TILE_COLUMNS + column]};
                            value = args.row_weight * softmax_term(logit, row_lse[half]) +
                                    args.column_weight * softmax_term(logit, lse);
                            value = inside[half] && tile.column + column < args.mask.columns ? value : 0.0f;
                        }
                        if (MASKED && column == positive[half]) value = positive_gradient[half];
                        part_sum = fmaf(value, product, part_sum);
                        gradient[half][bit] = value;
                    }
                }
                pairs[0][i] = pack<Element>(gradient[0][0], gradient[0][1]);
                pairs[1][i] = pack<Element>(gradient[1][0], gradient[1][1]);
            }
            args.output.template write<MASKED>(tile, 0, part, upper, pairs[0]);
            args.output.template write<MASKED>(tile, 1, part, lower, pairs[1]);
            sum += part_sum;
        }
        return sum;
    }
};

}  // namespace dalle2_fast::sm90

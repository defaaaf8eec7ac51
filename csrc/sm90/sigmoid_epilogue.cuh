// The epilogue of SigLIP's sigmoid loss: the loss and the gradients of the logits in one pass.
#pragma once

#include <sm90/hardware.h>

#include <cmath>
#include <cstdint>

#include "sm90/fragment.cuh"
#include "sm90/output.cuh"

namespace dalle2_fast::sm90 {

// L = scale P + bias, z = 1 for a positive pair, else -1: the loss is log(1 + exp(-z L)),
// G = -z / (1 + exp(z L)).
template <class Element>
struct SigmoidEpilogue {
    struct Arguments {
        Mask mask;
        const float *scale, *bias;
        Output<Element> output;  // matrix == nullptr: only the loss is wanted
        // Partial sums of the loss, of G P and of G.
        float *losses, *gradient_products, *gradients;
    };
    static __device__ __forceinline__ bool is_needed(const Arguments&) { return true; }

    const Arguments& args;
    float scale, bias;

    __device__ __forceinline__ SigmoidEpilogue(const Arguments& arguments, EpilogueBuffers&)
        : args(arguments) {
        scale = args.scale[0];
        bias = args.bias[0];
    }
    __device__ __forceinline__ void begin(const ConsumerTile&) {}
    __device__ __forceinline__ void finish(const ConsumerTile& tile, float (&products)[FRAGMENT]) {
        float sums[3] = {0, 0, 0};
        if (tile.row < args.mask.rows) {
            if (args.mask.applies_to(tile)) evaluate<true>(tile, products, sums);
            else evaluate<false>(tile, products, sums);
        }
        write_partial(args.losses, tile, sums[0]);
        write_partial(args.gradient_products, tile, sums[1]);
        write_partial(args.gradients, tile, sums[2]);
    }

    // log(1 + e), 0 <= e <= 1: the series below 1/16, where 1 + e would round the small e away.
    static __device__ __forceinline__ float log_one_plus(float e) {
        float series = fmaf(e, -1.0f / 6, 0.2f);
        series = fmaf(e, series, -0.25f);
        series = fmaf(e, series, 1.0f / 3);
        series = fmaf(e, series, -0.5f);
        series = fmaf(e, series, 1.0f) * e;
        return e < 0.0625f ? series : fast_log2(1.0f + e) * 0.693147181f;
    }

    template <bool MASKED>
    __device__ __forceinline__ void evaluate(const ConsumerTile& tile, float (&products)[FRAGMENT],
                                             float (&sums)[3]) {
        const int positive[2] = {MASKED ? args.mask.positive_column(tile, 0) : -1,
                                 MASKED ? args.mask.positive_column(tile, 1) : -1};
        const bool inside[2] = {!MASKED || tile.row + fragment_row(0) < args.mask.rows,
                                !MASKED || tile.row + fragment_row(1) < args.mask.rows};
        Element* const upper = args.output.address(tile, 0);
        Element* const lower = args.output.address(tile, 1);
#pragma unroll
        for (int part = 0; part < 8; ++part) {
            uint32_t pairs[2][4];
            float part_sums[3] = {0, 0, 0};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                int j = part * 4 + i;
                float gradient[2][2];
#pragma unroll
                for (int bit = 0; bit < 2; ++bit) {
                    int column = fragment_column(j, bit);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float product = products[4 * j + 2 * half + bit];
                        bool is_positive = MASKED && column == positive[half];
                        float y = fmaf(scale, product, bias);  // -z L
                        y = is_positive ? -y : y;
                        float e = fast_exp2(-fabsf(y) * LOG2E), reciprocal = fast_reciprocal(1.0f + e);
                        float loss = fmaxf(y, 0.0f) + log_one_plus(e);
                        if (y != y) loss = y;  // fmaxf drops a NaN
                        float value = y >= 0 ? reciprocal : e * reciprocal;
                        value = is_positive ? -value : value;
                        if (MASKED && !(inside[half] && tile.column + column < args.mask.columns))
                            value = loss = 0;
                        part_sums[0] += loss;
                        part_sums[1] = fmaf(value, product, part_sums[1]);
                        part_sums[2] += value;
                        gradient[half][bit] = value;
                    }
                }
                pairs[0][i] = pack<Element>(gradient[0][0], gradient[0][1]);
                pairs[1][i] = pack<Element>(gradient[1][0], gradient[1][1]);
            }
            if (args.output.matrix != nullptr) {
                args.output.template write<MASKED>(tile, 0, part, upper, pairs[0]);
                args.output.template write<MASKED>(tile, 1, part, lower, pairs[1]);
            }
#pragma unroll
            for (int kind = 0; kind < 3; ++kind) sums[kind] += part_sums[kind];
        }
    }
};

}  // namespace dalle2_fast::sm90

// Group norm, FiLM and SiLU on the CPU: the functions that Python calls.
//
//     y = act(xhat g + o), xhat = (x - mean) rstd, g = weight (1 + scale), o = bias (1 + scale) + shift
//
// mean and rstd = 1 / sqrt(variance + eps) are taken over a sample's group: C / G channels and all positions.
// act is SiLU, or nothing. x, y, dy and dx are stored as `dtype` (f32, f16 or bf16); sums and maths are
// float32, sums of more than 1024 values are float64, and a result is rounded once.
//
// The mean is subtracted before squares are summed (as a number near the mean, which is exact), so that a mean
// of 1e3 with a standard deviation of 1 costs no accuracy. How a tensor is cut for threads depends on its
// shape only, and sums have a fixed order: equal calls give equal bits with any number of threads.

#pragma once

#include <cstdint>

#include "contrastive.h"  // DType

namespace dalle2_fast::cpu {

// A tensor [N, C, P] of which the channels (channels_last) or the positions (contiguous) are adjacent. A sample
// has no gaps, so its other stride is C or P.
struct Images {
    int64_t samples, channels, positions;  // each >= 1
    int64_t groups;                        // divides channels
    bool channels_adjacent;
    DType dtype;
};

// A parameter [C] or [N, C] of any floating dtype with adjacent channels; data == nullptr where it is absent.
struct Parameter {
    const void* data;
    DType dtype;
    int64_t sample_stride;  // 0 for [C]
};

struct Affine {
    Parameter weight, bias, scale, shift;
    bool silu;
};

// Strides from sample to sample are in elements. mean and rstd: out, [N, G].
void group_norm_silu(const Images& images, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                     const Affine& affine, double eps, float* mean, float* rstd, int threads);

// dx and, in sums[2, N, C], the sums over the positions of dz and of dz xhat, where dz = dy act'(xhat g + o).
void group_norm_silu_backward(const Images& images, const void* dy, int64_t dy_stride, const void* x,
                              int64_t x_stride, const float* mean, const float* rstd, const Affine& affine,
                              void* dx, int64_t dx_stride, float* sums, int threads);

}  // namespace dalle2_fast::cpu

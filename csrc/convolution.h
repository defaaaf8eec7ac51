// A 3x3 convolution on the CPU by Winograd's minimal filtering F(2x2, 3x3) (Lavin and Gray, 1509.09308): 16
// multiplications per input channel for 2x2 outputs, where the definition has 36.
//
//     y = A^T [sum over channels of (G g G^T) * (B^T d B)] A + bias + residual
//
// d is a 4x4 tile of the padded input, g the 3x3 filter. The transforms B and A only add and subtract; their
// rounding errors are about those of the longer sums that they replace. float32, channels_last, padding 1.

#pragma once

#include <cstdint>

namespace dalle2_fast::cpu {

struct Convolution {
    int64_t samples, height, width;  // of the output
    int64_t in_channels, out_channels;
    bool upsample;  // the input has half the height and width; each of its pixels is read as 2x2 pixels
};

// Floats of the transformed filters.
int64_t convolution_filter_size(int64_t in_channels, int64_t out_channels);

// G g G^T of weight[out_channels, in_channels, 3, 3], for convolution3x3.
void transform_filters(const float* weight, int64_t in_channels, int64_t out_channels, float* filters,
                       int threads);

// x[samples, height, width, in_channels] (or half of height and width), y[samples, height, width, out_channels].
// bias[out_channels] and residual, of y's shape, may be null. y may not overlap x.
void convolution3x3(const Convolution& shape, const float* x, const float* filters, const float* bias,
                    const float* residual, float* y, int threads);

// A number that changes when the floats change, to find out whether transformed filters are still valid.
uint64_t fingerprint(const float* values, int64_t count);

}  // namespace dalle2_fast::cpu

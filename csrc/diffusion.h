// A step of a diffusion sampler, the noising of data, and normal noise on the CPU: the functions that Python
// calls.
//
//     x_next = a x + b x0 + c previous + std noise(seed, step),   x0 = clip(predict(x, guide(output)))
//     x_t = alpha x0 + sigma noise
//
// The noise of element e of a sample is normal number e % 4 of Philox4x32-10(key = seed, counter = (e / 4,
// step)), where elements are counted as in a contiguous tensor [C, P]. Box-Muller in float32 turns words into
// numbers. So the noise does not depend on the batch or the layout.
//
// Each tensor is stored as f32, f16 or bf16. The maths is float32, statistics of samples are float64, and a
// result is rounded once. How tensors are cut for threads depends on their shape only, and sums have a fixed
// order: equal calls give equal bits with any number of threads.

#pragma once

#include <cstdint>

#include "contrastive.h"  // DType

namespace dalle2_fast::cpu {

struct Shape {
    int64_t samples, channels, positions;  // each >= 1

    int64_t elements() const { return samples * channels * positions; }
};

// A tensor [N, C, P] with any strides, in elements. data == nullptr where it is absent.
struct Strided {
    void* data;
    DType dtype;
    int64_t sample_stride, channel_stride, position_stride;
};

struct Seeds {
    const int64_t* values;  // [N]; nullptr: there is no noise
    int64_t step;
};

// noise: out.
void sample_noise(const Shape& shape, const Strided& noise, const Seeds& seeds, int threads);

// alpha and sigma: [N]. Without seeds the noise is read. With seeds it is drawn, rounded to the dtype of
// `noise`, written there and added.
void add_noise(const Shape& shape, const Strided& x0, const float* alpha, const float* sigma,
               const Strided& noise, const Seeds& seeds, const Strided& x_t, int threads);

enum class Prediction : int { epsilon = 0, sample = 1, v_prediction = 2 };

struct StepTensors {
    Strided x, output;
    Strided unconditional;   // absent without guidance
    Strided variance_logit;  // absent without a learned range
    Strided previous;        // absent: x0 of this step
    Strided next, x0;        // out
};

struct StepOptions {
    const float* row;  // alpha, sigma, a, b, c, std, log_var_min, log_var_max
    Prediction prediction;
    const float* guidance;    // [N], or one number with stride 0; nullptr: guidance_number
    int64_t guidance_stride;  // from sample to sample
    double guidance_number;
    double guidance_rescale;  // 0: none
    double bound;             // of |x0|; infinity: none
    double quantile;          // of the dynamic threshold; 0: none
};

void diffusion_step(const Shape& shape, const StepTensors& tensors, const Seeds& seeds,
                    const StepOptions& options, int threads);

}  // namespace dalle2_fast::cpu

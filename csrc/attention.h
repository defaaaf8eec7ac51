// Attention on the CPU to the keys of a context and of the image in one softmax, without a gradient.
//
//     out = softmax(scale q [context_k; image_k]^T) [context_v; image_v]
//
// Values are stored as `dtype` (f32, f16 or bf16); products, sums and the softmax are float32.

#pragma once

#include <cstdint>

#include "contrastive.h"  // DType

namespace dalle2_fast::cpu {

// A tensor [B, H, rows, D] whose last dimension has no gaps; strides in elements.
struct Heads {
    const void* data;
    int64_t sample_stride, head_stride, row_stride;

    template <class S>
    const S* at(int64_t sample, int64_t head) const {
        return static_cast<const S*>(data) + sample * sample_stride + head * head_stride;
    }
};

struct Keys {
    Heads k, v;
    int64_t count;
    const bool* mask;  // [B, count], true = attend; nullptr: all keys
    int64_t mask_stride;
};

struct Attention {
    int64_t samples, heads, queries, width;
    DType dtype;
    float scale;
};

// out[B, queries, H, D]. A query without any key gives 0. What the mask leaves out is not read.
void attention(const Attention& shape, const Heads& q, const Keys& context, const Keys& image, void* out,
               int threads);

}  // namespace dalle2_fast::cpu

// The 3x3 convolution of convolution.h. A thread takes TILES tiles at a time, so that their transforms and the
// products stay in its L2 cache: with 112 channels 0.5 MB each, beside 0.8 MB of filters.

#include "convolution.h"

#include <cstring>
#include <vector>

#include "cpu/simd/panels.h"
#include "cpu/parallel.h"
#include "cpu/simd/processor.h"

namespace dalle2_fast::cpu {
namespace {

constexpr int64_t TILES = 64;  // a multiple of 8

// From element k to element k + 1 of the transformed tiles. One cache line more than their size: at a distance
// of a multiple of 4096 bytes all 16 elements would compete for the same lines of the L1 cache.
int64_t plane(int64_t channels) { return TILES * channels + PADDING; }

#define BODY "cpu/convolution_loops.h"
#include "cpu/simd/instruction_sets.h"

// G g G^T, G = [[1, 0, 0], [1/2, 1/2, 1/2], [1/2, -1/2, 1/2], [0, 0, 1]]
void transform_filter(const float* g, double* out) {
    double t[4][3];
    for (int j = 0; j < 3; ++j) {
        const double a = g[j], b = g[3 + j], c = g[6 + j];
        t[0][j] = a;
        t[1][j] = 0.5 * (a + b + c);
        t[2][j] = 0.5 * (a - b + c);
        t[3][j] = c;
    }
    for (int i = 0; i < 4; ++i) {
        const double a = t[i][0], b = t[i][1], c = t[i][2];
        out[4 * i + 0] = a;
        out[4 * i + 1] = 0.5 * (a + b + c);
        out[4 * i + 2] = 0.5 * (a - b + c);
        out[4 * i + 3] = c;
    }
}

}  // namespace

int64_t convolution_filter_size(int64_t in_channels, int64_t out_channels) {
    return 16 * in_channels * padded(out_channels);
}

void transform_filters(const float* weight, int64_t in_channels, int64_t out_channels, float* filters,
                       int threads) {
    const int64_t columns = padded(out_channels);
    parallel_for(in_channels, 16 * in_channels * columns, threads, [&](int64_t c) {
        for (int64_t panel = 0; panel < columns; panel += panel_width(columns - panel)) {
            const int64_t width = panel_width(columns - panel);
            float* to = filters + panel * in_channels + c * width;
            for (int64_t j = 0; j < width; ++j) {
                double transformed[16] = {};
                if (panel + j < out_channels)
                    transform_filter(weight + ((panel + j) * in_channels + c) * 9, transformed);
                for (int k = 0; k < 16; ++k) to[k * columns * in_channels + j] = float(transformed[k]);
            }
        }
    });
}

void convolution3x3(const Convolution& shape, const float* x, const float* filters, const float* bias,
                    const float* residual, float* y, int threads) {
    const int64_t tiles = shape.samples * ((shape.height + 1) / 2) * ((shape.width + 1) / 2);
    const int64_t blocks = (tiles + TILES - 1) / TILES;
    const int64_t depth = padded(shape.in_channels), columns = padded(shape.out_channels);
    std::vector<float> offsets(columns, 0.0f), zeros(depth, 0.0f);
    if (bias) std::copy(bias, bias + shape.out_channels, offsets.begin());

    const int64_t parts = std::min<int64_t>(blocks, threads);
    const int64_t operations = tiles * depth * columns;
    parallel_for(parts, operations, threads, [&](int64_t part) {
        static thread_local Floats memory;
        float* transformed = memory.at_least(16 * (plane(depth) + plane(columns)));
        float* products = transformed + 16 * plane(depth);
        const int64_t end = (part + 1) * blocks / parts;
        for (int64_t block = part * blocks / parts; block < end; ++block) {
            const int64_t first = block * TILES, count = std::min(TILES, tiles - first);
            DISPATCH(convolve_tiles, shape, first, count, x, filters, offsets.data(), residual, y,
                     transformed, products, zeros.data());
        }
    });
}

uint64_t fingerprint(const float* values, int64_t count) {
    // 16 independent sums, so that the compiler may use vectors. A factor that is odd loses no bits.
    uint32_t sums[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        uint32_t bits[16];
        std::memcpy(bits, values + i, sizeof bits);
        for (int lane = 0; lane < 16; ++lane) sums[lane] = sums[lane] * 0x9e3779b1u + bits[lane];
    }
    uint64_t total = uint64_t(count);
    for (; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i, sizeof bits);
        total = total * 0x9e3779b97f4a7c15u + bits;
    }
    for (const uint32_t sum : sums) total = total * 0x9e3779b97f4a7c15u + sum;
    return total;
}

}  // namespace dalle2_fast::cpu

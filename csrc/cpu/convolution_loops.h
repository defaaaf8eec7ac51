// The inner loops of cpu/convolution.cpp, which includes this file once per instruction set. Channels lie in
// vectors: arrays of channels are padded to whole vectors of PADDING values.

// The compiler may round a product and a sum once (FMA).
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "cpu/simd/vector.h"
#include "cpu/simd/multiply.h"

// out = B^T d B, for each channel. in[16]: pointers to the channels of the pixels of d, row by row. Element k of
// the transformed tile goes to out + k * stride.
INLINE void transform_tile(const float* const* in, int64_t channels, float* out, int64_t stride) {
    for_each_vector<float>(channels, [&](int64_t c, int64_t lanes) INLINE_LAMBDA {
        Vector<float> d[4][4], t[4][4];
        for (int i = 0; i < 16; ++i) {
            if (lanes == WIDTH<float>) {
                d[i / 4][i % 4] = load(in[i] + c);
            } else {
                Vector<float> value = fill(0.0f);
                for (int64_t lane = 0; lane < lanes; ++lane) value[lane] = in[i][c + lane];
                d[i / 4][i % 4] = value;
            }
        }
        for (int j = 0; j < 4; ++j) {
            t[0][j] = d[0][j] - d[2][j];
            t[1][j] = d[1][j] + d[2][j];
            t[2][j] = d[2][j] - d[1][j];
            t[3][j] = d[1][j] - d[3][j];
        }
        for (int i = 0; i < 4; ++i) {
            store(out + (4 * i + 0) * stride + c, t[i][0] - t[i][2]);
            store(out + (4 * i + 1) * stride + c, t[i][1] + t[i][2]);
            store(out + (4 * i + 2) * stride + c, t[i][2] - t[i][1]);
            store(out + (4 * i + 3) * stride + c, t[i][1] - t[i][3]);
        }
    });
}

// A^T m A + bias + residual for each channel. Element k of m is at in + k * stride. out[4] and residual[4]: the
// pixels of the 2x2 outputs; out is null for a pixel beyond the border.
INLINE void finish_tile(const float* in, int64_t stride, int64_t channels, const float* bias,
                        const float* const* residual, float* const* out) {
    for_each_vector<float>(channels, [&](int64_t c, int64_t lanes) INLINE_LAMBDA {
        Vector<float> t[2][4];
        for (int j = 0; j < 4; ++j) {
            const Vector<float> m0 = load(in + j * stride + c), m1 = load(in + (4 + j) * stride + c);
            const Vector<float> m2 = load(in + (8 + j) * stride + c), m3 = load(in + (12 + j) * stride + c);
            t[0][j] = m0 + m1 + m2;
            t[1][j] = m1 - m2 - m3;
        }
        const Vector<float> offset = load(bias + c);
        for (int i = 0; i < 4; ++i) {
            if (!out[i]) continue;
            const Vector<float>* row = t[i / 2];
            Vector<float> y = i % 2 ? row[1] - row[2] - row[3] : row[0] + row[1] + row[2];
            y += offset;
            if (lanes == WIDTH<float>) {
                store(out[i] + c, residual[i] ? y + load(residual[i] + c) : y);
            } else {
                for (int64_t lane = 0; lane < lanes; ++lane)
                    out[i][c + lane] = y[lane] + (residual[i] ? residual[i][c + lane] : 0.0f);
            }
        }
    });
}

// The tiles first .. first + count of all tiles of the images, row by row. transformed[16, TILES, in] and
// products[16, TILES, out], planes `plane` apart, are the thread's memory; zeros[in] are the pixels of the padding.
void convolve_tiles(const Convolution& shape, int64_t first, int64_t count, const float* x,
                    const float* filters, const float* bias, const float* residual, float* y,
                    float* transformed, float* products, const float* zeros) {
    const int64_t depth = padded(shape.in_channels), columns = padded(shape.out_channels);
    const int64_t tile_rows = (shape.height + 1) / 2, tile_columns = (shape.width + 1) / 2;
    const int64_t halved = shape.upsample ? 1 : 0;
    const int64_t x_height = shape.height >> halved, x_width = shape.width >> halved;
    const int64_t rows = (count + 7) / 8 * 8;  // rows past `count` hold old numbers, and nothing reads them
    for (int64_t tile = 0; tile < count; ++tile) {
        const int64_t index = first + tile, sample = index / (tile_rows * tile_columns);
        const int64_t top = index / tile_columns % tile_rows * 2 - 1, left = index % tile_columns * 2 - 1;
        const float* pixels[16];
        for (int i = 0; i < 16; ++i) {
            const int64_t row = top + i / 4, column = left + i % 4;
            const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
            const int64_t at = (sample * x_height + (row >> halved)) * x_width + (column >> halved);
            pixels[i] = inside ? x + at * shape.in_channels : zeros;
        }
        transform_tile(pixels, shape.in_channels, transformed + tile * depth, plane(depth));
    }
    for (int64_t k = 0; k < 16; ++k)
        for (int64_t j = 0; j < columns; j += panel_width(columns - j))
            multiply_panel(transformed + k * plane(depth), depth, filters + (k * columns + j) * shape.in_channels,
                           shape.in_channels, rows, panel_width(columns - j), products + k * plane(columns) + j,
                           columns);
    for (int64_t tile = 0; tile < count; ++tile) {
        const int64_t index = first + tile, sample = index / (tile_rows * tile_columns);
        const int64_t top = index / tile_columns % tile_rows * 2, left = index % tile_columns * 2;
        float* out[4];
        const float* added[4];
        for (int i = 0; i < 4; ++i) {
            const int64_t row = top + i / 2, column = left + i % 2;
            const bool inside = row < shape.height && column < shape.width;
            const int64_t at = ((sample * shape.height + row) * shape.width + column) * shape.out_channels;
            out[i] = inside ? y + at : nullptr;
            added[i] = inside && residual ? residual + at : nullptr;
        }
        finish_tile(products + tile * columns, plane(columns), shape.out_channels, bias, added, out);
    }
}

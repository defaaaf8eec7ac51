// The inner loops of cpu/attention.cpp, which includes this file once per instruction set.

// The compiler may round a product and a sum once (FMA).
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "cpu/simd/vector.h"
#include "cpu/simd/multiply.h"
#include "cpu/simd/vector_storage.h"

// count values as float32, times factor; zeros up to the next whole vector of PADDING values.
template <class S>
INLINE void load_row(const S* from, int64_t count, float factor, float* to) {
    for (int64_t j = 0; j < padded(count); j += FLOATS) {
        const int64_t left = count - j;
        if (left >= FLOATS)
            store(to + j, load_float(from + j) * factor);
        else
            store(to + j, load_float(from + j, left > 0 ? left : 0) * factor);
    }
}

// Replaces the first `keys` scores of each row by exp(score - the row's maximum); inverse[rows] = 1 / their sum.
INLINE void exponentials(float* scores, int64_t rows, int64_t stride, int64_t keys, float* inverse) {
    for (int64_t row = 0; row < rows; ++row, scores += stride) {
        Vector<float> largest = fill(-INFINITY);
        for (int64_t j = 0; j + FLOATS <= keys; j += FLOATS) largest = larger<float>(largest, load(scores + j));
        float maximum = largest[0];
        for (int lane = 1; lane < FLOATS; ++lane) maximum = largest[lane] > maximum ? largest[lane] : maximum;
        for (int64_t j = keys / FLOATS * FLOATS; j < keys; ++j)
            maximum = scores[j] > maximum ? scores[j] : maximum;
        Vector<float> total = fill(0.0f);
        for (int64_t j = 0; j < keys; j += FLOATS) {
            Vector<float> value = exponential_below_zero(load(scores + j) - maximum);
            if (j + FLOATS > keys) value = first_lanes<float>(keys - j) ? value : fill(0.0f);
            store(scores + j, value);
            total += value;
        }
        inverse[row] = float(1 / sum<float>(total));
    }
}

// The keys that the mask leaves, behind the `packed` ones that are there: k[width, columns] in panels of columns
// and v[columns, width] in panels of the width. Returns their number.
template <class S>
int64_t pack_keys(const Keys& keys, int64_t sample, int64_t head, int64_t width, int64_t packed,
                  int64_t columns, float* k, float* v, float* row) {
    if (keys.count == 0) return packed;
    const S* from_k = keys.k.at<S>(sample, head);
    const S* from_v = keys.v.at<S>(sample, head);
    for (int64_t key = 0; key < keys.count; ++key) {
        if (keys.mask && !keys.mask[sample * keys.mask_stride + key]) continue;
        load_row(from_k + key * keys.k.row_stride, width, 1.0f, row);
        int64_t panel = 0;
        while (panel + panel_width(columns - panel) <= packed) panel += panel_width(columns - panel);
        float* column = k + panel * width + packed - panel;
        const int64_t stride = panel_width(columns - panel);
        for (int64_t d = 0; d < width; ++d) column[d * stride] = row[d];
        load_row(from_v + key * keys.v.row_stride, width, 1.0f, row);
        const int64_t row_width = padded(width);
        for (int64_t j = 0; j < row_width; j += panel_width(row_width - j))
            __builtin_memcpy(v + j * columns + packed * panel_width(row_width - j), row + j,
                             panel_width(row_width - j) * sizeof(float));
        ++packed;
    }
    return packed;
}

// Queries first .. first + count (count <= QUERIES) of one head. columns: padded(keys).
template <class S>
void attend(const Attention& shape, const S* q, int64_t row_stride, int64_t count, const float* k,
            const float* v, int64_t keys, int64_t columns, float* queries, float* scores, float* results,
            S* out) {
    const int64_t width = padded(shape.width), rows = (count + 7) / 8 * 8;
    for (int64_t row = 0; row < count; ++row)
        load_row(q + row * row_stride, shape.width, shape.scale, queries + row * width);
    const int64_t used = padded(keys);  // the panels are those of `columns`
    for (int64_t j = 0; j < used; j += panel_width(columns - j))
        multiply_panel(queries, width, k + j * shape.width, shape.width, rows, panel_width(columns - j),
                       scores + j, columns);
    float inverse[QUERIES];
    exponentials(scores, count, columns, keys, inverse);
    for (int64_t j = 0; j < width; j += panel_width(width - j))
        multiply_panel(scores, columns, v + j * columns, keys, rows, panel_width(width - j), results + j,
                       width);
    for (int64_t row = 0; row < count; ++row) {
        S* to = out + row * shape.heads * shape.width;
        for_each_vector<float>(shape.width, [&](int64_t d, int64_t lanes) INLINE_LAMBDA {
            const Vector<float> value = load(results + row * width + d) * inverse[row];
            lanes < FLOATS ? store_float(to + d, value, lanes) : store_float(to + d, value);
        });
    }
}

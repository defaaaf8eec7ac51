// The inner loops of cpu/group_norm_silu.cpp, which includes this file once per instruction set.
//
// Two forms: a *run* is adjacent values with the same coefficients (positions of one channel). A *block* is
// rows of adjacent columns, with coefficients per column (channels_last: rows are positions, columns channels).
// Arrays of coefficients and of sums per column are padded to whole vectors.
//
// `ahead` is the distance in values to what the thread reads next. It is fetched into the L2 cache while this
// loop computes; without it a thread would first wait for memory and then for the arithmetic.

// The compiler may round a product and a sum once (FMA).
#if defined(__clang__)
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif

#include "cpu/simd/vector.h"
#include "cpu/simd/vector_storage.h"

template <class S>
void to_floats(const S* from, int64_t count, float* to) {
    for_each_vector<float>(count, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        lanes < FLOATS ? store_float(to + j, load_float(from + j, lanes), lanes)
                       : store_float(to + j, load_float(from + j));
    });
}

// ---------------------------------------------------------------------------------------------- both forms
// A loop over runs or blocks reads up to two inputs and either adds two values to sums or writes an output. Its
// body is a function of the values and of the coefficients at column j.

constexpr int64_t BLOCK_ROWS = 64;      // rows that are summed in float32 before their sum is added in float64
constexpr int64_t BLOCK_COLUMNS = 512;  // sums of that many columns stay in the L1 cache
constexpr int64_t RUN_VECTORS = 64;     // vectors of a run that are summed in float32

struct Two {
    Vector<float> first, second;
};

template <class S>
INLINE Vector<float> load_lanes(const S* from, int64_t lanes) {
    return lanes < FLOATS ? load_float(from, lanes) : load_float(from);
}

template <class S>
INLINE Vector<float> load_lanes(const S* from, int64_t lanes, int64_t ahead) {
    __builtin_prefetch(from + ahead, 0, 2);
    return load_lanes(from, lanes);
}

template <class S>
INLINE void store_lanes(S* to, Vector<float> value, int64_t lanes) {
    lanes < FLOATS ? store_float(to, value, lanes) : store_float(to, value);
}

// sums[0 .. columns) += the first value of `term`, sums[stride ..) += the second; term(row, j, lanes) -> Two is
// 0 in the lanes beyond the last column.
template <class Term>
INLINE void sum_block(int64_t rows, int64_t columns, double* sums, int64_t stride, Term term) {
    alignas(64) float first[BLOCK_COLUMNS], second[BLOCK_COLUMNS];
    for (int64_t column = 0; column < columns; column += BLOCK_COLUMNS) {
        const int64_t count = columns - column < BLOCK_COLUMNS ? columns - column : BLOCK_COLUMNS;
        const int64_t padded = (count + FLOATS - 1) / FLOATS * FLOATS;
        for (int64_t begin = 0; begin < rows; begin += BLOCK_ROWS) {
            const int64_t end = rows - begin < BLOCK_ROWS ? rows : begin + BLOCK_ROWS;
            __builtin_memset(first, 0, padded * sizeof(float));
            __builtin_memset(second, 0, padded * sizeof(float));
            int64_t row = begin;
            for (; row + 4 <= end; row += 4) {  // four rows, so that the sums are loaded and stored less often
                for_each_vector<float>(count, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
                    const Two a = term(row, column + j, lanes), b = term(row + 1, column + j, lanes);
                    const Two c = term(row + 2, column + j, lanes), d = term(row + 3, column + j, lanes);
                    store(first + j, load(first + j) + ((a.first + b.first) + (c.first + d.first)));
                    store(second + j, load(second + j) + ((a.second + b.second) + (c.second + d.second)));
                });
            }
            for (; row < end; ++row) {
                for_each_vector<float>(count, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
                    const Two a = term(row, column + j, lanes);
                    store(first + j, load(first + j) + a.first);
                    store(second + j, load(second + j) + a.second);
                });
            }
            for (int64_t j = 0; j < count; ++j) sums[column + j] += first[j];
            for (int64_t j = 0; j < count; ++j) sums[stride + column + j] += second[j];
        }
    }
}

// sums[0] += the sum of the first value of `term`, sums[1] += that of the second.
template <class Term>
INLINE void sum_run(int64_t count, double* sums, Term term) {
    for (int64_t begin = 0; begin < count; begin += RUN_VECTORS * FLOATS) {
        const int64_t end = count - begin < RUN_VECTORS * FLOATS ? count : begin + RUN_VECTORS * FLOATS;
        Vector<float> first[2] = {}, second[2] = {};  // two chains of additions
        int64_t i = begin;
        for (; i + 2 * FLOATS <= end; i += 2 * FLOATS) {
            const Two a = term(i, FLOATS), b = term(i + FLOATS, FLOATS);
            first[0] += a.first;
            second[0] += a.second;
            first[1] += b.first;
            second[1] += b.second;
        }
        for (; i < end; i += FLOATS) {
            const Two a = term(i, end - i < FLOATS ? end - i : FLOATS);
            first[0] += a.first;
            second[0] += a.second;
        }
        sums[0] += sum<float>(first[0] + first[1]);
        sums[1] += sum<float>(second[0] + second[1]);
    }
}

INLINE Vector<float> where_inside(Vector<float> value, int64_t lanes) {
    return lanes < FLOATS ? (first_lanes<float>(lanes) ? value : fill(0.0f)) : value;
}

// --------------------------------------------------------------------------------------------------- forward

// Sums of x - center and of its squares.
template <class S>
void block_moments(const S* x, int64_t rows, int64_t columns, const float* center, double* sums,
                   int64_t stride) {
    sum_block(rows, columns, sums, stride, [&](int64_t row, int64_t j, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = where_inside(load_lanes(x + row * columns + j, lanes) - load(center + j), lanes);
        return Two{d, d * d};
    });
}

template <class S>
void run_moments(const S* x, int64_t count, float center, double* sums) {
    sum_run(count, sums, [&](int64_t i, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = where_inside(load_lanes(x + i, lanes) - center, lanes);
        return Two{d, d * d};
    });
}

template <bool SILU, class S>
INLINE Vector<float> activate(Vector<float> z) {
    return SILU ? z * sigmoid<S>(z) : z;
}

// y = act((x - center) gain + offset)
template <bool SILU, class S>
void apply_block(const S* x, S* y, int64_t rows, int64_t columns, const float* center, const float* gain,
                 const float* offset, int64_t ahead) {
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
        for_each_vector<float>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<float> d = load_lanes(x + j, lanes, ahead) - load(center + j);
            store_lanes(y + j, activate<SILU, S>(d * load(gain + j) + load(offset + j)), lanes);
        });
    }
}

template <bool SILU, class S>
void apply_run(const S* x, S* y, int64_t count, float center, float gain, float offset, int64_t ahead) {
    for_each_vector<float>(count, [&](int64_t i, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = load_lanes(x + i, lanes, ahead) - center;
        store_lanes(y + i, activate<SILU, S>(d * gain + offset), lanes);
    });
}

// -------------------------------------------------------------------------------------------------- backward

// dy act'(z), act'(z) = s (1 + z (1 - s)), s = sigmoid<S>(z)
template <bool SILU, class S>
INLINE Vector<float> activation_gradient(Vector<float> dy, Vector<float> z) {
    if (!SILU) return dy;
    const Vector<float> s = sigmoid<S>(z);
    return dy * (s * (1.0f + z * (1.0f - s)));
}

// Sums of dz and of dz (x - mean).
template <bool SILU, class S>
void block_gradient_sums(const S* x, const S* dy, int64_t rows, int64_t columns, const float* mean,
                         const float* gain, const float* offset, double* sums, int64_t stride) {
    sum_block(rows, columns, sums, stride, [&](int64_t row, int64_t j, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = load_lanes(x + row * columns + j, lanes) - load(mean + j);
        const Vector<float> z = d * load(gain + j) + load(offset + j);
        Vector<float> dz = activation_gradient<SILU, S>(load_lanes(dy + row * columns + j, lanes), z);
        dz = where_inside(dz, lanes);
        return Two{dz, where_inside(dz * d, lanes)};
    });
}

template <bool SILU, class S>
void run_gradient_sums(const S* x, const S* dy, int64_t count, float mean, float gain, float offset,
                       double* sums) {
    sum_run(count, sums, [&](int64_t i, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = load_lanes(x + i, lanes) - mean;
        const Vector<float> dz = activation_gradient<SILU, S>(load_lanes(dy + i, lanes), d * gain + offset);
        return Two{where_inside(dz, lanes), where_inside(dz * d, lanes)};
    });
}

// dx = gain dz + slope (x - mean) + constant
template <bool SILU, class S>
void block_input_gradient(const S* x, const S* dy, S* dx, int64_t rows, int64_t columns, const float* mean,
                          const float* gain, const float* offset, const float* slope, const float* constant,
                          int64_t ahead, int64_t dy_ahead) {
    for (int64_t row = 0; row < rows; ++row, x += columns, dy += columns, dx += columns) {
        for_each_vector<float>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<float> d = load_lanes(x + j, lanes, ahead) - load(mean + j);
            const Vector<float> z = d * load(gain + j) + load(offset + j);
            const Vector<float> dz = activation_gradient<SILU, S>(load_lanes(dy + j, lanes, dy_ahead), z);
            store_lanes(dx + j, load(gain + j) * dz + (load(slope + j) * d + load(constant + j)), lanes);
        });
    }
}

template <bool SILU, class S>
void run_input_gradient(const S* x, const S* dy, S* dx, int64_t count, float mean, float gain, float offset,
                        float slope, float constant, int64_t ahead, int64_t dy_ahead) {
    for_each_vector<float>(count, [&](int64_t i, int64_t lanes) INLINE_LAMBDA {
        const Vector<float> d = load_lanes(x + i, lanes, ahead) - mean;
        const Vector<float> dy_now = load_lanes(dy + i, lanes, dy_ahead);
        const Vector<float> dz = activation_gradient<SILU, S>(dy_now, d * gain + offset);
        store_lanes(dx + i, gain * dz + (slope * d + constant), lanes);
    });
}

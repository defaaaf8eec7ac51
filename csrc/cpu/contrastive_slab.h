// The inner loops of cpu/contrastive.cpp, which includes this file once per instruction set: the compiler's
// target, the enclosing namespace and VECTOR_BYTES differ.
//
// A slab is SLAB columns of a tile, and one thread processes it row by row. Sums down its columns are
// therefore complete; sums along the rows are kept per slab, and the caller adds them in the order of the
// slabs.

// Both passes over a tile must see the same logits, each rounded once: no product is fused with a sum (FMA).
#if defined(__clang__)
#pragma clang fp contract(off)
#else
#pragma GCC optimize("fp-contract=off")
#endif

#include "cpu/simd/vector.h"

// ---------------------------------------------------------------------------------------------- log-sum-exp

constexpr int64_t FLUSH = 32;  // rows of a column that are summed in T before their sum is added in double

// row_sums[rows] and column_sums[columns] of exp(L) 2^-shift.
template <class T>
void sum_slab(const Slab<T>& slab, int shift, double* row_sums, double* column_sums) {
    alignas(32) T terms[SLAB];
    for (int64_t j = 0; j < slab.columns; ++j) column_sums[j] = 0;
    for (int64_t begin = 0; begin < slab.rows; begin += FLUSH) {
        const int64_t end = begin + FLUSH < slab.rows ? begin + FLUSH : slab.rows;
        for (int64_t j = 0; j < SLAB; ++j) terms[j] = 0;
        for (int64_t i = begin; i < end; ++i) {
            const T* row = slab.products + i * slab.stride;
            Vector<T> total = fill(T(0));
            for_each_vector<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
                const Vector<T> logits = load(row + j) * slab.scale;
                Vector<T> term = exponential<T>(logits, shift);
                if (lanes < WIDTH<T>) term = first_lanes<T>(lanes) ? term : fill(T(0));
                total += term;
                store(terms + j, load(terms + j) + term);
            });
            row_sums[i] = sum<T>(total);
        }
        for (int64_t j = 0; j < slab.columns; ++j) column_sums[j] += terms[j];
    }
}

// The lse of one row of L about its maximum. NaN if the row has a NaN, infinite if it has an infinity.
template <class T>
double row_lse_about_maximum(const T* row, int64_t columns, T scale) {
    Vector<T> maxima = fill(-T(INFINITY));
    for_each_vector<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        Vector<T> logits = load(row + j) * scale;
        if (lanes < WIDTH<T>) logits = first_lanes<T>(lanes) ? logits : fill(-T(INFINITY));
        maxima = larger<T>(maxima, logits);
    });
    T maximum = maxima[0];
    for (int lane = 1; lane < WIDTH<T>; ++lane) maximum = maxima[lane] > maximum ? maxima[lane] : maximum;
    maximum = maximum - maximum == 0 ? maximum : 0;
    double total = 0;
    for_each_vector<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        Vector<T> term = exponential<T>(load(row + j) * scale - maximum);
        if (lanes < WIDTH<T>) term = first_lanes<T>(lanes) ? term : fill(T(0));
        total += sum<T>(term);
    });
    return maximum + __builtin_log(total);
}

// The same for `columns` columns of a tile: lse[columns].
template <class T>
void column_lse_about_maximum(const T* products, int64_t stride, int64_t rows, int64_t columns, T scale,
                              double* lse) {
    for_each_vector<T>(columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
        const T* first = products + j;
        Vector<T> maximum = fill(-T(INFINITY));
        for (int64_t i = 0; i < rows; ++i) maximum = larger<T>(maximum, load(first + i * stride) * scale);
        maximum = finite_or_zero<T>(maximum);
        double totals[WIDTH<T>] = {};
        for (int64_t i = 0; i < rows; ++i) {
            const Vector<T> term = exponential<T>(load(first + i * stride) * scale - maximum);
            for (int lane = 0; lane < WIDTH<T>; ++lane) totals[lane] += term[lane];
        }
        for (int64_t lane = 0; lane < lanes; ++lane)
            lse[j + lane] = maximum[lane] + __builtin_log(totals[lane]);
    });
}

// ------------------------------------------------------------------------------------------------- gradients

// A float64 lse is used as the sum of two T, high + low: L - high is exact near the maximum. low is 0 for an
// infinite lse.
template <class T>
INLINE T low_part(double lse) {
    const T high = T(lse);
    return high - high == 0 ? T(lse - high) : T(0);
}

template <class T>
struct SplitLse {  // of the columns of a slab
    alignas(32) T high[SLAB], low[SLAB];

    INLINE void set(const double* lse, int64_t count) {
        for (int64_t j = 0; j < SLAB; ++j) {
            const double value = j < count ? lse[j] : 0;
            high[j] = T(value);
            low[j] = low_part<T>(value);
        }
    }
};

// exp(logits - lse)
template <class T>
INLINE Vector<T> softmax_term(Vector<T> logits, T high, T low) {
    return exponential<T>((logits - high) - low);
}

template <class T>
INLINE Vector<T> softmax_term(Vector<T> logits, const SplitLse<T>& lse, int64_t j) {
    return exponential<T>((logits - load(lse.high + j)) - load(lse.low + j));
}

// The mask of the positive's lane, in the vector that begins at column j.
template <class T>
INLINE Integer<T> positive_lane(int64_t positive, int64_t j) {
    return first_lanes<T>(positive - j + 1) & ~first_lanes<T>(positive - j);
}

template <class T>
double gradient_slab(const Slab<T>& slab, const double* row_lse, const double* column_lse, T row_weight,
                     T column_weight) {
    SplitLse<T> columns;
    columns.set(column_lse, slab.columns);
    const T positive_weight = row_weight + column_weight;
    double total = 0;
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const T high = T(row_lse[i]), low = low_part<T>(row_lse[i]);
        const int64_t positive = slab.diagonal_offset + i;
        Vector<T> row_sum = fill(T(0));
        for_each_vector<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale;
            Vector<T> gradient = row_weight * softmax_term<T>(logits, high, low) +
                                 column_weight * softmax_term<T>(logits, columns, j);
            if (positive >= j && positive < j + WIDTH<T>)
                gradient -= positive_lane<T>(positive, j) ? fill(positive_weight) : fill(T(0));
            Vector<T> gradient_product = gradient * product;
            if (lanes < WIDTH<T>) {
                gradient_product = first_lanes<T>(lanes) ? gradient_product : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                store(row + j, gradient);
            }
            row_sum += gradient_product;
        });
        total += sum<T>(row_sum);
    }
    return total;
}

// Adds to sums[0..2].
template <bool GRADIENT, class T>
void sigmoid_slab(const Slab<T>& slab, T bias, double* sums) {
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const int64_t positive = slab.diagonal_offset + i;
        Vector<T> losses = fill(T(0)), gradient_products = fill(T(0)), gradients = fill(T(0));
        for_each_vector<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale + bias;
            // y = -z L: the loss is log(1 + exp y), its derivative with respect to L is -z / (1 + exp(-y)).
            Vector<T> y = logits;
            const bool has_positive = positive >= j && positive < j + WIDTH<T>;
            if (has_positive) y = positive_lane<T>(positive, j) ? -y : y;
            const Vector<T> u = exponential<T>(y > 0 ? -y : y);  // exp(-|y|)
            Vector<T> loss = (y > 0 ? y : y * 0) + log_one_plus<T>(u);
            Vector<T> gradient = (y > 0 ? fill(T(1)) : u) / (u + 1);
            if (has_positive) gradient = positive_lane<T>(positive, j) ? -gradient : gradient;
            if (lanes < WIDTH<T>) {
                loss = first_lanes<T>(lanes) ? loss : fill(T(0));
                gradient = first_lanes<T>(lanes) ? gradient : fill(T(0));
            }
            losses += loss;
            if (!GRADIENT) return;
            gradients += gradient;
            if (lanes < WIDTH<T>) {
                gradient_products += first_lanes<T>(lanes) ? gradient * product : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                gradient_products += gradient * product;
                store(row + j, gradient);
            }
        });
        sums[0] += sum<T>(losses);
        sums[1] += sum<T>(gradient_products);
        sums[2] += sum<T>(gradients);
    }
}

// Adds to sums[0..1]. `similarity` is laid out as slab.products.
template <bool GRADIENT, class T>
void soft_slab(const Slab<T>& slab, const T* similarity, const double* row_lse, const double* column_lse,
               const double* similarity_row_lse, const double* similarity_column_lse, double* sums) {
    SplitLse<T> columns, similarity_columns;
    columns.set(column_lse, slab.columns);
    similarity_columns.set(similarity_column_lse, slab.columns);
    for (int64_t i = 0; i < slab.rows; ++i) {
        T* row = slab.products + i * slab.stride;
        const T* similarity_row = similarity + i * slab.stride;
        const T high = T(row_lse[i]), low = low_part<T>(row_lse[i]);
        const T similarity_high = T(similarity_row_lse[i]);
        const T similarity_low = low_part<T>(similarity_row_lse[i]);
        Vector<T> losses = fill(T(0)), gradient_products = fill(T(0));
        for_each_vector<T>(slab.columns, [&](int64_t j, int64_t lanes) INLINE_LAMBDA {
            const Vector<T> product = load(row + j);
            const Vector<T> logits = product * slab.scale;
            const Vector<T> target_logits = load(similarity_row + j) * (slab.scale / 2);
            const Vector<T> row_log_p = (logits - high) - low;
            const Vector<T> column_log_p = (logits - load(columns.high + j)) - load(columns.low + j);
            const Vector<T> p = softmax_term<T>(target_logits, similarity_high, similarity_low);
            const Vector<T> q = softmax_term<T>(target_logits, similarity_columns, j);
            Vector<T> loss = -(p * row_log_p + q * column_log_p);
            if (lanes < WIDTH<T>) loss = first_lanes<T>(lanes) ? loss : fill(T(0));
            losses += loss;
            if (!GRADIENT) return;
            const Vector<T> gradient = (exponential<T>(row_log_p) - p) + (exponential<T>(column_log_p) - q);
            Vector<T> gradient_product = gradient * product;
            if (lanes < WIDTH<T>) {
                gradient_product = first_lanes<T>(lanes) ? gradient_product : fill(T(0));
                store(row + j, gradient, lanes);
            } else {
                store(row + j, gradient);
            }
            gradient_products += gradient_product;
        });
        sums[0] += sum<T>(losses);
        sums[1] += sum<T>(gradient_products);
    }
}

#undef INLINE_LAMBDA
#undef INLINE
#undef VECTOR_BYTES

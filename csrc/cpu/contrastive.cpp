// The epilogues of contrastive.h on the CPU: a thread processes slabs of columns, with vector instructions
// inside (contrastive_slab.h).

#include "contrastive.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/processor.h"

namespace dalle2_fast::cpu {
namespace {

// Columns of a slab: its part of a row is 2 KB, and the sums of its columns stay in the L1 cache.
constexpr int64_t SLAB = 512;

template <class T>
struct Slab {
    T* products;  // of the tile's row 0 and the slab's column 0
    int64_t stride, rows, columns;
    int64_t diagonal_offset;  // column, counted from the slab's first, of row 0's positive
    T scale;
};

#define BODY "cpu/contrastive_slab.h"
#define LARGEST_VECTOR_BYTES 32  // rows are padded to 8 elements only
#include "cpu/simd/instruction_sets.h"

int64_t count_slabs(const Tile& tile) { return (tile.columns + SLAB - 1) / SLAB; }

template <class T>
Slab<T> slab_of(const Tile& tile, int64_t index, T scale) {
    const int64_t first = index * SLAB;
    return {static_cast<T*>(tile.products) + first,
            tile.stride,
            tile.rows,
            std::min(SLAB, tile.columns - first),
            tile.diagonal_offset - first,
            scale};
}

double log_add_exp(double a, double b) {  // log(exp a + exp b)
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
    const double larger = std::max(a, b);
    return std::isinf(larger) ? larger : larger + std::log1p(std::exp(std::min(a, b) - larger));
}

// The exponentials of a loss are scaled by this power of two, so that those of unit features stay below e^70:
// log 2 times it is the shift of contrastive.h. Scales beyond 5000 are out of its range.
constexpr double LOG_2 = 0.693147180559945309417;

int binary_shift(double scale) {
    const double size = std::abs(scale) < 5000 ? std::abs(scale) : 5000;  // 5000 for NaN
    return int(std::lround((size - 70) / LOG_2));
}

// Sums of exp(L - shift) outside these bounds may have lost terms; they are computed again about the maximum.
// The lower bound is so far above the smallest normal number that 1e6 terms flushed to 0 do not count.
template <class T>
bool in_range(double sum) {
    return sizeof(T) == 4 ? sum > 1e-24 && sum < 1e37 : sum > 1e-280 && sum < 1e300;
}

template <class T>
void run_lse(const Tile& tile, T scale, double* row_lse, double* column_lse, int threads) {
    const int power = binary_shift(scale);
    const double shift = power * LOG_2;
    const int64_t slabs = count_slabs(tile), elements = tile.rows * tile.columns;
    std::vector<double> row_sums(slabs * tile.rows);
    parallel_for(slabs, elements, threads, [&](int64_t index) {
        const Slab<T> slab = slab_of(tile, index, scale);
        double* lse = column_lse + index * SLAB;
        double sums[SLAB];
        DISPATCH(sum_slab, slab, power, row_sums.data() + index * tile.rows, sums);
        constexpr int64_t LANES = 32 / sizeof(T);
        for (int64_t j = 0; j < slab.columns; j += LANES) {
            const int64_t lanes = std::min(LANES, slab.columns - j);
            if (std::all_of(sums + j, sums + j + lanes, in_range<T>)) {
                for (int64_t k = j; k < j + lanes; ++k) sums[k] = shift + std::log(sums[k]);
            } else {
                DISPATCH(column_lse_about_maximum, slab.products + j, tile.stride, tile.rows, lanes, scale,
                         sums + j);
            }
            for (int64_t k = j; k < j + lanes; ++k) lse[k] = log_add_exp(lse[k], sums[k]);
        }
    });
    constexpr int64_t ROWS = 16;
    parallel_for((tile.rows + ROWS - 1) / ROWS, elements, threads, [&](int64_t block) {
        for (int64_t i = block * ROWS; i < std::min(tile.rows, (block + 1) * ROWS); ++i) {
            double sum = 0;
            for (int64_t slab = 0; slab < slabs; ++slab) sum += row_sums[slab * tile.rows + i];
            const T* row = static_cast<const T*>(tile.products) + i * tile.stride;
            const double lse = in_range<T>(sum) ? shift + std::log(sum)
                                                : DISPATCH(row_lse_about_maximum, row, tile.columns, scale);
            row_lse[i] = log_add_exp(row_lse[i], lse);
        }
    });
}

// COUNT sums over the whole tile: work(slab, index, sums) computes those of one slab, which are added in the
// order of the slabs.
template <int COUNT, class T, class Work>
void sum_over_slabs(const Tile& tile, T scale, int threads, double* sums, Work work) {
    const int64_t slabs = count_slabs(tile);
    std::vector<double> parts(slabs * COUNT);
    parallel_for(slabs, tile.rows * tile.columns, threads, [&](int64_t index) {
        work(slab_of(tile, index, scale), index, parts.data() + index * COUNT);
    });
    std::fill(sums, sums + COUNT, 0.0);
    for (int64_t index = 0; index < slabs * COUNT; ++index) sums[index % COUNT] += parts[index];
}

template <class T>
double run_gradient(const Tile& tile, T scale, const double* row_lse, const double* column_lse, T row_weight,
                    T column_weight, int threads) {
    double total;
    sum_over_slabs<1>(tile, scale, threads, &total, [&](const Slab<T>& slab, int64_t index, double* sum) {
        *sum = DISPATCH(gradient_slab, slab, row_lse, column_lse + index * SLAB, row_weight, column_weight);
    });
    return total;
}

template <class T>
void run_sigmoid(const Tile& tile, T scale, T bias, bool gradient, double* sums, int threads) {
    sum_over_slabs<3>(tile, scale, threads, sums, [&](const Slab<T>& slab, int64_t, double* part) {
        gradient ? DISPATCH(sigmoid_slab<true>, slab, bias, part)
                 : DISPATCH(sigmoid_slab<false>, slab, bias, part);
    });
}

template <class T>
void run_soft(const Tile& tile, const T* similarity, T scale, const double* row_lse, const double* column_lse,
              const double* similarity_row_lse, const double* similarity_column_lse, bool gradient,
              double* sums, int threads) {
    sum_over_slabs<2>(tile, scale, threads, sums, [&](const Slab<T>& slab, int64_t index, double* part) {
        const int64_t first = index * SLAB;
        gradient ? DISPATCH(soft_slab<true>, slab, similarity + first, row_lse, column_lse + first,
                            similarity_row_lse, similarity_column_lse + first, part)
                 : DISPATCH(soft_slab<false>, slab, similarity + first, row_lse, column_lse + first,
                            similarity_row_lse, similarity_column_lse + first, part);
    });
}

}  // namespace

void lse_epilogue(const Tile& tile, DType dtype, double scale, double* row_lse, double* column_lse,
                  int threads) {
    dtype == DType::f64 ? run_lse<double>(tile, scale, row_lse, column_lse, threads)
                        : run_lse<float>(tile, float(scale), row_lse, column_lse, threads);
}

double gradient_epilogue(const Tile& tile, DType dtype, double scale, const double* row_lse,
                         const double* column_lse, double row_weight, double column_weight, int threads) {
    return dtype == DType::f64
               ? run_gradient<double>(tile, scale, row_lse, column_lse, row_weight, column_weight, threads)
               : run_gradient<float>(tile, float(scale), row_lse, column_lse, float(row_weight),
                                     float(column_weight), threads);
}

void sigmoid_epilogue(const Tile& tile, DType dtype, double scale, double bias, bool gradient, double* sums,
                      int threads) {
    dtype == DType::f64 ? run_sigmoid<double>(tile, scale, bias, gradient, sums, threads)
                        : run_sigmoid<float>(tile, float(scale), float(bias), gradient, sums, threads);
}

void soft_epilogue(const Tile& tile, const void* similarity, DType dtype, double scale, const double* row_lse,
                   const double* column_lse, const double* similarity_row_lse,
                   const double* similarity_column_lse, bool gradient, double* sums, int threads) {
    dtype == DType::f64
        ? run_soft<double>(tile, static_cast<const double*>(similarity), scale, row_lse, column_lse,
                           similarity_row_lse, similarity_column_lse, gradient, sums, threads)
        : run_soft<float>(tile, static_cast<const float*>(similarity), float(scale), row_lse, column_lse,
                          similarity_row_lse, similarity_column_lse, gradient, sums, threads);
}

}  // namespace dalle2_fast::cpu

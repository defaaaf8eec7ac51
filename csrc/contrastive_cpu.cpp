// The epilogues of contrastive.h on the CPU: slabs of columns for threads, vectors inside (contrastive_cpu_slab.h).

#include "contrastive.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

#define INLINE_LAMBDA __attribute__((always_inline))

namespace dalle2_fast {
namespace {

constexpr int64_t SLAB = 512;  // columns: a row's share of a tile is 2 KB, and a slab's column sums stay in L1

template <class T>
struct Slab {
    T* products;  // of the tile's row 0 and the slab's column 0
    int64_t stride, rows, columns;
    int64_t own;  // column, counted from the slab's first, of row 0's own text
    T scale;
};

namespace portable {
#define VECTOR_BYTES 16
#include "contrastive_cpu_slab.h"
}

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_AVX2_TWIN
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
namespace avx2 {
#define VECTOR_BYTES 32
#include "contrastive_cpu_slab.h"
}
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const bool has_avx2 = __builtin_cpu_supports("avx2");
#define BEST(function, ...) (has_avx2 ? avx2::function(__VA_ARGS__) : portable::function(__VA_ARGS__))
#else
#define BEST(function, ...) portable::function(__VA_ARGS__)
#endif

// A thread costs some 30 us to start; below this many elements each it is not worth that.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 18;

// work(item) for each item, by at most `threads` threads, this one included. Threads are started anew: they do not
// outlive the call, so a process may fork between calls. Which thread does an item changes nothing.
template <class Work>
void parallel(int64_t items, int64_t elements, int threads, Work work) {
    std::atomic<int64_t> next{0};
    const auto share = [&] {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
    };
    const int64_t useful = std::min({int64_t(threads), items, elements / ELEMENTS_PER_THREAD});
    std::vector<std::thread> helpers;
    helpers.reserve(std::max<int64_t>(useful, 1));
    try {
        while (int64_t(helpers.size()) + 1 < useful) helpers.emplace_back(share);
    } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
    }
    share();
    for (std::thread& helper : helpers) helper.join();
}

int64_t slabs_of(const Tile& tile) { return (tile.columns + SLAB - 1) / SLAB; }

template <class T>
Slab<T> slab_of(const Tile& tile, int64_t index, T scale) {
    const int64_t first = index * SLAB;
    return {static_cast<T*>(tile.products) + first, tile.stride, tile.rows, std::min(SLAB, tile.columns - first),
            tile.own - first, scale};
}

// log(exp a + exp b)
double merged(double a, double b) {
    if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
    const double larger = std::max(a, b);
    return std::isinf(larger) ? larger : larger + std::log1p(std::exp(std::min(a, b) - larger));
}

// The power of two by which the exponentials of a loss are divided, so that those of unit features lie below e^70:
// log 2 times it is contrastive.h's shift. Scales past 5000 are out of its range.
constexpr double LOG_2 = 0.693147180559945309417;

int halvings_of(double scale) {
    const double size = std::abs(scale) < 5000 ? std::abs(scale) : 5000;  // 5000 for NaN
    return int(std::lround((size - 70) / LOG_2));
}

// Sums of exp(L - shift) outside these bounds may have lost terms: they are done again about the maximum. The least
// is far enough above the smallest normal number that 1e6 terms flushed to 0 do not count.
template <class T>
bool in_range(double sum) {
    return sizeof(T) == 4 ? sum > 1e-24 && sum < 1e37 : sum > 1e-280 && sum < 1e300;
}

template <class T>
void lse_epilogue(const Tile& tile, T scale, double* row_lse, double* column_lse, int threads) {
    const int halvings = halvings_of(scale);
    const double shift = halvings * LOG_2;
    const int64_t slabs = slabs_of(tile), elements = tile.rows * tile.columns;
    std::vector<double> row_sums(slabs * tile.rows);
    parallel(slabs, elements, threads, [&](int64_t index) {
        const Slab<T> slab = slab_of(tile, index, scale);
        double* lse = column_lse + index * SLAB;
        double sums[SLAB];
        BEST(sum_slab, slab, halvings, row_sums.data() + index * tile.rows, sums);
        constexpr int64_t LANES = 32 / sizeof(T);
        for (int64_t j = 0; j < slab.columns; j += LANES) {
            const int64_t lanes = std::min(LANES, slab.columns - j);
            if (std::all_of(sums + j, sums + j + lanes, in_range<T>)) {
                for (int64_t k = j; k < j + lanes; ++k) sums[k] = shift + std::log(sums[k]);
            } else {
                BEST(column_lse_about_maximum, slab.products + j, tile.stride, tile.rows, lanes, scale, sums + j);
            }
            for (int64_t k = j; k < j + lanes; ++k) lse[k] = merged(lse[k], sums[k]);
        }
    });
    constexpr int64_t ROWS = 16;
    parallel((tile.rows + ROWS - 1) / ROWS, elements, threads, [&](int64_t block) {
        for (int64_t i = block * ROWS; i < std::min(tile.rows, (block + 1) * ROWS); ++i) {
            double sum = 0;
            for (int64_t slab = 0; slab < slabs; ++slab) sum += row_sums[slab * tile.rows + i];
            const T* row = static_cast<const T*>(tile.products) + i * tile.stride;
            const double lse = in_range<T>(sum) ? shift + std::log(sum)
                                                : BEST(row_lse_about_maximum, row, tile.columns, scale);
            row_lse[i] = merged(row_lse[i], lse);
        }
    });
}

// The slabs' sums, COUNT of them each, in the order of the slabs; `work(slab, index, sums)` adds to its own.
template <int COUNT, class T, class Work>
void sum_over_slabs(const Tile& tile, T scale, int threads, double* sums, Work work) {
    const int64_t slabs = slabs_of(tile);
    std::vector<double> parts(slabs * COUNT);
    parallel(slabs, tile.rows * tile.columns, threads,
             [&](int64_t index) { work(slab_of(tile, index, scale), index, parts.data() + index * COUNT); });
    std::fill(sums, sums + COUNT, 0.0);
    for (int64_t index = 0; index < slabs * COUNT; ++index) sums[index % COUNT] += parts[index];
}

template <class T>
double gradient_epilogue(const Tile& tile, T scale, const double* row_lse, const double* column_lse, T row_weight,
                         T column_weight, int threads) {
    double total;
    sum_over_slabs<1>(tile, scale, threads, &total, [&](const Slab<T>& slab, int64_t index, double* sum) {
        *sum = BEST(gradient_slab, slab, row_lse, column_lse + index * SLAB, row_weight, column_weight);
    });
    return total;
}

template <class T>
void sigmoid_epilogue(const Tile& tile, T scale, T bias, bool gradient, double* sums, int threads) {
    sum_over_slabs<3>(tile, scale, threads, sums, [&](const Slab<T>& slab, int64_t, double* part) {
        gradient ? BEST(sigmoid_slab<true>, slab, bias, part)
                 : BEST(sigmoid_slab<false>, slab, bias, part);
    });
}

template <class T>
void soft_epilogue(const Tile& tile, const T* alike, T scale, const double* row_lse, const double* column_lse,
                   const double* alike_row_lse, const double* alike_column_lse, bool gradient, double* sums,
                   int threads) {
    sum_over_slabs<2>(tile, scale, threads, sums, [&](const Slab<T>& slab, int64_t index, double* part) {
        const int64_t first = index * SLAB;
        gradient ? BEST(soft_slab<true>, slab, alike + first, row_lse, column_lse + first, alike_row_lse,
                        alike_column_lse + first, part)
                 : BEST(soft_slab<false>, slab, alike + first, row_lse, column_lse + first, alike_row_lse,
                        alike_column_lse + first, part);
    });
}

}  // namespace

namespace cpu {

void lse_epilogue(const Tile& tile, DType dtype, double scale, double* row_lse, double* column_lse, int threads) {
    dtype == DType::f64 ? dalle2_fast::lse_epilogue<double>(tile, scale, row_lse, column_lse, threads)
                        : dalle2_fast::lse_epilogue<float>(tile, float(scale), row_lse, column_lse, threads);
}

double gradient_epilogue(const Tile& tile, DType dtype, double scale, const double* row_lse,
                         const double* column_lse, double row_weight, double column_weight, int threads) {
    if (dtype == DType::f64) {
        return dalle2_fast::gradient_epilogue<double>(tile, scale, row_lse, column_lse, row_weight, column_weight,
                                                      threads);
    }
    return dalle2_fast::gradient_epilogue<float>(tile, float(scale), row_lse, column_lse, float(row_weight),
                                                 float(column_weight), threads);
}

void sigmoid_epilogue(const Tile& tile, DType dtype, double scale, double bias, bool gradient, double* sums,
                      int threads) {
    dtype == DType::f64
        ? dalle2_fast::sigmoid_epilogue<double>(tile, scale, bias, gradient, sums, threads)
        : dalle2_fast::sigmoid_epilogue<float>(tile, float(scale), float(bias), gradient, sums, threads);
}

void soft_epilogue(const Tile& tile, const void* alike, DType dtype, double scale, const double* row_lse,
                   const double* column_lse, const double* alike_row_lse, const double* alike_column_lse,
                   bool gradient, double* sums, int threads) {
    dtype == DType::f64
        ? dalle2_fast::soft_epilogue<double>(tile, static_cast<const double*>(alike), scale, row_lse, column_lse,
                                             alike_row_lse, alike_column_lse, gradient, sums, threads)
        : dalle2_fast::soft_epilogue<float>(tile, static_cast<const float*>(alike), float(scale), row_lse,
                                            column_lse, alike_row_lse, alike_column_lse, gradient, sums, threads);
}

}  // namespace cpu
}  // namespace dalle2_fast

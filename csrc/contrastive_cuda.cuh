// Kernels of contrastive_cuda.cu: one pass over a tile of products P (float32), which torch's matrix product has just
// written. No launches here, and nothing but plain CUDA C++, so that the tests run this text on a CPU as well.
//
//   lse        sum_tile -> merge_sums, then sum_about_maximum -> merge_about_maximum, which leave at once as a rule
//   own pairs  own_products
//   gradients  split_lse -> epilogue<ClipRule | SigmoidRule | SoftRule> -> add_up
//
// Why float32 products, not bfloat16: at scale 100 a cosine of 0.5 rounded to 8 bits moves its logit by 0.1, and
// its term of the gradient by a tenth; that alone is the error of autocast's loss, of which ours may be half.
// Bytes per element of N^2, and the time at 4.2 TB/s (of an H200's 4.8; an estimate, not a measurement) for N = 32768:
//                                          float32            bfloat16
//   forward   product out, product in      4 + 4   2.0 ms     2 + 2   1.0 ms
//   gradient  the same, G out, G in twice  4+4+2+4 3.6 ms     2+2+2+4 2.6 ms
// so precision costs 2.0 ms beside 5.6 ms of matrix products at d = 512.
//
// A warp reads 512 contiguous bytes of a row. A thread owns LANES neighbouring columns and walks down the rows: sums
// down the columns need nobody else. Sums along the rows are kept for 32 rows and then reduced by 31 shuffles for all
// of them together, a quarter of a shuffle per element; one reduction per row would take 5 / LANES = 1.25.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace dalle2_fast::cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int LANES = 4;                        // columns of a thread: one 16-byte load
constexpr int BLOCK_COLUMNS = THREADS * LANES;  // of a block
constexpr int BATCH = 32;                       // rows whose sums are reduced together: one for each lane of a warp
// Rows of a block. The sums of its columns are 1 / SUM_ROWS of the bytes it reads; more rows leave GPUs idle at the
// end: 2048 x 32768 are 1024 blocks here, 4 for each place on an H200.
constexpr int SUM_ROWS = 64;
constexpr int EPILOGUE_ROWS = 32;
constexpr float LOG2_E = 1.44269504088896340736f;
constexpr float LOG2_E_REST = 1.92596299112661746887e-8f;  // log2(e) - LOG2_E
constexpr double LOG_2 = 0.693147180559945309417;

// Sums of exp(L) 2^-shift outside these bounds may have lost terms. The least is far enough above the smallest normal
// number that 1e6 terms flushed to 0 do not count.
constexpr double LEAST_SUM = 1e-24, MOST_SUM = 1e37;

// Blocks cover the tile: blockIdx.x counts BLOCK_COLUMNS columns, blockIdx.y rows.
struct Logits {
    const float* products;
    int64_t stride;
    int64_t rows, columns;
    int64_t own;         // column of row 0's own text
    const float* scale;  // on the device
    float factor;        // L = float(float(factor * scale[0]) * P)
};

// ------------------------------------------------------------------------------------------------------ small parts

__device__ __forceinline__ float fast_exp2(float x) {  // within 2^-22; below 2^-126 it is 0
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return exp2f(x);
#endif
}

// For terms that count only near x = 0. Far from it the product's rounding shows: at x = 70 it is 3e-6.
__device__ __forceinline__ float fast_exp(float x) { return fast_exp2(x * LOG2_E); }

// exp(x) 2^-shift to 3e-7 for all x and an integer shift: x log2(e) = whole + part, both as good as exact, where
// x - shift log(2) would be rounded. An infinite x may give NaN.
__device__ __forceinline__ float shifted_exp(float x, float shift) {
    constexpr float ROUND = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer
    const float whole = fmaf(x, LOG2_E, ROUND) - ROUND;
    const float part = fmaf(x, LOG2_E_REST, fmaf(x, LOG2_E, -whole));
    return fast_exp2(whole - shift) * fast_exp2(part);
}

// log(1 + u), 0 <= u <= 1, to 2e-7 of its value also where it is small: most of a sigmoid loss are small terms.
// u times the polynomial through log(1 + u) / u at the 10 Chebyshev points of [0, 1].
__device__ __forceinline__ float log_one_plus(float u) {
    constexpr float TERMS[] = {1.0f,         -0.49999893f, 0.3332971f,   -0.24951616f, 0.19663274f,
                               -0.15269667f, 0.10543624f,  -0.05637361f, 0.01954253f,  -0.00317606f};
    float y = TERMS[9];
#pragma unroll
    for (int k = 8; k >= 0; --k) y = fmaf(y, u, TERMS[k]);
    return y * u;
}

// Of a float64 lse as (high, low): near it L - high is exact.
__device__ __forceinline__ float less(float logit, float2 lse) { return (logit - lse.x) - lse.y; }

__device__ __forceinline__ float finite_or_zero(float x) { return x - x == 0 ? x : 0.0f; }

// LANES floats from 16-byte aligned memory, of which the first `count` exist; read once, so they need not stay cached.
template <bool FULL>
__device__ __forceinline__ void load(float (&to)[LANES], const float* from, int count) {
    if (FULL || count == LANES) {
        const float4 four = __ldcs(reinterpret_cast<const float4*>(from));
        to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) to[lane] = lane < count ? from[lane] : 0.0f;
    }
}

__device__ __forceinline__ void convert(float& to, float from) { to = from; }
__device__ __forceinline__ void convert(__half& to, float from) { to = __float2half_rn(from); }
__device__ __forceinline__ void convert(__nv_bfloat16& to, float from) { to = __float2bfloat16_rn(from); }

template <class Pair>
__device__ __forceinline__ unsigned bits(Pair pair) {
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
}

// One store of 16 or 8 bytes, asked for by name: of an assignment the compiler makes four on sm_80 to sm_90. It stays
// in L2, if it fits: the next matrix product reads it.
__device__ __forceinline__ void store_all(float* to, const float (&from)[LANES]) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}
__device__ __forceinline__ void store_all(__half* to, const float (&from)[LANES]) {
    __stwb(reinterpret_cast<uint2*>(to),
           make_uint2(bits(__floats2half2_rn(from[0], from[1])), bits(__floats2half2_rn(from[2], from[3]))));
}
__device__ __forceinline__ void store_all(__nv_bfloat16* to, const float (&from)[LANES]) {
    __stwb(reinterpret_cast<uint2*>(to),
           make_uint2(bits(__floats2bfloat162_rn(from[0], from[1])), bits(__floats2bfloat162_rn(from[2], from[3]))));
}

template <bool FULL, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[LANES], int count) {
    if (FULL || count == LANES) {
        store_all(to, from);
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
            if (lane < count) convert(to[lane], from[lane]);
    }
}

struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Larger {
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }  // not the NaN
};

// Lane l gets the combination over the warp of values[l]: each exchange halves both the values and the lanes that
// share a value.
template <class Combine>
__device__ __forceinline__ float reduce_transposed(float (&values)[BATCH], Combine combine) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 5; ++step) {  // counted up: the compiler does not unroll a loop of half /= 2
        const int half = BATCH / 2 >> step;
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < BATCH / 2; ++i) {
            if (i >= half) break;
            const float kept = upper ? values[i + half] : values[i];
            const float given = upper ? values[i] : values[i + half];
            values[i] = combine(kept, __shfl_xor_sync(~0u, given, half));
        }
    }
    return values[0];
}

// log(exp a + exp b)
__device__ __forceinline__ double merged(double a, double b) {
    if (a != a || b != b) return a + b;
    const double larger = a > b ? a : b, smaller = a > b ? b : a;
    return larger - larger == 0 ? larger + log1p(exp(smaller - larger)) : larger;
}

// -------------------------------------------------------------------------------------------------------------- lse

// Own pairs are left out of all sums: merging adds them in double. An easy pair's exponential is 1e6 times the others'
// sum, which is what the loss consists of then, and in one float32 sum with it they would be rounded away.
__device__ __forceinline__ bool has_own(const Logits& tile, int rows_per_block) {
    const int64_t columns_begin = blockIdx.x * int64_t(BLOCK_COLUMNS);
    const int64_t own_begin = tile.own + blockIdx.y * int64_t(rows_per_block);
    return own_begin + rows_per_block > columns_begin && own_begin < columns_begin + BLOCK_COLUMNS;
}

// Logit of the own pair of a row, or of a column; -infinity if that has none in this tile.
__device__ __forceinline__ double own_logit(const Logits& tile, int64_t index, bool is_row) {
    const int64_t row = is_row ? index : index - tile.own, column = row + tile.own;
    if (row < 0 || row >= tile.rows || column < 0 || column >= tile.columns) return -INFINITY;
    return __fmul_rn(tile.factor * tile.scale[0], tile.products[row * tile.stride + column]);
}

// What the lse kernels leave for one another. `columns` here is rounded up to a multiple of LANES.
struct Sums {
    float* along;         // [column blocks, rows]: of a row, in one block
    float* down;          // [row blocks, columns]: of a column, in one block
    float2* along_pairs;  // the same about a maximum: (base, sum of exp(L - base))
    float2* down_pairs;
    unsigned char* redo;  // [tile.columns + rows]: this column's, this row's sum is out of range
    int* flag;            // whether any is
    int64_t columns;
};

// 2^-shift = exp(70 - |scale|), nearly: logits of unit features stay below exp(70), of which a float32 holds 1e8.
__device__ __forceinline__ float shift_of(float scale) { return rintf((fabsf(scale) - 70) * LOG2_E); }

// FULL: the block lies within the tile, and no row's own text in the block.
template <bool FULL>
__device__ __forceinline__ void sum_block(const Logits& tile, const Sums& sums, float (&along)[WARPS][SUM_ROWS]) {
    const float scale = tile.factor * tile.scale[0], shift = shift_of(scale);
    const int64_t column = int64_t(blockIdx.x) * BLOCK_COLUMNS + threadIdx.x * LANES;
    const int64_t first_row = int64_t(blockIdx.y) * SUM_ROWS;
    const int count = FULL ? LANES : int(min(max(tile.columns - column, int64_t(0)), int64_t(LANES)));
    const int rows = FULL ? SUM_ROWS : int(min(tile.rows - first_row, int64_t(SUM_ROWS)));
    const float* place = tile.products + first_row * tile.stride + column;

    float down[LANES] = {};
#pragma unroll 1
    for (int batch = 0; batch < SUM_ROWS; batch += BATCH) {
        float row_sums[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            row_sums[i] = 0;
            if (FULL || batch + i < rows) {
                float products[LANES];
                load<FULL>(products, place + (batch + i) * tile.stride, count);
                const int64_t own = tile.own + first_row + batch + i - column;
#pragma unroll
                for (int lane = 0; lane < LANES; ++lane) {
                    float term = shifted_exp(__fmul_rn(scale, products[lane]), shift);
                    if (!FULL && (lane >= count || lane == own)) term = 0;
                    row_sums[i] += term;
                    down[lane] += term;
                }
            }
        }
        along[threadIdx.x / 32][batch + threadIdx.x % 32] = reduce_transposed(row_sums, Add());
    }
    if (column < sums.columns) store<true>(sums.down + blockIdx.y * sums.columns + column, down, LANES);

    __syncthreads();
    if (int(threadIdx.x) < rows) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += along[warp][threadIdx.x];
        sums.along[blockIdx.x * tile.rows + first_row + threadIdx.x] = sum;
    }
}

// Sums of exp(L) 2^-shift of each block's rows and columns. Reads 4 bytes per element: 1.0 ms for 32768^2.
__global__ void __launch_bounds__(THREADS) sum_tile(Logits tile, Sums sums) {
    __shared__ float along[WARPS][SUM_ROWS];
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) *sums.flag = 0;
    const bool full = (blockIdx.x + 1) * int64_t(BLOCK_COLUMNS) <= tile.columns &&
                      (blockIdx.y + 1) * int64_t(SUM_ROWS) <= tile.rows && !has_own(tile, SUM_ROWS);
    if (full) sum_block<true>(tile, sums, along);
    else sum_block<false>(tile, sums, along);
}

// One thread for each column, then for each row: its blocks' sums in their order and its own pair, merged into the
// running lse.
__global__ void __launch_bounds__(THREADS)
merge_sums(Logits tile, Sums sums, int row_blocks, int column_blocks, double* row_lse, double* column_lse) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index - tile.columns;
    if (row >= tile.rows) return;
    const bool is_row = row >= 0;
    const float* parts = is_row ? sums.along + row : sums.down + index;
    const int64_t step = is_row ? tile.rows : sums.columns;
    const double shift = shift_of(tile.factor * tile.scale[0]) * LOG_2;
    double sum = 0;
#pragma unroll 8
    for (int block = 0; block < (is_row ? column_blocks : row_blocks); ++block) sum += parts[block * step];
    sum += exp(own_logit(tile, is_row ? row : index, is_row) - shift);

    const bool in_range = sum > LEAST_SUM && sum < MOST_SUM;  // not for NaN
    sums.redo[index] = !in_range;
    if (in_range) {
        double* lse = is_row ? row_lse + row : column_lse + index;
        *lse = merged(*lse, shift + log(sum));
    } else {
        *sums.flag = 1;  // whoever writes writes the same
    }
}

// As sum_tile, about maxima: down its 32 rows a thread takes its own columns' largest L, along a row a warp does.
// Needs 128 registers for the logits alone, so that they are read once; that is the rare way.
__global__ void __launch_bounds__(THREADS) sum_about_maximum(Logits tile, Sums sums) {
    __shared__ float2 along[WARPS][BATCH];
    if (*sums.flag == 0) return;
    const float scale = tile.factor * tile.scale[0];
    const int64_t column = int64_t(blockIdx.x) * BLOCK_COLUMNS + threadIdx.x * LANES;
    const int64_t first_row = int64_t(blockIdx.y) * BATCH;
    const int count = int(min(max(tile.columns - column, int64_t(0)), int64_t(LANES)));
    const int rows = int(min(tile.rows - first_row, int64_t(BATCH)));
    const float* place = tile.products + first_row * tile.stride + column;

    float logits[BATCH][LANES], row_values[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        row_values[i] = -INFINITY;
        float products[LANES] = {};
        if (i < rows) load<false>(products, place + i * tile.stride, count);
        const int64_t own = tile.own + first_row + i - column;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) {
            const bool counts = i < rows && lane < count && lane != own;
            logits[i][lane] = counts ? __fmul_rn(scale, products[lane]) : -INFINITY;
            row_values[i] = fmaxf(row_values[i], logits[i][lane]);
        }
    }
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane) {
        float base = -INFINITY, sum = 0;
#pragma unroll
        for (int i = 0; i < BATCH; ++i) base = fmaxf(base, logits[i][lane]);
        base = finite_or_zero(base);
#pragma unroll
        for (int i = 0; i < BATCH; ++i) sum += fast_exp(logits[i][lane] - base);
        if (lane < count) sums.down_pairs[blockIdx.y * sums.columns + column + lane] = make_float2(base, sum);
    }
    const float base = finite_or_zero(reduce_transposed(row_values, Larger()));  // of row number `lane of the warp`
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
        const float row_base = __shfl_sync(~0u, base, i);
        row_values[i] = 0;
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane) row_values[i] += fast_exp(logits[i][lane] - row_base);
    }
    along[threadIdx.x / 32][threadIdx.x % 32] = make_float2(base, reduce_transposed(row_values, Add()));
    __syncthreads();
    if (int(threadIdx.x) < rows) {
        float2 all = along[0][threadIdx.x];
        for (int warp = 1; warp < WARPS; ++warp) {
            const float2 next = along[warp][threadIdx.x];
            // A sum of 0 has no base: there was nothing, or -infinity.
            const float both = next.y == 0 ? all.x : all.y == 0 ? next.x : fmaxf(all.x, next.x);
            all.y = all.y * fast_exp(all.x - both) + (next.y == 0 ? 0 : next.y * fast_exp(next.x - both));
            all.x = both;
        }
        sums.along_pairs[blockIdx.x * tile.rows + first_row + threadIdx.x] = all;
    }
}

__global__ void __launch_bounds__(THREADS)
merge_about_maximum(Logits tile, Sums sums, int row_blocks, int column_blocks, double* row_lse, double* column_lse) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = index - tile.columns;
    if (*sums.flag == 0 || row >= tile.rows || !sums.redo[index]) return;
    const bool is_row = row >= 0;
    const float2* parts = is_row ? sums.along_pairs + row : sums.down_pairs + index;
    const int64_t step = is_row ? tile.rows : sums.columns;
    double lse = own_logit(tile, is_row ? row : index, is_row);
    for (int block = 0; block < (is_row ? column_blocks : row_blocks); ++block) {
        const float2 part = parts[block * step];
        lse = merged(lse, part.x + log(double(part.y)));
    }
    double* running = is_row ? row_lse + row : column_lse + index;
    *running = merged(*running, lse);
}

// -------------------------------------------------------------------------------------------------------- own pairs

__device__ __forceinline__ float widened(float x) { return x; }
__device__ __forceinline__ float widened(__half x) { return __half2float(x); }
__device__ __forceinline__ float widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// Features by their strides: rows, then along a row.
template <class T>
struct Rows {
    const T* first;
    int64_t stride, step;
};

// own[i] = <image_i, text_i>, rounded at each addition, which tensor cores do not: they cut off. A warp for each row;
// reads 4 D bytes of it, 20 us for 32768 rows of 512 (an estimate, not a measurement).
template <class T>
__global__ void __launch_bounds__(THREADS)
own_products(Rows<T> image, Rows<T> text, int64_t rows, int64_t width, float* own) {
    const int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32;
    if (row >= rows) return;
    const T *one = image.first + row * image.stride, *other = text.first + row * text.stride;
    float sum = 0;
#pragma unroll 8
    for (int64_t i = threadIdx.x % 32; i < width; i += 32)
        sum = fmaf(widened(one[i * image.step]), widened(other[i * text.step]), sum);
#pragma unroll
    for (int step = 0; step < 5; ++step) sum += __shfl_xor_sync(~0u, sum, 16 >> step);
    if (threadIdx.x % 32 == 0) own[row] = sum;
}

// -------------------------------------------------------------------------------------------------------- gradients

struct Lse {  // of rows or columns, in halves: [count]
    const float2* row;
    const float2* column;
};

// float64 -> (high, low), so that no arithmetic of the large kernel is in float64 (1/64 of the speed on most GPUs).
__global__ void __launch_bounds__(THREADS)
split_lse(const double* row_lse, const double* column_lse, int64_t rows, int64_t columns, float2* row, float2* column) {
    const int64_t index = int64_t(blockIdx.x) * THREADS + threadIdx.x;
    if (index >= rows + columns) return;
    const double lse = index < columns ? column_lse[index] : row_lse[index - columns];
    const float high = float(lse);
    (index < columns ? column[index] : row[index - columns]) = make_float2(high, float(lse - high));
}

__device__ __forceinline__ void load_column_lse(float2 (&to)[LANES], const float2* lse, int64_t column, int count) {
#pragma unroll
    for (int lane = 0; lane < LANES; ++lane)
        to[lane] = lane < count ? lse[column + lane] : make_float2(0.0f, 0.0f);
}

// A rule is the formula of one epilogue. `Columns` is what it keeps of its thread's columns, `Row` what it reads of a
// row; `gradient` returns G of one element and adds to SUMS sums. ROWS_IN_FLIGHT rows may be read before the first is
// used: to hide a latency of 0.8 us an H200 needs 25 KB on their way to each SM, 2 rows of 4 blocks.

// G = row_weight exp(L - row_lse) + column_weight exp(L - column_lse) - (row_weight + column_weight) [own].
// 6 bytes per element with G in 16 bits: 1.5 ms for 32768^2.
struct ClipRule {
    static constexpr int SUMS = 1, ROWS_IN_FLIGHT = 8;
    static constexpr bool HAS_OWN = true;
    Lse lse;
    float row_weight, column_weight;

    struct Columns {
        float2 lse[LANES];
    };
    struct Row {
        float2 lse;
    };
    template <bool FULL>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t column, int count) const {
        load_column_lse(columns.lse, lse.column, column, count);
    }
    template <bool FULL>
    __device__ __forceinline__ void load_row(Row& to, const Logits&, int64_t row, int64_t, int) const {
        to.lse = __ldg(lse.row + row);
    }
    __device__ __forceinline__ float gradient(float product, float scale, const Row& row, const Columns& columns,
                                              int lane, bool own, float (&sums)[SUMS]) const {
        const float logit = __fmul_rn(scale, product);
        const float along = less(logit, row.lse), down = less(logit, columns.lse[lane]);
        // exp(x) - 1 of an easy pair is small: in full precision, not as a difference.
        const float gradient = own ? row_weight * expm1f(along) + column_weight * expm1f(down)
                                   : row_weight * fast_exp(along) + column_weight * fast_exp(down);
        sums[0] += gradient * product;
        return gradient;
    }
};

// z = 1 for an own pair, else -1; y = -z (scale P + bias): the loss is log(1 + exp y), G = -z / (1 + exp(-y)).
struct SigmoidRule {
    static constexpr int SUMS = 3, ROWS_IN_FLIGHT = 8;
    static constexpr bool HAS_OWN = true;
    const float* bias;

    struct Columns {
        float bias;
    };
    struct Row {};
    template <bool FULL>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t, int) const {
        columns.bias = bias[0];
    }
    template <bool FULL>
    __device__ __forceinline__ void load_row(Row&, const Logits&, int64_t, int64_t, int) const {}
    __device__ __forceinline__ float gradient(float product, float scale, const Row&, const Columns& columns, int,
                                              bool own, float (&sums)[SUMS]) const {
        const float logit = fmaf(scale, product, columns.bias), y = own ? -logit : logit;
        const float u = fast_exp(-fabsf(y));
        sums[0] += fmaxf(y, 0.0f) + log_one_plus(u);
        const float size = __fdividef(y > 0 ? 1.0f : u, 1.0f + u);
        const float gradient = own ? -size : size;
        sums[1] += gradient * product;
        sums[2] += gradient;
        return gradient;
    }
};

// A = scale / 2 * alike, p = exp(A - alike's row lse), q = exp(A - alike's column lse):
// the loss is p (row_lse - L) + q (column_lse - L), G = exp(L - row_lse) + exp(L - column_lse) - p - q.
// 10 bytes per element: 2.6 ms for 32768^2; its 4 exponentials would take 1.2 ms.
struct SoftRule {
    static constexpr int SUMS = 2, ROWS_IN_FLIGHT = 4;
    static constexpr bool HAS_OWN = false;  // an own pair is one of many here
    const float* alike;  // as Logits.products
    Lse lse, alike_lse;

    struct Columns {
        float2 lse[LANES], alike_lse[LANES];
    };
    struct Row {
        float2 lse, alike_lse;
        float alike[LANES];
    };
    template <bool FULL>
    __device__ __forceinline__ void load_columns(Columns& columns, int64_t column, int count) const {
        load_column_lse(columns.lse, lse.column, column, count);
        load_column_lse(columns.alike_lse, alike_lse.column, column, count);
    }
    template <bool FULL>
    __device__ __forceinline__ void load_row(Row& to, const Logits& tile, int64_t row, int64_t column,
                                             int count) const {
        to.lse = __ldg(lse.row + row);
        to.alike_lse = __ldg(alike_lse.row + row);
        load<FULL>(to.alike, alike + row * tile.stride + column, count);
    }
    __device__ __forceinline__ float gradient(float product, float scale, const Row& row, const Columns& columns,
                                              int lane, bool, float (&sums)[SUMS]) const {
        const float logit = __fmul_rn(scale, product);
        const float along = less(logit, row.lse), down = less(logit, columns.lse[lane]);
        const float similarity = __fmul_rn(0.5f * scale, row.alike[lane]);
        const float p = fast_exp(less(similarity, row.alike_lse));
        const float q = fast_exp(less(similarity, columns.alike_lse[lane]));
        const float gradient = (fast_exp(along) - p) + (fast_exp(down) - q);
        sums[0] -= p * along + q * down;
        sums[1] += gradient * product;
        return gradient;
    }
};

struct Nothing {};  // the type of a gradient that is not wanted

// FULL: the block lies within the tile, and no row's own text in the block.
template <bool FULL, class Rule, class G>
__device__ __forceinline__ void epilogue_block(const Logits& tile, const Rule& rule, G* gradient,
                                               int64_t gradient_stride, float (&sums)[Rule::SUMS]) {
    constexpr int ROWS = FULL ? Rule::ROWS_IN_FLIGHT : 1;
    const float scale = tile.factor * tile.scale[0];
    const int64_t column = int64_t(blockIdx.x) * BLOCK_COLUMNS + threadIdx.x * LANES;
    const int64_t first_row = int64_t(blockIdx.y) * EPILOGUE_ROWS;
    const int count = FULL ? LANES : int(min(max(tile.columns - column, int64_t(0)), int64_t(LANES)));
    const int rows = FULL ? EPILOGUE_ROWS : int(min(tile.rows - first_row, int64_t(EPILOGUE_ROWS)));
    typename Rule::Columns columns;
    rule.template load_columns<FULL>(columns, column, count);

#pragma unroll 1  // a longer text compiles longer, and there are enough bytes on their way
    for (int batch = 0; batch < rows; batch += ROWS) {
        float products[ROWS][LANES];
        typename Rule::Row row_facts[ROWS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = first_row + batch + i;
            load<FULL>(products[i], tile.products + row * tile.stride + column, count);
            rule.template load_row<FULL>(row_facts[i], tile, row, column, count);
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            const int64_t row = first_row + batch + i, own = tile.own + row - column;
            float values[LANES];
#pragma unroll
            for (int lane = 0; lane < LANES; ++lane) {
                values[lane] = 0;
                if (FULL || lane < count)
                    values[lane] = rule.gradient(products[i][lane], scale, row_facts[i], columns, lane,
                                                 !FULL && own == lane, sums);
            }
            if constexpr (!std::is_same_v<G, Nothing>)
                store<FULL>(gradient + row * gradient_stride + column, values, count);
        }
    }
}

// Turns a tile into G and leaves each block's sums in parts[SUMS, blocks]; without G only the first sum.
template <class Rule, class G>
__global__ void __launch_bounds__(THREADS)
epilogue(Logits tile, Rule rule, G* gradient, int64_t gradient_stride, float* parts) {
    constexpr int WANTED = std::is_same_v<G, Nothing> ? 1 : Rule::SUMS;
    __shared__ float warps[WANTED][WARPS];
    float sums[Rule::SUMS] = {};
    const bool full = (blockIdx.x + 1) * int64_t(BLOCK_COLUMNS) <= tile.columns &&
                      (blockIdx.y + 1) * int64_t(EPILOGUE_ROWS) <= tile.rows &&
                      !(Rule::HAS_OWN && has_own(tile, EPILOGUE_ROWS));
    if (full) epilogue_block<true>(tile, rule, gradient, gradient_stride, sums);
    else epilogue_block<false>(tile, rule, gradient, gradient_stride, sums);

#pragma unroll
    for (int k = 0; k < WANTED; ++k) {
#pragma unroll
        for (int step = 0; step < 5; ++step) sums[k] += __shfl_xor_sync(~0u, sums[k], 16 >> step);
        if (threadIdx.x % 32 == 0) warps[k][threadIdx.x / 32] = sums[k];
    }
    __syncthreads();
    if (threadIdx.x < WANTED) {
        float sum = 0;
        for (int warp = 0; warp < WARPS; ++warp) sum += warps[threadIdx.x][warp];
        const int64_t blocks = int64_t(gridDim.x) * gridDim.y;
        parts[threadIdx.x * blocks + blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = sum;
    }
}

// Block k adds the sum of parts[k, 0 .. blocks - 1] to sums[k], in one fixed order.
__global__ void __launch_bounds__(THREADS) add_up(const float* parts, int64_t blocks, double* sums) {
    __shared__ double threads[THREADS];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < blocks; i += THREADS) sum += parts[blockIdx.x * blocks + i];
    threads[threadIdx.x] = sum;
    for (int half = THREADS / 2; half >= 1; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) threads[threadIdx.x] += threads[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] += threads[0];
}

}  // namespace dalle2_fast::cuda

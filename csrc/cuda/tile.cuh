// How a block and a thread divide a tile of products, and vectorised loads and stores of it.
//
// A warp reads 512 contiguous bytes of a row. A thread owns LANES neighbouring columns and walks down the
// rows: sums down a column need no other thread. Sums along the rows are kept for BATCH rows and then reduced
// together, by 31 shuffles, a quarter of a shuffle per element; one reduction per row would take 5 / LANES =
// 1.25.
//
// Plain CUDA C++, like all kernels in this folder, so that the tests also run it on a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace dalle2_fast::cuda {

constexpr int THREADS = 256, WARPS = THREADS / 32;  // of a block
constexpr int LANES = 4;                            // columns of a thread: one 16-byte load
constexpr int BLOCK_COLUMNS = THREADS * LANES;
constexpr int BATCH = 32;  // rows whose sums are reduced together: one for each lane of a warp

// The logits L = float(float(factor * scale[0]) * P) of a tile of products. Blocks cover the tile: blockIdx.x
// counts BLOCK_COLUMNS columns, blockIdx.y the rows of a block.
struct LogitTile {
    const float* products;
    int64_t stride;
    int64_t rows, columns;
    int64_t diagonal_offset;  // column of row 0's positive
    const float* scale;       // on the device
    float factor;

    __device__ __forceinline__ float logit_scale() const { return factor * scale[0]; }
};

// The first of this thread's columns.
__device__ __forceinline__ int64_t thread_column() {
    return int64_t(blockIdx.x) * BLOCK_COLUMNS + threadIdx.x * LANES;
}

// How many of this thread's LANES columns the tile has.
__device__ __forceinline__ int count_columns(const LogitTile& tile, int64_t column) {
    return int(min(max(tile.columns - column, int64_t(0)), int64_t(LANES)));
}

// Whether this block contains a positive pair.
__device__ __forceinline__ bool has_positives(const LogitTile& tile, int rows_per_block) {
    const int64_t columns_begin = blockIdx.x * int64_t(BLOCK_COLUMNS);
    const int64_t positives_begin = tile.diagonal_offset + blockIdx.y * int64_t(rows_per_block);
    return positives_begin + rows_per_block > columns_begin &&
           positives_begin < columns_begin + BLOCK_COLUMNS;
}

// ------------------------------------------------------------------------------------------ loads and stores

// LANES floats from 16-byte aligned memory, of which the first `count` exist. They are read once, so they
// need not stay in the cache.
template <bool COMPLETE>
__device__ __forceinline__ void load(float (&to)[LANES], const float* from, int count) {
    if (COMPLETE || count == LANES) {
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

// One store of 16 or 8 bytes, written as an intrinsic: of an assignment the compiler makes four stores on
// sm_80 to sm_90. It stays in L2, if it fits, because the next matrix product reads it.
__device__ __forceinline__ void store_vector(float* to, const float (&from)[LANES]) {
    __stwb(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
}
__device__ __forceinline__ void store_vector(__half* to, const float (&from)[LANES]) {
    const unsigned low = bits(__floats2half2_rn(from[0], from[1]));
    const unsigned high = bits(__floats2half2_rn(from[2], from[3]));
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(low, high));
}
__device__ __forceinline__ void store_vector(__nv_bfloat16* to, const float (&from)[LANES]) {
    const unsigned low = bits(__floats2bfloat162_rn(from[0], from[1]));
    const unsigned high = bits(__floats2bfloat162_rn(from[2], from[3]));
    __stwb(reinterpret_cast<uint2*>(to), make_uint2(low, high));
}

template <bool COMPLETE, class T>
__device__ __forceinline__ void store(T* to, const float (&from)[LANES], int count) {
    if (COMPLETE || count == LANES) {
        store_vector(to, from);
    } else {
#pragma unroll
        for (int lane = 0; lane < LANES; ++lane)
            if (lane < count) convert(to[lane], from[lane]);
    }
}

}  // namespace dalle2_fast::cuda

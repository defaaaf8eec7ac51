// What all epilogues need to know of a fragment: where its elements are, which of them count, and reductions
// over the lanes that share a row or a column.
#pragma once

#include <sm90/hardware.h>

#include <cstdint>

#include "sm90/pipeline.cuh"

namespace dalle2_fast::sm90 {

constexpr float LOG2E = 1.44269504f;

// The 64 x 256 part of a tile that one consumer computes.
struct ConsumerTile {
    int row, column;  // of its first product
    int column_tile;
    int buffer;    // which of the EpilogueBuffers it uses
    int64_t slot;  // index of this part among the parts of all tiles
};

// A thread's register 4 j + 2 h + b is at (fragment_row(h), fragment_column(j, b)) of the consumer's part;
// see FRAGMENT in hardware.h.
__device__ __forceinline__ int fragment_row(int half) {
    return thread_in_warpgroup() / 32 * 16 + lane_in_warp() / 4 + 8 * half;
}
__device__ __forceinline__ int fragment_column(int block, int bit) {
    return 8 * block + 2 * (lane_in_warp() % 4) + bit;
}

// The thread's element of row fragment_row(half) in that column. Registers cannot be indexed at run time.
__device__ __forceinline__ float select_element(const float (&fragment)[FRAGMENT], int half, int column) {
    float found = 0;
#pragma unroll
    for (int j = 0; j < 32; ++j) {
        if (column == fragment_column(j, 0)) found = fragment[4 * j + 2 * half];
        if (column == fragment_column(j, 1)) found = fragment[4 * j + 2 * half + 1];
    }
    return found;
}

// Which products exist, and which are positive pairs.
struct Mask {
    int rows, columns;
    int64_t diagonal_offset;  // column of row 0's positive

    // Whether the part contains an edge of the matrix or a positive pair, which few do.
    __device__ __forceinline__ bool applies_to(const ConsumerTile& tile) const {
        int64_t first_positive = tile.row + diagonal_offset - tile.column;
        return tile.row + CONSUMER_ROWS > rows || tile.column + TILE_COLUMNS > columns ||
               (first_positive < TILE_COLUMNS && first_positive + CONSUMER_ROWS > 0);
    }
    // The column in the tile of the positive that this thread holds for row fragment_row(half); -1 if it
    // holds none.
    __device__ __forceinline__ int positive_column(const ConsumerTile& tile, int half) const {
        int row = tile.row + fragment_row(half);
        int64_t column = row + diagonal_offset, in_tile = column - tile.column;
        bool here = row < rows && column < columns && in_tile >= 0 && in_tile < TILE_COLUMNS &&
                    in_tile / 2 % 4 == lane_in_warp() % 4;
        return here ? int(in_tile) : -1;
    }
};

// exp(L - shift) = 2^(scale log2(e) P - binary_shift). It is an integer, so the one fused multiply-add rounds
// once.
__host__ __device__ __forceinline__ float binary_shift(float scale) {
    return rintf((fabsf(scale) - 70.0f) * LOG2E);
}

// ------------------------------------------------------------------------------------------------ reductions

struct Add {
    __device__ __forceinline__ float operator()(float x, float y) const { return x + y; }
};
struct Maximum {
    __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
};

// Over the four lanes that hold a row.
template <class Operation>
__device__ __forceinline__ float reduce_row(float value, Operation operation) {
    value = operation(value, __shfl_xor_sync(~0u, value, 1));
    return operation(value, __shfl_xor_sync(~0u, value, 2));
}

// Half of the lanes that share a column keep the first half of the values, the others the second; each value
// is summed over both.
template <int KEPT>
__device__ __forceinline__ void sum_halves(float (&values)[16]) {
    bool upper = lane_in_warp() & 2 * KEPT;
#pragma unroll
    for (int i = 0; i < KEPT; ++i) {
        float sent = upper ? values[i] : values[i + KEPT];
        float kept = upper ? values[i + KEPT] : values[i];
        values[i] = kept + __shfl_xor_sync(~0u, sent, 2 * KEPT);
    }
}
// values[2 i + b], i < 8, belong to the columns fragment_column(8 part + i, b). Sums over the eight lanes
// that hold a column; values[0] and [1] then are those of columns 64 part + 2 lane + {0, 1}.
__device__ __forceinline__ void sum_columns(float (&values)[16]) {
    sum_halves<8>(values);
    sum_halves<4>(values);
    sum_halves<2>(values);
}

// Writes a warp's part of a sum over all products; every warp and tile has its slot in `partials`.
__device__ __forceinline__ void write_partial(float* partials, const ConsumerTile& tile, float value) {
#pragma unroll
    for (int bit = 16; bit >= 1; bit /= 2) value += __shfl_xor_sync(~0u, value, bit);
    if (lane_in_warp() == 0) partials[tile.slot * (WARPGROUP / 32) + thread_in_warpgroup() / 32] = value;
}

}  // namespace dalle2_fast::sm90

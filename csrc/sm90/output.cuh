// Writes a fragment of gradients in 16 bits: 16 bytes per thread and store.
#pragma once

#include <sm90/hardware.h>

#include <cstdint>

#include "sm90/fragment.cuh"

namespace dalle2_fast::sm90 {

__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 pair) {
    return *reinterpret_cast<uint32_t*>(&pair);
}
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return *reinterpret_cast<uint32_t*>(&pair); }
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
    return bits_of(__floats2bfloat162_rn(low, high));
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
    return bits_of(__floats2half2_rn(low, high));
}

// The matrix [rows, columns] of gradients of the logits.
template <class Element>
struct Output {
    Element* matrix;
    int64_t stride;
    int rows, columns;

    // The address of the first eight columns that this thread writes in row fragment_row(half).
    __device__ __forceinline__ Element* address(const ConsumerTile& tile, int half) const {
        int64_t row = tile.row + fragment_row(half);
        return matrix + row * stride + tile.column + 8 * (lane_in_warp() % 4);
    }

    // pairs[i] are the thread's two elements of row fragment_row(half) in block 4 part + i. The four lanes of
    // a row exchange theirs, so that each has eight neighbouring elements to write.
    template <bool MASKED>
    __device__ __forceinline__ void write(const ConsumerTile& tile, int half, int part, Element* address,
                                          uint32_t (&pairs)[4]) const {
        int lane = lane_in_warp();
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            uint32_t received = __shfl_xor_sync(~0u, lane & 1 ? pairs[i] : pairs[i + 1], 1);
            pairs[i] = lane & 1 ? received : pairs[i];
            pairs[i + 1] = lane & 1 ? pairs[i + 1] : received;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t received = __shfl_xor_sync(~0u, lane & 2 ? pairs[i] : pairs[i + 2], 2);
            pairs[i] = lane & 2 ? received : pairs[i];
            pairs[i + 2] = lane & 2 ? pairs[i + 2] : received;
        }
        Element* to = address + 32 * part;
        int row = tile.row + fragment_row(half), column = tile.column + 8 * (4 * part + lane % 4);
        if (!MASKED || (row < rows && column + 8 <= columns)) {
            *reinterpret_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
        } else if (row < rows) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                unsigned short element = static_cast<unsigned short>(pairs[i / 2] >> i % 2 * 16);
                if (column + i < columns) reinterpret_cast<unsigned short*>(to)[i] = element;
            }
        }
    }
};

}  // namespace dalle2_fast::sm90

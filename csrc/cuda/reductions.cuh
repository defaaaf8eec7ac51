// Reductions over a warp and over the partial sums of all blocks, each in one fixed order.
#pragma once

#include "cuda/tile.cuh"

namespace dalle2_fast::cuda {

struct Add {
    __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Maximum {  // drops a NaN
    __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// Lane l gets the reduction over the warp of values[l]. Each exchange halves both the number of values and
// the number of lanes that share a value.
template <class Operation>
__device__ __forceinline__ float reduce_transposed(float (&values)[BATCH], Operation operation) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 0; step < 5; ++step) {  // counted up: the compiler does not unroll a loop of half /= 2
        const int half = BATCH / 2 >> step;
        const bool upper = lane & half;
#pragma unroll
        for (int i = 0; i < BATCH / 2; ++i) {
            if (i >= half) break;
            const float kept = upper ? values[i + half] : values[i];
            const float sent = upper ? values[i] : values[i + half];
            values[i] = operation(kept, __shfl_xor_sync(~0u, sent, half));
        }
    }
    return values[0];
}

// The sum over the warp, in every lane.
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
    for (int step = 0; step < 5; ++step) value += __shfl_xor_sync(~0u, value, 16 >> step);
    return value;
}

// Block k adds the sum of partials[k, 0 .. count - 1] to sums[k].
__global__ void __launch_bounds__(THREADS) add_partials(const float* partials, int64_t count, double* sums) {
    __shared__ double threads[THREADS];
    double sum = 0;
    for (int64_t i = threadIdx.x; i < count; i += THREADS) sum += partials[blockIdx.x * count + i];
    threads[threadIdx.x] = sum;
    for (int half = THREADS / 2; half >= 1; half /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < half) threads[threadIdx.x] += threads[threadIdx.x + half];
    }
    if (threadIdx.x == 0) sums[blockIdx.x] += threads[0];
}

}  // namespace dalle2_fast::cuda

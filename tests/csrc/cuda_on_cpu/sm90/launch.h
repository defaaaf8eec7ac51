// csrc/sm90/launch.h on the CPU: launches on the model in machine.h, whose device the tests choose.
#pragma once

#include "hardware.h"

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
    std::memset(memory, value, bytes);
    return cudaSuccess;
}

namespace dalle2_fast::sm90 {

inline int64_t PARTIAL_BYTES = 128 << 20;

inline void check(cudaError_t error, const char* what) { machine::require(error == cudaSuccess, what); }
inline const char* why_device_unavailable() { return machine::options.why_unavailable; }
inline TensorMap make_tensor_map(const void* matrix, bool, int64_t rows, int64_t width, int64_t stride,
                                 int box_rows) {
    return {static_cast<const uint16_t*>(matrix), rows, width, stride, box_rows};
}

template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int64_t wanted, int blocks_per_cluster, int threads,
                     size_t shared_bytes, void*, const std::decay_t<Parameters>&... arguments) {
    using namespace machine;
    int clusters = int(std::min<int64_t>(wanted, options.clusters));
    require(clusters >= 1 && blocks_per_cluster * threads <= cuda_on_cpu::MAX_THREADS,
            "an impossible launch");
    std::function<void()> body = [&] { kernel(arguments...); };
    cuda_on_cpu::body = &body;
    if (fibers.size() < size_t(blocks_per_cluster * threads)) fibers.resize(blocks_per_cluster * threads);
    gridDim = dim3(clusters * blocks_per_cluster);
    blockDim = dim3(threads);
    threads_per_block = threads;
    for (int step = 0; step < clusters; ++step) {
        int cluster = options.descending ? clusters - 1 - step : step;
        machine::threads.assign(blocks_per_cluster * threads, {});
        blocks.assign(blocks_per_cluster, {});
        copies.clear();
        cluster_barrier = {};
        for (Block& block : blocks) {
            block.memory.resize(shared_bytes / sizeof(block.memory[0]) + 1);
            std::memset(static_cast<void*>(block.memory.data()), 0xff,
                        block.memory.size() * sizeof(block.memory[0]));
        }
        run_cluster(cluster * blocks_per_cluster);
        require(copies.empty(), "a block ended before its copies landed");
        for (const Thread& thread : machine::threads)
            require(thread.issued.empty() && thread.committed.empty(), "a thread ended before its products");
    }
}

}  // namespace dalle2_fast::sm90

// csrc/sm90/hardware.h on the CPU: the same functions, on the model in machine.h.
#pragma once

#include "machine.h"

#define __grid_constant__

namespace dalle2_fast::sm90 {

// ---------------------------------------------------------------------- shared memory, registers, arithmetic

inline unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(machine::this_block().memory.data());
}
inline uint32_t shared_address(const void* pointer) {
    auto offset = static_cast<const unsigned char*>(pointer) - dynamic_shared();
    machine::this_block().at(uint32_t(offset) + machine::SHARED_START, 1);
    return uint32_t(offset) + machine::SHARED_START;
}
template <int>
void setmaxnreg_decrease() {}
template <int>
void setmaxnreg_increase() {}

inline float fast_exp2(float x) {
    float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
}
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

// -------------------------------------------------------------------------------------------------- barriers

inline uint32_t cluster_rank() { return uint32_t(machine::rank()); }
inline void cluster_sync() {
    machine::arrive_and_wait(machine::cluster_barrier, int(machine::threads.size()));
}

inline void named_barrier_sync(int number, int threads) {
    machine::arrive_and_wait(machine::this_block().named[number], threads);
}
inline void named_barrier_arrive(int number, int threads) {
    machine::arrive(machine::this_block().named[number], threads, true);
}
inline bool named_barrier_all(int number, int threads, bool predicate) {
    machine::arrive_and_wait(machine::this_block().named[number], threads, predicate);
    return machine::this_block().named[number].result;
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
    machine::Mbarrier& made = machine::this_block().barriers[shared_address(barrier)];
    made = {};
    made.arrivals = made.pending = arrivals;
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
    machine::Mbarrier& here = machine::this_block().barrier(shared_address(barrier));
    here.bytes += bytes;
    here.arrive();
}
inline void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    machine::blocks.at(rank).barrier(shared_address(barrier)).arrive();
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    machine::Mbarrier& here = machine::this_block().barrier(shared_address(barrier));
    machine::wait_until([&here, parity] { return here.phase != parity; });
}

// ------------------------------------------------------------------------------------------------------- TMA

inline void tma_load_multicast(const TensorMap& map, void* destination, uint64_t* barrier, int column,
                               int row, uint16_t ranks) {
    machine::Copy copy = {&map, shared_address(destination), shared_address(barrier), column, row, ranks};
    if (machine::options.late_copies) machine::copies.push_back(copy);
    else machine::land(copy);
}
inline void tma_load(const TensorMap& map, void* destination, uint64_t* barrier, int column, int row) {
    tma_load_multicast(map, destination, barrier, column, row, uint16_t(1 << machine::rank()));
}

// ----------------------------------------------------------------------------------------------------- wgmma

inline uint64_t matrix_descriptor(const void* matrix) {
    return (shared_address(matrix) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

constexpr int FRAGMENT = 128;

template <class Element>
void wgmma(float (&accumulator)[FRAGMENT], uint64_t rows, uint64_t columns, bool accumulate) {
    static const auto values = machine::table([](uint16_t bits) {
        if constexpr (std::is_same_v<Element, __half>) return __half2float({bits});
        else return __bfloat162float({bits});
    });
    machine::Product product = {accumulator, rows, columns, accumulate, &values};
    if (!machine::options.late_products) return machine::compute(product);
    if (!accumulate) std::fill_n(accumulator, FRAGMENT, NAN);
    machine::this_thread().issued.push_back(product);
}
inline void warpgroup_fence_operand(float (&)[FRAGMENT]) {}
inline void wgmma_fence() { __syncwarp(); }
inline void wgmma_commit_group() {
    machine::Thread& thread = machine::this_thread();
    thread.committed.push_back(std::exchange(thread.issued, {}));
}
template <int PENDING>
void wgmma_wait_group() {
    machine::Thread& thread = machine::this_thread();
    for (; int(thread.committed.size()) > PENDING; thread.committed.pop_front())
        for (const machine::Product& product : thread.committed.front()) machine::compute(product);
    __syncwarp();
}

}  // namespace dalle2_fast::sm90

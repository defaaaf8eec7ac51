// csrc/sm90_hardware.h on the CPU: the same functions, modelled from what NVIDIA's PTX manual says of them.
//
// A cluster's blocks run together, a fiber each thread (cuda_runtime.h here). What is modelled:
//   mbarriers    arrivals and announced bytes of each phase; a wait whose phase never ends is a deadlock, an
//   arrival
//                too many an error
//   copies       boxes of a matrix, zeros outside of it, to one block or several, in the 128-byte swizzle:
//   16-byte
//                piece p of a 128-byte row goes to p xor (address / 128 % 8)
//   products     operands through their descriptors (start, 8-row stride, swizzle of the computed address),
//   results
//                in the fragment of wgmma m64n256k16, fp32 sums
// and the order of events is the worst that the rules allow: copies land at once (over features that are
// still needed, if a barrier lets them) or only when nobody can go on, in any order; products are computed
// when issued or as late as their wait. Shared memory begins as NaN, and so do sums that a product will
// overwrite.
//
// Not modelled: the fences between the proxies, the visibility of ordinary memory, register limits, speed.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <random>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#define __grid_constant__

inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t) {
    std::memset(place, value, bytes);
    return cudaSuccess;
}

namespace dalle2_fast::sm90 {

struct TensorMap {
    const uint16_t* matrix;
    int64_t rows, width, stride;
    int box_rows;
};

inline int64_t PARTIAL_BYTES = 128 << 20;

namespace machine {

using cuda_on_cpu::current;
using cuda_on_cpu::fibers;
using cuda_on_cpu::State;

struct Options {
    int clusters = 2;  // that run "at once"
    bool late_copies = false, late_products = false, descending = false;
    const char* obstacle = nullptr;
};
inline Options options;

inline void require(bool condition, const char* message) {
    if (!condition) throw std::runtime_error(message);
}

struct Barrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;

    void settle() {
        if (pending == 0 && bytes == 0) {
            phase ^= 1;
            pending = arrivals;
        }
    }
};

struct NamedBarrier {
    int come = 0;
    int64_t generation = 0;
    bool all = true, result = true;
};

constexpr uint32_t SHARED_START = 1024;  // the first kilobyte is the system's

struct Block {
    std::vector<cuda_on_cpu::Line> memory;
    std::map<uint32_t, Barrier> barriers;
    NamedBarrier named[16];

    uint8_t* at(uint32_t address, size_t bytes) {
        require(
            address >= SHARED_START && address - SHARED_START + bytes <= memory.size() * sizeof(memory[0]),
            "an address outside of shared memory");
        return reinterpret_cast<uint8_t*>(memory.data()) + (address - SHARED_START);
    }
    Barrier& barrier(uint32_t address) {
        auto found = barriers.find(address);
        require(found != barriers.end(), "an mbarrier that was not initialised");
        return found->second;
    }
};

struct Copy {
    const TensorMap* map;
    uint32_t place, barrier;
    int column, row, ranks;
};

struct Product {
    float* sums;
    uint64_t rows, columns;
    bool add;
    const std::array<float, 65536>* values;
};

struct Thread {
    std::function<bool()> until;  // goes on once this is true
    std::vector<Product> issued;
    std::deque<std::vector<Product>> committed;
};

inline std::vector<Block> blocks;
inline std::vector<Thread> threads;
inline std::vector<Copy> copies;
inline NamedBarrier cluster_barrier;
inline int threads_per_block;
inline std::minstd_rand random;

inline int rank() { return current / threads_per_block; }
inline Block& here() { return blocks[rank()]; }

inline void wait_until(std::function<bool()> condition) {
    threads[current].until = std::move(condition);
    cuda_on_cpu::wait(State::ready);
}

inline void swizzled_write(Block& block, uint32_t address, uint16_t value) {
    address ^= (address >> 7 & 7) << 4;
    std::memcpy(block.at(address, 2), &value, 2);
}

inline void land(const Copy& copy) {
    require(copy.place % 1024 == 0, "a swizzled box has to begin at a multiple of 1024 bytes");
    require(reinterpret_cast<uintptr_t>(copy.map->matrix) % 16 == 0 && copy.map->stride % 8 == 0,
            "the copy engine needs multiples of 16 bytes");
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
        if (!(copy.ranks >> rank & 1)) continue;
        for (int row = 0; row < copy.map->box_rows; ++row)
            for (int column = 0; column < 64; ++column) {
                int64_t y = int64_t(copy.row) + row, x = int64_t(copy.column) + column;
                bool inside = y >= 0 && y < copy.map->rows && x >= 0 && x < copy.map->width;
                swizzled_write(blocks[rank], copy.place + row * 128 + column * 2,
                               inside ? copy.map->matrix[y * copy.map->stride + x] : 0);
            }
        Barrier& barrier = blocks[rank].barrier(copy.barrier);
        barrier.bytes -= int64_t(copy.map->box_rows) * 128;
        barrier.settle();
    }
}

inline float operand(uint64_t descriptor, int row, int k, const std::array<float, 65536>& values) {
    uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
            "a descriptor without the 128-byte swizzle");
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, here().at(address, 2), 2);
    return values[bits];
}

inline void compute(const Product& product) {  // the running thread's part
    int thread = current % 128, lane = thread % 32;
    for (int half = 0; half < 2; ++half) {
        float row[16];
        for (int k = 0; k < 16; ++k)
            row[k] = operand(product.rows, thread / 32 * 16 + lane / 4 + 8 * half, k, *product.values);
        for (int i = 0; i < 64; ++i) {
            int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2, number = 4 * (i / 2) + 2 * half + i % 2;
            float sum = product.add ? product.sums[number] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += row[k] * operand(product.columns, column, k, *product.values);
            product.sums[number] = sum;
        }
    }
}

inline std::array<float, 65536> table(float (*value_of)(uint16_t)) {
    std::array<float, 65536> values;
    for (int bits = 0; bits < 65536; ++bits) values[bits] = value_of(uint16_t(bits));
    return values;
}

inline void run_cluster(int first_block) {
    int count = int(threads.size());
    for (int i = 0; i < count; ++i) {
        cuda_on_cpu::Fiber& fiber = fibers[i];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = cuda_on_cpu::STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, cuda_on_cpu::enter, 0);
        fiber.state = State::ready;
    }
    bool everyone = true;  // or about half the warps: else all would keep in step, and need no barrier
    std::vector<bool> rests(count / 32);
    for (;;) {
        bool moved = false, all_done = true;
        for (size_t warp = 0; warp < rests.size(); ++warp) rests[warp] = !everyone && random() / 16 % 2;
        for (int step = 0; step < count; ++step) {
            int i = options.descending ? count - 1 - step : step;
            current = i;
            if (!rests[i / 32] && fibers[i].state == State::ready &&
                (!threads[i].until || threads[i].until())) {
                threads[i].until = nullptr;
                threadIdx = dim3(i % threads_per_block);
                blockIdx = dim3(first_block + i / threads_per_block);
                swapcontext(&cuda_on_cpu::scheduler, &fibers[i].context);
                if (cuda_on_cpu::failure)
                    std::rethrow_exception(std::exchange(cuda_on_cpu::failure, nullptr));
                moved = true;
            }
            all_done = all_done && fibers[i].state == State::done;
        }
        if (all_done) return;
        for (int first = 0; first < count; first += 32)
            moved |= cuda_on_cpu::release(first, first + 32, State::at_warp_barrier);
        bool stuck = everyone && !moved;
        everyone = !moved;
        if (stuck) {
            require(!copies.empty(), "deadlock: every thread waits, and no copy is under way");
            std::swap(copies[random() % copies.size()], copies.back());
            Copy copy = copies.back();
            copies.pop_back();
            land(copy);
        }
    }
}

}  // namespace machine

// -------------------------------------------------------------------------------------- shared memory, roles

inline unsigned char* dynamic_shared() {
    return reinterpret_cast<unsigned char*>(machine::here().memory.data());
}
inline uint32_t shared_address(const void* place) {
    auto offset = static_cast<const unsigned char*>(place) - dynamic_shared();
    machine::here().at(uint32_t(offset) + machine::SHARED_START, 1);
    return uint32_t(offset) + machine::SHARED_START;
}
template <int>
void give_up_registers() {}
template <int>
void take_registers() {}

inline float fast_exp2(float x) {
    float result = std::exp2(x);
    return result < 0x1p-126f ? 0.0f : result;
}
inline float fast_log2(float x) { return std::log2(x); }
inline float fast_reciprocal(float x) { return 1 / x; }

// -------------------------------------------------------------------------------------------------- barriers

inline uint32_t cluster_rank() { return uint32_t(machine::rank()); }

namespace machine {

inline void come(NamedBarrier& barrier, int expected, bool mine) {
    barrier.all = barrier.all && mine;
    require(++barrier.come <= expected, "too many threads at a barrier");
    if (barrier.come == expected) {
        barrier.result = std::exchange(barrier.all, true);
        barrier.come = 0;
        ++barrier.generation;
    }
}
inline void come_and_wait(NamedBarrier& barrier, int expected, bool mine = true) {
    int64_t generation = barrier.generation;
    come(barrier, expected, mine);
    wait_until([&barrier, generation] { return barrier.generation != generation; });
}

}  // namespace machine

inline void cluster_sync() { machine::come_and_wait(machine::cluster_barrier, int(machine::threads.size())); }
inline void named_sync(int number, int threads) {
    machine::come_and_wait(machine::here().named[number], threads);
}
inline void named_arrive(int number, int threads) {
    machine::come(machine::here().named[number], threads, true);
}
inline bool named_all(int number, int threads, bool mine) {
    machine::come_and_wait(machine::here().named[number], threads, mine);
    return machine::here().named[number].result;
}

inline void barrier_init(uint64_t* barrier, int arrivals) {
    machine::Barrier& made = machine::here().barriers[shared_address(barrier)];
    made = {};
    made.arrivals = made.pending = arrivals;
}
inline void barrier_init_done() {}
inline void arrive(machine::Barrier& barrier) {
    machine::require(--barrier.pending >= 0, "too many arrivals at an mbarrier");
    barrier.settle();
}
inline void barrier_announce(uint64_t* barrier, uint32_t bytes) {
    machine::Barrier& here = machine::here().barrier(shared_address(barrier));
    here.bytes += bytes;
    arrive(here);
}
inline void barrier_arrive(uint64_t* barrier, uint32_t rank) {
    arrive(machine::blocks.at(rank).barrier(shared_address(barrier)));
}
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
    machine::Barrier& here = machine::here().barrier(shared_address(barrier));
    machine::wait_until([&here, parity] { return here.phase != parity; });
}

// ----------------------------------------------------------------------------------------------- copy engine

inline void copy_box_to_all(const TensorMap& map, void* place, uint64_t* barrier, int column, int row,
                            uint16_t ranks) {
    machine::Copy copy = {&map, shared_address(place), shared_address(barrier), column, row, ranks};
    if (machine::options.late_copies) machine::copies.push_back(copy);
    else machine::land(copy);
}
inline void copy_box(const TensorMap& map, void* place, uint64_t* barrier, int column, int row) {
    copy_box_to_all(map, place, barrier, column, row, uint16_t(1 << machine::rank()));
}

// ---------------------------------------------------------------------------------------------- tensor cores

inline uint64_t matrix_descriptor(const void* place) {
    return (shared_address(place) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

constexpr int FRAGMENT = 128;

template <class Element>
void multiply(float (&sums)[FRAGMENT], uint64_t rows, uint64_t columns, bool add) {
    static const auto values = machine::table([](uint16_t bits) {
        if constexpr (std::is_same_v<Element, __half>) return __half2float({bits});
        else return __bfloat162float({bits});
    });
    machine::Product product = {sums, rows, columns, add, &values};
    if (!machine::options.late_products) return machine::compute(product);
    if (!add) std::fill_n(sums, FRAGMENT, NAN);
    machine::threads[cuda_on_cpu::current].issued.push_back(product);
}
inline void multiply_border(float (&)[FRAGMENT]) {}
inline void multiply_begin() { __syncwarp(); }
inline void multiply_commit() {
    machine::Thread& thread = machine::threads[cuda_on_cpu::current];
    thread.committed.push_back(std::exchange(thread.issued, {}));
}
template <int LEFT>
void multiply_wait() {
    machine::Thread& thread = machine::threads[cuda_on_cpu::current];
    for (; int(thread.committed.size()) > LEFT; thread.committed.pop_front())
        for (const machine::Product& product : thread.committed.front()) machine::compute(product);
    __syncwarp();
}

// ------------------------------------------------------------------------------------------------------ host

inline void check(cudaError_t error, const char* what) { machine::require(error == cudaSuccess, what); }
inline const char* device_obstacle() { return machine::options.obstacle; }
inline TensorMap tensor_map(const void* matrix, bool, int64_t rows, int64_t width, int64_t stride,
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

// A model of Hopper on the CPU, from what NVIDIA's PTX manual says: clusters, mbarriers, TMA and wgmma.
//
// The blocks of a cluster run together, each thread as a fiber (cuda_runtime.h). What is modelled:
//   mbarriers  arrivals and expected bytes of each phase; a wait for a phase that never completes is a
//              deadlock, and an arrival too many is an error
//   TMA        boxes of a matrix, with zeros outside of it, to one block or several, in the 128-byte swizzle:
//              the 16-byte piece p of a 128-byte row goes to p xor (address / 128 % 8)
//   wgmma      operands through their descriptors (start, stride of 8 rows, swizzle of the computed address),
//              results in the fragment of m64n256k16, float32 sums
// The order of events is the worst that the rules allow. Copies land at once (over features that are still
// needed, if a barrier lets them), or only when no thread can go on, in any order. Products are computed when
// they are issued, or as late as their wait. Shared memory begins as NaN, and so do accumulators that a
// product will overwrite.
//
// Not modelled: the fences between the proxies, the visibility of ordinary memory, register limits, speed.
#pragma once

#include <array>
#include <deque>
#include <functional>
#include <map>
#include <random>
#include <vector>

#include "../cuda_bf16.h"
#include "../cuda_fp16.h"
#include "../cuda_runtime.h"

namespace dalle2_fast::sm90 {

struct TensorMap {
    const uint16_t* matrix;
    int64_t rows, width, stride;
    int box_rows;
};

namespace machine {

using cuda_on_cpu::current;
using cuda_on_cpu::fibers;
using cuda_on_cpu::State;

struct Options {
    int clusters = 2;  // that run "at the same time"
    bool late_copies = false, late_products = false, descending = false;
    const char* why_unavailable = nullptr;
};
inline Options options;

inline void require(bool condition, const char* message) {
    if (!condition) throw std::runtime_error(message);
}

struct Mbarrier {
    int arrivals = 0, pending = 0;
    int64_t bytes = 0;
    uint32_t phase = 0;

    void complete_phase() {  // if it is complete
        if (pending == 0 && bytes == 0) {
            phase ^= 1;
            pending = arrivals;
        }
    }
    void arrive() {
        require(--pending >= 0, "too many arrivals at an mbarrier");
        complete_phase();
    }
};

struct NamedBarrier {
    int arrived = 0;
    int64_t generation = 0;
    bool all = true, result = true;
};

constexpr uint32_t SHARED_START = 1024;  // the system uses the first kilobyte

struct Block {
    std::vector<cuda_on_cpu::Line> memory;
    std::map<uint32_t, Mbarrier> barriers;
    NamedBarrier named[16];

    uint8_t* at(uint32_t address, size_t bytes) {
        require(
            address >= SHARED_START && address - SHARED_START + bytes <= memory.size() * sizeof(memory[0]),
            "an address outside of shared memory");
        return reinterpret_cast<uint8_t*>(memory.data()) + (address - SHARED_START);
    }
    Mbarrier& barrier(uint32_t address) {
        auto found = barriers.find(address);
        require(found != barriers.end(), "an mbarrier that was not initialised");
        return found->second;
    }
};

struct Copy {
    const TensorMap* map;
    uint32_t destination, barrier;
    int column, row, ranks;
};

struct Product {
    float* accumulator;
    uint64_t rows, columns;
    bool accumulate;
    const std::array<float, 65536>* values;
};

struct Thread {
    std::function<bool()> until;  // it goes on once this is true
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
inline Block& this_block() { return blocks[rank()]; }
inline Thread& this_thread() { return threads[current]; }

inline void wait_until(std::function<bool()> condition) {
    this_thread().until = std::move(condition);
    cuda_on_cpu::wait(State::ready);
}

inline void arrive(NamedBarrier& barrier, int expected, bool predicate) {
    barrier.all = barrier.all && predicate;
    require(++barrier.arrived <= expected, "too many threads at a barrier");
    if (barrier.arrived == expected) {
        barrier.result = std::exchange(barrier.all, true);
        barrier.arrived = 0;
        ++barrier.generation;
    }
}
inline void arrive_and_wait(NamedBarrier& barrier, int expected, bool predicate = true) {
    int64_t generation = barrier.generation;
    arrive(barrier, expected, predicate);
    wait_until([&barrier, generation] { return barrier.generation != generation; });
}

// --------------------------------------------------------------------------------------------- TMA and wgmma

inline void swizzled_write(Block& block, uint32_t address, uint16_t value) {
    address ^= (address >> 7 & 7) << 4;
    std::memcpy(block.at(address, 2), &value, 2);
}

inline void land(const Copy& copy) {
    require(copy.destination % 1024 == 0, "a swizzled box has to begin at a multiple of 1024 bytes");
    require(reinterpret_cast<uintptr_t>(copy.map->matrix) % 16 == 0 && copy.map->stride % 8 == 0,
            "TMA needs multiples of 16 bytes");
    for (size_t rank = 0; rank < blocks.size(); ++rank) {
        if (!(copy.ranks >> rank & 1)) continue;
        for (int row = 0; row < copy.map->box_rows; ++row)
            for (int column = 0; column < 64; ++column) {
                int64_t y = int64_t(copy.row) + row, x = int64_t(copy.column) + column;
                bool inside = y >= 0 && y < copy.map->rows && x >= 0 && x < copy.map->width;
                swizzled_write(blocks[rank], copy.destination + row * 128 + column * 2,
                               inside ? copy.map->matrix[y * copy.map->stride + x] : 0);
            }
        Mbarrier& barrier = blocks[rank].barrier(copy.barrier);
        barrier.bytes -= int64_t(copy.map->box_rows) * 128;
        barrier.complete_phase();
    }
}

inline float operand(uint64_t descriptor, int row, int k, const std::array<float, 65536>& values) {
    uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    require(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0,
            "a descriptor without the 128-byte swizzle");
    uint32_t address = start + row / 8 * stride + row % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, this_block().at(address, 2), 2);
    return values[bits];
}

inline void compute(const Product& product) {  // the running thread's fragment
    int thread = current % 128, lane = thread % 32;
    for (int half = 0; half < 2; ++half) {
        float row[16];
        for (int k = 0; k < 16; ++k)
            row[k] = operand(product.rows, thread / 32 * 16 + lane / 4 + 8 * half, k, *product.values);
        for (int i = 0; i < 64; ++i) {
            int column = 8 * (i / 2) + 2 * (lane % 4) + i % 2, number = 4 * (i / 2) + 2 * half + i % 2;
            float sum = product.accumulate ? product.accumulator[number] : 0.0f;
            for (int k = 0; k < 16; ++k) sum += row[k] * operand(product.columns, column, k, *product.values);
            product.accumulator[number] = sum;
        }
    }
}

inline std::array<float, 65536> table(float (*value_of)(uint16_t)) {
    std::array<float, 65536> values;
    for (int bits = 0; bits < 65536; ++bits) values[bits] = value_of(uint16_t(bits));
    return values;
}

// ------------------------------------------------------------------------------------------------- a cluster

inline void run_cluster(int first_block) {
    int count = int(threads.size());
    for (int i = 0; i < count; ++i) cuda_on_cpu::start(fibers[i]);
    // All warps run, or about half of them: otherwise all would keep in step, and would need no barrier.
    bool everyone = true;
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
                cuda_on_cpu::resume(fibers[i]);
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
}  // namespace dalle2_fast::sm90

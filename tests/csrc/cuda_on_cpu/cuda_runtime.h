// CUDA's runtime header for a machine without CUDA: the unmodified kernels of csrc/ run on the CPU.
//
//   g++ -x c++ -std=c++17 -I tests/csrc/cuda_on_cpu -I csrc csrc/cuda/contrastive.cu
//
// Blocks run one after another. Each thread of a block is a fiber that runs until it meets a barrier or a
// shuffle; then the next one runs. This checks indices, masks, arithmetic, the order of a reduction, barriers
// that not all threads reach, misaligned vector accesses (through __ldg, __ldcs, __ldcg, __stwb, __stcs and
// __stcg) and, because the threads and blocks run in both orders (`descending`), most missing barriers. It
// does not check real races, the rounding of the fast intrinsics, speed, asynchronous copies or tensor cores.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another, so one block at a time uses the variable
#define __align__(n) alignas(n)

// ------------------------------------------------------------------------------------------------ types

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

using std::max;
using std::min;

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes = 0;
    cudaStream_t stream = nullptr;
    cudaLaunchAttribute* attrs = nullptr;
    unsigned numAttrs = 0;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

// --------------------------------------------------------------------------------------------- emulator

namespace cuda_on_cpu {

constexpr int WARP = 32, MAX_THREADS = 1024;
constexpr size_t STACK = 1 << 16;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state = State::ready;
    int exchanges = 0;  // since the block started
};

inline bool descending = false;  // the order of the blocks, and of the threads of a block
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline int current;                        // the running fiber = the number of its thread in the block
inline const std::function<void()>* body;  // what each fiber runs
inline std::exception_ptr failure;
// One word per thread for shuffles and votes. Two alternate, because no thread is more than one exchange
// ahead of another.
inline uint64_t exchanged[2][MAX_THREADS];
struct alignas(1024) Line { char bytes[1024]; };
inline std::vector<Line> dynamic_memory;

inline void* dynamic_shared() { return dynamic_memory.data(); }

inline void wait(State state) {
    int thread = current;
    fibers[thread].state = state;
    swapcontext(&fibers[thread].context, &scheduler);
}

inline void enter() {
    try {
        (*body)();
    } catch (...) {  // an exception must not leave the stack of its fiber
        failure = std::current_exception();
    }
    wait(State::done);
}

inline void start(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.state = State::ready;
    fiber.exchanges = 0;
}

// Runs a fiber, which has to be the current one, until it waits.
inline void resume(Fiber& fiber) {
    swapcontext(&scheduler, &fiber.context);
    if (failure) std::rethrow_exception(std::exchange(failure, nullptr));
}

// Releases the threads first <= i < last from the barrier `state`, if all of them have reached it or ended.
inline bool release(int first, int last, State state) {
    bool some = false;
    for (int i = first; i < last; ++i) {
        if (fibers[i].state == state) some = true;
        else if (fibers[i].state != State::done) return false;
    }
    for (int i = first; some && i < last; ++i)
        if (fibers[i].state == state) fibers[i].state = State::ready;
    return some;
}

inline void run_block(int threads) {
    for (int i = 0; i < threads; ++i) start(fibers[i]);
    for (;;) {
        bool moved = false, all_done = true;
        for (int step = 0; step < threads; ++step) {
            int i = descending ? threads - 1 - step : step;
            if (fibers[i].state == State::ready) {
                current = i;
                threadIdx = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
                resume(fibers[i]);
                moved = true;
            }
            all_done = all_done && fibers[i].state == State::done;
        }
        if (all_done) return;
        for (int first = 0; first < threads; first += WARP)
            moved |= release(first, std::min(first + WARP, threads), State::at_warp_barrier);
        moved |= release(0, threads, State::at_block_barrier);
        if (!moved) throw std::runtime_error("deadlock: a barrier that not all threads reach");
    }
}

inline void run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
    int threads = block.x * block.y * block.z;
    if (threads < 1 || threads > MAX_THREADS)
        throw std::runtime_error("a block without threads or with too many");
    if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        throw std::runtime_error("an empty or too large grid");
    if (fibers.size() < size_t(threads)) fibers.resize(threads);
    dynamic_memory.resize(shared_bytes / sizeof(Line) + 1);
    body = &kernel;
    gridDim = grid;
    blockDim = block;
    int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    for (int64_t step = 0; step < blocks; ++step) {
        int64_t i = descending ? blocks - 1 - step : step;
        blockIdx = dim3(i % grid.x, i / grid.x % grid.y, i / (int64_t(grid.x) * grid.y));
        run_block(threads);
    }
}

// Every thread of a warp publishes a value; then `read` gets a function that returns the value of any lane.
template <class T, class Read>
auto with_warp(T value, Read read) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t* words = exchanged[fibers[current].exchanges++ % 2];
    words[current] = 0;
    std::memcpy(&words[current], &value, sizeof(T));
    wait(State::at_warp_barrier);
    return read([words](int lane) {
        T other;
        std::memcpy(&other, &words[current / WARP * WARP + lane % WARP], sizeof(T));
        return other;
    });
}

template <class T>
T* aligned(T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) throw std::runtime_error("a misaligned access");
    return address;
}

}  // namespace cuda_on_cpu

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    cuda_on_cpu::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                     [&] { kernel(Parameters(arguments)...); });
    return cudaSuccess;
}

// ----------------------------------------------------------------------------- functions that kernels call

inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::State::at_block_barrier); }
inline void __syncwarp(unsigned = ~0u) { cuda_on_cpu::wait(cuda_on_cpu::State::at_warp_barrier); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return cuda_on_cpu::with_warp(value, [=](auto of) { return of(lane & 31); });
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    int lane = cuda_on_cpu::current % cuda_on_cpu::WARP;
    return cuda_on_cpu::with_warp(value, [=](auto of) { return of(lane ^ mask); });
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
    int lane = cuda_on_cpu::current % cuda_on_cpu::WARP;
    int source = lane + delta < 32 ? lane + delta : lane;
    return cuda_on_cpu::with_warp(value, [=](auto of) { return of(source); });
}
inline unsigned __ballot_sync(unsigned, int predicate) {
    return cuda_on_cpu::with_warp(predicate, [](auto of) {
        unsigned bits = 0;
        for (int lane = 0; lane < 32; ++lane) bits |= unsigned(of(lane) != 0) << lane;
        return bits;
    });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == ~0u; }

template <class T> T __ldg(const T* address) { return *cuda_on_cpu::aligned(address); }
template <class T> T __ldcs(const T* address) { return *cuda_on_cpu::aligned(address); }
template <class T> T __ldcg(const T* address) { return *cuda_on_cpu::aligned(address); }
template <class T> void __stwb(T* address, T value) { *cuda_on_cpu::aligned(address) = value; }
template <class T> void __stcs(T* address, T value) { *cuda_on_cpu::aligned(address) = value; }
template <class T> void __stcg(T* address, T value) { *cuda_on_cpu::aligned(address) = value; }

inline float __fmul_rn(float x, float y) { return x * y; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline float __int_as_float(int bits) { return __uint_as_float(unsigned(bits)); }

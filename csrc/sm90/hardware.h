// Hopper's instructions under the names of the PTX manual. Nothing here knows what is computed.
//
// The kernels include this file as <sm90/hardware.h>. The tests put a file of the same name before it, which
// models the same functions on the CPU (tests/csrc/cuda_on_cpu/sm90).
#pragma once

#include <cuda.h>  // types only: the library is reached through cudart
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma needs the target sm_90a: plain sm_90 does not have it"
#endif

namespace dalle2_fast::sm90 {

// ---------------------------------------------------------------------- shared memory, registers, arithmetic

extern __shared__ __align__(1024) unsigned char dynamic_memory[];
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_memory; }

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// All four warps of a warpgroup must execute setmaxnreg together.
template <int COUNT>
__device__ __forceinline__ void setmaxnreg_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void setmaxnreg_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// 2^x with a relative error of about 2^-22; results below 2^-126 are 0.
__device__ __forceinline__ float fast_exp2(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ float fast_log2(float x) {
    float result;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}
__device__ __forceinline__ float fast_reciprocal(float x) {
    float result;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// -------------------------------------------------------------------------------------------------- barriers

__device__ __forceinline__ uint32_t cluster_rank() {  // of this block in its cluster
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barrier `number` (1..15) of `threads` threads of a block: arrive and wait, or only arrive, or wait for the
// conjunction of all threads' predicates.
__device__ __forceinline__ void named_barrier_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ bool named_barrier_all(int number, int threads, bool predicate) {
    int all;
    asm volatile(
        "{\n\t.reg .pred p, q;\n\tsetp.ne.s32 p, %3, 0;\n\t"
        "bar.red.and.pred q, %1, %2, p;\n\tselp.s32 %0, 1, 0, q;\n\t}"
        : "=r"(all)
        : "r"(number), "r"(threads), "r"(int(predicate))
        : "memory");
    return all != 0;
}

// The phase of an mbarrier completes when `arrivals` threads have arrived and all expected bytes have come.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
// Makes the initialisation visible to the cluster and to TMA.
__device__ __forceinline__ void mbarrier_init_fence() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
// Arrives at the barrier of block `rank` of the cluster.
__device__ __forceinline__ void mbarrier_arrive_remote(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "{\n\t.reg .b32 remote;\n\tmapa.shared::cluster.u32 remote, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
// Waits until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n\t.reg .pred done;\n\tagain:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ------------------------------------------------------------------------------------------------------- TMA

using TensorMap = CUtensorMap;

// Copies the map's box at (column, row) to `destination` in this block. `barrier` counts its bytes. Elements
// outside the tensor are zeros.
__device__ __forceinline__ void tma_load(const TensorMap& map, void* destination, uint64_t* barrier,
                                         int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}
// The same, to `destination` and `barrier` of every block of the cluster whose bit is set in `ranks`.
__device__ __forceinline__ void tma_load_multicast(const TensorMap& map, void* destination,
                                                   uint64_t* barrier, int column, int row, uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(destination)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(ranks)
        : "memory");
}

// ----------------------------------------------------------------------------------------------------- wgmma

// Of a matrix with rows of 128 bytes in the 128-byte swizzle: in each 1024 bytes (8 rows) the 16-byte pieces
// of row r are permuted by xor with r % 8.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* matrix) {
    uint64_t descriptor = (shared_address(matrix) & 0x3ffff) >> 4;
    descriptor |= uint64_t(1) << 16;          // leading byte offset: not used by this layout
    descriptor |= uint64_t(1024 >> 4) << 32;  // stride byte offset: from 8 rows to the next 8
    descriptor |= uint64_t(1) << 62;          // 128-byte swizzle
    return descriptor;
}

// Accumulator registers of a thread for the 64 x 256 products of its warpgroup. Thread t holds, in register
// 4 j + 2 h + b, row 16 (t / 32) + t % 32 / 4 + 8 h and column 8 j + 2 (t % 4) + b.
constexpr int FRAGMENT = 128;

#define EIGHT(i)                                                                                           \
    "+f"(accumulator[i]), "+f"(accumulator[i + 1]), "+f"(accumulator[i + 2]), "+f"(accumulator[i + 3]),    \
        "+f"(accumulator[i + 4]), "+f"(accumulator[i + 5]), "+f"(accumulator[i + 6]),                      \
        "+f"(accumulator[i + 7])
#define WHOLE_ACCUMULATOR                                                                            \
    EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64), \
        EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)
#define WGMMA(type)                                                                                         \
    asm volatile(                                                                                           \
        "{\n\t.reg .pred add;\n\tsetp.ne.b32 add, %130, 0;\n\t"                                             \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                        \
        " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                          \
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
        "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
        "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, " \
        "%128, %129, add, 1, 1, 0, 0;\n\t}"                                                                 \
        : WHOLE_ACCUMULATOR                                                                                 \
        : "l"(rows), "l"(columns), "r"(int(accumulate)))

// accumulator = or += the product of 64 rows and 256 columns over 16 of the width, asynchronously:
// wgmma_wait_group says when it is complete. `rows` and `columns` are matrix descriptors.
template <class Element>
__device__ __forceinline__ void wgmma(float (&accumulator)[FRAGMENT], uint64_t rows, uint64_t columns,
                                      bool accumulate);
template <>
__device__ __forceinline__ void wgmma<__nv_bfloat16>(float (&accumulator)[FRAGMENT], uint64_t rows,
                                                     uint64_t columns, bool accumulate) {
    WGMMA("bf16");
}
template <>
__device__ __forceinline__ void wgmma<__half>(float (&accumulator)[FRAGMENT], uint64_t rows, uint64_t columns,
                                              bool accumulate) {
    WGMMA("f16");
}
// The compiler does not move accesses of the accumulator across this fence.
__device__ __forceinline__ void warpgroup_fence_operand(float (&accumulator)[FRAGMENT]) {
    asm volatile("" : WHOLE_ACCUMULATOR::"memory");
}
#undef WGMMA
#undef WHOLE_ACCUMULATOR
#undef EIGHT

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit_group() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int PENDING>  // waits until at most PENDING committed groups of this warp are still running
__device__ __forceinline__ void wgmma_wait_group() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

}  // namespace dalle2_fast::sm90

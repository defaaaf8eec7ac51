// Hopper's instructions under plain names, and the host's part of a launch. Nothing here knows what it
// computes.
//
// contrastive_sm90.cu includes this as <sm90_hardware.h>; the tests put a file of the same name before it,
// where the same functions are modelled on the CPU (tests/cuda_on_cpu).
#pragma once

#include <cuda.h>  // types only: the library is reached through cudart
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#error "wgmma needs the target sm_90a: plain sm_90 does not have it"
#endif

namespace dalle2_fast::sm90 {

// -------------------------------------------------------------------------------------- shared memory, roles

extern __shared__ __align__(1024) unsigned char dynamic_memory[];
__device__ __forceinline__ unsigned char* dynamic_shared() { return dynamic_memory; }

__device__ __forceinline__ uint32_t shared_address(const void* place) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(place));
}

// A register count can be changed only by all four warps of a warpgroup together.
template <int COUNT>
__device__ __forceinline__ void give_up_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// 2^x to about 2^-22, results below 2^-126 are 0.
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

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barrier `number` (1..15) of `threads` threads of a block: wait for the others, or only be counted.
__device__ __forceinline__ void named_sync(int number, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int number, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
__device__ __forceinline__ bool named_all(int number, int threads, bool mine) {
    int all;
    asm volatile(
        "{\n\t.reg .pred p, q;\n\tsetp.ne.s32 p, %3, 0;\n\t"
        "bar.red.and.pred q, %1, %2, p;\n\tselp.s32 %0, 1, 0, q;\n\t}"
        : "=r"(all)
        : "r"(number), "r"(threads), "r"(int(mine))
        : "memory");
    return all != 0;
}

// An mbarrier's phase ends when `arrivals` threads have arrived and all bytes that were announced have come.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
                 : "memory");
}
__device__ __forceinline__ void barrier_init_done() {  // visible to the cluster and to the copy engine
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_announce(uint64_t* barrier, uint32_t bytes) {  // and arrive
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier,
                                               uint32_t rank) {  // at that block of the cluster
    asm volatile(
        "{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(shared_address(barrier)),
        "r"(rank)
        : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier,
                                             uint32_t parity) {  // for the end of that phase
    asm volatile(
        "{\n\t.reg .pred done;\n\tagain:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(
            shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ----------------------------------------------------------------------------------------------- copy engine

using TensorMap = CUtensorMap;

// The map's box at (column, row) to `place` here; the barrier counts its bytes. Outside the tensor: zeros.
__device__ __forceinline__ void copy_box(const TensorMap& map, void* place, uint64_t* barrier, int column,
                                         int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], "
        "[%2];" ::"r"(shared_address(place)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row)
        : "memory");
}
// The same to `place` and `barrier` of every block of the cluster in `ranks`, a bit each.
__device__ __forceinline__ void copy_box_to_all(const TensorMap& map, void* place, uint64_t* barrier,
                                                int column, int row, uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(shared_address(place)),
        "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "h"(ranks)
        : "memory");
}

// ---------------------------------------------------------------------------------------------- tensor cores

// Rows of 128 bytes, 8 rows to a swizzled block of 1024: the 16-byte pieces of row r are permuted by xor r
// % 8.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* place) {
    uint64_t descriptor = (shared_address(place) & 0x3ffff) >> 4;
    descriptor |= uint64_t(1) << 16;          // leading offset: not used by this layout
    descriptor |= uint64_t(1024 >> 4) << 32;  // from 8 rows to the next 8
    descriptor |= uint64_t(1) << 62;          // 128-byte swizzle
    return descriptor;
}

constexpr int FRAGMENT = 128;  // a thread's part of 64 x 256 numbers

// Thread t of the warpgroup holds, at 4 j + 2 h + b, row 16 (t / 32) + t % 32 / 4 + 8 h, column 8 j + 2 (t %
// 4) + b.
#define EIGHT(i)                                                                               \
    "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
        "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define ALL_SUMS                                                                                     \
    EIGHT(0), EIGHT(8), EIGHT(16), EIGHT(24), EIGHT(32), EIGHT(40), EIGHT(48), EIGHT(56), EIGHT(64), \
        EIGHT(72), EIGHT(80), EIGHT(88), EIGHT(96), EIGHT(104), EIGHT(112), EIGHT(120)
#define MULTIPLY(type)                                                                                      \
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
        : ALL_SUMS                                                                                          \
        : "l"(rows), "l"(columns), "r"(int(add)))

template <class Element>
__device__ __forceinline__ void multiply(float (&sums)[FRAGMENT], uint64_t rows, uint64_t columns, bool add);

// sums (+)= 64 rows x 256 columns over 16 of the width; done when multiply_wait says so.
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&sums)[FRAGMENT], uint64_t rows,
                                                        uint64_t columns, bool add) {
    MULTIPLY("bf16");
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&sums)[FRAGMENT], uint64_t rows, uint64_t columns,
                                                 bool add) {
    MULTIPLY("f16");
}
// What the compiler does with the sums stays on its side of this line.
__device__ __forceinline__ void multiply_border(float (&sums)[FRAGMENT]) {
    asm volatile("" : ALL_SUMS::"memory");
}
#undef MULTIPLY
#undef ALL_SUMS
#undef EIGHT

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT>  // at most LEFT committed groups of this warp are still running
__device__ __forceinline__ void multiply_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

// ------------------------------------------------------------------------------------------------------ host

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

inline EncodeTensorMap find_encode_tensor_map() {  // nullptr where the driver has none
    static const EncodeTensorMap found = [] {
        void* address = nullptr;
        cudaDriverEntryPointQueryResult result = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &address, 12000,
                                                             cudaEnableDefault, &result);
#else
        cudaError_t error =
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &address, cudaEnableDefault, &result);
#endif
        bool good = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
        if (!good) cudaGetLastError();  // an error that is not cleared would be blamed on the next launch
        return good ? reinterpret_cast<EncodeTensorMap>(address) : nullptr;
    }();
    return found;
}

inline const char* device_obstacle() {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError();
        return "there is no usable CUDA device";
    }
    if (major != 9 || minor != 0) return "the device is not of compute capability 9.0 (H100, H200)";
    if (find_encode_tensor_map() == nullptr) return "the driver has no cuTensorMapEncodeTiled";
    return nullptr;
}

// Boxes of box_rows rows and 128 bytes, swizzled, of a matrix [rows, width] of 2-byte numbers.
inline TensorMap tensor_map(const void* matrix, bool bf16, int64_t rows, int64_t width, int64_t stride,
                            int box_rows) {
    TensorMap map;
    cuuint64_t sizes[2] = {cuuint64_t(width), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
    cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, every[2] = {1, 1};
    CUresult result = find_encode_tensor_map()(
        &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void*>(matrix), sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
    return map;
}

// A kernel of clusters (its __cluster_dims__), as many as run at once but no more than `wanted`.
template <class... Parameters>
void launch_clusters(void (*kernel)(Parameters...), int64_t wanted, int blocks_per_cluster, int threads,
                     size_t shared_bytes, void* stream, const Parameters&... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
          "shared memory of the sm_90a kernel");
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks_per_cluster);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute cluster;
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(blocks_per_cluster), 1, 1};
    config.attrs = &cluster;
    config.numAttrs = 1;
    int fitting = 0;  // not half the multiprocessors: a cluster does not span two GPCs
    check(cudaOccupancyMaxActiveClusters(&fitting, kernel, &config), "clusters of the sm_90a kernel");
    if (fitting < 1) throw std::runtime_error("no cluster of the sm_90a kernel fits the device");
    config.gridDim = dim3(unsigned(wanted < fitting ? wanted : fitting) * blocks_per_cluster);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of the sm_90a kernel");
}

constexpr int64_t PARTIAL_BYTES = 128 << 20;  // bounds the workspace for partial sums

}  // namespace dalle2_fast::sm90

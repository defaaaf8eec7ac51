// The host's part of a launch on Hopper: tensor maps, clusters, and whether the device is one. As hardware.h,
// the tests replace this file by a model.
#pragma once

#include <sm90/hardware.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace dalle2_fast::sm90 {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);

inline EncodeTensorMap find_encode_tensor_map() {  // nullptr if the driver does not have it
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
        if (!good) cudaGetLastError();  // an error that is not cleared would be attributed to the next launch
        return good ? reinterpret_cast<EncodeTensorMap>(address) : nullptr;
    }();
    return found;
}

inline const char* why_device_unavailable() {  // nullptr if the current device can run these kernels
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

// Swizzled boxes of box_rows rows and 128 bytes of a matrix [rows, width] of 2-byte elements.
inline TensorMap make_tensor_map(const void* matrix, bool bf16, int64_t rows, int64_t width, int64_t stride,
                                 int box_rows) {
    TensorMap map;
    cuuint64_t sizes[2] = {cuuint64_t(width), cuuint64_t(rows)}, strides[1] = {cuuint64_t(stride) * 2};
    cuuint32_t box[2] = {64, cuuint32_t(box_rows)}, element_strides[2] = {1, 1};
    CUresult result = find_encode_tensor_map()(
        &map, bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
        const_cast<void*>(matrix), sizes, strides, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE,
        CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(int(result)));
    return map;
}

// Launches a kernel of clusters (its __cluster_dims__): as many clusters as run at the same time, but at most
// `wanted`.
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
    int fitting = 0;  // may be fewer than half the multiprocessors: a cluster does not span two GPCs
    check(cudaOccupancyMaxActiveClusters(&fitting, kernel, &config), "clusters of the sm_90a kernel");
    if (fitting < 1) throw std::runtime_error("no cluster of the sm_90a kernel fits the device");
    config.gridDim = dim3(unsigned(wanted < fitting ? wanted : fitting) * blocks_per_cluster);
    check(cudaLaunchKernelEx(&config, kernel, arguments...), "launch of the sm_90a kernel");
}

constexpr int64_t PARTIAL_BYTES = 128 << 20;  // upper limit of the workspace for partial sums

}  // namespace dalle2_fast::sm90

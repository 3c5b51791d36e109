// A CUDA runtime that hands each kernel to a function of the test's: by its name, with what it is given.
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>

#include "cuda/instances.h"

// The kernels: something to point to.
#define MATQUANT_DEFINE(name, ...) \
    extern "C" __attribute__((visibility("default"))) void name() {}
MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_DEFINE)
MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_DEFINE)

namespace {

using Function = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                         size_t shared_bytes, std::uintptr_t stream, int most_shared_bytes);
Function function = nullptr;
int processors = 0;
// What the last attribute was set for.
const void* prepared = nullptr;
int most_shared_bytes = 0;

}  // namespace

extern "C" __attribute__((visibility("default"))) void stand_in(Function to_call, int multiprocessors) {
    function = to_call;
    processors = multiprocessors;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
    *value = processors;
    return attribute == cudaDevAttrMultiProcessorCount && device == 3 ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
    prepared = kernel;
    most_shared_bytes = value;
    return attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t stream) {
    Dl_info info;
    if (dladdr(kernel, &info) == 0 || info.dli_saddr != kernel) {
        return cudaErrorInvalidValue;
    }
    const unsigned blocks[] = {grid.x, grid.y, grid.z}, threads[] = {block.x, block.y, block.z};
    const int most = prepared == kernel ? most_shared_bytes : 0;
    const int failed = function(info.dli_sname, blocks, threads, arguments, shared_bytes,
                                reinterpret_cast<std::uintptr_t>(stream), most);
    return failed ? cudaErrorInvalidValue : cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "refused by the test"; }

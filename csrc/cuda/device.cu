// matquant::linear and linear_by_row on a GPU: the CUDA runtime starts the kernels.
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>

#include "check.h"
#include "cuda/instances.h"
#include "cuda/launcher.h"
#include "cuda/parameters.h"
#include "cuda/torch_device.h"

#define MATQUANT_DECLARE_DECODE(name, element, kind, token_tiles, groups, blocks) \
    extern "C" __global__ void name(MATQUANT_DECODE_PARAMETERS(void));
#define MATQUANT_DECLARE_DEQUANTIZE(name, element, kind, groups) \
    extern "C" __global__ void name(MATQUANT_DEQUANTIZE_PARAMETERS(void));

MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_DECLARE_DECODE)
MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_DECLARE_DEQUANTIZE)

namespace matquant::cuda {
namespace {

using torch::stable::Tensor;

// In the order of instances().
#define MATQUANT_POINTER(name, ...) reinterpret_cast<const void*>(&name),
const void* const kKernels[] = {MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_POINTER)
                                    MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_POINTER)};
#undef MATQUANT_POINTER

void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

class Device : public Launcher {
  public:
    explicit Device(const TorchDevice& device) : stream_(device.stream()) {
        check_cuda(cudaDeviceGetAttribute(&processors_, cudaDevAttrMultiProcessorCount, device.index()),
                   "number of multiprocessors");
    }
    int processors() const override { return processors_; }
    void launch(const Plan& plan, std::span<const Memory> pointers) const override {
        const char* name = instances()[plan.instance].name;
        const void* kernel = kKernels[plan.instance];
        if (plan.shared_bytes > 0) {
            check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
                       name);
        }
        const void* data[kMostPointers];
        void* arguments[kMostPointers + 1];
        STD_TORCH_CHECK(pointers.size() <= kMostPointers, name, ": found ", pointers.size(), " pointers");
        for (size_t index = 0; index < pointers.size(); ++index) {
            data[index] = pointers[index].data;
            arguments[index] = &data[index];
        }
        Shape shape = plan.shape;
        arguments[pointers.size()] = &shape;
        const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]);
        check_cuda(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, plan.shared_bytes, stream_), name);
    }

  private:
    static constexpr size_t kMostPointers = 9;
    cudaStream_t stream_;
    int processors_ = 0;
};

Tensor linear(const Tensor& x, const Tensor& handle, int64_t out_features, const std::optional<Tensor>& bias) {
    const std::shared_ptr<const Weight> weight = find_weight(handle);
    const TorchDevice device(x);
    return multiply(Device(device), *weight, x, out_features, bias);
}

Tensor linear_by_row(const Tensor& x, const Tensor& handles, const Tensor& slots, int64_t out_features,
                     const std::optional<Tensor>& bias) {
    const Readers readers = find_readers(handles);
    const TorchDevice device(x);
    return multiply(Device(device), *readers.first, x, out_features, bias, Rows{slots, readers.count});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CUDA, m) {
    m.impl("linear", TORCH_BOX(&linear));
    m.impl("linear_by_row", TORCH_BOX(&linear_by_row));
}

}  // namespace matquant::cuda

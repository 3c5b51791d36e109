// The device of a product and the stream that torch works on there.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include "check.h"

namespace matquant::cuda {

// While it lives, the device of a tensor is the current one.
class TorchDevice {
  public:
    explicit TorchDevice(const torch::stable::Tensor& tensor) : index_(index_of(tensor)), guard_(index_) {}
    int32_t index() const { return index_; }

    // The symbol is looked up in the library that has it, so that this one can be loaded where torch was built without
    // CUDA.
    cudaStream_t stream() const {
        using Function = int32_t (*)(int32_t, void**);
        static const Function function = [] {
            void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
            void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
            return reinterpret_cast<Function>(symbol);
        }();
        STD_TORCH_CHECK(function != nullptr, "torch: found no aoti_torch_get_current_cuda_stream in libtorch_cuda.so");
        void* stream = nullptr;
        STD_TORCH_CHECK(function(index_, &stream) == 0, "torch gives no stream of device ", index_);
        return static_cast<cudaStream_t>(stream);
    }

  private:
    static int32_t index_of(const torch::stable::Tensor& tensor) {
        STD_TORCH_CHECK(tensor.is_cuda(), "x: found a tensor that is on no CUDA device, expected one that is");
        return tensor.get_device_index();
    }

    int32_t index_;
    torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace matquant::cuda

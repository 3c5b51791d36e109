// matquant::linear on a GPU: launches what the plan says. Nothing here waits for the device: the active widths are read
// by the kernels, so that a captured graph follows a switch.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "cuda/instances.h"
#include "cuda/kernels.cuh"
#include "cuda/plan.h"

#define MATQUANT_DECLARE_DECODE(name, element, kind, token_tiles, groups, blocks) \
    extern "C" __global__ void name(MATQUANT_DECODE_PARAMETERS(element));
#define MATQUANT_DECLARE_DEQUANTIZE(name, element, kind, groups) \
    extern "C" __global__ void name(MATQUANT_DEQUANTIZE_PARAMETERS(element));

MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_DECLARE_DECODE)
MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_DECLARE_DEQUANTIZE)

namespace matquant::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// In the order of instances().
#define MATQUANT_POINTER(name, ...) reinterpret_cast<const void*>(&name),
const void* const kKernels[] = {MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_POINTER)
                                    MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_POINTER)};
#undef MATQUANT_POINTER

void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The stream that torch works on. The symbol is looked up in the library that has it, so that this one can be loaded
// where torch was built without CUDA.
cudaStream_t current_stream(int32_t device) {
    using Function = int32_t (*)(int32_t, void**);
    static const Function function = [] {
        void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        void* symbol = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
        return reinterpret_cast<Function>(symbol);
    }();
    STD_TORCH_CHECK(function != nullptr, "torch: found no aoti_torch_get_current_cuda_stream in libtorch_cuda.so");
    void* stream = nullptr;
    STD_TORCH_CHECK(function(device, &stream) == 0, "torch gives no stream of device ", device);
    return static_cast<cudaStream_t>(stream);
}

int processor_count(int32_t device) {
    int count = 0;
    check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "number of multiprocessors");
    return count;
}

template <class Value>
Value* offset(Value* data, int64_t bytes) {
    return reinterpret_cast<Value*>(reinterpret_cast<std::uintptr_t>(data) + bytes);
}

template <size_t count>
void launch(const Plan& plan, void* (&arguments)[count], cudaStream_t stream) {
    const Instance& instance = instances()[plan.instance];
    const void* kernel = kKernels[plan.instance];
    if (plan.shared_bytes > 0) {
        check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
                   instance.name);
    }
    const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]);
    check_cuda(cudaLaunchKernel(kernel, grid, dim3(kThreads), arguments, plan.shared_bytes, stream), instance.name);
}

// Writes the segment's outputs, columns of `output`.
void multiply(Plan plan, const Segment& segment, const Tensor& input, const std::optional<Tensor>& bias,
              const Tensor& output, cudaStream_t stream) {
    Tensor partial_sums = torch::stable::new_empty(input, {plan.partial_sums}, ScalarType::Float);
    Tensor arrivals = torch::stable::new_zeros(input, {plan.arrivals}, ScalarType::Int);
    const int64_t first = plan.first_output * 2;  // bytes
    const void* input_data = input.const_data_ptr();
    const void* planes = segment.planes.const_data_ptr();
    const void* decoders = segment.decoders.const_data_ptr();
    const void* active_width = segment.active_width.const_data_ptr();
    const void* bias_data = bias ? offset(bias->const_data_ptr(), first) : nullptr;
    void* output_data = offset(output.mutable_data_ptr(), first);
    void* partial_data = partial_sums.mutable_data_ptr();
    void* arrivals_data = arrivals.mutable_data_ptr();
    void* arguments[] = {&input_data,  &planes,       &decoders,      &active_width, &bias_data,
                         &output_data, &partial_data, &arrivals_data, &plan.shape};
    launch(plan, arguments, stream);
}

// Writes the segment's rows of `weights`.
void dequantize(Plan plan, const Segment& segment, const Tensor& weights, cudaStream_t stream) {
    const void* planes = segment.planes.const_data_ptr();
    const void* decoders = segment.decoders.const_data_ptr();
    const void* active_width = segment.active_width.const_data_ptr();
    void* data = offset(weights.mutable_data_ptr(), plan.first_output * plan.columns() * 2);
    void* arguments[] = {&planes, &decoders, &active_width, &data, &plan.shape};
    launch(plan, arguments, stream);
}

Tensor linear(const Tensor& x, const Tensor& handle, int64_t out_features, const std::optional<Tensor>& bias) {
    const std::shared_ptr<const Weight> weight = find_weight(handle);
    STD_TORCH_CHECK(x.is_cuda(), "x: found a tensor that is on no CUDA device, expected one that is");
    const int32_t device = x.get_device_index();
    const std::vector<Plan> plans = make_plans(*weight, x, out_features, bias, processor_count(device));
    const int64_t tokens = plans.front().shape.tokens, columns = plans.front().columns();
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = out_features;
    if (tokens == 0) {
        return torch::stable::new_empty(x, sizes);
    }

    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    Tensor input = torch::stable::contiguous(torch::stable::reshape(x, {tokens, weight->columns}));
    if (columns != weight->columns) {  // whole steps, which no model's hidden size but the smallest lacks
        input = torch::stable::pad(input, {0, columns - weight->columns});
    }
    if (!plans.front().dequantizes()) {
        const Tensor output = torch::stable::new_empty(input, {tokens, out_features});
        for (size_t index = 0; index < plans.size(); ++index) {
            multiply(plans[index], weight->segments[index], input, bias, output, stream);
        }
        return torch::stable::reshape(output, sizes);
    }
    const Tensor weights = torch::stable::new_empty(input, {out_features, columns});
    for (size_t index = 0; index < plans.size(); ++index) {
        dequantize(plans[index], weight->segments[index], weights, stream);
    }
    std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weights),
                                      torch::stable::detail::from(bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::reshape(torch::stable::detail::to<Tensor>(stack[0]), sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CUDA, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace matquant::cuda

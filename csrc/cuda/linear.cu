// matquant::cuda_linear: checks the arguments, finds the kernel and divides the work. Nothing here waits for the
// device: the active widths are read by the kernels, so that a captured graph follows a switch.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "check.h"
#include "cuda/kernels.cuh"

namespace matquant::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// More tokens are multiplied by the library's kernel, with weights that are dequantized first.
constexpr int64_t kMostTokens = 64;
// Blocks of threads for each multiprocessor that columns are divided for, where rows alone are too few.
constexpr int kBlocksPerProcessor = 3;

struct Instance {
    const char* name;
    ScalarType dtype;
    int tokens;  // at once
    int groups;  // in a step
    const void* kernel;
    int (*shared_bytes)(int width);
};

template <class Element>
constexpr ScalarType kDtype = ScalarType::Half;
template <>
constexpr ScalarType kDtype<BFloat16> = ScalarType::BFloat16;

#define MATQUANT_ROW(name, element, token_tiles, groups, blocks) \
    {#name,                                                      \
     kDtype<element>,                                            \
     token_tiles * kTokens,                                      \
     groups,                                                     \
     reinterpret_cast<const void*>(&name),                       \
     &shared_bytes<token_tiles, groups>},
const Instance kInstances[] = {MATQUANT_CUDA_INSTANCES(MATQUANT_ROW)};
#undef MATQUANT_ROW

#define MATQUANT_ROW(name, element, groups) \
    {#name, kDtype<element>, 0, groups, reinterpret_cast<const void*>(&name), nullptr},
const Instance kDequantizers[] = {MATQUANT_CUDA_DEQUANTIZERS(MATQUANT_ROW)};
#undef MATQUANT_ROW

void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// The kernel for the fewest tokens that are enough, or for the most there are.
template <size_t count>
const Instance& find_instance(const Instance (&instances)[count], ScalarType dtype, int64_t tokens, int groups) {
    const Instance* found = nullptr;
    for (const Instance& instance : instances) {
        if (instance.dtype == dtype && instance.groups == groups && (found == nullptr || found->tokens < tokens)) {
            found = &instance;
        }
    }
    STD_TORCH_CHECK(found != nullptr, "no kernel for ", torch::headeronly::toString(dtype), " and ", groups,
                    " groups in ", kStepTiles * kTileColumns, " columns; the nearest is ", instances[0].name);
    return *found;
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

// Groups in a step of 128 columns, and the shift of Shape.
struct Grouping {
    int per_step;
    int shift;
};

Grouping grouping_of(int64_t group_size, int64_t in_features) {
    constexpr int64_t kStepColumns = kStepTiles * kTileColumns;
    if (group_size >= in_features && group_size != 32 && group_size != 64) {
        return {1, 31};
    }
    const bool power = group_size >= 32 && (group_size & (group_size - 1)) == 0;
    STD_TORCH_CHECK(power, "group_size: found ", group_size,
                    ", expected 32, 64, 128 or a greater power of two, or at least the ", in_features,
                    " input features");
    if (group_size < kStepColumns) {
        return {static_cast<int>(kStepColumns / group_size), 0};
    }
    int shift = 0;
    while (kStepColumns << shift < group_size) {
        ++shift;
    }
    return {1, shift};
}

Shape describe(const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
               const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes,
               int64_t in_features, int64_t group_size) {
    check_output_sizes(output_sizes);
    STD_TORCH_CHECK(output_sizes.size() <= kMaxPartitions, "output_sizes: found ", output_sizes.size(),
                    " partitions, expected at most ", kMaxPartitions);
    STD_TORCH_CHECK(planes.dim() == 4, "planes: found ", planes.dim(), " dimensions, expected 4");
    Shape shape = {};
    shape.partitions = static_cast<int32_t>(output_sizes.size());
    int64_t rows = 0, tile_rows = 0;
    for (size_t index = 0; index < output_sizes.size(); ++index) {
        shape.partition_tiles[index] = static_cast<int32_t>(tile_rows);
        shape.partition_rows[index] = static_cast<int32_t>(rows);
        tile_rows += (output_sizes[index] + kTileRows - 1) / kTileRows;
        rows += output_sizes[index];
    }
    const int64_t tile_columns = (in_features + kTileColumns - 1) / kTileColumns;
    const int64_t groups = (in_features + group_size - 1) / group_size;
    const int64_t resident_width = planes.size(2);
    check_tensor("planes", planes, ScalarType::Byte, {tile_rows, tile_columns, resident_width, kPlaneBytes});
    check_tensor("decoders", decoders, ScalarType::Half,
                 {static_cast<int64_t>(decoder_widths.size()), tile_rows, groups, 8, 2, 8});
    check_tensor("active_width", active_width, ScalarType::Int, {static_cast<int64_t>(output_sizes.size())});
    STD_TORCH_CHECK(planes.numel() < int64_t{1} << 32, "planes: found ", planes.numel(), " bytes, expected below 2^32");
    shape.rows = static_cast<int32_t>(rows);
    shape.tile_rows = static_cast<int32_t>(tile_rows);
    shape.tile_columns = static_cast<int32_t>(tile_columns);
    shape.resident_width = static_cast<int32_t>(resident_width);
    shape.groups = static_cast<int32_t>(groups);
    shape.group_shift = grouping_of(group_size, in_features).shift;
    shape.decoders_of_widths = ~uint64_t{0};
    for (size_t index = 0; index < decoder_widths.size(); ++index) {
        const int64_t width = decoder_widths[index];
        STD_TORCH_CHECK(kBaseBits <= width && width <= kMaxWidth, "decoder_widths: found ", to_string(decoder_widths),
                        ", expected widths in ", kBaseBits, "..", kMaxWidth);
        if (width <= resident_width) {  // of a wider one not all planes are there
            const int place = static_cast<int>(width - kBaseBits) * 8;
            shape.decoders_of_widths &= ~(uint64_t{0xff} << place);
            shape.decoders_of_widths |= static_cast<uint64_t>(index) << place;
        }
    }
    return shape;
}

Tensor multiply_few(const Tensor& input, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                    const std::optional<Tensor>& bias, int groups, Shape shape, cudaStream_t stream) {
    const Instance& instance = find_instance(kInstances, input.scalar_type(), shape.tokens, groups);
    const int passes = (shape.tokens + instance.tokens - 1) / instance.tokens;
    const int steps = shape.steps();
    // Enough blocks to fill the device, each with a step at least for each of its warps.
    const int wanted = kBlocksPerProcessor * processor_count(input.get_device_index());
    const int blocks = shape.tile_rows * passes;
    const int splits = std::clamp((wanted + blocks - 1) / blocks, 1, std::max(1, steps / kWarps));
    Tensor output = torch::stable::new_empty(input, {shape.tokens, shape.rows});
    Tensor partial_sums = torch::stable::new_empty(
        input, {splits > 1 ? int64_t{splits} * shape.tile_rows * shape.tokens * kTileRows : 0}, ScalarType::Float);
    Tensor arrivals =
        torch::stable::new_zeros(input, {splits > 1 ? int64_t{passes} * shape.tile_rows : 0}, ScalarType::Int);
    const int bytes = instance.shared_bytes(shape.resident_width);
    check_cuda(cudaFuncSetAttribute(instance.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
               instance.name);

    const void* input_data = input.const_data_ptr();
    const void* planes_data = planes.const_data_ptr();
    const void* decoders_data = decoders.const_data_ptr();
    const void* width_data = active_width.const_data_ptr();
    const void* bias_data = bias ? bias->const_data_ptr() : nullptr;
    void* output_data = output.mutable_data_ptr();
    void* partial_data = partial_sums.mutable_data_ptr();
    void* arrivals_data = arrivals.mutable_data_ptr();
    void* arguments[] = {&input_data,  &planes_data,  &decoders_data, &width_data, &bias_data,
                         &output_data, &partial_data, &arrivals_data, &shape};
    const dim3 grid(shape.tile_rows, splits, passes);
    check_cuda(cudaLaunchKernel(instance.kernel, grid, dim3(kThreads), arguments, bytes, stream), instance.name);
    return output;
}

Tensor multiply_many(const Tensor& input, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                     const std::optional<Tensor>& bias, int groups, Shape shape, cudaStream_t stream) {
    const Instance& instance = find_instance(kDequantizers, input.scalar_type(), 0, groups);
    Tensor weight = torch::stable::new_empty(input, {shape.rows, input.size(1)});
    const void* planes_data = planes.const_data_ptr();
    const void* decoders_data = decoders.const_data_ptr();
    const void* width_data = active_width.const_data_ptr();
    void* weight_data = weight.mutable_data_ptr();
    void* arguments[] = {&planes_data, &decoders_data, &width_data, &weight_data, &shape};
    const int tiles = static_cast<int>(input.size(1)) / kTileColumns;
    const dim3 grid(shape.tile_rows, (tiles + kWarps - 1) / kWarps);
    check_cuda(cudaLaunchKernel(instance.kernel, grid, dim3(kThreads), arguments, 0, stream), instance.name);
    std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                      torch::stable::detail::from(bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
              const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes, int64_t group_size,
              const std::optional<Tensor>& bias, const std::optional<int64_t>&) {
    STD_TORCH_CHECK(x.dim() > 0, "x: found a scalar, expected at least one dimension");
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "x: found dtype ",
                    torch::headeronly::toString(dtype), ", expected BFloat16 or Half");
    STD_TORCH_CHECK(group_size > 0, "group_size: found ", group_size, ", expected a positive size");
    const int64_t in_features = x.size(-1);
    const Grouping grouping = grouping_of(group_size, in_features);
    Shape shape = describe(planes, decoders, active_width, decoder_widths, output_sizes, in_features, group_size);
    if (bias) {
        check_tensor("bias", *bias, dtype, {shape.rows});
    }
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = shape.rows;
    STD_TORCH_CHECK(in_features > 0, "x: found no input features");
    const int64_t tokens = x.numel() / in_features;
    if (tokens == 0) {
        return torch::stable::new_zeros(x, sizes);
    }
    shape.tokens = static_cast<int32_t>(tokens);

    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    const cudaStream_t stream = current_stream(x.get_device_index());
    Tensor input = torch::stable::contiguous(torch::stable::reshape(x, {tokens, in_features}));
    constexpr int64_t kStepColumns = kStepTiles * kTileColumns;
    if (in_features % kStepColumns != 0) {  // whole steps, which no model's hidden size but the smallest lacks
        input = torch::stable::pad(input, {0, kStepColumns - in_features % kStepColumns});
    }
    const auto multiply = tokens <= kMostTokens ? multiply_few : multiply_many;
    Tensor output = multiply(input, planes, decoders, active_width, bias, grouping.per_step, shape, stream);
    return torch::stable::reshape(output, sizes);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CUDA, m) { m.impl("cuda_linear", TORCH_BOX(&linear)); }

}  // namespace matquant::cuda

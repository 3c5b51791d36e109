#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstddef>
#include <vector>

#include "cuda/launcher.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // torch 2.11 and older
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

namespace matquant::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// What a tensor holds from one of its elements on.
Memory memory_of(const Tensor& tensor, int64_t first = 0) {
    const auto element = static_cast<int64_t>(tensor.element_size());
    const auto* data = static_cast<const std::byte*>(tensor.const_data_ptr());
    return {data + first * element, (tensor.numel() - first) * element};
}

// Writes the segment's outputs, columns of `output`.
void decode(const Launcher& launcher, const Plan& plan, const Segment& segment, const Tensor& input,
            const std::optional<Tensor>& bias, const std::optional<Rows>& rows, const Tensor& output) {
    const Tensor partial_sums = torch::stable::new_empty(input, {plan.partial_sums}, ScalarType::Float);
    const Tensor arrivals = torch::stable::new_zeros(input, {plan.arrivals}, ScalarType::Int);
    Memory widths = memory_of(segment.active_width);
    widths.bytes *= plan.shape.slots;
    const std::array<Memory, 9> pointers = {memory_of(input),
                                            memory_of(segment.planes),
                                            memory_of(segment.decoders),
                                            widths,
                                            bias ? memory_of(*bias, plan.first_output) : Memory{nullptr, 0},
                                            memory_of(output, plan.first_output),
                                            memory_of(partial_sums),
                                            memory_of(arrivals),
                                            rows ? memory_of(rows->slots) : Memory{nullptr, 0}};
    launcher.launch(plan, pointers);
}

// Writes the segment's rows of `weights`.
void dequantize(const Launcher& launcher, const Plan& plan, const Segment& segment, const Tensor& weights) {
    Memory rows = memory_of(weights, plan.first_output * plan.columns());
    rows.bytes = plan.shape.rows * plan.columns() * static_cast<int64_t>(weights.element_size());
    const std::array<Memory, 4> pointers = {memory_of(segment.planes), memory_of(segment.decoders),
                                            memory_of(segment.active_width), rows};
    launcher.launch(plan, pointers);
}

}  // namespace

Tensor multiply(const Launcher& launcher, const Weight& weight, const Tensor& x, int64_t out_features,
                const std::optional<Tensor>& bias, const std::optional<Rows>& rows, std::optional<int64_t> splits) {
    const std::vector<Plan> plans = make_plans(weight, x, out_features, bias, rows, launcher.processors(), splits);
    const int64_t tokens = plans.front().shape.tokens, columns = plans.front().columns();
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = out_features;
    if (tokens == 0) {
        return torch::stable::new_empty(x, sizes);
    }
    Tensor input = torch::stable::contiguous(torch::stable::reshape(x, {tokens, weight.columns}));
    if (columns != weight.columns) {  // whole steps, which no model's hidden size but the smallest lacks
        input = torch::stable::pad(input, {0, columns - weight.columns});
    }
    if (!plans.front().dequantizes()) {
        const Tensor output = torch::stable::new_empty(input, {tokens, out_features});
        for (size_t index = 0; index < plans.size(); ++index) {
            decode(launcher, plans[index], weight.segments[index], input, bias, rows, output);
        }
        return torch::stable::reshape(output, sizes);
    }
    const Tensor weights = torch::stable::new_empty(input, {out_features, columns});
    for (size_t index = 0; index < plans.size(); ++index) {
        dequantize(launcher, plans[index], weight.segments[index], weights);
    }
    std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weights),
                                      torch::stable::detail::from(bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::reshape(torch::stable::detail::to<Tensor>(stack[0]), sizes);
}

}  // namespace matquant::cuda

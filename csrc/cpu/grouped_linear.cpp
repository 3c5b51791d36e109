// matquant::grouped_linear on the CPU: the products of a mixture's experts, all that are hit in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "check.h"
#include "cpu/linear.h"
#include "cpu/linear_by_row.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor grouped_linear(const Tensor& x, const Tensor& weights, const Tensor& groups, const std::optional<Tensor>& slots,
                      int64_t out_features) {
    STD_TORCH_CHECK(x.dim() == 2, "x: found ", x.dim(), " dimensions, expected rows and columns");
    STD_TORCH_CHECK(weights.dim() == 2, "weights: found ", weights.dim(), " dimensions, expected groups and slots");
    const int64_t rows = x.size(0), group_count = weights.size(0), slot_count = weights.size(1);
    check_tensor("weights", weights, ScalarType::Long, {group_count, slot_count});
    check_tensor("groups", groups, ScalarType::Int, {rows});
    if (slots) {
        check_tensor("slots", *slots, ScalarType::Int, {rows});
    }
    const int64_t* numbers = weights.const_data_ptr<int64_t>();
    const int32_t* group_of = groups.const_data_ptr<int32_t>();
    const int32_t* slot_of = slots ? slots->const_data_ptr<int32_t>() : nullptr;
    Tensor output = empty_output(x, out_features);
    const Tensor input = torch::stable::contiguous(x);
    const int64_t size = static_cast<int64_t>(x.element_size());

    std::vector<std::shared_ptr<const Weight>> held;  // tasks refer to them
    std::vector<Bundle> bundles;
    for (int64_t first = 0, past = 0; first < rows; first = past) {
        const int64_t group = group_of[first], slot = slot_of ? slot_of[first] : 0;
        STD_TORCH_CHECK(0 <= group && group < group_count && (first == 0 || group_of[first - 1] <= group),
                        "groups: found ", group, " for row ", first, ", expected ascending ones below ", group_count);
        STD_TORCH_CHECK(0 <= slot && slot < slot_count && numbers[group * slot_count + slot] != 0, "slots: found ",
                        slot, " for row ", first, ", expected one that has a weight");
        for (past = first; past < rows && group_of[past] == group && (!slot_of || slot_of[past] == slot);) {
            ++past;
        }
        held.push_back(weight_of(numbers[group * slot_count + slot]));
        Task task = make_task(*held.back(), input, std::nullopt, output);
        task.product.input = static_cast<const uint8_t*>(task.product.input) + first * x.size(1) * size;
        task.product.output = static_cast<uint8_t*>(task.product.output) + first * out_features * size;
        task.tokens = past - first;
        if (first > 0 && group_of[first - 1] == group) {
            check_same_planes(*task.weight, *bundles.back().front().weight);
            bundles.back().push_back(task);
        } else {
            bundles.push_back({task});
        }
    }
    multiply(bundles);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("grouped_linear", TORCH_BOX(&grouped_linear)); }

}  // namespace matquant::cpu

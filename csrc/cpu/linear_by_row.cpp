// matquant::linear_by_row on the CPU: rows at widths of their own, which read the same planes in one pass.
#include "cpu/linear_by_row.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <memory>

#include "check.h"
#include "cpu/linear.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The rows of one slot: where they stand, and a copy of them side by side with the product of each. Where they stand
// side by side already, there is no copy, and input and output are parts of the whole ones.
struct Group {
    std::shared_ptr<const Weight> weight;
    std::vector<int64_t> rows;
    Tensor input;
    Tensor output;

    bool together() const { return rows.back() - rows.front() + 1 == static_cast<int64_t>(rows.size()); }
};

Tensor linear_by_row(const Tensor& x, const Tensor& weights, const Tensor& slots, int64_t out_features,
                     const std::optional<Tensor>& bias) {
    Tensor output = empty_output(x, out_features);
    const Tensor input = torch::stable::contiguous(x);
    const int64_t rows = output.numel() / std::max<int64_t>(out_features, 1);
    const std::vector<int64_t> counts = count_rows(slots, rows, weights);
    const int32_t* slot_of = slots.const_data_ptr<int32_t>();
    if (rows == 0) {
        return output;
    }
    if (counts[slot_of[0]] == rows) {  // as most steps are
        const std::shared_ptr<const Weight> weight = weight_of(weights.const_data_ptr<int64_t>()[slot_of[0]]);
        multiply({{make_task(*weight, input, bias, output)}});
        return output;
    }
    std::vector<Group> groups(counts.size());
    for (int64_t row = 0; row < rows; ++row) {
        groups[slot_of[row]].rows.push_back(row);
    }

    const int64_t size = static_cast<int64_t>(x.element_size());
    const int64_t in_bytes = x.size(-1) * size, out_bytes = out_features * size;
    Bundle tasks;
    for (size_t slot = 0; slot < groups.size(); ++slot) {
        Group& group = groups[slot];
        if (group.rows.empty()) {
            continue;
        }
        group.weight = weight_of(weights.const_data_ptr<int64_t>()[slot]);
        check_same_planes(*group.weight, tasks.empty() ? *group.weight : *tasks.front().weight);
        const int64_t count = static_cast<int64_t>(group.rows.size());
        if (group.together()) {
            Task& task = tasks.emplace_back(make_task(*group.weight, input, bias, output));
            task.product.input = static_cast<const uint8_t*>(task.product.input) + group.rows.front() * in_bytes;
            task.product.output = static_cast<uint8_t*>(task.product.output) + group.rows.front() * out_bytes;
            task.tokens = count;
            continue;
        }
        group.input = torch::stable::empty({count, x.size(-1)}, x.scalar_type());
        group.output = torch::stable::empty({count, out_features}, x.scalar_type());
        for (int64_t index = 0; index < count; ++index) {
            std::memcpy(static_cast<uint8_t*>(group.input.mutable_data_ptr()) + index * in_bytes,
                        static_cast<const uint8_t*>(input.const_data_ptr()) + group.rows[index] * in_bytes, in_bytes);
        }
        tasks.push_back(make_task(*group.weight, group.input, bias, group.output));
    }
    multiply({tasks});
    for (const Group& group : groups) {
        if (group.rows.empty() || group.together()) {
            continue;
        }
        for (size_t index = 0; index < group.rows.size(); ++index) {
            std::memcpy(static_cast<uint8_t*>(output.mutable_data_ptr()) + group.rows[index] * out_bytes,
                        static_cast<const uint8_t*>(group.output.const_data_ptr()) + index * out_bytes, out_bytes);
        }
    }
    return output;
}

}  // namespace

void check_same_planes(const Weight& weight, const Weight& first) {
    const auto same = [](const Segment& a, const Segment& b) {
        return a.planes.const_data_ptr() == b.planes.const_data_ptr() && a.output_sizes == b.output_sizes;
    };
    STD_TORCH_CHECK(
        std::equal(weight.segments.begin(), weight.segments.end(), first.segments.begin(), first.segments.end(), same),
        "weights: found some with different planes, expected those of one layer");
}

std::vector<int64_t> count_rows(const Tensor& slots, int64_t rows, const Tensor& weights) {
    check_tensor("weights", weights, ScalarType::Long, {weights.numel()});
    check_tensor("slots", slots, ScalarType::Int, {slots.numel()});
    STD_TORCH_CHECK(rows <= slots.numel(), "slots: found ", slots.numel(), ", expected one for each of ", rows,
                    " rows");
    const int64_t* numbers = weights.const_data_ptr<int64_t>();
    const int32_t* slot_of = slots.const_data_ptr<int32_t>();
    std::vector<int64_t> counts(weights.numel());
    for (int64_t row = 0; row < rows; ++row) {
        STD_TORCH_CHECK(0 <= slot_of[row] && slot_of[row] < weights.numel() && numbers[slot_of[row]] != 0,
                        "slots: found ", slot_of[row], " for row ", row, ", expected one that has a weight");
        ++counts[slot_of[row]];
    }
    return counts;
}

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("linear_by_row", TORCH_BOX(&linear_by_row)); }

}  // namespace matquant::cpu

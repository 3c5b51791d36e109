// The inner loop of every solver in vllm_matquant/quantize: one block of columns of a GPTQ pass (arXiv 2210.17323,
// algorithm 1) that minimises over all widths at once.
//
// For each column the code is the parent q that minimises  sum_r lambda_r (w_r - (scale_r * S(q, r) + offset_r))^2,
// where w_r is the copy of the weight that was compensated for the errors of width r alone. All 256 parents are tried,
// but a prefix of the sum is recomputed only from the first width whose slice changed: with truncated slices that is
// two terms per parent on average instead of one per width.
//
// Given the codes of an earlier pass, the same loop is a sweep of coordinate descent on the layers' output errors: then
// w_r is the value of the weight that would be best if all others stayed as they are, and the error that later columns
// must hear of is the change of the decoded value.
//
// A lane is a row; rows are independent, so threads take chunks of kLanes rows and the result does not depend on how
// many there are.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 16;
constexpr int kParents = 256;
constexpr int kMaxWidths = kMaxWidth - kMinWidth + 1;

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using UnalignedFloats = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

struct Problem {
    int64_t widths, columns, rows, groups;  // rows counts all rows, padded to kLanes
    int64_t begin, end;                     // the block's columns
    const float* copies;                    // [columns, widths, rows]
    const float* scales;                    // [widths, groups, rows]
    const float* offsets;                   // [widths, groups, rows]
    const int32_t* group_of_column;         // [columns]
    const float* coupling;   // [columns, columns]: row j says what an error in column j does to the others
    const uint8_t* current;  // [columns, rows], codes of the earlier pass, or null
    const uint8_t* slices;   // [widths, kParents], S(q, r)
    const float* lambdas;    // [widths]
    bool mean_error;         // MatGPTQ: one error, the mean over widths, for every copy
    std::array<int8_t, kParents> first_changed;
    uint8_t* codes;  // [end - begin, rows]
    float* errors;   // [end - begin, widths, rows]
};

// For each parent the first width whose slice differs from the previous parent's; `widths` if none does.
std::array<int8_t, kParents> first_changed_width(const uint8_t* slices, int64_t widths) {
    std::array<int8_t, kParents> first{};
    for (int q = 1; q < kParents; ++q) {
        int r = 0;
        while (r < widths && slices[r * kParents + q] == slices[r * kParents + q - 1]) ++r;
        first[q] = static_cast<int8_t>(r);
    }
    return first;
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
void solve_lanes(const Problem& p, int64_t row, float* scratch) {
    const int64_t block = p.end - p.begin;
    const auto lanes = [](const float* values) { return reinterpret_cast<const UnalignedFloats*>(values); };
    // The lanes' copies of the block, contiguous: [widths, block].
    auto* copies = reinterpret_cast<UnalignedFloats*>(scratch);
    for (int64_t r = 0; r < p.widths; ++r) {
        for (int64_t j = 0; j < block; ++j) {
            copies[r * block + j] = *lanes(p.copies + ((p.begin + j) * p.widths + r) * p.rows + row);
        }
    }

    for (int64_t j = 0; j < block; ++j) {
        const int64_t column = p.begin + j;
        Floats weight[kMaxWidths], scale[kMaxWidths], offset[kMaxWidths], partial[kMaxWidths + 1];
        for (int64_t r = 0; r < p.widths; ++r) {
            const int64_t decoder = (r * p.groups + p.group_of_column[column]) * p.rows + row;
            weight[r] = copies[r * block + j];
            scale[r] = *lanes(p.scales + decoder);
            offset[r] = *lanes(p.offsets + decoder);
        }

        Floats best = Floats{} + __builtin_inff();
        Ints code{};
        partial[0] = Floats{};
        for (int q = 0; q < kParents; ++q) {
            if (p.first_changed[q] == p.widths) continue;
            for (int64_t r = p.first_changed[q]; r < p.widths; ++r) {
                const Floats error =
                    weight[r] - (scale[r] * static_cast<float>(p.slices[r * kParents + q]) + offset[r]);
                partial[r + 1] = partial[r] + p.lambdas[r] * error * error;
            }
            const Ints better = partial[p.widths] < best;
            best = better ? partial[p.widths] : best;
            code = better ? Ints{} + q : code;
        }

        for (int lane = 0; lane < kLanes; ++lane) p.codes[j * p.rows + row + lane] = static_cast<uint8_t>(code[lane]);
        const uint8_t* current = p.current ? p.current + column * p.rows + row : nullptr;
        const float* coupling = p.coupling + column * p.columns;
        Floats error[kMaxWidths], mean{};
        for (int64_t r = 0; r < p.widths; ++r) {
            const uint8_t* slices = p.slices + r * kParents;
            Floats level, before{};
            for (int lane = 0; lane < kLanes; ++lane) level[lane] = slices[code[lane]];
            if (current) {
                for (int lane = 0; lane < kLanes; ++lane) before[lane] = slices[current[lane]];
                error[r] = scale[r] * (level - before);
            } else {
                error[r] = (weight[r] - (scale[r] * level + offset[r])) / coupling[column];
            }
            mean += error[r] / static_cast<float>(p.widths);
        }
        for (int64_t r = 0; r < p.widths; ++r) {
            if (p.mean_error) error[r] = mean;
            *reinterpret_cast<UnalignedFloats*>(p.errors + (j * p.widths + r) * p.rows + row) = error[r];
            for (int64_t later = j + 1; later < block; ++later) {
                copies[r * block + later] -= error[r] * coupling[p.begin + later];
            }
        }
    }
}

std::tuple<Tensor, Tensor> solve_columns(const Tensor& copies, const Tensor& scales, const Tensor& offsets,
                                         const Tensor& group_of_column, const Tensor& coupling,
                                         const std::optional<Tensor>& current, const Tensor& slices,
                                         const Tensor& lambdas, bool mean_error, int64_t begin, int64_t end) {
    STD_TORCH_CHECK(copies.dim() == 3, "copies: found ", copies.dim(), " dimensions, expected 3");
    STD_TORCH_CHECK(scales.dim() == 3, "scales: found ", scales.dim(), " dimensions, expected 3");
    const int64_t columns = copies.size(0), widths = copies.size(1), rows = copies.size(2), groups = scales.size(1);
    STD_TORCH_CHECK(widths >= 1 && widths <= kMaxWidths, "copies: found ", widths, " widths, expected 1 to ",
                    kMaxWidths);
    STD_TORCH_CHECK(rows % kLanes == 0, "copies: found ", rows, " rows, expected a multiple of ", kLanes);
    STD_TORCH_CHECK(0 <= begin && begin < end && end <= columns, "block: found columns ", begin, " to ", end,
                    ", expected a range within ", columns);
    check_tensor("copies", copies, ScalarType::Float, {columns, widths, rows});
    check_tensor("scales", scales, ScalarType::Float, {widths, groups, rows});
    check_tensor("offsets", offsets, ScalarType::Float, {widths, groups, rows});
    check_tensor("group_of_column", group_of_column, ScalarType::Int, {columns});
    check_tensor("coupling", coupling, ScalarType::Float, {columns, columns});
    if (current) check_tensor("current", *current, ScalarType::Byte, {columns, rows});
    check_tensor("slices", slices, ScalarType::Byte, {widths, kParents});
    check_tensor("lambdas", lambdas, ScalarType::Float, {widths});
    const int32_t* group_data = group_of_column.const_data_ptr<int32_t>();
    for (int64_t column = begin; column < end; ++column) {
        STD_TORCH_CHECK(group_data[column] >= 0 && group_data[column] < groups, "group_of_column: found ",
                        group_data[column], ", expected 0 to ", groups - 1);
    }

    Tensor codes = torch::stable::empty({end - begin, rows}, ScalarType::Byte);
    Tensor errors = torch::stable::empty({end - begin, widths, rows}, ScalarType::Float);
    const uint8_t* slice_data = slices.const_data_ptr<uint8_t>();
    const Problem problem{widths,
                          columns,
                          rows,
                          groups,
                          begin,
                          end,
                          copies.const_data_ptr<float>(),
                          scales.const_data_ptr<float>(),
                          offsets.const_data_ptr<float>(),
                          group_data,
                          coupling.const_data_ptr<float>(),
                          current ? current->const_data_ptr<uint8_t>() : nullptr,
                          slice_data,
                          lambdas.const_data_ptr<float>(),
                          mean_error,
                          first_changed_width(slice_data, widths),
                          codes.mutable_data_ptr<uint8_t>(),
                          errors.mutable_data_ptr<float>()};
    torch::stable::parallel_for(0, rows / kLanes, 1, [&](int64_t first, int64_t last) {
        std::vector<float> scratch(widths * (end - begin) * kLanes);
        for (int64_t chunk = first; chunk < last; ++chunk) solve_lanes(problem, chunk * kLanes, scratch.data());
    });
    return {codes, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("solve_columns", TORCH_BOX(&solve_columns)); }

}  // namespace matquant::cpu

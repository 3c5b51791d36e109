// The inner loop of every solver in vllm_matquant/quantize: one block of columns of a GPTQ pass (arXiv 2210.17323,
// algorithm 1) that minimises over all widths at once.
//
// For each column the code is the parent q that minimises  sum_r lambda_r (w_r - (scale_r * S(q, r) + offset_r))^2,
// where w_r is the copy of the weight that was compensated for the errors of width r alone. All 256 parents are tried.
// Truncated slices are nested, so that parents with a common prefix share the terms of the widths that read no more
// than it: the sums are grown from width to width along the tree of codes, two terms per parent instead of one per
// width.
//
// Given the codes of an earlier pass, the same loop is a sweep of coordinate descent on the layers' output errors: then
// w_r is the value of the weight that would be best if all others stayed as they are, and the error that later columns
// must hear of is the change of the decoded value. Leading bits of the codes can be kept, so that the slices they make
// up stay what they are.
//
// A lane is a row; rows are independent, so threads take chunks of kLanes rows and the result does not depend on how
// many there are.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "check.h"
#include "cpu/layout.h"

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
    const float* coupling;    // [1 or widths, block, block]: row j says what an error in column j does to the others
    int64_t coupling_stride;  // floats from one width's coupling to the next: 0 where all share one
    const uint8_t* current;   // [columns, rows], codes of the earlier pass, or null
    const uint8_t* slices;    // [widths, kParents], S(q, r)
    std::array<float, kMaxWidths> roots;     // of lambda, for each width
    int fixed_bits;                          // leading bits of the current codes that stay as they are
    bool mean_error;                         // MatGPTQ: one error, the mean over widths, for every copy
    bool nested;                             // a width's slice is a prefix of the next one's
    std::array<int, kMaxWidths> slice_bits;  // bits of each width's slices
    uint8_t* codes;                          // [end - begin, rows]
    float* errors;                           // [end - begin, widths, rows]
};

std::array<int, kMaxWidths> bits_of_slices(const uint8_t* slices, int64_t widths) {
    std::array<int, kMaxWidths> bits{};
    for (int64_t r = 0; r < widths; ++r) {
        const int largest = *std::max_element(slices + r * kParents, slices + (r + 1) * kParents);
        while (largest >> bits[r]) ++bits[r];
    }
    return bits;
}

bool are_prefixes(const uint8_t* slices, int64_t widths, const std::array<int, kMaxWidths>& bits) {
    for (int64_t r = 0; r < widths; ++r) {
        if (r > 0 && bits[r] <= bits[r - 1]) return false;
        for (int q = 0; q < kParents; ++q) {
            if (slices[r * kParents + q] != q >> (8 - bits[r])) return false;
        }
    }
    return true;
}

constexpr auto kLevels = [] {
    std::array<float, kParents> levels{};
    for (int t = 0; t < kParents; ++t) levels[t] = static_cast<float>(t);
    return levels;
}();

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
        Floats weight[kMaxWidths], scale[kMaxWidths], offset[kMaxWidths];
        for (int64_t r = 0; r < p.widths; ++r) {
            const int64_t decoder = (r * p.groups + p.group_of_column[column]) * p.rows + row;
            weight[r] = copies[r * block + j];
            scale[r] = *lanes(p.scales + decoder);
            offset[r] = *lanes(p.offsets + decoder);
        }

        const uint8_t* current = p.current ? p.current + column * p.rows + row : nullptr;
        const int free_bits = 8 - p.fixed_bits;
        Ints prefix{};
        if (p.fixed_bits) {
            for (int lane = 0; lane < kLanes; ++lane) prefix[lane] = current[lane] >> free_bits;
        }
        Floats best = Floats{} + __builtin_inff();
        Ints code{};
        const auto consider = [&](int q, const Floats& cost) {
            Ints better = cost < best;
            if (p.fixed_bits) better &= prefix == (q >> free_bits);
            best = better ? cost : best;
            code = better ? Ints{} + q : code;
        };
        if (p.nested) {
            Floats costs[kParents];  // of the codes of the width at hand, summed over the widths up to it
            costs[0] = Floats{};
            int bits = 0;
            for (int64_t r = 0; r < p.widths; ++r) {
                const Floats root = Floats{} + p.roots[r], target = (weight[r] - offset[r]) * root;
                const Floats step = scale[r] * root;
                const int more = p.slice_bits[r] - bits;
                bits = p.slice_bits[r];
                // Downwards, for a code's prefix stands before it.
                for (int t = (1 << bits) - 1; t >= 0; --t) {
                    const Floats error = target - step * kLevels[t];
                    costs[t] = costs[t >> more] + error * error;
                }
            }
            for (int t = 0; t < 1 << bits; ++t) consider(t << (8 - bits), costs[t]);
        } else {
            for (int q = 0; q < kParents; ++q) {
                Floats cost{};
                for (int64_t r = 0; r < p.widths; ++r) {
                    const Floats error = weight[r] - (scale[r] * kLevels[p.slices[r * kParents + q]] + offset[r]);
                    cost += p.roots[r] * p.roots[r] * error * error;
                }
                consider(q, cost);
            }
        }

        for (int lane = 0; lane < kLanes; ++lane) p.codes[j * p.rows + row + lane] = static_cast<uint8_t>(code[lane]);
        const float* shared_coupling = p.coupling + j * block;
        Floats error[kMaxWidths], mean{};
        for (int64_t r = 0; r < p.widths; ++r) {
            const uint8_t* slices = p.slices + r * kParents;
            const float* coupling = shared_coupling + r * p.coupling_stride;
            Floats level, before{};
            for (int lane = 0; lane < kLanes; ++lane) level[lane] = slices[code[lane]];
            if (current) {
                for (int lane = 0; lane < kLanes; ++lane) before[lane] = slices[current[lane]];
                error[r] = scale[r] * (level - before);
            } else {
                error[r] = (weight[r] - (scale[r] * level + offset[r])) / coupling[j];
            }
            mean += error[r] / static_cast<float>(p.widths);
        }
        for (int64_t r = 0; r < p.widths; ++r) {
            const float* coupling = shared_coupling + r * p.coupling_stride;
            if (p.mean_error) error[r] = mean;
            *reinterpret_cast<UnalignedFloats*>(p.errors + (j * p.widths + r) * p.rows + row) = error[r];
            for (int64_t later = j + 1; later < block; ++later) {
                copies[r * block + later] -= error[r] * coupling[later];
            }
        }
    }
}

std::tuple<Tensor, Tensor> solve_columns(const Tensor& copies, const Tensor& scales, const Tensor& offsets,
                                         const Tensor& group_of_column, const Tensor& coupling,
                                         const std::optional<Tensor>& current, int64_t fixed_bits, const Tensor& slices,
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
    STD_TORCH_CHECK(coupling.dim() == 3, "coupling: found ", coupling.dim(), " dimensions, expected 3");
    const int64_t couplings = coupling.size(0);
    STD_TORCH_CHECK(couplings == 1 || couplings == widths, "coupling: found ", couplings, " matrices, expected 1 or ",
                    widths);
    check_tensor("coupling", coupling, ScalarType::Float, {couplings, end - begin, end - begin});
    if (current) check_tensor("current", *current, ScalarType::Byte, {columns, rows});
    STD_TORCH_CHECK(0 <= fixed_bits && fixed_bits < 8, "fixed_bits: found ", fixed_bits, ", expected 0 to 7");
    STD_TORCH_CHECK(fixed_bits == 0 || current, "fixed_bits: found ", fixed_bits, " without current codes");
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
    const auto slice_bits = bits_of_slices(slice_data, widths);
    std::array<float, kMaxWidths> roots{};
    for (int64_t r = 0; r < widths; ++r) roots[r] = std::sqrt(lambdas.const_data_ptr<float>()[r]);
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
                          couplings == 1 ? 0 : (end - begin) * (end - begin),
                          current ? current->const_data_ptr<uint8_t>() : nullptr,
                          slice_data,
                          roots,
                          static_cast<int>(fixed_bits),
                          mean_error,
                          are_prefixes(slice_data, widths, slice_bits),
                          slice_bits,
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

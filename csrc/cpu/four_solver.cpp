// The inner loop of the solver of codebooks (vllm_matquant/quantize/fours.py): one block of columns, four at a time, in
// a pass of GPTQ over vectors (GPTVQ, arXiv 2402.15319, algorithm 1) that minimises over all widths at once.
//
// For each four columns the most promising entries are found first: for the width of two bits by their errors under the
// 4 x 4 factor, for wider ones by how far the weights are from what their further bits reach. For each of these the
// further bits are chosen from all that there are, of one column after the other with those before it fixed; the one
// with the least error over all widths is taken.
//
// Given the codes of an earlier pass, the same loop is a sweep of descent over fours: the copies are then what the four
// weights would best be if all others stayed as they are, the factor is that of the Hessian's block, and the error that
// later columns must hear of is the change of the decoded values.
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
#include "decoder.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 16;
constexpr int kMaxWidths = kMaxWidth - kMinWidth + 1;
constexpr int kFurther = kMaxWidth - kMinWidth;  // most bits past the entry's
constexpr int kCodes = 1 << kFurther;
constexpr int kCandidates = 8;  // entries whose further bits are tried

using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using UnalignedFloats = float __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

// What of an entry at one width the choice of entries needs, for each place.
struct Reach {
    float low, high;  // the least and largest level, half a step further out; at three bits the two levels
};

struct Problem {
    int64_t widths, rows, groups;         // rows counts all rows, padded to kLanes
    int64_t begin, end;                   // the block's columns
    const float* copies;                  // [columns, widths, rows]
    const float* scales;                  // [widths, groups, rows]
    const int32_t* group_of_column;       // [columns]
    const float* factors;                 // [fours of the block, 4, 4], upper triangles
    const float* coupling;                // [block, block]: row j says what an error in column j does to the others
    const uint8_t* current;               // [columns, rows], codes of the earlier pass, or null
    std::array<int, kMaxWidths> further;  // bits of each width past the entry's
    std::array<const float*, kMaxWidths> book;  // of each width [1 + further, 256, 4]: levels, then increments
    std::array<float, kMaxWidths> lambdas;
    std::vector<Reach> reach;      // [widths, 256, 4]
    std::vector<float> projected;  // [fours, widths, 256, 4]: of width two an entry times the factor
    std::vector<float> within;     // [fours, widths, 256]: the error that is left within an entry's reach
    uint8_t* codes;                // [end - begin, rows]
    float* errors;                 // [end - begin, widths, rows]

    const float* factor(int64_t four) const { return factors + four * kPlaces * kPlaces; }
    float entry(int64_t width, int64_t plane, int64_t index, int64_t place) const {
        return book[width][(plane * kIndices + index) * kPlaces + place];
    }
};

void prepare(Problem& p) {
    const int64_t fours = (p.end - p.begin) / kPlaces;
    p.reach.resize(p.widths * kIndices * kPlaces);
    p.projected.resize(fours * p.widths * kIndices * kPlaces);
    p.within.resize(fours * p.widths * kIndices);
    std::vector<float> steps(p.widths * kIndices * kPlaces);
    for (int64_t r = 0; r < p.widths; ++r) {
        for (int64_t at = 0; at < kIndices * kPlaces; ++at) {
            const float first = p.book[r][at];
            float last = first;  // increments of a sign that is changed are negative
            for (int bit = 1; bit <= p.further[r]; ++bit) last += p.book[r][bit * kIndices * kPlaces + at];
            const float low = std::min(first, last), high = std::max(first, last);
            const float step = (high - low) / static_cast<float>(std::max(1, (1 << p.further[r]) - 1));
            const float half = p.further[r] > 1 ? step / 2 : 0.0f;
            p.reach[r * kIndices * kPlaces + at] = {low - half, high + half};
            steps[r * kIndices * kPlaces + at] = step;
        }
    }
    for (int64_t four = 0; four < fours; ++four) {
        const float* factor = p.factor(four);
        for (int64_t r = 0; r < p.widths; ++r) {
            for (int64_t index = 0; index < kIndices; ++index) {
                const int64_t at = (four * p.widths + r) * kIndices + index;
                float left = 0.0f;
                for (int64_t place = 0; place < kPlaces; ++place) {
                    float sum = 0.0f;
                    for (int64_t i = 0; i <= place; ++i) sum += p.entry(r, 0, index, i) * factor[i * kPlaces + place];
                    p.projected[at * kPlaces + place] = sum;
                    const float step =
                        steps[(r * kIndices + index) * kPlaces + place] * factor[place * kPlaces + place];
                    left += step * step / 12;
                }
                p.within[at] = left;
            }
        }
    }
}

// Chooses the further bits of one place of an entry, those of the places before it fixed: `values` has what these
// decode to and is given what this does. Returns its error over all widths, and the parent code in `parent`.
__attribute__((always_inline)) inline Floats refine(const Problem& p, const Ints& entry, int place, const float* factor,
                                                    const Floats (*wanted)[kPlaces], const Floats* scale, int most,
                                                    Floats (*values)[kPlaces], Ints& parent) {
    const float diagonal = factor[place * kPlaces + place];
    Floats levels[kMaxWidths][kCodes], costs[kCodes];
    costs[0] = Floats{};
    int bits = 0;
    for (int64_t r = 0; r < p.widths; ++r) {
        Floats target = wanted[r][place];
        for (int i = 0; i < place; ++i) target -= values[r][i] * factor[i * kPlaces + place];
        for (int lane = 0; lane < kLanes; ++lane) levels[r][0][lane] = p.entry(r, 0, entry[lane], place);
        levels[r][0] *= scale[r];
        for (int bit = 1; bit <= p.further[r]; ++bit) {
            Floats increment{};
            for (int lane = 0; lane < kLanes; ++lane) increment[lane] = p.entry(r, bit, entry[lane], place);
            increment *= scale[r];
            for (int t = (1 << (bit - 1)) - 1; t >= 0; --t) {
                levels[r][2 * t + 1] = levels[r][t] + increment;
                levels[r][2 * t] = levels[r][t];
            }
        }
        const int more = p.further[r] - bits;
        bits = p.further[r];
        // Downwards, for a code's prefix stands before it.
        for (int t = (1 << bits) - 1; t >= 0; --t) {
            const Floats error = target - levels[r][t] * diagonal;
            costs[t] = costs[t >> more] + error * error * p.lambdas[r];
        }
    }
    Floats least = costs[0];
    Ints code{};
    for (int t = 1; t < 1 << most; ++t) {
        const Ints better = costs[t] < least;
        least = better ? costs[t] : least;
        code = better ? Ints{} + t : code;
    }
    parent = (entry >> 2 * place & 3) << kFurther | code << (kFurther - most);
    for (int64_t r = 0; r < p.widths; ++r) {
        for (int lane = 0; lane < kLanes; ++lane) {
            values[r][place][lane] = levels[r][code[lane] >> (most - p.further[r])][lane];
        }
    }
    return least;
}

// What the current codes of a four decode to, and these.
__attribute__((always_inline)) inline void decode_current(const Problem& p, int64_t column, int64_t row,
                                                          const Floats* scale, Floats (*values)[kPlaces],
                                                          Ints* parents) {
    Ints entry{};
    for (int place = 0; place < kPlaces; ++place) {
        const uint8_t* current = p.current + (column + place) * p.rows + row;
        for (int lane = 0; lane < kLanes; ++lane) parents[place][lane] = current[lane];
        entry |= parents[place] >> kFurther << 2 * place;
    }
    for (int64_t r = 0; r < p.widths; ++r) {
        for (int place = 0; place < kPlaces; ++place) {
            for (int lane = 0; lane < kLanes; ++lane) {
                float level = p.entry(r, 0, entry[lane], place);
                for (int bit = 1; bit <= p.further[r]; ++bit) {
                    if (parents[place][lane] >> (kFurther - bit) & 1) level += p.entry(r, bit, entry[lane], place);
                }
                values[r][place][lane] = scale[r][lane] * level;
            }
        }
    }
}

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MATQUANT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MATQUANT_CLONES
#endif

MATQUANT_CLONES
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
    int most = 0;
    for (int64_t r = 0; r < p.widths; ++r) most = std::max(most, p.further[r]);

    for (int64_t four = 0; four < block / kPlaces; ++four) {
        const int64_t first = four * kPlaces, column = p.begin + first;
        const float* factor = p.factor(four);
        Floats weight[kMaxWidths][kPlaces], wanted[kMaxWidths][kPlaces], scale[kMaxWidths];
        for (int64_t r = 0; r < p.widths; ++r) {
            scale[r] = *lanes(p.scales + (r * p.groups + p.group_of_column[column]) * p.rows + row);
            for (int place = 0; place < kPlaces; ++place) {
                weight[r][place] = copies[r * block + first + place];
                wanted[r][place] = Floats{};
                for (int i = 0; i <= place; ++i) wanted[r][place] += weight[r][i] * factor[i * kPlaces + place];
            }
        }

        // The best entries, the best first.
        Floats lowest[kCandidates];
        Ints entries[kCandidates];
        for (int candidate = 0; candidate < kCandidates; ++candidate) {
            lowest[candidate] = Floats{} + __builtin_inff();
            entries[candidate] = Ints{};
        }
        for (int index = 0; index < kIndices; ++index) {
            Floats cost{};
            for (int64_t r = 0; r < p.widths; ++r) {
                const int64_t at = (four * p.widths + r) * kIndices + index;
                Floats error{};
                if (p.further[r] == 0) {
                    const float* projected = p.projected.data() + at * kPlaces;
                    for (int place = 0; place < kPlaces; ++place) {
                        const Floats off = wanted[r][place] - scale[r] * projected[place];
                        error += off * off;
                    }
                } else {
                    const Reach* reach = p.reach.data() + (r * kIndices + index) * kPlaces;
                    for (int place = 0; place < kPlaces; ++place) {
                        const Floats below = scale[r] * reach[place].low - weight[r][place];
                        const Floats above = weight[r][place] - scale[r] * reach[place].high;
                        Floats off;
                        if (p.further[r] == 1) {
                            const Floats squares[2] = {below * below, above * above};
                            off = squares[0] < squares[1] ? squares[0] : squares[1];
                        } else {
                            Floats outside = below > above ? below : above;
                            outside = outside > Floats{} ? outside : Floats{};
                            off = outside * outside;
                        }
                        error += off * (factor[place * kPlaces + place] * factor[place * kPlaces + place]);
                    }
                    if (p.further[r] > 1) error += scale[r] * scale[r] * p.within[at];
                }
                cost += error * p.lambdas[r];
            }
            Ints number = Ints{} + index;
            for (int candidate = 0; candidate < kCandidates; ++candidate) {
                const Ints better = cost < lowest[candidate];
                const Floats moved = better ? lowest[candidate] : cost;
                const Ints moved_number = better ? entries[candidate] : number;
                lowest[candidate] = better ? cost : lowest[candidate];
                entries[candidate] = better ? number : entries[candidate];
                cost = moved;
                number = moved_number;
            }
        }

        Floats decoded[kMaxWidths][kPlaces], before[kMaxWidths][kPlaces], best = Floats{} + __builtin_inff();
        Ints chosen[kPlaces] = {};  // parent codes
        if (p.current) {            // which are kept if nothing is better
            decode_current(p, column, row, scale, before, chosen);
            best = Floats{};
            for (int64_t r = 0; r < p.widths; ++r) {
                for (int place = 0; place < kPlaces; ++place) {
                    Floats error = wanted[r][place];
                    for (int i = 0; i <= place; ++i) error -= before[r][i] * factor[i * kPlaces + place];
                    best += error * error * p.lambdas[r];
                    decoded[r][place] = before[r][place];
                }
            }
        }
        for (int candidate = 0; candidate < kCandidates; ++candidate) {
            const Ints entry = entries[candidate];
            Floats values[kMaxWidths][kPlaces], total{};
            Ints parents[kPlaces];
            for (int place = 0; place < kPlaces; ++place) {
                total += refine(p, entry, place, factor, wanted, scale, most, values, parents[place]);
            }
            const Ints better = total < best;
            best = better ? total : best;
            for (int place = 0; place < kPlaces; ++place) {
                chosen[place] = better ? parents[place] : chosen[place];
                for (int64_t r = 0; r < p.widths; ++r) {
                    decoded[r][place] = better ? values[r][place] : decoded[r][place];
                }
            }
        }
        for (int place = 0; place < kPlaces; ++place) {
            uint8_t* codes = p.codes + (first + place) * p.rows + row;
            for (int lane = 0; lane < kLanes; ++lane) codes[lane] = static_cast<uint8_t>(chosen[place][lane]);
        }

        for (int64_t r = 0; r < p.widths; ++r) {
            Floats error[kPlaces];
            if (p.current) {
                for (int place = 0; place < kPlaces; ++place) error[place] = decoded[r][place] - before[r][place];
            } else {
                for (int place = 0; place < kPlaces; ++place) {
                    error[place] = wanted[r][place];
                    for (int i = 0; i <= place; ++i) error[place] -= decoded[r][i] * factor[i * kPlaces + place];
                }
            }
            for (int place = 0; place < kPlaces; ++place) {
                const int64_t j = first + place;
                *reinterpret_cast<UnalignedFloats*>(p.errors + (j * p.widths + r) * p.rows + row) = error[place];
                for (int64_t later = first + kPlaces; later < block; ++later) {
                    copies[r * block + later] -= error[place] * p.coupling[j * block + later];
                }
            }
        }
    }
}

std::tuple<Tensor, Tensor> solve_fours(const Tensor& copies, const Tensor& scales, const Tensor& group_of_column,
                                       const Tensor& factors, const Tensor& coupling,
                                       const std::optional<Tensor>& current, const Tensor& books,
                                       const std::vector<int64_t>& widths, const Tensor& lambdas, int64_t begin,
                                       int64_t end) {
    STD_TORCH_CHECK(copies.dim() == 3, "copies: found ", copies.dim(), " dimensions, expected 3");
    STD_TORCH_CHECK(scales.dim() == 3, "scales: found ", scales.dim(), " dimensions, expected 3");
    const int64_t columns = copies.size(0), count = copies.size(1), rows = copies.size(2), groups = scales.size(1);
    STD_TORCH_CHECK(count == static_cast<int64_t>(widths.size()) && 1 <= count && count <= kMaxWidths, "widths: found ",
                    widths.size(), ", expected as many as copies, which have ", count, ", 1 to ", kMaxWidths);
    STD_TORCH_CHECK(rows % kLanes == 0, "copies: found ", rows, " rows, expected a multiple of ", kLanes);
    STD_TORCH_CHECK(0 <= begin && begin < end && end <= columns && (end - begin) % kPlaces == 0,
                    "block: found columns ", begin, " to ", end, ", expected some fours within ", columns);
    check_tensor("copies", copies, ScalarType::Float, {columns, count, rows});
    check_tensor("scales", scales, ScalarType::Float, {count, groups, rows});
    check_tensor("group_of_column", group_of_column, ScalarType::Int, {columns});
    check_tensor("factors", factors, ScalarType::Float, {(end - begin) / kPlaces, kPlaces, kPlaces});
    check_tensor("coupling", coupling, ScalarType::Float, {end - begin, end - begin});
    if (current) check_tensor("current", *current, ScalarType::Byte, {columns, rows});
    check_tensor("lambdas", lambdas, ScalarType::Float, {count});
    int64_t planes = 0;
    for (size_t index = 0; index < widths.size(); ++index) {
        STD_TORCH_CHECK(kMinWidth <= widths[index] && widths[index] <= kMaxWidth &&
                            (index == 0 || widths[index - 1] < widths[index]),
                        "widths: found ", to_string(widths), ", expected ascending ones in ", kMinWidth, "..",
                        kMaxWidth);
        planes += widths[index] - 1;
    }
    check_tensor("books", books, ScalarType::Float, {planes, kIndices, kPlaces});
    const int32_t* group_data = group_of_column.const_data_ptr<int32_t>();
    for (int64_t column = begin; column < end; ++column) {
        STD_TORCH_CHECK(group_data[column] >= 0 && group_data[column] < groups, "group_of_column: found ",
                        group_data[column], ", expected 0 to ", groups - 1);
    }

    Tensor codes = torch::stable::empty({end - begin, rows}, ScalarType::Byte);
    Tensor errors = torch::stable::empty({end - begin, count, rows}, ScalarType::Float);
    Problem problem{};
    problem.widths = count;
    problem.rows = rows;
    problem.groups = groups;
    problem.begin = begin;
    problem.end = end;
    problem.copies = copies.const_data_ptr<float>();
    problem.scales = scales.const_data_ptr<float>();
    problem.group_of_column = group_data;
    problem.factors = factors.const_data_ptr<float>();
    problem.coupling = coupling.const_data_ptr<float>();
    problem.current = current ? current->const_data_ptr<uint8_t>() : nullptr;
    const float* book = books.const_data_ptr<float>();
    for (int64_t r = 0; r < count; ++r) {
        problem.further[r] = static_cast<int>(widths[r]) - kMinWidth;
        problem.book[r] = book;
        problem.lambdas[r] = lambdas.const_data_ptr<float>()[r];
        book += (widths[r] - 1) * kIndices * kPlaces;
    }
    problem.codes = codes.mutable_data_ptr<uint8_t>();
    problem.errors = errors.mutable_data_ptr<float>();
    prepare(problem);
    torch::stable::parallel_for(0, rows / kLanes, 1, [&](int64_t first, int64_t last) {
        std::vector<float> scratch(count * (end - begin) * kLanes);
        for (int64_t chunk = first; chunk < last; ++chunk) solve_lanes(problem, chunk * kLanes, scratch.data());
    });
    return {codes, errors};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("solve_fours", TORCH_BOX(&solve_fours)); }

}  // namespace matquant::cpu

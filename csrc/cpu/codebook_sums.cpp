// What codes decode to with a codebook, and the transpose of it: the inner loops of the fit of codebooks and of their
// training (vllm_matquant/quantize/codebook_fit.py). Here an entry with its signs is a row of a table of 256.
//
// Threads take whole rows. Sums are taken in double, over chunks of rows that do not depend on the number of threads,
// and added up in the order of these.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "decoder.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kBlock = 16;            // columns with four indices: column j has its next places 4, 8 and 12 further on
constexpr int64_t kMostChunks = 128;  // of rows, each with sums of its own
constexpr int64_t kLeastRows = 16;    // of a chunk

int64_t check_codes(const Tensor& codes, int64_t width) {
    STD_TORCH_CHECK(kMinWidth <= width && width <= kMaxWidth, "width: found ", width, ", expected ", kMinWidth, " to ",
                    kMaxWidth);
    STD_TORCH_CHECK(codes.dim() == 2, "codes: found ", codes.dim(), " dimensions, expected 2");
    check_tensor("codes", codes, ScalarType::Byte, {codes.size(0), codes.size(1)});
    STD_TORCH_CHECK(codes.size(1) % kBlock == 0, "codes: found ", codes.size(1), " columns, expected a multiple of ",
                    kBlock);
    return width - kMinWidth;
}

// The index of the four columns of which `codes` is the first; codes have `further` bits past the two of an index.
int index_of(const uint8_t* codes, int64_t further) {
    int index = 0;
    for (int place = 0; place < kPlaces; ++place) index |= (codes[kPlaces * place] >> further & 3) << 2 * place;
    return index;
}

// Calls `each(column, code, at)` for the columns of a row: `at` is the place of its entry in a table [256, 4].
template <class Each>
void for_each_weight(const uint8_t* codes, int64_t columns, int64_t further, const Each& each) {
    for (int64_t block = 0; block < columns; block += kBlock) {
        for (int64_t first = block; first < block + kBlock / kPlaces; ++first) {
            const int index = index_of(codes + first, further);
            for (int place = 0; place < kPlaces; ++place) {
                const int64_t column = first + kPlaces * place;
                each(column, codes[column], index * kPlaces + place);
            }
        }
    }
}

Tensor codebook_levels(const Tensor& codes, const Tensor& planes) {
    const int64_t further = check_codes(codes, planes.dim() == 3 ? planes.size(0) + 1 : 0);
    check_tensor("planes", planes, ScalarType::Float, {1 + further, kIndices, kPlaces});
    const int64_t rows = codes.size(0), columns = codes.size(1);
    Tensor levels = torch::stable::empty({rows, columns}, ScalarType::Float);
    const auto* code_data = codes.const_data_ptr<uint8_t>();
    const auto* table = planes.const_data_ptr<float>();
    auto* result = levels.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            float* values = result + row * columns;
            for_each_weight(code_data + row * columns, columns, further, [&](int64_t column, int code, int at) {
                float level = table[at];
                for (int64_t bit = 1; bit <= further; ++bit) {
                    level += static_cast<float>(code >> (further - bit) & 1) * table[bit * kIndices * kPlaces + at];
                }
                values[column] = level;
            });
        }
    });
    return levels;
}

Tensor codebook_sums(const Tensor& codes, const Tensor& weights, int64_t width) {
    const int64_t further = check_codes(codes, width);
    const int64_t rows = codes.size(0), columns = codes.size(1), size = (1 + further) * kIndices * kPlaces;
    check_tensor("weights", weights, ScalarType::Float, {rows, columns});
    Tensor sums = torch::stable::empty({1 + further, kIndices, kPlaces}, ScalarType::Float);
    const auto* code_data = codes.const_data_ptr<uint8_t>();
    const auto* weight_data = weights.const_data_ptr<float>();
    const int64_t chunk = std::max(kLeastRows, (rows + kMostChunks - 1) / kMostChunks);
    const int64_t chunks = (rows + chunk - 1) / chunk;
    std::vector<double> partial(chunks * size);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin * chunk; row < std::min(rows, end * chunk); ++row) {
            double* totals = partial.data() + row / chunk * size;
            const float* values = weight_data + row * columns;
            for_each_weight(code_data + row * columns, columns, further, [&](int64_t column, int code, int at) {
                totals[at] += values[column];
                for (int64_t bit = 1; bit <= further; ++bit) {
                    totals[bit * kIndices * kPlaces + at] += values[column] * (code >> (further - bit) & 1);
                }
            });
        }
    });
    auto* result = sums.mutable_data_ptr<float>();
    for (int64_t at = 0; at < size; ++at) {
        double total = 0.0;
        for (int64_t index = 0; index < chunks; ++index) total += partial[index * size + at];
        result[at] = static_cast<float>(total);
    }
    return sums;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) {
    m.impl("codebook_levels", TORCH_BOX(&codebook_levels));
    m.impl("codebook_sums", TORCH_BOX(&codebook_sums));
}

}  // namespace matquant::cpu

// From the form on disk (base field and planes, packed along the rows) to the tiles that kernels read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "check.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Exchanges the bits that `mask` selects with those `shift` places above them.
constexpr uint32_t exchange(uint32_t word, int shift, uint32_t mask) {
    const uint32_t difference = (word ^ word >> shift) & mask;
    return word ^ difference ^ difference << shift;
}

// 4 steps x 4 columns of 2-bit fields to 4 columns x 4 steps. A field's place is the number (step, column) of 2 + 2
// bits, and becomes (column, step): two exchanges of bits of that number.
constexpr uint32_t transpose_base(uint32_t word) {
    word = exchange(word, 6, 0x00cc00cc);
    return exchange(word, 12, 0x0000f0f0);
}

// 8 steps x 4 columns of bits to 4 columns x 8 steps: the place (step, column) of 3 + 2 bits becomes (column, step), a
// cycle of all five, which is four exchanges.
constexpr uint32_t transpose_plane(uint32_t word) {
    word = exchange(word, 14, 0x0000cccc);
    word = exchange(word, 7, 0x00aa00aa);
    word = exchange(word, 2, 0x0c0c0c0c);
    return exchange(word, 1, 0x22222222);
}

// Four bytes of each row of the form on disk make up 64 bytes of a tile: those of one plane, or one half of its base
// field. Rows may end before the tile does, and a tile may have rows that the layer has not: zeros.
template <uint32_t (*transpose)(uint32_t)>
void repack_words(const uint8_t* source, int64_t row_bytes, int64_t rows, uint8_t* target) {
    for (int64_t first = 0; first < row_bytes; first += 4, target += kPlaneBytes) {
        uint32_t words[kTileRows] = {};
        if (rows == kTileRows && first + 4 <= row_bytes) {
            for (int64_t row = 0; row < kTileRows; ++row) {
                std::memcpy(&words[row], source + row * row_bytes + first, 4);
            }
        } else {
            for (int64_t row = 0; row < rows; ++row) {
                std::memcpy(&words[row], source + row * row_bytes + first, std::min<int64_t>(4, row_bytes - first));
            }
        }
        for (uint32_t& word : words) {
            word = transpose(word);
        }
        std::memcpy(target, words, kPlaneBytes);
    }
}

void repack_codes(const Tensor& base, const std::vector<Tensor>& planes, const std::vector<int64_t>& output_sizes,
                  const Tensor& out) {
    check_output_sizes(output_sizes);
    STD_TORCH_CHECK(base.dim() == 2, "base: found ", base.dim(), " dimensions, expected 2");
    STD_TORCH_CHECK(planes.size() <= kMaxWidth - kMinWidth, "planes: found ", planes.size(), ", expected at most ",
                    kMaxWidth - kMinWidth);
    const int64_t base_bytes = base.size(1);
    const int64_t plane_bytes = ceil_div(base_bytes, 2);
    const std::vector<TileRows> tile_rows = split_into_tiles(output_sizes);
    const int64_t rows = tile_rows.back().first + tile_rows.back().count;
    check_tensor("base", base, ScalarType::Byte, {rows, base_bytes});
    std::vector<const uint8_t*> plane_data;
    for (const Tensor& plane : planes) {
        check_tensor("planes", plane, ScalarType::Byte, {rows, plane_bytes});
        plane_data.push_back(plane.const_data_ptr<uint8_t>());
    }

    // A step is a byte of the base field and half a byte of a plane.
    const int64_t tiles = ceil_div(base_bytes, kTileSteps);
    const int64_t row_count = static_cast<int64_t>(tile_rows.size());
    const int64_t resident_width = kBaseBits + static_cast<int64_t>(planes.size());
    check_tensor("out", out, ScalarType::Byte, {resident_width, row_count, tiles, kPlaneBytes});
    const uint8_t* base_data = base.const_data_ptr<uint8_t>();
    uint8_t* result_data = out.mutable_data_ptr<uint8_t>();

    torch::stable::parallel_for(0, row_count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const TileRows& part = tile_rows[row];
            uint8_t* target = result_data + kBaseBits * row * tiles * kPlaneBytes;
            if (tiles > 0) {  // the last tile's second half has no bytes on disk where rows end in its first
                std::memset(target + (kBaseBits * tiles - 1) * kPlaneBytes, 0, kPlaneBytes);
            }
            repack_words<transpose_base>(base_data + part.first * base_bytes, base_bytes, part.count, target);
            for (size_t plane = 0; plane < plane_data.size(); ++plane) {
                target = result_data + ((kBaseBits + plane) * row_count + row) * tiles * kPlaneBytes;
                repack_words<transpose_plane>(plane_data[plane] + part.first * plane_bytes, plane_bytes, part.count,
                                              target);
            }
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("repack_codes", TORCH_BOX(&repack_codes)); }

}  // namespace matquant::cpu

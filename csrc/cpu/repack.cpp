// From the form on disk (base field and planes, packed along the rows) to the tiles that kernels read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/layout.h"
#include "cpu/prepared_weight.h"

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

// The lower or upper four steps of each byte of a transposed plane, as the lower bits of 2-bit fields.
constexpr uint32_t spread(uint32_t word, int half) {
    word = word >> 4 * half & 0x0f0f0f0f;
    word = (word | word << 2) & 0x33333333;
    return (word | word << 1) & 0x55555555;
}

// What one row of tiles has of a tensor on disk: rows may end before the tile does, and a tile may have rows that the
// layer has not. Both are zeros.
struct DiskRows {
    const uint8_t* data;
    int64_t row_bytes;
    int64_t count;

    // Four bytes of each row.
    std::array<uint32_t, kTileRows> words(int64_t first) const {
        std::array<uint32_t, kTileRows> result = {};
        if (count == kTileRows && first + 4 <= row_bytes) {
            for (int64_t row = 0; row < kTileRows; ++row) {
                std::memcpy(&result[row], data + row * row_bytes + first, 4);
            }
        } else if (first < row_bytes) {
            for (int64_t row = 0; row < count; ++row) {
                std::memcpy(&result[row], data + row * row_bytes + first, std::min<int64_t>(4, row_bytes - first));
            }
        }
        return result;
    }
};

// Writes so many times 64 bytes of one row of tiles: the tiles of a plane, or the halves of those of the base field.
template <uint32_t (*transpose)(uint32_t)>
void repack_words(const DiskRows& source, int64_t count, uint8_t* target) {
    for (int64_t index = 0; index < count; ++index, target += kPlaneBytes) {
        std::array<uint32_t, kTileRows> words = source.words(4 * index);
        for (uint32_t& word : words) {
            word = transpose(word);
        }
        std::memcpy(target, words.data(), kPlaneBytes);
    }
}

void repack_pair(const DiskRows& upper, const DiskRows& lower, int64_t tiles, uint8_t* target) {
    for (int64_t tile = 0; tile < tiles; ++tile, target += 2 * kPlaneBytes) {
        std::array<uint32_t, kTileRows> high = upper.words(4 * tile), low = lower.words(4 * tile);
        std::array<uint32_t, kTileRows> fields[2];
        for (int64_t row = 0; row < kTileRows; ++row) {
            high[row] = transpose_plane(high[row]);
            low[row] = transpose_plane(low[row]);
            for (int half = 0; half < 2; ++half) {
                fields[half][row] = spread(high[row], half) << 1 | spread(low[row], half);
            }
        }
        std::memcpy(target, fields, 2 * kPlaneBytes);
    }
}

void repack_codes(const Tensor& base, const std::vector<Tensor>& planes, const std::vector<int64_t>& output_sizes,
                  const std::string& layout, const Tensor& out) {
    check_output_sizes(output_sizes);
    const bool paired = is_paired(layout);
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
    uint8_t* out_data = out.mutable_data_ptr<uint8_t>();
    const int64_t row_size = tiles * kPlaneBytes;

    torch::stable::parallel_for(0, row_count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const TileRows& part = tile_rows[row];
            const auto disk_plane = [&](int64_t plane) {
                return DiskRows{plane_data[plane - kBaseBits] + part.first * plane_bytes, plane_bytes, part.count};
            };
            repack_words<transpose_base>({base_data + part.first * base_bytes, base_bytes, part.count}, 2 * tiles,
                                         out_data + 2 * row * row_size);
            for (int64_t plane = kBaseBits; plane < resident_width; ++plane) {
                uint8_t* target = out_data + plane * row_count * row_size;
                if (paired && plane + 1 < resident_width) {
                    repack_pair(disk_plane(plane), disk_plane(plane + 1), tiles, target + 2 * row * row_size);
                    ++plane;
                } else {
                    repack_words<transpose_plane>(disk_plane(plane), tiles, target + row * row_size);
                }
            }
        }
    });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("repack_codes", TORCH_BOX(&repack_codes)); }

}  // namespace matquant::cpu

// From the form on disk (base field and planes, packed along the rows) to the planes of tiles that kernels read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "check.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bits 0, 2, 4 and 6 of a byte, gathered into four.
uint64_t even_bits(uint64_t byte) {
    byte &= 0x55;
    byte = (byte | byte >> 1) & 0x33;
    return (byte | byte >> 2) & 0x0f;
}

Tensor repack_codes(const Tensor& base, const std::vector<Tensor>& planes, const std::vector<int64_t>& output_sizes) {
    check_output_sizes(output_sizes);
    STD_TORCH_CHECK(base.dim() == 2, "base: found ", base.dim(), " dimensions, expected 2");
    STD_TORCH_CHECK(planes.size() <= kMaxWidth - kMinWidth, "planes: found ", planes.size(), ", expected at most ",
                    kMaxWidth - kMinWidth);
    // A byte of the base field is one row of a tile, half a byte of a plane is.
    const int64_t steps = base.size(1);
    const int64_t plane_bytes = ceil_div(steps, 2);
    const std::vector<TileRows> tile_rows = split_into_tiles(output_sizes);
    const int64_t rows = tile_rows.back().first + tile_rows.back().count;
    check_tensor("base", base, ScalarType::Byte, {rows, steps});
    std::vector<const uint8_t*> plane_data;
    for (const Tensor& plane : planes) {
        check_tensor("planes", plane, ScalarType::Byte, {rows, plane_bytes});
        plane_data.push_back(plane.const_data_ptr<uint8_t>());
    }

    const int64_t tiles = static_cast<int64_t>(tile_rows.size());
    const int64_t plane_size = tiles * steps;
    const int64_t resident_width = kMinWidth + static_cast<int64_t>(planes.size());
    Tensor result = torch::stable::empty({resident_width, tiles, steps}, ScalarType::Long);
    const uint8_t* base_data = base.const_data_ptr<uint8_t>();
    int64_t* result_data = result.mutable_data_ptr<int64_t>();

    torch::stable::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            for (int64_t step = 0; step < steps; ++step) {
                uint64_t masks[kMaxWidth] = {};
                for (int64_t lane = 0; lane < tile_rows[tile].count; ++lane) {
                    const int64_t row = tile_rows[tile].first + lane;
                    const int64_t shift = lane * kTileColumns;
                    const uint64_t pairs = base_data[row * steps + step];
                    masks[0] |= even_bits(pairs >> 1) << shift;
                    masks[1] |= even_bits(pairs) << shift;
                    for (size_t plane = 0; plane < plane_data.size(); ++plane) {
                        const uint64_t byte = plane_data[plane][row * plane_bytes + step / 2];
                        masks[kMinWidth + plane] |= (byte >> (step % 2 * kTileColumns) & 0xf) << shift;
                    }
                }
                for (int64_t plane = 0; plane < resident_width; ++plane) {
                    result_data[plane * plane_size + tile * steps + step] = static_cast<int64_t>(masks[plane]);
                }
            }
        }
    });
    return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("repack_codes", TORCH_BOX(&repack_codes)); }

}  // namespace matquant::cpu

// The layout of codes in memory, shared by every backend.
//
// A tile is 16 rows (outputs) by 4 columns (inputs) of weights. One plane of a tile is a 64-bit mask with bit
// row * 4 + column: as bytes of a 512-bit register the codes of a tile lie so that each 32-bit lane is one row.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace matquant {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileColumns = 4;
constexpr int kMinWidth = 2;
constexpr int kMaxWidth = 8;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The rows of one tile, all of the same partition: each part of a fused layer (q, k, v) starts a tile of its own.
struct TileRows {
    int64_t partition;
    int64_t first;
    int64_t count;  // at most kTileRows
};

inline std::vector<TileRows> split_into_tiles(const std::vector<int64_t>& output_sizes) {
    std::vector<TileRows> tiles;
    int64_t first = 0;
    for (size_t partition = 0; partition < output_sizes.size(); ++partition) {
        const int64_t end = first + output_sizes[partition];
        for (; first < end; first += tiles.back().count) {
            tiles.push_back({static_cast<int64_t>(partition), first, std::min(kTileRows, end - first)});
        }
    }
    return tiles;
}

}  // namespace matquant

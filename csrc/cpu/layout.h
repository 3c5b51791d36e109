// The layout of codes in memory, as the kernels of the CPU read them.
//
// A tile is 16 rows (outputs) by 32 columns (inputs) of weights, taken as 8 steps of 4 columns. A byte of a tile
// belongs to one row and to one column of each step: byte row * 4 + column % 4, so that each 32-bit lane of a register
// is one row. A plane of a tile is 64 bytes, whose bit `step` is that of step 0..7. Two planes in a pair, as the base
// field is, are 128 bytes of 2-bit fields: steps 0..3 in the first 64, 4..7 in the others, that of step s in the bits
// 2 * (s % 4) and up.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decoder.h"

namespace matquant::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kStepColumns = 4;
constexpr int64_t kTileSteps = 8;
constexpr int64_t kTileColumns = kTileSteps * kStepColumns;
constexpr int64_t kPlaneBytes = kTileRows * kStepColumns;  // of a tile
constexpr int kBaseBits = 2;

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// The rows of one row of tiles, all of the same partition: each part of a fused layer (q, k, v) starts a tile of its
// own.
struct TileRows {
    int64_t partition;
    int64_t first;
    int64_t count;  // at most kTileRows
};

// The layouts of planes past the base field: in pairs too, all but the last of an odd number, since a core reads few
// streams faster than many, or single, so that a width may part each two.
constexpr const char* kPairsLayout = "cpu-pairs";
constexpr const char* kPlanesLayout = "cpu-planes";

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

// Bytes of the decoders of a row of tiles at one width. In float16: [groups, 2 (scale, offset), 16 rows]. In int8:
// steps in bfloat16 [2 (of scales, of centres), 16], then for each group uint8 [16] codes of scales and int8 [16] of
// centres. With a codebook: steps in bfloat16 [16], then for each group uint8 [16] codes of scales.
constexpr int64_t decoder_bytes(DecoderForm form, int64_t groups) {
    switch (form) {
        case DecoderForm::kFloat16:
            return groups * 2 * kTileRows * 2;
        case DecoderForm::kInt8:
            return (2 + groups) * 2 * kTileRows;
        case DecoderForm::kCodebook:
            return (2 + groups) * kTileRows;
    }
    return 0;
}

// Bytes, ahead of those, that all rows of a partition share.
constexpr int64_t shared_decoder_bytes(DecoderForm form, int width) {
    return form == DecoderForm::kCodebook ? codebook_planes(width) * kEntryPlaneBytes : 0;
}

}  // namespace matquant::cpu

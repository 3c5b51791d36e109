// What the host tells the kernels of a layer and a product, and how much memory they take: plain C++, for the plan of
// the host and for the kernels.
#pragma once

#include "cuda/tile.h"
#include "decoder.h"

namespace matquant::cuda {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kLanes;
constexpr int kMaxPartitions = 8;
constexpr int kBaseBits = 2;
constexpr uint32_t kNone = 0xffffffff;

// A warp takes its tiles in steps of two: 128 columns. `groups` is the number of groups in a step: 1 (of 128 columns or
// more), 2 or 4.
constexpr int kStepTiles = 2;
constexpr int kStepColumns = kStepTiles * kTileColumns;

// Bytes of the decoders of a row of tiles: before its groups, and of each group.
MATQUANT_HOST_DEVICE constexpr int step_bytes(DecoderForm form) {
    return form == DecoderForm::kFloat16 ? 0 : (form == DecoderForm::kInt8 ? 2 : 1) * kTileRows * 2;
}
MATQUANT_HOST_DEVICE constexpr int group_bytes(DecoderForm form) {
    return form == DecoderForm::kCodebook ? kTileRows : 2 * kTileRows * (form == DecoderForm::kInt8 ? 1 : 2);
}

// Bytes of what a partition's rows share of the decoders of a width: its codebook, if it has one. They come first.
MATQUANT_HOST_DEVICE constexpr int shared_decoder_bytes(DecoderKind kind, int width) {
    return kind == DecoderKind::kCodebook ? codebook_planes(width) * kEntryPlaneBytes : 0;
}

// A segment of a weight and a product, as the host describes them.
struct Shape {
    int32_t rows;  // outputs of all partitions
    int32_t tokens;
    int32_t output_stride;  // from token to token
    int32_t tile_rows;      // of all partitions
    int32_t tile_columns;
    int32_t resident_width;
    int32_t groups;
    int32_t group_shift;  // a group has 2^shift steps; unused where a step has several
    int32_t slots;        // that a token may have; 1 where tokens have none
    int32_t partitions;
    int32_t partition_tiles[kMaxPartitions];             // where each begins, in rows of tiles
    int32_t partition_rows[kMaxPartitions];              // and in outputs
    uint32_t first_decoders[kMaxWidth - kMinWidth + 1];  // for each width the byte where its decoders begin, or kNone

    MATQUANT_HOST_DEVICE int steps() const { return (tile_columns + kStepTiles - 1) / kStepTiles; }

    MATQUANT_HOST_DEVICE uint32_t decoders_of(int width) const {
        uint32_t result = kNone;
        // All of them, for a kernel's parameters have no addresses that could be computed.
        for (int place = 0; place <= kMaxWidth - kMinWidth; ++place) {
            result = width == kMinWidth + place ? first_decoders[place] : result;
        }
        return result;
    }
};

// Steps that a warp has under way, and what one takes of shared memory.
MATQUANT_HOST_DEVICE constexpr int stages(int width) { return width <= 4 ? 3 : 2; }
MATQUANT_HOST_DEVICE constexpr int stage_bytes(DecoderKind kind, int width, int groups) {
    return kStepTiles * width * kPlaneBytes + groups * group_bytes(form_of(kind, width));
}

MATQUANT_HOST_DEVICE constexpr int larger(int a, int b) { return a > b ? a : b; }

// Shared memory of the tables of a codebook, see levels.cuh.
MATQUANT_HOST_DEVICE constexpr int table_bytes(int width) { return 1024 * (width > kCoarseBits ? 48 : 32); }

// Shared memory of a block that multiplies `tokens` with a layer that has slices of up to this width: the stages of its
// warps or, of codebooks, the tables, then the warps' sums.
MATQUANT_HOST_DEVICE constexpr int shared_bytes(DecoderKind kind, int tokens, int groups, int width) {
    if (kind == DecoderKind::kCodebook) {
        return larger(table_bytes(width), kWarps * kTileRows * tokens * 4);
    }
    const int narrow = width < 4 ? width : 4;
    const int staged = larger(stages(narrow) * stage_bytes(kind, narrow, groups),
                              width <= 4 ? 0 : stages(width) * stage_bytes(kind, width, groups));
    return kWarps * larger(staged, kTileRows * tokens * 4);
}

}  // namespace matquant::cuda

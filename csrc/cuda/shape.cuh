// What the host tells the kernels of a layer and a product, and the part of the work that a warp takes of it.
#pragma once

#include "cuda/element.cuh"

namespace matquant::cuda {

constexpr int kWarps = 4;
constexpr int kMaxPartitions = 8;
constexpr int kBaseBits = 2;
constexpr int kMaxWidth = 8;
constexpr int kNone = 0xff;

// A warp takes its tiles in steps of two: 128 columns. `groups` is the number of groups in a step: 1 (of 128 columns or
// more), 2 or 4.
constexpr int kStepTiles = 2;

// A layer and a product, as the host describes them.
struct Shape {
    int32_t tokens;
    int32_t rows;       // outputs of all partitions
    int32_t tile_rows;  // of all partitions
    int32_t tile_columns;
    int32_t resident_width;
    int32_t groups;
    int32_t group_shift;  // a group has 2^shift steps; unused where a step has several
    int32_t partitions;
    int32_t partition_tiles[kMaxPartitions];  // where each begins, in rows of tiles
    int32_t partition_rows[kMaxPartitions];   // and in outputs
    uint64_t decoders_of_widths;              // a byte for each of 2..8: the index of its decoders, kNone without

    __host__ __device__ int steps() const { return (tile_columns + kStepTiles - 1) / kStepTiles; }

    __device__ int decoder_of(int width) const {
        if (width < kBaseBits || width > kMaxWidth) {
            return kNone;
        }
        return static_cast<int>(decoders_of_widths >> (width - kBaseBits) * 8 & 0xff);
    }
};

// The part of a fused layer that a row of tiles belongs to.
struct Partition {
    int index = 0;
    int first_row = 0;  // of the row of tiles
    int end_of_rows;    // of the partition

    __device__ Partition(const Shape& shape, int tile_row) : end_of_rows(shape.rows) {
        int first_tile = 0;
#pragma unroll
        for (int next = 1; next < kMaxPartitions; ++next) {
            if (next < shape.partitions) {
                const bool reached = tile_row >= shape.partition_tiles[next];
                index += reached ? 1 : 0;
                first_tile = max(first_tile, reached ? shape.partition_tiles[next] : 0);
                first_row = max(first_row, reached ? shape.partition_rows[next] : 0);
                end_of_rows = min(end_of_rows, reached ? shape.rows : shape.partition_rows[next]);
            }
        }
        first_row += (tile_row - first_tile) * kTileRows;
    }
};

template <class Element>
struct Arguments {
    const typename Element::Type* input;  // [tokens, steps * kStepTiles * kTileColumns], zero past the layer's columns
    const uint8_t* planes;                // [tile rows, tile columns, resident width, kPlaneBytes]
    const uint8_t* decoders;              // [decoder widths, tile rows, groups, kDecoderBytes]
    const int32_t* active_width;          // [partitions]
    const typename Element::Type* bias;   // [rows] or nullptr
    typename Element::Type* output;       // [tokens, rows]
    float* partial_sums;                  // [blocks that divide columns, tile rows, tokens, kTileRows]
    uint32_t* arrivals;                   // [passes, tile rows], zero before and after
};

// Steps that a warp has under way, and what one takes of shared memory.
template <int width>
constexpr int kStages = width <= 4 ? 3 : 2;
template <int width, int groups>
constexpr int kStageBytes = kStepTiles * width * kPlaneBytes + groups * kDecoderBytes;
template <int token_tiles>
constexpr int kSumBytes = kTileRows * token_tiles * kTokens * 4;  // of one warp

__host__ __device__ constexpr int larger(int a, int b) { return a > b ? a : b; }

// Shared memory of a block whose layer has slices of up to this width.
template <int token_tiles, int groups>
__host__ __device__ constexpr int shared_bytes(int width) {
    const int weights = kStepTiles * kPlaneBytes, decoders = groups * kDecoderBytes;
    const int narrow = kStages<4> * ((width < 4 ? width : 4) * weights + decoders);
    const int wide = width <= 4 ? 0 : kStages<8> * (width * weights + decoders);
    return kWarps * larger(larger(narrow, wide), kSumBytes<token_tiles>);
}

// A row of tiles, the tokens that it is multiplied with, and the steps of it that a warp takes.
struct Share {
    int tile_row;
    int decoder;  // its width's
    int first_token;
    int begin, end;
};

}  // namespace matquant::cuda

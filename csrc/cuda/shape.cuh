// What the kernels are passed, and the part of the work that a warp takes of it.
#pragma once

#include "cuda/element.cuh"
#include "cuda/shape.h"

namespace matquant::cuda {

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
    const typename Element::Type* input;  // [tokens, steps * kStepColumns], zero past the layer's columns
    const uint8_t* planes;                // [tile rows, tile columns, resident width, kPlaneBytes]
    const uint8_t* decoders;              // of each width [tile rows, decoders.cuh: row_bytes]
    const int32_t* active_widths;         // [slots, partitions]
    const typename Element::Type* bias;   // [rows] or nullptr
    typename Element::Type* output;       // [tokens, rows]
    float* partial_sums;                  // [blocks that divide columns, tile rows, tokens, kTileRows]
    uint32_t* arrivals;                   // [passes, slots, tile rows], zero before and after
    const int32_t* slots;                 // [tokens], the slot of each; nullptr if that is 0 for all
};

// A row of tiles, the tokens that it is multiplied with, and the steps of it that a warp takes.
struct Share {
    int tile_row;
    uint32_t first_decoders;  // the byte where those of its width begin
    int first_token;
    int begin, end;
};

}  // namespace matquant::cuda

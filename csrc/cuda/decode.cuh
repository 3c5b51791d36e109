// The product of few tokens with a layer's slices: y = x W^T + bias, at the speed of memory.
//
// A block of threads takes one row of tiles, a share of its columns and some tokens; each of its warps takes a share of
// these and needs nobody else until the end: it copies its tiles, the activations and decoders for them into its part
// of shared memory, some tiles ahead, and multiplies. Then the warps' sums are added in order, and if the columns were
// divided among several blocks, the last of these to come adds the blocks' sums in order. So results do not depend on
// timing.
#pragma once

#include "cuda/multiply.cuh"
#include "cuda/sums.cuh"

namespace matquant::cuda {

template <class Element, DecoderKind kind, int token_tiles, int groups>
__device__ void decode(const Arguments<Element>& arguments, const Shape& shape, uint8_t* memory) {
    const int tile_row = blockIdx.x, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const Partition partition(shape, tile_row);
    const int width = arguments.active_width[partition.index];
    const uint32_t first_decoders = shape.decoders_of(width);

    const int steps = shape.steps();
    const int workers = gridDim.y * kWarps, worker = blockIdx.y * kWarps + warp;
    const int first_token = blockIdx.z * token_tiles * kTokens;
    const Share share = {tile_row, first_decoders, first_token,
                         static_cast<int>(static_cast<long long>(worker) * steps / workers),
                         static_cast<int>(static_cast<long long>(worker + 1) * steps / workers)};

    Sums results[token_tiles][kRowTiles] = {};
#define MATQUANT_WIDTH(bits)                                                                                   \
    case bits:                                                                                                 \
        multiply_steps<Element, kind, bits, token_tiles, groups>(                                              \
            arguments, shape, share, memory + warp * stages(bits) * stage_bytes(kind, bits, groups), results); \
        break;
    switch (first_decoders == kNone ? 0 : width) {
        MATQUANT_WIDTH(2)
        MATQUANT_WIDTH(3)
        MATQUANT_WIDTH(4)
        MATQUANT_WIDTH(5)
        MATQUANT_WIDTH(6)
        MATQUANT_WIDTH(7)
        MATQUANT_WIDTH(8)
        default:  // a width without decoders: nothing that could be mistaken for a result
#pragma unroll
            for (int index = 0; index < token_tiles * kRowTiles * 4; ++index) {
                results[index / 4 / kRowTiles][index / 4 % kRowTiles].value[index % 4] = __int_as_float(0x7fffffff);
            }
    }
#undef MATQUANT_WIDTH

    __syncthreads();  // every warp is done with its part of the memory
    const BlockSums<token_tiles> sums(memory);
    sums.store(warp, lane, results);
    __syncthreads();

    const int values = kTileRows * min(token_tiles * kTokens, shape.tokens - first_token);
    const size_t first_value = (static_cast<size_t>(tile_row) * shape.tokens + first_token) * kTileRows;
    const size_t partial_stride = static_cast<size_t>(shape.tile_rows) * shape.tokens * kTileRows;
    float* partial_sums = arguments.partial_sums + first_value;
    uint32_t* arrivals = arguments.arrivals + blockIdx.z * shape.tile_rows + tile_row;
    bool last = true;
    if (gridDim.y > 1) {
        for (int value = threadIdx.x; value < values; value += blockDim.x) {
            partial_sums[blockIdx.y * partial_stride + value] = sums.total(value / kTileRows, value % kTileRows);
        }
        __shared__ bool is_last;
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            is_last = atomicAdd(arrivals, 1) == gridDim.y - 1;
        }
        __syncthreads();
        last = is_last;
        __threadfence();
    }
    if (!last) {
        return;
    }
    for (int value = threadIdx.x; value < values; value += blockDim.x) {
        const int token = value / kTileRows, row = value % kTileRows;
        float sum = 0.0f;
        if (gridDim.y == 1) {
            sum = sums.total(token, row);
        } else {
            for (int block = 0; block < gridDim.y; ++block) {
                sum += __ldcg(&partial_sums[block * partial_stride + value]);
            }
        }
        if (partition.first_row + row < partition.end_of_rows) {
            if (arguments.bias != nullptr) {
                sum += Element::to_float(arguments.bias[partition.first_row + row]);
            }
            arguments
                .output[static_cast<size_t>(first_token + token) * shape.output_stride + partition.first_row + row] =
                Element::from_float(sum);
        }
    }
    if (gridDim.y > 1 && threadIdx.x == 0) {
        *arrivals = 0;
    }
}

}  // namespace matquant::cuda

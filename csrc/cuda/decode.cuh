// The product of few tokens with a layer's slices: y = x W^T + bias, at the speed of memory.
//
// A block of threads takes one row of tiles, a share of its columns and some tokens; each of its warps takes a share of
// these and needs nobody else until the end: it copies its tiles, the activations and decoders for them into its part
// of shared memory, some tiles ahead, and multiplies. Then the warps' sums are added in order, and if the columns were
// divided among several blocks, the last of these to come adds the blocks' sums in order. So results do not depend on
// timing.
//
// Where tokens have slots, there is such a block for each slot: it computes all of its tokens at the widths of its slot
// and writes those that have it, so that a token's result is what it would be if all had its widths. If none has it,
// there is nothing to do.
#pragma once

#include "cuda/multiply.cuh"
#include "cuda/multiply_codebook.cuh"
#include "cuda/sums.cuh"

namespace matquant::cuda {

// Which of a block's tokens it writes.
class SlotTokens {
  public:
    // `slots` are those of the block's tokens, of which there are `count`.
    __device__ SlotTokens(const int32_t* slots, int count, int slot) : slots_(slots), count_(count), slot_(slot) {}

    __device__ bool any_of(int tokens) const {
        bool found = slots_ == nullptr;
#pragma unroll 1
        for (int token = 0; token < tokens && !found; ++token) {
            found = has(token);
        }
        return found;
    }
    // The first slot has those that have none, too.
    __device__ bool has(int token) const {
        return slots_ == nullptr || slots_[token] == slot_ || (slot_ == 0 && !is_known(token));
    }
    // For what has none nothing that could be mistaken for a result.
    __device__ float result(int token, float sum) const { return is_known(token) ? sum : __int_as_float(0x7fffffff); }

  private:
    __device__ bool is_known(int token) const {
        return slots_ == nullptr || (0 <= slots_[token] && slots_[token] < count_);
    }

    const int32_t* slots_;
    int count_, slot_;
};

template <class Element, DecoderKind kind, int token_tiles, int groups>
__device__ void decode(const Arguments<Element>& arguments, const Shape& shape, uint8_t* memory) {
    const int tile_row = blockIdx.x, warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const Partition partition(shape, tile_row);
    const int pass = blockIdx.z / shape.slots, slot = blockIdx.z % shape.slots;
    const int first_token = pass * token_tiles * kTokens;
    const int32_t* slots = arguments.slots == nullptr ? nullptr : arguments.slots + first_token;
    const SlotTokens mine(slots, shape.slots, slot);
    if (!mine.any_of(min(token_tiles * kTokens, shape.tokens - first_token))) {
        return;
    }
    const int width = arguments.active_widths[slot * shape.partitions + partition.index];
    const uint32_t first_decoders = shape.decoders_of(width);

    const int steps = shape.steps();
    const int workers = gridDim.y * kWarps, worker = blockIdx.y * kWarps + warp;
    const Share share = {tile_row, first_decoders, first_token,
                         static_cast<int>(static_cast<long long>(worker) * steps / workers),
                         static_cast<int>(static_cast<long long>(worker + 1) * steps / workers)};

    Sums results[token_tiles][kRowTiles] = {};
#define MATQUANT_WIDTH(bits)                                                                                       \
    case bits:                                                                                                     \
        if constexpr (kind == DecoderKind::kCodebook) {                                                            \
            multiply_fours<Element, bits, token_tiles, groups>(arguments, shape, share, partition.index, memory,   \
                                                               results);                                           \
        } else {                                                                                                   \
            multiply_steps<Element, kind, bits, token_tiles, groups>(                                              \
                arguments, shape, share, memory + warp * stages(bits) * stage_bytes(kind, bits, groups), results); \
        }                                                                                                          \
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
            if (mine.has(value / kTileRows)) {
                partial_sums[blockIdx.y * partial_stride + value] = sums.total(value / kTileRows, value % kTileRows);
            }
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
        if (!mine.has(token)) {
            continue;
        }
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
                Element::from_float(mine.result(token, sum));
        }
    }
    if (gridDim.y > 1 && threadIdx.x == 0) {
        *arrivals = 0;
    }
}

}  // namespace matquant::cuda

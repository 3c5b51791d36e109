// The epilogue: the sums of a block's warps.
#pragma once

#include "cuda/shape.cuh"

namespace matquant::cuda {

// The sums of all warps, in order: shared [kWarps, tokens, kTileRows].
template <int token_tiles>
class BlockSums {
  public:
    __device__ explicit BlockSums(uint8_t* memory) : memory_(reinterpret_cast<float*>(memory)) {}

    __device__ void store(int warp, int lane, const Sums (&sums)[token_tiles][kRowTiles]) const {
#pragma unroll
        for (int token_tile = 0; token_tile < token_tiles; ++token_tile) {
#pragma unroll
            for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
#pragma unroll
                for (int index = 0; index < 4; ++index) {
                    const int token = token_tile * kTokens + lane % 4 * 2 + index % 2;
                    const int row = row_tile * 16 + lane / 4 + index / 2 * 8;
                    place(warp, token, row) = sums[token_tile][row_tile].value[index];
                }
            }
        }
    }
    __device__ float total(int token, int row) const {
        float sum = place(0, token, row);
#pragma unroll
        for (int warp = 1; warp < kWarps; ++warp) {
            sum += place(warp, token, row);
        }
        return sum;
    }

  private:
    __device__ float& place(int warp, int token, int row) const {
        return memory_[(warp * token_tiles * kTokens + token) * kTileRows + row];
    }

    float* memory_;
};

}  // namespace matquant::cuda

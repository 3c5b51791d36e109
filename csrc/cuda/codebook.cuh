// What names the levels of a lane's weights, where these come from a codebook: the index of each four and further bits.
//
// Lane t has of a tile the columns 16 t .. 16 t + 15, four fours: j has the columns j, j + 4, j + 8 and j + 12. Byte j
// of a row's word of the base field is its index. Two planes, interleaved to a word like it, have the next two bits of
// its places 0 and 2 in the lower half of byte j, and of places 1 and 3 in the upper half. So one permutation of bytes
// puts an index and the bits that go with it next to each other, as the number of an entry of a table.
#pragma once

#include "cuda/dequantize.cuh"

namespace matquant::cuda {

// Further bits are taken in twos.
constexpr int kMaxTwos = 3;
__host__ __device__ constexpr int further_twos(int width) { return (width - kBaseBits + 1) / 2; }

// Words of a row: indices, and further bits two by two. Of an odd number the last ones' lower bits may be anything.
struct FourWords {
    uint32_t indices, further[kMaxTwos];
    uint32_t thirds;  // of codes of three bits
};

// The third bits of places 1, 0, 3 and 2, from the least significant one on, as bytes of four bits: from a word with
// those of places 0 and 2 where they are to be, and one with the other two's.
__device__ inline uint32_t third_bits(uint32_t even, uint32_t odd) {
    return mask_or(odd, even & 0x0a0a0a0a, 0x05050505);
}

// Those of both rows of a row tile.
template <int width>
__device__ void rows_of(const TileWords& tile, int row_tile, FourWords (&rows)[2]) {
    RowPair further[kMaxTwos] = {};
    if constexpr (width == 3) {
        // Such a plane's word has the second row's bits one place lower, and none of them at the other end.
        const uint32_t word = tile.planes[2][row_tile];
        further[0] = {word, word << 1};
        rows[0].thirds = third_bits(word, word >> 5);
        rows[1].thirds = third_bits(word << 1, word >> 4);
    } else if constexpr (width > 3) {
        further[0] = tile.fields<2, 2>(row_tile);
    }
    if constexpr (width > 4) {
        further[1] = tile.fields<4, (width > 5 ? 2 : 1)>(row_tile);
    }
    if constexpr (width > 6) {
        further[2] = tile.fields<6, (width > 7 ? 2 : 1)>(row_tile);
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
        rows[row].indices = tile.base[row_tile][row];
#pragma unroll
        for (int two = 0; two < kMaxTwos; ++two) {
            rows[row].further[two] = further[two].row[row];
        }
    }
}

// Bytes of four bits: of places 0 and 2, or of 1 and 3.
__device__ inline uint32_t bits_of_pair(uint32_t further, int pair) { return further >> (4 * pair) & 0x0f0f0f0f; }

// Bytes of two words, the lower word's being 0 to 3; 8 more ask for eight times a byte's sign, which __byte_perm does
// not.
__device__ inline uint32_t permute_bytes(uint32_t lower, uint32_t upper, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(lower), "r"(upper), "r"(selector));
    return result;
}

// Byte `four` of the indices, and above it that of `bits`, whose bytes are below 128.
__device__ inline uint32_t number_of(uint32_t indices, uint32_t bits, int four) {
    return permute_bytes(indices, bits, four | (4 + four) << 4 | (12 + four) * 0x1100);
}

}  // namespace matquant::cuda

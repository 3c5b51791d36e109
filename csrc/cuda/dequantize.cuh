// From the words of a tile to the A operand of the tensor cores.
//
// A code is put into the mantissa of a value whose exponent e makes the code's last bit worth 1: the value is then
// 2^e + code, for one instruction, (word & mask) | exponent, and two weights. The sum of all 2^e times the activations
// is taken off again by a product with constants (multiply.cuh). Codes of as many bits as the mantissa has are one such
// value; those of 8 bits are two for bfloat16, the upper 6 and the lower 2 bits, each with a product of its own.
//
// A row's 16 codes in a lane are two rows of eight 2-bit fields in a word of the base field, field f in the bits 2 f
// and 2 f + 1 of each half. Two more bits come from planes, interleaved to a word like it, turned right by two bits;
// the next two from a word turned by four, the last two from one turned by six: so all bits of a code follow each
// other. Taking every other pair of bits from one word and the rest from the next gives 4-bit codes: those of the odd
// fields at the bits 2 f + 1 .. 2 f - 2, and with the words exchanged those of the even fields there. Taking every
// other four bits from the codes' first halves and the rest from their second ones gives codes of up to 8 bits, two in
// a half of a word. A code is so had where it lies in the mantissa already, or after the word was turned. What lies
// past the end of a word comes in at its other end; field 0, which is turned from there, is stored in the other half.
#pragma once

#include "cuda/element.cuh"
#include "decoder.h"

namespace matquant::cuda {

// (a & mask) | (b & ~mask), (a & mask) | b
__device__ inline uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
    return result;
}
__device__ inline uint32_t mask_or(uint32_t a, uint32_t b, uint32_t mask) {
    uint32_t result;
    asm("lop3.b32 %0, %1, %2, %3, 0xec;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
    return result;
}
__device__ inline uint32_t turn_right(uint32_t word, int bits) { return __funnelshift_r(word, word, bits); }

// The words of two rows.
struct RowPair {
    uint32_t row[2];
};

// Bits of one plane, or of two interleaved, as words of 2-bit fields: the first plane has the upper bits. A plane's
// word has the bits of the first row where they are needed, and those of the second one place lower.
template <int planes>
__device__ inline RowPair interleave(uint32_t upper, uint32_t lower) {
    constexpr uint32_t kUpper = 0xaaaaaaaa;
    if constexpr (planes == 1) {
        return {upper, turn_right(upper, 31)};
    }
    return {select_bits(upper, lower, kUpper), turn_right(select_bits(lower, upper, kUpper), 31)};
}

// A lane's words of a tile.
struct TileWords {
    uint32_t base[kRowTiles][2], planes[kMaxWidth][kRowTiles];

    // Of a row tile's codes the bits `first` and `first` + 1, counted from the most significant one, or the first
    // alone.
    template <int first, int bits>
    __device__ RowPair fields(int row_tile) const {
        if constexpr (first == 0) {
            return {base[row_tile][0], base[row_tile][1]};
        } else {
            return interleave<bits>(planes[first][row_tile], planes[first + 1][row_tile]);
        }
    }
};

// Up to four bits of a row's codes: a word with those of the odd fields and one with those of the even ones.
struct Nibbles {
    uint32_t odd, even;
};

// One part of codes: `bits` of them from the bit `first` on, with `below` less significant bits in the other part.
template <class Element, int first, int bits, int below>
struct Part {
    static_assert(bits <= Element::kMantissaBits && (first == 0 || bits <= 2));

    // Where the upper bit of a code is in its word: of the pair of columns 2 q and 2 q + 1 of a lane. Pairs 0 to 3 are
    // in the odd fields.
    __host__ __device__ static constexpr int stored_top_of(int q) { return (q < 4 ? 4 * q + 3 : 4 * q - 11) - first; }
    // And where it is to be: so that few turns bring all codes into the mantissa.
    __host__ __device__ static constexpr int top_of(int q) {
        if (Element::kMantissaBits >= 10) {
            return bits <= 4 ? (q < 4 ? 3 : 5) + q % 2 * 4 : q < 4 ? 7 : bits <= 6 && q % 2 == 0 ? 5 : 9;
        }
        return bits <= 2   ? (stored_top_of(q) + first - 1) % 6 + 1
               : bits == 3 ? 2 + q % 2 * 4
               : bits == 4 ? (q < 4 ? 3 : 5)
               : bits <= 6 ? 5
                           : 6;
    }
    __host__ __device__ static constexpr int turn_of(int q) { return (stored_top_of(q) - top_of(q)) & 31; }
    __host__ __device__ static constexpr int last_of(int q) { return top_of(q) - bits + 1; }
    __host__ __device__ static constexpr uint32_t mask_of(int q) { return ((1u << bits) - 1) << last_of(q); }
    // 2^exponent is what the value is more than the code.
    __host__ __device__ static constexpr int exponent_of(int q) { return Element::kMantissaBits - last_of(q) + below; }

    // Of a row tile: words[h][q] has the columns 2 q and 2 q + 1 of the row g + 8 h.
    __device__ static void unpack(const TileWords& tile, int row_tile, uint32_t (&words)[2][8]) {
        RowPair fields[4];
        fields[0] = tile.fields<first, at_most_two(bits)>(row_tile);
        if constexpr (bits > 2) {
            fields[1] = tile.fields<2, at_most_two(bits - 2)>(row_tile);
        }
        if constexpr (bits > 4) {
            fields[2] = tile.fields<4, at_most_two(bits - 4)>(row_tile);
        }
        if constexpr (bits > 6) {
            fields[3] = tile.fields<6, at_most_two(bits - 6)>(row_tile);
        }
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            const Nibbles upper = nibbles<(bits > 2)>(fields[0].row[row], fields[1].row[row]);
            // Words with the codes of the pairs q, q + 2; those of odd fields first.
            uint32_t codes[4] = {upper.odd, upper.odd, upper.even, upper.even};
            if constexpr (bits > 4) {
                const Nibbles lower = nibbles<(bits > 6)>(fields[2].row[row], fields[3].row[row]);
#pragma unroll
                for (int index = 0; index < 4; ++index) {
                    codes[index] = select_bits(codes[index], index < 2 ? lower.odd : lower.even,
                                               nibble_mask(stored_top_of(index / 2 * 4 + index % 2)));
                }
            }
#pragma unroll
            for (int q = 0; q < 8; ++q) {
                const uint32_t word = turn_right(codes[q / 4 * 2 + q % 2], turn_of(q));
                words[row][q] = mask_or(word, power_of_two<Element>(exponent_of(q)) * 0x10001u, mask_of(q) * 0x10001u);
            }
        }
    }

  private:
    __host__ __device__ static constexpr int at_most_two(int value) { return value < 2 ? value : 2; }

    template <bool both>
    __device__ static Nibbles nibbles(uint32_t upper, uint32_t lower) {
        constexpr uint32_t kOddFields = 0xcccccccc;
        if constexpr (both) {
            return {select_bits(upper, lower, kOddFields), select_bits(lower, upper, kOddFields)};
        }
        return {upper, upper};
    }
    // Of every other four bits, those below and at `top`.
    __host__ __device__ static constexpr uint32_t nibble_mask(int top) {
        const uint32_t turned = 0x0fu << ((top - 3) % 8);
        return ((turned | turned >> 8) & 0xff) * 0x01010101u;
    }
};

// Codes of a width as parts: one if the mantissa has room for it.
template <class Element, int width>
struct Parts {
    static constexpr int kUpperBits = width <= Element::kMantissaBits ? width : 6, kLowerBits = width - kUpperBits;
    using Upper = Part<Element, 0, kUpperBits, kLowerBits>;
    using Lower = Part<Element, kUpperBits, (kLowerBits > 0 ? kLowerBits : 1), 0>;
};

}  // namespace matquant::cuda

// From the words of a tile to the A operand of the tensor cores.
//
// A code of up to 4 bits is put into the mantissa of a value whose exponent e makes the code's last bit worth 1: the
// value is then 2^e + code, for one instruction, (word & mask) | exponent, and two weights. The sum of all 2^e times
// the activations is taken off again by a product with constants (multiply.cuh). Codes of more bits are two such parts,
// upper 4 and lower bits, each with a product of its own: bfloat16 has no room for more, and merging them costs as
// much as the second product.
//
// A row's 16 codes in a lane are two rows of eight 2-bit fields in a word of the base field, field f in the bits 2 f
// and 2 f + 1 of each half. Two more bits come from planes, interleaved to a word like it, turned right by two bits.
// Taking every other pair of bits from one of the words and the rest from the other gives 4-bit codes, upper fields
// from the base field and lower ones from the planes: those of the odd fields at the bits 2 f + 1 .. 2 f - 2, and with
// the words exchanged those of the even fields there. A code is so had where it lies in the mantissa already, or after
// the word was turned by 8 bits (by 4, 8 and 12 for bfloat16). Field 0 comes to lie in the other half by that, and is
// stored so.
#pragma once

#include "cuda/element.cuh"

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

// One part of codes: `bits` of them, with `below` less significant bits in the other part.
template <class Element, int bits, int below>
struct Part {
    // The pair of columns 2 q and 2 q + 1 of a lane: how far its word is turned, and the place of its upper bit then.
    __host__ __device__ static constexpr int turn_of(int q) {
        return Element::kMantissaBits >= 10 ? q % 4 / 2 * 8 : q % 4 * 4;
    }
    __host__ __device__ static constexpr int top_of(int q) {
        return (q < 4 ? 3 : 5) + (Element::kMantissaBits >= 10 ? q % 2 * 4 : 0);
    }
    __host__ __device__ static constexpr int last_of(int q) { return top_of(q) - bits + 1; }
    __host__ __device__ static constexpr uint32_t mask_of(int q) { return ((1u << bits) - 1) << last_of(q); }
    // 2^exponent is what the value is more than the code.
    __host__ __device__ static constexpr int exponent_of(int q) { return Element::kMantissaBits - last_of(q) + below; }

    // The values of a row: words[q] has the columns 2 q and 2 q + 1. `odd` has the codes of the odd fields.
    __device__ static void values(uint32_t odd, uint32_t even, uint32_t (&words)[8]) {
#pragma unroll
        for (int q = 0; q < 8; ++q) {
            const uint32_t word = turn_right(q < 4 ? odd : even, turn_of(q));
            words[q] = mask_or(word, power_of_two<Element>(exponent_of(q)) * 0x10001u, mask_of(q) * 0x10001u);
        }
    }

    // `fields` are the words with the part's first two bits, `rest` those with its others.
    __device__ static void unpack(const RowPair& fields, const RowPair& rest, uint32_t (&words)[2][8]) {
        constexpr uint32_t kOddFields = 0xcccccccc;
#pragma unroll
        for (int row = 0; row < 2; ++row) {
            if constexpr (bits <= 2) {
                values(fields.row[row], fields.row[row], words[row]);
            } else {
                values(select_bits(fields.row[row], rest.row[row], kOddFields),
                       select_bits(rest.row[row], fields.row[row], kOddFields), words[row]);
            }
        }
    }
};

}  // namespace matquant::cuda

// How the activations of a step lie in memory: as bytes where `dot` multiplies bytes, as words elsewhere.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/layout.h"

// GCC keeps arrays in registers only where every index is a constant before it looks at loops: so bodies that hold sums
// in arrays are unrolled by the compiler's front end, with a constant for each index.
#define MATQUANT_INLINE __attribute__((always_inline))

namespace matquant::cpu {
namespace {

template <int... indices, class Body>
MATQUANT_INLINE inline void repeat_indices(std::integer_sequence<int, indices...>, [[maybe_unused]] Body body) {
    (body(std::integral_constant<int, indices>()), ...);
}

// Calls body(0), ..., body(count - 1) with constants.
template <int count, class Body>
MATQUANT_INLINE inline void repeat(Body body) {
    repeat_indices(std::make_integer_sequence<int, count>(), body);
}

// Activations as signed bytes: the dot product of four with four unsigned bytes is one 32-bit lane. An integer of 16
// bits is two of them, and two sums. A chunk's bytes of one significance lie together, so that those of many columns
// can be read at once. Where activations take 8 bits, a span that takes 16 has its upper bytes with the others' only
// ones, and its lower ones, the second bytes, elsewhere.
struct ByteSteps {
    static constexpr bool kSecondBytes = true;
    static constexpr bool kFastLookUps = false;  // whether a register's look-ups take hardly longer than reading it
    template <int bits>
    static constexpr int kSums = bits / 8;
    template <int bits>
    static constexpr int64_t kStepBytes = kStepColumns;
    template <int bits>
    static constexpr int64_t kChunkBytes = kSums<bits> * kChunkColumns;

    template <int bits>
    static void store_chunk(const int16_t* high, const int8_t* rest, uint8_t* target) {
        if constexpr (bits == 8) {
            std::copy_n(high, kChunkColumns, reinterpret_cast<int8_t*>(target));
            return;
        }
        split(high, target, target + kChunkColumns);
        if constexpr (bits == 24) {
            std::memcpy(target + 2 * kChunkColumns, rest, kChunkColumns);
        }
    }

    // The bytes of a chunk's integers.
    static void split(const int16_t* integers, uint8_t* upper, uint8_t* lower) {
        for (int64_t column = 0; column < kChunkColumns; ++column) {
            const int byte = (integers[column] + 128) >> 8;
            upper[column] = static_cast<uint8_t>(byte);
            lower[column] = static_cast<uint8_t>(integers[column] - 256 * byte);
        }
    }

    template <class Lanes, int bits>
    static typename Lanes::Floats total(const typename Lanes::Sums* sums) {
        if constexpr (bits == 8) {
            return Lanes::to_floats(sums[0]);
        }
        const typename Lanes::Floats high = Lanes::to_floats(Lanes::add(Lanes::shift_left_8(sums[0]), sums[1]));
        if constexpr (bits == 16) {
            return high;
        }
        return Lanes::multiply_add(Lanes::to_floats(sums[kSums<bits> - 1]), Lanes::broadcast(0x1p-8f), high);
    }
};

// Activations as words of 16 bits, in the order 0, 2, 1, 3 of a step's columns: the codes of columns 0 and 2 are the
// even bytes of a lane, those of 1 and 3 the odd ones, and each pair is made words by one instruction. A word holds all
// of an activation of 16 bits, so there are no second bytes.
struct WordSteps {
    static constexpr bool kSecondBytes = false;
    static constexpr bool kFastLookUps = false;  // whether a register's look-ups take hardly longer than reading it
    template <int bits>
    static constexpr int kSums = bits == 24 ? 2 : 1;
    template <int bits>
    static constexpr int64_t kStepBytes = kSums<bits> * kStepColumns * 2;
    template <int bits>
    static constexpr int64_t kChunkBytes = kChunkSteps * kStepBytes<bits>;

    template <int bits>
    static void store_chunk(const int16_t* high, const int8_t* rest, uint8_t* target) {
        for (int64_t step = 0; step < kChunkSteps; ++step) {
            const int64_t first = step * kStepColumns;
            const int16_t words[8] = {high[first], high[first + 2], high[first + 1], high[first + 3]};
            std::memcpy(target + step * kStepBytes<bits>, words, 8);
            if constexpr (bits == 24) {
                const int16_t rest_words[4] = {rest[first], rest[first + 2], rest[first + 1], rest[first + 3]};
                std::memcpy(target + step * kStepBytes<bits> + 8, rest_words, 8);
            }
        }
    }

    template <class Lanes, int bits>
    static typename Lanes::Floats total(const typename Lanes::Sums* sums) {
        const typename Lanes::Floats high = Lanes::to_floats(sums[0]);
        if constexpr (bits != 24) {
            return high;
        }
        return Lanes::multiply_add(Lanes::to_floats(sums[kSums<bits> - 1]), Lanes::broadcast(0x1p-8f), high);
    }
};

}  // namespace
}  // namespace matquant::cpu

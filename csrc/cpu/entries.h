// The levels of codes: a codebook's entries, and their increments.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/steps.h"

namespace matquant::cpu {
namespace {

constexpr int kIndexPlaneBytes = kIndices * kPlaces;  // of a codebook by index

// The index of an entry and its signs: two bits of each of the four bytes.
inline uint32_t entry_index(uint32_t fours) { return (fours | fours >> 6 | fours >> 12 | fours >> 18) & 0xff; }

// Sums of four bytes each, modulo 256.
inline uint32_t add_bytes(uint32_t a, uint32_t b) {
    constexpr uint32_t kTop = 0x80808080;
    return ((a & ~kTop) + (b & ~kTop)) ^ ((a ^ b) & kTop);
}

// The levels of a step's codes, of `width` bits each: those of an entry, and an increment for each bit past the second,
// modulo 256; a codebook by index.
template <class Lanes, int width>
MATQUANT_INLINE inline typename Lanes::Codes look_up(const uint8_t* codebook, const typename Lanes::Codes& codes) {
    static_assert(kPlaces == kStepColumns);
    if constexpr (requires { Lanes::gather(codebook, codes); }) {
        const typename Lanes::Codes index =
            Lanes::entry_index(Lanes::select(Lanes::template shift_right<width - kBaseBits>(codes), 3));
        typename Lanes::Codes levels = Lanes::gather(codebook, index);
        repeat<width - kBaseBits>([&](auto bit) MATQUANT_INLINE {
            levels = Lanes::add_where(levels, codes, 1 << (width - kBaseBits - 1 - bit),
                                      Lanes::gather(codebook + (1 + bit) * kIndexPlaneBytes, index));
        });
        return levels;
    }
    alignas(64) uint8_t bytes[kPlaneBytes];
    Lanes::store_bytes(bytes, codes);
    for (int64_t row = 0; row < kTileRows; ++row) {
        uint32_t four, levels, increments;
        std::memcpy(&four, bytes + row * sizeof(four), sizeof(four));
        const uint32_t index = entry_index(four >> (width - kBaseBits) & 0x03030303);
        std::memcpy(&levels, codebook + index * kPlaces, sizeof(levels));
        for (int bit = 1; bit <= width - kBaseBits; ++bit) {
            std::memcpy(&increments, codebook + bit * kIndexPlaneBytes + index * kPlaces, sizeof(increments));
            levels = add_bytes(levels, increments & (four >> (width - kBaseBits - bit) & 0x01010101) * 0xff);
        }
        std::memcpy(bytes + row * sizeof(four), &levels, sizeof(levels));
    }
    return Lanes::load_bytes(bytes);
}

// Puts the activations of each four steps, which are 16 columns, into the order of PlaceTile: a place's of all four
// steps, then the next place's.
inline void order_by_place(float* values, int64_t chunks) {
    for (float* end = values + chunks * kChunkColumns; values < end; values += kPlaces * kStepColumns) {
        for (int64_t step = 0; step < kStepColumns; ++step) {
            for (int64_t place = step + 1; place < kPlaces; ++place) {
                std::swap(values[step * kPlaces + place], values[place * kPlaces + step]);
            }
        }
    }
}

}  // namespace
}  // namespace matquant::cpu

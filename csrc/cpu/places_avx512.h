// Look-ups in codebooks by AVX-512 VBMI, which permutes bytes across a register: 64 indices at a time, place by place.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/gemm_kernel.h"
#include "cpu/lanes_avx512.h"

namespace matquant::cpu {
namespace {

// A lane is a row's four columns in four steps: byte `column` has the field of each step. Makes it byte `step` with the
// field of each column, by exchanging what is off the diagonal: in blocks of two by two, then these.
template <int bits>
MATQUANT_INLINE inline __m512i transpose_fields(__m512i lanes) {
    const auto exchange = [&](auto distance, int mask) MATQUANT_INLINE {
        constexpr int kOfXorAnd = 0x28;  // truth table of (a ^ b) & c
        constexpr int kXor = 0x96;       // of a ^ b ^ c
        const __m512i other =
            _mm512_ternarylogic_epi32(lanes, _mm512_srli_epi32(lanes, distance), _mm512_set1_epi32(mask), kOfXorAnd);
        lanes = _mm512_ternarylogic_epi32(lanes, other, _mm512_slli_epi32(other, distance), kXor);
    };
    if constexpr (bits == 2) {
        exchange(std::integral_constant<int, 6>(), 0x00cc00cc);
        exchange(std::integral_constant<int, 12>(), 0x0000f0f0);
    } else {
        exchange(std::integral_constant<int, 7>(), 0x000a000a);
        exchange(std::integral_constant<int, 14>(), 0x00000c0c);
    }
    return lanes;
}

// What a tile holds, with the fields of four columns in each byte: [half of the steps] of the base field, of each
// further pair and of each single plane.
template <class Lanes, int width, int pairs>
struct PlaceTile {
    static constexpr int kSingles = width - 2 * pairs;
    const uint8_t* codebook;   // [planes, places, entries]
    __m512i index[2];          // the number of an entry in the lower six bits, which are those that a permutation heeds
    __mmask64 signs[2][2];     // [half of the steps][half of the places]
    __m512i paired[pairs][2];  // but the first
    __m512i single[kSingles + 1][2];

    MATQUANT_INLINE PlaceTile(const TilePlanes<width, pairs>& source, int64_t tile) : codebook(source.codebook) {
        repeat<2>([&](auto half) MATQUANT_INLINE {
            index[half] = transpose_fields<2>(_mm512_loadu_si512(source.template address<half>(tile)));
            signs[half][0] = _mm512_movepi8_mask(index[half]);
            signs[half][1] = _mm512_movepi8_mask(_mm512_add_epi8(index[half], index[half]));
            repeat<pairs - 1>([&](auto pair) MATQUANT_INLINE {
                paired[pair][half] =
                    transpose_fields<2>(_mm512_loadu_si512(source.template address<2 * (pair + 1) + half>(tile)));
            });
            repeat<kSingles>([&](auto plane) MATQUANT_INLINE {
                const __m512i bits = _mm512_loadu_si512(source.template address<2 * pairs + plane>(tile));
                single[plane][half] =
                    transpose_fields<1>(_mm512_and_si512(_mm512_srli_epi32(bits, 4 * half), _mm512_set1_epi8(0x0f)));
            });
        });
    }

    template <int step>
    MATQUANT_INLINE __m512i codes() const {
        constexpr int kHalf = step / 4, kPlace = step % 4;
        const auto entries = [&](auto plane) MATQUANT_INLINE {
            return _mm512_permutexvar_epi8(index[kHalf],
                                           _mm512_loadu_si512(codebook + plane * kEntryPlaneBytes + kPlace * kEntries));
        };
        __m512i levels = entries(std::integral_constant<int, 0>());
        const auto add_where = [&](__m512i bytes, auto bit, auto plane) MATQUANT_INLINE {
            const __mmask64 where = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(1 << bit)));
            levels = _mm512_mask_add_epi8(levels, where, levels, entries(plane));
        };
        repeat<2 * (pairs - 1)>([&](auto bit) MATQUANT_INLINE {
            add_where(paired[bit / 2][kHalf], std::integral_constant<int, 2 * kPlace + 1 - bit % 2>(),
                      std::integral_constant<int, 1 + bit>());
        });
        repeat<kSingles>([&](auto plane) MATQUANT_INLINE {
            add_where(single[plane][kHalf], std::integral_constant<int, kPlace>(),
                      std::integral_constant<int, 2 * pairs - 1 + plane>());
        });
        return _mm512_mask_sub_epi8(levels, signs[kHalf][kPlace / 2], _mm512_setzero_si512(), levels);
    }
};

}  // namespace
}  // namespace matquant::cpu

// The codes of a tile as the bytes of one AVX-512 register; for files compiled for AVX-512 only.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace matquant::cpu {
namespace {

// Bytes column by column in a row, so each 32-bit lane holds the four columns of one row.
template <int width>
__m512i load_codes(const int64_t* masks, int64_t plane_stride) {
    // A plane is a mask register as it stands: add its bit's value to the bytes that it selects.
    __m512i codes = _mm512_setzero_si512();
    for (int plane = 0; plane < width; ++plane) {
        const __mmask64 mask = static_cast<__mmask64>(masks[plane * plane_stride]);
        codes = _mm512_mask_add_epi8(codes, mask, codes, _mm512_set1_epi8(static_cast<char>(1 << (width - 1 - plane))));
    }
    return codes;
}

// One column of the codes in float32.
template <int column>
__m512 column_codes(__m512i codes) {
    const __m512i low_byte = _mm512_set1_epi32(0xff);
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(codes, 8 * column), low_byte));
}

}  // namespace
}  // namespace matquant::cpu

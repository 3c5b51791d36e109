// What the kernels for AVX-512 F, BW, VL and DQ share: a register holds 64 codes, or 16 rows in int32 or float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

struct Avx512Lanes {
    using Codes = __m512i;
    using Sums = __m512i;
    using Floats = __m512;
    static constexpr int kRows = 2;

    static Codes load_bytes(const uint8_t* source) { return _mm512_loadu_si512(source); }
    static void store_bytes(uint8_t* target, Codes bytes) { _mm512_storeu_si512(target, bytes); }
    template <int count>
    static Codes shift_right(Codes bytes) {
        if constexpr (count == 0) {
            return bytes;
        } else if constexpr (count > 0) {
            return _mm512_srli_epi16(bytes, count);
        } else {
            return _mm512_slli_epi16(bytes, -count);
        }
    }
    static Codes select(Codes bytes, int mask) {
        return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(mask)));
    }
    static Codes merge(Codes codes, Codes bytes, int mask) {
        constexpr int kOrOfAnd = 0xf8;  // truth table of a | (b & c)
        return _mm512_ternarylogic_epi32(codes, bytes, _mm512_set1_epi8(static_cast<char>(mask)), kOrOfAnd);
    }

    // Bytes of a table by the lower six bits of others: four look-ups among 16.
    static Codes look_up(const uint8_t* table, Codes index) {
        const __m512i lower = select(index, 0x0f);
        const auto sixteen = [&](int part) {
            const __m128i* entries = reinterpret_cast<const __m128i*>(table) + part;
            return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(entries)), lower);
        };
        const __mmask64 odd = where(index, 0x10);
        return _mm512_mask_blend_epi8(where(index, 0x20), _mm512_mask_blend_epi8(odd, sixteen(0), sixteen(1)),
                                      _mm512_mask_blend_epi8(odd, sixteen(2), sixteen(3)));
    }
    static __mmask64 where(Codes bytes, int bit) {
        return _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(bit)));
    }
    static Codes keep_where(Codes values, Codes bytes, int bit) {
        return _mm512_maskz_mov_epi8(where(bytes, bit), values);
    }
    static Codes add_bytes(Codes a, Codes b) { return _mm512_add_epi8(a, b); }
    static Codes negate_where(Codes values, Codes bytes, int bit) {
        return _mm512_mask_sub_epi8(values, where(bytes, bit), _mm512_setzero_si512(), values);
    }

    static Sums zero_sums() { return _mm512_setzero_si512(); }
    static Sums add(Sums a, Sums b) { return _mm512_add_epi32(a, b); }
    static Sums shift_left_8(Sums a) { return _mm512_slli_epi32(a, 8); }
    static Floats to_floats(Sums a) { return _mm512_cvtepi32_ps(a); }

    static Floats zero() { return _mm512_setzero_ps(); }
    static Floats load(const float* source) { return _mm512_loadu_ps(source); }
    static void store(float* target, Floats value) { _mm512_storeu_ps(target, value); }
    static Floats broadcast(float value) { return _mm512_set1_ps(value); }
    static Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats load_half(const uint16_t* source) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    }
    static Floats load_unsigned(const uint8_t* source) {
        return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
    }
    static Floats load_signed(const uint8_t* source) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))));
    }
    static void store_half(uint16_t* target, Floats value) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT));
    }
};

// A step of packed activations in every lane.
inline __m512i broadcast_step(const uint8_t* source) {
    int32_t step;
    std::memcpy(&step, source, sizeof(step));
    return _mm512_set1_epi32(step);
}

}  // namespace
}  // namespace matquant::cpu

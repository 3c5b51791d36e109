// What the kernels for AVX2, FMA and F16C share: two registers hold 64 codes, or 16 rows in int32 or float32.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

struct Avx2Lanes {
    struct Codes {
        __m256i low, high;  // 8 rows each
    };
    using Sums = Codes;
    struct Floats {
        __m256 low, high;
    };
    static constexpr int kRows = 1;

    static Codes load_bytes(const uint8_t* source) {
        const __m256i* halves = reinterpret_cast<const __m256i*>(source);
        return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
    }
    static void store_bytes(uint8_t* target, const Codes& bytes) {
        __m256i* halves = reinterpret_cast<__m256i*>(target);
        _mm256_storeu_si256(halves, bytes.low);
        _mm256_storeu_si256(halves + 1, bytes.high);
    }
    template <int count>
    static Codes shift_right(const Codes& bytes) {
        if constexpr (count == 0) {
            return bytes;
        } else if constexpr (count > 0) {
            return {_mm256_srli_epi16(bytes.low, count), _mm256_srli_epi16(bytes.high, count)};
        } else {
            return {_mm256_slli_epi16(bytes.low, -count), _mm256_slli_epi16(bytes.high, -count)};
        }
    }
    static Codes select(const Codes& bytes, int mask) {
        const __m256i masks = _mm256_set1_epi8(static_cast<char>(mask));
        return {_mm256_and_si256(bytes.low, masks), _mm256_and_si256(bytes.high, masks)};
    }
    static Codes merge(const Codes& codes, const Codes& bytes, int mask) {
        const Codes selected = select(bytes, mask);
        return {_mm256_or_si256(codes.low, selected.low), _mm256_or_si256(codes.high, selected.high)};
    }

    // Bytes of a table by the lower six bits of others: four look-ups among 16.
    static Codes look_up(const uint8_t* table, const Codes& index) {
        return {look_up(table, index.low), look_up(table, index.high)};
    }
    static __m256i look_up(const uint8_t* table, __m256i index) {
        const __m256i lower = _mm256_and_si256(index, _mm256_set1_epi8(0x0f));
        const auto sixteen = [&](int part) {
            const __m128i* entries = reinterpret_cast<const __m128i*>(table) + part;
            return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(entries)), lower);
        };
        // A blend goes by the top bit of each byte.
        const __m256i odd = _mm256_slli_epi16(index, 3);
        return _mm256_blendv_epi8(_mm256_blendv_epi8(sixteen(0), sixteen(1), odd),
                                  _mm256_blendv_epi8(sixteen(2), sixteen(3), odd), _mm256_slli_epi16(index, 2));
    }
    static __m256i where(__m256i bytes, int bit) {
        const __m256i bits = _mm256_set1_epi8(static_cast<char>(bit));
        return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits);
    }
    static Codes keep_where(const Codes& values, const Codes& bytes, int bit) {
        return {_mm256_and_si256(values.low, where(bytes.low, bit)),
                _mm256_and_si256(values.high, where(bytes.high, bit))};
    }
    static Codes add_bytes(const Codes& a, const Codes& b) {
        return {_mm256_add_epi8(a.low, b.low), _mm256_add_epi8(a.high, b.high)};
    }
    static Codes negate_where(const Codes& values, const Codes& bytes, int bit) {
        const auto negate = [&](__m256i value, __m256i byte) {
            const __m256i mask = where(byte, bit);
            return _mm256_sub_epi8(_mm256_xor_si256(value, mask), mask);
        };
        return {negate(values.low, bytes.low), negate(values.high, bytes.high)};
    }

    static Sums zero_sums() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Sums add(const Sums& a, const Sums& b) {
        return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
    }
    static Sums shift_left_8(const Sums& a) { return {_mm256_slli_epi32(a.low, 8), _mm256_slli_epi32(a.high, 8)}; }
    static Floats to_floats(const Sums& a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static Floats load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
    static void store(float* target, const Floats& value) {
        _mm256_storeu_ps(target, value.low);
        _mm256_storeu_ps(target + 8, value.high);
    }
    static Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats multiply(const Floats& a, const Floats& b) {
        return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static Floats load_half(const uint16_t* source) {
        const __m128i* halves = reinterpret_cast<const __m128i*>(source);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }
    static Floats load_unsigned(const uint8_t* source) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    static Floats load_signed(const uint8_t* source) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
    }
    static void store_half(uint16_t* target, const Floats& value) {
        __m128i* halves = reinterpret_cast<__m128i*>(target);
        _mm_storeu_si128(halves, _mm256_cvtps_ph(value.low, _MM_FROUND_TO_NEAREST_INT));
        _mm_storeu_si128(halves + 1, _mm256_cvtps_ph(value.high, _MM_FROUND_TO_NEAREST_INT));
    }
};

// A step of packed activations in every lane.
inline __m256i broadcast_step(const uint8_t* source) {
    int32_t step;
    std::memcpy(&step, source, sizeof(step));
    return _mm256_set1_epi32(step);
}

}  // namespace
}  // namespace matquant::cpu

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

    // Of fields of two bits in each byte of a lane.
    static Codes entry_index(const Codes& fields) { return {entry_index(fields.low), entry_index(fields.high)}; }
    static __m256i entry_index(__m256i fields) {
        const __m256i pairs = _mm256_or_si256(fields, _mm256_srli_epi32(fields, 6));
        return _mm256_and_si256(_mm256_or_si256(pairs, _mm256_srli_epi32(pairs, 12)), _mm256_set1_epi32(0xff));
    }
    static Codes gather(const uint8_t* codebook, const Codes& index) {
        const int* entries = reinterpret_cast<const int*>(codebook);
        return {_mm256_i32gather_epi32(entries, index.low, 4), _mm256_i32gather_epi32(entries, index.high, 4)};
    }
    static Codes add_where(const Codes& levels, const Codes& codes, int bit, const Codes& increments) {
        const __m256i bits = _mm256_set1_epi8(static_cast<char>(bit));
        const auto add = [&](__m256i level, __m256i code, __m256i increment) {
            const __m256i where = _mm256_cmpeq_epi8(_mm256_and_si256(code, bits), bits);
            return _mm256_add_epi8(level, _mm256_and_si256(where, increment));
        };
        return {add(levels.low, codes.low, increments.low), add(levels.high, codes.high, increments.high)};
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

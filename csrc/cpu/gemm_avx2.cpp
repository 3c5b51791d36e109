// The kernel for AVX2, FMA and F16C: two registers hold the 16 rows of a tile in float32, or its 64 codes as bytes.
#include <immintrin.h>

#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

struct Avx2Lanes {
    struct Floats {
        __m256 low, high;
    };
    // 12 sums, 2 weights and an activation of the 16 registers
    static constexpr int kTiles = 1;
    static constexpr int kRows = 6;

    static Floats load(const float* source) { return {_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8)}; }
    static void store(float* target, Floats value) {
        _mm256_storeu_ps(target, value.low);
        _mm256_storeu_ps(target + 8, value.high);
    }
    static Floats broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
    static Floats multiply_add(Floats a, Floats b, Floats c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static Floats load_half(const uint16_t* source) {
        const __m128i* halves = reinterpret_cast<const __m128i*>(source);
        return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
    }

    // The codes of 8 rows as bytes: each bit of half a mask is brought to its byte and tested there.
    template <int width>
    static __m256i decode_half(const int64_t* masks, int64_t plane_stride, int shift) {
        const __m256i byte_of_mask = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1,  //
                                                      2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3);
        const __m256i bit_of_byte = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
        __m256i codes = _mm256_setzero_si256();
        for (int plane = 0; plane < width; ++plane) {
            const int half = static_cast<int>(static_cast<uint64_t>(masks[plane * plane_stride]) >> shift);
            const __m256i spread = _mm256_shuffle_epi8(_mm256_set1_epi32(half), byte_of_mask);
            const __m256i set = _mm256_cmpeq_epi8(_mm256_and_si256(spread, bit_of_byte), bit_of_byte);
            codes = _mm256_sub_epi8(_mm256_add_epi8(codes, codes), set);
        }
        return codes;
    }

    static __m256 decode_column(__m256i codes, int column, __m256 scale, __m256 offset) {
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(codes, 8 * column), _mm256_set1_epi32(0xff));
        return _mm256_fmadd_ps(scale, _mm256_cvtepi32_ps(code), offset);
    }

    template <int width>
    static void decode(const int64_t* masks, int64_t plane_stride, Floats scale, Floats offset, Floats* columns) {
        const __m256i low = decode_half<width>(masks, plane_stride, 0);
        const __m256i high = decode_half<width>(masks, plane_stride, 32);
        for (int column = 0; column < kTileColumns; ++column) {
            columns[column] = {decode_column(low, column, scale.low, offset.low),
                               decode_column(high, column, scale.high, offset.high)};
        }
    }
};

}  // namespace

const Kernel kAvx2Kernel = {Avx2Lanes::kTiles, multiply<Avx2Lanes>};

}  // namespace matquant::cpu

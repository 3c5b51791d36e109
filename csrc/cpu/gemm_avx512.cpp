// The kernel for AVX-512 F, BW, VL and DQ: a register holds the 16 rows of a tile in float32, or its 64 codes as bytes.
#include <immintrin.h>

#include "cpu/codes_avx512.h"
#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

struct Avx512Lanes {
    using Floats = __m512;
    // 16 sums, 2 weights and the activations' broadcasts of the 32 registers
    static constexpr int kTiles = 2;
    static constexpr int kRows = 8;

    static Floats load(const float* source) { return _mm512_loadu_ps(source); }
    static void store(float* target, Floats value) { _mm512_storeu_ps(target, value); }
    static Floats broadcast(float value) { return _mm512_set1_ps(value); }
    static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
    static Floats load_half(const uint16_t* source) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
    }

    template <int width>
    static void decode(const int64_t* masks, int64_t plane_stride, Floats scale, Floats offset, Floats* columns) {
        const __m512i codes = load_codes<width>(masks, plane_stride);
        columns[0] = _mm512_fmadd_ps(scale, column_codes<0>(codes), offset);
        columns[1] = _mm512_fmadd_ps(scale, column_codes<1>(codes), offset);
        columns[2] = _mm512_fmadd_ps(scale, column_codes<2>(codes), offset);
        columns[3] = _mm512_fmadd_ps(scale, column_codes<3>(codes), offset);
    }
};

}  // namespace

const Kernel kAvx512Kernel = {Avx512Lanes::kTiles, multiply<Avx512Lanes>};

}  // namespace matquant::cpu

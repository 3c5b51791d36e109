// Look-ups in codebooks by AVX-512 VBMI, which permutes bytes across a register: 64 entries are one.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace matquant::cpu {
namespace {

// The instruction heeds the lower six bits of each index.
struct VbmiLookUps {
    static constexpr bool kFastLookUps = true;
    static __m512i look_up(const uint8_t* table, __m512i index) {
        return _mm512_permutexvar_epi8(index, _mm512_loadu_si512(table));
    }
};

}  // namespace
}  // namespace matquant::cpu

// The kernel for AVX-512 without VNNI: codes and activations are multiplied as words.
#include "cpu/lanes_avx512.h"

namespace matquant::cpu {
namespace {

struct Lanes : Avx512Lanes, WordSteps {
    template <int bits>
    static constexpr int kManyTokens = bits == 24 ? 5 : 10;
    template <int bits>
    static constexpr int kFewTokens = bits == 24 ? 1 : 4;
    static constexpr int kChains = 2;

    struct Operand {
        __m512i even, odd;  // columns 0 and 2 of each row, columns 1 and 3
    };
    static Operand prepare(Codes codes) {
        return {_mm512_and_si512(codes, _mm512_set1_epi16(0xff)), _mm512_srli_epi16(codes, 8)};
    }
    template <int bits>
    static void dot(Sums* sums, const Operand& operand, const uint8_t* step) {
        repeat<kSums<bits>>([&](auto sum) MATQUANT_INLINE {
            const __m512i even = _mm512_madd_epi16(operand.even, broadcast_step(step + 8 * sum));
            const __m512i odd = _mm512_madd_epi16(operand.odd, broadcast_step(step + 8 * sum + 4));
            sums[sum] = add(add(sums[sum], even), odd);
        });
    }
};

}  // namespace

const Kernel kAvx512Kernel = KernelOf<Lanes>::kKernel;

}  // namespace matquant::cpu

// The kernel for AVX2 without VNNI: codes and activations are multiplied as words. Products of bytes would saturate.
#include "cpu/lanes_avx2.h"

namespace matquant::cpu {
namespace {

struct Lanes : Avx2Lanes, WordSteps {
    template <int bits>
    static constexpr int kManyTokens = bits == 24 ? 2 : 4;  // 8 sums, 4 words, an activation and a product of 16
    template <int bits>
    static constexpr int kFewTokens = bits == 24 ? 1 : 2;
    static constexpr int kChains = 1;

    struct Operand {
        Codes even, odd;  // columns 0 and 2 of each row, columns 1 and 3
    };
    static Operand prepare(const Codes& codes) {
        const __m256i low_byte = _mm256_set1_epi16(0xff);
        return {{_mm256_and_si256(codes.low, low_byte), _mm256_and_si256(codes.high, low_byte)},
                {_mm256_srli_epi16(codes.low, 8), _mm256_srli_epi16(codes.high, 8)}};
    }
    template <int bits>
    static void dot(Sums* sums, const Operand& operand, const uint8_t* step) {
        repeat<kSums<bits>>([&](auto sum) MATQUANT_INLINE {
            const __m256i even = broadcast_step(step + 8 * sum);
            const __m256i odd = broadcast_step(step + 8 * sum + 4);
            sums[sum] = add(sums[sum], {_mm256_madd_epi16(operand.even.low, even),  //
                                        _mm256_madd_epi16(operand.even.high, even)});
            sums[sum] = add(sums[sum], {_mm256_madd_epi16(operand.odd.low, odd),  //
                                        _mm256_madd_epi16(operand.odd.high, odd)});
        });
    }
};

}  // namespace

const Kernel kAvx2Kernel = KernelOf<Lanes>::kKernel;

}  // namespace matquant::cpu

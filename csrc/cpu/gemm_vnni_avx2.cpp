// The kernel for AVX2 with AVX-VNNI: two instructions multiply the 64 codes of a step.
#include "cpu/lanes_avx2.h"

namespace matquant::cpu {
namespace {

struct Lanes : Avx2Lanes, ByteSteps {
    template <int bits>
    static constexpr int kManyTokens = 6 / kSums<bits>;  // 12 sums, 2 operands and an activation of the 16 registers
    template <int bits>
    static constexpr int kFewTokens = bits == 24 ? 1 : 2;
    static constexpr int kChains = 4;

    using Operand = Codes;
    static Operand prepare(const Codes& codes) { return codes; }
    template <int bits>
    static void dot(Sums* sums, const Operand& operand, const uint8_t* step) {
        repeat<kSums<bits>>([&](auto sum) MATQUANT_INLINE {
            const __m256i activations = broadcast_step(step + sum * kChunkColumns);
            // Not the intrinsic: see gemm_vnni_avx512.cpp.
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[sum].low) : "x"(operand.low), "x"(activations));
            __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums[sum].high) : "x"(operand.high), "x"(activations));
        });
    }
};

}  // namespace

const Kernel kAvx2VnniKernel = KernelOf<Lanes>::kKernel;

}  // namespace matquant::cpu

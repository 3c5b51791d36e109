// What the kernels for AVX-512 with VNNI share: one instruction multiplies the 64 codes of a step.
#pragma once

#include "cpu/lanes_avx512.h"

namespace matquant::cpu {
namespace {

struct VnniLanes : Avx512Lanes, ByteSteps {
    template <int bits>
    static constexpr int kManyTokens =
        14 / kSums<bits>;  // at most 28 sums, 2 operands and an activation of 32 registers
    template <int bits>
    static constexpr int kFewTokens = bits == 24 ? 1 : 8;
    static constexpr int kChains = 4;  // unpacking leaves room for one dot product a cycle, of four cycles

    using Operand = Codes;
    static Operand prepare(Codes codes) { return codes; }
    template <int bits>
    static void dot(Sums* sums, Operand operand, const uint8_t* step) {
        repeat<kSums<bits>>([&](auto sum) MATQUANT_INLINE {
            // Not the intrinsic: between it and its neighbours GCC 12 changes the type of the sum, and then keeps a
            // copy of each in memory.
            __asm__("vpdpbusd %2, %1, %0"
                    : "+v"(sums[sum])
                    : "v"(operand), "v"(broadcast_step(step + sum * kChunkColumns)));
        });
    }
};

}  // namespace
}  // namespace matquant::cpu

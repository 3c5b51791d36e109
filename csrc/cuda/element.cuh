// The two types of activations: their constants and their tensor-core product.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/tile.h"

namespace matquant::cuda {

// What bits is of A, 16 x 16, of B, 16 x 8, and of the sums, 16 x 8, in one lane of a warp.
struct A {
    uint32_t word[4];
};
struct B {
    uint32_t word[2];
};
struct Sums {
    float value[4];
};

#define MATQUANT_MMA(type)                                                                                    \
    __device__ static Sums multiply(const A& a, const B& b, const Sums& c) {                                  \
        Sums d;                                                                                               \
        asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                            \
            ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                                    \
            "{%10,%11,%12,%13};"                                                                              \
            : "=f"(d.value[0]), "=f"(d.value[1]), "=f"(d.value[2]), "=f"(d.value[3])                          \
            : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]), \
              "f"(c.value[0]), "f"(c.value[1]), "f"(c.value[2]), "f"(c.value[3]));                            \
        return d;                                                                                             \
    }

struct Half {
    using Type = __half;
    static constexpr int kMantissaBits = 10;
    static constexpr int kExponentBias = 15;
    MATQUANT_MMA("f16")
    __device__ static Type from_float(float value) { return __float2half_rn(value); }
    __device__ static float to_float(Type value) { return __half2float(value); }
    // Two values each.
    __device__ static uint32_t add(uint32_t a, uint32_t b) {
        const __half2 sum = __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
        return *reinterpret_cast<const uint32_t*>(&sum);
    }
};

struct BFloat16 {
    using Type = __nv_bfloat16;
    static constexpr int kMantissaBits = 7;
    static constexpr int kExponentBias = 127;
    MATQUANT_MMA("bf16")
    __device__ static Type from_float(float value) { return __float2bfloat16_rn(value); }
    __device__ static float to_float(Type value) { return __bfloat162float(value); }
    __device__ static uint32_t add(uint32_t a, uint32_t b) {
        const auto *first = reinterpret_cast<const __nv_bfloat162*>(&a),
                   *second = reinterpret_cast<const __nv_bfloat162*>(&b);
        const __nv_bfloat162 sum = __hadd2(*first, *second);
        return *reinterpret_cast<const uint32_t*>(&sum);
    }
};

#undef MATQUANT_MMA

// Twice 2^exponent, as the two values of a word.
template <class Element>
__host__ __device__ constexpr uint32_t power_of_two(int exponent) {
    return static_cast<uint32_t>(exponent + Element::kExponentBias) << Element::kMantissaBits;
}

}  // namespace matquant::cuda

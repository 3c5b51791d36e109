// The kernels' entry points: their parameters, and what defines one.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/dequantize_layer.cuh"

#define MATQUANT_DECODE_PARAMETERS(element)                                                                            \
    const matquant::cuda::element::Type *input, const uint8_t *planes, const uint8_t *decoders,                        \
        const int32_t *active_width, const matquant::cuda::element::Type *bias, matquant::cuda::element::Type *output, \
        float *partial_sums, uint32_t *arrivals, const matquant::cuda::Shape shape

#define MATQUANT_DEQUANTIZE_PARAMETERS(element)                                  \
    const uint8_t *planes, const uint8_t *decoders, const int32_t *active_width, \
        matquant::cuda::element::Type *output, const matquant::cuda::Shape shape

// A program that is compiled at run time has one of these lines; plan.cpp hands them out.
#define MATQUANT_DECODE_KERNEL(name, element, kind, token_tiles, groups, blocks)                           \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads, blocks)                         \
        name(MATQUANT_DECODE_PARAMETERS(element)) {                                                        \
        extern __shared__ __align__(16) uint8_t memory[];                                                  \
        matquant::cuda::decode<matquant::cuda::element, matquant::DecoderKind::kind, token_tiles, groups>( \
            {input, planes, decoders, active_width, bias, output, partial_sums, arrivals}, shape, memory); \
    }

// Six blocks fit a multiprocessor: without a number the compiler aims at more, and spills.
#define MATQUANT_DEQUANTIZE_KERNEL(name, element, kind, groups)                                   \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads, 6)                     \
        name(MATQUANT_DEQUANTIZE_PARAMETERS(element)) {                                           \
        matquant::cuda::dequantize<matquant::cuda::element, matquant::DecoderKind::kind, groups>( \
            planes, decoders, active_width, output, shape);                                       \
    }

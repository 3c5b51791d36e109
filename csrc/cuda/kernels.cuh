// What defines one of the kernels' entry points.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/dequantize_layer.cuh"
#include "cuda/parameters.h"

// A program that is compiled at run time has one of these lines; plan.cpp hands them out.
#define MATQUANT_DECODE_KERNEL(name, element, kind, token_tiles, groups, blocks)                                   \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads, blocks)                                 \
        name(MATQUANT_DECODE_PARAMETERS(matquant::cuda::element::Type)) {                                          \
        extern __shared__ __align__(16) uint8_t memory[];                                                          \
        matquant::cuda::decode<matquant::cuda::element, matquant::DecoderKind::kind, token_tiles, groups>(         \
            {input, planes, decoders, active_widths, bias, output, partial_sums, arrivals, slots}, shape, memory); \
    }

#define MATQUANT_DEQUANTIZE_KERNEL(name, element, kind, groups)                                                  \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads,                                       \
                                                 matquant::cuda::dequantize_blocks(matquant::DecoderKind::kind)) \
        name(MATQUANT_DEQUANTIZE_PARAMETERS(matquant::cuda::element::Type)) {                                    \
        matquant::cuda::dequantize<matquant::cuda::element, matquant::DecoderKind::kind, groups>(                \
            planes, decoders, active_width, output, shape);                                                      \
    }

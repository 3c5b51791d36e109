// Declarations of the kernels.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/dequantize_layer.cuh"
#include "cuda/instances.h"

#define MATQUANT_DECODE_PARAMETERS(element)                                                                            \
    const matquant::cuda::element::Type *input, const uint8_t *planes, const uint8_t *decoders,                        \
        const int32_t *active_width, const matquant::cuda::element::Type *bias, matquant::cuda::element::Type *output, \
        float *partial_sums, uint32_t *arrivals, const matquant::cuda::Shape shape

#define MATQUANT_DEQUANTIZE_PARAMETERS(element)                                  \
    const uint8_t *planes, const uint8_t *decoders, const int32_t *active_width, \
        matquant::cuda::element::Type *output, const matquant::cuda::Shape shape

namespace matquant::cuda {
constexpr int kThreads = kWarps * kLanes;
}  // namespace matquant::cuda

#define MATQUANT_DECLARE(name, element, token_tiles, groups, blocks) \
    extern "C" __global__ void name(MATQUANT_DECODE_PARAMETERS(element));

#define MATQUANT_DECLARE_DEQUANTIZER(name, element, groups) \
    extern "C" __global__ void name(MATQUANT_DEQUANTIZE_PARAMETERS(element));

MATQUANT_CUDA_INSTANCES(MATQUANT_DECLARE)
MATQUANT_CUDA_DEQUANTIZERS(MATQUANT_DECLARE_DEQUANTIZER)

#undef MATQUANT_DECLARE
#undef MATQUANT_DECLARE_DEQUANTIZER

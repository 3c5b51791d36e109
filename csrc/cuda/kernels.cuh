// Declarations of the kernels.
#pragma once

#include "cuda/decode.cuh"
#include "cuda/instances.h"

#define MATQUANT_DECODE_PARAMETERS(element)                                                                            \
    const matquant::cuda::element::Type *input, const uint8_t *planes, const uint8_t *decoders,                        \
        const int32_t *active_width, const matquant::cuda::element::Type *bias, matquant::cuda::element::Type *output, \
        float *partial_sums, uint32_t *arrivals, const matquant::cuda::Shape shape

namespace matquant::cuda {
constexpr int kThreads = kWarps * kLanes;
}  // namespace matquant::cuda

#define MATQUANT_DECLARE(name, element, token_tiles, groups, blocks) \
    extern "C" __global__ void name(MATQUANT_DECODE_PARAMETERS(element));

MATQUANT_CUDA_INSTANCES(MATQUANT_DECLARE)

#undef MATQUANT_DECLARE

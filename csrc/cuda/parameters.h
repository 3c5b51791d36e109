// What the kernels are given, for their definitions (kernels.cuh) and for the host that starts them.
#pragma once

#include <cstdint>

#include "cuda/shape.h"

#define MATQUANT_DECODE_PARAMETERS(element)                                                                  \
    const element *input, const uint8_t *planes, const uint8_t *decoders, const int32_t *active_widths,      \
        const element *bias, element *output, float *partial_sums, uint32_t *arrivals, const int32_t *slots, \
        const matquant::cuda::Shape shape

#define MATQUANT_DEQUANTIZE_PARAMETERS(element)                                                   \
    const uint8_t *planes, const uint8_t *decoders, const int32_t *active_width, element *output, \
        const matquant::cuda::Shape shape

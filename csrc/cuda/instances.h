// The kernels that there are: one list, for their definitions and for the table that finds them.
//
// A name says what a kernel is for: the activations' type, the most tokens and the groups in a step of 128 columns.
#pragma once

// A program may define either list itself, to have fewer of them.
#ifndef MATQUANT_CUDA_INSTANCES
// INSTANCE(name, element, token tiles of 8, groups in a step, blocks of threads that fit a multiprocessor's registers)
#define MATQUANT_CUDA_INSTANCES(INSTANCE)                      \
    INSTANCE(matquant_decode_float16_8_1, Half, 1, 1, 3)       \
    INSTANCE(matquant_decode_float16_8_2, Half, 1, 2, 3)       \
    INSTANCE(matquant_decode_float16_8_4, Half, 1, 4, 3)       \
    INSTANCE(matquant_decode_float16_16_1, Half, 2, 1, 2)      \
    INSTANCE(matquant_decode_float16_16_2, Half, 2, 2, 2)      \
    INSTANCE(matquant_decode_float16_16_4, Half, 2, 4, 2)      \
    INSTANCE(matquant_decode_float16_24_1, Half, 3, 1, 2)      \
    INSTANCE(matquant_decode_float16_24_2, Half, 3, 2, 2)      \
    INSTANCE(matquant_decode_bfloat16_8_1, BFloat16, 1, 1, 3)  \
    INSTANCE(matquant_decode_bfloat16_8_2, BFloat16, 1, 2, 3)  \
    INSTANCE(matquant_decode_bfloat16_8_4, BFloat16, 1, 4, 3)  \
    INSTANCE(matquant_decode_bfloat16_16_1, BFloat16, 2, 1, 2) \
    INSTANCE(matquant_decode_bfloat16_16_2, BFloat16, 2, 2, 2) \
    INSTANCE(matquant_decode_bfloat16_16_4, BFloat16, 2, 4, 2) \
    INSTANCE(matquant_decode_bfloat16_24_1, BFloat16, 3, 1, 2) \
    INSTANCE(matquant_decode_bfloat16_24_2, BFloat16, 3, 2, 2)
#endif

#ifndef MATQUANT_CUDA_DEQUANTIZERS
// INSTANCE(name, element, groups in a step)
#define MATQUANT_CUDA_DEQUANTIZERS(INSTANCE)              \
    INSTANCE(matquant_dequantize_float16_1, Half, 1)      \
    INSTANCE(matquant_dequantize_float16_2, Half, 2)      \
    INSTANCE(matquant_dequantize_float16_4, Half, 4)      \
    INSTANCE(matquant_dequantize_bfloat16_1, BFloat16, 1) \
    INSTANCE(matquant_dequantize_bfloat16_2, BFloat16, 2) \
    INSTANCE(matquant_dequantize_bfloat16_4, BFloat16, 4)
#endif

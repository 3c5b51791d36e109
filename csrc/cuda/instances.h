// The kernels that there are: one list, for their definitions (kernels_*.cu) and for the plan that finds them
// (plan.cpp).
//
// A name says what a kernel is for: the kind of decoders, the activations' type, the most tokens and the groups in a
// step of 128 columns.
#pragma once

// INSTANCE(name, element, decoders, token tiles of 8, groups in a step, blocks of threads that fit a multiprocessor's
// registers)
#define MATQUANT_DECODE_INSTANCES(INSTANCE, dtype, element, kind, decoders)       \
    INSTANCE(matquant_decode_##kind##_##dtype##_8_1, element, decoders, 1, 1, 3)  \
    INSTANCE(matquant_decode_##kind##_##dtype##_8_2, element, decoders, 1, 2, 3)  \
    INSTANCE(matquant_decode_##kind##_##dtype##_8_4, element, decoders, 1, 4, 3)  \
    INSTANCE(matquant_decode_##kind##_##dtype##_16_1, element, decoders, 2, 1, 2) \
    INSTANCE(matquant_decode_##kind##_##dtype##_16_2, element, decoders, 2, 2, 2) \
    INSTANCE(matquant_decode_##kind##_##dtype##_16_4, element, decoders, 2, 4, 2) \
    INSTANCE(matquant_decode_##kind##_##dtype##_24_1, element, decoders, 3, 1, 2) \
    INSTANCE(matquant_decode_##kind##_##dtype##_24_2, element, decoders, 3, 2, 2)

// INSTANCE(name, element, decoders, groups in a step)
#define MATQUANT_DEQUANTIZE_INSTANCES(INSTANCE, dtype, element, kind, decoders) \
    INSTANCE(matquant_dequantize_##kind##_##dtype##_1, element, decoders, 1)    \
    INSTANCE(matquant_dequantize_##kind##_##dtype##_2, element, decoders, 2)    \
    INSTANCE(matquant_dequantize_##kind##_##dtype##_4, element, decoders, 4)

// LIST(INSTANCE, ...) for the activations' types and one kind of decoders, or all of them.
#define MATQUANT_AFFINE_FLOAT16(LIST, INSTANCE)                   \
    LIST(INSTANCE, float16, Half, affine_float16, kAffineFloat16) \
    LIST(INSTANCE, bfloat16, BFloat16, affine_float16, kAffineFloat16)
#define MATQUANT_AFFINE_INT8(LIST, INSTANCE)                \
    LIST(INSTANCE, float16, Half, affine_int8, kAffineInt8) \
    LIST(INSTANCE, bfloat16, BFloat16, affine_int8, kAffineInt8)
#define MATQUANT_CODEBOOK(LIST, INSTANCE)                 \
    LIST(INSTANCE, float16, Half, codebook_4d, kCodebook) \
    LIST(INSTANCE, bfloat16, BFloat16, codebook_4d, kCodebook)
#define MATQUANT_ALL_DECODERS(LIST, INSTANCE) \
    MATQUANT_AFFINE_FLOAT16(LIST, INSTANCE)   \
    MATQUANT_AFFINE_INT8(LIST, INSTANCE)      \
    MATQUANT_CODEBOOK(LIST, INSTANCE)

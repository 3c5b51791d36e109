// The kernels' entry points; instances.h lists them.
#include "cuda/kernels.cuh"

#define MATQUANT_DEFINE(name, element, token_tiles, groups, blocks)                                        \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads, blocks)                         \
        name(MATQUANT_DECODE_PARAMETERS(element)) {                                                        \
        extern __shared__ __align__(16) uint8_t memory[];                                                  \
        matquant::cuda::decode<matquant::cuda::element, token_tiles, groups>(                              \
            {input, planes, decoders, active_width, bias, output, partial_sums, arrivals}, shape, memory); \
    }

MATQUANT_CUDA_INSTANCES(MATQUANT_DEFINE)

#define MATQUANT_DEFINE_DEQUANTIZER(name, element, groups)                                                          \
    extern "C" __global__ void __launch_bounds__(matquant::cuda::kThreads)                                          \
        name(MATQUANT_DEQUANTIZE_PARAMETERS(element)) {                                                             \
        matquant::cuda::dequantize<matquant::cuda::element, groups>(planes, decoders, active_width, output, shape); \
    }

MATQUANT_CUDA_DEQUANTIZERS(MATQUANT_DEFINE_DEQUANTIZER)

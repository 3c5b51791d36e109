// The kernels for decoders of the kind codebook-4d.
#include "cuda/instances.h"
#include "cuda/kernels.cuh"

MATQUANT_CODEBOOK(MATQUANT_DECODE_INSTANCES, MATQUANT_DECODE_KERNEL)
MATQUANT_CODEBOOK(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_DEQUANTIZE_KERNEL)

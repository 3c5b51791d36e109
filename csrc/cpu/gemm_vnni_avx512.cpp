// The kernel for AVX-512 with VNNI.
#include "cpu/lanes_vnni_avx512.h"

namespace matquant::cpu {

const Kernel kAvx512VnniKernel = KernelOf<VnniLanes>::kKernel;

}  // namespace matquant::cpu

// Which instruction sets this machine has, and which one is in use.
#pragma once

#include <vector>

#include "cpu/gemm.h"

namespace matquant::cpu {

struct Isa {
    const char* name;
    const Kernel* kernel;
};

// The instruction sets that this machine has, slowest first.
std::vector<Isa> available_isas();

// The fastest of them, or the one that the environment variable MATQUANT_CPU_ISA names; chosen once.
const Isa& isa_in_use();

}  // namespace matquant::cpu

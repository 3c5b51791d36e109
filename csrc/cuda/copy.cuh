// Asynchronous copies from global to shared memory, 16 bytes a lane.
#pragma once

#include "cuda/tile.h"

namespace matquant::cuda {

// Copies `bytes` of the 16, and fills the rest with zeros.
__device__ inline void copy_async(void* target, const void* source, int bytes = 16) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(source), "r"(bytes) : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until no more than `pending` groups of this thread's copies are under way.
template <int pending>
__device__ inline void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

}  // namespace matquant::cuda

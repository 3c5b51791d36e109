// A plain read of memory by all threads: what benchmarks compare kernels with.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstring>

#include "check.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kLine = 64;
constexpr int64_t kAhead = 4096;

int64_t read_memory(const Tensor& data) {
    check_tensor("data", data, ScalarType::Byte, {data.numel()});
    const uint8_t* bytes = data.const_data_ptr<uint8_t>();
    std::atomic<uint64_t> result = 0;
    torch::stable::parallel_for(0, data.numel() / kLine, 1, [&](int64_t begin, int64_t end) {
        uint64_t words[kLine / 8] = {};
        for (int64_t line = begin; line < end; ++line) {
            __builtin_prefetch(bytes + line * kLine + kAhead);
            uint64_t read[kLine / 8];
            std::memcpy(read, bytes + line * kLine, kLine);
            for (int64_t word = 0; word < kLine / 8; ++word) {
                words[word] ^= read[word];
            }
        }
        for (const uint64_t word : words) {
            result ^= word;
        }
    });
    return static_cast<int64_t>(result.load());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("read_memory", TORCH_BOX(&read_memory)); }

}  // namespace matquant::cpu

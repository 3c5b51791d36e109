// Which kernels compute a product, on what grids and with which shapes: plain C++, which is compiled whether or not
// there is CUDA.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "cuda/shape.h"
#include "weight.h"

namespace matquant::cuda {

// The layout of weights with a kind of decoders. (With codebooks columns have another order.)
constexpr const char* layout_of(DecoderKind kind) { return kind == DecoderKind::kCodebook ? "cuda-codebook" : "cuda"; }

// Adds a segment, in this layout, to the weight with this number; the weight's device does not matter.
void add_segment(int64_t id, const torch::stable::Tensor& planes, const torch::stable::Tensor& decoders,
                 const torch::stable::Tensor& active_width, const std::vector<int64_t>& decoder_widths,
                 const std::vector<int64_t>& output_sizes);

struct Instance {
    const char* name;
    const char* definition;  // a line that defines it, for a program with cuda/kernels.cuh
    DecoderKind decoder_kind;
    torch::headeronly::ScalarType dtype;  // of activations
    int tokens;                           // the most at once; 0 for a kernel that dequantizes
    int groups;                           // in a step
};

// Those that multiply, then those that dequantize, in the order of instances.h.
const std::vector<Instance>& instances();

// Tokens that each have a slot, and slots that each have widths: from the first row of each segment's active widths on
// there are those of all slots, [count, partitions].
struct Rows {
    torch::stable::Tensor slots;  // int32 [at least tokens], on the device
    int32_t count;
};

// A layer's readers, of which each slot has one: weights with the same planes and decoders, whose active widths lie
// one after the other's.
struct Readers {
    std::shared_ptr<const Weight> first;
    int32_t count;
};

// The readers that handles name (int64 [slots] on the CPU), which are zero past the last slot. An error if they are
// none of one layer.
Readers find_readers(const torch::stable::Tensor& handles);

// The kernel for one segment of a weight. More tokens than the kernels of decode.cuh are good for are multiplied by
// torch's library, with weights that are dequantized first; but not where tokens have slots, for what these are is
// known to the device alone.
struct Plan {
    int instance;  // of instances()
    std::array<int32_t, 3> grid;
    int32_t shared_bytes;
    int64_t first_output;            // of the segment
    int64_t partial_sums, arrivals;  // values of scratch memory: float32, and int32 that are zero
    Shape shape;

    bool dequantizes() const { return instances()[instance].tokens == 0; }
    // Of the input: whole steps.
    int64_t columns() const { return int64_t{kStepColumns} * shape.steps(); }
};

// The plans for the segments of a weight. Checks all arguments.
//
// `processors` are the device's multiprocessors. `splits` are the blocks that the columns of a row of tiles are divided
// among; by default as many as fill the device.
std::vector<Plan> make_plans(const Weight& weight, const torch::stable::Tensor& x, int64_t out_features,
                             const std::optional<torch::stable::Tensor>& bias, const std::optional<Rows>& rows,
                             int processors, std::optional<int64_t> splits = std::nullopt);

}  // namespace matquant::cuda

// The weights that are in memory, by number: what a compiled graph names instead of tensors whose shapes follow from a
// width, so that one graph serves every width.
//
// A weight is made, given its segments and freed by the operators new_weight, add_segment and free_weight. Everything
// but the active widths, which are data and may change between calls, is checked once, when a segment is added.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "decoder.h"

namespace matquant {

const char* to_string(DecoderKind kind);

// Output partitions (q, k, v of a fused layer) that have the same planes and decoders in memory.
struct Segment {
    torch::stable::Tensor planes;
    torch::stable::Tensor decoders;       // uint8 [bytes], those of each width, one after the other
    torch::stable::Tensor active_width;   // int32 [partitions]: what is read now
    std::vector<int64_t> decoder_widths;  // resident, in the order of `decoders`
    std::vector<int64_t> output_sizes;    // of the partitions
    int64_t resident_width;               // of the planes

    int64_t out_features() const;

    // An error if a width cannot be active: it has no decoder, or not all of its planes.
    void check_active(int64_t width) const;
};

// A linear layer, or a rank's cut of one. Never changed once it is in the registry.
struct Weight {
    int64_t columns;
    int64_t group_size;  // columns that share a decoder
    DecoderKind decoder_kind;
    std::string layout;                      // of planes and decoders: the backend's name for it
    std::optional<int64_t> activation_bits;  // that products may round to: 8, 16 or 24; by default as many as they need
    std::vector<Segment> segments;
    int64_t out_features;  // of all segments

    // What a backend keeps with the weight, made when a segment is added.
    struct Prepared {
        virtual ~Prepared() = default;
    };
    std::shared_ptr<Prepared> prepared;

    int64_t groups() const { return (columns + group_size - 1) / group_size; }
};

// The weight that a handle (int64 [1], on the CPU) names, or its number does. An error if there is none.
std::shared_ptr<const Weight> find_weight(const torch::stable::Tensor& handle);

std::shared_ptr<const Weight> weight_of(int64_t id);

// A weight with one more segment, whose fields are checked as far as they mean the same to every backend. A backend
// then checks planes and decoders, sets `prepared` and publishes it.
std::shared_ptr<Weight> with_segment(const Weight& weight, Segment segment);

// Puts a weight in the place of the one with this number.
void publish_weight(int64_t id, std::shared_ptr<const Weight> weight);

}  // namespace matquant

#include "weight.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>
#include <set>
#include <unordered_map>

#include "check.h"

namespace matquant {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Registry {
    std::mutex mutex;
    std::unordered_map<int64_t, std::shared_ptr<const Weight>> weights;
    int64_t last_id = 0;  // numbers are never used again
};

// Never destroyed: Python may free weights while the process ends.
Registry& registry() {
    static Registry* registry = new Registry;
    return *registry;
}

DecoderKind decoder_kind_of(const std::string& name) {
    for (const DecoderKind kind : {DecoderKind::kAffineFloat16, DecoderKind::kAffineInt8, DecoderKind::kCodebook}) {
        if (name == to_string(kind)) {
            return kind;
        }
    }
    STD_TORCH_CHECK(false, "decoder_kind: found \"", name, "\", expected \"", to_string(DecoderKind::kAffineFloat16),
                    "\", \"", to_string(DecoderKind::kAffineInt8), "\" or \"", to_string(DecoderKind::kCodebook), "\"");
}

int64_t new_weight(int64_t columns, int64_t group_size, const std::string& decoder_kind, const std::string& layout,
                   const std::optional<int64_t>& activation_bits) {
    STD_TORCH_CHECK(columns >= 0, "columns: found ", columns, ", expected none or more");
    STD_TORCH_CHECK(group_size > 0, "group_size: found ", group_size, ", expected a positive size");
    STD_TORCH_CHECK(!activation_bits || *activation_bits == 8 || *activation_bits == 16 || *activation_bits == 24,
                    "activation_bits: found ", activation_bits.value_or(0), ", expected 8, 16 or 24");
    const auto weight = std::make_shared<Weight>();
    weight->columns = columns;
    weight->group_size = group_size;
    weight->decoder_kind = decoder_kind_of(decoder_kind);
    weight->layout = layout;
    weight->activation_bits = activation_bits;
    weight->out_features = 0;
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    all.weights.emplace(++all.last_id, weight);
    return all.last_id;
}

void free_weight(int64_t id) {
    weight_of(id);
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    all.weights.erase(id);
}

}  // namespace

const char* to_string(DecoderKind kind) {
    switch (kind) {
        case DecoderKind::kAffineFloat16:
            return "affine-float16";
        case DecoderKind::kAffineInt8:
            return "affine-int8";
        case DecoderKind::kCodebook:
            return "codebook-4d";
    }
    return "";
}

int64_t Segment::out_features() const {
    int64_t sum = 0;
    for (const int64_t size : output_sizes) {
        sum += size;
    }
    return sum;
}

void Segment::check_active(int64_t width) const {
    const bool found = std::find(decoder_widths.begin(), decoder_widths.end(), width) != decoder_widths.end();
    STD_TORCH_CHECK(found, "active_width: found ", width, ", expected one of the resident decoder_widths ",
                    to_string(decoder_widths));
    STD_TORCH_CHECK(width <= resident_width, "active_width: found ", width, ", expected at most the resident width ",
                    resident_width);
}

std::shared_ptr<const Weight> weight_of(int64_t id) {
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    const auto found = all.weights.find(id);
    STD_TORCH_CHECK(found != all.weights.end(), "weight: found ", id,
                    ", expected the handle of a packed weight that has not been freed");
    return found->second;
}

std::shared_ptr<const Weight> find_weight(const Tensor& handle) {
    STD_TORCH_CHECK(handle.is_cpu(), "weight: found a handle on a device, expected one on the CPU");
    check_tensor("weight", handle, ScalarType::Long, {1});
    return weight_of(*handle.const_data_ptr<int64_t>());
}

std::shared_ptr<Weight> with_segment(const Weight& weight, Segment segment) {
    check_output_sizes(segment.output_sizes);
    std::set<int64_t> widths;
    for (const int64_t width : segment.decoder_widths) {
        STD_TORCH_CHECK(kMinWidth <= width && width <= kMaxWidth && widths.insert(width).second,
                        "decoder_widths: found ", to_string(segment.decoder_widths), ", expected different widths in ",
                        kMinWidth, "..", kMaxWidth);
    }
    check_tensor("active_width", segment.active_width, ScalarType::Int,
                 {static_cast<int64_t>(segment.output_sizes.size())});
    const auto result = std::make_shared<Weight>(weight);
    result->out_features += segment.out_features();
    result->segments.push_back(std::move(segment));
    result->prepared.reset();
    return result;
}

void publish_weight(int64_t id, std::shared_ptr<const Weight> weight) {
    weight_of(id);
    Registry& all = registry();
    const std::lock_guard lock(all.mutex);
    all.weights[id] = std::move(weight);
}

}  // namespace matquant

// They take no tensor, so no backend can be read off their arguments.
STABLE_TORCH_LIBRARY_IMPL(matquant, CompositeExplicitAutograd, m) {
    m.impl("new_weight", TORCH_BOX(&matquant::new_weight));
    m.impl("free_weight", TORCH_BOX(&matquant::free_weight));
}

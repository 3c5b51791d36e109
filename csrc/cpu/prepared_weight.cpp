#include "cpu/prepared_weight.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "cpu/isa.h"
#include "cuda/plan.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_layout(const Weight& weight, const Segment& segment) {
    STD_TORCH_CHECK(weight.group_size % kStepColumns == 0 || weight.group_size >= weight.columns, "group_size: found ",
                    weight.group_size, ", expected a multiple of ", kStepColumns, " or at least the ", weight.columns,
                    " columns");
    const int64_t rows = static_cast<int64_t>(split_into_tiles(segment.output_sizes).size());
    check_tensor("planes", segment.planes, ScalarType::Byte,
                 {segment.resident_width, rows, ceil_div(weight.columns, kTileColumns), kPlaneBytes});
    int64_t bytes = 0;
    for (const int64_t width : segment.decoder_widths) {
        const DecoderForm form = form_of(weight.decoder_kind, static_cast<int>(width));
        bytes += rows * decoder_bytes(form, weight.groups()) + static_cast<int64_t>(segment.output_sizes.size()) *
                                                                   shared_decoder_bytes(form, static_cast<int>(width));
    }
    check_tensor("decoders", segment.decoders, ScalarType::Byte, {bytes});
}

void add_segment(int64_t id, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                 const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes) {
    const std::shared_ptr<const Weight> before = weight_of(id);
    if (before->layout == cuda::layout_of(before->decoder_kind)) {  // for an emulator, which has no memory of its own
        return cuda::add_segment(id, planes, decoders, active_width, decoder_widths, output_sizes);
    }
    STD_TORCH_CHECK(planes.dim() == 4, "planes: found ", planes.dim(), " dimensions, expected 4");
    const std::shared_ptr<Weight> weight =
        with_segment(*before, {planes, decoders, active_width, decoder_widths, output_sizes, planes.size(0)});
    check_layout(*weight, weight->segments.back());
    weight->prepared = std::make_shared<PreparedWeight>(*weight);
    publish_weight(id, weight);
}

// Planes [entries, places] of codebooks as [places, entries].
std::vector<uint8_t> tables_by_place(const uint8_t* codebooks, int64_t bytes) {
    std::vector<uint8_t> result(bytes);
    for (int64_t byte = 0; byte < bytes; ++byte) {
        const int64_t plane = byte / kEntryPlaneBytes, entry = byte % kEntryPlaneBytes / kPlaces;
        result[plane * kEntryPlaneBytes + byte % kPlaces * kEntries + entry] = codebooks[byte];
    }
    return result;
}

}  // namespace

bool is_paired(const std::string& layout) {
    STD_TORCH_CHECK(layout == kPairsLayout || layout == kPlanesLayout, "layout: found \"", layout, "\", expected \"",
                    kPairsLayout, "\" or \"", kPlanesLayout, "\"");
    return layout == kPairsLayout;
}

PreparedWeight::PreparedWeight(const Weight& weight) : paired_(is_paired(weight.layout)) {
    int64_t begin = 0;
    for (const Segment& segment : weight.segments) {
        const int64_t count = segment.planes.size(1);
        Rows& rows = segments_.emplace_back();
        rows.begin = begin;
        rows.end = begin + count;
        rows.plane_stride = count * segment.planes.size(2) * kPlaneBytes;
        int64_t first = 0;
        for (const int64_t width : segment.decoder_widths) {
            const DecoderForm form = form_of(weight.decoder_kind, static_cast<int>(width));
            const int64_t shared =
                static_cast<int64_t>(segment.output_sizes.size()) * shared_decoder_bytes(form, static_cast<int>(width));
            rows.decoders[width] = first;
            rows.codebooks[width] = tables_by_place(segment.decoders.const_data_ptr<uint8_t>() + first, shared);
            first += shared + count * decoder_bytes(form, weight.groups());
        }
        begin += count;
    }
}

std::shared_ptr<const Plan> PreparedWeight::plan(const Weight& weight, int64_t threads) const {
    const std::lock_guard lock(mutex_);
    bool same = plan_ != nullptr && static_cast<int64_t>(plan_->begins.size()) == threads + 1;
    size_t index = 0;
    for (size_t segment = 0; same && segment < weight.segments.size(); ++segment) {
        const Tensor& active_width = weight.segments[segment].active_width;
        const int32_t* widths = active_width.const_data_ptr<int32_t>();
        const size_t count = weight.segments[segment].output_sizes.size();
        same = std::equal(widths, widths + count, plan_->widths.begin() + index);
        index += count;
    }
    if (!same) {
        plan_ = make_plan(weight, threads);
    }
    return plan_;
}

std::shared_ptr<const Plan> PreparedWeight::make_plan(const Weight& weight, int64_t threads) const {
    const auto plan = std::make_shared<Plan>();
    int64_t first = 0;  // output
    for (size_t index = 0; index < weight.segments.size(); ++index) {
        const Segment& segment = weight.segments[index];
        const uint8_t* planes = segment.planes.const_data_ptr<uint8_t>();
        const uint8_t* decoders = segment.decoders.const_data_ptr<uint8_t>();
        const int32_t* active_width = segment.active_width.const_data_ptr<int32_t>();
        const std::vector<int32_t> widths(active_width, active_width + segment.output_sizes.size());
        const std::vector<TileRows> tile_rows = split_into_tiles(segment.output_sizes);
        const int64_t rows = static_cast<int64_t>(tile_rows.size());
        const int64_t row_bytes = segments_[index].plane_stride / rows;
        for (int64_t row = 0; row < rows; ++row) {
            const TileRows& part = tile_rows[row];
            const int32_t width = widths[part.partition];
            segment.check_active(width);
            const DecoderForm form = form_of(weight.decoder_kind, width);
            const int64_t shared = shared_decoder_bytes(form, width), partitions = segment.output_sizes.size();
            const uint8_t* own = decoders + segments_[index].decoders[width];
            const std::vector<uint8_t>& codebooks = segments_[index].codebooks[width];
            plan->rows.push_back({
                .pairs = planes + 2 * row * row_bytes,
                .planes = planes + row * row_bytes,
                .decoders = own + partitions * shared + row * decoder_bytes(form, weight.groups()),
                .codebook = codebooks.empty() ? nullptr : codebooks.data() + part.partition * shared,
                .width = width,
                .first = first + part.first,
                .count = part.count,
            });
        }
        plan->widths.insert(plan->widths.end(), widths.begin(), widths.end());
        first += segment.out_features();
    }

    plan->widest = *std::max_element(plan->widths.begin(), plan->widths.end());

    // Units of rows, so that all threads have about as many bits to read.
    int64_t bits = 0, before = 0;
    for (const TileRow& row : plan->rows) {
        bits += row.width;
    }
    for (const Rows& segment : segments_) {
        for (int64_t row = segment.begin; row < segment.end; row += kUnitRows) {
            while (before * threads >= bits * static_cast<int64_t>(plan->begins.size()) &&
                   static_cast<int64_t>(plan->begins.size()) < threads) {
                plan->begins.push_back(row);
            }
            for (int64_t index = row; index < std::min(row + kUnitRows, segment.end); ++index) {
                before += plan->rows[index].width;
            }
        }
    }
    plan->begins.resize(threads + 1, static_cast<int64_t>(plan->rows.size()));
    return plan;
}

const PreparedWeight& prepared_for_cpu(const Weight& weight) {
    STD_TORCH_CHECK(weight.prepared != nullptr, "weight: found one without segments, expected at least one");
    const auto* prepared = dynamic_cast<const PreparedWeight*>(weight.prepared.get());
    STD_TORCH_CHECK(prepared != nullptr, "weight: found the layout \"", weight.layout, "\", expected \"", kPairsLayout,
                    "\" or \"", kPlanesLayout, "\"");
    return *prepared;
}

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("add_segment", TORCH_BOX(&add_segment)); }

}  // namespace matquant::cpu

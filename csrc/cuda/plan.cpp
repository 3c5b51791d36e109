#include "cuda/plan.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "check.h"
#include "cuda/instances.h"

namespace matquant::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostTokens = 64;
// Blocks of threads for each multiprocessor that columns are divided for, where rows alone are too few.
constexpr int64_t kBlocksPerProcessor = 3;
constexpr int64_t kMostBlocks = 65535;  // in the second and third dimension of a grid

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// What the list of instances calls the types of activations.
constexpr ScalarType Half = ScalarType::Half;
constexpr ScalarType BFloat16 = ScalarType::BFloat16;

std::string name_of(const torch::stable::Device& device) {
    const std::string type = device.is_cuda() ? "cuda" : device.is_cpu() ? "cpu" : "another";
    return type + ":" + std::to_string(device.index());
}

void check_device(const char* name, const Tensor& tensor, const Tensor& planes) {
    STD_TORCH_CHECK(tensor.device() == planes.device(), name, ": found it on ", name_of(tensor.device()),
                    ", expected it where the weight's planes are, on ", name_of(planes.device()));
}

void check_layout(const Weight& weight) {
    const char* expected = layout_of(weight.decoder_kind);
    STD_TORCH_CHECK(weight.layout == expected, "weight: found the layout \"", weight.layout, "\", expected \"",
                    expected, "\"");
}

// A segment of a weight, as far as it does not depend on the product.
struct Layer {
    Shape shape;
    int groups;  // in a step
};

class PreparedWeight : public Weight::Prepared {
  public:
    explicit PreparedWeight(std::vector<Layer> layers) : layers_(std::move(layers)) {}
    const std::vector<Layer>& layers() const { return layers_; }

  private:
    std::vector<Layer> layers_;
};

// Groups in a step, and the shift of Shape.
std::pair<int, int> grouping_of(int64_t group_size, int64_t columns) {
    if (group_size >= columns && group_size != 32 && group_size != 64) {
        return {1, 31};
    }
    const bool power = group_size >= 32 && (group_size & (group_size - 1)) == 0;
    STD_TORCH_CHECK(power, "group_size: found ", group_size,
                    ", expected 32, 64, 128 or a greater power of two, or at least the ", columns, " columns");
    if (group_size < kStepColumns) {
        return {static_cast<int>(kStepColumns / group_size), 0};
    }
    int shift = 0;
    while (int64_t{kStepColumns} << shift < group_size) {
        ++shift;
    }
    return {1, shift};
}

void check_bytes(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.numel() < int64_t{1} << 32, name, ": found ", tensor.numel(), " bytes, expected below 2^32");
}

Layer describe(const Weight& weight, const Segment& segment) {
    STD_TORCH_CHECK(weight.columns > 0, "columns: found none, expected at least one");
    STD_TORCH_CHECK(segment.output_sizes.size() <= kMaxPartitions, "output_sizes: found ", segment.output_sizes.size(),
                    " partitions, expected at most ", kMaxPartitions);
    const auto [groups, shift] = grouping_of(weight.group_size, weight.columns);
    Shape shape = {};
    shape.partitions = static_cast<int32_t>(segment.output_sizes.size());
    int64_t rows = 0, tile_rows = 0;
    for (size_t index = 0; index < segment.output_sizes.size(); ++index) {
        shape.partition_tiles[index] = static_cast<int32_t>(tile_rows);
        shape.partition_rows[index] = static_cast<int32_t>(rows);
        tile_rows += ceil_div(segment.output_sizes[index], kTileRows);
        rows += segment.output_sizes[index];
        STD_TORCH_CHECK(rows <= std::numeric_limits<int32_t>::max(), "output_sizes: found ",
                        to_string(segment.output_sizes), ", expected a sum below 2^31");
    }
    const int64_t tile_columns = ceil_div(weight.columns, kTileColumns);
    STD_TORCH_CHECK(kBaseBits <= segment.resident_width && segment.resident_width <= kMaxWidth, "planes: found ",
                    segment.resident_width, " planes, expected ", kBaseBits, " to ", kMaxWidth);
    check_tensor("planes", segment.planes, ScalarType::Byte,
                 {tile_rows, tile_columns, segment.resident_width, kPlaneBytes});
    check_bytes("planes", segment.planes);
    std::fill(std::begin(shape.first_decoders), std::end(shape.first_decoders), kNone);
    int64_t decoder_bytes = 0;
    for (const int64_t width : segment.decoder_widths) {
        if (width <= segment.resident_width) {  // of a wider one not all planes are there
            shape.first_decoders[width - kMinWidth] = static_cast<uint32_t>(decoder_bytes);
        }
        const DecoderForm form = form_of(weight.decoder_kind, width);
        decoder_bytes += shape.partitions * shared_decoder_bytes(weight.decoder_kind, static_cast<int>(width));
        decoder_bytes += tile_rows * (step_bytes(form) + weight.groups() * group_bytes(form));
    }
    check_tensor("decoders", segment.decoders, ScalarType::Byte, {decoder_bytes});
    check_bytes("decoders", segment.decoders);
    check_device("decoders", segment.decoders, segment.planes);
    check_device("active_width", segment.active_width, segment.planes);
    shape.rows = static_cast<int32_t>(rows);
    shape.tile_rows = static_cast<int32_t>(tile_rows);
    shape.tile_columns = static_cast<int32_t>(tile_columns);
    shape.resident_width = static_cast<int32_t>(segment.resident_width);
    shape.groups = static_cast<int32_t>(weight.groups());
    shape.group_shift = shift;
    return {shape, groups};
}

std::shared_ptr<Weight::Prepared> prepare(const Weight& weight) {
    std::vector<Layer> layers;
    for (const Segment& segment : weight.segments) {
        check_device("planes", segment.planes, weight.segments.front().planes);
        layers.push_back(describe(weight, segment));
    }
    return std::make_shared<PreparedWeight>(std::move(layers));
}

// The kernel for the fewest tokens that are enough, or for the most there are; with 0 the one that dequantizes.
int find_instance(DecoderKind kind, ScalarType dtype, int64_t tokens, int groups) {
    int found = -1;
    for (size_t index = 0; index < instances().size(); ++index) {
        const Instance& instance = instances()[index];
        if (instance.decoder_kind == kind && instance.dtype == dtype && instance.groups == groups &&
            (instance.tokens == 0) == (tokens == 0) && (found < 0 || instances()[found].tokens < tokens)) {
            found = static_cast<int>(index);
        }
    }
    STD_TORCH_CHECK(found >= 0, "no kernel for ", torch::headeronly::toString(dtype), ", ", to_string(kind),
                    " decoders and ", groups, " groups in ", kStepColumns, " columns");
    return found;
}

// A device has too few rows of tiles for all its multiprocessors: so many blocks divide the columns of each that it is
// full, each with a step at least for each of its warps.
int64_t splits_of(const Shape& shape, int64_t passes, int64_t processors) {
    const int64_t blocks = std::max<int64_t>(shape.tile_rows * passes, 1);
    return std::clamp<int64_t>(ceil_div(kBlocksPerProcessor * processors, blocks), 1,
                               std::max(1, shape.steps() / kWarps));
}

}  // namespace

const std::vector<Instance>& instances() {
#define MATQUANT_ROW(name, element, kind, token_tiles, groups, blocks)                                         \
    {#name,                                                                                                    \
     "MATQUANT_DECODE_KERNEL(" #name ", " #element ", " #kind ", " #token_tiles ", " #groups ", " #blocks ")", \
     DecoderKind::kind,                                                                                        \
     element,                                                                                                  \
     token_tiles * kTokens,                                                                                    \
     groups},
#define MATQUANT_DEQUANTIZE_ROW(name, element, kind, groups)                        \
    {#name,                                                                         \
     "MATQUANT_DEQUANTIZE_KERNEL(" #name ", " #element ", " #kind ", " #groups ")", \
     DecoderKind::kind,                                                             \
     element,                                                                       \
     0,                                                                             \
     groups},
    static const std::vector<Instance> list = {
        MATQUANT_ALL_DECODERS(MATQUANT_DECODE_INSTANCES, MATQUANT_ROW)
            MATQUANT_ALL_DECODERS(MATQUANT_DEQUANTIZE_INSTANCES, MATQUANT_DEQUANTIZE_ROW)};
#undef MATQUANT_ROW
#undef MATQUANT_DEQUANTIZE_ROW
    return list;
}

void add_segment(int64_t id, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                 const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes) {
    const std::shared_ptr<const Weight> before = weight_of(id);
    check_layout(*before);
    STD_TORCH_CHECK(planes.dim() == 4, "planes: found ", planes.dim(), " dimensions, expected 4");
    const std::shared_ptr<Weight> weight =
        with_segment(*before, {planes, decoders, active_width, decoder_widths, output_sizes, planes.size(2)});
    weight->prepared = prepare(*weight);
    publish_weight(id, weight);
}

Readers find_readers(const Tensor& handles) {
    STD_TORCH_CHECK(handles.is_cpu(), "weights: found handles on a device, expected them on the CPU");
    check_tensor("weights", handles, ScalarType::Long, {handles.numel()});
    const int64_t* numbers = handles.const_data_ptr<int64_t>();
    const int64_t* end = numbers + handles.numel();
    const int64_t* last = std::find(numbers, end, 0);
    STD_TORCH_CHECK(last != numbers && std::all_of(last, end, [](int64_t number) { return number == 0; }),
                    "weights: found ", last == numbers ? "none" : "some after a slot that has none",
                    ", expected those of the first slots");
    const Readers readers = {weight_of(numbers[0]), static_cast<int32_t>(last - numbers)};
    const std::vector<Segment>& first = readers.first->segments;
    for (int32_t slot = 1; slot < readers.count; ++slot) {
        const auto fits = [slot](const Segment& own, const Segment& other) {
            const auto partitions = static_cast<int64_t>(own.output_sizes.size());
            return own.planes.const_data_ptr() == other.planes.const_data_ptr() &&
                   own.decoders.const_data_ptr() == other.decoders.const_data_ptr() &&
                   own.output_sizes == other.output_sizes &&
                   other.active_width.const_data_ptr<int32_t>() ==
                       own.active_width.const_data_ptr<int32_t>() + slot * partitions;
        };
        const std::shared_ptr<const Weight> weight = weight_of(numbers[slot]);
        const std::vector<Segment>& others = weight->segments;
        STD_TORCH_CHECK(std::equal(first.begin(), first.end(), others.begin(), others.end(), fits),
                        "weights: found slot ", slot,
                        " with planes, decoders or a place of its widths of its own, expected readers of one layer");
    }
    return readers;
}

std::vector<Plan> make_plans(const Weight& weight, const Tensor& x, int64_t out_features,
                             const std::optional<Tensor>& bias, const std::optional<Rows>& rows, int processors,
                             std::optional<int64_t> splits) {
    check_layout(weight);
    const auto* prepared = dynamic_cast<const PreparedWeight*>(weight.prepared.get());
    STD_TORCH_CHECK(prepared != nullptr, "weight: found one without segments, expected at least one");
    const ScalarType dtype = x.scalar_type();
    STD_TORCH_CHECK(dtype == Half || dtype == BFloat16, "x: found dtype ", torch::headeronly::toString(dtype),
                    ", expected BFloat16 or Half");
    STD_TORCH_CHECK(x.dim() > 0, "x: found a scalar, expected at least one dimension");
    STD_TORCH_CHECK(x.size(-1) == weight.columns, "x: found ", x.size(-1), " columns, expected the weight's ",
                    weight.columns);
    STD_TORCH_CHECK(out_features == weight.out_features && out_features <= std::numeric_limits<int32_t>::max(),
                    "out_features: found ", out_features, ", expected the weight's ", weight.out_features);
    const Tensor& planes = weight.segments.front().planes;
    check_device("x", x, planes);
    if (bias) {
        check_tensor("bias", *bias, dtype, {out_features});
        check_device("bias", *bias, planes);
    }
    const int64_t tokens = x.numel() / weight.columns;
    STD_TORCH_CHECK(tokens <= std::numeric_limits<int32_t>::max(), "x: found ", tokens,
                    " tokens, expected fewer than 2^31");
    STD_TORCH_CHECK(!splits || (0 < *splits && *splits <= kMostBlocks), "splits: found ", splits.value_or(0),
                    ", expected 1 to ", kMostBlocks);

    if (rows) {
        check_tensor("slots", rows->slots, ScalarType::Int, {rows->slots.numel()});
        check_device("slots", rows->slots, planes);
        STD_TORCH_CHECK(tokens <= rows->slots.numel(), "slots: found ", rows->slots.numel(),
                        ", expected one for each of ", tokens, " rows");
    }

    std::vector<Plan> plans;
    int64_t first = 0;
    for (const Layer& layer : prepared->layers()) {
        Plan& plan = plans.emplace_back();
        Shape& shape = plan.shape = layer.shape;
        shape.tokens = static_cast<int32_t>(tokens);
        shape.output_stride = static_cast<int32_t>(out_features);
        plan.first_output = first;
        first += shape.rows;
        shape.slots = rows ? rows->count : 1;
        if (tokens > kMostTokens && !rows) {
            plan.instance = find_instance(weight.decoder_kind, dtype, 0, layer.groups);
            const int64_t blocks = ceil_div(int64_t{shape.steps()} * kStepTiles, kWarps);
            STD_TORCH_CHECK(blocks <= kMostBlocks, "x: found ", weight.columns, " columns, expected at most ",
                            kMostBlocks * kWarps * kTileColumns);
            plan.grid = {shape.tile_rows, static_cast<int32_t>(blocks), 1};
            continue;
        }
        plan.instance = find_instance(weight.decoder_kind, dtype, std::max<int64_t>(tokens, 1), layer.groups);
        const Instance& instance = instances()[plan.instance];
        const int64_t passes = ceil_div(tokens, instance.tokens);
        const int64_t most = kMostBlocks / shape.slots;
        STD_TORCH_CHECK(passes <= most, "x: found ", tokens, " tokens, expected at most ", most * instance.tokens);
        const int64_t divided = splits ? *splits : splits_of(shape, passes, processors);
        plan.grid = {shape.tile_rows, static_cast<int32_t>(divided), static_cast<int32_t>(passes * shape.slots)};
        plan.shared_bytes = shared_bytes(weight.decoder_kind, instance.tokens, layer.groups, shape.resident_width);
        if (divided > 1) {
            plan.partial_sums = divided * shape.tile_rows * tokens * kTileRows;
            plan.arrivals = passes * shape.slots * shape.tile_rows;
        }
    }
    return plans;
}

STABLE_TORCH_LIBRARY_IMPL(matquant, CUDA, m) { m.impl("add_segment", TORCH_BOX(&add_segment)); }

}  // namespace matquant::cuda

// matquant::linear on the CPU: checks the arguments and divides the work between threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <optional>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "check.h"
#include "cpu/isa.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of tiles that are never divided: their outputs for a token fill a cache line, which one thread writes.
constexpr int64_t kUnitRows = 2;

constexpr int64_t kPackingTokens = 8;  // the fewest that are worth a thread

Element element_of(ScalarType dtype) {
    switch (dtype) {
        case ScalarType::BFloat16:
            return Element::kBFloat16;
        case ScalarType::Half:
            return Element::kHalf;
        case ScalarType::Float:
            return Element::kFloat;
        default:
            STD_TORCH_CHECK(false, "x: found dtype ", torch::headeronly::toString(dtype),
                            ", expected BFloat16, Half or Float");
    }
}

int64_t find_decoder(const std::vector<int64_t>& decoder_widths, int64_t width, int64_t resident_width) {
    const auto found = std::find(decoder_widths.begin(), decoder_widths.end(), width);
    STD_TORCH_CHECK(found != decoder_widths.end(), "active_width: found ", width, ", expected one of decoder_widths ",
                    to_string(decoder_widths));
    STD_TORCH_CHECK(width <= resident_width, "active_width: found ", width, ", expected at most the resident width ",
                    resident_width);
    return found - decoder_widths.begin();
}

// The rows of tiles with what is active now looked up.
std::vector<TileRow> check_weights(const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                                   const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes,
                                   int64_t in_features, int64_t group_size) {
    check_output_sizes(output_sizes);
    for (const int64_t width : decoder_widths) {
        STD_TORCH_CHECK(kMinWidth <= width && width <= kMaxWidth, "decoder_widths: found ", to_string(decoder_widths),
                        ", expected widths in ", kMinWidth, "..", kMaxWidth);
    }
    STD_TORCH_CHECK(group_size > 0 && (group_size % kStepColumns == 0 || group_size >= in_features),
                    "group_size: found ", group_size, ", expected a multiple of ", kStepColumns, " or at least the ",
                    in_features, " input features");
    const std::vector<TileRows> tile_rows = split_into_tiles(output_sizes);
    const int64_t rows = static_cast<int64_t>(tile_rows.size());
    const int64_t tiles = ceil_div(in_features, kTileColumns);
    const int64_t groups = ceil_div(in_features, group_size);
    STD_TORCH_CHECK(planes.dim() == 4, "planes: found ", planes.dim(), " dimensions, expected 4");
    const int64_t resident_width = planes.size(0);
    check_tensor("planes", planes, ScalarType::Byte, {resident_width, rows, tiles, kPlaneBytes});
    check_tensor("decoders", decoders, ScalarType::Half,
                 {static_cast<int64_t>(decoder_widths.size()), rows, groups, 2, kTileRows});
    check_tensor("active_width", active_width, ScalarType::Int, {static_cast<int64_t>(output_sizes.size())});

    const uint8_t* data = planes.const_data_ptr<uint8_t>();
    const uint16_t* decoder_data = static_cast<const uint16_t*>(decoders.const_data_ptr());
    const int32_t* widths = active_width.const_data_ptr<int32_t>();
    const int64_t row_bytes = tiles * kPlaneBytes;
    const int64_t decoder_size = groups * 2 * kTileRows;
    std::vector<TileRow> result;
    result.reserve(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const TileRows& part = tile_rows[row];
        const int32_t width = widths[part.partition];
        const int64_t decoder = find_decoder(decoder_widths, width, resident_width);
        result.push_back({data + 2 * row * row_bytes, data + row * row_bytes,
                          decoder_data + (decoder * rows + row) * decoder_size, width, part.first, part.count});
    }
    return result;
}

// For float32 what keeps its precision. Where all that is active are slices of 2 bits, activations of 8 bits change the
// model's predictions by less than a hundredth of what these slices do already (docs/cpu-kernels.md).
int default_activation_bits(const std::vector<TileRow>& rows, Element element) {
    if (element == Element::kFloat) {
        return 24;
    }
    const bool narrow =
        std::all_of(rows.begin(), rows.end(), [](const TileRow& row) { return row.width == kMinWidth; });
    return narrow ? 8 : 16;
}

// Where each thread's rows of tiles begin, and the end: units of kUnitRows, so that all have about as many bits to
// read.
std::vector<int64_t> divide(const std::vector<TileRow>& rows, int64_t threads) {
    const int64_t count = static_cast<int64_t>(rows.size());
    int64_t bits = 0;
    for (const TileRow& row : rows) {
        bits += row.width;
    }
    std::vector<int64_t> begins;
    int64_t row = 0, before = 0;
    for (int64_t thread = 0; thread < threads; ++thread) {
        for (; row < count && before * threads < bits * thread; row += kUnitRows) {
            for (int64_t index = row; index < std::min(row + kUnitRows, count); ++index) {
                before += rows[index].width;
            }
        }
        begins.push_back(std::min(row, count));
    }
    begins.push_back(count);
    return begins;
}

// Memory that is kept from call to call, on huge pages where it is large and the system has them: fresh pages would
// cost a hundredth of a prompt's time, and scattered ones collide in the second cache.
template <class T>
class Scratch {
  public:
    T* take(int64_t count) {
        if (count > capacity_) {
            const size_t size = ceil_div(count * sizeof(T), kHugePage) * kHugePage;
            data_.reset(static_cast<T*>(std::aligned_alloc(kHugePage, size)));
            STD_TORCH_CHECK(data_ != nullptr, "no memory for ", size, " bytes of activations");
#ifdef __linux__
            madvise(data_.get(), size, MADV_HUGEPAGE);
#endif
            capacity_ = count;
        }
        return data_.get();
    }

  private:
    static constexpr int64_t kHugePage = 1 << 21;
    struct Free {
        void operator()(T* data) const { std::free(data); }
    };
    std::unique_ptr<T, Free> data_;
    int64_t capacity_ = 0;
};

// Packs and multiplies blocks of tokens.
void multiply(const std::vector<TileRow>& rows, int64_t tokens, Product product) {
    const Kernel& kernel = *isa_in_use().kernel;
    const int64_t segments = count_segments(product.columns, product.group_size);
    const int64_t most = std::min(tokens, kBlockTokens);
    thread_local Scratch<uint8_t> activations;
    thread_local Scratch<Factor> factors;
    product.activations =
        activations.take(segments * most * kSegmentSteps * kernel.step_bytes(product.activation_bits));
    product.factors = factors.take(segments * most);
    const int64_t element_size = product.element == Element::kFloat ? 4 : 2;
    const int64_t threads = torch::stable::get_num_threads();
    const std::vector<int64_t> begins = divide(rows, threads);
    for (; tokens > 0; tokens -= product.tokens) {
        product.tokens = std::min(tokens, kBlockTokens);
        torch::stable::parallel_for(0, product.tokens, kPackingTokens,
                                    [&](int64_t begin, int64_t end) { kernel.pack(product, begin, end); });
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
            kernel.multiply(product, rows.data() + begins[begin], begins[end] - begins[begin]);
        });
        product.input = static_cast<const uint8_t*>(product.input) + product.tokens * product.columns * element_size;
        product.output = static_cast<uint8_t*>(product.output) + product.tokens * product.output_stride * element_size;
    }
}

Tensor linear(const Tensor& x, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
              const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes, int64_t group_size,
              const std::optional<Tensor>& bias, const std::optional<int64_t>& activation_bits) {
    STD_TORCH_CHECK(x.dim() > 0, "x: found a scalar, expected at least one dimension");
    const ScalarType dtype = x.scalar_type();
    const Element element = element_of(dtype);
    STD_TORCH_CHECK(!activation_bits || *activation_bits == 8 || *activation_bits == 16 || *activation_bits == 24,
                    "activation_bits: found ", activation_bits.value_or(0), ", expected 8, 16 or 24");
    const int64_t in_features = x.size(-1);
    const std::vector<TileRow> rows =
        check_weights(planes, decoders, active_width, decoder_widths, output_sizes, in_features, group_size);
    const int64_t out_features = rows.back().first + rows.back().count;
    if (bias) {
        check_tensor("bias", *bias, dtype, {out_features});
    }
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = out_features;
    Tensor output = torch::stable::empty(sizes, dtype);
    const Tensor input = torch::stable::contiguous(x);
    const Product product = {
        .columns = in_features,
        .group_size = group_size,
        .plane_stride = planes.size(1) * planes.size(2) * kPlaneBytes,
        .paired = are_paired(decoder_widths, planes.size(0)),
        .activation_bits =
            activation_bits ? static_cast<int>(*activation_bits) : default_activation_bits(rows, element),
        .element = element,
        .tokens = 0,
        .input = input.const_data_ptr(),
        .activations = nullptr,
        .factors = nullptr,
        .bias = bias ? bias->const_data_ptr() : nullptr,
        .output = output.mutable_data_ptr(),
        .output_stride = out_features,
    };
    multiply(rows, output.numel() / out_features, product);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace matquant::cpu

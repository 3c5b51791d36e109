// matquant::linear on the CPU: checks, choice of the kernel, output.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "check.h"
#include "cpu/activations.h"
#include "cpu/isa.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows of activations that are multiplied at once: bounds the scratch memory, and is enough for the time to decode the
// weights to be small beside the product's.
constexpr int64_t kBlockRows = 128;

// The weights with what is active now looked up, and where each tile's rows go.
struct Weights {
    std::vector<Tile> tiles;
    std::vector<TileRows> rows;
    int64_t out_features;
};

int64_t find_decoder(const std::vector<int64_t>& decoder_widths, int64_t width, int64_t resident_width) {
    const auto found = std::find(decoder_widths.begin(), decoder_widths.end(), width);
    STD_TORCH_CHECK(found != decoder_widths.end(), "active_width: found ", width, ", expected one of decoder_widths ",
                    to_string(decoder_widths));
    STD_TORCH_CHECK(width <= resident_width, "active_width: found ", width, ", expected at most the resident width ",
                    resident_width);
    return found - decoder_widths.begin();
}

Weights check_weights(const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
                      const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes,
                      int64_t in_features, int64_t group_size) {
    check_output_sizes(output_sizes);
    for (const int64_t width : decoder_widths) {
        STD_TORCH_CHECK(kMinWidth <= width && width <= kMaxWidth, "decoder_widths: found ", to_string(decoder_widths),
                        ", expected widths in ", kMinWidth, "..", kMaxWidth);
    }
    STD_TORCH_CHECK(group_size > 0 && (group_size % kTileColumns == 0 || group_size >= in_features),
                    "group_size: found ", group_size, ", expected a multiple of ", kTileColumns, " or at least the ",
                    in_features, " input features");
    Weights weights{{}, split_into_tiles(output_sizes), 0};
    weights.out_features = weights.rows.back().first + weights.rows.back().count;
    const int64_t tiles = static_cast<int64_t>(weights.rows.size());
    const int64_t steps = ceil_div(in_features, kTileColumns);
    const int64_t groups = ceil_div(in_features, group_size);
    STD_TORCH_CHECK(planes.dim() == 3, "planes: found ", planes.dim(), " dimensions, expected 3");
    const int64_t resident_width = planes.size(0);
    check_tensor("planes", planes, ScalarType::Long, {resident_width, tiles, steps});
    check_tensor("decoders", decoders, ScalarType::Half,
                 {static_cast<int64_t>(decoder_widths.size()), tiles, groups, 2, kTileRows});
    check_tensor("active_width", active_width, ScalarType::Int, {static_cast<int64_t>(output_sizes.size())});

    const int64_t* masks = planes.const_data_ptr<int64_t>();
    const uint16_t* decoder_data = static_cast<const uint16_t*>(decoders.const_data_ptr());
    const int32_t* widths = active_width.const_data_ptr<int32_t>();
    const int64_t decoder_size = groups * 2 * kTileRows;
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int32_t width = widths[weights.rows[tile].partition];
        const int64_t decoder = find_decoder(decoder_widths, width, resident_width);
        weights.tiles.push_back({masks + tile * steps, decoder_data + (decoder * tiles + tile) * decoder_size, width});
    }
    return weights;
}

template <class T>
void write_rows(const float* sums, int64_t sums_stride, int64_t rows, const TileRows& tile, const T* bias,
                int64_t out_features, T* output) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t lane = 0; lane < tile.count; ++lane) {
            const float added = bias == nullptr ? 0.0f : static_cast<float>(bias[tile.first + lane]);
            output[row * out_features + tile.first + lane] = static_cast<T>(sums[row * sums_stride + lane] + added);
        }
    }
}

// Packs and multiplies blocks of rows.
template <class T>
void multiply(const T* x, int64_t rows, const Weights& weights, Product product, const T* bias, T* output) {
    const Isa& isa = isa_in_use();
    // Registers of the tile unit take columns of one group.
    const bool groups_fit = product.group_size % kRegisterColumns == 0 || product.group_size >= product.columns;
    const bool bfloat16 = std::is_same_v<T, c10::BFloat16> && isa.bfloat16_kernel != nullptr && groups_fit;
    const Kernel& kernel = bfloat16 ? *isa.bfloat16_kernel : *isa.kernel;
    const int64_t tiles = static_cast<int64_t>(weights.tiles.size());
    PackedActivations activations(std::min(rows, kBlockRows), product.columns, bfloat16);
    for (int64_t first_row = 0; first_row < rows; first_row += kBlockRows) {
        const int64_t block_rows = std::min(kBlockRows, rows - first_row);
        activations.pack(x + first_row * product.columns, block_rows, product);
        T* block_output = output + first_row * weights.out_features;
        torch::stable::parallel_for(0, ceil_div(tiles, kernel.tiles), 1, [&](int64_t begin, int64_t end) {
            alignas(64) float sums[kBlockRows * kMaxTiles * kTileRows];
            for (int64_t first = begin * kernel.tiles; first < std::min(end * kernel.tiles, tiles);
                 first += kernel.tiles) {
                const int count = static_cast<int>(std::min<int64_t>(kernel.tiles, tiles - first));
                kernel.multiply(product, &weights.tiles[first], count, sums);
                for (int index = 0; index < count; ++index) {
                    write_rows(sums + index * kTileRows, count * kTileRows, block_rows, weights.rows[first + index],
                               bias, weights.out_features, block_output);
                }
            }
        });
    }
}

Tensor linear(const Tensor& x, const Tensor& planes, const Tensor& decoders, const Tensor& active_width,
              const std::vector<int64_t>& decoder_widths, const std::vector<int64_t>& output_sizes, int64_t group_size,
              const std::optional<Tensor>& bias) {
    STD_TORCH_CHECK(x.dim() > 0, "x: found a scalar, expected at least one dimension");
    const ScalarType dtype = x.scalar_type();
    const int64_t in_features = x.size(-1);
    const Weights weights =
        check_weights(planes, decoders, active_width, decoder_widths, output_sizes, in_features, group_size);
    if (bias) {
        check_tensor("bias", *bias, dtype, {weights.out_features});
    }
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = weights.out_features;
    Tensor output = torch::stable::empty(sizes, dtype);
    const int64_t rows = output.numel() / weights.out_features;
    const Tensor input = torch::stable::contiguous(x);
    const Product product{planes.size(1) * planes.size(2), in_features, group_size, 0, nullptr, nullptr, nullptr};

    const auto run = [&]<class T>(T) {
        multiply(static_cast<const T*>(input.const_data_ptr()), rows, weights, product,
                 bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
                 static_cast<T*>(output.mutable_data_ptr()));
    };
    switch (dtype) {
        case ScalarType::BFloat16:
            run(c10::BFloat16());
            break;
        case ScalarType::Half:
            run(c10::Half());
            break;
        case ScalarType::Float:
            run(float());
            break;
        default:
            STD_TORCH_CHECK(false, "x: found dtype ", torch::headeronly::toString(dtype),
                            ", expected BFloat16, Half or Float");
    }
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(matquant, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace matquant::cpu

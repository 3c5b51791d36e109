// A layer's weights in the activations' type, for products with so many tokens that a library's kernel is faster.
#pragma once

#include "cuda/multiply.cuh"
#include "cuda/multiply_codebook.cuh"

namespace matquant::cuda {

// Blocks that fit a multiprocessor's registers: without a number the compiler aims at more, and spills.
constexpr int dequantize_blocks(DecoderKind kind) { return kind == DecoderKind::kCodebook ? 4 : 6; }

// A code's value from one part of it, without what dequantize.cuh adds.
template <class Element>
__device__ float2 without_magic(uint32_t word, int exponent) {
    const auto* values = reinterpret_cast<const typename Element::Type*>(&word);
    const float magic = static_cast<float>(1 << exponent);
    return {Element::to_float(values[0]) - magic, Element::to_float(values[1]) - magic};
}

// Scale and offset of rows g + 8 half of a row tile; `steps` and `memory` are where those of a row of tiles and a
// group's decoders begin.
template <DecoderForm form, int width>
__device__ float2 scale_and_offset(const uint8_t* steps, const uint8_t* memory, int g, int row_tile, int half) {
    GroupDecoders<form> decoders;
    decoders.load(memory + g * group_bytes(form) / 8);
    const float2 scales = decoders.scale(row_tile), addends = decoders.addend(row_tile);
    const float scale = half == 0 ? scales.x : scales.y, addend = half == 0 ? addends.x : addends.y;
    if constexpr (form == DecoderForm::kFloat16) {
        return {scale, addend};
    } else {
        const RowSteps step(steps, g, row_tile);
        const float scaled = scale * (half == 0 ? step.scale.x : step.scale.y);
        return {scaled, fmaf(-kMiddle<width>, scaled, addend * (half == 0 ? step.centre.x : step.centre.y))};
    }
}

// One warp's tile to `output` [rows, columns], columns of whole steps.
template <class Element, DecoderForm form, int width, int groups>
__device__ void dequantize_tile(const uint8_t* planes, const uint8_t* decoders, typename Element::Type* output,
                                const Shape& shape, int tile, int first_row, int rows, int lane) {
    constexpr int kLowerBits = Parts<Element, width>::kLowerBits;
    using Upper = typename Parts<Element, width>::Upper;
    using Lower = typename Parts<Element, width>::Lower;
    const Stage<form, width> stage(planes, lane, 0);
    TileWords words = {};
    stage.load_base(0, words.base);
#pragma unroll
    for (int plane = kBaseBits; plane < width; ++plane) {
        stage.load_plane(0, plane, words.planes[plane]);
    }
    const int steps = shape.steps();
    const size_t columns = static_cast<size_t>(steps) * kStepTiles * kTileColumns;
#pragma unroll
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        uint32_t upper[2][8], lower[2][8];
        Upper::unpack(words, row_tile, upper);
        if constexpr (kLowerBits > 0) {
            Lower::unpack(words, row_tile, lower);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_tile * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int run = 0; run < 2; ++run) {  // of 8 columns
                const int group = groups == 1   ? (tile / kStepTiles) >> shape.group_shift
                                  : groups == 2 ? tile
                                                : min(2 * tile + run, shape.groups - 1);
                const uint8_t* memory = decoders + step_bytes(form) + group * group_bytes(form);
                const float2 decoder = scale_and_offset<form, width>(decoders, memory, lane / 4, row_tile, half);
                uint4 packed;
                auto* values = reinterpret_cast<typename Element::Type*>(&packed);
#pragma unroll
                for (int pair = 0; pair < 4; ++pair) {
                    const int q = run * 4 + pair;
                    float2 codes = without_magic<Element>(upper[half][q], Upper::exponent_of(q));
                    if constexpr (kLowerBits > 0) {
                        const float2 rest = without_magic<Element>(lower[half][q], Lower::exponent_of(q));
                        codes = {codes.x + rest.x, codes.y + rest.y};
                    }
                    values[2 * pair] = Element::from_float(decoder.x * codes.x + decoder.y);
                    values[2 * pair + 1] = Element::from_float(decoder.x * codes.y + decoder.y);
                }
                if (row < rows) {
                    const size_t column = static_cast<size_t>(tile) * kTileColumns + run * 32 + lane % 4 * 8;
                    *reinterpret_cast<uint4*>(output + (first_row + row) * columns + column) = packed;
                }
            }
        }
    }
}

// The levels of a lane's sixteen columns of a row, see codebook.cuh.
template <int width>
__device__ void unpack_levels(const FourWords& row, const uint8_t* codebook, float (&levels)[16]) {
    constexpr int kWhole = coarse_planes(width);
#pragma unroll
    for (int four = 0; four < 4; ++four) {
        const uint32_t index = row.indices >> (8 * four) & (kIndices - 1);
        const auto* planes = reinterpret_cast<const uint32_t*>(codebook) + index % kEntries;
        int whole[kPlaces] = {}, sixteenths[kPlaces] = {};
        // Adds bytes where a bit of their places' fields in twos is set; it is the base level that all places have.
        const auto add = [&](int (&sums)[kPlaces], int plane, int further) {
            const uint32_t bytes = __ldg(planes + plane * kEntries);
#pragma unroll
            for (int place = 0; place < kPlaces; ++place) {
                const int bit = 8 * four + place % 2 * 4 + place / 2 * 2 + 1 - further % 2;
                const uint32_t word = further < 0 ? 0 : row.further[further / 2] >> bit;
                const int byte = static_cast<int>(bytes >> (8 * place) & 0xff);
                sums[place] += further < 0 ? byte - static_cast<int>(kZeroLevel) : (word & 1) != 0 ? byte : 0;
            }
        };
#pragma unroll
        for (int bit = -1; bit < kWhole - 1; ++bit) {
            add(whole, bit + 1, bit);
        }
        if constexpr (width > kWidestWhole) {
#pragma unroll
            for (int bit = -1; bit < width - kBaseBits; ++bit) {
                add(sixteenths, kWhole + bit + 1, bit);
            }
        }
#pragma unroll
        for (int place = 0; place < kPlaces; ++place) {
            const float level = static_cast<float>(whole[place]) + kFineUnit * static_cast<float>(sixteenths[place]);
            levels[four + 4 * place] = changes_sign(static_cast<int>(index), place) ? -level : level;
        }
    }
}

// The same where levels come from a codebook.
template <class Element, int width, int groups>
__device__ void dequantize_fours(const uint8_t* planes, const uint8_t* codebook, const uint8_t* decoders,
                                 typename Element::Type* output, const Shape& shape, int tile, int first_row, int rows,
                                 int lane) {
    constexpr int kGroupBytes = group_bytes(DecoderForm::kCodebook);
    const size_t columns = static_cast<size_t>(shape.steps()) * kStepTiles * kTileColumns;
    const int group = groups == 1   ? (tile / kStepTiles) >> shape.group_shift
                      : groups == 2 ? tile
                                    : min(2 * tile + lane % 4 / 2, shape.groups - 1);
    const uint8_t* scales = decoders + step_bytes(DecoderForm::kCodebook) + static_cast<size_t>(group) * kGroupBytes +
                            lane / 4 * (kGroupBytes / 8);
#pragma unroll 1  // there are no registers for more
    for (int row_tile = 0; row_tile < kRowTiles; ++row_tile) {
        TileWords words = {};  // the first row tile's are this one's
        const auto load = [&](int plane, int word) {
            return __ldg(reinterpret_cast<const uint32_t*>(planes + plane * kPlaneBytes + lane * 16) + word);
        };
        words.base[0][0] = load(row_tile / 2, row_tile % 2 * 2);
        words.base[0][1] = load(row_tile / 2, row_tile % 2 * 2 + 1);
#pragma unroll
        for (int plane = kBaseBits; plane < width; ++plane) {
            words.planes[plane][0] = load(plane, row_tile);
        }
        FourWords fours[2];
        rows_of<width>(words, 0, fours);
        const float2 multiples = {static_cast<float>(scales[2 * row_tile]),
                                  static_cast<float>(scales[2 * row_tile + 1])};
        const float2 scale = multiply(multiples, scale_steps(decoders, lane / 4, row_tile));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = row_tile * 16 + half * 8 + lane / 4;
            float levels[16];
            unpack_levels<width>(fours[half], codebook, levels);
            uint4 packed[2];
            auto* values = reinterpret_cast<typename Element::Type*>(packed);
#pragma unroll
            for (int column = 0; column < 16; ++column) {
                values[column] = Element::from_float((half == 0 ? scale.x : scale.y) * levels[column]);
            }
            if (row < rows) {
                const size_t column = static_cast<size_t>(tile) * kTileColumns + lane % 4 * 16;
                auto* target = reinterpret_cast<uint4*>(output + (first_row + row) * columns + column);
                target[0] = packed[0];
                target[1] = packed[1];
            }
        }
    }
}

// Each warp of a block takes a tile of the row blockIdx.x. Columns past the last tile become zeros; those of the last
// tile that the layer has not meet activations that are zero.
template <class Element, DecoderKind kind, int groups>
__device__ void dequantize(const uint8_t* planes, const uint8_t* decoders, const int32_t* active_width,
                           typename Element::Type* output, const Shape& shape) {
    const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
    const int tile = blockIdx.y * kWarps + warp;
    const Partition partition(shape, blockIdx.x);
    const int rows = min(kTileRows, partition.end_of_rows - partition.first_row);
    const int steps = shape.steps();
    if (tile >= steps * kStepTiles) {
        return;
    }
    const int width = active_width[partition.index];
    const uint32_t first_decoders = shape.decoders_of(width);
    if (tile >= shape.tile_columns || first_decoders == kNone) {
        // A width without decoders gives nothing that could be mistaken for weights.
        const float value = first_decoders == kNone ? __int_as_float(0x7fffffff) : 0.0f;
        for (int row = 0; row < rows; ++row) {
            auto* values = output + static_cast<size_t>(partition.first_row + row) * steps * kStepTiles * kTileColumns;
            values[tile * kTileColumns + lane] = Element::from_float(value);
            values[tile * kTileColumns + kLanes + lane] = Element::from_float(value);
        }
        return;
    }
    const size_t index = static_cast<size_t>(blockIdx.x) * shape.tile_columns + tile;
    planes += index * shape.resident_width * kPlaneBytes;
    decoders += first_decoders;
#define MATQUANT_WIDTH(bits)                                                                                    \
    case bits: {                                                                                                \
        constexpr DecoderForm kForm = form_of(kind, bits);                                                      \
        constexpr int kShared = shared_decoder_bytes(kind, bits);                                               \
        const uint8_t* row_decoders = decoders + static_cast<size_t>(shape.partitions) * kShared +              \
                                      static_cast<size_t>(blockIdx.x) * row_bytes<kForm>(shape);                \
        if constexpr (kind == DecoderKind::kCodebook) {                                                         \
            dequantize_fours<Element, bits, groups>(planes, decoders + partition.index * kShared, row_decoders, \
                                                    output, shape, tile, partition.first_row, rows, lane);      \
        } else {                                                                                                \
            dequantize_tile<Element, kForm, bits, groups>(planes, row_decoders, output, shape, tile,            \
                                                          partition.first_row, rows, lane);                     \
        }                                                                                                       \
        break;                                                                                                  \
    }
    switch (width) {
        MATQUANT_WIDTH(2)
        MATQUANT_WIDTH(3)
        MATQUANT_WIDTH(4)
        MATQUANT_WIDTH(5)
        MATQUANT_WIDTH(6)
        MATQUANT_WIDTH(7)
        MATQUANT_WIDTH(8)
    }
#undef MATQUANT_WIDTH
}

}  // namespace matquant::cuda

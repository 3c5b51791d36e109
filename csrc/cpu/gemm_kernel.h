// The product of packed activations and tiles of weights, for one instruction set.
//
// Weights are decoded to float32, a block of columns at a time, into a buffer that stays in the first cache; then every
// block of rows of the activations runs over that buffer with its sums in registers. Each sum adds its columns in
// order, whatever the number of rows, tiles and threads, so a result's bytes depend on none of them.
//
// `Lanes` is the policy of an instruction set:
//   Floats                      the 16 rows of a tile in float32
//   kTiles, kRows               size of the block whose sums fill the registers
//   zero, load, store, broadcast, load_half, multiply_add(a, b, c) = a * b + c
//   decode<width>(masks, plane_stride, scale, offset, Floats[4])
//                               the four columns of a tile from one 64-bit mask for each plane
//
// Everything is in an anonymous namespace: the linker merges functions of the same name, and would then give the
// baseline code with instructions that the machine may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/gemm.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

template <class Lanes, int width>
void decode_steps(const int64_t* masks, int64_t plane_stride, int64_t steps, const uint16_t* decoder, float* weights,
                  int64_t column_stride) {
    const typename Lanes::Floats scale = Lanes::load_half(decoder);
    const typename Lanes::Floats offset = Lanes::load_half(decoder + kTileRows);
    for (int64_t step = 0; step < steps; ++step) {
        typename Lanes::Floats columns[kTileColumns];
        Lanes::template decode<width>(masks + step, plane_stride, scale, offset, columns);
        for (int column = 0; column < kTileColumns; ++column) {
            Lanes::store(weights + (step * kTileColumns + column) * column_stride, columns[column]);
        }
    }
}

template <class Lanes, int... widths>
constexpr auto decoders_by_width(std::integer_sequence<int, widths...>) {
    return std::array{&decode_steps<Lanes, kMinWidth + widths>...};
}

// Decodes the columns [begin, end) of a tile, where `begin` starts a step of four columns.
template <class Lanes>
void decode_tile(const Product& product, const Tile& tile, int64_t begin, int64_t end, float* weights,
                 int64_t column_stride) {
    static constexpr auto kDecode =
        decoders_by_width<Lanes>(std::make_integer_sequence<int, kMaxWidth - kMinWidth + 1>());
    for (int64_t column = begin; column < end;) {
        const int64_t group = column / product.group_size;
        const int64_t steps = ceil_div(segment_end(product, column) - column, kTileColumns);
        kDecode[tile.width - kMinWidth](tile.planes + column / kTileColumns, product.plane_stride, steps,
                                        tile.decoders + group * 2 * kTileRows,
                                        weights + (column - begin) * column_stride, column_stride);
        column += steps * kTileColumns;
    }
}

template <class Lanes, int rows, int tiles>
void multiply_block(const float* activations, const float* weights, int64_t columns, float* sums) {
    using Floats = typename Lanes::Floats;
    Floats sum[rows][tiles];
    for (int row = 0; row < rows; ++row) {
        for (int tile = 0; tile < tiles; ++tile) {
            sum[row][tile] = Lanes::load(sums + (row * tiles + tile) * kTileRows);
        }
    }
    for (int64_t column = 0; column < columns; ++column) {
        Floats weight[tiles];
        for (int tile = 0; tile < tiles; ++tile) {
            weight[tile] = Lanes::load(weights + (column * tiles + tile) * kTileRows);
        }
        for (int row = 0; row < rows; ++row) {
            const Floats activation = Lanes::broadcast(activations[row * kBlockColumns + column]);
            for (int tile = 0; tile < tiles; ++tile) {
                sum[row][tile] = Lanes::multiply_add(activation, weight[tile], sum[row][tile]);
            }
        }
    }
    for (int row = 0; row < rows; ++row) {
        for (int tile = 0; tile < tiles; ++tile) {
            Lanes::store(sums + (row * tiles + tile) * kTileRows, sum[row][tile]);
        }
    }
}

// All rows, in blocks of `block` rows, the rest in blocks of half the size and so on.
template <class Lanes, int block, int tiles>
void multiply_rows(const float* activations, int64_t rows, const float* weights, int64_t columns, float* sums) {
    for (; rows >= block; rows -= block) {
        multiply_block<Lanes, block, tiles>(activations, weights, columns, sums);
        activations += block * kBlockColumns;
        sums += block * tiles * kTileRows;
    }
    if constexpr (block > 1) {
        multiply_rows<Lanes, block / 2, tiles>(activations, rows, weights, columns, sums);
    }
}

template <class Lanes, int tiles>
void multiply_tiles(const Product& product, const Tile* tile, float* sums) {
    alignas(64) float weights[kBlockColumns * tiles * kTileRows];
    std::fill_n(sums, product.rows * tiles * kTileRows, 0.0f);
    const float* activations = product.activations;
    for (int64_t begin = 0; begin < product.columns; begin += kBlockColumns) {
        const int64_t end = std::min(begin + kBlockColumns, product.columns);
        for (int index = 0; index < tiles; ++index) {
            decode_tile<Lanes>(product, tile[index], begin, end, weights + index * kTileRows, tiles * kTileRows);
        }
        const int64_t columns = ceil_div(end - begin, kTileColumns) * kTileColumns;
        multiply_rows<Lanes, Lanes::kRows, tiles>(activations, product.rows, weights, columns, sums);
        activations += product.rows * kBlockColumns;
    }
}

template <class Lanes, int tiles = Lanes::kTiles>
void multiply(const Product& product, const Tile* tile, int count, float* sums) {
    if constexpr (tiles > 1) {
        if (count < tiles) {
            return multiply<Lanes, tiles - 1>(product, tile, count, sums);
        }
    }
    multiply_tiles<Lanes, tiles>(product, tile, sums);
}

}  // namespace
}  // namespace matquant::cpu

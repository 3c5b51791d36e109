// The layout of codes and decoders in a GPU's memory, and who reads what.
//
// A tile is 64 rows (outputs) by 64 columns (inputs), the work of one warp. Its rows are four row tiles of 16, the A
// operand of mma.m16n8k16. Lane 4 g + t holds, of each row tile, rows g and g + 8, and of a tile's columns the sixteen
// 8 t .. 8 t + 7 and 32 + 8 t .. 32 + 8 t + 7: since weights and activations agree in it, the order of columns within a
// tile is free, and this one lets each lane read its activations 16 bytes at a time and ends a group of 32 columns
// between two products.
//
// Memory: uint8 [tile rows, tile columns, resident width, 512], the first two of a tile's planes being its base field.
// So all that a lane reads of a tile lies at fixed distances, planes past the active width are left out, and what is
// read lies together. A lane finds its 32-bit words, one for each plane and row tile and two for its base field, in
// runs of 16 bytes: nothing is shuffled. dequantize.cuh says where bits lie within words.
//
// Decoders, for each width, row of tiles and group [8 (g), 2 (scale, offset or centre), 8 (row tile, row g or g + 8)]:
// of a group a lane reads one run of bytes. Of affine-float16 the values are float16; of affine-int8 they are bytes,
// centres + 128, and a row of tiles begins with its rows' steps, bfloat16 [8 (g), 8 (row tile, row g or g + 8), 2 (of
// scale, of centre)]. With codebooks there are scales alone, and the codebook of each partition before all rows of
// tiles; lanes have other columns then (codebook.cuh).
#pragma once

#ifdef __CUDACC_RTC__
using uint8_t = unsigned char;
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using uint64_t = unsigned long long;
#else
#include <cstdint>
#endif

namespace matquant::cuda {

constexpr int kTileRows = 64;
constexpr int kTileColumns = 64;
constexpr int kRowTiles = 4;                               // of 16 rows
constexpr int kPlaneBytes = kTileRows * kTileColumns / 8;  // of a tile
constexpr int kTokens = 8;                                 // of a product, its columns
constexpr int kLanes = 32;

}  // namespace matquant::cuda

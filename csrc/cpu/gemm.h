// The product on the CPU, as its parts see it: linear.cpp checks, packs the activations and writes the output; a kernel
// per instruction set, chosen at run time, multiplies.
//
// This header is compiled with the flags of several instruction sets: whatever it defines is in an anonymous namespace,
// for the linker merges functions of the same name, and would give the baseline code instructions that the machine may
// lack.
#pragma once

#include <cstdint>

namespace matquant::cpu {

// Columns of weights that are decoded at once: 32 rows of them in float32 fill a third of an L1 cache of 48 KiB.
constexpr int64_t kBlockColumns = 128;

// Columns that a register of the tile unit holds in bfloat16.
constexpr int64_t kRegisterColumns = 32;

// One tile-row of the weights: 16 rows, all columns.
struct Tile {
    const int64_t* planes;     // masks of the most significant plane, one for each 4 columns
    const uint16_t* decoders;  // float16 [groups, 2 (scale, offset), 16 rows], for the active width
    int width;                 // active width: planes that are read
};

// Activations as a kernel reads them, in blocks of columns: [ceil(columns / kBlockColumns), rows, kBlockColumns].
struct Product {
    int64_t plane_stride;  // masks from a plane to the next
    int64_t columns;
    int64_t group_size;
    int64_t rows;
    const float* activations;  // zeros from `columns` to the next multiple of 4
    // For kernels that take bfloat16. Rows past 16 are padded to a multiple of 16; zeros follow `columns`.
    const uint16_t* bfloat16_activations;
    const float* activation_sums;  // [segments, rows]
};

namespace {

// Segments are what is left of the groups when they are cut into blocks: [begin, segment_end) has one decoder.
inline int64_t segment_end(const Product& product, int64_t begin) {
    const int64_t group_end = (begin / product.group_size + 1) * product.group_size;
    const int64_t block_end = (begin / kBlockColumns + 1) * kBlockColumns;
    const int64_t end = group_end < block_end ? group_end : block_end;
    return end < product.columns ? end : product.columns;
}

}  // namespace

// Sets sums [rows, count * 16] to the product of the activations and `count` tiles.
using Multiply = void (*)(const Product& product, const Tile* tiles, int count, float* sums);

struct Kernel {
    int tiles;  // the most that `multiply` takes at once
    Multiply multiply;
};

constexpr int kMaxTiles = 2;  // over all kernels

extern const Kernel kScalarKernel;
#ifdef __x86_64__
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAmxKernel;  // bfloat16
#endif

}  // namespace matquant::cpu

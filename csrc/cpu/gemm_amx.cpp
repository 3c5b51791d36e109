// The kernel for AMX-BF16: activations stay in bfloat16, and a code, an integer below 256, is exact in it. So the tile
// unit sums exact products of activations and codes in float32, and each group's sum takes its scale afterwards:
//
//     sum_k x_k (scale c_k + offset) = scale (sum_k x_k c_k) + offset (sum_k x_k)
//
// A tile register holds 16 rows of 32 activations, or 16 weight rows of 32 codes as rows of pairs of columns, which is
// how a tile of the layout falls out of its register: two rows of pairs.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/codes_avx512.h"
#include "cpu/gemm.h"
#include "layout.h"

namespace matquant::cpu {
namespace {

constexpr int64_t kRegisterRows = 16;
constexpr int64_t kRegisterBytes = 64;                         // of a row
constexpr int64_t kRegisterPairs = kRegisterRows * kTileRows;  // 32-bit pairs of codes
constexpr int64_t kBlockRegisters = kBlockColumns / kRegisterColumns;

// What LDTILECFG reads. Registers 0 and 1 hold sums, 2 and 3 activations, 4 weights.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64};
    uint8_t rows[16] = {};

    explicit TileConfig(int64_t activation_rows) {
        std::fill_n(rows, 4, static_cast<uint8_t>(activation_rows));
        rows[4] = kRegisterRows;
    }
};
static_assert(sizeof(TileConfig) == 64);

// GCC's tile intrinsics do not say what memory they read: this makes sure that it was written.
void finish_writes(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// Configures this thread's tile registers and gives them back as they were: oneDNN keeps configurations too.
class TileScope {
  public:
    explicit TileScope(const TileConfig& config) {
        finish_writes(&config);
        _tile_storeconfig(saved_);
        _tile_loadconfig(&config);
    }
    ~TileScope() { _tile_loadconfig(saved_); }
    TileScope(const TileScope&) = delete;
    TileScope& operator=(const TileScope&) = delete;

  private:
    alignas(64) uint8_t saved_[64];
};

// Two columns of codes as pairs of bfloat16: the upper halves of their float32, exact for 8 bits.
__m512i to_pairs(__m512 first, __m512 second) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(first), 16);
    return _mm512_mask_blend_epi16(0xaaaaaaaa, low, _mm512_castps_si512(second));
}

template <int width>
void decode_steps(const int64_t* masks, int64_t plane_stride, int64_t steps, uint32_t* pairs) {
    for (int64_t step = 0; step < steps; ++step) {
        const __m512i codes = load_codes<width>(masks + step, plane_stride);
        uint32_t* target = pairs + step * kTileColumns / 2 * kTileRows;
        _mm512_store_si512(target, to_pairs(column_codes<0>(codes), column_codes<1>(codes)));
        _mm512_store_si512(target + kTileRows, to_pairs(column_codes<2>(codes), column_codes<3>(codes)));
    }
}

template <int... widths>
constexpr auto decoders_by_width(std::integer_sequence<int, widths...>) {
    return std::array{&decode_steps<kMinWidth + widths>...};
}

struct Segment {
    const uint16_t* activations;   // [rows, kBlockColumns]
    const float* activation_sums;  // [rows]
    const uint32_t* pairs;         // codes
    int64_t registers;             // filled with codes
    __m512 scale;
    __m512 offset;
};

// Adds the product of one segment and one register, or two, of rows to their sums. Two hide each other's latency.
template <int count>
void multiply_rows(const Segment& segment, int64_t row, int64_t rows, float* sums) {
    constexpr int64_t kStride = kBlockColumns * sizeof(uint16_t);
    const uint16_t* activations = segment.activations + row * kBlockColumns;
    _tile_zero(0);
    if constexpr (count == 2) {
        _tile_zero(1);
    }
    for (int64_t index = 0; index < segment.registers; ++index) {
        _tile_loadd(4, segment.pairs + index * kRegisterPairs, kRegisterBytes);
        _tile_loadd(2, activations + index * kRegisterColumns, kStride);
        _tile_dpbf16ps(0, 2, 4);
        if constexpr (count == 2) {
            _tile_loadd(3, activations + rows * kBlockColumns + index * kRegisterColumns, kStride);
            _tile_dpbf16ps(1, 3, 4);
        }
    }
    alignas(64) float code_sums[count * kRegisterRows * kTileRows];
    _tile_stored(0, code_sums, kRegisterBytes);
    if constexpr (count == 2) {
        _tile_stored(1, code_sums + rows * kTileRows, kRegisterBytes);
    }
    for (int64_t lane = 0; lane < count * rows; ++lane) {
        float* target = sums + (row + lane) * kTileRows;
        __m512 sum = _mm512_loadu_ps(target);
        sum = _mm512_fmadd_ps(segment.scale, _mm512_load_ps(code_sums + lane * kTileRows), sum);
        sum = _mm512_fmadd_ps(segment.offset, _mm512_set1_ps(segment.activation_sums[row + lane]), sum);
        _mm512_storeu_ps(target, sum);
    }
}

__m512 load_half(const uint16_t* source) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

void multiply(const Product& product, const Tile* tile, int, float* sums) {
    static constexpr auto kDecode = decoders_by_width(std::make_integer_sequence<int, kMaxWidth - kMinWidth + 1>());
    const int64_t rows = std::min(product.rows, kRegisterRows);  // of one register; divides the product's
    const TileConfig config(rows);
    const TileScope scope(config);
    // Past the last column activations are zero; what stands there in the weights need only be finite.
    alignas(64) uint32_t pairs[kBlockRegisters * kRegisterPairs] = {};
    std::fill_n(sums, product.rows * kTileRows, 0.0f);
    const float* activation_sums = product.activation_sums;
    for (int64_t begin = 0; begin < product.columns;) {
        const int64_t end = segment_end(product, begin);
        kDecode[tile->width - kMinWidth](tile->planes + begin / kTileColumns, product.plane_stride,
                                         ceil_div(end - begin, kTileColumns), pairs);
        finish_writes(pairs);
        const int64_t in_block = begin % kBlockColumns;
        const uint16_t* decoder = tile->decoders + begin / product.group_size * 2 * kTileRows;
        const Segment segment = {product.bfloat16_activations + (begin - in_block) * product.rows + in_block,
                                 activation_sums,
                                 pairs,
                                 ceil_div(end - begin, kRegisterColumns),
                                 load_half(decoder),
                                 load_half(decoder + kTileRows)};
        int64_t row = 0;
        for (; row + 2 * rows <= product.rows; row += 2 * rows) {
            multiply_rows<2>(segment, row, rows, sums);
        }
        if (row < product.rows) {
            multiply_rows<1>(segment, row, rows, sums);
        }
        activation_sums += product.rows;
        begin = end;
    }
}

}  // namespace

const Kernel kAmxKernel = {1, multiply};

}  // namespace matquant::cpu

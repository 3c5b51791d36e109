// From the planes of a row of tiles to its codes.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <array>
#include <cstdint>
#include <utility>

#include "cpu/entries.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/steps.h"

namespace matquant::cpu {
namespace {

// The planes of a tile up to a width: of so many pairs, then single ones.
template <int width, int pairs>
struct TilePlanes {
    const TileRow& row;
    int64_t plane_stride;
    const uint8_t* codebook = nullptr;  // what levels are looked up in, [planes, places, entries]

    template <int plane>
    MATQUANT_INLINE const uint8_t* address(int64_t tile) const {
        if constexpr (plane < 2 * pairs) {
            return row.pairs + plane / 2 * 2 * plane_stride + (2 * tile + plane % 2) * kPlaneBytes;
        }
        return row.planes + plane * plane_stride + tile * kPlaneBytes;
    }

    // Asks for what is so many bytes ahead of a tile, over all planes. The tiles of the next row follow, so this runs
    // on into it.
    template <int64_t bytes>
    MATQUANT_INLINE void prefetch(int64_t tile) const {
        repeat<width>([&](auto plane) MATQUANT_INLINE {
            __builtin_prefetch(address<plane>(tile + bytes / (width * kPlaneBytes)));
        });
    }
};

// The bytes of one tile up to a width, and the codes that they hold.
template <class Lanes, int width, int pairs>
struct PackedTile {
    using Codes = typename Lanes::Codes;
    Codes planes[width];

    MATQUANT_INLINE PackedTile(const TilePlanes<width, pairs>& source, int64_t tile) {
        repeat<width>([&](auto plane)
                          MATQUANT_INLINE { planes[plane] = Lanes::load_bytes(source.template address<plane>(tile)); });
    }

    // Each field and each bit is shifted to where it stands in the code, and what came along is masked off.
    template <int step>
    MATQUANT_INLINE Codes codes() const {
        constexpr int kField = step % 4 * 2;  // where the step's fields begin, in the half of each pair that has them
        constexpr int kBasePlace = width - 2;
        Codes codes =
            Lanes::select(Lanes::template shift_right<kField - kBasePlace>(planes[step / 4]), 3 << kBasePlace);
        repeat<pairs - 1>([&](auto pair) MATQUANT_INLINE {
            constexpr int kPlace = kBasePlace - 2 * (pair + 1);
            codes = Lanes::merge(codes, Lanes::template shift_right<kField - kPlace>(planes[2 * (pair + 1) + step / 4]),
                                 3 << kPlace);
        });
        repeat<width - 2 * pairs>([&](auto single) MATQUANT_INLINE {
            constexpr int kPlane = 2 * pairs + single, kPlace = width - 1 - kPlane;
            codes = Lanes::merge(codes, Lanes::template shift_right<step - kPlace>(planes[kPlane]), 1 << kPlace);
        });
        return codes;
    }
};

// The bytes of one tile, and the levels that a codebook gives its codes.
template <class Lanes, int width, int pairs>
struct LevelTile {
    using Codes = typename Lanes::Codes;
    using Look = Entries<Lanes>;
    PackedTile<Lanes, width, pairs> packed;
    const uint8_t* codebook;

    MATQUANT_INLINE LevelTile(const TilePlanes<width, pairs>& source, int64_t tile)
        : packed(source, tile), codebook(source.codebook) {}

    // The sums are modulo 256: 256 less a level's byte is that of the other sign.
    template <int step>
    MATQUANT_INLINE Codes codes() const {
        constexpr int kHalf = step / 4, kPlace = step % 4;
        const Codes& index = packed.planes[kHalf];
        const auto entries = [&](auto plane) MATQUANT_INLINE {
            return Look::look_up(codebook + (plane * kPlaces + kPlace) * kEntries, index);
        };
        Codes levels = entries(std::integral_constant<int, 0>());
        const auto add_where = [&](const Codes& bytes, auto bit, auto plane) MATQUANT_INLINE {
            levels = Look::add_bytes(levels, Look::keep_where(entries(plane), bytes, 1 << bit));
        };
        repeat<2 * (pairs - 1)>([&](auto bit) MATQUANT_INLINE {
            add_where(packed.planes[2 * (bit / 2 + 1) + kHalf], std::integral_constant<int, 2 * kPlace + 1 - bit % 2>(),
                      std::integral_constant<int, 1 + bit>());
        });
        repeat<width - 2 * pairs>([&](auto single) MATQUANT_INLINE {
            add_where(packed.planes[2 * pairs + single], std::integral_constant<int, step>(),
                      std::integral_constant<int, 2 * pairs - 1 + single>());
        });
        return Look::negate_where(levels, index, kPlace < kPlaces / 2 ? kFirstHalfSign : kLastHalfSign);
    }
};

// What is multiplied with activations: codes, or levels from a codebook.
template <class Lanes, bool codebook, int width, int pairs>
using Tile = std::conditional_t<codebook, LevelTile<Lanes, width, pairs>, PackedTile<Lanes, width, pairs>>;

// Unpacks tiles to codes, or levels from a codebook, [steps, rows, 64], those of one row.
template <class Lanes, bool has_codebook, int width, int pairs, int rows, int64_t prefetch_bytes>
void unpack_tiles(const TileRow& row, const uint8_t* codebook, int64_t first_tile, int64_t count, int64_t plane_stride,
                  uint8_t* codes) {
    const TilePlanes<width, pairs> planes{row, plane_stride, codebook};
    for (int64_t tile = first_tile; tile < first_tile + count; ++tile) {
        planes.template prefetch<prefetch_bytes>(tile);
        const Tile<Lanes, has_codebook, width, pairs> packed(planes, tile);
        repeat<kTileSteps>([&](auto step) MATQUANT_INLINE {
            Lanes::store_bytes(codes + step * rows * kPlaneBytes, packed.template codes<step>());
        });
        codes += kTileSteps * rows * kPlaneBytes;
    }
}

// Functions that are made for each width and for planes in pairs or not stand in tables in this order.
constexpr int kVariants = 2 * (kMaxWidth - kMinWidth + 1);
constexpr int variant_of(int width, bool paired) { return 2 * (width - kMinWidth) + (paired ? 1 : 0); }
constexpr int width_of(int variant) { return kMinWidth + variant / 2; }
constexpr int pairs_of(int variant) { return variant % 2 != 0 ? width_of(variant) / 2 : 1; }

template <class Lanes, bool codebook, int rows, int64_t prefetch_bytes, int... variants>
constexpr auto unpackers_by_variant(std::integer_sequence<int, variants...>) {
    return std::array{&unpack_tiles<Lanes, codebook, width_of(variants), pairs_of(variants), rows, prefetch_bytes>...};
}

// What is multiplied at a width, one after the other: of a codebook's wide slices the coarse levels, which follow from
// the first bits, and what makes them fine.
template <bool codebook>
constexpr int parts_of(int width) {
    return codebook && width > kWidestWhole ? 2 : 1;
}

}  // namespace
}  // namespace matquant::cpu

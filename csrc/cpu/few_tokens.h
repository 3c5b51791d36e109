// The product while there are few tokens, when it waits for memory: a tile is unpacked into registers and multiplied
// with every token at once, so that each byte of weights is touched once.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/results.h"
#include "cpu/steps.h"
#include "cpu/unpack.h"

namespace matquant::cpu {
namespace {

// How far ahead weights are asked for: enough to cover the latency of memory where nothing else takes time.
constexpr int64_t kFewPrefetchBytes = 8192;

// The sums of a span, which is some whole tiles: of tokens, then of some tokens' second bytes.
template <class Lanes, int bits, bool codebook, int width, int pairs, int tokens, int seconds>
MATQUANT_INLINE inline void sum_tiles(const TilePlanes<width, pairs>& planes, int64_t first_tile, int64_t last_tile,
                                      const uint8_t* activations, const uint8_t* second_bytes,
                                      typename Lanes::Sums* result) {
    using Sums = typename Lanes::Sums;
    constexpr int kTokenSums = Lanes::template kSums<bits>;
    constexpr int kSums = tokens * kTokenSums + seconds;
    constexpr int64_t kBytes = Lanes::template kChunkBytes<bits>;
    constexpr int kStepBytes = Lanes::template kStepBytes<bits>;
    constexpr int kChains = std::clamp<int>(Lanes::kChains / kSums, 1, kTileSteps);
    Sums sums[kChains * kSums];
    repeat<kChains * kSums>([&](auto sum) MATQUANT_INLINE { sums[sum] = Lanes::zero_sums(); });
    // To the second half of a chunk, and from there to the next chunk.
    static_assert(kChunkColumns == 2 * kTileColumns);
    int64_t advance = kTileSteps * kStepBytes;
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        planes.template prefetch<kFewPrefetchBytes>(tile);
        const Tile<Lanes, codebook, width, pairs> packed(planes, tile);
        repeat<kTileSteps>([&](auto step) MATQUANT_INLINE {
            const typename Lanes::Operand operand = Lanes::prepare(packed.template codes<step>());
            Sums* chain = &sums[step % kChains * kSums];
            repeat<tokens>([&](auto token) MATQUANT_INLINE {
                Lanes::template dot<bits>(chain + token * kTokenSums, operand,
                                          activations + token * kBytes + step * kStepBytes);
            });
            repeat<seconds>([&](auto second) MATQUANT_INLINE {
                Lanes::template dot<bits>(chain + tokens * kTokenSums + second, operand,
                                          second_bytes + second * kBytes + step * kStepBytes);
            });
        });
        activations += advance;
        second_bytes += advance;
        advance = tokens * kBytes - advance;
    }
    repeat<(kChains - 1) * kSums>([&](auto sum) MATQUANT_INLINE {
        constexpr int kTarget = sum % kSums;
        sums[kTarget] = Lanes::add(sums[kTarget], sums[sum + kSums]);
    });
    repeat<kSums>([&](auto sum) MATQUANT_INLINE { result[sum] = sums[sum]; });
}

// Calls body with a constant that is at least count: 0, 2 or most. For each the kernel is compiled anew.
template <int most, class Body>
MATQUANT_INLINE inline void with_at_least(int64_t count, Body body) {
    if (count == 0) {
        return body(std::integral_constant<int, 0>());
    }
    if (count <= 2) {
        return body(std::integral_constant<int, std::min(2, most)>());
    }
    body(std::integral_constant<int, most>());
}

// All of a row of tiles with all tokens; spans are whole tiles.
template <class Lanes, int bits, bool codebook, int width, int pairs, int tokens>
void multiply_few(const Product& product, const TileRow& row) {
    using Sums = typename Lanes::Sums;
    constexpr int kSums = Lanes::template kSums<bits>;
    constexpr int64_t kBytes = tokens * Lanes::template kChunkBytes<bits>;
    const TilePlanes<width, pairs> planes{row, product.plane_stride, row.codebook};
    const RowDecoders<Lanes> decoders(product, row);
    typename Lanes::Floats results[tokens];
    repeat<tokens>([&](auto token) MATQUANT_INLINE { results[token] = Lanes::zero(); });
    for (Span span(product.columns, product.group_size); !span.past_last(); span.advance()) {
        const Decoder<Lanes> decoder = decoders.of_group(span.group());
        const auto add_span = [&](auto seconds) MATQUANT_INLINE {
            Sums sums[tokens * kSums + seconds];
            sum_tiles<Lanes, bits, codebook, width, pairs, tokens, seconds>(
                planes, span.begin() / kTileColumns, ceil_div(span.end(), kTileColumns),
                product.activations + span.chunk() * kBytes, product.second_bytes + span.chunk() * kBytes, sums);
            Sums second_sums[seconds + 1];  // apart, since the factors say which is whose
            repeat<seconds>([&](auto second) MATQUANT_INLINE { second_sums[second] = sums[tokens * kSums + second]; });
            repeat<tokens>([&](auto token) MATQUANT_INLINE {
                const Factor& factor = product.factors[span.index() * tokens + token];
                if constexpr (seconds > 0) {
                    add_second<Lanes>(&sums[token], factor.second, second_sums);
                }
                results[token] =
                    decoder.add_span(Lanes::template total<Lanes, bits>(&sums[token * kSums]), factor, results[token]);
            });
        };
        if constexpr (kHasSecondBytes<Lanes, bits> && width <= kMostWidthOf8Bits) {
            with_at_least<tokens>(product.second_counts[span.index()], add_span);
        } else {
            add_span(std::integral_constant<int, 0>());
        }
    }
    const Writer<Lanes> writer(product, row);
    repeat<tokens>([&](auto token) MATQUANT_INLINE { writer.write(token, results[token]); });
}

// multiply_few for some variants, one after the other, and in these for each number of tokens.
template <class Lanes, int bits, bool codebook, int... indices>
constexpr auto few_by_variant_and_tokens(std::integer_sequence<int, indices...>) {
    constexpr int kTokens = Lanes::template kFewTokens<bits>;
    return std::array{&multiply_few<Lanes, bits, codebook, width_of(indices / kTokens), pairs_of(indices / kTokens),
                                    indices % kTokens + 1>...};
}

}  // namespace
}  // namespace matquant::cpu

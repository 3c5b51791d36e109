// The product with many tokens, when it waits for the processor: the columns of a panel are unpacked into the first
// cache for a few rows of tiles, and blocks of tokens run over each span of them.
//
// `Blocks` is the policy of what multiplies them:
//   Lanes
//   kPanelColumns                                          that are unpacked at once: their codes stay in the first
//                                                          cache, the activations of kBlockTokens in the second
//   kPrefetchBytes                                         how far ahead weights are asked for
//   multiply<bits, rows>(product, span, codes, results)   adds the product of a span, whose codes are given, and all
//                                                          tokens to their results [tokens, rows, 16]
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/results.h"
#include "cpu/steps.h"
#include "cpu/unpack.h"

namespace matquant::cpu {
namespace {

// Of the second cache, for activations or for results.
constexpr int64_t kCachedBytes = 1 << 19;

// Results that are kept from call to call. No std::vector: the linker merges functions of the same name.
class KeptResults {
  public:
    ~KeptResults() { std::free(data_); }

    // So many zeros.
    float* zeros(int64_t count) {
        if (count > capacity_) {
            std::free(data_);
            data_ = static_cast<float*>(std::malloc(count * sizeof(float)));
            capacity_ = data_ == nullptr ? 0 : count;
            if (data_ == nullptr) {
                throw std::bad_alloc();
            }
        }
        std::fill_n(data_, count, 0.0f);
        return data_;
    }

  private:
    float* data_ = nullptr;
    int64_t capacity_ = 0;
};

// The codes [steps, rows, 64] of a span, and the decoders of its rows.
template <class Lanes, int rows>
struct SpanCodes {
    const uint8_t* codes;
    int64_t steps;
    Decoder<Lanes> decoders[rows];
};

template <class Lanes, int... parts>
auto decoders_of(const Product& product, const TileRow* row, std::integer_sequence<int, parts...>) {
    return std::array{RowDecoders<Lanes>(product, row[parts])...};
}

// Adds the product of a panel, which begins with `span`, and all tokens to their results [tokens, rows, 16]. Returns
// the first span of the next panel.
template <class Blocks, int bits, bool codebook, int rows>
Span multiply_panel(const Product& product, const TileRow* row,
                    const std::array<RowDecoders<typename Blocks::Lanes>, rows>& decoders, Span span, float* results) {
    using Lanes = typename Blocks::Lanes;
    constexpr int64_t kColumns = Blocks::kPanelColumns;
    static_assert(kColumns % kSpanColumns == 0);
    static constexpr auto kUnpack = unpackers_by_variant<Lanes, codebook, rows, Blocks::kPrefetchBytes>(
        std::make_integer_sequence<int, kVariants>());
    // Past the last span a kernel may read a chunk's codes, whatever they are: they meet zeros.
    constexpr int64_t kBytes = (kColumns + kChunkColumns) / kStepColumns * rows * kPlaneBytes;
    alignas(64) uint8_t codes[codebook ? 2 : 1][kBytes];
    const int64_t first = span.begin(), last = std::min(first + kColumns, product.columns);
    int parts = 1;
    for (int each = 0; each < rows; ++each) {
        const int width = row[each].width;
        const uint8_t* const book = row[each].codebook;
        const auto unpack = [&](int part, int part_width, const uint8_t* part_book) {
            kUnpack[variant_of(part_width, product.paired)](row[each], part_book, first / kTileColumns,
                                                            ceil_div(last - first, kTileColumns), product.plane_stride,
                                                            codes[part] + each * kPlaneBytes);
        };
        if constexpr (codebook) {
            if (parts_of<codebook>(width) == 2) {
                unpack(0, coarse_bits(width), book);
                unpack(1, width, book + coarse_planes(width) * kEntryPlaneBytes);
                parts = 2;
                continue;
            }
        }
        unpack(0, width, book);
    }
    for (; span.begin() < last; span.advance()) {
        for (int part = 0; part < parts; ++part) {
            SpanCodes<Lanes, rows> span_codes;
            span_codes.codes = codes[part] + (span.begin() - first) / kStepColumns * rows * kPlaneBytes;
            span_codes.steps = ceil_div(span.end() - span.begin(), kStepColumns);
            for (int each = 0; each < rows; ++each) {
                Decoder<Lanes>& decoder = span_codes.decoders[each];
                decoder = decoders[each].of_group(span.group());
                if (part == 1) {
                    // A row without a second part beside one that has it: whatever its codes are, they count nothing.
                    const bool has_part = parts_of<codebook>(row[each].width) == 2;
                    decoder = has_part ? decoder.fine() : Decoder<Lanes>{Lanes::zero(), Lanes::zero()};
                }
            }
            Blocks::template multiply<bits, rows>(product, span, span_codes, results);
        }
    }
    return span;
}

// `count` times some rows of tiles, panel by panel: so each panel's activations are read from memory once for all these
// rows.
template <class Blocks, int bits, bool codebook, int rows>
void multiply_panels(const Product& product, const TileRow* row, int64_t count) {
    using Lanes = typename Blocks::Lanes;
    thread_local KeptResults kept;
    const int64_t size = product.tokens * rows * kTileRows;
    float* const results = kept.zeros(count * size);
    std::vector<std::array<RowDecoders<Lanes>, rows>> decoders;
    for (int64_t each = 0; each < count; ++each) {
        decoders.push_back(decoders_of<Lanes>(product, row + each * rows, std::make_integer_sequence<int, rows>()));
    }
    for (Span span(product.columns, product.group_size), next = span; !span.past_last(); span = next) {
        for (int64_t each = 0; each < count; ++each) {
            next = multiply_panel<Blocks, bits, codebook, rows>(product, row + each * rows, decoders[each], span,
                                                                results + each * size);
        }
    }
    for (int64_t each = 0; each < count * rows; ++each) {
        const Writer<Lanes> writer(product, row[each]);
        const float* result = results + each / rows * size + each % rows * kTileRows;
        for (int64_t token = 0; token < product.tokens; ++token) {
            writer.write(token, Lanes::load(result + token * rows * kTileRows));
        }
    }
}

// All rows of tiles, as many at once as the policy's lanes take.
template <class Blocks, int bits, bool codebook>
void multiply_many(const Product& product, const TileRow* row, int64_t count) {
    using Lanes = typename Blocks::Lanes;
    constexpr int kRows = Lanes::kRows;
    const int64_t chunks = ceil_div(product.columns, kChunkColumns);
    const bool cached = chunks * product.tokens * Lanes::template kChunkBytes<bits> <= 2 * kCachedBytes;
    const int64_t result_bytes = product.tokens * kRows * kTileRows * static_cast<int64_t>(sizeof(float));
    const int64_t most = cached ? 1 : std::max<int64_t>(kCachedBytes / result_bytes, 1);
    while (count >= kRows) {
        const int64_t together = std::min(count / kRows, most);
        multiply_panels<Blocks, bits, codebook, kRows>(product, row, together);
        row += together * kRows;
        count -= together * kRows;
    }
    if (count > 0) {
        multiply_panels<Blocks, bits, codebook, 1>(product, row, count);
    }
}

// Calls body(first, count) for blocks of at most `most` tokens, of nearly the same size.
template <class Body>
void for_each_block(int64_t tokens, int64_t most, Body body) {
    int64_t first = 0;
    for (int64_t blocks = ceil_div(tokens, most); blocks > 0; --blocks) {
        const int64_t count = ceil_div(tokens - first, blocks);
        body(first, count);
        first += count;
    }
}

// Blocks of tokens whose sums are in registers.
template <class AnyLanes>
struct RegisterBlocks {
    using Lanes = AnyLanes;
    using Sums = typename Lanes::Sums;
    static constexpr int64_t kPanelColumns = 256, kPrefetchBytes = 2048;

    template <int bits, int rows>
    static void multiply(const Product& product, const Span& span, const SpanCodes<Lanes, rows>& codes,
                         float* results) {
        if constexpr (kHasSecondBytes<Lanes, bits>) {
            if (const int64_t count = product.second_counts[span.index()]; count > 0) {
                constexpr int kMost = Lanes::template kManyTokens<bits>;
                static constexpr auto kBlocks = second_blocks<rows>(std::make_integer_sequence<int, kMost>());
                Sums seconds[kBlockTokens * rows];
                const uint8_t* bytes = product.second_bytes + span.chunk() * product.tokens * kBytes<bits>;
                for_each_block(count, kMost, [&](int64_t first, int64_t tokens) {
                    kBlocks[tokens - 1](codes, bytes + first * kBytes<bits>, product.tokens * kBytes<bits>,
                                        seconds + first * rows);
                });
                return multiply_tokens<bits, rows, true>(product, span, codes, seconds, results);
            }
        }
        multiply_tokens<bits, rows, false>(product, span, codes, nullptr, results);
    }

  private:
    template <int bits>
    static constexpr int64_t kBytes = Lanes::template kChunkBytes<bits>;

    template <int bits, int rows, bool has_seconds>
    static void multiply_tokens(const Product& product, const Span& span, const SpanCodes<Lanes, rows>& codes,
                                const Sums* seconds, float* results) {
        constexpr int kMost = Lanes::template kManyTokens<bits>;
        static constexpr auto kBlocks = blocks<bits, rows, has_seconds>(std::make_integer_sequence<int, kMost>());
        const int64_t stride = product.tokens * kBytes<bits>;
        const uint8_t* activations = product.activations + span.chunk() * stride;
        const Factor* factors = product.factors + span.index() * product.tokens;
        for_each_block(product.tokens, kMost, [&](int64_t first, int64_t tokens) {
            kBlocks[tokens - 1](codes, activations + first * kBytes<bits>, stride, factors + first, seconds,
                                results + first * rows * kTileRows);
        });
    }

    // The sums [tokens, rows] of a span and a block of tokens, whose chunks are `stride` bytes apart.
    template <int bits, int rows, int tokens>
    MATQUANT_INLINE static void sum_block(const SpanCodes<Lanes, rows>& span, const uint8_t* activations,
                                          int64_t stride, Sums* result) {
        constexpr int kSums = Lanes::template kSums<bits>;
        Sums sums[tokens * rows * kSums];
        repeat<tokens * rows * kSums>([&](auto sum) MATQUANT_INLINE { sums[sum] = Lanes::zero_sums(); });
        const uint8_t* codes = span.codes;
        for (int64_t first = 0; first < span.steps; first += kChunkSteps, activations += stride) {
            const uint8_t* const end = codes + std::min(span.steps - first, kChunkSteps) * rows * kPlaneBytes;
            for (const uint8_t* step = activations; codes < end; step += Lanes::template kStepBytes<bits>) {
                typename Lanes::Operand operands[rows];
                repeat<rows>([&](auto row) MATQUANT_INLINE {
                    operands[row] = Lanes::prepare(Lanes::load_bytes(codes + row * kPlaneBytes));
                });
                repeat<tokens>([&](auto token) MATQUANT_INLINE {
                    repeat<rows>([&](auto row) MATQUANT_INLINE {
                        Lanes::template dot<bits>(&sums[(token * rows + row) * kSums], operands[row],
                                                  step + token * kBytes<bits>);
                    });
                });
                codes += rows * kPlaneBytes;
            }
        }
        repeat<tokens * rows * kSums>([&](auto sum) MATQUANT_INLINE { result[sum] = sums[sum]; });
    }

    // Adds the product of a span and a block of tokens to their results [tokens, rows, 16].
    template <int bits, int rows, bool has_seconds, int tokens>
    static void multiply_block(const SpanCodes<Lanes, rows>& span, const uint8_t* activations, int64_t stride,
                               const Factor* factors, [[maybe_unused]] const Sums* seconds, float* results) {
        constexpr int kSums = Lanes::template kSums<bits>;
        Sums sums[tokens * rows * kSums];
        sum_block<bits, rows, tokens>(span, activations, stride, sums);
        repeat<tokens>([&](auto token) MATQUANT_INLINE {
            repeat<rows>([&](auto row) MATQUANT_INLINE {
                float* result = results + (token * rows + row) * kTileRows;
                Sums* sum = &sums[(token * rows + row) * kSums];
                if constexpr (has_seconds) {
                    add_second<Lanes>(sum, factors[token].second, seconds + row, rows);
                }
                const typename Lanes::Floats total = Lanes::template total<Lanes, bits>(sum);
                Lanes::store(result, span.decoders[row].add_span(total, factors[token], Lanes::load(result)));
            });
        });
    }

    template <int rows, int tokens>
    static void sum_second_block(const SpanCodes<Lanes, rows>& span, const uint8_t* bytes, int64_t stride, Sums* sums) {
        sum_block<8, rows, tokens>(span, bytes, stride, sums);
    }

    template <int bits, int rows, bool has_seconds, int... tokens>
    static constexpr auto blocks(std::integer_sequence<int, tokens...>) {
        return std::array{&multiply_block<bits, rows, has_seconds, tokens + 1>...};
    }
    template <int rows, int... tokens>
    static constexpr auto second_blocks(std::integer_sequence<int, tokens...>) {
        return std::array{&sum_second_block<rows, tokens + 1>...};
    }
};

}  // namespace
}  // namespace matquant::cpu

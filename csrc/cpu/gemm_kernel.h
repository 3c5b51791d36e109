// The product of packed activations and rows of tiles, for one instruction set.
//
// Two loops share their parts. While there are few tokens the product waits for memory: `multiply_few` unpacks a tile
// into registers and multiplies it with every token at once, so that each byte of weights is touched once. With more
// tokens it waits for the dot products: `multiply_many` unpacks a span of a few rows of tiles into the first cache
// and runs blocks of tokens over it with their sums in registers. Both add the same integers and the same floats in the
// same order.
//
// `Lanes` is the policy of an instruction set, derived from ByteSteps or WordSteps of steps.h:
//   Codes                       the 64 bytes of a tile's plane, or its codes in one step
//   load_bytes, store_bytes
//   shift_right<count>(bytes)   left if negative; bits may cross into neighbouring bytes
//   select(bytes, mask)         bytes & mask, with the same mask for each byte
//   merge(codes, bytes, mask)   codes | (bytes & mask)
//   Operand, prepare(codes)     codes as `dot` takes them
//   Sums, Floats                16 rows of int32 and float32
//   dot<bits>(sums, operand, step)   adds the products of one step to kSums<bits> sums
//   add, zero_sums, shift_left_8, to_floats, zero, load, store, broadcast, multiply, multiply_add(a, b, c) = a * b + c
//   load_half, store_half
//   load_unsigned, load_signed  16 bytes as Floats
//   kRows                       rows of tiles that multiply_many takes at once
//   kManyTokens<bits>           tokens that it takes at once, kRows * kSums * kManyTokens sums fill the registers
//   kFewTokens<bits>            the most tokens of multiply_few
//   kChains                     sums that must be under way to hide the latency of `dot`
//
// Everything is in an anonymous namespace: the linker merges functions of the same name, and would then give the
// baseline code with instructions that the machine may lack.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/activations.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/steps.h"

namespace matquant::cpu {
namespace {

// How far ahead weights are asked for: enough to cover the latency of memory where nothing else takes time, less where
// the first cache must also hold what is unpacked.
constexpr int64_t kFewPrefetchBytes = 8192;
constexpr int64_t kManyPrefetchBytes = 2048;

// The planes of a tile up to a width: of so many pairs, then single ones.
template <int width, int pairs>
struct TilePlanes {
    const TileRow& row;
    int64_t plane_stride;

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

// The decoders of 16 rows and one group.
template <class Lanes>
struct Decoder {
    typename Lanes::Floats scale, offset;

    // What a span adds to the result of a token: s (scale sum_k q_k c_k + offset sum_k q_k).
    typename Lanes::Floats add_span(typename Lanes::Floats total, const Factor& factor,
                                    typename Lanes::Floats result) const {
        total = Lanes::multiply(total, Lanes::broadcast(factor.scale));
        result = Lanes::multiply_add(scale, total, result);
        return Lanes::multiply_add(offset, Lanes::broadcast(factor.sum), result);
    }
};

// The decoders of a row of tiles, as decoder_bytes in layout.h says that they lie. The form is told apart for each
// group: a branch that always goes the same way costs less than kernels for each form would.
template <class Lanes>
class RowDecoders {
  public:
    RowDecoders(const Product& product, const TileRow& row)
        : form_(form_of(product.decoder_kind, row.width)), data_(row.decoders) {
        if (form_ == DecoderForm::kFloat16) {
            return;
        }
        uint16_t steps[2 * kTileRows];
        std::memcpy(steps, data_, sizeof(steps));
        for (int64_t lane = 0; lane < 2 * kTileRows; ++lane) {
            steps_[lane] = std::bit_cast<float>(static_cast<uint32_t>(steps[lane]) << kBFloat16Shift);
        }
        data_ += sizeof(steps);
        negative_middle_ = -0.5f * static_cast<float>((1 << row.width) - 1);
    }

    MATQUANT_INLINE Decoder<Lanes> of_group(int64_t group) const {
        if (form_ == DecoderForm::kFloat16) {
            constexpr int64_t kBytes = 4 * kTileRows;
            const uint8_t* decoder = data_ + group * kBytes;
            __builtin_prefetch(decoder + kPrefetchBytes);
            return {Lanes::load_half(reinterpret_cast<const uint16_t*>(decoder)),
                    Lanes::load_half(reinterpret_cast<const uint16_t*>(decoder) + kTileRows)};
        }
        constexpr int64_t kBytes = 2 * kTileRows;
        const uint8_t* decoder = data_ + group * kBytes;
        __builtin_prefetch(decoder + kPrefetchBytes);
        // Both products are exact: 8 bits by the 8 of a bfloat16.
        const typename Lanes::Floats scale = Lanes::multiply(Lanes::load_unsigned(decoder), Lanes::load(steps_));
        const typename Lanes::Floats centre =
            Lanes::multiply(Lanes::load_signed(decoder + kTileRows), Lanes::load(steps_ + kTileRows));
        return {scale, Lanes::multiply_add(Lanes::broadcast(negative_middle_), scale, centre)};
    }

  private:
    static constexpr int64_t kPrefetchBytes = 256;

    DecoderForm form_;
    const uint8_t* data_;
    float negative_middle_ = 0.0f;
    alignas(64) float steps_[2 * kTileRows];  // of the scales, of the centres
};

// Adds the bias to a token's 16 results, rounds them and writes those that there are.
template <class Lanes>
class Writer {
  public:
    Writer(const Product& product, const TileRow& row) : product_(product), row_(row) {
        if (product.bias == nullptr) {
            return;
        }
        Product as_input = product;
        as_input.input = product.bias;
        as_input.columns = 0;  // one row of it
        alignas(64) float values[kSpanColumns];
        load_span<Lanes>(as_input, 0, row.first, row.count, values);
        std::copy_n(values, kTileRows, bias_);
    }

    void write(int64_t token, typename Lanes::Floats result) const {
        const int64_t first = token * product_.output_stride + row_.first;
        alignas(64) float values[kTileRows];
        Lanes::store(values, result);
        for (int64_t lane = 0; lane < kTileRows; ++lane) {
            values[lane] += bias_[lane];
        }
        alignas(64) uint16_t halves[kTileRows];
        switch (product_.element) {
            case Element::kBFloat16:
                for (int64_t lane = 0; lane < kTileRows; ++lane) {
                    halves[lane] = to_bfloat16(values[lane]);
                }
                return copy(halves, static_cast<uint16_t*>(product_.output) + first);
            case Element::kHalf:
                Lanes::store_half(halves, Lanes::load(values));
                return copy(halves, static_cast<uint16_t*>(product_.output) + first);
            case Element::kFloat:
                return copy(values, static_cast<float*>(product_.output) + first);
        }
    }

  private:
    // To nearest, ties to even.
    static uint16_t to_bfloat16(float value) {
        const uint32_t bits = std::bit_cast<uint32_t>(value);
        const uint32_t rounded = (bits + 0x7fff + (bits >> kBFloat16Shift & 1)) >> kBFloat16Shift;
        return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
    }

    template <class T>
    void copy(const T* values, T* target) const {
        if (row_.count == kTileRows) {
            std::memcpy(target, values, kTileRows * sizeof(T));
        } else {
            std::copy_n(values, row_.count, target);
        }
    }

    const Product& product_;
    const TileRow& row_;
    alignas(64) float bias_[kTileRows] = {};
};

template <class Lanes, int bits>
constexpr int64_t kSpanBytes = Lanes::template kSpanBytes<bits>;  // of one token

// Whether spans may have second bytes.
template <class Lanes, int bits>
constexpr bool kHasSecondBytes = bits == 8 && Lanes::kSecondBytes;

// Adds a token's second bytes to its sum of a span, if it has any. `seconds` are the sums of all those of the span.
template <class Lanes>
MATQUANT_INLINE inline void add_second(typename Lanes::Sums* sum, const Factor& factor,
                                       const typename Lanes::Sums* seconds, int64_t stride = 1) {
    if (factor.second != kNoSecondBytes) {
        *sum = Lanes::add(Lanes::shift_left_8(*sum), seconds[factor.second * stride]);
    }
}

// The sums of a span, which is some whole tiles: of tokens, then of some tokens' second bytes.
template <class Lanes, int bits, int width, int pairs, int tokens, int seconds>
MATQUANT_INLINE inline void sum_tiles(const TilePlanes<width, pairs>& planes, int64_t first_tile, int64_t last_tile,
                                      const uint8_t* activations, const uint8_t* second_bytes,
                                      typename Lanes::Sums* result) {
    using Sums = typename Lanes::Sums;
    constexpr int kTokenSums = Lanes::template kSums<bits>;
    constexpr int kSums = tokens * kTokenSums + seconds;
    constexpr int64_t kBytes = kSpanBytes<Lanes, bits>;
    constexpr int kStepBytes = Lanes::template kStepBytes<bits>;
    constexpr int kChains = std::clamp<int>(Lanes::kChains / kSums, 1, kTileSteps);
    Sums sums[kChains * kSums];
    repeat<kChains * kSums>([&](auto sum) MATQUANT_INLINE { sums[sum] = Lanes::zero_sums(); });
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
        planes.template prefetch<kFewPrefetchBytes>(tile);
        const PackedTile<Lanes, width, pairs> packed(planes, tile);
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
        activations += kTileSteps * kStepBytes;
        second_bytes += kTileSteps * kStepBytes;
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
template <class Lanes, int bits, int width, int pairs, int tokens>
void multiply_few(const Product& product, const TileRow& row) {
    using Sums = typename Lanes::Sums;
    constexpr int kSums = Lanes::template kSums<bits>;
    const TilePlanes<width, pairs> planes{row, product.plane_stride};
    const RowDecoders<Lanes> decoders(product, row);
    typename Lanes::Floats results[tokens];
    repeat<tokens>([&](auto token) MATQUANT_INLINE { results[token] = Lanes::zero(); });
    int64_t index = 0;
    for (int64_t begin = 0; begin < product.columns; index += tokens) {
        const int64_t end = span_end(product.columns, product.group_size, begin);
        const Decoder<Lanes> decoder = decoders.of_group(begin / product.group_size);
        const auto add_span = [&](auto seconds) MATQUANT_INLINE {
            Sums sums[tokens * kSums + seconds];
            sum_tiles<Lanes, bits, width, pairs, tokens, seconds>(
                planes, begin / kTileColumns, ceil_div(end, kTileColumns),
                product.activations + index * kSpanBytes<Lanes, bits>,
                product.second_bytes + index * kSpanBytes<Lanes, bits>, sums);
            Sums second_sums[seconds + 1];  // apart, since the factors say which is whose
            repeat<seconds>([&](auto second) MATQUANT_INLINE { second_sums[second] = sums[tokens * kSums + second]; });
            repeat<tokens>([&](auto token) MATQUANT_INLINE {
                const Factor& factor = product.factors[index + token];
                if constexpr (seconds > 0) {
                    add_second<Lanes>(&sums[token], factor, second_sums);
                }
                results[token] =
                    decoder.add_span(Lanes::template total<Lanes, bits>(&sums[token * kSums]), factor, results[token]);
            });
        };
        if constexpr (kHasSecondBytes<Lanes, bits> && width <= kMostWidthOf8Bits) {
            with_at_least<tokens>(product.second_counts[index / tokens], add_span);
        } else {
            add_span(std::integral_constant<int, 0>());
        }
        begin = end;
    }
    const Writer<Lanes> writer(product, row);
    repeat<tokens>([&](auto token) MATQUANT_INLINE { writer.write(token, results[token]); });
}

// Unpacks tiles to codes [steps, rows, 64], those of one row.
template <class Lanes, int width, int pairs, int rows, int64_t prefetch_bytes>
void unpack_tiles(const TileRow& row, int64_t first_tile, int64_t count, int64_t plane_stride, uint8_t* codes) {
    const TilePlanes<width, pairs> planes{row, plane_stride};
    for (int64_t tile = first_tile; tile < first_tile + count; ++tile) {
        planes.template prefetch<prefetch_bytes>(tile);
        const PackedTile<Lanes, width, pairs> packed(planes, tile);
        repeat<kTileSteps>([&](auto step) MATQUANT_INLINE {
            Lanes::store_bytes(codes + step * rows * kPlaneBytes, packed.template codes<step>());
        });
        codes += kTileSteps * rows * kPlaneBytes;
    }
}

// A span of codes [steps, rows, 64], and what a block of tokens needs of it.
template <class Lanes, int rows>
struct Span {
    const uint8_t* codes;
    int64_t steps;
    Decoder<Lanes> decoders[rows];
};

// The sums [tokens, rows] of a span and a block of tokens.
template <class Lanes, int bits, int rows, int tokens>
MATQUANT_INLINE inline void sum_block(const Span<Lanes, rows>& span, const uint8_t* activations,
                                      typename Lanes::Sums* result) {
    using Sums = typename Lanes::Sums;
    constexpr int kSums = Lanes::template kSums<bits>;
    Sums sums[tokens * rows * kSums];
    repeat<tokens * rows * kSums>([&](auto sum) MATQUANT_INLINE { sums[sum] = Lanes::zero_sums(); });
    const uint8_t* codes = span.codes;
    for (int64_t step = 0; step < span.steps; ++step) {
        typename Lanes::Operand operands[rows];
        repeat<rows>([&](auto row) MATQUANT_INLINE {
            operands[row] = Lanes::prepare(Lanes::load_bytes(codes + row * kPlaneBytes));
        });
        repeat<tokens>([&](auto token) MATQUANT_INLINE {
            repeat<rows>([&](auto row) MATQUANT_INLINE {
                Lanes::template dot<bits>(&sums[(token * rows + row) * kSums], operands[row],
                                          activations + token * kSpanBytes<Lanes, bits>);
            });
        });
        codes += rows * kPlaneBytes;
        activations += Lanes::template kStepBytes<bits>;
    }
    repeat<tokens * rows * kSums>([&](auto sum) MATQUANT_INLINE { result[sum] = sums[sum]; });
}

// Adds the product of a span and a block of tokens to their results [tokens, rows, 16].
template <class Lanes, int bits, int rows, int tokens>
void multiply_block(const Span<Lanes, rows>& span, const uint8_t* activations, const Factor* factors,
                    const typename Lanes::Sums* seconds, float* results) {
    constexpr int kSums = Lanes::template kSums<bits>;
    typename Lanes::Sums sums[tokens * rows * kSums];
    sum_block<Lanes, bits, rows, tokens>(span, activations, sums);
    repeat<tokens>([&](auto token) MATQUANT_INLINE {
        repeat<rows>([&](auto row) MATQUANT_INLINE {
            float* result = results + (token * rows + row) * kTileRows;
            typename Lanes::Sums* sum = &sums[(token * rows + row) * kSums];
            if constexpr (kHasSecondBytes<Lanes, bits>) {
                add_second<Lanes>(sum, factors[token], seconds + row, rows);
            }
            const typename Lanes::Floats total = Lanes::template total<Lanes, bits>(sum);
            Lanes::store(result, span.decoders[row].add_span(total, factors[token], Lanes::load(result)));
        });
    });
}

template <class Lanes, int bits, int rows, int... tokens>
constexpr auto blocks_by_tokens(std::integer_sequence<int, tokens...>) {
    return std::array{&multiply_block<Lanes, bits, rows, tokens + 1>...};
}

template <class Lanes, int rows, int tokens>
void sum_second_block(const Span<Lanes, rows>& span, const uint8_t* bytes, typename Lanes::Sums* sums) {
    sum_block<Lanes, 8, rows, tokens>(span, bytes, sums);
}

template <class Lanes, int rows, int... tokens>
constexpr auto second_blocks_by_tokens(std::integer_sequence<int, tokens...>) {
    return std::array{&sum_second_block<Lanes, rows, tokens + 1>...};
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

// Adds the product of a span, whose factors begin at `index`, and all tokens to their results [tokens, rows, 16].
template <class Lanes, int bits, int rows>
void multiply_tokens(const Product& product, const Span<Lanes, rows>& span, int64_t index,
                     typename Lanes::Sums* seconds, float* results) {
    constexpr int kMost = Lanes::template kManyTokens<bits>;
    constexpr int64_t kBytes = kSpanBytes<Lanes, bits>;
    static constexpr auto kBlocks = blocks_by_tokens<Lanes, bits, rows>(std::make_integer_sequence<int, kMost>());
    if constexpr (kHasSecondBytes<Lanes, bits>) {
        static constexpr auto kSecondBlocks =
            second_blocks_by_tokens<Lanes, rows>(std::make_integer_sequence<int, kMost>());
        for_each_block(product.second_counts[index / product.tokens], kMost, [&](int64_t first, int64_t count) {
            kSecondBlocks[count - 1](span, product.second_bytes + (index + first) * kBytes, seconds + first * rows);
        });
    }
    const uint8_t* activations = product.activations + index * kBytes;
    for_each_block(product.tokens, kMost, [&](int64_t first, int64_t count) {
        kBlocks[count - 1](span, activations + first * kBytes, product.factors + index + first, seconds,
                           results + first * rows * kTileRows);
    });
}

// Functions that are made for each width and for planes in pairs or not stand in tables in this order.
constexpr int kVariants = 2 * (kMaxWidth - kMinWidth + 1);
constexpr int variant_of(int width, bool paired) { return 2 * (width - kMinWidth) + (paired ? 1 : 0); }
constexpr int width_of(int variant) { return kMinWidth + variant / 2; }
constexpr int pairs_of(int variant) { return variant % 2 != 0 ? width_of(variant) / 2 : 1; }

template <class Lanes, int rows, int64_t prefetch_bytes, int... variants>
constexpr auto unpackers_by_variant(std::integer_sequence<int, variants...>) {
    return std::array{&unpack_tiles<Lanes, width_of(variants), pairs_of(variants), rows, prefetch_bytes>...};
}

template <class Lanes, int... parts>
auto decoders_of(const Product& product, const TileRow* row, std::integer_sequence<int, parts...>) {
    return std::array{RowDecoders<Lanes>(product, row[parts])...};
}

// All of some rows of tiles, all tokens, any groups.
template <class Lanes, int bits, int rows>
void multiply_many(const Product& product, const TileRow* row) {
    static constexpr auto kUnpack =
        unpackers_by_variant<Lanes, rows, kManyPrefetchBytes>(std::make_integer_sequence<int, kVariants>());
    alignas(64) uint8_t codes[kSpanSteps * rows * kPlaneBytes];
    alignas(64) float results[kBlockTokens * rows * kTileRows];
    typename Lanes::Sums seconds[kHasSecondBytes<Lanes, bits> ? kBlockTokens * rows : 1];
    std::fill_n(results, product.tokens * rows * kTileRows, 0.0f);
    const auto decoders = decoders_of<Lanes>(product, row, std::make_integer_sequence<int, rows>());
    int64_t index = 0;
    for (int64_t first = 0; first < product.columns; first += kSpanColumns) {
        const int64_t last = std::min(first + kSpanColumns, product.columns);
        for (int part = 0; part < rows; ++part) {
            kUnpack[variant_of(row[part].width, product.paired)](row[part], first / kTileColumns,
                                                                 ceil_div(last - first, kTileColumns),
                                                                 product.plane_stride, codes + part * kPlaneBytes);
        }
        for (int64_t begin = first; begin < last; index += product.tokens) {
            const int64_t end = span_end(product.columns, product.group_size, begin);
            Span<Lanes, rows> span;
            span.codes = codes + (begin - first) / kStepColumns * rows * kPlaneBytes;
            span.steps = ceil_div(end - begin, kStepColumns);
            for (int part = 0; part < rows; ++part) {
                span.decoders[part] = decoders[part].of_group(begin / product.group_size);
            }
            multiply_tokens<Lanes, bits, rows>(product, span, index, seconds, results);
            begin = end;
        }
    }
    for (int part = 0; part < rows; ++part) {
        const Writer<Lanes> writer(product, row[part]);
        for (int64_t token = 0; token < product.tokens; ++token) {
            writer.write(token, Lanes::load(results + (token * rows + part) * kTileRows));
        }
    }
}

// multiply_few for each variant, one after the other, and in these for each number of tokens.
template <class Lanes, int bits, int... indices>
constexpr auto few_by_variant_and_tokens(std::integer_sequence<int, indices...>) {
    constexpr int kTokens = Lanes::template kFewTokens<bits>;
    return std::array{
        &multiply_few<Lanes, bits, width_of(indices / kTokens), pairs_of(indices / kTokens), indices % kTokens + 1>...};
}

// Whether spans are whole tiles, but for the last.
inline bool has_whole_tiles(const Product& product) {
    return product.group_size % kTileColumns == 0 || product.group_size >= product.columns;
}

template <class Lanes, int bits>
void multiply_rows(const Product& product, const TileRow* rows, int64_t count) {
    constexpr int kTokens = Lanes::template kFewTokens<bits>;
    static constexpr auto kFew =
        few_by_variant_and_tokens<Lanes, bits>(std::make_integer_sequence<int, kVariants * kTokens>());
    if (product.tokens <= kTokens && has_whole_tiles(product)) {
        for (int64_t index = 0; index < count; ++index) {
            kFew[variant_of(rows[index].width, product.paired) * kTokens + product.tokens - 1](product, rows[index]);
        }
        return;
    }
    for (; count >= Lanes::kRows; count -= Lanes::kRows, rows += Lanes::kRows) {
        multiply_many<Lanes, bits, Lanes::kRows>(product, rows);
    }
    for (; count > 0; --count, ++rows) {
        multiply_many<Lanes, bits, 1>(product, rows);
    }
}

template <class Lanes>
struct KernelOf {
    template <class Call>
    static auto with_bits(int activation_bits, Call call) {
        switch (activation_bits) {
            case 8:
                return call(std::integral_constant<int, 8>());
            case 16:
                return call(std::integral_constant<int, 16>());
            default:
                return call(std::integral_constant<int, 24>());
        }
    }

    static int64_t span_bytes(int activation_bits) {
        return with_bits(activation_bits, [](auto bits) { return kSpanBytes<Lanes, bits>; });
    }
    static void pack(const Product& product, int64_t begin, int64_t end) {
        with_bits(product.activation_bits, [&](auto bits) { pack_tokens<Lanes, bits>(product, begin, end); });
    }
    static void multiply(const Product& product, const TileRow* rows, int64_t count) {
        with_bits(product.activation_bits, [&](auto bits) { multiply_rows<Lanes, bits>(product, rows, count); });
    }

    static constexpr Kernel kKernel = {span_bytes, pack, multiply};
};

}  // namespace
}  // namespace matquant::cpu

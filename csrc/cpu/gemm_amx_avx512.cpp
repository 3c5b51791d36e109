// The kernel for AMX: one instruction multiplies the codes of 16 rows and 64 columns with 16 tokens, eight times what
// AVX-512 does in that time. So it is unpacking the codes, and making floats of a span's sums, that take the time. The
// sums are the same integers as everywhere, and so are the bytes of the results.
#include <vector>

#include "cpu/lanes_avx512.h"
#ifdef MATQUANT_TILES  // a stand-in, for tests on machines without AMX
#include MATQUANT_TILES
#else
#include "cpu/tiles_amx.h"
#endif

namespace matquant::cpu {
namespace {

struct Lanes : Avx512Lanes, ByteSteps {};

constexpr int kRows = 2;  // rows of tiles whose sums, with both bytes of the activations, fill four registers
constexpr int kTokens = kRegisterRows;
constexpr int64_t kChunkSteps = 16;
static_assert(kPlaneBytes == kRegisterRowBytes && kChunkSteps * kStepColumns == kRegisterRowBytes);

// Columns that are unpacked at once: their codes stay in the first cache, 512 tokens' activations in the second.
constexpr int64_t kPanelColumns = 512;
constexpr int64_t kPanelSteps = kPanelColumns / kStepColumns;
static_assert(kPanelColumns % kSpanColumns == 0);
constexpr int64_t kPanelPrefetchBytes = 8192;

// Of the second cache, for activations or for results.
constexpr int64_t kCachedBytes = 1 << 19;

// Fewer tokens are multiplied as fast without tile registers.
constexpr int64_t fewest_tokens(int activation_bits) { return activation_bits == 8 ? 64 : 32; }

// What each register holds.
constexpr int sums_of(int row, int part) { return 2 * row + part; }
constexpr int activations_of(int part) { return 4 + part; }
constexpr int codes_of(int row) { return 6 + row; }

// The sums [16 tokens, rows, parts] of a span.
template <int bits, int rows>
MATQUANT_INLINE inline void sum_block(const Span<Lanes, rows>& span, const uint8_t* activations, Lanes::Sums* sums) {
    constexpr int kParts = Lanes::kSums<bits>;
    repeat<rows * kParts>([&](auto sum) MATQUANT_INLINE { Tiles::zero<sums_of(sum / kParts, sum % kParts)>(); });
    // The last chunk may reach past the span: whatever codes are there meet zeros.
    for (int64_t step = 0; step < span.steps; step += kChunkSteps) {
        repeat<kParts>([&](auto part) MATQUANT_INLINE {
            Tiles::load<activations_of(part)>(activations + part * kSpanColumns + step * kStepColumns,
                                              Lanes::kSpanBytes<bits>);
        });
        repeat<rows>([&](auto row) MATQUANT_INLINE {
            Tiles::load<codes_of(row)>(span.codes + (step * rows + row) * kPlaneBytes, rows * kPlaneBytes);
            repeat<kParts>([&](auto part) MATQUANT_INLINE {
                Tiles::dot<sums_of(row, part), activations_of(part), codes_of(row)>();
            });
        });
    }
    repeat<rows * kParts>([&](auto sum) MATQUANT_INLINE {
        Tiles::store<sums_of(sum / kParts, sum % kParts)>(sums + sum, rows * kParts * kRegisterRowBytes);
    });
}

// Adds the product of a span and up to 16 tokens to their results [tokens, rows, 16]. `seconds` are zeros, then the
// sums of the span's second bytes, [1 + tokens that have some, rows], or nullptr where no token has.
template <int bits, int rows, bool has_seconds>
void multiply_block(const Span<Lanes, rows>& span, int64_t tokens, const uint8_t* activations, const Factor* factors,
                    [[maybe_unused]] const Lanes::Sums* seconds, float* results) {
    constexpr int kParts = Lanes::kSums<bits>;
    Lanes::Sums sums[kTokens * rows * kParts];
    sum_block<bits, rows>(span, activations, sums);
    for (int64_t token = 0; token < tokens; ++token) {
        [[maybe_unused]] const int32_t second = factors[token].second;
        repeat<rows>([&](auto row) MATQUANT_INLINE {
            Lanes::Sums* parts = &sums[(token * rows + row) * kParts];
            if constexpr (has_seconds) {  // no branch: which tokens have some is as good as random
                static_assert(kNoSecondBytes == -1);
                const __m512i shift = _mm512_set1_epi32(second == kNoSecondBytes ? 0 : 8);
                *parts = Lanes::add(_mm512_sllv_epi32(*parts, shift), seconds[(second + 1) * rows + row]);
            }
            const Lanes::Floats total = Lanes::total<Lanes, bits>(parts);
            float* result = results + (token * rows + row) * kTileRows;
            Lanes::store(result, span.decoders[row].add_span(total, factors[token], Lanes::load(result)));
        });
    }
}

// All tokens.
template <int bits, int rows, bool has_seconds>
void multiply_tokens(const Product& product, const Span<Lanes, rows>& span, int64_t index, const Lanes::Sums* seconds,
                     float* results) {
    for (int64_t token = 0; token < product.tokens; token += kTokens) {
        const int64_t place = index * product.tokens + token;
        multiply_block<bits, rows, has_seconds>(span, std::min<int64_t>(product.tokens - token, kTokens),
                                                product.activations + place * Lanes::kSpanBytes<bits>,
                                                product.factors + place, seconds, results + token * rows * kTileRows);
    }
}

// Adds the product of a panel, the columns [first, last), and all tokens to their results [tokens, rows, 16]. `index`
// is the number of spans before it; returns that of those before the next.
template <int bits, int rows>
int64_t multiply_panel(const Product& product, const TileRow* row, const std::array<RowDecoders<Lanes>, rows>& decoders,
                       int64_t first, int64_t last, int64_t index, float* results) {
    static constexpr auto kUnpack =
        unpackers_by_variant<Lanes, rows, kPanelPrefetchBytes>(std::make_integer_sequence<int, kVariants>());
    alignas(64) uint8_t codes[(kPanelSteps + kChunkSteps) * rows * kPlaneBytes];
    Lanes::Sums seconds[kHasSecondBytes<Lanes, bits> ? (1 + kBlockTokens + kTokens) * rows : rows];
    std::fill_n(seconds, rows, Lanes::zero_sums());
    const int64_t tiles = ceil_div(last - first, kTileColumns);
    for (int part = 0; part < rows; ++part) {
        kUnpack[variant_of(row[part].width, product.paired)](row[part], first / kTileColumns, tiles,
                                                             product.plane_stride, codes + part * kPlaneBytes);
    }

    int64_t group = first / product.group_size;
    for (int64_t begin = first; begin < last; ++index) {
        const int64_t group_end = (group + 1) * product.group_size;
        const int64_t cut = (begin + kSpanColumns) & -kSpanColumns;
        const int64_t end = std::min({group_end, cut, last});
        Span<Lanes, rows> span;
        span.codes = codes + (begin - first) / kStepColumns * rows * kPlaneBytes;
        span.steps = ceil_div(end - begin, kStepColumns);
        for (int part = 0; part < rows; ++part) {
            span.decoders[part] = decoders[part].of_group(group);
        }
        group += end == group_end ? 1 : 0;
        const int64_t second_count = kHasSecondBytes<Lanes, bits> ? product.second_counts[index] : 0;
        if (second_count == 0) {
            multiply_tokens<bits, rows, false>(product, span, index, nullptr, results);
        } else if constexpr (kHasSecondBytes<Lanes, bits>) {
            const uint8_t* bytes = product.second_bytes + index * product.tokens * Lanes::kSpanBytes<bits>;
            for (int64_t first = 0; first < second_count; first += kTokens) {
                sum_block<bits, rows>(span, bytes + first * Lanes::kSpanBytes<bits>, seconds + (1 + first) * rows);
            }
            multiply_tokens<bits, rows, true>(product, span, index, seconds, results);
        }
        begin = end;
    }
    return index;
}

// All of some pairs of rows of tiles, or of single ones, panel by panel. So each panel's activations are read from
// memory once for all these rows.
template <int bits, int rows>
void multiply_group(const Product& product, const TileRow* row, int64_t count) {
    thread_local std::vector<float> results;
    const int64_t size = product.tokens * rows * kTileRows;
    results.assign(count * size, 0.0f);
    std::vector<std::array<RowDecoders<Lanes>, rows>> decoders;
    for (int64_t each = 0; each < count; ++each) {
        decoders.push_back(decoders_of<Lanes>(product, row + each * rows, std::make_integer_sequence<int, rows>()));
    }
    int64_t index = 0, next = 0;
    for (int64_t first = 0; first < product.columns; first += kPanelColumns, index = next) {
        const int64_t last = std::min(first + kPanelColumns, product.columns);
        for (int64_t each = 0; each < count; ++each) {
            next = multiply_panel<bits, rows>(product, row + each * rows, decoders[each], first, last, index,
                                              results.data() + each * size);
        }
    }
    for (int64_t each = 0; each < count * rows; ++each) {
        const Writer<Lanes> writer(product, row[each]);
        const float* result = results.data() + each / rows * size + each % rows * kTileRows;
        for (int64_t token = 0; token < product.tokens; ++token) {
            writer.write(token, Lanes::load(result + token * rows * kTileRows));
        }
    }
}

template <int bits>
void multiply_rows(const Product& product, const TileRow* rows, int64_t count) {
    const int64_t spans = count_spans(product.columns, product.group_size);
    const bool cached = spans * product.tokens * Lanes::kSpanBytes<bits> <= 2 * kCachedBytes;
    const int64_t pair_bytes = product.tokens * kRows * kTileRows * static_cast<int64_t>(sizeof(float));
    const int64_t most = cached ? 1 : std::max<int64_t>(kCachedBytes / pair_bytes, 1);
    const uint8_t tokens = static_cast<uint8_t>(std::min<int64_t>(product.tokens, kTokens));
    Tiles::configure({tokens, tokens, tokens, tokens, tokens, tokens, kChunkSteps, kChunkSteps});
    while (count >= kRows) {
        const int64_t pairs = std::min(count / kRows, most);
        multiply_group<bits, kRows>(product, rows, pairs);
        rows += pairs * kRows;
        count -= pairs * kRows;
    }
    if (count > 0) {
        multiply_group<bits, 1>(product, rows, count);
    }
    Tiles::release();
}

void multiply(const Product& product, const TileRow* rows, int64_t count) {
    if (product.tokens < fewest_tokens(product.activation_bits) || product.activation_bits == 24 ||
        !has_whole_tiles(product)) {
        return kAvx512VnniKernel.multiply(product, rows, count);
    }
    return product.activation_bits == 8 ? multiply_rows<8>(product, rows, count)
                                        : multiply_rows<16>(product, rows, count);
}

}  // namespace

// Packed activations are those of the kernel for AVX-512 with VNNI, which multiplies few tokens.
const Kernel kAmxKernel = {kAvx512VnniKernel.span_bytes, kAvx512VnniKernel.pack, multiply};

}  // namespace matquant::cpu

// The kernel for AMX: one instruction multiplies the codes of 16 rows and 64 columns with 16 tokens, eight times what
// AVX-512 does in that time. So it is unpacking the codes, and making floats of a span's sums, that take the time. The
// sums are the same integers as everywhere, and so are the bytes of the results.
#include <algorithm>
#include <cstdint>

#include "cpu/gemm_kernel.h"
#include "cpu/lanes_avx512.h"
#include "cpu/lanes_vbmi_avx512.h"
#ifdef MATQUANT_TILES  // a stand-in, for tests on machines without AMX
#include MATQUANT_TILES
#else
#include "cpu/tiles_amx.h"
#endif

namespace matquant::cpu {
namespace {

struct Lanes : Avx512Lanes, ByteSteps {
    static Codes look_up(const uint8_t* table, Codes index) { return VbmiLookUps::look_up(table, index); }
    static constexpr int kRows = 2;  // of tiles whose sums, with both bytes of the activations, fill four registers
};

constexpr int kTokens = kRegisterRows;
static_assert(kPlaneBytes == kRegisterRowBytes && kChunkColumns == kRegisterRowBytes && kChunkSteps == kRegisterRows);
static_assert(kSpareTokens >= kTokens - 1);

// Fewer tokens are multiplied as fast without tile registers.
constexpr int64_t fewest_tokens(int activation_bits) { return activation_bits == 8 ? 64 : 32; }

// What each register holds.
constexpr int sums_of(int row, int part) { return 2 * row + part; }
constexpr int activations_of(int part) { return 4 + part; }
constexpr int codes_of(int row) { return 6 + row; }

// Blocks of 16 tokens, whose sums are in tile registers.
struct TileBlocks {
    using Lanes = cpu::Lanes;
    using Sums = Lanes::Sums;
    static constexpr int64_t kPanelColumns = 512, kPrefetchBytes = 8192;

    template <int bits, int rows>
    static void multiply(const Product& product, const Span& span, const SpanCodes<Lanes, rows>& codes,
                         float* results) {
        if constexpr (kHasSecondBytes<Lanes, bits>) {
            if (const int64_t count = product.second_counts[span.index()]; count > 0) {
                Sums seconds[(1 + kBlockTokens + kTokens) * rows];
                std::fill_n(seconds, rows, Lanes::zero_sums());
                const int64_t stride = product.tokens * kBytes<bits>;
                const uint8_t* bytes = product.second_bytes + span.chunk() * stride;
                for (int64_t first = 0; first < count; first += kTokens) {
                    sum_block<bits, rows>(codes, bytes + first * kBytes<bits>, stride, seconds + (1 + first) * rows);
                }
                return multiply_tokens<bits, rows, true>(product, span, codes, seconds, results);
            }
        }
        multiply_tokens<bits, rows, false>(product, span, codes, nullptr, results);
    }

  private:
    template <int bits>
    static constexpr int64_t kBytes = Lanes::kChunkBytes<bits>;

    template <int bits, int rows, bool has_seconds>
    static void multiply_tokens(const Product& product, const Span& span, const SpanCodes<Lanes, rows>& codes,
                                const Sums* seconds, float* results) {
        const int64_t stride = product.tokens * kBytes<bits>;
        const uint8_t* activations = product.activations + span.chunk() * stride;
        const Factor* factors = product.factors + span.index() * product.tokens;
        for (int64_t token = 0; token < product.tokens; token += kTokens) {
            multiply_block<bits, rows, has_seconds>(codes, std::min<int64_t>(product.tokens - token, kTokens),
                                                    activations + token * kBytes<bits>, stride, factors + token,
                                                    seconds, results + token * rows * kTileRows);
        }
    }

    // The sums [16 tokens, rows, parts] of a span.
    template <int bits, int rows>
    MATQUANT_INLINE static void sum_block(const SpanCodes<Lanes, rows>& span, const uint8_t* activations,
                                          int64_t stride, Sums* sums) {
        constexpr int kParts = Lanes::kSums<bits>;
        repeat<rows * kParts>([&](auto sum) MATQUANT_INLINE { Tiles::zero<sums_of(sum / kParts, sum % kParts)>(); });
        for (int64_t step = 0; step < span.steps; step += kChunkSteps, activations += stride) {
            repeat<kParts>([&](auto part) MATQUANT_INLINE {
                Tiles::load<activations_of(part)>(activations + part * kChunkColumns, kBytes<bits>);
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
    // sums of the span's second bytes, [1 + tokens that have some, rows].
    template <int bits, int rows, bool has_seconds>
    static void multiply_block(const SpanCodes<Lanes, rows>& span, int64_t tokens, const uint8_t* activations,
                               int64_t stride, const Factor* factors, [[maybe_unused]] const Sums* seconds,
                               float* results) {
        constexpr int kParts = Lanes::kSums<bits>;
        Sums sums[kTokens * rows * kParts];
        sum_block<bits, rows>(span, activations, stride, sums);
        for (int64_t token = 0; token < tokens; ++token) {
            repeat<rows>([&](auto row) MATQUANT_INLINE {
                Sums* parts = &sums[(token * rows + row) * kParts];
                if constexpr (has_seconds) {
                    // No branch: which tokens have second bytes is as good as random.
                    static_assert(kNoSecondBytes == -1);
                    const int32_t second = factors[token].second;
                    const __m512i shift = _mm512_set1_epi32(second == kNoSecondBytes ? 0 : 8);
                    *parts = Lanes::add(_mm512_sllv_epi32(*parts, shift), seconds[(second + 1) * rows + row]);
                }
                const Lanes::Floats total = Lanes::total<Lanes, bits>(parts);
                float* result = results + (token * rows + row) * kTileRows;
                Lanes::store(result, span.decoders[row].add_span(total, factors[token], Lanes::load(result)));
            });
        }
    }
};

template <int bits>
void multiply_with_tiles(const Product& product, const TileRow* rows, int64_t count) {
    const uint8_t tokens = static_cast<uint8_t>(std::min<int64_t>(product.tokens, kTokens));
    Tiles::configure({tokens, tokens, tokens, tokens, tokens, tokens, kRegisterRows, kRegisterRows});
    if (product.decoder_kind == DecoderKind::kCodebook) {
        multiply_many<TileBlocks, bits, true>(product, rows, count);
    } else {
        multiply_many<TileBlocks, bits, false>(product, rows, count);
    }
    Tiles::release();
}

// Packed activations are those of the kernel for AVX-512 with VNNI and VBMI, which multiplies few tokens.
int64_t chunk_bytes(int activation_bits) { return kAvx512VbmiKernel.chunk_bytes(activation_bits); }

void pack(const Product& product, int64_t begin, int64_t end) { kAvx512VbmiKernel.pack(product, begin, end); }

void multiply(const Product& product, const TileRow* rows, int64_t count) {
    if (product.tokens < fewest_tokens(product.activation_bits) || product.activation_bits == 24 ||
        !has_whole_tiles(product)) {
        return kAvx512VbmiKernel.multiply(product, rows, count);
    }
    return product.activation_bits == 8 ? multiply_with_tiles<8>(product, rows, count)
                                        : multiply_with_tiles<16>(product, rows, count);
}

}  // namespace

constinit const Kernel kAmxKernel = {chunk_bytes, pack, multiply};

}  // namespace matquant::cpu

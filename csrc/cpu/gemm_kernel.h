// The product of packed activations and rows of tiles, for one instruction set.
//
// Two loops share their parts: that of few_tokens.h while the product waits for memory, that of many_tokens.h when it
// waits for the processor. Both add the same integers and the same floats in the same order.
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
//   add, zero_sums, shift_left_8, to_floats, zero, load, store, broadcast, multiply,
//   multiply_add(a, b, c) = a * b + c load_half, store_half load_unsigned, load_signed  16 bytes as Floats kRows rows
//   of tiles that multiply_many takes at once kManyTokens<bits>           tokens that it takes at once, kRows * kSums *
//   kManyTokens sums fill the registers kFewTokens<bits>            the most tokens of multiply_few kChains sums that
//   must be under way to hide the latency of `dot`
//
// Everything is in an anonymous namespace: the linker merges functions of the same name, and would then give the
// baseline code with instructions that the machine may lack.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/activations.h"
#include "cpu/few_tokens.h"
#include "cpu/gemm.h"
#include "cpu/many_tokens.h"

namespace matquant::cpu {
namespace {

// Whether spans are whole tiles, but for the last.
inline bool has_whole_tiles(const Product& product) {
    return product.group_size % kTileColumns == 0 || product.group_size >= product.columns;
}

// The widest slices that multiply_few takes. Slow look-ups take longer than the way of levels through the first cache,
// and so do two look-ups for each weight.
template <class Lanes, bool codebook>
constexpr int kMostWidthOfFew = !codebook             ? kMaxWidth
                                : Lanes::kFastLookUps ? kWidestWhole
                                                      : 0;

template <class Lanes, int bits, bool codebook>
void multiply_rows(const Product& product, const TileRow* rows, int64_t count) {
    constexpr int kMostWidth = kMostWidthOfFew<Lanes, codebook>;
    if constexpr (kMostWidth > 0) {
        constexpr int kTokens = Lanes::template kFewTokens<bits>;
        static constexpr auto kFew = few_by_variant_and_tokens<Lanes, bits, codebook>(
            std::make_integer_sequence<int, (variant_of(kMostWidth, true) + 1) * kTokens>());
        if (product.tokens <= kTokens && has_whole_tiles(product)) {
            for (const TileRow* const end = rows + count; rows < end;) {
                if (rows->width <= kMostWidth) {
                    kFew[variant_of(rows->width, product.paired) * kTokens + product.tokens - 1](product, *rows);
                    ++rows;
                    continue;
                }
                const TileRow* next = rows;
                while (next < end && next->width > kMostWidth) {
                    ++next;
                }
                multiply_many<RegisterBlocks<Lanes>, bits, codebook>(product, rows, next - rows);
                rows = next;
            }
            return;
        }
    }
    multiply_many<RegisterBlocks<Lanes>, bits, codebook>(product, rows, count);
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

    static int64_t chunk_bytes(int activation_bits) {
        return with_bits(activation_bits, [](auto bits) { return Lanes::template kChunkBytes<bits>; });
    }
    static void pack(const Product& product, int64_t begin, int64_t end) {
        with_bits(product.activation_bits, [&](auto bits) { pack_tokens<Lanes, bits>(product, begin, end); });
    }
    static void multiply(const Product& product, const TileRow* rows, int64_t count) {
        with_bits(product.activation_bits, [&](auto bits) {
            if (product.decoder_kind == DecoderKind::kCodebook) {
                return multiply_rows<Lanes, bits, true>(product, rows, count);
            }
            multiply_rows<Lanes, bits, false>(product, rows, count);
        });
    }

    static constexpr Kernel kKernel = {chunk_bytes, pack, multiply};
};

}  // namespace
}  // namespace matquant::cpu

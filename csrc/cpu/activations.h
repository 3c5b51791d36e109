// Activations in fixed point, as gemm.h says, for one instruction set.
//
// A token's span has integers of 16 bits, |q| <= 32639, so that their halves are bytes: q = 256 high + low with both
// in -128..127. Their scale is a power of two: bfloat16 and float16 within a factor 2^7 or 2^4 of the span's largest
// lose nothing, and no value more than 2^-15 of that largest. With 24 bits, for float32, 8 bits of the remainder
// follow; with 8 bits |q| <= 127, and the scale takes the largest value to 127. Rounding a span to 8 bits adds noise in
// proportion to the square of its largest activation, and a few outliers are the cause of most of it: so their spans
// have 16.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/gemm.h"

namespace matquant::cpu {
namespace {

constexpr int kBFloat16Shift = 16;  // a bfloat16 is the upper half of a float32

// Some activations of a token as floats, at most those of a span, and zeros up to the end of a chunk.
template <class Lanes>
void load_activations(const Product& product, int64_t token, int64_t begin, int64_t count, float* values) {
    const int64_t first = token * product.columns + begin;
    int64_t index = 0;
    switch (product.element) {
        case Element::kBFloat16: {
            const uint16_t* source = static_cast<const uint16_t*>(product.input) + first;
            for (; index < count; ++index) {
                values[index] = std::bit_cast<float>(static_cast<uint32_t>(source[index]) << kBFloat16Shift);
            }
            break;
        }
        case Element::kHalf: {
            const uint16_t* source = static_cast<const uint16_t*>(product.input) + first;
            for (; index + kTileRows <= count; index += kTileRows) {
                Lanes::store(values + index, Lanes::load_half(source + index));
            }
            uint16_t rest[kTileRows] = {};
            std::copy(source + index, source + count, rest);
            if (index < count) {
                Lanes::store(values + index, Lanes::load_half(rest));
            }
            index = count;
            break;
        }
        case Element::kFloat: {
            const float* source = static_cast<const float*>(product.input) + first;
            std::copy_n(source, count, values);
            index = count;
            break;
        }
    }
    std::fill(values + index, values + ceil_div(count, kChunkColumns) * kChunkColumns, 0.0f);
}

// The integer nearest to a value below 2^22, ties to even: adding this number leaves no bits of the fraction.
constexpr float kRounder = 0x1.8p23f;
inline int32_t round_to_integer(float value) {
    return std::bit_cast<int32_t>(value + kRounder) - std::bit_cast<int32_t>(kRounder);
}

// The distance of two neighbouring integers.
template <int bits>
float choose_scale(float largest) {
    constexpr float kSmallest = 0x1p-100f;  // its reciprocal is finite; what is below it counts as zero
    if constexpr (bits == 8) {
        return std::max(largest / 127.0f, kSmallest);
    }
    // Up to the next power of two: past it carries into the exponent, and the fraction is cut.
    constexpr uint32_t kFraction = 0x7fffff;
    const uint32_t scale = std::bit_cast<uint32_t>(largest / 32639.0f);
    return std::max(std::bit_cast<float>((scale + kFraction) & ~kFraction), kSmallest);
}

// The largest magnitude of some chunks, infinity or NaN if there is one.
inline float find_largest(const float* values, int64_t chunks) {
    constexpr uint32_t kMagnitude = 0x7fffffff;
    uint32_t largest = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, values += kChunkColumns) {
        for (int64_t index = 0; index < kChunkColumns; ++index) {
            largest = std::max(largest, std::bit_cast<uint32_t>(values[index]) & kMagnitude);
        }
    }
    return std::bit_cast<float>(largest);
}

// A sum of integers, and for 24 bits what their remainders, in units of 1 / 256, add to it.
struct IntegerSum {
    int32_t high = 0, rest = 0;
};

// Packs a chunk of a token, whose integers are its values times `factor` and have `scale_bits`: as many as are packed,
// or 16 where 8 are and the rest goes to `second`. Adds them to `sum`.
template <class Lanes, int bits, int scale_bits>
void pack_chunk(const float* values, float factor, uint8_t* target, [[maybe_unused]] uint8_t* second, IntegerSum& sum) {
    alignas(64) int16_t high[kChunkColumns];  // the integer itself, for 24 bits its leading 16
    alignas(64) int8_t rest[kChunkColumns];
    int32_t high_sum = 0, rest_sum = 0;
    for (int64_t index = 0; index < kChunkColumns; ++index) {
        const float value = values[index] * factor;
        const int32_t integer = round_to_integer(value);
        high[index] = static_cast<int16_t>(integer);
        high_sum += integer;
        if constexpr (bits == 24) {
            const float remainder = value - static_cast<float>(integer);
            const int32_t part = std::min(round_to_integer(remainder * 256.0f), 127);
            rest[index] = static_cast<int8_t>(part);
            rest_sum += part;
        }
    }
    if constexpr (scale_bits != bits && Lanes::kSecondBytes) {
        Lanes::split(high, target, second);
    } else {
        Lanes::template store_chunk<bits>(high, rest, target);
    }
    sum.high += high_sum;
    sum.rest += rest_sum;
}

// Packs one span of one token, into places of each chunk that are `stride` bytes apart.
template <class Lanes, int bits, int scale_bits = bits>
Factor pack_span(const Span& span, float* values, float largest, int64_t stride, uint8_t* target,
                 [[maybe_unused]] uint8_t* second = nullptr) {
    constexpr bool kSecond = scale_bits != bits && Lanes::kSecondBytes;
    constexpr int32_t kPlace = kSecond ? 0 : kNoSecondBytes;
    const bool finite = largest <= std::numeric_limits<float>::max();
    if (!finite) {
        std::fill_n(values, span.chunks() * kChunkColumns, 0.0f);
    }
    const float scale = finite ? choose_scale<scale_bits>(largest) : 1.0f;
    const float factor = 1.0f / scale;
    IntegerSum sum;
    for (int64_t chunk = 0; chunk < span.chunks(); ++chunk) {
        pack_chunk<Lanes, bits, scale_bits>(values + chunk * kChunkColumns, factor, target + chunk * stride,
                                            kSecond ? second + chunk * stride : nullptr, sum);
    }
    if (!finite) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        return {nan, nan, kPlace};
    }
    return {scale, scale * (static_cast<float>(sum.high) + static_cast<float>(sum.rest) / 256.0f), kPlace};
}

// Calls body(span, values) for each span of a token.
template <class Lanes, class Body>
void for_each_span(const Product& product, int64_t token, Body body) {
    for (Span span(product.columns, product.group_size); !span.past_last(); span.advance()) {
        alignas(64) float values[kSpanColumns];
        load_activations<Lanes>(product, token, span.begin(), span.end() - span.begin(), values);
        body(span, values);
    }
}

// A token's largest activation that does not make its span one with outliers.
template <class Lanes>
float largest_of_8_bits(const Product& product, int64_t token) {
    if (product.outlier == std::numeric_limits<float>::infinity()) {
        return product.outlier;
    }
    float sum = 0.0f;
    int64_t spans = 0;
    for_each_span<Lanes>(product, token, [&](const Span& span, const float* values) {
        sum += find_largest(values, span.chunks());
        ++spans;
    });
    return product.outlier * (sum / static_cast<float>(spans));
}

template <class Lanes, int bits>
void pack_tokens(const Product& product, int64_t begin, int64_t end) {
    constexpr int64_t kBytes = Lanes::template kChunkBytes<bits>;
    for (int64_t token = begin; token < end; ++token) {
        [[maybe_unused]] const float most = bits == 8 ? largest_of_8_bits<Lanes>(product, token) : 0.0f;
        for_each_span<Lanes>(product, token, [&](const Span& span, float* values) {
            const float largest = find_largest(values, span.chunks());
            const int64_t stride = product.tokens * kBytes, place = span.chunk() * stride + token * kBytes;
            Factor& factor = product.factors[span.index() * product.tokens + token];
            if constexpr (bits == 8) {
                if (largest > most) {
                    factor = pack_span<Lanes, 8, 16>(span, values, largest, stride, product.activations + place,
                                                     product.second_bytes + place);
                    return;
                }
            }
            factor = pack_span<Lanes, bits>(span, values, largest, stride, product.activations + place);
        });
    }
}

}  // namespace
}  // namespace matquant::cpu

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

// The activations of a span as floats, zeros after them.
template <class Lanes>
void load_span(const Product& product, int64_t token, int64_t begin, int64_t count, float* values) {
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
    std::fill(values + index, values + kSpanColumns, 0.0f);
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

// The largest magnitude of a span, infinity or NaN if there is one.
inline float find_largest(const float* values) {
    constexpr uint32_t kMagnitude = 0x7fffffff;
    uint32_t largest = 0;
    for (int64_t index = 0; index < kSpanColumns; ++index) {
        largest = std::max(largest, std::bit_cast<uint32_t>(values[index]) & kMagnitude);
    }
    return std::bit_cast<float>(largest);
}

// Packs one span of one token, whose integers have `scale_bits`: as many as are packed, or 16 where 8 are and the rest
// goes to `second`.
template <class Lanes, int bits, int scale_bits = bits>
Factor pack_span(const float* values, float largest, uint8_t* target, uint8_t* second = nullptr) {
    const bool finite = largest <= std::numeric_limits<float>::max();
    const float scale = finite ? choose_scale<scale_bits>(largest) : 1.0f;
    const float factor = finite ? 1.0f / scale : 0.0f;

    alignas(64) int16_t high[kSpanColumns];  // the integer itself, for 24 bits its leading 16
    alignas(64) int8_t rest[kSpanColumns];
    int32_t high_sum = 0, rest_sum = 0;
    for (int64_t index = 0; index < kSpanColumns; ++index) {
        const float value = finite ? values[index] * factor : 0.0f;
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
    int32_t place = kNoSecondBytes;
    if constexpr (scale_bits != bits && Lanes::kSecondBytes) {
        Lanes::split(high, target, second);
        place = 0;
    } else {
        Lanes::template store_steps<bits>(high, rest, target);
    }
    if (!finite) {
        const float nan = std::numeric_limits<float>::quiet_NaN();
        return {nan, nan, place};
    }
    const float sum = static_cast<float>(high_sum) + static_cast<float>(rest_sum) / 256.0f;
    return {scale, scale * sum, place};
}

// Calls body(values, factor's index) for each span of a token.
template <class Lanes, class Body>
void for_each_span(const Product& product, int64_t token, Body body) {
    int64_t index = token;
    for (int64_t column = 0; column < product.columns; index += product.tokens) {
        const int64_t next = span_end(product.columns, product.group_size, column);
        alignas(64) float values[kSpanColumns];
        load_span<Lanes>(product, token, column, next - column, values);
        body(values, index);
        column = next;
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
    for_each_span<Lanes>(product, token, [&](const float* values, int64_t) {
        sum += find_largest(values);
        ++spans;
    });
    return product.outlier * (sum / static_cast<float>(spans));
}

template <class Lanes, int bits>
void pack_tokens(const Product& product, int64_t begin, int64_t end) {
    constexpr int64_t kBytes = Lanes::template kSpanBytes<bits>;
    for (int64_t token = begin; token < end; ++token) {
        [[maybe_unused]] const float most = bits == 8 ? largest_of_8_bits<Lanes>(product, token) : 0.0f;
        for_each_span<Lanes>(product, token, [&](const float* values, int64_t index) {
            const float largest = find_largest(values);
            uint8_t* target = product.activations + index * kBytes;
            if constexpr (bits == 8) {
                if (largest > most) {
                    product.factors[index] =
                        pack_span<Lanes, 8, 16>(values, largest, target, product.second_bytes + index * kBytes);
                    return;
                }
            }
            product.factors[index] = pack_span<Lanes, bits>(values, largest, target);
        });
    }
}

}  // namespace
}  // namespace matquant::cpu

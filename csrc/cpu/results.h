// From the integers of spans to a row's results, and to the output.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "cpu/activations.h"
#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/steps.h"

namespace matquant::cpu {
namespace {

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

    // Of the second part of a codebook's wide slice.
    Decoder fine() const { return {Lanes::multiply(scale, Lanes::broadcast(kFineUnit)), Lanes::zero()}; }
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
        const int64_t count = form_ == DecoderForm::kCodebook ? kTileRows : 2 * kTileRows;
        uint16_t steps[2 * kTileRows];
        std::memcpy(steps, data_, count * sizeof(steps[0]));
        for (int64_t lane = 0; lane < count; ++lane) {
            steps_[lane] = std::bit_cast<float>(static_cast<uint32_t>(steps[lane]) << kBFloat16Shift);
        }
        data_ += count * static_cast<int64_t>(sizeof(steps[0]));
        if (form_ == DecoderForm::kCodebook) {
            // The zero of both parts is taken off the first one, which is exact still, so that a weight is rounded
            // once.
            negative_middle_ = row.width > kWidestWhole ? -kZeroLevel * (1.0f + kFineUnit) : -kZeroLevel;
        } else {
            negative_middle_ = -0.5f * static_cast<float>((1 << row.width) - 1);
        }
    }

    MATQUANT_INLINE Decoder<Lanes> of_group(int64_t group) const {
        if (form_ == DecoderForm::kFloat16) {
            constexpr int64_t kBytes = 4 * kTileRows;
            const uint8_t* decoder = data_ + group * kBytes;
            __builtin_prefetch(decoder + kPrefetchBytes);
            return {Lanes::load_half(reinterpret_cast<const uint16_t*>(decoder)),
                    Lanes::load_half(reinterpret_cast<const uint16_t*>(decoder) + kTileRows)};
        }
        if (form_ == DecoderForm::kCodebook) {
            const uint8_t* decoder = data_ + group * kTileRows;
            __builtin_prefetch(decoder + kPrefetchBytes);
            const typename Lanes::Floats scale = Lanes::multiply(Lanes::load_unsigned(decoder), Lanes::load(steps_));
            return {scale, Lanes::multiply(scale, Lanes::broadcast(negative_middle_))};
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
        load_activations<Lanes>(as_input, 0, row.first, row.count, values);
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

// Whether spans may have second bytes.
template <class Lanes, int bits>
constexpr bool kHasSecondBytes = bits == 8 && Lanes::kSecondBytes;

// Adds a token's second bytes to its sum of a span, if it has any. `seconds` are the sums of all those of the span,
// `stride` apart.
template <class Lanes>
MATQUANT_INLINE inline void add_second(typename Lanes::Sums* sum, int32_t second, const typename Lanes::Sums* seconds,
                                       int64_t stride = 1) {
    if (second != kNoSecondBytes) {
        *sum = Lanes::add(Lanes::shift_left_8(*sum), seconds[second * stride]);
    }
}

}  // namespace
}  // namespace matquant::cpu

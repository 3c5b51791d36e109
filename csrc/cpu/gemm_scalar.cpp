// The kernel in plain C++: the reference for the others, and what serves on machines without them.
#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

template <class T, int64_t size>
struct Array {
    T lane[size];
};

struct Lanes : WordSteps {
    using Codes = Array<uint8_t, kPlaneBytes>;
    using Operand = Codes;
    using Sums = Array<int32_t, kTileRows>;
    using Floats = Array<float, kTileRows>;
    static constexpr int kRows = 1;
    template <int bits>
    static constexpr int kManyTokens = 2;
    template <int bits>
    static constexpr int kFewTokens = 1;
    static constexpr int kChains = 1;

    template <class Result, class Operation>
    static Result each(Operation operation) {
        Result result;
        for (size_t index = 0; index < std::size(result.lane); ++index) {
            result.lane[index] = static_cast<std::remove_reference_t<decltype(result.lane[0])>>(operation(index));
        }
        return result;
    }

    static Codes load_bytes(const uint8_t* source) {
        Codes result;
        std::copy_n(source, kPlaneBytes, result.lane);
        return result;
    }
    static void store_bytes(uint8_t* target, const Codes& bytes) { std::copy_n(bytes.lane, kPlaneBytes, target); }
    template <int count>
    static Codes shift_right(const Codes& bytes) {
        return each<Codes>([&](size_t i) { return count >= 0 ? bytes.lane[i] >> count : bytes.lane[i] << -count; });
    }
    static Codes select(const Codes& bytes, int mask) {
        return each<Codes>([&](size_t i) { return bytes.lane[i] & mask; });
    }
    static Codes merge(const Codes& codes, const Codes& bytes, int mask) {
        return each<Codes>([&](size_t i) { return codes.lane[i] | (bytes.lane[i] & mask); });
    }
    static Operand prepare(const Codes& codes) { return codes; }

    template <int bits>
    static void dot(Sums* sums, const Operand& operand, const uint8_t* step) {
        for (int sum = 0; sum < kSums<bits>; ++sum) {
            int16_t words[kStepColumns];
            std::memcpy(words, step + 8 * sum, sizeof(words));
            for (int row = 0; row < kTileRows; ++row) {
                const uint8_t* codes = operand.lane + row * kStepColumns;
                sums[sum].lane[row] +=
                    codes[0] * words[0] + codes[2] * words[1] + codes[1] * words[2] + codes[3] * words[3];
            }
        }
    }

    static Sums zero_sums() { return {}; }
    static Sums add(const Sums& a, const Sums& b) {
        return each<Sums>([&](size_t i) { return a.lane[i] + b.lane[i]; });
    }
    static Floats to_floats(const Sums& a) {
        return each<Floats>([&](size_t i) { return a.lane[i]; });
    }

    static Floats zero() { return {}; }
    static Floats load(const float* source) {
        return each<Floats>([&](size_t i) { return source[i]; });
    }
    static void store(float* target, const Floats& value) { std::copy_n(value.lane, kTileRows, target); }
    static Floats broadcast(float value) {
        return each<Floats>([&](size_t) { return value; });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return each<Floats>([&](size_t i) { return a.lane[i] * b.lane[i]; });
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](size_t i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
    }

    // Float16 is a float32 with 10 of its 23 bits of fraction and an exponent biased by 15 in place of 127.
    static float from_half(uint16_t half) {
        const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
        const uint32_t magnitude = static_cast<uint32_t>(half & 0x7fff) << 13;
        const bool finite = (half & 0x7c00) != 0x7c00;
        const float value =
            finite ? std::bit_cast<float>(magnitude) * 0x1p112f : std::bit_cast<float>(magnitude | 0x7f800000);
        return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | sign);
    }
    static Floats load_half(const uint16_t* source) {
        return each<Floats>([&](size_t i) { return from_half(source[i]); });
    }

    static Floats load_unsigned(const uint8_t* source) {
        return each<Floats>([&](size_t i) { return source[i]; });
    }
    static Floats load_signed(const uint8_t* source) {
        return each<Floats>([&](size_t i) { return static_cast<int8_t>(source[i]); });
    }

    // To nearest, ties to even.
    static uint16_t to_half(float value) {
        const uint32_t bits = std::bit_cast<uint32_t>(value);
        const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
        const float magnitude = std::bit_cast<float>(bits & 0x7fffffff);
        if (magnitude != magnitude) {
            return sign | 0x7e00;
        }
        if (magnitude >= 65520.0f) {  // half a unit past the largest
            return sign | 0x7c00;
        }
        // Adding a number whose last bit is the last of the result's rounds to it.
        const uint32_t exponent = std::max(std::bit_cast<uint32_t>(magnitude) >> 23, 113u);
        const float rounder = std::bit_cast<float>((exponent + 13) << 23);
        const uint32_t units = std::bit_cast<uint32_t>(magnitude + rounder) - std::bit_cast<uint32_t>(rounder);
        return static_cast<uint16_t>(sign | (((exponent - 113) << 10) + units));
    }
    static void store_half(uint16_t* target, const Floats& value) {
        for (int lane = 0; lane < kTileRows; ++lane) {
            target[lane] = to_half(value.lane[lane]);
        }
    }
};

}  // namespace

const Kernel kScalarKernel = KernelOf<Lanes>::kKernel;

}  // namespace matquant::cpu

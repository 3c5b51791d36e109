// The kernel in plain C++: the reference for the others, and what serves on machines without them.
#include <bit>

#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

struct ScalarLanes {
    struct Floats {
        float lane[kTileRows];
    };
    static constexpr int kTiles = 1;
    static constexpr int kRows = 2;

    static Floats load(const float* source) {
        Floats result;
        std::copy_n(source, kTileRows, result.lane);
        return result;
    }
    static void store(float* target, const Floats& value) { std::copy_n(value.lane, kTileRows, target); }
    static Floats broadcast(float value) {
        Floats result;
        std::fill_n(result.lane, kTileRows, value);
        return result;
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        Floats result;
        for (int row = 0; row < kTileRows; ++row) {
            result.lane[row] = a.lane[row] * b.lane[row] + c.lane[row];
        }
        return result;
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
        Floats result;
        for (int row = 0; row < kTileRows; ++row) {
            result.lane[row] = from_half(source[row]);
        }
        return result;
    }

    template <int width>
    static void decode(const int64_t* masks, int64_t plane_stride, const Floats& scale, const Floats& offset,
                       Floats* columns) {
        uint64_t planes[width];
        for (int plane = 0; plane < width; ++plane) {
            planes[plane] = static_cast<uint64_t>(masks[plane * plane_stride]);
        }
        for (int column = 0; column < kTileColumns; ++column) {
            for (int row = 0; row < kTileRows; ++row) {
                int code = 0;
                for (int plane = 0; plane < width; ++plane) {
                    code = 2 * code + static_cast<int>(planes[plane] >> (row * kTileColumns + column) & 1);
                }
                columns[column].lane[row] = scale.lane[row] * static_cast<float>(code) + offset.lane[row];
            }
        }
    }
};

}  // namespace

const Kernel kScalarKernel = {ScalarLanes::kTiles, multiply<ScalarLanes>};

}  // namespace matquant::cpu

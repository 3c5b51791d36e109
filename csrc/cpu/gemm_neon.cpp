// The kernel for 64-bit Arm: codes and activations are multiplied as words, which every such processor can.
#include <arm_neon.h>

#include "cpu/gemm_kernel.h"

namespace matquant::cpu {
namespace {

constexpr int kQuarters = 4;  // registers of 16 bytes that hold 16 rows

template <class Register>
struct Registers {
    Register quarter[kQuarters];
};

struct Lanes : WordSteps {
    using Codes = Registers<uint8x16_t>;
    using Floats = Registers<float32x4_t>;
    // Two lanes for each row, added in to_floats: the register `half` of a quarter has its first or last two rows.
    struct Sums {
        int32x4_t quarter[2 * kQuarters];
    };
    static constexpr int kRows = 1;
    template <int bits>
    static constexpr int kManyTokens = bits == 24 ? 1 : 2;
    template <int bits>
    static constexpr int kFewTokens = bits == 24 ? 1 : 2;
    static constexpr int kChains = 1;

    template <class Result, int count = kQuarters, class Operation>
    MATQUANT_INLINE static Result each(Operation operation) {
        Result result;
        repeat<count>([&](auto index) MATQUANT_INLINE { result.quarter[index] = operation(index); });
        return result;
    }

    static Codes load_bytes(const uint8_t* source) {
        return each<Codes>([&](int i) { return vld1q_u8(source + 16 * i); });
    }
    static void store_bytes(uint8_t* target, const Codes& bytes) {
        repeat<kQuarters>([&](auto i) MATQUANT_INLINE { vst1q_u8(target + 16 * i, bytes.quarter[i]); });
    }
    template <int count>
    static Codes shift_right(const Codes& bytes) {
        return each<Codes>([&](int i) {
            if constexpr (count == 0) {
                return bytes.quarter[i];
            } else if constexpr (count > 0) {
                return vshrq_n_u8(bytes.quarter[i], count);
            } else {
                return vshlq_n_u8(bytes.quarter[i], -count);
            }
        });
    }
    static Codes select(const Codes& bytes, int mask) {
        return each<Codes>([&](int i) { return vandq_u8(bytes.quarter[i], vdupq_n_u8(static_cast<uint8_t>(mask))); });
    }
    static Codes merge(const Codes& codes, const Codes& bytes, int mask) {
        const uint8x16_t masks = vdupq_n_u8(static_cast<uint8_t>(mask));
        return each<Codes>([&](int i) { return vbslq_u8(masks, bytes.quarter[i], codes.quarter[i]); });
    }

    struct Operand {
        int16x8_t even[kQuarters], odd[kQuarters];  // columns 0 and 2 of each row, columns 1 and 3
    };
    static Operand prepare(const Codes& codes) {
        Operand result;
        repeat<kQuarters>([&](auto i) MATQUANT_INLINE {
            const uint16x8_t words = vreinterpretq_u16_u8(codes.quarter[i]);
            result.even[i] = vreinterpretq_s16_u16(vandq_u16(words, vdupq_n_u16(0xff)));
            result.odd[i] = vreinterpretq_s16_u16(vshrq_n_u16(words, 8));
        });
        return result;
    }
    template <int bits>
    static void dot(Sums* sums, const Operand& operand, const uint8_t* step) {
        repeat<kSums<bits>>([&](auto sum) MATQUANT_INLINE {
            int16_t words[kStepColumns];
            std::memcpy(words, step + 8 * sum, sizeof(words));
            const int16x4_t first = vld1_s16(words);
            const int16x8_t even = vreinterpretq_s16_s32(vdupq_lane_s32(vreinterpret_s32_s16(first), 0));
            const int16x8_t odd = vreinterpretq_s16_s32(vdupq_lane_s32(vreinterpret_s32_s16(first), 1));
            repeat<kQuarters>([&](auto i) MATQUANT_INLINE {
                int32x4_t& low = sums[sum].quarter[2 * i];
                int32x4_t& high = sums[sum].quarter[2 * i + 1];
                low = vmlal_s16(low, vget_low_s16(operand.even[i]), vget_low_s16(even));
                low = vmlal_s16(low, vget_low_s16(operand.odd[i]), vget_low_s16(odd));
                high = vmlal_high_s16(high, operand.even[i], even);
                high = vmlal_high_s16(high, operand.odd[i], odd);
            });
        });
    }

    static Sums zero_sums() {
        return each<Sums, 2 * kQuarters>([](int) { return vdupq_n_s32(0); });
    }
    static Sums add(const Sums& a, const Sums& b) {
        return each<Sums, 2 * kQuarters>([&](int i) { return vaddq_s32(a.quarter[i], b.quarter[i]); });
    }
    static Floats to_floats(const Sums& a) {
        return each<Floats>([&](int i) { return vcvtq_f32_s32(vpaddq_s32(a.quarter[2 * i], a.quarter[2 * i + 1])); });
    }

    static Floats zero() { return broadcast(0.0f); }
    static Floats load(const float* source) {
        return each<Floats>([&](int i) { return vld1q_f32(source + 4 * i); });
    }
    static void store(float* target, const Floats& value) {
        repeat<kQuarters>([&](auto i) MATQUANT_INLINE { vst1q_f32(target + 4 * i, value.quarter[i]); });
    }
    static Floats broadcast(float value) {
        return each<Floats>([&](int) { return vdupq_n_f32(value); });
    }
    static Floats multiply(const Floats& a, const Floats& b) {
        return each<Floats>([&](int i) { return vmulq_f32(a.quarter[i], b.quarter[i]); });
    }
    static Floats multiply_add(const Floats& a, const Floats& b, const Floats& c) {
        return each<Floats>([&](int i) { return vfmaq_f32(c.quarter[i], a.quarter[i], b.quarter[i]); });
    }
    static Floats load_half(const uint16_t* source) {
        return each<Floats>([&](int i) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(source + 4 * i))); });
    }
    static Floats load_unsigned(const uint8_t* source) {
        const uint8x16_t bytes = vld1q_u8(source);
        const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_high_u8(bytes);
        return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))), vcvtq_f32_u32(vmovl_high_u16(low)),
                vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))), vcvtq_f32_u32(vmovl_high_u16(high))};
    }
    static Floats load_signed(const uint8_t* source) {
        const int8x16_t bytes = vreinterpretq_s8_u8(vld1q_u8(source));
        const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_high_s8(bytes);
        return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))};
    }
    static void store_half(uint16_t* target, const Floats& value) {
        repeat<kQuarters>([&](auto i) MATQUANT_INLINE {
            vst1_u16(target + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(value.quarter[i])));
        });
    }
};

}  // namespace

const Kernel kNeonKernel = KernelOf<Lanes>::kKernel;

}  // namespace matquant::cpu

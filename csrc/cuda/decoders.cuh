// The decoders of a lane's rows: what a group's give in a product, what they give for one weight.
//
// Weights are scale * c + offset (float16), or scale * (c - middle) + centre, with scale and centre whole multiples of
// two steps that a row has (int8), or such a scale times the level that a codebook gives a code.
#pragma once

#include "cuda/shape.cuh"

namespace matquant::cuda {

// Bytes of the decoders of a row of tiles.
template <DecoderForm form>
__device__ uint32_t row_bytes(const Shape& shape) {
    return step_bytes(form) + shape.groups * group_bytes(form);
}

// The middle of a width's codes.
template <int width>
constexpr float kMiddle = ((1 << width) - 1) / 2.0f;

// What centres are more in memory, so that they have no sign.
constexpr float kCentreBias = 128.0f;

// One instruction, and none of the integer pipe: but only of bytes without a sign, and only if it is put this way.
__device__ inline float float_of_byte(uint32_t word, int index) {
    uint32_t bits;
    asm("bfe.u32 %0, %1, %2, 8;" : "=r"(bits) : "r"(word), "r"(8 * index));
    return __uint2float_rn(bits);
}

// Those of one group, of rows g and g + 8 of each row tile; `memory` is what the lanes of row g read.
template <DecoderForm form>
class GroupDecoders;

template <>
class GroupDecoders<DecoderForm::kFloat16> {
  public:
    __device__ void load(const uint8_t* memory) {
        unpack(*reinterpret_cast<const uint4*>(memory), scales_);
        unpack(*reinterpret_cast<const uint4*>(memory + 16), offsets_);
    }
    __device__ float2 scale(int row_tile) const { return __half22float2(scales_[row_tile]); }
    __device__ float2 addend(int row_tile) const { return __half22float2(offsets_[row_tile]); }

  private:
    __device__ static void unpack(const uint4& run, __half2 (&values)[kRowTiles]) {
        const uint32_t words[4] = {run.x, run.y, run.z, run.w};
#pragma unroll
        for (int index = 0; index < kRowTiles; ++index) {
            values[index] = *reinterpret_cast<const __half2*>(&words[index]);
        }
    }

    __half2 scales_[kRowTiles], offsets_[kRowTiles];
};

template <>
class GroupDecoders<DecoderForm::kInt8> {
  public:
    __device__ void load(const uint8_t* memory) {
        const uint4 run = *reinterpret_cast<const uint4*>(memory);
        words_[0] = run.x;
        words_[1] = run.y;
        words_[2] = run.z;
        words_[3] = run.w;
    }
    // Multiples of the rows' steps.
    __device__ float2 scale(int row_tile) const {
        return {byte(row_tile / 2, row_tile % 2 * 2), byte(row_tile / 2, row_tile % 2 * 2 + 1)};
    }
    __device__ float2 addend(int row_tile) const {
        const int word = 2 + row_tile / 2, first = row_tile % 2 * 2;
        return {byte(word, first) - kCentreBias, byte(word, first + 1) - kCentreBias};
    }

  private:
    __device__ float byte(int word, int index) const { return float_of_byte(words_[word], index); }

    uint32_t words_[4];
};

// Scales alone, those of codebooks.
template <>
class GroupDecoders<DecoderForm::kCodebook> {
  public:
    __device__ void load(const uint8_t* memory) {
        const uint2 run = __ldg(reinterpret_cast<const uint2*>(memory));
        words_[0] = run.x;
        words_[1] = run.y;
    }
    // Multiples of the rows' steps.
    __device__ float2 scale(int row_tile) const {
        return {float_of_byte(words_[row_tile / 2], row_tile % 2 * 2),
                float_of_byte(words_[row_tile / 2], row_tile % 2 * 2 + 1)};
    }

  private:
    uint32_t words_[2];
};

// The steps of decoders in int8, of rows g and g + 8 of a row tile.
struct RowSteps {
    float2 scale, centre;

    // Not to be kept in registers from loop to loop, where there are none to spare: hence volatile. `memory` is where
    // the steps of a row of tiles begin.
    __device__ RowSteps(const uint8_t* memory, int g, int row_tile) {
        uint32_t words[2];
        asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                     : "=r"(words[0]), "=r"(words[1])
                     : "l"(memory + (g * kRowTiles + row_tile) * 8));
        scale = {__uint_as_float(words[0] << 16), __uint_as_float(words[1] << 16)};
        centre = {__uint_as_float(words[0] & 0xffff0000), __uint_as_float(words[1] & 0xffff0000)};
    }
};

// The steps of a codebook's scales, of rows g and g + 8 of a row tile; `memory` is where a row of tiles begins.
__device__ inline float2 scale_steps(const uint8_t* memory, int g, int row_tile) {
    const uint32_t word = __ldg(reinterpret_cast<const uint32_t*>(memory) + g * kRowTiles + row_tile);
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000)};
}

__device__ inline float2 multiply(const float2& a, const float2& b) { return {a.x * b.x, a.y * b.y}; }

}  // namespace matquant::cuda

// How a code becomes a weight, see vllm_matquant/checkpoint/decoder.py. Needs no torch.
#pragma once

#ifdef __CUDACC__
#define MATQUANT_HOST_DEVICE __host__ __device__
#else
#define MATQUANT_HOST_DEVICE
#endif

namespace matquant {

constexpr int kMinWidth = 2;
constexpr int kMaxWidth = 8;

// How the decoders of a width are stored: weight = scale * code + offset, for each row and group. In float16 both are
// stored as they are. In int8 scale and centre are codes of 8 bits, unsigned and signed, times a bfloat16 step of the
// row; the centre is the value at the middle of the codes, so that offset = centre - (2^width - 1) / 2 * scale, rounded
// once to float32.
enum class DecoderForm { kFloat16, kInt8 };

// The decoders of a weight: of affine-int8 those of wide slices are in float16.
enum class DecoderKind { kAffineFloat16, kAffineInt8 };

constexpr int kWidestInt8 = 4;

MATQUANT_HOST_DEVICE constexpr DecoderForm form_of(DecoderKind kind, int width) {
    return kind == DecoderKind::kAffineInt8 && width <= kWidestInt8 ? DecoderForm::kInt8 : DecoderForm::kFloat16;
}

}  // namespace matquant

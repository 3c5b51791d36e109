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
// once to float32. A codebook (vllm_matquant/checkpoint/codebook.py) has no such pair: weight = scale * level.
enum class DecoderForm { kFloat16, kInt8, kCodebook };

// The decoders of a weight: of affine-int8 those of wide slices are in float16.
enum class DecoderKind { kAffineFloat16, kAffineInt8, kCodebook };

constexpr int kWidestInt8 = 4;

// A codebook: of each 16 columns, those that are the same modulo four share an index, which is their codes' two top
// bits, the first column's in the lowest ones: it is a byte of the base field as tiles have it (cpu/layout.h). The
// lower six bits are the number of an entry; the seventh changes the signs of its last two places, the eighth of the
// first two. It consists of planes, [64 entries, 4 places] bytes each: a level, and an increment for each further bit
// of a code. Up to this width, the size of a weight's level is plane 0 - 128 and its increments. Wider ones have a
// level and increments of the bits up to kCoarseBits first, and then a level, again with 128 to be taken off, and
// increments of all bits, which count sixteenths. What is added up in bytes is from 1 to 255, so that 256 less it is
// the other sign's.
constexpr int kWidestWhole = 4;
constexpr int kCoarseBits = 6;
constexpr float kFineUnit = 1.0f / 16;
constexpr int kEntries = 64;
constexpr int kIndices = 4 * kEntries;
constexpr int kPlaces = 4;
constexpr int kEntryPlaneBytes = kEntries * kPlaces;
constexpr int kFirstHalfSign = 128, kLastHalfSign = 64;  // bits of an index
constexpr float kZeroLevel = 128.0f;                     // the byte of level 0

// Whether an index changes the sign of a place.
MATQUANT_HOST_DEVICE constexpr bool changes_sign(int index, int place) {
    return (index & (place < kPlaces / 2 ? kFirstHalfSign : kLastHalfSign)) != 0;
}

// Bits of a width's codes that the first planes are looked up for, and how many planes these are.
MATQUANT_HOST_DEVICE constexpr int coarse_bits(int width) { return width < kCoarseBits ? width : kCoarseBits; }
MATQUANT_HOST_DEVICE constexpr int coarse_planes(int width) { return coarse_bits(width) - 1; }

MATQUANT_HOST_DEVICE constexpr int codebook_planes(int width) {
    return width - 1 + (width > kWidestWhole ? coarse_planes(width) : 0);
}

MATQUANT_HOST_DEVICE constexpr DecoderForm form_of(DecoderKind kind, int width) {
    if (kind == DecoderKind::kCodebook) {
        return DecoderForm::kCodebook;
    }
    return kind == DecoderKind::kAffineInt8 && width <= kWidestInt8 ? DecoderForm::kInt8 : DecoderForm::kFloat16;
}

}  // namespace matquant

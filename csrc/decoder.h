// How a code becomes a weight, see vllm_matquant/checkpoint/decoder.py. Needs no torch.
#pragma once

namespace matquant {

constexpr int kMinWidth = 2;
constexpr int kMaxWidth = 8;

// Affine: weight = scale * code + offset, for each row and group. In float16 both are stored as they are. In int8 scale
// and centre are codes of 8 bits, unsigned and signed, times a bfloat16 step of the row; the centre is the value at the
// middle of the codes, so that offset = centre - (2^width - 1) / 2 * scale, rounded once to float32.
enum class DecoderKind { kAffineFloat16, kAffineInt8 };

}  // namespace matquant

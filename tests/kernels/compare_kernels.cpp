// Multiplies random layers with every kernel of this processor's architecture and compares the bytes with those of the
// scalar kernel. Needs no torch, so that it can be built for other architectures and with sanitizers.
//
// Buffers have exactly the size that they need: a sanitizer sees every access past them.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/second_bytes.h"

using namespace matquant;
using namespace matquant::cpu;

namespace {

struct Named {
    const char* name;
    const Kernel& kernel;
};

std::vector<Named> other_kernels() {
    std::vector<Named> kernels;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        kernels.push_back({"avx2", kAvx2Kernel});
    }
    if (__builtin_cpu_supports("avxvnni")) {
        kernels.push_back({"avx2_vnni", kAvx2VnniKernel});
    }
    if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
        kernels.push_back({"avx512", kAvx512Kernel});
    }
    if (__builtin_cpu_supports("avx512vnni")) {
        kernels.push_back({"avx512_vnni", kAvx512VnniKernel});
    }
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) {
        kernels.push_back({"avx512_vbmi", kAvx512VbmiKernel});
        kernels.push_back({"amx", kAmxKernel});
    }
#elif defined(__aarch64__)
    kernels.push_back({"neon", kNeonKernel});
#endif
    return kernels;
}

struct Case {
    int64_t outputs, columns, group_size, tokens;
    int width, activation_bits;
    float outlier;
    bool paired;
    DecoderKind decoder_kind;
    Element element;
};

class Layer {
  public:
    explicit Layer(const Case& shape)
        : case_(shape), form_(form_of(shape.decoder_kind, shape.width)), rows_(ceil_div(shape.outputs, kTileRows)) {
        const int64_t tiles = ceil_div(shape.columns, kTileColumns);
        groups_ = ceil_div(shape.columns, shape.group_size);
        row_bytes_ = tiles * kPlaneBytes;
        planes_.resize(shape.width * rows_ * row_bytes_);
        for (uint8_t& byte : planes_) {
            byte = static_cast<uint8_t>(random_());
        }
        decoders_.resize(rows_ * decoder_bytes(form_, groups_));
        fill_decoders();
        if (form_ == DecoderForm::kCodebook) {
            fill_codebook();
        }
        input_ = elements(shape.tokens * shape.columns);
        bias_ = elements(shape.outputs);
    }

    std::vector<uint8_t> multiply(const Kernel& kernel) const {
        const Span past = count_spans(case_.columns, case_.group_size);
        const int64_t spans = past.index(), chunk_bytes = kernel.chunk_bytes(case_.activation_bits);
        std::vector<uint8_t> activations((past.chunk() * case_.tokens + kSpareTokens) * chunk_bytes);
        std::vector<uint8_t> second_bytes(activations.size());
        std::vector<int32_t> second_counts(spans);
        std::vector<Factor> factors(spans * case_.tokens);
        std::vector<uint8_t> output(case_.tokens * case_.outputs * element_size());
        const Product product = {.columns = case_.columns,
                                 .group_size = case_.group_size,
                                 .plane_stride = rows_ * row_bytes_,
                                 .paired = case_.paired,
                                 .decoder_kind = case_.decoder_kind,
                                 .activation_bits = case_.activation_bits,
                                 .outlier = case_.outlier,
                                 .element = case_.element,
                                 .tokens = case_.tokens,
                                 .input = input_.data(),
                                 .activations = activations.data(),
                                 .second_bytes = second_bytes.data(),
                                 .second_counts = second_counts.data(),
                                 .factors = factors.data(),
                                 .bias = bias_.data(),
                                 .output = output.data(),
                                 .output_stride = case_.outputs};
        kernel.pack(product, 0, case_.tokens);
        gather_second_bytes(product, chunk_bytes, 0, spans);
        std::vector<TileRow> tile_rows;
        for (int64_t row = 0; row < rows_; ++row) {
            const int64_t first = row * kTileRows;
            tile_rows.push_back({.pairs = planes_.data() + 2 * row * row_bytes_,
                                 .planes = planes_.data() + row * row_bytes_,
                                 .decoders = decoders_.data() + row * decoder_bytes(form_, groups_),
                                 .codebook = codebook_.data(),
                                 .width = case_.width,
                                 .first = first,
                                 .count = std::min(kTileRows, case_.outputs - first)});
        }
        kernel.multiply(product, tile_rows.data(), rows_);
        return output;
    }

  private:
    int64_t element_size() const { return case_.element == Element::kFloat ? 4 : 2; }

    // A sign, an exponent around 1 and a random fraction.
    uint16_t half() { return static_cast<uint16_t>((random_() & 0x83ff) | (12 + random_() % 6) << 10); }

    void fill_decoders() {
        const int64_t row_bytes = decoder_bytes(form_, groups_);
        for (size_t byte = 0; byte < decoders_.size(); byte += 2) {
            // Codes of 8 bits are any bytes, their steps are the upper halves of floats around 1.
            const int64_t steps = form_ == DecoderForm::kInt8       ? 4 * kTileRows
                                  : form_ == DecoderForm::kCodebook ? 2 * kTileRows
                                                                    : 0;
            const bool step = static_cast<int64_t>(byte) % row_bytes < steps;
            const float value = std::exp2(std::normal_distribution<float>()(random_));
            const uint16_t bits = step                             ? bfloat16(value)
                                  : form_ == DecoderForm::kFloat16 ? half()
                                                                   : static_cast<uint16_t>(random_());
            std::memcpy(decoders_.data() + byte, &bits, 2);
        }
    }

    // Levels from 1 up that with their increments add up to no more than a byte holds, place by place and entry by
    // entry.
    void fill_codebook() {
        codebook_.resize(codebook_planes(case_.width) * kEntryPlaneBytes);
        const int whole = coarse_planes(case_.width), planes = codebook_planes(case_.width);
        for (int64_t at = 0; at < kEntryPlaneBytes; ++at) {
            int left = 0;
            for (int plane = 0; plane < planes; ++plane) {
                const bool is_level = plane == 0 || plane == whole;
                left = is_level ? 255 : left;
                const int byte = static_cast<int>(is_level ? 1 + random_() % left : random_() % (left + 1));
                codebook_[plane * kEntryPlaneBytes + at] = static_cast<uint8_t>(byte);
                left -= byte;
            }
        }
    }

    static uint16_t bfloat16(float value) {
        uint16_t bits;
        std::memcpy(&bits, reinterpret_cast<const uint8_t*>(&value) + 2, 2);
        return bits;
    }

    std::vector<uint8_t> elements(int64_t count) {
        std::vector<uint8_t> bytes(count * element_size());
        for (int64_t index = 0; index < count; ++index) {
            uint8_t* target = bytes.data() + index * element_size();
            const float value = std::normal_distribution<float>()(random_);
            const uint16_t bits = half();
            switch (case_.element) {
                case Element::kFloat:
                    std::memcpy(target, &value, 4);
                    break;
                case Element::kHalf:
                    std::memcpy(target, &bits, 2);
                    break;
                case Element::kBFloat16: {
                    const uint16_t upper = bfloat16(value);
                    std::memcpy(target, &upper, 2);
                    break;
                }
            }
        }
        return bytes;
    }

    std::mt19937 random_{1};
    Case case_;
    DecoderForm form_;
    int64_t rows_, groups_, row_bytes_;
    std::vector<uint8_t> planes_;
    std::vector<uint8_t> decoders_;
    std::vector<uint8_t> codebook_;
    std::vector<uint8_t> input_, bias_;
};

// Multiplies with every kernel.
class Comparison {
  public:
    void compare(const Case& shape) {
        const Layer layer(shape);
        const std::vector<uint8_t> expected = layer.multiply(kScalarKernel);
        for (const auto& [name, kernel] : kernels_) {
            ++compared_;
            if (layer.multiply(kernel) != expected) {
                ++different_;
                std::printf(
                    "%s: %d x %d, group size %d, %d tokens, %d bits, activations of %d bits, decoders of kind %d\n",
                    name, int(shape.outputs), int(shape.columns), int(shape.group_size), int(shape.tokens), shape.width,
                    shape.activation_bits, int(shape.decoder_kind));
            }
        }
    }

    bool report() const {
        std::string names;
        for (const auto& [name, kernel] : kernels_) {
            names += std::string(" ") + name;
        }
        std::printf("compared %d products of:%s\n", compared_, names.c_str());
        return different_ == 0 && compared_ > 0;
    }

  private:
    std::vector<Named> kernels_ = other_kernels();
    int compared_ = 0, different_ = 0;
};

}  // namespace

int main() {
    const int64_t shapes[][3] = {{1, 8, 8},     {33, 9, 4},     {15, 36, 12},  {16, 64, 64},
                                 {52, 130, 32}, {20, 300, 300}, {77, 416, 96}, {48, 7, 512}};
    constexpr float kNever = std::numeric_limits<float>::infinity();
    const std::pair<int, float> roundings[] = {{8, kNever}, {8, 1.2f}, {16, kNever}, {24, kNever}};
    const int64_t tokens_of[] = {1, 2, 3, 4, 7, 8, 9, 13, 31, 33};
    Comparison comparison;
    int turn = 0;
    for (const auto& [outputs, columns, group_size] : shapes) {
        // Each number of tokens meets every third shape, of whole tiles at least one.
        ++turn;
        for (int width = kMinWidth; width <= kMaxWidth; ++width) {
            for (const auto& [bits, outlier] : roundings) {
                if (outlier != kNever && width > kMostWidthOf8Bits) {
                    continue;
                }
                for (size_t index = (turn + width) % 3; index < std::size(tokens_of); index += 3) {
                    const int64_t tokens = tokens_of[index];
                    const Element element = static_cast<Element>((tokens + width) % 3);
                    const bool paired = (tokens + bits / 8) % 2 != 0;
                    for (const DecoderKind kind :
                         {DecoderKind::kAffineFloat16, DecoderKind::kAffineInt8, DecoderKind::kCodebook}) {
                        comparison.compare(
                            {outputs, columns, group_size, tokens, width, bits, outlier, paired, kind, element});
                    }
                }
            }
        }
    }
    // More activations than the second cache holds, so that rows share panels, and more rows than share one; then many
    // tokens of whose activations it holds all.
    comparison.compare(
        {300, 1160, 32, kBlockTokens, 3, 16, kNever, true, DecoderKind::kAffineInt8, Element::kBFloat16});
    comparison.compare({70, 2120, 32, kBlockTokens, 3, 8, 1.0f, true, DecoderKind::kAffineInt8, Element::kBFloat16});
    comparison.compare({70, 1100, 1100, 300, 6, 8, kNever, false, DecoderKind::kAffineInt8, Element::kHalf});
    comparison.compare({70, 1160, 32, kBlockTokens, 6, 16, kNever, true, DecoderKind::kCodebook, Element::kBFloat16});
    comparison.compare({70, 1100, 1100, 300, 3, 8, 1.0f, false, DecoderKind::kCodebook, Element::kHalf});
    return comparison.report() ? 0 : 1;
}

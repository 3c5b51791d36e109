// The product on the CPU, as its parts see it: linear.cpp finds the weight and divides the work; a kernel per
// instruction set, chosen once at run time, packs the activations, multiplies and writes the output.
//
// Activations are rounded to fixed point, a scale for each token and span of at most 128 columns of one group, so
// that a span's products are sums of integers (and where they take 8 bits, a span with outliers may take 16):
//
//     sum_k x_k (scale c_k + offset)  =  s (scale sum_k q_k c_k + offset sum_k q_k),     x_k = s q_k
//
// These sums are exact, and spans are added in order in float32: a result's bytes depend neither on the instruction
// set nor on the number of threads, nor on what else is multiplied with it.
//
// This header is compiled with the flags of several instruction sets: whatever it defines is in an anonymous namespace,
// for the linker merges functions of the same name, and would give the baseline code instructions that the machine may
// lack.
#pragma once

#include <cstdint>

#include "cpu/layout.h"

namespace matquant::cpu {

// The most columns whose products are summed as integers: codes of 8 bits and activations of 16 stay below 2^31.
constexpr int64_t kSpanColumns = 128;

// Packed activations lie in chunks: these columns of each token. A span begins a chunk, and fills it up with zeros.
constexpr int64_t kChunkColumns = 64;
constexpr int64_t kChunkSteps = kChunkColumns / kStepColumns;

// Tokens that are multiplied at once: bounds the scratch memory, and makes the time to unpack small beside the
// products.
constexpr int64_t kBlockTokens = 512;

// Tokens past the last for which there must be memory behind the packed activations: a kernel may read them, and makes
// no use of them.
constexpr int64_t kSpareTokens = 15;

enum class Element { kBFloat16, kHalf, kFloat };

// The widest slices whose activations take 8 bits by default, and that may be multiplied with second bytes.
constexpr int kMostWidthOf8Bits = 4;

// What a token's span is multiplied with: its activations are `scale` times their integers, and these add up to
// `sum` after scaling.
struct Factor {
    float scale;
    float sum;
    int32_t second;  // where the span's second bytes are among those of its tokens, or kNoSecondBytes
};
constexpr int32_t kNoSecondBytes = -1;

// One multiplication of a block of tokens, by all threads.
struct Product {
    int64_t columns;
    int64_t group_size;
    int64_t plane_stride;  // bytes of a plane
    bool paired;           // planes past the base field too, see layout.h
    DecoderKind decoder_kind;
    int activation_bits;  // 8, 16 or 24
    // With 8 bits: a span has 16 if its largest activation is more than so many times the average of the largest of all
    // the token's spans. Infinity past kMostWidthOf8Bits.
    float outlier;
    Element element;  // of input, output and bias
    int64_t tokens;
    const void* input;       // [tokens, columns]
    uint8_t* activations;    // packed by the kernel: [chunks, tokens, bytes of a chunk]
    uint8_t* second_bytes;   // with 8 bits, of spans that have 16: [chunks, up to tokens, bytes of a chunk]
    int32_t* second_counts;  // [spans], of tokens that have such bytes
    Factor* factors;         // [spans, tokens]
    const void* bias;        // [rows of all tiles] or nullptr
    void* output;            // [tokens, output_stride]
    int64_t output_stride;
};

// A row of tiles: 16 rows of weights, all columns.
struct TileRow {
    const uint8_t* pairs;     // [tiles, 2, 64] of the base field, and 2 * plane_stride bytes on of the next pair
    const uint8_t* planes;    // [tiles, 64] of plane 0 if it were not in a pair, and plane_stride bytes on of plane 1
    const uint8_t* decoders;  // for the active width, see decoder_bytes in layout.h
    const uint8_t* codebook;  // of the partition, [planes, places, entries]; nullptr without one
    int width;                // active width: bits that are read
    int64_t first;            // output
    int64_t count;            // outputs, at most 16
};

namespace {

// A span, and the way to the next. Spans are what is left of the groups when they are cut every kSpanColumns columns:
// the columns [begin, end) have one decoder.
class Span {
  public:
    Span(int64_t columns, int64_t group_size) : columns_(columns), group_size_(group_size), group_end_(group_size) {
        find_end();
    }

    int64_t begin() const { return begin_; }
    int64_t end() const { return end_; }
    int64_t group() const { return group_; }
    int64_t index() const { return index_; }  // among all spans
    int64_t chunk() const { return chunk_; }  // its first
    int64_t chunks() const { return ceil_div(end_ - begin_, kChunkColumns); }
    bool past_last() const { return begin_ == columns_; }

    void advance() {
        chunk_ += chunks();
        ++index_;
        if (end_ == group_end_) {
            ++group_;
            group_end_ += group_size_;
        }
        begin_ = end_;
        find_end();
    }

  private:
    void find_end() {
        const int64_t cut = (begin_ + kSpanColumns) & -kSpanColumns;
        const int64_t end = group_end_ < cut ? group_end_ : cut;
        end_ = end < columns_ ? end : columns_;
    }

    int64_t columns_, group_size_, group_end_;
    int64_t begin_ = 0, end_ = 0, group_ = 0, index_ = 0, chunk_ = 0;
};

// The span past the last: its index is their number, its chunk that of all chunks.
inline Span count_spans(int64_t columns, int64_t group_size) {
    Span span(columns, group_size);
    while (!span.past_last()) {
        span.advance();
    }
    return span;
}

}  // namespace

struct Kernel {
    // Bytes of a token's packed activations of one chunk.
    int64_t (*chunk_bytes)(int activation_bits);
    // Packs the tokens [begin, end). Second bytes are left at the place of their token.
    void (*pack)(const Product& product, int64_t begin, int64_t end);
    // Multiplies all tokens with `count` rows of tiles and writes their outputs.
    void (*multiply)(const Product& product, const TileRow* rows, int64_t count);
};

extern const Kernel kScalarKernel;
#if defined(__x86_64__)
extern const Kernel kAvx2Kernel;
extern const Kernel kAvx2VnniKernel;
extern const Kernel kAvx512Kernel;
extern const Kernel kAvx512VnniKernel;
extern const Kernel kAvx512VbmiKernel;
extern const Kernel kAmxKernel;
#elif defined(__aarch64__)
extern const Kernel kNeonKernel;
#endif

}  // namespace matquant::cpu

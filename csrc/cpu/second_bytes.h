// The second bytes of spans that take 16 bits where others take 8, once all tokens are packed.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"

namespace matquant::cpu {
namespace {

// Puts the second bytes of the tokens of each span in [first, last) side by side, counts them, and has the factors say
// where they are. `bytes` are those of a chunk.
inline void gather_second_bytes(const Product& product, int64_t bytes, int64_t first, int64_t last) {
    for (Span span(product.columns, product.group_size); span.index() < last; span.advance()) {
        if (span.index() < first) {
            continue;
        }
        Factor* factors = product.factors + span.index() * product.tokens;
        int32_t count = 0;
        for (int64_t token = 0; token < product.tokens; ++token) {
            if (factors[token].second == kNoSecondBytes) {
                continue;
            }
            for (int64_t chunk = span.chunk(); chunk < span.chunk() + span.chunks(); ++chunk) {
                uint8_t* second_bytes = product.second_bytes + chunk * product.tokens * bytes;
                std::memmove(second_bytes + count * bytes, second_bytes + token * bytes, bytes);
            }
            factors[token].second = count++;
        }
        product.second_counts[span.index()] = count;
    }
}

}  // namespace
}  // namespace matquant::cpu

// The second bytes of spans that take 16 bits where others take 8, once all tokens are packed.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/gemm.h"

namespace matquant::cpu {
namespace {

// Puts the second bytes of the tokens of each span in [begin, end) side by side, counts them, and has the factors say
// where they are. `bytes` are those of a span.
inline void gather_second_bytes(const Product& product, int64_t bytes, int64_t begin, int64_t end) {
    for (int64_t span = begin; span < end; ++span) {
        uint8_t* second_bytes = product.second_bytes + span * product.tokens * bytes;
        int32_t count = 0;
        for (int64_t token = 0; token < product.tokens; ++token) {
            int32_t& second = product.factors[span * product.tokens + token].second;
            if (second != kNoSecondBytes) {
                std::memmove(second_bytes + count * bytes, second_bytes + token * bytes, bytes);
                second = count++;
            }
        }
        product.second_counts[span] = count;
    }
}

}  // namespace
}  // namespace matquant::cpu

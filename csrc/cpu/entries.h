// The levels that a codebook gives codes, place by place.
//
// The base field of a tile has in each byte the two top bits of one column in four steps, which is the index of the
// four of these columns: its entry in the lower six bits, and its signs. A step is a place of the fours. So nothing but
// what lies in a byte is needed for it, and what comes out lies where the step's codes would.
//
// Everything is in an anonymous namespace, see gemm.h.
#pragma once

#include <cstdint>
#include <utility>

#include "cpu/gemm.h"
#include "cpu/layout.h"
#include "cpu/steps.h"

namespace matquant::cpu {
namespace {

// For lanes without instructions of their own: looks bytes up by the lower six bits of others, byte by byte.
template <class Lanes>
struct PlainEntries {
    using Codes = typename Lanes::Codes;

    template <class Operation>
    static Codes each(const Codes& a, const Codes& b, Operation operation) {
        alignas(64) uint8_t first[kPlaneBytes], second[kPlaneBytes];
        Lanes::store_bytes(first, a);
        Lanes::store_bytes(second, b);
        for (int64_t byte = 0; byte < kPlaneBytes; ++byte) {
            first[byte] = static_cast<uint8_t>(operation(first[byte], second[byte]));
        }
        return Lanes::load_bytes(first);
    }
    static Codes look_up(const uint8_t* table, const Codes& index) {
        return each(index, index, [&](uint8_t byte, uint8_t) { return table[byte % kEntries]; });
    }
    static Codes keep_where(const Codes& values, const Codes& bytes, int bit) {
        return each(values, bytes, [&](uint8_t value, uint8_t byte) { return (byte & bit) != 0 ? value : 0; });
    }
    static Codes add_bytes(const Codes& a, const Codes& b) {
        return each(a, b, [](uint8_t first, uint8_t second) { return first + second; });
    }
    static Codes negate_where(const Codes& values, const Codes& bytes, int bit) {
        return each(values, bytes, [&](uint8_t value, uint8_t byte) { return (byte & bit) != 0 ? -value : value; });
    }
};

// Where a kernel has instructions for that, its lanes have these functions themselves.
template <class Lanes>
using Entries = std::conditional_t<requires(const uint8_t* table, typename Lanes::Codes index) {
    Lanes::look_up(table, index);
}, Lanes, PlainEntries<Lanes>>;

}  // namespace
}  // namespace matquant::cpu

// The kernel for AVX-512 with VNNI and VBMI: that of VNNI, with look-ups in codebooks by permutations of bytes.
#include "cpu/lanes_vnni_avx512.h"
#include "cpu/places_avx512.h"

namespace matquant::cpu {
namespace {

struct Lanes : VnniLanes {
    static constexpr bool kByPlace = true;
};

void pack(const Product& product, int64_t begin, int64_t end) {
    if (!takes_places(product)) {
        return kAvx512VnniKernel.pack(product, begin, end);
    }
    KernelOf<Lanes>::pack(product, begin, end);
}

void multiply(const Product& product, const TileRow* rows, int64_t count) {
    if (!takes_places(product)) {
        return kAvx512VnniKernel.multiply(product, rows, count);
    }
    KernelOf<Lanes>::with_bits(product.activation_bits,
                               [&](auto bits) { multiply_rows<Lanes, bits, true>(product, rows, count); });
}

}  // namespace

const Kernel kAvx512VbmiKernel = {KernelOf<Lanes>::chunk_bytes, pack, multiply, true};

}  // namespace matquant::cpu

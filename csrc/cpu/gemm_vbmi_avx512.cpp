// The kernel for AVX-512 with VNNI and VBMI: that of VNNI, but for look-ups in codebooks.
#include "cpu/lanes_vbmi_avx512.h"
#include "cpu/lanes_vnni_avx512.h"

namespace matquant::cpu {
namespace {

struct Lanes : VnniLanes {
    static constexpr bool kFastLookUps = VbmiLookUps::kFastLookUps;
    static Codes look_up(const uint8_t* table, Codes index) { return VbmiLookUps::look_up(table, index); }
};

int64_t chunk_bytes(int activation_bits) { return kAvx512VnniKernel.chunk_bytes(activation_bits); }

void pack(const Product& product, int64_t begin, int64_t end) { kAvx512VnniKernel.pack(product, begin, end); }

void multiply(const Product& product, const TileRow* rows, int64_t count) {
    if (product.decoder_kind != DecoderKind::kCodebook) {
        return kAvx512VnniKernel.multiply(product, rows, count);
    }
    KernelOf<Lanes>::with_bits(product.activation_bits,
                               [&](auto bits) { multiply_rows<Lanes, bits, true>(product, rows, count); });
}

}  // namespace

constinit const Kernel kAvx512VbmiKernel = {chunk_bytes, pack, multiply};

}  // namespace matquant::cpu

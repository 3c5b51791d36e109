#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace matquant::cpu {
namespace {

#if defined(__x86_64__)
// Whether there are tile registers and products of bytes, and the system lets this process use them: Linux keeps the
// registers' state only for those that have asked.
bool has_amx() {
#if defined(__linux__)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

Isa choose_isa() {
    const std::vector<Isa> isas = available_isas();
    const char* forced = std::getenv("MATQUANT_CPU_ISA");
    if (forced == nullptr) {
        return isas.back();
    }
    std::string names;
    for (const Isa& isa : isas) {
        if (std::string(forced) == isa.name) {
            return isa;
        }
        names += std::string(names.empty() ? "" : ", ") + isa.name;
    }
    STD_TORCH_CHECK(false, "MATQUANT_CPU_ISA: found \"", forced, "\", expected one that this machine has: ", names);
}

std::string cpu_isa() { return isa_in_use().name; }

std::vector<std::string> cpu_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : available_isas()) {
        names.push_back(isa.name);
    }
    return names;
}

}  // namespace

std::vector<Isa> available_isas() {
    std::vector<Isa> isas = {{"scalar", &kScalarKernel}};
#if defined(__x86_64__)
    // Every machine with AVX2 has F16C, which older compilers cannot ask for.
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return isas;
    }
    isas.push_back({"avx2", &kAvx2Kernel});
    if (__builtin_cpu_supports("avxvnni")) {
        isas.push_back({"avx2_vnni", &kAvx2VnniKernel});
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq")) {
        return isas;
    }
    isas.push_back({"avx512", &kAvx512Kernel});
    if (__builtin_cpu_supports("avx512vnni")) {
        isas.push_back({"avx512_vnni", &kAvx512VnniKernel});
        if (__builtin_cpu_supports("avx512vbmi")) {
            isas.push_back({"avx512_vbmi", &kAvx512VbmiKernel});
            if (has_amx()) {  // no processor has it without VBMI
                isas.push_back({"amx", &kAmxKernel});
            }
        }
    }
#elif defined(__aarch64__)
    isas.push_back({"neon", &kNeonKernel});
#endif
    return isas;
}

const Isa& isa_in_use() {
    static const Isa isa = choose_isa();
    return isa;
}

}  // namespace matquant::cpu

// They take no tensor, so no backend can be read off their arguments.
STABLE_TORCH_LIBRARY_IMPL(matquant, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&matquant::cpu::cpu_isa));
    m.impl("cpu_isas", TORCH_BOX(&matquant::cpu::cpu_isas));
}

#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace r1kernels {

// Whether this processor multiplies bfloat16 in tile registers and the system lets this process have them.
static bool has_tile_registers() {
#if defined(__linux__) && defined(__x86_64__)
    constexpr long kAskForState = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-bf16") && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
    return false;
#endif
}

const char* name(Isa isa) {
    switch (isa) {
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::avx512_bf16: return "avx512_bf16";
        case Isa::amx_bf16: return "amx_bf16";
        default: return "baseline";
    }
}

std::vector<Isa> supported_isas() {
    std::vector<Isa> isas = {Isa::baseline};
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (avx2) isas.push_back(Isa::avx2);
    if (avx512) isas.push_back(Isa::avx512);
    const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (avx512_bf16) isas.push_back(Isa::avx512_bf16);
    if (avx512_bf16 && has_tile_registers()) isas.push_back(Isa::amx_bf16);
#endif
    return isas;
}

static Isa choose() {
    const std::vector<Isa> isas = supported_isas();
    const char* wanted = std::getenv("R1KERNELS_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return isas.back();
    std::string known;
    for (Isa isa : isas) {
        if (std::string(wanted) == name(isa)) return isa;
        known += (known.empty() ? "" : ", ") + std::string(name(isa));
    }
    throw std::runtime_error("R1KERNELS_CPU_ISA: expected one of " + known + " on this processor, got '" + wanted + "'");
}

Isa chosen_isa() {
    static const Isa isa = choose();
    return isa;
}

std::vector<std::string> cpu_features() {
    std::vector<std::string> features;
#if defined(__x86_64__)
    __builtin_cpu_init();
#define R1KERNELS_FEATURE(feature) \
    if (__builtin_cpu_supports(feature)) features.push_back(feature)
    R1KERNELS_FEATURE("avx2");
    R1KERNELS_FEATURE("fma");
    R1KERNELS_FEATURE("f16c");
    R1KERNELS_FEATURE("avx512f");
    R1KERNELS_FEATURE("avx512bw");
    R1KERNELS_FEATURE("avx512vl");
    R1KERNELS_FEATURE("avx512dq");
    R1KERNELS_FEATURE("avx512bf16");
    R1KERNELS_FEATURE("amx-bf16");
#undef R1KERNELS_FEATURE
#endif
    return features;
}

}  // namespace r1kernels

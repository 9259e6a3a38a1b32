// Which instruction set the CPU kernels run with. Every kernel is compiled once for each, in a namespace of that name.
#pragma once

#include <string>
#include <vector>

namespace r1kernels {

enum class Isa { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

const char* name(Isa isa);

// The instruction sets that were built and that this processor has, weakest first; baseline is always there.
std::vector<Isa> supported_isas();

// The strongest supported one, or the one that R1KERNELS_CPU_ISA names. Decided at the first call.
// Throws std::runtime_error where that variable names an unknown or unsupported one.
Isa chosen_isa();

// Features of this processor that matter here, as the compiler names them.
std::vector<std::string> cpu_features();

}  // namespace r1kernels

// The object of one family's kernel table (declared in every instruction set's namespace) for the chosen one.
#if defined(__x86_64__)
#define R1KERNELS_DECLARE_TABLES(type, table)                                    \
    namespace baseline { extern const type table; }                              \
    namespace avx2 { extern const type table; }                                  \
    namespace avx512 { extern const type table; }                                \
    namespace avx512_bf16 { extern const type table; }                           \
    namespace amx_bf16 { extern const type table; }                              \
    inline const type& chosen_##table() {                                        \
        switch (chosen_isa()) {                                                  \
            case Isa::amx_bf16: return amx_bf16::table;                          \
            case Isa::avx512_bf16: return avx512_bf16::table;                    \
            case Isa::avx512: return avx512::table;                              \
            case Isa::avx2: return avx2::table;                                  \
            default: return baseline::table;                                     \
        }                                                                        \
    }
#else
#define R1KERNELS_DECLARE_TABLES(type, table)                                    \
    namespace baseline { extern const type table; }                              \
    inline const type& chosen_##table() { return baseline::table; }
#endif

// A row of a call on the CPU, and its logits: raw as they lie in memory, or shifted, scaled and capped into a buffer.
//
// Included by cpu.cpp alone, once for each instruction set.
#pragma once

#include <cmath>

#include "common/vector.h"
#include "logprob/cpu.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int64_t kBlock = 4096;  // logits; a multiple of kLanes that stays in the first-level cache

struct Row {
    int64_t number, target;  // the target counts from the first column of the call
    int64_t batch, token;
    double inverse_temperature;
    bool ignored;
};

Row row_of(const R1kernelsTokenLogprobs& call, int64_t number) {
    Row row;
    row.number = number;
    row.batch = number / call.tokens;
    row.token = number % call.tokens;
    row.target = call.targets[number] - call.first;
    row.ignored = call.targets[number] == call.ignore_index;
    row.inverse_temperature = 1.0 / (call.temperatures ? call.temperatures[number] : call.temperature);
    return row;
}

template <typename T>
const T* logits_of(const R1kernelsTokenLogprobs& call, const Row& row) {
    return static_cast<const T*>(call.logits) + row.batch * call.batch_stride + row.token * call.token_stride;
}

// Whether the raw logits are the logits.
bool is_plain(const R1kernelsTokenLogprobs& call) {
    return !call.bias && call.logit_scale == 1 && call.softcap == 0;
}

// tanh, within 1.5 units in the last place, and its derivative 1 - tanh^2, which does not cancel where tanh is near 1.
//
// With e = e^-2|u|: tanh|u| = (1 - e) / (1 + e) and 1 - tanh^2 = 4 e / (1 + e)^2. Near 0, where 1 - e cancels, it is
// u + u^3 p(u^2), p the minimax polynomial of degree 4 for |u| <= 0.55 (relative error 1.4e-8).
struct Tanh {
    Floats value, slope;
};

Tanh tanh_of(Floats u) {
    const Floats magnitude = greater(u, -u), squared = u * u;
    const Floats e = exp_negative(magnitude * -2.0f), share = 1.0f / (1.0f + e);
    Floats p = all(-0x1.b13538p-8f);
    p = p * squared + 0x1.5d220ep-6f;
    p = p * squared - 0x1.b9a044p-5f;
    p = p * squared + 0x1.110feap-3f;
    p = p * squared - 0x1.555554p-2f;
    const Floats far = (1.0f - e) / (1.0f + e);
    const Floats near = u + u * (squared * p);
    return {magnitude < 0.55f ? near : (u < 0 ? -far : far), 4.0f * e * share * share};
}

// z and dz / d raw of kLanes logits: z = cap(scale * (raw + bias)).
struct Logit {
    Floats value, slope;
};

Logit logit_of(const R1kernelsTokenLogprobs& call, Floats raw, Floats bias) {
    const Floats u = (raw + bias) * call.logit_scale;
    if (call.softcap == 0) return {u, all(call.logit_scale)};
    const Tanh cap = tanh_of(u / call.softcap);
    return {cap.value * call.softcap, cap.slope * call.logit_scale};
}

// The columns [begin, begin + count) of a row, count <= kBlock, into `logits` and, if not null, their slopes.
template <typename T>
void transform(const R1kernelsTokenLogprobs& call, const T* raw, int64_t begin, int64_t count, float* logits,
               float* slopes) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Logit z = logit_of(call, load(raw + begin + i), call.bias ? load(call.bias + begin + i) : Floats{});
        store(logits + i, z.value);
        if (slopes) store(slopes + i, z.slope);
    }
    if (i < count) {
        const int some = static_cast<int>(count - i);
        const Logit z =
            logit_of(call, load_some(raw + begin + i, some), call.bias ? load_some(call.bias + begin + i, some) : Floats{});
        store_some(logits + i, z.value, some);
        if (slopes) store_some(slopes + i, z.slope, some);
    }
}

// One logit and its slope, with the bits that the vectors give.
template <typename T>
Logit single(const R1kernelsTokenLogprobs& call, const T* raw, int64_t column) {
    const Floats value = load_some(raw + column, 1);
    if (is_plain(call)) return {value, all(1)};
    return logit_of(call, value, call.bias ? all(call.bias[column]) : Floats{});
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA

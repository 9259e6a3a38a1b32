// Hidden states times the rows of the head that were kept, and the gradients, on the CPU (see logprob/call.h).
//
// Every result is summed by one thread in a fixed order, in float32 lanes: bits depend neither on the number of threads nor on
// other tokens.
#pragma once

#include "common/vector.h"
#include "logprob/cpu.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

constexpr int kRegisters = 4;  // vectors that are summed side by side
constexpr int64_t kStride = kRegisters * kLanes;

template <typename T>
float dot(const T* a, const T* b, int64_t count) {
    Floats sums[kRegisters] = {};
    int64_t i = 0;
    for (; i + kStride <= count; i += kStride) {
        for (int r = 0; r < kRegisters; ++r) sums[r] += load(a + i + r * kLanes) * load(b + i + r * kLanes);
    }
    for (; i + kLanes <= count; i += kLanes) sums[0] += load(a + i) * load(b + i);
    double total = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if (i < count) {
        const int some = static_cast<int>(count - i);
        const Floats x = load_some(a + i, some), y = load_some(b + i, some);
        for (int lane = 0; lane < some; ++lane) total += static_cast<double>(x[lane]) * y[lane];
    }
    return static_cast<float>(total);
}

// Columns [begin, begin + vectors * kLanes) of a sum of rows times numbers; next(row, number) gives the terms in turn.
template <int kVectors, typename T, typename Out, typename Terms>
void add_rows(Out* to, int64_t begin, const Terms& terms) {
    Floats sums[kVectors] = {};
    terms([&](const T* row, float number) {
        for (int v = 0; v < kVectors; ++v) sums[v] += load(row + begin + v * kLanes) * number;
    });
    for (int v = 0; v < kVectors; ++v) store(to + begin + v * kLanes, sums[v]);
}

// to (width) = the sum of the terms, each a row (width) of T times a number, rounded once.
template <typename T, typename Out, typename Terms>
void sum_rows(Out* to, int64_t width, const Terms& terms) {
    int64_t i = 0;
    for (; i + 2 * kStride <= width; i += 2 * kStride) add_rows<2 * kRegisters, T>(to, i, terms);
    for (; i + kLanes <= width; i += kLanes) add_rows<1, T>(to, i, terms);
    if (i == width) return;
    const int some = static_cast<int>(width - i);
    Floats sums = {};
    terms([&](const T* row, float number) { sums += load_some(row + i, some) * number; });
    store_some(to + i, sums, some);
}

bool has_row(const R1kernelsKeptProducts& call, int64_t id) {
    return id >= call.first && id < call.first + call.vocabulary;
}

template <typename T>
void products(const R1kernelsKeptProducts& call, float* to, int64_t begin, int64_t end) {
    const T *hidden = static_cast<const T*>(call.hidden), *weight = static_cast<const T*>(call.weight);
    for (int64_t entry = begin; entry < end; ++entry) {
        const int64_t token = call.entry_tokens[entry], id = call.ids[entry];
        to[entry] = 0;
        if (token < 0 || !has_row(call, id)) continue;
        const int64_t row = id - call.first;
        to[entry] = dot(hidden + token * call.width, weight + row * call.width, call.width);
        if (call.bias) to[entry] += call.bias[row];
    }
}

template <typename T, typename Out>
void gradient_of_hidden(const R1kernelsKeptProducts& call, Out* to, int64_t begin, int64_t end) {
    const T* weight = static_cast<const T*>(call.weight);
    for (int64_t token = begin; token < end; ++token) {
        sum_rows<T>(to + token * call.width, call.width, [&](const auto& add) {
            for (int64_t entry = call.offsets[token]; entry < call.offsets[token + 1]; ++entry) {
                if (call.grad[entry] == 0 || !has_row(call, call.ids[entry])) continue;
                add(weight + (call.ids[entry] - call.first) * call.width, call.grad[entry]);
            }
        });
    }
}

// Of the rows of the head whose first entry in the order lies in [begin, end); the others are 0 already.
template <typename T>
void gradient_of_weight(const R1kernelsKeptProducts& call, T* to, float* bias, int64_t begin, int64_t end) {
    const T* hidden = static_cast<const T*>(call.hidden);
    for (int64_t place = begin; place < end; ++place) {
        const int64_t id = call.ids[call.order[place]];
        if (!has_row(call, id) || (place > 0 && call.ids[call.order[place - 1]] == id)) continue;
        int64_t last = place;
        while (last < call.entries && call.ids[call.order[last]] == id) ++last;
        if (to) {
            sum_rows<T>(to + (id - call.first) * call.width, call.width, [&](const auto& add) {
                for (int64_t i = place; i < last; ++i) {
                    const int64_t entry = call.order[i];
                    if (call.grad[entry] != 0) add(hidden + call.entry_tokens[entry] * call.width, call.grad[entry]);
                }
            });
        }
        if (!bias) continue;
        double total = 0;
        for (int64_t i = place; i < last; ++i) total += call.grad[call.order[i]];
        bias[id - call.first] = static_cast<float>(total);
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA

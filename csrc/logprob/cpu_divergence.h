// Divergences of rows on the CPU: the logits of teacher and student side by side, their sums known.
//
// Included by cpu.cpp alone, once for each instruction set.
#pragma once

#include "common/vector_math.h"
#include "logprob/cpu_rows.h"
#include "logprob/divergence_terms.h"  // after the functions that it is built on

namespace r1kernels::R1KERNELS_ISA {

namespace {

// A row of one of the two.
struct Side {
    const R1kernelsTokenLogprobs& call;
    const float* raw;
    bool plain;
    float largest, inverse_temperature, log_normaliser;

    Side(const R1kernelsTokenLogprobs& call, const float* stats, int64_t number) : call(call), plain(is_plain(call)) {
        const Row row = row_of(call, number);
        raw = logits_of<float>(call, row);
        largest = stats[number];
        inverse_temperature = static_cast<float>(row.inverse_temperature);
        log_normaliser = ::log1pf(stats[call.batch * call.tokens + number]);
    }

    // The logits of a block, in memory or in the buffer; slopes: null where they are not wanted.
    const float* block(int64_t begin, int64_t count, float* buffer, float* slopes) const {
        if (plain) return raw + begin;
        transform(call, raw, begin, count, buffer, slopes);
        return buffer;
    }

    Floats log_probs(Floats logits) const { return (logits - largest) * inverse_temperature - log_normaliser; }
};

// step(first, count) over the vectors of a block
template <typename Step>
void for_block(int64_t count, Step step) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) step(i, kLanes);
    if (i < count) step(i, static_cast<int>(count - i));
}

inline Floats load_lanes(const float* from, int count) { return count == kLanes ? load(from) : load_some(from, count); }

// sums (4, rows), the fields of DivergenceSums
template <int kKind>
void divergence_sums(const R1kernelsDivergence& call, float* sums, int64_t begin, int64_t end) {
    float student_logits[kBlock], teacher_logits[kBlock];
    const int64_t rows = call.student.batch * call.student.tokens;
    for (int64_t number = begin; number < end; ++number) {
        double divergence = 0, weighted = 0, at_largest = 0, largest = 0;
        const int64_t columns = row_of(call.student, number).ignored ? 0 : call.student.vocabulary;
        const Side student(call.student, call.student_stats, number), teacher(call.teacher, call.teacher_stats, number);
        const Floats log_largest = all(-student.log_normaliser);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t count = columns - first < kBlock ? columns - first : kBlock;
            const float* x = student.block(first, count, student_logits, nullptr);
            const float* y = teacher.block(first, count, teacher_logits, nullptr);
            DivergenceSums<Floats> of_block = {};
            for_block(count, [&](int64_t i, int lanes) {
                const DivergenceSums<Floats> terms = divergence_terms<kKind>(
                    student.log_probs(load_lanes(x + i, lanes)), teacher.log_probs(load_lanes(y + i, lanes)),
                    log_largest, call.beta);
                of_block.divergence += terms.divergence;
                of_block.weighted += terms.weighted;
                of_block.at_largest += terms.at_largest;
                of_block.largest += terms.largest;
            });
            divergence += sum(of_block.divergence);
            weighted += sum(of_block.weighted);
            at_largest += sum(of_block.at_largest);
            largest += sum(of_block.largest);
        }
        sums[number] = static_cast<float>(divergence);
        sums[rows + number] = static_cast<float>(weighted);
        sums[2 * rows + number] = static_cast<float>(at_largest);
        sums[3 * rows + number] = static_cast<float>(largest);
    }
}

// The gradient of the student's raw logits, over them; mean (2, rows): of r, see divergence_slope.
template <int kKind>
void divergence_gradient(const R1kernelsDivergence& call, const float* mean, const float* grad, float* to,
                         int64_t begin, int64_t end) {
    float student_logits[kBlock], teacher_logits[kBlock], slopes[kBlock];
    const int64_t rows = call.student.batch * call.student.tokens, columns = call.student.vocabulary;
    for (int64_t number = begin; number < end; ++number) {
        const Side student(call.student, call.student_stats, number), teacher(call.teacher, call.teacher_stats, number);
        float* row = to + (student.raw - static_cast<const float*>(call.student.logits));
        if (row_of(call.student, number).ignored) {
            memset(row, 0, columns * sizeof(float));
            continue;
        }
        const float upstream = (grad ? grad[number] : 1.0f) * student.inverse_temperature;
        const Floats at_largest = all(mean[number]), above = all(mean[rows + number]);
        for (int64_t first = 0; first < columns; first += kBlock) {
            const int64_t count = columns - first < kBlock ? columns - first : kBlock;
            const float* x = student.block(first, count, student_logits, slopes);
            const float* y = teacher.block(first, count, teacher_logits, nullptr);
            for_block(count, [&](int64_t i, int lanes) {
                Floats slope = divergence_slope<kKind>(student.log_probs(load_lanes(x + i, lanes)),
                                                       teacher.log_probs(load_lanes(y + i, lanes)), call.beta,
                                                       at_largest, above) *
                               upstream;
                if (!student.plain) slope *= load_lanes(slopes + i, lanes);
                lanes == kLanes ? store(row + first + i, slope) : store_some(row + first + i, slope, lanes);
            });
        }
    }
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA

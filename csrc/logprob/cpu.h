// The CPU kernels of the log-prob rows: plain functions over ranges, for a caller that shares the ranges out to threads.
//
// A row of V logits is cut into chunks of kChunk, which depend on the shape alone; item number row * chunks + chunk. Each
// item is reduced by one thread in a fixed order, and so are the items of a row: results do not depend on the number of
// threads or on other rows. Arguments are trusted.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "logprob/call.h"

namespace r1kernels {

constexpr int64_t kChunk = 16384;

inline int64_t chunks_per_row(int64_t vocabulary) { return (vocabulary + kChunk - 1) / kChunk; }

// Sums over some logits z of a row at temperature T, relative to the largest of them, M.
struct LogitSums {
    float largest;     // M, before the division by T; -inf while nothing but -inf was seen
    double ties;       // how many logits equal M
    double sum;        // sum of e^((z - M) / T) over the others
    double weighted;   // sum of e^((z - M) / T) (M - z) / T
    double squares;    // sum of e^(2 (z - M) / T); this and what follows for the extra statistics alone
    double total;      // sum of z
    int64_t position;  // the first column that holds M
};

// Where the forward writes.
struct LogprobOutputs {
    float* logp;     // (rows)
    float* entropy;  // (rows), or null
    float* stats;    // (3, rows)
    float* extra;    // (3, rows), or null
};

struct LogprobKernels {
    // Writes sums[item] for the items of [begin, end) (nothing for ignored rows).
    void (*reduce)(const R1kernelsTokenLogprobs& call, bool entropy, bool extra, LogitSums* sums, int64_t begin,
                   int64_t end);

    // Writes the outputs of the rows of [begin, end) from their items.
    void (*finish)(const R1kernelsTokenLogprobs& call, const LogitSums* sums, const LogprobOutputs& to, int64_t begin,
                   int64_t end);

    // Writes the gradient of the items of [begin, end) to grad, which may be the logits (with their strides).
    void (*backward)(const R1kernelsTokenLogprobs& call, const R1kernelsLogprobGradients& from, void* grad,
                     int64_t grad_batch_stride, int64_t grad_token_stride, int64_t begin, int64_t end);
};

// Products of kept rows of the head: over entries, tokens, and places in the order of the entries.
struct KeptKernels {
    void (*products)(const R1kernelsKeptProducts& call, float* to, int64_t begin, int64_t end);

    // to (N, H) of call.element, or of float32
    void (*gradient_of_hidden)(const R1kernelsKeptProducts& call, void* to, bool float32, int64_t begin, int64_t end);

    // to (V, H) of call.element and bias (V), both 0 before, or null where not wanted
    void (*gradient_of_weight)(const R1kernelsKeptProducts& call, void* to, float* bias, int64_t begin, int64_t end);
};

// Divergences: over rows.
struct DivergenceKernels {
    // Writes sums (4, B * T) over the columns of the call (divergence_terms.h; 0 for ignored rows).
    void (*sums)(const R1kernelsDivergence& call, float* sums, int64_t begin, int64_t end);

    // Writes the gradient of the student's raw logits over them; mean (2, B * T): of all columns; grad: null for ones.
    void (*gradient)(const R1kernelsDivergence& call, const float* mean, const float* grad, float* to, int64_t begin,
                     int64_t end);
};

// Tokens that numbers in [0, 1) choose from rows of logits (V).
struct SampleCall {
    Element element;
    const void* logits;  // (B, V)
    int64_t vocabulary;
    double temperature;
    const double* uniform;  // (B)
    int64_t* tokens;        // (B): written
    double* logp;           // (B): written
};

constexpr int64_t kSampleBlock = 256;

inline int64_t sample_blocks(int64_t vocabulary) { return (vocabulary + kSampleBlock - 1) / kSampleBlock; }

struct SampleKernels {
    // Rows [begin, end); ends: scratch for sample_blocks(V) numbers.
    void (*sample)(const SampleCall& call, double* ends, int64_t begin, int64_t end);
};

R1KERNELS_DECLARE_TABLES(LogprobKernels, logprob_kernels)
R1KERNELS_DECLARE_TABLES(KeptKernels, kept_kernels)
R1KERNELS_DECLARE_TABLES(DivergenceKernels, divergence_kernels)
R1KERNELS_DECLARE_TABLES(SampleKernels, sample_kernels)

}  // namespace r1kernels

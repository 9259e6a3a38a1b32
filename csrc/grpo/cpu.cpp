// grpo_loss on the CPU, compiled once for each instruction set (see common/vector.h). The mathematics is in terms.h.
#include "grpo/cpu.h"

#include "common/vector_math.h"
#include "grpo/terms.h"  // after the functions that it is built on

namespace r1kernels::R1KERNELS_ISA {

namespace {

using Tokens = Token<Floats, Ints>;

struct Workspace {
    SequenceSums* sequence_sums;  // one an item
    LossSums<float>* loss_sums;   // one an item
    Sequence* sequences;
};

size_t workspace_bytes(const R1kernelsGrpo& call, int64_t items) {
    return items * (sizeof(SequenceSums) + sizeof(LossSums<float>)) + call.sequences * sizeof(Sequence);
}

Workspace parts_of(void* workspace, int64_t items) {
    Workspace parts;
    parts.sequence_sums = static_cast<SequenceSums*>(workspace);
    parts.loss_sums = reinterpret_cast<LossSums<float>*>(parts.sequence_sums + items);
    parts.sequences = reinterpret_cast<Sequence*>(parts.loss_sums + items);
    return parts;
}

// How many tokens ahead of those at work memory is fetched: the processor itself fetches no further than a page.
constexpr int kAhead = 256;

// --- loads: `count` <= kLanes tokens from the token `first` on; Count is int, or Whole ---

struct Whole {
    constexpr operator int() const { return kLanes; }
};

// step(first, count) over the tokens of an item
template <typename Step>
void for_vectors(const Item& item, Step step) {
    int64_t t = item.begin;
    for (; t + kLanes <= item.end; t += kLanes) step(t, Whole{});
    if (t < item.end) step(t, static_cast<int>(item.end - t));
}

template <typename Count>
Floats load_values(const float* values, int64_t first, Count count) {
    return count == kLanes ? load(values + first) : load_some(values + first, count);
}

template <typename Count>
void store_values(float* values, int64_t first, Count count, Floats value) {
    count == kLanes ? store(values + first, value) : store_some(values + first, value, count);
}

template <typename Integer, typename Count>
Ints nonzero(const void* mask, int64_t first, Count count) {
    typedef Integer Integers __attribute__((vector_size(sizeof(Integer) * kLanes)));
    Integers values = {};
    const Integer* from = static_cast<const Integer*>(mask) + first;
    if (count == kLanes) {
        memcpy(&values, from, sizeof values);
    } else {
        memcpy(&values, from, count * sizeof(Integer));
    }
    return __builtin_convertvector(values != 0, Ints);
}

template <typename Count>
Ints counted_tokens(const R1kernelsGrpo& call, int64_t first, Count count) {
    switch (call.mask_bytes) {
        case 1: return nonzero<int8_t>(call.mask, first, count);
        case 2: return nonzero<int16_t>(call.mask, first, count);
        case 4: return nonzero<int32_t>(call.mask, first, count);
        default: return nonzero<int64_t>(call.mask, first, count);
    }
}

template <typename Count>
Tokens load_tokens(const R1kernelsGrpo& call, int64_t sequence, float weight, Ints in_mask, int64_t first,
                   Count count) {
    const Floats zero = {};
    Tokens tokens;
    Ints counted = in_mask;
    const auto values = [&](const float* from) {
        __builtin_prefetch(from + first + kAhead);
        return counted ? load_values(from, first, count) : zero;
    };
    const Floats logp = values(call.logp), old_logp = call.old_logp == nullptr ? logp : values(call.old_logp);
    tokens.impossible = is_impossible(call, logp, old_logp);
    tokens.counted = counted = in_mask & ~tokens.impossible;
    tokens.logp = counted ? logp : zero;
    tokens.log_ratio = call.old_logp == nullptr ? zero : (counted ? logp - old_logp : zero);
    tokens.drift = call.ref_logp == nullptr ? zero : values(call.ref_logp) - tokens.logp;
    if (call.advantages_per_token) {
        tokens.advantage = values(call.advantages);
    } else {
        tokens.advantage = counted ? all(call.advantages[sequence]) : zero;
    }
    if (call.policy_weights == nullptr) {
        tokens.policy_weight = all(1.0f);
    } else if (call.policy_weights_per_token) {
        tokens.policy_weight = values(call.policy_weights);
    } else {
        tokens.policy_weight = all(call.policy_weights[sequence]);
    }
    tokens.weight = call.weights == nullptr ? all(weight) : values(call.weights);
    tokens.entropy = call.entropy == nullptr ? zero : values(call.entropy);
    tokens.entropy_weight = call.entropy_weights == nullptr ? zero : values(call.entropy_weights);
    return tokens;
}

// --- sums over lanes ---

// half of the lanes added to the other half, again and again
template <int lanes>
float tree_sum(const float* values) {
    typedef float Half __attribute__((vector_size(2 * lanes)));
    Half low, high;
    memcpy(&low, values, sizeof low);
    memcpy(&high, values + lanes / 2, sizeof high);
    low += high;
    return tree_sum<lanes / 2>(reinterpret_cast<const float*>(&low));
}

template <>
inline float tree_sum<1>(const float* values) {
    return *values;
}

float tree_sum(Floats value) { return tree_sum<kLanes>(reinterpret_cast<const float*>(&value)); }

LossSums<float> over_lanes(LossSums<Floats> sums) {
    // relative to the largest ratio of all lanes
    LossSums<Floats> whole;
    whole.largest = all(largest(sums.largest));
    sums = merge(whole, sums);
    LossSums<float> result;
    constexpr int fields = sizeof(LossSums<float>) / sizeof(float);
    for (int i = 0; i < fields; ++i) {
        reinterpret_cast<float*>(&result)[i] = tree_sum(reinterpret_cast<const Floats*>(&sums)[i]);
    }
    result.largest = sums.largest[0];
    return result;
}

// --- the passes ---

// Sums of the loops below stay in registers where everything is inlined.
#define R1KERNELS_FLATTEN __attribute__((flatten))

R1KERNELS_FLATTEN void first_pass(const R1kernelsGrpo& call, void* workspace, int64_t items, int64_t begin,
                                  int64_t end) {
    const bool only_counts = !r1kernels_grpo_sums_over_sequences(call);
    for (int64_t number = begin; number < end; ++number) {
        const Item item = item_of(call, number, kGrpoChunk);
        Ints counted = {};
        Floats first = {}, second = {}, third = {};
        for_vectors(item, [&](int64_t t, auto count) {
            const Ints now = counted_tokens(call, t, count);
            counted -= now;
            if (only_counts || !any(now)) return;
            const Tokens tokens = load_tokens(call, item.sequence, 1.0f, now, t, count);
            Floats terms[3];
            sequence_terms(call, tokens, terms[0], terms[1], terms[2]);
            first += terms[0];
            second += terms[1];
            third += terms[2];
        });
        parts_of(workspace, items).sequence_sums[number] = {tree_sum(__builtin_convertvector(counted, Floats)),
                                                            tree_sum(first), tree_sum(second), tree_sum(third)};
    }
}

void between(const R1kernelsGrpo& call, void* workspace, int64_t items) {
    const Workspace parts = parts_of(workspace, items);
    const bool summed = r1kernels_grpo_needs_first_pass(call);
    float divisor = given_divisor(call);
    if (call.weights == nullptr && call.count == R1KERNELS_COUNT_BATCH) {
        double counted = 0;
        for (int64_t i = 0; i < items; ++i) counted += parts.sequence_sums[i].counted;
        divisor *= counted > 1 ? static_cast<float>(counted) : 1.0f;
    } else if (call.weights == nullptr && call.count == R1KERNELS_COUNT_LONGEST) {
        int64_t longest = 1;
        for (int64_t i = 0; i < call.sequences; ++i) {
            const int64_t length = boundary(call, i + 1) - boundary(call, i);
            longest = length > longest ? length : longest;
        }
        divisor *= static_cast<float>(longest);
    }
    for (int64_t i = 0; i < call.sequences; ++i) {
        double counted = 0, first = 0, second = 0, third = 0;
        const int64_t from = first_item(call, i, kGrpoChunk);
        const int64_t chunks = summed ? number_of_chunks(call, i, kGrpoChunk) : 0;
        for (int64_t number = from; number < from + chunks; ++number) {
            const SequenceSums& sums = parts.sequence_sums[number];
            counted += sums.counted;
            first += sums.first;
            second += sums.second;
            third += sums.third;
        }
        const SequenceSums sums = {static_cast<float>(counted), static_cast<float>(first),
                                   static_cast<float>(second), static_cast<float>(third)};
        const bool weighted = call.policy_weights != nullptr && !call.policy_weights_per_token;
        parts.sequences[i] = sequence_of(call, sums, divisor, weighted ? call.policy_weights[i] : 1.0f);
    }
}

R1KERNELS_FLATTEN void second_pass(const R1kernelsGrpo& given, void* workspace, int64_t items, int64_t begin,
                                   int64_t end) {
    const R1kernelsGrpo call = given;  // a copy: gradients that are stored cannot change it
    const Workspace parts = parts_of(workspace, items);
    for (int64_t number = begin; number < end; ++number) {
        const Item item = item_of(call, number, kGrpoChunk);
        const Sequence sequence = item.begin < item.end ? parts.sequences[item.sequence] : Sequence{};
        LossSums<Floats> sums;
        for_vectors(item, [&](int64_t t, auto count) {
            const Ints counted = counted_tokens(call, t, count);
            TokenGradient<Floats> gradient = {};
            if (any(counted)) {
                const Tokens tokens = load_tokens(call, item.sequence, sequence.weight, counted, t, count);
                gradient = add_token(call, sequence, tokens, sums);
            }
            if (call.grad_logp != nullptr) store_values(call.grad_logp, t, count, gradient.logp);
            if (call.grad_entropy != nullptr) store_values(call.grad_entropy, t, count, gradient.entropy);
        });
        LossSums<float>& result = parts.loss_sums[number];
        result = over_lanes(sums);
        to_units(call, sequence, item.chunk == 0, result);
    }
}

void finish_call(const R1kernelsGrpo& call, void* workspace, int64_t items) {
    const Workspace parts = parts_of(workspace, items);
    LossSums<double> total;
    for (int64_t i = 0; i < items; ++i) total = merge(total, parts.loss_sums[i]);
    finish(call, total);
    if (call.grad_of_ratio == nullptr) return;
    for (int64_t i = 0; i < call.sequences; ++i) {
        const int64_t from = first_item(call, i, kGrpoChunk), chunks = number_of_chunks(call, i, kGrpoChunk);
        double of_ratio = 0;
        for (int64_t number = from; number < from + chunks; ++number) of_ratio += parts.loss_sums[number].of_ratio;
        call.grad_of_ratio[i] = shared_gradient(call, parts.sequences[i].counted, of_ratio);
    }
}

void backward(const R1kernelsGrpo& call, float factor, const float* grad_of_ratio, const float* grad, float* to,
              int64_t begin, int64_t end) {
    for (int64_t number = begin; number < end; ++number) {
        const Item item = item_of(call, number, kGrpoChunk);
        const float shared = grad_of_ratio == nullptr ? 0.0f : grad_of_ratio[item.sequence];
        for_vectors(item, [&](int64_t t, auto count) {
            Floats value = load_values(grad, t, count);
            if (grad_of_ratio != nullptr) {
                Ints in_ratio = counted_tokens(call, t, count);
                if (call.logp != nullptr) in_ratio &= load_values(call.logp, t, count) != all(-kInfinity);
                value += in_ratio ? all(shared) : Floats{};
            }
            store_values(to, t, count, value * factor);
        });
    }
}

}  // namespace

const GrpoKernels grpo_kernels = {workspace_bytes, first_pass, between, second_pass, finish_call, backward};

}  // namespace r1kernels::R1KERNELS_ISA

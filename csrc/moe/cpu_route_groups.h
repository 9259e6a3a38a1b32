// The groups of experts that a token may use, on the CPU. Included by cpu_route_choice.h alone, once for each instruction
// set.
#pragma once

#include "moe/cpu_route_order.h"

namespace r1kernels::R1KERNELS_ISA {

namespace {

// Joins the two largest values of one set, lane by lane, with those of another, or with one more value.
template <typename Vector>
void join(Vector& first, Vector& second, Vector value) {
    second = larger(smaller(first, value), second);
    first = larger(first, value);
}
template <typename Vector>
void join(Vector& first, Vector& second, Vector other_first, Vector other_second) {
    join(first, second, other_first);
    second = larger(second, other_second);
}

// Joins the lanes of each of `count` sets, a power of two: set i fills the lanes of first[0] and second[0] from
// i * kLanes / count on.
template <int kSize = kLanes / 2, typename Vector>
void join_lanes(Vector* first, Vector* second, int64_t count) {
    const Ints lower = lower_blocks<kSize>(), upper = upper_blocks<kSize>();
    const int64_t half = count / 2;
    for (int64_t i = 0; i < half || i == 0; ++i) {
        const Vector a = first[i], b = first[i + half], c = second[i], d = second[i + half];
        Vector most = choose_lanes(a, b, lower), next = choose_lanes(c, d, lower);
        join(most, next, choose_lanes(a, b, upper), choose_lanes(c, d, upper));
        first[i] = most, second[i] = next;
    }
    if constexpr (kSize > 1) join_lanes<kSize / 2>(first, second, half);
}

Floats sum_of(Floats a, Floats b) { return a + b; }
Ints sum_of(Ints a, Ints b) { return keys_of(values_of(a) + values_of(b)); }

// The keys of up to kLanes groups from group `from` on; the score of a group is for softmax its best value, for sigmoid the
// sum of its two best ones. A vector may be read from any value on.
template <typename Vector>
Ints keys_of_groups(const MoeRouter& call, const Scalar<Vector>* values, int64_t from) {
    const int64_t size = call.experts / call.n_group;
    const int64_t groups = call.n_group - from < kLanes ? call.n_group - from : kLanes;
    int64_t sets = 1;
    while (sets < groups) sets *= 2;
    Vector first[kLanes], second[kLanes];
    for (int64_t group = 0; group < sets; ++group) {
        const Scalar<Vector>* of_group = values + (from + group) * size;
        Vector most = lowest<Vector>(), next = most;
        for (int64_t i = 0; group < groups && i < size; i += kLanes) {
            Vector value = load_as<Vector>(of_group + i);
            if (size - i < kLanes) value = places_from(i) < static_cast<int32_t>(size) ? value : lowest<Vector>();
            join(most, next, value);
        }
        first[group] = most, second[group] = next;
    }
    join_lanes(first, second, sets);
    const bool best_alone = call.softmax || size == 1;
    const Ints keys = as_keys(best_alone ? first[0] : sum_of(first[0], second[0]));
    const Ints lane = places_from(0);
    const Ints in_order = choose_lanes(keys, keys, lane * static_cast<int32_t>(kLanes / sets) & (kLanes - 1));
    return lane < static_cast<int32_t>(groups) ? in_order : lowest<Ints>();
}

// Makes the values of the experts outside of the best groups the lowest; returns by how much the score of the last group
// kept leads those of the others.
template <typename Vector>
float keep_best_groups(const MoeRouter& call, const RouterScratch& scratch, Scalar<Vector>* values) {
    const int64_t groups = whole_vectors(call.n_group), size = call.experts / call.n_group;
    for (int64_t i = 0; i < groups; i += kLanes) store_as(scratch.groups + i, keys_of_groups<Vector>(call, values, i));
    Floats last = highest<Floats>(), next = lowest<Floats>();
    for (int64_t i = 0; i < groups; i += kLanes) {
        const Ints keys = load_as<Ints>(scratch.groups + i);
        const Ints kept = ranks_of(scratch.groups, groups, i) < static_cast<int32_t>(call.topk_group);
        last = smaller(kept ? values_of(keys) : highest<Floats>(), last);
        next = larger(kept | (keys == kNotEligible) ? lowest<Floats>() : values_of(keys), next);
        store_as(scratch.ranks + i, kept);
    }
    for (int64_t group = 0; group < call.n_group; ++group) {
        const Ints kept = Ints{} + scratch.ranks[group];
        Scalar<Vector>* of_group = values + group * size;
        int64_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            store_as(of_group + i, kept ? load_as<Vector>(of_group + i) : lowest<Vector>());
        }
        for (; i < size; ++i) of_group[i] = kept[0] ? of_group[i] : LaneOf<Vector>::kLowest;
    }
    return smallest_lane(last) - largest_lane(next);
}

}  // namespace

}  // namespace r1kernels::R1KERNELS_ISA

// Prints for each operand of the Hopper kernels how many elements of its stages lie elsewhere than in the layout that
// wgmma is given through CuTe. Runs on the host.
#include <cstdio>

#include "moe/cuda_sm90a_machine.cuh"

using namespace r1kernels::moe::hopper;

template <class Element, bool kMnMajor, int kSize>
int misplaced() {
    const auto layout = cute::as_position_independent_swizzle_layout(stages_layout<Element, kMnMajor, kSize>());
    int count = 0;
    for (int stage = 0; stage < kStages; ++stage) {
        for (int k = 0; k < kBlockK; ++k) {
            for (int mn = 0; mn < kSize; ++mn) {
                const int in_stage = kMnMajor ? mn_major_offset(mn, k) : k_major_offset(mn, k);
                const int ours = stage * kSize * kBlockK * kElementBytes + in_stage;
                count += ours != kElementBytes * static_cast<int>(layout(mn, k, stage));
            }
        }
    }
    return count;
}

template <class Element>
void report() {
    std::printf("%d %d ", misplaced<Element, false, kBlockM>(), misplaced<Element, true, kBlockM>());
    std::printf("%d %d\n", misplaced<Element, false, kBlockN>(), misplaced<Element, true, kBlockN>());
}

int main() {
    report<cute::bfloat16_t>();
    report<cute::half_t>();
}

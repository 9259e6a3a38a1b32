// Tiles of operands in shared memory, and copying them there.
//
// A product runs over its depth in steps of 64 bytes of a row (32 elements of 16 bits, 16 of 32). A stage holds what one
// step needs of both operands; several stages are on their way while one is multiplied. Both layouts work in chunks of
// 16 bytes, and swap chunks around so that the eight rows that are read together lie in different banks.
// "Outer" is the dimension of an operand that is not summed over.
#pragma once

#include "common/elements.cuh"
#include "common/mma.cuh"
#include "moe/call.h"

namespace r1kernels::moe {

constexpr int kStages = 3;
constexpr int kStepBytes = 64;
constexpr int kThreads = 128;  // of a block

template <class Scalar>
constexpr int kChunk = 16 / sizeof(Scalar);
template <class Scalar>
constexpr int kStep = kStepBytes / sizeof(Scalar);

// The depth runs along memory: one row of kStep elements for each of kOuter.
template <class Scalar, int kOuter>
struct AlongDepth {
    static constexpr int kBytes = kOuter * kStepBytes;
    __device__ static int offset(int outer, int chunk) { return outer * kStepBytes + (chunk ^ (outer >> 1 & 3)) * 16; }
};

// The depth runs across memory: kStep rows of kOuter elements.
template <class Scalar, int kOuter>
struct AcrossDepth {
    static constexpr int kBytes = kOuter * kStepBytes;
    static constexpr int kChunks = kOuter / kChunk<Scalar>;
    __device__ static int offset(int depth, int chunk) { return (depth * kChunks + (chunk ^ (depth & 7))) * 16; }
};

template <class Scalar>
__device__ inline int steps_of(int64_t depth) {
    return static_cast<int>((depth + kStep<Scalar> - 1) / kStep<Scalar>);
}

// Whether all chunks of the rows of a matrix begin at multiples of 16 bytes.
template <class Scalar>
__device__ inline bool has_whole_chunks(const void* data, int64_t row_length) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && row_length % kChunk<Scalar> == 0;
}

// One chunk: its first `count` elements (none where count <= 0), then zeros.
template <class Scalar>
__device__ inline void copy_chunk(unsigned char* to, const Scalar* from, int count, bool whole_chunks) {
    if (whole_chunks) {
        copy_async(to, from, count > 0 ? 16 : 0);
        return;
    }
    Scalar elements[kChunk<Scalar>];
#pragma unroll
    for (int i = 0; i < kChunk<Scalar>; ++i) elements[i] = i < count ? from[i] : from_float<Scalar>(0.0f);
    *reinterpret_cast<uint4*>(to) = Chunk<Scalar>::of(elements).bits;
}

// Copies the next step of kOuter rows that are fixed from the beginning.
template <class Scalar, int kOuter>
class CopyAlongDepth {
public:
    using Layout = AlongDepth<Scalar, kOuter>;

    // row_of(outer): a row of `data`. Where a tile is not full any row will do: its sums are not stored.
    template <class RowOf>
    __device__ CopyAlongDepth(const void* data, int64_t length, RowOf row_of)
        : left_(static_cast<int>(length) - chunk() * kChunk<Scalar>),
          whole_chunks_(has_whole_chunks<Scalar>(data, length)) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            next_[i] = static_cast<const Scalar*>(data) + row_of(outer(i)) * length + chunk() * kChunk<Scalar>;
        }
    }

    __device__ void operator()(unsigned char* stage) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            copy_chunk(stage + Layout::offset(outer(i), chunk()), next_[i], left_, whole_chunks_);
            next_[i] += kStep<Scalar>;
        }
        left_ -= kStep<Scalar>;
    }

private:
    static constexpr int kChunksOfRow = kStepBytes / 16;
    static constexpr int kRows = kOuter * kChunksOfRow / kThreads;

    __device__ static int chunk() { return threadIdx.x % kChunksOfRow; }
    __device__ static int outer(int i) { return threadIdx.x / kChunksOfRow + i * (kThreads / kChunksOfRow); }

    const Scalar* next_[kRows];
    int left_;  // elements of a row from this thread's chunk on
    bool whole_chunks_;
};

// Copies the next kStep rows, columns [first_column, first_column + kOuter) of them; zeros behind the last column.
template <class Scalar, int kOuter, bool kGathered>
class CopyAcrossDepth {
public:
    using Layout = AcrossDepth<Scalar, kOuter>;

    // The rows [first, end) in expert order; zeros follow them.
    __device__ CopyAcrossDepth(const R1kernelsMoeRows& rows, int64_t length, int64_t first_column, int first, int end)
        : data_(static_cast<const Scalar*>(rows.data)), length_(static_cast<int>(length)), next_(first), end_(end),
          index_(rows.index), divisor_(rows.divisor), whole_chunks_(has_whole_chunks<Scalar>(rows.data, length)) {
        const int64_t column = first_column + chunk() * kChunk<Scalar>;
        columns_ = column < length ? static_cast<int>(min(length - column, int64_t{kChunk<Scalar>})) : 0;
        if (columns_ > 0) data_ += column;
        look_up();
    }

    __device__ void operator()(unsigned char* stage) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const bool exists = depth(i) < end_ - next_;
            int row = exists ? next_ + depth(i) : 0;
            if (kGathered && index_) row = row_[i] / divisor_;
            copy_chunk(stage + Layout::offset(depth(i), chunk()), data_ + int64_t{row} * length_,
                       exists ? columns_ : 0, whole_chunks_);
        }
        next_ += min(kStep<Scalar>, end_ - next_);
        look_up();
    }

private:
    static constexpr int kRows = kStep<Scalar> * Layout::kChunks / kThreads;

    __device__ static int chunk() { return threadIdx.x % Layout::kChunks; }
    __device__ static int depth(int i) { return threadIdx.x / Layout::kChunks + i * (kThreads / Layout::kChunks); }

    // A step ahead, so that no one waits for the index.
    __device__ void look_up() {
        if constexpr (kGathered) {
            if (index_ == nullptr) return;
#pragma unroll
            for (int i = 0; i < kRows; ++i) row_[i] = depth(i) < end_ - next_ ? index_[next_ + depth(i)] : 0;
        }
    }

    const Scalar* data_;  // this thread's chunk of row 0
    int length_, columns_, next_, end_;
    const int32_t* index_;
    int divisor_;
    int row_[kRows];
    bool whole_chunks_;
};

// Runs `steps` steps: copies ahead, and multiplies the stages in their order.
template <class Multiply, class CopyLeft, class CopyRight>
__device__ inline void run_steps(int steps, unsigned char* shared, CopyLeft& copy_left, CopyRight& copy_right,
                                 Multiply& multiply) {
    constexpr int kLeftBytes = CopyLeft::Layout::kBytes, kBytes = kLeftBytes + CopyRight::Layout::kBytes;
    const auto copy = [&](int stage) {
        copy_left(shared + stage * kBytes);
        copy_right(shared + stage * kBytes + kLeftBytes);
    };
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
        if (stage < steps) copy(stage);
        commit_copies();
    }
    int reading = 0, writing = kStages - 1;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<kStages - 2>();
        __syncthreads();  // the copies of all threads are there, and the stage to write next has been read
        if (step + kStages - 1 < steps) copy(writing);
        commit_copies();
        multiply(shared + reading * kBytes, shared + reading * kBytes + kLeftBytes);
        writing = reading;
        reading = reading + 1 == kStages ? 0 : reading + 1;
    }
}

}  // namespace r1kernels::moe

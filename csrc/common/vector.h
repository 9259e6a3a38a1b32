// Vectors of float for the CPU kernels: load and store of float32, bfloat16 and float16, max, exp, sums, lanes.
//
// Included only by files that are compiled once for each instruction set: everything lies in that set's namespace, so
// that the linker can never take one set's copy of a function for another's. No standard library template is used here
// for the same reason. The types are the compiler's own vectors (+, -, *, <, ?: work on them); only conversions that
// it does not find by itself are written with intrinsics.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "common/element.h"

namespace r1kernels::R1KERNELS_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

// Calls function(T{}) for the element type T.
template <typename Function>
inline void with_element(Element element, const Function& function) {
    switch (element) {
        case Element::float32: return function(float{});
        case Element::bfloat16: return function(BFloat16{});
        case Element::float16: return function(Float16{});
    }
}

// `count`, or the next multiple of kLanes above it
inline int64_t whole_vectors(int64_t count) { return (count + kLanes - 1) / kLanes * kLanes; }

constexpr float kInfinity = __builtin_inff();

inline Floats all(float value) { return Floats{} + value; }

// a where a > b, else b: b also where either is NaN
inline Floats greater(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// a where a < b, else b: b also where either is NaN
inline Floats lesser(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_min_ps(a, b);
#elif defined(__SSE2__)
    return _mm_min_ps(a, b);
#else
    return a < b ? a : b;
#endif
}

// whether a lane of a comparison holds
inline bool any(Ints lanes) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes) != 0;
#elif defined(__AVX2__)
    return !_mm256_testz_si256((__m256i)lanes, (__m256i)lanes);
#else
    int32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found |= lanes[lane];
    return found != 0;
#endif
}

// --- load: kLanes elements from any address ---

inline Floats load(const float* from) {
    Floats value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline Floats load(const BFloat16* from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)bits), 16);
#elif defined(__AVX2__)
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)bits), 16);
#else
    return (Floats)(__builtin_convertvector(bits, Words) << 16);
#endif
}

inline Floats load(const Float16* from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
    return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__)
    return _mm256_cvtph_ps((__m128i)bits);
#else
    const Words word = __builtin_convertvector(bits, Words);
    const Words sign = (word & 0x8000u) << 16;
    const Words magnitude = (word & 0x7fffu) << 13;
    // 2^112 moves the exponent's bias from 15 to 127, for subnormals too; infinity and NaN keep an exponent of all ones
    const Words finite = (Words)((Floats)magnitude * 0x1p112f);
    const Words special = magnitude | 0x7f800000u;
    return (Floats)(sign | ((word & 0x7c00u) == 0x7c00u ? special : finite));
#endif
}

// --- store: rounds to nearest, ties to even; NaN stays NaN ---

// the low 16 bits of each word, the high ones being 0
inline Halves narrow(Words words) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    return (Halves)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)words), _mm256_extracti128_si256((__m256i)words, 1));
#else
    return __builtin_convertvector(words, Halves);
#endif
}

inline void store(float* to, Floats value) { memcpy(to, &value, sizeof value); }

inline Halves bits_of(BFloat16, Floats value) {
#if defined(__AVX512BF16__)
    return (Halves)_mm512_cvtneps_pbh(value);
#else
    const Words word = (Words)value;
    const Words rounded = (word + 0x7fffu + ((word >> 16) & 1u)) >> 16;
    const Words quiet = (word >> 16) | 0x40u;
    return narrow((Words)(value == value ? rounded : quiet));
#endif
}

inline Halves bits_of(Float16, Floats value) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (Halves)_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
    const Words word = (Words)value;
    const Words sign = (word >> 16) & 0x8000u;
    const Words magnitude = word & 0x7fffffffu;
    // normal results: drop 13 bits of the fraction, rounding, and move the bias from 127 to 15
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // below 2^-14 adding 0.5 leaves the subnormal's bits, rounded by the addition itself
    const Words small = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words large = magnitude > 0x7f800000u ? Words{} + 0x7e00u : Words{} + 0x7c00u;  // NaN, or infinity
    Words result = magnitude < 0x38800000u ? small : normal;
    result = magnitude >= 0x477ff000u ? large : result;
    return narrow(sign | result);
#endif
}

template <typename T>
inline void store(T* to, Floats value) {
    const Halves bits = bits_of(T{}, value);
    memcpy(to, &bits, sizeof bits);
}


// --- stream: past the caches, a whole cache line at once, for parts of a line would each be read and written ---

constexpr int64_t kLineBytes = 64;
template <typename T>
constexpr int64_t kLine = kLineBytes / sizeof(T);

template <typename T>
inline bool begins_line(const T* to) { return reinterpret_cast<uintptr_t>(to) % kLineBytes == 0; }

// kLine numbers to a line
inline void stream_line(float* to, const float* from) {
#if defined(__AVX512F__)
    _mm512_stream_ps(to, load(from));
#elif defined(__AVX2__)
    _mm256_stream_ps(to, load(from));
    _mm256_stream_ps(to + kLanes, load(from + kLanes));
#else
    for (int64_t i = 0; i < kLine<float>; i += kLanes) store(to + i, load(from + i));
#endif
}
template <typename T>
inline void stream_line(T* to, const float* from) {
#if defined(__AVX512F__)
    const __m256i first = (__m256i)bits_of(T{}, load(from)), second = (__m256i)bits_of(T{}, load(from + kLanes));
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
#else  // in parts it gains nothing
    for (int64_t i = 0; i < kLine<T>; i += kLanes) store(to + i, load(from + i));
#endif
}

// Before another thread reads what was streamed.
inline void end_streams() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// --- the last elements of a row: `count` < kLanes of them, the other lanes hold -inf ---

template <typename T>
inline Floats load_some(const T* from, int count) {
    T buffer[kLanes];
    store(buffer, all(-kInfinity));
    memcpy(buffer, from, count * sizeof(T));
    return load(buffer);
}

template <typename T>
inline void store_some(T* to, Floats value, int count) {
    T buffer[kLanes];
    store(buffer, value);
    memcpy(to, buffer, count * sizeof(T));
}

#if defined(__AVX512F__)
// the same without a buffer, which costs a short row more than its work
inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1); }

inline Floats load_some(const float* from, int count) {
    return _mm512_mask_loadu_ps(all(-kInfinity), first_lanes(count), from);
}

inline void store_some(float* to, Floats value, int count) { _mm512_mask_storeu_ps(to, first_lanes(count), value); }
#endif

// --- exchanging lanes ---

// Lane i of the result is lane mask[i] of `first`, or lane mask[i] - kLanes of `second`.
template <typename Vector>
inline Vector choose_lanes(Vector first, Vector second, Ints mask) {
#if defined(__clang__)
    Vector result = {};
    for (int lane = 0; lane < kLanes; ++lane) {
        result[lane] = mask[lane] < kLanes ? first[mask[lane]] : second[mask[lane] - kLanes];
    }
    return result;
#else
    return __builtin_shuffle(first, second, mask);
#endif
}

// Blocks of kSize lanes of two vectors: the lower blocks of each pair of blocks (the second vector's in the place of the
// first one's upper blocks), or the upper ones.
template <int kSize>
inline Ints lower_blocks() {
    Ints mask = {};
    for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane & kSize ? kLanes + lane - kSize : lane;
    return mask;
}
template <int kSize>
inline Ints upper_blocks() {
    Ints mask = {};
    for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane & kSize ? kLanes + lane : lane + kSize;
    return mask;
}

// --- over the lanes, always in the same order ---

inline float largest(Floats value) {
    float result = value[0];
    for (int lane = 1; lane < kLanes; ++lane) result = value[lane] > result ? value[lane] : result;
    return result;
}

inline double sum(Floats value) {
    double result = 0;
    for (int lane = 0; lane < kLanes; ++lane) result += value[lane];
    return result;
}

// e^x below this rounds to 0; the smallest float is 2^-149, and e^-104 = 2^-150.04
constexpr float kSmallestExponent = -104.0f;

// e^r - 1 for |r| <= ln 2 / 2, as r + r^2 q(r), q the minimax polynomial of degree 4 (relative error of e^r 4.3e-9).
inline Floats exp_minus_one(Floats r) {
    Floats p = all(0x1.6fe43cp-10f);
    p = p * r + 0x1.1257a0p-7f;
    p = p * r + 0x1.555302p-5f;
    p = p * r + 0x1.555466p-3f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return p * r;
}

// e^x for x <= 0, within 1.1 units in the last place, subnormal results too (-inf gives exactly 0, NaN gives NaN).
//
// x = n ln 2 + r with |r| <= ln 2 / 2, e^x = 2^n e^r. ln 2 is split in two so that n times its first half is exact.
inline Floats exp_negative(Floats x) {
    const Floats clamped = greater(all(kSmallestExponent), x);  // the second operand passes NaN on
    const Floats shift = all(0x1.8p23f + 64);                    // adding it rounds; the low bits are then n + 64
    const Floats shifted = clamped * 0x1.715476p+0f + shift;
    const Floats n = shifted - shift;
    const Floats r = (clamped - n * 0x1.62e400p-1f) - n * 0x1.7f7d1cp-20f;
    const Floats p = exp_minus_one(r) + 1.0f;
#if defined(__AVX512F__)
    return _mm512_scalef_ps(p, n);
#else
    // 2^n alone may be subnormal, 2^(n + 64) is not: the last product rounds once, or is exactly 0
    const Floats scaled = (Floats)((Ints)p + ((Ints)shifted << 23));
    // 0 below the smallest exponent; NaN as it came, for the integers above may have made a number of it
    return x >= kSmallestExponent ? scaled * 0x1p-64f : clamped - kSmallestExponent;
#endif
}

}  // namespace r1kernels::R1KERNELS_ISA

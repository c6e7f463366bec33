/* Vectors of LANES numbers, in whichever registers the CPU has, and numbers in 16 bit. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#define LANES 16
#define VECTOR_BYTES 64
#define CACHE_LINE 64

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

#define INLINE static inline __attribute__((always_inline))

enum element { FLOAT32, BFLOAT16 };

INLINE int64_t bytes_of(enum element e) { return e == BFLOAT16 ? 2 : 4; }

INLINE floats load(const void *base, int64_t index, enum element e) {
    if (e == FLOAT32) {
        floats result;
        __builtin_memcpy(&result, (const float *)base + index, sizeof result);
        return result;
    }
#if defined(__AVX512F__) /* gcc 12 takes three times as many instructions for what is below */
    __m256i upper = _mm256_loadu_si256((const __m256i *)((const uint16_t *)base + index));
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(upper), 16);
#else
    halves upper;
    __builtin_memcpy(&upper, (const uint16_t *)base + index, sizeof upper);
    return (floats)(__builtin_convertvector(upper, words) << 16);
#endif
}

INLINE float load_one(const void *base, int64_t index, enum element e) {
    if (e == FLOAT32) return ((const float *)base)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)base)[index] << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof result);
    return result;
}

/* bfloat16 is rounded to nearest, ties to even, as torch does; a NaN stays one. */
INLINE void store_one(void *base, int64_t index, float value, enum element e) {
    if (e == FLOAT32) {
        ((float *)base)[index] = value;
        return;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    uint16_t rounded = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    ((uint16_t *)base)[index] = value != value ? 0x7fc0 : rounded;
}

INLINE halves rounded_halves(floats value) {
#if defined(__AVX512BF16__)
    return (halves)_mm512_cvtneps_pbh((__m512)value);
#else
    words bits = (words)value, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    ints is_number = value == value;
    return __builtin_convertvector((rounded & (words)is_number) | (0x7fc0 & ~(words)is_number), halves);
#endif
}

/* The first `count` numbers at a place, at most LANES, and zeros. */
INLINE floats load_first(const void *base, int64_t index, int64_t count, enum element e) {
    if (count == LANES) return load(base, index, e);
    char some[VECTOR_BYTES] = {0};
    __builtin_memcpy(some, (const char *)base + index * bytes_of(e), count * bytes_of(e));
    return load(some, 0, e);
}

INLINE void store_first(void *base, int64_t index, int64_t count, floats value, enum element e) {
    halves upper = rounded_halves(value);
    __builtin_memcpy((char *)base + index * bytes_of(e), e == FLOAT32 ? (void *)&value : (void *)&upper,
                     (count == LANES ? LANES : count) * bytes_of(e));
}

INLINE floats splat(float value) { return value - (floats){0}; }

INLINE floats larger(floats a, floats b) {
    ints is_a = a > b;
    return (floats)(((ints)a & is_a) | ((ints)b & ~is_a));
}

/* a * b + c, rounded once where the CPU can. The compiler forms none by itself (-ffp-contract=off), as a sum's bits
 * would then depend on the compiler. Without the instruction a product is rounded, too: see `has_fused`. */
INLINE floats fused(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    floats result;
    for (int i = 0; i < LANES; i += 8)
        _mm256_storeu_ps((float *)&result + i,
                         _mm256_fmadd_ps(_mm256_loadu_ps((const float *)&a + i), _mm256_loadu_ps((const float *)&b + i),
                                         _mm256_loadu_ps((const float *)&c + i)));
    return result;
#elif defined(__ARM_FEATURE_FMA)
    floats result;
    for (int i = 0; i < LANES; i += 4)
        vst1q_f32((float *)&result + i, vfmaq_f32(vld1q_f32((const float *)&c + i), vld1q_f32((const float *)&a + i),
                                                  vld1q_f32((const float *)&b + i)));
    return result;
#else
    return a * b + c;
#endif
}

/* e^x for x <= 0, to 1e-7 of itself; 0 where that would be denormal; NaN stays NaN.
 * x = n ln 2 + r with |r| <= ln 2 / 2 (Cody & Waite's two-part ln 2), e^r by its Taylor polynomial of degree 7. */
INLINE floats exponential(floats x) {
    const floats shifter = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ints is_denormal = x <= splat(-87.0f);
    floats scaled = fused(x, splat(1.44269504f), shifter);
    floats n = scaled - shifter;
    floats r = fused(n, splat(-0.693359375f), x);
    r = fused(n, splat(2.12194440e-4f), r);
    floats p = splat(1.0f / 5040);
    p = fused(p, r, splat(1.0f / 720));
    p = fused(p, r, splat(1.0f / 120));
    p = fused(p, r, splat(1.0f / 24));
    p = fused(p, r, splat(1.0f / 6));
    p = fused(p, r, splat(0.5f));
    p = fused(p, r, splat(1.0f));
    p = fused(p, r, splat(1.0f));
    words power = ((words)scaled - (words)shifter + 127) << 23;
    return (floats)((ints)(p * (floats)power) & ~is_denormal);
}

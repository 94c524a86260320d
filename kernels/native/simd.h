// Vectors of the widest float registers that the compiler was told of, and the few functions needed on them.
#pragma once

#include <cstdint>
#include <cstring>

namespace fd {

#if defined(__AVX512F__)
constexpr int VW = 16;  // floats in a register
constexpr int MR = 14;  // rows of a register tile: MR * NV sums, NV weights and one input fill the registers
#else
constexpr int VW = 8;
constexpr int MR = 6;
#endif
constexpr int NV = 2;  // registers side by side in a tile
constexpr int NR = NV * VW;

typedef float vf __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef float vfu __attribute__((vector_size(4 * VW), aligned(4), may_alias));
static inline vf load(const float* p) { return *(const vfu*)p; }
static inline void store(float* p, vf v) { *(vfu*)p = v; }
static inline vf all(float x) { return x - vf{}; }  // x - 0 is x, and -0 stays -0

// Ask for a cache line: close by, in the second cache, or to be written. Not the compiler's builtin: gcc takes a function
// of nothing but those for one without effect, and drops the call.
static inline void fetch_near(const float* p) { asm volatile("prefetcht0 %0" : : "m"(*p)); }
static inline void fetch_far(const float* p) { asm volatile("prefetcht1 %0" : : "m"(*p)); }
static inline void fetch_to_write(const float* p) { asm volatile("prefetchw %0" : : "m"(*p)); }

static inline vf first(const float* p, int n) {  // n < VW floats, then zeros
    float t[VW] = {};
    memcpy(t, p, sizeof(float) * n);
    return load(t);
}
static inline void store_first(float* p, vf v, int n) {
    float t[VW];
    store(t, v);
    memcpy(p, t, sizeof(float) * n);
}
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline float sum(vf v) {
    float s = 0;
    for (int i = 0; i < VW; i++) s += v[i];
    return s;
}

// 2^x for x <= 0, to 2 units in the last place; below 2^-126 it stays there. NaN stays NaN.
static inline vf exp2_below(vf x) {
    x = x < -126.f ? all(-126.f) : x;
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    vf t = x + magic;
    vf f = x - (t - magic);
    vf p = all(0.00015469732f);  // fitted to 4e-9 on |f| <= 1/2
    p = p * f + 0.00134004322f;
    p = p * f + 0.0096180256f;
    p = p * f + 0.0555032721f;
    p = p * f + 0.240226512f;
    p = p * f + 0.693147207f;
    p = p * f + 1.f;
    return (vf)((vi)p + ((vi)t << 23));
}

// exp, to 2 units in the last place: 2^n * p(r), where p is the Taylor series of e^r on |r| <= ln 2 / 2. NaN stays NaN.
static inline vf exp(vf x) {
    x = x < -87.3f ? all(-87.3f) : x;
    x = x > 88.7f ? all(88.7f) : x;
    const float magic = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    vf t = x * 1.44269504f + magic;
    vf n = t - magic;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = all(1.f / 5040);
    p = p * r + 1.f / 720;
    p = p * r + 1.f / 120;
    p = p * r + 1.f / 24;
    p = p * r + 1.f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.f;
    p = p * r + 1.f;
    vi e = ((vi)t << 23) + (127 << 23);
    return p * (vf)e;
}
static inline vf silu(vf x) { return x / (1.f + exp(-x)); }

// x * Phi(x). Below 1 (of |x| / sqrt 2) erf is a polynomial, above it erfc is the exp of one; both fitted to 2e-9.
static inline vf gelu(vf x) {
    vf z = x * 0.70710678f;
    vf t = z < 0.f ? -z : z;
    vf u = z * z;
    vf p = all(7.88249712e-05f);
    p = p * u - 0.000801885499f;
    p = p * u + 0.00518931194f;
    p = p * u - 0.0268543288f;
    p = p * u + 0.112835975f;
    p = p * u - 0.376126269f;
    p = p * u + 1.12837917f;
    vf near = 0.5f + 0.5f * z * p;
    vf c = t > 4.2f ? all(4.2f) : t;  // erfc(4.2) is below half a unit in the last place of 1
    vf q = all(1.53505603e-06f);
    q = q * c - 4.4057206e-05f;
    q = q * c + 0.000580113525f;
    q = q * c - 0.00468233502f;
    q = q * c + 0.0262045862f;
    q = q * c - 0.109704484f;
    q = q * c - 0.632219066f;
    q = q * c - 1.1300069f;
    q = q * c + 0.000265100907f;
    vf tail = 0.5f * exp(q);
    tail = t > 4.2f ? vf{} : tail;
    vf far = z < 0.f ? tail : 1.f - tail;
    return x * (t < 1.f ? near : far);
}

}  // namespace fd

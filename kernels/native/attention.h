// Softmax attention, transposed: queries lie across the registers, keys go by, so the maximum and the sum of a query
// are those of a lane. Keys come in blocks, with a running maximum, so the scores of all of them are never held.
// Source: Dao et al. 2022, arXiv:2205.14135; Milakov and Gimelshein 2018, arXiv:1805.02867.
#pragma once

#include <cmath>

#include "gemm.h"
#include "op.h"

namespace fd {

constexpr int KEYS = 128;  // keys at once: their scores for a panel of queries stay in the first cache

// c[M][NR] += sum over k of a[k][0..M) b[k][NR]; a sum of sums of blocks rounds less than one long sum
template <int M>
static __attribute__((noinline)) void outer(const float* a, int64_t lda, int k, const float* b, float* c) {
    vf acc[M][NV];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) acc[m][n] = vf{};
    for (int i = 0; i < k; i++, a += lda, b += NR) {
        vf w[NV];
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) w[n] = load(b + n * VW);
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) {
            vf x = all(a[m]);
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) acc[m][n] += x * w[n];
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) store(c + m * NR + n * VW, load(c + m * NR + n * VW) + acc[m][n]);
}

typedef void (*Outer)(const float*, int64_t, int, const float*, float*);
template <int M> struct Outers {
    static void fill(Outer* t) {
        t[M] = outer<M>;
        Outers<M - 1>::fill(t);
    }
};
template <> struct Outers<0> {
    static void fill(Outer* t) { t[0] = nullptr; }
};
struct OuterTable {
    Outer by_rows[MR + 1];
    OuterTable() { Outers<MR>::fill(by_rows); }
};
static const OuterTable outers;

struct AttentionScratch {
    int64_t keys, values, q, scores, sums, bytes;  // where each starts, in floats
    explicit AttentionScratch(const Op& o) {
        const int64_t d = o.N / o.heads, all = round_up(o.M * d, 16);
        keys = 0;
        values = keys + all;
        q = values + all;
        scores = q + d * NR;
        sums = scores + (int64_t)KEYS * NR;
        bytes = round_up((sums + d * NR) * sizeof(float), 64);
    }
};
static inline Need attention_need(const Op& o) { return Need{0, AttentionScratch(o).bytes}; }

static void attention(const Op& o, void** slots, const Team& team) {
    const float *Q = (const float*)slots[o.src0], *K = (const float*)slots[o.src1], *V = (const float*)slots[o.weight];
    float* out = (float*)slots[o.out];
    const int d = o.N / o.heads, blocks = (o.L + NR - 1) / NR;
    const AttentionScratch at(o);
    float* mine = (float*)team.mine();
    float *keys = mine + at.keys, *values = mine + at.values, *q = mine + at.q, *scores = mine + at.scores,
          *sums = mine + at.sums;
    const float scale = 1.44269504f / std::sqrt((float)d);  // powers of two below, not of e
    int64_t begin, end, copied = -1;
    team.share((int64_t)o.B * o.heads * blocks, begin, end);
    for (int64_t u = begin; u < end; u++) {
        const int64_t pair = u / blocks, image = pair / o.heads;
        const int head = pair % o.heads, q0 = u % blocks * NR, rows = o.L - q0 < NR ? o.L - q0 : NR;
        if (pair != copied) {
            copied = pair;
            const float* k = K + image * o.batch_k + (int64_t)head * o.head_k;
            const float* v = V + image * o.batch_k + (int64_t)head * o.head_k;
            for (int n = 0; n < o.M; n++) {
                memcpy(keys + (int64_t)n * d, k + (int64_t)n * o.ldk, d * sizeof(float));
                memcpy(values + (int64_t)n * d, v + (int64_t)n * o.ldk, d * sizeof(float));
            }
        }
        for (int part = 0; part < NV; part++) {
            const float* from[VW];
            for (int i = 0; i < VW; i++) {
                const int r = part * VW + i;
                from[i] = r < rows ? Q + (image * o.L + q0 + r) * o.ld0 + head * d : nullptr;
            }
            transpose_rows(from, d, q + part * VW, NR);
        }
        for (int c = 0; c < d * NR; c += VW) store(q + c, load(q + c) * scale);
        memset(sums, 0, sizeof(float) * d * NR);
        vf top[NV], below[NV];
        for (int n = 0; n < NV; n++) top[n] = all(-3e38f), below[n] = vf{};
        for (int k0 = 0; k0 < o.M; k0 += KEYS) {
            const int count = o.M - k0 < KEYS ? o.M - k0 : KEYS;
            for (int part = 0; part < row_parts(count); part++) {
                const int a = row_start(count, part), b = row_start(count, part + 1);
                const float* from[MR];
                for (int i = a; i < b; i++) from[i - a] = keys + (int64_t)(k0 + i) * d;
                tiles.by_rows[b - a](from, &d, 1, q, scores + a * NR, NR, false);
            }
            vf peak[NV];
            for (int n = 0; n < NV; n++) peak[n] = top[n];
            for (int i = 0; i < count; i++)
#pragma GCC unroll 2
                for (int n = 0; n < NV; n++) peak[n] = larger(load(scores + i * NR + n * VW), peak[n]);
            vf less[NV];
            for (int n = 0; n < NV; n++) {
                less[n] = exp2_below(top[n] - peak[n]);
                top[n] = peak[n];
                below[n] *= less[n];
            }
            if (k0)
                for (int c = 0; c < d; c++)
                    for (int n = 0; n < NV; n++) {
                        float* s = sums + c * NR + n * VW;
                        store(s, load(s) * less[n]);
                    }
            vf block[NV] = {};
            for (int i = 0; i < count; i++)
#pragma GCC unroll 2
                for (int n = 0; n < NV; n++) {
                    float* s = scores + i * NR + n * VW;
                    const vf p = exp2_below(load(s) - top[n]);
                    store(s, p);
                    block[n] += p;
                }
            for (int n = 0; n < NV; n++) below[n] += block[n];
            for (int part = 0; part < row_parts(d); part++) {
                const int a = row_start(d, part), b = row_start(d, part + 1);
                outers.by_rows[b - a](values + (int64_t)k0 * d + a, d, count, scores, sums + a * NR);
            }
        }
        for (int n = 0; n < NV; n++) {
            const vf inverse = 1.f / below[n];
            for (int c0 = 0; c0 < d; c0 += VW) {  // back to a row for each query
                vf r[VW];
                for (int i = 0; i < VW; i++)
                    r[i] = c0 + i < d ? load(sums + (c0 + i) * NR + n * VW) * inverse : vf{};
                transpose(r);
                for (int i = 0; i < VW && n * VW + i < rows; i++) {
                    float* to = out + (image * o.L + q0 + n * VW + i) * o.ldo + head * d + c0;
                    d - c0 >= VW ? store(to, r[i]) : store_first(to, r[i], d - c0);
                }
            }
        }
    }
    team.wait();
}

}  // namespace fd

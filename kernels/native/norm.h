// Statistics of group normalisation, layer normalisation, and what else goes pixel by pixel.
#pragma once

#include "conv.h"

namespace fd {

constexpr int CHUNKS = 16;  // parts of an image that are summed apart: a fixed number, so that threads change nothing

static inline int chunks_of(const Op& o) {
    const int64_t pixels = (int64_t)o.H * o.W;
    return pixels < 64 ? 1 : pixels < 1024 ? 4 : CHUNKS;
}
static inline Need norm_need(const Op& o) {
    return Need{round_up((int64_t)o.B * chunks_of(o) * 2 * (o.C0 + o.C1) * sizeof(float), 64), 0};
}

// Sums of x - k and (x - k)^2 of some pixels, k being the image's first pixel: what is left of a large mean is small.
static inline void moments(const float* x, int64_t ld, const float* k, int64_t n, int C, float* sums, float* squares) {
    constexpr int U = 4;
    int c = 0;
    for (; c + U * VW <= C; c += U * VW) {
        vf s[U] = {}, q[U] = {}, first_one[U];
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) first_one[u] = load(k + c + u * VW);
        for (int64_t p = 0; p < n; p++)
#pragma GCC unroll 4
            for (int u = 0; u < U; u++) {
                vf d = load(x + p * ld + c + u * VW) - first_one[u];
                s[u] += d;
                q[u] += d * d;
            }
#pragma GCC unroll 4
        for (int u = 0; u < U; u++) store(sums + c + u * VW, s[u]), store(squares + c + u * VW, q[u]);
    }
    for (; c < C; c += VW) {
        const int left = C - c < VW ? C - c : VW;
        vf s = {}, q = {};
        const vf first_one = first(k + c, left);
        for (int64_t p = 0; p < n; p++) {
            vf d = (left == VW ? load(x + p * ld + c) : first(x + p * ld + c, left)) - first_one;
            s += d;
            q += d * d;
        }
        store_first(sums + c, s, left), store_first(squares + c, q, left);
    }
}

// Write, for every image and channel, the scale and shift that normalise it: out[B][2][C].
static void norm(const Op& o, void** slots, const Team& team) {
    const Sources s = sources_of(o, slots);
    const int C = s.all(), chunks = chunks_of(o);
    const int64_t pixels = (int64_t)o.H * o.W;
    float *partial = (float*)team.scratch, *out = (float*)slots[o.out];
    int64_t begin, end;
    team.share((int64_t)o.B * chunks, begin, end);
    for (int64_t u = begin; u < end; u++) {
        const int64_t image = u / chunks, chunk = u % chunks;
        const int64_t p0 = pixels * chunk / chunks, p1 = pixels * (chunk + 1) / chunks;
        for (int i = 0, c = 0; i < s.count(); c += s.channels[i++]) {
            const float* x = s.base[i] + image * pixels * s.ld[i];
            moments(x + p0 * s.ld[i], s.ld[i], x, p1 - p0, s.channels[i], partial + u * 2 * C + c,
                    partial + u * 2 * C + C + c);
        }
    }
    team.wait();
    const float *gamma = o.weight < 0 ? nullptr : (const float*)slots[o.weight],
                *beta = o.bias < 0 ? nullptr : (const float*)slots[o.bias],
                *row = o.row < 0 ? nullptr : (const float*)slots[o.row];
    const int width = C / o.groups;
    team.share((int64_t)o.B * o.groups, begin, end);
    for (int64_t u = begin; u < end; u++) {
        const int64_t image = u / o.groups;
        const int c0 = u % o.groups * width;
        double mean = 0, total = 0;
        auto shift_of = [&](int c) -> double {
            const int i = c >= s.channels[0];
            return s.base[i][image * pixels * s.ld[i] + (i ? c - s.channels[0] : c)];
        };
        auto sum_of = [&](int c, int which) {
            double t = 0;
            for (int k = 0; k < chunks; k++) t += partial[((image * chunks + k) * 2 + which) * C + c];
            return t;
        };
        for (int c = c0; c < c0 + width; c++) mean += shift_of(c) + sum_of(c, 0) / pixels;
        mean /= width;
        for (int c = c0; c < c0 + width; c++) {  // mean of (x - mean)^2, from moments about k
            const double a = sum_of(c, 0) / pixels, d = mean - shift_of(c);
            total += sum_of(c, 1) / pixels - 2 * d * a + d * d;
        }
        const double inverse = 1 / std::sqrt(total / width + o.eps);
        for (int c = c0; c < c0 + width; c++) {
            double scale = inverse * (gamma ? gamma[c] : 1), shift = (beta ? beta[c] : 0) - mean * scale;
            if (row) {  // modulation: y * (1 + scale) + shift, from the two halves of the time row
                const double more = 1 + (double)row[image * o.row_stride + c];
                scale *= more;
                shift = shift * more + row[image * o.row_stride + C + c];
            }
            out[image * 2 * C + c] = scale;
            out[image * 2 * C + C + c] = shift;
        }
    }
    team.wait();
}

static void layer_norm(const Op& o, void** slots, const Team& team) {
    const float *x = (const float*)slots[o.src0], *gamma = (const float*)slots[o.weight],
                *beta = (const float*)slots[o.bias];
    float* out = (float*)slots[o.out];
    const int C = o.C0;
    int64_t begin, end;
    team.share((int64_t)o.B * o.H * o.W, begin, end);
    for (int64_t r = begin; r < end; r++) {
        const float* from = x + r * o.ld0;
        float* to = out + r * o.ldo;
        auto part = [&](const float* p, int c) { return c + VW <= C ? load(p + c) : first(p + c, C - c); };
        vf s = {}, q = {};
        for (int c = 0; c < C; c += VW) s += part(from, c);
        const float mean = sum(s) / C;
        for (int c = 0; c < C; c += VW) {
            vf d = part(from, c) - mean;
            for (int i = C - c; i < VW; i++) d[i] = 0;
            q += d * d;
        }
        const float inverse = 1 / std::sqrt(sum(q) / C + o.eps);
        for (int c = 0; c < C; c += VW) {
            vf v = (part(from, c) - mean) * inverse * part(gamma, c) + part(beta, c);
            c + VW <= C ? store(to + c, v) : store_first(to + c, v, C - c);
        }
    }
    team.wait();
}

// Halve by means of 2x2 pixels, or repeat pixels; norm and activation come before.
static void resample(const Op& o, void** slots, const Team& team) {
    const Sources s = sources_of(o, slots);
    const float* stats = o.affine ? (const float*)slots[o.stats] : nullptr;
    float *out = (float*)slots[o.out], *x = (float*)team.scratch;
    apply_affine(o, s, stats, x, team);
    const int C = s.all();
    int64_t begin, end;
    team.share((int64_t)o.B * o.H * o.W, begin, end);
    for (int64_t r = begin; r < end; r++) {
        const int64_t image = r / ((int64_t)o.H * o.W), y = r / o.W % o.H, col = r % o.W;
        float* to = out + r * o.ldo;
        if (o.SH <= o.H) {
            memcpy(to, x + ((image * o.SH + nearest(y, o.SH, o.H)) * o.SW + nearest(col, o.SW, o.W)) * C,
                   C * sizeof(float));
            continue;
        }
        const float* a = x + ((image * o.SH + 2 * y) * o.SW + 2 * col) * C;
        const float* b = a + (int64_t)o.SW * C;
        for (int c = 0; c < C; c++) to[c] = (a[c] + a[C + c] + b[c] + b[C + c]) * 0.25f;
    }
    team.wait();
}
static inline Need resample_need(const Op& o) {
    return Need{round_up((int64_t)o.B * o.SH * o.SW * (o.C0 + o.C1) * sizeof(float), 64), 0};
}

static void add(const Op& o, void** slots, const Team& team) {
    const float *a = (const float*)slots[o.src0], *b = (const float*)slots[o.residual];
    float* out = (float*)slots[o.out];
    int64_t begin, end;
    team.share((int64_t)o.B * o.H * o.W, begin, end);
    for (int64_t r = begin; r < end; r++)
        for (int c = 0; c < o.C0; c++) out[r * o.ldo + c] = a[r * o.ld0 + c] + b[r * o.ldr + c];
    team.wait();
}

}  // namespace fd

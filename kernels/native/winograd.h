// 3x3 convolutions by Winograd's F(m x m, 3 x 3): (m + 2)^2 products for m * m results instead of 9 * m * m.
// The matrices are in fastdiff/kernels/winograd.py. Source: Lavin and Gray 2015, arXiv:1509.09308.
//
// Every tile of the (normalised, activated, perhaps enlarged) image is transformed; then each of the (m + 2)^2
// frequencies is a matrix product; then the results are transformed back, with bias, time row and residual added. The
// middle and last steps go panel by panel, so that what lies between them stays in the cache. Weights are transformed
// beforehand ([panel][frequency][C][NR]), or on the way: a few tiles' products pay for it, and it reads a quarter.
#pragma once

#include "conv.h"

namespace fd {

// Bytes of transformed image at once. Every round reads (or makes) all transformed weights again: where these are few,
// rounds are short, and what a round makes stays in the cache until it is read.
constexpr int64_t LONG_ROUND = 12 << 20, SHORT_ROUND = 4 << 20, FEW_WEIGHTS = 16 << 20;
constexpr int SPAN = 128;                  // channels of weights that are read at once
constexpr int TILES = 42;                  // tiles at once, between product and back-transform
constexpr int STRIP = 64;                  // channels of a strip of image that is normalised and transformed
constexpr int64_t FRESH = 600 << 10;       // bytes of weights transformed on the way that stay close

template <int m> struct Winograd;

template <> struct Winograd<4> {
    static constexpr int T = 6;
    template <typename V> static inline void image(const V* d, V* t) {
        V a = d[4] - 4.f * d[2], b = d[3] - 4.f * d[1], c = d[4] - d[2], e = 2.f * (d[3] - d[1]);
        t[0] = 4.f * d[0] - 5.f * d[2] + d[4];
        t[1] = a + b;
        t[2] = a - b;
        t[3] = c + e;
        t[4] = c - e;
        t[5] = 4.f * d[1] - 5.f * d[3] + d[5];
    }
    template <typename V> static inline void kernel(const V* g, V* t) {
        V a = (g[0] + g[2]) * (-1.f / 6), b = g[1] * (1.f / 6);
        V c = g[0] * (1.f / 24) + g[2] * (1.f / 6), d = g[1] * (1.f / 12);
        t[0] = g[0] * 0.25f;
        t[1] = a - b;
        t[2] = a + b;
        t[3] = c + d;
        t[4] = c - d;
        t[5] = g[2];
    }
    template <typename V> static inline void result(const V* p, V* y) {
        V a = p[1] + p[2], b = p[1] - p[2], c = p[3] + p[4], d = p[3] - p[4];
        y[0] = p[0] + a + c;
        y[1] = b + 2.f * d;
        y[2] = a + 4.f * c;
        y[3] = b + 8.f * d + p[5];
    }
};

template <> struct Winograd<2> {
    static constexpr int T = 4;
    template <typename V> static inline void image(const V* d, V* t) {
        t[0] = d[0] - d[2];
        t[1] = d[1] + d[2];
        t[2] = d[2] - d[1];
        t[3] = d[1] - d[3];
    }
    template <typename V> static inline void kernel(const V* g, V* t) {
        V a = (g[0] + g[2]) * 0.5f, b = g[1] * 0.5f;
        t[0] = g[0];
        t[1] = a + b;
        t[2] = a - b;
        t[3] = g[2];
    }
    template <typename V> static inline void result(const V* p, V* y) {
        y[0] = p[0] + p[1] + p[2];
        y[1] = p[1] - p[2] - p[3];
    }
};

// Weights W[N][3][3][C], channels [c0, c1) of one panel: out[frequency][c1 - c0][NR], frequencies `step` apart
template <int m>
static void transform_weights(const float* w, int N, int C, int panel, int c0, int c1, float* out, int64_t step) {
    constexpr int T = Winograd<m>::T;
    float taps[9 * SPAN * VW];
    const float* rows[VW];
    for (int v = 0; v < NV; v++)
        for (int c = c0; c < c1; c += SPAN) {
            const int span = c1 - c < SPAN ? c1 - c : SPAN;
            for (int tap = 0; tap < 9; tap++) {
                for (int i = 0; i < VW; i++) {
                    const int n = panel * NR + v * VW + i;
                    rows[i] = n < N ? w + ((int64_t)n * 9 + tap) * C + c : nullptr;
                }
                transpose_rows(rows, span, taps + tap * SPAN * VW, VW);
            }
            for (int k = 0; k < span; k++) {
                vf g[3], t[T], columns[T][3];
#pragma GCC unroll 3
                for (int x = 0; x < 3; x++) {
#pragma GCC unroll 3
                    for (int y = 0; y < 3; y++) g[y] = load(taps + ((y * 3 + x) * SPAN + k) * VW);
                    Winograd<m>::kernel(g, t);
#pragma GCC unroll 6
                    for (int y = 0; y < T; y++) columns[y][x] = t[y];
                }
                float* to = out + (int64_t)(c - c0 + k) * NR + v * VW;
#pragma GCC unroll 6
                for (int y = 0; y < T; y++) {
                    Winograd<m>::kernel(columns[y], t);
#pragma GCC unroll 6
                    for (int x = 0; x < T; x++) store(to + (y * T + x) * step, t[x]);
                }
            }
        }
}

// A share of one panel's weights, channels [c0, c1), that are transformed next
static inline void fetch_weights(const float* w, int N, int C, int panel, int c0, int c1, int share, int shares) {
    const int from = 9 * NR * share / shares, to = 9 * NR * (share + 1) / shares;
    for (int i = from; i < to; i++) {
        const int n = panel * NR + i / 9;
        if (n >= N) return;
        for (int c = c0; c < c1; c += 16) fetch_far(w + ((int64_t)n * 9 + i % 9) * C + c);
    }
}

template <int m> struct WinogradConv {
    static constexpr int T = Winograd<m>::T, F = T * T;

    struct Shape {
        int C, ld, down, across, rows_at_once, panels;  // tiles down and across; tile rows of one round
        int64_t most;                               // tiles of one round
    };
    static Shape shape(const Op& o) {
        Shape s;
        s.C = o.C0 + o.C1;
        s.ld = s.C % 256 ? s.C : s.C + 16;  // see `spread`
        s.down = (o.H + m - 1) / m;
        s.across = (o.W + m - 1) / m;
        s.panels = panel_count(o.N, false);
        const int64_t row = (int64_t)F * s.across * s.C * sizeof(float), all = (int64_t)o.B * s.down;
        const int64_t weights = (int64_t)F * s.C * o.N * sizeof(float);
        const int64_t at_once = weights <= FEW_WEIGHTS ? SHORT_ROUND : LONG_ROUND;
        const int64_t rounds = (row * all + at_once - 1) / at_once;
        s.rows_at_once = (all + rounds - 1) / rounds;
        s.most = (int64_t)s.rows_at_once * s.across;
        return s;
    }
    static int fresh(const Shape& s) {  // channels of weights that are transformed at once on the way
        if (s.most > TILES) return s.C;
        const int most = FRESH / (F * NR * (int)sizeof(float)), parts = (s.C + most - 1) / most;
        return (int)round_up((s.C + parts - 1) / parts, VW);
    }
    static int64_t strip_bytes(const Shape& s) {
        return round_up((int64_t)T * (s.across * m + 2) * STRIP * sizeof(float), 64);
    }
    static Need need(const Op& o) {
        const Shape s = shape(o);
        Need n;
        n.shared = round_up(F * spread(s.most * s.ld) * sizeof(float), 64);
        int64_t own = F * spread(TILES * NR) * sizeof(float);
        if (!o.packed) own += F * spread((int64_t)fresh(s) * NR) * sizeof(float);
        n.own = round_up(own > strip_bytes(s) ? own : strip_bytes(s), 64);
        return n;
    }

    // One row of tiles, channels [c, c + n) of the result's sources: read, normalise, pad, transform
    static void image(const Op& o, const Sources& src, const Shape& s, const float* stats, int64_t tile_row, int c,
                      int n, float* strip, float* to, int64_t step) {
        const int64_t n_image = tile_row / s.down, ty = tile_row % s.down;
        const int wide = s.across * m + 2, i = c >= src.channels[0];
        const int channel = i ? c - src.channels[0] : c;
        const float *scale = nullptr, *shift = nullptr;
        if (stats) scale = stats + n_image * 2 * s.C + c, shift = scale + s.C;
        for (int y = 0; y < T; y++) {
            const int vy = ty * m + y - 1;
            for (int x = 0; x < wide; x++) {
                const int vx = x - 1;
                float* dst = strip + (int64_t)(y * wide + x) * STRIP;
                if (vy < 0 || vx < 0 || vy >= o.VIEW_H || vx >= o.VIEW_W) {
                    memset(dst, 0, n * sizeof(float));
                    continue;
                }
                const int64_t sy = nearest(vy, o.SH, o.VIEW_H), sx = nearest(vx, o.SW, o.VIEW_W);
                affine_row(src.base[i] + ((n_image * o.SH + sy) * o.SW + sx) * src.ld[i] + channel, scale, shift,
                           o.silu, n, dst);
            }
        }
        for (int tx = 0; tx < s.across; tx++)
            for (int k = 0; k < n; k += VW) {
                vf d[T], t[T], rows[T][T];
#pragma GCC unroll 6
                for (int x = 0; x < T; x++) {
#pragma GCC unroll 6
                    for (int y = 0; y < T; y++) d[y] = load(strip + (int64_t)(y * wide + tx * m + x) * STRIP + k);
                    Winograd<m>::image(d, t);
#pragma GCC unroll 6
                    for (int y = 0; y < T; y++) rows[y][x] = t[y];
                }
                float* z = to + (int64_t)tx * s.ld + c + k;
#pragma GCC unroll 6
                for (int y = 0; y < T; y++) {
                    Winograd<m>::image(rows[y], t);
#pragma GCC unroll 6
                    for (int x = 0; x < T; x++) store(z + (y * T + x) * step, t[x]);
                }
            }
    }

    static void result(const Op& o, const Shape& s, const Epilogue& e, float* out, int64_t tile, int n0,
                       const float* sums, int64_t step) {
        const int64_t tile_row = tile / s.across, image = tile_row / s.down;
        const int y0 = tile_row % s.down * m, x0 = tile % s.across * m;
        for (int v = 0; v < NR && n0 + v < o.N; v += VW) {
            vf p[T], y[m], rows[m][T];
#pragma GCC unroll 6
            for (int x = 0; x < T; x++) {
#pragma GCC unroll 6
                for (int i = 0; i < T; i++) p[i] = load(sums + (i * T + x) * step + v);
                Winograd<m>::result(p, y);
#pragma GCC unroll 6
                for (int i = 0; i < m; i++) rows[i][x] = y[i];
            }
            const int n = n0 + v, count = o.N - n;
#pragma GCC unroll 6
            for (int i = 0; i < m; i++) {
                if (y0 + i >= o.H) break;
                Winograd<m>::result(rows[i], y);
                for (int x = 0; x < m && x0 + x < o.W; x++) {
                    const int64_t pixel = (image * o.H + y0 + i) * o.W + x0 + x;
                    const vf value = finished(y[x], e, image, pixel, n, count);
                    float* z = out + pixel * o.ldo + n;
                    count >= VW ? store(z, value) : store_first(z, value, count);
                }
            }
        }
    }

    static void run(const Op& o, void** slots, const Team& team) {
        const Sources src = sources_of(o, slots);
        const Epilogue e = epilogue_of(o, slots);
        const float* stats = o.affine ? (const float*)slots[o.stats] : nullptr;
        const float* weight = (const float*)slots[o.weight];
        float* out = (float*)slots[o.out];
        const Shape s = shape(o);
        float *shared = (float*)team.scratch, *mine = (float*)team.mine();
        float *sums = mine, *fresh_weights = mine + F * spread(TILES * NR);
        const int at_once = fresh(s), blocks = (src.channels[0] + STRIP - 1) / STRIP,
                  all_blocks = blocks + (src.channels[1] + STRIP - 1) / STRIP;
        const int64_t all = (int64_t)o.B * s.down;
        for (int64_t r0 = 0; r0 < all; r0 += s.rows_at_once) {
            const int64_t rows = r0 + s.rows_at_once < all ? s.rows_at_once : all - r0, count = rows * s.across;
            const int64_t step = spread(count * s.ld);
            int64_t begin, end;
            team.share(rows * all_blocks, begin, end);
            for (int64_t u = begin; u < end; u++) {
                const int64_t row = u / all_blocks;
                const int b = u % all_blocks, i = b >= blocks;
                const int c = i ? (b - blocks) * STRIP : b * STRIP, left = src.channels[i] - c;
                image(o, src, s, stats, r0 + row, i ? src.channels[0] + c : c, left < STRIP ? left : STRIP, mine,
                      shared + row * s.across * s.ld, step);
            }
            team.wait();
            int by_tiles = 1, by_panels = 1;
            grid(row_parts(count), s.panels, team.size, by_tiles, by_panels);
            if (team.rank < by_tiles * by_panels) {
                const int i = team.rank / by_panels, j = team.rank % by_panels;
                const int64_t t0 = count * i / by_tiles, t1 = count * (i + 1) / by_tiles;
                for (int p = s.panels * j / by_panels; p < s.panels * (j + 1) / by_panels; p++) {
                    const int groups = (t1 - t0 + TILES - 1) / TILES;
                    if (!o.packed && at_once == s.C)
                        transform_weights<m>(weight, o.N, s.C, p, 0, s.C, fresh_weights, spread((int64_t)s.C * NR));
                    for (int group = 0; group < groups; group++) {
                        const int64_t ta = t0 + (t1 - t0) * group / groups, tb = t0 + (t1 - t0) * (group + 1) / groups;
                        const int wide = tb - ta;
                        for (int c0 = 0; c0 < s.C; c0 += at_once) {
                            const int c1 = c0 + at_once < s.C ? c0 + at_once : s.C;
                            const int64_t w_step = o.packed ? (int64_t)s.C * NR : spread((int64_t)(c1 - c0) * NR);
                            if (!o.packed && at_once < s.C)
                                transform_weights<m>(weight, o.N, s.C, p, c0, c1, fresh_weights, w_step);
                            const float* w = o.packed ? weight + ((int64_t)p * F * s.C + c0) * NR : fresh_weights;
                            const int len = c1 - c0;
                            for (int f = 0; f < F; f++) {
                                if (!o.packed && at_once < s.C) {
                                    const bool same = c1 < s.C;
                                    const int next = same ? c1 : 0, end = next + at_once < s.C ? next + at_once : s.C;
                                    fetch_weights(weight, o.N, s.C, same ? p : p + 1, next, end, f, F);
                                }
                                for (int part = 0; part < row_parts(wide); part++) {
                                    const int a = row_start(wide, part), b = row_start(wide, part + 1);
                                    const float* rows_of[MR];
                                    for (int k = a; k < b; k++)
                                        rows_of[k - a] = shared + f * step + (ta + k) * s.ld + c0;
                                    tiles.by_rows[b - a](rows_of, &len, 1, w + f * w_step,
                                                         sums + f * spread(wide * NR) + a * NR, NR, c0 > 0);
                                }
                            }
                        }
                        for (int k = 0; k < wide; k++)
                            result(o, s, e, out, r0 * s.across + ta + k, p * NR, sums + k * NR, spread(wide * NR));
                    }
                }
            }
            team.wait();
        }
    }
};

}  // namespace fd

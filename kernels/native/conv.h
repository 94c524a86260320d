// Convolutions and linear layers as one product; the image's rows are found through pointers.
#pragma once

#include <cmath>

#include "gemm.h"
#include "op.h"

namespace fd {

constexpr int KC = 1024, LEAST_KC = 768;  // bounds of a block of K
constexpr int SUM = 512;  // most terms of one running sum: a sum of such sums rounds less than one long one
constexpr int64_t L2 = 512 << 10;  // bytes of packed panels that stay close
constexpr int FEW = 16;           // channels below which the pieces are gathered first
constexpr int64_t COPIED = MR * (KC + 48 * PIECES);  // floats of rows that are copied
constexpr int MOST_CHANNELS = 8192;  // of a source that a 3x3 kernel slides over

// dst = affine of src (see NORM), and SiLU, for `n` channels of one pixel; scale is null for a plain copy
static inline void affine_row(const float* src, const float* scale, const float* shift, bool act, int n, float* dst) {
    int c = 0;
    for (; c + VW <= n; c += VW) {
        vf v = load(src + c);
        if (scale) v = v * load(scale + c) + load(shift + c);
        store(dst + c, act ? silu(v) : v);
    }
    if (c < n) {
        vf v = first(src + c, n - c);
        if (scale) v = v * first(scale + c, n - c) + first(shift + c, n - c);
        store_first(dst + c, act ? silu(v) : v, n - c);
    }
}

// Floats from one row to the next: an odd number of cache lines, or all rows would share a few sets of the cache.
static inline int64_t spread(int64_t floats) { return round_up(floats, 32) + 16; }
static inline bool crowded(int64_t ld) { return ld % 512 == 0; }

struct Sources {
    const float* base[2];
    int64_t ld[2];
    int channels[2];
    int count() const { return channels[1] ? 2 : 1; }
    int all() const { return channels[0] + channels[1]; }
};

static inline Sources sources_of(const Op& o, void** slots) {
    Sources s;
    s.base[0] = (const float*)slots[o.src0];
    s.base[1] = o.C1 ? (const float*)slots[o.src1] : nullptr;
    s.ld[0] = o.ld0;
    s.ld[1] = o.ld1;
    s.channels[0] = o.C0;
    s.channels[1] = o.C1;
    return s;
}

// torch's nearest neighbour: the stored row of an enlarged image's row
static inline int nearest(int y, int stored, int shown) {
    if (stored == shown) return y;
    if (2 * stored == shown) return y >> 1;
    const int i = (int)std::floor(y * ((float)stored / (float)shown));
    return i < stored ? i : stored - 1;
}

// Apply norm and activation to every stored pixel, side by side into dst[pixels][C0 + C1].
static inline void apply_affine(const Op& o, const Sources& s, const float* stats, float* dst, const Team& team) {
    int64_t begin, end;
    const int C = s.all();
    const int64_t pixels = (int64_t)o.SH * o.SW;
    team.share(o.B * pixels, begin, end);
    for (int64_t p = begin; p < end; p++) {
        const float* scale = stats ? stats + p / pixels * 2 * C : nullptr;
        for (int i = 0, c = 0; i < s.count(); c += s.channels[i++])
            affine_row(s.base[i] + p * s.ld[i], scale ? scale + c : nullptr, scale ? scale + C + c : nullptr, o.silu,
                       s.channels[i], dst + p * C + c);
    }
    team.wait();
}

struct Epilogue {
    const float *bias, *row, *residual;
    int64_t row_stride, ldr;
};

static inline Epilogue epilogue_of(const Op& o, void** slots) {
    Epilogue e;
    e.bias = o.bias < 0 ? nullptr : (const float*)slots[o.bias];
    e.row = o.row < 0 ? nullptr : (const float*)slots[o.row];
    e.residual = o.residual < 0 ? nullptr : (const float*)slots[o.residual];
    e.row_stride = o.row_stride;
    e.ldr = o.ldr;
    return e;
}

// Columns [n, n + VW) of one pixel of one image, or fewer at the end
static inline vf finished(vf v, const Epilogue& e, int64_t image, int64_t pixel, int n, int count) {
    if (count >= VW) {
        if (e.bias) v += load(e.bias + n);
        if (e.row) v += load(e.row + image * e.row_stride + n);
        if (e.residual) v += load(e.residual + pixel * e.ldr + n);
    } else {
        if (e.bias) v += first(e.bias + n, count);
        if (e.row) v += first(e.row + image * e.row_stride + n, count);
        if (e.residual) v += first(e.residual + pixel * e.ldr + n, count);
    }
    return v;
}

// How much of K is taken at once: as much as lets half of all panels stay close, so that rows pass by few times. It sets
// the order of summation, so it must not depend on the number of threads.
static inline int block_of_k(const Op& o) {
    const int64_t k = L2 / (panel_count(o.N, o.gated) * (int64_t)NR * sizeof(float) / 2 + 1) / 16 * 16;
    return k < LEAST_KC ? LEAST_KC : k > KC ? KC : (int)k;
}

struct Product {
    const Op& o;
    Sources s;
    const float* weight;
    float* out;
    Epilogue e;
    int kernel, taps, C;
    int64_t K, rows, pixels;
    float* rows_copy;

    bool plain() const { return kernel == 1 && o.stride == 1 && o.SH == o.VIEW_H && o.SW == o.VIEW_W; }

    struct Place {
        int64_t row, image;
        int y, x;
    };
    Place place(int64_t r) const {
        if (plain()) return Place{r, 0, 0, 0};
        return Place{r, r / pixels, (int)(r % pixels) / o.W, (int)(r % pixels) % o.W};
    }
    const float* at(const Place& at, const Piece& p) const {  // where a row finds a piece
        static const float zeros[MOST_CHANNELS] = {};
        const int i = p.source;
        if (plain()) return s.base[i] + at.row * s.ld[i] + p.channel;
        const int vy = at.y * o.stride + p.tap / kernel - o.pad, vx = at.x * o.stride + p.tap % kernel - o.pad;
        if (vy < 0 || vx < 0 || vy >= o.VIEW_H || vx >= o.VIEW_W) return zeros;
        const int sy = nearest(vy, o.SH, o.VIEW_H), sx = nearest(vx, o.SW, o.VIEW_W);
        return s.base[i] + ((at.image * o.SH + sy) * o.SW + sx) * s.ld[i] + p.channel;
    }

    // Rows [r0, r1) of panels [p0, p1): K in blocks; the panels of a block are packed, then meet all rows.
    void run(int64_t r0, int64_t r1, int p0, int p1, bool whole, float* pack) const {
        const int limit = whole ? 1 << 30 : block_of_k(o);
        const int cut = whole && K > 16 * SUM ? (int)(K / 16 + 1) : SUM;  // all of K has to fit into PIECES
        Piece pieces[PIECES];
        int lens[PIECES];
        int tap = 0, source = 0, channel = 0;
        bool add = false;
        int64_t done = 0;
        while (tap < taps) {
            int n = 0, total = 0;
            while (tap < taps && n < PIECES && total < limit) {
                const int rest = s.channels[source] - channel;
                const int left = limit - total < cut ? limit - total : cut, len = rest < left ? rest : left;
                pieces[n] = Piece{tap, source, channel, len, (int64_t)tap * C + (source ? s.channels[0] : 0) + channel};
                lens[n++] = len;
                total += len;
                channel += len;
                if (channel == s.channels[source]) {
                    channel = 0;
                    if (++source == s.count()) source = 0, tap++;
                }
            }
            const bool last = tap == taps;
            int group = L2 / ((int64_t)total * NR * sizeof(float));
            group = group < 1 ? 1 : group;
            for (int p = p0; p < p1; p += group) {
                const int q = p + group < p1 ? p + group : p1;
                block(r0, r1, p, q, q + group < p1 ? q + group : p1, pieces, lens, n, total, done, add, last, pack);
            }
            done += total;
            add = true;
        }
    }

    void block(int64_t r0, int64_t r1, int p0, int p1, int next, const Piece* pieces, const int* lens, int n, int total,
               int64_t done, bool add, bool last, float* pack) const {
        if (!o.packed)
            for (int p = p0; p < p1; p++) {
                float* to = pack + (int64_t)(p - p0) * total * NR;
                for (int i = 0; i < n; to += (int64_t)lens[i++] * NR)
                    pack_piece(weight, K, o.N, o.gated, p, pieces[i].column, lens[i], to);
            }
        const int count = r1 - r0, parts = row_parts(count);
        const bool copies = total <= KC && crowded(s.ld[0]);
        for (int part = 0; part < parts; part++) {
            const int64_t r = r0 + row_start(count, part);
            const int m = r0 + row_start(count, part + 1) - r;
            const float* a[PIECES * MR];
            for (int j = 0; j < m; j++) {
                const Place here = place(r + j);
                for (int i = 0; i < n; i++) a[i * m + j] = at(here, pieces[i]);
            }
            if (copies) {
                float* to = rows_copy;
                for (int i = 0; i < n; i++)
                    for (int j = 0; j < m; j++, to += spread(lens[i])) {
                        memcpy(to, a[i * m + j], lens[i] * sizeof(float));
                        a[i * m + j] = to;
                    }
            }
            for (int p = p0; p < p1; p++) {
                const float* b = o.packed ? weight + ((int64_t)p * K + done) * NR
                                          : pack + (int64_t)(p - p0) * total * NR;
                if (!o.gated) fetch(r, m, p);
                if (!o.packed && next > p1)
                    fetch_weights(p1, next, pieces, n, total, part * (p1 - p0) + p - p0, parts * (p1 - p0));
                float t[MR * NR];
                sum(a, lens, n, m, b, t);
                o.gated ? finish_gated(t, r, m, p) : finish(t, r, m, p, add, last);
            }
        }
    }

    // t[m][NR] = all pieces' products, in running sums of at most SUM terms (or one piece)
    static void sum(const float* const* a, const int* lens, int n, int m, const float* b, float* t) {
        float more[MR * NR];
        for (int i = 0, j; i < n; i = j) {
            int terms = lens[i];
            for (j = i + 1; j < n && terms + lens[j] <= SUM; j++) terms += lens[j];
            tiles.by_rows[m](a + i * m, lens + i, j - i, b, i ? more : t, NR, false);
            if (i)
                for (int k = 0; k < m * NR; k += VW) store(t + k, load(t + k) + load(more + k));
            b += (int64_t)terms * NR;
        }
    }

    // A share of the weights of the panels that are packed next
    void fetch_weights(int p0, int p1, const Piece* pieces, int n, int total, int share, int shares) const {
        const int rows = (p1 - p0) * NR, from = (int64_t)rows * share / shares, to = (int64_t)rows * (share + 1) / shares;
        for (int i = from; i < to; i++) {
            const int row = weight_row(p0 + i / NR, i % NR, o.N, o.gated);
            if (row < 0 || row >= weight_rows(o.N, o.gated)) continue;
            for (int j = 0; j < n; j++)
                for (int k = 0; k < pieces[j].len; k += 16)
                    fetch_far(weight + row * K + pieces[j].column + k);
        }
    }

    void fetch(int64_t r, int m, int p) const {  // what `finish` will write to
        for (int j = 0; j < m; j++)
            for (int v = 0; v < NR; v += 16) {
                fetch_to_write(out + (r + j) * o.ldo + p * NR + v);
                if (e.residual) fetch_near(e.residual + (r + j) * e.ldr + p * NR + v);
            }
    }

    void finish(const float* t, int64_t r, int m, int p, bool add, bool last) const {
        for (int j = 0; j < m; j++, t += NR) {
            float* z = out + (r + j) * o.ldo;
            const int64_t image = e.row ? (r + j) / pixels : 0;
            for (int v = 0; v < NR && p * NR + v < o.N; v += VW) {
                const int n = p * NR + v, count = o.N - n;
                vf x = load(t + v);
                if (count >= VW) {
                    if (add) x += load(z + n);
                    store(z + n, last ? finished(x, e, image, r + j, n, count) : x);
                } else {
                    if (add) x += first(z + n, count);
                    store_first(z + n, last ? finished(x, e, image, r + j, n, count) : x, count);
                }
            }
        }
    }

    void finish_gated(const float* t, int64_t r, int m, int p) const {  // values in one register, gates in the other
        for (int j = 0; j < m; j++, t += NR) {
            float* z = out + (r + j) * o.ldo;
            const int n = p * VW, count = o.N - n;
            vf value = load(t), gate = load(t + VW);
            if (e.bias) {
                value += count >= VW ? load(e.bias + n) : first(e.bias + n, count);
                gate += count >= VW ? load(e.bias + o.N + n) : first(e.bias + o.N + n, count);
            }
            value *= gelu(gate);
            count >= VW ? store(z + n, value) : store_first(z + n, value, count);
        }
    }
};

static inline bool gathers(const Op& o) { return o.kernel > 1 && o.C0 + o.C1 < FEW; }

static inline Need conv_need(const Op& o) {
    const int64_t C = o.C0 + o.C1, K = (int64_t)o.kernel * o.kernel * C;
    Need need = {0, 0};
    if (o.affine || o.silu) need.shared += round_up((int64_t)o.B * o.SH * o.SW * C * sizeof(float), 64);
    if (gathers(o)) need.shared += round_up((int64_t)o.B * o.H * o.W * K * sizeof(float), 64);
    int64_t own = COPIED * sizeof(float);
    if (!o.packed) own += L2 + (int64_t)KC * NR * sizeof(float);
    if (!o.packed && o.gated) own += K * NR * sizeof(float);
    need.own = round_up(own, 64);
    return need;
}

// The grid of row and panel shares that leaves the busiest thread least to do; packing counts as a few rows' work.
static inline void grid(int64_t parts, int panels, int threads, int& by_rows, int& by_panels) {
    int64_t best = INT64_MAX;
    for (int r = 1; r <= threads; r++) {
        const int p = threads / r;
        const int64_t cost = ((parts + r - 1) / r + 1) * ((panels + p - 1) / p);
        if (cost < best) best = cost, by_rows = r, by_panels = p;
    }
}

static void conv(const Op& o, void** slots, const Team& team) {
    Product g = {o, sources_of(o, slots), (const float*)slots[o.weight], (float*)slots[o.out], epilogue_of(o, slots)};
    char* scratch = team.scratch;
    g.kernel = o.kernel;
    g.pixels = (int64_t)o.H * o.W;
    g.rows = o.B * g.pixels;
    g.C = g.s.all();
    g.taps = o.kernel * o.kernel;
    g.K = (int64_t)g.taps * g.C;
    if (o.affine || o.silu) {
        float* x = (float*)scratch;
        apply_affine(o, g.s, o.affine ? (const float*)slots[o.stats] : nullptr, x, team);
        scratch += round_up((int64_t)o.B * o.SH * o.SW * g.C * sizeof(float), 64);
        g.s = Sources{{x, nullptr}, {g.C, 0}, {g.C, 0}};
    }
    if (gathers(o)) {
        float* x = (float*)scratch;
        int64_t begin, end;
        team.share(g.rows, begin, end);
        for (int64_t r = begin; r < end; r++) {
            const Product::Place here = g.place(r);
            for (int tap = 0; tap < g.taps; tap++)
                for (int i = 0, c = 0; i < g.s.count(); c += g.s.channels[i++])
                    memcpy(x + r * g.K + tap * g.C + c, g.at(here, Piece{tap, i, 0, 0, 0}),
                           g.s.channels[i] * sizeof(float));
        }
        team.wait();
        g.s = Sources{{x, nullptr}, {g.K, 0}, {(int)g.K, 0}};
    }
    const bool gathered = gathers(o);
    Op flat = o;  // what was gathered is a plain product
    if (gathered) flat.kernel = flat.stride = 1, flat.SH = flat.VIEW_H, flat.SW = flat.VIEW_W;
    Product h = {flat, g.s, g.weight, g.out, g.e, gathered ? 1 : g.kernel, gathered ? 1 : g.taps,
                 gathered ? (int)g.K : g.C, g.K, g.rows, g.pixels};
    const int panels = panel_count(o.N, o.gated);
    int by_rows = 1, by_panels = 1;
    grid(row_parts(h.rows), panels, team.size, by_rows, by_panels);
    if (team.rank < by_rows * by_panels) {
        const int parts = row_parts(h.rows), i = team.rank / by_panels, j = team.rank % by_panels;
        const int64_t r0 = row_start(h.rows, (int64_t)parts * i / by_rows);
        const int64_t r1 = row_start(h.rows, (int64_t)parts * (i + 1) / by_rows);
        const int p0 = panels * j / by_panels, p1 = panels * (j + 1) / by_panels;
        float* pack = (float*)team.mine();
        h.rows_copy = pack;
        if (r0 < r1 && p0 < p1) h.run(r0, r1, p0, p1, o.gated, pack + COPIED);
    }
    team.wait();
}

}  // namespace fd

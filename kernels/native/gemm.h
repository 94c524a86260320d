// Matrix products with weights: C[rows, N] = A[rows, K] W[N, K]^T, where A's rows are found through pointers.
//
// A convolution is such a product whose rows are pieces of the image, one piece for each tap and each of the one or two
// sources; a linear layer has one piece. Weights are packed into panels of NR columns, [K][NR]: beforehand, or on the
// way, by the thread that needs them, from the layout they were loaded in. That costs one pass over the weights and
// no memory, and weights changed in place (a LoRA) are seen at once.
#pragma once

#include "simd.h"

namespace fd {

constexpr int PIECES = 20;  // pieces in one block of K: nine taps, two sources, and two cut ends

struct Piece {  // of K: `len` columns of the weights from `column`; A's rows for it come from `tap` of `source`
    int tap, source, channel, len;
    int64_t column;
};

// One tile: c[M][NR] (+)= sum over pieces of a[piece][M][len] b[len][NR]. The sums stay in registers throughout.
template <int M>
static __attribute__((noinline)) void tile(const float* const* a, const int* lens, int pieces, const float* b, float* c,
                                           int64_t ldc, bool add) {
    vf acc[M][NV];
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) acc[m][n] = add ? load(c + m * ldc + n * VW) : vf{};
    for (int s = 0; s < pieces; s++, a += M) {
        const float* rows[M];
#pragma GCC unroll 16
        for (int m = 0; m < M; m++) rows[m] = a[m];
        const int len = lens[s];
        for (int k = 0; k < len; k++, b += NR) {
            vf w[NV];
#pragma GCC unroll 16
            for (int n = 0; n < NV; n++) w[n] = load(b + n * VW);
#pragma GCC unroll 16
            for (int m = 0; m < M; m++) {
                vf x = all(rows[m][k]);
#pragma GCC unroll 16
                for (int n = 0; n < NV; n++) acc[m][n] += x * w[n];
            }
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; m++)
#pragma GCC unroll 16
        for (int n = 0; n < NV; n++) store(c + m * ldc + n * VW, acc[m][n]);
}

typedef void (*Tile)(const float* const*, const int*, int, const float*, float*, int64_t, bool);

template <int M> struct Tiles {
    static void fill(Tile* t) {
        t[M] = tile<M>;
        Tiles<M - 1>::fill(t);
    }
};
template <> struct Tiles<0> {
    static void fill(Tile* t) { t[0] = nullptr; }
};
struct TileTable {
    Tile by_rows[MR + 1];
    TileTable() { Tiles<MR>::fill(by_rows); }
};
static const TileTable tiles;

// rows [0, n) in parts of at most MR, as even as they come
static inline int row_parts(int n) { return (n + MR - 1) / MR; }
static inline int row_start(int n, int part) {
    const int parts = row_parts(n);
    return (int64_t)n * part / parts;
}

template <int step> static inline __attribute__((always_inline)) vi low() {
    vi m;
    for (int i = 0; i < VW; i++) m[i] = (i & step) ? VW + i - step : i;
    return m;
}
template <int step> static inline __attribute__((always_inline)) vi high() {
    vi m;
    for (int i = 0; i < VW; i++) m[i] = (i & step) ? VW + i : i + step;
    return m;
}
template <int step> static inline __attribute__((always_inline)) void swap_blocks(vf* r) {
    const vi lo = low<step>(), hi = high<step>();
#pragma GCC unroll 16
    for (int i = 0; i < VW; i++)
        if (!(i & step)) {
            vf x = r[i], y = r[i + step];
            r[i] = __builtin_shuffle(x, y, lo);
            r[i + step] = __builtin_shuffle(x, y, hi);
        }
}
// VW rows of VW floats, transposed in registers
static inline __attribute__((always_inline)) void transpose(vf* r) {
#if defined(__AVX512F__)
    swap_blocks<8>(r);
#endif
    swap_blocks<4>(r);
    swap_blocks<2>(r);
    swap_blocks<1>(r);
}

// out[k][VW] = rows[VW][k], k in [0, len); a null row counts as zeros
static inline void transpose_rows(const float* const* rows, int len, float* out, int64_t ldo) {
    static const float zeros[VW] = {};
    int k = 0;
    vf r[VW];
    for (; k + VW <= len; k += VW) {
#pragma GCC unroll 16
        for (int i = 0; i < VW; i++) r[i] = load(rows[i] ? rows[i] + k : zeros);
        transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < VW; i++) store(out + (k + i) * ldo, r[i]);
    }
    if (k < len) {
        for (int i = 0; i < VW; i++) r[i] = rows[i] ? first(rows[i] + k, len - k) : vf{};
        transpose(r);
        for (int i = 0; i < len - k; i++) store(out + (k + i) * ldo, r[i]);
    }
}

// Which row of the weights a panel's column is. Gated: the first register's columns are values, the second's gates.
static inline int weight_row(int panel, int column, int N, bool gated) {
    if (!gated) return panel * NR + column;
    const int n = panel * VW + column % VW;
    return n >= N ? -1 : n + (column / VW) * N;
}
static inline int weight_rows(int N, bool gated) { return gated ? 2 * N : N; }
static inline int panel_count(int N, bool gated) { return gated ? (N + VW - 1) / VW : (N + NR - 1) / NR; }

// One panel of one piece: out[len][NR] from W[N][ldw]
static inline void pack_piece(const float* w, int64_t ldw, int N, bool gated, int panel, int64_t column, int len,
                              float* out) {
    const float* rows[VW];
    for (int v = 0; v < NV; v++) {
        for (int i = 0; i < VW; i++) {
            const int n = weight_row(panel, v * VW + i, N, gated);
            rows[i] = n < 0 || n >= weight_rows(N, gated) ? nullptr : w + n * ldw + column;
        }
        transpose_rows(rows, len, out + v * VW, NR);
    }
}

}  // namespace fd

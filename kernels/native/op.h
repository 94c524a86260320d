// One step of a plan. fastdiff/kernels/native/__init__.py mirrors this struct field by field.
#pragma once

#include <omp.h>

#include "simd.h"

namespace fd {

enum Kind : int32_t { CONV, NORM, LAYER_NORM, ATTENTION, RESAMPLE, ADD };

struct Op {
    int32_t kind;
    int32_t algorithm;   // CONV: 0 is direct, 2 and 4 are Winograd's F(2x2, 3x3) and F(4x4, 3x3)
    int32_t packed;      // CONV: whether the weights lie in this algorithm's own layout
    int32_t B, H, W;     // images, and the size of the result
    int32_t VIEW_H, VIEW_W;     // CONV: size of what the kernel slides over
    int32_t SH, SW;      // size of what is stored; smaller than VIEW_H, VIEW_W where pixels are repeated
    int32_t C0, C1, N;   // channels of the two sources (C1 may be 0) and of the result
    int32_t ld0, ld1, ldo, ldr;  // floats from one pixel to the next: sources, result, residual
    int32_t kernel, stride, pad;
    int32_t silu, gated, affine;
    int32_t row_stride;  // floats from one image's time row to the next
    int32_t groups, heads, L, M;  // NORM; ATTENTION: queries and keys
    int32_t ldk, head_k, batch_k;  // ATTENTION: floats from one key (and value), head and image to the next
    float eps;
    int32_t src0, src1, weight, bias, stats, row, residual, out;  // slots; -1 is none
};

struct Team {  // the threads that run a plan together; every op is called by all of them
    int rank, size;
    char* scratch;   // of the whole team
    int64_t shared;  // bytes of it that the op shares; each thread's own part follows
    int64_t own;
    char* mine() const { return scratch + shared + rank * own; }
    void wait() const {
#pragma omp barrier
    }
    void share(int64_t n, int64_t& begin, int64_t& end) const {
        begin = n * rank / size;
        end = n * (rank + 1) / size;
    }
};

struct Need {  // bytes of scratch
    int64_t shared, own;
};

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace fd

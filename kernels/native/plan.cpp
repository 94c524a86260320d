// Runs a plan: a list of ops over a table of addresses, by one team of threads, in one call.
#include "attention.h"
#include "conv.h"
#include "norm.h"
#include "winograd.h"

using namespace fd;

static Need need_of(const Op& o) {
    switch (o.kind) {
        case CONV:
            return o.algorithm == 4   ? WinogradConv<4>::need(o)
                   : o.algorithm == 2 ? WinogradConv<2>::need(o)
                                      : conv_need(o);
        case NORM: return norm_need(o);
        case ATTENTION: return attention_need(o);
        case RESAMPLE: return resample_need(o);
        default: return Need{0, 0};
    }
}

static void run_op(const Op& o, void** slots, Team team) {
    const Need need = need_of(o);
    team.shared = need.shared;
    team.own = need.own;
    switch (o.kind) {
        case CONV:
            o.algorithm == 4   ? WinogradConv<4>::run(o, slots, team)
            : o.algorithm == 2 ? WinogradConv<2>::run(o, slots, team)
                               : conv(o, slots, team);
            break;
        case NORM: norm(o, slots, team); break;
        case LAYER_NORM: layer_norm(o, slots, team); break;
        case ATTENTION: attention(o, slots, team); break;
        case RESAMPLE: resample(o, slots, team); break;
        case ADD: add(o, slots, team); break;
    }
}

extern "C" {

int fastdiff_op_bytes() { return sizeof(Op); }
int fastdiff_width() { return VW; }

// Bytes of scratch that a plan needs with so many threads
int64_t fastdiff_scratch(const Op* ops, int count, int threads) {
    int64_t most = 64;
    for (int i = 0; i < count; i++) {
        const Need need = need_of(ops[i]);
        const int64_t bytes = need.shared + need.own * threads;
        most = bytes > most ? bytes : most;
    }
    return most;
}

// Run the ops in order. seconds[count], or null: what each took.
void fastdiff_run(const Op* ops, int count, void** slots, void* scratch, int threads, double* seconds) {
#pragma omp parallel num_threads(threads)
    {
        Team team = {omp_get_thread_num(), omp_get_num_threads(), (char*)scratch, 0, 0};
        double before = seconds ? omp_get_wtime() : 0;
        for (int i = 0; i < count; i++) {
            run_op(ops[i], slots, team);
            if (seconds && team.rank == 0) {
                const double now = omp_get_wtime();
                seconds[i] = now - before;
                before = now;
            }
        }
    }
}

// Weights W[N][K] in the layout of an algorithm: see gemm.h and winograd.h
int64_t fastdiff_packed_floats(const Op* o) {
    const int64_t C = o->C0 + o->C1, F = (int64_t)(o->algorithm + 2) * (o->algorithm + 2);
    const int64_t K = o->algorithm ? F * C : o->kernel * o->kernel * C;
    return panel_count(o->N, o->gated) * K * NR;
}
void fastdiff_pack(const Op* o, const float* weight, float* out, int threads) {
    const int C = o->C0 + o->C1, panels = panel_count(o->N, o->gated);
    const int64_t K = (int64_t)o->kernel * o->kernel * C;
    const int64_t each = fastdiff_packed_floats(o) / panels;
#pragma omp parallel for num_threads(threads)
    for (int p = 0; p < panels; p++) {
        if (o->algorithm == 4) transform_weights<4>(weight, o->N, C, p, 0, C, out + p * each, (int64_t)C * NR);
        else if (o->algorithm == 2) transform_weights<2>(weight, o->N, C, p, 0, C, out + p * each, (int64_t)C * NR);
        else pack_piece(weight, K, o->N, o->gated, p, 0, K, out + p * each);
    }
}
}

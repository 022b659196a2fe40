// Updates and projections on a CPU in single precision; the mathematics and the symbols are those of
// ops/projection.py. Rows are independent of each other: each thread takes a run of them, in tiles.

#include <memory>

#include "rows.h"
#include "threads.h"

namespace {

constexpr int TILE = 36;  // rows; a multiple of ROWS_AT_ONCE
constexpr int MAX_PARTS = 5;

// What fastchgnet.ops.cpu.projection gives: what is missing is null.
struct Given {
    const float *s, *t, *w, *weight, *bias;
    const int64_t* row_ends;
    int64_t n_rows, n_at_ends, n_parts, n_biases, n_threads;
};

// What the forward op returns, or gradients of that.
template <typename T>
struct States {
    T* x;
    T* y[MAX_PARTS];
};

// Gradients of the features.
struct Features {
    float *s, *t, *w;
};

template <int D>
class Worker {
    static constexpr int D2 = 2 * D;
    const Given& in;
    const float *out, *parts;  // B, and the first W_m
    alignas(64) float out_t[D * D], part_t[MAX_PARTS * D * D2];
    alignas(64) float sent[TILE * D], x[TILE * D], y[TILE * D2];

    bool at_ends(int m) const { return in.row_ends && m < in.n_at_ends; }
    const float* part(int m) const { return parts + m * D2 * D; }

    // The sum of rows over the ends of a row.
    template <int N>
    void sum_ends(const float* rows, int64_t row, float* to) const {
        const float* one = rows + (in.row_ends ? in.row_ends[2 * row] : row) * N;
        const float* other = in.row_ends ? rows + in.row_ends[2 * row + 1] * N : nullptr;
        for (int n = 0; n < N; n += LANES) store(to + n, other ? load(one + n) + load(other + n) : load(one + n));
    }

    template <int N>
    void put_at_ends(const float* row_values, int64_t row, float* to) const {
        for (int e = 0; e < 2; e++) std::memcpy(to + in.row_ends[2 * row + e] * N, row_values, N * sizeof(float));
    }

  public:
    explicit Worker(const Given& in) : in(in), out(in.weight), parts(in.weight + (in.t ? D * D : 0)) {}

    void forward(int64_t from, int64_t to, const States<float>& result) {
        if (in.t) transpose(out, D, D, out_t);
        for (int m = 0; m < in.n_parts; m++) transpose(part(m), D2, D, part_t + m * D * D2);
        for (int64_t first = from; first < to; first += TILE) {
            const int rows = int(to - first < TILE ? to - first : TILE);
            const float* state = in.s + first * D;
            if (in.t) {
                for (int r = 0; r < rows; r++) {
                    sum_ends<D>(in.t, first + r, sent + r * D);
                    for (int n = 0; in.w && n < D; n += LANES)
                        store(sent + r * D + n, load(sent + r * D + n) * load(in.w + (first + r) * D + n));
                }
                float* updated = result.x + first * D;
                std::memcpy(updated, state, rows * D * sizeof(float));
                multiply(rows, D, D, sent, D, out_t, D, updated, D, Start::add);
                state = updated;
            }
            for (int m = 0; m < in.n_parts; m++) {
                const float* bias = m < in.n_biases ? in.bias + m * D2 : nullptr;
                float* to_rows = at_ends(m) ? y : result.y[m] + first * D2;
                multiply(rows, D2, D, state, D, part_t + m * D * D2, D2, to_rows, D2,
                         bias ? Start::bias : Start::zero, bias);
                for (int r = 0; at_ends(m) && r < rows; r++) put_at_ends<D2>(y + r * D2, first + r, result.y[m]);
            }
        }
    }

    void backward(int64_t from, int64_t to, const States<const float>& grad, const Features& result) {
        for (int64_t first = from; first < to; first += TILE) {
            const int rows = int(to - first < TILE ? to - first : TILE);
            float* by_s = result.s + first * D;
            if (grad.x) {
                std::memcpy(by_s, grad.x + first * D, rows * D * sizeof(float));
            } else {
                std::memset(by_s, 0, rows * D * sizeof(float));
            }
            for (int m = 0; m < in.n_parts; m++) {
                if (!grad.y[m]) continue;
                for (int r = 0; at_ends(m) && r < rows; r++) sum_ends<D2>(grad.y[m], first + r, y + r * D2);
                multiply(rows, D, D2, at_ends(m) ? y : grad.y[m] + first * D2, D2, part(m), D, by_s, D, Start::add);
            }
            if (!in.t) continue;
            multiply(rows, D, D, by_s, D, out, D, x, D);
            for (int r = 0; r < rows; r++) {
                const int64_t row = first + r;
                float* h = x + r * D;
                if (in.w) {
                    sum_ends<D>(in.t, row, sent);
                    for (int n = 0; n < D; n += LANES) {
                        store(result.w + row * D + n, load(h + n) * load(sent + n));
                        store(h + n, load(h + n) * load(in.w + row * D + n));
                    }
                }
                if (in.row_ends) {
                    put_at_ends<D>(h, row, result.t);
                } else {
                    std::memcpy(result.t + row * D, h, D * sizeof(float));
                }
            }
        }
    }
};

template <int D>
void run(const Given& in, const States<float>* made, const States<const float>* grad, const Features* gradients) {
    in_parallel(in.n_threads, [&](int64_t thread) {
        const int64_t from = in.n_rows * thread / in.n_threads, to = in.n_rows * (thread + 1) / in.n_threads;
        const std::unique_ptr<Worker<D>> worker(new Worker<D>(in));
        if (made) {
            worker->forward(from, to, *made);
        } else {
            worker->backward(from, to, *grad, *gradients);
        }
    });
}

}  // namespace

// Makes states, or gradients of the features from those of the states. Returns 0, or 1 for an unknown width.
extern "C" int project(int64_t width, const Given* in, const States<float>* made, const States<const float>* grad,
                       const Features* gradients) {
    if (width == 64) {
        run<64>(*in, made, grad, gradients);
    } else if (width == 16) {
        run<16>(*in, made, grad, gradients);
    } else {
        return 1;
    }
    return 0;
}

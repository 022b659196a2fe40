// The gated MLP of a tile of rows, from what it gathers to the messages, and the derivatives in between.
#pragma once

#include <cmath>

#include "rows.h"

constexpr int TILE = 36;  // rows; a multiple of ROWS_AT_ONCE
constexpr float EPS = 1e-5f;

// What fastchgnet.ops.cpu.message gives: the tensors of fastchgnet.ops._message_inputs.Inputs, the directions of
// derivatives, and numbers. What is missing is null.
struct Given {
    const float *p, *q, *r, *r_tail, *w, *a, *parameters;
    const int64_t *i, *i_start, *j, *j_start, *j_order, *k, *k_start, *k_order;
    const float *grad, *u_p, *u_q, *u_r, *u_tail, *u_w, *u_a;
    int64_t has_hidden, n_norms;
    int64_t n_i, n_j, n_r, n_k, n_threads, has_w, has_a;  // even tensors without elements may be null
};

// What gradients of the features are added to: nothing, one table or two.
struct Onto {
    const float *p[2], *q[2], *r[2], *r_tail[2], *w[2], *a[2];
};

struct Outputs {
    float* y;                           // the messages or their sums; for the second derivative the gradient of G
    float *p, *q, *r, *r_tail, *w, *a;  // gradients of the features
    float *h, *w_rows;                  // gradients by rows, [N, 2D] and [N, D]
    float* parameters;                  // null where not asked for
    Onto onto;
};

// The parameters, or their gradients, that stand one behind the other; what is missing is null.
template <typename T>
struct Parameters {
    T *angle_weight = nullptr, *weight = nullptr, *bias = nullptr, *scale = nullptr, *shift = nullptr;
    int64_t size = 0;

    Parameters(const Given& in, int64_t d, T* packed) {
        auto next = [&](bool is_there, int64_t n) {
            T* found = packed && is_there ? packed + size : nullptr;
            size += is_there ? n : 0;
            return found;
        };
        angle_weight = next(in.has_a, 2 * d * d);
        weight = next(in.has_hidden, 2 * d * d);
        bias = next(in.has_hidden, 2 * d);
        scale = next(in.n_norms, in.n_norms * d);
        shift = next(in.n_norms, in.n_norms * d);
    }
};

struct Inputs : Given, Parameters<const float> {
    Inputs(const Given& in, int64_t d) : Given(in), Parameters<const float>(in, d, in.parameters) {}
};

template <int D>
struct Tile {
    static constexpr int D2 = 2 * D;
    alignas(64) float h[TILE * D2], sh[TILE * D2], s[TILE * D2], x[TILE * D2], n[TILE * D2], sn[TILE * D2];
    alignas(64) float core[TILE * D], m[TILE * D], slope[TILE * D2], rstd[TILE * 2];
    alignas(64) float d1[TILE * D2], d2[TILE * D2], d3[TILE * D2], u[TILE * D2], sdot[TILE * D2], zdot[TILE * D2],
        lz[TILE * D2];
    alignas(64) float weight_t[2 * D * D], angle_t[D * D2];
};

template <int D>
class Gate {
  protected:
    static constexpr int D2 = 2 * D;
    const Inputs& in;
    Tile<D>& t;
    int64_t first = 0;  // row
    int rows = 0;

    Gate(const Inputs& in, Tile<D>& t) : in(in), t(t) {
        if (in.weight)
            for (int b = 0; b < 2; b++) transpose(in.weight + b * D * D, D, D, t.weight_t + b * D * D);
        if (in.a) transpose(in.angle_weight, D2, D, t.angle_t);
    }

    template <typename F>
    void over(int width, F f) {  // every vector of [rows, width]
        for (int n = 0; n < rows * width; n += LANES) f(n);
    }

    void gather(float* h, const float* p, const float* q, const float* head, const float* tail, const float* a) {
        for (int r = 0; r < rows; r++) {
            const int64_t row = first + r, k = in.k[row];
            const float* third = k < in.n_r ? row_of(head, k) : row_of(tail, k - in.n_r);
            for (int n = 0; n < D2; n += LANES) {
                Vec v = p ? load(p + in.i[row] * D2 + n) : Vec{};
                if (q) v += load(q + in.j[row] * D2 + n);
                if (third) v += load(third + n);
                store(h + r * D2 + n, v);
            }
        }
        if (a) multiply(rows, D2, D, a + first * D, D, t.angle_t, D2, h, D2, Start::add);
    }

    static const float* row_of(const float* table, int64_t row) { return table ? table + row * D2 : nullptr; }

    void linear(const float* s, float* z, const float* bias) {
        for (int b = 0; b < 2; b++)
            multiply(rows, D, D, s + b * D, D2, t.weight_t + b * D * D, D, z + b * D, D2,
                     bias ? Start::bias : Start::zero, bias ? bias + b * D : nullptr);
    }

    void linear_backward(const float* dz, float* ds) {
        for (int b = 0; b < 2; b++)
            multiply(rows, D, D, dz + b * D, D2, in.weight + b * D * D, D, ds + b * D, D2);
    }

    void messages() {
        gather(t.h, in.p, in.q, in.r, in.r_tail, in.a);
        float* z = t.h;
        if (in.weight) {
            over(D2, [&](int n) {
                const Vec h = load(t.h + n), sh = sigmoid(h);
                store(t.sh + n, sh);
                store(t.s + n, h * sh);
            });
            linear(t.s, t.n, in.bias);
            z = t.n;
        }
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < 2; b++) norm(z + r * D2 + b * D, r, b);
        over(D2, [&](int n) { store(t.sn + n, sigmoid(load(t.n + n))); });
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < D; n += LANES) {
                const int c = r * D2 + n;
                const Vec core = load(t.n + c) * load(t.sn + c);
                store(t.core + r * D + n, core);
                store(t.m + r * D + n, core * load(t.sn + c + D));
            }
    }

    void norm(const float* z, int r, int b) {
        float *x = t.x + r * D2 + b * D, *n = t.n + r * D2 + b * D;
        if (!in.scale) {
            if (z != n) std::memcpy(n, z, D * sizeof(float));
            return;
        }
        Vec sum{}, squares{};
        for (int d = 0; d < D; d += LANES) sum += load(z + d);
        const float mean = total(sum) / D;
        for (int d = 0; d < D; d += LANES) {
            const Vec c = load(z + d) - mean;
            squares += c * c;
        }
        const float rstd = 1 / std::sqrt(total(squares) / D + EPS);
        t.rstd[r * 2 + b] = rstd;
        const int64_t of = b < in.n_norms ? b * D : 0;
        for (int d = 0; d < D; d += LANES) {
            const Vec c = (load(z + d) - mean) * rstd;
            store(x + d, c);
            store(n + d, load(in.scale + of + d) * c + load(in.shift + of + d));
        }
    }

    // L(q), or L(g q) with `scaled`; both rows [rows, 2D], perhaps the same ones.
    void normed(const float* q, float* l, bool scaled) {
        if (!in.scale) {
            if (l != q) std::memcpy(l, q, rows * D2 * sizeof(float));
            return;
        }
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < 2; b++) {
                const int at = r * D2 + b * D;
                const float* g = in.scale + (b < in.n_norms ? b * D : 0);
                Vec sum{}, along{};
                for (int d = 0; d < D; d += LANES) {
                    const Vec v = scaled ? load(q + at + d) * load(g + d) : load(q + at + d);
                    sum += v;
                    along += v * load(t.x + at + d);
                }
                const float mean = total(sum) / D, mean_x = total(along) / D, rstd = t.rstd[r * 2 + b];
                for (int d = 0; d < D; d += LANES) {
                    const Vec v = scaled ? load(q + at + d) * load(g + d) : load(q + at + d);
                    store(l + at + d, rstd * (v - mean - load(t.x + at + d) * mean_x));
                }
            }
    }

    Vec silu_slope(int n) { return load(t.sh + n) + load(t.s + n) * (1 - load(t.sh + n)); }

    void slopes() {
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < D; n += LANES) {
                const int c = r * D2 + n;
                const Vec s = load(t.sn + c), core = load(t.core + r * D + n), gate = load(t.sn + c + D);
                store(t.slope + c, (s + core * (1 - s)) * gate);
                store(t.slope + c + D, core * gate * (1 - gate));
            }
    }

    void hidden_backward(const float* dz, float* dh) {
        if (!in.weight) {
            std::memcpy(dh, dz, rows * D2 * sizeof(float));
            return;
        }
        linear_backward(dz, dh);
        over(D2, [&](int n) { store(dh + n, load(dh + n) * silu_slope(n)); });
    }
};

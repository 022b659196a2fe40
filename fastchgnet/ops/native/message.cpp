// Gated messages on a CPU in single precision; the mathematics and the symbols are those of ops/message.py.
//
// Each thread takes whole segments of i and walks through their rows in tiles that stay in its cache.
// Gradients of parameters are added up per thread and joined in the order of the threads.

#include <cmath>
#include <system_error>
#include <thread>
#include <vector>

#include "rows.h"

constexpr int TILE = 36;  // rows; a multiple of ROWS_AT_ONCE
constexpr float EPS = 1e-5f;

// As fastchgnet.ops._message_native lays it out: what is missing is null.
struct Inputs {
    const float *p, *q, *r, *w, *a;
    const float *angle_weight, *weight, *bias, *scale, *shift;
    const int64_t *i, *i_start, *j, *k;
    const float *grad, *u_p, *u_q, *u_r, *u_w, *u_a;
    int64_t n_segments, n_norms, n_threads;
};

struct Outputs {
    float *y;        // the messages or their sums; for the second derivative the gradient of G
    float *p;        // [n_i, 2D]
    float *h, *w;    // gradients by rows, [N, 2D] and [N, D]
    float *a;        // [N, D]
    float *angle_weight, *weight, *bias, *scale, *shift;  // [threads, ...]; null where not asked for
};

template <int D>
struct Tile {
    static constexpr int D2 = 2 * D;
    alignas(64) float h[TILE * D2], sh[TILE * D2], s[TILE * D2], x[TILE * D2], n[TILE * D2], sn[TILE * D2];
    alignas(64) float core[TILE * D], m[TILE * D], slope[TILE * D2], rstd[TILE * 2];
    alignas(64) float d1[TILE * D2], d2[TILE * D2], d3[TILE * D2], u[TILE * D2], sdot[TILE * D2], zdot[TILE * D2],
        lz[TILE * D2], mdot[TILE * D];
    alignas(64) float weight_t[2 * D * D], angle_t[D * D2];
};

template <int D>
class Worker {
    static constexpr int D2 = 2 * D;
    const Inputs& in;
    const Outputs& out;
    Tile<D>& t;
    int64_t first = 0;
    int rows = 0;
    float *angle_weight, *weight, *bias, *scale, *shift;

    template <typename F>
    void over(int width, F f) {  // every vector of [rows, width]
        for (int n = 0; n < rows * width; n += LANES) f(n);
    }

  public:
    Worker(const Inputs& in, const Outputs& out, Tile<D>& t, int64_t thread) : in(in), out(out), t(t) {
        auto mine = [&](float* all, int64_t size) { return all ? all + thread * size : nullptr; };
        angle_weight = mine(out.angle_weight, D2 * D);
        weight = mine(out.weight, 2 * D * D);
        bias = mine(out.bias, D2);
        scale = mine(out.scale, D2);
        shift = mine(out.shift, D2);
        if (in.weight)
            for (int b = 0; b < 2; b++)
                for (int n = 0; n < D; n++)
                    for (int k = 0; k < D; k++) t.weight_t[(b * D + k) * D + n] = in.weight[(b * D + n) * D + k];
        if (in.a)
            for (int n = 0; n < D2; n++)
                for (int k = 0; k < D; k++) t.angle_t[k * D2 + n] = in.angle_weight[n * D + k];
    }

    template <typename F>
    void run(int64_t from, int64_t to, F work) {
        for (first = in.i_start[from]; first < in.i_start[to]; first += rows) {
            const int64_t left = in.i_start[to] - first;
            rows = left < TILE ? int(left) : TILE;
            work(*this);
        }
    }

    void forward() {
        messages();
        for (int r = 0; r < rows; r++) {
            const int64_t row = first + r;
            const float* m = t.m + r * D;
            if (!in.w) {
                std::memcpy(out.y + row * D, m, D * sizeof(float));
                continue;
            }
            float* y = out.y + in.i[row] * D;
            const float* w = in.w + in.k[row] * D;
            for (int n = 0; n < D; n += LANES) store(y + n, load(y + n) + load(w + n) * load(m + n));
        }
    }

    void backward() {
        messages();
        slopes();
        for (int r = 0; r < rows; r++) {
            const Row at(*this, r);
            for (int n = 0; n < D; n += LANES) {
                const Vec g = load(at.g + n), dm = in.w ? g * load(at.w + n) : g;
                if (in.w) store(out.w + at.row * D + n, g * load(t.m + r * D + n));
                for (int b = 0; b < D2; b += D) store(t.d1 + r * D2 + b + n, dm * load(t.slope + r * D2 + b + n));
            }
        }
        if (scale) add_norm(t.d1, t.x, nullptr, nullptr);
        normed(t.d1, t.d1, true);
        if (weight) add_linear(t.d1, t.s, true);
        hidden_backward(t.d1, t.d2);
        put(t.d2);
        if (angle_weight) add_angle(t.d2, in.a);
    }

    void second() {
        messages();
        slopes();
        gather(t.u, in.u_p, in.u_q, in.u_r, in.u_a);
        const float* zdot = t.u;
        if (in.weight) {
            over(D2, [&](int n) { store(t.sdot + n, silu_slope(n) * load(t.u + n)); });
            linear(t.sdot, t.zdot, nullptr);
            zdot = t.zdot;
        }
        normed(zdot, t.lz, false);
        for (int r = 0; r < rows; r++) second_of_gate(r);
        if (scale) add_norm(t.d1, t.x, t.d2, t.lz);
        if (in.scale) {
            second_of_norm(zdot);
        } else {
            std::memcpy(t.d3, t.d1, sizeof(t.d3));
        }
        // d2 is the gradient by z', d3 the one by z
        const float *first_h = t.d2, *by_h = t.d3;
        if (weight) {
            add_linear(t.d3, t.s, true);
            add_linear(t.d2, t.sdot, false);
        }
        if (in.weight) {
            linear_backward(t.d3, t.d1);
            linear_backward(t.d2, t.lz);
            over(D2, [&](int n) {
                const Vec sh = load(t.sh + n), s = load(t.s + n), slope = silu_slope(n), by_s = load(t.lz + n);
                const Vec curvature = (1 - sh) * (2 * sh + s * (1 - 2 * sh));
                store(t.d1 + n, slope * load(t.d1 + n) + curvature * load(t.u + n) * by_s);
                store(t.lz + n, slope * by_s);
            });
            by_h = t.d1;
            first_h = t.lz;
        }
        put(by_h);
        if (angle_weight) {
            add_angle(by_h, in.a);
            if (in.u_a) add_angle(first_h, in.u_a);
        }
    }

  private:
    // Where the gradient and the weight of a row are.
    struct Row {
        int64_t row;
        const float *g, *w;
        Row(const Worker& of, int r) : row(of.first + r) {
            g = of.in.grad + (of.in.w ? of.in.i[row] : row) * D;
            w = of.in.w ? of.in.w + of.in.k[row] * D : nullptr;
        }
    };

    void gather(float* h, const float* p, const float* q, const float* r_, const float* a) {
        for (int r = 0; r < rows; r++) {
            const int64_t row = first + r;
            for (int n = 0; n < D2; n += LANES) {
                Vec v = p ? load(p + in.i[row] * D2 + n) : Vec{};
                if (q) v += load(q + in.j[row] * D2 + n);
                if (r_) v += load(r_ + in.k[row] * D2 + n);
                store(h + r * D2 + n, v);
            }
        }
        if (a) multiply(rows, D2, D, a + first * D, D, t.angle_t, D2, h, D2, Start::add);
    }

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
        gather(t.h, in.p, in.q, in.r, in.a);
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

    // d1: gradient by n; d2: by n'.
    void second_of_gate(int r) {
        const Row at(*this, r);
        for (int n = 0; n < D; n += LANES) {
            const int c = r * D2 + n, e = r * D + n;
            const Vec s = load(t.sn + c), gate = load(t.sn + c + D), core = load(t.core + e), m = load(t.m + e);
            const Vec by_core = load(t.slope + c), by_gate = load(t.slope + c + D);
            const int64_t of = in.n_norms > 1 ? D : 0;
            const Vec ndot_core = load(t.lz + c) * (in.scale ? load(in.scale + n) : all(1));
            const Vec ndot_gate = load(t.lz + c + D) * (in.scale ? load(in.scale + of + n) : all(1));
            const Vec mdot = by_core * ndot_core + by_gate * ndot_gate;
            const Vec g = load(at.g + n), w = in.w ? load(at.w + n) : all(1), wg = w * g;
            const Vec core_core = (1 - s) * (2 * s + core * (1 - 2 * s)) * gate;
            const Vec core_gate = by_core * (1 - gate), gate_gate = by_gate * (1 - 2 * gate);
            Vec bar_core = wg * (core_core * ndot_core + core_gate * ndot_gate);
            Vec bar_gate = wg * (core_gate * ndot_core + gate_gate * ndot_gate);
            Vec tangent = w * mdot;
            if (in.u_w) {
                const Vec u = load(in.u_w + in.k[at.row] * D + n);
                tangent += u * m;
                bar_core += g * u * by_core;
                bar_gate += g * u * by_gate;
            }
            store(t.d1 + c, bar_core);
            store(t.d1 + c + D, bar_gate);
            store(t.d2 + c, wg * by_core);
            store(t.d2 + c + D, wg * by_gate);
            if (in.w) {
                float* y = out.y + in.i[at.row] * D + n;
                store(y, load(y) + tangent);
                store(out.w + at.row * D + n, g * mdot);
            } else {
                store(out.y + at.row * D + n, tangent);
            }
        }
    }

    // d3: gradient by z from d1, the one by n; d2: by z' from the one by n'.
    void second_of_norm(const float* zdot) {
        normed(t.d1, t.d3, true);
        for (int r = 0; r < rows; r++)
            for (int b = 0; b < 2; b++) {
                const int at = r * D2 + b * D;
                const float* g = in.scale + (b < in.n_norms ? b * D : 0);
                Vec q_lz{}, zdot_x{}, q_x{}, q_sum{};
                for (int d = 0; d < D; d += LANES) {
                    const Vec q = load(t.d2 + at + d) * load(g + d), x = load(t.x + at + d);
                    q_lz += q * load(t.lz + at + d);
                    zdot_x += load(zdot + at + d) * x;
                    q_x += q * x;
                    q_sum += q;
                }
                const float mean_q_lz = total(q_lz) / D, mean_zdot_x = total(zdot_x) / D;
                const float mean_q_x = total(q_x) / D, mean_q = total(q_sum) / D, rstd = t.rstd[r * 2 + b];
                for (int d = 0; d < D; d += LANES) {
                    const Vec q = load(t.d2 + at + d) * load(g + d), x = load(t.x + at + d);
                    const Vec by_zdot = rstd * (q - mean_q - x * mean_q_x);
                    const Vec change = x * mean_q_lz + mean_zdot_x * by_zdot + mean_q_x * load(t.lz + at + d);
                    store(t.d2 + at + d, by_zdot);
                    store(t.d3 + at + d, load(t.d3 + at + d) - rstd * change);
                }
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

    void put(const float* dh) {
        for (int r = 0; r < rows; r++) {
            float *p = out.p + in.i[first + r] * D2, *h = out.h + (first + r) * D2;
            for (int n = 0; n < D2; n += LANES) {
                const Vec v = load(dh + r * D2 + n);
                store(h + n, v);
                store(p + n, load(p + n) + v);
            }
        }
        if (in.a) multiply(rows, D, D2, dh, D2, in.angle_weight, D, out.a + first * D, D);
    }

    void add_linear(const float* dz, const float* s, bool with_bias) {
        for (int b = 0; b < 2; b++)
            multiply<true>(D, D, rows, dz + b * D, D2, s + b * D, D2, weight + b * D * D, D, Start::add);
        if (with_bias) add_rows(bias, dz, nullptr);
    }

    void add_angle(const float* dh, const float* a) {
        multiply<true>(D2, D, rows, dh, D2, a + first * D, D, angle_weight, D, Start::add);
    }

    void add_rows(float* sum, const float* rows_, const float* factor) {
        for (int n = 0; n < D2; n += LANES) {
            Vec v = load(sum + n);
            for (int r = 0; r < rows; r++)
                v += factor ? load(rows_ + r * D2 + n) * load(factor + r * D2 + n) : load(rows_ + r * D2 + n);
            store(sum + n, v);
        }
    }

    void add_norm(const float* dn, const float* x, const float* dn_dot, const float* lz) {
        add_rows(shift, dn, nullptr);
        add_rows(scale, dn, x);
        if (dn_dot) add_rows(scale, dn_dot, lz);
    }
};

template <typename F>
static void in_parallel(int64_t n, F share) {
    std::vector<std::thread> others;
    int64_t thread = 1;
    try {
        for (; thread < n; thread++) others.emplace_back(share, thread);
    } catch (const std::system_error&) {  // the system gives no more threads
        for (; thread < n; thread++) share(thread);
    }
    share(0);
    for (auto& other : others) other.join();
}

template <int D, typename F>
static void in_threads(const Inputs& in, const Outputs& out, F work) {
    const int64_t n_rows = in.i_start[in.n_segments], n = in.n_threads;
    auto segment = [&](int64_t part) {  // the first whose rows begin at or after this share of the rows
        int64_t low = 0, high = in.n_segments;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (in.i_start[middle] * n < part * n_rows) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return part == n ? in.n_segments : low;
    };
    auto share = [&](int64_t thread) {
        auto* tile = new Tile<D>;
        Worker<D>(in, out, *tile, thread).run(segment(thread), segment(thread + 1), work);
        delete tile;
    };
    in_parallel(n, share);
}

template <int D>
static void dispatch(int level, const Inputs& in, const Outputs& out) {
    if (level == 0) in_threads<D>(in, out, [](Worker<D>& worker) { worker.forward(); });
    if (level == 1) in_threads<D>(in, out, [](Worker<D>& worker) { worker.backward(); });
    if (level == 2) in_threads<D>(in, out, [](Worker<D>& worker) { worker.second(); });
}

// level: 0 forward, 1 backward, 2 its backward. Returns 0, or 1 for a width it does not know.
extern "C" int messages(int level, int64_t width, const Inputs* in, const Outputs* out) {
    if (width == 64) {
        dispatch<64>(level, *in, *out);
    } else if (width == 16) {
        dispatch<16>(level, *in, *out);
    } else {
        return 1;
    }
    return 0;
}

// Sums over segments of rows [N, width]: order may be null, rows then stand as they are.
extern "C" void sum_rows(const float* rows, const int64_t* order, const int64_t* start, int64_t n_segments,
                         int64_t width, int64_t n_threads, float* out) {
    auto share = [&](int64_t thread) {
        for (int64_t s = n_segments * thread / n_threads; s < n_segments * (thread + 1) / n_threads; s++) {
            float* sum = out + s * width;
            std::memset(sum, 0, width * sizeof(float));
            for (int64_t at = start[s]; at < start[s + 1]; at++) {
                const float* row = rows + (order ? order[at] : at) * width;
                for (int64_t n = 0; n < width; n++) sum[n] += row[n];
            }
        }
    };
    in_parallel(n_threads, share);
}

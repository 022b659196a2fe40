// Gated messages on a CPU in single precision; the mathematics and the symbols are those of ops/message.py.
//
// Each thread takes whole segments of i and walks through their rows in tiles that stay in its cache. Gradients
// of parameters are added up per thread and joined in the order of the threads. Then rows are summed over j and k.

#include <memory>
#include <vector>

#include "gate.h"
#include "threads.h"

// Starts n sums with what they are added to: nothing, one table or two.
static void start_sums(float* sum, const float* const* onto, int64_t offset, int64_t n) {
    if (!onto[0]) std::memset(sum, 0, n * sizeof(float));
    if (onto[0]) std::memcpy(sum, onto[0] + offset, n * sizeof(float));
    if (onto[1])
        for (int64_t at = 0; at < n; at++) sum[at] += onto[1][offset + at];
}

template <int D>
class Worker : Gate<D> {
    using Gate<D>::D2, Gate<D>::in, Gate<D>::t, Gate<D>::first, Gate<D>::rows, Gate<D>::over, Gate<D>::gather;
    using Gate<D>::linear, Gate<D>::linear_backward, Gate<D>::messages, Gate<D>::normed, Gate<D>::silu_slope;
    using Gate<D>::slopes, Gate<D>::hidden_backward;
    const Outputs& out;
    const Parameters<float> sums;

  public:
    Worker(const Inputs& in, const Outputs& out, Tile<D>& t, float* sums)
        : Gate<D>(in, t), out(out), sums(in, D, sums) {}

    template <typename F>
    void run(int64_t from, int64_t to, F work) {
        if (in.has_w && out.y) std::memset(out.y + from * D, 0, (to - from) * D * sizeof(float));
        if (out.p) start_sums(out.p + from * D2, out.onto.p, from * D2, (to - from) * D2);
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
                for (int n = 0; n < D; n += LANES)
                    store(out.y + row * D + n, load(m + n) + (in.a ? load(in.a + row * D + n) : Vec{}));
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
                if (in.w) store(out.w_rows + at.row * D + n, g * load(t.m + r * D + n));
                for (int b = 0; b < D2; b += D) store(t.d1 + r * D2 + b + n, dm * load(t.slope + r * D2 + b + n));
            }
        }
        if (sums.scale) add_norm(t.d1, nullptr, nullptr);
        normed(t.d1, t.d1, true);
        if (sums.weight) add_linear(t.d1, t.s, true);
        hidden_backward(t.d1, t.d2);
        put(t.d2, in.w ? nullptr : in.grad);
        if (sums.angle_weight) add_angle(t.d2, in.a);
    }

    void second() {
        messages();
        slopes();
        gather(t.u, in.u_p, in.u_q, in.u_r, in.u_tail, in.u_a);
        const float* zdot = t.u;
        if (in.weight) {
            over(D2, [&](int n) { store(t.sdot + n, silu_slope(n) * load(t.u + n)); });
            linear(t.sdot, t.zdot, nullptr);
            zdot = t.zdot;
        }
        normed(zdot, t.lz, false);
        for (int r = 0; r < rows; r++) second_of_gate(r);
        if (sums.scale) add_norm(t.d1, t.d2, t.lz);
        if (in.scale) {
            second_of_norm(zdot);
        } else {
            std::memcpy(t.d3, t.d1, sizeof(t.d3));
        }
        // d2 is the gradient by z', d3 the one by z
        const float *first_h = t.d2, *by_h = t.d3;
        if (sums.weight) {
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
        put(by_h, nullptr);
        if (sums.angle_weight) {
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
                store(out.w_rows + at.row * D + n, g * mdot);
            } else {
                const Vec residual = in.u_a ? load(in.u_a + at.row * D + n) : Vec{};
                store(out.y + at.row * D + n, tangent + residual);
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

    // Takes gradients by h, and what a gets beside them.
    void put(const float* dh, const float* da) {
        for (int r = 0; r < rows; r++) {
            float *p = out.p + in.i[first + r] * D2, *h = out.h + (first + r) * D2;
            for (int n = 0; n < D2; n += LANES) {
                const Vec v = load(dh + r * D2 + n);
                store(h + n, v);
                store(p + n, load(p + n) + v);
            }
        }
        if (!in.a) return;
        float* a = out.a + first * D;
        start_sums(a, out.onto.a, first * D, rows * D);
        for (int n = 0; da && n < rows * D; n++) a[n] += da[first * D + n];
        multiply(rows, D, D2, dh, D2, in.angle_weight, D, a, D, Start::add);
    }

    void add_linear(const float* dz, const float* s, bool with_bias) {
        for (int b = 0; b < 2; b++)
            multiply<true>(D, D, rows, dz + b * D, D2, s + b * D, D2, sums.weight + b * D * D, D, Start::add);
        if (with_bias)
            for (int b = 0; b < 2; b++) add_rows(sums.bias + b * D, b, dz, nullptr);
    }

    void add_angle(const float* dh, const float* a) {
        multiply<true>(D2, D, rows, dh, D2, a + first * D, D, sums.angle_weight, D, Start::add);
    }

    // Adds rows of core or gate, each element times a factor where there are factors.
    void add_rows(float* sum, int b, const float* rows_, const float* factor) {
        for (int n = 0; n < D; n += LANES) {
            Vec v = load(sum + n);
            for (int r = 0; r < rows; r++) {
                const int c = r * D2 + b * D + n;
                v += factor ? load(rows_ + c) * load(factor + c) : load(rows_ + c);
            }
            store(sum + n, v);
        }
    }

    void add_norm(const float* dn, const float* dn_dot, const float* lz) {
        for (int b = 0; b < 2; b++) {
            const int64_t of = b < in.n_norms ? b * D : 0;
            add_rows(sums.shift + of, b, dn, nullptr);
            add_rows(sums.scale + of, b, dn, t.x);
            if (dn_dot) add_rows(sums.scale + of, b, dn_dot, lz);
        }
    }
};

template <int D, typename F>
static void in_threads(const Inputs& in, const Outputs& out, F work) {
    const int64_t n_rows = in.i_start[in.n_i], n = in.n_threads, n_parameters = out.parameters ? in.size : 0;
    auto segment = [&](int64_t part) {  // the first whose rows begin at or after this share of the rows
        int64_t low = 0, high = in.n_i;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            if (in.i_start[middle] * n < part * n_rows) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        return part == n ? in.n_i : low;
    };
    std::vector<float> others((n - 1) * n_parameters);
    auto sums = [&](int64_t thread) { return thread ? &others[(thread - 1) * n_parameters] : out.parameters; };
    if (n_parameters) std::memset(out.parameters, 0, n_parameters * sizeof(float));
    // All of a tile is written before it is read. Taken here, since what a new thread takes would be new memory.
    const std::unique_ptr<Tile<D>[]> tiles(new Tile<D>[n]);
    in_parallel(n, [&](int64_t thread) {
        float* mine = n_parameters ? sums(thread) : nullptr;
        Worker<D>(in, out, tiles[thread], mine).run(segment(thread), segment(thread + 1), work);
    });
    for (int64_t thread = 1; thread < n && n_parameters; thread++)
        for (int64_t at = 0; at < n_parameters; at++) out.parameters[at] += sums(thread)[at];
}

// Rows [N, width] and the segments that they are summed over: order may be null, rows then stand as they are.
struct Sum {
    const float* rows;
    const int64_t *order, *start;
    int64_t n_segments, width;
    float* out;
    const float* const* onto;

    void run(int64_t from, int64_t to) const {
        for (int64_t s = from; s < to; s++) {
            float* sum = out + s * width;
            start_sums(sum, onto, s * width, width);
            for (int64_t at = start[s]; at < start[s + 1]; at++) {
                const float* row = rows + (order ? order[at] : at) * width;
                for (int64_t n = 0; n < width; n++) sum[n] += row[n];
            }
        }
    }
};

static void add_up(const std::vector<Sum>& wanted, int64_t n) {
    in_parallel(n, [&](int64_t thread) {
        for (const Sum& sum : wanted) sum.run(sum.n_segments * thread / n, sum.n_segments * (thread + 1) / n);
    });
}

template <int D>
static void dispatch(int level, const Inputs& in, const Outputs& out) {
    if (level == 0) in_threads<D>(in, out, [](Worker<D>& worker) { worker.forward(); });
    if (level == 1) in_threads<D>(in, out, [](Worker<D>& worker) { worker.backward(); });
    if (level == 2) in_threads<D>(in, out, [](Worker<D>& worker) { worker.second(); });
    if (level == 0) return;
    std::vector<Sum> wanted{{out.h, in.j_order, in.j_start, in.n_j, 2 * D, out.q, out.onto.q},
                            {out.h, in.k_order, in.k_start, in.n_r, 2 * D, out.r, out.onto.r},
                            {out.h, in.k_order, in.k_start + in.n_r, in.n_k - in.n_r, 2 * D, out.r_tail,
                             out.onto.r_tail}};
    if (in.has_w) wanted.push_back({out.w_rows, in.k_order, in.k_start, in.n_k, D, out.w, out.onto.w});
    add_up(wanted, in.n_threads);
}

// level: 0 forward, 1 backward, 2 its backward. Returns 0, or 1 for a width it does not know.
extern "C" int messages(int level, int64_t width, const Given* in, const Outputs* out) {
    if (width == 64) {
        dispatch<64>(level, Inputs(*in, 64), *out);
    } else if (width == 16) {
        dispatch<16>(level, Inputs(*in, 16), *out);
    } else {
        return 1;
    }
    return 0;
}

extern "C" void use_pool(decltype(Pool::run) run, decltype(Pool::number) number, decltype(Pool::size) size) {
    pool = {run, number, size};
}

extern "C" void sum_rows(const float* rows, const int64_t* order, const int64_t* start, int64_t n_segments,
                         int64_t width, int64_t n_threads, float* out) {
    const float* const nothing[2]{};
    add_up({{rows, order, start, n_segments, width, out, nothing}}, n_threads);
}

// Radial and angular bases on a CPU in single precision; the mathematics and the symbols are those of
// ops/radial_basis.py and ops/angular_basis.py.

#include <algorithm>
#include <cmath>
#include <vector>

#include "rows.h"
#include "threads.h"

namespace {

constexpr int MAX_FUNCTIONS = 64;  // frequencies; a multiple of LANES

template <typename F>
void each(int64_t n, int64_t n_threads, F work) {
    in_parallel(n_threads, [&](int64_t thread) {
        for (int64_t at = n * thread / n_threads; at < n * (thread + 1) / n_threads; at++) work(at);
    });
}

// Frequencies with zeros behind them, so that they fill whole vectors.
struct Frequencies {
    alignas(64) float value[MAX_FUNCTIONS] = {};
    int n;
    Frequencies(const float* from, int64_t n) : n(int(n)) { std::copy(from, from + n, value); }
};

// What multiplies the sines of a distance, A, and its slope A'.
struct Amplitude {
    float xi, value, slope = 0;

    Amplitude(float distance, float cutoff, int p, bool with_slope) {
        xi = distance / cutoff;
        xi = xi > 1 ? 1 : xi;  // and NaN stays
        float series = p * (p + 1) / 2.0f;
        for (int k = p - 2; k >= 0; k--) series = series * xi + (k + 1) * (k + 2) / 2.0f;
        const float rest = 1 - xi, u = rest * rest * rest * series, scale = std::sqrt(2 / cutoff) / distance;
        value = scale * u;
        if (!with_slope) return;
        float power = 1;
        for (int k = 0; k < p - 1; k++) power *= xi;
        const float u_slope = -0.5f * p * (p + 1) * (p + 2) * power * rest * rest / cutoff;
        slope = scale * (u_slope - u / distance);
    }
};

constexpr double K = 1 - 1e-6;  // the factor of the cosine in published weights
const float SCALE = float(1 / std::sqrt(std::acos(-1.0)));

struct Vector {
    float x, y, z;
    Vector operator-(const Vector& o) const { return {x - o.x, y - o.y, z - o.z}; }
    Vector operator*(float f) const { return {x * f, y * f, z * f}; }
    float dot(const Vector& o) const { return x * o.x + y * o.y + z * o.z; }
};

// The angle between two unit vectors: phi, its slope by the cosine, and u_j - c u_i.
struct Angle {
    float phi, slope;
    Vector across;

    Angle(const Vector& i, const Vector& j) {
        const float sign = i.dot(j) < 0 ? -1 : 1;
        const Vector w = j - i * sign;
        const float rest = w.dot(w) / 2, cosine = sign * (1 - rest), sine2 = rest * (2 - rest);
        const float q = std::sqrt(float(K * K) * sine2 + float(1 - K * K));
        phi = std::atan2(q, float(K) * cosine);
        slope = -float(K) / q;
        across = w - i * i.dot(w);
    }
};

// Short edges as lengths and directions.
struct Edges {
    std::vector<float> length;
    std::vector<Vector> unit;

    Edges(const float* edge, int64_t n) : length(n), unit(n) {
        for (int64_t at = 0; at < n; at++) {
            const Vector r{edge[3 * at], edge[3 * at + 1], edge[3 * at + 2]};
            length[at] = std::sqrt(r.dot(r));
            unit[at] = {r.x / length[at], r.y / length[at], r.z / length[at]};
        }
    }
};

}  // namespace

extern "C" void radial_basis(const float* distance, const float* frequency, int64_t n, int64_t n_functions,
                             double cutoff, int64_t p, int64_t n_threads, float* out) {
    const Frequencies f(frequency, n_functions);
    each(n, n_threads, [&](int64_t row) {
        const Amplitude a(distance[row], float(cutoff), int(p), false);
        alignas(64) float values[MAX_FUNCTIONS];
        for (int k = 0; k < f.n; k += LANES) {
            Vec sine, cosine;
            sine_and_cosine(load(f.value + k) * a.xi, sine, cosine);
            store(values + k, sine * a.value);
        }
        std::copy(values, values + f.n, out + row * f.n);
    });
}

extern "C" void radial_basis_backward(const float* grad, const float* distance, const float* frequency, int64_t n,
                                      int64_t n_functions, double cutoff, int64_t p, int64_t n_threads, float* out) {
    const Frequencies f(frequency, n_functions);
    each(n, n_threads, [&](int64_t row) {
        const Amplitude a(distance[row], float(cutoff), int(p), true);
        alignas(64) float g[MAX_FUNCTIONS] = {};
        std::copy(grad + row * f.n, grad + (row + 1) * f.n, g);
        Vec by_sine{}, by_cosine{};
        for (int k = 0; k < f.n; k += LANES) {
            Vec sine, cosine;
            const Vec w = load(f.value + k);
            sine_and_cosine(w * a.xi, sine, cosine);
            by_sine += load(g + k) * sine;
            by_cosine += load(g + k) * cosine * w;
        }
        out[row] = a.slope * total(by_sine) + a.value / float(cutoff) * total(by_cosine);
    });
}

// Of a Fourier series; out[T, 1 + 2 F].
extern "C" void angular_basis(const float* edge, const float* frequency, const int64_t* i, const int64_t* j,
                              int64_t n_edges, int64_t n_angles, int64_t n_functions, int64_t n_threads, float* out) {
    const Frequencies f(frequency, n_functions);
    const Edges edges(edge, n_edges);
    each(n_angles, n_threads, [&](int64_t row) {
        const Angle angle(edges.unit[i[row]], edges.unit[j[row]]);
        alignas(64) float sines[MAX_FUNCTIONS], cosines[MAX_FUNCTIONS];
        for (int k = 0; k < f.n; k += LANES) {
            Vec sine, cosine;
            sine_and_cosine(load(f.value + k) * angle.phi, sine, cosine);
            store(sines + k, sine * SCALE);
            store(cosines + k, cosine * SCALE);
        }
        float* to = out + row * (1 + 2 * f.n);
        to[0] = SCALE / std::sqrt(2.0f);
        std::copy(sines, sines + f.n, to + 1);
        std::copy(cosines, cosines + f.n, to + 1 + f.n);
    });
}

// Sums over the angles of each short edge; out[K, 3].
extern "C" void angular_basis_backward(const float* grad, const float* edge, const float* frequency, const int64_t* i,
                                       const int64_t* start, const int64_t* j, const int64_t* reverse,
                                       int64_t n_edges, int64_t n_angles, int64_t n_functions, int64_t n_threads,
                                       float* out) {
    const Frequencies f(frequency, n_functions);
    const Edges edges(edge, n_edges);
    std::vector<float> by_cosine(n_angles);
    std::vector<Vector> across(n_angles);
    each(n_angles, n_threads, [&](int64_t row) {
        const Angle angle(edges.unit[i[row]], edges.unit[j[row]]);
        const float* from = grad + row * (1 + 2 * f.n) + 1;
        alignas(64) float by_sines[MAX_FUNCTIONS] = {}, by_cosines[MAX_FUNCTIONS] = {};
        std::copy(from, from + f.n, by_sines);
        std::copy(from + f.n, from + 2 * f.n, by_cosines);
        Vec along{};
        for (int k = 0; k < f.n; k += LANES) {
            Vec sine, cosine;
            const Vec w = load(f.value + k);
            sine_and_cosine(w * angle.phi, sine, cosine);
            along += w * (load(by_sines + k) * cosine - load(by_cosines + k) * sine);
        }
        by_cosine[row] = angle.slope * SCALE * total(along);
        across[row] = angle.across;
    });
    each(n_edges, n_threads, [&](int64_t at) {
        Vector sum{0, 0, 0};
        for (int64_t row = start[at]; row < start[at + 1]; row++)
            sum = sum - across[row] * -(by_cosine[row] + by_cosine[reverse[row]]);
        const float over = 1 / edges.length[at];
        out[3 * at] = sum.x * over;
        out[3 * at + 1] = sum.y * over;
        out[3 * at + 2] = sum.z * over;
    });
}

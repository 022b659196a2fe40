// Small dense arithmetic on tiles of rows that stay in a core's cache.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, ROWS_AT_ONCE = 6, VECTORS_AT_ONCE = 4;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, ROWS_AT_ONCE = 6, VECTORS_AT_ONCE = 2;
#else
constexpr int VECTOR_BYTES = 16, ROWS_AT_ONCE = 4, VECTORS_AT_ONCE = 4;
#endif
constexpr int LANES = VECTOR_BYTES / sizeof(float);

typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntVec __attribute__((vector_size(VECTOR_BYTES)));

static inline Vec load(const float* p) {
    Vec v;
    std::memcpy(&v, p, sizeof(Vec));
    return v;
}

static inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(Vec)); }

static inline Vec all(float x) { return x - Vec{}; }

template <int BYTES>
static inline float total(const float* p) {
    typedef float Half __attribute__((vector_size(BYTES / 2)));
    Half low, high;
    std::memcpy(&low, p, sizeof(Half));
    std::memcpy(&high, p + BYTES / 8, sizeof(Half));
    low += high;
    return total<BYTES / 2>(reinterpret_cast<const float*>(&low));
}

template <>
inline float total<8>(const float* p) {
    return p[0] + p[1];
}

// The sum of all lanes, pairwise: a chain of additions would wait for each of them.
static inline float total(Vec v) { return total<VECTOR_BYTES>(reinterpret_cast<const float*>(&v)); }

// to[k, n] = from[n, k], in squares that stay in registers and caches.
static inline void transpose(const float* from, int n, int k, float* to) {
    constexpr int SIDE = 8;
    for (int i = 0; i < n; i += SIDE)
        for (int j = 0; j < k; j += SIDE)
            for (int b = 0; b < SIDE; b++)
                for (int a = 0; a < SIDE; a++) to[(j + b) * n + i + a] = from[(i + a) * k + j + b];
}

static inline Vec reciprocal(Vec x) {
#if defined(__AVX512F__)
    // right to 14 bits, and after a step of Newton's to the last but one: a division takes three times as long
    const Vec y = reinterpret_cast<Vec>(_mm512_rcp14_ps(reinterpret_cast<__m512>(x)));
    return y * (2.0f - x * y);
#else
    return 1.0f / x;
#endif
}

// 1 / (1 + exp(-x)). exp(t) = 2^n exp(r) with |r| <= ln(2) / 2 and a polynomial of degree 6, to 1e-7.
static inline Vec sigmoid(Vec x) {
    Vec t = -x;
    t = t > 87.0f ? all(87.0f) : t;
    t = t < -87.0f ? all(-87.0f) : t;
    const Vec shifter = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Vec n = (t * 1.44269504088896341f + shifter) - shifter;
    const Vec r = (t - n * 0.693359375f) - n * -2.12194440e-4f;
    Vec p = all(1.0f / 720);
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const IntVec power = (__builtin_convertvector(n, IntVec) + 127) << 23;
    Vec scale;
    std::memcpy(&scale, &power, sizeof(Vec));
    return reciprocal(1.0f + p * scale);
}

// Sine and cosine for |x| below some thousands, to 1e-7: x less a multiple of pi / 2, which is taken off in three
// parts that are exact products, and polynomials as in the Cephes library.
static inline void sine_and_cosine(Vec x, Vec& sine, Vec& cosine) {
    const Vec shifter = all(12582912.0f);
    const Vec n = (x * 0.636619772367581343f + shifter) - shifter;
    const Vec r = ((x - n * 1.5703125f) - n * 4.837512969970703125e-4f) - n * 7.549789948768648e-8f, z = r * r;
    const Vec s = r + r * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
    const Vec c =
        1.0f - 0.5f * z + z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
    const IntVec quadrant = __builtin_convertvector(n, IntVec), odd = (quadrant & 1) != 0;
    const Vec first = odd ? c : s, second = odd ? s : c;
    sine = (quadrant & 2) != 0 ? -first : first;
    cosine = ((quadrant + 1) & 2) != 0 ? -second : second;
}

// c[M, N] = start + a[M, K] b[K, N], start a bias [N], what c holds, or nothing.
// With `transposed`, a is read as [K, M]. N is a multiple of LANES.
enum class Start { zero, bias, add };

template <int ROWS, int VECTORS, bool transposed>
static inline void block(
    int K, const float* a, int lda, const float* b, int ldb, float* c, int ldc, Start start, const float* bias) {
    Vec sum[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++)
            sum[m][v] = start == Start::add    ? load(c + m * ldc + v * LANES)
                        : start == Start::bias ? load(bias + v * LANES)
                                               : Vec{};
    for (int k = 0; k < K; k++) {
        Vec row[VECTORS];
        for (int v = 0; v < VECTORS; v++) row[v] = load(b + k * ldb + v * LANES);
        for (int m = 0; m < ROWS; m++) {
            const float x = transposed ? a[k * lda + m] : a[m * lda + k];
            for (int v = 0; v < VECTORS; v++) sum[m][v] += x * row[v];
        }
    }
    for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) store(c + m * ldc + v * LANES, sum[m][v]);
}

template <int VECTORS, bool transposed>
static inline void columns(int M, int K, const float* a, int lda, const float* b, int ldb, float* c, int ldc,
                           Start start, const float* bias) {
    const int step = transposed ? 1 : lda;
    int m = 0;
    for (; m + ROWS_AT_ONCE <= M; m += ROWS_AT_ONCE)
        block<ROWS_AT_ONCE, VECTORS, transposed>(K, a + m * step, lda, b, ldb, c + m * ldc, ldc, start, bias);
    for (; m < M; m++) block<1, VECTORS, transposed>(K, a + m * step, lda, b, ldb, c + m * ldc, ldc, start, bias);
}

template <bool transposed = false>
static void multiply(int M, int N, int K, const float* a, int lda, const float* b, int ldb, float* c, int ldc,
                     Start start = Start::zero, const float* bias = nullptr) {
    constexpr int WIDE = VECTORS_AT_ONCE * LANES;
    int n = 0;
    for (; n + WIDE <= N; n += WIDE)
        columns<VECTORS_AT_ONCE, transposed>(M, K, a, lda, b + n, ldb, c + n, ldc, start, bias + (bias ? n : 0));
    for (; n < N; n += LANES)
        columns<1, transposed>(M, K, a, lda, b + n, ldb, c + n, ldc, start, bias + (bias ? n : 0));
}

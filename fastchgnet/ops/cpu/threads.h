// Work in threads.
#pragma once

#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

// Numbers below 1e-38 become zero for as long as it lives. Envelopes near the cutoff make many of them, and each
// would take a hundred cycles.
class FlushedDenormals {
#if defined(__SSE__)
    const unsigned before = _mm_getcsr();

  public:
    FlushedDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushedDenormals() { _mm_setcsr(before); }
#endif
};

// The pool of the OpenMP runtime that PyTorch has brought along, if it has: its threads are awake between two
// operations, and threads of our own would have to share their cores with them.
struct Pool {
    void (*run)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel
    int (*number)();                                           // of this thread
    int (*size)();
};
inline Pool pool{};

template <typename F>
static void in_parallel(int64_t n, F work) {
    auto share = [&](int64_t thread) {
        [[maybe_unused]] const FlushedDenormals flushed;
        work(thread);
    };
    if (n > 1 && pool.run) {
        struct Job {
            decltype(share)* work;
            int64_t n;
        } job{&share, n};
        auto each = [](void* given) {  // the team may have fewer threads than were asked for
            const Job& job = *static_cast<Job*>(given);
            for (int64_t thread = pool.number(); thread < job.n; thread += pool.size()) (*job.work)(thread);
        };
        pool.run(each, &job, unsigned(n), 0);
        return;
    }
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

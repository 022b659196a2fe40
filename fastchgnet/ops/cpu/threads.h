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

template <typename F>
static void in_parallel(int64_t n, F work) {
    auto share = [&](int64_t thread) {
        [[maybe_unused]] const FlushedDenormals flushed;
        work(thread);
    };
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

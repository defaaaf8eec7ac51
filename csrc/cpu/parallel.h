// A parallel loop on threads that end before it returns.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dalle2_fast::cpu {

// Starting a thread costs some 30 us; with fewer elements per thread than this it does not pay.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 18;

// Calls work(item) for each item on at most `threads` threads, the calling one included. No thread outlives
// the call, so a process may fork between calls. The result must not depend on which thread takes an item.
template <class Work>
void parallel_for(int64_t items, int64_t elements, int threads, Work work) {
    std::atomic<int64_t> next{0};
    const auto take_items = [&] {
        for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) work(item);
    };
    const int64_t useful = std::min({int64_t(threads), items, elements / ELEMENTS_PER_THREAD});
    std::vector<std::thread> helpers;
    helpers.reserve(std::max<int64_t>(useful, 1));
    try {
        while (int64_t(helpers.size()) + 1 < useful) helpers.emplace_back(take_items);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that have started do the work.
    }
    take_items();
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace dalle2_fast::cpu

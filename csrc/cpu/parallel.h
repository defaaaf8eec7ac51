// A parallel loop on the threads that torch already has.
//
// torch on Linux brings GNU OpenMP and keeps a team of threads for its own operations. This loop runs on the
// same team, through the function that compilers call for `#pragma omp parallel`. Then no thread is started
// per call, and no second team of threads waits in a busy loop beside torch's. The function is looked up at
// run time, because the module is built without torch and without OpenMP. Where the process has none (macOS,
// or a child after a fork, in which the team's threads do not exist), threads are started for the call.
#pragma once

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

namespace dalle2_fast::cpu {

// Waking a thread of the team costs 1 to 5 us, starting a new one some 30 us. With fewer elements per thread
// than this a call runs on fewer threads.
constexpr int64_t ELEMENTS_PER_THREAD = 1 << 13, ELEMENTS_PER_NEW_THREAD = 1 << 18;

// void GOMP_parallel(body, argument, threads, flags): calls body(argument) on each thread of a team and
// returns when all have returned.
using TeamCall = void (*)(void (*)(void*), void*, unsigned, unsigned);

inline const pid_t loading_process = getpid();

inline TeamCall find_team() {
    static const TeamCall found = reinterpret_cast<TeamCall>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return getpid() == loading_process ? found : nullptr;
}

// Calls work(item) for each item on at most `threads` threads, the calling one included. The result must not
// depend on which thread takes an item.
template <class Work>
void parallel_for(int64_t items, int64_t elements, int threads, Work work) {
    struct Loop {
        std::atomic<int64_t> next;
        int64_t items;
        Work& work;

        static void run(void* self) {
            Loop& loop = *static_cast<Loop*>(self);
            for (int64_t item; (item = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.items;)
                loop.work(item);
        }
    } loop{{0}, items, work};

    const TeamCall team = threads > 1 ? find_team() : nullptr;
    const int64_t each = team ? ELEMENTS_PER_THREAD : ELEMENTS_PER_NEW_THREAD;
    const int64_t useful = std::min({int64_t(threads), items, elements / each});
    if (useful <= 1) {
        Loop::run(&loop);
        return;
    }
    if (team) {
        team(&Loop::run, &loop, unsigned(useful), 0);
        return;
    }
    std::vector<std::thread> helpers;
    helpers.reserve(useful);
    try {
        while (int64_t(helpers.size()) + 1 < useful) helpers.emplace_back(&Loop::run, &loop);
    } catch (const std::system_error&) {
        // The system gives no more threads: those that have started do the work.
    }
    Loop::run(&loop);
    for (std::thread& helper : helpers) helper.join();
}

}  // namespace dalle2_fast::cpu

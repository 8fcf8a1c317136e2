// A loop shared out to the threads that PyTorch has already.
#pragma once

#include <atomic>
#include <cstddef>

namespace tapct {

// Calls work(i) once for every i below `count`, on at most `threads` threads, the caller's being
// one. Where the process has loaded libgomp, as PyTorch does, they are the threads of its pool:
// threads of our own would compete with those, which spin for milliseconds after each of PyTorch's
// loops. Must not throw.
void team_run(void (*work)(void*), void* data, std::size_t threads);

template <typename Work>
void team_for(std::size_t count, std::size_t threads, const Work& work) {
  struct Loop {
    std::atomic<std::size_t> next;
    std::size_t count;
    const Work* work;
  } loop{0, count, &work};
  team_run(
      [](void* data) noexcept {
        auto& shared = *static_cast<Loop*>(data);
        for (std::size_t i = shared.next++; i < shared.count; i = shared.next++) {
          (*shared.work)(i);
        }
      },
      &loop, threads < count ? threads : count);
}

}  // namespace tapct

// One loop over independent items, shared out to threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace tapct {

// Calls work(i) once for every i below `count`, on at most `threads` threads, the caller's being
// one. Throws the first error of any call, after which no further item is begun.
template <typename Work>
void parallel_for(std::size_t count, std::size_t threads, const Work& work) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;
  const auto run = [&]() noexcept {
    for (std::size_t i = next++; i < count; i = next++) {
      try {
        work(i);
      } catch (...) {
        next = count;
        const std::lock_guard lock(error_lock);
        error = error ? error : std::current_exception();
      }
    }
  };
  {
    std::vector<std::jthread> others;
    try {
      for (std::size_t i = 1; i < std::min(threads, count); ++i) {
        others.emplace_back(run);
      }
    } catch (const std::system_error&) {
      // No more threads to be had: those there are, and this one, do the work.
    }
    run();
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

}  // namespace tapct

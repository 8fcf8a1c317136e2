#include "tapct/team.hpp"

#include <dlfcn.h>

#include <system_error>
#include <thread>
#include <vector>

namespace tapct {

void team_run(void (*work)(void*), void* data, std::size_t threads) {
  if (threads <= 1) {
    work(data);
    return;
  }
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  // Asked for each time: PyTorch may be imported later than this library.
  if (const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"))) {
    parallel(work, data, static_cast<unsigned>(threads), 0);
    return;
  }
  std::vector<std::jthread> others;
  try {
    for (std::size_t i = 1; i < threads; ++i) {
      others.emplace_back(work, data);
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those there are, and this one, do the work.
  }
  work(data);
}

}  // namespace tapct

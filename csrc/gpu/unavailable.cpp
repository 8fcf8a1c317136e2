#include "tapct/error.hpp"
#include "tapct/gpu.hpp"

namespace tapct {

namespace {

[[noreturn]] void fail() {
  throw DeviceError("this build has no CUDA code; rebuild with TAPCT_CUDA=ON");
}

}  // namespace

std::vector<std::string> cuda_devices() { fail(); }

void render_views_gpu(std::span<const ViewJob>, const ViewOptions&, bool, float*, std::size_t,
                      void*) {
  fail();
}

}  // namespace tapct

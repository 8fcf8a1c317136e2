#include "tapct/error.hpp"
#include "tapct/gpu.hpp"

namespace tapct {

std::vector<std::string> cuda_devices() {
  throw DeviceError("this build has no CUDA code; rebuild with TAPCT_CUDA=ON");
}

}  // namespace tapct

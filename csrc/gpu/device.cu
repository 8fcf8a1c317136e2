#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "check.hpp"
#include "tapct/gpu.hpp"

namespace tapct {
std::vector<std::string> cuda_devices() {
  int num_devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&num_devices);
  if (status == cudaErrorNoDevice || status == cudaErrorInsufficientDriver) {
    return {};
  }
  check(status, "cudaGetDeviceCount");
  std::vector<std::string> devices;
  for (int i = 0; i < num_devices; ++i) {
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, i), "cudaGetDeviceProperties");
    devices.push_back(std::string(properties.name) + " (sm_" + std::to_string(properties.major) +
                      std::to_string(properties.minor) + ", " +
                      std::to_string(properties.totalGlobalMem >> 30) + " GiB)");
  }
  return devices;
}

}  // namespace tapct

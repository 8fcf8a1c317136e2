// What the CUDA build provides; gpu/unavailable.cpp has the same symbols.
#pragma once

#include <string>
#include <vector>

namespace tapct {

// One line per visible CUDA device, e.g. "NVIDIA H200 (sm_90, 139 GiB)"; empty without device or
// driver. Throws DeviceError in a build without CUDA.
std::vector<std::string> cuda_devices();

}  // namespace tapct

// Every CUDA call is checked.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "tapct/error.hpp"

namespace tapct {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    throw DeviceError(std::string(what) + ": " + cudaGetErrorString(status));
  }
}

}  // namespace tapct

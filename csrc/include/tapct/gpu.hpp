// What the CUDA build provides; gpu/unavailable.cpp has the same symbols.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include "tapct/views.hpp"

namespace tapct {

// One line per visible CUDA device, e.g. "NVIDIA H200 (sm_90, 139 GiB)"; empty without device or
// driver. Throws DeviceError in a build without CUDA.
std::vector<std::string> cuda_devices();

// Renders every job as render_views does, on the device that holds the first output: queues the
// work on `stream`, a cudaStream_t of that device, and returns. Boxes, outputs and `scratch` are
// device memory that must live until then; scratch holds size_zyx floats for each view with a blur,
// of which there may be at most `num_scratch`. Throws as check_view does, before anything is
// queued, and DeviceError.
void render_views_gpu(std::span<const ViewJob> jobs, const ViewOptions& options, bool is_bf16,
                      float* scratch, std::size_t num_scratch, void* stream);

}  // namespace tapct

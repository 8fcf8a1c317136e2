#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "check.hpp"
#include "tapct/gpu.hpp"
#include "view_tile.hpp"

namespace tapct {
namespace {

using gpu::Grid;
using gpu::Shared;
using gpu::TileView;

struct BlockThreads {
  float sums[gpu::per_thread];

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x), sums);
    __syncthreads();
  }
};

// A launch carries its views in its parameters, of which there may be 32764 bytes since CUDA 12.1:
// so no table has to be uploaded and kept alive on the host.
constexpr std::size_t views_per_launch = 128;
struct Batch {
  TileView views[views_per_launch];
};
static_assert(sizeof(Batch) <= 32764 - sizeof(Grid) - sizeof(int));

// Three blocks per multiprocessor: with four the noise would spill its registers.
template <typename Pixel>
__global__ void __launch_bounds__(gpu::num_threads, 3)
    render(const __grid_constant__ Batch batch, const __grid_constant__ Grid grid, int num_tiles) {
  __shared__ Shared shared;
  BlockThreads threads;
  const int block = static_cast<int>(blockIdx.x);
  gpu::render_tile<Pixel>(threads, shared, batch.views[block / num_tiles], grid, block % num_tiles);
}

template <typename Pixel>
__global__ void __launch_bounds__(gpu::num_threads, 4)
    blur(const __grid_constant__ Batch batch, const __grid_constant__ Grid grid, int num_tiles) {
  __shared__ Shared shared;
  BlockThreads threads;
  const int block = static_cast<int>(blockIdx.x);
  gpu::blur_tile<Pixel>(threads, shared, batch.views[block / num_tiles], grid, block % num_tiles);
}

// Makes `device` the current one for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    check(cudaSetDevice(device), "cudaSetDevice");
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  ~OnDevice() { cudaSetDevice(before_); }  // it was current before

 private:
  int before_ = 0;
};

int device_of(const void* pointer) {
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, pointer), "cudaPointerGetAttributes");
  if (attributes.type != cudaMemoryTypeDevice && attributes.type != cudaMemoryTypeManaged) {
    throw std::invalid_argument("render_views_gpu: the output is not in device memory");
  }
  return attributes.device;
}

using Kernel = void (*)(Batch, Grid, int);

void launch(Kernel kernel, const std::vector<TileView>& views, const Grid& grid,
            std::size_t num_tiles, cudaStream_t stream, const char* what) {
  // A launch has fewer than 2^31 blocks; a view alone is known to have fewer.
  const std::size_t most = std::min(views_per_launch, std::size_t{0x7fffffff} / num_tiles);
  Batch batch;
  for (std::size_t begin = 0; begin < views.size(); begin += most) {
    const std::size_t count = std::min(most, views.size() - begin);
    std::copy_n(views.begin() + static_cast<std::ptrdiff_t>(begin), count, batch.views);
    kernel<<<static_cast<unsigned>(count * num_tiles), gpu::num_threads, 0, stream>>>(
        batch, grid, static_cast<int>(num_tiles));
    check(cudaGetLastError(), what);
  }
}

}  // namespace

void render_views_gpu(std::span<const ViewJob> jobs, const ViewOptions& options, bool is_bf16,
                      float* scratch, std::size_t num_scratch, void* stream) {
  if (jobs.empty()) {
    return;
  }
  const auto [size_z, size_y, size_x] = options.size_zyx;
  std::vector<TileView> views, blurred;
  for (const ViewJob& job : jobs) {
    float* place = nullptr;
    if (gpu::is_blurred(job.view)) {
      if (blurred.size() == num_scratch) {
        throw std::invalid_argument("render_views_gpu: there is too little scratch memory");
      }
      place = scratch + blurred.size() * size_z * size_y * size_x;
    }
    views.push_back(gpu::make_tile_view(job, options, place));
    if (place != nullptr) {
      blurred.push_back(views.back());
    }
  }
  const Grid grid{static_cast<int>(size_z), static_cast<int>(size_y), static_cast<int>(size_x)};
  const std::size_t num_tiles =
      size_z * static_cast<std::size_t>(grid.rows()) * static_cast<std::size_t>(grid.columns());
  if (num_tiles > 0x7fffffff) {
    throw std::invalid_argument("render_views_gpu: a view has 2^31 tiles or more");
  }
  // Views of one box side by side read it from the cache, not from memory.
  std::stable_sort(views.begin(), views.end(),
                   [](const TileView& a, const TileView& b) { return a.hu < b.hu; });

  const OnDevice on_device(device_of(jobs[0].out));
  auto* const queue = static_cast<cudaStream_t>(stream);
  launch(is_bf16 ? render<std::uint16_t> : render<float>, views, grid, num_tiles, queue,
         "render_views_gpu: render");
  launch(is_bf16 ? blur<std::uint16_t> : blur<float>, blurred, grid, num_tiles, queue,
         "render_views_gpu: blur");
}

}  // namespace tapct

// A whole NIfTI file from memory: any bytes give int16 voxels or a FormatError.
#include <cstdlib>

#include "tapct/error.hpp"
#include "tapct/nifti.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const auto content = std::as_bytes(std::span(data, size));
  constexpr std::uint64_t max_bytes = 1 << 22;
  try {
    const tapct::NiftiImage image = tapct::parse_nifti(content, {max_bytes, 2});
    if (image.voxels.size() != image.header.num_voxels()) {
      std::abort();
    }
    // Every voxel is readable memory.
    volatile std::int64_t sum = 0;
    for (const std::int16_t voxel : image.voxels) {
      sum = sum + voxel;
    }
  } catch (const tapct::FormatError&) {
  }
  return 0;
}

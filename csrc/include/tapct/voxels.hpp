// Stored voxels of any real type to int16 in place, and what is done to int16 volumes in place.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace tapct {

// Bytes of one voxel by NIfTI's datatype code, 0 where the code is no integer or float type.
std::size_t voxel_bytes(std::int32_t datatype) noexcept;

struct StoredVoxels {
  std::int32_t datatype = 0;  // one with voxel_bytes
  bool is_swapped = false;    // against the byte order of this machine
  double slope = 1;
  double inter = 0;
};

// What one pass over the voxels found.
struct Conversion {
  std::uint64_t num_non_finite = 0;
  std::uint64_t num_outside = 0;  // of int16, after slope and intercept
  bool rounded = false;           // some value was not a whole number
};

// out[i] = stored[i] * slope + inter in float64, rounded half to even; 0 where that is not int16.
//
// `stored` may have any alignment, and may overlap `out` where each value is read before its place
// is written to, front to back: types of two bytes and more may begin where `out` begins or later,
// types of one byte may end where `out` ends or later.
Conversion convert_voxels(const StoredVoxels& kind, std::span<const std::byte> stored,
                          std::span<std::int16_t> out);

// Reverses the chosen axes (z, y, x) in place.
void flip_voxels(std::span<std::int16_t> voxels, const std::array<std::size_t, 3>& shape_zyx,
                 const std::array<bool, 3>& flips_zyx);

struct VoxelRange {
  std::int16_t min = 0;
  std::int16_t max = 0;
  std::uint64_t num_inside = 0;  // low <= value <= high
};

// One pass over at least one voxel.
VoxelRange range_of(std::span<const std::int16_t> voxels, std::int16_t low, std::int16_t high);

}  // namespace tapct

#include "tapct/voxels.hpp"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "tapct/clones.hpp"

// A function cloned for AVX2 must not call a template compiled for any x86-64 only.
#define TAPCT_INLINE inline __attribute__((always_inline))

namespace tapct {
namespace {

static_assert(std::endian::native == std::endian::little, "the readers swap from little endian");

// Values are converted in blocks that stay in the first-level cache: source and result may then
// overlap and lie at any address, and the inner loops still vectorise.
constexpr std::size_t block_voxels = 1024;

constexpr double int16_low = std::numeric_limits<std::int16_t>::min();
constexpr double int16_high = std::numeric_limits<std::int16_t>::max();

// Adding and subtracting 1.5 * 2^52 rounds half to even below 2^51 and leaves larger values out of
// range; nearbyint is a function call per voxel on baseline x86-64.
constexpr double rounder = 6755399441055744.0;

template <typename T>
TAPCT_INLINE T swap_bytes(T value) {
  if constexpr (sizeof(T) == 1) {
    return value;
  } else if constexpr (sizeof(T) == 2) {
    return std::bit_cast<T>(__builtin_bswap16(std::bit_cast<std::uint16_t>(value)));
  } else if constexpr (sizeof(T) == 4) {
    return std::bit_cast<T>(__builtin_bswap32(std::bit_cast<std::uint32_t>(value)));
  } else {
    return std::bit_cast<T>(__builtin_bswap64(std::bit_cast<std::uint64_t>(value)));
  }
}

// True where value * slope + inter is whole and exact in int32 for every value of T.
template <typename T>
TAPCT_INLINE bool is_exact_in_int32(double slope, double inter) {
  if constexpr (std::is_integral_v<T> && sizeof(T) <= 2) {
    // 65535 * 2^14 + 2^30 < 2^31
    return slope == std::floor(slope) && inter == std::floor(inter) && std::abs(slope) <= 16384.0 &&
           std::abs(inter) <= 1073741824.0;
  } else {
    return false;
  }
}

template <typename T>
TAPCT_INLINE bool convert_whole(const T* values, std::int16_t* out, std::size_t count,
                                std::int32_t slope, std::int32_t inter) {
  std::int32_t low = std::numeric_limits<std::int32_t>::max();
  std::int32_t high = std::numeric_limits<std::int32_t>::min();
  for (std::size_t i = 0; i < count; ++i) {
    const std::int32_t value = static_cast<std::int32_t>(values[i]) * slope + inter;
    low = std::min(low, value);
    high = std::max(high, value);
    out[i] = static_cast<std::int16_t>(value);
  }
  return low >= std::numeric_limits<std::int16_t>::min() &&
         high <= std::numeric_limits<std::int16_t>::max();
}

// Says whether all are in range; those that are not become 0.
template <typename T>
TAPCT_INLINE bool convert_real(const T* values, std::int16_t* out, std::size_t count, double slope,
                               double inter, bool& rounded) {
  int num_outside = 0;
  int num_rounded = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const double scaled = static_cast<double>(values[i]) * slope + inter;
    const double whole = scaled + rounder - rounder;
    // Written so that NaN is outside; an out-of-range cast would be undefined.
    const int inside = static_cast<int>(whole >= int16_low) & static_cast<int>(whole <= int16_high);
    num_outside += 1 - inside;
    num_rounded += inside & static_cast<int>(whole != scaled);
    out[i] = static_cast<std::int16_t>(static_cast<std::int32_t>(inside != 0 ? whole : 0.0));
  }
  rounded |= num_rounded != 0;
  return num_outside == 0;
}

template <typename T>
TAPCT_INLINE void count_outside(const T* values, std::size_t count, double slope, double inter,
                                Conversion& found) {
  for (std::size_t i = 0; i < count; ++i) {
    const double scaled = static_cast<double>(values[i]) * slope + inter;
    const double whole = scaled + rounder - rounder;
    if (!(whole >= int16_low && whole <= int16_high)) {
      ++(std::isfinite(scaled) ? found.num_outside : found.num_non_finite);
    }
  }
}

template <typename T, bool Swap>
TAPCT_INLINE Conversion convert(std::span<const std::byte> stored, std::span<std::int16_t> out,
                                double slope, double inter) {
  Conversion found;
  const bool is_whole = is_exact_in_int32<T>(slope, inter);
  T values[block_voxels];
  std::int16_t converted[block_voxels];
  for (std::size_t at = 0; at < out.size(); at += block_voxels) {
    const std::size_t count = std::min(block_voxels, out.size() - at);
    std::memcpy(values, stored.data() + at * sizeof(T), count * sizeof(T));
    if constexpr (Swap) {
      for (std::size_t i = 0; i < count; ++i) {
        values[i] = swap_bytes(values[i]);
      }
    }
    bool fits = false;
    if constexpr (std::is_integral_v<T> && sizeof(T) <= 2) {
      if (is_whole) {
        fits = convert_whole(values, converted, count, static_cast<std::int32_t>(slope),
                             static_cast<std::int32_t>(inter));
      } else {
        fits = convert_real(values, converted, count, slope, inter, found.rounded);
      }
    } else {
      fits = convert_real(values, converted, count, slope, inter, found.rounded);
    }
    if (!fits) {
      count_outside(values, count, slope, inter, found);
    }
    std::memcpy(out.data() + at, converted, count * sizeof(std::int16_t));
  }
  return found;
}

template <bool Swap>
TAPCT_INLINE Conversion convert_any(const StoredVoxels& kind, std::span<const std::byte> stored,
                                    std::span<std::int16_t> out) {
  const double slope = kind.slope;
  const double inter = kind.inter;
  switch (kind.datatype) {
    case 2:
      return convert<std::uint8_t, Swap>(stored, out, slope, inter);
    case 4:
      return convert<std::int16_t, Swap>(stored, out, slope, inter);
    case 8:
      return convert<std::int32_t, Swap>(stored, out, slope, inter);
    case 16:
      return convert<float, Swap>(stored, out, slope, inter);
    case 64:
      return convert<double, Swap>(stored, out, slope, inter);
    case 256:
      return convert<std::int8_t, Swap>(stored, out, slope, inter);
    case 512:
      return convert<std::uint16_t, Swap>(stored, out, slope, inter);
    case 768:
      return convert<std::uint32_t, Swap>(stored, out, slope, inter);
    case 1024:
      return convert<std::int64_t, Swap>(stored, out, slope, inter);
    default:
      assert(kind.datatype == 1280);
      return convert<std::uint64_t, Swap>(stored, out, slope, inter);
  }
}

TAPCT_CLONES Conversion convert_native(const StoredVoxels& kind, std::span<const std::byte> stored,
                                       std::span<std::int16_t> out) {
  return convert_any<false>(kind, stored, out);
}

TAPCT_CLONES Conversion convert_swapped(const StoredVoxels& kind, std::span<const std::byte> stored,
                                        std::span<std::int16_t> out) {
  return convert_any<true>(kind, stored, out);
}

// Exchanges two ranges of equal size that do not overlap, each reversed.
TAPCT_CLONES void swap_reversed(std::int16_t* a, std::int16_t* b, std::size_t size) {
  std::int16_t first[block_voxels];
  std::int16_t last[block_voxels];
  for (std::size_t done = 0; done < size; done += block_voxels) {
    const std::size_t count = std::min(block_voxels, size - done);
    std::int16_t* const head = a + done;
    std::int16_t* const tail = b + (size - done - count);
    std::memcpy(first, head, count * sizeof(std::int16_t));
    std::memcpy(last, tail, count * sizeof(std::int16_t));
    for (std::size_t i = 0; i < count; ++i) {
      head[i] = last[count - 1 - i];
      tail[i] = first[count - 1 - i];
    }
  }
}

void reverse(std::int16_t* row, std::size_t size) {
  swap_reversed(row, row + (size - size / 2), size / 2);
}

TAPCT_CLONES VoxelRange range(const std::int16_t* voxels, std::size_t size, std::int16_t low,
                              std::int16_t high) {
  VoxelRange found{voxels[0], voxels[0], 0};
  constexpr std::size_t block = 32768;  // the most that 16 bits can count without wrapping
  for (std::size_t at = 0; at < size; at += block) {
    const std::size_t count = std::min(block, size - at);
    std::int16_t min = found.min;
    std::int16_t max = found.max;
    std::uint16_t inside = 0;
    for (std::size_t i = 0; i < count; ++i) {
      const std::int16_t value = voxels[at + i];
      min = std::min(min, value);
      max = std::max(max, value);
      inside = static_cast<std::uint16_t>(inside + (value >= low && value <= high ? 1 : 0));
    }
    found.min = min;
    found.max = max;
    found.num_inside += inside;
  }
  return found;
}

}  // namespace

std::size_t voxel_bytes(std::int32_t datatype) noexcept {
  switch (datatype) {
    case 2:    // uint8
    case 256:  // int8
      return 1;
    case 4:    // int16
    case 512:  // uint16
      return 2;
    case 8:    // int32
    case 768:  // uint32
    case 16:   // float32
      return 4;
    case 64:    // float64
    case 1024:  // int64
    case 1280:  // uint64
      return 8;
    default:
      return 0;
  }
}

Conversion convert_voxels(const StoredVoxels& kind, std::span<const std::byte> stored,
                          std::span<std::int16_t> out) {
  if (kind.datatype == 4 && kind.slope == 1 && kind.inter == 0 && !kind.is_swapped &&
      static_cast<const void*>(stored.data()) == static_cast<const void*>(out.data())) {
    return {};  // they are int16 already, and in their place
  }
  return kind.is_swapped ? convert_swapped(kind, stored, out) : convert_native(kind, stored, out);
}

void flip_voxels(std::span<std::int16_t> voxels, const std::array<std::size_t, 3>& shape_zyx,
                 const std::array<bool, 3>& flips_zyx) {
  auto [num_z, num_y, num_x] = shape_zyx;
  auto [flip_z, flip_y, flip_x] = flips_zyx;
  assert(voxels.size() == num_z * num_y * num_x);
  // Neighbouring axes that flip together are one axis: of a RAS scan each slice is one long row.
  if (flip_y == flip_x) {
    num_x *= num_y;
    num_y = 1;
    flip_y = false;
    if (flip_z == flip_x) {
      num_x *= num_z;
      num_z = 1;
      flip_z = false;
    }
  } else if (flip_z == flip_y) {
    num_y *= num_z;
    num_z = 1;
    flip_z = false;
  }
  for (std::size_t z = 0; z < num_z; ++z) {
    for (std::size_t y = 0; y < num_y; ++y) {
      const std::size_t here = z * num_y + y;
      const std::size_t there = (flip_z ? num_z - 1 - z : z) * num_y + (flip_y ? num_y - 1 - y : y);
      std::int16_t* const row = voxels.data() + here * num_x;
      std::int16_t* const other = voxels.data() + there * num_x;
      if (here == there && flip_x) {
        reverse(row, num_x);
      } else if (here < there && flip_x) {
        swap_reversed(row, other, num_x);
      } else if (here < there) {
        std::swap_ranges(row, row + num_x, other);
      }
    }
  }
}

VoxelRange range_of(std::span<const std::int16_t> voxels, std::int16_t low, std::int16_t high) {
  assert(!voxels.empty());
  return range(voxels.data(), voxels.size(), low, high);
}

}  // namespace tapct

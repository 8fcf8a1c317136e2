// From Hounsfield units to pixel values: clip, subtract the mean, divide by the standard deviation.
// The operations and their order are those of the released processor in float32.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

namespace tapct {

struct ZScore {
  float low, high;  // clip range, HU
  float mean, std;
};

inline float zscore(float hu, const ZScore& z) noexcept {
  return (std::min(std::max(hu, z.low), z.high) - z.mean) / z.std;
}

// Rounds half to even, as torch does; the value must be finite.
inline std::uint16_t to_bf16(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace tapct

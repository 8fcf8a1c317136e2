// From int16 Hounsfield units to the pixel values of a backbone in one pass: resize in plane, pad
// at the end with air, clip, z-score, cast. No float copy of the volume is made. Resizing is
// torch's F.interpolate(mode="bilinear", align_corners=False) in float32: the same weights
// (ATen/native/cpu/UpSampleKernel.cpp, BSD-3-Clause), sums in another order.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tapct/zscore.hpp"

namespace tapct {

// Pixel i of one axis is the sum over t of weights[t][i] * source[first[i] + t]. Every row of
// weights spans all pixels, so that a loop over pixels reads memory in order.
struct ResizeAxis {
  std::vector<std::int32_t> first;
  std::vector<std::int32_t> num_taps;  // of each pixel; weights beyond are 0
  std::vector<float> weights;          // max_taps rows of one weight per pixel
  std::size_t max_taps = 0;
  bool is_identity = false;

  std::size_t num_pixels() const noexcept { return first.size(); }
};

// `antialias` widens the triangle by the scale where the axis shrinks.
// Throws std::invalid_argument for a size of 0 or beyond 2^24, where float32 places end.
ResizeAxis make_resize_axis(std::size_t size, std::size_t pixels, bool antialias);

using Shape = std::array<std::size_t, 3>;  // z, y, x

struct PixelOptions {
  std::array<std::size_t, 2> resize_yx{};  // rows and columns after resizing
  bool antialias = false;
  float pad_hu = -1024;
  ZScore zscore{};
  std::size_t num_threads = 1;
};

// Writes the pixel values of `hu` (z slowest) into `out`, whose shape may be larger than
// (slices, *resize_yx) along any axis: what lies beyond is air. Pixel is float, or std::uint16_t
// for the bits of bfloat16. Slices are shared among the threads. Throws std::invalid_argument where
// a span and its shape disagree or `out` is too small.
template <typename Pixel>
void hu_to_pixels(std::span<const std::int16_t> hu, const Shape& shape_zyx,
                  const PixelOptions& options, std::span<Pixel> out, const Shape& out_zyx);

}  // namespace tapct

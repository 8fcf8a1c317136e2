// Views of a scan's box: resample, turn, window, gamma, contrast, blur, z-score, noise. The law of
// every step is written down in tapct_fast/data/reference.py, whose float32 results these are to
// rounding. A view is a pure function of (box, View): neither threads nor neighbours change it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tapct/zscore.hpp"

namespace tapct {

struct View {
  std::array<float, 3> lo, hi;  // box voxels, z y x; lo > hi flips the axis
  std::array<float, 2> window;  // HU shown as the two ends of the clip range
  float gamma, contrast;        // 1 = none
  std::array<float, 3> sigma;   // of the blur, view voxels; 0 = none
  float noise_std;              // of the z-scored intensities; 0 = none
  std::uint64_t noise_key;
  unsigned turns;  // quarter turns in plane, 0..3
};

struct ViewJob {
  const std::int16_t* hu;
  std::array<std::size_t, 3> shape_zyx;
  View view;
  void* out;  // size_zyx pixels
};

struct ViewOptions {
  std::array<std::size_t, 3> size_zyx;
  bool antialias;
  ZScore zscore;
  std::size_t num_threads;
};

// Output i of one axis is the sum over t of weights[i * max_taps + t] * input[first[i] + t], for t
// below num_taps[i]; what lies outside the box is its outermost voxel.
struct ViewAxis {
  std::vector<std::int32_t> first, num_taps;
  std::vector<float> weights;
  std::size_t max_taps = 0;
  std::size_t begin = 0, end = 0;  // inputs that any output reads
};

ViewAxis make_view_axis(float lo, float hi, std::size_t num_out, std::size_t num_in,
                        bool antialias);

// Throws std::invalid_argument for a view that cannot be drawn: an empty or huge axis, bounds that
// are equal or not finite, a quarter turn of a view that is not square, a parameter out of range.
void check_view(const ViewJob& job, const ViewOptions& options);

// Renders every job; Pixel is float, or std::uint16_t for the bits of bfloat16. Threads share the
// jobs. Throws as check_view does, before anything is written.
template <typename Pixel>
void render_views(std::span<const ViewJob> jobs, const ViewOptions& options);

// Standard normal noise of voxels begin .. begin + out.size() - 1 under one key.
void view_noise(std::uint64_t key, std::size_t begin, std::span<float> out);

}  // namespace tapct

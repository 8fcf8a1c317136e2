#include "tapct/pixels.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>

#include "tapct/clones.hpp"

namespace tapct {
namespace {

constexpr std::size_t largest_axis = std::size_t{1} << 24;

ResizeAxis empty_axis(std::size_t pixels, std::size_t max_taps) {
  ResizeAxis axis;
  axis.max_taps = max_taps;
  axis.first.resize(pixels);
  axis.num_taps.resize(pixels);
  axis.weights.resize(pixels * max_taps);
  return axis;
}

ResizeAxis bilinear_axis(std::size_t size, std::size_t pixels) {
  ResizeAxis axis = empty_axis(pixels, 2);
  const float scale = static_cast<float>(size) / static_cast<float>(pixels);
  for (std::size_t i = 0; i < pixels; ++i) {
    // Fused, as in torch's AVX2 kernels: unfused places give weights up to 4e-6 apart.
    const float place = std::max(std::fma(scale, static_cast<float>(i) + 0.5F, -0.5F), 0.0F);
    const std::size_t low = std::min(static_cast<std::size_t>(place), size - 1);
    const float upper = std::clamp(place - static_cast<float>(low), 0.0F, 1.0F);
    const bool has_next = low + 1 < size && upper > 0;  // else the edge is held
    axis.first[i] = static_cast<std::int32_t>(low);
    axis.num_taps[i] = has_next ? 2 : 1;
    axis.weights[i] = has_next ? 1.0F - upper : 1.0F;
    axis.weights[pixels + i] = has_next ? upper : 0.0F;
  }
  return axis;
}

ResizeAxis triangle_axis(std::size_t size, std::size_t pixels) {
  const float scale = static_cast<float>(size) / static_cast<float>(pixels);
  const float support = std::max(scale, 1.0F);
  const float inverse = scale >= 1.0F ? 1.0F / scale : 1.0F;
  const auto last = static_cast<std::int64_t>(size);
  ResizeAxis axis = empty_axis(pixels, 2 * static_cast<std::size_t>(std::ceil(support)) + 1);
  for (std::size_t i = 0; i < pixels; ++i) {
    const float center = scale * (static_cast<float>(i) + 0.5F);
    const auto low = std::max<std::int64_t>(static_cast<std::int64_t>(center - support + 0.5F), 0);
    const auto high = std::min(static_cast<std::int64_t>(center + support + 0.5F), last);
    const auto taps = std::clamp<std::int64_t>(
        high - low, 1, std::ssize(axis.weights) / static_cast<std::int64_t>(pixels));
    float sum = 0;
    for (std::int64_t t = 0; t < taps; ++t) {
      const float distance = (static_cast<float>(low + t) - center + 0.5F) * inverse;
      const float weight = std::max(0.0F, 1.0F - std::abs(distance));
      axis.weights[static_cast<std::size_t>(t) * pixels + i] = weight;
      sum += weight;
    }
    for (std::int64_t t = 0; t < taps; ++t) {
      axis.weights[static_cast<std::size_t>(t) * pixels + i] /= sum;
    }
    axis.first[i] = static_cast<std::int32_t>(low);
    axis.num_taps[i] = static_cast<std::int32_t>(taps);
  }
  return axis;
}

TAPCT_CLONES void set_row(const std::int16_t* source, float weight, float* row, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    row[i] = weight * static_cast<float>(source[i]);
  }
}

TAPCT_CLONES void add_row(const std::int16_t* source, float weight, float* row, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    row[i] += weight * static_cast<float>(source[i]);
  }
}

// The plain bilinear case in one pass over the row.
TAPCT_CLONES void blend_rows(const std::int16_t* above, const std::int16_t* below, float upper,
                             float lower, float* row, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    row[i] = upper * static_cast<float>(above[i]) + lower * static_cast<float>(below[i]);
  }
}

TAPCT_CLONES void gather_two(const float* row, const std::int32_t* first, const float* weights,
                             float* pixels, std::size_t num_pixels) {
  const float* second = weights + num_pixels;
  for (std::size_t i = 0; i < num_pixels; ++i) {
    const float* source = row + first[i];
    pixels[i] = weights[i] * source[0] + second[i] * source[1];
  }
}

TAPCT_CLONES void add_tap(const float* row, const std::int32_t* first, const float* weights,
                          float* pixels, std::size_t num_pixels) {
  for (std::size_t i = 0; i < num_pixels; ++i) {
    pixels[i] += weights[i] * row[first[i]];
  }
}

inline void put(float value, float& out) noexcept { out = value; }
inline void put(float value, std::uint16_t& out) noexcept { out = to_bf16(value); }

TAPCT_CLONES void finish(const float* hu, const ZScore& z, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    put(zscore(hu[i], z), out[i]);
  }
}

TAPCT_CLONES void finish(const float* hu, const ZScore& z, std::uint16_t* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    put(zscore(hu[i], z), out[i]);
  }
}

// Everything the threads share, and read only.
template <typename Pixel>
struct Job {
  std::span<const std::int16_t> hu;
  Shape shape_zyx;
  std::span<Pixel> out;
  Shape out_zyx;
  ResizeAxis rows, columns;
  ZScore zscore;
  Pixel air;

  // Floats one thread needs: a row in float with the taps beyond its end, and a row of pixels.
  std::size_t scratch_size() const noexcept {
    return shape_zyx[2] + columns.max_taps + columns.num_pixels();
  }

  void slice(std::size_t z, std::span<float> scratch) const;
  void slices(std::size_t begin, std::size_t end, std::span<float> scratch) const;
};

template <typename Pixel>
void Job<Pixel>::slice(std::size_t z, std::span<float> scratch) const {
  const std::size_t width = shape_zyx[2];
  const std::int16_t* plane = hu.data() + z * shape_zyx[1] * width;
  float* row = scratch.data();
  float* pixels = row + width + columns.max_taps;
  const std::size_t num_pixels = columns.num_pixels();
  Pixel* target = out.data() + z * out_zyx[1] * out_zyx[2];
  for (std::size_t j = 0; j < rows.num_pixels(); ++j, target += out_zyx[2]) {
    const std::int16_t* source = plane + static_cast<std::size_t>(rows.first[j]) * width;
    const float* weight = rows.weights.data() + j;
    const auto taps = static_cast<std::size_t>(rows.num_taps[j]);
    if (taps == 2) {
      blend_rows(source, source + width, weight[0], weight[rows.num_pixels()], row, width);
    } else {
      set_row(source, weight[0], row, width);
      for (std::size_t t = 1; t < taps; ++t) {
        add_row(source + t * width, weight[t * rows.num_pixels()], row, width);
      }
    }
    if (columns.is_identity) {
      finish(row, zscore, target, num_pixels);
    } else {
      const float* weights = columns.weights.data();
      gather_two(row, columns.first.data(), weights, pixels, num_pixels);
      for (std::size_t t = 2; t < columns.max_taps; ++t) {
        add_tap(row + t, columns.first.data(), weights + t * num_pixels, pixels, num_pixels);
      }
      finish(pixels, zscore, target, num_pixels);
    }
    std::fill(target + num_pixels, target + out_zyx[2], air);
  }
  std::fill(target, out.data() + (z + 1) * out_zyx[1] * out_zyx[2], air);
}

template <typename Pixel>
void Job<Pixel>::slices(std::size_t begin, std::size_t end, std::span<float> scratch) const {
  for (std::size_t z = begin; z < std::min(end, shape_zyx[0]); ++z) {
    slice(z, scratch);
  }
  const std::size_t plane = out_zyx[1] * out_zyx[2];
  const std::size_t first_empty = std::max(begin, shape_zyx[0]);
  if (first_empty < end) {
    std::fill(out.data() + first_empty * plane, out.data() + end * plane, air);
  }
}

void require_shape(std::size_t size, const Shape& shape_zyx, const char* message) {
  std::size_t product = 1;
  for (const std::size_t axis : shape_zyx) {
    if (axis == 0 || axis > std::numeric_limits<std::size_t>::max() / product) {
      throw std::invalid_argument(message);
    }
    product *= axis;
  }
  if (product != size) {
    throw std::invalid_argument(message);
  }
}

}  // namespace

ResizeAxis make_resize_axis(std::size_t size, std::size_t pixels, bool antialias) {
  if (size == 0 || pixels == 0 || size > largest_axis || pixels > largest_axis) {
    throw std::invalid_argument("hu_to_pixels: an axis must have 1 to 2^24 voxels or pixels");
  }
  if (size == pixels) {
    ResizeAxis axis = empty_axis(pixels, 2);
    for (std::size_t i = 0; i < pixels; ++i) {
      axis.first[i] = static_cast<std::int32_t>(i);
      axis.num_taps[i] = 1;
      axis.weights[i] = 1.0F;
    }
    axis.is_identity = true;
    return axis;
  }
  return antialias ? triangle_axis(size, pixels) : bilinear_axis(size, pixels);
}

template <typename Pixel>
void hu_to_pixels(std::span<const std::int16_t> hu, const Shape& shape_zyx,
                  const PixelOptions& options, std::span<Pixel> out, const Shape& out_zyx) {
  require_shape(hu.size(), shape_zyx, "hu_to_pixels: hu does not have the shape given for it");
  require_shape(out.size(), out_zyx, "hu_to_pixels: out does not have the shape given for it");
  const auto [num_rows, num_columns] = options.resize_yx;
  if (out_zyx[0] < shape_zyx[0] || out_zyx[1] < num_rows || out_zyx[2] < num_columns) {
    throw std::invalid_argument("hu_to_pixels: out is smaller than the resized scan");
  }
  Job<Pixel> job{hu,
                 shape_zyx,
                 out,
                 out_zyx,
                 make_resize_axis(shape_zyx[1], num_rows, options.antialias),
                 make_resize_axis(shape_zyx[2], num_columns, options.antialias),
                 options.zscore,
                 {}};
  put(zscore(options.pad_hu, options.zscore), job.air);

  const std::size_t num_threads = std::clamp<std::size_t>(options.num_threads, 1, out_zyx[0]);
  const std::size_t scratch_size = job.scratch_size();
  // Zeroed: a tap beyond the row has weight 0, which hides any number but NaN.
  std::vector<float> scratch(num_threads * scratch_size);
  const auto work = [&](std::size_t thread) {
    job.slices(out_zyx[0] * thread / num_threads, out_zyx[0] * (thread + 1) / num_threads,
               std::span(scratch).subspan(thread * scratch_size, scratch_size));
  };
  std::vector<std::jthread> threads;
  for (std::size_t thread = 1; thread < num_threads; ++thread) {
    threads.emplace_back(work, thread);
  }
  work(0);
}

template void hu_to_pixels(std::span<const std::int16_t>, const Shape&, const PixelOptions&,
                           std::span<float>, const Shape&);
template void hu_to_pixels(std::span<const std::int16_t>, const Shape&, const PixelOptions&,
                           std::span<std::uint16_t>, const Shape&);

}  // namespace tapct

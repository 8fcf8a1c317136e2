#include <cmath>
#include <initializer_list>
#include <stdexcept>

#include "check.hpp"
#include "tapct/pixels.hpp"

namespace check {
inline std::string message_of(const std::invalid_argument& error) { return error.what(); }
}  // namespace check

namespace {

using tapct::hu_to_pixels;
using tapct::PixelOptions;
using tapct::Shape;

std::vector<std::size_t> sizes(std::initializer_list<std::size_t> values) { return values; }

// Values pass through: clip range of int16, mean 0, standard deviation 1.
PixelOptions plain(std::size_t rows, std::size_t columns) {
  return {{rows, columns}, false, -1024, {-32768, 32767, 0, 1}, 1};
}

std::vector<std::int16_t> ramp(std::size_t size) {
  std::vector<std::int16_t> hu(size);
  for (std::size_t i = 0; i < size; ++i) {
    hu[i] = static_cast<std::int16_t>(static_cast<int>(i * 7919 % 4001) - 2000);
  }
  return hu;
}

TEST(pixel_weights_are_the_formula) {
  // 4 voxels to 2 pixels: places 0.5 and 2.5; 2 to 4: -0.25 (held), 0.25, 0.75, 1.25 (held).
  const auto half = tapct::make_resize_axis(4, 2, false);
  CHECK((half.first == std::vector<std::int32_t>{0, 2}));
  CHECK((half.weights == std::vector<float>{0.5F, 0.5F, 0.5F, 0.5F}));
  const auto twice = tapct::make_resize_axis(2, 4, false);
  CHECK((twice.first == std::vector<std::int32_t>{0, 0, 0, 1}));
  CHECK((twice.num_taps == std::vector<std::int32_t>{1, 2, 2, 1}));
  CHECK((twice.weights == std::vector<float>{1, 0.75F, 0.25F, 1, 0, 0.25F, 0.75F, 0}));
  // The triangle over two voxels each way, cut at the edge and scaled to a sum of 1.
  const auto smooth = tapct::make_resize_axis(4, 2, true);
  CHECK((smooth.first == std::vector<std::int32_t>{0, 1}));
  CHECK((smooth.num_taps == std::vector<std::int32_t>{3, 3}));
  const float sum = 0.75F + 0.75F + 0.25F;
  CHECK(smooth.weights[0] == 0.75F / sum && smooth.weights[4] == 0.25F / sum);
}

TEST(pixel_weights_sum_to_one_inside_the_axis) {
  for (const std::size_t size : sizes({1, 2, 3, 7, 223, 224, 225, 512, 4097})) {
    for (const std::size_t pixels : sizes({1, 2, 8, 224, 513})) {
      for (const bool antialias : {false, true}) {
        const auto axis = tapct::make_resize_axis(size, pixels, antialias);
        for (std::size_t i = 0; i < pixels; ++i) {
          double sum = 0;
          for (std::size_t t = 0; t < axis.max_taps; ++t) {
            sum += static_cast<double>(axis.weights[t * pixels + i]);
          }
          CHECK(std::abs(sum - 1) < 1e-6 * static_cast<double>(axis.max_taps));
          CHECK(axis.first[i] >= 0 && axis.num_taps[i] >= 1);
          CHECK(static_cast<std::size_t>(axis.first[i] + axis.num_taps[i]) <= size);
          CHECK(static_cast<std::size_t>(axis.num_taps[i]) <= axis.max_taps);
        }
      }
    }
  }
}

TEST(pixels_match_a_double_sum_over_the_weights) {
  const Shape shape{3, 37, 53};
  const auto hu = ramp(3 * 37 * 53);
  for (const bool antialias : {false, true}) {
    for (const std::size_t rows : sizes({1, 16, 37, 64})) {
      for (const std::size_t columns : sizes({1, 8, 53, 61})) {
        PixelOptions options = plain(rows, columns);
        options.antialias = antialias;
        const auto y_axis = tapct::make_resize_axis(37, rows, antialias);
        const auto x_axis = tapct::make_resize_axis(53, columns, antialias);
        std::vector<float> out(3 * rows * columns);
        hu_to_pixels<float>(hu, shape, options, out, {3, rows, columns});
        for (std::size_t p = 0; p < out.size(); ++p) {
          const std::size_t z = p / (rows * columns);
          const std::size_t j = p / columns % rows;
          const std::size_t i = p % columns;
          double expected = 0;
          for (std::size_t s = 0; s < static_cast<std::size_t>(y_axis.num_taps[j]); ++s) {
            for (std::size_t t = 0; t < static_cast<std::size_t>(x_axis.num_taps[i]); ++t) {
              const std::size_t y = static_cast<std::size_t>(y_axis.first[j]) + s;
              const std::size_t x = static_cast<std::size_t>(x_axis.first[i]) + t;
              expected += static_cast<double>(y_axis.weights[s * rows + j]) *
                          static_cast<double>(x_axis.weights[t * columns + i]) *
                          hu[(z * 37 + y) * 53 + x];
            }
          }
          CHECK(std::abs(static_cast<double>(out[p]) - expected) < 2e-3);  // float32 of 2000
        }
      }
    }
  }
}

TEST(what_lies_beyond_the_scan_is_air_in_every_thread_count) {
  const auto hu = ramp(5 * 6 * 7);
  PixelOptions options = plain(6, 7);
  options.zscore = {-1008, 822, -86.8086F, 322.6347F};
  std::vector<std::uint16_t> once(8 * 8 * 8);
  hu_to_pixels<std::uint16_t>(hu, {5, 6, 7}, options, once, {8, 8, 8});
  const std::uint16_t air = tapct::to_bf16(tapct::zscore(-1024, options.zscore));
  for (std::size_t p = 0; p < once.size(); ++p) {
    const std::size_t z = p / 64, y = p / 8 % 8, x = p % 8;
    const bool inside = z < 5 && y < 6 && x < 7;
    const auto value = inside ? hu[(z * 6 + y) * 7 + x] : std::int16_t{-1024};
    CHECK(once[p] == tapct::to_bf16(tapct::zscore(value, options.zscore)));
    CHECK(inside || once[p] == air);
  }
  for (const std::size_t threads : sizes({0, 2, 3, 8, 100})) {
    options.num_threads = threads;
    std::vector<std::uint16_t> shared(once.size());
    hu_to_pixels<std::uint16_t>(hu, {5, 6, 7}, options, shared, {8, 8, 8});
    CHECK(shared == once);
  }
}

TEST(pixels_refuse_shapes_that_do_not_fit) {
  const auto hu = ramp(2 * 3 * 4);
  std::vector<float> out(2 * 8 * 8);
  const auto call = [&](const Shape& shape, const PixelOptions& options, const Shape& out_zyx) {
    hu_to_pixels<float>(hu, shape, options, out, out_zyx);
    return 0;
  };
  constexpr std::size_t huge = std::size_t{1} << 33;
  CHECK_THROWS(std::invalid_argument, "hu does not", call({2, 3, 5}, plain(8, 8), {2, 8, 8}));
  CHECK_THROWS(std::invalid_argument, "hu does not", call({0, 3, 4}, plain(8, 8), {2, 8, 8}));
  CHECK_THROWS(std::invalid_argument, "hu does not", call({huge, huge, 4}, plain(8, 8), {2, 8, 8}));
  CHECK_THROWS(std::invalid_argument, "out does not", call({2, 3, 4}, plain(8, 8), {2, 8, 9}));
  CHECK_THROWS(std::invalid_argument, "smaller", call({2, 3, 4}, plain(9, 8), {2, 8, 8}));
  CHECK_THROWS(std::invalid_argument, "smaller", call({2, 3, 4}, plain(8, 9), {2, 8, 8}));
  CHECK_THROWS(std::invalid_argument, "smaller", call({2, 3, 4}, plain(8, 8), {1, 16, 8}));
  CHECK_THROWS(std::invalid_argument, "1 to 2^24", call({2, 3, 4}, plain(0, 8), {2, 8, 8}));
}

}  // namespace

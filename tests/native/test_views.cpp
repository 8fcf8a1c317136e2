#include <algorithm>
#include <array>
#include <cmath>
#include <initializer_list>
#include <stdexcept>
#include <utility>
#include <vector>

#include "check.hpp"
#include "tapct/views.hpp"

namespace check {
inline std::string message_of(const std::invalid_argument& error) { return error.what(); }
}  // namespace check

namespace {

using tapct::View;
using tapct::ViewJob;
using tapct::ViewOptions;
using Shape = std::array<std::size_t, 3>;

std::vector<std::size_t> sizes(std::initializer_list<std::size_t> values) { return values; }

// HU pass through: the clip range is wide, the mean 0 and the standard deviation 1.
constexpr tapct::ZScore wide{-4096, 4096, 0, 1};

View plain(const Shape& shape) {
  return {
      {0, 0, 0},
      {static_cast<float>(shape[0]), static_cast<float>(shape[1]), static_cast<float>(shape[2])},
      {-4096, 4096},
      1,
      1,
      {0, 0, 0},
      0,
      0,
      0};
}

std::vector<float> render(const std::vector<std::int16_t>& hu, const Shape& shape, const View& view,
                          const Shape& size) {
  std::vector<float> out(size[0] * size[1] * size[2]);
  const ViewJob job{hu.data(), shape, view, out.data()};
  tapct::render_views<float>({&job, 1}, {size, true, wide, 1});
  return out;
}

std::vector<std::int16_t> ramp(const Shape& shape) {
  std::vector<std::int16_t> hu;
  for (std::size_t z = 0; z < shape[0]; ++z) {
    for (std::size_t y = 0; y < shape[1]; ++y) {
      for (std::size_t x = 0; x < shape[2]; ++x) {
        hu.push_back(static_cast<std::int16_t>(8 * z + 40 * y + 4 * x));
      }
    }
  }
  return hu;
}

TEST(view_of_the_voxels_themselves_is_the_voxels) {
  const Shape shape{3, 5, 4};
  const auto hu = ramp(shape);
  const auto view = render(hu, shape, plain(shape), shape);
  for (std::size_t i = 0; i < hu.size(); ++i) {
    CHECK(std::abs(view[i] - static_cast<float>(hu[i])) < 2e-3F);
  }
}

TEST(view_of_a_constant_is_constant_and_of_a_ramp_a_ramp) {
  const Shape shape{6, 20, 24}, size{8, 32, 32};
  const std::vector<std::int16_t> constant(6 * 20 * 24, 40);
  View view = plain(shape);
  view.lo = {1, 15, 3};
  view.hi = {5, 5, 20};
  view.sigma = {2, 0.7F, 0.7F};
  for (const float value : render(constant, shape, view, size)) {
    CHECK(std::abs(value - 40) < 2e-3F);
  }
  view.sigma = {0, 0, 0};
  const auto sloped = render(ramp(shape), shape, view, size);
  std::size_t i = 0;
  for (std::size_t z = 0; z < size[0]; ++z) {
    for (std::size_t y = 0; y < size[1]; ++y) {
      for (std::size_t x = 0; x < size[2]; ++x, ++i) {
        const auto at = [](std::size_t index, std::size_t n, double lo, double hi) {
          return lo + (static_cast<double>(index) + 0.5) / static_cast<double>(n) * (hi - lo) - 0.5;
        };
        const double expected = 8 * at(z, 8, 1, 5) + 40 * at(y, 32, 15, 5) + 4 * at(x, 32, 3, 20);
        CHECK(std::abs(static_cast<double>(sloped[i]) - expected) < 5e-3);
      }
    }
  }
}

TEST(view_with_reversed_bounds_is_the_view_reversed) {
  const Shape shape{3, 11, 9}, size{4, 6, 14};
  const auto hu = ramp(shape);
  View view = plain(shape);
  view.lo = {0.25F, 1, 2.5F};
  view.hi = {2.75F, 9, 8};
  const auto straight = render(hu, shape, view, size);
  for (unsigned flips = 1; flips < 8; ++flips) {
    View flipped = view;
    for (unsigned axis = 0; axis < 3; ++axis) {
      if ((flips >> axis & 1) != 0) {
        std::swap(flipped.lo[axis], flipped.hi[axis]);
      }
    }
    const auto out = render(hu, shape, flipped, size);
    const auto at = [&](std::size_t index, unsigned axis) {
      return (flips >> axis & 1) != 0 ? size[axis] - 1 - index : index;
    };
    for (std::size_t i = 0; i < out.size(); ++i) {
      const std::size_t z = at(i / size[2] / size[1], 0), y = at(i / size[2] % size[1], 1);
      CHECK(std::abs(out[i] - straight[(z * size[1] + y) * size[2] + at(i % size[2], 2)]) < 2e-3F);
    }
  }
}

TEST(view_axis_weights_sum_to_one_and_stay_in_the_box) {
  for (const std::size_t num_in : sizes({1, 2, 7, 400})) {
    for (const std::size_t num_out : sizes({1, 3, 96})) {
      for (const float lo : {0.0F, -3.5F, 390.25F}) {
        for (const float hi : {1.0F, 0.001F, 400.0F, -80.0F}) {
          for (const bool antialias : {false, true}) {
            if (lo == hi) {
              continue;
            }
            const auto axis = tapct::make_view_axis(lo, hi, num_out, num_in, antialias);
            for (std::size_t i = 0; i < num_out; ++i) {
              CHECK(axis.first[i] >= 0);
              CHECK(static_cast<std::size_t>(axis.first[i] + axis.num_taps[i]) <= num_in);
              CHECK(static_cast<std::size_t>(axis.num_taps[i]) <= axis.max_taps);
              double sum = 0;
              for (std::size_t t = 0; t < axis.max_taps; ++t) {
                sum += static_cast<double>(axis.weights[i * axis.max_taps + t]);
              }
              CHECK(std::abs(sum - 1) < 1e-5);
            }
          }
        }
      }
    }
  }
}

TEST(view_turns_four_times_is_the_view) {
  const Shape shape{1, 3, 3};
  const std::vector<std::int16_t> hu{1, 2, 3, 4, 5, 6, 7, 8, 9};
  const std::vector<std::vector<float>> expected{{1, 2, 3, 4, 5, 6, 7, 8, 9},
                                                 {3, 6, 9, 2, 5, 8, 1, 4, 7},
                                                 {9, 8, 7, 6, 5, 4, 3, 2, 1},
                                                 {7, 4, 1, 8, 5, 2, 9, 6, 3}};
  for (unsigned turns = 0; turns < 4; ++turns) {
    View view = plain(shape);
    view.turns = turns;
    const auto out = render(hu, shape, view, shape);
    for (std::size_t i = 0; i < 9; ++i) {
      CHECK(std::abs(out[i] - expected[turns][i]) < 2e-3F);
    }
  }
}

// Key 42: numpy.random.Philox(key=42) gives 0xd1f8817d4d62880e, 0x307266b65cc8797e,
// 0xde1f04e7f084ed03, 0x65034a8e78cd1e59; Box-Muller of them in float64.
TEST(view_noise_is_box_muller_of_the_known_words) {
  const std::array<float, 8> expected{-0.20313828F, 0.59594756F,  -1.1844526F,  1.38798093F,
                                      0.49483015F,  -0.19761563F, -1.34253538F, 0.23970409F};
  std::array<float, 8> noise{};
  tapct::view_noise(42, 0, noise);
  for (std::size_t i = 0; i < noise.size(); ++i) {
    CHECK(std::abs(noise[i] - expected[i]) < 1e-6F);
  }
}

TEST(view_noise_does_not_depend_on_where_it_is_cut) {
  std::vector<float> whole(1000), part(217);
  tapct::view_noise(42, 0, whole);
  for (const std::size_t begin : sizes({0, 1, 7, 8, 255, 256, 257, 783})) {
    tapct::view_noise(42, begin, part);
    CHECK(std::equal(part.begin(), part.end(), whole.begin() + static_cast<std::ptrdiff_t>(begin)));
  }
  double sum = 0, squares = 0;
  for (const float n : whole) {
    CHECK(std::isfinite(n));
    sum += static_cast<double>(n);
    squares += static_cast<double>(n) * static_cast<double>(n);
  }
  CHECK(std::abs(sum / 1000) < 0.12 && std::abs(squares / 1000 - 1) < 0.18);
}

TEST(view_that_cannot_be_throws) {
  const Shape shape{2, 3, 4};
  const std::vector<std::int16_t> hu(24);
  std::vector<float> out(24);
  const auto draw = [&](const Shape& box, const View& view) {
    const ViewJob job{hu.data(), box, view, out.data()};
    tapct::render_views<float>({&job, 1}, {shape, true, wide, 1});
    return 0;
  };
  const View view = plain(shape);
  CHECK_THROWS(std::invalid_argument, "an axis must have 1 to 2^24 voxels", draw({0, 3, 4}, view));
  View flat = view;
  flat.hi[2] = flat.lo[2];
  CHECK_THROWS(std::invalid_argument, "lo and hi must be finite, apart", draw(shape, flat));
  View turned = view;
  turned.turns = 1;
  CHECK_THROWS(std::invalid_argument, "only a square view can be turned", draw(shape, turned));
}

}  // namespace

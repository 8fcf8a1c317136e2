// The tiles of the GPU's kernels, run by a loop in place of a block of threads.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "check.hpp"
#include "gpu/view_tile.hpp"

namespace {

using tapct::View;
using tapct::ViewJob;
using tapct::ViewOptions;
using Shape = std::array<std::size_t, 3>;

// Up or down: where one thread reads what another writes before the next barrier, results differ.
struct LoopThreads {
  bool is_down;
  float sums[tapct::gpu::num_threads][tapct::gpu::per_thread];

  template <typename F>
  void each(const F& f) {
    for (int i = 0; i < tapct::gpu::num_threads; ++i) {
      const int thread = is_down ? tapct::gpu::num_threads - 1 - i : i;
      f(thread, sums[thread]);
    }
  }
};

template <typename Pixel>
std::vector<Pixel> render_tiles(ViewJob job, const ViewOptions& options, bool is_down = false) {
  const auto [z, y, x] = options.size_zyx;
  std::vector<Pixel> out(z * y * x);
  std::vector<float> blurred(z * y * x, NAN);
  job.out = out.data();
  const bool is_blurred = tapct::gpu::is_blurred(job.view);
  const auto view = tapct::gpu::make_tile_view(job, options, is_blurred ? blurred.data() : nullptr);
  const tapct::gpu::Grid grid{static_cast<int>(z), static_cast<int>(y), static_cast<int>(x)};
  const int num_tiles = grid.size_z * grid.rows() * grid.columns();
  LoopThreads threads{is_down, {}};
  tapct::gpu::Shared shared;
  for (int i = 0; i < num_tiles; ++i) {
    tapct::gpu::render_tile<Pixel>(threads, shared, view, grid, i);
  }
  for (int i = 0; is_blurred && i < num_tiles; ++i) {
    tapct::gpu::blur_tile<Pixel>(threads, shared, view, grid, i);
  }
  return out;
}

std::vector<std::int16_t> noise_hu(const Shape& shape) {
  std::mt19937 random(7);
  std::vector<std::int16_t> hu(shape[0] * shape[1] * shape[2]);
  for (auto& value : hu) {
    value = static_cast<std::int16_t>(static_cast<int>(random() % 4000) - 1100);
  }
  return hu;
}

constexpr tapct::ZScore released{-1008, 822, -86.8086F, 322.6347F};

void compare(const Shape& shape, const Shape& size, const View& view, bool antialias) {
  const auto hu = noise_hu(shape);
  std::vector<float> expected(size[0] * size[1] * size[2]);
  const ViewJob job{hu.data(), shape, view, expected.data()};
  const ViewOptions options{size, antialias, released, 1};
  tapct::render_views<float>({&job, 1}, options);
  const auto actual = render_tiles<float>(job, options);
  CHECK(actual == render_tiles<float>(job, options, true));
  double most = 0, total = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(static_cast<double>(actual[i] - expected[i]));
    most = std::max(most, error <= 0 ? 0.0 : std::isnan(error) ? 1e9 : error);
    total += error;
  }
  // The agreement that all renderers are held to, in z-scores.
  CHECK(most < 1e-3);
  CHECK(total / static_cast<double>(expected.size()) < 1e-5);
}

View whole(const Shape& shape) {
  return {
      {0, 0, 0},
      {static_cast<float>(shape[0]), static_cast<float>(shape[1]), static_cast<float>(shape[2])},
      {-1008, 822},
      1,
      1,
      {0, 0, 0},
      0,
      11,
      0};
}

const std::vector<Shape> shapes{{9, 40, 37}, {3, 12, 14}, {30, 151, 250}, {1, 1, 1}, {1, 30, 2}};

TEST(tiles_resample_as_the_cpu_does) {
  for (const Shape& shape : shapes) {
    for (const Shape& size :
         {Shape{5, 24, 24}, Shape{2, 50, 67}, Shape{3, 1, 130}, Shape{4, 7, 5}}) {
      for (const bool antialias : {true, false}) {
        View view = whole(shape);
        compare(shape, size, view, antialias);
        for (std::size_t axis = 0; axis < 3; ++axis) {
          view.lo[axis] += 0.3F;
          view.hi[axis] -= 0.4F;
          std::swap(view.lo[axis], view.hi[axis]);  // one more axis flipped each time
          compare(shape, size, view, antialias);
        }
      }
    }
  }
}

TEST(tiles_turn_as_the_cpu_does) {
  for (const std::size_t size : {8U, 24U, 33U, 64U, 70U}) {
    for (unsigned turns = 0; turns < 4; ++turns) {
      View view = whole({9, 40, 37});
      view.hi = {7, 20, 35};
      view.turns = turns;
      view.noise_std = 0.5F;
      compare({9, 40, 37}, {3, size, size}, view, true);
    }
  }
}

TEST(tiles_change_intensities_as_the_cpu_does) {
  View view = whole({9, 40, 37});
  view.window = {-300, 500};
  compare({9, 40, 37}, {5, 24, 24}, view, true);
  view.gamma = 0.7F;
  compare({9, 40, 37}, {5, 24, 24}, view, true);
  view.contrast = 1.3F;
  compare({9, 40, 37}, {5, 24, 24}, view, true);
  view.noise_std = 1.5F;
  compare({9, 40, 37}, {5, 24, 24}, view, true);
  compare({9, 40, 37}, {5, 23, 21}, view, true);  // rows that four does not divide
}

TEST(tiles_blur_as_the_cpu_does) {
  for (const Shape& size :
       {Shape{5, 24, 24}, Shape{1, 7, 70}, Shape{12, 3, 2}, Shape{40, 65, 33}}) {
    for (const float sigma : {0.05F, 0.4F, 1.0F, 3.0F, 13.0F}) {
      for (const float across : {0.0F, 0.9F, 8.0F}) {
        View view = whole({9, 40, 37});
        view.sigma = {across, sigma, sigma};
        view.gamma = 1.4F;
        view.turns = size[1] == size[2] ? 1 : 0;
        view.noise_std = across;
        compare({9, 40, 37}, size, view, true);
      }
    }
  }
}

TEST(tiles_round_to_bfloat16_as_the_cpu_does) {
  const Shape shape{9, 40, 37}, size{5, 24, 24};
  View view = whole(shape);
  view.noise_std = 0.3F;
  const auto hu = noise_hu(shape);
  const ViewJob job{hu.data(), shape, view, nullptr};
  const ViewOptions options{size, true, released, 1};
  const auto values = render_tiles<float>(job, options);
  const auto bits = render_tiles<std::uint16_t>(job, options);
  for (std::size_t i = 0; i < values.size(); ++i) {
    CHECK(bits[i] == tapct::to_bf16(values[i]));
  }
}

}  // namespace

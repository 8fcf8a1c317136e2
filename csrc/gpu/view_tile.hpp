// The arithmetic of views.cu, one tile of one view at a time, written so that a CPU can run it too:
// tests/native/test_view_tile.cpp holds it to render_views without a GPU.
//
// One block of threads makes 32 x 32 pixels of one slice of a view. It streams over the part of the
// box below them in strips that fit shared memory, whatever the scale: across slices into the
// strip, along x into `columns`, along y into registers. So a voxel costs a few multiply-adds per
// axis where a direct gather would cost the product of the three, and no weight is stored: a
// triangle's is cheaper computed.
//
// `Threads` stands for the block: each(f) calls f(thread, sums) for every thread, where `sums` are
// the thread's own four values, and returns when all threads are done.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "tapct/views.hpp"

#ifdef __CUDACC__
#define TAPCT_HD __host__ __device__ __forceinline__
#else
#define TAPCT_HD inline
#endif
#ifdef __CUDA_ARCH__
#define TAPCT_UNROLL _Pragma("unroll")
#define TAPCT_UNROLL_2 _Pragma("unroll 2")
#else
#define TAPCT_UNROLL
#define TAPCT_UNROLL_2
#endif

namespace tapct::gpu {

constexpr int tile_size = 32;  // pixels along y and x; also the lanes of a warp
constexpr int num_threads = 256;
constexpr int num_warps = num_threads / tile_size;
constexpr int per_thread = tile_size * tile_size / num_threads;
constexpr int strip_rows = num_warps * per_thread;
constexpr int strip_columns = tile_size * per_thread;
constexpr int tile_pitch = tile_size + 1;  // reading a turned tile down its columns meets all banks
constexpr int largest_radius = 127;        // of the blur: sigma up to 42 voxels
static_assert(per_thread == 4 && tile_size * tile_pitch <= strip_rows * strip_columns);

// One axis of the resampling: output i sits at lo + (i + 0.5) * step - 0.5.
struct ResampleAxis {
  double lo;
  double step;
  double half_width;  // of the triangle
  float inverse_width;
  int num_taps;
  int size;  // of the box
};

// One view as the kernels read it, from constant memory.
struct TileView {
  const std::int16_t* hu;
  void* out;
  float* blurred;  // where the view lies in [0, 1] until it is blurred; null = no blur
  std::uint64_t noise_key;
  ResampleAxis axes[3];
  float sigma[3];
  int radius[3];
  float low, inverse_range;  // window
  float gamma, contrast, gain, offset, noise_std;
  int turns;
};

// First input and weights of one output along one axis.
struct Output {
  int first;
  float offset;  // first input minus centre; weights are computed from it without cancellation
  float scale;   // one over the sum of the weights
};

struct Shared {
  float strip[strip_rows * strip_columns];  // at the end: the tile, with tile_pitch
  float columns[strip_rows * tile_size];
  float gaussian[3][largest_radius + 1];
  Output z;
  Output y[tile_size];
  Output x[tile_size];
};

// The pixels of a tile before the quarter turns: slice z, rows from y, columns from x.
struct Tile {
  int z, y, x;
  int num_y, num_x;
};

TAPCT_HD int smaller(int a, int b) { return a < b ? a : b; }
TAPCT_HD int larger(int a, int b) { return a > b ? a : b; }
TAPCT_HD float to_unit(float value) { return fminf(fmaxf(value, 0.0F), 1.0F); }

// Voxels of the box under triangles; beyond the box its outermost voxel goes on.
struct Resample {
  const std::int16_t* source;
  const ResampleAxis* axes;

  TAPCT_HD void prepare(Shared&, int) const {}
  TAPCT_HD int size(int axis) const { return axes[axis].size; }
  TAPCT_HD int num_taps(int axis) const { return axes[axis].num_taps; }
  TAPCT_HD int inside(int axis, int i) const { return smaller(larger(i, 0), axes[axis].size - 1); }
  TAPCT_HD float weight(const Shared&, int axis, float offset, int tap) const {
    return fmaxf(1.0F - fabsf(static_cast<float>(tap) + offset) * axes[axis].inverse_width, 0.0F);
  }
  TAPCT_HD Output output(const Shared& shared, int axis, int i) const {
    const ResampleAxis& a = axes[axis];
    const double center = a.lo + (i + 0.5) * a.step - 0.5;
    const double first = floor(center - a.half_width) + 1;
    Output out{static_cast<int>(first), static_cast<float>(first - center), 0};
    float sum = 0;
    for (int t = 0; t < a.num_taps; ++t) {
      sum += weight(shared, axis, out.offset, t);
    }
    out.scale = 1.0F / sum;
    return out;
  }
};

// Pixels of a view under Gaussians; at its faces the view is mirrored without repeating the pixel
// at the face, as often as a thin view asks for.
struct Blur {
  const float* source;
  const TileView* view;
  int size_zyx[3];

  TAPCT_HD void prepare(Shared& shared, int thread) const {
    for (int axis = 0; axis < 3; ++axis) {
      if (thread <= view->radius[axis]) {
        const double steps = thread == 0 ? 0 : thread / static_cast<double>(view->sigma[axis]);
        shared.gaussian[axis][thread] = static_cast<float>(exp(-0.5 * steps * steps));
      }
    }
  }
  TAPCT_HD int size(int axis) const { return size_zyx[axis]; }
  TAPCT_HD int num_taps(int axis) const { return 2 * view->radius[axis] + 1; }
  TAPCT_HD int inside(int axis, int i) const {
    const int last = size_zyx[axis] - 1;
    if (i >= 0 && i <= last) {
      return i;
    }
    const int period = larger(2 * last, 1);
    const int folded = (i < 0 ? -i : i) % period;
    return folded > last ? period - folded : folded;
  }
  TAPCT_HD float weight(const Shared& shared, int axis, float, int tap) const {
    const int distance = tap - view->radius[axis];
    return shared.gaussian[axis][distance < 0 ? -distance : distance];
  }
  TAPCT_HD Output output(const Shared& shared, int axis, int i) const {
    float sum = shared.gaussian[axis][0];
    for (int t = 1; t <= view->radius[axis]; ++t) {
      sum += 2 * shared.gaussian[axis][t];
    }
    return {i - view->radius[axis], 0, 1.0F / sum};
  }
};

// Sums over slices: rows [row, row + num_rows) and columns [column, column + num_columns) of the
// input into the strip.
template <typename Filter>
TAPCT_HD void sum_slices(Shared& shared, const Filter& filter, int thread, int row, int num_rows,
                         int column, int num_columns) {
  const int lane = thread % tile_size;
  const int size_x = filter.size(2);
  const std::size_t plane =
      static_cast<std::size_t>(filter.size(1)) * static_cast<std::size_t>(size_x);
  const int first = shared.z.first;
  const float offset = shared.z.offset;
  const int num_taps = filter.num_taps(0);
  int x[per_thread];
  bool is_used[per_thread];
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    is_used[k] = lane + k * tile_size < num_columns;
    x[k] = filter.inside(2, column + lane + k * tile_size);
  }
  for (int r = thread / tile_size; r < num_rows; r += num_warps) {
    const int start = filter.inside(1, row + r) * size_x;  // a slice has fewer than 2^31 voxels
    float sums[per_thread] = {};
    TAPCT_UNROLL_2
    for (int t = 0; t < num_taps; ++t) {
      const auto* slice =
          filter.source + static_cast<std::size_t>(filter.inside(0, first + t)) * plane;
      const float weight = filter.weight(shared, 0, offset, t);
      TAPCT_UNROLL
      for (int k = 0; k < per_thread; ++k) {
        if (is_used[k]) {
          sums[k] += weight * static_cast<float>(slice[start + x[k]]);
        }
      }
    }
    TAPCT_UNROLL
    for (int k = 0; k < per_thread; ++k) {
      if (is_used[k]) {
        shared.strip[r * strip_columns + lane + k * tile_size] = sums[k];
      }
    }
  }
}

// Sums along x: from the strip into `columns`, which later strips of the same rows add to.
template <typename Filter>
TAPCT_HD void sum_columns(Shared& shared, const Filter& filter, int thread, int num_rows,
                          int column, int num_columns, bool is_first) {
  const int lane = thread % tile_size;
  const int warp = thread / tile_size;
  const Output out = shared.x[lane];
  const int begin = larger(0, column - out.first);
  const int end = smaller(filter.num_taps(2), column + num_columns - out.first);
  float sums[per_thread] = {};
  for (int t = begin; t < end; ++t) {
    const float weight = filter.weight(shared, 2, out.offset, t);
    TAPCT_UNROLL
    for (int k = 0; k < per_thread; ++k) {
      const int r = warp + k * num_warps;
      if (r < num_rows) {
        sums[k] += weight * shared.strip[r * strip_columns + out.first + t - column];
      }
    }
  }
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    float& target = shared.columns[(warp + k * num_warps) * tile_size + lane];
    target = is_first ? sums[k] : target + sums[k];
  }
}

// Sums along y: from rows [row, row + num_rows) in `columns` into the pixels of this thread.
template <typename Filter>
TAPCT_HD void sum_rows(const Shared& shared, const Filter& filter, int thread,
                       float (&sums)[per_thread], int row, int num_rows) {
  const int lane = thread % tile_size;
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    const Output& out = shared.y[thread / tile_size + k * num_warps];
    const int end = smaller(filter.num_taps(1), row + num_rows - out.first);
    for (int t = larger(0, row - out.first); t < end; ++t) {
      sums[k] += filter.weight(shared, 1, out.offset, t) *
                 shared.columns[(out.first + t - row) * tile_size + lane];
    }
  }
}

// Leaves the filtered tile in `shared.strip`.
template <typename Filter, typename Threads>
TAPCT_HD void filter_tile(Threads& threads, Shared& shared, const Filter& filter,
                          const Tile& tile) {
  threads.each([&](int thread, float (&sums)[per_thread]) {
    filter.prepare(shared, thread);
    TAPCT_UNROLL
    for (int k = 0; k < per_thread; ++k) {
      sums[k] = 0;
    }
  });
  // A tile at the edge repeats its last output, so that every lane has one.
  threads.each([&](int thread, float (&)[per_thread]) {
    const int i = thread % tile_size;
    if (thread < tile_size) {
      shared.y[i] = filter.output(shared, 1, tile.y + smaller(i, tile.num_y - 1));
    } else if (thread < 2 * tile_size) {
      shared.x[i] = filter.output(shared, 2, tile.x + smaller(i, tile.num_x - 1));
    } else if (thread == 2 * tile_size) {
      shared.z = filter.output(shared, 0, tile.z);
    }
  });
  // Outputs go up the axis, or down it where the view is flipped.
  const int first_y = shared.y[0].first, last_y = shared.y[tile_size - 1].first;
  const int first_x = shared.x[0].first, last_x = shared.x[tile_size - 1].first;
  const int begin_y = smaller(first_y, last_y),
            end_y = larger(first_y, last_y) + filter.num_taps(1);
  const int begin_x = smaller(first_x, last_x),
            end_x = larger(first_x, last_x) + filter.num_taps(2);
  for (int row = begin_y; row < end_y; row += strip_rows) {
    const int num_rows = smaller(strip_rows, end_y - row);
    for (int column = begin_x; column < end_x; column += strip_columns) {
      const int num_columns = smaller(strip_columns, end_x - column);
      threads.each([&](int thread, float (&)[per_thread]) {
        sum_slices(shared, filter, thread, row, num_rows, column, num_columns);
      });
      threads.each([&](int thread, float (&)[per_thread]) {
        sum_columns(shared, filter, thread, num_rows, column, num_columns, column == begin_x);
      });
    }
    threads.each([&](int thread, float (&sums)[per_thread]) {
      sum_rows(shared, filter, thread, sums, row, num_rows);
    });
  }
  threads.each([&](int thread, float (&sums)[per_thread]) {
    const int lane = thread % tile_size;
    TAPCT_UNROLL
    for (int k = 0; k < per_thread; ++k) {
      const int y = thread / tile_size + k * num_warps;
      shared.strip[y * tile_pitch + lane] =
          sums[k] * (shared.z.scale * shared.y[y].scale * shared.x[lane].scale);
    }
  });
}

TAPCT_HD std::uint64_t high_product(std::uint64_t a, std::uint64_t b) {
#ifdef __CUDA_ARCH__
  return __umul64hi(a, b);
#else
  __extension__ using uint128 = unsigned __int128;
  return static_cast<std::uint64_t>((static_cast<uint128>(a) * b) >> 64);
#endif
}

struct Words {
  std::uint64_t a, b, c, d;
};

// Philox4x64-10 of counter (counter, 0, 0, 0) and key (key, 0).
// Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
TAPCT_HD Words philox(std::uint64_t counter, std::uint64_t key) {
  Words w{counter, 0, 0, 0};
  std::uint64_t other_key = 0;
  TAPCT_UNROLL
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t left = 0xD2E7470EE14C6C93U, right = 0xCA5A826395121157U;
    w = {high_product(right, w.c) ^ w.b ^ key, right * w.c,
         high_product(left, w.a) ^ w.d ^ other_key, left * w.a};
    key += 0x9E3779B97F4A7C15U;
    other_key += 0xBB67AE8584CAA73BU;
  }
  return w;
}

// The normal noise of one voxel after another; a counter serves eight voxels, a word two.
class Noise {
 public:
  TAPCT_HD explicit Noise(std::uint64_t key) : key_(key) {}

  TAPCT_HD float operator()(std::uint64_t n) {
    const std::uint64_t word = n / 2;
    if (word / 4 + 1 != counter_) {
      counter_ = word / 4 + 1;
      words_ = philox(counter_, key_);
    }
    if (word + 1 != next_word_) {
      next_word_ = word + 1;
      // Not an array: one indexed at run time would lie in local memory.
      const std::uint64_t low_half = word % 2 == 0 ? words_.a : words_.b;
      const std::uint64_t high_half = word % 2 == 0 ? words_.c : words_.d;
      box_muller(word % 4 < 2 ? low_half : high_half);
    }
    return n % 2 == 0 ? even_ : odd_;
  }

 private:
  TAPCT_HD void box_muller(std::uint64_t word) {
    const auto high = static_cast<float>(static_cast<std::uint32_t>(word >> 32));
    const auto low = static_cast<float>(static_cast<std::uint32_t>(word));
    const float radius = sqrtf(-2.0F * logf((high + 0.5F) * 0x1p-32F));
    float sine = 0, cosine = 0;
#ifdef __CUDA_ARCH__
    sincospif(low * 0x1p-31F, &sine, &cosine);  // unlike sincosf, never slow and without a stack
#else
    const float angle = low * static_cast<float>(6.283185307179586 * 0x1p-32);
    sine = std::sin(angle);
    cosine = std::cos(angle);
#endif
    even_ = radius * cosine;
    odd_ = radius * sine;
  }

  std::uint64_t key_;
  std::uint64_t counter_ = 0;  // counters begin at 1
  std::uint64_t next_word_ = 0;
  Words words_{};
  float even_ = 0, odd_ = 0;
};

TAPCT_HD void to_pixel(float value, float& pixel) { pixel = value; }
// bfloat16 bits, rounded half to even; the value is finite.
TAPCT_HD void to_pixel(float value, std::uint16_t& pixel) {
  std::uint32_t bits = 0;
  memcpy(&bits, &value, sizeof(bits));
  pixel = static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <typename Pixel>
struct alignas(per_thread * sizeof(Pixel)) Pixels {
  Pixel at[per_thread];
};

// Stores the first `count` values, in one access where that is allowed.
template <typename Pixel>
TAPCT_HD void store(Pixel* target, const float (&values)[per_thread], int count) {
  Pixels<Pixel> pixels;
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    to_pixel(values[k], pixels.at[k]);
  }
  if (count == per_thread && reinterpret_cast<std::uintptr_t>(target) % sizeof(pixels) == 0) {
    *reinterpret_cast<Pixels<Pixel>*>(target) = pixels;
    return;
  }
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    if (k < count) {
      target[k] = pixels.at[k];
    }
  }
}

// HU to [0, 1]: window, gamma, contrast.
TAPCT_HD float intensity(const TileView& view, float hu) {
  float unit = to_unit((hu - view.low) * view.inverse_range);
  if (view.gamma != 1) {
    unit = powf(unit, view.gamma);
  }
  if (view.contrast != 1) {
    unit = to_unit((unit - 0.5F) * view.contrast + 0.5F);
  }
  return unit;
}

// [0, 1] to noisy z-scores, of consecutive voxels from n on.
template <typename Pixel>
TAPCT_HD void finish(const TileView& view, std::size_t n, float (&values)[per_thread], int count) {
  Noise noise(view.noise_key);
  TAPCT_UNROLL
  for (int k = 0; k < per_thread; ++k) {
    values[k] = values[k] * view.gain + view.offset;
    if (view.noise_std > 0) {
      values[k] += view.noise_std * noise(n + static_cast<std::size_t>(k));
    }
  }
  store(static_cast<Pixel*>(view.out) + n, values, count);
}

// Number of tiles of a view, and the place of one in the turned view. Slices go fastest: neighbours
// read the same slices of the box, and meet in the cache.
struct Grid {
  int size_z, size_y, size_x;

  TAPCT_HD int rows() const { return (size_y + tile_size - 1) / tile_size; }
  TAPCT_HD int columns() const { return (size_x + tile_size - 1) / tile_size; }
  TAPCT_HD Tile tile(int index) const {
    const int place = index / size_z;
    const int y = place / columns() * tile_size, x = place % columns() * tile_size;
    return {index % size_z, y, x, smaller(tile_size, size_y - y), smaller(tile_size, size_x - x)};
  }
  TAPCT_HD std::size_t voxel(int z, int y, int x) const {
    return (static_cast<std::size_t>(z) * static_cast<std::size_t>(size_y) +
            static_cast<std::size_t>(y)) *
               static_cast<std::size_t>(size_x) +
           static_cast<std::size_t>(x);
  }
};

// Where the pixels of a tile of the turned view lie before the turns.
TAPCT_HD Tile before_turns(const Tile& t, int turns, const Grid& grid) {
  switch (turns) {
    case 1:
      return {t.z, t.x, grid.size_y - t.y - t.num_y, t.num_x, t.num_y};
    case 2:
      return {t.z, grid.size_y - t.y - t.num_y, grid.size_x - t.x - t.num_x, t.num_y, t.num_x};
    case 3:
      return {t.z, grid.size_x - t.x - t.num_x, t.y, t.num_x, t.num_y};
    default:
      return t;
  }
}

// Place in `shared.strip` of row i, column j of the turned tile.
TAPCT_HD int strip_place(const Tile& turned, int turns, int i, int j) {
  switch (turns) {
    case 1:
      return j * tile_pitch + turned.num_y - 1 - i;
    case 2:
      return (turned.num_y - 1 - i) * tile_pitch + turned.num_x - 1 - j;
    case 3:
      return (turned.num_x - 1 - j) * tile_pitch + i;
    default:
      return i * tile_pitch + j;
  }
}

// Hands out the tile in `shared.strip`: each thread gets four consecutive pixels of the turned
// view, emit(n, values, count), the first `count` of which exist.
template <typename Threads, typename Emit>
TAPCT_HD void each_four(Threads& threads, const Shared& shared, const Tile& turned, int turns,
                        const Grid& grid, const Emit& emit) {
  threads.each([&](int thread, float (&values)[per_thread]) {
    constexpr int per_row = tile_size / per_thread;
    const int i = thread / per_row, j = thread % per_row * per_thread;
    const int count = smaller(per_thread, turned.num_x - j);
    if (i < turned.num_y && count > 0) {
      TAPCT_UNROLL
      for (int k = 0; k < per_thread; ++k) {
        values[k] = shared.strip[strip_place(turned, turns, i, smaller(j + k, turned.num_x - 1))];
      }
      emit(grid.voxel(turned.z, turned.y + i, turned.x + j), values, count);
    }
  });
}

template <typename Pixel, typename Threads>
TAPCT_HD void render_tile(Threads& threads, Shared& shared, const TileView& view, const Grid& grid,
                          int index) {
  const Tile turned = grid.tile(index);
  const Resample filter{view.hu, view.axes};
  filter_tile(threads, shared, filter, before_turns(turned, view.turns, grid));
  each_four(threads, shared, turned, view.turns, grid,
            [&](std::size_t n, float (&values)[per_thread], int count) {
              TAPCT_UNROLL
              for (int k = 0; k < per_thread; ++k) {
                values[k] = intensity(view, values[k]);
              }
              if (view.blurred != nullptr) {
                store(view.blurred + n, values, count);
              } else {
                finish<Pixel>(view, n, values, count);
              }
            });
}

// Blurs what render_tile left in `view.blurred` of every tile of the view.
template <typename Pixel, typename Threads>
TAPCT_HD void blur_tile(Threads& threads, Shared& shared, const TileView& view, const Grid& grid,
                        int index) {
  const Tile tile = grid.tile(index);
  const Blur filter{view.blurred, &view, {grid.size_z, grid.size_y, grid.size_x}};
  filter_tile(threads, shared, filter, tile);
  each_four(threads, shared, tile, 0, grid,
            [&](std::size_t n, float (&values)[per_thread], int count) {
              TAPCT_UNROLL
              for (int k = 0; k < per_thread; ++k) {
                values[k] = to_unit(values[k]);  // rounding must not leave the clip range
              }
              finish<Pixel>(view, n, values, count);
            });
}

inline bool is_blurred(const View& view) {
  return std::any_of(view.sigma.begin(), view.sigma.end(), [](float sigma) { return sigma > 0; });
}

// `blurred` is memory for the view's pixels; null where is_blurred is false. Throws as check_view
// does, and for what only the GPU does not do.
inline TileView make_tile_view(const ViewJob& job, const ViewOptions& options, float* blurred) {
  check_view(job, options);
  const View& view = job.view;
  const ZScore& z = options.zscore;
  if (job.shape_zyx[1] > 0x7fffffff / job.shape_zyx[2]) {
    throw std::invalid_argument("render_views_gpu: a slice of a box has 2^31 voxels or more");
  }
  TileView tile{};
  tile.hu = job.hu;
  tile.out = job.out;
  tile.blurred = blurred;
  tile.noise_key = view.noise_key;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const double lo = static_cast<double>(view.lo[axis]), hi = static_cast<double>(view.hi[axis]);
    const double step = (hi - lo) / static_cast<double>(options.size_zyx[axis]);
    const double half_width = options.antialias ? std::max(std::abs(step), 1.0) : 1.0;
    tile.axes[axis] = {lo,
                       step,
                       half_width,
                       static_cast<float>(1 / half_width),
                       static_cast<int>(std::ceil(2 * half_width)),
                       static_cast<int>(job.shape_zyx[axis])};
    const double radius = std::ceil(3 * static_cast<double>(view.sigma[axis]));
    if (radius > largest_radius) {
      throw std::invalid_argument("render_views_gpu: a blur has a sigma of more than 42 voxels");
    }
    tile.sigma[axis] = view.sigma[axis];
    tile.radius[axis] = static_cast<int>(radius);
  }
  const double low = static_cast<double>(view.window[0]),
               high = static_cast<double>(view.window[1]);
  const double std = static_cast<double>(z.std), bottom = static_cast<double>(z.low);
  tile.low = view.window[0];
  tile.inverse_range = static_cast<float>(1 / (high - low));
  tile.gamma = view.gamma;
  tile.contrast = view.contrast;
  tile.gain = static_cast<float>((static_cast<double>(z.high) - bottom) / std);
  tile.offset = static_cast<float>((bottom - static_cast<double>(z.mean)) / std);
  tile.noise_std = view.noise_std;
  tile.turns = static_cast<int>(view.turns);
  return tile;
}

}  // namespace tapct::gpu

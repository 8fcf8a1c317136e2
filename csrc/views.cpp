#include "tapct/views.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>

#include "tapct/clones.hpp"
#include "tapct/parallel.hpp"

namespace tapct {
namespace {

constexpr std::size_t largest_axis = std::size_t{1} << 24;
constexpr float largest_place = 16777216.0F;  // float32 places end there
constexpr std::size_t most_taps = std::size_t{1} << 16;

// --- Functions that the compiler can vectorise; the C library's it cannot. Relative errors of a
// few 1e-7, and the same bits in every clone.

// Natural logarithm of a positive, normal number. Coefficients: Cephes logf (S. Moshier).
inline float log_of(float x) noexcept {
  const auto bits = std::bit_cast<std::int32_t>(x);
  const std::int32_t shifted = bits - 0x3f3504f3;  // so that the mantissa is in [sqrt .5, sqrt 2)
  const auto exponent = static_cast<float>(shifted >> 23);
  const float m = std::bit_cast<float>((shifted & 0x007fffff) + 0x3f3504f3) - 1.0F;
  const float z = m * m;
  float p = 7.0376836292e-2F;
  p = p * m - 1.1514610310e-1F;
  p = p * m + 1.1676998740e-1F;
  p = p * m - 1.2420140846e-1F;
  p = p * m + 1.4249322787e-1F;
  p = p * m - 1.6668057665e-1F;
  p = p * m + 2.0000714765e-1F;
  p = p * m - 2.4999993993e-1F;
  p = p * m + 3.3333331174e-1F;
  const float tail = p * m * z + exponent * -2.12194440e-4F - 0.5F * z;
  return m + tail + exponent * 0.693359375F;
}

// e to a power in [-87, 88]; below that 0 to 1e-38. Coefficients: Cephes expf.
inline float exp_of(float x) noexcept {
  x = std::max(x, -87.0F);
  const float n = (x * 1.44269504F + 12582912.0F) - 12582912.0F;  // rounds to the nearest integer
  const float r = (x - n * 0.693359375F) - n * -2.12194440e-4F;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  const float value = p * r * r + r + 1.0F;
  const std::int32_t exponent = static_cast<std::int32_t>(n) + 127;
  return value * std::bit_cast<float>(exponent << 23);
}

struct Uniform2 {
  std::uint32_t high, low;
};

// Box-Muller: the high word is the radius, the low one the angle. The angle is reduced as a
// fraction of a turn, which is exact; the polynomials are Cephes sinf and cosf on [-pi/4, pi/4].
inline void normals_of(Uniform2 u, float& cosine, float& sine) noexcept {
  const float radius =
      std::sqrt(-2.0F * log_of((static_cast<float>(u.high) + 0.5F) * 2.3283064365386963e-10F));
  const float turn = static_cast<float>(u.low) * 2.3283064365386963e-10F;  // 0 to 1
  const float quadrant = (turn * 4.0F + 12582912.0F) - 12582912.0F;
  const float r = (turn - quadrant * 0.25F) * 6.28318530717958648F;
  const float z = r * r;
  const float s = ((-1.9515295891e-4F * z + 8.3321608736e-3F) * z - 1.6666654611e-1F) * z * r + r;
  const float c =
      ((2.443315711809948e-5F * z - 1.388731625493765e-3F) * z + 4.166664568298827e-2F) * z * z -
      0.5F * z + 1.0F;
  const auto q = static_cast<std::int32_t>(quadrant);
  const float first = (q & 1) != 0 ? s : c;
  const float second = (q & 1) != 0 ? c : s;
  cosine = radius * (((q + 1) & 2) != 0 ? -first : first);
  sine = radius * ((q & 2) != 0 ? -second : second);
}

// Philox4x64-10 (Salmon et al. 2011) as numpy counts: word 4 * (counter - 1) + i, from counter 1.
void philox(std::uint64_t counter, std::uint64_t key, std::uint64_t* words) noexcept {
  std::uint64_t c0 = counter, c1 = 0, c2 = 0, c3 = 0, k0 = key, k1 = 0;
  for (int round = 0; round < 10; ++round) {
    const unsigned __int128 left = static_cast<unsigned __int128>(0xD2E7470EE14C6C93U) * c0;
    const unsigned __int128 right = static_cast<unsigned __int128>(0xCA5A826395121157U) * c2;
    c0 = static_cast<std::uint64_t>(right >> 64) ^ c1 ^ k0;
    c1 = static_cast<std::uint64_t>(right);
    c2 = static_cast<std::uint64_t>(left >> 64) ^ c3 ^ k1;
    c3 = static_cast<std::uint64_t>(left);
    k0 += 0x9E3779B97F4A7C15U;
    k1 += 0xBB67AE8584CAA73BU;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

constexpr std::size_t normals_per_block = 8;  // of one counter
constexpr std::size_t noise_blocks = 32;

TAPCT_CLONES void normals_from(const std::uint32_t* high, const std::uint32_t* low, float* cosine,
                               float* sine, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    normals_of({high[i], low[i]}, cosine[i], sine[i]);
  }
}

// --- Rows. Each loop is one that gcc vectorises.

TAPCT_CLONES void set_row(const std::int16_t* in, float weight, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    out[i] = weight * static_cast<float>(in[i]);
  }
}

TAPCT_CLONES void add_row(const std::int16_t* in, float weight, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    out[i] += weight * static_cast<float>(in[i]);
  }
}

TAPCT_CLONES void set_row(const float* in, float weight, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    out[i] = weight * in[i];
  }
}

TAPCT_CLONES void add_row(const float* in, float weight, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    out[i] += weight * in[i];
  }
}

// Taps beyond an output's own have weight 0 and read what follows in `row`, which is padded.
TAPCT_CLONES void gather_row(const float* row, const std::int32_t* first, const float* weights_TO,
                             std::size_t taps, float* out, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    out[i] = weights_TO[i] * row[first[i]];
  }
  for (std::size_t t = 1; t < taps; ++t) {
    const float* weight = weights_TO + t * size;
    const float* shifted = row + t;
    for (std::size_t i = 0; i < size; ++i) {
      out[i] += weight[i] * shifted[first[i]];
    }
  }
}

TAPCT_CLONES void window_row(float* row, float low, float scale, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    row[i] = std::min(std::max((row[i] - low) * scale, 0.0F), 1.0F);
  }
}

TAPCT_CLONES void gamma_row(float* row, float gamma, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    const float u = row[i];
    const float power = exp_of(gamma * log_of(std::max(u, 1e-30F)));
    row[i] = u > 0.0F ? power : 0.0F;
  }
}

TAPCT_CLONES void contrast_row(float* row, float contrast, std::size_t size) {
  for (std::size_t i = 0; i < size; ++i) {
    row[i] = std::min(std::max((row[i] - 0.5F) * contrast + 0.5F, 0.0F), 1.0F);
  }
}

inline void put(float value, float& out) noexcept { out = value; }
inline void put(float value, std::uint16_t& out) noexcept { out = to_bf16(value); }

// From [0, 1] to z-scores; `noise` may be null.
#define TAPCT_FINISH_ROW(PIXEL)                                                                   \
  TAPCT_CLONES void finish_row(const float* row, float gain, float offset, PIXEL* out,            \
                               std::size_t size) {                                                \
    for (std::size_t i = 0; i < size; ++i) {                                                      \
      put(std::min(std::max(row[i], 0.0F), 1.0F) * gain + offset, out[i]);                        \
    }                                                                                             \
  }                                                                                               \
  TAPCT_CLONES void finish_noisy_row(const float* row, float gain, float offset,                  \
                                     const float* noise, float noise_std, PIXEL* out,             \
                                     std::size_t size) {                                          \
    for (std::size_t i = 0; i < size; ++i) {                                                      \
      put(std::min(std::max(row[i], 0.0F), 1.0F) * gain + offset + noise_std * noise[i], out[i]); \
    }                                                                                             \
  }
TAPCT_FINISH_ROW(float)
TAPCT_FINISH_ROW(std::uint16_t)
#undef TAPCT_FINISH_ROW

// Voxel of an axis that stands at `place`: mirrored without repeating the edge voxel, as often as
// it takes (reflect 101).
std::size_t mirrored(std::int64_t place, std::int64_t size) {
  const std::int64_t period = std::max<std::int64_t>(2 * (size - 1), 1);
  const std::int64_t folded = ((place + size - 1) % period + period) % period - (size - 1);
  return static_cast<std::size_t>(folded < 0 ? -folded : folded);
}

// A Gaussian and the voxels under it: output i is the sum over t of weights[t] * input[from[i +
// t]].
struct Blur {
  std::vector<float> weights;  // empty: none
  std::vector<std::size_t> from;
};

Blur make_blur(float sigma, std::size_t size) {
  Blur blur;
  if (!(sigma > 0)) {
    return blur;
  }
  const auto radius = static_cast<std::int64_t>(std::ceil(3.0 * static_cast<double>(sigma)));
  std::vector<double> kernel;
  double sum = 0;
  for (std::int64_t t = -radius; t <= radius; ++t) {
    const double place = static_cast<double>(t) / static_cast<double>(sigma);
    kernel.push_back(std::exp(-0.5 * place * place));
    sum += kernel.back();
  }
  for (const double weight : kernel) {
    blur.weights.push_back(static_cast<float>(weight / sum));
  }
  const auto count = static_cast<std::int64_t>(size);
  for (std::int64_t place = -radius; place < count + radius; ++place) {
    blur.from.push_back(mirrored(place, count));
  }
  return blur;
}

// What one thread uses again for every view.
struct Scratch {
  std::vector<float> plane, row, taps_TO, view, other, turned, noise;
};

float* sized(std::vector<float>& buffer, std::size_t size) {
  if (buffer.size() < size) {
    buffer.resize(size);
  }
  return buffer.data();
}

void blend(const ViewAxis& axis, std::size_t i, const float* base, std::size_t stride, float* out,
           std::size_t size) {
  const float* weights = axis.weights.data() + i * axis.max_taps;
  set_row(base, weights[0], out, size);
  for (std::size_t t = 1; t < static_cast<std::size_t>(axis.num_taps[i]); ++t) {
    add_row(base + t * stride, weights[t], out, size);
  }
}

// Output i of a blurred axis whose voxels are rows of `size` numbers.
void blur_rows(const Blur& blur, std::size_t i, const float* base, float* out, std::size_t size) {
  const std::size_t* from = blur.from.data() + i;
  set_row(base + from[0] * size, blur.weights[0], out, size);
  for (std::size_t t = 1; t < blur.weights.size(); ++t) {
    add_row(base + from[t] * size, blur.weights[t], out, size);
  }
}

// Weights with the taps outermost, as gather_row reads them.
void by_tap(const ViewAxis& axis, std::vector<float>& taps_TO) {
  const std::size_t size = axis.first.size();
  float* taps = sized(taps_TO, size * axis.max_taps);
  for (std::size_t t = 0; t < axis.max_taps; ++t) {
    for (std::size_t i = 0; i < size; ++i) {
      taps[t * size + i] = axis.weights[i * axis.max_taps + t];
    }
  }
}

// Output (y, x) of torch.rot90(plane, turns): see reference.py.
void turn_plane(const float* in, float* out, std::size_t size, unsigned turns) {
  const std::size_t last = size - 1;
  for (std::size_t y = 0; y < size; ++y) {
    for (std::size_t x = 0; x < size; ++x) {
      const std::size_t from = turns == 1   ? x * size + last - y
                               : turns == 2 ? (last - y) * size + last - x
                                            : (last - x) * size + y;
      out[y * size + x] = in[from];
    }
  }
}

class Renderer {
 public:
  Renderer(const ViewJob& job, const ViewOptions& options, Scratch& scratch)
      : job_(job), options_(options), scratch_(scratch) {
    const auto& [z, y, x] = options.size_zyx;
    num_plane_ = y * x;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      axes_[axis] = make_view_axis(job.view.lo[axis], job.view.hi[axis], options.size_zyx[axis],
                                   job.shape_zyx[axis], options.antialias);
    }
    for (const std::int32_t first : axes_[2].first) {
      first_x_.push_back(first - static_cast<std::int32_t>(axes_[2].begin));
    }
    const auto& clip = options.zscore;
    gain_ = static_cast<float>((static_cast<double>(clip.high) - static_cast<double>(clip.low)) /
                               static_cast<double>(clip.std));
    offset_ = static_cast<float>((static_cast<double>(clip.low) - static_cast<double>(clip.mean)) /
                                 static_cast<double>(clip.std));
    for (std::size_t axis = 0; axis < 3; ++axis) {
      blurs_[axis] = make_blur(job.view.sigma[axis], options.size_zyx[axis]);
      is_blurred_ = is_blurred_ || !blurs_[axis].weights.empty();
    }
    // Beyond its end lie voxels that taps of weight 0 read: any numbers but NaN.
    sized(scratch.row,
          std::max(axes_[2].end - axes_[2].begin + axes_[2].max_taps, blurs_[2].from.size()));
  }

  template <typename Pixel>
  void render() {
    const std::size_t depth = options_.size_zyx[0];
    float* view = sized(scratch_.view, num_plane_ * (is_blurred_ ? depth : 1));
    by_tap(axes_[2], scratch_.taps_TO);
    for (std::size_t z = 0; z < depth; ++z) {
      float* plane = view + (is_blurred_ ? z * num_plane_ : 0);
      resample_plane(z, plane);
      change_intensity(plane);
      if (!is_blurred_) {
        finish_plane<Pixel>(z, plane);
      }
    }
    if (is_blurred_) {
      blur<Pixel>(view);
    }
  }

 private:
  void resample_plane(std::size_t z, float* plane) {
    const auto [num_z, num_y, num_x] = job_.shape_zyx;
    const ViewAxis &axis_z = axes_[0], &axis_y = axes_[1], &axis_x = axes_[2];
    const std::size_t width = axis_x.end - axis_x.begin, height = axis_y.end - axis_y.begin;
    float* thick = sized(scratch_.plane, width * height);
    const float* weights = axis_z.weights.data() + z * axis_z.max_taps;
    const auto first = static_cast<std::size_t>(axis_z.first[z]);
    for (std::size_t y = 0; y < height; ++y) {
      const std::int16_t* source =
          job_.hu + (first * num_y + axis_y.begin + y) * num_x + axis_x.begin;
      float* out = thick + y * width;
      set_row(source, weights[0], out, width);
      for (std::size_t t = 1; t < static_cast<std::size_t>(axis_z.num_taps[z]); ++t) {
        add_row(source + t * num_y * num_x, weights[t], out, width);
      }
    }
    const std::size_t rows = options_.size_zyx[1], columns = options_.size_zyx[2];
    float* row = scratch_.row.data();
    for (std::size_t y = 0; y < rows; ++y) {
      const auto from = static_cast<std::size_t>(axis_y.first[y]) - axis_y.begin;
      blend(axis_y, y, thick + from * width, width, row, width);
      std::fill(row + width, row + width + axis_x.max_taps, 0.0F);
      gather_row(row, first_x_.data(), scratch_.taps_TO.data(), axis_x.max_taps,
                 plane + y * columns, columns);
    }
  }

  void change_intensity(float* plane) {
    const View& view = job_.view;
    const float low = view.window[0];
    const auto scale =
        static_cast<float>(1.0 / (static_cast<double>(view.window[1]) - static_cast<double>(low)));
    window_row(plane, low, scale, num_plane_);
    if (view.gamma != 1.0F) {
      gamma_row(plane, view.gamma, num_plane_);
    }
    if (view.contrast != 1.0F) {
      contrast_row(plane, view.contrast, num_plane_);
    }
    if (view.turns != 0) {
      float* turned = sized(scratch_.turned, num_plane_);
      turn_plane(plane, turned, options_.size_zyx[1], view.turns);
      std::copy(turned, turned + num_plane_, plane);
    }
  }

  template <typename Pixel>
  void blur(const float* view) {
    const auto& [depth, rows, columns] = options_.size_zyx;
    const auto& [across, down, along] = blurs_;
    float* first = sized(scratch_.plane, 2 * num_plane_);
    float* second = first + num_plane_;
    for (std::size_t z = 0; z < depth; ++z) {
      const float* plane = view + z * num_plane_;
      if (!across.weights.empty()) {
        blur_rows(across, z, view, first, num_plane_);
        plane = first;
      }
      if (!down.weights.empty()) {
        for (std::size_t y = 0; y < rows; ++y) {
          blur_rows(down, y, plane, second + y * columns, columns);
        }
        plane = second;
      }
      if (!along.weights.empty()) {
        float* row = scratch_.row.data();
        float* out = sized(scratch_.turned, num_plane_);
        for (std::size_t y = 0; y < rows; ++y) {
          for (std::size_t x = 0; x < along.from.size(); ++x) {
            row[x] = plane[y * columns + along.from[x]];
          }
          set_row(row, along.weights[0], out + y * columns, columns);
          for (std::size_t t = 1; t < along.weights.size(); ++t) {
            add_row(row + t, along.weights[t], out + y * columns, columns);
          }
        }
        plane = out;
      }
      finish_plane<Pixel>(z, plane);
    }
  }

  template <typename Pixel>
  void finish_plane(std::size_t z, const float* plane) {
    Pixel* out = static_cast<Pixel*>(job_.out) + z * num_plane_;
    if (job_.view.noise_std > 0) {
      float* noise = sized(scratch_.noise, num_plane_);
      view_noise(job_.view.noise_key, z * num_plane_, {noise, num_plane_});
      finish_noisy_row(plane, gain_, offset_, noise, job_.view.noise_std, out, num_plane_);
    } else {
      finish_row(plane, gain_, offset_, out, num_plane_);
    }
  }

  const ViewJob& job_;
  const ViewOptions& options_;
  Scratch& scratch_;
  std::array<ViewAxis, 3> axes_;
  std::vector<std::int32_t> first_x_;  // in the part of a row that is read
  std::array<Blur, 3> blurs_;
  std::size_t num_plane_ = 0;
  float gain_ = 0, offset_ = 0;
  bool is_blurred_ = false;
};

}  // namespace

ViewAxis make_view_axis(float lo, float hi, std::size_t num_out, std::size_t num_in,
                        bool antialias) {
  const double scale =
      (static_cast<double>(hi) - static_cast<double>(lo)) / static_cast<double>(num_out);
  const double half_width = antialias ? std::max(std::abs(scale), 1.0) : 1.0;
  const auto taps = static_cast<std::int64_t>(std::ceil(2.0 * half_width));
  const auto last = static_cast<std::int64_t>(num_in) - 1;
  ViewAxis axis;
  axis.max_taps = static_cast<std::size_t>(std::min(taps, last + 1));
  axis.weights.resize(num_out * axis.max_taps);
  axis.begin = num_in;
  for (std::size_t i = 0; i < num_out; ++i) {
    const double center = static_cast<double>(lo) + (static_cast<double>(i) + 0.5) * scale - 0.5;
    const std::int64_t start = static_cast<std::int64_t>(std::floor(center - half_width)) + 1;
    const auto weight = [&](std::int64_t input) {
      return std::max(1.0 - std::abs(static_cast<double>(input) - center) / half_width, 0.0);
    };
    double sum = 0;
    for (std::int64_t t = 0; t < taps; ++t) {
      sum += weight(start + t);
    }
    const std::int64_t low = std::clamp<std::int64_t>(start, 0, last);
    const std::int64_t high = std::clamp<std::int64_t>(start + taps - 1, 0, last);
    float* const weights = axis.weights.data() + i * axis.max_taps;
    std::int64_t t = 0;
    for (std::int64_t input = low; input <= high; ++input) {
      double share = 0;  // the outermost voxel stands for all beyond it
      for (; t < taps && (start + t <= input || input == high); ++t) {
        share += weight(start + t) / sum;
      }
      weights[input - low] = static_cast<float>(share);
    }
    axis.first.push_back(static_cast<std::int32_t>(low));
    axis.num_taps.push_back(static_cast<std::int32_t>(high + 1 - low));
    axis.begin = std::min(axis.begin, static_cast<std::size_t>(low));
    axis.end = std::max(axis.end, static_cast<std::size_t>(high) + 1);
  }
  return axis;
}

void view_noise(std::uint64_t key, std::size_t begin, std::span<float> out) {
  constexpr std::size_t num_pairs = noise_blocks * normals_per_block / 2;
  std::array<std::uint32_t, num_pairs> high{}, low{};
  std::array<float, num_pairs> cosine{}, sine{};
  const std::size_t end = begin + out.size();
  for (std::size_t block = begin / normals_per_block; block * normals_per_block < end;
       block += noise_blocks) {
    for (std::size_t b = 0; b < noise_blocks; ++b) {
      std::array<std::uint64_t, 4> words{};
      philox(block + b + 1, key, words.data());
      for (std::size_t i = 0; i < 4; ++i) {
        high[4 * b + i] = static_cast<std::uint32_t>(words[i] >> 32);
        low[4 * b + i] = static_cast<std::uint32_t>(words[i]);
      }
    }
    normals_from(high.data(), low.data(), cosine.data(), sine.data(), num_pairs);
    const std::size_t first = block * normals_per_block;
    const std::size_t from = std::max(first, begin), to = std::min(first + 2 * num_pairs, end);
    for (std::size_t n = from; n < to; ++n) {
      const std::size_t pair = (n - first) / 2;
      out[n - begin] = n % 2 == 0 ? cosine[pair] : sine[pair];
    }
  }
}

void check_view(const ViewJob& job, const ViewOptions& options) {
  const auto require = [](bool condition, const char* message) {
    if (!condition) {
      throw std::invalid_argument(message);
    }
  };
  const View& view = job.view;
  const ZScore& zscore = options.zscore;
  require(std::isfinite(zscore.low) && std::isfinite(zscore.high) && std::isfinite(zscore.mean) &&
              std::isfinite(zscore.std) && zscore.low < zscore.high && zscore.std > 0,
          "render_views: clip range, mean and deviation must be finite, the last positive");
  for (std::size_t axis = 0; axis < 3; ++axis) {
    require(job.shape_zyx[axis] >= 1 && job.shape_zyx[axis] <= largest_axis &&
                options.size_zyx[axis] >= 1 && options.size_zyx[axis] <= largest_axis,
            "render_views: an axis must have 1 to 2^24 voxels");
    const float lo = view.lo[axis], hi = view.hi[axis];
    require(std::isfinite(lo) && std::isfinite(hi) && lo != hi && std::abs(lo) <= largest_place &&
                std::abs(hi) <= largest_place,
            "render_views: lo and hi must be finite, apart and below 2^24");
    require(std::abs(hi - lo) / static_cast<float>(options.size_zyx[axis]) < most_taps,
            "render_views: a view shrinks its part of the box too much");
    require(view.sigma[axis] >= 0 && view.sigma[axis] <= 100,
            "render_views: sigma must be in [0, 100]");
  }
  require(std::isfinite(view.window[0]) && std::isfinite(view.window[1]) &&
              view.window[0] < view.window[1],
          "render_views: the window must be an increasing pair");
  require(view.gamma > 0 && view.gamma <= 100 && view.contrast >= 0 && view.contrast <= 100,
          "render_views: gamma and contrast must be in (0, 100]");
  require(view.noise_std >= 0 && view.noise_std <= 1000,
          "render_views: noise_std must be in [0, 1000]");
  require(view.turns <= 3, "render_views: turns must be 0..3");
  require(view.turns == 0 || options.size_zyx[1] == options.size_zyx[2],
          "render_views: only a square view can be turned");
}

template <typename Pixel>
void render_views(std::span<const ViewJob> jobs, const ViewOptions& options) {
  for (const ViewJob& job : jobs) {
    check_view(job, options);
  }
  parallel_for(jobs.size(), std::max<std::size_t>(options.num_threads, 1), [&](std::size_t i) {
    thread_local Scratch scratch;
    Renderer(jobs[i], options, scratch).render<Pixel>();
  });
}

template void render_views<float>(std::span<const ViewJob>, const ViewOptions&);
template void render_views<std::uint16_t>(std::span<const ViewJob>, const ViewOptions&);

}  // namespace tapct

#include "tapct/training_ops.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "tapct/clones.hpp"
#include "tapct/exp.hpp"
#include "tapct/team.hpp"
#include "tapct/zscore.hpp"

namespace tapct {

namespace {

struct Parts {
  explicit Parts(std::size_t rows)
      : num_rows(rows),
        rows_each(std::max<std::size_t>(32, (rows + 63) / 64)),
        count((rows + rows_each - 1) / rows_each) {}

  std::size_t begin(std::size_t part) const { return part * rows_each; }
  std::size_t end(std::size_t part) const { return std::min(num_rows, (part + 1) * rows_each); }

  std::size_t num_rows, rows_each, count;
};

void add_parts(const std::vector<float>& sums, std::size_t width, float* out) {
  std::fill_n(out, width, 0.0F);
  for (std::size_t first = 0; first < sums.size(); first += width) {
    for (std::size_t i = 0; i < width; ++i) {
      out[i] += sums[first + i];
    }
  }
}

TAPCT_WIDE_CLONES void widen_row(const std::uint16_t* x, float* out, std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    out[i] = std::bit_cast<float>(static_cast<std::uint32_t>(x[i]) << 16);
  }
}

TAPCT_WIDE_CLONES void narrow_row(const float* x, std::uint16_t* out, std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    out[i] = x[i] == x[i] ? to_bf16(x[i]) : std::uint16_t{0x7fc0};  // rounding could end NaN
  }
}

// Return a row as float32: itself, or in the buffer.
const float* read_row(Values values, std::size_t at, float* buffer, std::size_t width) {
  if (const auto* wide = std::get_if<const float*>(&values)) {
    return *wide + at;
  }
  widen_row(std::get<const std::uint16_t*>(values) + at, buffer, width);
  return buffer;
}

// Calls fill(row) for a row of float32: the one to be written, or the buffer, then rounded.
template <typename Fill>
void write_row(MutableValues values, std::size_t at, float* buffer, std::size_t width,
               const Fill& fill) {
  if (auto* wide = std::get_if<float*>(&values)) {
    fill(*wide + at);
  } else {
    fill(buffer);
    narrow_row(buffer, std::get<std::uint16_t*>(values) + at, width);
  }
}

struct Normal {
  float cdf;    // Phi(x)
  float power;  // exp(-x^2 / 2)
};

// Phi(-|x|) = exp(-x^2 / 2) R(|x|): no cancellation, so the left tail keeps its relative precision.
// R(a) = erfc(a / sqrt 2) exp(a^2 / 2) / 2 is a polynomial in 1 / (1 + 0.35 a) without constant
// term, fitted to a relative 3.2e-8 on [0, 13.2], behind which the exponential leaves float32.
[[gnu::always_inline]] inline Normal normal(float x) {
  const float power = exp_of<OneLane>(-0.5F * x * x);
  const float t = 1.0F / (1.0F + 0.35F * std::fabs(x));
  float ratio = -0.02910836F;
  ratio = ratio * t + 0.14378586F;
  ratio = ratio * t - 0.25532319F;
  ratio = ratio * t + 0.15871821F;
  ratio = ratio * t - 0.02278869F;
  ratio = ratio * t + 0.10536855F;
  ratio = ratio * t + 0.1198692F;
  ratio = ratio * t + 0.1398567F;
  ratio = ratio * t + 0.13962171F;
  const float tail = power * (ratio * t);
  return {x < 0 ? tail : 1.0F - tail, power};
}

TAPCT_WIDE_CLONES void gelu_row(const float* x, const float* bias, float* out, std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    const float z = x[i] + bias[i];
    out[i] = z * normal(z).cdf;
  }
}

TAPCT_WIDE_CLONES void gelu_backward_row(const float* grad, const float* x, const float* bias,
                                         float* grad_x, float* bias_sum, std::size_t width) {
  constexpr float density_at_0 = 0.398942280F;  // 1 / sqrt(2 pi)
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    const float z = x[i] + bias[i];
    const Normal at_z = normal(z);
    const float through = grad[i] * (at_z.cdf + z * density_at_0 * at_z.power);
    grad_x[i] = through;
    bias_sum[i] += through;
  }
}

TAPCT_WIDE_CLONES void add_row(const float* x, const float* branch, const float* factor, float* out,
                               std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    out[i] = x[i] + factor[i] * branch[i];
  }
}

struct Moments {
  float mean, inverse_deviation;
};

[[gnu::always_inline]] inline Moments moments(const float* x, float eps, std::size_t width) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (std::size_t i = 0; i < width; ++i) {
    sum += x[i];
  }
  const float count = static_cast<float>(width), mean = sum / count;
#pragma omp simd reduction(+ : squares)
  for (std::size_t i = 0; i < width; ++i) {
    squares += (x[i] - mean) * (x[i] - mean);
  }
  return {mean, 1.0F / std::sqrt(squares / count + eps)};
}

TAPCT_WIDE_CLONES void norm_row(const float* x, const float* weight, const float* bias, float eps,
                                float* out, std::size_t width) {
  const Moments of_x = moments(x, eps, width);
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    out[i] = (x[i] - of_x.mean) * of_x.inverse_deviation * weight[i] + bias[i];
  }
}

// grad_x = grad_out + the gradient through the norm; adds to the sums of weight and bias.
TAPCT_WIDE_CLONES void norm_backward_row(const float* grad_out, const float* grad_normed,
                                         const float* x, const float* weight, float eps,
                                         float* grad_x, float* weight_sum, float* bias_sum,
                                         std::size_t width) {
  const Moments of_x = moments(x, eps, width);
  const float mean = of_x.mean, scale = of_x.inverse_deviation;
  float sum = 0, along = 0;
#pragma omp simd reduction(+ : sum, along)
  for (std::size_t i = 0; i < width; ++i) {
    const float unit = (x[i] - mean) * scale;
    const float scaled = grad_normed[i] * weight[i];
    sum += scaled;
    along += scaled * unit;
    weight_sum[i] += grad_normed[i] * unit;
    bias_sum[i] += grad_normed[i];
  }
  sum /= static_cast<float>(width);
  along /= static_cast<float>(width);
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    const float unit = (x[i] - mean) * scale;
    grad_x[i] = grad_out[i] + (grad_normed[i] * weight[i] - sum - unit * along) * scale;
  }
}

TAPCT_WIDE_CLONES void scale_row(const float* grad, const float* factor, float* out,
                                 std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    out[i] = grad[i] * factor[i];
  }
}

TAPCT_WIDE_CLONES void gamma_row(const float* grad, const float* branch, float* gamma_sum,
                                 std::size_t width) {
#pragma omp simd
  for (std::size_t i = 0; i < width; ++i) {
    gamma_sum[i] += grad[i] * branch[i];
  }
}

// For each sample its place in the tensor that lists it, or -1.
std::vector<std::ptrdiff_t> places(const Listed& listed, std::size_t num_samples) {
  std::vector<std::ptrdiff_t> found(num_samples, -1);
  const std::size_t count = listed.is_listed ? listed.samples.size() : num_samples;
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t sample = listed.is_listed ? static_cast<std::size_t>(listed.samples[i]) : i;
    if (sample >= num_samples) {
      throw std::out_of_range("residual_norm: index lists sample " +
                              std::to_string(listed.samples[i]) + " of " +
                              std::to_string(num_samples));
    }
    found[sample] = static_cast<std::ptrdiff_t>(i);
  }
  return found;
}

// Where each token of the stream has its row in the tensors of the branch and of the norm.
class Rows {
 public:
  explicit Rows(const ResidualNorm& op)
      : tokens_(op.num_tokens),
        width_(op.width),
        with_branch_(places(op.with_branch, op.num_samples)),
        with_norm_(places(op.with_norm, op.num_samples)) {}

  std::ptrdiff_t of_branch(std::size_t row) const { return offset(with_branch_, row); }
  std::ptrdiff_t of_norm(std::size_t row) const { return offset(with_norm_, row); }

 private:
  std::ptrdiff_t offset(const std::vector<std::ptrdiff_t>& places, std::size_t row) const {
    const std::ptrdiff_t place = places[row / tokens_];
    const std::size_t token = row % tokens_;
    return place < 0 ? -1
                     : static_cast<std::ptrdiff_t>(
                           (static_cast<std::size_t>(place) * tokens_ + token) * width_);
  }

  std::size_t tokens_, width_;
  std::vector<std::ptrdiff_t> with_branch_, with_norm_;
};

std::vector<float> branch_factor(const ResidualNorm& op) {
  std::vector<float> factor(op.width, op.scale);
  for (std::size_t i = 0; op.gamma != nullptr && i < op.width; ++i) {
    factor[i] *= op.gamma[i];
  }
  return factor;
}

}  // namespace

void bias_gelu(const float* x, const float* bias, float* out, std::size_t num_rows,
               std::size_t width, std::size_t threads) {
  const Parts parts(num_rows);
  team_for(parts.count, threads, [&](std::size_t part) {
    for (std::size_t row = parts.begin(part); row < parts.end(part); ++row) {
      gelu_row(x + row * width, bias, out + row * width, width);
    }
  });
}

void bias_gelu_backward(const float* grad, const float* x, const float* bias, float* grad_x,
                        float* grad_bias, std::size_t num_rows, std::size_t width,
                        std::size_t threads) {
  const Parts parts(num_rows);
  std::vector<float> sums(parts.count * width);
  team_for(parts.count, threads, [&](std::size_t part) {
    for (std::size_t row = parts.begin(part); row < parts.end(part); ++row) {
      const std::size_t at = row * width;
      gelu_backward_row(grad + at, x + at, bias, grad_x + at, sums.data() + part * width, width);
    }
  });
  add_parts(sums, width, grad_bias);
}

void residual_norm(const ResidualNorm& op, const float* x, Values branch, const float* bias,
                   float* out, MutableValues normed, std::size_t threads) {
  const std::vector<float> factor = branch_factor(op);
  const Rows rows(op);
  const Parts parts(op.num_samples * op.num_tokens);
  team_for(parts.count, threads, [&](std::size_t part) {
    std::vector<float> buffer(op.width);
    for (std::size_t row = parts.begin(part); row < parts.end(part); ++row) {
      const float* read = x + row * op.width;
      if (op.has_branch) {
        float* written = out + row * op.width;
        if (const std::ptrdiff_t at = rows.of_branch(row); at >= 0) {
          const float* added =
              read_row(branch, static_cast<std::size_t>(at), buffer.data(), op.width);
          add_row(read, added, factor.data(), written, op.width);
        } else {
          std::copy_n(read, op.width, written);
        }
        read = written;
      }
      if (const std::ptrdiff_t at = rows.of_norm(row); op.weight != nullptr && at >= 0) {
        write_row(normed, static_cast<std::size_t>(at), buffer.data(), op.width,
                  [&](float* to) { norm_row(read, op.weight, bias, op.eps, to, op.width); });
      }
    }
  });
}

void residual_norm_backward(const ResidualNorm& op, const float* grad_out, Values grad_normed,
                            const float* read, Values branch, const ResidualNormGrads& grads,
                            std::size_t threads) {
  const std::vector<float> factor = branch_factor(op), zeros(op.width);
  const Rows rows(op);
  const Parts parts(op.num_samples * op.num_tokens);
  std::vector<float> sums(parts.count * 3 * op.width);
  team_for(parts.count, threads, [&](std::size_t part) {
    std::vector<float> buffer(op.width);
    float* gamma_sum = sums.data() + part * 3 * op.width;
    float* weight_sum = gamma_sum + op.width;
    float* bias_sum = weight_sum + op.width;
    for (std::size_t row = parts.begin(part); row < parts.end(part); ++row) {
      const std::size_t here = row * op.width;
      const float* from = op.has_branch ? grad_out + here : zeros.data();
      float* grad = grads.x + here;
      if (const std::ptrdiff_t at = rows.of_norm(row); op.weight != nullptr && at >= 0) {
        const float* of_norm =
            read_row(grad_normed, static_cast<std::size_t>(at), buffer.data(), op.width);
        norm_backward_row(from, of_norm, read + here, op.weight, op.eps, grad, weight_sum, bias_sum,
                          op.width);
      } else {
        std::copy_n(from, op.width, grad);
      }
      if (const std::ptrdiff_t at = rows.of_branch(row); op.has_branch && at >= 0) {
        const auto place = static_cast<std::size_t>(at);
        write_row(grads.branch, place, buffer.data(), op.width,
                  [&](float* to) { scale_row(grad, factor.data(), to, op.width); });
        if (op.gamma != nullptr) {
          gamma_row(grad, read_row(branch, place, buffer.data(), op.width), gamma_sum, op.width);
        }
      }
    }
  });
  add_parts(sums, 3 * op.width, grads.parameters_3D);
  for (std::size_t i = 0; i < op.width; ++i) {
    grads.parameters_3D[i] *= op.scale;  // gamma's
  }
}

}  // namespace tapct

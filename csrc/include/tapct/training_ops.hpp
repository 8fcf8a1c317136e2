// What a block needs on a CPU beside matrix products, in float32, forward and backward.
// A sum over rows is added up per part, then over parts, and the parts depend on the number of rows
// alone: results have the same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <variant>

namespace tapct {

// Of float32, or the bits of bfloat16: what a matrix product takes and gives.
using Values = std::variant<const float*, const std::uint16_t*>;
using MutableValues = std::variant<float*, std::uint16_t*>;

// out = z Phi(z) with z = x + bias, for rows of `width`; what is NaN in PyTorch (at minus infinity)
// is NaN here. Backward: grad_x = grad (Phi(z) + z phi(z)), and grad_bias, its sum over the rows.
void bias_gelu(const float* x, const float* bias, float* out, std::size_t num_rows,
               std::size_t width, std::size_t threads);
void bias_gelu_backward(const float* grad, const float* x, const float* bias, float* grad_x,
                        float* grad_bias, std::size_t num_rows, std::size_t width,
                        std::size_t threads);

// The samples that a tensor holds, in its order, each at most once; all where it is not listed.
struct Listed {
  bool is_listed;
  std::span<const std::int64_t> samples;
};

// The op `tapct::residual_norm` of tapct_kernels, which defines it. Not read are branch and out
// where there is no branch, bias and normed where there is no norm: its weight is null. So is a
// gamma of 1.
struct ResidualNorm {
  std::size_t num_samples, num_tokens, width;
  Listed with_branch, with_norm;
  float scale, eps;
  bool has_branch;
  const float* gamma;
  const float* weight;
};

void residual_norm(const ResidualNorm& op, const float* x, Values branch, const float* bias,
                   float* out, MutableValues normed, std::size_t threads);

// `read` is what was normed. The gradients of gamma, weight and bias are three rows of grads_3D.
struct ResidualNormGrads {
  float* x;
  MutableValues branch;
  float* parameters_3D;
};

void residual_norm_backward(const ResidualNorm& op, const float* grad_out, Values grad_normed,
                            const float* read, Values branch, const ResidualNormGrads& grads,
                            std::size_t threads);

}  // namespace tapct

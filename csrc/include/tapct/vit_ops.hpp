// What a transformer's block needs on a CPU beside matrix products, in bfloat16 (bits in uint16_t).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tapct {

constexpr std::size_t head_width = 64;

// Whether the CPU and the system have AVX-512 with bfloat16, and AMX tiles of it. The first call
// of has_amx asks the system for the use of tiles.
bool has_avx512_bf16();
bool has_amx();

// out[n, t, h] = sum_s softmax_s(q . k / 8) v of qkv (N, T, 3, H, 64); out is (N, T, H, 64).
// Sums in float32, probabilities rounded to bfloat16. levels (N, H, T) is log2 sum_s exp(q . k /
// 8), which the backward needs. Needs has_amx. Source: the tiling of FlashAttention-2,
// arXiv:2307.08691.
void attention_amx(const std::uint16_t* qkv, std::uint16_t* out, float* levels,
                   std::size_t num_volumes, std::size_t num_tokens, std::size_t num_heads,
                   std::size_t threads);

// The gradient of qkv, probabilities computed again; gradients of scores rounded to bfloat16.
void attention_amx_backward(const std::uint16_t* grad_out, const std::uint16_t* qkv,
                            const std::uint16_t* out, const float* levels, std::uint16_t* grad_qkv,
                            std::size_t num_volumes, std::size_t num_tokens, std::size_t num_heads,
                            std::size_t threads);

// x += branch in place, and out = LayerNorm(x) weight + bias, for num_rows rows of `width`, a
// multiple of 16. Without a branch (null) x stays. Needs has_avx512_bf16.
void add_norm(float* x, const std::uint16_t* branch, const float* weight, const float* bias,
              float eps, std::uint16_t* out, std::size_t num_rows, std::size_t width,
              std::size_t threads);

// x = x Phi(x) in place, the nearest bfloat16; what is not finite stays so. Needs has_avx512_bf16.
void gelu(std::uint16_t* x, std::size_t count, std::size_t threads);

}  // namespace tapct

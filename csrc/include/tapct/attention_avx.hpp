// Attention in float32 on AVX2 or AVX-512, forward and backward.
#pragma once

#include <cstddef>

namespace tapct {

// Whether the CPU has AVX2 with fused multiply-add, or more.
bool has_avx2();

// See attention_amx of vit_ops.hpp, of which these are the same in float32; levels are natural
// logarithms. `lanes` is 8 (AVX2), 16 (AVX-512), or 0 for what the CPU has. Needs has_avx2.
void attention_avx(const float* qkv, float* out, float* levels, std::size_t num_volumes,
                   std::size_t num_tokens, std::size_t num_heads, std::size_t threads,
                   std::size_t lanes);
void attention_avx_backward(const float* grad_out, const float* qkv, const float* out,
                            const float* levels, float* grad_qkv, std::size_t num_volumes,
                            std::size_t num_tokens, std::size_t num_heads, std::size_t threads,
                            std::size_t lanes);

}  // namespace tapct

// Matrix products of float32 on AMX tiles, which multiply bfloat16.
#pragma once

#include <cstddef>

namespace tapct {

// Element (r, c) is values[r * stride + c], or values[c * stride + r] if transposed.
struct Matrix {
  const float* values;
  std::size_t rows, columns, stride;
  bool is_transposed;
};

// out = left right + bias, row-major; bias may be null. Every number is split into bfloat16 pieces,
// each the nearest to what the ones before leave, and the last cut off: three are exact, two hold
// 16 bits. Of the products of pieces those are summed, in float32, that count beside the last
// piece: six of three pieces, three of two. What is not finite gives NaN; numbers and products
// below 2^-100 may lose bits. The bits of a row depend on no other row, nor on `threads`. Needs
// has_amx. Source: arXiv:1904.06376.
void matmul_amx(const Matrix& left, const Matrix& right, const float* bias, float* out,
                std::size_t pieces, std::size_t threads);

}  // namespace tapct

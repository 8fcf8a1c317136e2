// The exponential of kernels for the CPU, of floats and of vectors of them.
#pragma once

#include <cstdint>

namespace tapct {

struct OneLane {
  using Floats = float;
  using Bits = std::uint32_t;
};

// e^x of x <= 0, as in expf.c of Cephes (public domain); 0 below -87; NaN stays. Lanes has a type
// of floats and one of as many unsigned integers.
template <typename Lanes>
[[gnu::always_inline]] inline typename Lanes::Floats exp_of(typename Lanes::Floats x) {
  using Floats = typename Lanes::Floats;
  using Bits = typename Lanes::Bits;
  // 1.5 * 2^23: a sum with it has no fraction bits. 127: they end in the exponent of 2^whole.
  constexpr float to_exponent = 12582912.0F + 127.0F;
  const Floats shifted = x * 1.44269504F + to_exponent;
  const Floats whole = shifted - to_exponent;
  const Floats rest = (x - whole * 0.693359375F) + whole * 2.12194440e-4F;
  Floats power = rest * 1.9875691500e-4F + 1.3981999507e-3F;
  power = power * rest + 8.3334519073e-3F;
  power = power * rest + 4.1665795894e-2F;
  power = power * rest + 1.6666665459e-1F;
  power = power * rest + 5.0000001201e-1F;
  power = power * (rest * rest) + rest + 1.0F;
  power *= __builtin_bit_cast(Floats, __builtin_bit_cast(Bits, shifted) << 23);
  return x < -87.0F ? Floats{} : power;
}

}  // namespace tapct

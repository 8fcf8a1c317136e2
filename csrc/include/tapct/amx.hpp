// What kernels on AMX tiles of bfloat16 share. x86-64 on Linux only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

#if defined(__x86_64__) && defined(__linux__)
#define TAPCT_HAS_X86 1
#include <immintrin.h>

#define TAPCT_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))
#define TAPCT_AMX \
  __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

namespace tapct {

constexpr std::size_t tile_rows = 16;      // of every tile
constexpr std::size_t tile_elements = 32;  // bfloat16 in a row of a tile
constexpr std::size_t tile_size = tile_rows * tile_elements;

struct TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

struct Deleter {
  void operator()(void* memory) const { ::operator delete[](memory, std::align_val_t{64}); }
};
template <typename T>
using Aligned = std::unique_ptr<T[], Deleter>;

template <typename T>
Aligned<T> make_aligned(std::size_t count) {
  return Aligned<T>(static_cast<T*>(::operator new[](count * sizeof(T), std::align_val_t{64})));
}

TAPCT_AVX512 inline __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

}  // namespace tapct

#else
#define TAPCT_HAS_X86 0
#endif

// The few symbols of zlib-ng 2.1 or newer that libblosc2 carries; the blosc2 wheel ships no header
// for them. Source: zlib-ng.h.in of zlib-ng/zlib-ng (Zlib licence), its native ("zng_") interface.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct zng_stream {
  const std::uint8_t* next_in;
  std::uint32_t avail_in;
  std::size_t total_in;
  std::uint8_t* next_out;
  std::uint32_t avail_out;
  std::size_t total_out;
  const char* msg;
  void* state;
  void* (*zalloc)(void*, unsigned int, unsigned int);
  void (*zfree)(void*, void*);
  void* opaque;
  int data_type;
  std::uint32_t adler;
  unsigned long reserved;
};

const char* zlibng_version(void);
std::int32_t zng_inflateInit2(zng_stream* stream, std::int32_t window_bits);
std::int32_t zng_inflate(zng_stream* stream, std::int32_t flush);
std::int32_t zng_inflateReset(zng_stream* stream);
std::int32_t zng_inflateEnd(zng_stream* stream);
std::int32_t zng_deflateInit2(zng_stream* stream, std::int32_t level, std::int32_t method,
                              std::int32_t window_bits, std::int32_t mem_level,
                              std::int32_t strategy);
std::int32_t zng_deflate(zng_stream* stream, std::int32_t flush);
std::int32_t zng_deflateEnd(zng_stream* stream);
std::size_t zng_deflateBound(zng_stream* stream, std::size_t size);
std::uint32_t zng_crc32_z(std::uint32_t crc, const std::uint8_t* bytes, std::size_t size);

}  // extern "C"

namespace tapct::zng {
inline constexpr std::int32_t no_flush = 0;
inline constexpr std::int32_t finish = 4;
inline constexpr std::int32_t ok = 0;
inline constexpr std::int32_t stream_end = 1;
inline constexpr std::int32_t buffer_error = -5;
inline constexpr std::int32_t gzip_window_bits = 15 + 16;
inline constexpr std::int32_t raw_window_bits = -15;
inline constexpr std::int32_t deflated = 8;
inline constexpr std::int32_t memory_level = 8;
inline constexpr std::int32_t default_strategy = 0;
}  // namespace tapct::zng

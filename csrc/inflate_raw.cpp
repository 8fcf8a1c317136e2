#include "tapct/inflate_raw.hpp"

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "tapct/error.hpp"
#include "zlib_ng.hpp"

namespace tapct {
namespace {

constexpr std::int32_t window_bits = -15;                    // negative: no zlib or gzip header
constexpr std::size_t largest_offer = std::size_t{1} << 30;  // avail_in is 32 bits wide

std::uint32_t clamp(std::size_t size) {
  return static_cast<std::uint32_t>(std::min(size, largest_offer));
}

}  // namespace

std::vector<std::byte> inflate_raw(std::span<const std::byte> compressed, std::size_t max_size) {
  zng_stream stream{};
  if (zng_inflateInit2(&stream, window_bits) != zng::ok) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<zng_stream, decltype(&zng_inflateEnd)> closer(&stream, &zng_inflateEnd);
  std::vector<std::byte> out;
  std::size_t done = 0;
  std::size_t consumed = 0;
  while (true) {
    if (done == out.size()) {
      if (done > max_size) {
        throw FormatError("file", "inflates to more than any slice of a CT", "limit");
      }
      // One byte beyond the limit proves that it is broken. CT shrinks about twofold.
      out.resize(std::min(std::max(2 * done, 3 * compressed.size()), max_size + 1));
    }
    const std::uint32_t given = clamp(compressed.size() - consumed);
    const std::uint32_t room = clamp(out.size() - done);
    stream.next_in = reinterpret_cast<const std::uint8_t*>(compressed.data() + consumed);
    stream.avail_in = given;
    stream.next_out = reinterpret_cast<std::uint8_t*>(out.data() + done);
    stream.avail_out = room;
    const std::int32_t status = zng_inflate(&stream, zng::no_flush);
    consumed += given - stream.avail_in;
    done += room - stream.avail_out;
    if (status == zng::stream_end) {
      out.resize(done);
      return out;
    }
    if (status != zng::ok && status != zng::buffer_error) {
      throw FormatError("file", "has damaged deflated data");
    }
    if (stream.avail_out != 0 && consumed == compressed.size()) {
      throw FormatError("file", "is cut short: its deflated data do not end");
    }
  }
}

}  // namespace tapct

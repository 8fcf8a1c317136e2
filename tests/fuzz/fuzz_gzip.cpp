// A gzip stream: the index and the order of the members decide the same, whatever the bytes are.
// The first two bytes say how many bytes the stream is to hold.
#include <cstdlib>
#include <cstring>
#include <vector>

#include "tapct/error.hpp"
#include "tapct/inflate.hpp"

namespace {

bool is_read(std::span<const std::byte> stream, std::vector<std::byte>& out, std::size_t threads) {
  try {
    tapct::inflate_exactly(stream, out, threads);
    return true;
  } catch (const tapct::FormatError&) {
    return false;
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < 2) {
    return 0;
  }
  std::uint16_t out_size = 0;
  std::memcpy(&out_size, data, sizeof(out_size));
  const auto stream = std::as_bytes(std::span(data + 2, size - 2));
  std::vector<std::byte> in_order(out_size);
  std::vector<std::byte> by_index(out_size);
  const bool is_whole = is_read(stream, in_order, 1);
  if (is_whole != is_read(stream, by_index, 2) || (is_whole && in_order != by_index)) {
    std::abort();
  }
  try {
    tapct::inflate_prefix(stream, in_order);
  } catch (const tapct::FormatError&) {
  }
  return 0;
}

#include "check.hpp"
#include "samples.hpp"
#include "tapct/error.hpp"
#include "tapct/inflate.hpp"

namespace {

using samples::Bytes;
using tapct::FormatError;

Bytes inflate(const Bytes& compressed, std::size_t size) {
  Bytes out(size);
  tapct::inflate_exactly(compressed, out);
  return out;
}

Bytes sample() { return samples::bytes_of(samples::voxels(20000)); }

}  // namespace

TEST(every_compression_level_decodes_exactly) {
  const Bytes data = sample();
  for (const std::int32_t level : {0, 1, 6, 9}) {
    CHECK(inflate(samples::gzip(data, level), data.size()) == data);
  }
}

TEST(members_are_joined) {
  const Bytes data = sample();
  const Bytes more = samples::bytes_of(samples::voxels(333, 2));
  const Bytes stream = samples::join(samples::gzip(data), samples::gzip(more));
  CHECK(inflate(stream, data.size() + more.size()) == samples::join(data, more));
  const Bytes with_empty =
      samples::join(samples::join(samples::gzip({}), stream), samples::gzip({}));
  CHECK(inflate(with_empty, data.size() + more.size()) == samples::join(data, more));
}

TEST(every_truncation_is_an_error) {
  const Bytes data = samples::bytes_of(samples::voxels(400));
  const Bytes whole = samples::join(samples::gzip(data), samples::gzip(data));
  const std::size_t one = samples::gzip(data).size();
  for (std::size_t size = 0; size < whole.size(); ++size) {
    // At the border the first member alone is a whole stream, only too short.
    const char* text = size == one ? "fewer bytes" : "gzip";
    CHECK_THROWS(FormatError, text, inflate(samples::first(whole, size), 2 * data.size()));
  }
}

TEST(every_flipped_bit_of_data_or_trailer_is_an_error) {
  const Bytes data = samples::bytes_of(samples::voxels(400));
  const Bytes whole = samples::gzip(data);
  int num_silent = 0;
  for (std::size_t bit = 10 * 8; bit < whole.size() * 8; ++bit) {
    try {
      // Bits that pad the last byte of deflate data carry nothing; the voxels are then right.
      num_silent += inflate(samples::flipped(whole, bit), data.size()) != data ? 1 : 0;
    } catch (const FormatError&) {
    }
  }
  CHECK(num_silent == 0);
}

TEST(trailing_bytes_are_an_error) {
  const Bytes data = sample();
  const Bytes whole = samples::gzip(data);
  for (const std::size_t count : {1U, 2U, 100U}) {
    const Bytes zeros(count);
    CHECK_THROWS(FormatError, "not gzip", inflate(samples::join(whole, zeros), data.size()));
  }
}

TEST(a_stream_longer_than_declared_is_an_error) {
  const Bytes data = sample();
  const Bytes whole = samples::gzip(data);
  CHECK_THROWS(FormatError, "more bytes", inflate(whole, data.size() - 1));
  CHECK_THROWS(FormatError, "more bytes", inflate(whole, 1));
  CHECK_THROWS(FormatError, "fewer bytes", inflate(whole, data.size() + 1));
  CHECK_THROWS(FormatError, "more bytes",
               inflate(samples::join(whole, samples::gzip(Bytes(1))), data.size()));
}

TEST(a_bomb_writes_no_byte_beyond_its_output) {
  const Bytes bomb = samples::gzip(Bytes(std::size_t{8} << 20));
  CHECK(bomb.size() < 16384);
  Bytes guarded(4096 + 64, std::byte{0x5a});
  CHECK_THROWS(FormatError, "more bytes",
               tapct::inflate_exactly(bomb, std::span(guarded).first(4096)));
  CHECK(std::all_of(guarded.begin() + 4096, guarded.end(),
                    [](std::byte b) { return b == std::byte{0x5a}; }));
  CHECK((std::uint64_t{8} << 20) <= tapct::max_inflated_size(bomb.size()));
  CHECK((std::uint64_t{16} << 20) > tapct::max_inflated_size(bomb.size()));
}

TEST(the_prefix_needs_neither_the_rest_nor_one_member) {
  const Bytes data = sample();
  const Bytes whole = samples::gzip(data);
  Bytes head(544);
  CHECK(tapct::inflate_prefix(samples::first(whole, whole.size() / 2), head) == head.size());
  CHECK(head == samples::first(data, head.size()));
  const Bytes tiny = samples::join(samples::gzip(samples::first(data, 100)), samples::gzip(data));
  CHECK(tapct::inflate_prefix(tiny, head) == head.size());
  CHECK(head == samples::first(samples::join(samples::first(data, 100), data), head.size()));
  CHECK(tapct::inflate_prefix(samples::gzip(samples::first(data, 7)), head) == 7);
  CHECK_THROWS(FormatError, "ends before", tapct::inflate_prefix(samples::first(whole, 60), head));
}

TEST(crc32_is_the_standard_one) {
  const std::string text = "123456789";  // its check value is in every CRC catalogue
  CHECK(tapct::crc32(std::as_bytes(std::span(text))) == 0xcbf43926U);
  const auto bytes = std::as_bytes(std::span(text));
  CHECK(tapct::crc32(bytes.subspan(4), tapct::crc32(bytes.first(4))) == 0xcbf43926U);
}

TEST(the_backend_names_itself) {
  const std::string name = tapct::inflate_backend();
  CHECK(name.starts_with("zlib-ng 2") || name.starts_with("libdeflate "));
}

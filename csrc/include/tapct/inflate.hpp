// gzip streams (RFC 1952) of one or more members, decoded to the end with every CRC and size
// checked.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tapct {

// "libdeflate 1.23" where the build found it, else "zlib-ng 2.3.3" out of libblosc2.
std::string inflate_backend();

bool is_gzip(std::span<const std::byte> head) noexcept;

// The most bytes a gzip stream of this size can decode to: deflate's limit is 1032 to 1
// (https://zlib.net/zlib_tech.html).
std::uint64_t max_inflated_size(std::uint64_t compressed_size) noexcept;

// Decodes the first bytes only and returns how many there were; checks nothing beyond them.
// Throws FormatError("gzip", ...) where the stream is damaged that early.
std::size_t inflate_prefix(std::span<const std::byte> compressed, std::span<std::byte> out);

// Decodes every member and returns how many there were. Throws FormatError("gzip", ...) unless the
// stream is whole, fills `out` exactly, and nothing follows its last member.
//
// With more than one thread, members whose headers state their size (see gzip_index.hpp) are
// decoded in parallel. What is accepted does not depend on the number of threads: where an index
// does not hold in every particular, the stream is decoded again in order, and that decides.
std::size_t inflate_exactly(std::span<const std::byte> compressed, std::span<std::byte> out,
                            std::size_t threads = 1);

// CRC-32 (IEEE 802.3), the checksum of gzip and of Python's zlib.crc32; `crc` continues an earlier
// one.
std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t crc = 0);

}  // namespace tapct

// Where the members of a gzip file lie, as far as their headers say so.
//
// Our writer puts one subfield into the FEXTRA field of every member's header (RFC 1952, 2.3.1.1),
// 12 bytes, numbers little endian:
//
//   bytes 0..1   the subfield's id, "TF"
//   bytes 2..3   8, the length of what follows
//   bytes 4..11  the size of the whole member, from its first header byte to its last trailer byte
//
// BGZF (the SAM specification, 4.1) has "BC", length 2: the member's size less one, 16 bits.
// Readers that know neither skip the field, as RFC 1952 demands.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tapct {

// Stored header of our members: 10 bytes, XLEN, the subfield.
inline constexpr std::size_t indexed_header_bytes = 24;
inline constexpr std::size_t gzip_trailer_bytes = 8;

struct GzipMember {
  std::span<const std::byte> compressed;  // the whole member
  std::size_t out_offset = 0;
  std::size_t out_size = 0;  // by its trailer
};

// Walks from header to header without decoding. Empty unless every member states its size, the
// sizes end with the file, and the trailers add up to `out_size`. A hint: decoding has to agree.
std::vector<GzipMember> gzip_index(std::span<const std::byte> compressed, std::size_t out_size);

// Writes the header of a member of `member_size` bytes in all.
void put_indexed_header(std::span<std::byte, indexed_header_bytes> header,
                        std::uint64_t member_size);

}  // namespace tapct

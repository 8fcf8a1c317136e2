#include "tapct/gzip_index.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#include "tapct/inflate.hpp"

namespace tapct {
namespace {

constexpr std::size_t fixed_header_bytes = 10;
constexpr std::byte flag_extra{4};
constexpr std::size_t max_members = std::size_t{1} << 20;  // BGZF has one for every 64 KiB

template <typename T>
T little(std::span<const std::byte> bytes, std::size_t offset) {
  T value;
  std::memcpy(&value, bytes.subspan(offset, sizeof(T)).data(), sizeof(T));
  return value;
}

// The size that a member's own header states, 0 where it states none.
std::uint64_t stated_size(std::span<const std::byte> member) {
  if (member.size() < fixed_header_bytes + 2 || !is_gzip(member) ||
      (member[3] & flag_extra) == std::byte{0}) {
    return 0;
  }
  const std::size_t extra_size = little<std::uint16_t>(member, fixed_header_bytes);
  auto extra = member.subspan(fixed_header_bytes + 2);
  extra = extra.first(std::min(extra.size(), extra_size));
  while (extra.size() >= 4) {
    const char first = static_cast<char>(extra[0]);
    const char second = static_cast<char>(extra[1]);
    const std::size_t length = little<std::uint16_t>(extra, 2);
    if (length > extra.size() - 4) {
      return 0;
    }
    if (first == 'T' && second == 'F' && length == 8) {
      return little<std::uint64_t>(extra, 4);
    }
    if (first == 'B' && second == 'C' && length == 2) {
      return std::uint64_t{little<std::uint16_t>(extra, 4)} + 1;
    }
    extra = extra.subspan(4 + length);
  }
  return 0;
}

}  // namespace

std::vector<GzipMember> gzip_index(std::span<const std::byte> compressed, std::size_t out_size) {
  std::vector<GzipMember> members;
  std::size_t out_offset = 0;
  while (!compressed.empty()) {
    const std::uint64_t size = stated_size(compressed);
    if (size < fixed_header_bytes + gzip_trailer_bytes || size > compressed.size() ||
        members.size() == max_members) {
      return {};
    }
    const auto member = compressed.first(static_cast<std::size_t>(size));
    const std::size_t produced = little<std::uint32_t>(member, member.size() - 4);
    if (produced > out_size - out_offset) {
      return {};
    }
    members.push_back({member, out_offset, produced});
    out_offset += produced;
    compressed = compressed.subspan(member.size());
  }
  if (out_offset != out_size) {
    return {};
  }
  return members;
}

void put_indexed_header(std::span<std::byte, indexed_header_bytes> header,
                        std::uint64_t member_size) {
  // No time and an unknown system: equal input, equal file.
  constexpr std::array<unsigned char, 16> fixed{0x1f, 0x8b, 8,  4, 0,   0,   0, 0,
                                                0,    255,  12, 0, 'T', 'F', 8, 0};
  std::memcpy(header.data(), fixed.data(), fixed.size());
  std::memcpy(header.data() + fixed.size(), &member_size, sizeof(member_size));
}

}  // namespace tapct

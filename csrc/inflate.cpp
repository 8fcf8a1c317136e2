#include "tapct/inflate.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>

#include "tapct/error.hpp"
#include "tapct/gzip_index.hpp"
#include "tapct/parallel.hpp"
#include "zlib_ng.hpp"

#ifdef TAPCT_HAS_LIBDEFLATE
#include <libdeflate.h>
#endif

namespace tapct {
namespace {

constexpr std::size_t smallest_member = 18;  // header 10, trailer 8

const std::uint8_t* as_u8(const std::byte* bytes) {
  return reinterpret_cast<const std::uint8_t*>(bytes);
}

[[noreturn]] void damaged() {
  throw FormatError("gzip", "the compressed data is damaged; copy the file again from its source");
}

[[noreturn]] void truncated() {
  throw FormatError("gzip", "the file ends before its data; copy it again from its source");
}

[[noreturn]] void too_short() {
  throw FormatError("gzip", "the stream holds fewer bytes than the header declares");
}

[[noreturn]] void too_long() {
  throw FormatError("gzip", "the stream holds more bytes than the header declares");
}

void check_ends_with_member(std::span<const std::byte> rest) {
  if (!rest.empty() && !is_gzip(rest)) {
    throw FormatError("gzip", "bytes that are not gzip follow the compressed data");
  }
}

// Pulls bytes out of a gzip stream, across members.
class GzipReader {
 public:
  explicit GzipReader(std::span<const std::byte> compressed) : input_(compressed) {
    // zlib-ng keeps its interface within a major version; another major needs zlib_ng.hpp checked.
    if (zlibng_version()[0] != '2' ||
        zng_inflateInit2(&stream_, zng::gzip_window_bits) != zng::ok) {
      throw std::bad_alloc();
    }
  }
  ~GzipReader() { zng_inflateEnd(&stream_); }
  GzipReader(const GzipReader&) = delete;
  GzipReader& operator=(const GzipReader&) = delete;

  // Fills `out` as far as the stream reaches; fewer bytes come back only when the last member is
  // over.
  std::size_t read(std::span<std::byte> out) {
    std::size_t done = 0;
    while (!finished_) {
      // Keep decoding with no room left: the trailer with CRC and size is read by such a call.
      const std::size_t room = out.size() - done;
      const std::uint32_t offered = clamp(room);
      const std::uint32_t given = clamp(input_.size());
      stream_.next_in = as_u8(input_.data());
      stream_.avail_in = given;
      stream_.next_out = reinterpret_cast<std::uint8_t*>(out.data() + done);
      stream_.avail_out = offered;
      const std::int32_t status = zng_inflate(&stream_, zng::no_flush);
      const std::uint32_t consumed = given - stream_.avail_in;
      const std::uint32_t produced = offered - stream_.avail_out;
      input_ = input_.subspan(consumed);
      done += produced;
      if (status == zng::stream_end) {
        next_member();
      } else if (status != zng::ok && status != zng::buffer_error) {
        damaged();
      } else if (consumed == 0 && produced == 0) {
        if (input_.empty()) {
          truncated();
        }
        return done;  // the caller's buffer is full and the member goes on
      }
    }
    return done;
  }

  bool finished() const noexcept { return finished_; }
  std::size_t num_members() const noexcept { return num_members_; }

 private:
  static std::uint32_t clamp(std::size_t size) {
    constexpr std::size_t largest = std::size_t{1}
                                    << 30;  // avail_in and avail_out are 32 bits wide
    return static_cast<std::uint32_t>(std::min(size, largest));
  }

  void next_member() {
    ++num_members_;
    check_ends_with_member(input_);
    finished_ = input_.empty();
    if (!finished_ && zng_inflateReset(&stream_) != zng::ok) {
      throw std::bad_alloc();
    }
  }

  std::span<const std::byte> input_;
  zng_stream stream_{};
  std::size_t num_members_ = 0;
  bool finished_ = false;
};

}  // namespace

bool is_gzip(std::span<const std::byte> head) noexcept {
  return head.size() >= 3 && head[0] == std::byte{0x1f} && head[1] == std::byte{0x8b} &&
         head[2] == std::byte{8};
}

std::uint64_t max_inflated_size(std::uint64_t compressed_size) noexcept {
  constexpr std::uint64_t ratio = 1032;
  constexpr std::uint64_t largest = std::numeric_limits<std::uint64_t>::max();
  return compressed_size > largest / ratio ? largest : compressed_size * ratio;
}

std::size_t inflate_prefix(std::span<const std::byte> compressed, std::span<std::byte> out) {
  return GzipReader(compressed).read(out);
}

#ifdef TAPCT_HAS_LIBDEFLATE

std::string inflate_backend() { return "libdeflate " LIBDEFLATE_VERSION_STRING; }

std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t crc) {
  return libdeflate_crc32(crc, bytes.data(), bytes.size());
}

namespace {

std::size_t inflate_in_order(std::span<const std::byte> compressed, std::span<std::byte> out) {
  const std::unique_ptr<libdeflate_decompressor, decltype(&libdeflate_free_decompressor)>
      decompressor(libdeflate_alloc_decompressor(), &libdeflate_free_decompressor);
  if (!decompressor) {
    throw std::bad_alloc();
  }
  std::size_t num_members = 0;
  do {
    if (compressed.size() < smallest_member) {
      truncated();
    }
    std::size_t consumed = 0;
    std::size_t produced = 0;
    switch (libdeflate_gzip_decompress_ex(decompressor.get(), compressed.data(), compressed.size(),
                                          out.data(), out.size(), &consumed, &produced)) {
      case LIBDEFLATE_SUCCESS:
        break;
      case LIBDEFLATE_INSUFFICIENT_SPACE:
        too_long();
      default:
        damaged();  // libdeflate reports a cut stream the same way
    }
    compressed = compressed.subspan(consumed);
    out = out.subspan(produced);
    ++num_members;
    check_ends_with_member(compressed);
  } while (!compressed.empty());
  if (!out.empty()) {
    too_short();
  }
  return num_members;
}

}  // namespace

#else

std::string inflate_backend() { return std::string("zlib-ng ") + zlibng_version(); }

std::uint32_t crc32(std::span<const std::byte> bytes, std::uint32_t crc) {
  return zng_crc32_z(crc, as_u8(bytes.data()), bytes.size());
}

namespace {

std::size_t inflate_in_order(std::span<const std::byte> compressed, std::span<std::byte> out) {
  if (compressed.size() < smallest_member) {
    truncated();
  }
  GzipReader reader(compressed);
  const std::size_t produced = reader.read(out);
  if (produced < out.size()) {
    too_short();
  }
  if (!reader.finished()) {
    too_long();
  }
  return reader.num_members();
}

}  // namespace

#endif

std::size_t inflate_exactly(std::span<const std::byte> compressed, std::span<std::byte> out,
                            std::size_t threads) {
  const auto members = threads > 1 ? gzip_index(compressed, out.size()) : std::vector<GzipMember>{};
  if (members.size() < 2) {
    return inflate_in_order(compressed, out);
  }
  std::atomic<bool> holds{true};
  parallel_for(members.size(), threads, [&](std::size_t i) {
    const GzipMember& member = members[i];
    try {
      // One member that ends where the index says, and fills what the index says.
      if (!holds || inflate_in_order(member.compressed,
                                     out.subspan(member.out_offset, member.out_size)) != 1) {
        holds = false;
      }
    } catch (const FormatError&) {
      holds = false;
    }
  });
  return holds ? members.size() : inflate_in_order(compressed, out);
}

}  // namespace tapct

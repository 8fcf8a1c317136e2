#include "tapct/deflate.hpp"

#include <fcntl.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <vector>

#include "tapct/buffer.hpp"
#include "tapct/gzip_index.hpp"
#include "tapct/inflate.hpp"
#include "tapct/parallel.hpp"
#include "zlib_ng.hpp"

#ifdef TAPCT_HAS_LIBDEFLATE
#include <libdeflate.h>
#endif

namespace tapct {
namespace {

constexpr std::size_t member_bytes = std::size_t{8} << 20;

#ifdef TAPCT_HAS_LIBDEFLATE

// A raw deflate stream behind the room for the header, with room for the trailer.
Buffer deflate(std::span<const std::byte> data, int level, std::size_t& size) {
  const std::unique_ptr<libdeflate_compressor, decltype(&libdeflate_free_compressor)> compressor(
      libdeflate_alloc_compressor(level), &libdeflate_free_compressor);
  if (!compressor) {
    throw std::bad_alloc();
  }
  const std::size_t bound = libdeflate_deflate_compress_bound(compressor.get(), data.size());
  Buffer out(indexed_header_bytes + bound + gzip_trailer_bytes);
  size = libdeflate_deflate_compress(compressor.get(), data.data(), data.size(),
                                     out.span().data() + indexed_header_bytes, bound);
  if (size == 0) {
    throw std::logic_error("libdeflate: the bound was too small");
  }
  return out;
}

#else

Buffer deflate(std::span<const std::byte> data, int level, std::size_t& size) {
  zng_stream stream{};
  if (zlibng_version()[0] != '2' ||
      zng_deflateInit2(&stream, level, zng::deflated, zng::raw_window_bits, zng::memory_level,
                       zng::default_strategy) != zng::ok) {
    throw std::bad_alloc();
  }
  const std::unique_ptr<zng_stream, decltype(&zng_deflateEnd)> ended(&stream, &zng_deflateEnd);
  const std::size_t bound = zng_deflateBound(&stream, data.size());
  Buffer out(indexed_header_bytes + bound + gzip_trailer_bytes);
  stream.next_in = reinterpret_cast<const std::uint8_t*>(data.data());
  stream.avail_in = static_cast<std::uint32_t>(data.size());
  stream.next_out = reinterpret_cast<std::uint8_t*>(out.span().data() + indexed_header_bytes);
  stream.avail_out = static_cast<std::uint32_t>(bound);
  if (zng_deflate(&stream, zng::finish) != zng::stream_end) {
    throw std::logic_error("zlib-ng: the bound was too small");
  }
  size = stream.total_out;
  return out;
}

#endif

Buffer make_member(std::span<const std::byte> data, int level) {
  std::size_t deflated_size = 0;
  Buffer member = deflate(data, level, deflated_size);
  const std::size_t size = indexed_header_bytes + deflated_size + gzip_trailer_bytes;
  put_indexed_header(member.span().first<indexed_header_bytes>(), size);
  const std::uint32_t crc = crc32(data);
  const auto data_size = static_cast<std::uint32_t>(data.size());
  std::byte* const trailer = member.span().data() + size - gzip_trailer_bytes;
  std::memcpy(trailer, &crc, sizeof(crc));
  std::memcpy(trailer + sizeof(crc), &data_size, sizeof(data_size));
  member.shrink(size);
  return member;
}

class NewFile {
 public:
  explicit NewFile(const std::string& path)
      : descriptor_(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
    check(descriptor_ >= 0);
  }
  ~NewFile() {
    if (descriptor_ >= 0) {
      ::close(descriptor_);
    }
  }
  NewFile(const NewFile&) = delete;
  NewFile& operator=(const NewFile&) = delete;

  void append(std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
      if (count < 0 && errno == EINTR) {
        continue;
      }
      check(count >= 0);
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
  }

  // A network file system reports here what it could not store.
  void close() {
    const int status = ::close(descriptor_);
    descriptor_ = -1;
    check(status == 0);
  }

 private:
  static void check(bool is_good) {
    if (!is_good) {
      throw std::system_error(errno, std::generic_category(), "write");
    }
  }

  int descriptor_;
};

}  // namespace

void write_gzip(const std::string& path, std::span<const std::byte> head,
                std::span<const std::byte> body, int level, std::size_t threads) {
  NewFile file(path);
  file.append(make_member(head, level).span());
  // As many members at a time as there are threads: the rest of the file needs no memory.
  const std::size_t at_once = std::max<std::size_t>(threads, 1);
  while (!body.empty()) {
    const std::size_t left = (body.size() + member_bytes - 1) / member_bytes;
    std::vector<Buffer> members(std::min(at_once, left));
    parallel_for(members.size(), threads, [&](std::size_t i) {
      const auto rest = body.subspan(i * member_bytes);
      members[i] = make_member(rest.first(std::min(rest.size(), member_bytes)), level);
    });
    for (const Buffer& member : members) {
      file.append(member.span());
    }
    body = body.subspan(std::min(body.size(), members.size() * member_bytes));
  }
  file.close();
}

}  // namespace tapct

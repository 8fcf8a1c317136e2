// Inputs made by formula: noise, gzip members, NIfTI files, and a folder that is removed at the
// end.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "zlib_ng.hpp"

namespace samples {

using Bytes = std::vector<std::byte>;

// A smooth ramp with noise, as a CT compresses.
inline std::vector<std::int16_t> voxels(std::size_t count, std::uint32_t seed = 1) {
  std::mt19937 random(seed);
  std::vector<std::int16_t> out(count);
  for (std::size_t i = 0; i < count; ++i) {
    out[i] = static_cast<std::int16_t>(static_cast<int>(i / 7 % 2000) - 1000 +
                                       static_cast<int>(random() % 32));
  }
  return out;
}

inline Bytes bytes_of(const std::vector<std::int16_t>& values) {
  Bytes out(values.size() * sizeof(std::int16_t));
  std::memcpy(out.data(), values.data(), out.size());
  return out;
}

// One gzip member.
inline Bytes gzip(const Bytes& data, std::int32_t level = 6) {
  zng_stream stream{};
  using namespace tapct::zng;
  if (zng_deflateInit2(&stream, level, deflated, gzip_window_bits, memory_level,
                       default_strategy) != ok) {
    throw std::runtime_error("deflateInit2");
  }
  Bytes out(zng_deflateBound(&stream, data.size()) + 32);
  stream.next_in = reinterpret_cast<const std::uint8_t*>(data.data());
  stream.avail_in = static_cast<std::uint32_t>(data.size());
  stream.next_out = reinterpret_cast<std::uint8_t*>(out.data());
  stream.avail_out = static_cast<std::uint32_t>(out.size());
  const std::int32_t status = zng_deflate(&stream, finish);
  out.resize(stream.total_out);
  zng_deflateEnd(&stream);
  if (status != 1) {
    throw std::runtime_error("deflate");
  }
  return out;
}

inline Bytes join(const Bytes& a, const Bytes& b) {
  Bytes out = a;
  out.insert(out.end(), b.begin(), b.end());
  return out;
}

inline Bytes first(const Bytes& bytes, std::size_t size) {
  return Bytes(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(size));
}

inline Bytes flipped(Bytes bytes, std::size_t bit) {
  bytes[bit / 8] ^= static_cast<std::byte>(1U << bit % 8);
  return bytes;
}

// Writes `value` into `bytes` at `offset` in either byte order.
template <typename T>
void put(Bytes& bytes, std::size_t offset, T value, bool big_endian = false) {
  auto raw = std::bit_cast<std::array<std::byte, sizeof(T)>>(value);
  if (big_endian) {
    std::reverse(raw.begin(), raw.end());
  }
  std::memcpy(bytes.data() + offset, raw.data(), raw.size());
}

class Folder {
 public:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tapct-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) {
      throw std::runtime_error("mkdtemp");
    }
    path_ = pattern;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;

  std::string at(const std::string& name) const { return (path_ / name).string(); }

  // Writes over an existing file in place: ext4 waits for the disk when a file is cut to nothing
  // first, and these tests write thousands.
  std::string write(const std::string& name, const Bytes& bytes) const {
    std::ofstream(at(name), std::ios::binary | std::ios::app).close();
    std::fstream file(at(name), std::ios::binary | std::ios::in | std::ios::out);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    file.close();
    std::filesystem::resize_file(at(name), bytes.size());
    return at(name);
  }

 private:
  std::filesystem::path path_;
};

inline Bytes read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  Bytes out(text.size());
  std::memcpy(out.data(), text.data(), text.size());
  return out;
}

}  // namespace samples

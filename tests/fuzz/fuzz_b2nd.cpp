// A store file from memory whose checksums are made right after the mutation: any bytes give a
// StoreError or boxes of the size asked for.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>
#include <system_error>
#include <vector>

#include "tapct/b2nd.hpp"
#include "tapct/box_reader.hpp"
#include "tapct/error.hpp"
#include "tapct/inflate.hpp"

namespace {

using tapct::Zyx;
using Bytes = std::vector<std::byte>;

constexpr Zyx volume_zyx{9, 20, 21};  // ragged in every chunk and block
constexpr std::size_t smallest = tapct::meta_position;
constexpr std::size_t frame_size_at = 16;
constexpr std::size_t chunk_crc32s_at = tapct::meta_position + 284;

// The path of a descriptor of a file that has no name.
std::string path_of(int descriptor) { return "/proc/self/fd/" + std::to_string(descriptor); }

void overwrite(int descriptor, std::span<const std::byte> bytes) {
  if (::ftruncate(descriptor, 0) != 0 ||
      ::pwrite(descriptor, bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    std::abort();
  }
}

std::uint64_t get(std::span<const std::byte> bytes, std::size_t at, std::size_t width) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < width; ++i) {
    value = value << 8 | std::to_integer<std::uint64_t>(bytes[at + i]);
  }
  return value;
}

void put(std::span<std::byte> bytes, std::size_t at, std::uint64_t value, std::size_t width) {
  for (std::size_t i = 0; i < width; ++i) {
    bytes[at + i] = static_cast<std::byte>(value >> 8 * (width - 1 - i));
  }
}

bool lies_inside(const Bytes& file, std::uint64_t offset, std::uint64_t size) {
  return offset <= file.size() && size <= file.size() - offset;
}

std::uint32_t crc32_of(const Bytes& file, std::uint64_t offset, std::uint64_t size) {
  return tapct::crc32(std::span(file).subspan(offset, size));
}

void seal_header(Bytes& file) {
  const std::uint64_t header = get(file, 11, 4);
  const std::uint64_t chunks = get(file, 39, 8);
  if (header < tapct::meta_position || !lies_inside(file, header, chunks)) {
    return;
  }
  put(file, header - 4, 0, 4);
  Bytes rest(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(header));
  rest.insert(rest.end(), file.begin() + static_cast<std::ptrdiff_t>(header + chunks), file.end());
  put(file, header - 4, tapct::crc32(rest), 4);
}

// Makes all checksums right that a reader would get to.
void seal(int descriptor, Bytes& file) {
  put(file, frame_size_at, file.size(), 8);
  seal_header(file);
  overwrite(descriptor, file);
  tapct::Frame frame;
  try {
    frame = tapct::parse_frame(tapct::File(path_of(descriptor)));
  } catch (const tapct::StoreError&) {
    return;
  }
  const std::size_t num_blocks = frame.grid.num_blocks();
  const std::size_t num_chunks = frame.grid.num_chunks();
  std::vector<std::uint32_t> starts(num_blocks + 1);
  for (std::size_t i = 0; i < num_chunks; ++i) {
    const std::uint64_t offset = frame.offsets[i];
    const std::uint64_t size = frame.offsets[i + 1] - offset;
    const std::uint64_t head = std::min<std::uint64_t>(size, frame.grid.head_bytes());
    put(file, chunk_crc32s_at + 4 * i, crc32_of(file, offset, size), 4);
    const std::size_t at = chunk_crc32s_at + 4 * num_chunks + 17 + 4 * i * (1 + num_blocks);
    put(file, at, crc32_of(file, offset, head), 4);
    std::int16_t value = 0;
    try {
      if (size == 0 || !tapct::parse_chunk_head(std::span(file).subspan(offset, head), size,
                                                frame.grid, starts, value)) {
        continue;
      }
    } catch (const tapct::StoreError&) {
      continue;
    }
    for (std::size_t block = 0; block < num_blocks; ++block) {
      put(file, at + 4 * (1 + block),
          crc32_of(file, offset + starts[block], starts[block + 1] - starts[block]), 4);
    }
  }
  seal_header(file);
  overwrite(descriptor, file);
}

// A true file to start from: mutations of nothing would not get past the header.
Bytes sample(bool is_zstd) {
  std::vector<std::int16_t> voxels(
      static_cast<std::size_t>(volume_zyx[0] * volume_zyx[1] * volume_zyx[2]));
  for (std::size_t i = 0; i < voxels.size(); ++i) {
    voxels[i] = static_cast<std::int16_t>(i < 700 ? 5 : (i * 7919 >> 5) % 900);
  }
  char folder[] = "/tmp/fuzz_b2nd.XXXXXX";
  if (::mkdtemp(folder) == nullptr) {
    std::abort();
  }
  const std::string path = std::string(folder) + "/v.b2nd";
  tapct::B2ndOptions options;
  options.codec = is_zstd ? "zstd" : "lz4hc";
  options.clevel = 3;
  options.chunk_zyx = {4, 16, 16};
  options.block_zyx = {2, 8, 8};
  tapct::write_b2nd(path, voxels, volume_zyx, {}, options);
  const tapct::File file(path);
  Bytes bytes(file.size());
  file.read_at(0, bytes);
  ::unlink(path.c_str());
  ::rmdir(folder);
  return bytes;
}

}  // namespace

// Input: one byte that picks the sample and the box, then edits of three bytes: position (of the
// header, the offsets or, with its top bit, anywhere) and the new value.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const Bytes samples[] = {sample(false), sample(true)};
  static const int descriptor = ::memfd_create("fuzz_b2nd", 0);
  if (size < 1 || size > 200) {
    return 0;
  }
  Bytes file = samples[data[0] & 1];
  for (std::size_t i = 1; i + 3 <= size; i += 3) {
    const std::size_t position = std::size_t{data[i]} << 8 | data[i + 1];
    if (position == 0xffff) {
      file.resize(file.size() - std::min<std::size_t>(data[i + 2], file.size() - smallest));
    } else {
      file[position % file.size()] = std::byte{data[i + 2]};
    }
  }
  seal(descriptor, file);
  constexpr Zyx boxes[][2] = {
      {{0, 0, 0}, volume_zyx}, {{3, 7, 9}, {3, 9, 8}}, {{8, 19, 20}, {1, 1, 1}}};
  const bool use_mmap = (data[0] & 2) != 0;
  tapct::BoxReader reader({{"case-1", path_of(descriptor), {}}}, {.use_mmap = use_mmap});
  const std::int64_t index = 0;
  for (const auto& [lo, shape] : boxes) {
    std::vector<std::int16_t> out(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]));
    try {
      reader.read(std::span(&index, 1), std::span(&lo, 1), shape, {.hu = out}, 1);
    } catch (const tapct::StoreError&) {
      if (size == 1) {
        std::abort();  // nothing was edited
      }
    }
  }
  return 0;
}

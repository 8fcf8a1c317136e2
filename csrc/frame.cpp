#include "tapct/frame.hpp"

#include <blosc2.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <memory>
#include <new>

#include "tapct/buffer.hpp"
#include "tapct/error.hpp"
#include "tapct/inflate.hpp"

namespace tapct {
namespace {

using Bytes = std::span<const std::byte>;

[[noreturn]] void damaged(const std::string& what) { throw StoreError(what + " is damaged"); }

std::uint64_t big_endian(Bytes bytes) {
  std::uint64_t value = 0;
  for (const std::byte byte : bytes) {
    value = value << 8 | std::to_integer<std::uint64_t>(byte);
  }
  return value;
}

std::uint32_t little_endian32(const std::byte* bytes) {
  std::uint32_t value = 0;  // blosc2 chunks are little endian, as are all machines built for
  std::memcpy(&value, bytes, sizeof(value));
  return value;
}

// msgpack, only in the widths that every file has.
class Packer {
 public:
  explicit Packer(std::vector<std::byte>& out) : out_(out) {}

  template <typename T>
  void number(T value) {
    for (std::size_t i = sizeof(T); i-- > 0;) {
      out_.push_back(static_cast<std::byte>(value >> 8 * i));
    }
  }
  void byte(int value) { out_.push_back(static_cast<std::byte>(value)); }
  void key(const char* text) {
    byte(0xa0 | static_cast<int>(std::strlen(text)));
    const auto* bytes = reinterpret_cast<const std::byte*>(text);
    out_.insert(out_.end(), bytes, bytes + std::strlen(text));
  }
  void float64(double value) {
    byte(0xcb);
    number(std::bit_cast<std::uint64_t>(value));
  }
  void crc32s(std::span<const std::uint32_t> values) {
    byte(0xc6);
    number(static_cast<std::uint32_t>(values.size() * sizeof(std::uint32_t)));
    for (const std::uint32_t value : values) {
      number(value);
    }
  }

 private:
  std::vector<std::byte>& out_;
};

constexpr std::size_t max_axis = std::size_t{1} << 31;
constexpr std::uint64_t max_voxels = std::uint64_t{1} << 40;
constexpr std::uint64_t max_chunk_bytes = std::uint64_t{1} << 30;

// Positions in the file's header.
constexpr std::size_t header_size_at = 11;
constexpr std::size_t frame_size_at = 16;
constexpr std::size_t cbytes_at = 39;
constexpr std::size_t typesize_at = 48;
constexpr std::size_t metalayers_at = 87;
constexpr std::size_t b2nd_at = 123;
// Positions in the metalayer; the last two depend on the number of chunks.
constexpr std::size_t affine_at = 20;
constexpr std::size_t spacing_at = 176;
constexpr std::size_t hu_range_at = 213;
constexpr std::size_t sha256_at = 235;
constexpr std::size_t chunk_crc32s_at = 284;
constexpr std::size_t meta_fixed_bytes = 317;
constexpr std::size_t trailer_bytes = 35;

std::size_t meta_bytes(std::size_t num_chunks, std::size_t num_blocks) {
  return meta_fixed_bytes + sizeof(std::uint32_t) * num_chunks * (2 + num_blocks);
}

// From the map of metalayers to the start of the shape.
constexpr char metalayers[] =
    "\x93\xcd\x00\x1c\xde\x00\x02\xa4"
    "b2nd\xd2\x00\x00\x00\x76\xa5tapct\xd2\x00\x00\x00\xc3\xdc\x00\x02\xc6\x00\x00\x00\x48"
    "\x97\x00\x03\x93";
constexpr char frame_magic[] =
    "\x9e\xa8"
    "b2frame\0\xd2";
constexpr char dtype[] = "\x00\xdb\x00\x00\x00\x03<i2\xc6";

template <std::size_t N>
bool has(Bytes bytes, std::size_t at, const char (&text)[N]) {
  return std::memcmp(bytes.data() + at, text, N - 1) == 0;
}

// Three numbers, each behind its type byte; returns the position behind them.
std::size_t read_axes(Bytes bytes, std::size_t at, int type, std::size_t width, Zyx& out) {
  for (std::int64_t& size : out) {
    if (std::to_integer<int>(bytes[at]) != type) {
      damaged("the volume file's header");
    }
    const std::uint64_t value = big_endian(bytes.subspan(at + 1, width));
    if (value < 1 || value > max_axis) {
      damaged("the volume file's header");
    }
    size = static_cast<std::int64_t>(value);
    at += 1 + width;
  }
  return at;
}

Grid read_grid(Bytes prefix) {
  Grid grid;
  std::size_t at = read_axes(prefix, b2nd_at + 4, 0xd3, 8, grid.shape_zyx);
  const bool is_split = prefix[at] == std::byte{0x93};
  at = read_axes(prefix, at + 1, 0xd2, 4, grid.chunk_zyx);
  const bool is_split_again = prefix[at] == std::byte{0x93};
  at = read_axes(prefix, at + 1, 0xd2, 4, grid.block_zyx);
  if (!is_split || !is_split_again || !has(prefix, at, dtype)) {
    damaged("the volume file's header");
  }
  std::uint64_t voxels = 1;
  std::uint64_t padded = 1;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    const auto shape = static_cast<std::uint64_t>(grid.shape_zyx[axis]);
    const auto chunk = static_cast<std::uint64_t>(grid.chunk_zyx[axis]);
    const auto block = static_cast<std::uint64_t>(grid.block_zyx[axis]);
    const std::uint64_t extended = (chunk + block - 1) / block * block;
    if (block > chunk || chunk > shape || shape > max_voxels / voxels ||
        extended > max_chunk_bytes / sizeof(std::int16_t) / padded) {
      damaged("the volume file's header");
    }
    voxels *= shape;
    padded *= extended;
  }
  return grid;
}

struct FreeContext {
  void operator()(blosc2_context* context) const noexcept { blosc2_free_ctx(context); }
};

// What libblosc2 may be given: no dictionary, no lazy chunk, no filter but shuffle (others can load
// plug-ins), and sizes that are those of the place where it lies.
bool is_plain_chunk(Bytes chunk, std::uint64_t size, std::uint64_t nbytes, int typesize) {
  const std::byte* c = chunk.data();
  const int codec = std::to_integer<int>(c[BLOSC2_CHUNK_FLAGS]) >> 5;
  const bool is_known_codec =
      codec == BLOSC_BLOSCLZ_FORMAT || codec == BLOSC_LZ4_FORMAT || codec == BLOSC_ZSTD_FORMAT;
  bool has_plain_filters = true;
  for (std::size_t slot = 0; slot < BLOSC2_MAX_FILTERS; ++slot) {
    has_plain_filters &= c[BLOSC2_CHUNK_FILTER_CODES + slot] <= std::byte{BLOSC_SHUFFLE};
  }
  const int flags = std::to_integer<int>(c[BLOSC2_CHUNK_BLOSC2_FLAGS]);
  return is_known_codec && has_plain_filters && (flags & ~0x70) == 0 &&
         c[BLOSC2_CHUNK_BLOSC2_FLAGS2] == std::byte{0} &&
         std::to_integer<int>(c[BLOSC2_CHUNK_TYPESIZE]) == typesize &&
         (std::to_integer<int>(c[BLOSC2_CHUNK_FLAGS]) & 0x05) == 0x05 &&  // the long header
         little_endian32(c + BLOSC2_CHUNK_NBYTES) == nbytes &&
         little_endian32(c + BLOSC2_CHUNK_CBYTES) == size;
}

std::vector<std::uint64_t> read_offsets(Bytes chunk, std::size_t num_chunks,
                                        std::uint64_t chunks_at, std::uint64_t chunks_end) {
  std::vector<std::uint64_t> stored(num_chunks);
  const std::size_t nbytes = num_chunks * sizeof(std::uint64_t);
  if (!is_plain_chunk(chunk, chunk.size(), nbytes, sizeof(std::uint64_t))) {
    damaged("the volume file's list of chunks");
  }
  const std::unique_ptr<blosc2_context, FreeContext> context(
      blosc2_create_dctx(BLOSC2_DPARAMS_DEFAULTS));
  if (!context) {
    throw std::bad_alloc();
  }
  if (blosc2_decompress_ctx(context.get(), chunk.data(), static_cast<std::int32_t>(chunk.size()),
                            stored.data(),
                            static_cast<std::int32_t>(nbytes)) != static_cast<int>(nbytes)) {
    damaged("the volume file's list of chunks");
  }
  // Chunks lie one behind the other in order, so an offset is the end of the chunk before.
  std::vector<std::uint64_t> offsets(num_chunks + 1, chunks_end);
  for (std::size_t i = num_chunks; i-- > 0;) {
    constexpr std::uint64_t zeros = std::uint64_t{0x80 | BLOSC2_SPECIAL_ZERO} << 56;
    if (stored[i] == zeros) {
      offsets[i] = offsets[i + 1];
    } else if (stored[i] < chunks_end - chunks_at &&
               offsets[i + 1] - chunks_at >= chunk_header_bytes + stored[i]) {
      offsets[i] = chunks_at + stored[i];
    } else {
      damaged("the volume file's list of chunks");
    }
  }
  if (offsets[0] != chunks_at) {
    damaged("the volume file's list of chunks");
  }
  return offsets;
}

std::vector<std::uint32_t> read_crc32s(Bytes bytes) {
  std::vector<std::uint32_t> values(bytes.size() / sizeof(std::uint32_t));
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<std::uint32_t>(big_endian(bytes.subspan(4 * i, 4)));
  }
  return values;
}

// Reads the values at their places; that all else is as encode_meta writes it is then one
// comparison.
void read_meta(Bytes bytes, Frame& frame) {
  const std::size_t chunk_bytes = sizeof(std::uint32_t) * frame.grid.num_chunks();
  const std::size_t block_bytes = chunk_bytes * (1 + frame.grid.num_blocks());
  for (std::size_t i = 0; i < 16; ++i) {
    frame.meta.affine[i] =
        std::bit_cast<double>(big_endian(bytes.subspan(affine_at + 9 * i + 1, 8)));
  }
  for (std::size_t i = 0; i < 3; ++i) {
    frame.meta.spacing_mm[i] =
        std::bit_cast<double>(big_endian(bytes.subspan(spacing_at + 9 * i + 1, 8)));
  }
  for (std::size_t i = 0; i < 2; ++i) {
    frame.meta.hu_range[i] =
        static_cast<std::int16_t>(big_endian(bytes.subspan(hu_range_at + 3 * i + 1, 2)));
  }
  std::memcpy(frame.meta.source_sha256.data(), bytes.data() + sha256_at, 32);
  frame.chunk_crc32s = read_crc32s(bytes.subspan(chunk_crc32s_at, chunk_bytes));
  frame.block_crc32s = read_crc32s(bytes.subspan(chunk_crc32s_at + chunk_bytes + 17, block_bytes));
  frame.stored_crc32 = static_cast<std::uint32_t>(big_endian(bytes.last(4)));
  if (!std::ranges::equal(bytes, encode_meta(frame.meta, frame.chunk_crc32s, frame.block_crc32s,
                                             frame.stored_crc32))) {
    damaged("the volume file's metalayer");
  }
}

}  // namespace

Zyx Grid::num_chunks_zyx() const noexcept {
  Zyx out{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    out[axis] = (shape_zyx[axis] + chunk_zyx[axis] - 1) / chunk_zyx[axis];
  }
  return out;
}

Zyx Grid::num_blocks_zyx() const noexcept {
  Zyx out{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    out[axis] = (chunk_zyx[axis] + block_zyx[axis] - 1) / block_zyx[axis];
  }
  return out;
}

std::size_t Grid::num_chunks() const noexcept {
  const Zyx n = num_chunks_zyx();
  return static_cast<std::size_t>(n[0] * n[1] * n[2]);
}

std::size_t Grid::num_blocks() const noexcept {
  const Zyx n = num_blocks_zyx();
  return static_cast<std::size_t>(n[0] * n[1] * n[2]);
}

std::size_t Grid::block_bytes() const noexcept {
  return static_cast<std::size_t>(block_zyx[0] * block_zyx[1] * block_zyx[2]) *
         sizeof(std::int16_t);
}

std::size_t Grid::chunk_bytes() const noexcept { return block_bytes() * num_blocks(); }

std::size_t Grid::head_bytes() const noexcept {
  return chunk_header_bytes + sizeof(std::uint32_t) * num_blocks();
}

std::vector<std::byte> encode_meta(const VolumeMeta& meta,
                                   std::span<const std::uint32_t> chunk_crc32s,
                                   std::span<const std::uint32_t> block_crc32s,
                                   std::uint32_t file_crc32) {
  std::vector<std::byte> out;
  out.reserve(meta_fixed_bytes + 4 * (chunk_crc32s.size() + block_crc32s.size()));
  Packer pack(out);
  pack.byte(0x88);
  pack.key("version");
  pack.byte(2);
  pack.key("affine");
  pack.byte(0xdc);
  pack.number(std::uint16_t{16});
  std::ranges::for_each(meta.affine, [&](double value) { pack.float64(value); });
  pack.key("spacing_mm");
  pack.byte(0x93);
  std::ranges::for_each(meta.spacing_mm, [&](double value) { pack.float64(value); });
  pack.key("hu_range");
  pack.byte(0x92);
  for (const std::int16_t hu : meta.hu_range) {
    pack.byte(0xd1);
    pack.number(static_cast<std::uint16_t>(hu));
  }
  pack.key("source_sha256");
  pack.byte(0xc4);
  pack.byte(32);
  out.insert(out.end(), meta.source_sha256.begin(), meta.source_sha256.end());
  pack.key("chunk_crc32");
  pack.crc32s(chunk_crc32s);
  pack.key("block_crc32");
  pack.crc32s(block_crc32s);
  pack.key("file_crc32");
  pack.byte(0xce);
  pack.number(file_crc32);
  return out;
}

Frame parse_frame(const File& file, bool is_sealed) {
  std::array<std::byte, meta_position> prefix{};
  if (file.read_at(0, prefix) != prefix.size()) {
    damaged("the volume file");
  }
  const Bytes bytes(prefix);
  if (!has(bytes, 0, frame_magic) || !has(bytes, metalayers_at, metalayers) ||
      big_endian(bytes.subspan(typesize_at, 4)) != sizeof(std::int16_t)) {
    damaged("the volume file's header");
  }
  Frame frame;
  frame.grid = read_grid(bytes);
  const Zyx chunks_zyx = frame.grid.num_chunks_zyx();
  std::uint64_t num_chunks = 1;
  const std::uint64_t header_bytes = big_endian(bytes.subspan(header_size_at, 4));
  const std::uint64_t cbytes = big_endian(bytes.subspan(cbytes_at, 8));
  for (const std::int64_t count : chunks_zyx) {
    // Below the file's size: each chunk has checksums there.
    if (static_cast<std::uint64_t>(count) > file.size() / num_chunks) {
      damaged("the volume file's header");
    }
    num_chunks *= static_cast<std::uint64_t>(count);
  }
  const std::uint64_t num_blocks = frame.grid.num_blocks();
  if (num_blocks > file.size() / num_chunks ||
      header_bytes != meta_position + meta_bytes(num_chunks, num_blocks) ||
      bytes[meta_position - 5] != std::byte{0xc6} ||
      big_endian(bytes.last(4)) != header_bytes - meta_position ||
      big_endian(bytes.subspan(frame_size_at, 8)) != file.size() || header_bytes > file.size() ||
      cbytes > file.size() - header_bytes) {
    damaged("the volume file's header");
  }
  const std::uint64_t rest_bytes = file.size() - header_bytes - cbytes;
  if (rest_bytes < trailer_bytes + chunk_header_bytes ||
      rest_bytes > trailer_bytes + chunk_header_bytes + sizeof(std::uint64_t) * num_chunks) {
    damaged("the volume file's header");
  }
  Buffer buffer(static_cast<std::size_t>(header_bytes + rest_bytes));
  const auto header = buffer.span().first(static_cast<std::size_t>(header_bytes));
  const auto rest = buffer.span().subspan(header.size());
  if (file.read_at(0, header) != header.size() ||
      file.read_at(header_bytes + cbytes, rest) != rest.size() ||
      std::memcmp(header.data(), prefix.data(), prefix.size()) != 0) {
    damaged("the volume file");
  }
  read_meta(header.subspan(meta_position), frame);
  const auto stored = header.last(4);
  std::ranges::fill(stored, std::byte{0});
  frame.crc32 = crc32(buffer.span());
  if (is_sealed && frame.crc32 != frame.stored_crc32) {
    damaged("the volume file's header");
  }
  frame.offsets =
      read_offsets(rest.first(rest.size() - trailer_bytes), static_cast<std::size_t>(num_chunks),
                   header_bytes, header_bytes + cbytes);
  return frame;
}

bool parse_chunk_head(std::span<const std::byte> head, std::uint64_t size, const Grid& grid,
                      std::span<std::uint32_t> starts, std::int16_t& value) {
  const std::size_t chunk_bytes = grid.chunk_bytes();
  if (head.size() < chunk_header_bytes || size > chunk_bytes + BLOSC2_MAX_OVERHEAD ||
      !is_plain_chunk(head, size, chunk_bytes, sizeof(std::int16_t)) ||
      little_endian32(head.data() + BLOSC2_CHUNK_BLOCKSIZE) != grid.block_bytes()) {
    damaged("a chunk's header");
  }
  const int special = std::to_integer<int>(head[BLOSC2_CHUNK_BLOSC2_FLAGS]) >> 4;
  if (special == BLOSC2_SPECIAL_VALUE && size == chunk_header_bytes + sizeof(value)) {
    std::memcpy(&value, head.data() + chunk_header_bytes, sizeof(value));
    return false;
  }
  const std::size_t num_blocks = grid.num_blocks();
  const bool is_copy = (std::to_integer<int>(head[BLOSC2_CHUNK_FLAGS]) & BLOSC_MEMCPYED) != 0;
  for (std::size_t block = 0; block < num_blocks; ++block) {
    if (is_copy) {
      starts[block] = static_cast<std::uint32_t>(chunk_header_bytes + block * grid.block_bytes());
    } else if (head.size() == grid.head_bytes()) {
      starts[block] = little_endian32(head.data() + chunk_header_bytes + 4 * block);
    } else {
      damaged("a chunk's header");
    }
  }
  starts[num_blocks] = static_cast<std::uint32_t>(size);
  const std::size_t first = is_copy ? chunk_header_bytes : grid.head_bytes();
  if (special != BLOSC2_NO_SPECIAL || starts[0] != first ||
      (is_copy && size != chunk_header_bytes + chunk_bytes)) {
    damaged("a chunk's header");
  }
  for (std::size_t block = 0; block < num_blocks; ++block) {
    if (starts[block] >= starts[block + 1]) {
      damaged("a chunk's header");
    }
  }
  return true;
}

}  // namespace tapct

// The b2nd files of the store, format version 2: a Blosc2 contiguous frame whose header has one
// fixed form, with a metalayer "tapct" that holds geometry, source and checksums. The frame is
// parsed here, not by libblosc2, so that sizes and offsets are checked before anything follows
// them. Specified byte by byte in docs/store.md.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tapct/file.hpp"

namespace tapct {

using Zyx = std::array<std::int64_t, 3>;

// What a file says about its volume beside the voxels.
struct VolumeMeta {
  std::array<double, 16> affine{};
  std::array<double, 3> spacing_mm{};
  std::array<std::int16_t, 2> hu_range{};
  std::array<std::byte, 32> source_sha256{};
};

// Compression grid of a volume; parse_frame has checked that no product overflows.
struct Grid {
  Zyx shape_zyx{};
  Zyx chunk_zyx{};
  Zyx block_zyx{};

  Zyx num_chunks_zyx() const noexcept;
  Zyx num_blocks_zyx() const noexcept;  // of one chunk
  std::size_t num_chunks() const noexcept;
  std::size_t num_blocks() const noexcept;   // of one chunk
  std::size_t block_bytes() const noexcept;  // decoded, padding included
  std::size_t chunk_bytes() const noexcept;  // decoded, padding included
  std::size_t head_bytes() const noexcept;   // of a compressed chunk: header and block starts
};

inline constexpr std::size_t chunk_header_bytes = 32;

struct Frame {
  Grid grid;
  VolumeMeta meta;
  // Absolute file positions, one more than chunks; a chunk of zeros has no bytes.
  std::vector<std::uint64_t> offsets;
  std::vector<std::uint32_t> chunk_crc32s;
  std::vector<std::uint32_t> block_crc32s;  // per chunk: of its head, then of each block
  std::uint32_t stored_crc32 = 0;           // as the file says
  std::uint32_t crc32 = 0;                  // over all bytes but the chunks, stored_crc32 as zero
};

// Bytes of the metalayer "tapct" of a volume with these counts.
std::vector<std::byte> encode_meta(const VolumeMeta& meta,
                                   std::span<const std::uint32_t> chunk_crc32s,
                                   std::span<const std::uint32_t> block_crc32s,
                                   std::uint32_t file_crc32);

// File position of the metalayer's content in every file.
inline constexpr std::size_t meta_position = 200;

// Reads header, offsets and trailer; checks every size against the file before allocating, and the
// file's own checksum unless it has none yet. Throws StoreError, std::system_error.
Frame parse_frame(const File& file, bool is_sealed = true);

// Checks the first Grid::head_bytes() bytes of a chunk of `size` bytes against the grid and fills
// `starts` (num_blocks + 1). Returns false where the chunk is one repeated value, `value`.
// Throws StoreError.
bool parse_chunk_head(std::span<const std::byte> head, std::uint64_t size, const Grid& grid,
                      std::span<std::uint32_t> starts, std::int16_t& value);

}  // namespace tapct

// Volumes of int16 in Blosc2 b2nd files, with checksums of ours: the format itself has none, and 83
// of 100 flipped bits in an LZ4 file came back as wrong voxels.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "tapct/frame.hpp"

namespace tapct {

struct B2ndOptions {
  std::string codec = "lz4hc";  // or "zstd"
  int clevel = 5;
  Zyx chunk_zyx{16, 128, 128};  // voxels; what one checksum covers and one read brings
  Zyx block_zyx{4, 64, 64};     // voxels; what is decoded alone, 32 KiB to fit the L1 cache
};

std::string blosc2_version();

// Writes `data` (z slowest) to a new file, reads it back and compares every voxel.
// Returns one CRC-32 per compressed chunk and a last one over all other bytes of the file.
// Throws StoreError; std::system_error where the file exists or cannot be created;
// std::invalid_argument for options out of range.
std::vector<std::uint32_t> write_b2nd(const std::string& path, std::span<const std::int16_t> data,
                                      const Zyx& shape_zyx, const VolumeMeta& meta,
                                      const B2ndOptions& options);

}  // namespace tapct

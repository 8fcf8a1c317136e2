// Boxes of many store files, decoded by many threads into memory of the caller.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "tapct/frame.hpp"
#include "tapct/zscore.hpp"

namespace tapct {

// One file, and the checksums an index holds of it: one per chunk and that of the rest, big endian.
// An empty `crc32s` trusts those in the file. The bytes must outlive the reader.
struct StoreCase {
  std::string name;  // for messages
  std::string path;
  std::span<const std::byte> crc32s;
};

struct BoxReaderOptions {
  bool use_mmap = false;       // a file cut short while it is read then ends the process
  std::size_t max_open = 256;  // files kept open
};

// Where boxes go, one behind the other: as int16 HU, or as the bits of bfloat16.
struct BoxOutput {
  std::span<std::int16_t> hu{};
  std::span<std::uint16_t> bf16{};
  ZScore zscore{};
  std::size_t size() const noexcept { return hu.empty() ? bf16.size() : hu.size(); }
};

// Safe to use from many threads. Every compressed byte that is decoded is checked on every read.
class BoxReader {
 public:
  BoxReader(std::vector<StoreCase> cases, const BoxReaderOptions& options);
  ~BoxReader();
  BoxReader(const BoxReader&) = delete;
  BoxReader& operator=(const BoxReader&) = delete;

  // Box i starts at lo_zyx[i] of case cases[i]; all have one shape. Throws StoreError naming the
  // case; std::invalid_argument where the counts do not match or a case does not exist.
  void read(std::span<const std::int64_t> cases, std::span<const Zyx> lo_zyx, const Zyx& shape_zyx,
            const BoxOutput& out, std::size_t num_threads);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tapct

#include "tapct/b2nd.hpp"

#include <b2nd.h>
#include <blosc2.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>

#include "tapct/box_reader.hpp"
#include "tapct/buffer.hpp"
#include "tapct/error.hpp"
#include "tapct/file.hpp"
#include "tapct/inflate.hpp"

namespace tapct {
namespace {

struct FreeArray {
  void operator()(b2nd_array_t* array) const noexcept { b2nd_free(array); }
};
using Array = std::unique_ptr<b2nd_array_t, FreeArray>;

struct FreeB2ndContext {
  void operator()(b2nd_context_t* context) const noexcept { b2nd_free_ctx(context); }
};

void init_blosc2() {
  static std::once_flag once;
  std::call_once(once, blosc2_init);
}

std::int64_t product(const Zyx& shape_zyx) { return shape_zyx[0] * shape_zyx[1] * shape_zyx[2]; }

// libblosc2 reports no reason, and leaks where it cannot create its file.
void check_creatable(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "wbx");
  if (file == nullptr) {
    throw std::system_error(errno, std::generic_category(), "create");
  }
  std::fclose(file);
  std::remove(path.c_str());
}

void write_frame(const std::string& path, std::span<const std::int16_t> data, const Zyx& shape_zyx,
                 const VolumeMeta& meta, const B2ndOptions& options) {
  blosc2_cparams cparams = BLOSC2_CPARAMS_DEFAULTS;  // SHUFFLE in the last filter slot, no DELTA
  cparams.typesize = sizeof(std::int16_t);
  cparams.compcode = options.codec == "zstd" ? BLOSC_ZSTD : BLOSC_LZ4HC;
  cparams.clevel = static_cast<std::uint8_t>(options.clevel);
  cparams.nthreads = 1;  // with more, the order of blocks inside a chunk depends on timing
  blosc2_dparams dparams = BLOSC2_DPARAMS_DEFAULTS;
  std::string urlpath = path;
  blosc2_storage storage = BLOSC2_STORAGE_DEFAULTS;
  storage.contiguous = true;
  storage.urlpath = urlpath.data();
  storage.cparams = &cparams;
  storage.dparams = &dparams;
  std::array<std::int32_t, 3> chunk{};
  std::array<std::int32_t, 3> block{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    // A chunk larger than a small volume would be mostly padding.
    chunk[axis] = static_cast<std::int32_t>(std::min(options.chunk_zyx[axis], shape_zyx[axis]));
    block[axis] = std::min(static_cast<std::int32_t>(options.block_zyx[axis]), chunk[axis]);
  }
  // The checksums are known only after writing; their space is not.
  const Grid grid{shape_zyx, {chunk[0], chunk[1], chunk[2]}, {block[0], block[1], block[2]}};
  const std::vector<std::uint32_t> unknown(grid.num_chunks() * (1 + grid.num_blocks()));
  auto content = encode_meta(meta, std::span(unknown).first(grid.num_chunks()), unknown, 0);
  std::string name = "tapct";
  const blosc2_metalayer metalayer{name.data(), reinterpret_cast<std::uint8_t*>(content.data()),
                                   static_cast<std::int32_t>(content.size())};
  const std::unique_ptr<b2nd_context_t, FreeB2ndContext> context(
      b2nd_create_ctx(&storage, 3, shape_zyx.data(), chunk.data(), block.data(), "<i2",
                      DTYPE_NUMPY_FORMAT, &metalayer, 1));
  b2nd_array_t* written = nullptr;
  const int status = context ? b2nd_from_cbuffer(context.get(), &written, data.data(),
                                                 static_cast<std::int64_t>(data.size_bytes()))
                             : BLOSC2_ERROR_FAILURE;
  const Array array(written);
  if (status != BLOSC2_ERROR_SUCCESS) {
    throw StoreError("the volume could not be written; is the disk full?");
  }
}

// Writes over bytes of a file that exists.
void overwrite(const std::string& path, std::size_t offset, std::span<const std::byte> bytes) {
  std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
  file.seekp(static_cast<std::streamoff>(offset));
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (!file) {
    throw StoreError("the volume could not be written; is the disk full?");
  }
}

// Fills in the checksums of a written frame; returns those of the chunks and of the rest.
std::vector<std::uint32_t> seal(const std::string& path) {
  const File file(path);
  Frame frame = parse_frame(file, /*is_sealed=*/false);
  const std::size_t num_blocks = frame.grid.num_blocks();
  Buffer chunk;
  std::vector<std::uint32_t> starts(num_blocks + 1);
  for (std::size_t i = 0; i < frame.chunk_crc32s.size(); ++i) {
    const auto size = static_cast<std::size_t>(frame.offsets[i + 1] - frame.offsets[i]);
    if (chunk.size() < size) {
      chunk = Buffer(size);
    }
    const std::span<const std::byte> bytes = chunk.span().first(size);
    if (file.read_at(frame.offsets[i], chunk.span().first(size)) != size) {
      throw StoreError("the volume could not be read back; check the disk");
    }
    if (size == 0) {
      continue;  // a chunk of zeros
    }
    const auto head = bytes.first(std::min(size, frame.grid.head_bytes()));
    std::uint32_t* block_crc32s = frame.block_crc32s.data() + i * (1 + num_blocks);
    frame.chunk_crc32s[i] = crc32(bytes);
    block_crc32s[0] = crc32(head);
    std::int16_t value = 0;
    if (parse_chunk_head(head, size, frame.grid, starts, value)) {
      for (std::size_t block = 0; block < num_blocks; ++block) {
        block_crc32s[1 + block] =
            crc32(bytes.subspan(starts[block], starts[block + 1] - starts[block]));
      }
    }
  }
  overwrite(path, meta_position,
            encode_meta(frame.meta, frame.chunk_crc32s, frame.block_crc32s, 0));
  const std::uint32_t file_crc32 = parse_frame(file, /*is_sealed=*/false).crc32;
  overwrite(path, meta_position,
            encode_meta(frame.meta, frame.chunk_crc32s, frame.block_crc32s, file_crc32));
  std::vector<std::uint32_t> crc32s = std::move(frame.chunk_crc32s);
  crc32s.push_back(file_crc32);
  return crc32s;
}

void check_options(std::span<const std::int16_t> data, const Zyx& shape_zyx,
                   const B2ndOptions& options) {
  std::int64_t chunk_voxels = 1;
  for (std::size_t axis = 0; axis < 3; ++axis) {
    constexpr std::int64_t largest = 1 << 16;
    const std::int64_t chunk = options.chunk_zyx[axis];
    const std::int64_t block = options.block_zyx[axis];
    if (shape_zyx[axis] < 1 || block < 1 || chunk < block || chunk > largest) {
      throw std::invalid_argument("write_b2nd: sizes must be 1 <= block <= chunk <= 65536");
    }
    chunk_voxels *= chunk;
  }
  if (chunk_voxels > std::int64_t{1} << 29) {
    throw std::invalid_argument("write_b2nd: a chunk must stay below 1 GiB");
  }
  if (static_cast<std::int64_t>(data.size()) != product(shape_zyx)) {
    throw std::invalid_argument("write_b2nd: data does not have the shape's size");
  }
  if (options.codec != "lz4hc" && options.codec != "zstd") {
    throw std::invalid_argument("write_b2nd: codec must be lz4hc or zstd");
  }
  if (options.clevel < 1 || options.clevel > 9) {
    throw std::invalid_argument("write_b2nd: clevel must be from 1 to 9");
  }
}

}  // namespace

std::string blosc2_version() { return blosc2_get_version_string(); }

std::vector<std::uint32_t> write_b2nd(const std::string& path, std::span<const std::int16_t> data,
                                      const Zyx& shape_zyx, const VolumeMeta& meta,
                                      const B2ndOptions& options) {
  init_blosc2();
  check_options(data, shape_zyx, options);
  check_creatable(path);
  write_frame(path, data, shape_zyx, meta, options);
  std::vector<std::uint32_t> crc32s = seal(path);

  // Compare slab by slab, so that packing needs no second volume in memory. Reason: blosc2 4.14.1
  // wrote wrong ragged last chunks with another filter pipeline, without an error.
  BoxReader reader({{"the volume", path, {}}}, {});
  const std::int64_t slice = shape_zyx[1] * shape_zyx[2];
  std::vector<std::int16_t> slab;
  for (std::int64_t z = 0; z < shape_zyx[0]; z += options.chunk_zyx[0]) {
    const std::int64_t depth = std::min(options.chunk_zyx[0], shape_zyx[0] - z);
    slab.resize(static_cast<std::size_t>(depth * slice));
    const std::int64_t index = 0;
    const Zyx lo{z, 0, 0};
    reader.read(std::span(&index, 1), std::span(&lo, 1), {depth, shape_zyx[1], shape_zyx[2]},
                {.hu = slab}, 1);
    if (std::memcmp(slab.data(), data.data() + z * slice, slab.size() * sizeof(std::int16_t)) !=
        0) {
      throw StoreError("the written volume reads back differently; check the disk and pack again");
    }
  }
  return crc32s;
}

}  // namespace tapct

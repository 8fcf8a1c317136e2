#include "tapct/b2nd.hpp"

#include <b2nd.h>
#include <blosc2.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <system_error>

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

struct FreeContext {
  void operator()(blosc2_context* context) const noexcept { blosc2_free_ctx(context); }
};
using Context = std::unique_ptr<blosc2_context, FreeContext>;

struct FreeB2ndContext {
  void operator()(b2nd_context_t* context) const noexcept { b2nd_free_ctx(context); }
};

void init_blosc2() {
  static std::once_flag once;
  std::call_once(once, blosc2_init);
}

[[noreturn]] void damaged(const std::string& what) { throw StoreError(what + " is damaged"); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t product(const Zyx& shape_zyx) { return shape_zyx[0] * shape_zyx[1] * shape_zyx[2]; }

std::uint64_t big_endian(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (const std::byte byte : bytes) {
    value = value << 8 | std::to_integer<std::uint64_t>(byte);
  }
  return value;
}

// CRC over a frame's header and over its trailing offsets and trailer: all bytes but the chunks.
// Field positions: README_CFRAME_FORMAT.rst of Blosc/c-blosc2.
std::uint32_t frame_crc32(const std::string& path) {
  const File file(path);
  constexpr std::size_t fixed_bytes = 47;
  std::array<std::byte, fixed_bytes> fixed{};
  if (file.read_at(0, fixed) != fixed.size()) {
    damaged("the volume file");
  }
  const std::uint64_t header_bytes = big_endian(std::span(fixed).subspan(11, 4));
  const std::uint64_t frame_bytes = big_endian(std::span(fixed).subspan(16, 8));
  const std::uint64_t chunk_bytes = big_endian(std::span(fixed).subspan(39, 8));
  constexpr std::uint64_t largest_rest = std::uint64_t{64} << 20;  // 8 bytes per chunk in truth
  if (frame_bytes != file.size() || header_bytes < fixed_bytes || header_bytes > file.size() ||
      chunk_bytes > file.size() - header_bytes || file.size() - chunk_bytes > largest_rest) {
    damaged("the volume file's header");
  }
  Buffer rest(static_cast<std::size_t>(file.size() - chunk_bytes));
  const auto header = rest.span().first(static_cast<std::size_t>(header_bytes));
  const auto trailer = rest.span().subspan(header.size());
  if (file.read_at(0, header) != header.size() ||
      file.read_at(header_bytes + chunk_bytes, trailer) != trailer.size()) {
    damaged("the volume file");
  }
  return crc32(rest.span());
}

// A compressed chunk as it lies in the file.
class Chunk {
 public:
  Chunk(blosc2_schunk* schunk, std::int64_t index) {
    size_ = blosc2_schunk_get_chunk(schunk, index, &bytes_, &owned_);
    if (size_ < BLOSC_EXTENDED_HEADER_LENGTH) {
      release();
      damaged("chunk " + std::to_string(index));
    }
  }
  ~Chunk() { release(); }
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;

  const std::uint8_t* bytes() const noexcept { return bytes_; }
  std::int32_t size() const noexcept { return size_; }

  // A chunk of zeros has no bytes in the file, only a mark in the offsets, which frame_crc32
  // covers.
  std::uint32_t crc() const {
    const int special = bytes_[BLOSC2_CHUNK_BLOSC2_FLAGS] >> 4 & BLOSC2_SPECIAL_MASK;
    if (special != BLOSC2_NO_SPECIAL && special != BLOSC2_SPECIAL_VALUE) {
      return 0;
    }
    return crc32(std::as_bytes(std::span(bytes_, static_cast<std::size_t>(size_))));
  }

 private:
  void release() noexcept {
    if (owned_) {
      std::free(bytes_);
    }
  }
  std::uint8_t* bytes_ = nullptr;
  bool owned_ = false;
  std::int32_t size_ = 0;
};

Array open_array(const std::string& path) {
  b2nd_array_t* opened = nullptr;
  const int status = b2nd_open(path.c_str(), &opened);
  Array array(opened);
  if (status != BLOSC2_ERROR_SUCCESS || !array || array->ndim != 3 || array->sc->typesize != 2) {
    damaged("the volume file");
  }
  return array;
}

// Decodes the blocks of a chunk which a box touches and copies the box's part of them.
class ChunkDecoder {
 public:
  explicit ChunkDecoder(const b2nd_array_t& array)
      : chunk_items_(static_cast<std::size_t>(array.extchunknitems)),
        decoded_(std::make_unique_for_overwrite<std::int16_t[]>(chunk_items_)) {
    std::copy_n(array.blockshape, 3, block_zyx_.begin());
    for (std::size_t axis = 0; axis < 3; ++axis) {
      num_blocks_zyx_[axis] = array.extchunkshape[axis] / block_zyx_[axis];
    }
    masked_ = std::make_unique<bool[]>(static_cast<std::size_t>(product(num_blocks_zyx_)));
    blosc2_dparams parameters = BLOSC2_DPARAMS_DEFAULTS;
    context_.reset(blosc2_create_dctx(parameters));
    if (!context_) {
      throw std::bad_alloc();
    }
  }

  // [lo, hi) is the part of the box inside the chunk, in chunk voxels; `out` is where its first
  // voxel goes, in rows of `row` and slices of `slice` voxels.
  void copy_box(const Chunk& chunk, const Zyx& lo, const Zyx& hi, std::int16_t* out,
                std::int64_t row, std::int64_t slice) {
    Zyx first{};
    Zyx last{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      first[axis] = lo[axis] / block_zyx_[axis];
      last[axis] = ceil_div(hi[axis], block_zyx_[axis]);
    }
    const auto num_blocks = static_cast<std::size_t>(product(num_blocks_zyx_));
    std::fill_n(masked_.get(), num_blocks, true);
    for_blocks(first, last, [&](const Zyx&, std::size_t index) { masked_[index] = false; });
    if (blosc2_set_maskout(context_.get(), masked_.get(), static_cast<int>(num_blocks)) != 0 ||
        blosc2_decompress_ctx(context_.get(), chunk.bytes(), chunk.size(), decoded_.get(),
                              static_cast<std::int32_t>(chunk_items_ * sizeof(std::int16_t))) < 0) {
      damaged("a chunk");
    }
    for_blocks(first, last, [&](const Zyx& block, std::size_t index) {
      copy_block(block, index, lo, hi, out, row, slice);
    });
  }

 private:
  template <typename Visit>
  void for_blocks(const Zyx& first, const Zyx& last, Visit visit) const {
    for (std::int64_t z = first[0]; z < last[0]; ++z) {
      for (std::int64_t y = first[1]; y < last[1]; ++y) {
        for (std::int64_t x = first[2]; x < last[2]; ++x) {
          const std::int64_t index = (z * num_blocks_zyx_[1] + y) * num_blocks_zyx_[2] + x;
          visit(Zyx{z, y, x}, static_cast<std::size_t>(index));
        }
      }
    }
  }

  void copy_block(const Zyx& block, std::size_t index, const Zyx& lo, const Zyx& hi,
                  std::int16_t* out, std::int64_t row, std::int64_t slice) const {
    const auto block_items = product(block_zyx_);
    const std::int16_t* voxels = decoded_.get() + static_cast<std::int64_t>(index) * block_items;
    Zyx begin{};
    Zyx end{};
    Zyx origin{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      origin[axis] = block[axis] * block_zyx_[axis];
      begin[axis] = std::max(lo[axis], origin[axis]);
      end[axis] = std::min(hi[axis], origin[axis] + block_zyx_[axis]);
    }
    for (std::int64_t z = begin[0]; z < end[0]; ++z) {
      for (std::int64_t y = begin[1]; y < end[1]; ++y) {
        const std::int64_t from =
            ((z - origin[0]) * block_zyx_[1] + (y - origin[1])) * block_zyx_[2] +
            (begin[2] - origin[2]);
        const std::int64_t to = (z - lo[0]) * slice + (y - lo[1]) * row + (begin[2] - lo[2]);
        std::copy_n(voxels + from, end[2] - begin[2], out + to);
      }
    }
  }

  std::size_t chunk_items_;
  std::unique_ptr<std::int16_t[]> decoded_;
  Zyx block_zyx_{};
  Zyx num_blocks_zyx_{};
  std::unique_ptr<bool[]> masked_;
  Context context_;
};

// libblosc2 reports no reason, and leaks where it cannot create its file.
void check_creatable(const std::string& path) {
  std::FILE* file = std::fopen(path.c_str(), "wbx");
  if (file == nullptr) {
    throw std::system_error(errno, std::generic_category(), "create");
  }
  std::fclose(file);
  std::remove(path.c_str());
}

std::string to_string(const Zyx& zyx) {
  return "(" + std::to_string(zyx[0]) + ", " + std::to_string(zyx[1]) + ", " +
         std::to_string(zyx[2]) + ")";
}

// `expected` has at least one checksum per chunk of the array.
void read_box_of(b2nd_array_t& array, std::span<const std::uint32_t> expected, const Zyx& lo_zyx,
                 const Zyx& shape_zyx, std::span<std::int16_t> out) {
  Zyx first{};
  Zyx last{};
  Zyx num_chunks{};
  for (std::size_t axis = 0; axis < 3; ++axis) {
    if (lo_zyx[axis] < 0 || shape_zyx[axis] < 1 || lo_zyx[axis] > array.shape[axis] ||
        shape_zyx[axis] > array.shape[axis] - lo_zyx[axis]) {
      const Zyx volume_zyx{array.shape[0], array.shape[1], array.shape[2]};
      throw StoreError("box at " + to_string(lo_zyx) + " of shape " + to_string(shape_zyx) +
                       " exceeds the volume of shape " + to_string(volume_zyx) +
                       "; clip the box before read_box");
    }
    first[axis] = lo_zyx[axis] / array.chunkshape[axis];
    last[axis] = ceil_div(lo_zyx[axis] + shape_zyx[axis], array.chunkshape[axis]);
    num_chunks[axis] = ceil_div(array.shape[axis], array.chunkshape[axis]);
  }
  if (static_cast<std::int64_t>(out.size()) != product(shape_zyx)) {
    throw std::invalid_argument("read_box: the output does not have the box's size");
  }
  const std::int64_t row = shape_zyx[2];
  const std::int64_t slice = shape_zyx[1] * shape_zyx[2];
  ChunkDecoder decoder(array);
  for (std::int64_t z = first[0]; z < last[0]; ++z) {
    for (std::int64_t y = first[1]; y < last[1]; ++y) {
      for (std::int64_t x = first[2]; x < last[2]; ++x) {
        const std::int64_t index = (z * num_chunks[1] + y) * num_chunks[2] + x;
        const Chunk chunk(array.sc, index);
        if (chunk.crc() != expected[static_cast<std::size_t>(index)]) {
          damaged("chunk " + std::to_string(index));
        }
        const Zyx at{z, y, x};
        Zyx lo{};
        Zyx hi{};
        std::int64_t to = 0;
        for (std::size_t axis = 0; axis < 3; ++axis) {
          const std::int64_t origin = at[axis] * array.chunkshape[axis];
          lo[axis] = std::max(lo_zyx[axis] - origin, std::int64_t{0});
          hi[axis] = std::min(lo_zyx[axis] + shape_zyx[axis] - origin,
                              std::int64_t{array.chunkshape[axis]});
          const std::int64_t stride = axis == 0 ? slice : axis == 1 ? row : 1;
          to += (origin + lo[axis] - lo_zyx[axis]) * stride;
        }
        decoder.copy_box(chunk, lo, hi, out.data() + to, row, slice);
      }
    }
  }
}

void write_frame(const std::string& path, std::span<const std::int16_t> data, const Zyx& shape_zyx,
                 const B2ndOptions& options) {
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
  const std::unique_ptr<b2nd_context_t, FreeB2ndContext> context(
      b2nd_create_ctx(&storage, 3, shape_zyx.data(), chunk.data(), block.data(), "<i2",
                      DTYPE_NUMPY_FORMAT, nullptr, 0));
  b2nd_array_t* written = nullptr;
  const int status = context ? b2nd_from_cbuffer(context.get(), &written, data.data(),
                                                 static_cast<std::int64_t>(data.size_bytes()))
                             : BLOSC2_ERROR_FAILURE;
  const Array array(written);
  if (status != BLOSC2_ERROR_SUCCESS) {
    throw StoreError("the volume could not be written; is the disk full?");
  }
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
                                      const Zyx& shape_zyx, const B2ndOptions& options) {
  init_blosc2();
  check_options(data, shape_zyx, options);
  check_creatable(path);
  write_frame(path, data, shape_zyx, options);

  const Array array = open_array(path);
  std::vector<std::uint32_t> crc32s;
  for (std::int64_t index = 0; index < array->sc->nchunks; ++index) {
    crc32s.push_back(Chunk(array->sc, index).crc());
  }
  crc32s.push_back(frame_crc32(path));

  // Compare slab by slab, so that packing needs no second volume in memory. Reason: blosc2 4.14.1
  // wrote wrong ragged last chunks with another filter pipeline, without an error.
  const std::int64_t slice = shape_zyx[1] * shape_zyx[2];
  std::vector<std::int16_t> slab;
  for (std::int64_t z = 0; z < shape_zyx[0]; z += array->chunkshape[0]) {
    const std::int64_t depth = std::min<std::int64_t>(array->chunkshape[0], shape_zyx[0] - z);
    slab.resize(static_cast<std::size_t>(depth * slice));
    read_box_of(*array, crc32s, {z, 0, 0}, {depth, shape_zyx[1], shape_zyx[2]}, slab);
    if (std::memcmp(slab.data(), data.data() + z * slice, slab.size() * sizeof(std::int16_t)) !=
        0) {
      throw StoreError("the written volume reads back differently; check the disk and pack again");
    }
  }
  return crc32s;
}

void read_box(const std::string& path, std::span<const std::uint32_t> crc32s, const Zyx& lo_zyx,
              const Zyx& shape_zyx, std::span<std::int16_t> out) {
  init_blosc2();
  // First: libblosc2 must not parse a header or offsets that are not the ones it wrote.
  if (crc32s.empty() || frame_crc32(path) != crc32s.back()) {
    damaged("the volume file's header");
  }
  const Array array = open_array(path);
  if (array->sc->nchunks != static_cast<std::int64_t>(crc32s.size()) - 1) {
    damaged("the list of checksums");
  }
  read_box_of(*array, crc32s, lo_zyx, shape_zyx, out);
}

}  // namespace tapct

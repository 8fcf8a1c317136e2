#include "tapct/box_reader.hpp"

#include <blosc2.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <list>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <unordered_map>

#include "tapct/buffer.hpp"
#include "tapct/clones.hpp"
#include "tapct/error.hpp"
#include "tapct/inflate.hpp"

namespace tapct {
namespace {

using Bytes = std::span<const std::byte>;

[[noreturn]] void damaged(const std::string& what) { throw StoreError(what + " is damaged"); }

std::string to_string(const Zyx& zyx) {
  return "(" + std::to_string(zyx[0]) + ", " + std::to_string(zyx[1]) + ", " +
         std::to_string(zyx[2]) + ")";
}

std::uint32_t big_endian32(Bytes bytes, std::size_t index) {
  std::uint32_t value = 0;
  for (const std::byte byte : bytes.subspan(4 * index, 4)) {
    value = value << 8 | std::to_integer<std::uint32_t>(byte);
  }
  return value;
}

// An open file whose header has been verified; chunks are read by pread, or lie in a mapping.
class OpenFile {
 public:
  OpenFile(const StoreCase& from, bool use_mmap) : file_(from.path), frame_(parse_frame(file_)) {
    if (!from.crc32s.empty()) {
      const std::size_t num_chunks = frame_.chunk_crc32s.size();
      bool is_indexed = from.crc32s.size() == 4 * (num_chunks + 1) &&
                        big_endian32(from.crc32s, num_chunks) == frame_.crc32;
      for (std::size_t i = 0; is_indexed && i < num_chunks; ++i) {
        is_indexed = big_endian32(from.crc32s, i) == frame_.chunk_crc32s[i];
      }
      if (!is_indexed) {
        throw StoreError("the volume file is damaged or not the one in the index");
      }
    }
    if (use_mmap) {
      map_ = ::mmap(nullptr, file_.size(), PROT_READ, MAP_SHARED, file_.descriptor(), 0);
      if (map_ == MAP_FAILED) {
        map_ = nullptr;
        throw std::system_error(errno, std::generic_category(), "mmap");
      }
    }
  }
  ~OpenFile() {
    if (map_ != nullptr) {
      ::munmap(map_, file_.size());
    }
  }
  OpenFile(const OpenFile&) = delete;
  OpenFile& operator=(const OpenFile&) = delete;

  const Frame& frame() const noexcept { return frame_; }
  bool is_mapped() const noexcept { return map_ != nullptr; }

  // Once per box: a mapping of a file that was cut short must not be touched.
  void check_size() const {
    struct stat status{};
    if (::fstat(file_.descriptor(), &status) != 0 ||
        static_cast<std::uint64_t>(status.st_size) != file_.size()) {
      damaged("the volume file");
    }
  }

  // Bytes [offset, offset + into.size()): of the mapping, or read into `into`.
  Bytes bytes(std::uint64_t offset, std::span<std::byte> into) const {
    if (map_ != nullptr) {
      return {static_cast<const std::byte*>(map_) + offset, into.size()};
    }
    if (file_.read_at(offset, into) != into.size()) {
      damaged("the volume file");
    }
    return into;
  }

 private:
  File file_;
  Frame frame_;
  void* map_ = nullptr;
};

// One row after another of a box inside a block.
struct Rows {
  const std::int16_t* from;
  std::int64_t from_row, from_slice;
  std::int64_t to_row, to_slice;
  Zyx count;
};

void copy_rows(const Rows& rows, std::int16_t* to) {
  for (std::int64_t z = 0; z < rows.count[0]; ++z) {
    for (std::int64_t y = 0; y < rows.count[1]; ++y) {
      std::memcpy(to + z * rows.to_slice + y * rows.to_row,
                  rows.from + z * rows.from_slice + y * rows.from_row,
                  static_cast<std::size_t>(rows.count[2]) * sizeof(std::int16_t));
    }
  }
}

TAPCT_CLONES void normalise_rows(const Rows& rows, std::uint16_t* to, const ZScore& z_score) {
  const ZScore z_local = z_score;
  for (std::int64_t z = 0; z < rows.count[0]; ++z) {
    for (std::int64_t y = 0; y < rows.count[1]; ++y) {
      const std::int16_t* from = rows.from + z * rows.from_slice + y * rows.from_row;
      std::uint16_t* row = to + z * rows.to_slice + y * rows.to_row;
      for (std::int64_t x = 0; x < rows.count[2]; ++x) {
        row[x] = to_bf16(zscore(static_cast<float>(from[x]), z_local));
      }
    }
  }
}

struct FreeContext {
  void operator()(blosc2_context* context) const noexcept { blosc2_free_ctx(context); }
};

// Part of an axis or of all axes: [lo, hi).
struct Box {
  Zyx lo{};
  Zyx hi{};
};

// What one thread needs to decode: a context, one compressed chunk and one decoded chunk.
class Decoder {
 public:
  Decoder() : context_(blosc2_create_dctx(BLOSC2_DPARAMS_DEFAULTS)) {
    if (!context_) {
      throw std::bad_alloc();
    }
  }

  // `at` is the first output voxel of the box.
  void read(const OpenFile& file, const Zyx& lo_zyx, const Zyx& shape_zyx, const BoxOutput& out,
            std::size_t at) {
    const Grid& grid = file.frame().grid;
    Zyx first{};
    Zyx last{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      if (lo_zyx[axis] < 0 || shape_zyx[axis] < 1 || lo_zyx[axis] > grid.shape_zyx[axis] ||
          shape_zyx[axis] > grid.shape_zyx[axis] - lo_zyx[axis]) {
        throw StoreError("box at " + to_string(lo_zyx) + " of shape " + to_string(shape_zyx) +
                         " exceeds the volume of shape " + to_string(grid.shape_zyx) +
                         "; clip the box before read_box");
      }
      first[axis] = lo_zyx[axis] / grid.chunk_zyx[axis];
      last[axis] = (lo_zyx[axis] + shape_zyx[axis] - 1) / grid.chunk_zyx[axis] + 1;
    }
    if (file.is_mapped()) {
      file.check_size();
    }
    reserve(grid);
    row_ = shape_zyx[2];
    slice_ = shape_zyx[1] * shape_zyx[2];
    const Zyx chunks_zyx = grid.num_chunks_zyx();
    for (std::int64_t z = first[0]; z < last[0]; ++z) {
      for (std::int64_t y = first[1]; y < last[1]; ++y) {
        for (std::int64_t x = first[2]; x < last[2]; ++x) {
          const Zyx chunk{z, y, x};
          Box part;
          bool is_whole = true;  // then the chunk's one checksum is cheaper than its blocks'
          std::int64_t to = 0;
          for (std::size_t axis = 0; axis < 3; ++axis) {
            const std::int64_t origin = chunk[axis] * grid.chunk_zyx[axis];
            part.lo[axis] = std::max(lo_zyx[axis] - origin, std::int64_t{0});
            part.hi[axis] = std::min(lo_zyx[axis] + shape_zyx[axis] - origin, grid.chunk_zyx[axis]);
            const std::int64_t end = std::min(grid.shape_zyx[axis] - origin, grid.chunk_zyx[axis]);
            is_whole = is_whole && part.lo[axis] == 0 && part.hi[axis] == end;
            const std::int64_t stride = axis == 0 ? slice_ : axis == 1 ? row_ : 1;
            to += (origin + part.lo[axis] - lo_zyx[axis]) * stride;
          }
          const std::int64_t index = (z * chunks_zyx[1] + y) * chunks_zyx[2] + x;
          read_chunk(file, static_cast<std::size_t>(index), part, is_whole, out,
                     at + static_cast<std::size_t>(to));
        }
      }
    }
  }

 private:
  void reserve(const Grid& grid) {
    const std::size_t decoded = grid.chunk_bytes() / sizeof(std::int16_t);
    if (decoded_items_ < decoded) {
      decoded_ = std::make_unique_for_overwrite<std::int16_t[]>(decoded);
      decoded_items_ = decoded;
    }
    const std::size_t compressed = grid.chunk_bytes() + grid.head_bytes() + BLOSC2_MAX_OVERHEAD;
    if (compressed_.size() < compressed) {
      compressed_ = Buffer(compressed);
    }
    if (starts_.size() < grid.num_blocks() + 1) {
      starts_.resize(grid.num_blocks() + 1);
      masked_ = std::make_unique<bool[]>(grid.num_blocks());
    }
  }

  void read_chunk(const OpenFile& file, std::size_t index, const Box& part, bool is_whole,
                  const BoxOutput& out, std::size_t at) {
    const Frame& frame = file.frame();
    const Grid& grid = frame.grid;
    const std::uint64_t offset = frame.offsets[index];
    const std::uint64_t size = frame.offsets[index + 1] - offset;
    if (size == 0) {
      return fill(0, part, out, at);
    }
    if (size > grid.chunk_bytes() + BLOSC2_MAX_OVERHEAD) {
      damaged("chunk " + std::to_string(index));
    }
    const std::size_t num_blocks = grid.num_blocks();
    const Zyx blocks_zyx = grid.num_blocks_zyx();
    Box touched;
    for (std::size_t axis = 0; axis < 3; ++axis) {
      touched.lo[axis] = part.lo[axis] / grid.block_zyx[axis];
      touched.hi[axis] = (part.hi[axis] - 1) / grid.block_zyx[axis] + 1;
    }
    std::fill_n(masked_.get(), num_blocks, true);
    std::size_t num_touched = 0;
    for (std::int64_t z = touched.lo[0]; z < touched.hi[0]; ++z) {
      for (std::int64_t y = touched.lo[1]; y < touched.hi[1]; ++y) {
        for (std::int64_t x = touched.lo[2]; x < touched.hi[2]; ++x) {
          masked_[static_cast<std::size_t>((z * blocks_zyx[1] + y) * blocks_zyx[2] + x)] = false;
          ++num_touched;
        }
      }
    }
    const auto chunk_bytes = static_cast<std::size_t>(size);
    const std::size_t head_bytes = std::min(chunk_bytes, grid.head_bytes());
    const auto into = compressed_.span();
    const std::uint32_t* block_crc32s = frame.block_crc32s.data() + index * (1 + num_blocks);
    const Bytes read = file.bytes(offset, into.first(is_whole ? chunk_bytes : head_bytes));
    const std::uint32_t expected = is_whole ? frame.chunk_crc32s[index] : block_crc32s[0];
    if (crc32(read) != expected) {
      damaged("chunk " + std::to_string(index));
    }
    std::int16_t value = 0;
    const std::span<std::uint32_t> starts(starts_.data(), num_blocks + 1);
    if (!parse_chunk_head(read.first(head_bytes), size, grid, starts, value)) {
      return fill(value, part, out, at);
    }
    if (!is_whole) {
      read_blocks(file, index, offset, block_crc32s, num_blocks);
    }
    if (num_touched < num_blocks) {  // not those of padding either
      if (blosc2_set_maskout(context_.get(), masked_.get(), static_cast<int>(num_blocks)) != 0) {
        throw std::bad_alloc();
      }
    }
    if (blosc2_decompress_ctx(context_.get(), read.data(), static_cast<std::int32_t>(size),
                              decoded_.get(), static_cast<std::int32_t>(grid.chunk_bytes())) < 0) {
      damaged("chunk " + std::to_string(index));
    }
    for (std::int64_t z = touched.lo[0]; z < touched.hi[0]; ++z) {
      for (std::int64_t y = touched.lo[1]; y < touched.hi[1]; ++y) {
        for (std::int64_t x = touched.lo[2]; x < touched.hi[2]; ++x) {
          write_block(grid, {z, y, x}, (z * blocks_zyx[1] + y) * blocks_zyx[2] + x, part, out, at);
        }
      }
    }
  }

  // Reads the blocks that are not masked, neighbours in one call, to where they lie in the chunk,
  // so that libblosc2 finds them behind the head; checks each.
  void read_blocks(const OpenFile& file, std::size_t index, std::uint64_t offset,
                   const std::uint32_t* block_crc32s, std::size_t num_blocks) {
    for (std::size_t block = 0; block < num_blocks;) {
      if (masked_[block]) {
        ++block;
        continue;
      }
      std::size_t end = block;
      while (end < num_blocks && !masked_[end]) {
        ++end;
      }
      const std::size_t from = starts_[block];
      const Bytes run =
          file.bytes(offset + from, compressed_.span().subspan(from, starts_[end] - from));
      for (; block < end; ++block) {
        const Bytes bytes = run.subspan(starts_[block] - from, starts_[block + 1] - starts_[block]);
        if (crc32(bytes) != block_crc32s[1 + block]) {
          damaged("chunk " + std::to_string(index));
        }
      }
    }
  }

  void write_block(const Grid& grid, const Zyx& block, std::int64_t index, const Box& part,
                   const BoxOutput& out, std::size_t at) const {
    Rows rows{};
    std::int64_t from = index * (grid.block_zyx[0] * grid.block_zyx[1] * grid.block_zyx[2]);
    std::int64_t to = 0;
    rows.from_row = grid.block_zyx[2];
    rows.from_slice = grid.block_zyx[1] * grid.block_zyx[2];
    for (std::size_t axis = 0; axis < 3; ++axis) {
      const std::int64_t origin = block[axis] * grid.block_zyx[axis];
      const std::int64_t begin = std::max(part.lo[axis], origin);
      rows.count[axis] = std::min(part.hi[axis], origin + grid.block_zyx[axis]) - begin;
      from += (begin - origin) * (axis == 0 ? rows.from_slice : axis == 1 ? rows.from_row : 1);
      to += (begin - part.lo[axis]) * (axis == 0 ? slice_ : axis == 1 ? row_ : 1);
    }
    rows.from = decoded_.get() + from;
    rows.to_row = row_;
    rows.to_slice = slice_;
    write(rows, out, at + static_cast<std::size_t>(to));
  }

  void fill(std::int16_t value, const Box& part, const BoxOutput& out, std::size_t at) {
    Rows rows{};
    for (std::size_t axis = 0; axis < 3; ++axis) {
      rows.count[axis] = part.hi[axis] - part.lo[axis];
    }
    std::fill_n(decoded_.get(), rows.count[2], value);
    rows.from = decoded_.get();  // the same row again and again
    rows.to_row = row_;
    rows.to_slice = slice_;
    write(rows, out, at);
  }

  static void write(const Rows& rows, const BoxOutput& out, std::size_t at) {
    if (out.hu.empty()) {
      normalise_rows(rows, out.bf16.data() + at, out.zscore);
    } else {
      copy_rows(rows, out.hu.data() + at);
    }
  }

  std::unique_ptr<blosc2_context, FreeContext> context_;
  Buffer compressed_;
  std::unique_ptr<std::int16_t[]> decoded_;
  std::size_t decoded_items_ = 0;
  std::vector<std::uint32_t> starts_;
  std::unique_ptr<bool[]> masked_;
  std::int64_t row_ = 0;
  std::int64_t slice_ = 0;
};

}  // namespace

struct BoxReader::Impl {
  using Open = std::pair<std::size_t, std::shared_ptr<const OpenFile>>;

  std::vector<StoreCase> cases;
  BoxReaderOptions options;
  std::mutex mutex;
  std::list<Open> open;  // the last used first
  std::unordered_map<std::size_t, std::list<Open>::iterator> places;
  std::vector<std::unique_ptr<Decoder>> idle;

  std::shared_ptr<const OpenFile> file_of(std::size_t index) {
    {
      const std::scoped_lock lock(mutex);
      if (const auto found = places.find(index); found != places.end()) {
        open.splice(open.begin(), open, found->second);
        return found->second->second;
      }
    }
    auto file = std::make_shared<const OpenFile>(cases[index], options.use_mmap);
    const std::scoped_lock lock(mutex);
    if (!places.contains(index)) {  // another thread may have opened it meanwhile
      open.emplace_front(index, file);
      places[index] = open.begin();
      if (open.size() > options.max_open) {
        places.erase(open.back().first);
        open.pop_back();
      }
    }
    return file;
  }

  void forget(std::size_t index) {
    const std::scoped_lock lock(mutex);
    if (const auto found = places.find(index); found != places.end()) {
      open.erase(found->second);
      places.erase(found);
    }
  }

  std::unique_ptr<Decoder> take_decoder() {
    {
      const std::scoped_lock lock(mutex);
      if (!idle.empty()) {
        std::unique_ptr<Decoder> decoder = std::move(idle.back());
        idle.pop_back();
        return decoder;
      }
    }
    return std::make_unique<Decoder>();
  }

  void give_back(std::unique_ptr<Decoder> decoder) {
    const std::scoped_lock lock(mutex);
    idle.push_back(std::move(decoder));
  }

  void read_one(Decoder& decoder, std::size_t index, const Zyx& lo, const Zyx& shape,
                const BoxOutput& out, std::size_t at) {
    const std::string& name = cases[index].name;
    const std::string way_out = "; delete cases/" + name + ".json and pack again";
    try {
      decoder.read(*file_of(index), lo, shape, out, at);
    } catch (const StoreError& error) {
      throw StoreError(name + ": " + error.what() + way_out);
    } catch (const std::system_error& error) {
      forget(
          index);  // who tries again opens the file anew: a handle of a remounted disk stays stale
      throw StoreReadError(name + ": " + error.code().message() + "; check the disk, or" +
                           way_out.substr(1));
    }
  }
};

BoxReader::BoxReader(std::vector<StoreCase> cases, const BoxReaderOptions& options)
    : impl_(std::make_unique<Impl>()) {
  static std::once_flag once;
  std::call_once(once, blosc2_init);
  impl_->cases = std::move(cases);
  impl_->options = options;
}

BoxReader::~BoxReader() = default;

void BoxReader::read(std::span<const std::int64_t> cases, std::span<const Zyx> lo_zyx,
                     const Zyx& shape_zyx, const BoxOutput& out, std::size_t num_threads) {
  std::size_t voxels = 1;
  for (const std::int64_t size : shape_zyx) {
    if (size < 1 || static_cast<std::size_t>(size) > (std::size_t{1} << 40) / voxels) {
      throw std::invalid_argument("read_boxes: shape_zyx must be positive");
    }
    voxels *= static_cast<std::size_t>(size);
  }
  if (cases.size() != lo_zyx.size() || out.size() / voxels != cases.size() ||
      out.size() % voxels != 0) {
    throw std::invalid_argument("read_boxes: cases, lo_zyx and out are not of one length");
  }
  for (const std::int64_t index : cases) {
    if (index < 0 || static_cast<std::size_t>(index) >= impl_->cases.size()) {
      throw std::invalid_argument("read_boxes: there is no case " + std::to_string(index));
    }
  }
  std::atomic<std::size_t> next{0};
  std::mutex mutex;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      std::unique_ptr<Decoder> decoder = impl_->take_decoder();
      for (std::size_t i = next++; i < cases.size(); i = next++) {
        impl_->read_one(*decoder, static_cast<std::size_t>(cases[i]), lo_zyx[i], shape_zyx, out,
                        i * voxels);
      }
      impl_->give_back(std::move(decoder));
    } catch (...) {
      next = cases.size();  // the others stop after their box
      const std::scoped_lock lock(mutex);
      failure = failure ? failure : std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    for (std::size_t i = 1; i < std::min(num_threads, cases.size()); ++i) {
      threads.emplace_back(work);
    }
    work();
  }
  if (failure) {
    std::rethrow_exception(failure);
  }
}

}  // namespace tapct

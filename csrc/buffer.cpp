#include "tapct/buffer.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <array>
#include <cstdint>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <utility>

namespace tapct {
namespace {

constexpr std::size_t huge_page = std::size_t{2} << 20;
constexpr std::size_t smallest_mapping = 2 * huge_page;

std::size_t rounded_up(std::size_t size, std::size_t unit) {
  return (size + unit - 1) / unit * unit;
}

std::size_t page_size() {
  static const auto size = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  return size;
}

// Maps more than asked for, and gives back what lies outside the aligned part.
std::byte* map_aligned(std::size_t size) {
  const std::size_t whole = size + huge_page;
  void* const mapped =
      ::mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) {
    throw std::bad_alloc();
  }
  auto* const start = static_cast<std::byte*>(mapped);
  const std::size_t head =
      (huge_page - reinterpret_cast<std::uintptr_t>(start) % huge_page) % huge_page;
  if (head != 0) {
    ::munmap(start, head);
  }
  if (head != huge_page) {
    ::munmap(start + head + size, huge_page - head);
  }
#ifdef MADV_HUGEPAGE
  ::madvise(start + head, size, MADV_HUGEPAGE);  // a hint: systems without it use small pages
#endif
  return start + head;
}

// Blocks that were released and may be taken again. The system takes them back when it is short of
// memory (MADV_FREE); until then their pages need no faulting in.
class Kept {
 public:
  struct Block {
    std::byte* bytes = nullptr;
    std::size_t size = 0;
  };

  // A block of at least `size` bytes and not of much more; an empty one where there is none.
  Block take(std::size_t size) noexcept {
    // Not waiting: after a fork the lock may be held by a thread that is not there.
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) {
      return {};
    }
    for (Block& block : blocks_) {
      if (block.size >= size && block.size / 2 <= size) {
        return std::exchange(block, {});
      }
    }
    return {};
  }

  void give(Block block) noexcept {
#ifdef MADV_FREE
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (lock && block.size <= largest_kept && ::madvise(block.bytes, block.size, MADV_FREE) == 0) {
      std::swap(block, blocks_[next_]);  // the oldest makes room
      next_ = (next_ + 1) % blocks_.size();
    }
#endif
    if (block.bytes != nullptr) {
      ::munmap(block.bytes, block.size);
    }
  }

 private:
  // A loop that reads scans holds the last one while it reads the next, in a few threads.
  static constexpr std::size_t most_kept = 4;
  static constexpr std::size_t largest_kept = std::size_t{1} << 30;

  std::mutex mutex_;
  std::array<Block, most_kept> blocks_{};
  std::size_t next_ = 0;
};

// Never destroyed: Python may release a buffer after the library's static objects are gone.
Kept& kept() {
  static Kept& only = *new Kept;
  return only;
}

}  // namespace

Buffer::Buffer(std::size_t size) : size_(size) {
  if (size < smallest_mapping) {
    bytes_ = std::make_unique_for_overwrite<std::byte[]>(size).release();
    return;
  }
  if (size > std::numeric_limits<std::size_t>::max() / 2) {
    throw std::bad_alloc();
  }
  const Kept::Block block = kept().take(rounded_up(size, page_size()));
  if (block.bytes != nullptr) {
    bytes_ = block.bytes;
    mapped_ = block.size;
    return;
  }
  mapped_ = rounded_up(size, page_size());
  bytes_ = map_aligned(mapped_);
}

void Buffer::shrink(std::size_t size) noexcept {
  size_ = size < size_ ? size : size_;
#ifdef MADV_FREE
  const std::size_t used = rounded_up(size_, page_size());
  if (used < mapped_) {
    ::madvise(bytes_ + used, mapped_ - used, MADV_FREE);
  }
#endif
}

void Buffer::swap(Buffer& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
}

void Buffer::release() noexcept {
  if (mapped_ != 0) {
    kept().give({bytes_, mapped_});
  } else {
    std::unique_ptr<std::byte[]>{bytes_}.reset();
  }
}

}  // namespace tapct

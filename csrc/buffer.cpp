#include "tapct/buffer.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <limits>
#include <memory>
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

}  // namespace

Buffer::Buffer(std::size_t size) : size_(size) {
  if (size < smallest_mapping) {
    bytes_ = std::make_unique_for_overwrite<std::byte[]>(size).release();
    return;
  }
  if (size > std::numeric_limits<std::size_t>::max() / 2) {
    throw std::bad_alloc();
  }
  mapped_ = rounded_up(size, page_size());
  bytes_ = map_aligned(mapped_);
}

void Buffer::shrink(std::size_t size) noexcept {
  size_ = size < size_ ? size : size_;
  const std::size_t kept = rounded_up(size_ == 0 ? 1 : size_, page_size());
  if (kept < mapped_) {
    ::munmap(bytes_ + kept, mapped_ - kept);
    mapped_ = kept;
  }
}

void Buffer::swap(Buffer& other) noexcept {
  std::swap(bytes_, other.bytes_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
}

void Buffer::release() noexcept {
  if (mapped_ != 0) {
    ::munmap(bytes_, mapped_);
  } else {
    std::unique_ptr<std::byte[]>{bytes_}.reset();
  }
}

}  // namespace tapct

// An owned block of bytes that is not zeroed: clearing 144 MB costs as much as decoding a third of
// it. Large blocks ask for huge pages, and a few released ones are kept for the next, unless the
// system wants their memory: faulting 144 MB in costs 80 to 260 ms, as much as decoding it.
#pragma once

#include <cstddef>
#include <span>

namespace tapct {

class Buffer {
 public:
  Buffer() = default;
  // Throws std::bad_alloc.
  explicit Buffer(std::size_t size);
  ~Buffer() { release(); }
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    Buffer old(static_cast<Buffer&&>(other));
    swap(old);
    return *this;
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::span<std::byte> span() noexcept { return {bytes_, size_}; }
  std::span<const std::byte> span() const noexcept { return {bytes_, size_}; }
  std::size_t size() const noexcept { return size_; }

  // Keeps the first `size` bytes; of a large block the system may take the rest.
  void shrink(std::size_t size) noexcept;

 private:
  void swap(Buffer& other) noexcept;
  void release() noexcept;

  std::byte* bytes_ = nullptr;
  std::size_t size_ = 0;
  std::size_t mapped_ = 0;  // bytes mapped at bytes_, 0 for a block of the heap
};

}  // namespace tapct

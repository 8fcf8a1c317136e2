// A regular file opened for reading. Failures are std::system_error without the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tapct {

class File {
 public:
  explicit File(const std::string& path);
  ~File();
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  std::uint64_t size() const noexcept { return size_; }
  int descriptor() const noexcept { return descriptor_; }

  // Fills `out` from `offset` on and returns how many bytes there were; fewer only at the file's
  // end.
  std::size_t read_at(std::uint64_t offset, std::span<std::byte> out) const;

 private:
  int descriptor_;
  std::uint64_t size_ = 0;
};

}  // namespace tapct

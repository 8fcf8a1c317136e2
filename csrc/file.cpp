#include "tapct/file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

namespace tapct {
namespace {

[[noreturn]] void fail(int error, const char* what) {
  throw std::system_error(error, std::generic_category(), what);
}

}  // namespace

// O_NONBLOCK: opening a named pipe must fail below, not wait for a writer.
File::File(const std::string& path)
    : descriptor_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) {
    fail(errno, "open");
  }
  struct stat status{};
  int error = ::fstat(descriptor_, &status) == 0 ? 0 : errno;
  if (error == 0 && S_ISDIR(status.st_mode)) {
    error = EISDIR;
  } else if (error == 0 && !S_ISREG(status.st_mode)) {
    error = EINVAL;
  }
  if (error != 0) {
    ::close(descriptor_);
    fail(error, "not a regular file");
  }
  size_ = static_cast<std::uint64_t>(status.st_size);
}

File::~File() { ::close(descriptor_); }

std::size_t File::read_at(std::uint64_t offset, std::span<std::byte> out) const {
  constexpr std::size_t largest_read = std::size_t{1} << 30;  // Linux reads at most 2 GiB at once
  std::size_t done = 0;
  while (done < out.size()) {
    const ssize_t count =
        ::pread(descriptor_, out.data() + done, std::min(out.size() - done, largest_read),
                static_cast<off_t>(offset + done));
    if (count < 0 && errno == EINTR) {
      continue;
    }
    if (count < 0) {
      fail(errno, "read");
    }
    if (count == 0) {
      break;
    }
    done += static_cast<std::size_t>(count);
  }
  return done;
}

}  // namespace tapct

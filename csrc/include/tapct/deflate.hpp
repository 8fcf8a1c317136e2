// gzip files of many members, written in parallel; every gzip reader opens them.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace tapct {

// Writes `head` as one member and `body` as members of 8 MiB, each stating its size (see
// gzip_index.hpp), to a new file. The bytes depend on the input, `level` (1..9) and the backend
// (see inflate_backend), not on `threads`. Throws std::system_error.
void write_gzip(const std::string& path, std::span<const std::byte> head,
                std::span<const std::byte> body, int level, std::size_t threads);

}  // namespace tapct

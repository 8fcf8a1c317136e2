// A bare deflate stream (RFC 1951), as in deflated DICOM data sets: no header, length or checksum.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

namespace tapct {

// Decodes one whole stream; what follows it is ignored. Throws
// FormatError("file", ...) where the stream is damaged, does not end, or has more than `max_size`
// bytes; the reason goes on after the words "file 3 of 40".
std::vector<std::byte> inflate_raw(std::span<const std::byte> compressed, std::size_t max_size);

}  // namespace tapct

// DICOM Part 10 files: the header fields a reader asks for, and uncompressed slices as HU.
//
// Every length in a file is checked against what is there. Sequences are skipped by a loop with a
// bounded stack, never by recursion. No value of a file gets into an error.
// Source: DICOM PS3.5 7 (data set), 7.5 (nesting), A (transfer syntaxes), PS3.10 7 (file format).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

namespace tapct {

// A file by its path, or its whole content in memory.
using DicomSource = std::variant<std::string, std::span<const std::byte>>;

struct DicomTag {
  std::string keyword;
  std::uint32_t tag;  // group << 16 | element
};

struct DicomValue {
  std::string keyword;
  std::string vr;     // empty where the syntax is implicit
  std::string bytes;  // as stored; none for a sequence
};

struct DicomHeader {
  std::string transfer_syntax;  // digits and dots
  bool big_endian = false;
  // Where the deflated data set starts; then pixel_offset counts in the inflated one.
  std::optional<std::uint64_t> deflated_at;
  std::vector<DicomValue> values;  // in file order
  std::uint64_t num_bytes = 0;     // of the file, or of the inflated data set
  std::optional<std::uint64_t> pixel_offset;
  std::optional<std::uint64_t> pixel_bytes;  // none where the length is undefined: encapsulated
};

// What became of one file. A file without the DICM mark is not judged here.
struct DicomScan {
  bool has_mark = false;
  std::string start;  // the first bytes of a file without the mark
  DicomHeader header;
  std::string field;  // of the error, or empty; `reason` goes on after the words "file 3 of 40"
  std::string reason;
  std::string code;  // a reason code of io/findings.py, or empty
  int os_error = 0;
};

// Inflated bytes: 8192 x 8192 int16 and 4 MiB of header. Growing to it takes half as much again.
inline constexpr std::uint64_t max_dicom_slice = std::uint64_t{132} << 20;

// Parses one file up to its pixel data. Throws FormatError, or std::system_error for a path.
DicomScan scan_dicom(const DicomSource& source, std::span<const DicomTag> tags);

// The same for many files; an error becomes part of a file's result.
std::vector<DicomScan> scan_dicom(std::span<const DicomSource> sources,
                                  std::span<const DicomTag> tags, std::size_t num_threads);

// Where the stored values of one slice lie, and how they become HU.
struct StoredSlice {
  DicomSource source;
  std::string place;      // "file 3 of 40": names the slice in an error
  std::size_t index = 0;  // its place in the volume; no two slices share one
  std::uint64_t pixel_offset = 0;
  std::uint64_t pixel_bytes = 0;
  std::optional<std::uint64_t> deflated_at;
  bool big_endian = false;
  bool is_signed = true;
  unsigned bits_stored = 16;
  std::optional<std::uint16_t> padding;  // bits of the stored value that is no measurement
  double slope = 1;
  double intercept = 0;
};

// Writes round_half_even(stored * slope + intercept) of every slice into its place of `out`.
// Padding that leaves int16 becomes -32768: it is no measurement, and must neither condemn the scan
// nor look like metal. Throws FormatError where a slice has more or fewer bytes than
// `pixels_per_slice` needs, a value has more than bits_stored bits, or HU leave int16.
void read_slices(std::span<const StoredSlice> slices, std::size_t pixels_per_slice,
                 std::span<std::int16_t> out, std::size_t num_threads);

// The bytes of the deflated data set behind a file's meta information. Throws FormatError unless
// the stream is whole and of at most max_dicom_slice bytes.
std::vector<std::byte> inflate_data_set(std::span<const std::byte> compressed);

}  // namespace tapct

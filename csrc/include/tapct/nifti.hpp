// NIfTI-1 and NIfTI-2 single files, plain or gzip, either byte order, as int16 voxels.
// Source: nifti1.h and nifti2.h of the NIfTI Data Format Working Group.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "tapct/buffer.hpp"

namespace tapct {

// What the header says; geometry is reported as stored and judged by the caller.
struct NiftiHeader {
  int version = 1;  // NIfTI-1 or NIfTI-2
  bool big_endian = false;
  std::array<std::int64_t, 3> dims_xyz{};
  std::int32_t datatype = 0;
  std::size_t bytes_per_voxel = 0;
  std::uint64_t data_offset = 0;  // bytes from the start of the decoded file
  double scl_slope = 0;
  double scl_inter = 0;
  bool has_lone_inter = false;         // slope 0 beside an intercept, which was not applied
  std::array<double, 3> pixdim_xyz{};  // in xyzt_units
  double qfac = 0;                     // pixdim[0]
  std::int32_t xyzt_units = 0;
  std::int32_t qform_code = 0;
  std::int32_t sform_code = 0;
  std::array<double, 3> quaternion_bcd{};
  std::array<double, 3> offset_xyz{};
  std::array<double, 12> srow{};  // 3 rows of 4

  // Voxels and bytes; parse_nifti_header has checked that neither overflows.
  std::uint64_t num_voxels() const noexcept;
  std::uint64_t num_bytes() const noexcept { return num_voxels() * bytes_per_voxel; }
};

inline constexpr std::size_t nifti_header_bytes = 544;  // NIfTI-2 and its extension flag

// `head` is the start of the decoded file, nifti_header_bytes long where the file is.
// Throws FormatError naming the header field that contradicts the format.
NiftiHeader parse_nifti_header(std::span<const std::byte> head);

struct NiftiOptions {
  std::uint64_t max_bytes = 0;  // of the file, and of what it decodes to
  std::size_t threads = 1;      // for gzip members that state their sizes
  // Decode into these bytes instead of a block of our own. As many as the decoded file has suffice
  // (for a plain file: as its voxels have), plus one for each voxel of one byte, plus one.
  std::optional<std::span<std::byte>> buffer{};
};

struct NiftiImage {
  NiftiHeader header;
  Buffer storage;                  // empty where the caller gave a buffer
  std::span<std::int16_t> voxels;  // x fastest, in `storage` or the caller's buffer
  bool rounded = false;            // some stored value was not a whole number
  std::size_t num_members = 0;     // of a gzip file
};

// Reads a whole file: header first, sizes checked against the limit before anything is allocated,
// slope and intercept applied, values rounded half to even, all within one block of memory.
// Throws FormatError, InputError (the buffer is too small), std::system_error.
NiftiImage read_nifti(const std::string& path, const NiftiOptions& options);

// The same for a file's content.
NiftiImage parse_nifti(std::span<const std::byte> content, const NiftiOptions& options);

}  // namespace tapct

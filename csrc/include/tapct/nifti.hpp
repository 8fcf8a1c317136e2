// NIfTI-1 and NIfTI-2 single files, plain or gzip, either byte order, as int16 voxels.
// Source: nifti1.h and nifti2.h of the NIfTI Data Format Working Group.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
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

struct NiftiImage {
  NiftiHeader header;
  Buffer storage;
  std::size_t voxels_at = 0;  // byte offset of the int16 voxels in `storage`, x fastest
  bool rounded = false;       // some stored value was not a whole number

  std::span<const std::int16_t> voxels() const noexcept;
};

// Reads a whole file: header first, sizes checked against `max_bytes` before anything is allocated,
// slope and intercept applied, values rounded half to even. Throws FormatError, std::system_error.
NiftiImage read_nifti(const std::string& path, std::uint64_t max_bytes);

}  // namespace tapct

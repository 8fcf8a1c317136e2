#include "tapct/nifti.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>
#include <type_traits>

#include "tapct/error.hpp"
#include "tapct/file.hpp"
#include "tapct/inflate.hpp"

namespace tapct {
namespace {

static_assert(std::endian::native == std::endian::little, "the readers swap from little endian");

template <typename T>
T swap_bytes(T value) {
  auto bytes = std::bit_cast<std::array<std::byte, sizeof(T)>>(value);
  std::reverse(bytes.begin(), bytes.end());
  return std::bit_cast<T>(bytes);
}

// Reads fields at fixed offsets in the file's byte order; the caller has checked the length.
class Fields {
 public:
  Fields(std::span<const std::byte> bytes, bool swap) : bytes_(bytes), swap_(swap) {}

  template <typename T>
  T at(std::size_t offset) const {
    T value;
    std::memcpy(&value, bytes_.subspan(offset, sizeof(T)).data(), sizeof(T));
    return swap_ ? swap_bytes(value) : value;
  }

 private:
  std::span<const std::byte> bytes_;
  bool swap_;
};

constexpr std::size_t nifti1_bytes = 348;
constexpr std::size_t nifti2_bytes = 540;

// Field offsets of nifti1.h and nifti2.h.
struct Layout {
  std::size_t magic, datatype, bitpix, dim, pixdim, vox_offset, scl_slope, scl_inter, qform_code,
      sform_code, quaternion, offset, srow, xyzt_units;
};
constexpr Layout nifti1{344, 70, 72, 40, 76, 108, 112, 116, 252, 254, 256, 268, 280, 123};
constexpr Layout nifti2{4, 12, 14, 16, 104, 168, 176, 184, 344, 348, 352, 376, 400, 500};

std::size_t voxel_bytes(std::int32_t datatype) {
  switch (datatype) {
    case 2:    // uint8
    case 256:  // int8
      return 1;
    case 4:    // int16
    case 512:  // uint16
      return 2;
    case 8:    // int32
    case 768:  // uint32
    case 16:   // float32
      return 4;
    case 64:    // float64
    case 1024:  // int64
    case 1280:  // uint64
      return 8;
    default:
      throw FormatError("datatype", "code " + std::to_string(datatype) +
                                        " is not an integer or float type that holds HU; convert "
                                        "the scan to int16 or float32");
  }
}

// Spatial axes, checked so that num_voxels() * bytes_per_voxel cannot overflow.
void read_dims(const std::array<std::int64_t, 8>& dim, NiftiHeader& header) {
  if (dim[0] < 1 || dim[0] > 7) {
    throw FormatError("dim[0]", std::to_string(dim[0]) + " is not a number of axes from 1 to 7");
  }
  if (dim[0] < 3) {
    throw FormatError("dim[0]",
                      "the file has " + std::to_string(dim[0]) + " axes; a CT volume has three");
  }
  const auto num_axes = static_cast<std::size_t>(dim[0]);
  for (std::size_t axis = 1; axis <= num_axes; ++axis) {
    if (dim[axis] < 1) {
      throw FormatError("dim[" + std::to_string(axis) + "]",
                        std::to_string(dim[axis]) + " is not a positive size");
    }
    if (axis > 3 && dim[axis] > 1) {
      throw FormatError("dim[" + std::to_string(axis) + "]",
                        "the file holds " + std::to_string(dim[axis]) +
                            " volumes; write the wanted one to its own 3D file");
    }
  }
  std::uint64_t budget = std::numeric_limits<std::int64_t>::max() / header.bytes_per_voxel;
  for (std::size_t axis = 1; axis <= 3; ++axis) {
    header.dims_xyz[axis - 1] = dim[axis];
    budget /= static_cast<std::uint64_t>(dim[axis]);
    if (budget == 0) {
      throw FormatError("dim", "the sizes multiply to more than any file can hold");
    }
  }
}

std::uint64_t checked_data_offset(double stored, std::size_t header_bytes) {
  const std::size_t smallest = header_bytes + 4;  // the extension flag follows the header
  constexpr double largest = 9007199254740992.0;  // 2^53: whole numbers are exact below
  if (!std::isfinite(stored) || stored < static_cast<double>(smallest) || stored > largest ||
      stored != std::floor(stored)) {
    throw FormatError("vox_offset", "the stored offset is not a whole number of at least " +
                                        std::to_string(smallest) + " bytes");
  }
  return static_cast<std::uint64_t>(stored);
}

void read_scaling(NiftiHeader& header) {
  // 0: "no scaling" by nifti1.h, whatever the intercept. Both NaN: how nibabel marks an unset pair.
  if (header.scl_slope == 0 || (std::isnan(header.scl_slope) && std::isnan(header.scl_inter))) {
    header.scl_slope = 1;
    header.scl_inter = 0;
  }
  if (!std::isfinite(header.scl_slope)) {
    throw FormatError("scl_slope", "the stored slope is not a finite number");
  }
  if (!std::isfinite(header.scl_inter)) {
    throw FormatError("scl_inter", "the stored intercept is not a finite number");
  }
}

template <typename Real>
void read_geometry(const Fields& fields, const Layout& layout, NiftiHeader& header) {
  header.qfac = fields.at<Real>(layout.pixdim);
  for (std::size_t i = 0; i < 3; ++i) {
    header.pixdim_xyz[i] = fields.at<Real>(layout.pixdim + (i + 1) * sizeof(Real));
    header.quaternion_bcd[i] = fields.at<Real>(layout.quaternion + i * sizeof(Real));
    header.offset_xyz[i] = fields.at<Real>(layout.offset + i * sizeof(Real));
  }
  for (std::size_t i = 0; i < header.srow.size(); ++i) {
    header.srow[i] = fields.at<Real>(layout.srow + i * sizeof(Real));
  }
}

bool has_magic(std::span<const std::byte> head, std::size_t offset, std::string_view magic) {
  return std::memcmp(head.data() + offset, magic.data(), magic.size()) == 0;
}

constexpr std::string_view magic1{"n+1\0", 4};
constexpr std::string_view magic1_pair{"ni1\0", 4};
constexpr std::string_view magic2{"n+2\0\r\n\032\n", 8};

// What one pass over the voxels found.
struct Conversion {
  bool non_finite = false;
  bool out_of_range = false;
  bool rounded = false;
};

constexpr double int16_low = std::numeric_limits<std::int16_t>::min();
constexpr double int16_high = std::numeric_limits<std::int16_t>::max();

// Adding and subtracting 1.5 * 2^52 rounds half to even below 2^51 and leaves larger values out of
// range; nearbyint is a function call per voxel on baseline x86-64.
constexpr double rounder = 6755399441055744.0;

// Stored values to int16: value * slope + inter in float64, rounded half to even.
template <typename T, bool Swap>
Conversion convert_scaled(std::span<const std::byte> stored, std::span<std::int16_t> out,
                          double slope, double inter) {
  Conversion found;
  for (std::size_t i = 0; i < out.size(); ++i) {
    T value;
    std::memcpy(&value, stored.data() + i * sizeof(T), sizeof(T));
    if constexpr (Swap) {
      value = swap_bytes(value);
    }
    const double scaled = static_cast<double>(value) * slope + inter;
    const double whole = scaled + rounder - rounder;
    // Written so that NaN fails the first test; an out-of-range cast would be undefined.
    if (whole >= int16_low && whole <= int16_high) {
      found.rounded |= whole != scaled;
      out[i] = static_cast<std::int16_t>(whole);
    } else {
      found.non_finite |= !std::isfinite(scaled);
      found.out_of_range |= std::isfinite(scaled);
      out[i] = 0;
    }
  }
  return found;
}

template <typename T, bool Swap>
Conversion convert(std::span<const std::byte> stored, std::span<std::int16_t> out, double slope,
                   double inter) {
  if constexpr (std::is_same_v<T, std::int16_t>) {
    if (slope == 1 && inter == 0) {
      // Whole, in range, finite: only the byte order may change. memmove: the spans may be one.
      std::memmove(out.data(), stored.data(), stored.size());
      if constexpr (Swap) {
        std::transform(out.begin(), out.end(), out.begin(), swap_bytes<std::int16_t>);
      }
      return {};
    }
  }
  return convert_scaled<T, Swap>(stored, out, slope, inter);
}

template <bool Swap>
Conversion convert_any(const NiftiHeader& header, std::span<const std::byte> stored,
                       std::span<std::int16_t> out) {
  const double slope = header.scl_slope;
  const double inter = header.scl_inter;
  switch (header.datatype) {
    case 2:
      return convert<std::uint8_t, Swap>(stored, out, slope, inter);
    case 4:
      return convert<std::int16_t, Swap>(stored, out, slope, inter);
    case 8:
      return convert<std::int32_t, Swap>(stored, out, slope, inter);
    case 16:
      return convert<float, Swap>(stored, out, slope, inter);
    case 64:
      return convert<double, Swap>(stored, out, slope, inter);
    case 256:
      return convert<std::int8_t, Swap>(stored, out, slope, inter);
    case 512:
      return convert<std::uint16_t, Swap>(stored, out, slope, inter);
    case 768:
      return convert<std::uint32_t, Swap>(stored, out, slope, inter);
    case 1024:
      return convert<std::int64_t, Swap>(stored, out, slope, inter);
    default:  // voxel_bytes() has refused every other code
      return convert<std::uint64_t, Swap>(stored, out, slope, inter);
  }
}

void check_sizes(const NiftiHeader& header, const File& file, bool gzip, std::uint64_t max_bytes) {
  const std::uint64_t num_bytes = header.num_bytes();
  if (header.data_offset > max_bytes || num_bytes > max_bytes - header.data_offset ||
      header.num_voxels() > max_bytes / sizeof(std::int16_t)) {
    throw FormatError("dim", "the header declares " + std::to_string(num_bytes) +
                                 " bytes of voxels, more than the limit of " +
                                 std::to_string(max_bytes));
  }
  const std::uint64_t total = header.data_offset + num_bytes;
  if (gzip && total > max_inflated_size(file.size())) {
    throw FormatError("dim", "the header declares more voxels than the compressed file can hold");
  }
  if (!gzip && total != file.size()) {
    throw FormatError(total > file.size() ? "dim" : "vox_offset",
                      "the header declares " + std::to_string(total) + " bytes, the file has " +
                          std::to_string(file.size()));
  }
}

}  // namespace

std::uint64_t NiftiHeader::num_voxels() const noexcept {
  std::uint64_t product = 1;
  for (const std::int64_t size : dims_xyz) {
    product *= static_cast<std::uint64_t>(size);
  }
  return product;
}

std::span<const std::int16_t> NiftiImage::voxels() const noexcept {
  return {reinterpret_cast<const std::int16_t*>(storage.span().data() + voxels_at),
          static_cast<std::size_t>(header.num_voxels())};
}

NiftiHeader parse_nifti_header(std::span<const std::byte> head) {
  if (head.size() < nifti1_bytes + 4) {
    throw FormatError("header", "the file is shorter than a NIfTI header");
  }
  const auto stored_size = Fields(head, false).at<std::int32_t>(0);
  const auto swapped_size = swap_bytes(stored_size);
  const bool swap = swapped_size == nifti1_bytes || swapped_size == nifti2_bytes;
  const std::int32_t header_size = swap ? swapped_size : stored_size;
  NiftiHeader header;
  header.big_endian = swap;
  if (header_size == static_cast<std::int32_t>(nifti2_bytes)) {
    header.version = 2;
  } else if (header_size != static_cast<std::int32_t>(nifti1_bytes)) {
    throw FormatError("sizeof_hdr",
                      "the file is not NIfTI: the header does not start with 348 or 540");
  }
  const bool is_nifti2 = header.version == 2;
  if (is_nifti2 && head.size() < nifti_header_bytes) {
    throw FormatError("header", "the file is shorter than a NIfTI-2 header");
  }
  const Layout& layout = is_nifti2 ? nifti2 : nifti1;
  if (!is_nifti2 && has_magic(head, layout.magic, magic1_pair)) {
    throw FormatError("magic", "the voxels lie in a second file (.img); write one .nii file");
  }
  if (!has_magic(head, layout.magic, is_nifti2 ? magic2 : magic1)) {
    throw FormatError("magic", "the file is Analyze or damaged, not NIfTI; convert it to .nii");
  }

  const Fields fields(head, swap);
  header.datatype = fields.at<std::int16_t>(layout.datatype);
  header.bytes_per_voxel = voxel_bytes(header.datatype);
  const auto bitpix = fields.at<std::int16_t>(layout.bitpix);
  if (bitpix != static_cast<std::int16_t>(8 * header.bytes_per_voxel)) {
    throw FormatError("bitpix", std::to_string(bitpix) + " bits contradict datatype " +
                                    std::to_string(header.datatype));
  }
  std::array<std::int64_t, 8> dim{};
  for (std::size_t i = 0; i < dim.size(); ++i) {
    dim[i] = is_nifti2 ? fields.at<std::int64_t>(layout.dim + 8 * i)
                       : fields.at<std::int16_t>(layout.dim + 2 * i);
  }
  read_dims(dim, header);
  if (is_nifti2) {
    header.data_offset = checked_data_offset(
        static_cast<double>(fields.at<std::int64_t>(layout.vox_offset)), nifti2_bytes);
    header.scl_slope = fields.at<double>(layout.scl_slope);
    header.scl_inter = fields.at<double>(layout.scl_inter);
    header.qform_code = fields.at<std::int32_t>(layout.qform_code);
    header.sform_code = fields.at<std::int32_t>(layout.sform_code);
    header.xyzt_units = fields.at<std::int32_t>(layout.xyzt_units);
    read_geometry<double>(fields, layout, header);
  } else {
    header.data_offset = checked_data_offset(fields.at<float>(layout.vox_offset), nifti1_bytes);
    header.scl_slope = fields.at<float>(layout.scl_slope);
    header.scl_inter = fields.at<float>(layout.scl_inter);
    header.qform_code = fields.at<std::int16_t>(layout.qform_code);
    header.sform_code = fields.at<std::int16_t>(layout.sform_code);
    header.xyzt_units = fields.at<std::uint8_t>(layout.xyzt_units);
    read_geometry<float>(fields, layout, header);
  }
  read_scaling(header);
  return header;
}

NiftiImage read_nifti(const std::string& path, std::uint64_t max_bytes) {
  const File file(path);
  if (file.size() > max_bytes) {
    throw FormatError("file", "the file has " + std::to_string(file.size()) +
                                  " bytes, more than the limit of " + std::to_string(max_bytes));
  }
  // Room for a gzip header with a long name besides the NIfTI header itself.
  Buffer start(static_cast<std::size_t>(std::min<std::uint64_t>(file.size(), 65536)));
  if (file.read_at(0, start.span()) != start.size()) {
    throw FormatError("file", "the file became shorter while it was read");
  }
  const bool gzip = is_gzip(start.span());
  Buffer compressed;
  std::array<std::byte, nifti_header_bytes> head{};
  std::size_t head_size = std::min(start.size(), head.size());
  if (gzip) {
    compressed = Buffer(static_cast<std::size_t>(file.size()));
    if (file.read_at(0, compressed.span()) != compressed.size()) {
      throw FormatError("file", "the file became shorter while it was read");
    }
    head_size = inflate_prefix(compressed.span(), head);
  } else {
    std::copy_n(start.span().begin(), head_size, head.begin());
  }

  NiftiImage image;
  image.header = parse_nifti_header(std::span(head).first(head_size));
  const NiftiHeader& header = image.header;
  check_sizes(header, file, gzip, max_bytes);

  const auto num_bytes = static_cast<std::size_t>(header.num_bytes());
  const auto data_offset = static_cast<std::size_t>(header.data_offset);
  Buffer decoded;
  std::span<std::byte> stored;
  if (gzip) {
    decoded = Buffer(data_offset + num_bytes);
    inflate_exactly(compressed.span(), decoded.span());
    compressed = Buffer();
    stored = decoded.span().subspan(data_offset);
  } else {
    decoded = Buffer(num_bytes);
    stored = decoded.span();
    if (file.read_at(header.data_offset, stored) != stored.size()) {
      throw FormatError("file", "the file became shorter while it was read");
    }
  }
  const auto num_voxels = static_cast<std::size_t>(header.num_voxels());
  // int16 in place: the decoded buffer becomes the result unless its voxels lie at an odd address.
  const bool in_place = header.datatype == 4 && (!gzip || data_offset % alignof(std::int16_t) == 0);
  if (in_place) {
    image.voxels_at = decoded.size() - num_bytes;
    image.storage = std::move(decoded);
  } else {
    image.storage = Buffer(num_voxels * sizeof(std::int16_t));
  }
  const std::span<std::int16_t> out{
      reinterpret_cast<std::int16_t*>(image.storage.span().data() + image.voxels_at), num_voxels};
  const Conversion found = header.big_endian ? convert_any<true>(header, stored, out)
                                             : convert_any<false>(header, stored, out);
  if (found.non_finite) {
    throw FormatError("voxels", "some are NaN or infinite; replace them (air is -1000 HU)");
  }
  if (found.out_of_range) {
    throw FormatError("voxels", "some lie outside int16 after slope and intercept: not HU");
  }
  image.rounded = found.rounded;
  return image;
}

}  // namespace tapct

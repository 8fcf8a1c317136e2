#include "tapct/nifti.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string_view>

#include "tapct/error.hpp"
#include "tapct/file.hpp"
#include "tapct/inflate.hpp"
#include "tapct/voxels.hpp"

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

std::size_t checked_voxel_bytes(std::int32_t datatype) {
  const std::size_t size = voxel_bytes(datatype);
  if (size == 0) {
    throw FormatError("datatype",
                      "code " + std::to_string(datatype) +
                          " is not an integer or float type that holds HU; convert the scan to "
                          "int16 or float32",
                      "unsupported");
  }
  return size;
}

// Spatial axes, checked so that num_voxels() * bytes_per_voxel cannot overflow.
void read_dims(const std::array<std::int64_t, 8>& dim, NiftiHeader& header) {
  if (dim[0] < 1 || dim[0] > 7) {
    throw FormatError("dim[0]", std::to_string(dim[0]) + " is not a number of axes from 1 to 7");
  }
  if (dim[0] < 3) {
    throw FormatError("dim[0]",
                      "the file has " + std::to_string(dim[0]) + " axes; a CT volume has three",
                      "unsupported");
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
                            " volumes; write the wanted one to its own 3D file",
                        "unsupported");
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
  header.has_lone_inter =
      header.scl_slope == 0 && header.scl_inter != 0 && std::isfinite(header.scl_inter);
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

void check_sizes(const NiftiHeader& header, std::uint64_t file_size, bool gzip,
                 std::uint64_t max_bytes) {
  const std::uint64_t num_bytes = header.num_bytes();
  if (header.data_offset > max_bytes || num_bytes > max_bytes - header.data_offset ||
      header.num_voxels() > max_bytes / sizeof(std::int16_t)) {
    throw FormatError("dim",
                      "the header declares " + std::to_string(num_bytes) +
                          " bytes of voxels, more than the limit of " + std::to_string(max_bytes),
                      "limit");
  }
  const std::uint64_t total = header.data_offset + num_bytes;
  if (gzip && total > max_inflated_size(file_size)) {
    throw FormatError("dim", "the header declares more voxels than the compressed file can hold");
  }
  if (!gzip && total != file_size) {
    throw FormatError(total > file_size ? "dim" : "vox_offset",
                      "the header declares " + std::to_string(total) + " bytes, the file has " +
                          std::to_string(file_size));
  }
}

void check_file_size(std::uint64_t size, std::uint64_t max_bytes) {
  if (size > max_bytes) {
    throw FormatError("file",
                      "the file has " + std::to_string(size) + " bytes, more than the limit of " +
                          std::to_string(max_bytes),
                      "limit");
  }
}

// Where the stored bytes and the int16 voxels lie in one block, for convert_voxels to work in it:
// voxels of one byte end where the int16 voxels end, all others are at or behind their int16.
struct Places {
  std::size_t stored_at;  // first stored byte: of the header for gzip, else of the voxels
  std::size_t voxels_at;
  std::size_t size;
};

Places places_of(const NiftiHeader& header, bool gzip, std::size_t base_address) {
  const auto lead = gzip ? static_cast<std::size_t>(header.data_offset) : std::size_t{0};
  const auto num_stored = static_cast<std::size_t>(header.num_bytes());
  const std::size_t num_int16 =
      static_cast<std::size_t>(header.num_voxels()) * sizeof(std::int16_t);
  const std::size_t base = base_address % alignof(std::int16_t);
  const std::size_t stored_at = base + (num_int16 > num_stored ? num_int16 - num_stored : 0);
  // int16 stays where it is, unless that is an odd address.
  const bool in_place = header.datatype == 4 && lead % alignof(std::int16_t) == 0;
  return {stored_at, in_place ? stored_at + lead : base, stored_at + lead + num_stored};
}

// Gives `image` a block that holds the stored bytes first and the voxels in the end.
std::span<std::byte> take_block(NiftiImage& image, Places& places, bool gzip,
                                const NiftiOptions& options) {
  if (!options.buffer) {
    places = places_of(image.header, gzip, 0);
    image.storage = Buffer(places.size);
    return image.storage.span();
  }
  places = places_of(image.header, gzip, reinterpret_cast<std::uintptr_t>(options.buffer->data()));
  if (options.buffer->size() < places.size) {
    throw InputError("buffer holds " + std::to_string(options.buffer->size()) +
                     " bytes, this scan needs " + std::to_string(places.size));
  }
  return *options.buffer;
}

void finish(NiftiImage& image, std::span<std::byte> block, const Places& places, std::size_t lead) {
  const NiftiHeader& header = image.header;
  image.voxels = {reinterpret_cast<std::int16_t*>(block.data() + places.voxels_at),
                  static_cast<std::size_t>(header.num_voxels())};
  const auto stored =
      block.subspan(places.stored_at + lead, static_cast<std::size_t>(header.num_bytes()));
  const Conversion found =
      convert_voxels({header.datatype, header.big_endian, header.scl_slope, header.scl_inter},
                     stored, image.voxels);
  const std::string of_all = " of " + std::to_string(header.num_voxels());
  if (found.num_non_finite != 0) {
    throw FormatError("voxels",
                      std::to_string(found.num_non_finite) + of_all +
                          " are NaN or infinite; replace them (air is -1000 HU)",
                      "non_finite");
  }
  if (found.num_outside != 0) {
    throw FormatError("voxels",
                      std::to_string(found.num_outside) + of_all +
                          " lie outside int16 after slope and intercept: not HU",
                      "hu");
  }
  image.rounded = found.rounded;
  image.storage.shrink(places.voxels_at + image.voxels.size_bytes());
}

NiftiImage read_gzip(std::span<const std::byte> compressed, const NiftiOptions& options) {
  std::array<std::byte, nifti_header_bytes> head{};
  const std::size_t head_size = inflate_prefix(compressed, head);
  NiftiImage image;
  image.header = parse_nifti_header(std::span(head).first(head_size));
  check_sizes(image.header, compressed.size(), true, options.max_bytes);
  Places places{};
  const std::span<std::byte> block = take_block(image, places, true, options);
  image.num_members = inflate_exactly(
      compressed, block.subspan(places.stored_at, places.size - places.stored_at), options.threads);
  finish(image, block, places, static_cast<std::size_t>(image.header.data_offset));
  return image;
}

// `read_at(offset, out)` says how many bytes there were.
template <typename ReadAt>
NiftiImage read_plain(std::span<const std::byte> head, std::uint64_t size, const ReadAt& read_at,
                      const NiftiOptions& options) {
  NiftiImage image;
  image.header = parse_nifti_header(head.first(std::min(head.size(), nifti_header_bytes)));
  check_sizes(image.header, size, false, options.max_bytes);
  Places places{};
  const std::span<std::byte> block = take_block(image, places, false, options);
  const auto stored = block.subspan(places.stored_at, places.size - places.stored_at);
  if (read_at(image.header.data_offset, stored) != stored.size()) {
    throw FormatError("file", "the file became shorter while it was read");
  }
  finish(image, block, places, 0);
  return image;
}

}  // namespace

std::uint64_t NiftiHeader::num_voxels() const noexcept {
  std::uint64_t product = 1;
  for (const std::int64_t size : dims_xyz) {
    product *= static_cast<std::uint64_t>(size);
  }
  return product;
}

NiftiHeader parse_nifti_header(std::span<const std::byte> head) {
  if (head.size() < nifti1_bytes + 4) {
    throw FormatError("header", "the file is shorter than a NIfTI header", "integrity");
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
    throw FormatError("header", "the file is shorter than a NIfTI-2 header", "integrity");
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
  header.bytes_per_voxel = checked_voxel_bytes(header.datatype);
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

NiftiImage read_nifti(const std::string& path, const NiftiOptions& options) {
  const File file(path);
  check_file_size(file.size(), options.max_bytes);
  std::array<std::byte, nifti_header_bytes> start{};
  const std::size_t start_size = file.read_at(0, start);
  const auto head = std::span<const std::byte>(start).first(start_size);
  if (!is_gzip(head)) {
    return read_plain(
        head, file.size(),
        [&](std::uint64_t offset, std::span<std::byte> out) { return file.read_at(offset, out); },
        options);
  }
  Buffer compressed(static_cast<std::size_t>(file.size()));
  if (file.read_at(0, compressed.span()) != compressed.size()) {
    throw FormatError("file", "the file became shorter while it was read");
  }
  return read_gzip(compressed.span(), options);
}

NiftiImage parse_nifti(std::span<const std::byte> content, const NiftiOptions& options) {
  check_file_size(content.size(), options.max_bytes);
  if (is_gzip(content)) {
    return read_gzip(content, options);
  }
  const auto read_at = [&](std::uint64_t offset, std::span<std::byte> out) {
    // read_plain has checked that the voxels end with the content.
    std::memcpy(out.data(), content.data() + offset, out.size());
    return out.size();
  };
  return read_plain(content, content.size(), read_at, options);
}

}  // namespace tapct

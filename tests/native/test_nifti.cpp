#include <algorithm>
#include <cmath>
#include <limits>
#include <system_error>

#include "check.hpp"
#include "samples.hpp"
#include "tapct/error.hpp"
#include "tapct/nifti.hpp"

namespace {

using samples::Bytes;
using samples::put;
using tapct::FormatError;

constexpr std::uint64_t limit = 1 << 20;

struct Sample {
  int version = 1;
  bool big = false;
  std::int16_t datatype = 4;
  std::int16_t bitpix = 16;
  std::array<std::int64_t, 8> dim{3, 4, 3, 2, 1, 1, 1, 1};
  double slope = 1;
  double inter = 0;
  double vox_offset = -1;  // -1: right behind the header
};

std::size_t header_bytes(const Sample& s) { return s.version == 2 ? 544 : 352; }

Bytes header(const Sample& s) {
  Bytes h(header_bytes(s));
  const double vox_offset = s.vox_offset == -1 ? static_cast<double>(h.size()) : s.vox_offset;
  if (s.version == 2) {
    put(h, 0, std::int32_t{540}, s.big);
    std::memcpy(h.data() + 4, "n+2\0\r\n\032\n", 8);
    put(h, 12, s.datatype, s.big);
    put(h, 14, s.bitpix, s.big);
    for (std::size_t i = 0; i < 8; ++i) {
      put(h, 16 + 8 * i, s.dim[i], s.big);
      put(h, 104 + 8 * i, 1.5 + static_cast<double>(i), s.big);
    }
    put(h, 168, static_cast<std::int64_t>(vox_offset), s.big);
    put(h, 176, s.slope, s.big);
    put(h, 184, s.inter, s.big);
    put(h, 344, std::int32_t{1}, s.big);
    put(h, 348, std::int32_t{2}, s.big);
    for (std::size_t i = 0; i < 18; ++i) {
      put(h, 352 + 8 * i, 0.25 * static_cast<double>(i), s.big);
    }
    put(h, 500, std::int32_t{10}, s.big);
    return h;
  }
  put(h, 0, std::int32_t{348}, s.big);
  for (std::size_t i = 0; i < 8; ++i) {
    put(h, 40 + 2 * i, static_cast<std::int16_t>(s.dim[i]), s.big);
    put(h, 76 + 4 * i, 1.5F + static_cast<float>(i), s.big);
  }
  put(h, 70, s.datatype, s.big);
  put(h, 72, s.bitpix, s.big);
  put(h, 108, static_cast<float>(vox_offset), s.big);
  put(h, 112, static_cast<float>(s.slope), s.big);
  put(h, 116, static_cast<float>(s.inter), s.big);
  put(h, 123, std::uint8_t{10});
  put(h, 252, std::int16_t{1}, s.big);
  put(h, 254, std::int16_t{2}, s.big);
  for (std::size_t i = 0; i < 18; ++i) {
    put(h, 256 + 4 * i, 0.25F * static_cast<float>(i), s.big);
  }
  std::memcpy(h.data() + 344, "n+1\0", 4);
  return h;
}

template <typename T>
Bytes file_of(Sample s, const std::vector<T>& values) {
  Bytes bytes = header(s);
  const std::size_t start = bytes.size();
  bytes.resize(start + values.size() * sizeof(T));
  for (std::size_t i = 0; i < values.size(); ++i) {
    put(bytes, start + i * sizeof(T), values[i], s.big);
  }
  return bytes;
}

std::vector<std::int16_t> read(const Bytes& bytes, bool* rounded = nullptr) {
  static const samples::Folder folder;  // one for all: making a folder per file takes seconds
  const auto image = tapct::read_nifti(folder.write("scan", bytes), {limit});
  const auto parsed = tapct::parse_nifti(bytes, {limit, 2});
  CHECK(std::ranges::equal(parsed.voxels, image.voxels));
  if (rounded != nullptr) {
    *rounded = image.rounded;
  }
  return {image.voxels.begin(), image.voxels.end()};
}

tapct::NiftiHeader parse(const Sample& s) {
  Bytes h = header(s);
  h.resize(tapct::nifti_header_bytes);
  return tapct::parse_nifti_header(h);
}

// Voxels 24 values long that fit every type, in all byte orders, versions and both containers.
template <typename T>
void check_type(std::int16_t datatype) {
  std::vector<T> values(24);
  std::vector<std::int16_t> expected(24);
  for (std::size_t i = 0; i < values.size(); ++i) {
    const int value = static_cast<int>(i) * 5 - (std::numeric_limits<T>::is_signed ? 60 : 0);
    values[i] = static_cast<T>(value);
    expected[i] = static_cast<std::int16_t>(value);
  }
  for (const int version : {1, 2}) {
    for (const bool big : {false, true}) {
      Sample s;
      s.version = version;
      s.big = big;
      s.datatype = datatype;
      s.bitpix = 8 * sizeof(T);
      const Bytes plain = file_of(s, values);
      CHECK(read(plain) == expected);
      CHECK(read(samples::gzip(plain)) == expected);
      s.slope = 2;
      s.inter = -10;
      std::vector<std::int16_t> scaled = expected;
      for (std::int16_t& value : scaled) {
        value = static_cast<std::int16_t>(2 * value - 10);
      }
      CHECK(read(file_of(s, values)) == scaled);
    }
  }
}

}  // namespace

TEST(every_datatype_reads_in_both_byte_orders_and_versions) {
  check_type<std::uint8_t>(2);
  check_type<std::int16_t>(4);
  check_type<std::int32_t>(8);
  check_type<float>(16);
  check_type<double>(64);
  check_type<std::int8_t>(256);
  check_type<std::uint16_t>(512);
  check_type<std::uint32_t>(768);
  check_type<std::int64_t>(1024);
  check_type<std::uint64_t>(1280);
}

TEST(other_datatypes_are_errors) {
  constexpr std::array<std::int16_t, 12> codes{0,    1,    32,   128, 255, 1536,
                                               1792, 2048, 2304, 5,   -4,  32767};
  for (const std::int16_t code : codes) {
    Sample s;
    s.datatype = code;
    CHECK_THROWS(FormatError, "datatype", parse(s));
  }
  Sample s;
  s.bitpix = 8;
  CHECK_THROWS(FormatError, "bitpix", parse(s));
}

TEST(geometry_is_reported_as_stored) {
  for (const int version : {1, 2}) {
    for (const bool big : {false, true}) {
      Sample s;
      s.version = version;
      s.big = big;
      const tapct::NiftiHeader h = parse(s);
      CHECK(h.version == version);
      CHECK(h.big_endian == big);
      CHECK((h.dims_xyz == std::array<std::int64_t, 3>{4, 3, 2}));
      CHECK(h.qfac == 1.5);
      CHECK((h.pixdim_xyz == std::array{2.5, 3.5, 4.5}));
      CHECK(h.qform_code == 1);
      CHECK(h.sform_code == 2);
      CHECK(h.xyzt_units == 10);
      CHECK((h.quaternion_bcd == std::array{0.0, 0.25, 0.5}));
      CHECK((h.offset_xyz == std::array{0.75, 1.0, 1.25}));
      CHECK(h.srow[0] == 1.5 && h.srow[11] == 4.25);
    }
  }
}

TEST(hostile_dims_are_errors_before_any_allocation) {
  const auto with = [](std::array<std::int64_t, 8> dim, int version = 1) {
    Sample s;
    s.dim = dim;
    s.version = version;
    return file_of(s, std::vector<std::int16_t>(24));
  };
  CHECK_THROWS(FormatError, "dim[0]", read(with({0, 4, 3, 2, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[0]", read(with({8, 4, 3, 2, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[0]", read(with({-1, 4, 3, 2, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[0]", read(with({2, 4, 6, 1, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[2]", read(with({3, 4, 0, 2, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[3]", read(with({3, 4, 3, -2, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[4]", read(with({4, 4, 3, 1, 2, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[4]", read(with({4, 4, 3, 2, 0, 1, 1, 1})));
  CHECK_THROWS(FormatError, "dim[5]", read(with({5, 4, 3, 1, 1, 2, 1, 1})));
  CHECK_THROWS(FormatError, "limit", read(with({3, 32767, 32767, 32767, 1, 1, 1, 1})));
  CHECK_THROWS(FormatError, "multiply",
               read(with({3, 1LL << 62, 1LL << 62, 1LL << 62, 1, 1, 1, 1}, 2)));
  CHECK_THROWS(FormatError, "multiply", read(with({3, 1LL << 61, 3, 2, 1, 1, 1, 1}, 2)));
  CHECK_THROWS(FormatError, "dim: the header declares", read(with({3, 4, 3, 3, 1, 1, 1, 1})));
  CHECK(read(with({4, 4, 3, 2, 1, 0, 0, 0})) == std::vector<std::int16_t>(24));
  // The compressed file is far too small for what its header declares: refused by size alone.
  Sample s;
  s.dim = {3, 700, 700, 1, 1, 1, 1, 1};
  CHECK_THROWS(FormatError, "than the compressed file can hold",
               read(samples::gzip(file_of(s, std::vector<std::int16_t>(24)))));
}

TEST(extra_and_missing_bytes_are_errors) {
  const Bytes whole = file_of(Sample{}, samples::voxels(24));
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CHECK_THROWS(FormatError, "", read(samples::first(whole, size)));
    CHECK_THROWS(FormatError, "", read(samples::gzip(samples::first(whole, size))));
  }
  CHECK_THROWS(FormatError, "vox_offset", read(samples::join(whole, Bytes(1))));
  CHECK_THROWS(FormatError, "more bytes", read(samples::gzip(samples::join(whole, Bytes(1)))));
}

TEST(voxel_offsets_outside_the_data_are_errors) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  for (const double offset : {0.0, -352.0, 351.0, 352.5, nan, inf, -inf, 1e30}) {
    Sample s;
    s.vox_offset = offset;
    CHECK_THROWS(FormatError, "vox_offset", read(file_of(s, samples::voxels(24))));
  }
  for (const double offset : {368.0, 1e6, 1e12}) {
    Sample s;
    s.vox_offset = offset;
    CHECK_THROWS(FormatError, "", read(file_of(s, samples::voxels(24))));
    CHECK_THROWS(FormatError, "", read(samples::gzip(file_of(s, samples::voxels(24)))));
  }
}

TEST(an_extension_before_the_voxels_is_skipped) {
  const auto values = samples::voxels(24);
  for (const std::size_t extension : {16U, 17U}) {  // 17: int16 voxels at an odd offset
    Sample s;
    s.vox_offset = static_cast<double>(352 + extension);
    const Bytes bytes = samples::join(samples::join(header(s), Bytes(extension, std::byte{7})),
                                      samples::bytes_of(values));
    CHECK(read(bytes) == values);
    CHECK(read(samples::gzip(bytes)) == values);
  }
}

TEST(slope_zero_means_no_scaling) {
  const auto values = samples::voxels(24);
  const double nan = std::numeric_limits<double>::quiet_NaN();
  Sample s;
  s.slope = 0;
  s.inter = 5;
  CHECK(read(file_of(s, values)) == values);
  s.slope = s.inter = nan;
  CHECK(read(file_of(s, values)) == values);
  s.inter = 5;
  CHECK_THROWS(FormatError, "scl_slope", read(file_of(s, values)));
  s.slope = 1;
  s.inter = std::numeric_limits<double>::infinity();
  CHECK_THROWS(FormatError, "scl_inter", read(file_of(s, values)));
}

TEST(values_round_half_to_even_and_say_so) {
  Sample s;
  s.datatype = 16;
  s.bitpix = 32;
  s.dim = {3, 2, 2, 2, 1, 1, 1, 1};
  bool rounded = false;
  const std::vector<float> values{0.5F, 1.5F, -0.5F, -1.5F, 2.4F, -32768.5F, 32767.4F, -1000.F};
  const std::vector<std::int16_t> expected{0, 2, 0, -2, 2, -32768, 32767, -1000};
  CHECK(read(file_of(s, values), &rounded) == expected);
  CHECK(rounded);
  CHECK(read(file_of(s, std::vector<float>(8, 3.F)), &rounded) == std::vector<std::int16_t>(8, 3));
  CHECK(!rounded);
}

TEST(values_that_are_not_int16_are_errors) {
  Sample s;
  s.datatype = 64;
  s.bitpix = 64;
  const double inf = std::numeric_limits<double>::infinity();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const double bad : {nan, inf, -inf}) {
    std::vector<double> values(24);
    values[23] = bad;
    CHECK_THROWS(FormatError, "NaN or infinite", read(file_of(s, values)));
  }
  for (const double bad : {32768.0, 32767.5, -32769.0, 1e300, -1e300, 9.3e18}) {
    std::vector<double> values(24);
    values[11] = bad;
    CHECK_THROWS(FormatError, "outside int16", read(file_of(s, values)));
  }
  s.datatype = 1280;
  CHECK_THROWS(FormatError, "outside int16",
               read(file_of(s, std::vector<std::uint64_t>(24, ~std::uint64_t{0}))));
}

TEST(files_that_are_not_nifti_are_errors) {
  Bytes pair = file_of(Sample{}, samples::voxels(24));
  std::memcpy(pair.data() + 344, "ni1\0", 4);
  CHECK_THROWS(FormatError, ".img", read(pair));
  std::memcpy(pair.data() + 344, "\0\0\0\0", 4);
  CHECK_THROWS(FormatError, "magic", read(pair));
  CHECK_THROWS(FormatError, "sizeof_hdr", read(Bytes(1000, std::byte{'a'})));
  CHECK_THROWS(FormatError, "header", read(Bytes{}));
  CHECK_THROWS(FormatError, "sizeof_hdr",
               read(samples::gzip(samples::gzip(file_of(Sample{}, samples::voxels(20000))))));
  const samples::Folder folder;
  CHECK_THROWS(std::system_error, "", tapct::read_nifti(folder.at("missing"), {limit}));
  CHECK_THROWS(std::system_error, "", tapct::read_nifti(folder.at("."), {limit}));
  CHECK_THROWS(FormatError, "limit", tapct::read_nifti(folder.write("large", Bytes(2000)), {1999}));
}

TEST(no_flipped_bit_of_a_compressed_scan_gives_other_voxels) {
  const auto values = samples::voxels(24);
  const Bytes whole = samples::gzip(file_of(Sample{}, values));
  int num_silent = 0;
  for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
    try {
      num_silent += read(samples::flipped(whole, bit)) != values ? 1 : 0;
    } catch (const FormatError&) {
    }
  }
  CHECK(num_silent == 0);
}

#include <cmath>
#include <string>

#include "check.hpp"
#include "samples.hpp"
#include "tapct/dicom.hpp"
#include "tapct/error.hpp"

namespace {

using samples::Bytes;
using tapct::DicomScan;
using tapct::FormatError;

const std::vector<tapct::DicomTag> tags{{"Rows", 0x00280010}, {"ImageType", 0x00080008}};

template <typename T>
void add(Bytes& bytes, T value, bool big = false) {
  bytes.resize(bytes.size() + sizeof(T));
  samples::put(bytes, bytes.size() - sizeof(T), value, big);
}

void add_text(Bytes& bytes, const std::string& text) {
  for (const char letter : text) {
    bytes.push_back(static_cast<std::byte>(letter));
  }
}

void add_short(Bytes& bytes, unsigned tag, const std::string& vr, const Bytes& value,
               bool big = false) {
  add(bytes, static_cast<std::uint16_t>(tag >> 16), big);
  add(bytes, static_cast<std::uint16_t>(tag), big);
  add_text(bytes, vr);
  add(bytes, static_cast<std::uint16_t>(value.size()), big);
  bytes.insert(bytes.end(), value.begin(), value.end());
}

void add_long(Bytes& bytes, unsigned tag, const std::string& vr, std::uint32_t length,
              bool big = false) {
  add(bytes, static_cast<std::uint16_t>(tag >> 16), big);
  add(bytes, static_cast<std::uint16_t>(tag), big);
  add_text(bytes, vr);
  add(bytes, std::uint16_t{0});
  add(bytes, length, big);
}

void add_mark(Bytes& bytes, unsigned tag, std::uint32_t length) {
  add(bytes, static_cast<std::uint16_t>(tag >> 16));
  add(bytes, static_cast<std::uint16_t>(tag));
  add(bytes, length);
}

Bytes text(const std::string& value) {
  Bytes bytes;
  add_text(bytes, value);
  return bytes;
}

Bytes meta(std::string uid) {
  uid.resize(uid.size() + uid.size() % 2, '\0');
  Bytes bytes(128);
  add_text(bytes, "DICM");
  add_short(bytes, 0x00020010, "UI", text(uid));
  return bytes;
}

constexpr char explicit_little[] = "1.2.840.10008.1.2.1";

Bytes pixels_of(const std::vector<std::int16_t>& values, bool big) {
  Bytes bytes;
  for (const std::int16_t value : values) {
    add(bytes, value, big);
  }
  return bytes;
}

Bytes slice(const std::vector<std::int16_t>& values, bool big = false, const Bytes& before = {}) {
  Bytes bytes = meta(big ? "1.2.840.10008.1.2.2" : explicit_little);
  add_short(bytes, 0x00080008, "CS", text("AXIAL "), big);
  bytes.insert(bytes.end(), before.begin(), before.end());
  Bytes rows;
  add(rows, std::uint16_t{2}, big);
  add_short(bytes, 0x00280010, "US", rows, big);
  add_long(bytes, 0x7fe00010, "OW", static_cast<std::uint32_t>(2 * values.size()), big);
  return samples::join(bytes, pixels_of(values, big));
}

DicomScan scan(const Bytes& bytes) {
  return tapct::scan_dicom(std::span<const std::byte>(bytes), tags);
}

std::vector<std::int16_t> read(const Bytes& bytes, double slope, double intercept,
                               std::optional<std::uint16_t> padding = {}, unsigned bits = 16) {
  const DicomScan found = scan(bytes);
  tapct::StoredSlice stored;
  stored.source = std::span<const std::byte>(bytes);
  stored.place = "file 3 of 40";
  stored.pixel_offset = found.header.pixel_offset.value();
  stored.pixel_bytes = found.header.pixel_bytes.value();
  stored.big_endian = found.header.big_endian;
  stored.slope = slope;
  stored.intercept = intercept;
  stored.padding = padding;
  stored.bits_stored = bits;
  std::vector<std::int16_t> out(4);
  tapct::read_slices(std::span(&stored, 1), out.size(), out, 2);
  return out;
}

Bytes nested(std::size_t depth) {
  Bytes bytes;
  for (std::size_t i = 0; i < depth; ++i) {
    add_long(bytes, 0x00091001, "SQ", 0xffffffff);
    add_mark(bytes, 0xfffee000, 0xffffffff);
  }
  for (std::size_t i = 0; i < depth; ++i) {
    add_mark(bytes, 0xfffee00d, 0);
    add_mark(bytes, 0xfffee0dd, 0);
  }
  return bytes;
}

}  // namespace

TEST(dicom_header_gives_the_fields_asked_for) {
  for (const bool big : {false, true}) {
    const DicomScan found = scan(slice({1, 2, 3, 4}, big));
    CHECK(found.has_mark && found.header.big_endian == big);
    CHECK(found.header.values.size() == 2);
    CHECK(found.header.values[0].keyword == "ImageType");
    CHECK(found.header.values[0].bytes == "AXIAL ");
    CHECK(found.header.values[1].bytes == (big ? std::string("\0\2", 2) : std::string("\2\0", 2)));
    CHECK(found.header.pixel_bytes == 8U);
  }
}

TEST(dicom_slices_become_hu) {
  for (const bool big : {false, true}) {
    const Bytes bytes = slice({0, 100, -2000, 7}, big);
    CHECK((read(bytes, 1, -1024) == std::vector<std::int16_t>{-1024, -924, -3024, -1017}));
    CHECK((read(bytes, -2, 1) == std::vector<std::int16_t>{1, -199, 4001, -13}));
    CHECK((read(bytes, 0.5, 0) == std::vector<std::int16_t>{0, 50, -1000, 4}));  // 3.5: half even
    CHECK_THROWS(FormatError, "do not fit int16", read(bytes, 20, 0));
    CHECK((read(bytes, 20, 0, 63536) == std::vector<std::int16_t>{0, 2000, -32768, 140}));
    CHECK_THROWS(FormatError, "infinite", read(bytes, 1e308, 0));
    CHECK_THROWS(FormatError, "file 3 of 40 has values beyond 8 bits", read(bytes, 1, 0, {}, 8));
  }
  CHECK_THROWS(FormatError, "has 6 bytes where Rows and Columns need 8",
               read(slice({1, 2, 3}), 1, 0));
  CHECK_THROWS(FormatError, "has 10 bytes", read(slice({1, 2, 3, 4, 5}), 1, 0));
}

TEST(dicom_sequences_are_skipped_without_recursion) {
  CHECK(scan(slice({1, 2, 3, 4}, false, nested(30))).header.values.size() == 2);
  CHECK_THROWS(FormatError, "deeper", scan(slice({1, 2, 3, 4}, false, nested(10000))));
}

TEST(dicom_file_cut_anywhere_is_refused_or_has_no_whole_pixels) {
  const Bytes whole = slice({1, 2, 3, 4}, false, nested(2));
  for (std::size_t size = 132; size < whole.size(); ++size) {
    try {
      const DicomScan found = scan(samples::first(whole, size));
      if (found.header.pixel_offset) {
        CHECK_THROWS(FormatError, "PixelData", read(samples::first(whole, size), 1, 0));
      }
    } catch (const FormatError&) {
    }
  }
  CHECK(!scan(samples::first(whole, 131)).has_mark);
}

TEST(dicom_lies_are_refused) {
  Bytes twice = slice({1, 2, 3, 4}, false, [] {
    Bytes bytes;
    add_short(bytes, 0x00080008, "CS", text("OTHER "));
    return bytes;
  }());
  CHECK_THROWS(FormatError, "ImageType: has it twice", scan(twice));
  Bytes bad_vr = meta(explicit_little);
  add_short(bad_vr, 0x00080008, "??", text("AXIAL "));
  CHECK_THROWS(FormatError, "damaged", scan(bad_vr));
  Bytes beyond = meta(explicit_little);
  add_long(beyond, 0x00091001, "OB", 0xfffffffe);
  CHECK_THROWS(FormatError, "cut short", scan(beyond));
  CHECK_THROWS(FormatError, "TransferSyntaxUID", scan(meta("1.2.x")));
  Bytes none(128);
  add_text(none, "DICM");
  CHECK_THROWS(FormatError, "TransferSyntaxUID", scan(none));
  Bytes bad_deflate = meta("1.2.840.10008.1.2.1.99");
  add_text(bad_deflate, "\7\7\7\7");
  CHECK_THROWS(FormatError, "damaged deflated", scan(bad_deflate));
}

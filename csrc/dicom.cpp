#include "tapct/dicom.hpp"

#include <algorithm>
#include <cstring>
#include <system_error>

#include "tapct/error.hpp"
#include "tapct/file.hpp"
#include "tapct/inflate_raw.hpp"
#include "tapct/parallel.hpp"

namespace tapct {
namespace {

constexpr std::size_t mark_at = 128;
constexpr std::size_t meta_at = 132;
constexpr std::size_t start_bytes = 1024;        // of a file without the mark, for its judge
constexpr std::size_t window_bytes = 16 * 1024;  // a slice's whole header, in one read
constexpr std::size_t max_value_bytes = 65536;
constexpr std::size_t max_depth = 64;              // real files nest about ten deep
constexpr std::size_t max_elements = 4 * 1 << 20;  // 0.1 s; a large enhanced object has 200,000

constexpr std::uint32_t undefined_length = 0xffffffff;
constexpr std::uint32_t group_length = 0x00020000;
constexpr std::uint32_t transfer_syntax_uid = 0x00020010;
constexpr std::uint32_t pixel_data = 0x7fe00010;
constexpr std::uint32_t item = 0xfffee000;
constexpr std::uint32_t item_end = 0xfffee00d;
constexpr std::uint32_t sequence_end = 0xfffee0dd;

constexpr char implicit_little[] = "1.2.840.10008.1.2";
constexpr char explicit_big[] = "1.2.840.10008.1.2.2";
constexpr char deflated_little[] = "1.2.840.10008.1.2.1.99";

[[noreturn]] void damaged() {
  throw FormatError("file", "cannot be parsed as DICOM; it is damaged");
}

[[noreturn]] void cut_short() { throw FormatError("file", "is cut short inside its header"); }

// Bytes by offset: of a span, or of a file through a buffer that moves along.
class Window {
 public:
  explicit Window(std::span<const std::byte> all) : bytes_(all), size_(all.size()) {}
  explicit Window(const File& file) : file_(&file), size_(file.size()) {}

  std::uint64_t size() const noexcept { return size_; }

  std::span<const std::byte> at(std::uint64_t offset, std::size_t count) {
    if (offset > size_ || count > size_ - offset) {
      cut_short();
    }
    if (offset < start_ || offset - start_ + count > bytes_.size()) {
      buffer_.resize(static_cast<std::size_t>(
          std::min<std::uint64_t>(std::max(count, window_bytes), size_ - offset)));
      if (file_->read_at(offset, buffer_) != buffer_.size()) {
        throw FormatError("file", "became shorter while it was read");
      }
      bytes_ = buffer_;
      start_ = offset;
    }
    return bytes_.subspan(static_cast<std::size_t>(offset - start_), count);
  }

 private:
  const File* file_ = nullptr;
  std::vector<std::byte> buffer_;
  std::span<const std::byte> bytes_;
  std::uint64_t start_ = 0;
  std::uint64_t size_;
};

std::uint32_t u16_of(std::span<const std::byte> bytes, std::size_t at, bool big) {
  const auto a = std::to_integer<std::uint32_t>(bytes[at]);
  const auto b = std::to_integer<std::uint32_t>(bytes[at + 1]);
  return big ? a << 8 | b : b << 8 | a;
}

std::uint32_t u32_of(std::span<const std::byte> bytes, std::size_t at, bool big) {
  const std::uint32_t a = u16_of(bytes, at, big);
  const std::uint32_t b = u16_of(bytes, at + 2, big);
  return big ? a << 16 | b : b << 16 | a;
}

enum class LengthField : std::uint8_t { none, two, four };

// PS3.5 table 7.1-1 and 7.1-2: which value representations exist, and how long their length is.
LengthField length_field(std::string_view vr) noexcept {
  constexpr std::string_view two =
      "AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US ";
  constexpr std::string_view four = "OB OD OF OL OV OW SQ SV UC UN UR UT UV ";
  for (const auto& [list, field] : {std::pair{two, LengthField::two}, {four, LengthField::four}}) {
    for (std::size_t i = 0; i < list.size(); i += 3) {
      if (list.substr(i, 2) == vr) {
        return field;
      }
    }
  }
  return LengthField::none;
}

struct Encoding {
  bool implicit = false;
  bool big = false;
};

struct Element {
  std::uint32_t tag;
  std::string vr;
  std::uint32_t length;
  std::uint64_t value_at;

  bool is_endless() const noexcept { return length == undefined_length; }
};

Element read_element(Window& window, std::uint64_t at, Encoding encoding) {
  const std::span<const std::byte> head = window.at(at, 8);
  const std::uint32_t tag = u16_of(head, 0, encoding.big) << 16 | u16_of(head, 2, encoding.big);
  if (encoding.implicit || tag >> 16 == 0xfffe) {
    return {tag, "", u32_of(head, 4, encoding.big), at + 8};
  }
  const std::string vr{std::to_integer<char>(head[4]), std::to_integer<char>(head[5])};
  switch (length_field(vr)) {
    case LengthField::two:
      return {tag, vr, u16_of(head, 6, encoding.big), at + 8};
    case LengthField::four:
      return {tag, vr, u32_of(window.at(at + 8, 4), 0, encoding.big), at + 12};
    case LengthField::none:
      break;
  }
  damaged();
}

class Parser {
 public:
  Parser(std::span<const DicomTag> tags, DicomHeader& header) : tags_(tags), header_(header) {}

  // Reads the meta information, group 0002, and returns where the data set starts.
  std::uint64_t read_meta(Window& window) {
    std::uint64_t at = meta_at;
    std::optional<std::uint64_t> declared_end;
    while (at < window.size() && u16_of(window.at(at, 2), 0, false) == 0x0002) {
      if (header_.deflated_at && declared_end && at >= *declared_end) {
        break;  // the deflated stream may look like group 0002
      }
      count();
      const Element element = read_element(window, at, {});
      at = end_of(window, element);
      if (element.tag == group_length && element.length == 4) {
        declared_end = at + u32_of(window.at(element.value_at, 4), 0, false);
      } else if (element.tag == transfer_syntax_uid) {
        read_syntax(window, element);
      }
      keep(window, element);
    }
    if (header_.transfer_syntax.empty()) {
      throw FormatError("TransferSyntaxUID", "has none; the file may be cut short");
    }
    if (header_.deflated_at && declared_end && at != *declared_end) {
      damaged();
    }
    return at;
  }

  // Reads the data set up to its pixel data or its end.
  void read_data_set(Window& window, std::uint64_t at, Encoding encoding) {
    header_.num_bytes = window.size();
    // Only undefined lengths open a level: what says its length is skipped as a whole.
    struct Level {
      bool is_sequence;
      Encoding encoding;
    };
    std::array<Level, max_depth> levels{};
    levels[0] = {false, encoding};
    std::size_t depth = 0;
    const auto open = [&](bool is_sequence, Encoding inside) {
      if (++depth == max_depth) {
        throw FormatError("file", "nests sequences deeper than any CT");
      }
      levels[depth] = {is_sequence, inside};
    };
    while (depth > 0 || at < window.size()) {
      count();
      const Level& level = levels[depth];
      const Element element = read_element(window, at, level.encoding);
      const std::uint32_t tag = element.tag;
      if (level.is_sequence ? tag == sequence_end : depth > 0 && tag == item_end) {
        --depth;
        at = element.value_at;
        continue;
      }
      if (level.is_sequence != (tag == item) || tag == sequence_end || tag == item_end) {
        damaged();
      }
      if (depth == 0 && tag == pixel_data) {
        header_.pixel_offset = element.value_at;
        if (!element.is_endless()) {
          header_.pixel_bytes = element.length;
        }
        return;
      }
      if (depth == 0) {
        keep(window, element);
      }
      if (!element.is_endless()) {
        at = end_of(window, element);
      } else if (level.is_sequence) {
        open(false, level.encoding);
        at = element.value_at;
      } else if (level.encoding.implicit || element.vr == "SQ" || element.vr == "OB" ||
                 element.vr == "OW") {
        open(true, level.encoding);
        at = element.value_at;
      } else if (element.vr == "UN") {
        open(true, {.implicit = true, .big = false});  // PS3.5 6.2.2, note 4
        at = element.value_at;
      } else {
        damaged();
      }
    }
  }

 private:
  void count() {
    if (++num_elements_ > max_elements) {
      throw FormatError("file", "has more data elements than any CT");
    }
  }

  static std::uint64_t end_of(const Window& window, const Element& element) {
    if (element.is_endless()) {
      damaged();
    }
    if (element.length > window.size() - element.value_at) {
      cut_short();
    }
    return element.value_at + element.length;
  }

  void read_syntax(Window& window, const Element& element) {
    if (element.length > 64) {
      throw FormatError("TransferSyntaxUID", "has one that is no UID");
    }
    std::string& uid = header_.transfer_syntax;
    for (const std::byte byte : window.at(element.value_at, element.length)) {
      uid.push_back(std::to_integer<char>(byte));
    }
    uid.erase(uid.find_last_not_of(std::string_view("\0 ", 2)) + 1);
    if (uid.find_first_not_of("0123456789.") != std::string::npos) {
      throw FormatError("TransferSyntaxUID", "has one that is no UID");
    }
    if (uid == deflated_little) {
      header_.deflated_at = 0;  // known once the meta information is over
    }
    header_.big_endian = uid == explicit_big;
  }

  void keep(Window& window, const Element& element) {
    const auto wanted =
        std::ranges::find_if(tags_, [&](const DicomTag& t) { return t.tag == element.tag; });
    if (wanted == tags_.end()) {
      return;
    }
    const std::string& keyword = wanted->keyword;
    if (std::ranges::any_of(header_.values,
                            [&](const DicomValue& v) { return v.keyword == keyword; })) {
      throw FormatError(keyword, "has it twice");
    }
    std::string bytes;
    if (element.vr != "SQ" && !element.is_endless()) {
      if (element.length > max_value_bytes) {
        throw FormatError(keyword, "has it longer than any value of a CT");
      }
      const std::span<const std::byte> value = window.at(element.value_at, element.length);
      bytes.assign(reinterpret_cast<const char*>(value.data()), value.size());
    }
    header_.values.push_back({keyword, element.vr, std::move(bytes)});
  }

  std::span<const DicomTag> tags_;
  DicomHeader& header_;
  std::size_t num_elements_ = 0;
};

DicomScan scan(Window& window, std::span<const DicomTag> tags) {
  DicomScan found;
  const std::span<const std::byte> start =
      window.at(0, static_cast<std::size_t>(std::min<std::uint64_t>(window.size(), start_bytes)));
  found.has_mark = start.size() >= meta_at && std::memcmp(start.data() + mark_at, "DICM", 4) == 0;
  if (!found.has_mark) {
    found.start.assign(reinterpret_cast<const char*>(start.data()), start.size());
    return found;
  }
  Parser parser(tags, found.header);
  const std::uint64_t at = parser.read_meta(window);
  const std::string& syntax = found.header.transfer_syntax;
  if (found.header.deflated_at) {
    found.header.deflated_at = at;
    if (window.size() - at > max_dicom_slice) {
      throw FormatError("file", "is larger than any slice of a CT", "limit");
    }
    const std::vector<std::byte> plain =
        inflate_data_set(window.at(at, static_cast<std::size_t>(window.size() - at)));
    Window inflated{std::span(plain)};
    parser.read_data_set(inflated, 0, {});
  } else {
    parser.read_data_set(window, at,
                         {.implicit = syntax == implicit_little, .big = found.header.big_endian});
  }
  return found;
}

}  // namespace

std::vector<std::byte> inflate_data_set(std::span<const std::byte> compressed) {
  if (compressed.size() > max_dicom_slice) {
    throw FormatError("file", "is larger than any slice of a CT", "limit");
  }
  // Writers put a zero byte (PS3.5 A.5), or a checksum, behind the stream.
  return inflate_raw(compressed, max_dicom_slice);
}

DicomScan scan_dicom(const DicomSource& source, std::span<const DicomTag> tags) {
  if (const auto* content = std::get_if<std::span<const std::byte>>(&source)) {
    Window window(*content);
    return scan(window, tags);
  }
  const File file(std::get<std::string>(source));
  Window window(file);
  return scan(window, tags);
}

std::vector<DicomScan> scan_dicom(std::span<const DicomSource> sources,
                                  std::span<const DicomTag> tags, std::size_t num_threads) {
  std::vector<DicomScan> found(sources.size());
  parallel_for(sources.size(), num_threads, [&](std::size_t index) {
    DicomScan& result = found[index];
    try {
      result = scan_dicom(sources[index], tags);
    } catch (const FormatError& error) {
      result.has_mark = true;
      result.field = error.field();
      result.reason = error.what();
      result.code = error.code();
    } catch (const std::system_error& error) {
      result.os_error = error.code().value();
    }
  });
  return found;
}

}  // namespace tapct

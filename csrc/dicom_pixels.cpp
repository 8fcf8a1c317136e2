// Stored values of slices to HU. Built with -ffp-contract=off: stored * slope + intercept is two
// roundings, as in every other reader.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>

#include "tapct/clones.hpp"
#include "tapct/dicom.hpp"
#include "tapct/error.hpp"
#include "tapct/file.hpp"
#include "tapct/parallel.hpp"

namespace tapct {
namespace {

constexpr char rescale[] = "RescaleSlope, RescaleIntercept";
constexpr int low16 = std::numeric_limits<std::int16_t>::min();
constexpr int high16 = std::numeric_limits<std::int16_t>::max();

static_assert(std::endian::native == std::endian::little, "stored values are little endian");

struct Range {
  int low = std::numeric_limits<int>::max();  // above `high`: no value
  int high = std::numeric_limits<int>::min();
};

TAPCT_CLONES void swap_bytes(std::uint16_t* values, std::size_t count) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<std::uint16_t>(values[i] << 8 | values[i] >> 8);
  }
}

// Stored is int16_t or uint16_t; both reductions stay in 16 bits, which the vector units have.
template <typename Stored>
inline Range range_of(const std::uint16_t* bits, std::size_t count) noexcept {
  Stored low = std::numeric_limits<Stored>::max();
  Stored high = std::numeric_limits<Stored>::min();
  for (std::size_t i = 0; i < count; ++i) {
    const auto value = static_cast<Stored>(bits[i]);
    low = std::min(low, value);
    high = std::max(high, value);
  }
  return count == 0 ? Range{} : Range{low, high};
}

TAPCT_CLONES Range range_signed(const std::uint16_t* bits, std::size_t count) noexcept {
  return range_of<std::int16_t>(bits, count);
}

TAPCT_CLONES Range range_unsigned(const std::uint16_t* bits, std::size_t count) noexcept {
  return range_of<std::uint16_t>(bits, count);
}

Range range_without(const std::uint16_t* bits, std::size_t count, std::uint16_t padding,
                    bool is_signed) noexcept {
  Range range;
  for (std::size_t i = 0; i < count; ++i) {
    if (bits[i] != padding) {
      const int value = is_signed ? static_cast<std::int16_t>(bits[i]) : bits[i];
      range.low = std::min(range.low, value);
      range.high = std::max(range.high, value);
    }
  }
  return range;
}

// Arithmetic modulo 2**16 is exact here: the range of the results was checked before.
TAPCT_CLONES void map_whole(std::uint16_t* bits, std::size_t count, std::uint16_t slope,
                            std::uint16_t intercept) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    bits[i] = static_cast<std::uint16_t>(static_cast<std::uint32_t>(bits[i]) * slope + intercept);
  }
}

TAPCT_CLONES void map_whole_padded(std::uint16_t* bits, std::size_t count, std::uint16_t slope,
                                   std::uint16_t intercept, std::uint16_t padding,
                                   std::uint16_t padding_hu) noexcept {
  for (std::size_t i = 0; i < count; ++i) {
    const auto mapped =
        static_cast<std::uint16_t>(static_cast<std::uint32_t>(bits[i]) * slope + intercept);
    bits[i] = bits[i] == padding ? padding_hu : mapped;
  }
}

bool is_whole(double value) noexcept {
  return std::abs(value) <= 1 << 30 && value == std::nearbyint(value);
}

std::uint16_t low_bits(double whole) noexcept {
  return static_cast<std::uint16_t>(static_cast<std::int32_t>(whole));
}

// Turns one slice of stored bits into HU, in place.
void map_slice(const StoredSlice& slice, std::span<std::int16_t> values) {
  auto* bits = reinterpret_cast<std::uint16_t*>(values.data());
  const std::size_t count = values.size();
  if (slice.big_endian) {
    swap_bytes(bits, count);
  }
  const Range found = slice.padding ? range_without(bits, count, *slice.padding, slice.is_signed)
                      : slice.is_signed ? range_signed(bits, count)
                                        : range_unsigned(bits, count);
  const bool is_empty = found.low > found.high;
  const int span = 1 << (slice.is_signed ? slice.bits_stored - 1 : slice.bits_stored);
  if (!is_empty && (found.low < (slice.is_signed ? -span : 0) || found.high >= span)) {
    throw FormatError("BitsStored", slice.place + " has values beyond " +
                                        std::to_string(slice.bits_stored) +
                                        " bits (an overlay in them?)");
  }
  const auto hu_of = [&](int stored) {
    return std::nearbyint(stored * slice.slope + slice.intercept);
  };
  // Rounding is monotonic, so the ends of the range decide for all values between them.
  if (!is_empty) {
    const auto [low, high] = std::minmax({hu_of(found.low), hu_of(found.high)});
    if (!std::isfinite(low) || !std::isfinite(high)) {
      throw FormatError(rescale, "make values of " + slice.place + " infinite");
    }
    if (low < low16 || high > high16) {
      throw FormatError(
          rescale, "make values of " + slice.place + " which do not fit int16 and cannot be HU",
          "hu");
    }
  }
  std::uint16_t padding_hu = 0;
  if (slice.padding) {
    const double hu = hu_of(slice.is_signed ? static_cast<std::int16_t>(*slice.padding)
                                            : static_cast<int>(*slice.padding));
    padding_hu = low_bits(hu >= low16 && hu <= high16 ? hu : low16);
  }
  if (is_whole(slice.slope) && is_whole(slice.intercept)) {
    const std::uint16_t slope = low_bits(slice.slope);
    const std::uint16_t intercept = low_bits(slice.intercept);
    if (slice.padding) {
      map_whole_padded(bits, count, slope, intercept, *slice.padding, padding_hu);
    } else if (slope != 1 || intercept != 0) {
      map_whole(bits, count, slope, intercept);
    }
    return;
  }
  std::vector<std::uint16_t> table(is_empty ? 0
                                            : static_cast<std::size_t>(found.high - found.low) + 1);
  for (std::size_t i = 0; i < table.size(); ++i) {
    table[i] = low_bits(hu_of(found.low + static_cast<int>(i)));
  }
  for (std::size_t i = 0; i < count; ++i) {
    const int stored = slice.is_signed ? static_cast<std::int16_t>(bits[i]) : bits[i];
    const bool is_padding = slice.padding && bits[i] == *slice.padding;
    bits[i] = is_padding ? padding_hu : table[static_cast<std::size_t>(stored - found.low)];
  }
}

[[noreturn]] void wrong_size(const StoredSlice& slice, std::uint64_t there, std::uint64_t needed) {
  throw FormatError("PixelData", slice.place + " has " + std::to_string(there) +
                                     " bytes where Rows and Columns need " +
                                     std::to_string(needed));
}

void check_size(const StoredSlice& slice, std::uint64_t size, std::uint64_t needed) {
  const std::uint64_t there = slice.pixel_offset > size ? 0 : size - slice.pixel_offset;
  if (slice.pixel_bytes != needed || there < needed) {
    wrong_size(slice, std::min(slice.pixel_bytes, there), needed);
  }
}

void copy_stored(const StoredSlice& slice, std::span<const std::byte> content,
                 std::span<std::byte> out) {
  check_size(slice, content.size(), out.size());
  std::memcpy(out.data(), content.data() + slice.pixel_offset, out.size());
}

void read_stored(const StoredSlice& slice, std::span<std::byte> out) {
  const auto* content = std::get_if<std::span<const std::byte>>(&slice.source);
  if (content != nullptr && !slice.deflated_at) {
    copy_stored(slice, *content, out);
  } else if (content != nullptr) {
    const auto at =
        static_cast<std::size_t>(std::min<std::uint64_t>(*slice.deflated_at, content->size()));
    copy_stored(slice, inflate_data_set(content->subspan(at)), out);
  } else {
    const File file(std::get<std::string>(slice.source));
    if (slice.deflated_at) {
      const std::uint64_t at = std::min(*slice.deflated_at, file.size());
      std::vector<std::byte> packed(
          static_cast<std::size_t>(std::min(file.size() - at, max_dicom_slice + 1)));
      packed.resize(file.read_at(at, packed));
      copy_stored(slice, inflate_data_set(packed), out);
      return;
    }
    check_size(slice, file.size(), out.size());
    const std::size_t count = file.read_at(slice.pixel_offset, out);
    if (count != out.size()) {
      wrong_size(slice, count, out.size());
    }
  }
}

}  // namespace

void read_slices(std::span<const StoredSlice> slices, std::size_t pixels_per_slice,
                 std::span<std::int16_t> out, std::size_t num_threads) {
  // The first slice's error is thrown, whichever thread was first.
  std::vector<std::exception_ptr> errors(slices.size());
  parallel_for(slices.size(), num_threads, [&](std::size_t index) {
    const auto values = out.subspan(slices[index].index * pixels_per_slice, pixels_per_slice);
    try {
      read_stored(slices[index], std::as_writable_bytes(values));
      map_slice(slices[index], values);
    } catch (...) {
      errors[index] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) {
      std::rethrow_exception(error);
    }
  }
}

}  // namespace tapct

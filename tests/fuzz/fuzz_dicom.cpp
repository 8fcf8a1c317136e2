// Feeds bytes to the DICOM parser as a file in memory, and reads the pixels where it found some.
// Only FormatError may come out: a crash, a leak or any other exception is a finding.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "tapct/dicom.hpp"
#include "tapct/error.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<tapct::DicomTag> tags{{"Rows", 0x00280010},
                                                 {"ImageType", 0x00080008},
                                                 {"ImagePositionPatient", 0x00200032},
                                                 {"ModalityLUTSequence", 0x00283000}};
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  try {
    const tapct::DicomScan scan = tapct::scan_dicom(bytes, tags);
    if (scan.header.pixel_offset && scan.header.pixel_bytes) {
      tapct::StoredSlice slice;
      slice.source = bytes;
      slice.place = "file 1 of 1";
      slice.pixel_offset = *scan.header.pixel_offset;
      slice.pixel_bytes = *scan.header.pixel_bytes;
      slice.deflated_at = scan.header.deflated_at;
      slice.big_endian = scan.header.big_endian;
      slice.is_signed = size % 2 == 0;
      slice.bits_stored = 12 + static_cast<unsigned>(size % 5);
      slice.slope = size % 3 == 0 ? 0.5 : 1;
      slice.intercept = -1024;
      if (size % 7 == 0) {
        slice.padding = 63536;
      }
      std::vector<std::int16_t> out(64);
      tapct::read_slices(std::span(&slice, 1), out.size(), out, 1);
    }
  } catch (const tapct::FormatError&) {
    return 0;
  }
  return 0;
}

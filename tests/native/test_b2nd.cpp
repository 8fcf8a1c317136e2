#include <algorithm>
#include <stdexcept>
#include <system_error>

#include "check.hpp"
#include "samples.hpp"
#include "tapct/b2nd.hpp"
#include "tapct/box_reader.hpp"
#include "tapct/error.hpp"

namespace {

using tapct::StoreError;
using tapct::Zyx;

constexpr Zyx volume_zyx{21, 70, 45};  // off every chunk and block size below

std::vector<std::int16_t> volume() {
  return samples::voxels(static_cast<std::size_t>(volume_zyx[0] * volume_zyx[1] * volume_zyx[2]));
}

tapct::B2ndOptions small() {
  tapct::B2ndOptions options;
  options.chunk_zyx = {8, 32, 32};
  options.block_zyx = {4, 16, 8};
  return options;
}

std::vector<std::uint32_t> write(const std::string& path, const std::vector<std::int16_t>& data,
                                 const Zyx& shape, const tapct::B2ndOptions& options) {
  return tapct::write_b2nd(path, data, shape, {}, options);
}

samples::Bytes big_endian(const std::vector<std::uint32_t>& values) {
  samples::Bytes out(4 * values.size());
  for (std::size_t i = 0; i < values.size(); ++i) {
    samples::put(out, 4 * i, values[i], true);
  }
  return out;
}

std::vector<std::int16_t> read(const std::string& path, const std::vector<std::uint32_t>& crc32s,
                               const Zyx& lo, const Zyx& shape) {
  const samples::Bytes expected = big_endian(crc32s);
  tapct::BoxReader reader({{"case-1", path, expected}}, {});
  std::vector<std::int16_t> out(
      static_cast<std::size_t>(std::max(shape[0] * shape[1] * shape[2], std::int64_t{1})));
  const std::int64_t index = 0;
  reader.read(std::span(&index, 1), std::span(&lo, 1), shape, {.hu = out}, 1);
  return out;
}

std::vector<std::int16_t> cut(const std::vector<std::int16_t>& whole, const Zyx& lo,
                              const Zyx& shape) {
  std::vector<std::int16_t> out;
  for (std::int64_t z = lo[0]; z < lo[0] + shape[0]; ++z) {
    for (std::int64_t y = lo[1]; y < lo[1] + shape[1]; ++y) {
      const auto row = whole.begin() + (z * volume_zyx[1] + y) * volume_zyx[2] + lo[2];
      out.insert(out.end(), row, row + shape[2]);
    }
  }
  return out;
}

}  // namespace

TEST(any_box_reads_back_from_either_codec) {
  const samples::Folder folder;
  const auto data = volume();
  for (const char* codec : {"lz4hc", "zstd"}) {
    tapct::B2ndOptions options = small();
    options.codec = codec;
    const std::string path = folder.at(codec);
    const auto crc32s = write(path, data, volume_zyx, options);
    CHECK(crc32s.size() == 3 * 3 * 2 + 1);
    CHECK(read(path, crc32s, {0, 0, 0}, volume_zyx) == data);
    std::mt19937 random(3);
    for (int trial = 0; trial < 200; ++trial) {
      Zyx lo{};
      Zyx shape{};
      for (std::size_t axis = 0; axis < 3; ++axis) {
        lo[axis] = std::uniform_int_distribution<std::int64_t>(0, volume_zyx[axis] - 1)(random);
        shape[axis] =
            std::uniform_int_distribution<std::int64_t>(1, volume_zyx[axis] - lo[axis])(random);
      }
      CHECK(read(path, crc32s, lo, shape) == cut(data, lo, shape));
    }
  }
}

TEST(a_volume_smaller_than_a_chunk_reads_back) {
  const samples::Folder folder;
  const auto data = samples::voxels(3 * 5 * 7);
  const auto crc32s = write(folder.at("tiny"), data, {3, 5, 7}, {});
  CHECK(read(folder.at("tiny"), crc32s, {0, 0, 0}, {3, 5, 7}) == data);
}

TEST(constant_volumes_read_back) {
  const samples::Folder folder;
  for (const std::int16_t hu :
       {std::int16_t{0}, std::int16_t{-1024}}) {  // 0: such chunks have no bytes in the file
    const std::vector<std::int16_t> data(volume().size(), hu);
    const std::string path = folder.at(std::to_string(hu));
    const auto crc32s = write(path, data, volume_zyx, small());
    CHECK(read(path, crc32s, {0, 0, 0}, volume_zyx) == data);
    CHECK(read(path, crc32s, {3, 9, 30}, {9, 40, 15}) == cut(data, {3, 9, 30}, {9, 40, 15}));
  }
}

TEST(writing_is_deterministic) {
  const samples::Folder folder;
  const auto data = volume();
  CHECK(write(folder.at("a"), data, volume_zyx, small()) ==
        write(folder.at("b"), data, volume_zyx, small()));
  CHECK(samples::read(folder.at("a")) == samples::read(folder.at("b")));
}

TEST(boxes_outside_the_volume_are_errors) {
  const samples::Folder folder;
  const std::string path = folder.at("v");
  const auto crc32s = write(path, volume(), volume_zyx, small());
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {-1, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {21, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {0, 1, 0}, {1, 70, 1}));
  CHECK_THROWS(std::invalid_argument, "positive", read(path, crc32s, {0, 0, 0}, {1, 0, 1}));
}

TEST(options_out_of_range_are_errors) {
  const samples::Folder folder;
  const auto attempt = [&](auto change) {
    tapct::B2ndOptions options = small();
    change(options);
    write(folder.at("o"), volume(), volume_zyx, options);
  };
  CHECK_THROWS(std::invalid_argument, "codec", attempt([](auto& o) { o.codec = "zfp"; }));
  CHECK_THROWS(std::invalid_argument, "clevel", attempt([](auto& o) { o.clevel = 10; }));
  CHECK_THROWS(std::invalid_argument, "sizes", attempt([](auto& o) { o.block_zyx[1] = 0; }));
  CHECK_THROWS(std::invalid_argument, "sizes", attempt([](auto& o) { o.chunk_zyx[2] = 4; }));
  CHECK_THROWS(std::invalid_argument, "1 GiB",
               attempt([](auto& o) { o.chunk_zyx = {65536, 65536, 65536}; }));
  CHECK_THROWS(std::invalid_argument, "shape",
               write(folder.at("o"), samples::voxels(5), {1, 2, 3}, {}));
  CHECK_THROWS(std::system_error, "create",
               write(folder.at("no/such/folder"), volume(), volume_zyx, small()));
}

TEST(every_flipped_bit_and_every_truncation_is_an_error) {
  const samples::Folder folder;
  const Zyx shape{4, 12, 10};
  const auto data = samples::voxels(480);
  tapct::B2ndOptions options;
  options.chunk_zyx = {2, 8, 10};
  options.block_zyx = {1, 8, 10};
  const auto crc32s = write(folder.at("v"), data, shape, options);
  const samples::Bytes whole = samples::read(folder.at("v"));
  for (std::size_t bit = 0; bit < whole.size() * 8; ++bit) {
    const std::string path = folder.write("flipped", samples::flipped(whole, bit));
    CHECK_THROWS(StoreError, "damaged", read(path, crc32s, {0, 0, 0}, shape));
  }
  for (std::size_t size = 0; size < whole.size(); ++size) {
    const std::string path = folder.write("cut", samples::first(whole, size));
    CHECK_THROWS(StoreError, "damaged", read(path, crc32s, {0, 0, 0}, shape));
  }
  const std::string longer = folder.write("longer", samples::join(whole, samples::Bytes(1)));
  CHECK_THROWS(StoreError, "damaged", read(longer, crc32s, {0, 0, 0}, shape));
}

TEST(checksums_of_another_file_are_errors) {
  const samples::Folder folder;
  const auto data = volume();
  const auto crc32s = write(folder.at("a"), data, volume_zyx, small());
  auto other = crc32s;
  other[0] ^= 1;
  CHECK_THROWS(StoreError, "index", read(folder.at("a"), other, {0, 0, 0}, {1, 1, 1}));
  CHECK(read(folder.at("a"), {}, {20, 69, 44}, {1, 1, 1}).at(0) == data.back());
  other = crc32s;
  other.erase(other.begin());
  CHECK_THROWS(StoreError, "index", read(folder.at("a"), other, {0, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "No such file", read(folder.at("none"), crc32s, {0, 0, 0}, {1, 1, 1}));
}

TEST(eight_threads_read_batches_of_one_reader) {
  const samples::Folder folder;
  const auto data = volume();
  std::vector<tapct::StoreCase> files;
  for (const char* name : {"a", "b", "c"}) {
    write(folder.at(name), data, volume_zyx, small());
    files.push_back({name, folder.at(name), {}});
  }
  tapct::BoxReader reader(files, {.max_open = 2});  // files are closed while others are read
  const Zyx shape{5, 40, 20};
  const std::size_t voxels = 5 * 40 * 20;
  std::mt19937 random(4);
  std::vector<std::int64_t> cases;
  std::vector<Zyx> corners;
  for (std::int64_t i = 0; i < 64; ++i) {
    cases.push_back(i % 3);
    corners.push_back({static_cast<std::int64_t>(random() % 17),
                       static_cast<std::int64_t>(random() % 31),
                       static_cast<std::int64_t>(random() % 26)});
  }
  for (int round = 0; round < 3; ++round) {
    std::vector<std::int16_t> out(64 * voxels);
    reader.read(cases, corners, shape, {.hu = out}, 8);
    for (std::size_t i = 0; i < 64; ++i) {
      const auto expected = cut(data, corners[i], shape);
      CHECK(std::equal(expected.begin(), expected.end(), out.data() + i * voxels));
    }
  }
}

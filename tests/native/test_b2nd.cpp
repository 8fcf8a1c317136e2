#include <algorithm>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "check.hpp"
#include "samples.hpp"
#include "tapct/b2nd.hpp"
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

std::vector<std::int16_t> read(const std::string& path, const std::vector<std::uint32_t>& crc32s,
                               const Zyx& lo, const Zyx& shape) {
  std::vector<std::int16_t> out(static_cast<std::size_t>(shape[0] * shape[1] * shape[2]));
  tapct::read_box(path, crc32s, lo, shape, out);
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
    const auto crc32s = tapct::write_b2nd(path, data, volume_zyx, options);
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
  const auto crc32s = tapct::write_b2nd(folder.at("tiny"), data, {3, 5, 7}, {});
  CHECK(read(folder.at("tiny"), crc32s, {0, 0, 0}, {3, 5, 7}) == data);
}

TEST(constant_volumes_read_back) {
  const samples::Folder folder;
  for (const std::int16_t hu :
       {std::int16_t{0}, std::int16_t{-1024}}) {  // 0: such chunks have no bytes in the file
    const std::vector<std::int16_t> data(volume().size(), hu);
    const std::string path = folder.at(std::to_string(hu));
    const auto crc32s = tapct::write_b2nd(path, data, volume_zyx, small());
    CHECK(read(path, crc32s, {0, 0, 0}, volume_zyx) == data);
    CHECK(read(path, crc32s, {3, 9, 30}, {9, 40, 15}) == cut(data, {3, 9, 30}, {9, 40, 15}));
  }
}

TEST(writing_is_deterministic) {
  const samples::Folder folder;
  const auto data = volume();
  CHECK(tapct::write_b2nd(folder.at("a"), data, volume_zyx, small()) ==
        tapct::write_b2nd(folder.at("b"), data, volume_zyx, small()));
  CHECK(samples::read(folder.at("a")) == samples::read(folder.at("b")));
}

TEST(boxes_outside_the_volume_are_errors) {
  const samples::Folder folder;
  const std::string path = folder.at("v");
  const auto crc32s = tapct::write_b2nd(path, volume(), volume_zyx, small());
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {-1, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {21, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {0, 1, 0}, {1, 70, 1}));
  CHECK_THROWS(StoreError, "exceeds", read(path, crc32s, {0, 0, 0}, {1, 0, 1}));
  std::vector<std::int16_t> wrong_size(5);
  CHECK_THROWS(std::invalid_argument, "size",
               tapct::read_box(path, crc32s, {0, 0, 0}, {1, 1, 4}, wrong_size));
}

TEST(options_out_of_range_are_errors) {
  const samples::Folder folder;
  const auto attempt = [&](auto change) {
    tapct::B2ndOptions options = small();
    change(options);
    tapct::write_b2nd(folder.at("o"), volume(), volume_zyx, options);
  };
  CHECK_THROWS(std::invalid_argument, "codec", attempt([](auto& o) { o.codec = "zfp"; }));
  CHECK_THROWS(std::invalid_argument, "clevel", attempt([](auto& o) { o.clevel = 10; }));
  CHECK_THROWS(std::invalid_argument, "sizes", attempt([](auto& o) { o.block_zyx[1] = 0; }));
  CHECK_THROWS(std::invalid_argument, "sizes", attempt([](auto& o) { o.chunk_zyx[2] = 4; }));
  CHECK_THROWS(std::invalid_argument, "1 GiB",
               attempt([](auto& o) { o.chunk_zyx = {65536, 65536, 65536}; }));
  CHECK_THROWS(std::invalid_argument, "shape",
               tapct::write_b2nd(folder.at("o"), samples::voxels(5), {1, 2, 3}, {}));
  CHECK_THROWS(std::system_error, "create",
               tapct::write_b2nd(folder.at("no/such/folder"), volume(), volume_zyx, small()));
}

TEST(every_flipped_bit_and_every_truncation_is_an_error) {
  const samples::Folder folder;
  const Zyx shape{4, 12, 10};
  const auto data = samples::voxels(480);
  tapct::B2ndOptions options;
  options.chunk_zyx = {2, 8, 10};
  options.block_zyx = {1, 8, 10};
  const auto crc32s = tapct::write_b2nd(folder.at("v"), data, shape, options);
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
  const auto crc32s = tapct::write_b2nd(folder.at("a"), data, volume_zyx, small());
  auto other = crc32s;
  other[0] ^= 1;
  CHECK_THROWS(StoreError, "chunk 0", read(folder.at("a"), other, {0, 0, 0}, {1, 1, 1}));
  CHECK(read(folder.at("a"), other, {20, 69, 44}, {1, 1, 1}).at(0) == data.back());
  other = crc32s;
  other.erase(other.begin());
  CHECK_THROWS(StoreError, "checksums", read(folder.at("a"), other, {0, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(StoreError, "header", read(folder.at("a"), {}, {0, 0, 0}, {1, 1, 1}));
  CHECK_THROWS(std::system_error, "", read(folder.at("none"), crc32s, {0, 0, 0}, {1, 1, 1}));
}

TEST(threads_read_one_file_at_once) {
  const samples::Folder folder;
  const auto data = volume();
  const std::string path = folder.at("v");
  const auto crc32s = tapct::write_b2nd(path, data, volume_zyx, small());
  std::array<int, 4> num_right{};
  std::vector<std::thread> threads;
  for (int& right : num_right) {
    threads.emplace_back([&] {
      for (std::int64_t z = 0; z < volume_zyx[0]; ++z) {
        const Zyx lo{z, 0, 0};
        const Zyx shape{1, volume_zyx[1], volume_zyx[2]};
        right += read(path, crc32s, lo, shape) == cut(data, lo, shape) ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  CHECK(std::all_of(num_right.begin(), num_right.end(), [](int n) { return n == volume_zyx[0]; }));
}

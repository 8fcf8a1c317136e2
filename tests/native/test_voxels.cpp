#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

#include "check.hpp"
#include "samples.hpp"
#include "tapct/buffer.hpp"
#include "tapct/gzip_index.hpp"
#include "tapct/parallel.hpp"
#include "tapct/voxels.hpp"

TEST(every_flip_puts_each_voxel_in_its_mirrored_place) {
  using Shape = std::array<std::size_t, 3>;
  for (const Shape& shape : {Shape{3, 4, 5}, Shape{1, 1, 1}, Shape{2, 5, 2051}, Shape{4, 1, 6}}) {
    const auto [num_z, num_y, num_x] = shape;
    const auto values = samples::voxels(num_z * num_y * num_x);
    for (unsigned flips = 0; flips < 8; ++flips) {
      const std::array<bool, 3> axes{(flips & 1) != 0, (flips & 2) != 0, (flips & 4) != 0};
      auto flipped = values;
      tapct::flip_voxels(flipped, shape, axes);
      bool is_right = true;
      for (std::size_t i = 0; i < values.size(); ++i) {
        const std::size_t x = i % num_x;
        const std::size_t y = i / num_x % num_y;
        const std::size_t z = i / num_x / num_y;
        const std::size_t there =
            ((axes[0] ? num_z - 1 - z : z) * num_y + (axes[1] ? num_y - 1 - y : y)) * num_x +
            (axes[2] ? num_x - 1 - x : x);
        is_right &= flipped[there] == values[i];
      }
      CHECK(is_right);
    }
  }
}

TEST(the_range_counts_what_lies_inside) {
  for (const std::size_t size : {1U, 100U, 32768U, 70001U}) {
    const auto values = samples::voxels(size);
    const tapct::VoxelRange found = tapct::range_of(values, -500, 300);
    CHECK(found.min == *std::ranges::min_element(values));
    CHECK(found.max == *std::ranges::max_element(values));
    CHECK(found.num_inside == static_cast<std::uint64_t>(std::ranges::count_if(
                                  values, [](int v) { return v >= -500 && v <= 300; })));
  }
}

TEST(an_index_must_hold_in_every_particular) {
  // Two members whose 20 bytes between header and trailer stand for deflate data.
  samples::Bytes stream;
  for (const std::uint32_t out_size : {7U, 5U}) {
    samples::Bytes member(tapct::indexed_header_bytes + 20 + tapct::gzip_trailer_bytes);
    tapct::put_indexed_header(std::span(member).first<tapct::indexed_header_bytes>(),
                              member.size());
    samples::put(member, member.size() - 4, out_size);
    stream = samples::join(stream, member);
  }
  const auto members = tapct::gzip_index(stream, 12);
  CHECK(members.size() == 2 && members[1].out_offset == 7 && members[1].out_size == 5);
  CHECK(tapct::gzip_index(stream, 11).empty());
  CHECK(tapct::gzip_index(stream, 13).empty());
  CHECK(tapct::gzip_index(samples::first(stream, stream.size() - 1), 12).empty());
  CHECK(tapct::gzip_index(samples::join(stream, samples::Bytes(1)), 12).empty());
  samples::put(stream, 16, std::uint64_t{1});
  CHECK(tapct::gzip_index(stream, 12).empty());
}

TEST(large_and_small_buffers_keep_their_bytes_when_they_shrink_and_move) {
  for (const std::size_t size : {std::size_t{100}, std::size_t{5} << 20}) {
    tapct::Buffer buffer(size);
    std::ranges::fill(buffer.span(), std::byte{7});
    buffer.shrink(size / 3);
    const tapct::Buffer moved = std::move(buffer);
    CHECK(moved.size() == size / 3);
    CHECK(std::ranges::all_of(moved.span(), [](std::byte b) { return b == std::byte{7}; }));
  }
}

TEST(a_parallel_loop_does_each_item_once_and_hands_errors_on) {
  for (const std::size_t threads : {0U, 1U, 2U, 5U}) {
    std::vector<int> done(1000);
    tapct::parallel_for(done.size(), threads, [&](std::size_t i) { ++done[i]; });
    CHECK(done == std::vector<int>(1000, 1));
    const auto fail = [](std::size_t) { throw std::runtime_error("item"); };
    CHECK_THROWS(std::runtime_error, "item", (tapct::parallel_for(9, threads, fail), 0));
  }
}

TEST(a_released_block_serves_the_next_buffer_of_its_size_only) {
  constexpr std::size_t size = std::size_t{48} << 20;
  const std::byte* first = nullptr;
  {
    tapct::Buffer buffer(size);
    std::memset(buffer.span().data(), 7, size);
    first = buffer.span().data();
  }
  {
    tapct::Buffer other(size / 4);  // would waste three quarters of it
    CHECK(other.span().data() != first);
  }
  tapct::Buffer again(size - 100);
  CHECK(again.size() == size - 100);
#ifdef MADV_FREE
  CHECK(again.span().data() == first);
#endif
  tapct::Buffer second(size);  // while the first is in use
  CHECK(second.span().data() != first);
  std::memset(again.span().data(), 1, again.size());
  std::memset(second.span().data(), 2, size);
  CHECK(again.span().front() == std::byte{1});
  CHECK(again.span().back() == std::byte{1});
}

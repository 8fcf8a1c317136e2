#include "tapct/matmul_amx.hpp"

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "tapct/amx.hpp"
#include "tapct/team.hpp"
#include "tapct/vit_ops.hpp"

namespace tapct {

#if TAPCT_HAS_X86

namespace {

// A panel is 32 rows of the left factor or 32 columns of the right one; a step 32 elements of the
// sum. Of every step a packed panel holds the pieces, two tiles each, in the order they are read.
constexpr std::size_t panel = 2 * tile_rows;
constexpr std::size_t piece_size = 2 * tile_size;
constexpr std::size_t max_steps = 16;  // packed at a time; so long do sums stay in tiles
constexpr std::size_t max_left = 4;    // panels of one item of work, in the L2 cache
constexpr std::size_t max_right = 48;  // panels packed at a time
constexpr std::size_t min_right = 6;   // panels for which left panels are packed

std::size_t divided(std::size_t count, std::size_t size) { return (count + size - 1) / size; }

struct Block {
  __m512 rows[tile_rows];
};

// 16 x 16 elements of a matrix, by rows of its memory; zeros beyond its ends.
TAPCT_AVX512 inline Block load(const Matrix& matrix, std::size_t row, std::size_t column) {
  const std::size_t height = matrix.is_transposed ? matrix.columns : matrix.rows;
  const std::size_t width = matrix.is_transposed ? matrix.rows : matrix.columns;
  const std::size_t count = height - std::min(row, height);
  const std::size_t lanes = std::min(width - std::min(column, width), tile_rows);
  const auto mask = static_cast<__mmask16>((1U << lanes) - 1);
  Block block;
  for (std::size_t i = 0; i < tile_rows; ++i) {
    block.rows[i] = _mm512_maskz_loadu_ps(i < count ? mask : __mmask16{0},
                                          matrix.values + (row + i) * matrix.stride + column);
  }
  return block;
}

TAPCT_AVX512 inline void transpose(Block& block) {
  __m512* r = block.rows;
  __m512 t[tile_rows];
  for (std::size_t i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (std::size_t i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (std::size_t i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (std::size_t i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// A piece of each value of `first` and `second`, in pairs. They keep the rest, but for the last.
template <bool is_last>
TAPCT_AVX512 inline __m512i take_piece(__m512& first, __m512& second) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000U));
  __m512i a = _mm512_castps_si512(first), b = _mm512_castps_si512(second);
  if constexpr (!is_last) {
    a = _mm512_and_si512(_mm512_add_epi32(a, _mm512_set1_epi32(0x8000)), upper);
    b = _mm512_and_si512(_mm512_add_epi32(b, _mm512_set1_epi32(0x8000)), upper);
    first = _mm512_sub_ps(first, _mm512_castsi512_ps(a));
    second = _mm512_sub_ps(second, _mm512_castsi512_ps(b));
  }
  return _mm512_ternarylogic_epi32(_mm512_srli_epi32(a, 16), b, upper, 0xf8);  // or (b and upper)
}

// One step of a panel. Row r of a left tile holds its elements i and i + 16 in pairs, and row i of
// a right tile the same two of each of 16 columns.
template <std::size_t pieces, bool is_left>
TAPCT_AVX512 void pack_step(const Matrix& matrix, std::size_t outer, std::size_t inner,
                            std::uint16_t* out) {
  const bool is_inner_first = matrix.is_transposed == is_left;
  for (std::size_t half = 0; half < 2; ++half) {
    Block blocks[2];
    for (std::size_t i = 0; i < 2; ++i) {
      const std::size_t o = outer + half * tile_rows, k = inner + i * tile_rows;
      blocks[i] = is_inner_first ? load(matrix, k, o) : load(matrix, o, k);
      if (matrix.is_transposed) {
        transpose(blocks[i]);
      }
    }
    for (std::size_t row = 0; row < tile_rows; ++row) {
      __m512 first = blocks[0].rows[row], second = blocks[1].rows[row];
      std::uint16_t* target = out + half * tile_size + row * tile_elements;
      for (std::size_t piece = 0; piece + 1 < pieces; ++piece) {
        _mm512_store_si512(target + piece * piece_size, take_piece<false>(first, second));
      }
      _mm512_store_si512(target + (pieces - 1) * piece_size, take_piece<true>(first, second));
    }
  }
}

// Panels from `outer` on, in the order in which their matrix lies in memory.
template <std::size_t pieces, bool is_left>
void pack(const Matrix& matrix, std::size_t outer, std::size_t panels, std::size_t inner,
          std::size_t steps, std::uint16_t* out) {
  const bool is_inner_first = matrix.is_transposed == is_left;
  for (std::size_t n = 0; n < panels * steps; ++n) {
    const std::size_t i = is_inner_first ? n % panels : n / steps;
    const std::size_t step = is_inner_first ? n / panels : n % steps;
    pack_step<pieces, is_left>(matrix, outer + i * panel, inner + step * tile_elements,
                               out + (i * steps + step) * pieces * piece_size);
  }
}

TAPCT_AMX inline void load_left(const std::uint16_t* tiles) {
  _tile_loadd(4, tiles, 64);
  _tile_loadd(5, tiles + tile_size, 64);
}

TAPCT_AMX inline void load_right(const std::uint16_t* tiles) {
  _tile_loadd(6, tiles, 64);
  _tile_loadd(7, tiles + tile_size, 64);
}

TAPCT_AMX inline void multiply_tiles() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

// Where the sums of 32 rows and 32 columns start, or null for zero, and where they go.
struct Sums {
  const float* start;
  std::size_t start_stride;
  float* end;
  std::size_t end_stride;
};

// Pieces in the order that loads the fewest tiles.
template <std::size_t pieces>
TAPCT_AMX void multiply_panels(const std::uint16_t* left, const std::uint16_t* right,
                               std::size_t steps, const Sums& sums) {
  if (sums.start == nullptr) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    const float* below = sums.start + tile_rows * sums.start_stride;
    _tile_loadd(0, sums.start, sums.start_stride * sizeof(float));
    _tile_loadd(1, sums.start + tile_rows, sums.start_stride * sizeof(float));
    _tile_loadd(2, below, sums.start_stride * sizeof(float));
    _tile_loadd(3, below + tile_rows, sums.start_stride * sizeof(float));
  }
  for (std::size_t step = 0; step < steps; ++step) {
    for (std::size_t row = step; row < panel; row += steps) {  // else the stores wait for memory
      __builtin_prefetch(sums.end + row * sums.end_stride, 1);
      __builtin_prefetch(sums.end + row * sums.end_stride + tile_rows, 1);
    }
    load_left(left);
    if constexpr (pieces == 3) {
      load_right(right + 2 * piece_size);
      multiply_tiles();
    }
    load_right(right + piece_size);
    multiply_tiles();
    load_right(right);
    multiply_tiles();
    if constexpr (pieces == 3) {
      load_left(left + 2 * piece_size);
      multiply_tiles();
    }
    load_left(left + piece_size);
    multiply_tiles();
    if constexpr (pieces == 3) {
      load_right(right + piece_size);
      multiply_tiles();
    }
    left += pieces * piece_size;
    right += pieces * piece_size;
  }
  float* below = sums.end + tile_rows * sums.end_stride;
  _tile_stored(0, sums.end, sums.end_stride * sizeof(float));
  _tile_stored(1, sums.end + tile_rows, sums.end_stride * sizeof(float));
  _tile_stored(2, below, sums.end_stride * sizeof(float));
  _tile_stored(3, below + tile_rows, sums.end_stride * sizeof(float));
}

// Some rows and columns of the product, for some steps.
struct Item {
  const Matrix& left;
  std::size_t first_row, end_row;
  std::size_t first_step, num_steps;
  const std::uint16_t* right;  // of the columns, packed
  std::size_t num_columns;
  const float* bias;   // of the columns, or null
  float* out;          // of the columns
  std::size_t stride;  // of out
};

template <std::size_t pieces>
TAPCT_AMX void multiply_item(const Item& item, std::uint16_t* packed) {
  constexpr std::size_t step_size = pieces * piece_size;
  alignas(64) float edge[panel * panel];
  const TileConfig config;
  _tile_loadconfig(&config);
  const bool is_first = item.first_step == 0;
  pack<pieces, true>(item.left, item.first_row, divided(item.end_row - item.first_row, panel),
                     item.first_step * tile_elements, item.num_steps, packed);
  for (std::size_t column = 0; column < item.num_columns; column += panel) {
    const std::size_t columns = std::min(item.num_columns - column, panel);
    const auto* right = item.right + column / panel * item.num_steps * step_size;
    const float* bias = item.bias == nullptr ? nullptr : item.bias + column;
    for (std::size_t row = item.first_row; row < item.end_row; row += panel) {
      const std::size_t rows = std::min(item.end_row - row, panel);
      float* place = item.out + row * item.stride + column;
      const float* start = is_first ? bias : place;
      const std::size_t start_stride = is_first ? 0 : item.stride;
      Sums sums{start, start_stride, place, item.stride};
      const bool is_whole = rows == panel && columns == panel;
      if (!is_whole) {
        if (start != nullptr) {
          for (std::size_t i = 0; i < rows; ++i) {
            std::copy_n(start + i * start_stride, columns, edge + i * panel);
          }
          sums.start = edge;
          sums.start_stride = panel;
        }
        sums.end = edge;
        sums.end_stride = panel;
      }
      const auto* left = packed + (row - item.first_row) / panel * item.num_steps * step_size;
      multiply_panels<pieces>(left, right, item.num_steps, sums);
      for (std::size_t i = 0; !is_whole && i < rows; ++i) {
        std::copy_n(edge + i * panel, columns, place + i * item.stride);
      }
    }
  }
  _tile_release();
}

// Memory of the calling thread, which keeps it, up to 4.7 MB and 0.4 MB for each worker: given back
// after each product, its pages would have to be cleared for the next one.
std::uint16_t* kept_memory(std::size_t count) {
  thread_local Aligned<std::uint16_t> memory;
  thread_local std::size_t size = 0;
  if (size < count) {
    memory = make_aligned<std::uint16_t>(count);
    size = count;
  }
  return memory.get();
}

// Items are some rows by the columns that are packed; where rows are few, by parts of these, so
// that there is work for all threads.
template <std::size_t pieces>
void multiply(const Matrix& left, const Matrix& right, const float* bias, float* out,
              std::size_t threads) {
  constexpr std::size_t step_size = pieces * piece_size, at_once = 4;
  const std::size_t num_rows = left.rows, num_columns = right.columns;
  const std::size_t row_panels = divided(num_rows, panel), panels = divided(num_columns, panel);
  const std::size_t num_steps = divided(left.columns, tile_elements);
  const std::size_t item_rows = std::min(divided(row_panels, threads), max_left) * panel;
  const std::size_t row_items = divided(num_rows, item_rows);
  const std::size_t most_parts = std::max<std::size_t>(1, std::min(panels, max_right) / min_right);
  const std::size_t parts = std::min(divided(4 * threads, row_items), most_parts);
  const std::size_t num_items = row_items * parts, workers = std::min(threads, num_items);
  const std::size_t left_size = item_rows / panel * std::min(num_steps, max_steps) * step_size;
  std::uint16_t* packed_left =
      kept_memory(workers * left_size +
                  std::min(panels, max_right) * std::min(num_steps, max_steps) * step_size);
  std::uint16_t* packed_right = packed_left + workers * left_size;
  for (std::size_t first = 0; first < panels; first += max_right) {
    const std::size_t count = std::min(panels - first, max_right), each = divided(count, parts);
    for (std::size_t step = 0; step < num_steps; step += max_steps) {
      const std::size_t steps = std::min(num_steps - step, max_steps);
      team_for(divided(count, at_once), threads, [&](std::size_t i) {
        pack<pieces, false>(right, (first + i * at_once) * panel,
                            std::min(count - i * at_once, at_once), step * tile_elements, steps,
                            packed_right + i * at_once * steps * step_size);
      });
      std::atomic<std::size_t> next{0}, worker{0};
      team_for(workers, workers, [&](std::size_t) {
        std::uint16_t* mine = packed_left + worker++ * left_size;
        for (std::size_t i = next++; i < num_items; i = next++) {
          const std::size_t row = i / parts * item_rows, from = i % parts * each;
          if (from >= count) {
            continue;
          }
          const std::size_t column = (first + from) * panel;
          multiply_item<pieces>(
              {left, row, std::min(num_rows, row + item_rows), step, steps,
               packed_right + from * steps * step_size,
               std::min(num_columns, (first + std::min(from + each, count)) * panel) - column,
               bias == nullptr ? nullptr : bias + column, out + column, num_columns},
              mine);
        }
      });
    }
  }
}

}  // namespace

void matmul_amx(const Matrix& left, const Matrix& right, const float* bias, float* out,
                std::size_t pieces, std::size_t threads) {
  if (!has_amx()) {
    throw std::runtime_error("matmul_amx: this CPU has no AMX tiles of bfloat16");
  }
  if (pieces != 2 && pieces != 3) {
    throw std::invalid_argument("matmul_amx: pieces must be 2 or 3");
  }
  if (left.columns == 0) {
    throw std::invalid_argument("matmul_amx: a sum of nothing");
  }
  if (left.rows == 0 || right.columns == 0) {
    return;
  }
  (pieces == 3 ? multiply<3> : multiply<2>)(left, right, bias, out,
                                            std::max<std::size_t>(threads, 1));
}

#else

void matmul_amx(const Matrix&, const Matrix&, const float*, float*, std::size_t, std::size_t) {
  throw std::runtime_error("matmul_amx: only on x86-64");
}

#endif

}  // namespace tapct

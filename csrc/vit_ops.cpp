#include "tapct/vit_ops.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "tapct/amx.hpp"
#include "tapct/team.hpp"
#include "tapct/zscore.hpp"

#if TAPCT_HAS_X86
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tapct {

#if TAPCT_HAS_X86

namespace {

constexpr std::size_t num_rows = 2 * tile_rows;         // of a product at a time: queries, or keys
constexpr std::size_t num_keys = 256;                   // whose scores lie in the L1 cache
constexpr std::size_t num_parts = 8;                    // of num_rows queries that share keys
constexpr float log2_e_by_8 = 1.4426950408889634F / 8;  // exp(s / 8) = 2^(s log2_e_by_8)

// Memory of one thread; lines of the cache are not shared.
struct alignas(64) Scratch {
  float scores[num_rows * num_keys];  // then the probabilities, bfloat16, in the same rows
  float sums[num_parts][num_rows * head_width];
  float totals[num_parts][num_rows * 16];  // of the probabilities, per lane
  float largest[num_parts][num_rows];      // scores so far, times log2_e_by_8
  std::uint16_t queries[num_parts][num_rows * head_width];
};

// 2^x to 1e-4, finer than the bfloat16 that becomes of it.
TAPCT_AVX512 inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 0);
  const __m512 rest = _mm512_sub_ps(x, whole);
  __m512 power = _mm512_fmadd_ps(rest, _mm512_set1_ps(0.05508868F), _mm512_set1_ps(0.24260405F));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.69327624F));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(0.99992894F));
  return _mm512_scalef_ps(power, whole);
}

TAPCT_AVX512 inline __m512 load_wide(const std::uint16_t* source) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}

TAPCT_AVX512 inline void store_narrow(std::uint16_t* target, __m512 first, __m512 second) {
  const __m512bh both = _mm512_cvtne2ps_pbh(second, first);
  std::memcpy(target, &both, sizeof(both));
}

// Keys as the right operand of a product: for 16 keys and 32 elements, a tile whose row r holds the
// elements 2r and 2r + 1 of each key. Keys beyond num_tokens are zero.
TAPCT_AVX512 void pack_keys(const std::uint16_t* keys, std::size_t stride, std::size_t num_tokens,
                            std::size_t padded, std::uint16_t* out) {
  for (std::size_t key = 0; key < padded; ++key) {
    for (std::size_t half = 0; half < 2; ++half) {
      std::uint32_t pairs[tile_rows] = {};
      if (key < num_tokens) {
        std::memcpy(pairs, keys + key * stride + half * tile_elements, sizeof(pairs));
      }
      auto* tile = out + (key / tile_rows * 2 + half) * tile_size + key % tile_rows * 2;
      for (std::size_t row = 0; row < tile_rows; ++row) {
        std::memcpy(tile + row * tile_elements, &pairs[row], sizeof(pairs[row]));
      }
    }
  }
}

// Values likewise: for 32 keys and 16 elements, a tile whose row r holds the keys 2r and 2r + 1.
TAPCT_AVX512 void pack_values(const std::uint16_t* values, std::size_t stride,
                              std::size_t num_tokens, std::size_t padded, std::uint16_t* out) {
  for (std::size_t key = 0; key < padded; key += 2) {
    std::uint16_t even[head_width] = {}, odd[head_width] = {};
    if (key < num_tokens) {
      std::memcpy(even, values + key * stride, sizeof(even));
    }
    if (key + 1 < num_tokens) {
      std::memcpy(odd, values + (key + 1) * stride, sizeof(odd));
    }
    for (std::size_t quarter = 0; quarter < 4; ++quarter) {
      auto* row = out + (key / tile_elements * 4 + quarter) * tile_size +
                  key % tile_elements / 2 * tile_elements;
      for (std::size_t i = 0; i < tile_rows; ++i) {
        row[2 * i] = even[quarter * tile_rows + i];
        row[2 * i + 1] = odd[quarter * tile_rows + i];
      }
    }
  }
}

// Scores of 32 queries and `count` keys from `first` on. The backward has keys for queries.
TAPCT_AMX void multiply_keys(const std::uint16_t* queries, const std::uint16_t* keys,
                             std::size_t first, std::size_t count, float* scores) {
  constexpr std::size_t query_bytes = head_width * sizeof(std::uint16_t);
  constexpr std::size_t score_bytes = num_keys * sizeof(float);
  const auto* below = queries + tile_rows * head_width;
  for (std::size_t key = 0; key < count; key += 2 * tile_rows) {
    const auto* tile = keys + (first + key) / tile_rows * 2 * tile_size;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (std::size_t half = 0; half < 2; ++half) {
      _tile_loadd(4, queries + half * tile_elements, query_bytes);
      _tile_loadd(6, tile + half * tile_size, 64);
      _tile_loadd(7, tile + (2 + half) * tile_size, 64);
      _tile_loadd(5, below + half * tile_elements, query_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    float* target = scores + key;
    _tile_stored(0, target, score_bytes);
    _tile_stored(1, target + tile_rows, score_bytes);
    _tile_stored(2, target + tile_rows * num_keys, score_bytes);
    _tile_stored(3, target + tile_rows * num_keys + tile_rows, score_bytes);
  }
}

// Adds the products of 32 rows of `count` probabilities with the values from `first` on.
TAPCT_AMX void multiply_values(const float* scores, const std::uint16_t* values, std::size_t first,
                               std::size_t count, float* sums) {
  constexpr std::size_t score_bytes = num_keys * sizeof(float);
  constexpr std::size_t sum_bytes = head_width * sizeof(float);
  const auto* probabilities = reinterpret_cast<const std::uint16_t*>(scores);
  const auto* below = reinterpret_cast<const std::uint16_t*>(scores + tile_rows * num_keys);
  for (std::size_t quarter = 0; quarter < 4; quarter += 2) {
    float* target = sums + quarter * tile_rows;
    _tile_loadd(0, target, sum_bytes);
    _tile_loadd(1, target + tile_rows, sum_bytes);
    _tile_loadd(2, target + tile_rows * head_width, sum_bytes);
    _tile_loadd(3, target + tile_rows * head_width + tile_rows, sum_bytes);
    for (std::size_t key = 0; key < count; key += tile_elements) {
      const auto* tile = values + ((first + key) / tile_elements * 4 + quarter) * tile_size;
      _tile_loadd(4, probabilities + key, score_bytes);
      _tile_loadd(6, tile, 64);
      _tile_loadd(7, tile + tile_size, 64);
      _tile_loadd(5, below + key, score_bytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, target, sum_bytes);
    _tile_stored(1, target + tile_rows, sum_bytes);
    _tile_stored(2, target + tile_rows * head_width, sum_bytes);
    _tile_stored(3, target + tile_rows * head_width + tile_rows, sum_bytes);
  }
}

// Scores to probabilities relative to the largest score so far, to which sums and totals are
// brought down.
TAPCT_AVX512 void take_exponentials(Scratch& scratch, std::size_t part, std::size_t count) {
  const __m512 scale = _mm512_set1_ps(log2_e_by_8);
  alignas(64) float largest[num_rows], factors[num_rows];
  for (std::size_t row = 0; row < num_rows; ++row) {
    const float* scores = scratch.scores + row * num_keys;
    __m512 even = _mm512_loadu_ps(scores), odd = _mm512_loadu_ps(scores + 16);
    for (std::size_t i = 32; i < count; i += 32) {
      even = _mm512_max_ps(even, _mm512_loadu_ps(scores + i));
      odd = _mm512_max_ps(odd, _mm512_loadu_ps(scores + i + 16));
    }
    largest[row] = _mm512_reduce_max_ps(_mm512_max_ps(even, odd));
  }
  for (std::size_t row = 0; row < num_rows; row += 16) {
    float* kept = scratch.largest[part] + row;
    const __m512 before = _mm512_loadu_ps(kept);
    const __m512 now = _mm512_max_ps(before, _mm512_mul_ps(_mm512_load_ps(largest + row), scale));
    _mm512_store_ps(factors + row, exp2_of(_mm512_sub_ps(before, now)));
    _mm512_storeu_ps(kept, now);
  }
  for (std::size_t row = 0; row < num_rows; ++row) {
    float* scores = scratch.scores + row * num_keys;
    auto* probabilities = reinterpret_cast<std::uint16_t*>(scores);
    const __m512 top = _mm512_set1_ps(scratch.largest[part][row]);
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (std::size_t i = 0; i < count; i += 32) {
      const __m512 first = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), scale, top));
      const __m512 second = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i + 16), scale, top));
      even = _mm512_add_ps(even, first);
      odd = _mm512_add_ps(odd, second);
      store_narrow(probabilities + i, first, second);
    }
    const __m512 factor = _mm512_set1_ps(factors[row]);
    float* total = scratch.totals[part] + row * 16;
    _mm512_storeu_ps(total,
                     _mm512_fmadd_ps(_mm512_loadu_ps(total), factor, _mm512_add_ps(even, odd)));
    float* sums = scratch.sums[part] + row * head_width;
    for (std::size_t i = 0; i < head_width; i += 16) {
      _mm512_storeu_ps(sums + i, _mm512_mul_ps(_mm512_loadu_ps(sums + i), factor));
    }
  }
}

TAPCT_AVX512 void store_scaled(std::uint16_t* target, const float* row, float factor) {
  const __m512 scale = _mm512_set1_ps(factor);
  for (std::size_t i = 0; i < head_width; i += 32) {
    store_narrow(target + i, _mm512_mul_ps(_mm512_loadu_ps(row + i), scale),
                 _mm512_mul_ps(_mm512_loadu_ps(row + i + 16), scale));
  }
}

TAPCT_AVX512 void write_rows(const Scratch& scratch, std::size_t count, std::uint16_t* out,
                             std::size_t stride, float* levels) {
  for (std::size_t row = 0; row < count; ++row) {
    const std::size_t part = row / num_rows, place = row % num_rows;
    const float total = _mm512_reduce_add_ps(_mm512_loadu_ps(scratch.totals[part] + place * 16));
    store_scaled(out + row * stride, scratch.sums[part] + place * head_width, 1 / total);
    levels[row] = scratch.largest[part][place] + std::log2(total);
  }
}

struct Head {
  const std::uint16_t* queries;  // of the first token
  std::size_t stride;
  std::size_t num_tokens;
  std::size_t padded;  // to whole tiles
  const std::uint16_t* keys;
  const std::uint16_t* values;
  std::uint16_t* out;
  std::size_t out_stride;
  float* levels;
};

TAPCT_AMX void attend(const Head& head, std::size_t first, Scratch& scratch) {
  const std::size_t count = std::min(num_parts * num_rows, head.num_tokens - first);
  const std::size_t parts = (count + num_rows - 1) / num_rows;
  std::memset(scratch.queries, 0, parts * sizeof(scratch.queries[0]));
  std::memset(scratch.sums, 0, parts * sizeof(scratch.sums[0]));
  std::memset(scratch.totals, 0, parts * sizeof(scratch.totals[0]));
  std::fill_n(scratch.largest[0], parts * num_rows, -1e30F);
  for (std::size_t row = 0; row < count; ++row) {
    std::memcpy(scratch.queries[0] + row * head_width, head.queries + (first + row) * head.stride,
                head_width * sizeof(std::uint16_t));
  }
  const TileConfig config;
  _tile_loadconfig(&config);
  for (std::size_t key = 0; key < head.padded; key += num_keys) {
    const std::size_t keys = std::min(num_keys, head.padded - key);
    for (std::size_t part = 0; part < parts; ++part) {
      multiply_keys(scratch.queries[part], head.keys, key, keys, scratch.scores);
      if (key + keys > head.num_tokens) {
        for (std::size_t row = 0; row < num_rows; ++row) {
          std::fill(scratch.scores + row * num_keys + (head.num_tokens - key),
                    scratch.scores + row * num_keys + keys,
                    -std::numeric_limits<float>::infinity());
        }
      }
      take_exponentials(scratch, part, keys);
      multiply_values(scratch.scores, head.values, key, keys, scratch.sums[part]);
    }
  }
  _tile_release();
  write_rows(scratch, count, head.out + first * head.out_stride, head.out_stride,
             head.levels + first);
}

// Memory of one thread in the backward, which takes 32 keys at a time: their rows are queries.
struct alignas(64) BackwardScratch {
  float weights[num_rows * num_keys];  // scores, then the probabilities, bfloat16, in the same rows
  float slopes[num_rows * num_keys];   // gradients of probabilities, then of scores, likewise
  std::uint16_t pairs[num_rows * num_keys];  // the latter as the right operand of a product
  float key_sums[num_rows * head_width], value_sums[num_rows * head_width];
  std::uint16_t keys[num_rows * head_width], values[num_rows * head_width];
  std::uint16_t packed[num_rows * head_width], turned[head_width * num_rows];  // keys
  // Of all tokens of a head, and query_sums turned: a row is one of the 64 elements.
  Aligned<std::uint16_t> query_columns, query_pairs, grad_columns, grad_pairs;
  Aligned<float> query_sums, levels, deltas;
};

// With p = 2^(s log2_e_by_8 - level) the gradient of a score is p (dp - delta), but for 1 / 8.
TAPCT_AVX512 void take_slopes(BackwardScratch& scratch, std::size_t first, std::size_t count,
                              std::size_t keys) {
  const __m512 scale = _mm512_set1_ps(log2_e_by_8);
  for (std::size_t row = 0; row < num_rows; ++row) {
    float* weights = scratch.weights + row * num_keys;
    float* slopes = scratch.slopes + row * num_keys;
    const __mmask16 is_key = row < keys ? 0xffff : 0;
    for (std::size_t i = 0; i < count; i += 16) {
      const __m512 level = _mm512_load_ps(scratch.levels.get() + first + i);
      const __m512 delta = _mm512_load_ps(scratch.deltas.get() + first + i);
      const __m512 weight = _mm512_maskz_mov_ps(
          is_key, exp2_of(_mm512_fmsub_ps(_mm512_load_ps(weights + i), scale, level)));
      const __m512 slope =
          _mm512_maskz_mul_ps(is_key, weight, _mm512_sub_ps(_mm512_load_ps(slopes + i), delta));
      const __m256bh weight_bits = _mm512_cvtneps_pbh(weight);
      const __m256bh slope_bits = _mm512_cvtneps_pbh(slope);
      std::memcpy(reinterpret_cast<std::uint16_t*>(weights) + i, &weight_bits, sizeof(weight_bits));
      std::memcpy(reinterpret_cast<std::uint16_t*>(slopes) + i, &slope_bits, sizeof(slope_bits));
    }
  }
  // For 16 queries a tile whose row r holds the keys 2r and 2r + 1.
  const auto* bits = reinterpret_cast<const std::uint16_t*>(scratch.slopes);
  constexpr std::size_t stride = 2 * num_keys;
  for (std::size_t row = 0; row < num_rows; row += 2) {
    for (std::size_t i = 0; i < count; i += 16) {
      __m256i even, odd;
      std::memcpy(&even, bits + row * stride + i, sizeof(even));
      std::memcpy(&odd, bits + (row + 1) * stride + i, sizeof(odd));
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
      _mm512_store_si512(scratch.pairs + i * tile_elements + row / 2 * tile_elements, both);
    }
  }
}

// Adds the products of the turned keys with the slopes of `count` queries from `first` on.
TAPCT_AMX void multiply_slopes(const BackwardScratch& scratch, std::size_t first, std::size_t count,
                               std::size_t padded) {
  const std::size_t sum_bytes = padded * sizeof(float);
  for (std::size_t i = 0; i < count; i += 2 * tile_rows) {
    _tile_loadd(6, scratch.pairs + i * tile_elements, 64);
    _tile_loadd(7, scratch.pairs + (i + tile_rows) * tile_elements, 64);
    for (std::size_t element = 0; element < head_width; element += 2 * tile_rows) {
      float* target = scratch.query_sums.get() + element * padded + first + i;
      float* below = target + tile_rows * padded;
      _tile_loadd(0, target, sum_bytes);
      _tile_loadd(1, target + tile_rows, sum_bytes);
      _tile_loadd(2, below, sum_bytes);
      _tile_loadd(3, below + tile_rows, sum_bytes);
      _tile_loadd(4, scratch.turned + element * num_rows, 64);
      _tile_loadd(5, scratch.turned + (element + tile_rows) * num_rows, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
      _tile_stored(0, target, sum_bytes);
      _tile_stored(1, target + tile_rows, sum_bytes);
      _tile_stored(2, below, sum_bytes);
      _tile_stored(3, below + tile_rows, sum_bytes);
    }
  }
}

struct HeadBackward {
  const std::uint16_t* queries;  // of the first token; the keys are `width` behind, then the values
  const std::uint16_t* out;
  const std::uint16_t* grad_out;
  const float* levels;
  std::uint16_t* grad;  // laid out as the queries are
  std::size_t width;    // of a token of out
  std::size_t num_tokens;
  std::size_t padded;
};

TAPCT_AVX512 float dot(const std::uint16_t* a, const std::uint16_t* b) {
  __m512 sum = _mm512_setzero_ps();
  for (std::size_t i = 0; i < head_width; i += 16) {
    sum = _mm512_fmadd_ps(load_wide(a + i), load_wide(b + i), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

TAPCT_AVX512 void prepare_queries(const HeadBackward& head, BackwardScratch& scratch) {
  const std::size_t tokens = head.num_tokens, padded = head.padded, width = head.width;
  pack_keys(head.queries, 3 * width, tokens, padded, scratch.query_columns.get());
  pack_values(head.queries, 3 * width, tokens, padded, scratch.query_pairs.get());
  pack_keys(head.grad_out, width, tokens, padded, scratch.grad_columns.get());
  pack_values(head.grad_out, width, tokens, padded, scratch.grad_pairs.get());
  std::fill_n(scratch.query_sums.get(), head_width * padded, 0.0F);
  std::copy_n(head.levels, tokens, scratch.levels.get());
  for (std::size_t token = 0; token < tokens; ++token) {
    scratch.deltas[token] = dot(head.out + token * width, head.grad_out + token * width);
  }
  // So high that no query has a probability there.
  std::fill_n(scratch.levels.get() + tokens, padded - tokens, 1e30F);
  std::fill_n(scratch.deltas.get() + tokens, padded - tokens, 0.0F);
}

TAPCT_AVX512 void prepare_keys(const HeadBackward& head, std::size_t first, std::size_t count,
                               BackwardScratch& scratch) {
  const std::size_t stride = 3 * head.width;
  const auto* keys = head.queries + head.width + first * stride;
  std::memset(scratch.keys, 0, sizeof(scratch.keys));
  std::memset(scratch.values, 0, sizeof(scratch.values));
  for (std::size_t key = 0; key < count; ++key) {
    const auto* source = keys + key * stride;
    std::copy_n(source, head_width, scratch.keys + key * head_width);
    std::copy_n(source + head.width, head_width, scratch.values + key * head_width);
  }
  pack_keys(keys, stride, count, num_rows, scratch.packed);
  for (std::size_t key = 0; key < num_rows; key += tile_rows) {
    for (std::size_t element = 0; element < head_width; element += 2) {
      const auto* tile = scratch.packed + (key / tile_rows * 2 + element / 32) * tile_size;
      const __m512i both = _mm512_load_si512(tile + element % 32 / 2 * tile_elements);
      const __m256i even = _mm512_cvtepi32_epi16(both);
      const __m256i odd = _mm512_cvtepi32_epi16(_mm512_srli_epi32(both, 16));
      std::memcpy(scratch.turned + element * num_rows + key, &even, sizeof(even));
      std::memcpy(scratch.turned + (element + 1) * num_rows + key, &odd, sizeof(odd));
    }
  }
  std::memset(scratch.key_sums, 0, sizeof(scratch.key_sums));
  std::memset(scratch.value_sums, 0, sizeof(scratch.value_sums));
}

TAPCT_AMX void attend_backward(const HeadBackward& head, BackwardScratch& scratch) {
  const std::size_t tokens = head.num_tokens, padded = head.padded, stride = 3 * head.width;
  prepare_queries(head, scratch);
  const TileConfig config;
  _tile_loadconfig(&config);
  for (std::size_t key = 0; key < tokens; key += num_rows) {
    const std::size_t keys = std::min(num_rows, tokens - key);
    prepare_keys(head, key, keys, scratch);
    for (std::size_t query = 0; query < padded; query += num_keys) {
      const std::size_t count = std::min(num_keys, padded - query);
      multiply_keys(scratch.keys, scratch.query_columns.get(), query, count, scratch.weights);
      multiply_keys(scratch.values, scratch.grad_columns.get(), query, count, scratch.slopes);
      take_slopes(scratch, query, count, keys);
      multiply_values(scratch.weights, scratch.grad_pairs.get(), query, count, scratch.value_sums);
      multiply_values(scratch.slopes, scratch.query_pairs.get(), query, count, scratch.key_sums);
      multiply_slopes(scratch, query, count, padded);
    }
    for (std::size_t i = 0; i < keys; ++i) {
      auto* target = head.grad + head.width + (key + i) * stride;
      store_scaled(target, scratch.key_sums + i * head_width, 1.0F / 8);
      store_scaled(target + head.width, scratch.value_sums + i * head_width, 1);
    }
  }
  _tile_release();
  alignas(64) float row[head_width];
  for (std::size_t token = 0; token < tokens; ++token) {
    for (std::size_t i = 0; i < head_width; ++i) {
      row[i] = scratch.query_sums[i * padded + token];
    }
    store_scaled(head.grad + token * stride, row, 1.0F / 8);
  }
}

TAPCT_AVX512 void norm_row(float* x, const std::uint16_t* branch, const float* weight,
                           const float* bias, float eps, std::uint16_t* out, std::size_t width) {
  __m512 sum = _mm512_setzero_ps();
  for (std::size_t i = 0; i < width; i += 16) {
    __m512 value = _mm512_loadu_ps(x + i);
    if (branch != nullptr) {
      value = _mm512_add_ps(value, load_wide(branch + i));
      _mm512_storeu_ps(x + i, value);
    }
    sum = _mm512_add_ps(sum, value);
  }
  const float count = static_cast<float>(width);
  const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / count);
  __m512 squares = _mm512_setzero_ps();
  for (std::size_t i = 0; i < width; i += 16) {
    const __m512 rest = _mm512_sub_ps(_mm512_loadu_ps(x + i), mean);
    squares = _mm512_fmadd_ps(rest, rest, squares);
  }
  const float variance = _mm512_reduce_add_ps(squares) / count;
  const __m512 scale =
      _mm512_div_ps(_mm512_set1_ps(1), _mm512_sqrt_ps(_mm512_set1_ps(variance + eps)));
  for (std::size_t i = 0; i < width; i += 16) {
    const __m512 unit = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(x + i), mean), scale);
    const __m512 value =
        _mm512_fmadd_ps(unit, _mm512_loadu_ps(weight + i), _mm512_loadu_ps(bias + i));
    const __m256bh bits = _mm512_cvtneps_pbh(value);
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

// GELU of every bfloat16, rounded from double: 128 KB, of which what tokens hold fits the L1 cache.
const std::uint16_t* gelu_table() {
  constexpr std::size_t count = 1 << 16;
  static const std::unique_ptr<std::uint16_t[]> table = [] {
    // One more than there are: a lane loads 32 bits and uses 16.
    std::unique_ptr<std::uint16_t[]> values(new std::uint16_t[count + 1]());
    for (std::size_t bits = 0; bits < count; ++bits) {
      const auto x =
          static_cast<double>(std::bit_cast<float>(static_cast<std::uint32_t>(bits << 16)));
      const double y = x == 0 ? x : x * 0.5 * std::erfc(-x * 0.7071067811865476);
      // Quiet NaN: rounding would carry its last bits into infinity. And 0 x of minus infinity.
      values[bits] = std::isnan(y) ? std::uint16_t{0x7fc0} : to_bf16(static_cast<float>(y));
    }
    return values;
  }();
  return table.get();
}

TAPCT_AVX512 inline __m512i look_up(const std::uint16_t* table, __m256i bits) {
  const __m512i found = _mm512_i32gather_epi32(_mm512_cvtepu16_epi32(bits), table, 2);
  return _mm512_and_si512(found, _mm512_set1_epi32(0xffff));
}

TAPCT_AVX512 void gelu_run(std::uint16_t* x, std::size_t count) {
  const std::uint16_t* table = gelu_table();
  std::size_t i = 0;
  for (; i + 16 <= count; i += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    const __m256i out = _mm512_cvtepi32_epi16(look_up(table, bits));
    std::memcpy(x + i, &out, sizeof(out));
  }
  for (; i < count; ++i) {
    x[i] = table[x[i]];
  }
}

}  // namespace

bool has_avx512_bf16() {
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

bool has_amx() {
  static const bool is_there = [] {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned amx_bf16 = 1U << 22, amx_tile = 1U << 24;
    if (!has_avx512_bf16() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0 || (d & amx_bf16) == 0 ||
        (d & amx_tile) == 0) {
      return false;
    }
    // ARCH_REQ_XCOMP_PERM of XFEATURE_XTILEDATA, for all threads of the process.
    return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  }();
  return is_there;
}

void attention_amx(const std::uint16_t* qkv, std::uint16_t* out, float* levels,
                   std::size_t num_volumes, std::size_t num_tokens, std::size_t num_heads,
                   std::size_t threads) {
  if (!has_amx()) {
    throw std::runtime_error("attention_amx: this CPU has no AMX tiles of bfloat16");
  }
  if (num_volumes == 0 || num_tokens == 0 || num_heads == 0) {
    return;
  }
  const std::size_t padded = (num_tokens + tile_elements - 1) / tile_elements * tile_elements;
  const std::size_t width = num_heads * head_width, stride = 3 * width;
  const std::size_t head_size = padded * head_width;
  const auto keys = make_aligned<std::uint16_t>(num_heads * head_size);
  const auto values = make_aligned<std::uint16_t>(num_heads * head_size);
  const std::size_t blocks = (num_tokens + num_parts * num_rows - 1) / (num_parts * num_rows);
  // One per item that may be at work at a time; each thread takes a free one.
  const std::size_t workers = std::max<std::size_t>(1, std::min(threads, num_heads * blocks));
  const std::unique_ptr<Scratch[]> scratch(new Scratch[workers]);
  for (std::size_t volume = 0; volume < num_volumes; ++volume) {
    const auto* first = qkv + volume * num_tokens * stride;
    team_for(num_heads, threads, [&](std::size_t h) {
      const auto* base = first + h * head_width;
      pack_keys(base + width, stride, num_tokens, padded, keys.get() + h * head_size);
      pack_values(base + 2 * width, stride, num_tokens, padded, values.get() + h * head_size);
    });
    std::atomic<std::size_t> next{0}, worker{0};
    team_for(workers, workers, [&](std::size_t) {
      Scratch& mine = scratch[worker++];
      for (std::size_t i = next++; i < num_heads * blocks; i = next++) {
        const std::size_t h = i / blocks;
        const Head head{first + h * head_width,
                        stride,
                        num_tokens,
                        padded,
                        keys.get() + h * head_size,
                        values.get() + h * head_size,
                        out + volume * num_tokens * width + h * head_width,
                        width,
                        levels + (volume * num_heads + h) * num_tokens};
        attend(head, i % blocks * num_parts * num_rows, mine);
      }
    });
  }
}

void attention_amx_backward(const std::uint16_t* grad_out, const std::uint16_t* qkv,
                            const std::uint16_t* out, const float* levels, std::uint16_t* grad_qkv,
                            std::size_t num_volumes, std::size_t num_tokens, std::size_t num_heads,
                            std::size_t threads) {
  if (!has_amx()) {
    throw std::runtime_error("attention_amx_backward: this CPU has no AMX tiles of bfloat16");
  }
  if (num_volumes == 0 || num_tokens == 0 || num_heads == 0) {
    return;
  }
  const std::size_t padded = (num_tokens + tile_elements - 1) / tile_elements * tile_elements;
  const std::size_t width = num_heads * head_width, items = num_volumes * num_heads;
  const std::size_t workers = std::max<std::size_t>(1, std::min(threads, items));
  const std::unique_ptr<BackwardScratch[]> scratch(new BackwardScratch[workers]);
  for (std::size_t worker = 0; worker < workers; ++worker) {
    BackwardScratch& mine = scratch[worker];
    for (auto* bits :
         {&mine.query_columns, &mine.query_pairs, &mine.grad_columns, &mine.grad_pairs}) {
      *bits = make_aligned<std::uint16_t>(padded * head_width);
    }
    mine.query_sums = make_aligned<float>(padded * head_width);
    mine.levels = make_aligned<float>(padded);
    mine.deltas = make_aligned<float>(padded);
  }
  std::atomic<std::size_t> next{0}, worker{0};
  team_for(workers, workers, [&](std::size_t) {
    BackwardScratch& mine = scratch[worker++];
    for (std::size_t i = next++; i < items; i = next++) {
      const std::size_t at = i / num_heads * num_tokens * width + i % num_heads * head_width;
      const std::size_t at_qkv =
          i / num_heads * num_tokens * 3 * width + i % num_heads * head_width;
      attend_backward({qkv + at_qkv, out + at, grad_out + at, levels + i * num_tokens,
                       grad_qkv + at_qkv, width, num_tokens, padded},
                      mine);
    }
  });
}

void add_norm(float* x, const std::uint16_t* branch, const float* weight, const float* bias,
              float eps, std::uint16_t* out, std::size_t num_rows_of_x, std::size_t width,
              std::size_t threads) {
  if (!has_avx512_bf16() || width % 16 != 0) {
    throw std::runtime_error("add_norm: needs AVX-512 with bfloat16 and a width in sixteens");
  }
  constexpr std::size_t rows_at_once = 64;
  team_for((num_rows_of_x + rows_at_once - 1) / rows_at_once, threads, [&](std::size_t i) {
    const std::size_t end = std::min(num_rows_of_x, (i + 1) * rows_at_once);
    for (std::size_t row = i * rows_at_once; row < end; ++row) {
      norm_row(x + row * width, branch == nullptr ? nullptr : branch + row * width, weight, bias,
               eps, out + row * width, width);
    }
  });
}

void gelu(std::uint16_t* x, std::size_t count, std::size_t threads) {
  if (!has_avx512_bf16()) {
    throw std::runtime_error("gelu: needs AVX-512 with bfloat16");
  }
  constexpr std::size_t at_once = 1 << 16;
  team_for((count + at_once - 1) / at_once, threads, [&](std::size_t i) {
    gelu_run(x + i * at_once, std::min(at_once, count - i * at_once));
  });
}

#else

bool has_avx512_bf16() { return false; }
bool has_amx() { return false; }

void attention_amx(const std::uint16_t*, std::uint16_t*, float*, std::size_t, std::size_t,
                   std::size_t, std::size_t) {
  throw std::runtime_error("attention_amx: only on x86-64");
}

void attention_amx_backward(const std::uint16_t*, const std::uint16_t*, const std::uint16_t*,
                            const float*, std::uint16_t*, std::size_t, std::size_t, std::size_t,
                            std::size_t) {
  throw std::runtime_error("attention_amx_backward: only on x86-64");
}

void add_norm(float*, const std::uint16_t*, const float*, const float*, float, std::uint16_t*,
              std::size_t, std::size_t, std::size_t) {
  throw std::runtime_error("add_norm: only on x86-64");
}

void gelu(std::uint16_t*, std::size_t, std::size_t) {
  throw std::runtime_error("gelu: only on x86-64");
}

#endif

}  // namespace tapct

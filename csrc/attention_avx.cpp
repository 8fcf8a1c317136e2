#include "tapct/attention_avx.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>

#include "tapct/exp.hpp"
#include "tapct/team.hpp"
#include "tapct/vit_ops.hpp"

namespace tapct {

#if defined(__x86_64__) && defined(__GNUC__)

#define TAPCT_INLINE [[gnu::always_inline]] inline

namespace {

constexpr std::size_t num_keys = 256;    // of a block
constexpr std::size_t num_queries = 48;  // of a block
constexpr std::size_t num_parts = 8;     // query blocks that share a packing of keys
constexpr std::size_t row_step = 6;      // rows of a product at a time
constexpr std::size_t key_step = 16;     // keys are padded to
constexpr float scale = 1.0F / 8;

template <std::size_t width>
struct Lanes {
  typedef float Floats __attribute__((vector_size(width * sizeof(float))));
  typedef std::uint32_t Bits __attribute__((vector_size(width * sizeof(float))));

  TAPCT_INLINE static Floats load(const float* source) {
    Floats values;
    __builtin_memcpy(&values, source, sizeof(values));
    return values;
  }
  TAPCT_INLINE static void store(float* target, Floats values) {
    __builtin_memcpy(target, &values, sizeof(values));
  }
};

// A product: element (i, l) of the left factor is a[i * row_stride + l * inner_stride]; the right
// one and the sums are row-major.
struct Product {
  const float* a;
  std::size_t row_stride, inner_stride, length;
  const float* b;
  std::size_t b_stride;
  float* c;
  std::size_t c_stride;
  bool adds;
};

template <std::size_t width, std::size_t vectors>
TAPCT_INLINE void multiply_some(const Product& p, const float* a, const float* b, float* c) {
  using L = Lanes<width>;
  typename L::Floats sums[row_step][vectors] = {};
  for (std::size_t l = 0; l < p.length; ++l) {
    typename L::Floats right[vectors];
    for (std::size_t j = 0; j < vectors; ++j) {
      right[j] = L::load(b + l * p.b_stride + j * width);
    }
    for (std::size_t i = 0; i < row_step; ++i) {
      const float left = a[i * p.row_stride + l * p.inner_stride];
      for (std::size_t j = 0; j < vectors; ++j) {
        sums[i][j] += left * right[j];
      }
    }
  }
  for (std::size_t i = 0; i < row_step; ++i) {
    for (std::size_t j = 0; j < vectors; ++j) {
      float* target = c + i * p.c_stride + j * width;
      L::store(target, p.adds ? L::load(target) + sums[i][j] : sums[i][j]);
    }
  }
}

// The columns from `column` on, some vectors at a time, then as many as are left.
template <std::size_t width, std::size_t vectors>
TAPCT_INLINE void multiply_from(const Product& p, std::size_t rows, std::size_t columns,
                                std::size_t column) {
  for (; column + vectors * width <= columns; column += vectors * width) {
    for (std::size_t row = 0; row < rows; row += row_step) {
      multiply_some<width, vectors>(p, p.a + row * p.row_stride, p.b + column,
                                    p.c + row * p.c_stride + column);
    }
  }
  if constexpr (vectors * width > key_step) {
    multiply_from<width, vectors - 1>(p, rows, columns, column);
  }
}

// Rows in sixes, columns in sixteens; both padded by the caller.
template <std::size_t width>
TAPCT_INLINE void multiply(const Product& p, std::size_t rows, std::size_t columns) {
  multiply_from<width, width == 16 ? 4 : 2>(p, rows, columns, 0);  // sums of 24 or 12 registers
}

TAPCT_INLINE void copy_rows(const float* source, std::size_t stride, std::size_t count,
                            float* out) {
  for (std::size_t row = 0; row < count; ++row) {
    __builtin_memcpy(out + row * head_width, source + row * stride, head_width * sizeof(float));
  }
}

// Rows as columns: element e of row r becomes columns[e * num_keys + r]. Rows from `count` to
// `padded` are zero.
TAPCT_INLINE void turn(const float* source, std::size_t stride, std::size_t count,
                       std::size_t padded, float* columns) {
  using L = Lanes<8>;
  for (std::size_t row = 0; row < padded; row += 8) {
    for (std::size_t element = 0; element < head_width; element += 8) {
      L::Floats r[8], t[8];
      for (std::size_t i = 0; i < 8; ++i) {
        r[i] = row + i < count ? L::load(source + (row + i) * stride + element) : L::Floats{};
      }
      for (std::size_t i = 0; i < 8; i += 2) {
        t[i] = __builtin_shufflevector(r[i], r[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        t[i + 1] = __builtin_shufflevector(r[i], r[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
      }
      for (std::size_t i = 0; i < 2; ++i) {
        for (std::size_t j = 0; j < 8; j += 4) {
          r[j + 2 * i] = __builtin_shufflevector(t[j + i], t[j + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
          r[j + 2 * i + 1] =
              __builtin_shufflevector(t[j + i], t[j + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
      }
      for (std::size_t i = 0; i < 4; ++i) {
        float* target = columns + (element + i) * num_keys + row;
        L::store(target, __builtin_shufflevector(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
        L::store(target + 4 * num_keys,
                 __builtin_shufflevector(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
      }
    }
  }
}

struct alignas(64) Scratch {
  float columns[head_width * num_keys];
  float values[num_keys * head_width];
  float scores[num_queries * num_keys];
  float queries[num_parts * num_queries * head_width];
  float sums[num_parts * num_queries * head_width];
  float largest[num_parts * num_queries], totals[num_parts * num_queries];
};

std::size_t padded_to(std::size_t count, std::size_t step) {
  return (count + step - 1) / step * step;
}

struct Head {
  const float* queries;  // of the first token; the keys are `width` behind, then the values
  std::size_t width, num_tokens;
  float* out;
  float* levels;
};

// Keys of a block, so that the blocks are alike.
std::size_t block_size(std::size_t num_tokens) {
  const std::size_t blocks = (num_tokens + num_keys - 1) / num_keys;
  return padded_to((num_tokens + blocks - 1) / blocks, key_step);
}

template <std::size_t width>
TAPCT_INLINE void take_exponentials(float* scores, std::size_t padded, float& largest, float& total,
                                    float* sums) {
  using L = Lanes<width>;
  typename L::Floats most = L::load(scores);
  for (std::size_t i = width; i < padded; i += width) {
    const auto other = L::load(scores + i);
    most = other > most ? other : most;
  }
  float now = largest;
  for (std::size_t i = 0; i < width; ++i) {
    now = most[i] > now ? most[i] : now;
  }
  typename L::Floats added{};
  for (std::size_t i = 0; i < padded; i += width) {
    const auto weight = exp_of<L>((L::load(scores + i) - now) * scale);
    L::store(scores + i, weight);
    added += weight;
  }
  float sum = 0;
  for (std::size_t i = 0; i < width; ++i) {
    sum += added[i];
  }
  if (now != largest) {
    const float factor = std::exp((largest - now) * scale);
    for (std::size_t i = 0; i < head_width; i += width) {
      L::store(sums + i, L::load(sums + i) * factor);
    }
    total *= factor;
    largest = now;
  }
  total += sum;
}

template <std::size_t width>
TAPCT_INLINE void attend(const Head& head, std::size_t first, Scratch& scratch) {
  const std::size_t stride = 3 * head.width;
  const std::size_t count = std::min(num_parts * num_queries, head.num_tokens - first);
  const std::size_t rows = padded_to(count, row_step);
  copy_rows(head.queries + first * stride, stride, count, scratch.queries);
  std::fill(scratch.queries + count * head_width, scratch.queries + rows * head_width, 0.0F);
  std::fill_n(scratch.sums, rows * head_width, 0.0F);
  std::fill_n(scratch.totals, rows, 0.0F);
  std::fill_n(scratch.largest, rows, -std::numeric_limits<float>::infinity());
  const std::size_t block = block_size(head.num_tokens);
  for (std::size_t key = 0; key < head.num_tokens; key += block) {
    const std::size_t keys = std::min(block, head.num_tokens - key);
    const std::size_t padded = padded_to(keys, key_step);
    const float* source = head.queries + head.width + key * stride;
    turn(source, stride, keys, padded, scratch.columns);
    copy_rows(source + head.width, stride, keys, scratch.values);
    for (std::size_t query = 0; query < rows; query += num_queries) {
      const std::size_t here = std::min(num_queries, rows - query);
      multiply<width>({scratch.queries + query * head_width, head_width, 1, head_width,
                       scratch.columns, num_keys, scratch.scores, num_keys, false},
                      here, padded);
      for (std::size_t row = 0; row < here; ++row) {
        float* scores = scratch.scores + row * num_keys;
        std::fill(scores + keys, scores + padded, -std::numeric_limits<float>::infinity());
        take_exponentials<width>(scores, padded, scratch.largest[query + row],
                                 scratch.totals[query + row],
                                 scratch.sums + (query + row) * head_width);
      }
      multiply<width>({scratch.scores, num_keys, 1, keys, scratch.values, head_width,
                       scratch.sums + query * head_width, head_width, true},
                      here, head_width);
    }
  }
  for (std::size_t row = 0; row < count; ++row) {
    const float factor = 1 / scratch.totals[row];
    float* target = head.out + (first + row) * head.width;
    for (std::size_t i = 0; i < head_width; ++i) {
      target[i] = scratch.sums[row * head_width + i] * factor;
    }
    head.levels[first + row] = scratch.largest[row] * scale + std::log(scratch.totals[row]);
  }
}

// Memory of one thread; rows of all tokens are on the heap.
struct alignas(64) BackwardScratch {
  float key_columns[head_width * num_keys], value_columns[head_width * num_keys];
  float keys[num_keys * head_width];
  float key_sums[(num_keys + row_step) * head_width],
      value_sums[(num_keys + row_step) * head_width];
  float weights[num_queries * num_keys + key_step], slopes[num_queries * num_keys + key_step];
  float queries[num_queries * head_width], grads[num_queries * head_width];
  std::unique_ptr<float[]> query_sums, deltas;
};

struct HeadBackward {
  const float* queries;  // as in Head
  std::size_t width, num_tokens;
  const float* out;
  const float* grad_out;
  const float* levels;
  float* grad;  // laid out as the queries are
};

// With p = exp(s / 8 - level) the gradient of a score is p (dp - delta), but for 1 / 8.
template <std::size_t width>
TAPCT_INLINE void take_slopes(float* weights, float* slopes, std::size_t padded, float level,
                              float delta) {
  using L = Lanes<width>;
  for (std::size_t i = 0; i < padded; i += width) {
    const auto x = L::load(weights + i) * scale - level;
    const auto weight = exp_of<L>(x);
    L::store(weights + i, weight);
    L::store(slopes + i, weight * (L::load(slopes + i) - delta));
  }
}

template <std::size_t width>
TAPCT_INLINE void attend_backward(const HeadBackward& head, BackwardScratch& scratch) {
  using L = Lanes<width>;
  const std::size_t tokens = head.num_tokens, stride = 3 * head.width;
  std::fill_n(scratch.query_sums.get(), padded_to(tokens, row_step) * head_width, 0.0F);
  for (std::size_t token = 0; token < tokens; ++token) {
    typename L::Floats sum{};
    for (std::size_t i = 0; i < head_width; i += width) {
      sum += L::load(head.out + token * head.width + i) *
             L::load(head.grad_out + token * head.width + i);
    }
    float delta = 0;
    for (std::size_t i = 0; i < width; ++i) {
      delta += sum[i];
    }
    scratch.deltas[token] = delta;
  }
  const std::size_t block = block_size(tokens);
  for (std::size_t key = 0; key < tokens; key += block) {
    const std::size_t keys = std::min(block, tokens - key);
    const std::size_t padded = padded_to(keys, key_step), key_rows = padded_to(keys, row_step);
    const float* source = head.queries + head.width + key * stride;
    turn(source, stride, keys, padded, scratch.key_columns);
    turn(source + head.width, stride, keys, padded, scratch.value_columns);
    copy_rows(source, stride, keys, scratch.keys);
    std::fill_n(scratch.key_sums, key_rows * head_width, 0.0F);
    std::fill_n(scratch.value_sums, key_rows * head_width, 0.0F);
    for (std::size_t query = 0; query < tokens; query += num_queries) {
      const std::size_t count = std::min(num_queries, tokens - query);
      const std::size_t rows = padded_to(count, row_step);
      copy_rows(head.queries + query * stride, stride, count, scratch.queries);
      copy_rows(head.grad_out + query * head.width, head.width, count, scratch.grads);
      std::fill(scratch.queries + count * head_width, scratch.queries + rows * head_width, 0.0F);
      std::fill(scratch.grads + count * head_width, scratch.grads + rows * head_width, 0.0F);
      multiply<width>({scratch.queries, head_width, 1, head_width, scratch.key_columns, num_keys,
                       scratch.weights, num_keys, false},
                      rows, padded);
      multiply<width>({scratch.grads, head_width, 1, head_width, scratch.value_columns, num_keys,
                       scratch.slopes, num_keys, false},
                      rows, padded);
      for (std::size_t row = 0; row < count; ++row) {
        float* weights = scratch.weights + row * num_keys;
        std::fill(weights + keys, weights + padded, -std::numeric_limits<float>::infinity());
        take_slopes<width>(weights, scratch.slopes + row * num_keys, padded,
                           head.levels[query + row], scratch.deltas[query + row]);
      }
      multiply<width>({scratch.weights, 1, num_keys, count, scratch.grads, head_width,
                       scratch.value_sums, head_width, true},
                      key_rows, head_width);
      multiply<width>({scratch.slopes, 1, num_keys, count, scratch.queries, head_width,
                       scratch.key_sums, head_width, true},
                      key_rows, head_width);
      multiply<width>({scratch.slopes, num_keys, 1, keys, scratch.keys, head_width,
                       scratch.query_sums.get() + query * head_width, head_width, true},
                      rows, head_width);
    }
    for (std::size_t i = 0; i < keys; ++i) {
      float* target = head.grad + head.width + (key + i) * stride;
      for (std::size_t j = 0; j < head_width; ++j) {
        target[j] = scratch.key_sums[i * head_width + j] * scale;
        target[head.width + j] = scratch.value_sums[i * head_width + j];
      }
    }
  }
  for (std::size_t token = 0; token < tokens; ++token) {
    for (std::size_t i = 0; i < head_width; ++i) {
      head.grad[token * stride + i] = scratch.query_sums[token * head_width + i] * scale;
    }
  }
}

#define TAPCT_AVX2 __attribute__((target("avx2,fma")))
#define TAPCT_AVX512F __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma")))

TAPCT_AVX2 void attend_8(const Head& head, std::size_t first, Scratch& scratch) {
  attend<8>(head, first, scratch);
}
TAPCT_AVX512F void attend_16(const Head& head, std::size_t first, Scratch& scratch) {
  attend<16>(head, first, scratch);
}
TAPCT_AVX2 void attend_backward_8(const HeadBackward& head, BackwardScratch& scratch) {
  attend_backward<8>(head, scratch);
}
TAPCT_AVX512F void attend_backward_16(const HeadBackward& head, BackwardScratch& scratch) {
  attend_backward<16>(head, scratch);
}

bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

std::size_t checked_lanes(std::size_t lanes) {
  if (!has_avx2()) {
    throw std::runtime_error("attention_avx: this CPU has no AVX2");
  }
  const std::size_t most = has_avx512() ? 16 : 8;
  if (lanes != 0 && lanes != 8 && lanes != most) {
    throw std::invalid_argument("attention_avx: lanes must be 0, 8, or 16 on a CPU with AVX-512");
  }
  return lanes == 0 ? most : lanes;
}

}  // namespace

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

void attention_avx(const float* qkv, float* out, float* levels, std::size_t num_volumes,
                   std::size_t num_tokens, std::size_t num_heads, std::size_t threads,
                   std::size_t lanes) {
  const auto run = checked_lanes(lanes) == 16 ? attend_16 : attend_8;
  if (num_volumes == 0 || num_tokens == 0 || num_heads == 0) {
    return;
  }
  const std::size_t width = num_heads * head_width;
  const std::size_t blocks = (num_tokens + num_parts * num_queries - 1) / (num_parts * num_queries);
  const std::size_t items = num_volumes * num_heads * blocks;
  const std::size_t workers = std::min(std::max<std::size_t>(1, threads), items);
  const std::unique_ptr<Scratch[]> scratch(new Scratch[workers]);
  std::atomic<std::size_t> next{0}, worker{0};
  team_for(workers, workers, [&](std::size_t) {
    Scratch& mine = scratch[worker++];
    for (std::size_t i = next++; i < items; i = next++) {
      const std::size_t volume = i / blocks / num_heads, h = i / blocks % num_heads;
      const std::size_t token = volume * num_tokens;
      run({qkv + token * 3 * width + h * head_width, width, num_tokens,
           out + token * width + h * head_width, levels + (volume * num_heads + h) * num_tokens},
          i % blocks * num_parts * num_queries, mine);
    }
  });
}

void attention_avx_backward(const float* grad_out, const float* qkv, const float* out,
                            const float* levels, float* grad_qkv, std::size_t num_volumes,
                            std::size_t num_tokens, std::size_t num_heads, std::size_t threads,
                            std::size_t lanes) {
  const auto run = checked_lanes(lanes) == 16 ? attend_backward_16 : attend_backward_8;
  if (num_volumes == 0 || num_tokens == 0 || num_heads == 0) {
    return;
  }
  const std::size_t width = num_heads * head_width, items = num_volumes * num_heads;
  const std::size_t workers = std::min(std::max<std::size_t>(1, threads), items);
  const std::unique_ptr<BackwardScratch[]> scratch(new BackwardScratch[workers]);
  for (std::size_t i = 0; i < workers; ++i) {
    scratch[i].query_sums.reset(new float[padded_to(num_tokens, row_step) * head_width]);
    scratch[i].deltas.reset(new float[num_tokens]);
  }
  std::atomic<std::size_t> next{0}, worker{0};
  team_for(workers, workers, [&](std::size_t) {
    BackwardScratch& mine = scratch[worker++];
    for (std::size_t i = next++; i < items; i = next++) {
      const std::size_t token = i / num_heads * num_tokens, h = i % num_heads * head_width;
      run({qkv + token * 3 * width + h, width, num_tokens, out + token * width + h,
           grad_out + token * width + h, levels + i * num_tokens, grad_qkv + token * 3 * width + h},
          mine);
    }
  });
}

#else

bool has_avx2() { return false; }

void attention_avx(const float*, float*, float*, std::size_t, std::size_t, std::size_t, std::size_t,
                   std::size_t) {
  throw std::runtime_error("attention_avx: only on x86-64");
}

void attention_avx_backward(const float*, const float*, const float*, const float*, float*,
                            std::size_t, std::size_t, std::size_t, std::size_t, std::size_t) {
  throw std::runtime_error("attention_avx_backward: only on x86-64");
}

#endif

}  // namespace tapct

// A few tokens through every layer of a Llama decoder, against a cache that is only read.
//
// One parallel region for the whole model: a token costs what its weights cost to read, and what
// lies between two products (norms, rotation, softmax) is done by every thread for itself, because
// that takes less time than waiting for another to do it. Threads wait for each other five times a
// layer. The twin in PyTorch, and the meaning of every step, is `decoder_layer` in llama.py;
// `native.py` calls this, and brain/native_decoder.py has it built.
//
// Numbers are float32 wherever they are not stored: a matrix, the cache and what the twin rounds
// are in the model's dtype. Vectors are the compiler's own (GCC, Clang); only conversions are named
// for a processor. No sum depends on how many threads there are.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

// As wide as the processor's registers: GCC takes wider vectors apart, through memory. `MOST`
// vectors are multiplied at a time by two rows, as many as there are registers for.
#if defined(__AVX512F__)
constexpr int LANES = 16, MOST = 8;
#elif defined(__AVX2__)
constexpr int LANES = 8, MOST = 4;
#else
constexpr int LANES = 4, MOST = 4;
#endif
typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct BFloat16 {
  uint16_t bits;
};

template <class Vector>
inline Vector load(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

inline Floats widen(const float* from) { return load<Floats>(from); }

inline Floats widen(const BFloat16* from) {
#if defined(__AVX512F__)  // GCC 12 converts one number after another
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#elif defined(__AVX2__)
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load<__m128i>(from)), 16);
#else
  return (Floats)(__builtin_convertvector(load<Halves>(from), Ints) << 16);
#endif
}

inline Floats widen(const int8_t* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
#elif defined(__AVX2__)
  return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#else
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Ints), Floats);
#endif
}

inline float number(float x) { return x; }
inline float number(int8_t x) { return x; }
inline float number(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline void narrow(float x, float* to) { *to = x; }

// To the nearest, ties to even; what is no number stays none.
inline void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  to->bits = x != x ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

// As the model's dtype would hold it.
template <class Real>
inline float rounded(float x) {
  Real held;
  narrow(x, &held);
  return number(held);
}

inline float sum(Floats vector) {
  typedef float Quad __attribute__((vector_size(16)));
  Quad quads[LANES / 4];
  std::memcpy(quads, &vector, sizeof vector);
#pragma GCC unroll 4
  for (int half = LANES / 8; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int i = 0; i < half; ++i) quads[i] += quads[i + half];
  return (quads[0][0] + quads[0][2]) + (quads[0][1] + quads[0][3]);
}

// e^x for x <= 0, to some 2 units in the last place; 0 where float32 has no normal number for it.
inline float exponential(float x) {
  const float clamped = std::max(x, -87.0f);
  const float turns = std::nearbyint(clamped * 1.44269504f);
  const float rest = (clamped - turns * 0.693145752f) - turns * 1.42860677e-6f;
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  const int32_t bits = (int32_t(turns) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : series * power;
}

// Bytes from what is being read to what is asked for: memory answers late, and what a thread reads
// lies in one piece. Rows one after another, not side by side, are 1.3 times as fast.
constexpr int64_t AHEAD = 8192;

template <class Number>
inline void ask_for(const Number* from, int64_t numbers) {
  const char* start = reinterpret_cast<const char*>(from) + AHEAD;
#pragma GCC unroll 8
  for (int64_t line = 0; line < numbers * int64_t(sizeof(Number)); line += 64)
    __builtin_prefetch(start + line, 0, 0);
}

// R rows of a matrix times T vectors of float32: sums[r][t]. A sum is C chains of additions, so
// that one need not wait for another.
template <int R, int T, bool ASKS, class Weight>
[[gnu::noinline]] void products(const Weight* const* rows, const float* x, int64_t x_stride,
                                int64_t size, float (&sums)[R][T]) {
  constexpr int C = R > 1 || T > 4 ? 1 : T == 1 ? 4 : 2;
  Floats parts[R][T][C] = {};
  int64_t i = 0;
  for (; i + C * LANES <= size; i += C * LANES) {
    if (ASKS) ask_for(rows[0] + i * R, R * C * LANES);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      Floats row[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row[r] = widen(rows[r] + i + c * LANES);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const Floats column = load<Floats>(x + t * x_stride + i + c * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) parts[r][t][c] += row[r] * column;
      }
    }
  }
  for (; i + LANES <= size; i += LANES)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        parts[r][t][0] += widen(rows[r] + i) * load<Floats>(x + t * x_stride + i);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
#pragma GCC unroll 8
      for (int c = 1; c < C; ++c) parts[r][t][0] += parts[r][t][c];
      sums[r][t] = sum(parts[r][t][0]);
      for (int64_t j = i; j < size; ++j) sums[r][t] += number(rows[r][j]) * x[t * x_stride + j];
    }
}

// R rows times T vectors, from vector t on: take(r, t, sum).
template <int R, int T, bool ASKS, class Weight, class Take>
inline void taken(const Weight* const* rows, const float* x, int64_t x_stride, int64_t size,
                  int64_t t, Take take) {
  float sums[R][T];
  products<R, T, ASKS>(rows, x + t * x_stride, x_stride, size, sums);
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < T; ++i) take(r, t + i, sums[r][i]);
}

// The same for any number of vectors.
template <int R, int AT_ONCE, bool ASKS, class Weight, class Take>
inline void products(const Weight* const* rows, const float* x, int64_t x_stride, int64_t size,
                     int64_t vectors, Take take) {
  if (vectors == 1) return taken<R, 1, ASKS>(rows, x, x_stride, size, 0, take);
  int64_t t = 0;
  for (; t + AT_ONCE <= vectors; t += AT_ONCE)
    taken<R, AT_ONCE, ASKS>(rows, x, x_stride, size, t, take);
  for (; t + 3 <= vectors; t += 3) taken<R, 3, ASKS>(rows, x, x_stride, size, t, take);
  for (; t < vectors; ++t) taken<R, 1, false>(rows, x, x_stride, size, t, take);
}

// Rows first to last of a matrix times T vectors: take(row, t, product).
template <class Weight, class Take>
inline void multiply(const Weight* matrix, const float* scale, const float* x, int64_t x_stride,
                     int64_t size, int64_t vectors, int64_t first, int64_t last, Take take) {
  const Weight* rows[2];
  int64_t row = first;
  auto scaled = [&](int r, int64_t t, float sum) {
    take(row + r, t, scale ? sum * scale[row + r] : sum);
  };
  if (vectors > 4)  // two rows, so that a vector that is loaded serves both
    for (; row + 2 <= last; row += 2) {
      rows[0] = matrix + row * size;
      rows[1] = rows[0] + size;
      products<2, MOST, true>(rows, x, x_stride, size, vectors, scaled);
    }
  for (; row < last; ++row) {
    rows[0] = matrix + row * size;
    products<1, MOST, true>(rows, x, x_stride, size, vectors, scaled);
  }
}

}  // namespace

// Filled in by native.py: the order and width of the fields are a contract between the two.
struct Matrix {
  const void* values;
  const float* scale;  // of every row, where the values are bytes; otherwise null
};

struct Decode {
  int64_t layers, hidden_size, intermediate, heads, kv_heads, head_dim, vocab;
  int64_t tokens, capacity, bucket;
  int64_t each;  // whether every token's attention mass is wanted apart
  double eps;
  const void* attention_norm;  // [layers, hidden]
  const void* mlp_norm;        // [layers, hidden]
  const void* final_norm;      // [hidden]
  Matrix qkv, attention_out, gate_up, down, head;
  const void* keys;    // [layers, kv_heads, capacity, head_dim]
  const void* values;  // [layers, kv_heads, capacity, head_dim]
  float* hidden;       // [T, hidden], written over
  const float* cos;    // [T, head_dim / 2]
  const float* sin;
  const uint8_t* cached;  // [T, bucket]
  const uint8_t* fresh;   // [T, T]: who of the new tokens sees whom
  const float* live;      // [T]
  float* logits;          // [T, vocab]
  void* new_keys;         // [layers, kv_heads, T, head_dim]
  void* new_values;       // [layers, kv_heads, T, head_dim]
  float* mass;            // [each ? T : 1, bucket + T], zeros before
  float* workspace;       // see native.py
  int64_t threads;        // at most
};

namespace {

// What one thread, or all of them, work with: slices of the workspace.
// Without a base it only counts.
struct Slices {
  float* base;
  int64_t used;
  float* take(int64_t size) {
    float* slice = base ? base + used : nullptr;
    used += (size + LANES - 1) / LANES * LANES;
    return slice;
  }
};

struct Shared {
  int32_t* seen;       // slots that any token sees
  int64_t num_seen;
  float* projected;    // [T, qkv rows]
  float* activated;    // [T, intermediate]
  int64_t span;        // slots of a block: attention is summed by blocks, never by threads
  int64_t blocks;
  float* most;         // [blocks, heads * T]: of the scores
  float* total;        // [blocks, heads * T]: of their exponentials
  float* mixed;        // [blocks, heads * T, head_dim]
  float* scores;       // [heads * T, slots of the first block], then of the next
  float* mass;         // the same, [each ? T : 1, slots]
};

constexpr int64_t MOST_BLOCKS = 32, SHORTEST_BLOCK = 32;  // so many threads can attend

Shared shared_of(const Decode& d, Slices& slices) {
  const int64_t queries = d.heads * d.tokens;
  const int64_t blocks = std::min((d.bucket + SHORTEST_BLOCK - 1) / SHORTEST_BLOCK, MOST_BLOCKS);
  Shared shared{};
  shared.seen = reinterpret_cast<int32_t*>(slices.take(d.bucket));
  shared.projected = slices.take(d.tokens * (d.heads + 2 * d.kv_heads) * d.head_dim);
  shared.activated = slices.take(d.tokens * d.intermediate);
  shared.most = slices.take(blocks * queries);
  shared.total = slices.take(blocks * queries);
  shared.mixed = slices.take(blocks * queries * d.head_dim);
  shared.scores = slices.take(queries * d.bucket);
  shared.mass = slices.take((d.each ? d.tokens : 1) * d.bucket);
  return shared;
}

struct Own {
  float* x;      // [T, hidden], or [T, heads * head_dim]
  float* query;  // [heads, T, head_dim]
  float* key;    // [kv_heads, T, head_dim]
  float* value;  // [kv_heads, T, head_dim]
  float* own;    // [heads, T, T]: shares of the new tokens
};

Own own_of(const Decode& d, Slices& slices) {
  Own own{};
  own.x = slices.take(d.tokens * std::max(d.hidden_size, d.heads * d.head_dim));
  own.query = slices.take(d.heads * d.tokens * d.head_dim);
  own.key = slices.take(d.kv_heads * d.tokens * d.head_dim);
  own.value = slices.take(d.kv_heads * d.tokens * d.head_dim);
  own.own = slices.take(d.heads * d.tokens * d.tokens);
  return own;
}

int64_t shared_size(const Decode& d) {
  Slices counted{nullptr, 0};
  shared_of(d, counted);
  return counted.used;
}

int64_t own_size(const Decode& d) {
  Slices counted{nullptr, 0};
  own_of(d, counted);
  return counted.used;
}

// Rows of the cache in the order in which a thread reads them, of one key head after another.
template <class Real>
struct Walk {
  const Real* plane;  // [capacity, head_dim]
  int64_t planes;     // from this one on
  int64_t row;        // which of the thread's slots is next
};

template <class Real, class Weight>
struct Worker : Own {
  const Decode& d;
  const Shared& shared;
  int64_t thread, threads;
  int64_t first_block, last_block;  // of this thread
  int64_t first, last;              // of the slots that are seen: those of one block
  float *scores, *mass;             // theirs
  int64_t first_seen, num_seen;     // of the slots that are seen: those of all this thread's blocks
  Walk<Real> keys_ahead, values_ahead;

  int64_t queries() const { return d.heads * d.tokens; }
  int64_t qkv_rows() const { return (d.heads + 2 * d.kv_heads) * d.head_dim; }
  // Rows in pairs, as they are multiplied: however many threads there are, sums are the same.
  int64_t begin(int64_t size) const { return (size + 1) / 2 * thread / threads * 2; }
  int64_t end(int64_t size) const {
    return std::min((size + 1) / 2 * (thread + 1) / threads * 2, size);
  }

  Worker(const Decode& d, const Shared& shared, int64_t thread, int64_t threads, const Own& own)
      : Own(own), d(d), shared(shared), thread(thread), threads(threads) {
    first_block = shared.blocks * thread / threads;
    last_block = shared.blocks * (thread + 1) / threads;
    for (int64_t block = first_block; block < last_block; ++block) {
      enter(block);
      std::memset(mass, 0, sizeof(float) * masses() * (last - first));
    }
    first_seen = std::min(first_block * shared.span, shared.num_seen);
    num_seen = std::min(last_block * shared.span, shared.num_seen) - first_seen;
  }

  int64_t masses() const { return d.each ? d.tokens : 1; }

  void enter(int64_t block) {
    first = block * shared.span;
    last = std::min(first + shared.span, shared.num_seen);
    scores = shared.scores + queries() * first;
    mass = shared.mass + masses() * first;
  }

  const Weight* matrix(const Matrix& m, int64_t layer, int64_t rows, int64_t columns) const {
    return static_cast<const Weight*>(m.values) + layer * rows * columns;
  }
  const float* scale(const Matrix& m, int64_t layer, int64_t rows) const {
    return m.scale ? m.scale + layer * rows : nullptr;
  }

  // Root-mean-square norm of the hidden state into x.
  void norm(const void* gains, int64_t layer) {
    const Real* gain = static_cast<const Real*>(gains) + layer * d.hidden_size;
    for (int64_t t = 0; t < d.tokens; ++t) {
      const float* hidden = d.hidden + t * d.hidden_size;
      float squares = 0;
#pragma omp simd reduction(+ : squares)
      for (int64_t i = 0; i < d.hidden_size; ++i) squares += hidden[i] * hidden[i];
      const float factor = 1.0f / std::sqrt(squares / d.hidden_size + float(d.eps));
      float* out = x + t * d.hidden_size;
#pragma omp simd
      for (int64_t i = 0; i < d.hidden_size; ++i)
        out[i] = rounded<Real>(rounded<Real>(hidden[i] * factor) * number(gain[i]));
    }
  }

  void project(int64_t layer) {
    const int64_t rows = qkv_rows();
    multiply(matrix(d.qkv, layer, rows, d.hidden_size), scale(d.qkv, layer, rows), x,
             d.hidden_size, d.hidden_size, d.tokens, begin(rows), end(rows),
             [&](int64_t row, int64_t t, float product) {
               shared.projected[t * rows + row] = rounded<Real>(product);
             });
  }

  // One head's vector, rotated by its position's angles.
  void rotate(const float* from, int64_t t, float* to) const {
    const int64_t half = d.head_dim / 2;
    const float *cos = d.cos + t * half, *sin = d.sin + t * half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      to[i] = rounded<Real>(from[i] * cos[i] - from[i + half] * sin[i]);
      to[i + half] = rounded<Real>(from[i + half] * cos[i] + from[i] * sin[i]);
    }
  }

  // Queries [heads, T, head_dim], scaled; keys and values [kv_heads, T, head_dim].
  void split(int64_t layer) {
    const float divisor = 1.0f / std::sqrt(float(d.head_dim));
    for (int64_t t = 0; t < d.tokens; ++t) {
      const float* from = shared.projected + t * qkv_rows();
      for (int64_t h = 0; h < d.heads; ++h, from += d.head_dim) {
        float* to = query + (h * d.tokens + t) * d.head_dim;
        rotate(from, t, to);
        for (int64_t i = 0; i < d.head_dim; ++i) to[i] *= divisor;
      }
      for (int64_t h = 0; h < d.kv_heads; ++h, from += d.head_dim)
        rotate(from, t, key + (h * d.tokens + t) * d.head_dim);
      for (int64_t h = 0; h < d.kv_heads; ++h, from += d.head_dim)
        std::memcpy(value + (h * d.tokens + t) * d.head_dim, from, sizeof(float) * d.head_dim);
    }
    if (thread == 0) {
      const int64_t size = d.kv_heads * d.tokens * d.head_dim;
      Real* keys = static_cast<Real*>(d.new_keys) + layer * size;
      Real* values = static_cast<Real*>(d.new_values) + layer * size;
      for (int64_t i = 0; i < size; ++i) {
        narrow(key[i], keys + i);
        narrow(value[i], values + i);
      }
    }
  }

  // The first of this layer's cached rows, before this thread waits for the others. Keys and values
  // alternate block by block, too soon for the processor to see where either goes on.
  void ask_for_cache(int64_t layer) {
    const int64_t plane = layer * d.kv_heads * d.capacity * d.head_dim;
    const int64_t planes = num_seen > 0 ? d.kv_heads : 0;
    keys_ahead = {static_cast<const Real*>(d.keys) + plane, planes, 0};
    values_ahead = {static_cast<const Real*>(d.values) + plane, planes, 0};
    const int64_t rows = AHEAD / 2 / (d.head_dim * int64_t(sizeof(Real)));
    for (int64_t i = 0; i < rows; ++i) ask_for_row(keys_ahead);
    for (int64_t i = 0; i < rows; ++i) ask_for_row(values_ahead);
  }

  void ask_for_row(Walk<Real>& walk) {
    if (walk.planes == 0) return;
    const Real* row = walk.plane + shared.seen[first_seen + walk.row] * d.head_dim;
    for (int64_t i = 0; i < d.head_dim; i += 64 / int64_t(sizeof(Real)))
      __builtin_prefetch(row + i, 0, 3);
    if (++walk.row < num_seen) return;
    walk = {walk.plane + d.capacity * d.head_dim, walk.planes - 1, 0};
  }

  // Scores of this thread's slots, and block by block their sum of exponentials and mixed values.
  void attend(int64_t layer) {
    const int64_t group = d.heads / d.kv_heads * d.tokens, plane = d.capacity * d.head_dim;
    for (int64_t h = 0; h < d.kv_heads; ++h) {
      const Real* keys = static_cast<const Real*>(d.keys) + (layer * d.kv_heads + h) * plane;
      const Real* values = static_cast<const Real*>(d.values) + (layer * d.kv_heads + h) * plane;
      for (int64_t block = first_block; block < last_block; ++block) {
        enter(block);
        const int64_t length = last - first, found = block * queries() + h * group;
        float* weights = scores + h * group * length;
        score(keys, query + h * group * d.head_dim, weights, group);
        for (int64_t q = 0; q < group; ++q) soften(weights + q * length, found + q);
        mix(values, weights, shared.mixed + found * d.head_dim, group);
      }
    }
  }

  void score(const Real* keys, const float* queries, float* block, int64_t group) {
    const int64_t length = last - first;
    const int32_t* slots = shared.seen + first;
    constexpr int ROWS = 4;
    const Real* rows[ROWS];
    int64_t i = 0;
    auto put = [&](int r, int64_t q, float product) { block[q * length + i + r] = product; };
    for (; i + ROWS <= length; i += ROWS) {
      for (int r = 0; r < ROWS; ++r) {
        rows[r] = keys + slots[i + r] * d.head_dim;
        ask_for_row(keys_ahead);
      }
      products<ROWS, 4, false>(rows, queries, d.head_dim, d.head_dim, group, put);
    }
    for (; i < length; ++i) {
      rows[0] = keys + slots[i] * d.head_dim;
      ask_for_row(keys_ahead);
      products<1, 4, false>(rows, queries, d.head_dim, d.head_dim, group, put);
    }
    if (d.tokens == 1) return;  // one token sees all that any token sees
    for (int64_t q = 0; q < group; ++q) {
      const uint8_t* visible = d.cached + q % d.tokens * d.bucket;
      for (int64_t j = 0; j < length; ++j)
        if (!visible[slots[j]]) block[q * length + j] = -INFINITY;
    }
  }

  // Scores to exponentials, for the place where their largest and their sum are kept.
  void soften(float* row, int64_t place) const {
    const int64_t length = last - first;
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < length; ++i) most = std::max(most, row[i]);
    const float base = most == -INFINITY ? 0.0f : most;
    float total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < length; ++i) {
      row[i] = exponential(row[i] - base);
      total += row[i];
    }
    shared.most[place] = most;
    shared.total[place] = total;
  }

  // The values of this thread's slots, each by its weight: several queries and vectors at a time,
  // so that a value that is loaded once serves them all.
  void mix(const Real* values, const float* weights, float* mixed, int64_t group) {
    int64_t q = 0;
    for (; q + 3 <= group; q += 3) mix_some<3>(values, weights, mixed, q);
    for (; q < group; ++q) mix_some<1>(values, weights, mixed, q);
  }

  template <int Q>
  void mix_some(const Real* values, const float* weights, float* mixed, int64_t q) {
    constexpr int WIDE = 4;
    int64_t column = 0;
    for (; column + WIDE * LANES <= d.head_dim; column += WIDE * LANES)
      mix_columns<Q, WIDE>(values, weights, mixed, q, column);
    for (; column + LANES <= d.head_dim; column += LANES)
      mix_columns<Q, 1>(values, weights, mixed, q, column);
    const int64_t length = last - first;
    for (; column < d.head_dim; ++column)
      for (int i = 0; i < Q; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < length; ++j)
          sum += weights[(q + i) * length + j] *
                 number(values[shared.seen[first + j] * d.head_dim + column]);
        mixed[(q + i) * d.head_dim + column] = sum;
      }
  }

  template <int Q, int WIDE>
  void mix_columns(const Real* values, const float* weights, float* mixed, int64_t q,
                   int64_t column) {
    const int64_t length = last - first;
    const int32_t* slots = shared.seen + first;
    const bool asks = q == 0 && column == 0;  // once, however often a row is read
    Floats sums[Q][WIDE] = {};
    for (int64_t j = 0; j < length; ++j) {
      const Real* row = values + slots[j] * d.head_dim + column;
      if (asks) ask_for_row(values_ahead);
#pragma GCC unroll 8
      for (int w = 0; w < WIDE; ++w) {
        const Floats part = widen(row + w * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) sums[i][w] += part * weights[(q + i) * length + j];
      }
    }
    for (int i = 0; i < Q; ++i)
      for (int w = 0; w < WIDE; ++w)
        store(mixed + (q + i) * d.head_dim + column + w * LANES, sums[i][w]);
  }

  // What all blocks found, and the new tokens among themselves: one softmax over both. Attended
  // values into x [T, heads * head_dim]; this thread's slots receive their mass.
  void combine() {
    const int64_t group = d.heads / d.kv_heads, width = d.head_dim;
    for (int64_t h = 0; h < d.heads; ++h)
      for (int64_t t = 0; t < d.tokens; ++t) {
        const int64_t q = h * d.tokens + t;
        const float* keys = key + h / group * d.tokens * width;
        const float* values = value + h / group * d.tokens * width;
        const uint8_t* visible = d.fresh + t * d.tokens;
        float* share = own + q * d.tokens;
        float most = -INFINITY;
        for (int64_t block = 0; block < shared.blocks; ++block)
          most = std::max(most, shared.most[block * queries() + q]);
        for (int64_t j = 0; j < d.tokens; ++j) {
          if (!visible[j]) continue;
          const float* row = keys + j * width;
          float sums[1][1];
          products<1, 1, false>(&row, query + q * width, width, width, sums);
          share[j] = sums[0][0];
          most = std::max(most, share[j]);
        }
        float factors[MOST_BLOCKS], total = 0;
        for (int64_t block = 0; block < shared.blocks; ++block) {
          factors[block] = exponential(shared.most[block * queries() + q] - most);
          total += shared.total[block * queries() + q] * factors[block];
        }
        for (int64_t j = 0; j < d.tokens; ++j) {
          share[j] = visible[j] ? exponential(share[j] - most) : 0.0f;
          total += share[j];
        }
        float* out = x + (t * d.heads + h) * width;
        for (int64_t i = 0; i < width; ++i) out[i] = 0;
        for (int64_t block = 0; block < shared.blocks; ++block)
          add(out, shared.mixed + (block * queries() + q) * width, factors[block] / total, width);
        for (int64_t j = 0; j < d.tokens; ++j)
          if (visible[j]) add(out, values + j * width, share[j] / total, width);
        for (int64_t i = 0; i < width; ++i) out[i] = rounded<Real>(out[i]);

        const float counts = d.each ? 1.0f : d.live[t];
        for (int64_t block = first_block; block < last_block; ++block) {
          enter(block);
          add(mass + (d.each ? t * (last - first) : 0), scores + q * (last - first),
              counts * factors[block] / total, last - first);
        }
        if (thread == 0)
          add(d.mass + (d.each ? t * (d.bucket + d.tokens) : 0) + d.bucket, share, counts / total,
              d.tokens);
      }
  }

  static void add(float* to, const float* from, float factor, int64_t size) {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) to[i] += from[i] * factor;
  }

  // Rows of the hidden state receive a product.
  void receive(const Matrix& m, int64_t layer, const float* from, int64_t columns) {
    const int64_t rows = d.hidden_size;
    multiply(matrix(m, layer, rows, columns), scale(m, layer, rows), from, columns, columns,
             d.tokens, begin(rows), end(rows), [&](int64_t row, int64_t t, float product) {
               d.hidden[t * rows + row] += rounded<Real>(product);
             });
  }

  // SwiGLU: a gate's row and the row above it, side by side.
  void activate(int64_t layer) {
    const int64_t size = d.intermediate, width = d.hidden_size;
    const Weight* gates = matrix(d.gate_up, layer, 2 * size, width);
    const float* scales = scale(d.gate_up, layer, 2 * size);
    auto taken = [&](bool up) {
      return [this, up, size](int64_t row, int64_t t, float product) {
        float* place = shared.activated + t * size + row;
        const float held = rounded<Real>(product);
        *place = up ? rounded<Real>(*place / (1.0f + std::exp(-*place)) * held) : held;
      };
    };
    for (int64_t row = begin(size); row < end(size);) {
      const int64_t stop = std::min(row + 256, end(size));  // long enough to be read in a stream
      multiply(gates, scales, x, width, width, d.tokens, row, stop, taken(false));
      multiply(gates + size * width, scales ? scales + size : nullptr, x, width, width, d.tokens,
               row, stop, taken(true));
      row = stop;
    }
  }

  // The first rows that this thread will read of a matrix, before it waits for the others.
  void ask_early(const Matrix& m, int64_t layer, int64_t rows, int64_t columns, int64_t row) const {
    const Weight* from = matrix(m, layer, rows, columns) + row * columns;
    const char* start = reinterpret_cast<const char*>(from);
    for (int64_t line = 0; line < AHEAD; line += 64) __builtin_prefetch(start + line, 0, 0);
  }

  void work() {
    for (int64_t layer = 0; layer < d.layers; ++layer) {
      norm(d.attention_norm, layer);
      project(layer);
      ask_for_cache(layer);
#pragma omp barrier
      split(layer);
      attend(layer);
      ask_early(d.attention_out, layer, d.hidden_size, d.heads * d.head_dim, begin(d.hidden_size));
#pragma omp barrier
      combine();
      receive(d.attention_out, layer, x, d.heads * d.head_dim);
      ask_early(d.gate_up, layer, 2 * d.intermediate, d.hidden_size, begin(d.intermediate));
#pragma omp barrier
      norm(d.mlp_norm, layer);
      activate(layer);
      ask_early(d.down, layer, d.hidden_size, d.intermediate, begin(d.hidden_size));
#pragma omp barrier
      receive(d.down, layer, shared.activated, d.intermediate);
      if (layer + 1 < d.layers)
        ask_early(d.qkv, layer + 1, qkv_rows(), d.hidden_size, begin(qkv_rows()));
#pragma omp barrier
    }
    norm(d.final_norm, 0);
    multiply(matrix(d.head, 0, d.vocab, d.hidden_size), scale(d.head, 0, d.vocab), x,
             d.hidden_size, d.hidden_size, d.tokens, begin(d.vocab), end(d.vocab),
             [&](int64_t row, int64_t t, float product) {
               d.logits[t * d.vocab + row] = rounded<Real>(product);
             });
    for (int64_t block = first_block; block < last_block; ++block) {
      enter(block);
      for (int64_t t = 0; t < masses(); ++t)
        for (int64_t i = first; i < last; ++i)
          d.mass[t * (d.bucket + d.tokens) + shared.seen[i]] =
              mass[t * (last - first) + i - first];
    }
  }
};

template <class Real, class Weight>
void decode(const Decode& d) {
  Slices common{d.workspace, 0};
  Shared shared = shared_of(d, common);
  int64_t seen = 0;
  for (int64_t slot = 0; slot < d.bucket; ++slot) {
    int64_t t = 0;
    while (t < d.tokens && !d.cached[t * d.bucket + slot]) ++t;
    if (t < d.tokens) shared.seen[seen++] = int32_t(slot);
  }
  shared.num_seen = seen;
  shared.span = std::max((seen + MOST_BLOCKS - 1) / MOST_BLOCKS, SHORTEST_BLOCK);
  shared.span = (shared.span + 3) / 4 * 4;
  shared.blocks = (seen + shared.span - 1) / shared.span;
#pragma omp parallel num_threads(d.threads)
  {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    Slices slices{d.workspace, common.used + thread * own_size(d)};
    Worker<Real, Weight>(d, shared, thread, threads, own_of(d, slices)).work();
  }
}

}  // namespace

// For one pair of number formats, named when this is built: there are as many libraries as pairs.
extern "C" void decode(const Decode* d) { decode<REAL, WEIGHT>(*d); }

// Floats that the workspace must hold for this many threads.
extern "C" int64_t workspace_size(const Decode* d) {
  return shared_size(*d) + d->threads * own_size(*d);
}

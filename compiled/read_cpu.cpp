// A few tokens through every layer of a Llama decoder, against a cache that is only read.
//
// All threads go through the whole model: a token costs what its weights cost to read, and what
// lies between two products (norms, rotation, softmax) is done by every thread for itself, because
// that takes less time than waiting for another to do it. Threads wait for each other five times a
// layer. The twin in PyTorch, and the meaning of every step, is `decoder_layer` in llama.py;
// `read_cpu.py` calls this, and brain/machine/cpu_operator.py has it built.
//
// Numbers are float32 wherever they are not stored: the cache and what the twin rounds are in the
// model's dtype, a matrix is in that, in bytes, or in a file's own blocks (blocks.h). Vectors are the compiler's own (GCC, Clang); only conversions, sums of
// whole vectors and products of bfloat16 are named for a processor. No sum depends on how many
// threads there are.

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>

#include "blocks.h"
#include "exponential.h"
#include "team_size.h"

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
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef int64_t Pairs __attribute__((vector_size(LANES * 4)));
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

// To the nearest, ties to even; NaN stays NaN.
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

template <class Real>
inline Floats rounded(Floats x) {
  if constexpr (std::is_same_v<Real, float>) {
    return x;
  } else {
    const Bits bits = (Bits)x, odd = (bits >> 16) & 1;
    return x != x ? x : (Floats)((bits + 0x7fff + odd) & 0xffff0000);
  }
}

// What products are made of: bfloat16 where the model is in it and the processor multiplies pairs,
// else float32.
#if defined(__AVX512BF16__)
template <class Real>
using Input = Real;
#else
template <class Real>
using Input = float;
#endif

// As the model's dtype would hold it, for products to come.
template <class Real>
inline void hold(float x, Input<Real>* to) {
  if constexpr (std::is_same_v<Input<Real>, Real>)
    narrow(x, to);
  else
    *to = rounded<Real>(x);
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

// Lane i is the sum of vector i, to the bit what `sum` makes of it, in a third of the steps.
inline Floats ordered_sums(const Floats* v) {
#if defined(__AVX512F__)
  Floats quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    auto halved = [](Floats a, Floats b) {
      return _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    };
    const __m512 front = halved(v[i], v[i + 4]), back = halved(v[i + 8], v[i + 12]);
    quads[i] = (Floats)(_mm512_shuffle_f32x4(front, back, 0x88) +
                        _mm512_shuffle_f32x4(front, back, 0xdd));
  }
  auto low = [](Floats a, Floats b) { return (Floats)_mm512_unpacklo_ps(a, b); };
  auto high = [](Floats a, Floats b) { return (Floats)_mm512_unpackhi_ps(a, b); };
#elif defined(__AVX2__)
  Floats quads[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    quads[i] = (Floats)(_mm256_permute2f128_ps(v[i], v[i + 4], 0x20) +
                        _mm256_permute2f128_ps(v[i], v[i + 4], 0x31));
  auto low = [](Floats a, Floats b) { return (Floats)_mm256_unpacklo_ps(a, b); };
  auto high = [](Floats a, Floats b) { return (Floats)_mm256_unpackhi_ps(a, b); };
#else
  Floats all;
  for (int i = 0; i < LANES; ++i) all[i] = sum(v[i]);
  return all;
#endif
#if defined(__AVX2__)
  const Floats even = low(quads[0], quads[2]) + high(quads[0], quads[2]);
  const Floats odd = low(quads[1], quads[3]) + high(quads[1], quads[3]);
  return low(even, odd) + high(even, odd);
#endif
}

// The same, in another order where that takes fewer steps.
inline Floats sums(const Floats* vectors) {
#if defined(__AVX512F__)
  __m512 quads[4], halves[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Floats* v = vectors + 4 * i;
    const __m512 even = _mm512_unpacklo_ps(v[0], v[2]) + _mm512_unpackhi_ps(v[0], v[2]);
    const __m512 odd = _mm512_unpacklo_ps(v[1], v[3]) + _mm512_unpackhi_ps(v[1], v[3]);
    quads[i] = _mm512_unpacklo_ps(even, odd) + _mm512_unpackhi_ps(even, odd);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    halves[i] = _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0x88) +
                _mm512_shuffle_f32x4(quads[2 * i], quads[2 * i + 1], 0xdd);
  return (Floats)(_mm512_shuffle_f32x4(halves[0], halves[1], 0x88) +
                  _mm512_shuffle_f32x4(halves[0], halves[1], 0xdd));
#else
  return ordered_sums(vectors);
#endif
}

template <class Number>
inline void ask_for(const Number* from, int64_t numbers) {
  const char* start = reinterpret_cast<const char*>(from) + AHEAD;
#pragma GCC unroll 8
  for (int64_t line = 0; line < numbers * int64_t(sizeof(Number)); line += 64)
    __builtin_prefetch(start + line, 0, 3);
}

// As many numbers of a row, or of what it is multiplied by, as one instruction multiplies.
template <class Factor>
struct Piece {
  static constexpr int WIDTH = LANES;
  typedef Floats Vector;
  template <class Number>
  static Vector of(const Number* from) {
    return widen(from);
  }
  static void add(Floats& to, Vector a, Vector b) { to += a * b; }
};

#if defined(__AVX512BF16__)
template <>
struct Piece<BFloat16> {
  static constexpr int WIDTH = 2 * LANES;
  typedef __m512bh Vector;
  static Vector of(const BFloat16* from) { return (Vector)load<__m512i>(from); }
  static Vector of(const int8_t* from) {
    return _mm512_cvtne2ps_pbh((__m512)widen(from + LANES), (__m512)widen(from));
  }
  static void add(Floats& to, Vector a, Vector b) {
    to = (Floats)_mm512_dpbf16_ps((__m512)to, a, b);  // each lane adds the products of a pair
  }
};
#endif

// So many numbers in whole vectors.
constexpr int room(int numbers) { return (numbers + LANES - 1) / LANES * LANES; }

// R rows of a matrix times T vectors: results[t * R + r]. A sum is C chains of additions, so that
// one need not wait for another.
template <int R, int T, bool ASKS, class Weight, class Factor>
[[gnu::noinline]] void products(const Weight* const* rows, const Factor* x, int64_t x_stride,
                                int64_t size, float (&results)[room(R * T)]) {
  typedef Piece<Factor> P;
  constexpr int C = R > 1 || T > 4 ? 1 : T == 1 ? 4 : 2, W = P::WIDTH, ROOM = room(R * T);
  Floats parts[ROOM][C] = {};
  int64_t i = 0;
  for (; i + C * W <= size; i += C * W) {
    if (ASKS) ask_for(rows[0] + i * R, R * C * W);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      typename P::Vector row[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row[r] = P::of(rows[r] + i + c * W);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const typename P::Vector column = P::of(x + t * x_stride + i + c * W);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) P::add(parts[t * R + r][c], row[r], column);
      }
    }
  }
  for (; C > 1 && i + W <= size; i += W)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        P::add(parts[t * R + r][0], P::of(rows[r] + i), P::of(x + t * x_stride + i));
  if (W > LANES && i + LANES <= size) {  // half of what one instruction multiplies
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t)
        parts[t * R + r][0] += widen(rows[r] + i) * widen(x + t * x_stride + i);
    i += LANES;
  }
  Floats whole[ROOM];
#pragma GCC unroll 16
  for (int k = 0; k < ROOM; ++k) {
    whole[k] = parts[k][0];
#pragma GCC unroll 8
    for (int c = 1; c < C; ++c) whole[k] += parts[k][c];
  }
  if (R * T == 1)
    results[0] = sum(whole[0]);
  else
#pragma GCC unroll 4
    for (int k = 0; k < ROOM; k += LANES) store(results + k, sums(whole + k));
  for (; i < size; ++i)
    for (int r = 0; r < R; ++r)
      for (int t = 0; t < T; ++t)
        results[t * R + r] += number(rows[r][i]) * number(x[t * x_stride + i]);
}

// One row times one vector, as above, before the lanes are added up: what is left of the row, less
// than a vector, is for the caller. Not inlined: GCC would address by index, an instruction more
// for every vector.
template <class Weight, class Factor>
[[gnu::noinline]] Floats lane_products(const Weight* row, const Factor* x, int64_t size) {
  typedef Piece<Factor> P;
  constexpr int C = 4, W = P::WIDTH;
  Floats parts[C] = {};
  int64_t i = 0;
  for (; i + C * W <= size; i += C * W) {
    ask_for(row + i, C * W);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      P::add(parts[c], P::of(row + i + c * W), P::of(x + i + c * W));
  }
  for (; i + W <= size; i += W) P::add(parts[0], P::of(row + i), P::of(x + i));
  if (W > LANES && i + LANES <= size) parts[0] += widen(row + i) * widen(x + i);
  return ((parts[0] + parts[1]) + parts[2]) + parts[3];
}

// The same for any number of vectors, at most MANY at a time: taker.take<R, T>(t, results), where t
// is the first of them.
template <int R, int MANY, bool ASKS, class Weight, class Factor, class Taker>
inline void products(const Weight* const* rows, const Factor* x, int64_t x_stride, int64_t size,
                     int64_t vectors, Taker taker) {
  int64_t t = 0;
  auto some = [&](auto count) {
    constexpr int T = decltype(count)::value;
    float results[room(R * T)];
    if (t == 0)
      products<R, T, ASKS>(rows, x, x_stride, size, results);
    else
      products<R, T, false>(rows, x + t * x_stride, x_stride, size, results);
    taker.template take<R, T>(t, results);
    t += T;
  };
  while (t + MANY <= vectors) some(std::integral_constant<int, MANY>{});
  if (MANY > 4 && t + 4 <= vectors) some(std::integral_constant<int, 4>{});
  if (t + 3 <= vectors) some(std::integral_constant<int, 3>{});
  if (t + 2 <= vectors) some(std::integral_constant<int, 2>{});
  if (t < vectors) some(std::integral_constant<int, 1>{});
}

// Where products of rows go, or are added to, as the model's dtype holds them:
// to[t * stride + row].
template <class Real, bool ADDS>
struct Rows {
  float* to;
  int64_t stride;
  const float* scale;  // of every row, or null
  int64_t row = 0;

  template <int R, int T>
  void take(int64_t t, float* results) const {
    if constexpr (R * T == 1)
      results[0] = rounded<Real>(scale ? results[0] * scale[row] : results[0]);
    else
      for (int k = 0; k < R * T; k += LANES) {
        const Floats held = load<Floats>(results + k);
        store(results + k, rounded<Real>(scale ? held * scales<R>() : held));
      }
    for (int i = 0; i < T; ++i) {
      float* place = to + (t + i) * stride + row;
      for (int r = 0; r < R; ++r)
        place[r] = ADDS ? place[r] + results[i * R + r] : results[i * R + r];
    }
  }

  // Of vector t: `count` rows.
  void take_rows(const float* results, int64_t count, int64_t t = 0) const {
    const size_t bytes = count * sizeof(float);
    float* place = to + t * stride + row;
    Floats held = load<Floats>(results);
    if (scale) {
      Floats scales{};
      std::memcpy(&scales, scale + row, bytes);
      held *= scales;
    }
    held = rounded<Real>(held);
    if (ADDS) {
      Floats before{};
      std::memcpy(&before, place, bytes);
      held += before;
    }
    std::memcpy(place, &held, bytes);
  }

  // Of R rows, over and over.
  template <int R>
  Floats scales() const {
    static_assert(R <= 2);
    if (R == 1) return Floats{} + scale[row];
    int64_t pair;
    std::memcpy(&pair, scale + row, sizeof pair);
    return (Floats)(Pairs{} + pair);
  }
};

// Rows first to last of a matrix times some vectors.
template <class Weight, class Factor, class Into>
inline void multiply(const Weight* matrix, const Factor* x, int64_t x_stride, int64_t size,
                     int64_t vectors, int64_t first, int64_t last, Into into) {
  const Weight* rows[2];
  into.row = first;
  if (vectors == 1) {  // as many rows as are added up at a time, still one after another
    for (; into.row < last; into.row += LANES) {
      const int64_t count = std::min<int64_t>(LANES, last - into.row);
      Floats parts[LANES] = {};
      float results[LANES];
      for (int64_t r = 0; r < count; ++r)
        parts[r] = lane_products(matrix + (into.row + r) * size, x, size);
      store(results, ordered_sums(parts));
      for (int64_t i = size / LANES * LANES; i < size; ++i)
        for (int64_t r = 0; r < count; ++r)
          results[r] += number(matrix[(into.row + r) * size + i]) * number(x[i]);
      into.take_rows(results, count);
    }
    return;
  }
  if (vectors > 4)  // two rows, so that a vector that is loaded serves both
    for (; into.row + 2 <= last; into.row += 2) {
      rows[0] = matrix + into.row * size;
      rows[1] = rows[0] + size;
      products<2, MOST, true>(rows, x, x_stride, size, vectors, into);
    }
  for (; into.row < last; ++into.row) {
    rows[0] = matrix + into.row * size;
    products<1, MOST, true>(rows, x, x_stride, size, vectors, into);
  }
}

}  // namespace

// Some rows of a matrix, in one kind of block.
struct Part {
  const uint8_t* bytes;
  int64_t kind, rows;
};

// Filled in by read_cpu.py: the order and width of the fields are a contract between the two.
struct Matrix {
  const void* values;  // of matrices in blocks: [layers, parts] Part
  const float* scale;  // of every row, where the values are bytes; otherwise null
  int64_t parts;       // of a layer's matrix, where it is in blocks
};

struct Decode {
  int64_t layers, hidden_size, intermediate, heads, kv_heads, head_dim, vocab;
  int64_t tokens, capacity, bucket;
  int64_t per_query;   // whether the attention mass of every token is wanted apart
  double eps;
  const void* attention_norm;  // [layers, hidden]
  const void* mlp_norm;        // [layers, hidden]
  const void* final_norm;      // [hidden]
  Matrix qkv, attention_out, gate_up, down, head;
  const void* keys;    // [layers, kv_heads, capacity, head_dim]
  const void* values;  // [layers, kv_heads, capacity, head_dim]
  float* hidden;       // [T, hidden], written over
  const float* cos;    // [kinds, T, head_dim / 2]
  const float* sin;
  const uint8_t* visible_cached;  // [T, bucket]
  const uint8_t* visible_new;     // [T, T]
  const float* live;      // [T]
  const int64_t* targets; // [T], or null: what follows each token
  float* logits;          // [T, vocab]; with targets their nats [T]
  void* new_keys;         // [layers, kv_heads, T, head_dim]
  void* new_values;       // [layers, kv_heads, T, head_dim]
  float* mass;            // [per_query ? T : 1, bucket + T], zeros before
  float* workspace;       // see read_cpu.py
  int64_t threads;        // at most
  const void* qkv_bias;   // [layers, qkv rows], or null
  const void* qk_gain;    // [layers, 2, head_dim], of queries and of keys, or null
  const int64_t* kinds;   // [layers]: which of cos and sin turn a layer
  double head_eps;        // of the norms of queries and keys
  double attention_scale; // of scores; 0: 1 / sqrt(head_dim)
  double logit_divisor;   // of logits
  int64_t neighbours;     // whether rows of queries and keys that turn together lie side by side
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

// Of some numbers: the largest, and the sum of e^(number - most).
struct Sum {
  float most, total;
};

struct Shared {
  int32_t* seen;       // slots that any token sees
  int64_t num_seen;
  int32_t* sees_all;   // [T]: 1 for a token that sees every one of them, else 0
  float* projected;    // [T, qkv rows]
  float* activated;    // [T, intermediate]: room for what products are made of
  int64_t span;        // slots of a block: attention is summed by blocks, never by threads
  int64_t blocks;
  float* most;         // [blocks, heads * T]: of the scores
  float* total;        // [blocks, heads * T]: of their exponentials
  float* weighted;     // [blocks, heads * T, head_dim]: values by their weights
  float* scores;       // [heads * T, slots of the first block], then of the next
  float* mass;         // the same, [per_query ? T : 1, slots]
  Sum* sums;           // with targets: [parts of the head, T], of the logits
  float* chosen;       // with targets: [T], their logits
};

constexpr int64_t MOST_BLOCKS = 32, SHORTEST_BLOCK = 64;  // so many threads can attend
constexpr int64_t GATES = 256;  // rows at a time: enough to be read in a stream

// Parts of the head that are summed apart, by rows and never by threads.
inline int64_t parts_of(const Decode& d) { return (d.vocab + GATES - 1) / GATES; }

Shared shared_of(const Decode& d, Slices& slices) {
  const int64_t queries = d.heads * d.tokens;
  const int64_t blocks = std::min((d.bucket + SHORTEST_BLOCK - 1) / SHORTEST_BLOCK, MOST_BLOCKS);
  Shared shared{};
  shared.seen = reinterpret_cast<int32_t*>(slices.take(d.bucket));
  shared.sees_all = reinterpret_cast<int32_t*>(slices.take(d.tokens));
  shared.projected = slices.take(d.tokens * (d.heads + 2 * d.kv_heads) * d.head_dim);
  shared.activated = slices.take(d.tokens * d.intermediate);
  shared.most = slices.take(blocks * queries);
  shared.total = slices.take(blocks * queries);
  shared.weighted = slices.take(blocks * queries * d.head_dim);
  shared.scores = slices.take(queries * d.bucket);
  shared.mass = slices.take((d.per_query ? d.tokens : 1) * d.bucket);
  shared.sums = reinterpret_cast<Sum*>(slices.take(d.targets ? 2 * parts_of(d) * d.tokens : 0));
  shared.chosen = slices.take(d.targets ? d.tokens : 0);
  return shared;
}

template <class Real>
struct Own {
  Input<Real>* x;      // [T, hidden], or [T, heads * head_dim]
  Input<Real>* query;  // [heads, T, head_dim]
  Input<Real>* key;    // [kv_heads, T, head_dim]
  float* value;        // [kv_heads, T, head_dim]
  float* new_weights;  // [heads, T, T]: of the new tokens
  float* attended;     // [head_dim]
  float* head;         // [head_dim]: a query, key or value on its way
  float *gates, *ups;  // [T, GATES]
  float* floats;       // where matrices are in blocks: [T, widest], what they are multiplied by
  float* factors;      // … as whole numbers
  float* unpacked;     // [LANES, widest]: rows of a matrix
  float* sums;         // [T, LANES]: of their products
};

// What matrices are made of that lie in a file's own blocks (blocks.h).
struct InBlocks {};

inline int64_t widest_of(const Decode& d) {
  return std::max({d.hidden_size, d.heads * d.head_dim, d.intermediate});
}

template <class Real, class Weight>
Own<Real> own_of(const Decode& d, Slices& slices) {
  Own<Real> own{};
  auto inputs = [&](int64_t size) { return reinterpret_cast<Input<Real>*>(slices.take(size)); };
  own.x = inputs(d.tokens * std::max(d.hidden_size, d.heads * d.head_dim));
  own.query = inputs(d.heads * d.tokens * d.head_dim);
  own.key = inputs(d.kv_heads * d.tokens * d.head_dim);
  own.value = slices.take(d.kv_heads * d.tokens * d.head_dim);
  own.new_weights = slices.take(d.heads * d.tokens * d.tokens);
  own.attended = slices.take(d.head_dim);
  own.head = slices.take(d.head_dim);
  own.gates = slices.take(d.tokens * GATES);
  own.ups = slices.take(d.tokens * GATES);
  if constexpr (std::is_same_v<Weight, InBlocks>) {
    const int64_t widest = widest_of(d);
    own.floats = slices.take(std::is_same_v<Input<Real>, float> ? 0 : d.tokens * widest);
    own.factors = slices.take(d.tokens == 1 ? blocks::factors_size(widest) : 0);
    own.unpacked = slices.take(LANES * widest);
    own.sums = slices.take(LANES * d.tokens);
  }
  return own;
}

int64_t shared_size(const Decode& d) {
  Slices counted{nullptr, 0};
  shared_of(d, counted);
  return counted.used;
}

template <class Real, class Weight>
int64_t own_size(const Decode& d) {
  Slices counted{nullptr, 0};
  own_of<Real, Weight>(d, counted);
  return counted.used;
}

// Threads -----------------------------------------------------------------------------------------
//
// They belong to the process and sleep between two calls. OpenMP's spin for milliseconds while they
// wait, unless the environment says otherwise: on a busy machine they use up the time of the thread
// that they wait for.

inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");  // `yield` does nothing on most of them
#endif
}

using Clock = std::chrono::steady_clock;

inline int64_t nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

// A number that changes, and threads that wait for it to: they spin for as long as a wait takes on
// an idle machine, then sleep, since the thread that will change it may need their processor.
class Signal {
 public:
  uint64_t now() const { return number.load(std::memory_order_acquire); }

  void change(uint64_t to) {
    number.store(to);  // in one order with `sleepers`: either side sees what the other wrote
    if (sleepers.load() == 0) return;
    std::lock_guard<std::mutex> held(mutex);
    changed.notify_all();
  }

  // Returns what it has become instead of `before`. `asleep`: nanoseconds asleep are added to it.
  uint64_t wait(uint64_t before, std::atomic<int64_t>* asleep = nullptr) {
    const auto start = Clock::now();
    do {
      for (int i = 0; i < 16; ++i) {
        const uint64_t found = now();
        if (found != before) return found;
        pause_briefly();
      }
    } while (Clock::now() - start < SPIN);
    std::unique_lock<std::mutex> held(mutex);
    ++sleepers;
    changed.wait(held, [&] { return number.load() != before; });
    --sleepers;
    if (asleep) *asleep += nanoseconds_since(start);
    return now();
  }

 private:
  static constexpr std::chrono::microseconds SPIN{20};
  std::atomic<uint64_t> number{0};
  std::atomic<int64_t> sleepers{0};
  std::mutex mutex;
  std::condition_variable changed;
};

// Where threads wait until all of them are there.
class Barrier {
 public:
  void wait(int64_t threads) {
    const uint64_t round = rounds.now();  // before this thread arrives it cannot change
    if (arrived.fetch_add(1) + 1 < threads) {
      rounds.wait(round, &asleep);
    } else {
      arrived.store(0);
      rounds.change(round + 1);
    }
  }

  // Nanoseconds that threads have slept here, since this was last asked.
  int64_t slept() { return asleep.exchange(0); }

 private:
  std::atomic<int64_t> arrived{0};
  std::atomic<int64_t> asleep{0};
  Signal rounds;
};

// Who does what: rows of matrices, and blocks of slots below.
struct Team {
  int64_t thread, threads;
  Barrier* barrier;

  void wait() const {
    if (threads > 1) barrier->wait(threads);
  }
  // Rows in pairs, as they are multiplied: however many threads there are, sums are the same.
  int64_t begin(int64_t rows) const { return (rows + 1) / 2 * thread / threads * 2; }
  int64_t end(int64_t rows) const {
    return std::min((rows + 1) / 2 * (thread + 1) / threads * 2, rows);
  }
};

// The threads of this process. They are never joined: they sleep until it ends.
class Pool {
 public:
  // Runs work(team) in this thread and others, `most` in all. There are fewer if no more can be
  // started or fewer are faster, and this one alone if another call has the others. Reads
  // of few tokens and of many learn apart what is faster, each from what an `amount` takes.
  template <class Work>
  void run(int64_t most, bool many, double amount, const Work& work) {
    std::unique_lock<std::mutex> held(busy, std::try_to_lock);
    if (!held) return work(Team{0, 1, nullptr});
    TeamSize& size = sizes[many];
    const int64_t threads = 1 + started(size.next(most) - 1);
    const auto start = Clock::now();
    if (threads == 1) {
      work(Team{0, 1, nullptr});
    } else {
      given = &work;
      call = [](const void* given, const Team& team) { (*static_cast<const Work*>(given))(team); };
      calls.change(((calls.now() >> THREAD_BITS) + 1) << THREAD_BITS | threads);
      work(Team{0, threads, &barrier});
      barrier.wait(threads);
    }
    const double taken = nanoseconds_since(start);
    size.learn(taken, barrier.slept() / (taken * std::max<int64_t>(threads - 1, 1)), amount);
  }

 private:
  static constexpr int THREAD_BITS = 16;

  // How many of `wanted` other threads there are.
  int64_t started(int64_t wanted) {
    wanted = std::min<int64_t>(wanted, (1 << THREAD_BITS) - 2);
    try {
      for (; others < wanted; ++others)
        std::thread([this, thread = others + 1, seen = calls.now()] { serve(thread, seen); })
            .detach();
    } catch (const std::exception&) {  // too many processes, or no memory for a stack
    }
    return std::min(others, wanted);
  }

  void serve(int64_t thread, uint64_t seen) {
    for (;;) {
      seen = calls.wait(seen);
      const int64_t threads = seen & ((1 << THREAD_BITS) - 1);
      if (thread >= threads) continue;
      call(given, Team{thread, threads, &barrier});
      barrier.wait(threads);
    }
  }

  std::mutex busy;
  TeamSize sizes[2];
  int64_t others = 0;
  Signal calls;  // how many there have been, and how many threads the last one has
  const void* given;
  void (*call)(const void* given, const Team& team);
  Barrier barrier;
};

alignas(Pool) unsigned char pool_room[sizeof(Pool)];
Pool* const pool = new (pool_room) Pool;  // never destroyed: its threads may outlive static objects

// A forked process has none of the threads, and perhaps a lock that nobody will open.
[[maybe_unused]] const int forked = pthread_atfork(nullptr, nullptr, [] { new (pool_room) Pool; });

inline int64_t queries_of(const Decode& d) { return d.heads * d.tokens; }
inline int64_t masses_of(const Decode& d) { return d.per_query ? d.tokens : 1; }
inline int64_t qkv_rows_of(const Decode& d) { return (d.heads + 2 * d.kv_heads) * d.head_dim; }
inline float score_scale(const Decode& d) {
  return d.attention_scale ? float(d.attention_scale) : 1.0f / std::sqrt(float(d.head_dim));
}

// Norm --------------------------------------------------------------------------------------------
//
// x = hidden / sqrt(mean(hidden^2) + eps) * gain, for every token. Twin: `rms_norm` in llama.py.

template <class Real>
void norm(const Decode& d, const void* gains, int64_t layer, Input<Real>* x) {
  const Real* gain = static_cast<const Real*>(gains) + layer * d.hidden_size;
  for (int64_t t = 0; t < d.tokens; ++t) {
    const float* hidden = d.hidden + t * d.hidden_size;
    float squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < d.hidden_size; ++i) squares += hidden[i] * hidden[i];
    const float factor = 1.0f / std::sqrt(squares / d.hidden_size + float(d.eps));
    Input<Real>* out = x + t * d.hidden_size;
#pragma omp simd
    for (int64_t i = 0; i < d.hidden_size; ++i)
      hold<Real>(rounded<Real>(hidden[i] * factor) * number(gain[i]), out + i);
  }
}

// Matrix products ---------------------------------------------------------------------------------
//
// out[t, row] = sum_i weight[row, i] * x[t, i], times the row's scale where weights are bytes, as
// the model's dtype holds it. Each thread makes some rows. Twin: `linear` in linear.py.

template <class Weight>
inline const Weight* matrix(const Matrix& m, int64_t layer, int64_t rows, int64_t columns) {
  return static_cast<const Weight*>(m.values) + layer * rows * columns;
}
inline const float* scale(const Matrix& m, int64_t layer, int64_t rows) {
  return m.scale ? m.scale + layer * rows : nullptr;
}
inline const Part* parts(const Matrix& m, int64_t layer) {
  return static_cast<const Part*>(m.values) + layer * m.parts;
}

// The vectors of a product as it takes them.
template <class Real, class Weight>
struct Vectors {
  const Input<Real>* x;  // [T, columns]
  Vectors(const Decode&, const Own<Real>&, const Input<Real>* x, int64_t) : x(x) {}
};

template <class Real>
struct Vectors<Real, InBlocks> {
  const float* x;           // [T, columns]
  blocks::Factors factors;  // of one that is alone
  float *unpacked, *sums;   // see Own

  Vectors(const Decode& d, const Own<Real>& own, const Input<Real>* given, int64_t columns)
      : unpacked(own.unpacked), sums(own.sums) {
    if constexpr (std::is_same_v<Input<Real>, float>) {
      x = given;
    } else {
      for (int64_t i = 0; i < d.tokens * columns; ++i) own.floats[i] = number(given[i]);
      x = own.floats;
    }
    if (d.tokens > 1 || !blocks::MULTIPLIES) return;
    factors = blocks::factors_at(own.factors, columns);
    blocks::make_factors(x, columns, factors);
  }
};

// Adds products to sums[t * LANES + row].
struct Adding {
  float* sums;
  int64_t row = 0;

  template <int R, int T>
  void take(int64_t t, const float* results) const {
    for (int i = 0; i < T; ++i)
      for (int r = 0; r < R; ++r) sums[(t + i) * LANES + row + r] += results[i * R + r];
  }
};

// Rows of one kind. Of one vector they are multiplied as they lie, where blocks.h can. Of several some rows are unpacked
// once, then multiplied piece by piece: so much of some vectors stays close to the processor.
template <int64_t KIND, class Real, class Into>
void multiply_part(const uint8_t* bytes, int64_t size, int64_t columns,
                   const Vectors<Real, InBlocks>& vectors, int64_t tokens, int64_t end, Into& into) {
  constexpr int64_t PIECE = 1024;
  for (int64_t count; into.row < end; into.row += count, bytes += count * size) {
    count = std::min<int64_t>(LANES, end - into.row);
    if constexpr (blocks::multiplies(KIND))
      if (tokens == 1) {
        float results[LANES];
        for (int64_t r = 0; r < count; ++r)
          results[r] = blocks::dot<KIND>(bytes + r * size, vectors.factors, columns);
        into.take_rows(results, count);
        continue;
      }
    for (int64_t r = 0; r < count; ++r)
      blocks::unpack_row<KIND>(bytes + r * size, columns, vectors.unpacked + r * columns);
    std::memset(vectors.sums, 0, sizeof(float) * LANES * tokens);
    for (int64_t from = 0; from < columns; from += PIECE) {
      const int64_t length = std::min(PIECE, columns - from);
      for (int64_t t = 0; t < tokens; t += MOST) {
        const float* x = vectors.x + t * columns + from;
        const int64_t some = std::min<int64_t>(MOST, tokens - t);
        Adding sums{vectors.sums + t * LANES};
        auto row = [&](int64_t r) { return vectors.unpacked + r * columns + from; };
        for (; sums.row + 2 <= count; sums.row += 2) {
          const float* rows[2] = {row(sums.row), row(sums.row + 1)};
          products<2, MOST, false>(rows, x, columns, length, some, sums);
        }
        if (sums.row < count) {
          const float* rows[1] = {row(sums.row)};
          products<1, MOST, false>(rows, x, columns, length, some, sums);
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) into.take_rows(vectors.sums + t * LANES, count, t);
  }
}

// Rows of a layer's matrix, from `row` on, times the vectors: into.row of them is the first, and
// `last` the one after the last.
template <class Real, class Weight, class Into>
void multiply_rows(const Decode& d, const Matrix& m, int64_t layer, int64_t rows, int64_t columns,
                   const Vectors<Real, Weight>& vectors, int64_t row, int64_t last, Into into) {
  multiply(matrix<Weight>(m, layer, rows, columns) + row * columns, vectors.x, columns, columns,
           d.tokens, into.row, last, into);
}

template <class Real, class Into>
void multiply_rows(const Decode& d, const Matrix& m, int64_t layer, int64_t, int64_t columns,
                   const Vectors<Real, InBlocks>& vectors, int64_t row, int64_t last, Into into) {
  const Part* part = parts(m, layer);
  for (int64_t begin = -row; begin < last; begin += part->rows, ++part) {
    const int64_t end = std::min(last, begin + part->rows);
    if (end <= into.row) continue;
    const int64_t size = blocks::row_bytes(part->kind, columns);
    const uint8_t* bytes = part->bytes + (into.row - begin) * size;
    blocks::dispatch(part->kind, [&](auto kind) {
      multiply_part<decltype(kind)::value>(bytes, size, columns, vectors, d.tokens, end, into);
    });
  }
}

template <class Real, class Weight, bool ADDS, class Held = Real>
void linear(const Decode& d, const Team& team, const Own<Real>& own, const Matrix& m, int64_t layer,
            int64_t rows, int64_t columns, const Input<Real>* x, float* to) {
  const Vectors<Real, Weight> vectors(d, own, x, columns);
  const Rows<Held, ADDS> into{to, rows, scale(m, layer, rows), team.begin(rows)};
  multiply_rows(d, m, layer, rows, columns, vectors, 0, team.end(rows), into);
}

// The first rows that this thread will read of a matrix, before it waits for the others.
template <class Weight>
void ask_early(const Matrix& m, int64_t layer, int64_t rows, int64_t columns, int64_t row) {
  const char* start;
  if constexpr (std::is_same_v<Weight, InBlocks>) {
    const Part* part = parts(m, layer);
    for (; row >= part->rows; ++part) row -= part->rows;
    const int64_t size = blocks::row_bytes(part->kind, columns);
    start = reinterpret_cast<const char*>(part->bytes) + row * size;
  } else {
    start = reinterpret_cast<const char*>(matrix<Weight>(m, layer, rows, columns) + row * columns);
  }
  for (int64_t line = 0; line < AHEAD; line += 64) __builtin_prefetch(start + line, 0, 3);
}

// Queries, keys and values ------------------------------------------------------------------------
//
// A sum that gets a bias is rounded with it. A query or key may be normalised: x / sqrt(mean(x^2) +
// eps) * gain. Then it is rotated:
// (x[i], x[i + half]) = (x[i] cos - x[i + half] sin, x[i + half] cos + x[i] sin), by the angles of
// the token's position. Twin: `rotate` in rope.py.

template <class Real>
void rotate(const Decode& d, const float* from, int64_t t, int64_t kind, Input<Real>* to) {
  const int64_t half = d.head_dim / 2, at = (kind * d.tokens + t) * half;
  const float *cos = d.cos + at, *sin = d.sin + at;
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    hold<Real>(from[i] * cos[i] - from[i + half] * sin[i], to + i);
    hold<Real>(from[i + half] * cos[i] + from[i] * sin[i], to + i + half);
  }
}

// The product for them. Where a bias is to come, sums are not rounded.
template <class Real, class Weight>
void project(const Decode& d, const Team& team, const Own<Real>& own, int64_t layer, float* to) {
  const int64_t rows = qkv_rows_of(d), columns = d.hidden_size;
  if (d.qkv_bias)
    linear<Real, Weight, false, float>(d, team, own, d.qkv, layer, rows, columns, own.x, to);
  else
    linear<Real, Weight, false>(d, team, own, d.qkv, layer, rows, columns, own.x, to);
}

// Rows of one head of which neighbours are turned together, as `rotate` wants them: in `room`.
inline const float* apart(const Decode& d, const float* from, float* room) {
  const int64_t half = d.head_dim / 2;
  for (int64_t i = 0; i < half; ++i) room[i] = from[2 * i], room[i + half] = from[2 * i + 1];
  return room;
}

// Rows of one head with their bias, as the model's dtype holds them: in `room`, if there is one.
template <class Real>
const float* biased(const Decode& d, const float* from, int64_t layer, int64_t row, float* room) {
  if (!d.qkv_bias) return from;
  const Real* bias = static_cast<const Real*>(d.qkv_bias) + layer * qkv_rows_of(d) + row;
#pragma omp simd
  for (int64_t i = 0; i < d.head_dim; ++i) room[i] = rounded<Real>(from[i] + number(bias[i]));
  return room;
}

// A query (which = 0) or key (1), normalised: in `room`, if there are norms. Twin: `rms_norm`.
template <class Real>
const float* normalised(const Decode& d, const float* from, int64_t layer, int64_t which,
                        float* room) {
  if (!d.qk_gain) return from;
  const Real* gain = static_cast<const Real*>(d.qk_gain) + (2 * layer + which) * d.head_dim;
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < d.head_dim; ++i) squares += from[i] * from[i];
  const float factor = 1.0f / std::sqrt(squares / d.head_dim + float(d.head_eps));
#pragma omp simd
  for (int64_t i = 0; i < d.head_dim; ++i)
    room[i] = rounded<Real>(rounded<Real>(from[i] * factor) * number(gain[i]));
  return room;
}

// The packed projection apart: queries [heads, T, head_dim] and keys [kv_heads, T, head_dim],
// rotated, and values, as many.
template <class Real>
void split(const Decode& d, int64_t layer, const float* projected, const Own<Real>& own) {
  const int64_t width = d.head_dim, kind = d.kinds[layer];
  for (int64_t t = 0; t < d.tokens; ++t) {
    int64_t row = 0;
    auto next = [&](bool turns = false) {
      const float* from = projected + t * qkv_rows_of(d) + row;
      if (turns && d.neighbours) from = apart(d, from, own.head);
      from = biased<Real>(d, from, layer, row, own.head);
      row += width;
      return from;
    };
    auto turn = [&](int64_t heads, int64_t which, Input<Real>* to) {
      for (int64_t h = 0; h < heads; ++h)
        rotate<Real>(d, normalised<Real>(d, next(true), layer, which, own.head), t, kind,
                     to + (h * d.tokens + t) * width);
    };
    turn(d.heads, 0, own.query);
    turn(d.kv_heads, 1, own.key);
    for (int64_t h = 0; h < d.kv_heads; ++h)
      std::memcpy(own.value + (h * d.tokens + t) * width, next(), sizeof(float) * width);
  }
}

// Keys and values of the new tokens, for whoever remembers them.
template <class Real>
void return_new_rows(const Decode& d, int64_t layer, const Own<Real>& own) {
  const int64_t size = d.kv_heads * d.tokens * d.head_dim;
  Real* keys = static_cast<Real*>(d.new_keys) + layer * size;
  Real* values = static_cast<Real*>(d.new_values) + layer * size;
  for (int64_t i = 0; i < size; ++i) {
    narrow(number(own.key[i]), keys + i);
    narrow(own.value[i], values + i);
  }
}

// Numbers to exponentials of what they are less than the largest.
inline Sum exponentiate(float* row, int64_t length) {
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
  return {most, total};
}

// Attention over the cache, block by block ---------------------------------------------------------
//
// Of every block b of slots and every query: m_b = max_s score_s, with score_s = q · k_s /
// sqrt(head_dim), w_s = e^(score_s - m_b), total_b = sum_s w_s and sum_s w_s v_s. Twin: the cached
// half of `_attend_tile` in attention.py.

// Rows of the cache in the order in which a thread reads them, of one key head after another.
template <class Real>
struct Walk {
  const Real* plane;  // [capacity, head_dim]
  int64_t planes;     // from this one on
  int64_t row;        // which of the thread's slots is next
};

// Where scores go: to[q * stride + slot].
struct Scores {
  float* to;
  int64_t stride;
  float factor;
  int64_t slot = 0;

  template <int R, int T>
  void take(int64_t q, const float* results) const {
    for (int k = 0; k < R * T; ++k) to[(q + k / R) * stride + slot + k % R] = results[k] * factor;
  }
};

// Some of the slots that are seen, and what is kept of them.
struct Block {
  const int32_t* slots;
  int64_t length;
  float* scores;  // [heads * T, length], then e^(score - most)
  float* mass;    // [per_query ? T : 1, length], over all layers
};

inline Block block_of(const Decode& d, const Shared& shared, int64_t index) {
  const int64_t first = index * shared.span;
  const int64_t last = std::min(first + shared.span, shared.num_seen);
  return {shared.seen + first, last - first, shared.scores + queries_of(d) * first,
          shared.mass + masses_of(d) * first};
}

// The blocks of one thread.
template <class Real>
struct Blocks {
  const Decode& d;
  const Shared& shared;
  int64_t begin, end;            // of the blocks
  int64_t first_seen, num_seen;  // of the slots that are seen: those of all these blocks
  Walk<Real> keys_ahead, values_ahead;

  Blocks(const Decode& d, const Shared& shared, const Team& team) : d(d), shared(shared) {
    begin = shared.blocks * team.thread / team.threads;
    end = shared.blocks * (team.thread + 1) / team.threads;
    first_seen = std::min(begin * shared.span, shared.num_seen);
    num_seen = std::min(end * shared.span, shared.num_seen) - first_seen;
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(d, shared, index);
      std::memset(block.mass, 0, sizeof(float) * masses_of(d) * block.length);
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

  void attend(int64_t layer, const Input<Real>* query) {
    const int64_t group = d.heads / d.kv_heads * d.tokens, plane = d.capacity * d.head_dim;
    for (int64_t h = 0; h < d.kv_heads; ++h) {
      const Real* keys = static_cast<const Real*>(d.keys) + (layer * d.kv_heads + h) * plane;
      const Real* values = static_cast<const Real*>(d.values) + (layer * d.kv_heads + h) * plane;
      for (int64_t index = begin; index < end; ++index) {
        const Block block = block_of(d, shared, index);
        const int64_t found = index * queries_of(d) + h * group;
        float* weights = block.scores + h * group * block.length;
        score(block, keys, query + h * group * d.head_dim, weights, group);
        for (int64_t q = 0; q < group; ++q) {
          const Sum sum = exponentiate(weights + q * block.length, block.length);
          shared.most[found + q] = sum.most;
          shared.total[found + q] = sum.total;
        }
        weigh(block, values, weights, shared.weighted + found * d.head_dim, group);
      }
    }
  }

  void score(const Block& block, const Real* keys, const Input<Real>* queries, float* scores,
             int64_t group) {
    constexpr int ROWS = 4;
    const Real* rows[ROWS];
    Scores into{scores, block.length, score_scale(d)};
    for (; into.slot + ROWS <= block.length; into.slot += ROWS) {
      for (int r = 0; r < ROWS; ++r) {
        rows[r] = keys + block.slots[into.slot + r] * d.head_dim;
        ask_for_row(keys_ahead);
      }
      products<ROWS, 4, false>(rows, queries, d.head_dim, d.head_dim, group, into);
    }
    for (; into.slot < block.length; ++into.slot) {
      rows[0] = keys + block.slots[into.slot] * d.head_dim;
      ask_for_row(keys_ahead);
      products<1, 4, false>(rows, queries, d.head_dim, d.head_dim, group, into);
    }
    for (int64_t q = 0; q < group; ++q) {
      if (shared.sees_all[q % d.tokens]) continue;
      const uint8_t* visible = d.visible_cached + q % d.tokens * d.bucket;
      for (int64_t j = 0; j < block.length; ++j)
        if (!visible[block.slots[j]]) scores[q * block.length + j] = -INFINITY;
    }
  }

  // The values of a block, each by its weight: several queries and vectors at a time, so that a
  // value that is loaded once serves them all.
  void weigh(const Block& block, const Real* values, const float* weights, float* weighted,
             int64_t group) {
    int64_t q = 0;
    for (; q + 3 <= group; q += 3) weigh_some<3>(block, values, weights, weighted, q);
    for (; q < group; ++q) weigh_some<1>(block, values, weights, weighted, q);
  }

  template <int Q>
  void weigh_some(const Block& block, const Real* values, const float* weights, float* weighted,
                  int64_t q) {
    constexpr int WIDE = 4;
    int64_t column = 0;
    for (; column + WIDE * LANES <= d.head_dim; column += WIDE * LANES)
      weigh_columns<Q, WIDE>(block, values, weights, weighted, q, column);
    for (; column + LANES <= d.head_dim; column += LANES)
      weigh_columns<Q, 1>(block, values, weights, weighted, q, column);
    const int64_t length = block.length;
    for (; column < d.head_dim; ++column)
      for (int i = 0; i < Q; ++i) {
        float sum = 0;
        for (int64_t j = 0; j < length; ++j)
          sum += weights[(q + i) * length + j] *
                 number(values[block.slots[j] * d.head_dim + column]);
        weighted[(q + i) * d.head_dim + column] = sum;
      }
  }

  template <int Q, int WIDE>
  void weigh_columns(const Block& block, const Real* values, const float* weights, float* weighted,
                     int64_t q, int64_t column) {
    const int64_t length = block.length;
    const int32_t* slots = block.slots;
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
        store(weighted + (q + i) * d.head_dim + column + w * LANES, sums[i][w]);
  }

  // The mass of these blocks' slots, when all layers are done.
  void return_mass() const {
    for (int64_t index = begin; index < end; ++index) {
      const Block block = block_of(d, shared, index);
      for (int64_t t = 0; t < masses_of(d); ++t)
        for (int64_t i = 0; i < block.length; ++i)
          d.mass[t * (d.bucket + d.tokens) + block.slots[i]] = block.mass[t * block.length + i];
    }
  }
};

// Blocks and new tokens combined -------------------------------------------------------------------
//
// With m the largest score of all, f_b = e^(m_b - m), w_j = e^(score_j - m) of new token j and
// z = sum_b f_b total_b + sum_j w_j, a query gets (sum_b f_b weighted_b + sum_j w_j v_j) / z, and
// gives mass f_b w_s / z to a slot, w_j / z to a new token. Twin: `attend` in attention.py.

inline void add(float* to, const float* from, float factor, int64_t size) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) to[i] += from[i] * factor;
}

// One softmax over all that a query sees.
struct Softmax {
  float factors[MOST_BLOCKS];  // f_b / z
  float total;                 // z
};

template <class Real>
struct Combination : Own<Real> {
  using Own<Real>::x, Own<Real>::query, Own<Real>::key, Own<Real>::value, Own<Real>::new_weights,
      Own<Real>::attended;
  const Decode& d;
  const Shared& shared;

  Combination(const Decode& d, const Shared& shared, const Own<Real>& own)
      : Own<Real>(own), d(d), shared(shared) {}

  // Attended values into x [T, heads * head_dim]. The slots of this thread's blocks receive their
  // mass, and from one thread the new tokens theirs.
  void combine(const Blocks<Real>& blocks, bool gives_new_mass) {
    for (int64_t h = 0; h < d.heads; ++h)
      for (int64_t t = 0; t < d.tokens; ++t) {
        const Softmax softmax = normalise(h, t);
        weigh(softmax, h, t);
        give_mass(softmax, h, t, blocks, gives_new_mass);
      }
  }

  // Weights of the new tokens into new_weights: w_j, 0 for one that is not visible.
  Softmax normalise(int64_t h, int64_t t) {
    const int64_t q = h * d.tokens + t, width = d.head_dim;
    const Input<Real>* keys = key + h / (d.heads / d.kv_heads) * d.tokens * width;
    const uint8_t* visible = d.visible_new + t * d.tokens;
    float* weights = new_weights + q * d.tokens;
    float most = -INFINITY;
    for (int64_t block = 0; block < shared.blocks; ++block)
      most = std::max(most, shared.most[block * queries_of(d) + q]);
    for (int64_t j = 0; j < d.tokens; ++j) {
      if (!visible[j]) continue;
      const Input<Real>* row = keys + j * width;
      float score[room(1)];
      products<1, 1, false>(&row, query + q * width, width, width, score);
      weights[j] = score[0] * score_scale(d);
      most = std::max(most, weights[j]);
    }
    Softmax softmax;
    softmax.total = 0;
    for (int64_t block = 0; block < shared.blocks; ++block) {
      softmax.factors[block] = exponential(shared.most[block * queries_of(d) + q] - most);
      softmax.total += shared.total[block * queries_of(d) + q] * softmax.factors[block];
    }
    for (int64_t j = 0; j < d.tokens; ++j) {
      weights[j] = visible[j] ? exponential(weights[j] - most) : 0.0f;
      softmax.total += weights[j];
    }
    for (int64_t block = 0; block < shared.blocks; ++block)
      softmax.factors[block] /= softmax.total;
    return softmax;
  }

  void weigh(const Softmax& softmax, int64_t h, int64_t t) {
    const int64_t q = h * d.tokens + t, width = d.head_dim;
    const float* values = value + h / (d.heads / d.kv_heads) * d.tokens * width;
    const uint8_t* visible = d.visible_new + t * d.tokens;
    const float* weights = new_weights + q * d.tokens;
    weigh_blocks(shared.weighted + q * width, softmax.factors);
    for (int64_t j = 0; j < d.tokens; ++j)
      if (visible[j]) add(attended, values + j * width, weights[j] / softmax.total, width);
    Input<Real>* out = x + (t * d.heads + h) * width;
    for (int64_t i = 0; i < width; ++i) hold<Real>(attended[i], out + i);
  }

  // The weighted values of every block, by its factor, into attended.
  void weigh_blocks(const float* weighted, const float* factors) {
    constexpr int WIDE = 4;
    const int64_t stride = queries_of(d) * d.head_dim;
    int64_t i = 0;
    for (; i + WIDE * LANES <= d.head_dim; i += WIDE * LANES) {
      Floats sums[WIDE] = {};
      for (int64_t block = 0; block < shared.blocks; ++block)
#pragma GCC unroll 4
        for (int w = 0; w < WIDE; ++w)
          sums[w] += load<Floats>(weighted + block * stride + i + w * LANES) * factors[block];
      for (int w = 0; w < WIDE; ++w) store(attended + i + w * LANES, sums[w]);
    }
    for (; i < d.head_dim; ++i) {
      attended[i] = 0;
      for (int64_t block = 0; block < shared.blocks; ++block)
        attended[i] += weighted[block * stride + i] * factors[block];
    }
  }

  void give_mass(const Softmax& softmax, int64_t h, int64_t t, const Blocks<Real>& blocks,
                 bool gives_new_mass) {
    const int64_t q = h * d.tokens + t, row = d.per_query ? t : 0;
    const float counts = d.per_query ? 1.0f : d.live[t];
    for (int64_t index = blocks.begin; index < blocks.end; ++index) {
      const Block block = block_of(d, shared, index);
      add(block.mass + row * block.length, block.scores + q * block.length,
          counts * softmax.factors[index], block.length);
    }
    if (gives_new_mass)
      add(d.mass + row * (d.bucket + d.tokens) + d.bucket, new_weights + q * d.tokens,
          counts / softmax.total, d.tokens);
  }
};

// MLP ---------------------------------------------------------------------------------------------
//
// activated = silu(gate) * up, with silu(g) = g / (1 + e^-g): a gate's row and the row above it,
// side by side. Twin: the end of `decoder_layer` in llama.py.

template <class Real, class Weight>
void activate(const Decode& d, const Team& team, int64_t layer, const Own<Real>& own,
              Input<Real>* activated) {
  const int64_t size = d.intermediate, width = d.hidden_size;
  const Vectors<Real, Weight> vectors(d, own, own.x, width);
  const float* scales = scale(d.gate_up, layer, 2 * size);
  const int64_t end = team.end(size);
  for (int64_t row = team.begin(size); row < end; row += GATES) {
    const int64_t count = std::min(GATES, end - row);
    auto some = [&](int64_t from, float* to) {
      const Rows<Real, false> into{to, GATES, scales ? scales + from : nullptr};
      multiply_rows(d, d.gate_up, layer, 2 * size, width, vectors, from, count, into);
    };
    some(row, own.gates);
    some(size + row, own.ups);
    for (int64_t t = 0; t < d.tokens; ++t) {
      const float *gate = own.gates + t * GATES, *up = own.ups + t * GATES;
      Input<Real>* out = activated + t * size + row;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const float e = exponential(-std::abs(gate[i])), turned = gate[i] < 0 ? e : 1.0f;
        hold<Real>(rounded<Real>(gate[i] * turned / (1.0f + e)) * up[i], out + i);
      }
    }
  }
}

// Logits ------------------------------------------------------------------------------------------

// Some of them, in place.
inline void divide(const Decode& d, float* logits, int64_t begin, int64_t end) {
  const float divisor = float(d.logit_divisor);
  if (divisor == 1.0f) return;
  for (int64_t i = begin; i < end; ++i) logits[i] /= divisor;
}

// Surprise ----------------------------------------------------------------------------------------
//
// nats[t] = log(sum_row e^logit[t, row]) - logit[t, target[t]], of which no row is ever whole. Twin:
// `head_surprises` in sample.py.

template <class Real, class Weight>
void sum_head(const Decode& d, const Shared& shared, const Team& team, const Own<Real>& own) {
  const int64_t width = d.hidden_size, parts = parts_of(d);
  const Vectors<Real, Weight> vectors(d, own, own.x, width);
  const float* scales = scale(d.head, 0, d.vocab);
  const int64_t end = parts * (team.thread + 1) / team.threads;
  for (int64_t part = parts * team.thread / team.threads; part < end; ++part) {
    const int64_t first = part * GATES, count = std::min(GATES, d.vocab - first);
    const Rows<Real, false> into{own.gates, GATES, scales ? scales + first : nullptr};
    multiply_rows(d, d.head, 0, d.vocab, width, vectors, first, count, into);
    for (int64_t t = 0; t < d.tokens; ++t) {
      float* logits = own.gates + t * GATES;
      divide(d, logits, 0, count);
      const int64_t target = d.targets[t] - first;
      if (0 <= target && target < count) shared.chosen[t] = logits[target];
      shared.sums[part * d.tokens + t] = exponentiate(logits, count);
    }
  }
}

void surprise(const Decode& d, const Shared& shared) {
  for (int64_t t = 0; t < d.tokens; ++t) {
    float most = -INFINITY, total = 0;
    for (int64_t part = 0; part < parts_of(d); ++part)
      most = std::max(most, shared.sums[part * d.tokens + t].most);
    for (int64_t part = 0; part < parts_of(d); ++part) {
      const Sum sum = shared.sums[part * d.tokens + t];
      total += sum.total * exponential(sum.most - most);
    }
    d.logits[t] = std::log(total) + most - shared.chosen[t];
  }
}

// All layers ---------------------------------------------------------------------------------------

// What one thread does. Twin: `_through_layers` in read.py, and the head.
template <class Real, class Weight>
void work(const Decode& d, const Shared& shared, const Team& team, const Own<Real>& own) {
  const int64_t hidden = d.hidden_size, inner = d.intermediate, width = d.heads * d.head_dim;
  const int64_t qkv_rows = qkv_rows_of(d);
  Input<Real>* activated = reinterpret_cast<Input<Real>*>(shared.activated);
  Blocks<Real> blocks(d, shared, team);
  Combination<Real> combination(d, shared, own);
  for (int64_t layer = 0; layer < d.layers; ++layer) {
    norm<Real>(d, d.attention_norm, layer, own.x);
    project<Real, Weight>(d, team, own, layer, shared.projected);
    blocks.ask_for_cache(layer);
    team.wait();
    split(d, layer, shared.projected, own);
    if (team.thread == 0) return_new_rows(d, layer, own);
    blocks.attend(layer, own.query);
    ask_early<Weight>(d.attention_out, layer, hidden, width, team.begin(hidden));
    team.wait();
    combination.combine(blocks, team.thread == 0);
    linear<Real, Weight, true>(d, team, own, d.attention_out, layer, hidden, width, own.x, d.hidden);
    ask_early<Weight>(d.gate_up, layer, 2 * inner, hidden, team.begin(inner));
    team.wait();
    norm<Real>(d, d.mlp_norm, layer, own.x);
    activate<Real, Weight>(d, team, layer, own, activated);
    ask_early<Weight>(d.down, layer, hidden, inner, team.begin(hidden));
    team.wait();
    linear<Real, Weight, true>(d, team, own, d.down, layer, hidden, inner, activated, d.hidden);
    if (layer + 1 < d.layers)
      ask_early<Weight>(d.qkv, layer + 1, qkv_rows, hidden, team.begin(qkv_rows));
    team.wait();
  }
  norm<Real>(d, d.final_norm, 0, own.x);
  if (d.targets) {
    sum_head<Real, Weight>(d, shared, team, own);
    team.wait();
    if (team.thread == 0) surprise(d, shared);
  } else {
    linear<Real, Weight, false>(d, team, own, d.head, 0, d.vocab, hidden, own.x, d.logits);
    for (int64_t t = 0; t < d.tokens; ++t)
      divide(d, d.logits + t * d.vocab, team.begin(d.vocab), team.end(d.vocab));
  }
  blocks.return_mass();
}

// The slots that any token sees, and the blocks that they make up.
void find_blocks(const Decode& d, Shared& shared) {
  int64_t seen = 0;
  for (int64_t slot = 0; slot < d.bucket; ++slot) {
    int64_t t = 0;
    while (t < d.tokens && !d.visible_cached[t * d.bucket + slot]) ++t;
    if (t < d.tokens) shared.seen[seen++] = int32_t(slot);
  }
  shared.num_seen = seen;
  for (int64_t t = 0; t < d.tokens; ++t) {
    int64_t sees = 0;
    for (int64_t slot = 0; slot < d.bucket; ++slot) sees += d.visible_cached[t * d.bucket + slot];
    shared.sees_all[t] = sees == seen;
  }
  shared.span = std::max((seen + MOST_BLOCKS - 1) / MOST_BLOCKS, SHORTEST_BLOCK);
  shared.span = (shared.span + 3) / 4 * 4;
  shared.blocks = (seen + shared.span - 1) / shared.span;
}

// Bytes of weights that a call reads of a matrix.
template <class Weight>
double matrix_bytes(const Matrix& m, int64_t layers, int64_t rows, int64_t columns) {
  if constexpr (std::is_same_v<Weight, InBlocks>) {
    double bytes = 0;
    for (const Part* part = parts(m, 0); part < parts(m, layers); ++part)
      bytes += double(part->rows) * blocks::row_bytes(part->kind, columns);
    return bytes;
  } else {
    return double(layers) * rows * columns * sizeof(Weight);
  }
}

// Bytes of weights and of the cache that a call reads.
template <class Real, class Weight>
double bytes_read(const Decode& d, const Shared& shared) {
  const int64_t width = d.heads * d.head_dim;
  return 2.0 * d.layers * d.kv_heads * d.head_dim * shared.num_seen * sizeof(Real) +
         matrix_bytes<Weight>(d.qkv, d.layers, qkv_rows_of(d), d.hidden_size) +
         matrix_bytes<Weight>(d.attention_out, d.layers, d.hidden_size, width) +
         matrix_bytes<Weight>(d.gate_up, d.layers, 2 * d.intermediate, d.hidden_size) +
         matrix_bytes<Weight>(d.down, d.layers, d.hidden_size, d.intermediate) +
         matrix_bytes<Weight>(d.head, 1, d.vocab, d.hidden_size);
}

template <class Real, class Weight>
void decode(const Decode& d) {
  Slices common{d.workspace, 0};
  Shared shared = shared_of(d, common);
  find_blocks(d, shared);
  const bool many = d.tokens > 4;  // bound by products, not by memory
  const double bytes = bytes_read<Real, Weight>(d, shared);
  pool->run(d.threads, many, many ? bytes * d.tokens : bytes, [&](const Team& team) {
    Slices slices{d.workspace, common.used + team.thread * own_size<Real, Weight>(d)};
    work<Real, Weight>(d, shared, team, own_of<Real, Weight>(d, slices));
  });
}

}  // namespace

// For one pair of number formats, named when this is built: there are as many libraries as pairs.
extern "C" void decode(const Decode* d) { decode<REAL, WEIGHT>(*d); }

// Bytes of the arguments: whoever fills them in compares.
extern "C" int64_t arguments_size() { return sizeof(Decode); }

// Floats that the workspace must hold for this many threads.
extern "C" int64_t workspace_size(const Decode* d) {
  return shared_size(*d) + d->threads * own_size<REAL, WEIGHT>(*d);
}

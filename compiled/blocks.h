// Rows of a matrix in the blocks of a GGUF file: as numbers, or times one vector as they lie.
//
// A block holds some whole numbers q >= 0 with a scale and a minimum for every 16 or 32 of them:
// a weight is scale * q - minimum. Its layout is ggml's (ggml-common.h of llama.cpp). The vector
// is made whole numbers too, of sixteen bits with a scale for every 32, so that a product is one of
// whole numbers and yet nearly as good as one of floats: bfloat16 would lose a hundred times as
// much. That needs AVX2; elsewhere each row becomes floats first. Twin: blocks.py.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__) || defined(__F16C__)
#include <immintrin.h>
#endif

// Bytes from what is being read to what is asked for: memory answers late, and what a thread reads
// lies in one piece. Rows one after another, not side by side, are 1.3 times as fast.
constexpr int64_t AHEAD = 8192;

namespace blocks {

// As ggml numbers them.
enum Kind : int64_t {
  F32 = 0,
  F16 = 1,
  Q4_0 = 2,
  Q4_1 = 3,
  Q5_0 = 6,
  Q5_1 = 7,
  Q8_0 = 8,
  Q4_K = 12,
  Q5_K = 13,
  Q6_K = 14,
  BF16 = 30,
};

constexpr int64_t GROUP = 32, SUPER = 256;  // weights with one scale, and of a block of several

constexpr int64_t weights_of(int64_t kind) {
  return kind >= Q4_K && kind <= Q6_K                 ? SUPER
         : kind == F32 || kind == F16 || kind == BF16 ? 1
                                                      : GROUP;
}

constexpr int64_t bytes_of(int64_t kind) {
  switch (kind) {
    case F32:
      return 4;
    case F16:
    case BF16:
      return 2;
    case Q4_0:
      return 2 + 16;
    case Q4_1:
      return 4 + 16;
    case Q5_0:
      return 2 + 4 + 16;
    case Q5_1:
      return 4 + 4 + 16;
    case Q8_0:
      return 2 + 32;
    case Q4_K:
      return 4 + 12 + 128;
    case Q5_K:
      return 4 + 12 + 32 + 128;
    default:
      return 128 + 64 + 16 + 2;  // Q6_K
  }
}

inline int64_t row_bytes(int64_t kind, int64_t columns) {
  return columns / weights_of(kind) * bytes_of(kind);
}

inline float of_bits(uint32_t bits) {
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline uint32_t word(const uint8_t* from) {
  uint32_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

inline uint16_t short_word(const uint8_t* from) {
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}

// A number of sixteen bits, IEEE's.
inline float half(const uint8_t* from) {
  const uint32_t bits = short_word(from);
#if defined(__F16C__)
  return _cvtsh_ss(uint16_t(bits));
#else
  const uint32_t sign = bits >> 15 << 31, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * float(fraction) * 0x1p-24f;
  return of_bits(sign | (exponent == 31 ? 255 : exponent + 112) << 23 | fraction << 13);
#endif
}

// Eight scales and eight minima of six bits each, in the twelve bytes of a Q4_K or Q5_K block.
struct Sixes {
  uint8_t scales[8], minima[8];
};

inline Sixes sixes(const uint8_t* from) {
  const uint32_t a = word(from), b = word(from + 4), c = word(from + 8);
  const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, two = 0x03030303;
  const uint32_t told[4] = {a & six, (c & four) | (a >> 6 & two) << 4, b & six,
                            (c >> 4 & four) | (b >> 6 & two) << 4};
  Sixes both;
  std::memcpy(both.scales, told, 8);
  std::memcpy(both.minima, told + 2, 8);
  return both;
}

// One block as numbers
// -----------------------------------------------------------------------------

template <int64_t KIND>
inline void unpack_block(const uint8_t* __restrict block, float* __restrict out) {
  if constexpr (KIND == F32) {
    *out = of_bits(word(block));
  } else if constexpr (KIND == F16) {
    *out = half(block);
  } else if constexpr (KIND == BF16) {
    *out = of_bits(uint32_t(short_word(block)) << 16);
  } else if constexpr (KIND == Q8_0) {
    const float d = half(block);
#pragma omp simd
    for (int i = 0; i < 32; ++i) out[i] = d * int8_t(block[2 + i]);
  } else if constexpr (KIND == Q4_0 || KIND == Q4_1 || KIND == Q5_0 || KIND == Q5_1) {
    constexpr bool FIVE = KIND == Q5_0 || KIND == Q5_1, LEAST = KIND == Q4_1 || KIND == Q5_1;
    const float d = half(block), m = LEAST ? half(block + 2) : d * (FIVE ? -16.0f : -8.0f);
    const uint8_t* rest = block + (LEAST ? 4 : 2);
    const uint32_t high = FIVE ? word(rest) : 0;
    const uint8_t* nibbles = rest + (FIVE ? 4 : 0);
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const int low = (nibbles[i] & 15) | (FIVE ? int(high >> i & 1) << 4 : 0);
      const int up = nibbles[i] >> 4 | (FIVE ? int(high >> (i + 16) & 1) << 4 : 0);
      out[i] = d * float(low) + m;
      out[i + 16] = d * float(up) + m;
    }
  } else if constexpr (KIND == Q4_K || KIND == Q5_K) {
    const float d = half(block), least = half(block + 2);
    const Sixes both = sixes(block + 4);
    const uint8_t* high = block + 16;
    const uint8_t* nibbles = high + (KIND == Q5_K ? 32 : 0);
    for (int g = 0; g < 8; ++g) {
      const float scale = d * float(both.scales[g]), m = least * float(both.minima[g]);
      const uint8_t* from = nibbles + g / 2 * 32;
#pragma omp simd
      for (int i = 0; i < 32; ++i) {
        const int fifth = KIND == Q5_K ? (high[i] >> g & 1) << 4 : 0;
        out[g * 32 + i] = scale * float((from[i] >> g % 2 * 4 & 15) | fifth) - m;
      }
    }
  } else {
    const float d = half(block + 208);
    for (int part = 0; part < 16; ++part) {  // with a scale
      const float scale = d * float(int8_t(block[192 + part]));
      const int g = part / 2, at = part % 2 * 16;
      const int low_shift = g % 4 / 2 * 4, high_shift = g % 4 * 2;
      const uint8_t* low = block + g / 4 * 64 + g % 2 * 32 + at;
      const uint8_t* high = block + 128 + g / 4 * 32 + at;
#pragma omp simd
      for (int i = 0; i < 16; ++i) {
        const int q = (low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4;
        out[part * 16 + i] = scale * float(q - 32);
      }
    }
  }
}

template <int64_t KIND>
void unpack_row(const uint8_t* row, int64_t columns, float* out) {
  for (int64_t i = 0; i < columns; i += weights_of(KIND), row += bytes_of(KIND))
    unpack_block<KIND>(row, out + i);
}

// Calls with the kind as a constant.
template <class Call>
inline void dispatch(int64_t kind, Call call) {
  switch (kind) {
#define KIND_OF(NAME) \
  case NAME:          \
    return call(std::integral_constant<int64_t, NAME>{});
    KIND_OF(F32)
    KIND_OF(F16)
    KIND_OF(BF16)
    KIND_OF(Q4_0) KIND_OF(Q4_1) KIND_OF(Q5_0) KIND_OF(Q5_1) KIND_OF(Q8_0) KIND_OF(Q4_K)
        KIND_OF(Q5_K) KIND_OF(Q6_K)
#undef KIND_OF
  }
}

// A vector as whole numbers
// ------------------------------------------------------------------------

// Whether a processor multiplies four bytes by four at a time. Others multiply pairs of sixteen
// bits.
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
#define BLOCKS_BY_BYTES 1
constexpr bool BY_BYTES = true;
#else
constexpr bool BY_BYTES = false;
#endif

// x[i] = scale[i / 32] * number[i], as near as sixteen bits come.
struct Factors {
  int16_t* number;     // [columns]
  int8_t *high, *low;  // BY_BYTES, in place of that: number = 256 * high + low
  float *scale, *sum;  // [columns / 32]: the sum of the x that this holds
  float* half_sum;     // [columns / 16]
  float* pairs;        // [columns / 32, 2]: scale and sum
};

constexpr float MOST = 127 * 256 + 127;

// Floats that a vector's factors take.
constexpr int64_t factors_size(int64_t columns) { return columns / 2 + columns / GROUP * 6 + 64; }

inline Factors factors_at(float* room, int64_t columns) {
  int16_t* numbers = reinterpret_cast<int16_t*>(room);
  int8_t* bytes = reinterpret_cast<int8_t*>(room);
  float* floats = room + (columns / 2 + 15) / 16 * 16;
  const int64_t groups = columns / GROUP;
  return {numbers,
          bytes,
          bytes + columns,
          floats,
          floats + groups,
          floats + 2 * groups,
          floats + 4 * groups};
}

inline void make_factors(const float* x, int64_t columns, const Factors& to) {
  for (int64_t g = 0; g < columns / GROUP; ++g) {
    const float* from = x + g * GROUP;
    float most = 0, unlike = 0;
#pragma omp simd reduction(max : most) reduction(+ : unlike)
    for (int i = 0; i < GROUP; ++i) {
      const float size = from[i] < 0 ? -from[i] : from[i];
      most = most > size ? most : size;
      unlike += from[i] * 0.0f;  // NaN if one is NaN or infinite, which `most` may miss
    }
    const float scale = most / MOST + unlike, factor = most > 0 ? MOST / most : 0.0f;
    int32_t numbers[GROUP], sums[2] = {};
#pragma omp simd
    for (int i = 0; i < GROUP; ++i) {
      const float whole = from[i] * factor;
      numbers[i] = int32_t(whole + (whole < 0 ? -0.5f : 0.5f));
    }
#pragma omp simd
    for (int i = 0; i < GROUP; ++i) {
      const int32_t high = (numbers[i] + 128) >> 8;
      if (BY_BYTES) {
        to.high[g * GROUP + i] = int8_t(high);
        to.low[g * GROUP + i] = int8_t(numbers[i] - high * 256);
      } else {
        to.number[g * GROUP + i] = int16_t(numbers[i]);
      }
    }
    for (int part = 0; part < 2; ++part)
      for (int i = 0; i < 16; ++i) sums[part] += numbers[part * 16 + i];
    to.scale[g] = scale;
    to.sum[g] = scale * float(sums[0] + sums[1]);
    to.pairs[2 * g] = scale;
    to.pairs[2 * g + 1] = to.sum[g];
    to.half_sum[2 * g] = scale * float(sums[0]);
    to.half_sum[2 * g + 1] = scale * float(sums[1]);
  }
}

// A row times the vector
// ---------------------------------------------------------------------------

#if defined(__AVX2__) && defined(__FMA__)
#define BLOCKS_MULTIPLY 1

inline __m256i load32(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

// 32 of q times those of x, from `at` on, added up to eight: by lane, those of the first 16 where
// FIRST says, and those of the others.
#if defined(BLOCKS_BY_BYTES)
constexpr bool FIRST[8] = {true, true, true, true, false, false, false, false};

inline __m256i times_bytes(__m256i sum, __m256i q, const int8_t* x) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return _mm256_dpbusd_epi32(sum, q, load32(x));
#else
  return _mm256_dpbusd_avx_epi32(sum, q, load32(x));
#endif
}

inline __m256i times(__m256i q, const Factors& x, int64_t at) {
  const __m256i upper = times_bytes(_mm256_setzero_si256(), q, x.high + at);
  return times_bytes(_mm256_slli_epi32(upper, 8), q, x.low + at);
}

inline __m256i times_apart(__m256i q, const Factors& x, int64_t at) { return times(q, x, at); }
#else
constexpr bool FIRST[8] = {true, true, false, false, true, true, false, false};

inline __m256i times_half(__m128i q, const int16_t* x) {
  return _mm256_madd_epi16(_mm256_cvtepu8_epi16(q), load32(x));
}

inline __m256i times(__m256i q, const Factors& x, int64_t at) {  // of which no lane is of one half
  return _mm256_add_epi32(times_half(_mm256_castsi256_si128(q), x.number + at),
                          times_half(_mm256_extracti128_si256(q, 1), x.number + at + 16));
}

inline __m256i times_apart(__m256i q, const Factors& x, int64_t at) {
  return _mm256_hadd_epi32(times_half(_mm256_castsi256_si128(q), x.number + at),
                           times_half(_mm256_extracti128_si256(q, 1), x.number + at + 16));
}
#endif

inline __m256 scaled(__m256 sum, __m256i product, __m256 scale) {
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), scale, sum);
}

inline float lanes_sum(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The bits of a word as bytes, 16 where a bit is set.
inline __m256i sixteens(uint32_t bits) {
  const __m256i spread = _mm256_shuffle_epi8(
      _mm256_set1_epi32(int(bits)),
      _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303));
  const __m256i one = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  return _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(spread, one), one),
                          _mm256_set1_epi8(16));
}

// Blocks of 32: q of one as bytes.
template <int64_t KIND>
inline __m256i whole(const uint8_t* block) {
  if constexpr (KIND == Q8_0) {
    return _mm256_xor_si256(load32(block + 2), _mm256_set1_epi8(int8_t(0x80)));
  } else {
    constexpr bool FIVE = KIND == Q5_0 || KIND == Q5_1;
    const uint8_t* rest = block + (KIND == Q4_1 || KIND == Q5_1 ? 4 : 2);
    const __m128i both = _mm_loadu_si128((const __m128i*)(rest + (FIVE ? 4 : 0)));
    const __m256i nibbles =
        _mm256_and_si256(_mm256_set_m128i(_mm_srli_epi16(both, 4), both), _mm256_set1_epi8(15));
    return FIVE ? _mm256_or_si256(nibbles, sixteens(word(rest))) : nibbles;
  }
}

template <int64_t KIND>
inline void ask_ahead(const uint8_t* block) {
  for (int64_t line = 0; line < bytes_of(KIND); line += 64)
    __builtin_prefetch(block + AHEAD + line, 0, 3);
}

template <int64_t KIND>
inline float dot_of_groups(const uint8_t* row, const Factors& x, int64_t columns) {
  constexpr bool LEAST = KIND == Q4_1 || KIND == Q5_1;
  constexpr float BIAS = KIND == Q8_0 ? 128 : KIND == Q5_0 ? 16 : 8;
  constexpr int CHAINS = 2;  // so that one sum need not wait for another
  __m256 sums[CHAINS] = {};
  float rest[CHAINS] = {};
  const int64_t groups = columns / GROUP;
  auto one = [&](int64_t g, int chain) {
    const uint8_t* block = row + g * bytes_of(KIND);
    const float d = half(block);
    const __m256i product = times(whole<KIND>(block), x, g * GROUP);
    sums[chain] = scaled(sums[chain], product, _mm256_set1_ps(d * x.scale[g]));
    rest[chain] += (LEAST ? half(block + 2) : d) * x.sum[g];
  };
  int64_t g = 0;
  for (; g + CHAINS <= groups; g += CHAINS) {
    ask_ahead<KIND>(row + g * bytes_of(KIND));
    ask_ahead<KIND>(row + (g + 1) * bytes_of(KIND));
#pragma GCC unroll 2
    for (int chain = 0; chain < CHAINS; ++chain) one(g + chain, chain);
  }
  if (g < groups) one(g, 0);
  return lanes_sum(_mm256_add_ps(sums[0], sums[1])) + (rest[0] + rest[1]) * (LEAST ? 1.0f : -BIAS);
}

inline __m256 lane(__m256 v, int index) {
  return _mm256_permutevar8x32_ps(v, _mm256_set1_epi32(index));
}

inline __m256 bytes_as_floats(const uint8_t* from) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}

// Q4_K, Q5_K
template <int64_t KIND>
inline float dot_of_fours(const uint8_t* row, const Factors& x, int64_t columns) {
  __m256 sums[2] = {}, rest = {};
  const __m256i four = _mm256_set1_epi8(15), bit = _mm256_set1_epi8(16);
  for (int64_t b = 0; b < columns / SUPER; ++b) {
    const uint8_t* block = row + b * bytes_of(KIND);
    ask_ahead<KIND>(block);
    const Sixes both = sixes(block + 4);
    const __m256 scale =
        _mm256_mul_ps(_mm256_mul_ps(bytes_as_floats(both.scales), _mm256_set1_ps(half(block))),
                      _mm256_loadu_ps(x.scale + b * 8));
    rest = _mm256_fmadd_ps(
        _mm256_mul_ps(bytes_as_floats(both.minima), _mm256_set1_ps(half(block + 2))),
        _mm256_loadu_ps(x.sum + b * 8), rest);
    __m256i fifth = KIND == Q5_K ? load32(block + 16) : _mm256_setzero_si256();
    const uint8_t* nibbles = block + (KIND == Q5_K ? 48 : 16);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const __m256i packed = load32(nibbles + pair * 32);
      __m256i q[2] = {_mm256_and_si256(packed, four),
                      _mm256_and_si256(_mm256_srli_epi16(packed, 4), four)};
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int g = pair * 2 + i;
        if (KIND == Q5_K) {
          const __m256i moved =
              g < 4 ? _mm256_slli_epi16(fifth, 4 - g) : _mm256_srli_epi16(fifth, g - 4);
          q[i] = _mm256_or_si256(q[i], _mm256_and_si256(moved, bit));
        }
        sums[i] = scaled(sums[i], times(q[i], x, b * SUPER + g * GROUP), lane(scale, g));
      }
    }
  }
  return lanes_sum(_mm256_sub_ps(_mm256_add_ps(sums[0], sums[1]), rest));
}

inline float dot_of_sixes(const uint8_t* row, const Factors& x, int64_t columns) {
  __m256 sums[2] = {}, rest = {};
  const __m256i four = _mm256_set1_epi8(15), two = _mm256_set1_epi8(0x30);
  const __m256i twice[2] = {_mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3),
                            _mm256_setr_epi32(4, 4, 5, 5, 6, 6, 7, 7)};
  for (int64_t b = 0; b < columns / SUPER; ++b) {
    const uint8_t* block = row + b * bytes_of(Q6_K);
    ask_ahead<Q6_K>(block);
    const __m256 d = _mm256_set1_ps(half(block + 208));
    const __m256 scale_of_x = _mm256_loadu_ps(x.scale + b * 8);
#pragma GCC unroll 2
    for (int part = 0; part < 2; ++part) {  // of 128
      const __m128i eight = _mm_loadl_epi64((const __m128i*)(block + 192 + part * 8));
      __m256 scale = _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)), d);
      rest = _mm256_fmadd_ps(scale, _mm256_loadu_ps(x.half_sum + b * 16 + part * 8), rest);
      scale = _mm256_mul_ps(scale, _mm256_permutevar8x32_ps(scale_of_x, twice[part]));
      const __m256i upper = load32(block + 128 + part * 32);
      const __m256i packed[2] = {load32(block + part * 64), load32(block + part * 64 + 32)};
#pragma GCC unroll 4
      for (int g = 0; g < 4; ++g) {
        const __m256i nibbles = g < 2 ? packed[g % 2] : _mm256_srli_epi16(packed[g % 2], 4);
        const __m256i pair = g == 0   ? _mm256_slli_epi16(upper, 4)
                             : g == 1 ? _mm256_slli_epi16(upper, 2)
                             : g == 2 ? upper
                                      : _mm256_srli_epi16(upper, 2);
        const __m256i q =
            _mm256_or_si256(_mm256_and_si256(nibbles, four), _mm256_and_si256(pair, two));
        const int64_t at = b * SUPER + (part * 4 + g) * GROUP;
        auto of = [g](int i) { return g * 2 + !FIRST[i]; };
        const __m256i lanes =
            _mm256_setr_epi32(of(0), of(1), of(2), of(3), of(4), of(5), of(6), of(7));
        sums[g % 2] =
            scaled(sums[g % 2], times_apart(q, x, at), _mm256_permutevar8x32_ps(scale, lanes));
      }
    }
  }
  return lanes_sum(_mm256_fmadd_ps(rest, _mm256_set1_ps(-32.0f), _mm256_add_ps(sums[0], sums[1])));
}

// The same of two groups at a time, with vectors of 64 bytes.
#if defined(BLOCKS_BY_BYTES) && defined(__AVX512VNNI__) && defined(__AVX512VL__) && \
    defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__F16C__)
#define BLOCKS_WIDE 1

inline __m512i load64(const void* from) { return _mm512_loadu_si512(from); }

inline __m512i both(__m256i first, __m256i second) {
  return _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

inline __m512i twice(const void* from) { return _mm512_broadcast_i64x4(load32(from)); }

// By 16 bits, those of the first half by one number, of the second by another.
inline __m512i shifts(int first, int second) {
  return both(_mm256_set1_epi16(int16_t(first)), _mm256_set1_epi16(int16_t(second)));
}

inline __m512i times64(__m512i q, const Factors& x, int64_t at) {
  const __m512i upper = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, load64(x.high + at));
  return _mm512_dpbusd_epi32(_mm512_slli_epi32(upper, 8), q, load64(x.low + at));
}

inline __m512 scaled(__m512 sum, __m512i product, __m512 scale) {
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sum);
}

// (a & mask) | b
inline __m512i beside(__m512i a, __m512i mask, __m512i b) {
  return _mm512_ternarylogic_epi32(a, mask, b, 0xea);  // (a & mask) | b
}

// Two of a vector's numbers, each in half of the lanes.
inline __m512 lanes(__m512 v, int first, int second) {
  return _mm512_permutexvar_ps(both(_mm256_set1_epi32(first), _mm256_set1_epi32(second)), v);
}

template <int64_t KIND>
inline __m512i whole64(const uint8_t* block) {
  constexpr int64_t SIZE = bytes_of(KIND);
  if constexpr (KIND == Q8_0) {
    return _mm512_xor_si512(both(load32(block + 2), load32(block + SIZE + 2)),
                            _mm512_set1_epi8(int8_t(0x80)));
  } else {
    constexpr bool FIVE = KIND == Q5_0 || KIND == Q5_1;
    constexpr int64_t HIGH = KIND == Q4_1 || KIND == Q5_1 ? 4 : 2, LOW = HIGH + (FIVE ? 4 : 0);
    auto nibbles = [](const uint8_t* from) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)from));
    };
    const __m256i shift = _mm256_set_m128i(_mm_set1_epi16(4), _mm_setzero_si128());
    const __m512i moved = _mm512_srlv_epi16(both(nibbles(block + LOW), nibbles(block + SIZE + LOW)),
                                            both(shift, shift));
    const __m512i four = _mm512_and_si512(moved, _mm512_set1_epi8(15));
    if (!FIVE) return four;
    const uint64_t bits = word(block + HIGH) | uint64_t(word(block + SIZE + HIGH)) << 32;
    return _mm512_or_si512(four, _mm512_maskz_set1_epi8(bits, 16));
  }
}

template <int64_t KIND>
inline float wide_dot_of_groups(const uint8_t* row, const Factors& x, int64_t columns) {
  constexpr bool LEAST = KIND == Q4_1 || KIND == Q5_1;
  constexpr float BIAS = KIND == Q8_0 ? 128 : KIND == Q5_0 ? 16 : 8;
  constexpr int64_t SIZE = bytes_of(KIND);
  __m512 sums[2] = {};
  __m128 rest = {};
  auto halves = [](const uint8_t* from) {  // of four blocks
    __m128i four = _mm_cvtsi32_si128(short_word(from));
    four = _mm_insert_epi16(four, short_word(from + SIZE), 1);
    four = _mm_insert_epi16(four, short_word(from + 2 * SIZE), 2);
    return _mm_cvtph_ps(_mm_insert_epi16(four, short_word(from + 3 * SIZE), 3));
  };
  const int64_t groups = columns / GROUP;
  int64_t g = 0;
  for (; g + 4 <= groups; g += 4) {
    const uint8_t* block = row + g * SIZE;
    for (int64_t line = 0; line < 4 * SIZE; line += 64)
      __builtin_prefetch(block + AHEAD + line, 0, 3);
    const __m128 d = halves(block);
    rest = _mm_fmadd_ps(LEAST ? halves(block + 2) : d, _mm_loadu_ps(x.sum + g), rest);
    const __m512 scale = _mm512_castps128_ps512(_mm_mul_ps(d, _mm_loadu_ps(x.scale + g)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i)
      sums[i] =
          scaled(sums[i], times64(whole64<KIND>(block + 2 * i * SIZE), x, (g + 2 * i) * GROUP),
                 lanes(scale, 2 * i, 2 * i + 1));
  }
  const float sum = _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) +
                    (rest[0] + rest[1] + rest[2] + rest[3]) * (LEAST ? 1.0f : -BIAS);
  if (g == groups) return sum;
  Factors last = x;
  last.high += g * GROUP, last.low += g * GROUP, last.scale += g, last.sum += g;
  return sum + dot_of_groups<KIND>(row + g * SIZE, last, columns - g * GROUP);
}

// Q4_K, Q5_K
template <int64_t KIND>
inline float wide_dot_of_fours(const uint8_t* row, const Factors& x, int64_t columns) {
  __m512 sums[2] = {}, rest = {};
  const __m512i four = _mm512_set1_epi8(15), bit = _mm512_set1_epi8(16), nibble = shifts(0, 4);
  // Numbers in the upper half of a byte stay there, and their scale is a sixteenth.
  const __m512i either = both(_mm256_set1_epi8(15), _mm256_set1_epi8(int8_t(0xf0)));
  const float less = KIND == Q4_K ? 0.0625f : 1.0f;
  const __m512 factors = _mm512_setr_ps(1, 1, less, 1, 1, 1, less, 1, 1, 1, less, 1, 1, 1, less, 1);
  for (int64_t b = 0; b < columns / SUPER; ++b) {
    const uint8_t* block = row + b * bytes_of(KIND);
    ask_ahead<KIND>(block);
    const Sixes told = sixes(block + 4);
    const __m128i mixed = _mm_unpacklo_epi8(_mm_loadl_epi64((const __m128i*)told.scales),
                                            _mm_loadl_epi64((const __m128i*)told.minima));
    const __m512 d = _mm512_cvtph_ps(_mm256_set1_epi32(int(word(block))));
    // Scale and minimum of one group after another, times the scale and the sum of its x.
    const __m512 scale = _mm512_mul_ps(
        _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(mixed)), _mm512_mul_ps(d, factors)),
        _mm512_loadu_ps(x.pairs + b * 16));
    rest = _mm512_add_ps(rest, scale);
    const uint8_t* nibbles = block + (KIND == Q5_K ? 48 : 16);
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const int g = pair * 2;
      __m512i q = twice(nibbles + pair * 32);
      if constexpr (KIND == Q5_K) {
        const __m512i fifth = twice(block + 16);
        const __m512i moved = pair < 2 ? _mm512_sllv_epi16(fifth, shifts(4 - g, 3 - g))
                                       : _mm512_srlv_epi16(fifth, shifts(g - 4, g - 3));
        q = beside(_mm512_srlv_epi16(q, nibble), four, _mm512_and_si512(moved, bit));
      } else {
        q = _mm512_and_si512(q, either);
      }
      sums[pair % 2] = scaled(sums[pair % 2], times64(q, x, b * SUPER + g * GROUP),
                              lanes(scale, 2 * g, 2 * g + 2));
    }
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1])) -
         _mm512_mask_reduce_add_ps(0xaaaa, rest);
}

inline float wide_dot_of_sixes(const uint8_t* row, const Factors& x, int64_t columns) {
  __m512 sums[2] = {}, rest = {};
  const __m512i four = _mm512_set1_epi8(15), two = _mm512_set1_epi8(0x30);
  const __m512i each = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
  for (int64_t b = 0; b < columns / SUPER; ++b) {
    const uint8_t* block = row + b * bytes_of(Q6_K);
    ask_ahead<Q6_K>(block);
    const __m128i told = _mm_loadu_si128((const __m128i*)(block + 192));
    const __m512 unscaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(told)),
                                          _mm512_set1_ps(half(block + 208)));  // of each 16
    rest = _mm512_fmadd_ps(unscaled, _mm512_loadu_ps(x.half_sum + b * 16), rest);
    const __m512 of_x = _mm512_castps256_ps512(_mm256_loadu_ps(x.scale + b * 8));
    const __m512 scale = _mm512_mul_ps(unscaled, _mm512_permutexvar_ps(each, of_x));
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {  // of groups
      const __m512i packed = load64(block + pair / 2 * 64),
                    upper = twice(block + 128 + pair / 2 * 32);
      const __m512i nibbles = pair % 2 ? _mm512_srli_epi16(packed, 4) : packed;
      const __m512i moved = pair % 2 ? _mm512_srlv_epi16(upper, shifts(0, 2))
                                     : _mm512_sllv_epi16(upper, shifts(4, 2));
      const __m512i q = beside(nibbles, four, _mm512_and_si512(moved, two));
      auto of = [pair](int i) { return _mm_set1_epi32(pair * 4 + i); };
      const __m512i lanes = both(_mm256_set_m128i(of(1), of(0)), _mm256_set_m128i(of(3), of(2)));
      sums[pair % 2] = scaled(sums[pair % 2], times64(q, x, b * SUPER + pair * 64),
                              _mm512_permutexvar_ps(lanes, scale));
    }
  }
  return _mm512_reduce_add_ps(
      _mm512_fmadd_ps(rest, _mm512_set1_ps(-32.0f), _mm512_add_ps(sums[0], sums[1])));
}
#endif

constexpr bool MULTIPLIES = true;

template <int64_t KIND>
inline float dot(const uint8_t* row, const Factors& x, int64_t columns) {
#if defined(BLOCKS_WIDE)
  if constexpr (KIND == Q4_K || KIND == Q5_K)
    return wide_dot_of_fours<KIND>(row, x, columns);
  else if constexpr (KIND == Q6_K)
    return wide_dot_of_sixes(row, x, columns);
  else
    return wide_dot_of_groups<KIND>(row, x, columns);
#else
  if constexpr (KIND == Q4_K || KIND == Q5_K)
    return dot_of_fours<KIND>(row, x, columns);
  else if constexpr (KIND == Q6_K)
    return dot_of_sixes(row, x, columns);
  else
    return dot_of_groups<KIND>(row, x, columns);
#endif
}
#else
constexpr bool MULTIPLIES = false;
template <int64_t KIND>
inline float dot(const uint8_t*, const Factors&, int64_t) {
  return 0;
}
#endif

// Whether rows of a kind are multiplied as they lie.
constexpr bool multiplies(int64_t kind) { return MULTIPLIES && weights_of(kind) > 1; }

}  // namespace blocks

// Steps 2 to 4 of a tick on a CPU, where nothing is captured: how bright rows are, which of them go,
// and the patch. PyTorch makes some two hundred small steps of it, which cost more to call than to
// do.
//
// The twins in PyTorch, and the meaning of every step, are in score.py, finite.py and patch.py;
// `tick_cpu.py` calls this. One thread: it is done before another would have woken up.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "exponential.h"

namespace {

constexpr int64_t NOWHERE = -1;  // twin: state.py

int64_t count_of(const uint8_t* valid, int64_t capacity) {
  int64_t count = 0;
  for (int64_t slot = 0; slot < capacity; ++slot) count += valid[slot];
  return count;
}

template <class Bits>
bool is_finite(const void* numbers, int64_t count, Bits exponent) {
  const Bits* bits = static_cast<const Bits*>(numbers);
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= (bits[i] & exponent) != exponent;
  return finite;
}

struct Row {
  float score;
  int64_t position, slot;
};

// The lower score first, of equal ones the earlier position.
inline bool before(const Row& a, const Row& b) {
  return a.score < b.score || (a.score == b.score && a.position < b.position);
}

}  // namespace

// Twin: `brighten` in score.py. All rows: [capacity].
extern "C" void brighten(int64_t capacity, const uint8_t* valid, const float* brightness,
                         const int64_t* lit, const int64_t* tick, const float* mass, float decay,
                         float gain, float maximum, float* brighter, int64_t* lit_now) {
  const float count = count_of(valid, capacity);
  const int64_t now = *tick;
  for (int64_t slot = 0; slot < capacity; ++slot) {
    const float scaled = mass[slot] * count;
    const float sum = decay * brightness[slot] + gain * scaled;
    const float held = sum < 0.0f ? 0.0f : sum > maximum ? maximum : sum;  // NaN stays NaN
    brighter[slot] = valid[slot] ? held : 0.0f;
    lit_now[slot] = valid[slot] && scaled > 1.0f ? now : lit[slot];
  }
}

// Twin: `echo` in score.py.
extern "C" void echo(int64_t capacity, const uint8_t* valid, const int64_t* position,
                     const float* novelty, const int64_t* at, const float* strength,
                     float log_decay, float* louder) {
  for (int64_t slot = 0; slot < capacity; ++slot) {
    const int64_t distance = *at - position[slot];
    const bool gains = valid[slot] && distance > 0;
    const float share = exponential(gains ? float(distance) * log_decay : 0.0f);
    louder[slot] = novelty[slot] + (gains ? share * *strength : 0.0f);
  }
}

// Twin: `decide_cull` in score.py, of at most two rows.
extern "C" void decide_cull(int64_t capacity, const uint8_t* valid, const uint8_t* pinned,
                            const int64_t* position, const int64_t* at, const float* keep_scores,
                            int64_t target, int64_t sinks, int64_t recent, uint8_t* cull,
                            int64_t* culled) {
  const int64_t count = count_of(valid, capacity), newest = *at - recent;
  const int64_t wanted = count < target ? 0 : count == target ? 1 : 2;
  std::memset(cull, 0, capacity);
  culled[0] = culled[1] = NOWHERE;
  if (target == 0 || wanted == 0) return;
  const Row none{std::numeric_limits<float>::infinity(), std::numeric_limits<int64_t>::max(), -1};
  Row lowest[2] = {none, none};
  for (int64_t slot = 0; slot < capacity; ++slot) {
    if (!valid[slot] || pinned[slot] || position[slot] < sinks || position[slot] > newest) continue;
    const float score = keep_scores[slot];
    const Row row{score != score ? -std::numeric_limits<float>::infinity() : score, position[slot],
                  slot};
    if (before(row, lowest[0])) {
      lowest[1] = lowest[0];
      lowest[0] = row;
    } else if (before(row, lowest[1])) {
      lowest[1] = row;
    }
  }
  for (int64_t i = 0; i < wanted && lowest[i].slot >= 0; ++i) {
    cull[lowest[i].slot] = 1;
    culled[i] = lowest[i].position;
  }
}

// Twin: `not_finite` in finite.py, of parts in four bytes a number (float32) or two (bfloat16).
extern "C" int64_t not_finite(int64_t parts, const void* const* numbers, const int64_t* counts,
                              const int64_t* widths) {
  int64_t flags = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const bool finite = widths[i] == 4
                            ? is_finite<uint32_t>(numbers[i], counts[i], 0x7f800000)
                            : is_finite<uint16_t>(numbers[i], counts[i], 0x7f80);
    flags |= int64_t(!finite) << i;
  }
  return flags;
}

// Filled in by tick_cpu.py: the order and width of the fields are a contract between the two.
struct Column {
  void* held;           // [capacity] of the mirror, or [1] of the cursor
  const void* updated;  // as many, or null: the rows that are there keep what they have
  const void* rows;     // [W], of the new ones
  int64_t width;        // bytes of one
};

struct Patch {
  int64_t capacity, tokens;            // W
  int64_t planes, row_bytes;           // layers * kv_heads; of one row of keys in one of them
  int64_t columns, cursor_columns;
  void *keys, *values;                 // [planes, capacity, row]
  const void *new_keys, *new_values;   // [planes, W, row]
  const Column* column;                // of the mirror, but for `valid`
  const Column* cursor;
  uint8_t* valid;                      // [capacity]
  const uint8_t* cull;                 // [capacity]
  const int64_t* length;               // of the W rows so many are written
  const int64_t* not_finite;           // nothing is changed unless it is 0
};

namespace {

inline char* at(void* from, int64_t index, int64_t width) {
  return static_cast<char*>(from) + index * width;
}
inline const char* at(const void* from, int64_t index, int64_t width) {
  return static_cast<const char*>(from) + index * width;
}

// Row `from` of the new ones into a slot.
void write_row(const Patch& p, int64_t from, int64_t slot) {
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    const int64_t to = plane * p.capacity + slot, read = plane * p.tokens + from;
    std::memcpy(at(p.keys, to, p.row_bytes), at(p.new_keys, read, p.row_bytes), p.row_bytes);
    std::memcpy(at(p.values, to, p.row_bytes), at(p.new_values, read, p.row_bytes), p.row_bytes);
  }
  for (int64_t i = 0; i < p.columns; ++i) {
    const Column& column = p.column[i];
    std::memcpy(at(column.held, slot, column.width), at(column.rows, from, column.width),
                column.width);
  }
  p.valid[slot] = 1;
}

}  // namespace

// Twin: `patch` in patch.py, of a tick's plan. It cannot fail, and no signal's handler runs within
// it.
extern "C" void patch(const Patch* patch) {
  const Patch& p = *patch;
  if (*p.not_finite) return;
  for (int64_t i = 0; i < p.columns; ++i) {
    const Column& column = p.column[i];
    if (column.updated) std::memcpy(column.held, column.updated, p.capacity * column.width);
  }
  for (int64_t slot = 0; slot < p.capacity; ++slot) p.valid[slot] &= !p.cull[slot];
  int64_t slot = 0;
  for (int64_t row = 0; row < *p.length; ++row) {  // into the lowest free slots
    while (slot < p.capacity && p.valid[slot]) ++slot;
    if (slot == p.capacity) break;  // the host has made room
    write_row(p, row, slot);
  }
  for (int64_t i = 0; i < p.cursor_columns; ++i) {
    const Column& column = p.cursor[i];
    std::memcpy(column.held, column.updated, column.width);
  }
}

// Bytes of the arguments of `patch`: whoever fills them in compares.
extern "C" int64_t arguments_size() { return sizeof(Patch); }

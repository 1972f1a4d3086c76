// What is spoken after some logits, on a CPU: the draw (penalty, temperature, top-k, top-p, min-p and
// Gumbel noise) and the surprise of what was drawn, where PyTorch makes some three hundred small
// steps.
//
// The twins in PyTorch, and the meaning of every step, are `draw` and `surprises` in sample.py;
// `draw_cpu.py` calls this. One thread: it is done before another would have woken up.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "exponential.h"

namespace {

// Filled in by draw_cpu.py: the order and width of the fields are a contract between the two.
struct Draw {
  int64_t rows, vocab, capacity;
  int64_t greedy, top_k, nucleus;
  const float* logits;       // [rows, vocab]
  const int64_t* token_id;   // [capacity]
  const uint8_t* valid;      // [capacity]
  const int64_t* tokens;     // [rows]: row i was read behind the first i + 1 of them
  const int64_t* tick;       // [1]: of row 0; each row is a tick later
  const float* temperature;  // [1] each
  const float* top_p;
  const float* min_p;
  const float* penalty;
  const int64_t* key;     // [2]
  const int64_t* forced;  // [rows]: taken instead of a draw where it is not negative
  int64_t* token;         // [rows]
  float* surprise;        // [rows], nats
  float* extremes;        // [rows, 2]: the least and the greatest logit, NaN if there is any
};

struct Candidate {
  float score;
  int64_t id;
};

// The higher score first; of equal ones the lower id.
inline bool before(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// Philox4x32-10 of (key; tick, id, 0), as a number in (0, 1). Twin: `uniform` in philox.py.
double uniform(const int64_t* key, int64_t tick, int64_t id) {
  uint32_t c0 = uint32_t(tick), c1 = uint32_t(uint64_t(tick) >> 32), c2 = uint32_t(id), c3 = 0;
  uint32_t k0 = uint32_t(key[0]), k1 = uint32_t(key[1]);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t(c0) * 0xD2511F53u, product1 = uint64_t(c2) * 0xCD9E8D57u;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const uint64_t bits = ((uint64_t(c0) << 20) ^ c1) & ((uint64_t(1) << 52) - 1);
  return (double(bits) + 0.5) * 0x1p-52;
}

constexpr int64_t BLOCK = 64;

// Scores of a block of ids: logits, lowered where a token was seen, over the temperature.
inline void score(const Draw& d, const float* logits, const uint8_t* seen, int64_t first,
                  int64_t count, float temperature, float* scores) {
  const float penalty = *d.penalty;
  for (int64_t i = 0; i < count; ++i) {
    const float logit = logits[first + i];
    const float lowered = logit > 0 ? logit / penalty : logit * penalty;
    scores[i] = (seen[first + i] ? lowered : logit) / temperature;
  }
}

// Every token with a score; the likeliest first, and where `sorts` all in order. NaN is none.
std::vector<Candidate> all(const Draw& d, const float* logits, const uint8_t* seen,
                           float temperature, bool sorts) {
  std::vector<Candidate> found;
  found.reserve(d.vocab);
  float scores[BLOCK];
  for (int64_t first = 0; first < d.vocab; first += BLOCK) {
    const int64_t count = std::min(BLOCK, d.vocab - first);
    score(d, logits, seen, first, count, temperature, scores);
    for (int64_t i = 0; i < count; ++i)
      if (!std::isnan(scores[i])) found.push_back({scores[i], first + i});
  }
  if (sorts)
    std::sort(found.begin(), found.end(), before);
  else if (!found.empty())
    std::iter_swap(found.begin(), std::min_element(found.begin(), found.end(), before));
  return found;
}

// The `most` candidates that come before all others, in order. NaN is none.
std::vector<Candidate> best(const Draw& d, const float* logits, const uint8_t* seen, int64_t most,
                            float temperature) {
  std::vector<Candidate> heap;  // the last of them on top
  heap.reserve(most);
  float scores[BLOCK];
  for (int64_t first = 0; first < d.vocab; first += BLOCK) {
    const int64_t count = std::min(BLOCK, d.vocab - first);
    score(d, logits, seen, first, count, temperature, scores);
    const bool full = int64_t(heap.size()) == most;
    if (full) {
      const float least = heap.front().score;
      int any = 0;
      for (int64_t i = 0; i < count; ++i) any |= scores[i] > least;
      if (!any) continue;
    }
    for (int64_t i = 0; i < count; ++i) {
      const Candidate candidate{scores[i], first + i};
      if (std::isnan(candidate.score)) continue;
      if (int64_t(heap.size()) == most) {
        if (!before(candidate, heap.front())) continue;
        std::pop_heap(heap.begin(), heap.end(), before);
        heap.pop_back();
      }
      heap.push_back(candidate);
      std::push_heap(heap.begin(), heap.end(), before);
    }
  }
  std::sort_heap(heap.begin(), heap.end(), before);
  return heap;
}

// Of those that top-p and min-p leave, the one with the largest score and noise. The first of them
// is the likeliest; for top-p they are in order.
int64_t likeliest(const Draw& d, const std::vector<Candidate>& found, int64_t tick) {
  const size_t count = found.size();
  std::vector<float> probabilities(count);
  float total = 0;
  for (size_t i = 0; i < count; ++i)
    total += probabilities[i] = std::exp(found[i].score - found[0].score);
  int64_t drawn = count ? found[0].id : 0;
  double most = -std::numeric_limits<double>::infinity();
  float so_far = 0;
  for (size_t i = 0; i < count; ++i) {
    const float probability = probabilities[i] / total;
    // The smallest set that reaches top_p: a token stays while those before it fall short.
    if (d.nucleus && !(so_far < *d.top_p)) break;
    so_far += probability;
    if (!(probability >= *d.min_p * (probabilities[0] / total))) continue;
    const double noise = -std::log(-std::log(uniform(d.key, tick, found[i].id)));
    if (found[i].score + noise > most) {
      most = found[i].score + noise;
      drawn = found[i].id;
    }
  }
  return drawn;
}

// What is taken in, whatever is drawn: the extremes, and how unexpected `token` was.
void measure(const Draw& d, const float* logits, int64_t token, float* surprise, float* extremes) {
  float least = logits[0], most = logits[0];
  int broken = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(| : broken)
  for (int64_t i = 0; i < d.vocab; ++i) {
    least = logits[i] < least ? logits[i] : least;
    most = logits[i] > most ? logits[i] : most;
    broken |= logits[i] != logits[i];
  }
  const float nothing = std::numeric_limits<float>::quiet_NaN();
  extremes[0] = broken ? nothing : least;
  extremes[1] = broken ? nothing : most;
  double total = 0;
  for (int64_t first = 0; first < d.vocab; first += BLOCK) {
    float sum = 0;
    const int64_t last = std::min(first + BLOCK, d.vocab);
#pragma omp simd reduction(+ : sum)
    for (int64_t i = first; i < last; ++i) sum += exponential(logits[i] - most);
    total += sum;
  }
  *surprise = broken ? nothing : float(std::log(total) + (most - logits[token]));
}

}  // namespace

extern "C" void draw(const Draw* given) {
  const Draw& d = *given;
  std::vector<uint8_t> seen(d.vocab);
  for (int64_t slot = 0; slot < d.capacity; ++slot)
    if (d.valid[slot]) seen[d.token_id[slot]] = 1;
  for (int64_t row = 0; row < d.rows; ++row) {
    seen[d.tokens[row]] = 1;
    const float* logits = d.logits + row * d.vocab;
    if (d.forced[row] >= 0) {
      d.token[row] = d.forced[row];
    } else if (d.greedy) {
      const std::vector<Candidate> found = best(d, logits, seen.data(), 1, 1.0f);
      d.token[row] = found.empty() ? 0 : found[0].id;
    } else {
      const bool some = 0 < d.top_k && d.top_k < d.vocab;
      const std::vector<Candidate> found =
          some ? best(d, logits, seen.data(), d.top_k, *d.temperature)
               : all(d, logits, seen.data(), *d.temperature, d.nucleus);
      d.token[row] = likeliest(d, found, *d.tick + row);
    }
    measure(d, logits, d.token[row], d.surprise + row, d.extremes + 2 * row);
  }
}

// Bytes of the arguments: whoever fills them in compares.
extern "C" int64_t arguments_size() { return sizeof(Draw); }

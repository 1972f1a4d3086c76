// How many threads a call gets, learned from the calls before it.

#pragma once

#include <cmath>
#include <cstdint>

// Beside other busy processes all threads wait for the one that is not running, so fewer may be
// faster. No sum depends on how many there are, so what pays is found by trying: some sizes are
// timed in turn, and the fastest is kept for a while. Nothing is tried as long as threads hardly
// wait for each other.
class TeamSize {
 public:
  // Threads of the next call.
  int64_t next(int64_t wanted) {
    if (wanted != most) {
      *this = TeamSize();
      most = size = wanted;
    }
    return size;
  }

  // What became of it: its time, the share of it that its threads slept, and the work it did.
  void learn(double time, double asleep, double work) {
    if (trying) return compare(time / work);
    waited += (asleep - waited) / 8;
    const bool doubtful = size < most || waited > CROWDED;
    if (!doubtful || ++calls < CALLS_KEPT) return;
    trying = true, least = INFINITY;
    take(most);
  }

 private:
  static constexpr int64_t TRIES = 4, CALLS_KEPT = 64;
  static constexpr double CROWDED = 0.2;

  void take(int64_t threads) { size = threads, calls = 0, cost = 0; }

  void compare(double call) {
    if (calls++ > 0) cost += call;  // the first of a size finds its processors
    if (calls <= TRIES) return;
    if (cost < least) least = cost, best = size;
    if (size > 1) return take(smaller());
    trying = false, waited = 0;
    take(best);
  }

  // One fewer than all, half, a quarter, …, one.
  int64_t smaller() const {
    if (size == most && most > 2) return most - 1;
    return size > most / 2 ? most / 2 : size / 2;
  }

  int64_t most = 0, size = 0, best = 0;
  bool trying = false;
  int64_t calls = 0;  // of this size
  double waited = 0;  // the share, lately
  double cost = 0, least = 0;
};

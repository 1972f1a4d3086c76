// The exponential function of numbers that are not positive, as loops over many of them need it.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// e^x for x <= 0, to some 2 units in the last place; 0 where float32 has no normal number for it.
inline float exponential(float x) {
  constexpr float LEAST = -87.0f;
  const float clamped = x > LEAST ? x : LEAST;  // NaN, too: it has no integer
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
  const uint32_t bits = uint32_t(int32_t(turns) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x >= LEAST ? series * power : x != x ? x : 0.0f;
}

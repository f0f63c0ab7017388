// The exponential of what is not positive, in a form that compilers vectorise.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

/// 2^n for -126 <= n <= 127.
inline float power_of_two(int32_t n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return power;
}

/// exp(x) for x <= 0, to an ulp or two where it is a normal number.
inline float exponential(float x) {
  const float clamped = std::max(x, -110.0f);  // of which nothing is left
  const int32_t n = static_cast<int32_t>(clamped * 1.44269504f - 0.5f);
  const float whole = static_cast<float>(n);
  float rest = clamped - whole * 0.693359375f;  // ln 2 in two parts
  rest = rest + whole * 2.12194440e-4f;
  float series = 1.0f / 5040;
  series = series * rest + 1.0f / 720;
  series = series * rest + 1.0f / 120;
  series = series * rest + 1.0f / 24;
  series = series * rest + 1.0f / 6;
  series = (series * rest + 0.5f) * rest;
  series = (series + 1) * rest + 1;
  const int32_t half = n >> 1;
  return series * power_of_two(half) * power_of_two(n - half);
}

// How a number is widened for the formula, and rounded after it.
#pragma once

#include "common.h"

namespace {

struct BFloat16 {
  uint16_t bits;
};

template <class T> struct Number {
  using Wide = T;
  static Wide widen(T value) { return value; }
  static T round(Wide value) { return value; }
};

template <> struct Number<BFloat16> {
  using Wide = float;
  static float widen(BFloat16 value) {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
  static BFloat16 round(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint32_t nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;
    return {static_cast<uint16_t>(is_nan ? 0x7FC0u : nearest)};
  }
};

}  // namespace

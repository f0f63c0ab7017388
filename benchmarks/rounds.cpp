// The kernel of masks.cpp beside the same kernel with two rounds of the hash: see rounds.py.

#include "drop.h"

namespace {

struct Three {
  uint32_t key1, multiplier;  // the latter is that of examples

  uint32_t operator()(uint32_t z) const { return before_last(z, key1) * ROUND3; }
};

struct Two {
  uint32_t key1, multiplier;

  uint32_t operator()(uint32_t z) const {
    z = (z ^ (z >> 17)) * ROUND1 + key1;
    return (z ^ (z >> 11)) * ROUND2;
  }
};

}  // namespace

DROP(three, float, Three)
DROP(two, float, Two)

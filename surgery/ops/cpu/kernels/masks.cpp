// The mask of a whole batch: see drop.h.

#include "drop.h"

namespace {

struct Batch {
  uint32_t key1, multiplier;  // the latter is that of examples

  uint32_t operator()(uint32_t z) const { return before_last(z, key1) * ROUND3; }
};

}  // namespace

DROP(float32, float, Batch)
DROP(float64, double, Batch)
DROP(bfloat16, BFloat16, Batch)

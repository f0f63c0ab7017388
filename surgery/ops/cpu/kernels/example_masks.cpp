// The mask of one example of a batch: see drop.h. A library of its own, since few need it.

#include "drop.h"

namespace {

struct Example {
  uint32_t key1, multiplier;

  uint32_t operator()(uint32_t z) const { return shared_by_examples(z, key1).bits(multiplier); }
};

}  // namespace

DROP(float32, float, Example)
DROP(float64, double, Example)
DROP(bfloat16, BFloat16, Example)

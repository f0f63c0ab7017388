// Rows of a weight that lie elsewhere in the whole: see drop.h and part.py.

#include "drop.h"

namespace {

/// With the multiplier ROUND3 these are the bits of a batch.
struct Example {
  uint32_t key1, multiplier;

  uint32_t operator()(uint32_t z) const { return shared_by_examples(z, key1).bits(multiplier); }
};

}  // namespace

#define DROP_ROWS(name, T)                                                                         \
  extern "C" void drop_rows_##name(                                                                \
      const T *weight, const T *anchor, const T *grad, T *used, T *masked_grad,                    \
      const uint32_t *key, const int32_t *threshold, const Number<T>::Wide *scale, int64_t start,  \
      uint32_t multiplier, int64_t count, int64_t width, int64_t stride, int threads) {            \
    if (count == 0) return;                                                                        \
    const int64_t grain = std::max<int64_t>(1, (1 << 13) / width);                                 \
    in_parallel(count / width, grain, threads, [&](int64_t begin, int64_t end) {                   \
      Drop<T, Example> drop{weight, anchor, grad, used, masked_grad, key[0],                       \
                            Example{key[1], multiplier}, *threshold, *scale, 0};                   \
      for (int64_t row = begin; row < end; ++row) {                                                \
        drop.start = static_cast<uint32_t>(start + row * (stride - width));                        \
        drop.part(row * width, (row + 1) * width);                                                 \
      }                                                                                            \
    });                                                                                            \
  }

DROP_ROWS(float32, float)
DROP_ROWS(float64, double)
DROP_ROWS(bfloat16, BFloat16)

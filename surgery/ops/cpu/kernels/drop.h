// The masked weight of mask.py, and beside it the masked gradient: one pass over memory, one hash.
//
// What they are is defined by `masked_formula`; tests compare the two bit by bit.
#pragma once

#include "numbers.h"

namespace {

// The masked weight, and beside it the masked gradient

/// `Hash`: from where an index enters to its bits.
template <class T, class Hash> struct Drop {
  using Wide = typename Number<T>::Wide;
  const T *weight, *anchor, *grad;
  T *used;
  T *masked_grad;
  uint32_t key0;
  Hash hash;
  int32_t threshold;
  Wide scale;
  uint32_t start;  // index of the first weight

  /// Weights [begin, end).
  template <bool Anchor, bool Used, bool Grad> void part(int64_t begin, int64_t end) const {
    constexpr int64_t BLOCK = 1 << 12;  // a 32-bit counter inside
    // Copies: for all the compiler knows, what is stored may be a member.
    const Hash hashed = hash;
    const int32_t least = threshold;
    const Wide factor = scale, towards = 1 - scale;
    for (int64_t at = begin; at < end; at += BLOCK) {
      const int count = static_cast<int>(std::min(BLOCK, end - at));
      const uint32_t base = (start + static_cast<uint32_t>(at)) * STEP + key0;
      const T *w = weight + at, *a = anchor + at, *g = grad + at;
      T *u = used + at, *m = masked_grad + at;
#pragma GCC ivdep
      for (int i = 0; i < count; ++i) {
        const uint32_t bits = hashed(base + static_cast<uint32_t>(i) * STEP);
        const bool keep = static_cast<int32_t>(bits) >= least;
        if (Used) {
          const Wide dropped = Anchor ? Number<T>::widen(a[i]) : Wide(0);
          const Wide scaled = Number<T>::widen(w[i]) * factor;
          const Wide kept = Anchor ? scaled + dropped * towards : scaled;
          u[i] = Number<T>::round(keep ? kept : dropped);
        }
        if (Grad) {
          const Wide kept = Number<T>::widen(g[i]) * factor;
          m[i] = Number<T>::round(keep ? kept : Wide(0));
        }
      }
    }
  }

  /// The same with what there is.
  void part(int64_t begin, int64_t end) const {
    if (!grad) return anchor ? part<true, true, false>(begin, end) : part<false, true, false>(begin, end);
    if (!used) return part<false, false, true>(begin, end);
    return anchor ? part<true, true, true>(begin, end) : part<false, true, true>(begin, end);
  }

  void run(int64_t count, int threads) const {
    in_parallel(count, 1 << 13, threads, [&](int64_t begin, int64_t end) { part(begin, end); });
  }
};

}  // namespace

#define DROP(name, T, Hash)                                                                        \
  extern "C" void drop_##name(                                                                     \
      const T *weight, const T *anchor, const T *grad, T *used, T *masked_grad,                    \
      const uint32_t *key, const int32_t *threshold, const Number<T>::Wide *scale, int64_t start,  \
      uint32_t multiplier, int64_t count, int threads) {                                           \
    Drop<T, Hash>{weight, anchor, grad, used, masked_grad, key[0], Hash{key[1], multiplier},       \
                  *threshold, *scale, static_cast<uint32_t>(start)}                                \
        .run(count, threads);                                                                      \
  }

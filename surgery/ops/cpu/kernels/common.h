// What the kernels share: the hash of hash.py, and threads.
//
// Only the C++ standard library, so that compiling takes a second or two. See native.py for the flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr uint32_t STEP = 0x9E3779B9u;
constexpr uint32_t ROUND1 = 0xED5AD4BBu, ROUND2 = 0xAC4C1B51u, ROUND3 = 0x31848BABu;

// `Word` is uint32_t, or a vector of them.

/// All of the hash but its last product.
template <class Word> inline Word before_last(Word z, uint32_t key1) {
  z = (z ^ (z >> 17)) * ROUND1 + key1;
  z = (z ^ (z >> 11)) * ROUND2;
  return z ^ (z >> 15);
}

/// What the masks of all examples have in common.
template <class Word> struct Shared {
  Word first, second;

  /// Of the example with that multiplier: (z ^ (second & (multiplier ^ ROUND3))) * multiplier.
  Word bits(uint32_t multiplier) const { return (first ^ (second & multiplier)) * multiplier; }
};

template <class Word> inline Shared<Word> shared_by_examples(Word z, uint32_t key1) {
  z = before_last(z, key1);
  Word second = z * ROUND3;
  second ^= second >> 16;
  return {z ^ (second & ROUND3), second};
}

/// Calls `work(begin, end)` on parts of [0, count) that begin at multiples of `grain`.
template <class Work> void in_parallel(int64_t count, int64_t grain, int threads, Work work) {
  const int64_t grains = (count + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>(threads, grains));
  if (threads <= 1) return work(int64_t{0}, count);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int part = 0; part < threads; ++part)
    work(grains * part / threads * grain, std::min(count, grains * (part + 1) / threads * grain));
}

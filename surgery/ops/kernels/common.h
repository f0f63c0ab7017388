// What the kernels share: the hash of hash.py, and threads.
//
// Only the C++ standard library, so that compiling takes a second or two. See native.py for the flags.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

constexpr uint32_t STEP = 0x9E3779B9u, ROUND1 = 0x7FEB352Du;

/// All of the hash but its last product. `Word` is uint32_t, or a vector of them.
template <class Word> inline Word before_last(Word z, uint32_t key1) {
  z = (z ^ (z >> 16)) * ROUND1 + key1;
  return z ^ (z >> 15);
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

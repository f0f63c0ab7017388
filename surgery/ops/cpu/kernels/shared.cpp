// Weights that share mask entries (unit="input", "output", "tensor"): `masked_formula` with a mask of
// fewer entries. Tests compare the two bit by bit.

#include "numbers.h"

namespace {

/// Four dimensions of a weight, the last one dense, and how far apart their mask entries are: 0 where they
/// share one. In the last dimension that is 0 or 1.
struct Shape {
  const int64_t *size, *apart;

  /// The mask entry of the first weight of a row.
  int64_t entry(int64_t row) const {
    int64_t found = 0;
    for (int dim = 2; dim >= 0; --dim) {
      found += row % size[dim] * apart[dim];
      row /= size[dim];
    }
    return found;
  }
};

template <class T> struct Values {
  using Wide = typename Number<T>::Wide;
  const T *weight, *anchor;
  T *used;
  Wide scale;

  /// So many weights, of which `keep(i)` says whether weight i is kept.
  template <bool Anchor, class Keep> void part(int64_t at, int64_t count, Keep keep) const {
    const Wide factor = scale, towards = 1 - scale;
    const T *w = weight + at, *a = anchor + at;
    T *u = used + at;
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      const Wide dropped = Anchor ? Number<T>::widen(a[i]) : Wide(0);
      const Wide scaled = Number<T>::widen(w[i]) * factor;
      const Wide kept = Anchor ? scaled + dropped * towards : scaled;
      u[i] = Number<T>::round(keep(i) ? kept : dropped);
    }
  }

  template <class Keep> void part(int64_t at, int64_t count, Keep keep) const {
    anchor ? part<true>(at, count, keep) : part<false>(at, count, keep);
  }
};

template <class T>
void drop_shared(const Values<T> &values, const uint32_t *key, int32_t threshold, Shape shape, int threads) {
  const uint32_t key0 = key[0], key1 = key[1];
  const int64_t width = shape.size[3], count = shape.size[0] * shape.size[1] * shape.size[2] * width;
  const auto kept = [=](uint32_t entry) {
    return static_cast<int32_t>(before_last(entry * STEP + key0, key1) * ROUND3) >= threshold;
  };
  in_parallel(count, 1 << 13, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t row = at / width, column = at % width, some = std::min(width - column, end - at);
      const uint32_t first = static_cast<uint32_t>(shape.entry(row));
      if (shape.apart[3] == 0) {
        const bool keep = kept(first);
        values.part(at, some, [=](int64_t) { return keep; });
      } else {
        const uint32_t from = first + static_cast<uint32_t>(column);
        values.part(at, some, [=](int64_t i) { return kept(from + static_cast<uint32_t>(i)); });
      }
      at += some;
    }
  });
}

}  // namespace

#define DROP_SHARED(name, T)                                                                        \
  extern "C" void drop_shared_##name(const T *weight, const T *anchor, T *used, const uint32_t *key, \
                                     const int32_t *threshold, const Number<T>::Wide *scale,         \
                                     const int64_t *size, const int64_t *apart, int threads) {       \
    drop_shared(Values<T>{weight, anchor, used, *scale}, key, *threshold, Shape{size, apart}, threads); \
  }

DROP_SHARED(float32, float)
DROP_SHARED(float64, double)
DROP_SHARED(bfloat16, BFloat16)

// What the masks of a weight, shared by all rows of an example, do to outputs: `weighted_gram` of
// grams.py. The derivatives by a weight, of every example and output, never exist as a whole.

#include "common.h"
#include "vectors.h"

#include <vector>

namespace {

constexpr int WIDE = LANES == 16 ? 2 : 1;  // vectors of a weight's row that are held in registers
constexpr int64_t STRIDE = WIDE * LANES;
constexpr int TOGETHER = 8;  // derivatives of so many (row of the weight, output) are computed at once

struct Sizes {
  int64_t outputs, examples, rows, out, in, padded;
};

/// to[k][i] = sum over t of from[t][k] * x[t][i] for TOGETHER values of k.
inline void derivatives(const float *from, const float *x, float *to, const Sizes &of) {
  for (int64_t i = 0; i < of.padded; i += STRIDE) {
    Floats sums[TOGETHER][WIDE] = {};
    for (int64_t t = 0; t < of.rows; ++t) {
      const float *own = from + t * TOGETHER, *at = x + t * of.padded + i;
      Floats values[WIDE];
      for (int v = 0; v < WIDE; ++v) values[v] = load(at + v * LANES);
      for (int k = 0; k < TOGETHER; ++k)
        for (int v = 0; v < WIDE; ++v)
          sums[k][v] = fused(splat(own[k]), values[v], sums[k][v]);
    }
    for (int k = 0; k < TOGETHER; ++k)
      for (int v = 0; v < WIDE; ++v) store(to + k * of.padded + i + v * LANES, sums[k][v]);
  }
}

/// The sums over i of square[i] * d[a][i] * d[b][i] for b <= a, added to sums[a][b].
inline void products(const float *d, const float *square, float *sums, const Sizes &of) {
  const int64_t count = of.outputs, width = of.padded;
  for (int64_t a = 0; a < count; ++a)
    for (int64_t b = 0; b <= a; b += 4) {
      Floats own[4] = {};
      const int64_t some = std::min<int64_t>(4, count - b);
      const float *others[4];
      for (int64_t k = 0; k < 4; ++k) others[k] = d + (b + std::min(k, some - 1)) * width;
      for (int64_t i = 0; i < width; i += LANES) {
        const Floats at = load(d + a * width + i) * load(square + i);
        for (int k = 0; k < 4; ++k) own[k] = fused(at, load(others[k] + i), own[k]);
      }
      for (int64_t k = 0; k < some && b + k <= a; ++k) sums[a * count + b + k] += total(own[k]);
    }
}

}  // namespace

/// out[r][a][b] = sum over o, i of square[o][i] * d_a[o][i] * d_b[o][i] with the derivatives
/// d_a[o][i] = sum over t of by[a][r][t][o] * x[r][t][i].
extern "C" void weighted_gram(const float *by, const float *x, const float *square, float *out,
                              int64_t outputs, int64_t examples, int64_t rows, int64_t features_out,
                              int64_t features_in, int threads) {
  const int64_t padded = (features_in + STRIDE - 1) / STRIDE * STRIDE;
  const Sizes of{outputs, examples, rows, features_out, features_in, padded};
  const int64_t parts = (of.out + TOGETHER - 1) / TOGETHER;  // of an example, TOGETHER rows each
  const int64_t chunk = std::max<int64_t>(1, (parts + 7) / 8), chunks = (parts + chunk - 1) / chunk;
  const int64_t pairs = outputs * outputs;
  std::vector<float> sums(examples * chunks * pairs);
  in_parallel(examples * chunks, 1, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> inputs(rows * padded), packed(rows * TOGETHER);
    std::vector<float> found(outputs * TOGETHER * padded), weights(padded);
    int64_t packed_example = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t example = task / chunks, first = task % chunks * chunk * TOGETHER;
      const int64_t last = std::min(of.out, first + chunk * TOGETHER);
      if (example != packed_example)
        for (int64_t t = 0; t < rows; ++t)
          std::copy_n(x + (example * rows + t) * of.in, of.in, inputs.data() + t * padded);
      packed_example = example;
      for (int64_t row = first; row < last; row += TOGETHER) {
        const int64_t some = std::min<int64_t>(TOGETHER, last - row);
        // (row of the weight, output) in this order, TOGETHER at a time
        for (int64_t k = 0; k < outputs * TOGETHER; k += TOGETHER) {
          for (int64_t j = 0; j < TOGETHER; ++j) {
            const int64_t own = (k + j) / outputs, output = (k + j) % outputs;
            const float *from = by + (output * examples + example) * rows * of.out + row + own;
            for (int64_t t = 0; t < rows; ++t)
              packed[t * TOGETHER + j] = own < some ? from[t * of.out] : 0.0f;
          }
          derivatives(packed.data(), inputs.data(), found.data() + k * padded, of);
        }
        for (int64_t own = 0; own < some; ++own) {
          std::copy_n(square + (row + own) * of.in, of.in, weights.data());
          products(found.data() + own * outputs * padded, weights.data(), &sums[task * pairs], of);
        }
      }
    }
  });
  std::fill_n(out, examples * pairs, 0.0f);
  for (int64_t task = 0; task < examples * chunks; ++task) {
    float *to = out + task / chunks * pairs;
    for (int64_t a = 0; a < outputs; ++a)
      for (int64_t b = 0; b <= a; ++b) to[a * outputs + b] += sums[task * pairs + a * outputs + b];
  }
  for (int64_t example = 0; example < examples; ++example)
    for (int64_t a = 0; a < outputs; ++a)
      for (int64_t b = 0; b < a; ++b)
        out[example * pairs + b * outputs + a] = out[example * pairs + a * outputs + b];
}

// Mean and variance of functions of Gaussians that are independent of each other: the formulas of
// independent.py, in one pass where those take ten to thirty. Tests compare both.

#include "common.h"
#include "exponential.h"

#include <cmath>
#include <limits>

namespace {

/// The density at t >= 0 and the probability above it: phi(t) and 1 - Phi(t).
struct Tail {
  float density, above;
};

/// Mills' ratio (1 - Phi) / phi is a Chebyshev series in (t - 3) / (t + 3), by 1 + t; interpolated at 200
/// nodes with 40 digits; relative error below 2e-8.
inline Tail tail(float t) {
  const float y = (t - 3) / (t + 3), twice = 2 * y;
  const float b10 = 2.923700631e-07f;
  const float b9 = twice * b10 + 3.502925453e-07f;
  const float b8 = twice * b9 - b10 - 6.358788760e-06f;
  const float b7 = twice * b8 - b9 - 1.115834180e-05f;
  const float b6 = twice * b7 - b8 + 1.728511084e-04f;
  const float b5 = twice * b6 - b7 + 9.479933484e-05f;
  const float b4 = twice * b5 - b6 - 5.941318104e-03f;
  const float b3 = twice * b4 - b5 + 2.894271301e-02f;
  const float b2 = twice * b3 - b4 - 4.602520716e-02f;
  const float b1 = twice * b2 - b3 - 1.556837737e-01f;
  const float mills = (y * b1 - b2 + 1.178456823f) / (1 + t);
  const float density = 0.398942280f * exponential(-0.5f * t * t);
  return {density, density * mills};
}

inline float clamped(float t) { return t >= 50 ? 50.0f : t; }  // NaN stays

/// Calls `work(begin, end)` for rows, some at a time.
template <class Work> void by_rows(int64_t rows, int64_t width, int threads, Work work) {
  in_parallel(rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, width)), threads, work);
}

}  // namespace

/// Of u if it is positive, else slope * u.
extern "C" void leaky_relu_moments(const float *mean, const float *variance, float *first,
                                   float *second, float *gain, float slope, int64_t count,
                                   int threads) {
  const float rest = 1 - slope;
  in_parallel(count, 1 << 10, threads, [=](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float m = mean[i], v = variance[i], size = std::fabs(m), sd = std::sqrt(v);
      const Tail at = tail(clamped(size / (sd > 0 ? sd : 1e-30f)));
      const float added = sd * at.density - size * at.above;
      const float small = (m * m + v) * at.above - size * sd * at.density - added * added;
      const float positive = m > 0 ? 1 - at.above : at.above;
      const float of_relu = small + (m > 0 ? v * (1 - 2 * at.above) : 0.0f);
      const float total = slope * slope * v + rest * rest * of_relu + 2 * slope * rest * v * positive;
      first[i] = slope * m + rest * ((m > 0 ? m : 0.0f) + added);
      second[i] = total < 0 ? 0.0f : total;
      if (gain) gain[i] = slope + rest * positive;
    }
  });
}

extern "C" void gelu_moments(const float *mean, const float *variance, float *first, float *second,
                             float *gain, int64_t count, int threads) {
  in_parallel(count, 1 << 10, threads, [=](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float m = mean[i], v = variance[i];
      const float narrower = 1 / (1 + v), inverse = std::sqrt(narrower), z = m * inverse;
      const Tail at = tail(clamped(std::fabs(z)));
      const float below = z > 0 ? 1 - at.above : at.above;
      const float falling = z * at.density * narrower, slope = below + falling;
      const float bend = 1 + narrower - z * z * narrower, density = at.density * inverse;
      const float third = (bend + 2 * narrower) * falling, second_term = density * bend;
      const float inner = 0.5f * second_term * second_term + v * third * third * (1.0f / 6);
      first[i] = below * m + v * density;
      second[i] = (slope * slope + v * inner) * v;
      if (gain) gain[i] = slope;
    }
  });
}

/// (x - its mean, or not) / root of the expected square, by row; then times weight, plus bias.
extern "C" void norm_moments(const float *mean, const float *variance, const float *weight,
                             const float *bias, float *first, float *second, float eps, int centred,
                             int64_t rows, int64_t width, int threads) {
  const float share = 1.0f / static_cast<float>(width), one = centred ? share : 0.0f;
  by_rows(rows, width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *m = mean + row * width, *v = variance + row * width;
      float *to = first + row * width, *moved = second + row * width;
      float total = 0, spread = 0, square = 0, along = 0, twice = 0;
#pragma omp simd reduction(+ : total, spread)
      for (int64_t i = 0; i < width; ++i) total += m[i], spread += v[i];
      const float centre = centred ? total * share : 0.0f;
#pragma omp simd reduction(+ : square)
      for (int64_t i = 0; i < width; ++i) square += (m[i] - centre) * (m[i] - centre);
      const float inverse = 1 / std::sqrt((square + spread * (1 - one)) * share + eps);
#pragma omp simd reduction(+ : along, twice)
      for (int64_t i = 0; i < width; ++i) {
        const float y = (m[i] - centre) * inverse;
        to[i] = y;
        along += v[i] * y, twice += v[i] * y * y;
      }
      const float constant = one * share * spread, linear = 2 * one * share * along;
      const float quadratic = share * share * twice;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) {
        const float y = to[i], scale = weight ? weight[i] : 1.0f, by = inverse * scale;
        const float own = 1 - 2 * one - 2 * share * y * y;
        const float all = v[i] * own + constant + y * (linear + y * quadratic);
        to[i] = y * scale + (bias ? bias[i] : 0.0f);
        moved[i] = (all < 0 ? 0.0f : all) * by * by;
      }
    }
  });
}

/// softmax(m + w / 2) and its variance, by row; see `softmax` of independent.py.
extern "C" void softmax_moments(const float *mean, const float *variance, float *first,
                                float *second, int64_t rows, int64_t width, int threads) {
  by_rows(rows, width, threads, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float *m = mean + row * width, *v = variance + row * width;
      float *to = first + row * width, *moved = second + row * width;
      const float least = -std::numeric_limits<float>::infinity();
      float largest = least, sum = 0, common = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < width; ++i) largest = std::max(largest, m[i]);
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += to[i] = exponential(m[i] - largest);
      const float inverse = 1 / sum;
#pragma omp simd reduction(+ : common)
      for (int64_t i = 0; i < width; ++i) {
        const float share = to[i] * inverse;
        moved[i] = share == share ? share : 0.0f;
        common += moved[i] * moved[i] * v[i];
      }
      largest = least;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < width; ++i) {
        const float share = moved[i], spread = v[i] * (1 - 2 * share) + common;
        const float some = spread < 0 ? 0.0f : spread;
        moved[i] = share * share * some;
        to[i] = m[i] + 0.5f * some;
        largest = std::max(largest, to[i]);
      }
      sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < width; ++i) sum += to[i] = exponential(to[i] - largest);
      const float by = 1 / sum;
#pragma GCC ivdep
      for (int64_t i = 0; i < width; ++i) to[i] *= by;
    }
  });
}

// Gaussian pre-activations: what a kink of an activation adds to its expectation, `excess` of expect.py,
// in one pass where that takes twenty; and a draw, of gaussian.py, in one where that takes six. Tests
// compare each with those, and `excess` with erfcx in float64.

#include "common.h"
#include "exponential.h"

#include <cmath>

namespace {

/// (1 + t^2) * (1 - t * M(t)) for t >= 0, where M is Mills' ratio (1 - Phi) / phi: a Chebyshev series in
/// (t - 4) / (t + 4), interpolated at 400 nodes with 40 digits; relative error below 6e-8.
inline float scaled_tail(float t) {
  const float y = (t - 4) / (t + 4), twice = 2 * y;
  // Clenshaw's recurrence, by hand: a loop over coefficients keeps the outer one from being vectorised
  const float b12 = 6.869403535e-08f;
  const float b11 = twice * b12 - 9.779440688e-07f;
  const float b10 = twice * b11 - b12 - 3.784210776e-07f;
  const float b9 = twice * b10 - b11 + 2.639518425e-05f;
  const float b8 = twice * b9 - b10 - 6.738337834e-05f;
  const float b7 = twice * b8 - b9 - 4.980695085e-04f;
  const float b6 = twice * b7 - b8 + 4.911893513e-03f;
  const float b5 = twice * b6 - b7 - 2.145192958e-02f;
  const float b4 = twice * b5 - b6 + 5.723431706e-02f;
  const float b3 = twice * b4 - b5 - 8.957011253e-02f;
  const float b2 = twice * b3 - b4 + 4.126950726e-02f;
  const float b1 = twice * b2 - b3 + 1.114946529e-01f;
  return y * b1 - b2 + 8.966519833e-01f;
}

}  // namespace

/// sd * (phi(t) - t * (1 - Phi(t))) for t = |mean| / sd, and 0 where sd is 0; to which `rectified` adds
/// max(mean, 0).
extern "C" void excess(const float *mean, const float *variance, float *out, int rectified,
                       int64_t count, int threads) {
  in_parallel(count, 1 << 10, threads, [=](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float sd = std::sqrt(variance[i]);
      const float some = sd > 0 ? sd : 1.0f;
      const float ratio = std::fabs(mean[i]) / some;
      const float t = ratio >= 50 ? 50.0f : ratio;  // NaN stays
      const float density = 0.398942280f * exponential(-0.5f * t * t);
      const float added = sd * density * (scaled_tail(t) / (1 + t * t));
      out[i] = rectified ? (mean[i] <= 0 ? 0.0f : mean[i]) + added : added;  // NaN stays
    }
  });
}

/// mean <- mean + sd * noise with sd^2 = ratio * variance, and variance <- the derivative of that by the
/// variance, 0 where sd is 0.
extern "C" void sample(float *mean, float *variance, const float *noise, const float *ratio,
                       int64_t count, int threads) {
  const float factor = *ratio, half = 0.5f * factor;
  in_parallel(count, 1 << 10, threads, [=](int64_t begin, int64_t end) {
#pragma GCC ivdep
    for (int64_t i = begin; i < end; ++i) {
      const float sd = std::sqrt(variance[i] * factor);
      const float slope = noise[i] * half / (sd > 0 ? sd : 1.0f);
      mean[i] = mean[i] + sd * noise[i];
      variance[i] = sd > 0 ? slope : 0.0f;
    }
  });
}

// Products with a mask for each row of x: example_product.py, where each example has few rows. The
// masked weights of all rows never exist; a mask is drawn in registers, next to where it is used.
//
// What they are is defined by the blocks of example_product.py; tests compare the two.

#include "common.h"
#include "vectors.h"

#include <type_traits>
#include <vector>

namespace {

typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

inline Words lane_steps() {
  Words steps = {};
  for (int lane = 0; lane < LANES; ++lane) steps[lane] = lane * STEP;
  return steps;
}

/// All ones where a vector of weights is kept.
inline Ints keeps(const Shared<Words> &shared, uint32_t multiplier, int32_t threshold) {
  return (Ints)shared.bits(multiplier) >= threshold;
}

inline Floats where(Ints keep, Floats kept, Floats dropped) {
  return (Floats)((keep & (Ints)kept) | (~keep & (Ints)dropped));
}

inline Floats where(Ints keep, Floats kept) { return (Floats)(keep & (Ints)kept); }

struct Masks {
  const uint32_t *key;
  int32_t threshold;
  const uint32_t *multipliers;  // of each row of x
};

struct Weight {
  const float *kept, *dropped;  // what is used where kept, and where dropped (null: zero)
  int64_t outputs, inputs;

  uint32_t start(int64_t output) const { return static_cast<uint32_t>(output * inputs) * STEP; }
};

/// out[r][o] = scale * sum over i of x[r][i] * W_r[o][i], where W_r has the mask of row r.
struct Product {
  const float *x;
  Weight weight;
  Masks masks;
  float scale;
  float *out;
  int64_t rows;
  std::vector<float> packed;  // x as [block][vector][row in block][lane], zeros at the end

  template <int Rows> void pack(int64_t first, float *to) const {
    for (int64_t i = 0; i < weight.inputs; i += LANES)
      for (int row = 0; row < Rows; ++row, to += LANES)
        store(to, load_some(x + (first + row) * weight.inputs + i, weight.inputs - i));
  }

  template <int Rows, bool Anchor>
  void block(int64_t first, const float *packed_x, int64_t begin, int64_t end) const {
    const Words steps = lane_steps() + masks.key[0];
    uint32_t multipliers[Rows];
    std::copy_n(masks.multipliers + first, Rows, multipliers);
    for (int64_t output = begin; output < end; ++output) {
      const float *kept = weight.kept + output * weight.inputs;
      const float *dropped = weight.dropped + output * weight.inputs;
      const float *from = packed_x;
      Floats sums[Rows] = {};
      Words indices = steps + weight.start(output);
      auto shared = shared_by_examples(indices, masks.key[1]);
      auto add = [&](Floats w, Floats a) {
        // Started before it is needed: the hash is a chain of products, each of which waits for one.
        indices += LANES * STEP;
        const auto next = shared_by_examples(indices, masks.key[1]);
        for (int row = 0; row < Rows; ++row, from += LANES) {
          const Ints keep = keeps(shared, multipliers[row], masks.threshold);
          sums[row] = fused(load(from), Anchor ? where(keep, w, a) : where(keep, w), sums[row]);
        }
        shared = next;
      };
      int64_t i = 0;
      for (; i + LANES <= weight.inputs; i += LANES)
        add(load(kept + i), Anchor ? load(dropped + i) : Floats{});
      if (i < weight.inputs)
        add(load_some(kept + i, weight.inputs - i),
            Anchor ? load_some(dropped + i, weight.inputs - i) : Floats{});
      for (int row = 0; row < Rows; ++row)
        out[(first + row) * weight.outputs + output] = scale * total(sums[row]);
    }
  }

  /// Blocks of 16 rows, then what is left in blocks of 8, 4, 2 and 1.
  template <class Visit> void each_block(Visit visit) const {
    const int64_t vectors = (weight.inputs + LANES - 1) / LANES;
    int64_t row = 0;
    auto visit_all = [&](auto size) {
      for (; row + size() <= rows; row += size()) visit(size, row, row * vectors * LANES);
    };
    visit_all(std::integral_constant<int, 16>());
    visit_all(std::integral_constant<int, 8>());
    visit_all(std::integral_constant<int, 4>());
    visit_all(std::integral_constant<int, 2>());
    visit_all(std::integral_constant<int, 1>());
  }

  void run(int threads) {
    packed.resize(rows * ((weight.inputs + LANES - 1) / LANES) * LANES);
    each_block([&](auto size, int64_t row, int64_t at) { pack<size()>(row, packed.data() + at); });
    in_parallel(weight.outputs, 1, threads, [&](int64_t begin, int64_t end) {
      each_block([&](auto size, int64_t row, int64_t at) {
        if (weight.dropped) return block<size(), true>(row, packed.data() + at, begin, end);
        return block<size(), false>(row, packed.data() + at, begin, end);
      });
    });
  }
};

/// of_x[r][i] = scale_x * sum over o of grad[r][o] * W_r[o][i], and
/// of_weight[o][i] = scale_weight * sum over r of m_r[o][i] * grad[r][o] * x[r][i], of one hash. For finite
/// numbers: what is dropped is multiplied by 0.
struct Gradients {
  const float *grad_columns;  // [o][r]
  const float *x;
  Weight weight;
  Masks masks;
  float scale_x, scale_weight;
  float *of_x, *of_weight;  // null: not wanted
  int64_t rows;

  static constexpr int OUTPUTS = 4;  // at a time, so that sums by x are loaded and stored less often

  template <int Outputs, bool Anchor>
  void outputs(int64_t output, int64_t i, const float *xs, float *sums) const {
    const int64_t count = weight.inputs - i;
    Shared<Words> shared[Outputs];
    Floats kept[Outputs], dropped[Outputs], by_weight[Outputs];
    const float *grads[Outputs];
    for (int o = 0; o < Outputs; ++o) {
      const int64_t at = (output + o) * weight.inputs + i;
      const uint32_t start = weight.start(output + o) + static_cast<uint32_t>(i) * STEP;
      shared[o] = shared_by_examples(lane_steps() + (start + masks.key[0]), masks.key[1]);
      kept[o] = load_some(weight.kept + at, count);
      if (Anchor) dropped[o] = load_some(weight.dropped + at, count);
      by_weight[o] = Floats{};
      grads[o] = grad_columns + (output + o) * rows;
    }
    for (int64_t row = 0; row < rows; ++row) {
      const Floats values = load(xs + row * LANES);
      Floats by_x = load(sums + row * LANES);
      for (int o = 0; o < Outputs; ++o) {
        const Ints keep = keeps(shared[o], masks.multipliers[row], masks.threshold);
        const Floats grad = Floats{} + grads[o][row];
        const Floats kept_grad = where(keep, grad);
        by_x = Anchor ? fused(grad, where(keep, kept[o], dropped[o]), by_x)
                      : fused(kept_grad, kept[o], by_x);
        by_weight[o] = fused(kept_grad, values, by_weight[o]);
      }
      store(sums + row * LANES, by_x);
    }
    for (int o = 0; of_weight && o < Outputs; ++o)
      store_some(of_weight + (output + o) * weight.inputs + i, by_weight[o] * scale_weight, count);
  }

  template <bool Anchor> void columns(int64_t begin, int64_t end) const {
    std::vector<float> xs(rows * LANES), sums(rows * LANES);
    for (int64_t i = begin; i < end; i += LANES) {
      const int64_t count = weight.inputs - i;
      for (int64_t row = 0; row < rows; ++row)
        store(&xs[row * LANES], load_some(x + row * weight.inputs + i, count));
      std::fill(sums.begin(), sums.end(), 0.0f);
      int64_t output = 0;
      for (; output + OUTPUTS <= weight.outputs; output += OUTPUTS)
        outputs<OUTPUTS, Anchor>(output, i, xs.data(), sums.data());
      for (; output < weight.outputs; ++output)
        outputs<1, Anchor>(output, i, xs.data(), sums.data());
      for (int64_t row = 0; of_x && row < rows; ++row)
        store_some(of_x + row * weight.inputs + i, load(&sums[row * LANES]) * scale_x, count);
    }
  }

  void run(int threads) const {
    in_parallel(weight.inputs, LANES, threads, [&](int64_t begin, int64_t end) {
      return weight.dropped ? columns<true>(begin, end) : columns<false>(begin, end);
    });
  }
};

}  // namespace

extern "C" void example_product(
    const float *x, const float *kept, const float *dropped, const uint32_t *key,
    const int32_t *threshold, const float *scale, const uint32_t *multipliers, float *out,
    int64_t rows, int64_t outputs, int64_t inputs, int threads) {
  // beside an anchor, the scale is in `kept`
  Product{x, {kept, dropped, outputs, inputs}, {key, *threshold, multipliers},
          dropped ? 1.0f : *scale, out, rows, {}}
      .run(threads);
}

extern "C" void example_gradients(
    const float *grad_columns, const float *x, const float *kept, const float *dropped,
    const uint32_t *key, const int32_t *threshold, const float *scale, const uint32_t *multipliers,
    float *of_x, float *of_weight, int64_t rows, int64_t outputs, int64_t inputs, int threads) {
  Gradients{grad_columns, x, {kept, dropped, outputs, inputs}, {key, *threshold, multipliers},
            dropped ? 1.0f : *scale, *scale, of_x, of_weight, rows}
      .run(threads);
}

/// `multipliers` of hash.py.
extern "C" void example_multipliers(const uint32_t *key, uint32_t *out, int64_t count) {
  const uint32_t even = ~1u, key0 = key[0] & even, key1 = key[1] & even;
  const auto of = [=](uint32_t example) {
    uint32_t z = (example << 1) * STEP + key1;
    z = (z ^ (z >> 17 & even)) * ROUND1 + key0;
    z = (z ^ (z >> 11 & even)) * ROUND2;
    z = (z ^ (z >> 15 & even)) * ROUND3;
    return z ^ (z >> 16 & even);
  };
  const uint32_t first = of(0) ^ ROUND3;
  for (int64_t example = 0; example < count; ++example) out[example] = of(static_cast<uint32_t>(example)) ^ first;
}

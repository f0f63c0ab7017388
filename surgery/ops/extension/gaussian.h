// A draw from the Gaussian of a Linear's pre-activation, on the GPU: `_GaussianLinear` of
// gaussian_linear.py, and gpu/gaussians.py.
#pragma once

#include "planned.h"

#include <ATen/ops/_unsafe_view.h>

namespace {

PyObject* gaussian_gradients_of = nullptr;  // of Python

/// What the products multiply: see `Factors` of gaussians.py.
struct Factors {
  Tensor x, weight, square_x, square_weight, by_variance;

  /// grad, slope: undefined in forward. False, and nothing is done, where Python has to do it.
  bool make(const Tensor& given, const Tensor& values, const Tensor& anchor, ScalarType type,
            const Tensor& grad, const Tensor& slope, bool of_x, bool of_weight) {
    const bool copies = given.scalar_type() != type || values.scalar_type() != type;
    const Planned* kernel =
        planned({FACTORS, index_of(values), type_of(given), type_of(values), type_of(anchor), type_of(grad),
                 number_of(type), of_x ? given.numel() : 0, of_weight ? values.numel() : 0,
                 grad.defined() ? grad.numel() : 0});
    if (!kernel) return false;
    square_x = at::empty_like(given, given.options().dtype(type));
    square_weight = at::empty_like(values, values.options().dtype(type));
    x = copies ? at::empty_like(square_x) : given;
    weight = copies ? at::empty_like(square_weight) : values;
    if (grad.defined()) by_variance = at::empty_like(grad);
    run(*kernel,
        {&given, &values, &anchor, &grad, &slope, &x, &weight, &square_x, &square_weight, &by_variance},
        nullptr);
    return true;
  }
};

/// The sample, and in `slope` its derivative by the variance. Undefined where Python has to do it.
Tensor gaussian_sample(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& anchor,
                       const Tensor& ratio, const Tensor& noise, ScalarType type, Tensor& slope) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const Planned* draw = planned({DRAW, index_of(weight), number_of(type), type_of(noise), noise.numel()});
  Factors factors;
  if (!draw || !factors.make(x, weight, anchor, type, {}, {}, true, true)) return {};
  Tensor mean = at::linear(factors.x, factors.weight, bias.defined() ? bias.to(type) : bias);
  if (mean.is_view()) mean = at::_unsafe_view(mean, mean.sizes());
  slope = at::linear(factors.square_x, factors.square_weight);
  run(*draw, {&mean, &slope, &noise, &mean, &slope, &ratio}, nullptr);
  return mean;
}

/// total + 2 * value * through: see `add_twice` of gaussians.py.
struct Twice {
  Tensor total, value, through;

  Tensor result() const {
    return total.scalar_type() == value.scalar_type() ? total : at::empty_like(value);
  }
};

/// Of x and weight, where they are wanted. False, and nothing is done, where Python has to do it.
bool gaussian_gradients(const Tensor& rows, const Tensor& slope, const Tensor& x, const Tensor& weight,
                        const Tensor& anchor, bool want_x, bool want_weight, Tensor& of_x,
                        Tensor& of_weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const ScalarType type = rows.scalar_type();
  const Planned* twice =
      planned({ADD_TWICE, index_of(weight), number_of(type), type_of(x), type_of(weight), type_of(anchor),
               want_x ? x.numel() : 0, want_weight ? weight.numel() : 0});
  Factors factors;
  if (!twice || !factors.make(x, weight, anchor, type, rows, slope, want_weight, want_x)) return false;
  Twice by_x, by_weight;
  const Tensor& varied = factors.by_variance;
  if (want_x) by_x = {rows.mm(factors.weight), x, varied.mm(factors.square_weight)};
  if (want_weight) by_weight = {rows.t().mm(factors.x), weight, varied.t().mm(factors.square_x)};
  const Twice &first = want_x ? by_x : by_weight, &second = want_weight ? by_weight : by_x;
  if (want_x) of_x = by_x.result();
  if (want_weight) of_weight = by_weight.result();
  const Tensor &to_x = want_x ? of_x : first.value, &to_weight = want_weight ? of_weight : second.value;
  run(*twice,
      {&first.total, &first.value, &first.through, &to_x, &second.total, &second.value, &anchor,
       &second.through, &to_weight},
      nullptr);
  return true;
}

/// Keeps x, and the derivative of the sample by the variance.
struct GaussianLinear : Keeping {
  Tensor weight;
  ScalarType of_bias = at::kFloat;
  uint32_t version = 0;

  std::string name() const override { return "GaussianLinearBackward"; }

  variable_list gradients_by(const Tensor& grad, const Wanted& want) override {
    const Tensor input = first.unpack(), slope = second.unpack();
    variable_list found(3);
    bool done = is_ordinary(grad, {&input, &slope}) && (want[0] || want[1]) &&
                (weight.is_inference() || weight._version() == version);
    if (done) {
      const Tensor rows = matrix(grad).contiguous(), slopes = matrix(slope), inputs = matrix(input);
      done = fits(rows) && fits(slopes) && fits(inputs) && fits(weight) &&
             gaussian_gradients(rows, slopes, inputs, weight, anchor, want[0], want[1], found[0], found[1]);
      if (done && want[0]) found[0] = found[0].view(input.sizes());
      if (done && want[2]) found[2] = at::sum(rows, 0, false, of_bias);
    }
    if (done) return found;
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr g = wrap(grad), i = wrap(input), s = wrap(slope), w = wrap(weight);
    THPObjectPtr result(PyObject_CallFunction(
        gaussian_gradients_of, "OOOOIO(iii)", g.get(), i.get(), s.get(), w.get(), version, about.object,
        static_cast<int>(want[0]), static_cast<int>(want[1]), static_cast<int>(want[2])));
    if (!result) pass_on();
    return unwrapped(result.get(), want);
  }
};

/// gaussian(x, weight, bias, rest, noise) -> Tensor or None
PyObject* gaussian(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5, "five arguments");
  PyObject *rest = args[3], *a = PyTuple_GET_ITEM(rest, 0), *r = PyTuple_GET_ITEM(rest, 1);
  if (!are_tensors({args[0], args[1], args[2], a, r, args[4]})) Py_RETURN_NONE;
  const Tensor &x = tensor_of(args[0]), &weight = tensor_of(args[1]), &bias = tensor_of(args[2]);
  const Tensor &anchor = tensor_of(a), &ratio = tensor_of(r), &noise = tensor_of(args[4]);
  if (!Weight{weight, anchor}.is_taken() ||
      !fit_together(weight, {&x, &weight, &bias, &anchor, &ratio, &noise})) {
    Py_RETURN_NONE;
  }
  Tensor out;
  {
    pybind11::gil_scoped_release without_gil;
    const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
    const at::DeviceType kind = weight.device().type();
    const bool casts = at::autocast::is_autocast_enabled(kind);
    const ScalarType type = casts ? at::autocast::get_autocast_dtype(kind) : x.scalar_type();
    Tensor slope;
    out = gaussian_sample(x, weight, bias, anchor, ratio, noise, type, slope);
    if (out.defined() && at::GradMode::is_enabled() && requires_grad({&x, &weight, &bias})) {
      auto& node = follow<GaussianLinear>(out, x, weight, bias, anchor, x, slope, rest);
      node.weight = weight;
      node.version = weight.is_inference() ? 0 : weight._version();
      if (bias.defined()) node.of_bias = bias.scalar_type();
    }
  }
  if (!out.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

}  // namespace

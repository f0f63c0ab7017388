// A product with a masked weight for each example, on the GPU: `_Eager` of example_operators.py, and
// gpu/products.py.
#pragma once

#include "planned.h"

#include <ATen/ops/bmm.h>

namespace {

PyObject* example_gradients_of = nullptr;  // of Python

struct Examples {
  int64_t count, each, outputs, inputs;

  Examples(const Tensor& x, const Tensor& weight)
      : count(x.size(0)), each(x.dim() == 3 ? x.size(1) : 1), outputs(weight.size(0)), inputs(weight.size(1)) {}

  /// The rest of a plan.
  void into(Plan& plan) const { plan.insert(plan.end(), {count, each, outputs, inputs}); }
};

const Planned* by_rows(Which which, const Tensor& left, const Tensor& weight, const Tensor& anchor,
                       std::initializer_list<const Tensor*> beside, const Examples& sizes) {
  Plan plan{which, index_of(weight), type_of(left), type_of(weight), type_of(anchor)};
  for (const Tensor* one : beside) plan.push_back(type_of(*one));
  sizes.into(plan);
  return planned(plan);
}

/// Of all examples at once, in one piece of memory.
const Planned* of_block(Which which, const Tensor& from, const Tensor& to, const Tensor& anchor,
                        const Examples& sizes) {
  Plan plan{which, index_of(from), type_of(from), type_of(to), type_of(anchor)};
  sizes.into(plan);
  return planned(plan);
}

/// Undefined, and nothing is done, where Python has to do it.
Tensor example_product(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& anchor,
                       const Mask& mask) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const Examples sizes(x, weight);
  const auto result = [&] {
    auto shape = x.sizes().vec();
    shape.back() = sizes.outputs;
    return at::empty(shape, x.options());
  };
  if (const Planned* kernel = by_rows(PRODUCT, x, weight, anchor, {&bias}, sizes)) {
    const Tensor found = result();
    run(*kernel, {&x, &weight, &anchor, &bias, &found}, &mask);
    return found;
  }
  const Planned* kernel = of_block(MASKED_WEIGHTS, weight, x, anchor, sizes);
  if (!kernel || x.dim() != 3) return {};
  const Tensor used = at::empty({sizes.count, sizes.outputs, sizes.inputs}, x.options());
  run(*kernel, {&weight, &anchor, &used}, &mask);
  Tensor found = result();
  at::bmm_out(found, x, used.transpose(1, 2));
  return bias.defined() ? found.add_(bias) : found;
}

/// The gradients of x and weight, where they are wanted. False, and nothing is done, where Python has to.
bool example_gradients(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& anchor,
                       const Mask& mask, bool want_x, bool want_weight, Tensor& of_x, Tensor& of_weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const Examples sizes(x, weight);
  const Planned* to_x = want_x ? by_rows(INPUT_GRADIENT, grad, weight, anchor, {&x}, sizes) : nullptr;
  const Planned* to_weight = want_weight ? by_rows(WEIGHT_GRADIENT, grad, weight, {}, {&x}, sizes) : nullptr;
  if ((to_x || !want_x) && (to_weight || !want_weight)) {
    if (want_x) {
      of_x = at::empty_like(x);
      run(*to_x, {&grad, &weight, &anchor, &of_x}, &mask);
    }
    if (want_weight) {
      of_weight = at::empty_like(weight);
      run(*to_weight, {&grad, &x, &of_weight}, &mask);
    }
    return true;
  }
  const Planned* weights = want_x ? of_block(MASKED_WEIGHTS, weight, x, anchor, sizes) : nullptr;
  const Planned* sum = want_weight ? of_block(MASKED_SUM, x, weight, {}, sizes) : nullptr;
  if (x.dim() != 3 || (want_x && !weights) || (want_weight && !sum)) return false;
  Tensor block = at::empty({sizes.count, sizes.outputs, sizes.inputs}, x.options());
  if (want_x) {
    run(*weights, {&weight, &anchor, &block}, &mask);
    of_x = at::empty_like(x);
    at::bmm_out(of_x, grad, block);
  }
  if (want_weight) {
    at::bmm_out(block, grad.transpose(1, 2), x);
    of_weight = at::empty_like(weight);
    run(*sum, {&block, &of_weight}, &mask);
  }
  return true;
}

/// Keeps x and the weight.
struct ExampleProduct : Keeping {
  Mask mask{};
  ScalarType of_bias = at::kFloat;

  std::string name() const override { return "ExampleProductBackward"; }

  variable_list gradients_by(const Tensor& given, const Wanted& want) override {
    const Tensor input = first.unpack(), values = second.unpack();
    variable_list found(3);
    bool done = is_ordinary(given, {&input, &values});
    if (done) {
      const Tensor grad = given.contiguous();
      done = fits(grad) && fits(input) && fits(values) &&
             example_gradients(grad, input, values, anchor, mask, want[0], want[1], found[0], found[1]);
    }
    if (!done) {
      pybind11::gil_scoped_acquire gil;
      THPObjectPtr g = wrap(given), i = wrap(input), w = wrap(values);
      THPObjectPtr result(PyObject_CallFunction(example_gradients_of, "OOOO(ii)", g.get(), i.get(), w.get(),
                                                about.object, static_cast<int>(want[0]),
                                                static_cast<int>(want[1])));
      if (!result) pass_on();
      found = unwrapped(result.get(), want);
    }
    if (want[2]) found[2] = at::sum(matrix(given), 0).to(of_bias);
    return found;
  }
};

/// example(x, weight, bias, rest) -> Tensor or None
PyObject* example(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "four arguments");
  PyObject *rest = args[3], *a = PyTuple_GET_ITEM(rest, 0), *told = PyTuple_GET_ITEM(rest, 1);
  if (!are_tensors({args[0], args[1], args[2], a})) Py_RETURN_NONE;
  const Tensor &x = tensor_of(args[0]), &weight = tensor_of(args[1]), &bias = tensor_of(args[2]);
  const Tensor& anchor = tensor_of(a);
  Mask mask{};
  if (!Weight{weight, anchor}.is_taken() || !fit_together(weight, {&x, &weight, &bias, &anchor}) ||
      !read_key(PyTuple_GET_ITEM(told, 0), mask) || !read_law(PyTuple_GET_ITEM(told, 1), weight, mask)) {
    Py_RETURN_NONE;
  }
  Tensor out;
  {
    pybind11::gil_scoped_release without_gil;
    const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
    out = example_product(x, weight, bias, anchor, mask);
    if (out.defined() && at::GradMode::is_enabled() && requires_grad({&x, &weight, &bias})) {
      auto& node = follow<ExampleProduct>(out, x, weight, bias, anchor, x, weight, rest);
      node.mask = mask;
      if (bias.defined()) node.of_bias = bias.scalar_type();
    }
  }
  if (!out.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

}  // namespace

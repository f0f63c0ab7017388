// A masked weight by itself, as a node of autograd: `_DropWeight` of mask.py.
#pragma once

#include "nodes.h"

namespace {

PyObject* weight_gradient_of = nullptr;  // of Python

/// The masked values by the kernel of their type; undefined where there is none.
Tensor masked_values(const Tensor& values, const Tensor& anchor, ScalarType to, const Mask& mask) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const Way way({values, anchor}, to, false, mask.sharing);
  if (!way) return {};
  const Tensor used = at::empty_like(values, values.options().dtype(to));
  if (way.kernel) {
    run(*way.kernel, values, anchor, Tensor(), used, Tensor(), mask);
  } else {
    run(way.here, values, anchor, Tensor(), used, mask);
  }
  return used;
}

/// Keeps the key. Any number of backward passes may go through it.
struct MaskedWeight : Opaque {
  Mask mask{};
  ScalarType type = at::kFloat;
  Owned about;  // anchor, mask, ... as Python gave them

  std::string name() const override { return "MaskedWeightBackward"; }

  variable_list apply(variable_list&& grads) override {
    const Tensor& grad = grads[0];
    if (!grad.defined()) return variable_list(1);
    if (is_ordinary(grad, {})) {
      const c10::OptionalDeviceGuard there(grad.is_cuda() ? std::optional(grad.device()) : std::nullopt);
      const Tensor dense = grad.contiguous();
      Tensor found = is_aligned(dense) ? masked_values(dense, {}, type, mask) : Tensor();
      if (found.defined()) return {std::move(found)};
    }
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr g = wrap(grad);
    THPObjectPtr result(PyObject_CallFunction(weight_gradient_of, "OO", g.get(), about.object));
    if (!result) pass_on();
    return {THPVariable_Unpack(result.get())};
  }
};

/// mask(weight, (anchor, mask, dtype)) -> Tensor or None
PyObject* mask_weight(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 2, "two arguments");
  PyObject *rest = args[1], *a = PyTuple_GET_ITEM(rest, 0), *told = PyTuple_GET_ITEM(rest, 1);
  if (PyTuple_GET_ITEM(rest, 2) != Py_None || !are_tensors({args[0], a})) Py_RETURN_NONE;
  const Tensor &weight = tensor_of(args[0]), &anchor = tensor_of(a);
  if (!weight.defined() || !Weight{weight, anchor}.is_taken() || somebody_looks_on() ||
      c10::InferenceMode::is_enabled() || torch::autograd::isFwGradDefined(weight) ||
      (on_the_gpu(weight) && !takes_numbers(weight))) {
    Py_RETURN_NONE;
  }
  Mask mask{};
  if (!read_key(PyTuple_GET_ITEM(told, 0), mask) || !read_law(PyTuple_GET_ITEM(told, 1), weight, mask) ||
      !read_layout(PyTuple_GET_ITEM(told, 2), weight, mask)) {
    Py_RETURN_NONE;
  }
  Tensor used;
  {
    pybind11::gil_scoped_release without_gil;
    const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
    used = masked_values(weight, anchor, weight.scalar_type(), mask);
    if (used.defined() && at::GradMode::is_enabled() && weight.requires_grad()) {
      auto node = node_of<MaskedWeight>();
      node->set_next_edges(torch::autograd::collect_next_edges(weight));
      node->mask = mask;
      node->type = weight.scalar_type();
      node->about.take(rest);
      torch::autograd::set_history(used, node);
    }
  }
  if (!used.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(used));
  END_HANDLE_TH_ERRORS
}

}  // namespace

// In compiled graphs: what the operators of linear_operators.py do on the CPU and on NVIDIA's GPUs.
#pragma once

#include "errors.h"
#include "weight.h"

#include <torch/library.h>

namespace {

PyObject *product_in_python = nullptr, *gradients_in_python = nullptr, *weight_in_python = nullptr;

using Optional = std::optional<Tensor>;

/// Key and law as a graph has them; false where they are not as expected.
///
/// row: undefined where they have one entry.
bool read_tables(const Tensor& weight, const Tensor& key, const Tensor& thresholds,
                 const Tensor& scales, const Tensor& row, Mask& mask) {
  for (const Tensor* one : {&key, &thresholds, &scales, &row}) {
    if (one->defined() && (one->device() != weight.device() || !one->is_contiguous())) return false;
  }
  const bool wide = weight.scalar_type() == at::kDouble;
  if (key.scalar_type() != at::kInt || key.numel() != 2) return false;
  if (row.defined() ? row.scalar_type() != at::kLong : thresholds.numel() != 1 || scales.numel() != 1) return false;
  const ScalarType of_scales = wide ? at::kDouble : at::kFloat;
  if (thresholds.scalar_type() != at::kInt || scales.scalar_type() != of_scales) return false;
  if (on_the_gpu(weight)) {
    if (!row.defined()) return false;
    mask.key_at = key.data_ptr();
    mask.thresholds = thresholds.data_ptr();
    mask.scales = scales.data_ptr();
    mask.row = row.data_ptr();
    return true;
  }
  for (int n = 0; n < 2; ++n) mask.key[n] = static_cast<uint32_t>(key.const_data_ptr<int32_t>()[n]);
  const int64_t number = row.defined() ? *row.const_data_ptr<int64_t>() : 0;
  mask.threshold = thresholds.const_data_ptr<int32_t>()[number];
  mask.scale = wide ? scales.const_data_ptr<double>()[number] : scales.const_data_ptr<float>()[number];
  return true;
}

/// What a function of Python gives for these tensors, and what else it takes.
PyObject* call(PyObject* function, std::initializer_list<const Tensor*> tensors, PyObject* more) {
  THPObjectPtr args(PyTuple_New(static_cast<Py_ssize_t>(tensors.size()) + (more != nullptr)));
  if (!args) throw python_error();
  Py_ssize_t at = 0;
  for (const Tensor* one : tensors) PyTuple_SET_ITEM(args.get(), at++, THPVariable_Wrap(*one));
  if (more) PyTuple_SET_ITEM(args.get(), at, more);
  PyObject* result = PyObject_CallObject(function, args.get());
  if (!result) pass_on();
  return result;
}

Tensor linear_operator(const Tensor& x, const Tensor& weight, const Optional& bias,
                       const Optional& anchor, const Tensor& key, const Tensor& thresholds,
                       const Tensor& scales, const Tensor& row) {
  const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
  const Tensor b = bias.value_or(Tensor()), a = anchor.value_or(Tensor());
  const Weight masked{weight, a};
  Mask mask{};
  Tensor used;
  if (is_plain(x) && masked.is_taken() && !somebody_looks_on() &&
      read_tables(weight, key, thresholds, scales, row, mask)) {
    const Way way(masked, x.scalar_type(), false, {});
    if (way) return product(x, masked, b, How(), way, mask, weight.requires_grad(), used);
  }
  pybind11::gil_scoped_acquire gil;
  THPObjectPtr found(
      call(product_in_python, {&x, &weight, &b, &a, &key, &thresholds, &scales, &row}, nullptr));
  return THPVariable_Unpack(found.get());
}

std::tuple<Tensor, Tensor> gradients_operator(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& anchor,
    const Tensor& key, const Tensor& thresholds, const Tensor& scales, const Tensor& row,
    c10::List<bool> wanted) {
  const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
  const Tensor a = anchor.value_or(Tensor());
  const Weight masked{weight, a};
  const std::array<bool, 3> want{wanted.get(0), wanted.get(1), false};  // the compiler has the bias
  std::array<Tensor, 3> found;
  Mask mask{};
  if (!is_plain(x) || !is_plain(grad) || !masked.is_taken() || somebody_looks_on() ||
      !read_tables(weight, key, thresholds, scales, row, mask) ||
      !gradients(grad, x, masked, Tensor(), How(), mask, want, found)) {
    pybind11::gil_scoped_acquire gil;
    PyObject* flags = Py_BuildValue("[OO]", want[0] ? Py_True : Py_False, want[1] ? Py_True : Py_False);
    THPObjectPtr result(call(
        gradients_in_python, {&grad, &x, &weight, &a, &key, &thresholds, &scales, &row}, flags));
    for (int n = 0; n < 2; ++n) found[n] = THPVariable_Unpack(PyTuple_GET_ITEM(result.get(), n));
    return {found[0], found[1]};
  }
  for (Tensor& one : found) {
    if (!one.defined()) one = at::empty({0}, grad.options());
  }
  return {found[0], found[1]};
}

/// The masked weight. It is contiguous.
Tensor weight_operator(const Tensor& weight, const Optional& anchor, const Tensor& key, const Tensor& threshold,
                       const Tensor& scale) {
  const Tensor a = anchor.value_or(Tensor());
  Mask mask{};
  if (Weight{weight, a}.is_taken() && !somebody_looks_on() &&
      read_tables(weight, key, threshold, scale, {}, mask)) {
    const Tensor used = masked_values(weight, a, weight.scalar_type(), mask);
    if (used.defined()) return used;
  }
  pybind11::gil_scoped_acquire gil;
  THPObjectPtr found(call(weight_in_python, {&weight, &a, &key, &threshold, &scale}, nullptr));
  return THPVariable_Unpack(found.get());
}

TORCH_LIBRARY_IMPL(surgery, CPU, library) {
  library.impl("drop", weight_operator);
  library.impl("masked_linear", linear_operator);
  library.impl("masked_linear_backward", gradients_operator);
}

TORCH_LIBRARY_IMPL(surgery, CUDA, library) {
  library.impl("masked_linear", linear_operator);
  library.impl("masked_linear_backward", gradients_operator);
}

}  // namespace

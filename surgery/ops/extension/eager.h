// In eager training: a product that is a node of autograd. `_MaskedLinear` of linear.py is the same for a
// Linear.
#pragma once

#include "nodes.h"

namespace {

PyObject* gradients_of = nullptr;  // of Python: for all that is out of the ordinary

/// Keeps x; and the masked weight where it is a cast of the weight, as a plain layer keeps that.
struct MaskedProduct : Keeping {
  Tensor weight;
  How how;
  Mask mask{};
  uint32_t version = 0;
  bool keeps = false;

  std::string name() const override {
    return how.kind == How::CONVOLUTION ? "MaskedConvolutionBackward" : "MaskedLinearBackward";
  }

  variable_list gradients_by(const Tensor& grad, const Wanted& want) override {
    const Tensor input = want[1] || how.kind == How::CONVOLUTION ? first.unpack() : Tensor();
    const Tensor kept = keeps ? second.unpack() : Tensor();
    const bool ordinary = is_ordinary(grad, {&input}) &&
                          (keeps || weight.is_inference() || weight._version() == version);
    std::array<Tensor, 3> found;
    if (!ordinary || !gradients(grad, input, {weight, anchor}, kept, how, mask, want, found)) {
      return by_python(grad, input, kept, want);
    }
    return {std::move(found[0]), std::move(found[1]), std::move(found[2])};
  }

  /// By `gradients_of`, which knows everything, and may be followed by autograd.
  variable_list by_python(const Tensor& grad, const Tensor& input, const Tensor& kept, const Wanted& want) {
    pybind11::gil_scoped_acquire gil;
    THPObjectPtr g = wrap(grad), i = wrap(input), w = wrap(weight), k = wrap(kept);
    THPObjectPtr result(PyObject_CallFunction(
        gradients_of, "OOOOI(ii)O(iii)", g.get(), i.get(), w.get(), k.get(), version,
        static_cast<int>(mask.key[0]), static_cast<int>(mask.key[1]), about.object,
        static_cast<int>(want[0]), static_cast<int>(want[1]), static_cast<int>(want[2])));
    if (!result) pass_on();
    return unwrapped(result.get(), want);
  }
};

/// Undefined, and nothing is done, where Python has to do it. By columns, x is a matrix.
Tensor masked_product(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& anchor,
                      How&& how, Mask& mask, int64_t rank, PyObject* about) {
  const c10::OptionalDeviceGuard there(weight.is_cuda() ? std::optional(weight.device()) : std::nullopt);
  const at::DeviceType kind = weight.device().type();
  const bool casts = at::autocast::is_autocast_enabled(kind);
  if (casts && !on_the_gpu(weight)) return {};
  const ScalarType type = casts ? at::autocast::get_autocast_dtype(kind) : x.scalar_type();
  const Weight masked{weight, anchor};
  const Way way(masked, type, false, mask.sharing);
  if (!way || (on_the_gpu(weight) && !takes_numbers(weight))) return {};
  Tensor input = x, summand = bias;
  if (casts) {
    input = at::autocast::cached_cast(type, x, kind);
    if (bias.defined()) summand = at::autocast::cached_cast(type, bias, kind);
  }
  if (input.scalar_type() != type || (!casts && type != weight.scalar_type())) return {};
  if (summand.defined() && summand.scalar_type() != type) return {};
  draw_key(mask.key, weight.device(), rank);
  const bool trained = weight.requires_grad();
  Tensor used;
  Tensor out = product(input, masked, summand, how, way, mask, trained, used);
  if (!requires_grad({&input, &weight, &summand})) return out;
  const Tensor& kept = trained || how.kind == How::CONVOLUTION ? input : Tensor();
  auto& node = follow<MaskedProduct>(out, input, weight, summand, anchor, kept, used, about);
  node.how = std::move(how);
  node.keeps = used.defined();
  node.weight = weight;
  node.mask = mask;
  node.version = weight.is_inference() ? 0 : weight._version();
  return out;
}

/// `How` of product.py.
How how_of(PyObject* given) {
  How how;
  const Py_ssize_t size = PyTuple_GET_SIZE(given);
  how.kind = size == 0 ? How::ROWS : size == 1 ? How::COLUMNS : How::CONVOLUTION;
  if (how.kind != How::CONVOLUTION) return how;
  std::vector<int64_t>* const lists[] = {&how.stride, &how.padding, &how.dilation};
  for (int n = 0; n < 3; ++n) {
    PyObject* one = PyTuple_GET_ITEM(given, n);
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(one); ++i) {
      lists[n]->push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(one, i)));
    }
  }
  how.groups = PyLong_AsLongLong(PyTuple_GET_ITEM(given, 3));
  if (PyErr_Occurred()) throw python_error();
  return how;
}

/// product(x, weight, bias, about, rank) -> Tensor or None
PyObject* masked(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5, "five arguments");
  PyObject *about = args[3], *law = PyTuple_GET_ITEM(about, 0), *a = PyTuple_GET_ITEM(about, 2);
  if (!are_tensors({args[0], args[1], args[2], a})) Py_RETURN_NONE;
  const Tensor &x = tensor_of(args[0]), &weight = tensor_of(args[1]), &bias = tensor_of(args[2]);
  const Tensor& anchor = tensor_of(a);
  if (!x.defined() || !weight.defined() || !at::GradMode::is_enabled() || somebody_looks_on() ||
      !Weight{weight, anchor}.is_taken()) {
    Py_RETURN_NONE;
  }
  How how = how_of(PyTuple_GET_ITEM(about, 4));
  if (!how.fits(x, weight, bias)) Py_RETURN_NONE;
  for (const Tensor* one : {&x, &bias}) {
    if (!one->defined()) continue;
    if (one->device() != weight.device() || !is_plain(*one)) Py_RETURN_NONE;
  }
  for (const Tensor* one : {&x, &weight, &bias}) {
    if (torch::autograd::isFwGradDefined(*one)) Py_RETURN_NONE;
  }
  Mask mask{};
  if (!read_law(law, weight, mask) || !read_layout(PyTuple_GET_ITEM(about, 1), weight, mask)) Py_RETURN_NONE;
  const int64_t rank = PyLong_AsLongLong(args[4]);
  if (PyErr_Occurred()) return nullptr;
  Tensor out;
  {
    pybind11::gil_scoped_release without_gil;
    const bool folds = how.kind == How::COLUMNS && x.dim() > 2;
    const Tensor input = folds ? x.view({-1, x.size(-1)}) : x;  // as the plain forward does
    out = masked_product(input, weight, bias, anchor, std::move(how), mask, rank, about);
    if (folds && out.defined()) {
      auto sizes = x.sizes().vec();
      sizes.back() = weight.size(1);
      out = out.view(sizes);
    }
  }
  if (!out.defined()) Py_RETURN_NONE;
  return THPVariable_Wrap(std::move(out));
  END_HANDLE_TH_ERRORS
}

}  // namespace

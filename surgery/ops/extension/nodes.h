// What the nodes of autograd have in common.
#pragma once

#include "errors.h"
#include "product.h"

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <type_traits>

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

/// A node as this version of torch counts its owners. `deleteNode` is found by its argument, where
/// there is one: it does not recurse into what a node leads to.
template <class Made, class Pointer = decltype(torch::autograd::Edge::function)> auto node_of() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    return std::shared_ptr<Made>(new Made(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<Made>();
  }
}

/// An object of Python that a node has, wherever that is let go of.
struct Owned {
  PyObject* object = nullptr;

  void take(PyObject* one) {
    pybind11::gil_scoped_acquire gil;
    object = Py_NewRef(one);
  }

  ~Owned() {
    if (object == nullptr || !Py_IsInitialized()) return;
    const auto state = PyGILState_Ensure();
    Py_DECREF(object);
    PyGILState_Release(state);
  }
};

using Wanted = std::array<bool, 3>;  // the gradients of x, weight and bias

/// A node that compiled autograd, which asks every node for all that it has, is told to leave alone: a key
/// is another number at each step.
struct Opaque : Node {
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const {
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, name(), ": compiled autograd cannot read this node of DropConnect; set DROPCONNECT_COMPILE=0, ",
        "and Python makes the nodes");
  }
};

/// A node that keeps one or two tensors for a single backward.
struct Keeping : Opaque {
  SavedVariable first, second;
  Tensor anchor;
  bool freed = false;
  Owned about;  // what Python has to be told beside tensors

  virtual variable_list gradients_by(const Tensor& grad, const Wanted& want) = 0;

  void release_variables() override {
    std::lock_guard<std::mutex> guard(mutex_);
    first.reset_data();
    second.reset_data();
    freed = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!grads[0].defined()) return variable_list(3);
    TORCH_CHECK(!freed, torch::autograd::ERR_BACKWARD_TWICE);
    return gradients_by(grads[0], {task_should_compute_output(0), task_should_compute_output(1),
                                   task_should_compute_output(2)});
  }
};

/// Let a new node follow what was made of x, weight and bias: it keeps two tensors, or one. It has still
/// to be told the rest.
template <class Made>
Made& follow(const Tensor& made, const Tensor& x, const Tensor& weight, const Tensor& bias,
             const Tensor& anchor, const Tensor& first, const Tensor& second, PyObject* about) {
  auto node = node_of<Made>();
  node->set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
  if (first.defined()) node->first = SavedVariable(first, false);
  if (second.defined()) node->second = SavedVariable(second, false);
  node->anchor = anchor;
  node->about.take(about);
  torch::autograd::set_history(made, node);
  return *node;
}

bool requires_grad(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* one : tensors) {
    if (one->defined() && one->requires_grad()) return true;
  }
  return false;
}

/// Whether what autograd is told of these is no more than a gradient.
bool is_ordinary(const Tensor& grad, std::initializer_list<const Tensor*> kept) {
  if (at::GradMode::is_enabled() || somebody_looks_on() || torch::autograd::isFwGradDefined(grad)) return false;
  for (const Tensor* one : kept) {
    if (one->defined() && !is_plain(*one)) return false;
  }
  return is_plain(grad);
}

bool are_tensors(std::initializer_list<PyObject*> objects) {
  for (PyObject* one : objects) {
    if (one != Py_None && !THPVariable_CheckExact(one)) return false;
  }
  return true;
}

THPObjectPtr wrap(const Tensor& one) { return THPObjectPtr(THPVariable_Wrap(one)); }

/// Those of a tuple that are wanted, and not None.
variable_list unwrapped(PyObject* tuple, const Wanted& want) {
  variable_list found(3);
  for (int n = 0; n < 3; ++n) {
    PyObject* one = PyTuple_GET_ITEM(tuple, n);
    if (one != Py_None && want[n]) found[n] = THPVariable_Unpack(one);
  }
  return found;
}

/// The numbers of a law for a weight; false where they are not on the host, or not for it.
bool read_law(PyObject* law, const Tensor& weight, Mask& mask) {
  static PyObject* names[] = {PyUnicode_InternFromString("numbers"),
                              PyUnicode_InternFromString("threshold"),
                              PyUnicode_InternFromString("scale")};
  if (law == Py_None) return false;
  THPObjectPtr numbers(PyObject_GetAttr(law, names[0]));
  THPObjectPtr threshold(PyObject_GetAttr(law, names[1]));
  THPObjectPtr scale(PyObject_GetAttr(law, names[2]));
  if (!numbers || !threshold || !scale) throw python_error();
  if (!PyTuple_Check(numbers.get()) || !THPVariable_CheckExact(threshold.get())) return false;
  if (THPVariable_Unpack(threshold.get()).device() != weight.device()) return false;
  const bool wide = THPVariable_Unpack(scale.get()).scalar_type() == at::kDouble;
  if (wide != (weight.scalar_type() == at::kDouble)) return false;
  mask.threshold = static_cast<int32_t>(PyLong_AsLong(PyTuple_GET_ITEM(numbers.get(), 0)));
  mask.scale = PyFloat_AsDouble(PyTuple_GET_ITEM(numbers.get(), 1));
  if (PyErr_Occurred()) throw python_error();
  return true;
}

PyObject* steps_in_python = nullptr;

/// Which weights share a mask entry, by one key; false where no kernel counts so.
bool read_layout(PyObject* layout, const Tensor& weight, Mask& mask) {
  static PyObject* names[] = {PyUnicode_InternFromString("is_elementwise"), PyUnicode_InternFromString("entries")};
  THPObjectPtr elementwise(PyObject_GetAttr(layout, names[0]));
  THPObjectPtr count(PyObject_GetAttr(layout, names[1]));
  if (!elementwise || !count) throw python_error();
  const int64_t entries = PyLong_AsLongLong(count.get());
  if (entries > SEGMENT) return false;
  if (elementwise.get() == Py_True) return entries == weight.numel();
  if (on_the_gpu(weight)) return false;
  THPObjectPtr steps(PyObject_CallOneArg(steps_in_python, layout));
  if (!steps) throw python_error();
  if (steps.get() == Py_None) return false;
  int64_t all = 1;
  for (Py_ssize_t n = 0; n < 4; ++n) {
    mask.sharing.sizes[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(steps.get(), 0), n));
    mask.sharing.apart[n] = PyLong_AsLongLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(steps.get(), 1), n));
    all *= mask.sharing.sizes[n];
  }
  if (PyErr_Occurred()) throw python_error();
  return all == weight.numel() && all != 0;
}

/// The words of a key that the host knows; false of others.
bool read_key(PyObject* key, Mask& mask) {
  if (PyTuple_Check(key) && PyTuple_GET_SIZE(key) == 2) {
    for (int n = 0; n < 2; ++n) {
      mask.key[n] = static_cast<uint32_t>(PyLong_AsUnsignedLongLongMask(PyTuple_GET_ITEM(key, n)));
    }
    if (PyErr_Occurred()) throw python_error();
    return true;
  }
  if (!THPVariable_CheckExact(key)) return false;
  const Tensor& words = THPVariable_Unpack(key);
  if (!words.is_cpu() || !is_plain(words) || words.scalar_type() != at::kInt || words.numel() != 2) return false;
  for (int n = 0; n < 2; ++n) mask.key[n] = static_cast<uint32_t>(words.const_data_ptr<int32_t>()[n * words.stride(0)]);
  return true;
}

const Tensor& tensor_of(PyObject* object) {
  static const Tensor none;
  return object == Py_None ? none : THPVariable_Unpack(object);
}

}  // namespace

// Products with masked weights, without Python's part of the time: in eager training, and that of a Linear
// in compiled graphs. And on a GPU the other samplings of a Linear in eager training.
//
// All of it is in Python again, to the bit, in linear.py, linear_operators.py, product.py,
// example_operators.py and gaussian_linear.py, and hands over to those where anything is out of the ordinary.
#include <torch/csrc/autograd/python_variable.h>

#include "eager.h"
#include "example.h"
#include "gaussian.h"
#include "operators.h"

namespace {

const std::array<ScalarType, TYPES> BY_NUMBER{at::kFloat, at::kBFloat16, at::kHalf, at::kDouble};

/// use_cpu(type, address, shares): a kernel by element, or one for weights that share mask entries
PyObject* use_cpu(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  int type = 0, shares = 0;
  unsigned long long address = 0;
  if (!PyArg_ParseTuple(args, "iKp", &type, &address, &shares)) return nullptr;
  if (shares) {
    shared_on_cpu.at(type) = reinterpret_cast<DropShared>(address);
  } else {
    on_cpu.at(type) = reinterpret_cast<Drop>(address);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

/// use_driver(cuLaunchKernel, cuCtxGetCurrent, cuStreamIsCapturing, aoti_torch_get_current_cuda_stream): addresses
PyObject* use_driver(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  unsigned long long how = 0, context = 0, capturing = 0, stream = 0;
  if (!PyArg_ParseTuple(args, "KKKK", &how, &context, &capturing, &stream)) return nullptr;
  launch = reinterpret_cast<Launch>(how);
  current_context = reinterpret_cast<CurrentContext>(context);
  is_capturing = reinterpret_cast<IsCapturing>(capturing);
  current_stream = reinterpret_cast<CurrentStream>(stream);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

/// use_gpu(device, from, to, anchor, grad, sixteen, function, threads, shared, block)
PyObject* use_gpu(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  unsigned long long function = 0;
  int device = 0, from = 0, to = 0, anchor = 0, grad = 0, sixteen = 0;
  unsigned threads = 0, shared = 0, block = 0;
  if (!PyArg_ParseTuple(args, "iiipppKIII", &device, &from, &to, &anchor, &grad, &sixteen,
                        &function, &threads, &shared, &block)) {
    return nullptr;
  }
  const int form = form_of(BY_NUMBER.at(from), BY_NUMBER.at(to), anchor, grad, sixteen);
  Kernel& kernel = on_gpu.at(device).at(form);
  kernel.threads = threads;
  kernel.shared = shared;
  kernel.block = block;
  kernel.function = reinterpret_cast<void*>(function);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

/// use_plan(plan, function, threads, shared, grid, numbers): a kernel of planned.h
PyObject* use_plan(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *plan = nullptr, *numbers = nullptr;
  unsigned long long function = 0;
  Planned kernel{};
  if (!PyArg_ParseTuple(args, "O!KII(III)O!", &PyTuple_Type, &plan, &function, &kernel.threads,
                        &kernel.shared, &kernel.grid[0], &kernel.grid[1], &kernel.grid[2], &PyTuple_Type,
                        &numbers)) {
    return nullptr;
  }
  kernel.function = reinterpret_cast<void*>(function);
  Plan key;
  for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(plan); ++n) key.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(plan, n)));
  for (Py_ssize_t n = 0; n < PyTuple_GET_SIZE(numbers); ++n) {
    kernel.numbers.push_back(static_cast<int32_t>(PyLong_AsLong(PyTuple_GET_ITEM(numbers, n))));
  }
  if (PyErr_Occurred()) return nullptr;
  std::unique_lock<std::shared_mutex> guard(lock_of_plans);
  plans.emplace(std::move(key), std::move(kernel));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

/// pretend(whether): that the CPU is a GPU
PyObject* pretend(PyObject*, PyObject* whether) {
  pretends = whether == Py_True;
  Py_RETURN_NONE;
}

/// forget(): all kernels of GPUs, in tests
PyObject* forget(PyObject*, PyObject*) {
  std::unique_lock<std::shared_mutex> guard(lock_of_plans);
  plans.clear();
  for (auto& of_device : on_gpu) {
    for (Kernel& kernel : of_device) kernel.function = nullptr;
  }
  Py_RETURN_NONE;
}

/// otherwise(gradients_of, product, gradients, example, gaussian, mask, drop, steps): who does what is out of the ordinary
PyObject* otherwise(PyObject*, PyObject* args) {
  HANDLE_TH_ERRORS
  PyObject *eager = nullptr, *product = nullptr, *gradients = nullptr, *example = nullptr, *gaussian = nullptr;
  PyObject *mask = nullptr, *drop = nullptr, *steps = nullptr;
  if (!PyArg_ParseTuple(args, "OOOOOOOO", &eager, &product, &gradients, &example, &gaussian, &mask, &drop, &steps)) {
    return nullptr;
  }
  Py_XSETREF(weight_in_python, Py_NewRef(drop));
  Py_XSETREF(steps_in_python, Py_NewRef(steps));
  Py_XSETREF(weight_gradient_of, Py_NewRef(mask));
  Py_XSETREF(example_gradients_of, Py_NewRef(example));
  Py_XSETREF(gaussian_gradients_of, Py_NewRef(gaussian));
  Py_XSETREF(gradients_of, Py_NewRef(eager));
  Py_XSETREF(product_in_python, Py_NewRef(product));
  Py_XSETREF(gradients_in_python, Py_NewRef(gradients));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

/// release(): free the memory for masked weights that nobody uses now
PyObject* release(PyObject*, PyObject*) {
  std::lock_guard<std::mutex> guard(lock_of_blocks);
  blocks.clear();
  Py_RETURN_NONE;
}

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyCFunction fast(Fast function) { return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)); }

PyMethodDef methods[] = {
    {"product", fast(masked), METH_FASTCALL, nullptr},
    {"mask", fast(mask_weight), METH_FASTCALL, nullptr},
    {"example", fast(example), METH_FASTCALL, nullptr},
    {"gaussian", fast(gaussian), METH_FASTCALL, nullptr},
    {"use_plan", use_plan, METH_VARARGS, nullptr},
    {"pretend", pretend, METH_O, nullptr},
    {"forget", forget, METH_NOARGS, nullptr},
    {"use_cpu", use_cpu, METH_VARARGS, nullptr},
    {"use_driver", use_driver, METH_VARARGS, nullptr},
    {"use_gpu", use_gpu, METH_VARARGS, nullptr},
    {"otherwise", otherwise, METH_VARARGS, nullptr},
    {"release", release, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition{PyModuleDef_HEAD_INIT, "linear", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit_linear() { return PyModule_Create(&definition); }

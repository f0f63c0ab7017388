// Kernels of the GPU that are launched as Python has launched them before, for tensors of the same kinds
// and shapes. So what a launch depends on, as tiles and the number of programs, only Python knows.
#pragma once

#include "nodes.h"

#include <map>
#include <mutex>
#include <shared_mutex>
#include <vector>

namespace {

/// Numbers of launch.py.
enum Which : int64_t {
  PRODUCT = 1,
  INPUT_GRADIENT,
  WEIGHT_GRADIENT,
  MASKED_WEIGHTS,
  MASKED_SUM,
  FACTORS,
  DRAW,
  ADD_TWICE
};

/// Which kernel, the device, the dtypes of tensors (-1: there is none), and shapes.
using Plan = std::vector<int64_t>;

struct Planned {
  void* function;
  unsigned threads, shared;
  std::array<unsigned, 3> grid;
  std::vector<int32_t> numbers;
};

std::shared_mutex lock_of_plans;
std::map<Plan, Planned> plans;  // nothing leaves it

/// Null where Python has not launched it yet.
const Planned* planned(const Plan& plan) {
  if (!can_launch()) return nullptr;
  std::shared_lock<std::shared_mutex> guard(lock_of_plans);
  const auto found = plans.find(plan);
  return found == plans.end() ? nullptr : &found->second;
}

int64_t type_of(const Tensor& tensor) { return tensor.defined() ? number_of(tensor.scalar_type()) : -1; }

/// Dense, of a type that kernels take, and aligned as those were that Python had compiled for.
bool fits(const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  return number_of(type) >= 0 && type != at::kDouble && tensor.is_contiguous() && is_aligned(tensor);
}

/// Whether the kernels take these tensors, of which some may be undefined, with a weight on a GPU.
bool fit_together(const Tensor& weight, std::initializer_list<const Tensor*> tensors) {
  if (!on_the_gpu(weight) || somebody_looks_on() || !takes_numbers(weight)) return false;
  for (const Tensor* one : tensors) {
    if (!one->defined()) continue;
    const bool taken = is_plain(*one) && fits(*one) && one->numel() > 0 && one->device() == weight.device();
    if (!taken || torch::autograd::isFwGradDefined(*one)) return false;
  }
  return true;
}

/// Launch it on tensors, of which undefined ones are left out, and on a mask of numbers, if it has one.
void run(const Planned& kernel, std::initializer_list<const Tensor*> tensors, const Mask* mask) {
  std::array<void*, 12> addresses{};
  std::array<void*, 40> parameters{};
  size_t count = 0, pointers = 0;
  const Tensor* first = *tensors.begin();
  for (const Tensor* one : tensors) {
    if (!one->defined()) continue;
    addresses[pointers] = one->data_ptr();
    parameters[count++] = &addresses[pointers++];
  }
  int32_t words[] = {0, 0, 0, 0, 0};
  float scale = 0;
  if (mask) {
    // Nobody follows the pointers to key and law, as the numbers are given.
    for (int n = 0; n < 3; ++n) parameters[count++] = &addresses[0];
    words[0] = static_cast<int32_t>(mask->key[0]);
    words[1] = static_cast<int32_t>(mask->key[1]);
    words[3] = mask->threshold;
    scale = static_cast<float>(mask->scale);
    for (int n = 0; n < 4; ++n) parameters[count++] = &words[n];
    parameters[count++] = &scale;
    parameters[count++] = &words[4];
  }
  for (const int32_t& number : kernel.numbers) parameters[count++] = const_cast<int32_t*>(&number);
  void* none = nullptr;  // memory of Triton's own
  parameters[count++] = &none;
  parameters[count++] = &none;
  const int error = launch(kernel.function, kernel.grid[0], kernel.grid[1], kernel.grid[2], kernel.threads,
                           1, 1, kernel.shared, stream_of(*first), parameters.data(), nullptr);
  TORCH_CHECK(error == 0, "CUDA driver error ", error, " at the launch of a DropConnect kernel");
}

}  // namespace

// The product with a masked weight, and its gradients: see `product` and `gradients` of linear.py, and
// product.py.
#pragma once

#include "masks.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

namespace {

/// A dense tensor and nothing else: see `is_ordinary_there`.
bool is_plain(const Tensor& tensor) {
  static const auto make = [](at::Device device) {
    const c10::InferenceMode usual(false);  // whatever the first call is in
    return at::empty({0}, device).key_set();
  };
  if (tensor.is_cuda()) {
    static const c10::DispatchKeySet keys = make(at::Device(at::kCUDA, tensor.device().index()));
    return tensor.key_set() == keys;
  }
  static const c10::DispatchKeySet keys = make(at::kCPU);
  return tensor.key_set() == keys;
}

/// Modes of torch, and transforms of torch.func.
bool somebody_looks_on() {
  const auto keys = c10::impl::tls_local_dispatch_key_set().included_;
  return c10::impl::TorchDispatchModeTLS::any_modes_set() || at::impl::torch_function_mode_enabled() ||
         keys.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

Tensor matrix(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

/// A weight that is masked, and the anchor of its dropped entries.
struct Weight {
  const Tensor &values, &anchor;

  bool is_taken() const {
    if (values.numel() < 2 || values.numel() > SEGMENT || !values.is_contiguous()) return false;
    if (!is_plain(values)) return false;
    if (!anchor.defined()) return true;
    return is_plain(anchor) && anchor.is_contiguous() && anchor.device() == values.device() &&
           anchor.sizes() == values.sizes() && anchor.scalar_type() == values.scalar_type();
  }
};

/// How a weight is masked for a product of some type; false where no kernel is known for it.
struct Way {
  const Kernel* kernel = nullptr;
  OnCPU here;

  /// `grad`: whether that of the weight is masked as well.
  Way(const Weight& weight, ScalarType type, bool grad, const Sharing& sharing) {
    if (on_the_gpu(weight.values)) {
      if (!sharing) kernel = kernel_for(weight.values, type, weight.anchor, grad);
    } else if (type == weight.values.scalar_type()) {
      here = OnCPU(type, sharing);
    }
  }
  explicit operator bool() const { return kernel || here; }
};

/// How an input meets a weight.
struct How {
  enum Kind { ROWS, COLUMNS, CONVOLUTION };
  Kind kind = ROWS;  // the weight is (out, in), or (in, out) as that of transformers' Conv1D, or filters
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups = 1;

  /// Whether tensors fit together; where they do not, Python says what is wrong.
  bool fits(const Tensor& x, const Tensor& weight, const Tensor& bias) const {
    if (kind == CONVOLUTION) {
      const auto spatial = static_cast<size_t>(weight.dim() - 2);
      return x.dim() == weight.dim() && x.size(1) == weight.size(1) * groups && spatial > 0 &&
             stride.size() == spatial && padding.size() == spatial && dilation.size() == spatial;
    }
    if (weight.dim() != 2 || x.dim() < 2 || x.size(-1) != weight.size(kind == ROWS ? 1 : 0)) return false;
    // `matmul` folds others in a way, and so rounds, that depends on what autograd follows.
    if (x.dim() > 2 && !x.is_contiguous()) return false;
    return kind == ROWS || (bias.defined() && x.is_contiguous());
  }

  Tensor multiply(const Tensor& x, const Tensor& used, const Tensor& bias, bool trained) const {
    // What chooses a kernel looks at whether there will be a backward; for a sum with a bias it does not.
    const auto followed = [&] { return trained ? used.detach().set_requires_grad(true) : used; };
    switch (kind) {
      case ROWS: return bias.defined() ? at::linear(x, used, bias) : at::linear(x, followed());
      case COLUMNS: return at::addmm(bias, x, used);
      case CONVOLUTION: {
        const std::vector<int64_t> none(stride.size(), 0);
        return at::convolution(x, followed(), bias, stride, padding, dilation, false, none, groups);
      }
    }
    return {};
  }
};

/// multiply(x, W_used, bias). `masked` becomes W_used if that is a cast of W.
Tensor product(const Tensor& x, const Weight& weight, const Tensor& bias, const How& how, const Way& way,
               const Mask& mask, bool trained, Tensor& masked) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const Tensor& values = weight.values;
  std::optional<Borrowed> memory;
  Tensor used;
  if (way.kernel) {
    used = at::empty_like(values, values.options().dtype(x.scalar_type()));
    run(*way.kernel, values, weight.anchor, Tensor(), used, Tensor(), mask);
    if (x.scalar_type() != values.scalar_type()) masked = used;
  } else {
    memory.emplace(values);
    used = memory->used;
    run(way.here, values, weight.anchor, Tensor(), used, mask);
  }
  return how.multiply(x, used, bias, trained);
}

/// The gradient of the weight in its dtype, of which that of the masked weight is given; it may be written.
Tensor masked_gradient(const Tensor& of_weight, const Weight& weight, const Mask& mask, const Kernel* of_grad,
                       const OnCPU& here) {
  if (!of_grad) {
    run(here, Tensor(), Tensor(), of_weight, Tensor(), mask);
    return of_weight;
  }
  const bool casts = of_weight.scalar_type() != weight.values.scalar_type();
  const Tensor masked = casts ? at::empty_like(weight.values) : of_weight;
  run(*of_grad, of_weight, Tensor(), Tensor(), masked, Tensor(), mask);
  return masked;
}

/// `gradients` of a convolution, which computes those of x and weight in one.
bool gradients_of_convolution(const Tensor& grad, const Tensor& x, const Weight& weight, const Tensor& kept,
                              const How& how, const Mask& mask, const std::array<bool, 3>& want,
                              std::array<Tensor, 3>& found) {
  const Tensor& values = weight.values;
  const ScalarType type = grad.scalar_type();
  const Way way(weight, type, false, mask.sharing);
  if (!way && (!kept.defined() || !on_the_gpu(values))) return false;
  const Kernel* of_grad = want[1] && on_the_gpu(values) ? kernel_of(values, type) : nullptr;
  if (want[1] && on_the_gpu(values) && !of_grad) return false;
  std::optional<Borrowed> memory;
  Tensor used = kept;
  if (!used.defined() && way.kernel) {
    used = at::empty_like(values, values.options().dtype(type));
    if (want[0]) run(*way.kernel, values, weight.anchor, Tensor(), used, Tensor(), mask);  // else its shape is read
  } else if (!used.defined()) {
    memory.emplace(values);
    used = memory->used;
    if (want[0]) run(way.here, values, weight.anchor, Tensor(), used, mask);
  }
  const std::vector<int64_t> none(how.stride.size(), 0);
  auto [of_x, of_weight, of_bias] = at::convolution_backward(
      grad, x, used, at::OptionalIntArrayRef(values.size(0)), how.stride, how.padding, how.dilation, false,
      none, how.groups, want);
  if (want[1]) of_weight = masked_gradient(of_weight.contiguous(), weight, mask, of_grad, way.here);
  found = {std::move(of_x), std::move(of_weight), std::move(of_bias)};
  return true;
}

/// The gradients of x, weight and bias, each where it is wanted. False, and nothing is done, where no
/// kernel is known.
///
/// x: undefined where the gradient of the weight is not wanted. kept: the masked weight, or undefined.
bool gradients(const Tensor& grad, const Tensor& x, const Weight& weight, const Tensor& kept,
               const How& how, const Mask& mask, const std::array<bool, 3>& want,
               std::array<Tensor, 3>& found) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  if (how.kind == How::CONVOLUTION) {
    return gradients_of_convolution(grad, x, weight, kept, how, mask, want, found);
  }
  const bool by_rows = how.kind == How::ROWS;
  const Tensor& values = weight.values;
  const ScalarType type = grad.scalar_type();
  const bool both = want[0] && !kept.defined();  // the masked weight is drawn again
  std::optional<Way> way;
  const Kernel* of_grad = nullptr;
  if (both || !on_the_gpu(values)) {
    way.emplace(weight, type, want[1], mask.sharing);
    if (!*way) return false;
  } else if (want[1]) {
    of_grad = kernel_of(values, type);
    if (!of_grad) return false;
  }
  const Tensor rows = matrix(grad);
  Tensor of_weight, of_x;
  if (want[1]) of_weight = by_rows ? rows.t().mm(matrix(x)) : matrix(x).t().mm(rows);
  const auto to_x = [&](const Tensor& used) { return rows.mm(by_rows ? used : used.t()); };
  if (both) {
    if (way->kernel) {
      const Tensor used = at::empty_like(values, values.options().dtype(type));
      const bool casts = of_weight.defined() && type != values.scalar_type();
      const Tensor masked = casts ? at::empty_like(values) : of_weight;
      run(*way->kernel, values, weight.anchor, of_weight, used, masked, mask);
      of_x = to_x(used);
      of_weight = masked;
    } else {
      const Borrowed memory(values);
      run(way->here, values, weight.anchor, of_weight, memory.used, mask);
      of_x = to_x(memory.used);
    }
  } else {
    if (want[0]) of_x = to_x(kept);
    if (want[1]) of_weight = masked_gradient(of_weight, weight, mask, of_grad, way ? way->here : OnCPU());
  }
  if (want[0] && grad.dim() > 2) {
    auto sizes = grad.sizes().vec();
    sizes.back() = values.size(1);  // by columns, x is a matrix
    of_x = of_x.view(sizes);
  }
  found = {std::move(of_x), std::move(of_weight), want[2] ? at::sum(rows, 0) : Tensor()};
  return true;
}

}  // namespace

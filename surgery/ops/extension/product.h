// The product with a masked weight, and its gradients: see `product` and `gradients` of linear.py.
#pragma once

#include "masks.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <optional>

namespace {

/// A dense tensor and nothing else: see `is_ordinary_there`.
bool is_plain(const Tensor& tensor) {
  static const auto make = [](at::Device device) { return at::empty({0}, device).key_set(); };
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
    if (values.dim() != 2 || values.numel() < 2 || !values.is_contiguous()) return false;
    if (!is_plain(values)) return false;
    if (!anchor.defined()) return true;
    return is_plain(anchor) && anchor.is_contiguous() && anchor.device() == values.device() &&
           anchor.sizes() == values.sizes() && anchor.scalar_type() == values.scalar_type();
  }
};

/// How a weight is masked for a product of some type; false where no kernel is known for it.
struct Way {
  const Kernel* kernel = nullptr;
  Drop drop = nullptr;

  /// `grad`: whether that of the weight is masked as well.
  Way(const Weight& weight, ScalarType type, bool grad) {
    if (on_the_gpu(weight.values)) {
      kernel = kernel_for(weight.values, type, weight.anchor, grad);
    } else if (type == weight.values.scalar_type() && number_of(type) >= 0) {
      drop = on_cpu[number_of(type)];
    }
  }
  explicit operator bool() const { return kernel || drop; }
};

/// linear(x, W_used, bias). `masked` becomes W_used if that is a cast of W.
Tensor product(const Tensor& x, const Weight& weight, const Tensor& bias, const Way& way,
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
    run(way.drop, values, weight.anchor, Tensor(), used, mask);
  }
  if (bias.defined()) return at::linear(x, used, bias);
  // `matmul` looks at that when it chooses how to fold a batch, and so how to round.
  return at::linear(x, trained ? used.detach().set_requires_grad(true) : used);
}

/// The gradients of x, weight and bias, each where it is wanted. False, and nothing is done, where no
/// kernel is known.
///
/// x: undefined where the gradient of the weight is not wanted. kept: the masked weight, or undefined.
bool gradients(const Tensor& grad, const Tensor& x, const Weight& weight, const Tensor& kept,
               const Mask& mask, const std::array<bool, 3>& want, std::array<Tensor, 3>& found) {
  const at::AutoDispatchBelowADInplaceOrView below;
  const c10::impl::ExcludeDispatchKeyGuard as_it_is(c10::autocast_dispatch_keyset);
  const Tensor& values = weight.values;
  const ScalarType type = grad.scalar_type();
  const bool both = want[0] && !kept.defined();  // the masked weight is drawn again
  std::optional<Way> way;
  const Kernel* of_grad = nullptr;
  if (both || !on_the_gpu(values)) {
    way.emplace(weight, type, want[1]);
    if (!*way) return false;
  } else if (want[1]) {
    of_grad = kernel_of(values, type);
    if (!of_grad) return false;
  }
  const Tensor rows = matrix(grad);
  Tensor of_weight, of_x;
  if (want[1]) of_weight = rows.t().mm(matrix(x));
  const auto as_weight = [&] {
    return of_weight.defined() && type != values.scalar_type() ? at::empty_like(values) : of_weight;
  };
  if (both) {
    if (way->kernel) {
      const Tensor used = at::empty_like(values, values.options().dtype(type));
      const Tensor masked = as_weight();
      run(*way->kernel, values, weight.anchor, of_weight, used, masked, mask);
      of_x = rows.mm(used);
      of_weight = masked;
    } else {
      const Borrowed memory(values);
      run(way->drop, values, weight.anchor, of_weight, memory.used, mask);
      of_x = rows.mm(memory.used);
    }
  } else {
    if (want[0]) of_x = rows.mm(kept);
    if (want[1] && of_grad) {
      const Tensor masked = as_weight();
      run(*of_grad, of_weight, Tensor(), Tensor(), masked, Tensor(), mask);
      of_weight = masked;
    } else if (want[1]) {
      run(way->drop, Tensor(), Tensor(), of_weight, Tensor(), mask);
    }
  }
  if (want[0] && grad.dim() > 2) {
    auto sizes = grad.sizes().vec();
    sizes.back() = values.size(1);
    of_x = of_x.view(sizes);
  }
  found = {std::move(of_x), std::move(of_weight), want[2] ? at::sum(rows, 0) : Tensor()};
  return true;
}

}  // namespace

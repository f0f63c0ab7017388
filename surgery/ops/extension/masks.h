// Masks: the kernels of cpu/ and gpu/, called by address, and what says which mask it is.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randint.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <mutex>
#include <vector>

namespace {

using at::ScalarType;
using at::Tensor;

constexpr int TYPES = 4;

int number_of(ScalarType type) {
  switch (type) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    case at::kDouble: return 3;
    default: return -1;
  }
}

/// Of the CPU: see cpu/kernels/drop.h.
using Drop = void (*)(const void* weight, const void* anchor, const void* grad, void* used,
                      void* masked_grad, const uint32_t* key, const int32_t* threshold,
                      const void* scale, int64_t start, uint32_t multiplier, int64_t count,
                      int threads);
std::array<Drop, TYPES> on_cpu{};

/// The same where weights share mask entries: see cpu/kernels/shared.cpp. It masks a gradient as a weight.
using DropShared = void (*)(const void* weight, const void* anchor, void* used, const uint32_t* key,
                            const int32_t* threshold, const void* scale, const int64_t* sizes,
                            const int64_t* apart, int threads);
std::array<DropShared, TYPES> shared_on_cpu{};

/// Of the GPU: see gpu/mask_kernels.py. `launch` is that of the driver.
struct Kernel {
  std::atomic<void*> function = nullptr;  // set last: other threads may look for it
  unsigned threads = 0, shared = 0, block = 0;
};
using Launch = int (*)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned shared, void* stream, void** parameters, void** extra);
Launch launch = nullptr;
using IsCapturing = int (*)(void* stream, int* status);
IsCapturing is_capturing = nullptr;
using CurrentContext = int (*)(void** context);
CurrentContext current_context = nullptr;
using CurrentStream = int (*)(int32_t device, void** stream);  // of torch
CurrentStream current_stream = nullptr;
constexpr int DEVICES = 32, FORMS = TYPES * TYPES * 8;
std::array<std::array<Kernel, FORMS>, DEVICES> on_gpu{};

/// What a kernel of the GPU was compiled for: the types that it reads and writes; whether there is an
/// anchor, of the first type, and a gradient, of the second; whether 16 divides the number of entries.
int form_of(ScalarType from, ScalarType to, bool anchor, bool grad, bool sixteen) {
  return (number_of(from) * TYPES + number_of(to)) * 8 + anchor * 4 + grad * 2 + sixteen;
}

/// In tests, kernels of the GPU run in Triton's interpreter, on tensors of the CPU.
bool pretends = false;

bool on_the_gpu(const Tensor& tensor) { return tensor.is_cuda() || (pretends && tensor.is_cpu()); }

int index_of(const Tensor& tensor) { return std::max<int>(tensor.device().index(), 0); }

/// Which weights share a mask entry: `Steps` of law.py. Without sizes none do.
struct Sharing {
  std::array<int64_t, 4> sizes{}, apart{};

  explicit operator bool() const { return sizes[3] != 0; }
};

constexpr int64_t SEGMENT = int64_t{1} << 30;  // of hash.py: beyond it, parts have keys of their own

struct Mask {
  uint32_t key[2];
  int32_t threshold;
  double scale;
  Sharing sharing{};
  // On the GPU all of it may be in memory, the law in row `row` of a table. Else these are null.
  void *key_at = nullptr, *thresholds = nullptr, *scales = nullptr, *row = nullptr;
};

bool is_aligned(const Tensor& tensor) {
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
}

/// Whether this thread can launch kernels of a GPU: there is a driver, and a context. A thread of autograd has
/// none until somebody has launched something that makes one, as Triton does when Python launches.
bool can_launch() {
  static thread_local bool found = false;
  if (!launch) return false;
  void* context = nullptr;
  if (!found) found = current_context(&context) == 0 && context;
  return found;
}

/// A kernel that reads tensors of the weight's size; null where none is known.
const Kernel* kernel_at(const Tensor& weight, ScalarType from, ScalarType to, bool anchor, bool grad) {
  const int device = index_of(weight);
  if (device >= DEVICES || number_of(from) < 0 || number_of(to) < 0 || !can_launch()) return nullptr;
  const Kernel& kernel = on_gpu[device][form_of(from, to, anchor, grad, weight.numel() % 16 == 0)];
  return kernel.function ? &kernel : nullptr;
}

/// The one that masks a weight, and with `grad` its gradient, too.
const Kernel* kernel_for(const Tensor& weight, ScalarType to, const Tensor& anchor, bool grad) {
  const ScalarType from = weight.scalar_type();
  if (from == at::kDouble || (anchor.defined() && anchor.scalar_type() != from)) return nullptr;
  if (!is_aligned(weight) || (anchor.defined() && !is_aligned(anchor))) return nullptr;
  return kernel_at(weight, from, to, anchor.defined(), grad);
}

/// The one that masks a gradient alone, which a product has just made, as that of a weight.
const Kernel* kernel_of(const Tensor& weight, ScalarType grad) {
  return kernel_at(weight, grad, weight.scalar_type(), false, false);
}

void* stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_CHECK(current_stream(index_of(tensor), &stream) == 0, "no current stream");
  return stream;
}

/// Whether kernels can be launched with numbers of the host: not what becomes part of a CUDA graph, in which keys
/// and laws are in memory, so that replays can have others.
bool takes_numbers(const Tensor& tensor) {
  int status = 0;
  return can_launch() && is_capturing(stream_of(tensor), &status) == 0 && status == 0;
}

/// Launch one. Parameters are what Triton has not made a constant, and two pointers of its own.
void run(const Kernel& kernel, const Tensor& weight, const Tensor& anchor, const Tensor& grad,
         const Tensor& used, const Tensor& masked_grad, const Mask& mask) {
  void *w = weight.data_ptr(), *u = used.data_ptr(), *none = nullptr;
  void *a = anchor.defined() ? anchor.data_ptr() : nullptr;
  void *g = grad.defined() ? grad.data_ptr() : nullptr;
  void *m = grad.defined() ? masked_grad.data_ptr() : nullptr;
  int32_t k0 = static_cast<int32_t>(mask.key[0]), k1 = static_cast<int32_t>(mask.key[1]);
  int32_t key_is_there = mask.key_at != nullptr, law_is_there = mask.row ? 2 : 0;
  int32_t threshold = mask.threshold, size = static_cast<int32_t>(weight.numel());
  float scale = static_cast<float>(mask.scale);
  std::array<void*, 24> parameters{};
  int count = 0;
  parameters[count++] = &w;
  if (a) parameters[count++] = &a;
  if (g) parameters[count++] = &g;
  parameters[count++] = &u;
  if (g) parameters[count++] = &m;
  // Nobody follows the pointers to key and law if the numbers are given.
  void* pointers[] = {mask.key_at, mask.thresholds, mask.scales, mask.row};
  for (void*& pointer : pointers) {
    if (!pointer) pointer = u;
    parameters[count++] = &pointer;
  }
  parameters[count++] = &k0;
  parameters[count++] = &k1;
  parameters[count++] = &key_is_there;
  parameters[count++] = &threshold;
  parameters[count++] = &scale;
  parameters[count++] = &law_is_there;
  parameters[count++] = &size;
  parameters[count++] = &none;
  parameters[count++] = &none;
  const unsigned programs = (static_cast<unsigned>(size) + kernel.block - 1) / kernel.block;
  const int error = launch(kernel.function, programs, 1, 1, kernel.threads, 1, 1, kernel.shared,
                           stream_of(weight), parameters.data(), nullptr);
  TORCH_CHECK(error == 0, "CUDA driver error ", error, " at the launch of a DropConnect mask");
}

/// How the CPU masks tensors of one type; false where it has no kernel for that.
struct OnCPU {
  Drop drop = nullptr;
  DropShared shared = nullptr;

  OnCPU() = default;
  OnCPU(ScalarType type, const Sharing& sharing) {
    if (number_of(type) < 0) return;
    sharing ? void(shared = shared_on_cpu[number_of(type)]) : void(drop = on_cpu[number_of(type)]);
  }
  explicit operator bool() const { return drop || shared; }
};

/// The masked weight into `used`, and the gradient in its own place; each where it is defined.
void run(const OnCPU& way, const Tensor& weight, const Tensor& anchor, const Tensor& grad, const Tensor& used,
         const Mask& mask) {
  const Tensor& some = weight.defined() ? weight : grad;
  const float narrow = static_cast<float>(mask.scale);
  const void* scale = some.scalar_type() == at::kDouble ? static_cast<const void*>(&mask.scale) : &narrow;
  const auto in = [](const Tensor& one) { return one.defined() ? one.const_data_ptr() : nullptr; };
  const auto out = [](const Tensor& one) { return one.defined() ? one.data_ptr() : nullptr; };
  const int threads = at::get_num_threads();
  if (way.drop) {
    way.drop(in(weight), in(anchor), in(grad), out(used), out(grad), mask.key, &mask.threshold, scale, 0, 0,
             some.numel(), threads);
    return;
  }
  const auto masked = [&](const Tensor& from, const Tensor& towards, const Tensor& to) {
    if (!from.defined()) return;
    way.shared(in(from), in(towards), out(to), mask.key, &mask.threshold, scale, mask.sharing.sizes.data(),
               mask.sharing.apart.data(), threads);
  };
  masked(weight, anchor, used);
  masked(grad, Tensor(), grad);
}

// Keys: see hash.py and random.py

uint64_t scramble(uint64_t seed) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// `_derived_words`.
void derive(uint32_t key[2], int64_t number) {
  const uint64_t factor = scramble(2 * static_cast<uint64_t>(number)) | 1;
  const uint64_t summand = scramble(2 * static_cast<uint64_t>(number) + 1);
  const auto fold = [](uint64_t z) { return z ^ static_cast<uint64_t>(static_cast<int64_t>(z) >> 32); };
  uint64_t z[2];
  for (int n = 0; n < 2; ++n) {
    const auto word = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int32_t>(key[n])));
    z[n] = fold(word * factor + summand);
  }
  constexpr uint64_t MIXER = 0xD1342543DE82EF95u;
  key[0] = static_cast<uint32_t>(fold(z[0] * MIXER + z[1]));
  key[1] = static_cast<uint32_t>(fold(z[1] * MIXER + z[0]));
}

/// `draw_key` in eager code: from the default generator of a device.
void draw_key(uint32_t key[2], at::Device device, int64_t rank) {
  if (device.is_cuda()) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> guard(generator.mutex());
    const uint64_t offset = generator.get_offset();
    generator.set_offset(offset + 4);
    const uint64_t seed = scramble(generator.current_seed() + offset * 0xD1342543DE82EF95u);
    key[0] = static_cast<uint32_t>(seed);
    key[1] = static_cast<uint32_t>(seed >> 32);
  } else {
    const Tensor words = at::randint(-(int64_t{1} << 31), int64_t{1} << 31, {2}, at::kInt);
    for (int n = 0; n < 2; ++n) key[n] = static_cast<uint32_t>(words.const_data_ptr<int32_t>()[n]);
  }
  if (rank != 0) derive(key, rank);
}

// Memory of the CPU for masked weights, used again: see cpu/workspace.py

std::mutex lock_of_blocks;
std::vector<Tensor> blocks;

/// A masked weight that lives no longer than one product.
struct Borrowed {
  Tensor block, used;
  explicit Borrowed(const Tensor& weight) {
    if (weight.numel() == 0) {
      used = at::empty_like(weight);
      return;
    }
    {
      std::lock_guard<std::mutex> guard(lock_of_blocks);
      for (auto one = blocks.begin(); one != blocks.end(); ++one) {
        if (one->scalar_type() == weight.scalar_type() && one->numel() >= weight.numel()) {
          block = std::move(*one);
          blocks.erase(one);
          break;
        }
      }
      if (!block.defined()) {  // smaller ones of that type have had their time
        for (auto one = blocks.begin(); one != blocks.end(); ++one) {
          if (one->scalar_type() == weight.scalar_type()) {
            blocks.erase(one);
            break;
          }
        }
      }
    }
    if (!block.defined()) block = at::empty({weight.numel()}, weight.options());
    used = block.narrow(0, 0, weight.numel()).view(weight.sizes());
  }
  ~Borrowed() {
    if (!block.defined()) return;
    std::lock_guard<std::mutex> guard(lock_of_blocks);
    blocks.push_back(std::move(block));
  }
};

}  // namespace

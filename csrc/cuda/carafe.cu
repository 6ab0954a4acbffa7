// The CUDA operators: block kernels (here) where one fits the call, otherwise a thread computes one output
// element with the functions of common/element.h.
#include <Python.h>
#include <torch/csrc/stable/library.h>

#include "../arguments.h"
#include "../common/element.h"
#include "launch.h"

namespace carafe {
namespace {

constexpr int kThreads = 256;

// Calls element(n, c, i, j) for every element of an output map, neighbouring threads on neighbouring addresses.
template <class T, class Element>
__global__ void __launch_bounds__(kThreads, 2)
    for_each_element(Map<T> output, int64_t batch, int64_t channels, int64_t height, int64_t width, Element element) {
  const int64_t count = batch * channels * height * width;
  const bool channels_last = output.channel_stride == 1 && channels > 1;
  for (int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += int64_t(gridDim.x) * kThreads) {
    int64_t rest = index, n, c, i, j;
    if (channels_last) {
      c = rest % channels, rest /= channels;
      j = rest % width, rest /= width;
      i = rest % height, n = rest / height;
    } else {
      j = rest % width, rest /= width;
      i = rest % height, rest /= height;
      c = rest % channels, n = rest / channels;
    }
    output.at(n, c, i, j) = element(n, c, i, j);
  }
}

template <class T>
struct ReassembleElement {
  Shape shape;
  Map<const T> features, masks;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return reassemble_element(shape, features, masks, n, c, i, j);
  }
};

template <class T>
struct GradFeaturesElement {
  Shape shape;
  Map<const T> grad_output, masks;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return grad_features_element(shape, grad_output, masks, n, c, i, j);
  }
};

template <class T>
struct GradMasksElement {
  Shape shape;
  Map<const T> grad_output, features;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return grad_masks_element(shape, grad_output, features, n, c, i, j);
  }
};

template <class T, class Element>
void launch_elements(
    Map<T> output, int64_t batch, int64_t channels, int64_t height, int64_t width, const Element& element) {
  const int64_t blocks = std::min(ceil_div(batch * channels * height * width, kThreads), kMaxBlocks);
  for_each_element<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream()>>>(
      output, batch, channels, height, width, element);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  template <class T>
  static void reassemble(
      const Shape& shape, const Map<T>& output, const Map<const T>& features, const Kernels<T>& kernels) {
    const bool launched = launch_block(
        [&](int64_t bytes) { return gpu::reassemble(shape, output, features, kernels, bytes, LaunchBlock{}); });
    if (launched) return;
    check_masks(kernels);
    const ReassembleElement<T> element{shape, features, kernels.map};
    launch_elements(output, shape.batch, shape.channels, shape.out_height, shape.out_width, element);
  }

  template <class T>
  static void grad_features(
      const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Kernels<T>& kernels) {
    const bool launched = launch_block(
        [&](int64_t bytes) { return gpu::grad_features(shape, grad, grad_output, kernels, bytes, LaunchBlock{}); });
    if (launched) return;
    check_masks(kernels);
    const GradFeaturesElement<T> element{shape, grad_output, kernels.map};
    launch_elements(grad, shape.batch, shape.channels, shape.height, shape.width, element);
  }

  template <class T>
  static void grad_kernels(
      const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
      const Kernels<T>& kernels) {
    const bool launched = launch_block([&](int64_t bytes) {
      return gpu::grad_kernels(shape, grad, grad_output, features, kernels, bytes, LaunchBlock{});
    });
    if (launched) return;
    check_masks(kernels);
    const GradMasksElement<T> element{shape, grad_output, features};
    launch_elements(grad, shape.batch, shape.mask_channels(), shape.out_height, shape.out_width, element);
  }

 private:
  template <class T>
  static void check_masks(const Kernels<T>& kernels) {
    STD_TORCH_CHECK(
        kernels.normalizer == Normalizer::none,
        "with a normalizer on CUDA, the kernels of a pixel must fit into a block's shared memory");
  }
};

// An operator on the device of its tensors, which the checks of arguments.h hold to be one.
template <auto Operator>
struct OnDevice;

template <class... Rest, Tensor (*Operator)(const Tensor&, Rest...)>
struct OnDevice<Operator> {
  static Tensor call(const Tensor& first, Rest... rest) {
    const torch::stable::accelerator::DeviceGuard guard(first.get_device_index());
    return Operator(first, rest...);
  }
};

}  // namespace
}  // namespace carafe

STABLE_TORCH_LIBRARY_IMPL(carafe_plugin, CUDA, m) {
  using namespace carafe;
  m.impl("carafe", TORCH_BOX(&OnDevice<&reassemble<Cuda>>::call));
  m.impl("_carafe_grad_features", TORCH_BOX(&OnDevice<&grad_features<Cuda>>::call));
  m.impl("_carafe_grad_kernels", TORCH_BOX(&OnDevice<&grad_kernels<Cuda>>::call));
}

// The GPU architectures that this library was compiled for, ascending, as nvcc counts them (800 for sm_80); 0 after the
// last. For Python (through ctypes).
extern "C" __attribute__((visibility("default"))) int carafe_cuda_architecture(int index) {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  constexpr int kCount = sizeof kArchitectures / sizeof *kArchitectures;
  return index >= 0 && index < kCount ? kArchitectures[index] : 0;
}

// Whether it has PTX of the last of them, which newer GPUs compile for themselves.
extern "C" __attribute__((visibility("default"))) int carafe_cuda_has_ptx() { return CARAFE_PTX; }

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

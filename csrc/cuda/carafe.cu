// The CUDA operators: a thread computes one output element with the functions of kernels/element.h.
#include <Python.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../arguments.h"
#include "../kernels/element.h"

namespace carafe {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it the threads loop; a grid's first axis admits 2^31 - 1

// Calls element(n, c, i, j) for every element of an output map, neighbouring threads on neighbouring addresses.
template <class T, class Element>
__global__ void __launch_bounds__(kThreads)
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
struct Reassemble {
  Shape shape;
  Map<const T> features, masks;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return reassemble_element(shape, features, masks, n, c, i, j);
  }
};

template <class T>
struct GradFeatures {
  Shape shape;
  Map<const T> grad_output, masks;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return grad_features_element(shape, grad_output, masks, n, c, i, j);
  }
};

template <class T>
struct GradMasks {
  Shape shape;
  Map<const T> grad_output, features;
  __device__ T operator()(int64_t n, int64_t c, int64_t i, int64_t j) const {
    return grad_masks_element(shape, grad_output, features, n, c, i, j);
  }
};

template <class T, class Element>
void launch(
    const Tensor& input, Map<T> output, int64_t batch, int64_t channels, int64_t height, int64_t width,
    const Element& element) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &stream));
  const int64_t blocks = std::min(ceil_div(batch * channels * height * width, kThreads), kMaxBlocks);
  for_each_element<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      output, batch, channels, height, width, element);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

struct Cuda {
  template <class T>
  static void reassemble(
      const Tensor& input, const Shape& shape, Map<T> output, Map<const T> features, Map<const T> masks) {
    const Reassemble<T> element{shape, features, masks};
    launch(input, output, shape.batch, shape.channels, shape.out_height, shape.out_width, element);
  }

  template <class T>
  static void grad_features(
      const Tensor& input, const Shape& shape, Map<T> output, Map<const T> grad_output, Map<const T> masks) {
    const GradFeatures<T> element{shape, grad_output, masks};
    launch(input, output, shape.batch, shape.channels, shape.height, shape.width, element);
  }

  template <class T>
  static void grad_masks(
      const Tensor& input, const Shape& shape, Map<T> output, Map<const T> grad_output, Map<const T> features) {
    const GradMasks<T> element{shape, grad_output, features};
    launch(input, output, shape.batch, shape.mask_channels(), shape.out_height, shape.out_width, element);
  }
};

}  // namespace
}  // namespace carafe

STABLE_TORCH_LIBRARY_IMPL(carafe_plugin, CUDA, m) {
  m.impl("carafe", TORCH_BOX(&carafe::carafe_impl<carafe::Cuda>));
  m.impl("_carafe_grad_features", TORCH_BOX(&carafe::grad_features_impl<carafe::Cuda>));
  m.impl("_carafe_grad_masks", TORCH_BOX(&carafe::grad_masks_impl<carafe::Cuda>));
}

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

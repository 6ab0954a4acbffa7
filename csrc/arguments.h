// From tensors to a Shape and Maps, with every check that keeps a kernel from reading what is not there. CPU and CUDA
// share it; Python has checked the same with friendlier words, but torch.ops callers come here directly.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>

#include "common/half.h"
#include "common/normalizer.h"
#include "common/shape.h"

namespace carafe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_pair(const Tensor& first, const char* first_name, const Tensor& second, const char* second_name) {
  const ScalarType dtype = first.scalar_type();
  STD_TORCH_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
          dtype == ScalarType::BFloat16,
      first_name, ": the dtype must be float64, float32, float16 or bfloat16");
  STD_TORCH_CHECK(first.dim() == 4, first_name, " must have 4 dimensions, got ", first.dim());
  STD_TORCH_CHECK(second.dim() == 4, second_name, " must have 4 dimensions, got ", second.dim());
  STD_TORCH_CHECK(
      first.scalar_type() == second.scalar_type(), first_name, " and ", second_name, " must have the same dtype");
  STD_TORCH_CHECK(
      first.is_cuda() == second.is_cuda() && first.get_device_index() == second.get_device_index(), first_name, " and ",
      second_name, " must be on the same device");
}

inline void check_size(const Tensor& tensor, const char* name, int64_t n, int64_t c, int64_t h, int64_t w) {
  STD_TORCH_CHECK(
      tensor.size(0) == n && tensor.size(1) == c && tensor.size(2) == h && tensor.size(3) == w, name,
      " must have shape (", n, ", ", c, ", ", h, ", ", w, "), got (", tensor.size(0), ", ", tensor.size(1), ", ",
      tensor.size(2), ", ", tensor.size(3), ")");
}

constexpr int64_t kMaxKernel = (1 << 15) - 1;
constexpr int64_t kMaxLength = (int64_t(1) << 31) - 1;

inline Shape make_shape(
    int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t kernel, int64_t groups, int64_t up,
    int64_t down) {
  STD_TORCH_CHECK(kernel >= 1 && kernel % 2 == 1, "kernel_size must be odd and at least 1, got ", kernel);
  STD_TORCH_CHECK(up >= 1 && down >= 1, "up and down must be at least 1, got ", up, " and ", down);
  STD_TORCH_CHECK(
      groups >= 1 && channels % groups == 0, "group_size must be at least 1 and divide the channels, got ", groups,
      " for ", channels, " channels");
  STD_TORCH_CHECK(height >= 0 && width >= 0, "height and width must not be negative, got ", height, " x ", width);
  // Products of two of these fit into an int64_t; what a tensor of such a size would take does not fit into any memory.
  STD_TORCH_CHECK(
      kernel <= kMaxKernel && std::max({up, down, height, width}) <= kMaxLength, "kernel_size must be at most ",
      kMaxKernel, ", up, down, height and width at most ", kMaxLength, ", got ", kernel, ", ", up, ", ", down, ", ",
      height, ", ", width);
  return Shape{batch,  channels, height, width, ceil_div(height * up, down), ceil_div(width * up, down),
               kernel, groups,   up,     down};
}

template <class T>
Map<const T> input_map(const Tensor& tensor) {
  const auto data = static_cast<const T*>(tensor.const_data_ptr());
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

template <class T>
Map<T> output_map(const Tensor& tensor) {
  const auto data = static_cast<T*>(tensor.mutable_data_ptr());
  return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

// torch's own rule for "channels_last and not also contiguous": strides of axes of length 1 say nothing.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int64_t axis : {1, 3, 2, 0}) {
    if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
    expected *= tensor.size(axis);
  }
  return true;
}

inline Normalizer make_normalizer(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number <= 3, "normalizer must be 0, 1, 2 or 3, got ", number);
  return static_cast<Normalizer>(number);
}

inline void check_kernels(const Shape& shape, const Tensor& kernels, Normalizer normalizer) {
  if (normalizer == Normalizer::none) {
    return check_size(kernels, "kernels", shape.batch, shape.mask_channels(), shape.out_height, shape.out_width);
  }
  STD_TORCH_CHECK(
      (shape.up == 1 || shape.down == 1) && std::max(shape.up, shape.down) <= 64,
      "with a normalizer, up or down must be 1 and neither more than 64, got ", shape.up, " and ", shape.down);
  const bool by_output = shape.up == 1;
  check_size(
      kernels, "kernels", shape.batch, shape.mask_channels() * shape.up * shape.up,
      by_output ? shape.out_height : shape.height, by_output ? shape.out_width : shape.width);
}

// A new map with the dtype and device of `source`, and its memory format if asked (the rule of the fake kernels).
inline Tensor new_map(const Tensor& source, int64_t n, int64_t c, int64_t h, int64_t w, bool keep_format) {
  using torch::headeronly::MemoryFormat;
  const int64_t size[] = {n, c, h, w};
  return torch::stable::empty(
      {size, 4}, source.scalar_type(), std::nullopt, source.device(), std::nullopt,
      keep_format && is_channels_last(source) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

// Calls `function` with a null pointer of the element type. A template function, because THO_DISPATCH_V2 splits its
// body at commas.
template <class Function>
void dispatch(ScalarType dtype, const Function& function) {
  switch (dtype) {
    case ScalarType::Double:
      return function(static_cast<double*>(nullptr));
    case ScalarType::Float:
      return function(static_cast<float*>(nullptr));
    case ScalarType::Half:
      return function(static_cast<Half*>(nullptr));
    case ScalarType::BFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    default:
      STD_TORCH_CHECK(false, "a dtype that check_pair admits has no kernel");
  }
}

// The three operators up to the point where the device matters: check, allocate, and hand typed maps to the device.
// `Device` has three static templates: reassemble, grad_features, grad_kernels (Shape, output, inputs, kernels).

template <class Device>
Tensor reassemble(
    const Tensor& features, const Tensor& kernels, int64_t kernel_size, int64_t group_size, int64_t up, int64_t down,
    int64_t normalizer_number) {
  check_pair(features, "features", kernels, "kernels");
  const Shape shape = make_shape(
      features.size(0), features.size(1), features.size(2), features.size(3), kernel_size, group_size, up, down);
  const Normalizer normalizer = make_normalizer(normalizer_number);
  check_kernels(shape, kernels, normalizer);
  Tensor output = new_map(features, shape.batch, shape.channels, shape.out_height, shape.out_width, true);
  if (output.numel() == 0) return output;
  dispatch(features.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Kernels<T> typed{input_map<T>(kernels), normalizer};
    Device::template reassemble<T>(shape, output_map<T>(output), input_map<T>(features), typed);
  });
  return output;
}

template <class Device>
Tensor grad_features(
    const Tensor& grad_output, const Tensor& kernels, int64_t height, int64_t width, int64_t kernel_size,
    int64_t group_size, int64_t up, int64_t down, int64_t normalizer_number) {
  check_pair(grad_output, "grad_output", kernels, "kernels");
  const Shape shape =
      make_shape(grad_output.size(0), grad_output.size(1), height, width, kernel_size, group_size, up, down);
  check_size(grad_output, "grad_output", shape.batch, shape.channels, shape.out_height, shape.out_width);
  const Normalizer normalizer = make_normalizer(normalizer_number);
  check_kernels(shape, kernels, normalizer);
  Tensor grad = new_map(grad_output, shape.batch, shape.channels, shape.height, shape.width, true);
  if (grad.numel() == 0) return grad;
  dispatch(grad_output.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Kernels<T> typed{input_map<T>(kernels), normalizer};
    Device::template grad_features<T>(shape, output_map<T>(grad), input_map<T>(grad_output), typed);
  });
  return grad;
}

template <class Device>
Tensor grad_kernels(
    const Tensor& grad_output, const Tensor& features, const Tensor& kernels, int64_t kernel_size, int64_t group_size,
    int64_t up, int64_t down, int64_t normalizer_number) {
  check_pair(grad_output, "grad_output", features, "features");
  check_pair(features, "features", kernels, "kernels");
  const Shape shape = make_shape(
      features.size(0), features.size(1), features.size(2), features.size(3), kernel_size, group_size, up, down);
  check_size(grad_output, "grad_output", shape.batch, shape.channels, shape.out_height, shape.out_width);
  const Normalizer normalizer = make_normalizer(normalizer_number);
  check_kernels(shape, kernels, normalizer);
  Tensor grad = new_map(kernels, kernels.size(0), kernels.size(1), kernels.size(2), kernels.size(3), true);
  if (grad.numel() == 0) return grad;
  dispatch(grad_output.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const Kernels<T> typed{input_map<T>(kernels), normalizer};
    Device::template grad_kernels<T>(
        shape, output_map<T>(grad), input_map<T>(grad_output), input_map<T>(features), typed);
  });
  return grad;
}

}  // namespace carafe

// From tensors to a Shape and Maps, with every check that keeps a kernel from reading what is not there. CPU and CUDA
// share it; Python has checked the same with friendlier words, but torch.ops callers come here directly.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "common/operators.h"
#include "torch_api.h"

namespace carafe {

inline std::string name_of_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return "float64";
    case ScalarType::Float:
      return "float32";
    case ScalarType::Half:
      return "float16";
    case ScalarType::BFloat16:
      return "bfloat16";
    default:
      return "another";
  }
}

inline std::string name_of_device(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(device_index(tensor));
  return tensor.is_cpu() ? "cpu" : "another";
}

inline void check_pair(const Tensor& first, const char* first_name, const Tensor& second, const char* second_name) {
  const ScalarType dtype = first.scalar_type();
  CARAFE_CHECK(
      dtype == ScalarType::Double || dtype == ScalarType::Float || dtype == ScalarType::Half ||
          dtype == ScalarType::BFloat16,
      first_name, ": the dtype must be float64, float32, float16 or bfloat16");
  CARAFE_CHECK(first.dim() == 4, first_name, " must have 4 dimensions, got ", first.dim());
  CARAFE_CHECK(second.dim() == 4, second_name, " must have 4 dimensions, got ", second.dim());
  CARAFE_CHECK(
      first.scalar_type() == second.scalar_type(), first_name, " and ", second_name, " must have the same dtype, got ",
      name_of_dtype(first), " and ", name_of_dtype(second));
  CARAFE_CHECK(
      first.is_cuda() == second.is_cuda() && device_index(first) == device_index(second), first_name, " and ",
      second_name, " must be on the same device, got ", name_of_device(first), " and ", name_of_device(second));
}

using Size = std::array<int64_t, 4>;

inline Size size_of(const Tensor& tensor) { return {tensor.size(0), tensor.size(1), tensor.size(2), tensor.size(3)}; }

inline void check_size(const Tensor& tensor, const char* name, const Size& expected) {
  const Size size = size_of(tensor);
  CARAFE_CHECK(
      size == expected, name, " must have shape (", expected[0], ", ", expected[1], ", ", expected[2], ", ",
      expected[3], "), got (", size[0], ", ", size[1], ", ", size[2], ", ", size[3], ")");
}

constexpr int64_t kMaxKernel = (1 << 15) - 1;
constexpr int64_t kMaxLength = (int64_t(1) << 31) - 1;

// `out_height` and `out_width`: the first rows and columns of the output that are wanted; all by default.
inline Shape make_shape(
    const Size& features, int64_t kernel, int64_t groups, int64_t up, int64_t down, Optional<int64_t> out_height,
    Optional<int64_t> out_width) {
  const auto [batch, channels, height, width] = features;
  CARAFE_CHECK(kernel >= 1 && kernel % 2 == 1, "kernel_size must be odd and at least 1, got ", kernel);
  CARAFE_CHECK(up >= 1 && down >= 1, "up and down must be at least 1, got ", up, " and ", down);
  CARAFE_CHECK(
      groups >= 1 && channels % groups == 0, "group_size must be at least 1 and divide the channels, got ", groups,
      " for ", channels, " channels");
  CARAFE_CHECK(height >= 0 && width >= 0, "height and width must not be negative, got ", height, " x ", width);
  // Products of two of these fit into an int64_t; what a tensor of such a size would take does not fit into any memory.
  CARAFE_CHECK(
      kernel <= kMaxKernel && std::max({up, down, height, width}) <= kMaxLength, "kernel_size must be at most ",
      kMaxKernel, ", up, down, height and width at most ", kMaxLength, ", got ", kernel, ", ", up, ", ", down, ", ",
      height, ", ", width);
  Shape shape{batch, channels, height, width, 0, 0, kernel, groups, up, down};
  shape.out_height = out_height.value_or(shape.output_height());
  shape.out_width = out_width.value_or(shape.output_width());
  CARAFE_CHECK(
      0 <= shape.out_height && shape.out_height <= shape.output_height() && 0 <= shape.out_width &&
          shape.out_width <= shape.output_width(),
      "the output (out_height x out_width, or grad_output) must be of at most ", shape.output_height(), " x ",
      shape.output_width(), ", got ", shape.out_height, " x ", shape.out_width);
  return shape;
}

inline Size output_size(const Shape& shape) { return {shape.batch, shape.channels, shape.out_height, shape.out_width}; }

template <class T>
Map<T> to_map(T* data, const Tensor& tensor) {
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

inline Normalizer check_kernels(const Shape& shape, const Tensor& kernels, int64_t normalizer) {
  CARAFE_CHECK(normalizer >= 0 && normalizer <= 3, "normalizer must be 0, 1, 2 or 3, got ", normalizer);
  const bool by_output = normalizer == 0 || shape.up == 1;
  CARAFE_CHECK(
      normalizer == 0 || ((by_output || shape.down == 1) && std::max(shape.up, shape.down) <= 64),
      "with a normalizer, up or down must be 1 and neither more than 64, got ", shape.up, " and ", shape.down);
  const int64_t channels = shape.mask_channels();
  check_size(
      kernels, "kernels",
      by_output ? Size{shape.batch, channels, shape.out_height, shape.out_width}
                : Size{shape.batch, channels * shape.up * shape.up, shape.height, shape.width});
  return static_cast<Normalizer>(normalizer);
}

// A new map with the dtype, device and memory format of `source` (the rule of the fake kernels).
inline Tensor new_map(const Tensor& source, const Size& size) {
  return empty_like(source, size, is_channels_last(source));
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
      CARAFE_CHECK(false, "a dtype that check_pair admits has no kernel");
  }
}

// Computes a map like `source` of that size, once all is checked: `Device::run` gets the typed call and the map.
template <class Device, template <class> class Operator, class... Inputs>
Tensor run(
    const Shape& shape, const Tensor& kernels, int64_t normalizer_number, const Tensor& source, const Size& size,
    const Inputs&... inputs) {
  const Normalizer normalizer = check_kernels(shape, kernels, normalizer_number);
  const Tensor result = new_map(source, size);
  if (result.numel() == 0) return result;
  dispatch(source.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto input = [](const Tensor& tensor) {
      return to_map(static_cast<const T*>(tensor.const_data_ptr()), tensor);
    };
    const auto output = to_map(static_cast<T*>(result.mutable_data_ptr()), result);
    Device::run(Operator<T>{shape, output, input(inputs)..., {input(kernels), normalizer}}, result);
  });
  return result;
}

template <class Device>
Tensor reassemble(
    const Tensor& features, const Tensor& kernels, int64_t kernel_size, int64_t group_size, int64_t up, int64_t down,
    int64_t normalizer, Optional<int64_t> out_height, Optional<int64_t> out_width) {
  check_pair(features, "features", kernels, "kernels");
  const Shape shape = make_shape(size_of(features), kernel_size, group_size, up, down, out_height, out_width);
  return run<Device, Reassemble>(shape, kernels, normalizer, features, output_size(shape), features);
}

template <class Device>
Tensor grad_features(
    const Tensor& grad_output, const Tensor& kernels, int64_t height, int64_t width, int64_t kernel_size,
    int64_t group_size, int64_t up, int64_t down, int64_t normalizer) {
  check_pair(grad_output, "grad_output", kernels, "kernels");
  const Size size{grad_output.size(0), grad_output.size(1), height, width};
  const Shape shape = make_shape(size, kernel_size, group_size, up, down, grad_output.size(2), grad_output.size(3));
  check_size(grad_output, "grad_output", output_size(shape));
  return run<Device, GradFeatures>(shape, kernels, normalizer, grad_output, size, grad_output);
}

template <class Device>
Tensor grad_kernels(
    const Tensor& grad_output, const Tensor& features, const Tensor& kernels, int64_t kernel_size, int64_t group_size,
    int64_t up, int64_t down, int64_t normalizer) {
  check_pair(grad_output, "grad_output", features, "features");
  check_pair(features, "features", kernels, "kernels");
  const Shape shape =
      make_shape(size_of(features), kernel_size, group_size, up, down, grad_output.size(2), grad_output.size(3));
  check_size(grad_output, "grad_output", output_size(shape));
  return run<Device, GradKernels>(shape, kernels, normalizer, kernels, size_of(kernels), grad_output, features);
}

}  // namespace carafe

// From tensors to a Shape and Maps, as arguments.h does it, for the operators that start at the content encoder's raw
// output (cpu/normalize.h says how that lies in memory).
#pragma once

#include "arguments.h"
#include "common/normalizer.h"

namespace carafe {

inline Normalizer make_normalizer(int64_t normalizer) {
  STD_TORCH_CHECK(normalizer >= 0 && normalizer <= 2, "normalizer must be 0, 1 or 2, got ", normalizer);
  return static_cast<Normalizer>(normalizer + 1);
}

inline void check_logits(const Shape& shape, const Tensor& logits) {
  STD_TORCH_CHECK(
      (shape.up == 1 || shape.down == 1) && std::max(shape.up, shape.down) <= 64,
      "from logits, up or down must be 1 and neither more than 64, got ", shape.up, " and ", shape.down);
  const bool by_output = shape.up == 1;
  check_size(
      logits, "logits", shape.batch, shape.mask_channels() * shape.up * shape.up,
      by_output ? shape.out_height : shape.height, by_output ? shape.out_width : shape.width);
}

template <class Launcher>
Tensor logits_impl(
    const Tensor& features, const Tensor& logits, int64_t kernel_size, int64_t group_size, int64_t up, int64_t down,
    int64_t normalizer) {
  check_pair(features, "features", logits, "logits");
  const Shape shape = make_shape(
      features.size(0), features.size(1), features.size(2), features.size(3), kernel_size, group_size, up, down);
  check_logits(shape, logits);
  const Normalizer how = make_normalizer(normalizer);
  Tensor output = new_map(features, shape.batch, shape.channels, shape.out_height, shape.out_width, true);
  if (output.numel() == 0) return output;
  dispatch(features.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Launcher::template reassemble_logits<T>(
        shape, output_map<T>(output), input_map<T>(features), {input_map<T>(logits), how});
  });
  return output;
}

template <class Launcher>
Tensor logits_grad_features_impl(
    const Tensor& grad_output, const Tensor& logits, int64_t height, int64_t width, int64_t kernel_size,
    int64_t group_size, int64_t up, int64_t down, int64_t normalizer) {
  check_pair(grad_output, "grad_output", logits, "logits");
  const Shape shape =
      make_shape(grad_output.size(0), grad_output.size(1), height, width, kernel_size, group_size, up, down);
  check_size(grad_output, "grad_output", shape.batch, shape.channels, shape.out_height, shape.out_width);
  check_logits(shape, logits);
  const Normalizer how = make_normalizer(normalizer);
  Tensor grad = new_map(grad_output, shape.batch, shape.channels, shape.height, shape.width, true);
  if (grad.numel() == 0) return grad;
  dispatch(grad_output.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Launcher::template grad_features_logits<T>(
        shape, output_map<T>(grad), input_map<T>(grad_output), {input_map<T>(logits), how});
  });
  return grad;
}

template <class Launcher>
Tensor logits_grad_logits_impl(
    const Tensor& grad_output, const Tensor& features, const Tensor& logits, int64_t kernel_size, int64_t group_size,
    int64_t up, int64_t down, int64_t normalizer) {
  check_pair(grad_output, "grad_output", features, "features");
  check_pair(features, "features", logits, "logits");
  const Shape shape = make_shape(
      features.size(0), features.size(1), features.size(2), features.size(3), kernel_size, group_size, up, down);
  check_size(grad_output, "grad_output", shape.batch, shape.channels, shape.out_height, shape.out_width);
  check_logits(shape, logits);
  const Normalizer how = make_normalizer(normalizer);
  Tensor grad = new_map(logits, shape.batch, logits.size(1), logits.size(2), logits.size(3), true);
  if (grad.numel() == 0) return grad;
  dispatch(grad_output.scalar_type(), [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    Launcher::template grad_logits<T>(
        shape, output_map<T>(grad), input_map<T>(grad_output), input_map<T>(features), {input_map<T>(logits), how});
  });
  return grad;
}

}  // namespace carafe

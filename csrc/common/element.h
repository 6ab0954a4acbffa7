// One output element of each operator: the definition in reference.py, written for a CPU loop and a CUDA thread alike.
// All three are gathers, so they need no atomics and give the same bits on every run.
#pragma once

#include "half.h"

namespace carafe {

// Y[n, c, i', j'] (eq. 3 of the paper)
template <class T>
CARAFE_HOST_DEVICE T reassemble_element(
    const Shape& shape, const Map<const T>& features, const Map<const T>& masks, int64_t n, int64_t c, int64_t out_row,
    int64_t out_column) {
  accumulator_t<T> sum = 0;
  const int64_t first_row = shape.source(out_row) - shape.radius();
  const int64_t first_column = shape.source(out_column) - shape.radius();
  const int64_t first_tap = shape.group_of(c) * shape.taps();
  for (int64_t u = 0; u < shape.kernel; ++u) {
    const int64_t row = first_row + u;
    for (int64_t v = 0; v < shape.kernel; ++v) {
      const int64_t column = first_column + v;
      // Outside the map the features are zero, not absent: an infinite mask there gives NaN, as in the reference.
      const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
      const accumulator_t<T> feature = inside ? widen(features.at(n, c, row, column)) : accumulator_t<T>(0);
      sum += widen(masks.at(n, first_tap + u * shape.kernel + v, out_row, out_column)) * feature;
    }
  }
  return Narrow<T>::from(sum);
}

// dX[n, c, i, j]: every output whose neighbourhood holds (i, j) gives its share.
template <class T>
CARAFE_HOST_DEVICE T grad_features_element(
    const Shape& shape, const Map<const T>& grad_output, const Map<const T>& masks, int64_t n, int64_t c, int64_t row,
    int64_t column) {
  accumulator_t<T> sum = 0;
  const int64_t first_tap = shape.group_of(c) * shape.taps();
  for (int64_t u = 0; u < shape.kernel; ++u) {
    const int64_t source_row = row - u + shape.radius();
    if (source_row < 0 || source_row >= shape.height) continue;
    for (int64_t v = 0; v < shape.kernel; ++v) {
      const int64_t source_column = column - v + shape.radius();
      if (source_column < 0 || source_column >= shape.width) continue;
      const int64_t tap = first_tap + u * shape.kernel + v;
      for (int64_t i = shape.first_output(source_row); i < shape.first_output(source_row + 1); ++i) {
        for (int64_t j = shape.first_output(source_column); j < shape.first_output(source_column + 1); ++j) {
          sum += widen(masks.at(n, tap, i, j)) * widen(grad_output.at(n, c, i, j));
        }
      }
    }
  }
  return Narrow<T>::from(sum);
}

// dM[n, mask_channel, i', j']
template <class T>
CARAFE_HOST_DEVICE T grad_masks_element(
    const Shape& shape, const Map<const T>& grad_output, const Map<const T>& features, int64_t n, int64_t mask_channel,
    int64_t out_row, int64_t out_column) {
  const int64_t tap = mask_channel % shape.taps();
  const int64_t row = shape.source(out_row) + tap / shape.kernel - shape.radius();
  const int64_t column = shape.source(out_column) + tap % shape.kernel - shape.radius();
  const bool inside = row >= 0 && row < shape.height && column >= 0 && column < shape.width;
  accumulator_t<T> sum = 0;
  const int64_t first_channel = mask_channel / shape.taps() * shape.group_channels();
  for (int64_t c = first_channel; c < first_channel + shape.group_channels(); ++c) {
    const accumulator_t<T> feature = inside ? widen(features.at(n, c, row, column)) : accumulator_t<T>(0);
    sum += widen(grad_output.at(n, c, out_row, out_column)) * feature;
  }
  return Narrow<T>::from(sum);
}

}  // namespace carafe

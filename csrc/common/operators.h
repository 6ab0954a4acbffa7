// The operators: what a call of each reads and writes, and how to compute one output element of it, the definition in
// reference.py, for a CPU loop and a CUDA thread alike. All three are gathers, so they need no atomics and give the
// same bits on every run.
#pragma once

#include "half.h"

namespace carafe {

// none: the kernels are masks, normalised already and in the layout of the output. Otherwise they are logits, as the
// content encoder leaves them. carafe_plugin.ops.reference has the definition, carafe_plugin.ops._operators the same
// numbers.
enum class Normalizer { none, softmax, sigmoid, sigmoid_normalized };

template <class T>
struct Kernels {
  Map<const T> map;
  Normalizer normalizer;
};

// element() is for masks.
template <class T>
struct Reassemble {
  using type = T;
  Shape shape;
  Map<T> result;
  Map<const T> features;
  Kernels<T> kernels;

  // Y[n, c, i', j'] (eq. 3 of the paper)
  CARAFE_HOST_DEVICE T element(int64_t n, int64_t c, int64_t out_row, int64_t out_column) const {
    accumulator_t<T> sum = 0;
    const int64_t first_row = shape.source(out_row) - shape.radius();
    const int64_t first_column = shape.source(out_column) - shape.radius();
    const int64_t first_tap = shape.group_of(c) * shape.taps();
    for (int64_t u = 0; u < shape.kernel; ++u) {
      const int64_t row = first_row + u;
      for (int64_t v = 0; v < shape.kernel; ++v) {
        const int64_t column = first_column + v;
        // Outside the map the features are zero, not absent: an infinite mask there gives NaN, as in the reference.
        const accumulator_t<T> feature =
            shape.inside(row, column) ? widen(features.at(n, c, row, column)) : accumulator_t<T>(0);
        sum += widen(kernels.map.at(n, first_tap + u * shape.kernel + v, out_row, out_column)) * feature;
      }
    }
    return narrow<T>(sum);
  }
};

template <class T>
struct GradFeatures {
  using type = T;
  Shape shape;
  Map<T> result;
  Map<const T> grad_output;
  Kernels<T> kernels;

  // dX[n, c, i, j]: every output whose neighbourhood holds (i, j) gives its share.
  CARAFE_HOST_DEVICE T element(int64_t n, int64_t c, int64_t row, int64_t column) const {
    accumulator_t<T> sum = 0;
    const int64_t first_tap = shape.group_of(c) * shape.taps();
    for (int64_t u = 0; u < shape.kernel; ++u) {
      const int64_t source_row = row - u + shape.radius();
      for (int64_t v = 0; v < shape.kernel; ++v) {
        const int64_t source_column = column - v + shape.radius();
        if (!shape.inside(source_row, source_column)) continue;
        const int64_t tap = first_tap + u * shape.kernel + v;
        const int64_t last_row = smaller(shape.first_output(source_row + 1), shape.out_height);
        const int64_t last_column = smaller(shape.first_output(source_column + 1), shape.out_width);
        for (int64_t i = shape.first_output(source_row); i < last_row; ++i) {
          for (int64_t j = shape.first_output(source_column); j < last_column; ++j) {
            sum += widen(kernels.map.at(n, tap, i, j)) * widen(grad_output.at(n, c, i, j));
          }
        }
      }
    }
    return narrow<T>(sum);
  }
};

template <class T>
struct GradKernels {
  using type = T;
  Shape shape;
  Map<T> result;
  Map<const T> grad_output, features;
  Kernels<T> kernels;  // read where there is a normaliser

  // dM[n, mask_channel, i', j']
  CARAFE_HOST_DEVICE T element(int64_t n, int64_t mask_channel, int64_t out_row, int64_t out_column) const {
    const int64_t tap = mask_channel % shape.taps();
    const int64_t row = shape.source(out_row) + tap / shape.kernel - shape.radius();
    const int64_t column = shape.source(out_column) + tap % shape.kernel - shape.radius();
    const bool inside = shape.inside(row, column);
    accumulator_t<T> sum = 0;
    const int64_t first_channel = mask_channel / shape.taps() * shape.group_channels();
    for (int64_t c = first_channel; c < first_channel + shape.group_channels(); ++c) {
      const accumulator_t<T> feature = inside ? widen(features.at(n, c, row, column)) : accumulator_t<T>(0);
      sum += widen(grad_output.at(n, c, out_row, out_column)) * feature;
    }
    return narrow<T>(sum);
  }
};

}  // namespace carafe

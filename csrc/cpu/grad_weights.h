// The gradient to weights from staged features and cotangents: vectors run along the row, a block of taps and output
// phases stays in registers while the channels pass by.
#pragma once

#include "loops.h"

namespace carafe {

// P outputs times U taps stay in registers while the channels pass by. Each output's cotangents lie `out_step` after
// the last one's, its gradients `grad_step`.
template <class V, int P, int U, class A>
CARAFE_INLINE void grad_masks_block(
    int64_t channels, const A* grad_output, int64_t grad_channel_step, int64_t out_step, const A* features,
    int64_t channel_step, const int64_t* offsets, A* grad, int64_t tap_step, int64_t grad_step, int64_t begin,
    int64_t end) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][P];
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[u][p] = V::load(grad + u * tap_step + p * grad_step + q);
    }
    for (int64_t c = 0; c < channels; ++c) {
      typename V::type cotangent[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) cotangent[p] = V::load(grad_output + c * grad_channel_step + p * out_step + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        typename V::type value = V::load(features + c * channel_step + offsets[u] + q);
        if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[u][p] += cotangent[p] * value;
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(grad + u * tap_step + p * grad_step + q, sum[u][p]);
    }
  }
}

template <class V, int P, class A>
CARAFE_INLINE void grad_masks_taps(
    int64_t taps, int64_t channels, const A* grad_output, int64_t grad_channel_step, int64_t out_step,
    const A* features, int64_t channel_step, const int64_t* offsets, A* grad, int64_t tap_step, int64_t grad_step,
    int64_t lanes) {
  for_each_block<5, 3, 1>(taps, [&](auto count, int64_t tap) CARAFE_ALWAYS_INLINE {
    with_half_tail<V>(0, lanes, [&](auto vector, int64_t begin, int64_t end) CARAFE_ALWAYS_INLINE {
      grad_masks_block<decltype(vector), P, count>(
          channels, grad_output, grad_channel_step, out_step, features, channel_step, offsets + tap,
          grad + tap * tap_step, tap_step, grad_step, begin, end);
    });
  });
}

// Downsampling by a whole number, one row of features after the other: each load serves all the output rows that read
// the row, which see it through another row of taps each.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_weights_by_feature_rows(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t k = shape.kernel, down = shape.down, tap_step = sum.channel_stride();
  list_taps(shape, x, 0, k, offsets);
  for (int64_t row = 0; row < x.rows; ++row) {
    const int64_t seen_by_first = tile.row_begin + row;  // the row of taps, perhaps past the last, of output row 0
    const int64_t first = std::max(rows.begin, ceil_div(seen_by_first - k + 1, down));
    const int64_t end = std::min(rows.end, seen_by_first / down + 1);
    for_each_block<ManyRegisters ? 3 : 0, 2, 1>(end - first, [&](auto outputs, int64_t each) CARAFE_ALWAYS_INLINE {
      const int64_t o = first + each, place = o - rows.begin;
      grad_masks_taps<V, outputs>(
          k, dy.channels, dy.data + place * dy.pitch, dy.channel_stride(), dy.pitch, x.data + row * x.row_stride(),
          x.channel_stride(), offsets, sum.data + (seen_by_first - o * down) * k * tap_step + place * sum.pitch,
          tap_step, sum.pitch - down * k * tap_step, valid_lanes(shape, tile));
    });
  }
}

// Adds to `sum` what the channels of dy give.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_weights_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  if (shape.up == 1) {
    return grad_weights_by_feature_rows<V, ManyRegisters>(shape, tile, x, dy, sum, offsets);
  }
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
    for_each_block<ManyRegisters ? 4 : 0, 2, 1>(count, [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
      grad_masks_taps<V, outputs>(
          shape.taps(), dy.channels, dy.data + (place + p) * dy.pitch, dy.channel_stride(), dy.pitch, from,
          x.channel_stride(), offsets, sum.data + (place + p) * sum.pitch, sum.channel_stride(), sum.pitch,
          valid_lanes(shape, tile));
    });
  });
}

}  // namespace carafe

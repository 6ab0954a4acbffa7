// The gradient to masks from staged features and gradients of outputs: vectors run along the row, a block of taps and
// output phases stays in registers while the channels pass by.
#pragma once

#include "buffer.h"

namespace carafe {

// Adds to the gradients of U taps of P outputs. Those of an output lie `grad.phase_step` after the last one's.
template <class V, int P, int U, class A>
CARAFE_INLINE void grad_masks_block(
    int64_t channels, const Lanes<A>& grad_output, const Lanes<A>& features, const int64_t* offsets,
    const Lanes<A>& grad, int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][P];
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[u][p] = V::load(grad(u, p) + q);
    }
    for (int64_t c = 0; c < channels; ++c) {
      typename V::type outer[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) outer[p] = V::load(grad_output(c, p) + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        typename V::type value = V::load(features(c) + offsets[u] + q);
        if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[u][p] += outer[p] * value;
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(grad(u, p) + q, sum[u][p]);
    }
  }
}

template <class V, int P, class A>
CARAFE_INLINE void grad_masks_taps(
    int64_t channels, const Lanes<A>& grad_output, const Lanes<A>& features, const Taps& taps, const Lanes<A>& grad,
    int64_t lanes) {
  for_each_block<5, 3, 1>(taps.count, [&](auto count, int64_t tap) CARAFE_ALWAYS_INLINE {
    with_half_tail<V>(0, lanes, [&](auto vector, int64_t begin, int64_t end) CARAFE_ALWAYS_INLINE {
      grad_masks_block<decltype(vector), P, count>(
          channels, grad_output, features, taps.offsets + tap, grad.from(tap), begin, end);
    });
  });
}

// Downsampling by a whole number, one row of features after the other: each load serves all the output rows that read
// the row, which see it through another row of taps each.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_masks_by_feature_rows(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t k = shape.kernel, down = shape.down, tap_step = sum.channel_stride();
  const Taps taps = list_taps(shape, x, 0, k, offsets);
  for (int64_t row = 0; row < x.rows; ++row) {
    const int64_t seen_by_first = tile.row_begin + row;  // the row of taps, perhaps past the last, of output row 0
    const int64_t first = std::max(rows.begin, ceil_div(seen_by_first - k + 1, down));
    const int64_t end = std::min(rows.end, seen_by_first / down + 1);
    for_each_block<ManyRegisters ? 3 : 0, 2, 1>(end - first, [&](auto outputs, int64_t each) CARAFE_ALWAYS_INLINE {
      const int64_t o = first + each, place = o - rows.begin;
      const Lanes<A> grad{sum.at((seen_by_first - o * down) * k, place), tap_step, sum.pitch - down * k * tap_step};
      grad_masks_taps<V, outputs>(dy.channels, dy.row(place), x.row(row), taps, grad, valid_lanes(shape, tile));
    });
  }
}

// Adds to `sum` what the channels of dy give.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_masks_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  if (shape.up == 1) {
    return grad_masks_by_feature_rows<V, ManyRegisters>(shape, tile, x, dy, sum, offsets);
  }
  for_each_run(
      shape, tile, x, offsets,
      [&](const Lanes<A>& features, const Taps& taps, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
        for_each_block<ManyRegisters ? 4 : 0, 2, 1>(count, [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
          grad_masks_taps<V, outputs>(
              dy.channels, dy.row(0).from(0, place + p), features, taps, sum.row(0).from(0, place + p),
              valid_lanes(shape, tile));
        });
      });
}

}  // namespace carafe

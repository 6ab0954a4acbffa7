// The gradient to masks from staged features and gradients of outputs: vectors run along the row, a block of taps and
// output phases stays in registers while the channels pass by.
#pragma once

#include "reassemble.h"

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

// Downsampling by 2 with features straight from a row of the map, lanes [begin, end) in whole vectors: U taps from
// `tap` on of P outputs. With Cut, columns outside the map count as zeros, the row beginning at `column` of it. As much
// of `next` is prefetched.
template <class V, bool Cut, int P, int U, class T, class A>
CARAFE_INLINE void grad_masks_halves_block(
    int64_t channels, const Lanes<A>& grad_output, const SourceRow<T>& row, const SourceRow<T>* next, int64_t channel,
    int64_t tap, const Lanes<A>& grad, int64_t begin, int64_t end, int64_t column, int64_t width) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][P];
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[u][p] = V::load(grad(u, p) + q);
    }
    typename V::index inside[U];
    if constexpr (Cut) {
      for (int u = 0; u < U; ++u) {
        const int64_t from = column + 2 * q + tap + u;
        inside[u] = lanes_between<V>(ceil_div(-from, 2), ceil_div(width - from, 2));
      }
    }
    const T* columns = row.at(channel, 2 * q + tap);
    const T* ahead = next ? next->at(channel, 2 * q) : nullptr;
    for (int64_t c = 0; c < channels; ++c, columns += row.channel_step) {
      typename V::type outer[P], values[U + 1];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) outer[p] = V::load(grad_output(c, p) + q);
#pragma GCC unroll 3
      for (int u = 0; u < U; u += 2) load_pairs<V>(columns + u, values[u], values[u + 1]);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        if constexpr (Cut) values[u] = (typename V::type)((typename V::index)values[u] & inside[u]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[u][p] += outer[p] * values[u];
      }
      if (ahead) {
        __builtin_prefetch(ahead, 0, 3);
        if constexpr (sizeof(T) * V::lanes >= 64) __builtin_prefetch(ahead + V::lanes, 0, 3);
        ahead += next->channel_step;
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(grad(u, p) + q, sum[u][p]);
    }
  }
}

// Adds to `sum` what the channels of dy give with those of the map from `channel` on.
template <class V, class T, class A>
CARAFE_INLINE void grad_masks_halves(
    const Shape& shape, const Tile& tile, const SourceRow<T>* source, int64_t count, int64_t channel,
    const Staged<A>& dy, const Staged<A>& sum) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t k = shape.kernel, tap_step = sum.channel_stride(), lanes = valid_lanes(shape, tile);
  const Interior<V> inside(shape, tile, ceil_div(lanes, V::lanes) * V::lanes);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t seen_by_first = tile.row_begin + row;  // as in grad_masks_by_feature_rows
    const int64_t first = std::max(rows.begin, ceil_div(seen_by_first - k + 1, 2));
    const int64_t end = std::min(rows.end, seen_by_first / 2 + 1);
    const SourceRow<T>* next = row + 1 < count ? source + row + 1 : nullptr;
    for_each_block<3, 2, 1>(end - first, [&](auto outputs, int64_t each) CARAFE_ALWAYS_INLINE {
      const int64_t o = first + each, place = o - rows.begin;
      const Lanes<A> grad{sum.at((seen_by_first - o * 2) * k, place), tap_step, sum.pitch - 2 * k * tap_step};
      for_each_block<5, 3, 1>(k, [&](auto taps, int64_t tap) CARAFE_ALWAYS_INLINE {
        const auto vectors = [&](auto cut, int64_t from, int64_t to) CARAFE_ALWAYS_INLINE {
          grad_masks_halves_block<V, cut, outputs, taps>(
              dy.channels, dy.row(place), source[row], next, channel, tap, grad.from(tap), from, to, inside.column,
              shape.width);
        };
        if (inside.begin > 0) vectors(Constant<1>(), 0, inside.begin);
        if (inside.begin < inside.end) vectors(Constant<0>(), inside.begin, inside.end);
        if (inside.end < lanes) vectors(Constant<1>(), inside.end, lanes);
      });
      next = nullptr;
    });
  }
}

}  // namespace carafe

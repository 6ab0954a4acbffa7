// The arithmetic on staged buffers: vectors run along the row, a block of channels and output phases stays in
// registers.
#pragma once

#include "plan.h"

namespace carafe {

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls run(features, place, count) for every run of outputs that read the same features: `count` phases from `place`
// on (in units of a pitch, from the first output row of the tile), which read `features` at `offsets` (one a tap). All
// outputs of a source row are one run where down is 1.
template <class A, class Function>
CARAFE_INLINE void for_each_run(
    const Shape& shape, const Tile& tile, const OutputRows& rows, const Staged<A>& features, int64_t* offsets,
    const Function& run) {
  const int64_t k = shape.kernel;
  for (int64_t phase = 0; phase < shape.up;) {
    const int64_t source = phase * shape.down / shape.up;
    int64_t next = phase + 1;
    while (next < shape.up && next * shape.down / shape.up == source) ++next;
    const bool whole = next - phase == shape.up;  // then the rows, too, are consecutive outputs
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      const LaneOffset at(source + tap % k - shape.radius(), shape.down);
      offsets[tap] = tap / k * features.row_stride() + at.phase * features.pitch + at.lanes;
    }
    for (int64_t s = tile.row_begin; s < tile.row_end; ++s) {
      const OutputRows own(shape, s, s + 1);
      const A* const from = features.data + (s - tile.row_begin) * features.row_stride();
      for (int64_t row = own.begin; row < own.end; row += whole ? own.count() : 1) {
        run(from, (row - rows.begin) * shape.up + phase, whole ? own.count() * shape.up : next - phase);
      }
    }
    phase = next;
  }
}

// ------------------------------------------------------------------------------------------------------ forward

// Where a block of outputs goes: to a buffer, P phases `step` apart,
template <class A>
struct ToBuffer {
  A* data;
  int64_t channel_step, step;

  CARAFE_INLINE ToBuffer next(int64_t channels) const { return {data + channels * channel_step, channel_step, step}; }

  template <class V, int P, int C>
  CARAFE_INLINE void expect(int64_t) const {}

  template <class V, int P>
  CARAFE_INLINE void put(int64_t c, int64_t q, const typename V::type (&values)[P]) const {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) V::store(data + c * channel_step + p * step + q, values[p]);
  }
};

// or straight to a map, where each row holds one phase, or two that take turns.
template <class A, int Phases>
struct ToMap {
  A* data;
  int64_t channel_step, row_step;

  CARAFE_INLINE ToMap next(int64_t channels) const { return {data + channels * channel_step, channel_step, row_step}; }

  // Asks for the memory that the next C channels will go to.
  template <class V, int P, int C>
  CARAFE_INLINE void expect(int64_t q) const {
#pragma GCC unroll 8
    for (int c = C; c < 2 * C; ++c) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const A* const to = data + c * channel_step + p / Phases * row_step + Phases * q;
        __builtin_prefetch(to + p % Phases * V::lanes, 1, 2);
      }
    }
  }

  template <class V, int P>
  CARAFE_INLINE void put(int64_t c, int64_t q, const typename V::type (&values)[P]) const {
#pragma GCC unroll 4
    for (int p = 0; p < P; p += Phases) {
      A* const to = data + c * channel_step + p / Phases * row_step + Phases * q;
      if constexpr (Phases == 1) {
        store_narrowed<V>(to, values[p]);
      } else {
        store_pairs<V>(to, values[p], values[p + 1]);
      }
    }
  }
};

// P outputs share the features they read; C channels share the masks. The last vector steps back where `lanes` is no
// multiple of a vector.
template <class V, int P, int C, class A, class Output>
CARAFE_INLINE void reassemble_block(
    const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, const A* masks, int64_t tap_step,
    int64_t out_step, const Output& output, int64_t lanes) {
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    output.template expect<V, P, C>(q);
    typename V::type sum[C][P] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      typename V::type weights[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        weights[p] = V::load(masks + tap * tap_step + p * out_step + q);
        if constexpr (C > 1) weights[p] = shared<V>(weights[p]);
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        typename V::type value = V::load(features + c * channel_step + offsets[tap] + q);
        if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[c][p] += weights[p] * value;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, P>(c, q, sum[c]);
  }
}

// Two output rows, C channels: the second reads the rows of features that the first one reads, but for `lag` taps
// (those of the rows by which it lies lower), so that most loads serve both. `offsets` has taps + lag of them.
template <class V, int C, class A, class Output>
CARAFE_INLINE void reassemble_two_rows(
    const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, int64_t lag, const A* masks,
    int64_t tap_step, int64_t out_step, const Output& output, int64_t lanes) {
  const A* const second_masks = masks + out_step - lag * tap_step;
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    output.template expect<V, 2, C>(q);
    typename V::type sum[C][2] = {};
    const auto add = [&](auto first, auto second, int64_t tap) CARAFE_ALWAYS_INLINE {
      typename V::type weights[2];
      if constexpr (first) weights[0] = V::load(masks + tap * tap_step + q);
      if constexpr (second) weights[1] = V::load(second_masks + tap * tap_step + q);
      const A* from = features + offsets[tap] + q;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c, from += channel_step) {
        typename V::type value = V::load(from);
        if constexpr (first && second) value = shared<V>(value);
        if constexpr (first) sum[c][0] += weights[0] * value;
        if constexpr (second) sum[c][1] += weights[1] * value;
      }
    };
    int64_t tap = 0;
    for (; tap < lag; ++tap) add(Constant<1>(), Constant<0>(), tap);
    for (; tap < taps; ++tap) add(Constant<1>(), Constant<1>(), tap);
    for (; tap < taps + lag; ++tap) add(Constant<0>(), Constant<1>(), tap);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, 2>(c, q, sum[c]);
  }
}

template <class V, int P, int C, class A, class Output>
CARAFE_INLINE void reassemble_channels(
    int64_t channels, const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, const A* masks,
    int64_t tap_step, int64_t out_step, const Output& output, int64_t lanes) {
  int64_t c = 0;
  for (; c + C <= channels; c += C) {
    reassemble_block<V, P, C>(
        features + c * channel_step, channel_step, offsets, taps, masks, tap_step, out_step, output.next(c), lanes);
  }
  for (; c < channels; ++c) {
    reassemble_block<V, P, 1>(
        features + c * channel_step, channel_step, offsets, taps, masks, tap_step, out_step, output.next(c), lanes);
  }
}

// Whether output rows are taken two at a time: each has one phase, and they have rows of features in common.
inline bool by_two_rows(const Shape& shape) { return shape.up == 1 && shape.down < shape.kernel; }

// How many offsets the loops below list.
inline int64_t most_offsets(const Shape& shape) { return shape.taps() + shape.down * shape.kernel; }

// Downsampling by a whole number, two rows at a time: outputs of x, for all its channels; `output_at(row)` is where
// those of the tile's output row go.
template <class V, bool ManyRegisters, class A, class OutputAt>
CARAFE_INLINE void reassemble_by_two_rows(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const OutputAt& output_at,
    int64_t lanes, int64_t* offsets) {
  constexpr int block_channels = ManyRegisters ? 8 : 4;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t k = shape.kernel, lag = shape.down * k;
  for (int64_t tap = 0; tap < shape.taps() + lag; ++tap) {
    const LaneOffset at(tap % k - shape.radius(), shape.down);
    offsets[tap] = tap / k * x.row_stride() + at.phase * x.pitch + at.lanes;
  }
  for (int64_t row = 0; row < rows.count(); row += 2) {
    const A* const from = x.data + ((rows.begin + row) * shape.down - tile.row_begin) * x.row_stride();
    const A* const masks = m.data + row * m.pitch;
    const auto output = output_at(row);
    if (row + 1 == rows.count()) {
      reassemble_channels<V, 1, 8>(
          x.channels, from, x.channel_stride(), offsets, shape.taps(), masks, m.channel_stride(), m.pitch, output,
          lanes);
      break;
    }
    const auto block = [&](auto channels, int64_t c) CARAFE_ALWAYS_INLINE {
      reassemble_two_rows<V, channels>(
          from + c * x.channel_stride(), x.channel_stride(), offsets, shape.taps(), lag, masks, m.channel_stride(),
          m.pitch, output.next(c), lanes);
    };
    int64_t c = 0;
    for (; c + block_channels <= x.channels; c += block_channels) block(Constant<block_channels>(), c);
    for (; c < x.channels; ++c) block(Constant<1>(), c);
  }
}

// Outputs y of features x with weights m, for the channels of y.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void reassemble_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Staged<A>& y,
    int64_t* offsets) {
  if (by_two_rows(shape)) {
    const auto output_at = [&](int64_t row) CARAFE_ALWAYS_INLINE {
      return ToBuffer<A>{y.data + row * y.pitch, y.channel_stride(), y.pitch};
    };
    return reassemble_by_two_rows<V, ManyRegisters>(shape, tile, x, m, output_at, tile.lanes, offsets);
  }
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
    const auto block = [&](auto outputs, auto block_channels, int64_t p) CARAFE_ALWAYS_INLINE {
      reassemble_channels<V, outputs, block_channels>(
          y.channels, from, x.channel_stride(), offsets, shape.taps(), m.data + (place + p) * m.pitch,
          m.channel_stride(), m.pitch, ToBuffer<A>{y.data + (place + p) * y.pitch, y.channel_stride(), y.pitch},
          tile.lanes);
    };
    int64_t p = 0;
    for (; p + 4 <= count; p += 4) block(Constant<4>(), Constant<ManyRegisters ? 4 : 2>(), p);
    for (; p + 2 <= count; p += 2) block(Constant<2>(), Constant<ManyRegisters ? 8 : 4>(), p);
    for (; p < count; ++p) block(Constant<1>(), Constant<8>(), p);
  });
}

// The same straight into rows of the output, `lanes` of them (a vector at least), for `channels` channels from x's
// first on: where up is 2 and down 1, or where up is 1.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void reassemble_direct(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Map<A>& y, int64_t lanes,
    int64_t* offsets) {
  if (by_two_rows(shape)) {
    const auto output_at = [&](int64_t row) CARAFE_ALWAYS_INLINE {
      return ToMap<A, 1>{y.data + row * y.row_stride, y.channel_stride, y.row_stride};
    };
    return reassemble_by_two_rows<V, ManyRegisters>(shape, tile, x, m, output_at, lanes, offsets);
  }
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
    const auto block = [&](auto phases, auto outputs, auto block_channels) CARAFE_ALWAYS_INLINE {
      A* const to = y.data + place / phases * y.row_stride;
      reassemble_channels<V, outputs, block_channels>(
          x.channels, from, x.channel_stride(), offsets, shape.taps(), m.data + place * m.pitch, m.channel_stride(),
          m.pitch, ToMap<A, phases>{to, y.channel_stride, y.row_stride}, lanes);
    };
    if (count == 4) {
      block(Constant<2>(), Constant<4>(), Constant<ManyRegisters ? 4 : 2>());
    } else {
      block(Constant<1>(), Constant<1>(), Constant<8>());
    }
  });
}

// -------------------------------------------------------------------------------------------- gradient to weights

// P outputs times U taps stay in registers while the channels pass by. Each output's cotangents lie `out_step` after
// the last one's, its gradients `grad_step`.
template <class V, int P, int U, class A>
CARAFE_INLINE void grad_masks_block(
    int64_t channels, const A* grad_output, int64_t grad_channel_step, int64_t out_step, const A* features,
    int64_t channel_step, const int64_t* offsets, A* grad, int64_t tap_step, int64_t grad_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
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
  const auto block = [&](auto count, int64_t tap) CARAFE_ALWAYS_INLINE {
    grad_masks_block<V, P, count>(
        channels, grad_output, grad_channel_step, out_step, features, channel_step, offsets + tap,
        grad + tap * tap_step, tap_step, grad_step, lanes);
  };
  int64_t tap = 0;
  for (; tap + 5 <= taps; tap += 5) block(Constant<5>(), tap);
  for (; tap + 3 <= taps; tap += 3) block(Constant<3>(), tap);
  for (; tap < taps; ++tap) block(Constant<1>(), tap);
}

// Downsampling by a whole number, one row of features after the other: each load serves all the output rows that read
// the row, which see it through another row of taps each.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_weights_by_feature_rows(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t k = shape.kernel, down = shape.down, tap_step = sum.channel_stride();
  for (int64_t tap = 0; tap < k; ++tap) {
    const LaneOffset at(tap - shape.radius(), down);
    offsets[tap] = at.phase * x.pitch + at.lanes;
  }
  for (int64_t row = 0; row < x.rows; ++row) {
    const int64_t seen_by_first = tile.row_begin + row;  // the row of taps, perhaps past the last, of output row 0
    const int64_t last = std::min(rows.end - 1, seen_by_first / down);
    const auto block = [&](auto outputs, int64_t o) CARAFE_ALWAYS_INLINE {
      const int64_t place = o - rows.begin;
      grad_masks_taps<V, outputs>(
          k, dy.channels, dy.data + place * dy.pitch, dy.channel_stride(), dy.pitch, x.data + row * x.row_stride(),
          x.channel_stride(), offsets, sum.data + (seen_by_first - o * down) * k * tap_step + place * sum.pitch,
          tap_step, sum.pitch - down * k * tap_step, tile.lanes);
    };
    int64_t o = std::max(rows.begin, ceil_div(seen_by_first - k + 1, down));
    if constexpr (ManyRegisters) {
      for (; o + 2 <= last; o += 3) block(Constant<3>(), o);
    }
    for (; o + 1 <= last; o += 2) block(Constant<2>(), o);
    for (; o <= last; ++o) block(Constant<1>(), o);
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
    const auto block = [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
      grad_masks_taps<V, outputs>(
          shape.taps(), dy.channels, dy.data + (place + p) * dy.pitch, dy.channel_stride(), dy.pitch, from,
          x.channel_stride(), offsets, sum.data + (place + p) * sum.pitch, sum.channel_stride(), sum.pitch, tile.lanes);
    };
    int64_t p = 0;
    if constexpr (ManyRegisters) {
      for (; p + 4 <= count; p += 4) block(Constant<4>(), p);
    }
    for (; p + 2 <= count; p += 2) block(Constant<2>(), p);
    for (; p < count; ++p) block(Constant<1>(), p);
  });
}

// ----------------------------------------------------------------------------------------- gradient to features

// What every output sends to U neighbouring tap columns of a feature row, still in the lanes of the outputs: so all
// loads are aligned, and one cotangent serves U taps.
template <class V, int U, int C, class A>
CARAFE_INLINE void column_sums_block(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks, int64_t tap_step,
    const A* grad_output, int64_t channel_step, A* sums, int64_t column_step, int64_t sum_channel_step, int64_t begin,
    int64_t end) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      typename V::type cotangent[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) cotangent[c] = V::load(grad_output + c * channel_step + grad_offsets[t] + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        const typename V::type weight = shared<V>(V::load(masks + u * tap_step + mask_offsets[t] + q));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[u][c] += weight * cotangent[c];
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) V::store(sums + u * column_step + c * sum_channel_step + q, sum[u][c]);
    }
  }
}

template <class V, int C, class A>
CARAFE_INLINE void column_sums(
    int64_t columns, int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    int64_t tap_step, const A* grad_output, int64_t channel_step, const Staged<A>& sums, int64_t begin, int64_t end) {
  const auto block = [&](auto taps, int64_t column) CARAFE_ALWAYS_INLINE {
    column_sums_block<V, taps, C>(
        contributions, mask_offsets, grad_offsets, masks + column * tap_step, tap_step, grad_output, channel_step,
        sums.data + column * sums.row_stride(), sums.row_stride(), sums.channel_stride(), begin, end);
  };
  int64_t column = 0;
  for (; column + 5 <= columns; column += 5) block(Constant<5>(), column);
  for (; column + 3 <= columns; column += 3) block(Constant<3>(), column);
  for (; column < columns; ++column) block(Constant<1>(), column);
}

// Moves the sums of every tap column to the features' lanes and adds them up.
template <class V, class A>
CARAFE_INLINE void shift_columns(int64_t kernel, const A* sums, int64_t column_step, A* grad, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum = {};
    for (int64_t v = 0; v < kernel; ++v) sum += V::load(sums + v * column_step + q + kernel / 2 - v);
    V::store(grad + q, sum);
  }
}

// One row of gradients where the lane that a tap reaches depends on the output phase, or where there is one phase: the
// contributions (a mask lane and a cotangent lane each) of every tap and output phase, gathered.
template <class V, int C, class A>
CARAFE_INLINE void grad_features_block(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    const A* grad_output, int64_t channel_step, A* grad, int64_t grad_channel_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      const typename V::type weight = V::load(masks + mask_offsets[t] + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c] += weight * V::load(grad_output + c * channel_step + grad_offsets[t] + q);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) V::store(grad + c * grad_channel_step + q, sum[c]);
  }
}

// Downsampling by 2, two rows and both residues at a time, those of features that see the same outputs: a cotangent
// that is loaded serves up to four of them. `mask_offsets` has a place for each of the four, kAbsent where it gets
// nothing.
constexpr int kSquare = 4;
constexpr int64_t kAbsent = -1;  // no offset: only tap 0 lies within a few lanes of the start, and it shifts upwards

template <class V, int C, class A>
CARAFE_INLINE void grad_features_square(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    const A* grad_output, int64_t channel_step, A* grad, int64_t pitch, int64_t grad_channel_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[kSquare][C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      typename V::type cotangent[C];
      const A* from = grad_output + grad_offsets[t] + q;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c, from += channel_step) cotangent[c] = V::load(from);
#pragma GCC unroll 4
      for (int each = 0; each < kSquare; ++each) {
        const int64_t offset = mask_offsets[kSquare * t + each];
        if (offset == kAbsent) continue;
        typename V::type weight = V::load(masks + offset + q);
        if constexpr (C > 1) weight = shared<V>(weight);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[each][c] += weight * cotangent[c];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int each = 0; each < kSquare; ++each)
        V::store(grad + c * grad_channel_step + each * pitch + q, sum[each][c]);
    }
  }
}

inline bool by_squares(const Shape& shape) { return shape.up == 1 && shape.down == 2; }

// Whether gradients to features go by tap columns: then the lane that a tap reaches is the same for all phases of an
// output, and there are phases enough to make up for moving the sums.
inline bool by_columns(const Shape& shape) { return shape.down == 1 && shape.up > 1; }

constexpr int64_t kBlockChannels = 4;  // the most that grad_features_staged takes at a time

// How many outputs' taps reach one row of features, or one tap column of it, at most.
inline int64_t most_contributions(const Shape& shape) {
  return (by_columns(shape) ? shape.kernel : shape.taps()) * ceil_div(shape.up, shape.down) * shape.up;
}

// How many offsets the loops below list.
inline int64_t most_gradient_offsets(const Shape& shape) {
  const int64_t outputs_a_side = (shape.kernel + 2) / 2;
  return std::max(2 * most_contributions(shape), (1 + kSquare) * outputs_a_side * outputs_a_side);
}

// Gradients dx of features, for the channels of dy. `sums` has room for a row of every tap column of kBlockChannels
// channels, zero in its halo; `offsets` for most_gradient_offsets().
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_features_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& dy, const Staged<A>& m, const Staged<A>& dx,
    const Staged<A>& sums, int64_t* offsets) {
  constexpr int block_channels = ManyRegisters ? kBlockChannels : kBlockChannels / 2;
  const int64_t k = shape.kernel, radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin - radius, tile.row_end + radius);
  int64_t* const mask_offsets = offsets;
  int64_t* const grad_offsets = offsets + most_contributions(shape);
  // Sums of tap columns are wanted `halo` lanes beyond the span; they stay zero where the map ends there.
  const int64_t padding = ceil_div(radius + 1, V::lanes) * V::lanes;
  const bool last = (tile.lane_begin + tile.lanes) * shape.up >= shape.out_width;
  const int64_t begin = tile.lane_begin > 0 ? -padding : 0, end = tile.lanes + (last ? 0 : padding);

  const auto square = [&](int64_t i) CARAFE_ALWAYS_INLINE {
    int64_t* const square_offsets = offsets;
    int64_t* const cotangent_offsets = offsets + kSquare * (most_gradient_offsets(shape) / (1 + kSquare));
    int64_t contributions = 0;
    const int64_t first = std::max(rows.begin, ceil_div(i + radius - k + 1, 2));
    // Each sum in the order of its taps, as below.
    for (int64_t o = std::min(rows.end - 1, (i + 1 + radius) / 2); o >= first; --o) {
      for (int64_t shift = floor_div(-radius, 2); shift <= floor_div(radius, 2); ++shift) {
        for (int64_t each = 0; each < kSquare; ++each) {
          const int64_t u = i + each / 2 - 2 * o + radius, v = 2 * shift + each % 2 + radius;
          const bool present = u >= 0 && u < k && v >= 0 && v < k;
          square_offsets[kSquare * contributions + each] =
              present ? (u * k + v) * m.channel_stride() + (o - rows.begin) * m.pitch - shift : kAbsent;
        }
        cotangent_offsets[contributions++] = (o - rows.begin) * dy.pitch - shift;
      }
    }
    const auto block = [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
      grad_features_square<V, count>(
          contributions, square_offsets, cotangent_offsets, m.data, dy.data + c * dy.channel_stride(),
          dy.channel_stride(), dx.data + c * dx.channel_stride() + (i - tile.row_begin) * dx.row_stride(), dx.pitch,
          dx.channel_stride(), tile.lanes);
    };
    int64_t c = 0;
    for (; c + block_channels <= dy.channels; c += block_channels) block(Constant<block_channels>(), c);
    for (; c < dy.channels; ++c) block(Constant<1>(), c);
  };

  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
    if (by_squares(shape) && i + 1 < tile.row_end) {
      square(i++);
      continue;
    }
    A* const to = dx.data + (i - tile.row_begin) * dx.row_stride();
    // Calls visit(u, place, phase) for every output phase of every row that tap row u joins to feature row i.
    const auto for_each_place = [&](const auto& visit) CARAFE_ALWAYS_INLINE {
      for (int64_t u = 0; u < k; ++u) {
        const int64_t s = i - u + radius;
        if (s < 0 || s >= shape.height) continue;
        const OutputRows own(shape, s, s + 1);
        for (int64_t row = own.begin; row < own.end; ++row) {
          for (int64_t phase = 0; phase < shape.up; ++phase) visit(u, (row - rows.begin) * shape.up + phase, phase);
        }
      }
    };
    if (by_columns(shape)) {
      int64_t contributions = 0;
      for_each_place([&](int64_t u, int64_t place, int64_t) CARAFE_ALWAYS_INLINE {
        mask_offsets[contributions] = u * k * m.channel_stride() + place * m.pitch;
        grad_offsets[contributions++] = place * dy.pitch;
      });
      const auto block = [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
        column_sums<V, count>(
            k, contributions, mask_offsets, grad_offsets, m.data, m.channel_stride(), dy.data + c * dy.channel_stride(),
            dy.channel_stride(), sums, begin, end);
        for (int64_t each = 0; each < count; ++each) {
          shift_columns<V>(
              k, sums.data + each * sums.channel_stride(), sums.row_stride(), to + (c + each) * dx.channel_stride(),
              tile.lanes);
        }
      };
      int64_t c = 0;
      for (; c + block_channels <= dy.channels; c += block_channels) block(Constant<block_channels>(), c);
      for (; c < dy.channels; ++c) block(Constant<1>(), c);
      continue;
    }
    for (int64_t residue = 0; residue < shape.down; ++residue) {
      int64_t contributions = 0;
      for_each_place([&](int64_t u, int64_t place, int64_t phase) CARAFE_ALWAYS_INLINE {
        for (int64_t v = 0; v < k; ++v) {
          const LaneOffset at(phase * shape.down / shape.up + v - radius, shape.down);
          if (at.phase != residue) continue;
          mask_offsets[contributions] = (u * k + v) * m.channel_stride() + place * m.pitch - at.lanes;
          grad_offsets[contributions++] = place * dy.pitch - at.lanes;
        }
      });
      const auto block = [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
        grad_features_block<V, count>(
            contributions, mask_offsets, grad_offsets, m.data, dy.data + c * dy.channel_stride(), dy.channel_stride(),
            to + c * dx.channel_stride() + residue * dx.pitch, dx.channel_stride(), tile.lanes);
      };
      int64_t c = 0;
      for (; c + 8 <= dy.channels; c += 8) block(Constant<8>(), c);
      for (; c < dy.channels; ++c) block(Constant<1>(), c);
    }
  }
}

}  // namespace carafe

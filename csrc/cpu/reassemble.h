// The outputs of staged features and weights: vectors run along the row, a block of channels and output phases stays in
// registers.
#pragma once

#include "loops.h"

namespace carafe {

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
template <class T, int Phases>
struct ToMap {
  T* data;
  int64_t channel_step, row_step;

  CARAFE_INLINE ToMap next(int64_t channels) const { return {data + channels * channel_step, channel_step, row_step}; }

  // Asks for the memory that the next C channels will go to.
  template <class V, int P, int C>
  CARAFE_INLINE void expect(int64_t q) const {
#pragma GCC unroll 8
    for (int c = C; c < 2 * C; ++c) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const T* const to = data + c * channel_step + p / Phases * row_step + Phases * q;
        __builtin_prefetch(to + p % Phases * V::lanes, 1, 2);
      }
    }
  }

  template <class V, int P>
  CARAFE_INLINE void put(int64_t c, int64_t q, const typename V::type (&values)[P]) const {
#pragma GCC unroll 4
    for (int p = 0; p < P; p += Phases) {
      T* const to = data + c * channel_step + p / Phases * row_step + Phases * q;
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
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    output.template expect<V, 2, C>(q);
    typename V::type sum[C][2] = {};
    const auto add = [&](auto first, auto second, int64_t tap) CARAFE_ALWAYS_INLINE {
      typename V::type weights[2];
      if constexpr (first) weights[0] = V::load(masks + tap * tap_step + q);
      if constexpr (second) weights[1] = V::load(masks + out_step + (tap - lag) * tap_step + q);
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

// How many channels' sums the registers hold beside each other, for so many outputs.
template <bool ManyRegisters>
constexpr int channels_beside(int outputs) {
  return outputs == 1 ? 8 : (ManyRegisters ? 16 : 8) / outputs;
}

template <class V, int P, int C, class A, class Output>
CARAFE_INLINE void reassemble_channels(
    int64_t channels, const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, const A* masks,
    int64_t tap_step, int64_t out_step, const Output& output, int64_t lanes) {
  for_each_block<C, 1>(channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    reassemble_block<V, P, count>(
        features + c * channel_step, channel_step, offsets, taps, masks, tap_step, out_step, output.next(c), lanes);
  });
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
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t lag = shape.down * shape.kernel;
  list_taps(shape, x, 0, shape.taps() + lag, offsets);
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
    for_each_block<ManyRegisters ? 8 : 4, 1>(x.channels, [&](auto channels, int64_t c) CARAFE_ALWAYS_INLINE {
      reassemble_two_rows<V, channels>(
          from + c * x.channel_stride(), x.channel_stride(), offsets, shape.taps(), lag, masks, m.channel_stride(),
          m.pitch, output.next(c), lanes);
    });
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
    for_each_block<4, 2, 1>(count, [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
      reassemble_channels<V, outputs, channels_beside<ManyRegisters>(outputs)>(
          y.channels, from, x.channel_stride(), offsets, shape.taps(), m.data + (place + p) * m.pitch,
          m.channel_stride(), m.pitch, ToBuffer<A>{y.data + (place + p) * y.pitch, y.channel_stride(), y.pitch},
          tile.lanes);
    });
  });
}

// The same straight into rows of the output, `lanes` of them (a vector at least), for `channels` channels from x's
// first on: where up is 2 and down 1, or where up is 1.
template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void reassemble_direct(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Map<T>& y, int64_t lanes,
    int64_t* offsets) {
  if (by_two_rows(shape)) {
    const auto output_at = [&](int64_t row) CARAFE_ALWAYS_INLINE {
      return ToMap<T, 1>{y.data + row * y.row_stride, y.channel_stride, y.row_stride};
    };
    return reassemble_by_two_rows<V, ManyRegisters>(shape, tile, x, m, output_at, lanes, offsets);
  }
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
    const auto block = [&](auto phases, auto outputs) CARAFE_ALWAYS_INLINE {
      T* const to = y.data + place / phases * y.row_stride;
      with_half_tail<V>(0, lanes, [&](auto vector, int64_t begin, int64_t end) CARAFE_ALWAYS_INLINE {
        reassemble_channels<decltype(vector), outputs, channels_beside<ManyRegisters>(outputs)>(
            x.channels, from + begin, x.channel_stride(), offsets, shape.taps(), m.data + place * m.pitch + begin,
            m.channel_stride(), m.pitch, ToMap<T, phases>{to + phases * begin, y.channel_stride, y.row_stride},
            end - begin);
      });
    };
    if (count == 4) {
      block(Constant<2>(), Constant<4>());
    } else {
      block(Constant<1>(), Constant<1>());
    }
  });
}

}  // namespace carafe

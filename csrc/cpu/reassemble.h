// The outputs of staged features and masks: vectors run along the row, a block of channels and output phases stays in
// registers.
#pragma once

#include "buffer.h"

namespace carafe {

// Where blocks of outputs go: to rows of a map, each of which holds one phase or two that take turns, or to a buffer,
// whose rows hold one.
template <class T, int Phases, bool IsMap = true>
struct Target {
  T* data;
  int64_t channel_step, row_step;

  CARAFE_INLINE Target from(int64_t channel, int64_t row = 0) const {
    return {data + channel * channel_step + row * row_step, channel_step, row_step};
  }

  // Prefetches the memory that the next C channels will go to.
  template <class V, int P, int C>
  CARAFE_INLINE void prefetch(int64_t q) const {
    if constexpr (!IsMap) return;
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

// The same where each row holds two phases, and the map ends between those of the last lane: that of the vector at
// `last` (negative: of none).
template <class T>
struct CutTarget : Target<T, 2> {
  int64_t last;

  CARAFE_INLINE CutTarget from(int64_t channel, int64_t row = 0) const {
    return {Target<T, 2>::from(channel, row), last};
  }

  template <class V, int P>
  CARAFE_INLINE void put(int64_t c, int64_t q, const typename V::type (&values)[P]) const {
    if (q != last) return Target<T, 2>::template put<V, P>(c, q, values);
#pragma GCC unroll 4
    for (int p = 0; p < P; p += 2) {
      T pairs[2 * V::lanes];
      store_pairs<V>(pairs, values[p], values[p + 1]);
      T* const to = this->data + c * this->channel_step + p / 2 * this->row_step + 2 * q;
      memcpy(static_cast<void*>(to), pairs, sizeof pairs - sizeof(T));
    }
  }
};

// P outputs share the features they read; C channels share the masks. The last vector steps back where `lanes` is not a
// multiple of a vector.
template <class V, int P, int C, class A, class Output>
CARAFE_INLINE void reassemble_block(
    const Lanes<A>& features, const Taps& taps, const Lanes<A>& masks, const Output& output, int64_t lanes) {
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    output.template prefetch<V, P, C>(q);
    typename V::type sum[C][P] = {};
    for (int64_t tap = 0; tap < taps.count; ++tap) {
      typename V::type mask[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        mask[p] = V::load(masks(tap, p) + q);
        if constexpr (C > 1) mask[p] = shared<V>(mask[p]);
      }
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        typename V::type value = V::load(features(c) + taps.offsets[tap] + q);
        if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[c][p] += mask[p] * value;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, P>(c, q, sum[c]);
  }
}

// Two output rows, C channels: the second reads the rows of features that the first one reads, but for `lag` taps
// (those of the rows by which it lies lower), so that most loads serve both. `taps` lists those of both rows.
template <class V, int C, class A, class Output>
CARAFE_INLINE void reassemble_two_rows(
    const Lanes<A>& features, const Taps& taps, int64_t lag, const Lanes<A>& masks, const Output& output,
    int64_t lanes) {
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    output.template prefetch<V, 2, C>(q);
    typename V::type sum[C][2] = {};
    const auto add = [&](auto first, auto second, int64_t tap) CARAFE_ALWAYS_INLINE {
      typename V::type mask[2];
      if constexpr (first) mask[0] = V::load(masks(tap) + q);
      if constexpr (second) mask[1] = V::load(masks(tap - lag, 1) + q);
      const A* from = features.data + taps.offsets[tap] + q;
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c, from += features.channel_step) {
        typename V::type value = V::load(from);
        if constexpr (first && second) value = shared<V>(value);
        if constexpr (first) sum[c][0] += mask[0] * value;
        if constexpr (second) sum[c][1] += mask[1] * value;
      }
    };
    int64_t tap = 0;
    for (; tap < lag; ++tap) add(Constant<1>(), Constant<0>(), tap);
    for (; tap < taps.count - lag; ++tap) add(Constant<1>(), Constant<1>(), tap);
    for (; tap < taps.count; ++tap) add(Constant<0>(), Constant<1>(), tap);
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, 2>(c, q, sum[c]);
  }
}

// How many channels' sums the registers hold beside each other, for so many outputs.
template <bool ManyRegisters>
constexpr int channels_beside(int outputs) {
  return outputs == 1 ? 8 : (ManyRegisters ? 16 : 8) / outputs;
}

// P outputs of all channels.
template <class V, int P, int C, class A, class Output>
CARAFE_INLINE void reassemble_channels(
    int64_t channels, const Lanes<A>& features, const Taps& taps, const Lanes<A>& masks, const Output& output,
    int64_t lanes) {
  for_each_block<C, 1>(channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    reassemble_block<V, P, count>(features.from(c), taps, masks, output.from(c), lanes);
  });
}

// Whether output rows are taken two at a time: each has one phase, and they have rows of features in common.
inline bool by_two_rows(const Shape& shape) { return shape.up == 1 && shape.down < shape.kernel; }

template <class A>
CARAFE_INLINE Target<A, 1, false> target_of(const Staged<A>& y, int64_t place = 0) {
  return {y.data + place * y.pitch, y.channel_stride(), y.pitch};
}

// How many offsets the loops below list.
inline int64_t most_offsets(const Shape& shape) { return shape.taps() + shape.down * shape.kernel; }

// Downsampling by a whole number, two rows at a time: outputs of x, for all its channels.
template <class V, bool ManyRegisters, class A, class Output>
CARAFE_INLINE void reassemble_by_two_rows(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Output& all, int64_t lanes,
    int64_t* offsets) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t lag = shape.down * shape.kernel;
  const Taps taps = list_taps(shape, x, 0, shape.taps() + lag, offsets);
  for (int64_t row = 0; row < rows.count(); row += 2) {
    const Lanes<A> features = x.row((rows.begin + row) * shape.down - tile.row_begin), masks = m.row(row);
    const Output output = all.from(0, row);
    if (row + 1 == rows.count()) {
      reassemble_channels<V, 1, 8>(x.channels, features, Taps{offsets, shape.taps()}, masks, output, lanes);
      break;
    }
    for_each_block<ManyRegisters ? 8 : 4, 1>(x.channels, [&](auto channels, int64_t c) CARAFE_ALWAYS_INLINE {
      reassemble_two_rows<V, channels>(features.from(c), taps, lag, masks, output.from(c), lanes);
    });
  }
}

// Outputs y of features x with masks m, for the channels of y.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void reassemble_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Staged<A>& y,
    int64_t* offsets) {
  if (by_two_rows(shape)) {
    return reassemble_by_two_rows<V, ManyRegisters>(shape, tile, x, m, target_of(y), tile.lanes, offsets);
  }
  for_each_run(
      shape, tile, x, offsets,
      [&](const Lanes<A>& features, const Taps& taps, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
        for_each_block<4, 2, 1>(count, [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
          reassemble_channels<V, outputs, channels_beside<ManyRegisters>(outputs)>(
              y.channels, features, taps, m.row(0).from(0, place + p), target_of(y, place + p), tile.lanes);
        });
      });
}

// The same straight into rows of the output, `lanes` of them (a vector at least), for the channels
// of x: where up is 2 and down 1, or where up is 1.
template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void reassemble_direct(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Map<T>& y, int64_t lanes,
    int64_t* offsets) {
  if (by_two_rows(shape)) {
    const Target<T, 1> output{y.data, y.channel_stride, y.row_stride};
    return reassemble_by_two_rows<V, ManyRegisters>(shape, tile, x, m, output, lanes, offsets);
  }
  const bool cut = (tile.lane_begin + lanes) * shape.up > shape.out_width;
  for_each_run(
      shape, tile, x, offsets,
      [&](const Lanes<A>& features, const Taps& taps, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
        const auto block = [&](auto phases, auto outputs, auto cuts) CARAFE_ALWAYS_INLINE {
          T* const to = y.data + place / phases * y.row_stride;
          with_half_tail<V>(0, lanes, [&](auto vector, int64_t begin, int64_t end) CARAFE_ALWAYS_INLINE {
            const auto go = [&](const auto& target) CARAFE_ALWAYS_INLINE {
              reassemble_channels<decltype(vector), outputs, channels_beside<ManyRegisters>(outputs)>(
                  x.channels, features.from(0, 0, begin), taps, m.row(0).from(0, place, begin), target, end - begin);
            };
            const Target<T, phases> target{to + phases * begin, y.channel_stride, y.row_stride};
            if constexpr (cuts) {
              go(CutTarget<T>{target, end == lanes ? end - begin - vector.lanes : -1});
            } else {
              go(target);
            }
          });
        };
        const auto pairs = [&](auto outputs) CARAFE_ALWAYS_INLINE {
          cut ? block(Constant<2>(), outputs, Constant<1>()) : block(Constant<2>(), outputs, Constant<0>());
        };
        if (shape.up == 1) {
          block(Constant<1>(), Constant<1>(), Constant<0>());
        } else if (count == 4) {
          pairs(Constant<4>());
        } else {  // the second output row of this source row is not wanted
          pairs(Constant<2>());
        }
      });
}

}  // namespace carafe

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

// Downsampling by 2 straight from rows of the map: a tap's features are every second column. Staging them would take as
// long as the arithmetic.

// A row of all channels, from the column of the first tap of lane 0 on.
template <class T>
struct SourceRow {
  const T* columns;
  int64_t channel_step;

  CARAFE_INLINE const T* at(int64_t channel, int64_t column) const { return columns + channel * channel_step + column; }
};

// How many columns of it the loops read, some of them outside the map.
inline int64_t source_columns(const Shape& shape, int64_t lanes) { return 2 * lanes + shape.kernel - 1; }

// All bits of a vector's lanes from `begin` to `end`, both of which may lie outside of it. From a table: GCC takes
// comparisons apart before it knows the instruction set.
template <class V>
CARAFE_INLINE typename V::index lanes_between(int64_t begin, int64_t end) {
  using Number = std::conditional_t<sizeof(typename V::element) == 8, int64_t, int32_t>;
  struct Table {
    Number numbers[3 * V::lanes] = {};
    constexpr Table() {
      for (int64_t i = 0; i < V::lanes; ++i) numbers[V::lanes + i] = -1;
    }
  };
  static constexpr Table table;
  const auto load = [&](int64_t place, int64_t lane) CARAFE_ALWAYS_INLINE {
    typename V::index bits;
    memcpy(&bits, table.numbers + place - std::clamp<int64_t>(lane, 0, V::lanes), sizeof bits);
    return bits;
  };
  return load(V::lanes, begin) & load(2 * V::lanes, end);
}

// Lanes [begin, end) of one output row or two, C channels: the second one reads `rows` from the third one on. The last
// vector steps back where the lanes are no multiple. With Cut, columns outside the `width` of the map count as zeros,
// the rows beginning at `column` of it. Of each of the first `ahead` rows of `next`, as much is prefetched as was read.
template <class V, bool Cut, int Rows, int C, class T, class A, class Output>
CARAFE_INLINE void halve_rows(
    int64_t kernel, const SourceRow<T>* rows, const SourceRow<T>* next, int64_t ahead, int64_t channel,
    int64_t next_channel, const Lanes<A>& masks, const Output& output, int64_t begin, int64_t end, int64_t column,
    int64_t width) {
  for (int64_t place = begin; place < end; place += V::lanes) {
    const int64_t q = std::min(place, end - V::lanes);
    output.template prefetch<V, Rows, C>(q);
    typename V::type sum[C][Rows] = {};
    // Taps v and, where they are two, v + 1 of row u.
    const auto add = [&](auto first, auto second, auto taps, int64_t u, int64_t v) CARAFE_ALWAYS_INLINE {
      typename V::type mask[taps][Rows];
      const auto load_masks = [&](int tap) CARAFE_ALWAYS_INLINE {
        if constexpr (first) mask[tap][0] = shared<V>(V::load(masks(u * kernel + v + tap) + q));
        if constexpr (second) mask[tap][Rows - 1] = shared<V>(V::load(masks((u - 2) * kernel + v + tap, 1) + q));
      };
      load_masks(0);
      if constexpr (taps > 1) load_masks(1);
      typename V::index inside[2];
      if constexpr (Cut) {
        for (const int64_t tap : {0, 1}) {
          const int64_t from = column + 2 * q + v + tap;  // then every second column
          inside[tap] = lanes_between<V>(ceil_div(-from, 2), ceil_div(width - from, 2));
        }
      }
      const T* columns = rows[u].at(channel, 2 * q + v);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c, columns += rows[u].channel_step) {
        typename V::type even, odd;
        load_pairs<V>(columns, even, odd);
        const auto multiply = [&](int tap, typename V::type value) CARAFE_ALWAYS_INLINE {
          if constexpr (first) sum[c][0] += mask[tap][0] * value;
          if constexpr (second) sum[c][Rows - 1] += mask[tap][Rows - 1] * value;
        };
        if constexpr (Cut) {
          even = (typename V::type)((typename V::index)even & inside[0]);
          odd = (typename V::type)((typename V::index)odd & inside[1]);
        }
        multiply(0, even);
        if constexpr (taps > 1) multiply(1, odd);
      }
    };
    const auto add_row = [&](auto first, auto second, int64_t u) CARAFE_ALWAYS_INLINE {
      for (int64_t v = 0; v + 1 < kernel; v += 2) add(first, second, Constant<2>(), u, v);
      add(first, second, Constant<1>(), u, kernel - 1);
      if (u >= ahead) return;
      const T* columns = next[u].at(next_channel, 2 * q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c, columns += next[u].channel_step) {
        __builtin_prefetch(columns, 0, 2);
        if constexpr (sizeof(T) * V::lanes >= 64) __builtin_prefetch(columns + V::lanes, 0, 2);
      }
    };
    int64_t u = 0;
    if constexpr (Rows == 2) {
      for (; u < 2; ++u) add_row(Constant<1>(), Constant<0>(), u);
      for (; u < kernel; ++u) add_row(Constant<1>(), Constant<1>(), u);
      for (; u < kernel + 2; ++u) add_row(Constant<0>(), Constant<1>(), u);
    } else {
      for (; u < kernel; ++u) add_row(Constant<1>(), Constant<0>(), u);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, Rows>(c, q, sum[c]);
  }
}

// The vectors of `lanes` lanes, between `begin` and `end`, that read no column outside the map.
template <class V>
struct Interior {
  int64_t column, begin, end;  // `column` of the map is that of the first tap of lane 0

  Interior(const Shape& shape, const Tile& tile, int64_t lanes) : column(2 * tile.lane_begin - shape.radius()) {
    const int64_t whole = (shape.width - column - shape.kernel + 1) / 2;
    begin = column < 0 ? ceil_div(-column, 2 * V::lanes) * V::lanes : 0;
    end = whole >= lanes ? lanes : begin + floor_div(whole - begin, V::lanes) * V::lanes;
    if (end - begin < V::lanes) begin = end = lanes;
  }
};

// All outputs of the tile, `lanes` of them (a vector at least) in a row, from `count` rows.
template <class V, class T, class A>
CARAFE_INLINE void reassemble_halves(
    const Shape& shape, const Tile& tile, const SourceRow<T>* source, int64_t count, const Staged<A>& m,
    const Map<T>& y, int64_t lanes) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t first = 2 * rows.begin - tile.row_begin, channels = shape.group_channels();
  const Target<T, 1> output{y.data, y.channel_stride, y.row_stride};
  const Interior<V> inside(shape, tile, lanes);
  for_each_block<8, 1>(channels, [&](auto block, int64_t c) CARAFE_ALWAYS_INLINE {
    for (int64_t place = 0; place < rows.count(); place += 2) {
      const auto go = [&](auto outputs) CARAFE_ALWAYS_INLINE {
        const SourceRow<T>* const from = source + first + 2 * place;
        const SourceRow<T>* next = from + shape.kernel + 2 * (outputs - 1);
        int64_t ahead = std::min<int64_t>(4, source + count - next), next_channel = c;
        if (place + outputs >= rows.count()) {  // what follows is the next block
          next = source + first;
          next_channel = c + block;
          ahead = next_channel + block <= channels ? shape.kernel + 2 * (outputs - 1) : 0;
        }
        const auto vectors = [&](auto cut, int64_t from_lane, int64_t to_lane) CARAFE_ALWAYS_INLINE {
          halve_rows<V, cut, outputs, block>(
              shape.kernel, from, next, ahead, c, next_channel, m.row(place), output.from(c, place), from_lane, to_lane,
              inside.column, shape.width);
        };
        if (inside.begin > 0) vectors(Constant<1>(), 0, inside.begin);
        if (inside.begin < inside.end) vectors(Constant<0>(), inside.begin, inside.end);
        if (inside.end < lanes) vectors(Constant<1>(), inside.end, lanes);
      };
      place + 1 < rows.count() ? go(Constant<2>()) : go(Constant<1>());
    }
  });
}

}  // namespace carafe

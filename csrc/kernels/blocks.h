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
      for (int p = 0; p < P; ++p) weights[p] = V::load(masks + tap * tap_step + p * out_step + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const typename V::type value = V::load(features + c * channel_step + offsets[tap] + q);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[c][p] += weights[p] * value;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) output.template put<V, P>(c, q, sum[c]);
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

// Outputs y of features x with weights m, for the channels of y.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void reassemble_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Staged<A>& y,
    int64_t* offsets) {
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

// P outputs times U taps of one kernel row stay in registers while the channels pass by.
template <class V, int P, int U, class A>
CARAFE_INLINE void grad_masks_block(
    int64_t channels, const A* grad_output, int64_t grad_channel_step, const A* features, int64_t channel_step,
    const int64_t* offsets, A* grad, int64_t tap_step, int64_t out_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[U][P];
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[u][p] = V::load(grad + u * tap_step + p * out_step + q);
    }
    for (int64_t c = 0; c < channels; ++c) {
      typename V::type cotangent[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) cotangent[p] = V::load(grad_output + c * grad_channel_step + p * out_step + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        const typename V::type value = V::load(features + c * channel_step + offsets[u] + q);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[u][p] += cotangent[p] * value;
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(grad + u * tap_step + p * out_step + q, sum[u][p]);
    }
  }
}

template <class V, int P, class A>
CARAFE_INLINE void grad_masks_taps(
    int64_t taps, int64_t channels, const A* grad_output, int64_t grad_channel_step, const A* features,
    int64_t channel_step, const int64_t* offsets, A* grad, int64_t tap_step, int64_t out_step, int64_t lanes) {
  int64_t tap = 0;
  for (; tap + 5 <= taps; tap += 5) {
    grad_masks_block<V, P, 5>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
  for (; tap + 3 <= taps; tap += 3) {
    grad_masks_block<V, P, 3>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
  for (; tap < taps; ++tap) {
    grad_masks_block<V, P, 1>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
}

// Adds to `sum` what the channels of dy give.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_weights_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,
    int64_t* offsets) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
    const auto block = [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
      grad_masks_taps<V, outputs>(
          shape.taps(), dy.channels, dy.data + (place + p) * dy.pitch, dy.channel_stride(), from, x.channel_stride(),
          offsets, sum.data + (place + p) * sum.pitch, sum.channel_stride(), sum.pitch, tile.lanes);
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
        const typename V::type weight = V::load(masks + u * tap_step + mask_offsets[t] + q);
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

// Whether gradients to features go by tap columns: then the lane that a tap reaches is the same for all phases of an
// output, and there are phases enough to make up for moving the sums.
inline bool by_columns(const Shape& shape) { return shape.down == 1 && shape.up > 1; }

constexpr int64_t kBlockChannels = 4;  // the most that grad_features_staged takes at a time

// Gradients dx of features, for the channels of dy. `sums` has room for a row of every tap column of kBlockChannels
// channels, zero in its halo; `offsets` for two lists of most_contributions().
inline int64_t most_contributions(const Shape& shape) {
  return (by_columns(shape) ? shape.kernel : shape.taps()) * ceil_div(shape.up, shape.down) * shape.up;
}

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

  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
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

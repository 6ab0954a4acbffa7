// Copies between maps of any layout and dtype and the buffers that the loops run along.
#pragma once

#include "convert.h"
#include "region.h"

namespace carafe {

// From pixels (`step` apart, channels adjacent) to lanes, those of channel c at lanes(c).
template <class V, class T, class ChannelLanes>
CARAFE_INLINE void gather_channels(
    const T* from, int64_t step, int64_t count, int64_t channels, const ChannelLanes& lanes) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    int64_t q = 0;
    for (; q + V::lanes <= count; q += V::lanes) {
      typename V::type square[V::lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) square[i] = load_widened<V>(from + (q + i) * step + c);
      transpose<V>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) V::store(lanes(c + i) + q, square[i]);
    }
    for (; q < count; ++q) {
      for (int64_t i = 0; i < V::lanes; ++i) lanes(c + i)[q] = widen(from[q * step + c + i]);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) lanes(c)[q] = widen(from[q * step + c]);
  }
}

// The way back.
template <class V, class T, class ChannelLanes>
CARAFE_INLINE void scatter_channels(const ChannelLanes& lanes, int64_t count, int64_t channels, T* to, int64_t step) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    int64_t q = 0;
    for (; q + V::lanes <= count; q += V::lanes) {
      typename V::type square[V::lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) square[i] = V::load(lanes(c + i) + q);
      transpose<V>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) store_narrowed<V>(to + (q + i) * step + c, square[i]);
    }
    for (; q < count; ++q) {
      for (int64_t i = 0; i < V::lanes; ++i) to[q * step + c + i] = Narrow<T>::from(lanes(c + i)[q]);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) to[q * step + c] = Narrow<T>::from(lanes(c)[q]);
  }
}

// `count` columns, `step` apart, to lanes.
template <class V, class T, class A>
CARAFE_INLINE void stage_row(const T* from, int64_t step, int64_t count, A* lanes) {
  const auto vector = [&](int64_t q) CARAFE_ALWAYS_INLINE { V::store(lanes + q, load_widened<V>(from + q)); };
  if (step == 1 && for_each_vector<V>(count, vector)) return;
  for (int64_t q = 0; q < count; ++q) lanes[q] = widen(from[q * step]);
}

// 2 `count` adjacent columns to the lanes of two phases.
template <class V, class T, class A>
CARAFE_INLINE void stage_pairs(const T* from, int64_t count, A* even, A* odd) {
  constexpr auto all = std::make_integer_sequence<int64_t, V::lanes>();
  const auto vectors = [&](int64_t q) CARAFE_ALWAYS_INLINE {
    const typename V::type first = load_widened<V>(from + 2 * q), second = load_widened<V>(from + 2 * q + V::lanes);
    V::store(even + q, unzip<V, 0>(first, second, all));
    V::store(odd + q, unzip<V, 1>(first, second, all));
  };
  if (for_each_vector<V>(count, vectors)) return;
  for (int64_t q = 0; q < count; ++q) even[q] = widen(from[2 * q]), odd[q] = widen(from[2 * q + 1]);
}

// The ways back.
template <class V, class T, class A>
CARAFE_INLINE void unstage_row(const A* lanes, int64_t count, T* to, int64_t step) {
  const auto vector = [&](int64_t q) CARAFE_ALWAYS_INLINE { store_narrowed<V>(to + q, V::load(lanes + q)); };
  if (step == 1 && for_each_vector<V>(count, vector)) return;
  for (int64_t q = 0; q < count; ++q) to[q * step] = Narrow<T>::from(lanes[q]);
}

template <class V, class T, class A>
CARAFE_INLINE void unstage_pairs(const A* even, const A* odd, int64_t count, T* to) {
  const auto vectors = [&](int64_t q)
                           CARAFE_ALWAYS_INLINE { store_pairs<V>(to + 2 * q, V::load(even + q), V::load(odd + q)); };
  if (for_each_vector<V>(count, vectors)) return;
  for (int64_t q = 0; q < count; ++q) {
    to[2 * q] = Narrow<T>::from(even[q]);
    to[2 * q + 1] = Narrow<T>::from(odd[q]);
  }
}

// Channels lie far apart, so that the hardware's prefetcher loses its way (and its page) at each of them: rows are
// prefetched this many channels ahead.
constexpr int64_t kChannelsAhead = 4;

template <bool ForWriting, class T>
CARAFE_INLINE void prefetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count + line - 1; i += line) __builtin_prefetch(from + std::min(i, count - 1), ForWriting, 2);
}

// Copies what lies inside the map; the rest of the buffer stays as it is. One channel after the other, as they lie in
// memory, unless they lie side by side.
template <class V, class T, class A>
CARAFE_INLINE void stage(const Map<const T>& map, const Region& region, const Staged<A>& to) {
  const int64_t period = to.phases, step = map.column_stride * period;
  const Inside inside(region, to);
  const int64_t begin = inside.begin;
  const auto count = [&](int64_t phase) { return inside.count(phase, period); };
  const auto source = [&](int64_t c, int64_t row, int64_t phase) {
    return map.pointer(region.n, region.channel + c, region.row + row, (region.lane + begin) * period + phase);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      for (int64_t phase = 0; phase < period; ++phase) {
        gather_channels<V>(source(0, row, phase), step, count(phase), to.channels, to.row(row).from(0, phase, begin));
      }
    }
    return;
  }
  const bool pairs = period == 2 && map.column_stride == 1;
  for (int64_t c = 0; c < to.channels; ++c) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      A* const lanes = to.at(c, row) + begin;
      if (map.column_stride == 1 && region.channel + c + kChannelsAhead < region.last_channel) {
        prefetch<false>(source(c + kChannelsAhead, row, 0), count(0) * period);
      }
      if (pairs) {
        const int64_t whole = count(1);
        stage_pairs<V>(source(c, row, 0), whole, lanes, lanes + to.pitch);
        if (count(0) > whole) lanes[whole] = widen(*source(c, row, 2 * whole));
        continue;
      }
      for (int64_t phase = 0; phase < period; ++phase) {
        stage_row<V>(source(c, row, phase), step, count(phase), lanes + phase * to.pitch);
      }
    }
  }
}

// Writes a buffer's lanes (no halo) to where they lie in the map.
template <class V, class T, class A>
CARAFE_INLINE void unstage(const Staged<A>& from, const Region& region, const Map<T>& map) {
  const int64_t period = from.phases, step = map.column_stride * period;
  const int64_t columns = std::min(from.lanes * period, region.map_columns - region.lane * period);
  const auto target = [&](int64_t c, int64_t row, int64_t column) {
    return map.pointer(region.n, region.channel + c, region.row + row, region.lane * period + column);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < from.rows; ++row) {
      for (int64_t phase = 0; phase < std::min(period, columns); ++phase) {
        scatter_channels<V>(
            from.row(row).from(0, phase), ceil_div(columns - phase, period), from.channels, target(0, row, phase),
            step);
      }
    }
    return;
  }
  const bool pairs = period == 2 && map.column_stride == 1;
  for (int64_t c = 0; c < from.channels; ++c) {
    for (int64_t row = 0; row < from.rows; ++row) {
      const A* const lanes = from.at(c, row);
      if (map.column_stride == 1 && region.channel + c + kChannelsAhead < region.last_channel) {
        prefetch<true>(target(c + kChannelsAhead, row, 0), columns);
      }
      if (pairs) {
        unstage_pairs<V>(lanes, lanes + from.pitch, columns / 2, target(c, row, 0));
        if (columns % 2) *target(c, row, columns - 1) = Narrow<T>::from(lanes[columns / 2]);
        continue;
      }
      for (int64_t phase = 0; phase < std::min(period, columns); ++phase) {
        unstage_row<V>(lanes + phase * from.pitch, ceil_div(columns - phase, period), target(c, row, phase), step);
      }
    }
  }
}

}  // namespace carafe

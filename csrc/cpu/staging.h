// Copies between maps of any layout and dtype and the buffers that the loops run along. Each goes both ways: from the
// map where its elements are const, otherwise to the map.
#pragma once

#include "buffer.h"

namespace carafe {

template <class T, class A>
CARAFE_INLINE void copy_element(T* element, A* lane) {
  if constexpr (std::is_const_v<T>) {
    *lane = widen(*element);
  } else {
    *element = narrow<T>(*lane);
  }
}

template <class V, class T, class A>
CARAFE_INLINE typename V::type load_source(T* elements, A* lanes) {
  if constexpr (std::is_const_v<T>) {
    return load_widened<V>(elements);
  } else {
    return V::load(lanes);
  }
}

template <class V, class T, class A>
CARAFE_INLINE void store_target(T* elements, A* lanes, typename V::type value) {
  if constexpr (std::is_const_v<T>) {
    V::store(lanes, value);
  } else {
    store_narrowed<V>(elements, value);
  }
}

// Pixels (`step` apart, channels adjacent), and lanes, those of channel c at lanes(c).
template <class V, class T, class ChannelLanes>
CARAFE_INLINE void copy_channels(T* pixels, int64_t step, int64_t count, int64_t channels, const ChannelLanes& lanes) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    int64_t q = 0;
    for (; q + V::lanes <= count; q += V::lanes) {
      typename V::type square[V::lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) square[i] = load_source<V>(pixels + (q + i) * step + c, lanes(c + i) + q);
      transpose<V>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) store_target<V>(pixels + (q + i) * step + c, lanes(c + i) + q, square[i]);
    }
    for (; q < count; ++q) {
      for (int64_t i = 0; i < V::lanes; ++i) copy_element(pixels + q * step + c + i, lanes(c + i) + q);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) copy_element(pixels + q * step + c, lanes(c) + q);
  }
}

// `count` columns, `step` apart, and lanes.
template <class V, class T, class A>
CARAFE_INLINE void copy_row(T* columns, int64_t step, int64_t count, A* lanes) {
  const auto vector = [&](int64_t q) CARAFE_ALWAYS_INLINE {
    store_target<V>(columns + q, lanes + q, load_source<V>(columns + q, lanes + q));
  };
  if (step == 1 && for_each_vector<V>(count, vector)) return;
  for (int64_t q = 0; q < count; ++q) copy_element(columns + q * step, lanes + q);
}

// 2 `count` adjacent columns, and the lanes of two phases.
template <class V, class T, class A>
CARAFE_INLINE void copy_pairs(T* columns, int64_t count, A* even, A* odd) {
  const auto vectors = [&](int64_t q) CARAFE_ALWAYS_INLINE {
    if constexpr (std::is_const_v<T>) {
      typename V::type first, second;
      load_pairs<V>(columns + 2 * q, first, second);
      V::store(even + q, first);
      V::store(odd + q, second);
    } else {
      store_pairs<V>(columns + 2 * q, V::load(even + q), V::load(odd + q));
    }
  };
  if (for_each_vector<V>(count, vectors)) return;
  for (int64_t q = 0; q < count; ++q) {
    copy_element(columns + 2 * q, even + q);
    copy_element(columns + 2 * q + 1, odd + q);
  }
}

// Channels lie far apart, so that the hardware's prefetcher loses its way (and its page) at each of them: rows are
// prefetched this many channels ahead.
constexpr int64_t kChannelsAhead = 4;

template <class T>
CARAFE_INLINE void prefetch(T* columns, int64_t count) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count + line - 1; i += line) {
    __builtin_prefetch(columns + std::min(i, count - 1), !std::is_const_v<T>, 2);
  }
}

// Which part of a map a buffer mirrors: channels from `channel`, rows from `row` (may lie outside the map), lanes from
// `lane` (likewise). The next buffers, too, come from the channels before `last_channel`.
struct Region {
  int64_t n, channel, last_channel, row, lane;
  int64_t map_rows, map_columns;
};

// What of a buffer lies inside the map: some rows, and in each of them lanes from `begin` on.
struct Inside {
  int64_t first_row, last_row, begin;

  template <class Buffer>
  Inside(const Region& region, const Buffer& buffer)
      : first_row(std::max<int64_t>(0, -region.row)),
        last_row(std::min(buffer.rows, region.map_rows - region.row)),
        begin(std::max(-buffer.halo, -region.lane)),
        end_(buffer.lanes + buffer.halo),
        region_(region) {}

  // How many lanes: one more, perhaps, in the first of `period` phases than in the last.
  CARAFE_INLINE int64_t count(int64_t phase, int64_t period) const {
    const int64_t end = std::min(end_, ceil_div(region_.map_columns - phase, period) - region_.lane);
    return std::max<int64_t>(0, end - begin);
  }

 private:
  int64_t end_;
  const Region& region_;
};

// Zeros for what lies outside the map. Once for a tile is enough, before its first copy: which part that is does not
// depend on the channel.
template <class V, class A>
CARAFE_INLINE void clear_outside(const Region& region, const Staged<A>& buffer) {
  const Inside inside(region, buffer);
  const int64_t end = inside.begin + inside.count(buffer.phases - 1, buffer.phases);
  const typename V::type zero = {};
  for (int64_t place = 0; place < buffer.channels * buffer.rows; ++place) {
    const int64_t channel = place / buffer.rows, row = place % buffer.rows;
    const bool empty = row < inside.first_row || row >= inside.last_row;
    for (int64_t phase = 0; phase < buffer.phases; ++phase) {
      A* const lanes = buffer.at(channel, row, phase);
      const auto clear = [&](int64_t from, int64_t to) CARAFE_ALWAYS_INLINE {  // whole vectors: inside is filled later
        for (int64_t q = floor_div(from, V::lanes) * V::lanes; q < to; q += V::lanes) V::store(lanes + q, zero);
      };
      clear(-buffer.halo, empty ? buffer.lanes + buffer.halo : inside.begin);
      if (!empty) clear(end, buffer.lanes + buffer.halo);
    }
  }
}

// Staged masks with the channels of the logits that they come from, (N, G k^2 up^2, H, W): channel (tap up + row phase)
// up + column phase. Each lane of the logits is a lane of the masks already, so that the pixel shuffle costs nothing.
// For up == 1 or down == 1; the masks have `up` phases.
template <class A>
struct Shuffled {
  const Staged<A>& masks;
  int64_t up = masks.phases, channels = masks.channels * up * up;
  int64_t rows = masks.rows / up, phases = 1, lanes = masks.lanes, halo = masks.halo;

  CARAFE_INLINE auto row(int64_t i, int64_t lane) const {
    return [first = masks.at(0, i * up) + lane, step = masks.channel_stride(), pitch = masks.pitch, squared = up * up](
               int64_t c, int64_t = 0)
               CARAFE_ALWAYS_INLINE { return first + c / squared * step + c % squared * pitch; };
  }
  // Of the logits, given that of the masks.
  Region region(const Region& r) const {
    const int64_t squared = up * up;
    return {r.n,    r.channel * squared, r.last_channel * squared, r.row / up,
            r.lane, r.map_rows / up,     r.map_columns / up};
  }
};

// Copies what lies inside the map; the rest of the buffer stays as it is. One channel after the other, as they lie in
// memory, unless they lie side by side.
template <class V, class T, class Buffer>
CARAFE_INLINE void copy(const Map<T>& map, const Region& region, const Buffer& buffer) {
  const int64_t period = buffer.phases, step = map.column_stride * period;
  const Inside inside(region, buffer);
  const auto count = [&](int64_t phase) { return inside.count(phase, period); };
  const auto columns = [&](int64_t c, int64_t row, int64_t phase) {
    return map.pointer(region.n, region.channel + c, region.row + row, (region.lane + inside.begin) * period + phase);
  };
  if (map.has_adjacent_channels()) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      const auto lanes = buffer.row(row, inside.begin);
      for (int64_t phase = 0; phase < period; ++phase) {
        copy_channels<V>(
            columns(0, row, phase), step, count(phase), buffer.channels,
            [&](int64_t c) CARAFE_ALWAYS_INLINE { return lanes(c, phase); });
      }
    }
    return;
  }
  const bool pairs = period == 2 && map.column_stride == 1;
  for (int64_t c = 0; c < buffer.channels; ++c) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      const auto lanes = buffer.row(row, inside.begin);
      if (map.column_stride == 1 && region.channel + c + kChannelsAhead < region.last_channel) {
        prefetch(columns(c + kChannelsAhead, row, 0), count(0) * period);
      }
      if (pairs) {
        const int64_t most = count(0), least = count(1);
        copy_pairs<V>(columns(c, row, 0), least, lanes(c, 0), lanes(c, 1));
        if (most > least) copy_element(columns(c, row, 2 * least), lanes(c, 0) + least);
        continue;
      }
      for (int64_t phase = 0; phase < period; ++phase) {
        copy_row<V>(columns(c, row, phase), step, count(phase), lanes(c, phase));
      }
    }
  }
}

}  // namespace carafe

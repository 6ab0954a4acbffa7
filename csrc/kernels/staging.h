// Copies between maps of any layout and dtype, and small buffers in which every axis that the row kernels run along is
// contiguous.
//
// A row of a map is split by a period p into p phases: column q * p + phase goes to lane q of that phase. With period
// `up` for outputs and masks and `down` for features, lane q of every phase belongs to lane q (give or take a shift
// that is the same for all lanes) of every other: upsampling, downsampling and 3/2 vectorise by the same loop.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "scalar.h"

namespace carafe {

#define CARAFE_ALWAYS_INLINE __attribute__((always_inline))
#define CARAFE_INLINE inline CARAFE_ALWAYS_INLINE

template <class A, int Bytes>
struct Vector {
  typedef A element;
  typedef A type __attribute__((vector_size(Bytes)));
  typedef A unaligned __attribute__((vector_size(Bytes), aligned(sizeof(A)), may_alias));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> index __attribute__((vector_size(Bytes)));
  static constexpr int64_t lanes = Bytes / sizeof(A);

  static CARAFE_INLINE type load(const A* address) { return *reinterpret_cast<const unaligned*>(address); }
  static CARAFE_INLINE void store(A* address, type value) { *reinterpret_cast<unaligned*>(address) = value; }
};

// Half 0 (or 1) of two vectors, their elements taking turns.
template <class V, int Half, int64_t... I>
CARAFE_INLINE typename V::type zip(
    typename V::type first, typename V::type second, std::integer_sequence<int64_t, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(first, second, (Half * V::lanes / 2 + I / 2 + I % 2 * V::lanes)...);
#else
  return __builtin_shuffle(first, second, typename V::index{(Half * V::lanes / 2 + I / 2 + I % 2 * V::lanes)...});
#endif
}

// Transposes a square of as many vectors as one has lanes. A round of zipping rows i and i + lanes / 2 rotates the bits
// of every element's address by one: after all rounds, row and column have changed places.
template <class V>
CARAFE_INLINE void transpose(typename V::type (&rows)[V::lanes]) {
  constexpr auto all = std::make_integer_sequence<int64_t, V::lanes>();
#pragma GCC unroll 4
  for (int64_t round = 1; round < V::lanes; round *= 2) {
    typename V::type next[V::lanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < V::lanes / 2; ++i) {
      next[2 * i] = zip<V, 0>(rows[i], rows[i + V::lanes / 2], all);
      next[2 * i + 1] = zip<V, 1>(rows[i], rows[i + V::lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < V::lanes; ++i) rows[i] = next[i];
  }
}

template <class V, class T>
CARAFE_INLINE typename V::type load_widened(const T* from) {
  if constexpr (std::is_same_v<T, typename V::element>) {
    return V::load(from);
  } else {
    typename V::element values[V::lanes];
    for (int64_t i = 0; i < V::lanes; ++i) values[i] = widen(from[i]);
    return V::load(values);
  }
}

template <class V, class T>
CARAFE_INLINE void store_narrowed(T* to, typename V::type value) {
  if constexpr (std::is_same_v<T, typename V::element>) {
    V::store(to, value);
  } else {
    typename V::element values[V::lanes];
    V::store(values, value);
    for (int64_t i = 0; i < V::lanes; ++i) to[i] = Narrow<T>::from(values[i]);
  }
}

// Where the lanes of channel c begin: `step` apart, or, where each holds `phases` in one, those `pitch` apart.
template <class A>
struct Lanes {
  A* base;
  int64_t step, phases = 1, pitch = 0;

  CARAFE_INLINE A* operator()(int64_t c) const { return base + c / phases * step + c % phases * pitch; }
};

// From pixels (`step` apart, channels adjacent) to lanes.
template <class V, class T, class A>
CARAFE_INLINE void gather_channels(
    const T* from, int64_t step, int64_t count, int64_t channels, const Lanes<A>& lanes) {
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
template <class V, class T, class A>
CARAFE_INLINE void scatter_channels(const Lanes<const A>& lanes, int64_t count, int64_t channels, T* to, int64_t step) {
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

// What one buffer holds: [channel][row][phase][lane], lanes -halo .. lanes + halo - 1 at `pitch` elements a phase.
template <class A>
struct Staged {
  A* data;  // lane 0 of the first channel, row and phase
  int64_t channels, rows, phases, lanes, halo, pitch;

  int64_t row_stride() const { return phases * pitch; }
  int64_t channel_stride() const { return rows * phases * pitch; }
};

// The part of a map that a buffer mirrors: channels from `channel`, rows from `row` (may lie outside the map), lanes
// from `lane` (likewise).
struct Window {
  int64_t n, channel, row, lane;
  int64_t map_rows, map_columns;
};

// Fills a buffer, its halo included, with zeros for what lies outside the map.
template <class V, class T, class A>
CARAFE_INLINE void stage(const Map<const T>& map, const Window& window, const Staged<A>& to) {
  const int64_t period = to.phases;
  for (int64_t row = 0; row < to.rows; ++row) {
    const int64_t i = window.row + row;
    const bool inside = i >= 0 && i < window.map_rows;
    for (int64_t phase = 0; phase < period; ++phase) {
      // Lanes [begin, end) of this phase lie inside the map.
      int64_t begin = -to.halo, end = to.lanes + to.halo;
      if (inside) {
        begin = std::max(begin, -window.lane);
        end = std::min(end, ceil_div(window.map_columns - phase, period) - window.lane);
      }
      if (!inside || end <= begin) begin = end = to.lanes + to.halo;
      A* const first = to.data + row * to.row_stride() + phase * to.pitch;
      for (int64_t c = 0; c < to.channels; ++c) {
        A* const lanes = first + c * to.channel_stride();
        std::fill(lanes - to.halo, lanes + begin, A(0));
        std::fill(lanes + end, lanes + to.lanes + to.halo, A(0));
      }
      if (begin == end) continue;
      const T* const source = map.pointer(window.n, window.channel, i, (window.lane + begin) * period + phase);
      const int64_t step = map.column_stride * period;
      if (map.channel_stride == 1 && step != 1) {
        gather_channels<V>(source, step, end - begin, to.channels, Lanes<A>{first + begin, to.channel_stride()});
        continue;
      }
      for (int64_t c = 0; c < to.channels; ++c) {
        const T* const from = source + c * map.channel_stride;
        A* const lanes = first + c * to.channel_stride() + begin;
        const int64_t count = end - begin;
        if (step == 1) {
          for (int64_t q = 0; q < count; ++q) lanes[q] = widen(from[q]);
        } else if (step == 2) {
          for (int64_t q = 0; q < count; ++q) lanes[q] = widen(from[2 * q]);
        } else {
          for (int64_t q = 0; q < count; ++q) lanes[q] = widen(from[q * step]);
        }
      }
    }
  }
}

// Writes a buffer's lanes (no halo) to where they lie in the map.
template <class V, class T, class A>
CARAFE_INLINE void unstage(const Staged<A>& from, const Window& window, const Map<T>& map) {
  const int64_t period = from.phases;
  for (int64_t row = 0; row < from.rows; ++row) {
    const int64_t first_column = window.lane * period;
    const int64_t columns = std::min(from.lanes * period, window.map_columns - first_column);
    const A* const first = from.data + row * from.row_stride();
    T* const target = map.pointer(window.n, window.channel, window.row + row, first_column);
    if (map.channel_stride == 1 && map.column_stride != 1) {
      for (int64_t phase = 0; phase < std::min(period, columns); ++phase) {
        scatter_channels<V>(
            Lanes<const A>{first + phase * from.pitch, from.channel_stride()}, ceil_div(columns - phase, period),
            from.channels, target + phase * map.column_stride, period * map.column_stride);
      }
      continue;
    }
    for (int64_t c = 0; c < from.channels; ++c) {
      const A* const lanes = first + c * from.channel_stride();
      T* const to = target + c * map.channel_stride;
      if (map.column_stride == 1 && period == 1) {
        for (int64_t q = 0; q < columns; ++q) to[q] = Narrow<T>::from(lanes[q]);
      } else if (map.column_stride == 1 && period == 2) {
        const A* const odd = lanes + from.pitch;
        for (int64_t q = 0; q < columns / 2; ++q) {
          to[2 * q] = Narrow<T>::from(lanes[q]);
          to[2 * q + 1] = Narrow<T>::from(odd[q]);
        }
        if (columns % 2) to[columns - 1] = Narrow<T>::from(lanes[columns / 2]);
      } else {
        for (int64_t column = 0; column < columns; ++column) {
          to[column * map.column_stride] = Narrow<T>::from(lanes[column % period * from.pitch + column / period]);
        }
      }
    }
  }
}

}  // namespace carafe

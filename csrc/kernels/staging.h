// Copies between maps of any layout and dtype, and small buffers in which every axis that the row kernels run along is
// contiguous.
//
// A row of a map is split by a period p into p phases: column q * p + phase goes to lane q of that phase. With period
// `up` for outputs and masks and `down` for features, lane q of every phase belongs to lane q (give or take a shift
// that is the same for all lanes) of every other: upsampling, downsampling and 3/2 vectorise by the same loop.
#pragma once

#include <algorithm>
#include <cstring>

#include "scalar.h"

namespace carafe {

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
template <class T, class A>
inline __attribute__((always_inline)) void stage(const Map<const T>& map, const Window& window, const Staged<A>& to) {
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
        for (int64_t q = 0; q < end - begin; ++q) {
          for (int64_t c = 0; c < to.channels; ++c)
            first[c * to.channel_stride() + begin + q] = widen(source[q * step + c]);
        }
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
template <class T, class A>
inline __attribute__((always_inline)) void unstage(const Staged<A>& from, const Window& window, const Map<T>& map) {
  const int64_t period = from.phases;
  for (int64_t row = 0; row < from.rows; ++row) {
    const int64_t first_column = window.lane * period;
    const int64_t columns = std::min(from.lanes * period, window.map_columns - first_column);
    const A* const first = from.data + row * from.row_stride();
    T* const target = map.pointer(window.n, window.channel, window.row + row, first_column);
    if (map.channel_stride == 1 && map.column_stride != 1) {
      for (int64_t column = 0; column < columns; ++column) {
        const A* const lane = first + column % period * from.pitch + column / period;
        T* const to = target + column * map.column_stride;
        for (int64_t c = 0; c < from.channels; ++c) to[c] = Narrow<T>::from(lane[c * from.channel_stride()]);
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

// A window of a feature map, or of an output's gradient, in shared memory.
#pragma once

#include "sites.h"

namespace carafe::gpu::general {

// How a window lies there: [phase row][phase column][site row][site column][channel]. The channels of a pixel are
// neighbours so that a thread reads four of them at once; kQuad more than are used keep the 16-byte accesses of
// neighbouring pixels in different banks where there is an even number of quads.
struct Patch {
  static constexpr int kQuad = 4;

  int rows = 1, columns = 1;              // sites, halo included
  int phase_rows = 1, phase_columns = 1;  // of the map, that are staged
  int quads = 1;                          // channels / 4
  Divider by_rows = Divider::by(rows), by_columns = Divider::by(columns), by_window = Divider::by(rows * columns);
  Divider by_phase_columns = Divider::by(phase_columns), by_places = Divider::by(places());
  Divider by_quads = Divider::by(quads);

  CARAFE_HOST_DEVICE int pitch() const { return quads * kQuad + kQuad; }
  CARAFE_HOST_DEVICE int plane() const { return rows * columns * pitch(); }  // from a phase to the next
  CARAFE_HOST_DEVICE int places() const { return phase_rows * phase_columns * rows * columns; }
  CARAFE_HOST_DEVICE int64_t size() const { return int64_t(places()) * pitch(); }
  CARAFE_HOST_DEVICE int offset(int row, int column) const { return (row * columns + column) * pitch(); }
};

// The same window of the map in global memory.
struct Window {
  int n, channel;              // the first channel
  int channels;                // how many there are: beyond them zeros are staged
  int row, column;             // the first site
  int height, width;           // of the map, in pixels: outside, the features are zero, not absent
  int scale, first_phase_row;  // pixels a site, and the first phase row of the patch
};

// Four channels of a place of the patch, as they lie in global memory.
template <class T>
CARAFE_HOST_DEVICE Quad<T> fetch_quad(
    const View<const T>& view, const Window& window, const Patch& patch, int place, int quad) {
  constexpr int kQuad = Patch::kQuad;
  const int rest = patch.by_columns(place), column = place - rest * patch.columns;
  const int phase = patch.by_rows(rest), row = rest - phase * patch.rows;
  const int phase_row = patch.by_phase_columns(phase), phase_column = phase - phase_row * patch.phase_columns;
  const int i = (window.row + row) * window.scale + window.first_phase_row + phase_row;
  const int j = (window.column + column) * window.scale + phase_column;
  const int left = window.channels - quad * kQuad;
  Quad<T> value = {};
  if (i < 0 || i >= window.height || j < 0 || j >= window.width) return value;
  const T* const from = view.map.pointer(window.n, window.channel + quad * kQuad, i, j);
  if (view.quads && left >= kQuad) return load_quad(from);
  CARAFE_UNROLL
  for (int c = 0; c < kQuad; ++c) {
    if (c < left) value.values[c] = from[c * view.map.channel_stride];
  }
  return value;
}

// A thread issues InFlight loads before it waits for the first of them.
template <int InFlight, class T, class A>
CARAFE_HOST_DEVICE void stage_patch(
    const View<const T>& view, const Window& window, const Patch& patch, int thread, int threads, A* to) {
  constexpr int kQuad = Patch::kQuad;
  // Neighbouring threads take neighbours in memory.
  const Divider& first_axis = view.channels_last ? patch.by_quads : patch.by_places;
  const int items = patch.places() * patch.quads;
  CARAFE_ROLLED
  for (int first = thread; first < items; first += InFlight * threads) {
    Quad<T> values[InFlight];
    int targets[InFlight];
    CARAFE_UNROLL
    for (int b = 0; b < InFlight; ++b) {
      const int item = first + b * threads;
      if (item >= items) continue;
      const int other = first_axis(item), one = item - other * static_cast<int>(first_axis.divisor);
      const int place = view.channels_last ? other : one, quad = view.channels_last ? one : other;
      values[b] = fetch_quad(view, window, patch, place, quad);
      targets[b] = place * patch.pitch() + quad * kQuad;
    }
    CARAFE_UNROLL
    for (int b = 0; b < InFlight; ++b) {
      if (first + b * threads >= items) continue;
      Quad<A> wide;
      CARAFE_UNROLL
      for (int c = 0; c < kQuad; ++c) wide.values[c] = widen(values[b].values[c]);
      store_quad(to + targets[b], wide);
    }
  }
}

// Writes four neighbouring channels of a pixel, or as many of them as there are.
template <class T, class A>
CARAFE_HOST_DEVICE void write_quad(const View<T>& view, T* to, const A* values, int left) {
  constexpr int kQuad = Patch::kQuad;
  if (view.quads && left >= kQuad) {
    Quad<T> packed;
    CARAFE_UNROLL
    for (int c = 0; c < kQuad; ++c) packed.values[c] = narrow<T>(values[c]);
    store_quad(to, packed);
  } else {
    CARAFE_UNROLL
    for (int c = 0; c < kQuad; ++c) {
      if (c < left) to[c * view.map.channel_stride] = narrow<T>(values[c]);
    }
  }
}

template <class T, class A>
CARAFE_HOST_DEVICE void write_pair(T* to, const A (&values)[2]) {
  struct alignas(2 * sizeof(T)) Pair {
    T values[2];
  };
  *reinterpret_cast<Pair*>(to) = Pair{{narrow<T>(values[0]), narrow<T>(values[1])}};
}

}  // namespace carafe::gpu::general

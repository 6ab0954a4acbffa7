// How the arithmetic walks over staged features: the taps of an output, and outputs that read the same features.
#pragma once

#include "buffer.h"
#include "plan.h"

namespace carafe {

// Where the element `column` columns right of lane q's first one lies: its phase, and how many lanes further.
struct LaneOffset {
  int64_t phase, lanes;
  CARAFE_INLINE LaneOffset(int64_t column, int64_t period)
      : phase(column - floor_div(column, period) * period), lanes(floor_div(column, period)) {}
};

// The taps of a kernel: how far from an output's lane the features of each one lie.
struct Taps {
  const int64_t* offsets;
  int64_t count;
};

// Lists `count` taps of outputs that lie at column `column` of their lane's features; those after the kernel's last row
// of taps go on below it.
template <class A>
CARAFE_INLINE Taps
list_taps(const Shape& shape, const Staged<A>& features, int64_t column, int64_t count, int64_t* offsets) {
  for (int64_t tap = 0; tap < count; ++tap) {
    const LaneOffset at(column + tap % shape.kernel - shape.radius(), shape.down);
    offsets[tap] = tap / shape.kernel * features.row_stride() + at.phase * features.pitch + at.lanes;
  }
  return {offsets, count};
}

// Calls run(features, taps, place, count) for every run of outputs that read the same features: `count` phases from
// `place` on, counted from the first output row of the tile, which read the row `features` at `taps`. All outputs of a
// source row are one run where down is 1.
template <class A, class Function>
CARAFE_INLINE void for_each_run(
    const Shape& shape, const Tile& tile, const Staged<A>& features, int64_t* offsets, const Function& run) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for (int64_t phase = 0; phase < shape.up;) {
    const int64_t source = phase * shape.down / shape.up;
    int64_t next = phase + 1;
    while (next < shape.up && next * shape.down / shape.up == source) ++next;
    const bool whole = next - phase == shape.up;  // then the rows, too, are consecutive outputs
    const Taps taps = list_taps(shape, features, source, shape.taps(), offsets);
    for (int64_t s = tile.row_begin; s < tile.row_end; ++s) {
      const OutputRows own(shape, s, s + 1);
      const Lanes<A> from = features.row(s - tile.row_begin);
      for (int64_t row = own.begin; row < own.end; row += whole ? own.count() : 1) {
        run(from, taps, (row - rows.begin) * shape.up + phase, whole ? own.count() * shape.up : next - phase);
      }
    }
    phase = next;
  }
}

}  // namespace carafe

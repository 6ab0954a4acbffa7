// How the arithmetic walks over staged buffers: blocks of what stays in registers, vectors along a row, and outputs
// that read the same features.
#pragma once

#include "plan.h"

namespace carafe {

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls body(size, place) for the blocks that 0 .. count - 1 fall into: as many as there are of the first size, then of
// the next. Sizes of 0 are left out; the last one is 1, or places may remain.
template <int... Sizes, class Body>
CARAFE_INLINE void for_each_block(int64_t count, const Body& body) {
  int64_t place = 0;
  const auto of_size = [&](auto size) CARAFE_ALWAYS_INLINE {
    if constexpr (size > 0) {
      for (; place + size <= count; place += size) body(size, place);
    }
  };
  (of_size(Constant<Sizes>()), ...);
}

// Calls body(vector, begin, end) for the lanes to go over by whole vectors, then, where half a vector holds what
// remains, for those to go over by half a one: on processors that take the widest in two turns it costs half. Worth it
// around whole passes over the channels; deeper inside, two versions of a loop cost each other registers.
template <class V, class Body>
CARAFE_INLINE void with_half_tail(int64_t begin, int64_t end, const Body& body) {
  if constexpr (V::bytes == kVectorBytes) {
    const int64_t rest = (end - begin) % V::lanes;
    if (rest > 0 && rest <= V::lanes / 2) {
      body(V(), begin, end - rest);
      return body(Vector<typename V::element, V::bytes / 2>(), end - rest, end);
    }
  }
  body(V(), begin, end);
}

// The offsets of `count` taps from lane 0 of a row of features, for outputs that lie at its column `column`; those
// after the kernel's last row of taps go on below it.
template <class A>
CARAFE_INLINE void list_taps(
    const Shape& shape, const Staged<A>& features, int64_t column, int64_t count, int64_t* offsets) {
  for (int64_t tap = 0; tap < count; ++tap) {
    const LaneOffset at(column + tap % shape.kernel - shape.radius(), shape.down);
    offsets[tap] = tap / shape.kernel * features.row_stride() + at.phase * features.pitch + at.lanes;
  }
}

// Calls run(features, place, count) for every run of outputs that read the same features: `count` phases from `place`
// on (in units of a pitch, from the first output row of the tile), which read `features` at `offsets` (one a tap). All
// outputs of a source row are one run where down is 1.
template <class A, class Function>
CARAFE_INLINE void for_each_run(
    const Shape& shape, const Tile& tile, const OutputRows& rows, const Staged<A>& features, int64_t* offsets,
    const Function& run) {
  for (int64_t phase = 0; phase < shape.up;) {
    const int64_t source = phase * shape.down / shape.up;
    int64_t next = phase + 1;
    while (next < shape.up && next * shape.down / shape.up == source) ++next;
    const bool whole = next - phase == shape.up;  // then the rows, too, are consecutive outputs
    list_taps(shape, features, source, shape.taps(), offsets);
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

}  // namespace carafe

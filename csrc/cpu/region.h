// Which part of a map a buffer mirrors, and what of it lies outside the map.
#pragma once

#include "buffer.h"

namespace carafe {

// Channels from `channel`, rows from `row` (may lie outside the map), lanes from `lane` (likewise). The next buffers,
// too, come from the channels before `last_channel`.
struct Region {
  int64_t n, channel, last_channel, row, lane;
  int64_t map_rows, map_columns;
};

// What of a buffer lies inside the map: some rows, and in each of them lanes from `begin` on.
struct Inside {
  int64_t first_row, last_row, begin;

  template <class A>
  Inside(const Region& region, const Staged<A>& buffer)
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

// Zeros for what lies outside the map. Once for a tile is enough, before its first stage(): which part that is does not
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

}  // namespace carafe

// Small buffers in which every axis that the loops run along is contiguous, in the dtype of the arithmetic.
//
// A row of a map is split by a period p into p phases: column q * p + phase goes to lane q of that phase. With period
// `up` for outputs and masks and `down` for features, lane q of every phase belongs to lane q (give or take a shift
// that is the same for all lanes) of every other: upsampling, downsampling and 3/2 vectorise by the same loop.
#pragma once

#include <memory>

#include "plan.h"

namespace carafe {

// The lanes of several channels and phases as the innermost loops see them; the channels of masks are their taps.
template <class A>
struct Lanes {
  A* data;
  int64_t channel_step, phase_step;

  CARAFE_INLINE A* operator()(int64_t channel, int64_t phase = 0) const {
    return data + channel * channel_step + phase * phase_step;
  }
  CARAFE_INLINE Lanes from(int64_t channel, int64_t phase = 0, int64_t lane = 0) const {
    return {(*this)(channel, phase) + lane, channel_step, phase_step};
  }
};

// What a buffer holds: [channel][row][phase][lane], lanes -halo .. lanes + halo - 1 at `pitch` elements a phase.
template <class A>
struct Staged {
  A* data;  // lane 0 of the first channel, row and phase
  int64_t channels, rows, phases, lanes, halo, pitch;

  int64_t row_stride() const { return phases * pitch; }
  // A vector more than there is: strides of 4096 bytes would drive the taps of a lane out of the first-level cache.
  int64_t channel_stride() const { return rows * phases * pitch + kVectorBytes / int64_t(sizeof(A)); }

  CARAFE_INLINE A* at(int64_t channel, int64_t row, int64_t phase = 0) const {
    return data + channel * channel_stride() + row * row_stride() + phase * pitch;
  }
  // Phases from the first of a row on; those of the next row follow.
  CARAFE_INLINE Lanes<A> row(int64_t i, int64_t lane = 0) const { return {at(0, i) + lane, channel_stride(), pitch}; }

  void fill_zero() const {
    if (channels * rows * phases == 0) return;
    std::fill(data - halo, at(channels - 1, rows - 1, phases - 1) + lanes + halo, A(0));
  }
};

// Memory for the buffers of one thread; it grows to the largest tile and is reused for the next.
template <class A>
class Scratch {
 public:
  Staged<A> take(int64_t channels, int64_t rows, int64_t phases, int64_t lanes, int64_t halo) {
    constexpr int64_t vector = kVectorBytes / int64_t(sizeof(A));
    const int64_t left = ceil_div(halo, vector) * vector;
    const int64_t pitch = left + ceil_div(lanes + halo, vector) * vector;
    Staged<A> buffer{nullptr, channels, rows, phases, lanes, halo, pitch};
    const int64_t count = channels * buffer.channel_stride();
    Block& block = blocks_[next_++];
    if (!block.memory || block.size < count) {
      block.memory.reset(new A[count + vector]);
      block.size = count;
    }
    A* const aligned =
        reinterpret_cast<A*>(ceil_div(reinterpret_cast<intptr_t>(block.memory.get()), kVectorBytes) * kVectorBytes);
    buffer.data = aligned + left;
    return buffer;
  }
  // Offsets, or pointers; one list a tile.
  template <class Item>
  Item* list(int64_t count) {
    static_assert(sizeof(Item) % sizeof(int64_t) == 0, "one list serves all");
    const int64_t size = count * int64_t(sizeof(Item) / sizeof(int64_t));
    if (list_size_ < size) {
      list_.reset(new int64_t[size]);
      list_size_ = size;
    }
    return reinterpret_cast<Item*>(list_.get());
  }
  void restart() { next_ = 0; }

 private:
  struct Block {
    std::unique_ptr<A[]> memory;
    int64_t size = 0;
  };
  Block blocks_[5];
  int next_ = 0;
  std::unique_ptr<int64_t[]> list_;
  int64_t list_size_ = 0;
};

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

// Small buffers in which every axis that the loops run along is contiguous, in the dtype of the arithmetic.
//
// A row of a map is split by a period p into p phases: column q * p + phase goes to lane q of that phase. With period
// `up` for outputs and masks and `down` for features, lane q of every phase belongs to lane q (give or take a shift
// that is the same for all lanes) of every other: upsampling, downsampling and 3/2 vectorise by the same loop.
#pragma once

#include <memory>

#include "../common/shape.h"
#include "simd.h"

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
  CARAFE_INLINE Lanes<A> row(int64_t i) const { return {at(0, i), channel_stride(), pitch}; }

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
    static_assert(sizeof(Item) == sizeof(int64_t), "one list serves both");
    if (list_size_ < count) {
      list_.reset(new int64_t[count]);
      list_size_ = count;
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

}  // namespace carafe

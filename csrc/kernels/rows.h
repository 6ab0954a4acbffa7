// The fast CPU kernels: vectors run along the row, a block of channels and output phases stays in registers.
//
// Work is cut into tiles: one image, one group, a band of source rows, a range of lanes (staging.h says what a lane
// is). A tile stages what it reads, computes, and writes only its own elements; each element's sum has one order,
// whatever the tiling, so the bits depend neither on the number of threads nor on their timing.
#pragma once

#include <memory>
#include <type_traits>

#include "staging.h"

namespace carafe {

// Vector width and register count of an instruction set; cpu/carafe.cpp compiles the kernels once for each.
template <int Bytes, int Registers>
struct Isa {
  static constexpr int bytes = Bytes, registers = Registers;
};

#define CARAFE_ALWAYS_INLINE __attribute__((always_inline))
#define CARAFE_INLINE inline CARAFE_ALWAYS_INLINE

template <int Value>
using Constant = std::integral_constant<int, Value>;

template <class A, int Bytes>
struct Vector {
  typedef A type __attribute__((vector_size(Bytes)));
  typedef A unaligned __attribute__((vector_size(Bytes), aligned(sizeof(A)), may_alias));
  static constexpr int64_t lanes = Bytes / sizeof(A);

  static CARAFE_INLINE type load(const A* address) { return *reinterpret_cast<const unaligned*>(address); }
  static CARAFE_INLINE void store(A* address, type value) { *reinterpret_cast<unaligned*>(address) = value; }
};

// How a call is cut into tiles.
struct Plan {
  int64_t bands, rows;   // bands of at most `rows` source rows
  int64_t spans, lanes;  // spans of at most `lanes` lanes
  int64_t tiles;         // batch * groups * bands * spans
};

struct Tile {
  int64_t n, group;
  int64_t row_begin, row_end;  // source rows
  int64_t lane_begin, lanes;
};

constexpr int64_t kVectorBytes = 64;        // the widest, so that one plan serves every instruction set
constexpr int64_t kMaxLanes = 128;          // of a span
constexpr int64_t kMaskBytes = 384 * 1024;  // staged masks of a band: they should stay in the second-level cache
constexpr int64_t kMaxRows = 8;             // of a band
constexpr int64_t kTilesPerThread = 4;      // enough that threads share evenly
constexpr int64_t kChunk = 16;              // channels staged at a time

template <class A>
Plan make_plan(const Shape& shape, int64_t threads) {
  const int64_t vector = kVectorBytes / int64_t(sizeof(A));
  const int64_t all_lanes = std::max(ceil_div(shape.out_width, shape.up), ceil_div(shape.width, shape.down));
  Plan plan;
  plan.spans = ceil_div(all_lanes, kMaxLanes);
  plan.lanes = ceil_div(ceil_div(all_lanes, plan.spans), vector) * vector;
  plan.spans = ceil_div(all_lanes, plan.lanes);
  const int64_t outputs_a_row = ceil_div(shape.up, shape.down) * shape.up;
  const int64_t bytes_a_row = shape.taps() * outputs_a_row * plan.lanes * int64_t(sizeof(A));
  const int64_t most = std::clamp<int64_t>(kMaskBytes / bytes_a_row, 1, kMaxRows);
  const int64_t wanted =
      ceil_div(kTilesPerThread * threads, std::max<int64_t>(1, shape.batch * shape.groups * plan.spans));
  plan.bands = std::min(shape.height, std::max(ceil_div(shape.height, most), wanted));
  plan.rows = ceil_div(shape.height, plan.bands);
  plan.bands = ceil_div(shape.height, plan.rows);
  plan.tiles = shape.batch * shape.groups * plan.bands * plan.spans;
  return plan;
}

inline Tile make_tile(const Shape& shape, const Plan& plan, int64_t index) {
  Tile tile;
  tile.lane_begin = index % plan.spans * plan.lanes;
  tile.lanes = plan.lanes;
  index /= plan.spans;
  tile.row_begin = index % plan.bands * plan.rows;
  tile.row_end = std::min(shape.height, tile.row_begin + plan.rows);
  index /= plan.bands;
  tile.group = index % shape.groups;
  tile.n = index / shape.groups;
  return tile;
}

// Outputs [begin, end) of source rows [first, last), clipped to the map.
struct OutputRows {
  int64_t begin, end;
  OutputRows(const Shape& shape, int64_t first, int64_t last)
      : begin(std::min(shape.out_height, shape.first_output(std::max<int64_t>(first, 0)))),
        end(std::min(shape.out_height, shape.first_output(std::clamp<int64_t>(last, 0, shape.height)))) {}
  int64_t count() const { return std::max<int64_t>(0, end - begin); }
};

// Memory for the buffers of one thread; it grows to the largest tile and is reused for the next.
template <class A>
class Scratch {
 public:
  Staged<A> take(int64_t channels, int64_t rows, int64_t phases, int64_t lanes, int64_t halo) {
    constexpr int64_t vector = kVectorBytes / int64_t(sizeof(A));
    const int64_t left = ceil_div(halo, vector) * vector;
    const int64_t pitch = left + ceil_div(lanes + halo, vector) * vector;
    const int64_t count = channels * rows * phases * pitch;
    Block& block = blocks_[next_++];
    if (block.size < count) {
      block.memory.reset(new A[count + vector]);
      block.size = count;
    }
    A* const aligned =
        reinterpret_cast<A*>(ceil_div(reinterpret_cast<intptr_t>(block.memory.get()), kVectorBytes) * kVectorBytes);
    return {aligned + left, channels, rows, phases, lanes, halo, pitch};
  }
  int64_t* offsets(int64_t count) {
    if (offset_count_ < count) {
      offsets_.reset(new int64_t[count]);
      offset_count_ = count;
    }
    return offsets_.get();
  }
  void restart() { next_ = 0; }

 private:
  struct Block {
    std::unique_ptr<A[]> memory;
    int64_t size = 0;
  };
  Block blocks_[4];
  int next_ = 0;
  std::unique_ptr<int64_t[]> offsets_;
  int64_t offset_count_ = 0;
};

// Where column `shift` elements right of lane q's source column 0 lies: its phase, and how many lanes further.
struct LaneOffset {
  int64_t phase, lanes;
  CARAFE_INLINE LaneOffset(int64_t column, int64_t period)
      : phase(column - floor_div(column, period) * period), lanes(floor_div(column, period)) {}
};

// Calls run(features, place, count) for every run of outputs that read the same features: `count` phases from `place`
// on (in units of a pitch, from the first output row of the tile), which read `features` at `offsets` (one a tap). All
// outputs of a source row are one run where down is 1.
template <class A, class Function>
CARAFE_INLINE void for_each_run(
    const Shape& shape, const Tile& tile, const OutputRows& rows, const Staged<A>& features, int64_t* offsets,
    const Function& run) {
  const int64_t k = shape.kernel;
  for (int64_t phase = 0; phase < shape.up;) {
    const int64_t source = phase * shape.down / shape.up;
    int64_t next = phase + 1;
    while (next < shape.up && next * shape.down / shape.up == source) ++next;
    const bool whole = next - phase == shape.up;  // then the rows, too, are consecutive outputs
    for (int64_t tap = 0; tap < shape.taps(); ++tap) {
      const LaneOffset at(source + tap % k - shape.radius(), shape.down);
      offsets[tap] = tap / k * features.row_stride() + at.phase * features.pitch + at.lanes;
    }
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

// ------------------------------------------------------------------------------------------------------ forward

// Outputs `P` apart by out_step share the features they read; C channels share the masks.
template <class V, int P, int C, class A>
CARAFE_INLINE void reassemble_block(
    const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, const A* masks, int64_t tap_step,
    A* output, int64_t out_channel_step, int64_t out_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[C][P] = {};
    for (int64_t tap = 0; tap < taps; ++tap) {
      typename V::type weights[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) weights[p] = V::load(masks + tap * tap_step + p * out_step + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const typename V::type value = V::load(features + c * channel_step + offsets[tap] + q);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[c][p] += weights[p] * value;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(output + c * out_channel_step + p * out_step + q, sum[c][p]);
    }
  }
}

template <class V, int P, int C, class A>
CARAFE_INLINE void reassemble_channels(
    int64_t channels, const A* features, int64_t channel_step, const int64_t* offsets, int64_t taps, const A* masks,
    int64_t tap_step, A* output, int64_t out_channel_step, int64_t out_step, int64_t lanes) {
  int64_t c = 0;
  for (; c + C <= channels; c += C) {
    reassemble_block<V, P, C>(
        features + c * channel_step, channel_step, offsets, taps, masks, tap_step, output + c * out_channel_step,
        out_channel_step, out_step, lanes);
  }
  for (; c < channels; ++c) {
    reassemble_block<V, P, 1>(
        features + c * channel_step, channel_step, offsets, taps, masks, tap_step, output + c * out_channel_step,
        out_channel_step, out_step, lanes);
  }
}

template <class I, class T>
CARAFE_INLINE void reassemble_tile(
    const Shape& shape, const Map<T>& output, const Map<const T>& features, const Map<const T>& masks, const Tile& tile,
    Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  using V = Vector<A, I::bytes>;
  constexpr bool many = I::registers >= 32;
  const int64_t taps = shape.taps(), radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t channels = shape.group_channels();

  scratch.restart();
  const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
  stage(masks, {tile.n, tile.group * taps, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, m);
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * radius, shape.down, tile.lanes, radius + 1);
  auto y = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.offsets(taps);

  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t channel = tile.group * channels + first;
    x.channels = y.channels = std::min(kChunk, channels - first);
    stage(features, {tile.n, channel, tile.row_begin - radius, tile.lane_begin, shape.height, shape.width}, x);
    for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
      const auto block = [&](auto outputs, auto block_channels, int64_t p) CARAFE_ALWAYS_INLINE {
        reassemble_channels<V, outputs, block_channels>(
            y.channels, from, x.channel_stride(), offsets, taps, m.data + (place + p) * m.pitch, m.channel_stride(),
            y.data + (place + p) * y.pitch, y.channel_stride(), y.pitch, tile.lanes);
      };
      int64_t p = 0;
      for (; p + 4 <= count; p += 4) block(Constant<4>(), Constant<many ? 4 : 2>(), p);
      for (; p + 2 <= count; p += 2) block(Constant<2>(), Constant<many ? 8 : 4>(), p);
      for (; p < count; ++p) block(Constant<1>(), Constant<8>(), p);
    });
    unstage(y, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, output);
  }
}

// -------------------------------------------------------------------------------------------- gradient to masks

// P outputs times U taps of one kernel row stay in registers while the channels pass by.
template <class V, int P, int U, class A>
CARAFE_INLINE void grad_masks_block(
    int64_t channels, const A* grad_output, int64_t grad_channel_step, const A* features, int64_t channel_step,
    const int64_t* offsets, A* grad, int64_t tap_step, int64_t out_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[U][P];
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sum[u][p] = V::load(grad + u * tap_step + p * out_step + q);
    }
    for (int64_t c = 0; c < channels; ++c) {
      typename V::type cotangent[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) cotangent[p] = V::load(grad_output + c * grad_channel_step + p * out_step + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        const typename V::type value = V::load(features + c * channel_step + offsets[u] + q);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[u][p] += cotangent[p] * value;
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) V::store(grad + u * tap_step + p * out_step + q, sum[u][p]);
    }
  }
}

template <class V, int P, class A>
CARAFE_INLINE void grad_masks_taps(
    int64_t taps, int64_t channels, const A* grad_output, int64_t grad_channel_step, const A* features,
    int64_t channel_step, const int64_t* offsets, A* grad, int64_t tap_step, int64_t out_step, int64_t lanes) {
  int64_t tap = 0;
  for (; tap + 5 <= taps; tap += 5) {
    grad_masks_block<V, P, 5>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
  for (; tap + 3 <= taps; tap += 3) {
    grad_masks_block<V, P, 3>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
  for (; tap < taps; ++tap) {
    grad_masks_block<V, P, 1>(
        channels, grad_output, grad_channel_step, features, channel_step, offsets + tap, grad + tap * tap_step,
        tap_step, out_step, lanes);
  }
}

template <class I, class T>
CARAFE_INLINE void grad_masks_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
    const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  using V = Vector<A, I::bytes>;
  constexpr bool many = I::registers >= 32;
  const int64_t taps = shape.taps(), radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t channels = shape.group_channels();

  scratch.restart();
  const auto sum = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
  std::fill(sum.data, sum.data + taps * sum.channel_stride(), A(0));
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * radius, shape.down, tile.lanes, radius + 1);
  auto dy = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.offsets(taps);

  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t channel = tile.group * channels + first;
    x.channels = dy.channels = std::min(kChunk, channels - first);
    stage(features, {tile.n, channel, tile.row_begin - radius, tile.lane_begin, shape.height, shape.width}, x);
    stage(grad_output, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, dy);
    for_each_run(shape, tile, rows, x, offsets, [&](const A* from, int64_t place, int64_t count) CARAFE_ALWAYS_INLINE {
      const auto block = [&](auto outputs, int64_t p) CARAFE_ALWAYS_INLINE {
        grad_masks_taps<V, outputs>(
            taps, dy.channels, dy.data + (place + p) * dy.pitch, dy.channel_stride(), from, x.channel_stride(), offsets,
            sum.data + (place + p) * sum.pitch, sum.channel_stride(), sum.pitch, tile.lanes);
      };
      int64_t p = 0;
      if constexpr (many) {
        for (; p + 4 <= count; p += 4) block(Constant<4>(), p);
      }
      for (; p + 2 <= count; p += 2) block(Constant<2>(), p);
      for (; p < count; ++p) block(Constant<1>(), p);
    });
  }
  unstage(sum, {tile.n, tile.group * taps, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, grad);
}

// ----------------------------------------------------------------------------------------- gradient to features

// One row of gradients: the contributions (a mask lane and a cotangent lane each) of every tap and output phase.
template <class V, int C, class A>
CARAFE_INLINE void grad_features_block(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    const A* grad_output, int64_t channel_step, A* grad, int64_t grad_channel_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      const typename V::type weight = V::load(masks + mask_offsets[t] + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c] += weight * V::load(grad_output + c * channel_step + grad_offsets[t] + q);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) V::store(grad + c * grad_channel_step + q, sum[c]);
  }
}

template <class I, class T>
CARAFE_INLINE void grad_features_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& masks,
    const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  using V = Vector<A, I::bytes>;
  const int64_t k = shape.kernel, taps = shape.taps(), radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin - radius, tile.row_end + radius);
  const int64_t channels = shape.group_channels();
  const int64_t halo = radius + 1;

  scratch.restart();
  const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, halo);
  stage(masks, {tile.n, tile.group * taps, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, m);
  auto dy = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, halo);
  auto dx = scratch.take(kChunk, tile.row_end - tile.row_begin, shape.down, tile.lanes, 0);
  const int64_t most = taps * ceil_div(shape.up, shape.down) * shape.up;
  int64_t* const mask_offsets = scratch.offsets(2 * most);
  int64_t* const grad_offsets = mask_offsets + most;

  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t channel = tile.group * channels + first;
    dy.channels = dx.channels = std::min(kChunk, channels - first);
    stage(grad_output, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, dy);
    for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
      for (int64_t residue = 0; residue < shape.down; ++residue) {
        int64_t contributions = 0;
        for (int64_t u = 0; u < k; ++u) {
          const int64_t s = i - u + radius;
          if (s < 0 || s >= shape.height) continue;
          const OutputRows own(shape, s, s + 1);
          for (int64_t row = own.begin; row < own.end; ++row) {
            for (int64_t phase = 0; phase < shape.up; ++phase) {
              for (int64_t v = 0; v < k; ++v) {
                const LaneOffset at(phase * shape.down / shape.up + v - radius, shape.down);
                if (at.phase != residue) continue;
                const int64_t place = (row - rows.begin) * shape.up + phase;
                mask_offsets[contributions] = (u * k + v) * m.channel_stride() + place * m.pitch - at.lanes;
                grad_offsets[contributions] = place * dy.pitch - at.lanes;
                ++contributions;
              }
            }
          }
        }
        A* const to = dx.data + (i - tile.row_begin) * dx.row_stride() + residue * dx.pitch;
        int64_t c = 0;
        for (; c + 8 <= dy.channels; c += 8) {
          grad_features_block<V, 8>(
              contributions, mask_offsets, grad_offsets, m.data, dy.data + c * dy.channel_stride(), dy.channel_stride(),
              to + c * dx.channel_stride(), dx.channel_stride(), tile.lanes);
        }
        for (; c < dy.channels; ++c) {
          grad_features_block<V, 1>(
              contributions, mask_offsets, grad_offsets, m.data, dy.data + c * dy.channel_stride(), dy.channel_stride(),
              to + c * dx.channel_stride(), dx.channel_stride(), tile.lanes);
        }
      }
    }
    unstage(dx, {tile.n, channel, tile.row_begin, tile.lane_begin, shape.height, shape.width}, grad);
  }
}

}  // namespace carafe

// What every block kernel shares: the grid of sites that it works on, the steps that it takes, and loads and stores of
// four elements at once.
//
// A block kernel is a struct with
//
//     int steps() const                                                   the same for every thread
//     void run(const Job& job, int step, int thread, State& state, A* shared) const
//
// between whose steps stands a barrier. Within a step no thread reads what another one writes, so that the CUDA kernel
// (run_block in launch.h) is a loop over the steps, and the host runs the very same block by a loop over steps and
// threads: ascending and descending give the same bits, or there is a race.
#pragma once

#include <algorithm>

#include "../../common/operators.h"
#include "../loops.h"

namespace carafe::gpu::general {

// Division of small numbers (dividend * divisor < 2^32) by a multiplication: a block divides for every element that it
// stages, and a GPU has no instruction for that. Made on the host, because making one divides.
struct Divider {
  uint32_t divisor = 1, factor = 1;

  static Divider by(int64_t divisor) {
    return {static_cast<uint32_t>(divisor), static_cast<uint32_t>((uint64_t(1) << 32) / divisor + 1)};
  }
  CARAFE_HOST_DEVICE int operator()(int dividend) const {
    const auto quotient = static_cast<uint32_t>(uint64_t(static_cast<uint32_t>(dividend)) * factor >> 32);
    return divisor == 1 ? dividend : static_cast<int>(quotient);
  }
};

// A site is a pixel of the coarser map: of the source where the scale goes up, of the output where it goes down. The
// finer map has scale x scale pixels a site, its phases. So one set of loops serves both directions:
//
//             features    output      masks
//     up      coarse      fine        fine
//     down    fine        coarse      coarse
//
// Along an axis, tap u of site s reads the features at site s + shift(u), phase(u).
struct Sites {
  int feature_height, feature_width;  // in pixels
  int output_height, output_width;    // likewise, of the outputs that are wanted
  int height, width;                  // in sites, however many outputs are wanted
  int rows, columns;                  // those of them that have outputs that are wanted
  bool up;                            // the scale is up, or 1
  int scale = 1, kernel = 1;
  Divider by_kernel = Divider::by(kernel);
  Divider by_feature_scale = Divider::by(feature_scale()), by_output_scale = Divider::by(output_scale());

  CARAFE_HOST_DEVICE int taps() const { return kernel * kernel; }
  CARAFE_HOST_DEVICE int feature_scale() const { return up ? 1 : scale; }
  CARAFE_HOST_DEVICE int output_scale() const { return up ? scale : 1; }
  CARAFE_HOST_DEVICE bool inside(int row, int column) const {
    return row >= 0 && row < rows && column >= 0 && column < columns;
  }
  CARAFE_HOST_DEVICE int phases() const { return output_scale() * output_scale(); }  // kernels of a site
  // How far the taps reach, in sites.
  CARAFE_HOST_DEVICE int before() const { return by_feature_scale(kernel / 2 + feature_scale() - 1); }
  CARAFE_HOST_DEVICE int after() const { return by_feature_scale(kernel / 2); }
  CARAFE_HOST_DEVICE int reach() const { return before() + after(); }
  CARAFE_HOST_DEVICE int shift(int tap) const {
    return by_feature_scale(tap - kernel / 2 + before() * feature_scale()) - before();
  }
  CARAFE_HOST_DEVICE int phase(int tap) const { return tap - kernel / 2 - shift(tap) * feature_scale(); }
};

// The sites of a call whose up or down is 1.
inline Sites make_sites(const Shape& shape) {
  const auto number = [](int64_t value) { return static_cast<int>(value); };
  const int height = number(shape.height), width = number(shape.width);
  const int out_height = number(shape.out_height), out_width = number(shape.out_width);
  const int scale = number(std::max(shape.up, shape.down));
  const bool up = shape.down == 1;
  const auto features = [&](int pixels) { return up ? pixels : number(ceil_div(pixels, scale)); };
  const auto outputs = [&](int pixels) { return up ? number(ceil_div(pixels, scale)) : pixels; };
  return {
      height,
      width,
      out_height,
      out_width,
      features(height),
      features(width),
      outputs(out_height),
      outputs(out_width),
      up,
      scale,
      number(shape.kernel)};
}

// Four elements that one instruction loads or stores; two for double.
template <class T>
struct alignas(sizeof(T) >= 4 ? 16 : 4 * sizeof(T)) Quad {
  T values[4];
};

template <class A>
CARAFE_HOST_DEVICE Quad<A> load_quad(const A* from) {
  return *reinterpret_cast<const Quad<A>*>(from);
}

template <class A>
CARAFE_HOST_DEVICE void store_quad(A* to, const Quad<A>& quad) {
  *reinterpret_cast<Quad<A>*>(to) = quad;
}

// A tensor in global memory, with what may be loaded or stored at once.
template <class T>
struct View {
  Map<T> map;
  bool channels_last;               // neighbours in memory are channels, not columns
  bool quads;                       // four channels at a multiple of four are one aligned access,
  bool column_pairs, column_quads;  // and two or four columns at such a multiple

  // The first of `count` elements along the axis of stride 1 is aligned wherever its index is a multiple of `count`.
  static bool aligned(const Map<T>& map, int64_t axis, int64_t first, int64_t second, int64_t count) {
    const auto address = reinterpret_cast<uintptr_t>(map.data);
    const int64_t bytes = count * int64_t(sizeof(T)) < 16 ? count * int64_t(sizeof(T)) : 16;
    return axis == 1 && address % bytes == 0 && first % count == 0 && second % count == 0 &&
           map.batch_stride % count == 0;
  }

  // Channels that are read together belong to one group of `group_channels`.
  static View of(const Map<T>& map, int64_t group_channels) {
    return {
        map, map.has_adjacent_channels(),
        group_channels % 4 == 0 && aligned(map, map.channel_stride, map.row_stride, map.column_stride, 4),
        aligned(map, map.column_stride, map.row_stride, map.channel_stride, 2),
        aligned(map, map.column_stride, map.row_stride, map.channel_stride, 4)};
  }
};

// What a block computes: a rectangle of sites and a range of one group's channels.
struct Job {
  int n, group;
  int row, column;              // the first site
  int first_channel, channels;  // of the tensor
};

}  // namespace carafe::gpu::general

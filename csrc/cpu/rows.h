// The fast CPU kernels: tiles, each staged, computed on and written back.
//
// What follows is plain code; the loops below it are compiled once for each instruction set, as static members of the
// class I (cpu/carafe.cpp has them with target attributes), and once for each dtype or accumulator.
#pragma once

#include "grad_features.h"
#include "grad_weights.h"
#include "normalize.h"
#include "pixels.h"
#include "reassemble.h"

namespace carafe {

// An instruction set: how wide its vectors are and how many registers it has.
template <int Bytes, int Registers>
struct Isa {
  static constexpr int bytes = Bytes;
  static constexpr bool many_registers = Registers >= 32;
};

// The loops for an instruction set; `Target` is its attribute.
#define CARAFE_LOOPS(Target)                                                                                           \
  template <class A>                                                                                                   \
  Target static void clear_outside(const Window& window, const Staged<A>& buffer) {                                    \
    carafe::clear_outside<Vector<A, bytes>>(window, buffer);                                                           \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void stage(const Map<const T>& map, const Window& window, const Staged<A>& to) {                       \
    carafe::stage<Vector<A, bytes>>(map, window, to);                                                                  \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void unstage(const Staged<A>& from, const Window& window, const Map<T>& map) {                         \
    carafe::unstage<Vector<A, bytes>>(from, window, map);                                                              \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void stage_logits(                                                                                     \
      const Shape& shape, const Map<const T>& map, const LogitsWindow& window, const Staged<A>& to) {                  \
    carafe::stage_logits<Vector<A, bytes>>(shape, map, window, to);                                                    \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void unstage_logits(                                                                                   \
      const Shape& shape, const Staged<A>& from, const LogitsWindow& window, const Map<T>& map) {                      \
    carafe::unstage_logits<Vector<A, bytes>>(shape, from, window, map);                                                \
  }                                                                                                                    \
  template <class A>                                                                                                   \
  Target static void normalize(Normalizer normalizer, const Staged<A>& m, int64_t begin, int64_t end) {                \
    carafe::normalize<Vector<A, bytes>>(normalizer, m, begin, end);                                                    \
  }                                                                                                                    \
  template <class A>                                                                                                   \
  Target static void normalize_backward(                                                                               \
      Normalizer normalizer, const Staged<A>& weights, const A* logits, const Staged<A>& grad, int64_t lanes) {        \
    carafe::normalize_backward<Vector<A, bytes>>(normalizer, weights, logits, grad, lanes);                            \
  }                                                                                                                    \
  template <class A>                                                                                                   \
  Target static void reassemble_staged(                                                                                \
      const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Staged<A>& y,                \
      int64_t* offsets) {                                                                                              \
    carafe::reassemble_staged<Vector<A, bytes>, many_registers>(shape, tile, x, m, y, offsets);                        \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void reassemble_direct(                                                                                \
      const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Map<T>& y, int64_t lanes,    \
      int64_t* offsets) {                                                                                              \
    carafe::reassemble_direct<Vector<A, bytes>, many_registers>(shape, tile, x, m, y, lanes, offsets);                 \
  }                                                                                                                    \
  template <class A>                                                                                                   \
  Target static void grad_weights_staged(                                                                              \
      const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,             \
      int64_t* offsets) {                                                                                              \
    carafe::grad_weights_staged<Vector<A, bytes>, many_registers>(shape, tile, x, dy, sum, offsets);                   \
  }                                                                                                                    \
  template <class A>                                                                                                   \
  Target static void grad_features_staged(                                                                             \
      const Shape& shape, const Tile& tile, const Staged<A>& dy, const Staged<A>& m, const Staged<A>& dx,              \
      const Staged<A>& sums, int64_t* offsets) {                                                                       \
    carafe::grad_features_staged<Vector<A, bytes>, many_registers>(shape, tile, dy, m, dx, sums, offsets);             \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void reassemble_pixels(                                                                                \
      const Shape& shape, const Tile& tile, const Map<const T>& features, const Staged<A>& m, const Map<T>& output,    \
      const Neighbours<T>& near) {                                                                                     \
    carafe::reassemble_pixels<Vector<A, bytes>, many_registers>(shape, tile, features, m, output, near);               \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void grad_weights_pixels(                                                                              \
      const Shape& shape, const Tile& tile, const Map<const T>& features, const Map<const T>& grad_output,             \
      const Staged<A>& sum, const Neighbours<T>& near, A* partial) {                                                   \
    carafe::grad_weights_pixels<Vector<A, bytes>, many_registers>(                                                     \
        shape, tile, features, grad_output, sum, near, partial);                                                       \
  }                                                                                                                    \
  template <class T, class A>                                                                                          \
  Target static void grad_features_pixels(                                                                             \
      const Shape& shape, const Tile& tile, const Map<const T>& grad_output, const Staged<A>& m, const Map<T>& grad) { \
    carafe::grad_features_pixels<Vector<A, bytes>, many_registers>(shape, tile, grad_output, m, grad);                 \
  }

// The neighbours of a tile's pixels.
template <class T, class A>
Neighbours<T> make_neighbours(const Shape& shape, const Tile& tile, Scratch<A>& scratch) {
  const auto zeros = scratch.take(1, 1, 1, shape.group_channels(), 0);
  memset(zeros.data, 0, shape.group_channels() * sizeof(A));
  const int64_t columns = Neighbours<T>::columns_of(shape, tile);
  return {scratch.template list<const T*>(shape.kernel * columns), reinterpret_cast<const T*>(zeros.data), columns};
}

// What a tile covers of the features, rows from `row` on, all channels of its group,
inline Window feature_window(const Shape& shape, const Tile& tile, int64_t row) {
  const int64_t channels = shape.group_channels(), first = tile.group * channels;
  return {tile.n, first, first + channels, row, tile.lane_begin, shape.height, shape.width};
}

// and of a map of the output's size with `channels` channels a group.
inline Window output_window(const Shape& shape, const Tile& tile, int64_t row, int64_t channels) {
  const int64_t first = tile.group * channels;
  return {tile.n, first, first + channels, row, tile.lane_begin, shape.out_height, shape.out_width};
}

// Where a tile's weights come from: masks as the public operator takes them,
template <class T>
struct Masks {
  Map<const T> map;

  template <class I, class A>
  void stage_weights(const Shape& shape, const Tile& tile, int64_t first_row, const Staged<A>& to) const {
    const Window window = output_window(shape, tile, first_row, shape.taps());
    I::clear_outside(window, to);
    I::stage(map, window, to);
  }
};

// or the content encoder's raw output.
template <class T>
struct Logits {
  Map<const T> map;
  Normalizer normalizer;

  template <class I, class A>
  void stage_weights(const Shape& shape, const Tile& tile, int64_t first_row, const Staged<A>& to) const {
    stage_logits<I>(shape, tile, first_row, to);
    const int64_t last = ceil_div(shape.out_width, shape.up) - tile.lane_begin;
    I::normalize(normalizer, to, tile.lane_begin > 0 ? -to.halo : 0, std::min(to.lanes + to.halo, last));
  }

  template <class I, class A>
  void stage_logits(const Shape& shape, const Tile& tile, int64_t first_row, const Staged<A>& to) const {
    I::clear_outside(output_window(shape, tile, first_row, shape.taps()), to);
    I::stage_logits(shape, map, {tile.n, tile.group, first_row, tile.lane_begin}, to);
  }
};

template <class I, class T, class Weights>
void reassemble_tile(
    const Shape& shape, const Map<T>& output, const Map<const T>& features, const Weights& weights, const Tile& tile,
    Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t channels = shape.group_channels(), halo = shape.radius() + 1;

  scratch.restart();
  const auto m = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, 0);
  weights.template stage_weights<I>(shape, tile, rows.begin, m);
  if (by_pixels<I, A>(shape, features) && by_pixels<I, A>(shape, output)) {
    return I::reassemble_pixels(shape, tile, features, m, output, make_neighbours<T>(shape, tile, scratch));
  }
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * shape.radius(), shape.down, tile.lanes, halo);
  auto y = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.template list<int64_t>(most_offsets(shape));
  Window from = feature_window(shape, tile, tile.row_begin - shape.radius());
  Window to = output_window(shape, tile, rows.begin, channels);
  I::clear_outside(from, x);
  // The common cases need no copy of the output.
  const int64_t lanes = valid_lanes(shape, tile);
  const bool direct = output.column_stride == 1 && ((shape.up == 2 && shape.down == 1) || shape.up == 1) &&
                      lanes * int64_t(sizeof(A)) >= I::bytes;

  for (; to.channel < to.last_channel; from.channel = to.channel += kChunk) {
    x.channels = y.channels = std::min(kChunk, to.last_channel - to.channel);
    I::stage(features, from, x);
    if (direct) {
      Map<T> target = output;
      target.data = output.pointer(tile.n, to.channel, rows.begin, tile.lane_begin * shape.up);
      I::reassemble_direct(shape, tile, x, m, target, lanes, offsets);
      continue;
    }
    I::reassemble_staged(shape, tile, x, m, y, offsets);
    I::unstage(y, to, output);
  }
}

// From the gradient to a tile's weights to that of what they come from.
template <class I, class T, class Weights, class A>
void write_grad_weights(
    const Shape& shape, const Map<T>& grad, const Weights& weights, const Tile& tile, const Staged<A>& sum,
    Scratch<A>& scratch) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const int64_t taps = shape.taps();
  if constexpr (std::is_same_v<Weights, Masks<T>>) {
    I::unstage(sum, output_window(shape, tile, rows.begin, taps), grad);
  } else {
    const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
    weights.template stage_weights<I>(shape, tile, rows.begin, m);
    auto logits = m;
    if (weights.normalizer == Normalizer::sigmoid_normalized) {  // whose derivative needs them
      logits = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
      weights.template stage_logits<I>(shape, tile, rows.begin, logits);
    }
    I::normalize_backward(weights.normalizer, m, static_cast<const A*>(logits.data), sum, tile.lanes);
    I::unstage_logits(shape, sum, {tile.n, tile.group, rows.begin, tile.lane_begin}, grad);
  }
}

template <class I, class T, class Weights>
void grad_weights_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
    const Weights& weights, const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t taps = shape.taps(), halo = shape.radius() + 1;

  scratch.restart();
  const auto sum = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
  sum.fill_zero();
  if (by_pixels<I, A>(shape, features) && by_pixels<I, A>(shape, grad_output)) {
    constexpr int64_t vector = I::bytes / int64_t(sizeof(A));
    const auto near = make_neighbours<T>(shape, tile, scratch);
    const auto partial = scratch.take(1, 1, 1, (taps * shape.up * shape.up + vector) * vector, 0);
    partial.fill_zero();
    I::grad_weights_pixels(shape, tile, features, grad_output, sum, near, partial.data);
    return write_grad_weights<I>(shape, grad, weights, tile, sum, scratch);
  }
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * shape.radius(), shape.down, tile.lanes, halo);
  auto dy = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.template list<int64_t>(taps);
  Window from = feature_window(shape, tile, tile.row_begin - shape.radius());
  Window cotangents = output_window(shape, tile, rows.begin, shape.group_channels());
  I::clear_outside(from, x);
  I::clear_outside(cotangents, dy);

  for (; from.channel < from.last_channel; cotangents.channel = from.channel += kChunk) {
    x.channels = dy.channels = std::min(kChunk, from.last_channel - from.channel);
    I::stage(features, from, x);
    I::stage(grad_output, cotangents, dy);
    I::grad_weights_staged(shape, tile, x, dy, sum, offsets);
  }
  write_grad_weights<I>(shape, grad, weights, tile, sum, scratch);
}

template <class I, class T, class Weights>
void grad_features_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Weights& weights, const Tile& tile,
    Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const OutputRows rows(shape, tile.row_begin - shape.radius(), tile.row_end + shape.radius());
  const int64_t lanes = I::bytes / int64_t(sizeof(A));
  const int64_t halo = ceil_div(shape.radius() + 1, lanes) * lanes;  // whole vectors of it are read
  // Cotangents come with the rows around the tile: fewer channels of them keep to the second-level cache.
  const int64_t chunk = grad_output.channel_stride == 1 ? kChunk : kChunk / 2;

  scratch.restart();
  const auto m = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, halo);
  weights.template stage_weights<I>(shape, tile, rows.begin, m);
  if (by_pixels<I, A>(shape, grad_output) && by_pixels<I, A>(shape, grad)) {
    return I::grad_features_pixels(shape, tile, grad_output, m, grad);
  }
  auto dy = scratch.take(chunk, rows.count(), shape.up, tile.lanes, halo);
  auto dx = scratch.take(chunk, tile.row_end - tile.row_begin, shape.down, tile.lanes, 0);
  const auto sums = scratch.take(kBlockChannels, by_columns(shape) ? shape.kernel : 0, 1, tile.lanes, halo);
  int64_t* const offsets = scratch.template list<int64_t>(most_gradient_offsets(shape));
  Window cotangents = output_window(shape, tile, rows.begin, shape.group_channels());
  Window to = feature_window(shape, tile, tile.row_begin);
  I::clear_outside(cotangents, dy);
  sums.fill_zero();

  for (; to.channel < to.last_channel; cotangents.channel = to.channel += chunk) {
    dy.channels = dx.channels = std::min(chunk, to.last_channel - to.channel);
    I::stage(grad_output, cotangents, dy);
    I::grad_features_staged(shape, tile, dy, m, dx, sums, offsets);
    I::unstage(dx, to, grad);
  }
}

}  // namespace carafe

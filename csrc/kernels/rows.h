// The fast CPU kernels: tiles, each staged, computed on and written back.
//
// What follows is plain code; the loops below it are compiled once for each instruction set, as static members of the
// class I (cpu/carafe.cpp has them with target attributes), and once for each dtype or accumulator.
#pragma once

#include "blocks.h"
#include "normalize.h"

namespace carafe {

// An instruction set: how wide its vectors are and how many registers it has.
template <int Bytes, int Registers>
struct Isa {
  static constexpr int bytes = Bytes;
  static constexpr bool many_registers = Registers >= 32;
};

// The loops for an instruction set; `Target` is its attribute.
#define CARAFE_LOOPS(Target)                                                                                    \
  template <class T, class A>                                                                                   \
  Target static void stage(const Map<const T>& map, const Window& window, const Staged<A>& to) {                \
    carafe::stage<Vector<A, bytes>>(map, window, to);                                                           \
  }                                                                                                             \
  template <class T, class A>                                                                                   \
  Target static void unstage(const Staged<A>& from, const Window& window, const Map<T>& map) {                  \
    carafe::unstage<Vector<A, bytes>>(from, window, map);                                                       \
  }                                                                                                             \
  template <class T, class A>                                                                                   \
  Target static void stage_logits(                                                                              \
      const Shape& shape, const Map<const T>& map, const LogitsWindow& window, const Staged<A>& to) {           \
    carafe::stage_logits<Vector<A, bytes>>(shape, map, window, to);                                             \
  }                                                                                                             \
  template <class T, class A>                                                                                   \
  Target static void unstage_logits(                                                                            \
      const Shape& shape, const Staged<A>& from, const LogitsWindow& window, const Map<T>& map) {               \
    carafe::unstage_logits<Vector<A, bytes>>(shape, from, window, map);                                         \
  }                                                                                                             \
  template <class A>                                                                                            \
  Target static void normalize(Normalizer normalizer, const Staged<A>& m, int64_t begin, int64_t end) {         \
    carafe::normalize<Vector<A, bytes>>(normalizer, m, begin, end);                                             \
  }                                                                                                             \
  template <class A>                                                                                            \
  Target static void normalize_backward(                                                                        \
      Normalizer normalizer, const Staged<A>& weights, const A* logits, const Staged<A>& grad, int64_t lanes) { \
    carafe::normalize_backward<Vector<A, bytes>>(normalizer, weights, logits, grad, lanes);                     \
  }                                                                                                             \
  template <class A>                                                                                            \
  Target static void reassemble_staged(                                                                         \
      const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& m, const Staged<A>& y,         \
      int64_t* offsets) {                                                                                       \
    carafe::reassemble_staged<Vector<A, bytes>, many_registers>(shape, tile, x, m, y, offsets);                 \
  }                                                                                                             \
  template <class A>                                                                                            \
  Target static void grad_weights_staged(                                                                       \
      const Shape& shape, const Tile& tile, const Staged<A>& x, const Staged<A>& dy, const Staged<A>& sum,      \
      int64_t* offsets) {                                                                                       \
    carafe::grad_weights_staged<Vector<A, bytes>, many_registers>(shape, tile, x, dy, sum, offsets);            \
  }                                                                                                             \
  template <class A>                                                                                            \
  Target static void grad_features_staged(                                                                      \
      const Shape& shape, const Tile& tile, const Staged<A>& dy, const Staged<A>& m, const Staged<A>& dx,       \
      const Staged<A>& sums, int64_t* offsets) {                                                                \
    carafe::grad_features_staged<Vector<A, bytes>, many_registers>(shape, tile, dy, m, dx, sums, offsets);      \
  }

// Where a tile's weights come from: masks as the public operator takes them,
template <class T>
struct Masks {
  Map<const T> map;

  template <class I, class A>
  void stage_weights(const Shape& shape, const Tile& tile, int64_t first_row, const Staged<A>& to) const {
    I::stage(
        map, {tile.n, tile.group * shape.taps(), first_row, tile.lane_begin, shape.out_height, shape.out_width}, to);
  }
};

// or the content encoder's raw output.
template <class T>
struct Logits {
  Map<const T> map;
  Normalizer normalizer;

  template <class I, class A>
  void stage_weights(const Shape& shape, const Tile& tile, int64_t first_row, const Staged<A>& to) const {
    I::stage_logits(shape, map, {tile.n, tile.group, first_row, tile.lane_begin}, to);
    I::normalize(normalizer, to, -to.halo, to.lanes + to.halo);
  }
};

template <class I, class T, class Weights>
void reassemble_tile(
    const Shape& shape, const Map<T>& output, const Map<const T>& features, const Weights& weights, const Tile& tile,
    Scratch<accumulator_t<T>>& scratch) {
  const int64_t taps = shape.taps(), radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t channels = shape.group_channels();

  scratch.restart();
  const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
  weights.template stage_weights<I>(shape, tile, rows.begin, m);
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * radius, shape.down, tile.lanes, radius + 1);
  auto y = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.offsets(taps);

  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t channel = tile.group * channels + first;
    x.channels = y.channels = std::min(kChunk, channels - first);
    I::stage(features, {tile.n, channel, tile.row_begin - radius, tile.lane_begin, shape.height, shape.width}, x);
    I::reassemble_staged(shape, tile, x, m, y, offsets);
    I::unstage(y, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, output);
  }
}

template <class I, class T, class Weights>
void grad_weights_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
    const Weights& weights, const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
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
    I::stage(features, {tile.n, channel, tile.row_begin - radius, tile.lane_begin, shape.height, shape.width}, x);
    I::stage(grad_output, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, dy);
    I::grad_weights_staged(shape, tile, x, dy, sum, offsets);
  }
  if constexpr (std::is_same_v<Weights, Masks<T>>) {
    I::unstage(sum, {tile.n, tile.group * taps, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, grad);
  } else {
    const LogitsWindow window{tile.n, tile.group, rows.begin, tile.lane_begin};
    const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
    I::stage_logits(shape, weights.map, window, m);
    I::normalize(weights.normalizer, m, int64_t(0), tile.lanes);
    auto logits = m;
    if (weights.normalizer == Normalizer::sigmoid_normalized) {  // whose derivative needs them
      logits = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
      I::stage_logits(shape, weights.map, window, logits);
    }
    I::normalize_backward(weights.normalizer, m, static_cast<const A*>(logits.data), sum, tile.lanes);
    I::unstage_logits(shape, sum, window, grad);
  }
}

template <class I, class T, class Weights>
void grad_features_tile(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Weights& weights, const Tile& tile,
    Scratch<accumulator_t<T>>& scratch) {
  using A = accumulator_t<T>;
  const int64_t taps = shape.taps(), radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin - radius, tile.row_end + radius);
  const int64_t channels = shape.group_channels();
  const int64_t lanes = I::bytes / int64_t(sizeof(A));
  const int64_t halo = ceil_div(radius + 1, lanes) * lanes;  // whole vectors of it are read

  scratch.restart();
  const auto m = scratch.take(taps, rows.count(), shape.up, tile.lanes, halo);
  weights.template stage_weights<I>(shape, tile, rows.begin, m);
  auto dy = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, halo);
  auto dx = scratch.take(kChunk, tile.row_end - tile.row_begin, shape.down, tile.lanes, 0);
  const auto sums = scratch.take(kBlockChannels, by_columns(shape) ? shape.kernel : 0, 1, tile.lanes, halo);
  for (int64_t row = 0; row < sums.channels * sums.rows; ++row) {
    A* const first = sums.data + row * sums.pitch;
    std::fill(first - halo, first, A(0));
    std::fill(first + tile.lanes, first + tile.lanes + halo, A(0));
  }
  int64_t* const offsets = scratch.offsets(2 * most_contributions(shape));

  for (int64_t first = 0; first < channels; first += kChunk) {
    const int64_t channel = tile.group * channels + first;
    dy.channels = dx.channels = std::min(kChunk, channels - first);
    I::stage(grad_output, {tile.n, channel, rows.begin, tile.lane_begin, shape.out_height, shape.out_width}, dy);
    I::grad_features_staged(shape, tile, dy, m, dx, sums, offsets);
    I::unstage(dx, {tile.n, channel, tile.row_begin, tile.lane_begin, shape.height, shape.width}, grad);
  }
}

}  // namespace carafe

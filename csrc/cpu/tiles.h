// The operators on one tile: it is staged, computed on and written back.
//
// What follows is plain code; the loops that it calls are compiled once for each instruction set I (isa.h), and once
// for each dtype or accumulator. x, m, y, dx and dy are the staged features, masks, outputs and the gradients of these.
#pragma once

#include "calls.h"
#include "grad_features.h"
#include "grad_masks.h"
#include "isa.h"
#include "normalize.h"
#include "pixels.h"
#include "reassemble.h"

namespace carafe {

// The neighbours of a tile's pixels.
template <class T, class A>
Neighbours<T> make_neighbours(const Shape& shape, const Tile& tile, Scratch<A>& scratch) {
  const auto zeros = scratch.take(1, 1, 1, shape.group_channels(), 0);
  memset(zeros.data, 0, shape.group_channels() * sizeof(A));
  const int64_t columns = Neighbours<T>::columns_of(shape, tile);
  return {scratch.template list<const T*>(shape.kernel * columns), reinterpret_cast<const T*>(zeros.data), columns};
}

// What a tile covers of the features: rows from `row` on, all channels of its group.
inline Region feature_region(const Shape& shape, const Tile& tile, int64_t row) {
  const int64_t channels = shape.group_channels(), first = tile.group * channels;
  return {tile.n, first, first + channels, row, tile.lane_begin, shape.height, shape.width};
}

// What a tile covers of a map of the output's size with `channels` channels a group.
inline Region output_region(const Shape& shape, const Tile& tile, int64_t row, int64_t channels) {
  const int64_t first = tile.group * channels;
  return {tile.n, first, first + channels, row, tile.lane_begin, shape.out_height, shape.out_width};
}

// Stages the kernels of a tile's outputs, rows from `row` on, as they are.
template <class I, class T, class A>
void stage_kernels(const Shape& shape, const Tile& tile, const Kernels<T>& kernels, int64_t row, const Staged<A>& to) {
  using V = typename I::template vector<A>;
  const Region region = output_region(shape, tile, row, shape.taps());
  I::template call<clear_outside<V, A>>(region, to);
  if (kernels.normalizer == Normalizer::none) {
    I::template call<stage<V, T, A>>(kernels.map, region, to);
  } else {
    I::template call<stage_logits<V, T, A>>(kernels.map, region, to);
  }
}

// The same, normalised.
template <class I, class T, class A>
void stage_masks(const Shape& shape, const Tile& tile, const Kernels<T>& kernels, int64_t row, const Staged<A>& to) {
  stage_kernels<I>(shape, tile, kernels, row, to);
  if (kernels.normalizer == Normalizer::none) return;
  const int64_t begin = tile.lane_begin > 0 ? -to.halo : 0;
  const int64_t end = std::min(to.lanes + to.halo, ceil_div(shape.out_width, shape.up) - tile.lane_begin);
  I::template call<normalize<typename I::template vector<A>, A>>(kernels.normalizer, to, begin, end);
}

template <class I, class T>
void run_tile(const Shape& shape, const Reassemble<T>& call, const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  const auto& [output, features, kernels] = call;
  using A = accumulator_t<T>;
  using V = typename I::template vector<A>;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t channels = shape.group_channels(), halo = shape.radius() + 1;

  scratch.restart();
  const auto m = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, 0);
  stage_masks<I>(shape, tile, kernels, rows.begin, m);
  if (by_pixels<I, A>(shape, features) && by_pixels<I, A>(shape, output)) {
    return I::template call<reassemble_pixels<V, I::many_registers, T, A>>(
        shape, tile, features, m, output, make_neighbours<T>(shape, tile, scratch));
  }
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * shape.radius(), shape.down, tile.lanes, halo);
  auto y = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.template list<int64_t>(most_offsets(shape));
  Region from = feature_region(shape, tile, tile.row_begin - shape.radius());
  Region to = output_region(shape, tile, rows.begin, channels);
  I::template call<clear_outside<V, A>>(from, x);
  // The common cases need no copy of the output.
  const int64_t lanes = valid_lanes(shape, tile);
  const bool direct = output.column_stride == 1 && ((shape.up == 2 && shape.down == 1) || shape.up == 1) &&
                      lanes * int64_t(sizeof(A)) >= I::bytes;

  for (; to.channel < to.last_channel; from.channel = to.channel += kChunk) {
    x.channels = y.channels = std::min(kChunk, to.last_channel - to.channel);
    I::template call<stage<V, T, A>>(features, from, x);
    if (direct) {
      Map<T> target = output;
      target.data = output.pointer(tile.n, to.channel, rows.begin, tile.lane_begin * shape.up);
      I::template call<reassemble_direct<V, I::many_registers, T, A>>(shape, tile, x, m, target, lanes, offsets);
      continue;
    }
    I::template call<reassemble_staged<V, I::many_registers, A>>(shape, tile, x, m, y, offsets);
    I::template call<unstage<V, T, A>>(y, to, output);
  }
}

// From the gradient to a tile's masks to that of the kernels that they come from.
template <class I, class T, class A>
void write_grad_kernels(
    const Shape& shape, const Map<T>& grad, const Kernels<T>& kernels, const Tile& tile, const Staged<A>& sum,
    Scratch<A>& scratch) {
  using V = typename I::template vector<A>;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  const Region region = output_region(shape, tile, rows.begin, shape.taps());
  if (kernels.normalizer == Normalizer::none) return I::template call<unstage<V, T, A>>(sum, region, grad);
  const auto m = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, 0);
  stage_masks<I>(shape, tile, kernels, rows.begin, m);
  auto logits = m;
  if (kernels.normalizer == Normalizer::sigmoid_normalized) {  // whose derivative needs them
    logits = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, 0);
    stage_kernels<I>(shape, tile, kernels, rows.begin, logits);
  }
  I::template call<normalize_backward<V, A>>(kernels.normalizer, m, logits, sum);
  I::template call<unstage_logits<V, T, A>>(sum, region, grad);
}

template <class I, class T>
void run_tile(const Shape& shape, const GradKernels<T>& call, const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  const auto& [grad, grad_output, features, kernels] = call;
  using A = accumulator_t<T>;
  using V = typename I::template vector<A>;
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  if (rows.count() == 0) return;
  const int64_t taps = shape.taps(), halo = shape.radius() + 1;

  scratch.restart();
  const auto sum = scratch.take(taps, rows.count(), shape.up, tile.lanes, 0);
  sum.fill_zero();
  if (by_pixels<I, A>(shape, features) && by_pixels<I, A>(shape, grad_output)) {
    const auto near = make_neighbours<T>(shape, tile, scratch);
    const auto partial = scratch.take(1, 1, 1, (taps * shape.up * shape.up + V::lanes) * V::lanes, 0);
    partial.fill_zero();
    I::template call<grad_masks_pixels<V, I::many_registers, T, A>>(
        shape, tile, features, grad_output, sum, near, partial.data);
    return write_grad_kernels<I>(shape, grad, kernels, tile, sum, scratch);
  }
  auto x = scratch.take(kChunk, tile.row_end - tile.row_begin + 2 * shape.radius(), shape.down, tile.lanes, halo);
  auto dy = scratch.take(kChunk, rows.count(), shape.up, tile.lanes, 0);
  int64_t* const offsets = scratch.template list<int64_t>(taps);
  Region from = feature_region(shape, tile, tile.row_begin - shape.radius());
  Region outputs = output_region(shape, tile, rows.begin, shape.group_channels());
  I::template call<clear_outside<V, A>>(from, x);
  I::template call<clear_outside<V, A>>(outputs, dy);

  for (; from.channel < from.last_channel; outputs.channel = from.channel += kChunk) {
    x.channels = dy.channels = std::min(kChunk, from.last_channel - from.channel);
    I::template call<stage<V, T, A>>(features, from, x);
    I::template call<stage<V, T, A>>(grad_output, outputs, dy);
    I::template call<grad_masks_staged<V, I::many_registers, A>>(shape, tile, x, dy, sum, offsets);
  }
  write_grad_kernels<I>(shape, grad, kernels, tile, sum, scratch);
}

template <class I, class T>
void run_tile(const Shape& shape, const GradFeatures<T>& call, const Tile& tile, Scratch<accumulator_t<T>>& scratch) {
  const auto& [grad, grad_output, kernels] = call;
  using A = accumulator_t<T>;
  using V = typename I::template vector<A>;
  const OutputRows rows(shape, tile.row_begin - shape.radius(), tile.row_end + shape.radius());
  const int64_t halo = ceil_div(shape.radius() + 1, V::lanes) * V::lanes;  // whole vectors of it are read
  // Gradients of outputs come with the rows around the tile: fewer channels of them keep to the second-level cache.
  const int64_t chunk = grad_output.channel_stride == 1 ? kChunk : kChunk / 2;

  scratch.restart();
  const auto m = scratch.take(shape.taps(), rows.count(), shape.up, tile.lanes, halo);
  stage_masks<I>(shape, tile, kernels, rows.begin, m);
  if (by_pixels<I, A>(shape, grad_output) && by_pixels<I, A>(shape, grad)) {
    return I::template call<grad_features_pixels<V, I::many_registers, T, A>>(shape, tile, grad_output, m, grad);
  }
  auto dy = scratch.take(chunk, rows.count(), shape.up, tile.lanes, halo);
  auto dx = scratch.take(chunk, tile.row_end - tile.row_begin, shape.down, tile.lanes, 0);
  const auto sums = scratch.take(kBlockChannels, by_columns(shape) ? shape.kernel : 0, 1, tile.lanes, halo);
  int64_t* const offsets = scratch.template list<int64_t>(most_gradient_offsets(shape));
  Region outputs = output_region(shape, tile, rows.begin, shape.group_channels());
  Region to = feature_region(shape, tile, tile.row_begin);
  I::template call<clear_outside<V, A>>(outputs, dy);
  sums.fill_zero();

  for (; to.channel < to.last_channel; outputs.channel = to.channel += chunk) {
    dy.channels = dx.channels = std::min(chunk, to.last_channel - to.channel);
    I::template call<stage<V, T, A>>(grad_output, outputs, dy);
    I::template call<grad_features_staged<V, I::many_registers, A>>(shape, tile, dy, m, dx, sums, offsets);
    I::template call<unstage<V, T, A>>(dx, to, grad);
  }
}

template <class I>
void run_tiles(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end) {
  std::visit(
      [&](const auto& call) {
        Scratch<accumulator_t<typename std::decay_t<decltype(call)>::element>> scratch;
        for (int64_t index = begin; index < end; ++index) {
          run_tile<I>(shape, call, make_tile(shape, plan, index), scratch);
        }
      },
      call);
}

}  // namespace carafe

// The operators on one tile: it is staged, computed on and written back.
//
// What follows is plain code; the loops that it calls are compiled once for each instruction set, and once for each
// dtype or accumulator. x, m, y, dx and dy are the staged features, masks, outputs and the gradients of these.
#pragma once

#include "grad_features.h"
#include "grad_masks.h"
#include "normalize.h"
#include "pixels.h"
#include "reassemble.h"
#include "staging.h"

namespace carafe {

// A tile of a call on instruction set I (CARAFE_TILES).
template <class I, class T>
class TileRun {
 public:
  using A = accumulator_t<T>;
  using V = Vector<A, I::bytes>;

  TileRun(const Shape& shape, const Kernels<T>& kernels, const Tile& tile, Scratch<A>& scratch)
      : shape_(shape), kernels_(kernels), tile_(tile), scratch_(scratch) {
    scratch_.restart();
    if (from_logits()) {
      kernel_shape_.out_height = shape.output_height();
      kernel_shape_.out_width = shape.output_width();
    }
  }

  void run(const Reassemble<T>& call) {
    const auto& [shape, output, features, kernels] = call;
    const OutputRows rows(shape, tile_.row_begin, tile_.row_end);
    const int64_t lanes = valid_lanes(shape, tile_);
    if (rows.count() == 0 || lanes == 0) return;
    const auto m = stage_masks(tile_.row_begin, tile_.row_end, 0);
    if (by_pixels(features) && by_pixels(output)) {
      return I::template call<reassemble_pixels<V, I::many_registers, T, A>>(
          shape, tile_, features, m, output, make_neighbours());
    }
    if constexpr (I::many_registers) {  // with few, taking columns apart again costs more than staging them once
      if (by_halves(features) && output.column_stride == 1 && lanes >= V::lanes) {
        const int64_t count = tile_.row_end - tile_.row_begin + 2 * shape.radius();
        Map<T> target = output;
        target.data = output.pointer(tile_.n, tile_.group * shape.group_channels(), rows.begin, tile_.lane_begin);
        if (const SourceRow<T>* const source = take_rows(features, count, source_columns(shape, lanes))) {
          return I::template call<reassemble_halves<V, T, A>>(shape, tile_, source, count, m, target, lanes);
        }
      }
    }
    auto x = take_features(kChunk, shape.radius(), shape.radius() + 1);
    auto y = take_outputs(kChunk, rows, 0);
    int64_t* const offsets = scratch_.template list<int64_t>(most_offsets(shape));
    Region from = feature_region(tile_.row_begin - shape.radius());
    Region to = output_region(rows.begin);
    I::template call<clear_outside<V, A>>(from, x);
    // The common cases need no copy of the output.
    const bool direct = output.column_stride == 1 && ((shape.up == 2 && shape.down == 1) || shape.up == 1) &&
                        lanes * int64_t(sizeof(A)) >= I::bytes;

    for (; to.channel < to.last_channel; from.channel = to.channel += kChunk) {
      x.channels = y.channels = std::min(kChunk, to.last_channel - to.channel);
      I::template call<copy<V, const T, Staged<A>>>(features, from, x);
      if (direct) {
        Map<T> target = output;
        target.data = output.pointer(tile_.n, to.channel, rows.begin, tile_.lane_begin * shape.up);
        I::template call<reassemble_direct<V, I::many_registers, T, A>>(shape, tile_, x, m, target, lanes, offsets);
        continue;
      }
      I::template call<reassemble_staged<V, I::many_registers, A>>(shape, tile_, x, m, y, offsets);
      I::template call<copy<V, T, Staged<A>>>(output, to, y);
    }
  }

  void run(const GradFeatures<T>& call) {
    const auto& [shape, grad, grad_output, kernels] = call;
    const OutputRows rows(shape, tile_.row_begin - shape.radius(), tile_.row_end + shape.radius());
    const int64_t halo = ceil_div(shape.radius() + 1, V::lanes) * V::lanes;  // whole vectors of it are read
    // Gradients of outputs come with the rows around the tile: fewer channels of them keep to the second-level cache.
    const int64_t chunk = grad_output.channel_stride == 1 ? kChunk : kChunk / 2;
    const auto m = stage_masks(tile_.row_begin - shape.radius(), tile_.row_end + shape.radius(), halo);
    if (by_pixels(grad_output) && by_pixels(grad)) {
      return I::template call<grad_features_pixels<V, I::many_registers, T, A>>(shape, tile_, grad_output, m, grad);
    }
    auto dy = take_outputs(chunk, rows, halo);
    auto dx = take_features(chunk, 0, 0);
    const auto sums = scratch_.take(kBlockChannels, by_columns(shape) ? shape.kernel : 0, 1, tile_.lanes, halo);
    int64_t* const offsets = scratch_.template list<int64_t>(most_gradient_offsets(shape));
    Region outputs = output_region(rows.begin);
    Region to = feature_region(tile_.row_begin);
    I::template call<clear_outside<V, A>>(outputs, dy);
    sums.fill_zero();
    // The common case of downsampling needs no copy of the gradient.
    const int64_t columns = std::min(shape.width - 2 * tile_.lane_begin, 2 * tile_.lanes);
    const bool direct =
        by_squares(shape) && grad.column_stride == 1 && columns >= 2 * V::lanes && tile_.row_end - tile_.row_begin >= 2;

    for (; to.channel < to.last_channel; outputs.channel = to.channel += chunk) {
      dy.channels = dx.channels = std::min(chunk, to.last_channel - to.channel);
      I::template call<copy<V, const T, Staged<A>>>(grad_output, outputs, dy);
      if (direct) {
        Map<T> target = grad;
        target.data = grad.pointer(tile_.n, to.channel, tile_.row_begin, 2 * tile_.lane_begin);
        I::template call<grad_features_direct<V, I::many_registers, T, A>>(
            shape, tile_, dy, m, target, columns, offsets);
        continue;
      }
      I::template call<grad_features_staged<V, I::many_registers, A>>(shape, tile_, dy, m, dx, sums, offsets);
      I::template call<copy<V, T, Staged<A>>>(grad, to, dx);
    }
  }

  void run(const GradKernels<T>& call) {
    const auto& [shape, grad, grad_output, features, kernels] = call;
    const OutputRows rows(shape, tile_.row_begin, tile_.row_end);
    const OutputRows kernel_rows(kernel_shape_, tile_.row_begin, tile_.row_end);
    if (kernel_rows.count() == 0) return;
    const auto sum = take_outputs(shape.taps(), kernel_rows, 0);
    sum.fill_zero();
    if (rows.count() == 0 || valid_lanes(shape, tile_) == 0) return write_grad_kernels(grad, kernel_rows, sum);
    if (by_pixels(features) && by_pixels(grad_output)) {
      const auto near = make_neighbours();
      const int64_t room = (shape.taps() * shape.up * shape.up + V::lanes) * V::lanes;
      const auto partial = scratch_.take(1, 1, 1, room, 0);
      partial.fill_zero();
      I::template call<grad_masks_pixels<V, I::many_registers, T, A>>(
          shape, tile_, features, grad_output, sum, near, partial.data);
      return write_grad_kernels(grad, kernel_rows, sum);
    }
    auto dy = take_outputs(kChunk, rows, 0);
    if constexpr (I::many_registers) {
      const int64_t count = tile_.row_end - tile_.row_begin + 2 * shape.radius();
      const int64_t lanes = ceil_div(valid_lanes(shape, tile_), V::lanes) * V::lanes;
      const SourceRow<T>* const source =
          by_halves(features) ? take_rows(features, count, source_columns(shape, lanes)) : nullptr;
      if (source != nullptr) {
        Region outputs = output_region(rows.begin);
        I::template call<clear_outside<V, A>>(outputs, dy);
        for (int64_t c = 0; c < shape.group_channels(); c += kChunk, outputs.channel += kChunk) {
          dy.channels = std::min(kChunk, shape.group_channels() - c);
          I::template call<copy<V, const T, Staged<A>>>(grad_output, outputs, dy);
          I::template call<grad_masks_halves<V, T, A>>(shape, tile_, source, count, c, dy, sum);
        }
        return write_grad_kernels(grad, kernel_rows, sum);
      }
    }
    auto x = take_features(kChunk, shape.radius(), shape.radius() + 1);
    int64_t* const offsets = scratch_.template list<int64_t>(shape.taps());
    Region from = feature_region(tile_.row_begin - shape.radius());
    Region outputs = output_region(rows.begin);
    I::template call<clear_outside<V, A>>(from, x);
    I::template call<clear_outside<V, A>>(outputs, dy);

    for (; from.channel < from.last_channel; outputs.channel = from.channel += kChunk) {
      x.channels = dy.channels = std::min(kChunk, from.last_channel - from.channel);
      I::template call<copy<V, const T, Staged<A>>>(features, from, x);
      I::template call<copy<V, const T, Staged<A>>>(grad_output, outputs, dy);
      I::template call<grad_masks_staged<V, I::many_registers, A>>(shape, tile_, x, dy, sum, offsets);
    }
    write_grad_kernels(grad, kernel_rows, sum);
  }

 private:
  // Then the tile has whole kernels of every source row, however many of its outputs are wanted.
  bool from_logits() const { return kernels_.normalizer != Normalizer::none && shape_.up > 1; }

  template <class Element>
  bool by_pixels(const Map<Element>& map) const {
    return map.has_adjacent_channels() && (shape_.up == 1 || shape_.down == 1) && shape_.group_channels() >= V::lanes;
  }

  template <class Element>
  bool by_halves(const Map<Element>& map) const {
    return shape_.up == 1 && shape_.down == 2 && shape_.kernel > 1 && map.column_stride == 1;
  }

  // `count` rows of the map around the tile, of which so many columns may be read: they lie in the map's memory, if not
  // in the row, or a copy does. Null where most rows would be copied, as strides of 0 have it.
  const SourceRow<T>* take_rows(const Map<const T>& map, int64_t count, int64_t columns) {
    const int64_t channels = shape_.group_channels(), channel = tile_.group * channels;
    const int64_t first_row = tile_.row_begin - shape_.radius(), column = 2 * tile_.lane_begin - shape_.radius();
    const T* const last = map.pointer(shape_.batch - 1, shape_.channels - 1, shape_.height - 1, shape_.width - 1);
    const auto offset = [&](int64_t c, int64_t i) { return map.pointer(tile_.n, c, i, column) - map.data; };
    const auto is_outside = [&](int64_t i) { return i < 0 || i >= shape_.height; };
    const auto is_copied = [&](int64_t i) {
      return offset(channel, i) < 0 || offset(channel + channels - 1, i) + columns > last - map.data + 1;
    };
    int64_t copies = 0;
    for (int64_t i = first_row; i < first_row + count; ++i) copies += !is_outside(i) && is_copied(i);
    if (2 * copies > count) return nullptr;
    const auto memory = scratch_.take(1, 1, 1, (copies * channels + 1) * columns, 0);
    memory.fill_zero();
    T* copy = reinterpret_cast<T*>(memory.data);
    SourceRow<T>* const rows = scratch_.template list<SourceRow<T>>(count);
    const T* const zeros = copy;
    const int64_t begin = std::max<int64_t>(0, -column), end = std::min(columns, shape_.width - column);
    for (int64_t row = 0; row < count; ++row) {
      const int64_t i = first_row + row;
      if (is_outside(i)) {
        rows[row] = {zeros, 0};
      } else if (is_copied(i)) {
        rows[row] = {copy + columns, columns};
        for (int64_t c = 0; c < channels; ++c) {
          copy += columns;
          std::copy_n(map.pointer(tile_.n, channel + c, i, column + begin), end - begin, copy + begin);
        }
      } else {
        rows[row] = {map.data + offset(channel, i), map.channel_stride};
      }
    }
    return rows;
  }

  Neighbours<T> make_neighbours() {
    const auto zeros = scratch_.take(1, 1, 1, shape_.group_channels(), 0);
    zeros.fill_zero();
    const int64_t columns = Neighbours<T>::columns_of(shape_, tile_);
    return {scratch_.template list<const T*>(shape_.kernel * columns), reinterpret_cast<const T*>(zeros.data), columns};
  }

  Staged<A> take_features(int64_t channels, int64_t rows_around, int64_t halo) {
    const int64_t rows = tile_.row_end - tile_.row_begin + 2 * rows_around;
    return scratch_.take(channels, rows, shape_.down, tile_.lanes, halo);
  }
  Staged<A> take_outputs(int64_t channels, const OutputRows& rows, int64_t halo) {
    return scratch_.take(channels, rows.count(), shape_.up, tile_.lanes, halo);
  }

  // What the tile covers of the features: rows from `row` on, all channels of its group.
  Region feature_region(int64_t row) const {
    const int64_t channels = shape_.group_channels(), first = tile_.group * channels;
    return {tile_.n, first, first + channels, row, tile_.lane_begin, shape_.height, shape_.width};
  }
  // What it covers of a map of the output's size,
  Region output_region(int64_t row) const {
    const int64_t channels = shape_.group_channels(), first = tile_.group * channels;
    return {tile_.n, first, first + channels, row, tile_.lane_begin, shape_.out_height, shape_.out_width};
  }
  // or of the masks.
  Region kernel_region(int64_t row) const {
    const int64_t taps = shape_.taps(), first = tile_.group * taps;
    return {tile_.n, first, first + taps, row, tile_.lane_begin, kernel_shape_.out_height, kernel_shape_.out_width};
  }

  // The kernels of these outputs as they are.
  Staged<A> stage_kernels(const OutputRows& rows, int64_t halo) {
    const auto m = take_outputs(shape_.taps(), rows, halo);
    const Region region = kernel_region(rows.begin);
    I::template call<clear_outside<V, A>>(region, m);
    copy_kernels(kernels_.map, region, m);
    return m;
  }

  template <class Element>
  void copy_kernels(const Map<Element>& map, const Region& region, const Staged<A>& masks) const {
    if (kernels_.normalizer == Normalizer::none) {
      I::template call<copy<V, Element, Staged<A>>>(map, region, masks);
    } else {
      const Shuffled<A> logits{masks};
      I::template call<copy<V, Element, Shuffled<A>>>(map, logits.region(region), logits);
    }
  }

  // The same, normalised, of all outputs of source rows [first, last).
  Staged<A> stage_masks(int64_t first, int64_t last, int64_t halo) {
    const auto m = stage_kernels(OutputRows(kernel_shape_, first, last), halo);
    if (kernels_.normalizer == Normalizer::none) return m;
    const int64_t begin = tile_.lane_begin > 0 ? -halo : 0;
    const int64_t end = std::min(m.lanes + halo, ceil_div(kernel_shape_.out_width, shape_.up) - tile_.lane_begin);
    I::template call<normalize<V, A>>(kernels_.normalizer, m, begin, end);
    return m;
  }

  // From the gradient to a tile's masks to that of the kernels that they come from.
  void write_grad_kernels(const Map<T>& grad, const OutputRows& rows, const Staged<A>& sum) {
    if (kernels_.normalizer != Normalizer::none) {
      const auto m = stage_masks(tile_.row_begin, tile_.row_end, 0);
      // Only the derivative of this one needs the logits.
      const auto logits = kernels_.normalizer == Normalizer::sigmoid_normalized ? stage_kernels(rows, 0) : m;
      I::template call<normalize_backward<V, A>>(kernels_.normalizer, m, logits, sum);
    }
    copy_kernels(grad, kernel_region(rows.begin), sum);
  }

  const Shape& shape_;
  Shape kernel_shape_ = shape_;  // whose output has the size of the masks
  const Kernels<T>& kernels_;
  const Tile& tile_;
  Scratch<A>& scratch_;
};

template <class I>
void run_tiles(const Plan& plan, const Call& call, int64_t begin, int64_t end) {
  std::visit(
      [&](const auto& call) {
        using T = typename std::decay_t<decltype(call)>::type;
        Scratch<accumulator_t<T>> scratch;
        for (int64_t index = begin; index < end; ++index) {
          const Tile tile = make_tile(call.shape, plan, index);
          TileRun<I, T>(call.shape, call.kernels, tile, scratch).run(call);
        }
      },
      call);
}

// Compiles run_`path` for an instruction set, the vectors and registers that it has and its attribute. A loop is
// inlined into a function of its own with the attribute.
#define CARAFE_TILES(path, Bytes, Registers, Target)                                   \
  namespace carafe {                                                                   \
  namespace {                                                                          \
  struct InstructionSet {                                                              \
    static constexpr int bytes = Bytes;                                                \
    static constexpr bool many_registers = Registers >= 32;                            \
    template <auto Loop, class... Arguments>                                           \
    __attribute__((noinline)) Target static void call(const Arguments&... arguments) { \
      Loop(arguments...);                                                              \
    }                                                                                  \
  };                                                                                   \
  }                                                                                    \
  void run_##path(const Plan& plan, const Call& call, int64_t begin, int64_t end) {    \
    run_tiles<InstructionSet>(plan, call, begin, end);                                 \
  }                                                                                    \
  }

}  // namespace carafe

// The arithmetic where channels lie side by side (channels_last): vectors run along the channels, straight from and to
// the maps, and one tap of the masks serves a whole vector.
//
// For up == 1 or down == 1, and groups of a vector of channels at least.
#pragma once

#include "buffer.h"

namespace carafe {

// Calls body(vectors, channel): `Most` vectors at a time, then four, then one; the last steps back where it would pass
// the end.
template <class V, int Most, class Body>
CARAFE_INLINE void for_each_channel_block(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + Most * V::lanes <= channels; c += Most * V::lanes) body(Constant<Most>(), c);
  if constexpr (Most > 4) {
    for (; c + 4 * V::lanes <= channels; c += 4 * V::lanes) body(Constant<4>(), c);
  }
  for (; c < channels; c += V::lanes) body(Constant<1>(), std::min(c, channels - V::lanes));
}

// Where the pixels lie that the outputs of a source row read: k rows of them, as wide as the tile and its neighbours.
// Outside the map lies a pixel of zeros.
template <class T>
struct Neighbours {
  const T** pointers;
  const T* zeros;
  int64_t columns;

  static int64_t columns_of(const Shape& shape, const Tile& tile) {
    return (tile.lanes - 1) * shape.down + shape.kernel;
  }

  void fill(const Shape& shape, const Tile& tile, const Map<const T>& map, int64_t source_row) const {
    const int64_t first_row = source_row - shape.radius();
    const int64_t first_column = tile.lane_begin * shape.down - shape.radius();
    for (int64_t u = 0; u < shape.kernel; ++u) {
      for (int64_t column = 0; column < columns; ++column) {
        const int64_t i = first_row + u, j = first_column + column;
        const bool inside = i >= 0 && i < shape.height && j >= 0 && j < shape.width;
        pointers[u * columns + column] =
            inside ? map.pointer(tile.n, tile.group * shape.group_channels(), i, j) : zeros;
      }
    }
  }
};

// Pixels that rows share lie too far apart for the hardware's prefetcher: the ones that a row of taps will reach are
// prefetched this many lanes ahead, and so is memory to write to.
constexpr int64_t kPixelsAhead = 4;

// Calls prefetch(pixel) for those that tap row u reaches then, and did not before.
template <class T, class Prefetch>
CARAFE_INLINE void prefetch_ahead(
    const Shape& shape, const Neighbours<T>& near, int64_t u, int64_t q, int64_t lanes, const Prefetch& prefetch) {
  if (q + kPixelsAhead >= lanes) return;
  const T* const* const end = near.pointers + u * near.columns + (q + kPixelsAhead) * shape.down + shape.kernel;
  for (int64_t fresh = std::min(shape.down, shape.kernel); fresh > 0; --fresh) prefetch(end[-fresh]);
}

// Calls visit(source row, output row, count, place) for every source row that has outputs: `count` at every lane, in
// that output row and those below it; `place` counts the phases of the rows before.
template <class Visit>
CARAFE_INLINE void for_each_source_row(const Shape& shape, const Tile& tile, const Visit& visit) {
  const OutputRows rows(shape, tile.row_begin, tile.row_end);
  for (int64_t s = tile.row_begin; s < tile.row_end; ++s) {
    const OutputRows own(shape, s, s + 1);
    if (own.count() > 0) visit(s, own.begin, own.count() * shape.up, (own.begin - rows.begin) * shape.up);
  }
}

// ------------------------------------------------------------------------------------------------------ forward

template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void reassemble_pixels(
    const Shape& shape, const Tile& tile, const Map<const T>& features, const Staged<A>& m, const Map<T>& output,
    const Neighbours<T>& near) {
  const int64_t channels = shape.group_channels(), lanes = valid_lanes(shape, tile), k = shape.kernel;
  for_each_source_row(shape, tile, [&](int64_t s, int64_t row, int64_t count, int64_t place) CARAFE_ALWAYS_INLINE {
    near.fill(shape, tile, features, s);
    for (int64_t q = 0; q < lanes; ++q) {
      const auto block = [&](auto outputs, auto vectors, int64_t first, int64_t c) CARAFE_ALWAYS_INLINE {
        constexpr int P = outputs, C = vectors;
        const A* masks = m.data + (place + first) * m.pitch + q;
        typename V::type sum[C][P] = {};
        for (int64_t u = 0; u < k; ++u) {
          const T* const* const pixels = near.pointers + u * near.columns + q * shape.down;
          if (first == 0) {
            prefetch_ahead(shape, near, u, q, lanes, [&](const T* pixel) CARAFE_ALWAYS_INLINE {
#pragma GCC unroll 8
              for (int i = 0; i < C; ++i) __builtin_prefetch(pixel + c + i * V::lanes, 0, 2);
            });
          }
          for (int64_t v = 0; v < k; ++v, masks += m.channel_stride()) {
            const T* const pixel = pixels[v] + c;
#pragma GCC unroll 8
            for (int i = 0; i < C; ++i) {
              typename V::type value = load_widened<V>(pixel + i * V::lanes);
              if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
              for (int p = 0; p < P; ++p) sum[i][p] += value * masks[p * m.pitch];
            }
          }
        }
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) {
          const int64_t column = (tile.lane_begin + q) * shape.up + (first + p) % shape.up;
          if (column >= shape.out_width) continue;
          T* const to = output.pointer(tile.n, tile.group * channels + c, row + (first + p) / shape.up, column);
#pragma GCC unroll 8
          for (int i = 0; i < C; ++i) {
            store_narrowed<V>(to + i * V::lanes, sum[i][p]);
            __builtin_prefetch(to + kPixelsAhead * shape.up * output.column_stride + i * V::lanes, 1, 2);
          }
        }
      };
      if constexpr (ManyRegisters) {
        if (count == 1) {
          for_each_channel_block<V, 8>(
              channels, [&](auto vectors, int64_t c) CARAFE_ALWAYS_INLINE { block(Constant<1>(), vectors, 0, c); });
          continue;
        }
      }
      for_each_channel_block<V, 4>(channels, [&](auto vectors, int64_t c) CARAFE_ALWAYS_INLINE {
        for_each_block<ManyRegisters ? 4 : 0, 2, 1>(
            count, [&](auto outputs, int64_t first) CARAFE_ALWAYS_INLINE { block(outputs, vectors, first, c); });
      });
    }
  });
}

// ---------------------------------------------------------------------------------------------- gradient to masks

// The sums of the elements of as many vectors as one has lanes, in order.
template <class V>
CARAFE_INLINE typename V::type sum_elements(typename V::type (&rows)[V::lanes]) {
#pragma GCC unroll 4
  for (int64_t half = V::lanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < half; ++i)
      rows[i] = zip<V, 0>(rows[i], rows[i + half], V::all) + zip<V, 1>(rows[i], rows[i + half], V::all);
  }
  return rows[0];
}

// The first `count` elements, and zeros.
template <class V, class T>
CARAFE_INLINE typename V::type load_part(const T* from, int64_t count) {
  typename V::element values[V::lanes] = {};
  for (int64_t i = 0; i < count; ++i) values[i] = widen(from[i]);
  return V::load(values);
}

// `partial` has room for a vector for every tap of `up` x `up` outputs, and as many as a vector has lanes besides.
template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void grad_masks_pixels(
    const Shape& shape, const Tile& tile, const Map<const T>& features, const Map<const T>& grad_output,
    const Staged<A>& sum, const Neighbours<T>& near, A* partial) {
  const int64_t channels = shape.group_channels(), lanes = valid_lanes(shape, tile), k = shape.kernel;
  for_each_source_row(shape, tile, [&](int64_t s, int64_t row, int64_t count, int64_t place) CARAFE_ALWAYS_INLINE {
    near.fill(shape, tile, features, s);
    for (int64_t q = 0; q < lanes; ++q) {
      // P outputs times U taps stay in registers while the channels pass by.
      const auto block = [&](auto outputs, auto taps, int64_t first, int64_t tap) CARAFE_ALWAYS_INLINE {
        constexpr int P = outputs, U = taps;
        const T* grads[P];
        const T* pixels[U];
        for (int p = 0; p < P; ++p) {
          const int64_t i = row + (first + p) / shape.up, j = (tile.lane_begin + q) * shape.up + (first + p) % shape.up;
          grads[p] = j < shape.out_width ? grad_output.pointer(tile.n, tile.group * channels, i, j) : near.zeros;
        }
        for (int u = 0; u < U; ++u) {
          pixels[u] = near.pointers[(tap + u) / k * near.columns + q * shape.down + (tap + u) % k];
        }
        constexpr int64_t line = 64 / int64_t(sizeof(T));
        if (tap == 0) {
          for (int p = 0; p < P; ++p) {
            const T* const ahead = grads[p] + kPixelsAhead * shape.up * grad_output.column_stride;
            for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(ahead + c, 0, 2);
          }
        }
        if (first == 0) {  // the rows that these taps are the first of
          for (int64_t u = ceil_div(tap, k); u <= (tap + U - 1) / k; ++u) {
            prefetch_ahead(shape, near, u, q, lanes, [&](const T* pixel) CARAFE_ALWAYS_INLINE {
              for (int64_t c = 0; c < channels; c += line) __builtin_prefetch(pixel + c, 0, 2);
            });
          }
        }
        typename V::type total[U][P] = {};
        const auto add = [&](const auto& load) CARAFE_ALWAYS_INLINE {
          typename V::type outer[P];
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) outer[p] = load(grads[p]);
#pragma GCC unroll 5
          for (int u = 0; u < U; ++u) {
            typename V::type value = load(pixels[u]);
            if constexpr (P > 1) value = shared<V>(value);
#pragma GCC unroll 4
            for (int p = 0; p < P; ++p) total[u][p] += outer[p] * value;
          }
        };
        int64_t c = 0;
        for (; c + V::lanes <= channels; c += V::lanes) {
          add([&](const T* from) CARAFE_ALWAYS_INLINE { return load_widened<V>(from + c); });
        }
        if (c < channels) add([&](const T* from) CARAFE_ALWAYS_INLINE { return load_part<V>(from + c, channels - c); });
#pragma GCC unroll 5
        for (int u = 0; u < U; ++u) {
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) V::store(partial + ((tap + u) * count + first + p) * V::lanes, total[u][p]);
        }
      };
      for_each_block<ManyRegisters ? 4 : 0, 2, 1>(count, [&](auto outputs, int64_t first) CARAFE_ALWAYS_INLINE {
        for_each_block<5, 3, 1>(
            shape.taps(), [&](auto taps, int64_t tap) CARAFE_ALWAYS_INLINE { block(outputs, taps, first, tap); });
      });

      A* to = sum.data + place * sum.pitch + q;
      int64_t p = 0;
      for (int64_t begin = 0; begin < shape.taps() * count; begin += V::lanes) {
        typename V::type rows[V::lanes];
#pragma GCC unroll 16
        for (int64_t i = 0; i < V::lanes; ++i) rows[i] = V::load(partial + (begin + i) * V::lanes);
        A sums[V::lanes];
        V::store(sums, sum_elements<V>(rows));
        const int64_t end = std::min(V::lanes, shape.taps() * count - begin);
        for (int64_t i = 0; i < end; ++i) {
          to[p * sum.pitch] = sums[i];
          if (++p == count) p = 0, to += sum.channel_stride();
        }
      }
    }
  });
}

// ----------------------------------------------------------------------------------------- gradient to features

// J neighbouring pixels share the gradients of outputs that they gather.
template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void grad_features_pixels(
    const Shape& shape, const Tile& tile, const Map<const T>& grad_output, const Staged<A>& m, const Map<T>& grad) {
  const int64_t channels = shape.group_channels(), k = shape.kernel, radius = shape.radius();
  const OutputRows rows(shape, tile.row_begin - radius, tile.row_end + radius);
  const int64_t begin = tile.lane_begin * shape.down;
  const int64_t end = std::min(shape.width, begin + tile.lanes * shape.down);
  // Outputs whose source lies in [first, last).
  const auto columns = [&](int64_t first, int64_t last) {
    return std::pair(
        shape.first_output(std::max<int64_t>(0, first)),
        std::min(shape.out_width, shape.first_output(std::min(shape.width, last))));
  };
  const auto block = [&](auto pixels, auto vectors, int64_t i, int64_t j, int64_t c) CARAFE_ALWAYS_INLINE {
    constexpr int J = pixels, C = vectors;
    typename V::type sum[J][C] = {};
    const OutputRows near(shape, i - radius, i + radius + 1);
    const auto [first_column, last_column] = columns(j - radius, j + J + radius);
    const int64_t next = j + kPixelsAhead * shape.down;  // the pixel whose outputs are prefetched now
    const auto [first_ahead, last_ahead] = columns(next + radius, next + J + radius);
    for (int64_t row = near.begin; row < near.end; ++row) {
      const int64_t u = i - shape.source(row) + radius;
      const T* grads = grad_output.pointer(tile.n, tile.group * channels + c, row, first_column);
      const A* const masks = m.data + u * k * m.channel_stride() + (row - rows.begin) * m.row_stride();
      for (int64_t column = first_ahead; column < last_ahead; ++column) {
        const T* const ahead = grad_output.pointer(tile.n, tile.group * channels + c, row, column);
#pragma GCC unroll 4
        for (int each = 0; each < C; ++each) __builtin_prefetch(ahead + each * V::lanes, 0, 2);
      }
      int64_t lane = first_column / shape.up, phase = first_column % shape.up;
      for (int64_t column = first_column; column < last_column; ++column, grads += grad_output.column_stride) {
        typename V::type outer[C];
#pragma GCC unroll 4
        for (int each = 0; each < C; ++each) outer[each] = load_widened<V>(grads + each * V::lanes);
        const int64_t v = j - lane * shape.down + radius;  // of the first pixel: the source is a phase of its lane
        const A* const mask = masks + phase * m.pitch + lane - tile.lane_begin;
#pragma GCC unroll 4
        for (int each = 0; each < J; ++each) {
          if (uint64_t(v + each) >= uint64_t(k)) continue;
          const A factor = mask[(v + each) * m.channel_stride()];
#pragma GCC unroll 4
          for (int x = 0; x < C; ++x) sum[each][x] += outer[x] * factor;
        }
        if (++phase == shape.up) phase = 0, ++lane;
      }
    }
#pragma GCC unroll 4
    for (int each = 0; each < J; ++each) {
      T* const to = grad.pointer(tile.n, tile.group * channels + c, i, j + each);
#pragma GCC unroll 4
      for (int x = 0; x < C; ++x) {
        store_narrowed<V>(to + x * V::lanes, sum[each][x]);
        __builtin_prefetch(to + kPixelsAhead * shape.down * grad.column_stride + x * V::lanes, 1, 2);
      }
    }
  };
  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
    const auto all_channels = [&](auto pixels, int64_t j) CARAFE_ALWAYS_INLINE {
      for_each_channel_block<V, 4>(
          channels, [&](auto vectors, int64_t c) CARAFE_ALWAYS_INLINE { block(pixels, vectors, i, j, c); });
    };
    constexpr int most = ManyRegisters ? 4 : 2;
    int64_t j = begin;
    for (; j + most <= end; j += most) all_channels(Constant<most>(), j);
    for (; j < end; ++j) all_channels(Constant<1>(), j);
  }
}

}  // namespace carafe

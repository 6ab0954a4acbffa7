// What the kernels for the common cases share: how a map is cut into tiles, and how a window of it goes into shared
// memory. docs/cuda.md draws it.
//
// A site is a pixel of the coarser map: of the features where the scale goes up, of the output where it goes down. The
// finer map has Up x Up or Down x Down pixels a site, its phases.
#pragma once

#include <algorithm>

#include "../common/operators.h"
#include "loops.h"

namespace carafe::gpu {

constexpr int kQuad = 4;                        // channels that a thread keeps at once
constexpr int kStrip = 2;                       // neighbouring sites that it keeps
constexpr int kTileRows = 4, kTileColumns = 8;  // of a block, in sites
constexpr int kTileSites = kTileRows * kTileColumns;

// Threads that take the channels of a strip of sites, a quad each: 128 bytes of a pixel, all banks of shared memory.
template <class T>
constexpr int kLanes = 128 / (kQuad * sizeof(T));

// A common case: kernels of K x K taps, and a scale Up / Down, one of which is 1.
template <int K, int Up, int Down>
struct Geometry {
  static constexpr int kSide = K, kTaps = K * K, kRadius = K / 2;
  static constexpr int kUp = Up, kDown = Down;
  static constexpr int kPhases = Up * Up;  // kernels of a site
};

// A tensor whose items of the batch are small enough for offsets of 32 bits.
template <class T>
struct Image {
  T* data;
  int64_t batch_stride;
  int channel_stride, row_stride, column_stride;
  int height, width;
  bool channels_last;  // neighbours in memory are channels, not columns
  bool quads;          // four channels at a multiple of four are one aligned access
  bool runs;           // and so are the columns that a thread writes

  __device__ T* item(int n) const { return data + n * batch_stride; }
  __device__ int offset(int channel, int row, int column) const {
    return channel * channel_stride + row * row_stride + column * column_stride;
  }
  __device__ bool inside(int row, int column) const {
    return static_cast<unsigned>(row) < static_cast<unsigned>(height) &&
           static_cast<unsigned>(column) < static_cast<unsigned>(width);
  }
};

// The first of `count` elements along the axis of stride 1 is aligned wherever its index is a multiple of `count`.
template <class T>
bool is_aligned(const Map<T>& map, int64_t axis, int64_t first, int64_t second, int64_t count) {
  const auto address = reinterpret_cast<uintptr_t>(map.data);
  return axis == 1 && address % (count * sizeof(T)) == 0 && first % count == 0 && second % count == 0 &&
         map.batch_stride % count == 0;
}

// False where an item's offsets do not fit into 32 bits.
template <class T>
bool make_image(
    const Map<T>& map, int64_t channels, int64_t height, int64_t width, int64_t group_channels, int64_t run,
    Image<T>* image) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  const auto span = [](int64_t size, int64_t stride) { return (size - 1) * (stride < 0 ? -stride : stride); };
  // A kernel's window may lie outside by less than a tile, and an offset there is computed though not used.
  const int64_t most =
      span(channels, map.channel_stride) + span(height + 64, map.row_stride) + span(width + 64, map.column_stride);
  if (most > kMost) return false;
  *image = {
      map.data,
      map.batch_stride,
      static_cast<int>(map.channel_stride),
      static_cast<int>(map.row_stride),
      static_cast<int>(map.column_stride),
      static_cast<int>(height),
      static_cast<int>(width),
      map.has_adjacent_channels(),
      group_channels % kQuad == 0 && is_aligned(map, map.channel_stride, map.row_stride, map.column_stride, kQuad),
      is_aligned(map, map.column_stride, map.row_stride, map.channel_stride, run)};
  return true;
}

// The same number; but what follows from it is computed anew, instead of taking registers from what comes before.
__device__ __forceinline__ unsigned renew(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

// Elements that one instruction loads or stores.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Vector {
  T values[Count];
};
template <class T>
using Quad = Vector<T, kQuad>;

template <int Count, class T>
__device__ __forceinline__ Vector<T, Count> load(const T* from) {
  return *reinterpret_cast<const Vector<T, Count>*>(from);
}
template <class T, int Count>
__device__ __forceinline__ void store(T* to, const Vector<T, Count>& vector) {
  *reinterpret_cast<Vector<T, Count>*>(to) = vector;
}

template <class T>
__device__ __forceinline__ Quad<float> load_wide(const T* from) {
  const Quad<T> quad = load<kQuad>(from);
  Quad<float> wide;
  CARAFE_UNROLL
  for (int c = 0; c < kQuad; ++c) wide.values[c] = widen(quad.values[c]);
  return wide;
}

// Writes neighbouring channels of a pixel.
template <class T>
__device__ __forceinline__ void write_channels(const Image<T>& image, T* to, const float (&values)[kQuad]) {
  if (image.quads) {
    Quad<T> packed;
    CARAFE_UNROLL
    for (int c = 0; c < kQuad; ++c) packed.values[c] = narrow<T>(values[c]);
    store(to, packed);
  } else {
    CARAFE_UNROLL
    for (int c = 0; c < kQuad; ++c) to[c * image.channel_stride] = narrow<T>(values[c]);
  }
}

// Writes the first `left` of neighbouring columns.
template <int Count, class T>
__device__ __forceinline__ void write_run(const Image<T>& image, T* to, const float (&values)[Count], int left) {
  if (image.runs && left >= Count) {
    Vector<T, Count> packed;
    CARAFE_UNROLL
    for (int j = 0; j < Count; ++j) packed.values[j] = narrow<T>(values[j]);
    store(to, packed);
  } else {
    CARAFE_UNROLL
    for (int j = 0; j < Count; ++j) {
      if (j < left) to[j * image.column_stride] = narrow<T>(values[j]);
    }
  }
}

// How a window lies in shared memory, in elements: planes of phases (one where the window is not split), rows, pixels,
// the channels of a pixel. A pixel takes one quad more than it needs, an odd number of them, so that neighbouring
// threads that write neighbouring pixels use different banks.
template <int Rows, int Columns, int Quads, int Scale = 1, int RowPadding = 0>
struct Window {
  static constexpr int kRows = Rows, kColumns = Columns, kQuads = Quads;
  static constexpr int kPixel = (Quads | 1) == Quads ? Quads * kQuad : (Quads + 1) * kQuad;
  static constexpr int kRow = (Columns + Scale - 1) / Scale * kPixel + RowPadding * kQuad;
  static constexpr int kPlane = (Rows + Scale - 1) / Scale * kRow;
  static constexpr int kSize = Scale * Scale * kPlane;

  static __device__ __forceinline__ constexpr int at(int row, int column) {
    return (row % Scale * Scale + column % Scale) * kPlane + row / Scale * kRow + column / Scale * kPixel;
  }
};

// Stages the window whose first pixel is (row, column); `channels` are left, from the one that `item` points at. Zeros
// where there is nothing. A thread has a place along one axis and walks along another, several loads at a time.
template <class Window, int Threads, class T>
__device__ __forceinline__ void stage(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, T* to) {
  constexpr int kAtOnce = 4;
  if (image.channels_last) {  // neighbouring threads have neighbouring quads, and go down the rows
    constexpr int kPlaces = Window::kColumns * Window::kQuads;
    CARAFE_ROLLED
    for (unsigned place = thread; place < kPlaces; place += Threads) {
      const int quad = place % Window::kQuads, j = place / Window::kQuads;
      const bool inside = quad * kQuad < channels && image.inside(0, column + j);
      const T* const from = item + image.offset(quad * kQuad, row, column + j);
      CARAFE_ROLLED
      for (int first = 0; first < Window::kRows; first += kAtOnce) {
        Quad<T> quads[kAtOnce] = {};
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          const int i = first + b;
          if (!inside || i >= Window::kRows || !image.inside(row + i, 0)) continue;
          const T* const at = from + i * image.row_stride;
          if (image.quads) {
            quads[b] = load<kQuad>(at);
          } else {
            CARAFE_UNROLL
            for (int c = 0; c < kQuad; ++c) quads[b].values[c] = at[c];
          }
        }
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          if (first + b < Window::kRows) store(to + Window::at(first + b, j) + quad * kQuad, quads[b]);
        }
      }
    }
  } else {  // neighbouring threads have neighbouring pixels, and go through the channels
    constexpr int kPixels = Window::kRows * Window::kColumns;
    constexpr int kTeams = Threads >= 2 * kPixels ? 2 : 1, kSteps = Window::kQuads / kTeams;
    CARAFE_ROLLED
    for (unsigned place = thread; place < kTeams * kPixels; place += Threads) {
      const int team = place / kPixels, pixel = place % kPixels, i = pixel / Window::kColumns;
      const int j = pixel % Window::kColumns, first_quad = team * kSteps;
      const bool inside = image.inside(row + i, column + j);
      const T* from = item + image.offset(first_quad * kQuad, row + i, column + j);
      T* const target = to + Window::at(i, j) + first_quad * kQuad;
      CARAFE_ROLLED
      for (int first = 0; first < kSteps; first += kAtOnce) {
        Quad<T> quads[kAtOnce] = {};
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          if (!inside || (first_quad + first + b) * kQuad >= channels) continue;
          CARAFE_UNROLL
          for (int c = 0; c < kQuad; ++c) quads[b].values[c] = from[(b * kQuad + c) * image.channel_stride];
        }
        from += kAtOnce * kQuad * image.channel_stride;
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) store(target + (first + b) * kQuad, quads[b]);
      }
    }
  }
}

// How a call is cut: the channels of a group among `splits` blocks, of `share` channels each.
struct Tiling {
  int rows, columns;            // of sites, that are to be computed
  int tile_rows, tile_columns;  // of tiles
  int items;                    // of the batch, times groups
  int groups, group_channels;
  int splits, share;
  int64_t blocks;

  struct Job {
    int split, n, group;
    int row, column;              // the first site
    int first_channel, channels;  // of the tensor; how many are the block's
  };
  // Blocks that share weights follow one another, then those that share features.
  __device__ Job job(unsigned index, int rows_of_tile, int columns_of_tile) const {
    Job job;
    job.split = static_cast<int>(index % splits), index /= splits;
    job.column = static_cast<int>(index % tile_columns) * columns_of_tile, index /= tile_columns;
    job.row = static_cast<int>(index % tile_rows) * rows_of_tile, index /= tile_rows;
    job.group = static_cast<int>(index % groups), job.n = static_cast<int>(index / groups);
    const int first = job.split * share;
    job.first_channel = job.group * group_channels + first;
    job.channels = group_channels - first < share ? group_channels - first : share;
    return job;
  }

  // About `wanted` blocks where there are as many chunks of channels: every split has the tile's weights to prepare.
  static Tiling of(
      const Shape& shape, int64_t rows, int64_t columns, int64_t tile_row, int64_t tile_column, int64_t chunk,
      int64_t wanted) {
    const int64_t tile_rows = ceil_div(rows, tile_row), tile_columns = ceil_div(columns, tile_column);
    const int64_t tiles = tile_rows * tile_columns * shape.groups * shape.batch;
    const int64_t chunks = ceil_div(shape.group_channels(), chunk);
    const int64_t most = std::max<int64_t>(1, std::min(chunks, wanted / tiles));
    const int64_t share = ceil_div(chunks, most), splits = ceil_div(chunks, share);
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    return {
        number(rows),
        number(columns),
        number(tile_rows),
        number(tile_columns),
        number(shape.batch * shape.groups),
        number(shape.groups),
        number(shape.group_channels()),
        number(splits),
        number(share * chunk),
        tiles * splits};
  }
};

}  // namespace carafe::gpu

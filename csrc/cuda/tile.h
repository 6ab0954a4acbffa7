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

constexpr int kQuad = 4;                         // floats that one instruction loads
constexpr int kStrip = 2;                        // neighbouring sites that a thread keeps
constexpr int kTileRows = 2, kTileColumns = 16;  // of a block, in sites
constexpr int kTileSites = kTileRows * kTileColumns;
constexpr int kThreads = 128;                           // of a block
constexpr int kLanes = kThreads * kStrip / kTileSites;  // that share a strip, each with channels of its own

// Channels that one instruction loads.
template <class T>
constexpr int kUnit = 16 / sizeof(T);

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
  bool units;          // kUnit channels at a multiple of kUnit are one aligned access, and there are no others
  bool runs;           // and so are the columns that a thread writes
  bool pairs;          // and columns 2 i and 2 i + 1, of which there are none or both

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
      group_channels % kUnit<std::remove_const_t<T>> == 0 &&
          is_aligned(map, map.channel_stride, map.row_stride, map.column_stride, kUnit<std::remove_const_t<T>>),
      is_aligned(map, map.column_stride, map.row_stride, map.channel_stride, run),
      is_aligned(map, map.column_stride, map.row_stride, map.channel_stride, 2) && width % 2 == 0};
  return true;
}

// The same number; but what follows from it is computed anew, instead of taking registers from what comes before.
__device__ __forceinline__ unsigned renew(unsigned number) {
  asm volatile("" : "+r"(number));
  return number;
}

// A thread's place among those of a tile: its strip of sites, and which channels. Threads that follow one another read
// and write what lies together: eight strips of a row, or all channels.
struct Place {
  int row, column, lane;

  static __device__ __forceinline__ Place of(unsigned thread, bool channels_last) {
    static_assert(kLanes == 8 && kTileColumns / kStrip == 8, "three bits each");
    const auto low = static_cast<int>(thread % 8), high = static_cast<int>(thread / 8 % 8);
    return {static_cast<int>(thread / 64), (channels_last ? high : low) * kStrip, channels_last ? low : high};
  }
};

// Elements that one instruction loads or stores.
template <class T, int Count>
struct alignas(Count * sizeof(T)) Vector {
  T values[Count];
};

template <int Count, class T>
__device__ __forceinline__ Vector<T, Count> load(const T* from) {
  return *reinterpret_cast<const Vector<T, Count>*>(from);
}
template <class T, int Count>
__device__ __forceinline__ void store(T* to, const Vector<T, Count>& vector) {
  *reinterpret_cast<Vector<T, Count>*>(to) = vector;
}

// The same by one instruction wherever the values come from: the compiler takes some stores apart.
template <class T, int Count>
__device__ __forceinline__ void store_shared(T* to, const Vector<T, Count>& vector) {
  static_assert(sizeof(vector) == 8 || sizeof(vector) == 16, "two words or four");
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const auto* const words = reinterpret_cast<const uint32_t*>(&vector);
  if constexpr (sizeof(vector) == 8) {
    asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
  }
}

// Two half-precision numbers of a word: an instruction for each, and one to pack them.
template <class T>
__device__ __forceinline__ float2 widen_pair(uint32_t word) {
  if constexpr (std::is_same_v<T, Half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
  } else {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  }
}
template <class T>
__device__ __forceinline__ uint32_t narrow_pair(float low, float high) {
  if constexpr (std::is_same_v<T, Half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

template <int Count, class T>
__device__ __forceinline__ Vector<float, Count> load_wide(const T* from) {
  if constexpr (is_half_precision<T>) {
    const auto words = load<Count / 2>(reinterpret_cast<const uint32_t*>(from));
    Vector<float, Count> wide;
    CARAFE_UNROLL
    for (int c = 0; c < Count; c += 2) {
      const float2 pair = widen_pair<T>(words.values[c / 2]);
      wide.values[c] = pair.x, wide.values[c + 1] = pair.y;
    }
    return wide;
  } else {
    return load<Count>(from);
  }
}

// Stores `Count` numbers, an even number of them, by one instruction.
template <int Count, class T>
__device__ __forceinline__ void store_narrow(T* to, const float (&values)[Count]) {
  if constexpr (is_half_precision<T>) {
    Vector<uint32_t, Count / 2> words;
    CARAFE_UNROLL
    for (int c = 0; c < Count; c += 2) words.values[c / 2] = narrow_pair<T>(values[c], values[c + 1]);
    store(reinterpret_cast<uint32_t*>(to), words);
  } else {
    Vector<T, Count> vector;
    CARAFE_UNROLL
    for (int c = 0; c < Count; ++c) vector.values[c] = values[c];
    store(to, vector);
  }
}

// Writes the first `left` of neighbouring channels of a pixel.
template <int Count, class T>
__device__ __forceinline__ void write_channels(const Image<T>& image, T* to, const float (&values)[Count], int left) {
  if (image.units && left >= Count) {
    store_narrow(to, values);
  } else {
    CARAFE_UNROLL
    for (int c = 0; c < Count; ++c) {
      if (c < left) to[c * image.channel_stride] = narrow<T>(values[c]);
    }
  }
}

// Writes the first `left` of neighbouring columns.
template <int Count, class T>
__device__ __forceinline__ void write_run(const Image<T>& image, T* to, const float (&values)[Count], int left) {
  if (image.runs && left >= Count) {
    store_narrow(to, values);
  } else {
    CARAFE_UNROLL
    for (int j = 0; j < Count; ++j) {
      if (j < left) to[j * image.column_stride] = narrow<T>(values[j]);
    }
  }
}

// Writes what a thread has of the finer map: Scale rows and kStrip * Scale columns of several channels. `channels`,
// `rows` and `columns` are left.
template <int Scale, int Channels, class T>
__device__ __forceinline__ void write_pixels(
    const Image<T>& image, T* to, const float (&sums)[Channels][Scale][kStrip * Scale], int channels, int rows,
    int columns) {
  CARAFE_UNROLL
  for (int y = 0; y < Scale; ++y) {
    if (y >= rows) continue;
    if (image.channels_last) {
      CARAFE_UNROLL
      for (int x = 0; x < kStrip * Scale; ++x) {
        float values[Channels];
        CARAFE_UNROLL
        for (int c = 0; c < Channels; ++c) values[c] = sums[c][y][x];
        if (x < columns) write_channels(image, to + y * image.row_stride + x * image.column_stride, values, channels);
      }
    } else if (image.runs && channels >= Channels && columns >= kStrip * Scale) {
      T* at = to + y * image.row_stride;
      CARAFE_UNROLL
      for (int c = 0; c < Channels; ++c, at += image.channel_stride) store_narrow(at, sums[c][y]);
    } else {
      CARAFE_UNROLL
      for (int c = 0; c < Channels; ++c) {
        if (c < channels) write_run(image, to + c * image.channel_stride + y * image.row_stride, sums[c][y], columns);
      }
    }
  }
}

// How a window lies in shared memory, in elements: planes, rows, pixels, the channels of a pixel in units of `Unit`.
// Every column in so many as there are planes, one a strip, lies in the same plane; and a pixel takes a unit more than
// it needs, an odd number of them. So threads that have neighbouring strips use different banks, and so do those that
// write neighbouring pixels, because planes begin a part of all banks apart: `Banks`, elements in one access to all.
template <int Rows, int Columns, int Units, int Unit, int Planes, int Banks>
struct Window {
  static constexpr int kRows = Rows, kColumns = Columns, kUnits = Units, kUnitChannels = Unit;
  static constexpr int kChannels = Units * Unit;
  static constexpr int kPixel = (Units + 1) * Unit;
  static constexpr int kRow = (Columns + Planes - 1) / Planes * kPixel;
  static constexpr int kPacked = Rows * kRow;
  static constexpr int kPlane = kPacked + (Banks + Banks / Planes - kPacked % Banks) % Banks;
  static constexpr int kSize = Planes * kPlane;
  static_assert(Units % 2 == 0, "a pixel's last unit would be another's first");

  static __device__ __forceinline__ constexpr int at(int row, int column) {
    return column % Planes * kPlane + row * kRow + column / Planes * kPixel;
  }
};
template <class T>
constexpr int kBanks = 128 / sizeof(T);

// Stages a window of which neighbouring columns are neighbours in memory: neighbouring threads have neighbouring runs
// of `Run` columns, and so many threads, which do not follow one another, share the units.
template <class Window, int AtOnce, int Run, class T>
__device__ __forceinline__ void stage_columns(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, unsigned threads,
    T* to, int wanted) {
  constexpr int kChannels = Window::kUnitChannels, kParts = Run, kAtOnce = AtOnce / Run;
  static_assert(kAtOnce > 0 && Window::kUnits % (kParts * kAtOnce) == 0, "no load is left over");
  constexpr unsigned kRuns = (Window::kColumns + Run - 1) / Run, kPlaces = Window::kRows * kRuns;
  constexpr unsigned kWhole = (kPlaces + 15) / 16 * 16;  // half a warp
  using Unit = Vector<T, kChannels>;
  CARAFE_ROLLED
  for (unsigned place = thread; place < kWhole * kParts; place += threads) {
    const unsigned run = place % kWhole;
    if (run >= kPlaces) continue;
    const int part = static_cast<int>(place / kWhole) * kChannels;
    const int i = static_cast<int>(run / kRuns), j = static_cast<int>(run % kRuns) * Run;
    const int left = (image.inside(row + i, column + j) ? channels : 0) - part;
    const T* from = item + image.offset(part, row + i, column + j);
    const auto move = [&](int first, auto all) {
      Unit units[Run][kAtOnce] = {};
      CARAFE_UNROLL
      for (int b = 0; b < kAtOnce; ++b) {
        CARAFE_UNROLL
        for (int c = 0; c < kChannels; ++c, from += image.channel_stride) {
          if (decltype(all)::value == 0 || (decltype(all)::value == 1 && first + b * kParts * kChannels + c >= left))
            continue;
          const auto columns = load<Run>(from);
          CARAFE_UNROLL
          for (int x = 0; x < Run; ++x) units[x][b].values[c] = columns.values[x];
        }
        from += (kParts - 1) * kChannels * image.channel_stride;
      }
      CARAFE_UNROLL
      for (int x = 0; x < Run; ++x) {
        if (Window::kColumns % Run != 0 && j + x >= Window::kColumns) continue;
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          store_shared(to + Window::at(i, j + x) + part + first + b * kParts * kChannels, units[x][b]);
        }
      }
    };
    CARAFE_ROLLED
    for (int first = 0; first < wanted; first += AtOnce * kChannels) {
      if (first + ((kAtOnce - 1) * kParts + 1) * kChannels <= left) {
        move(first, std::integral_constant<int, 2>{});
      } else if (first < left) {
        move(first, std::integral_constant<int, 1>{});
      } else {
        move(first, std::integral_constant<int, 0>{});
      }
    }
  }
}

// Stages the window whose first pixel is (row, column); `channels` are left, from the one that `item` points at. Zeros
// where there is nothing, and what lies beyond the first `wanted` channels may stay as it was. A thread has a place
// along one axis and walks along another, AtOnce units at a time, as its registers allow.
template <class Window, int AtOnce, class T>
__device__ __forceinline__ void stage(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, unsigned threads,
    T* to, int wanted = Window::kChannels) {
  constexpr int kAtOnce = AtOnce, kChannels = Window::kUnitChannels;
  static_assert(Window::kUnits % kAtOnce == 0, "no load is left over");
  using Unit = Vector<T, kChannels>;
  if (image.channels_last) {  // neighbouring threads have neighbouring units, and go down the rows
    constexpr unsigned kPlaces = Window::kColumns * Window::kUnits;
    CARAFE_ROLLED
    for (unsigned place = thread; place < kPlaces; place += threads) {
      const int first = static_cast<int>(place % Window::kUnits) * kChannels;
      const int j = static_cast<int>(place / Window::kUnits);
      const bool inside = first < channels && image.inside(0, column + j);
      const T* const from = item + image.offset(first, row, column + j);
      CARAFE_ROLLED
      for (int i = 0; i < Window::kRows; i += kAtOnce) {
        Unit units[kAtOnce] = {};
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          if (!inside || i + b >= Window::kRows || !image.inside(row + i + b, 0)) continue;
          const T* const at = from + (i + b) * image.row_stride;
          if (image.units) {
            units[b] = load<kChannels>(at);
          } else {
            CARAFE_UNROLL
            for (int c = 0; c < kChannels; ++c) {
              if (first + c < channels) units[b].values[c] = at[c];
            }
          }
        }
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          if (i + b < Window::kRows) store_shared(to + Window::at(i + b, j) + first, units[b]);
        }
      }
    }
  } else if (image.pairs && column % 2 == 0) {
    stage_columns<Window, AtOnce, 2>(image, item, row, column, channels, thread, threads, to, wanted);
  } else {
    stage_columns<Window, AtOnce, 1>(image, item, row, column, channels, thread, threads, to, wanted);
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

  // Splits the channels where that leaves less to do for the busiest quarter of a multiprocessor, by a tenth at least,
  // which waits for memory less the more it has; so that every multiprocessor has a block, or `least` of them.
  // `preparing` and `meeting`: what a block takes for the weights, and one of several for a second pass, in chunks of
  // channels. `units`: the chunks that a block of so many warps computes at once; one alone takes half as long again.
  static Tiling of(
      const Shape& shape, int64_t rows, int64_t columns, int64_t tile_row, int64_t tile_column, int64_t chunk,
      int64_t multiprocessors, double preparing, double meeting, double least = 1, int units = 1, int warps = 4) {
    const int64_t tile_rows = ceil_div(rows, tile_row), tile_columns = ceil_div(columns, tile_column);
    const int64_t tiles = tile_rows * tile_columns * shape.groups * shape.batch;
    const int64_t chunks = ceil_div(shape.group_channels(), chunk);
    const auto blocks_of = [&](int64_t share) { return tiles * ceil_div(chunks, share); };
    const auto time = [&](int64_t share) {
      const double all = double(share) + double(share % units) / 2 + preparing + (share < chunks ? meeting : 0);
      return double(ceil_div(ceil_div(blocks_of(share), multiprocessors) * warps, 4) + 1) * all;
    };
    const auto wanted = static_cast<int64_t>(least * double(multiprocessors));
    int64_t best = chunks;
    for (int64_t share = chunks - 1; share >= 1; --share) {
      if (time(share) < 0.9 * time(best) || blocks_of(best) < std::min(wanted, blocks_of(1))) best = share;
    }
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    const int64_t splits = ceil_div(chunks, best);
    return {
        number(rows),
        number(columns),
        number(tile_rows),
        number(tile_columns),
        number(shape.batch * shape.groups),
        number(shape.groups),
        number(shape.group_channels()),
        number(splits),
        number(best * chunk),
        tiles * splits};
  }
};

}  // namespace carafe::gpu

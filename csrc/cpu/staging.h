// Copies between maps of any layout and dtype, and small buffers in which every axis that the row kernels run along is
// contiguous.
//
// A row of a map is split by a period p into p phases: column q * p + phase goes to lane q of that phase. With period
// `up` for outputs and masks and `down` for features, lane q of every phase belongs to lane q (give or take a shift
// that is the same for all lanes) of every other: upsampling, downsampling and 3/2 vectorise by the same loop.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "../common/scalar.h"

namespace carafe {

#define CARAFE_ALWAYS_INLINE __attribute__((always_inline))
#define CARAFE_INLINE inline CARAFE_ALWAYS_INLINE

template <class A, int Bytes>
struct Vector {
  typedef A element;
  typedef A type __attribute__((vector_size(Bytes)));
  typedef A unaligned __attribute__((vector_size(Bytes), aligned(sizeof(A)), may_alias));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> index __attribute__((vector_size(Bytes)));
  typedef uint32_t words __attribute__((vector_size(Bytes)));
  typedef uint16_t halves __attribute__((vector_size(Bytes / 2)));
  static constexpr int64_t bytes = Bytes, lanes = Bytes / int64_t(sizeof(A));

  static CARAFE_INLINE type load(const A* address) { return *reinterpret_cast<const unaligned*>(address); }
  static CARAFE_INLINE void store(A* address, type value) { *reinterpret_cast<unaligned*>(address) = value; }
};

// Keeps a value that several products share in its register: GCC would rather load it again for each of two or three.
template <class V>
CARAFE_INLINE typename V::type shared(typename V::type value) {
#if defined(__x86_64__) && defined(__GNUC__)
  asm("" : "+v"(value));
#endif
  return value;
}

// Half 0 (or 1) of two vectors, their elements taking turns.
template <class V, int Half, int64_t... I>
CARAFE_INLINE typename V::type zip(
    typename V::type first, typename V::type second, std::integer_sequence<int64_t, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(first, second, (Half * V::lanes / 2 + I / 2 + I % 2 * V::lanes)...);
#else
  return __builtin_shuffle(first, second, typename V::index{(Half * V::lanes / 2 + I / 2 + I % 2 * V::lanes)...});
#endif
}

// The way back: the elements at even (Half 0) or odd places of two vectors.
template <class V, int Half, int64_t... I>
CARAFE_INLINE typename V::type unzip(
    typename V::type first, typename V::type second, std::integer_sequence<int64_t, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(first, second, (2 * I + Half)...);
#else
  return __builtin_shuffle(first, second, typename V::index{(2 * I + Half)...});
#endif
}

// Transposes a square of as many vectors as one has lanes. A round of zipping rows i and i + lanes / 2 rotates the bits
// of every element's address by one: after all rounds, row and column have changed places.
template <class V>
CARAFE_INLINE void transpose(typename V::type (&rows)[V::lanes]) {
  constexpr auto all = std::make_integer_sequence<int64_t, V::lanes>();
#pragma GCC unroll 4
  for (int64_t round = 1; round < V::lanes; round *= 2) {
    typename V::type next[V::lanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < V::lanes / 2; ++i) {
      next[2 * i] = zip<V, 0>(rows[i], rows[i + V::lanes / 2], all);
      next[2 * i + 1] = zip<V, 1>(rows[i], rows[i + V::lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < V::lanes; ++i) rows[i] = next[i];
  }
}

// scalar.h's conversions, for a vector of floats.
template <class V>
struct Words {
  typedef typename V::type real;
  typedef typename V::words bits;
  static CARAFE_INLINE bits to_bits(real value) { return (bits)value; }
  static CARAFE_INLINE real to_real(bits value) { return (real)value; }
};

template <class V>
CARAFE_INLINE typename V::words load_halves(const void* from) {
  typename V::halves values;
  memcpy(&values, from, sizeof values);
  return __builtin_convertvector(values, typename V::words);
}

template <class V>
CARAFE_INLINE void store_halves(void* to, typename V::words words) {
  const typename V::halves values = __builtin_convertvector(words, typename V::halves);
  memcpy(to, &values, sizeof values);
}

template <class V, class T>
CARAFE_INLINE typename V::type load_widened(const T* from) {
  if constexpr (std::is_same_v<T, Half>) {
    return widen_half<Words<V>>(load_halves<V>(from));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return widen_bfloat16<Words<V>>(load_halves<V>(from));
  } else {
    return V::load(from);
  }
}

template <class V, class T>
CARAFE_INLINE void store_narrowed(T* to, typename V::type value) {
  if constexpr (std::is_same_v<T, Half>) {
    store_halves<V>(to, narrow_half<Words<V>>(value));
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    store_halves<V>(to, narrow_bfloat16<Words<V>>(value));
  } else {
    V::store(to, value);
  }
}

// Two vectors whose elements take turns: two to the left of each other, or, of half precision, both in one.
template <class V, class T>
CARAFE_INLINE void store_pairs(T* to, typename V::type even, typename V::type odd) {
  if constexpr (sizeof(T) == 2) {
    if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) std::swap(even, odd);  // the lower half comes second there
    typename V::words both;
    if constexpr (std::is_same_v<T, Half>) {
      both = narrow_half<Words<V>>(even) | narrow_half<Words<V>>(odd) << 16;
    } else {
      both = narrow_bfloat16<Words<V>>(even) | narrow_bfloat16<Words<V>>(odd) << 16;
    }
    memcpy(static_cast<void*>(to), &both, sizeof both);
  } else {
    constexpr auto all = std::make_integer_sequence<int64_t, V::lanes>();
    V::store(to, zip<V, 0>(even, odd, all));
    V::store(to + V::lanes, zip<V, 1>(even, odd, all));
  }
}

// Where the lanes of channel c begin: `step` apart, or, where each holds `phases` in one, those `pitch` apart.
template <class A>
struct Lanes {
  A* base;
  int64_t step, phases = 1, pitch = 0;

  CARAFE_INLINE A* operator()(int64_t c) const { return base + c / phases * step + c % phases * pitch; }
};

// From pixels (`step` apart, channels adjacent) to lanes.
template <class V, class T, class A>
CARAFE_INLINE void gather_channels(
    const T* from, int64_t step, int64_t count, int64_t channels, const Lanes<A>& lanes) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    int64_t q = 0;
    for (; q + V::lanes <= count; q += V::lanes) {
      typename V::type square[V::lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) square[i] = load_widened<V>(from + (q + i) * step + c);
      transpose<V>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) V::store(lanes(c + i) + q, square[i]);
    }
    for (; q < count; ++q) {
      for (int64_t i = 0; i < V::lanes; ++i) lanes(c + i)[q] = widen(from[q * step + c + i]);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) lanes(c)[q] = widen(from[q * step + c]);
  }
}

// The way back.
template <class V, class T, class A>
CARAFE_INLINE void scatter_channels(const Lanes<const A>& lanes, int64_t count, int64_t channels, T* to, int64_t step) {
  int64_t c = 0;
  for (; c + V::lanes <= channels; c += V::lanes) {
    int64_t q = 0;
    for (; q + V::lanes <= count; q += V::lanes) {
      typename V::type square[V::lanes];
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) square[i] = V::load(lanes(c + i) + q);
      transpose<V>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < V::lanes; ++i) store_narrowed<V>(to + (q + i) * step + c, square[i]);
    }
    for (; q < count; ++q) {
      for (int64_t i = 0; i < V::lanes; ++i) to[q * step + c + i] = Narrow<T>::from(lanes(c + i)[q]);
    }
  }
  for (; c < channels; ++c) {
    for (int64_t q = 0; q < count; ++q) to[q * step + c] = Narrow<T>::from(lanes(c)[q]);
  }
}

constexpr int64_t kVectorBytes = 64;  // the widest, so that one plan serves every instruction set

// What one buffer holds: [channel][row][phase][lane], lanes -halo .. lanes + halo - 1 at `pitch` elements a phase.
template <class A>
struct Staged {
  A* data;  // lane 0 of the first channel, row and phase
  int64_t channels, rows, phases, lanes, halo, pitch;

  int64_t row_stride() const { return phases * pitch; }
  // A vector more than there is: strides of 4096 bytes would drive the taps of a lane out of the first-level cache.
  int64_t channel_stride() const { return rows * phases * pitch + kVectorBytes / int64_t(sizeof(A)); }

  void fill_zero() const {
    if (channels * rows * phases == 0) return;
    A* const last = data + (channels - 1) * channel_stride() + (rows * phases - 1) * pitch;
    std::fill(data - halo, last + lanes + halo, A(0));
  }
};

// The part of a map that a buffer mirrors: channels from `channel`, rows from `row` (may lie outside the map), lanes
// from `lane` (likewise). The next buffers, too, come from the channels before `last_channel`.
struct Window {
  int64_t n, channel, last_channel, row, lane;
  int64_t map_rows, map_columns;
};

// What of a buffer lies inside the map: some rows, and in each of them lanes from `begin` on.
struct Inside {
  int64_t first_row, last_row, begin;

  template <class A>
  Inside(const Window& window, const Staged<A>& buffer)
      : first_row(std::max<int64_t>(0, -window.row)),
        last_row(std::min(buffer.rows, window.map_rows - window.row)),
        begin(std::max(-buffer.halo, -window.lane)),
        end_(buffer.lanes + buffer.halo),
        window_(window) {}

  // How many lanes: one more, perhaps, in the first of `period` phases than in the last.
  CARAFE_INLINE int64_t count(int64_t phase, int64_t period) const {
    const int64_t end = std::min(end_, ceil_div(window_.map_columns - phase, period) - window_.lane);
    return std::max<int64_t>(0, end - begin);
  }

 private:
  int64_t end_;
  const Window& window_;
};

// Zeros for what lies outside the map. Once for a tile is enough, before its first stage(): which part that is does not
// depend on the channel.
template <class V, class A>
CARAFE_INLINE void clear_outside(const Window& window, const Staged<A>& buffer) {
  const Inside inside(window, buffer);
  const int64_t end = inside.begin + inside.count(buffer.phases - 1, buffer.phases);
  const typename V::type zero = {};
  for (int64_t place = 0; place < buffer.channels * buffer.rows; ++place) {
    const int64_t channel = place / buffer.rows, row = place % buffer.rows;
    const bool empty = row < inside.first_row || row >= inside.last_row;
    for (int64_t phase = 0; phase < buffer.phases; ++phase) {
      A* const lanes =
          buffer.data + channel * buffer.channel_stride() + row * buffer.row_stride() + phase * buffer.pitch;
      const auto clear = [&](int64_t from, int64_t to) CARAFE_ALWAYS_INLINE {  // whole vectors: inside is filled later
        for (int64_t q = floor_div(from, V::lanes) * V::lanes; q < to; q += V::lanes) V::store(lanes + q, zero);
      };
      clear(-buffer.halo, empty ? buffer.lanes + buffer.halo : inside.begin);
      if (!empty) clear(end, buffer.lanes + buffer.halo);
    }
  }
}

// Calls body(q) so that vectors at these q cover 0 .. count - 1: the last one steps back where `count` is no multiple,
// and false is returned where not even one fits.
template <class V, class Body>
CARAFE_INLINE bool for_each_vector(int64_t count, const Body& body) {
  if (count < V::lanes) return false;
  for (int64_t q = 0; q + V::lanes <= count; q += V::lanes) body(q);
  if (count % V::lanes) body(count - V::lanes);
  return true;
}

// `count` columns, `step` apart, to lanes.
template <class V, class T, class A>
CARAFE_INLINE void stage_row(const T* from, int64_t step, int64_t count, A* lanes) {
  const auto vector = [&](int64_t q) CARAFE_ALWAYS_INLINE { V::store(lanes + q, load_widened<V>(from + q)); };
  if (step == 1 && for_each_vector<V>(count, vector)) return;
  for (int64_t q = 0; q < count; ++q) lanes[q] = widen(from[q * step]);
}

// 2 `count` adjacent columns to the lanes of two phases.
template <class V, class T, class A>
CARAFE_INLINE void stage_pairs(const T* from, int64_t count, A* even, A* odd) {
  constexpr auto all = std::make_integer_sequence<int64_t, V::lanes>();
  const auto vectors = [&](int64_t q) CARAFE_ALWAYS_INLINE {
    const typename V::type first = load_widened<V>(from + 2 * q), second = load_widened<V>(from + 2 * q + V::lanes);
    V::store(even + q, unzip<V, 0>(first, second, all));
    V::store(odd + q, unzip<V, 1>(first, second, all));
  };
  if (for_each_vector<V>(count, vectors)) return;
  for (int64_t q = 0; q < count; ++q) even[q] = widen(from[2 * q]), odd[q] = widen(from[2 * q + 1]);
}

// The ways back.
template <class V, class T, class A>
CARAFE_INLINE void unstage_row(const A* lanes, int64_t count, T* to, int64_t step) {
  const auto vector = [&](int64_t q) CARAFE_ALWAYS_INLINE { store_narrowed<V>(to + q, V::load(lanes + q)); };
  if (step == 1 && for_each_vector<V>(count, vector)) return;
  for (int64_t q = 0; q < count; ++q) to[q * step] = Narrow<T>::from(lanes[q]);
}

template <class V, class T, class A>
CARAFE_INLINE void unstage_pairs(const A* even, const A* odd, int64_t count, T* to) {
  const auto vectors = [&](int64_t q)
                           CARAFE_ALWAYS_INLINE { store_pairs<V>(to + 2 * q, V::load(even + q), V::load(odd + q)); };
  if (for_each_vector<V>(count, vectors)) return;
  for (int64_t q = 0; q < count; ++q) {
    to[2 * q] = Narrow<T>::from(even[q]);
    to[2 * q + 1] = Narrow<T>::from(odd[q]);
  }
}

// Channels lie far apart, so that the hardware's prefetcher loses its way (and its page) at each of them: rows are
// asked for this many channels before their turn.
constexpr int64_t kChannelsAhead = 4;

template <bool ForWriting, class T>
CARAFE_INLINE void prefetch(const T* from, int64_t count) {
  constexpr int64_t line = 64 / int64_t(sizeof(T));
  for (int64_t i = 0; i < count + line - 1; i += line) __builtin_prefetch(from + std::min(i, count - 1), ForWriting, 2);
}

// Copies what lies inside the map; the rest of the buffer stays as it is. One channel after the
// other, as they lie in memory, unless they lie side by side.
template <class V, class T, class A>
CARAFE_INLINE void stage(const Map<const T>& map, const Window& window, const Staged<A>& to) {
  const int64_t period = to.phases, step = map.column_stride * period;
  const Inside inside(window, to);
  const int64_t begin = inside.begin;
  const auto count = [&](int64_t phase) { return inside.count(phase, period); };
  const auto source = [&](int64_t c, int64_t row, int64_t phase) {
    return map.pointer(window.n, window.channel + c, window.row + row, (window.lane + begin) * period + phase);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      for (int64_t phase = 0; phase < period; ++phase) {
        A* const lanes = to.data + row * to.row_stride() + phase * to.pitch + begin;
        gather_channels<V>(
            source(0, row, phase), step, count(phase), to.channels, Lanes<A>{lanes, to.channel_stride()});
      }
    }
    return;
  }
  const bool pairs = period == 2 && map.column_stride == 1;
  for (int64_t c = 0; c < to.channels; ++c) {
    for (int64_t row = inside.first_row; row < inside.last_row; ++row) {
      A* const lanes = to.data + c * to.channel_stride() + row * to.row_stride() + begin;
      if (map.column_stride == 1 && window.channel + c + kChannelsAhead < window.last_channel) {
        prefetch<false>(source(c + kChannelsAhead, row, 0), count(0) * period);
      }
      if (pairs) {
        const int64_t whole = count(1);
        stage_pairs<V>(source(c, row, 0), whole, lanes, lanes + to.pitch);
        if (count(0) > whole) lanes[whole] = widen(*source(c, row, 2 * whole));
        continue;
      }
      for (int64_t phase = 0; phase < period; ++phase) {
        stage_row<V>(source(c, row, phase), step, count(phase), lanes + phase * to.pitch);
      }
    }
  }
}

// Writes a buffer's lanes (no halo) to where they lie in the map.
template <class V, class T, class A>
CARAFE_INLINE void unstage(const Staged<A>& from, const Window& window, const Map<T>& map) {
  const int64_t period = from.phases, step = map.column_stride * period;
  const int64_t columns = std::min(from.lanes * period, window.map_columns - window.lane * period);
  const auto target = [&](int64_t c, int64_t row, int64_t column) {
    return map.pointer(window.n, window.channel + c, window.row + row, window.lane * period + column);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < from.rows; ++row) {
      for (int64_t phase = 0; phase < std::min(period, columns); ++phase) {
        const A* const lanes = from.data + row * from.row_stride() + phase * from.pitch;
        scatter_channels<V>(
            Lanes<const A>{lanes, from.channel_stride()}, ceil_div(columns - phase, period), from.channels,
            target(0, row, phase), step);
      }
    }
    return;
  }
  const bool pairs = period == 2 && map.column_stride == 1;
  for (int64_t c = 0; c < from.channels; ++c) {
    for (int64_t row = 0; row < from.rows; ++row) {
      const A* const lanes = from.data + c * from.channel_stride() + row * from.row_stride();
      if (map.column_stride == 1 && window.channel + c + kChannelsAhead < window.last_channel) {
        prefetch<true>(target(c + kChannelsAhead, row, 0), columns);
      }
      if (pairs) {
        unstage_pairs<V>(lanes, lanes + from.pitch, columns / 2, target(c, row, 0));
        if (columns % 2) *target(c, row, columns - 1) = Narrow<T>::from(lanes[columns / 2]);
        continue;
      }
      for (int64_t phase = 0; phase < std::min(period, columns); ++phase) {
        unstage_row<V>(lanes + phase * from.pitch, ceil_div(columns - phase, period), target(c, row, phase), step);
      }
    }
  }
}

}  // namespace carafe

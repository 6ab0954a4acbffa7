// The kernel normaliser on staged buffers, and the way there from the content encoder's raw output: it needs neither a
// pixel shuffle nor a normalised copy in memory.
#pragma once

#include <cmath>

#include "staging.h"

namespace carafe {

enum class Normalizer { softmax, sigmoid, sigmoid_normalized };

// e^x, x below 88 (so all that is asked here); to about one unit in the last place for float.
template <class V>
CARAFE_INLINE typename V::type exponential(typename V::type x) {
  using Value = typename V::type;
  if constexpr (std::is_same_v<typename V::element, double>) {
    for (int64_t i = 0; i < V::lanes; ++i) x[i] = std::exp(x[i]);
    return x;
  } else {
    using Bits = typename V::index;
    const Value clamped = x < -87.0f ? Value{} - 87.0f : x;  // below lie the subnormal numbers
    // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to the integer n, and leaves it in the last bits.
    constexpr float round = 12582912.0f;
    const Value shifted = clamped * 1.44269504f + round;
    const Value n = shifted - round;
    const Value r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    Value p = r * 1.9875691e-4f + 1.3981999e-3f;                        // the minimax polynomial of Cephes' expf
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666666e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * (r * r) + r + 1.0f;
    // A cast between vectors keeps the bits.
    const Bits scaled = (Bits)p + ((Bits)shifted << 23);
    return x != x ? x : (Value)scaled;
  }
}

// sigmoid(x) = e^min(x, 0) / (1 + e^-|x|), which never overflows; `shift` scales it by e^-shift.
template <class V>
CARAFE_INLINE typename V::type sigmoid(typename V::type x, typename V::type shift) {
  const typename V::type zero = {};
  return exponential<V>((x < zero ? x : zero) - shift) / (exponential<V>(x < zero ? x : -x) + 1);
}

// Normalises lanes [begin, end) of a buffer in place, each kernel (all channels of one lane) on its own.
template <class V, class A>
CARAFE_INLINE void normalize(Normalizer normalizer, const Staged<A>& m, int64_t begin, int64_t end) {
  using Value = typename V::type;
  const Value zero = {};
  const int64_t step = m.channel_stride();
  for (int64_t place = 0; place < m.rows * m.phases; ++place) {
    for (int64_t q = begin; q < end; q += V::lanes) {
      A* const kernel = m.data + place * m.pitch + q;
      if (normalizer == Normalizer::sigmoid) {
        for (int64_t tap = 0; tap < m.channels; ++tap)
          V::store(kernel + tap * step, sigmoid<V>(V::load(kernel + tap * step), zero));
        continue;
      }
      Value largest = V::load(kernel);
      for (int64_t tap = 1; tap < m.channels; ++tap) {
        const Value value = V::load(kernel + tap * step);
        largest = value > largest ? value : largest;
      }
      Value sum = {};
      if (normalizer == Normalizer::softmax) {
        for (int64_t tap = 0; tap < m.channels; ++tap) {
          const Value value = exponential<V>(V::load(kernel + tap * step) - largest);
          V::store(kernel + tap * step, value);
          sum += value;
        }
      } else {
        // The common factor e^-min(largest, 0) keeps a quotient of vanishing sigmoids from becoming 0 / 0.
        const Value shift = largest < zero ? largest : zero;
        for (int64_t tap = 0; tap < m.channels; ++tap) {
          const Value value = sigmoid<V>(V::load(kernel + tap * step), shift);
          V::store(kernel + tap * step, value);
          sum += value;
        }
      }
      const Value factor = 1 / sum;
      for (int64_t tap = 0; tap < m.channels; ++tap)
        V::store(kernel + tap * step, V::load(kernel + tap * step) * factor);
    }
  }
}

// Turns the gradient to normalised weights into that to logits, in place; `logits` is read by sigmoid_normalized alone.
template <class V, class A>
CARAFE_INLINE void normalize_backward(
    Normalizer normalizer, const Staged<A>& weights, const A* logits, const Staged<A>& grad, int64_t lanes) {
  using Value = typename V::type;
  const Value zero = {};
  for (int64_t place = 0; place < grad.rows * grad.phases; ++place) {
    for (int64_t q = 0; q < lanes; q += V::lanes) {
      const A* const kernel = weights.data + place * weights.pitch + q;
      A* const g = grad.data + place * grad.pitch + q;
      Value dot = {};
      if (normalizer != Normalizer::sigmoid) {
        for (int64_t tap = 0; tap < grad.channels; ++tap)
          dot += V::load(kernel + tap * weights.channel_stride()) * V::load(g + tap * grad.channel_stride());
      }
      for (int64_t tap = 0; tap < grad.channels; ++tap) {
        const Value weight = V::load(kernel + tap * weights.channel_stride());
        Value value = weight * (V::load(g + tap * grad.channel_stride()) - dot);
        if (normalizer == Normalizer::sigmoid) value = value * (1 - weight);
        if (normalizer == Normalizer::sigmoid_normalized) {  // d sigmoid = sigmoid(x) sigmoid(-x)
          const Value x = V::load(logits + tap * weights.channel_stride() + place * weights.pitch + q);
          value = value * sigmoid<V>(-x, zero);
        }
        V::store(g + tap * grad.channel_stride(), value);
      }
    }
  }
}

// The content encoder's raw output is (N, G k^2 up^2, H, W): channel (tap up + row phase) up + column phase. Each lane
// of it is a lane of a staged buffer already, so that the pixel shuffle costs nothing. For up == 1 or down == 1.
struct LogitsWindow {
  int64_t n, group;
  int64_t first_row;  // of the output
  int64_t lane;
};

template <class V, class T, class A>
CARAFE_INLINE void stage_logits(
    const Shape& shape, const Map<const T>& map, const LogitsWindow& window, const Staged<A>& to) {
  const int64_t phases = shape.up * shape.up, channels = shape.taps() * phases;
  const int64_t columns = shape.up == 1 ? shape.out_width : shape.width;
  const int64_t begin = std::max(-to.halo, -window.lane);
  const int64_t end = std::max(begin, std::min(to.lanes + to.halo, columns - window.lane));
  for (int64_t row = 0; row < to.rows / shape.up; ++row) {
    const Lanes<A> lanes{to.data + row * phases * to.pitch, to.channel_stride(), phases, to.pitch};
    for (int64_t c = 0; c < channels; ++c) {
      std::fill(lanes(c) - to.halo, lanes(c) + begin, A(0));
      std::fill(lanes(c) + end, lanes(c) + to.lanes + to.halo, A(0));
    }
    if (end == begin) continue;
    const int64_t map_row = window.first_row / shape.up + row;
    const T* const from = map.pointer(window.n, window.group * channels, map_row, window.lane + begin);
    if (map.channel_stride == 1 && map.column_stride != 1) {
      const Lanes<A> first{lanes.base + begin, lanes.step, lanes.phases, lanes.pitch};
      gather_channels<V>(from, map.column_stride, end - begin, channels, first);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const T* const source = from + c * map.channel_stride;
      A* const target = lanes(c) + begin;
      if (map.column_stride == 1) {
        for (int64_t q = 0; q < end - begin; ++q) target[q] = widen(source[q]);
      } else {
        for (int64_t q = 0; q < end - begin; ++q) target[q] = widen(source[q * map.column_stride]);
      }
    }
  }
}

// The way back (no halo).
template <class V, class T, class A>
CARAFE_INLINE void unstage_logits(
    const Shape& shape, const Staged<A>& from, const LogitsWindow& window, const Map<T>& map) {
  const int64_t phases = shape.up * shape.up, channels = shape.taps() * phases;
  const int64_t columns = std::min(from.lanes, (shape.up == 1 ? shape.out_width : shape.width) - window.lane);
  for (int64_t row = 0; row < from.rows / shape.up; ++row) {
    const Lanes<const A> lanes{from.data + row * phases * from.pitch, from.channel_stride(), phases, from.pitch};
    T* const to = map.pointer(window.n, window.group * channels, window.first_row / shape.up + row, window.lane);
    if (map.channel_stride == 1 && map.column_stride != 1) {
      scatter_channels<V>(lanes, columns, channels, to, map.column_stride);
      continue;
    }
    for (int64_t c = 0; c < channels; ++c) {
      const A* const source = lanes(c);
      T* const target = to + c * map.channel_stride;
      if (map.column_stride == 1) {
        for (int64_t q = 0; q < columns; ++q) target[q] = Narrow<T>::from(source[q]);
      } else {
        for (int64_t q = 0; q < columns; ++q) target[q * map.column_stride] = Narrow<T>::from(source[q]);
      }
    }
  }
}

}  // namespace carafe

// The kernel normaliser on staged buffers, and the way there from the content encoder's raw output: it needs neither a
// pixel shuffle nor a normalised copy in memory.
#pragma once

#include <cmath>

#include "../common/normalizer.h"
#include "staging.h"

namespace carafe {

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

  // Where the buffer would lie in a map of masks.
  Window masks(const Shape& shape) const {
    return {n, group * shape.taps(), 0, first_row, lane, shape.out_height, shape.out_width};
  }
};

template <class V, class T, class A>
CARAFE_INLINE void stage_logits(
    const Shape& shape, const Map<const T>& map, const LogitsWindow& window, const Staged<A>& to) {
  const int64_t phases = shape.up * shape.up, channels = shape.taps() * phases, rows = to.rows / shape.up;
  const Window masks = window.masks(shape);
  const Inside inside(masks, to);
  const int64_t begin = inside.begin, count = inside.count(0, shape.up);
  const auto source = [&](int64_t c, int64_t row) {
    return map.pointer(window.n, window.group * channels + c, window.first_row / shape.up + row, window.lane + begin);
  };
  const auto lanes = [&](int64_t row) {
    return Lanes<A>{to.data + row * phases * to.pitch + begin, to.channel_stride(), phases, to.pitch};
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < rows; ++row) {
      gather_channels<V>(source(0, row), map.column_stride, count, channels, lanes(row));
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < rows; ++row) stage_row<V>(source(c, row), map.column_stride, count, lanes(row)(c));
  }
}

// The way back (no halo).
template <class V, class T, class A>
CARAFE_INLINE void unstage_logits(
    const Shape& shape, const Staged<A>& from, const LogitsWindow& window, const Map<T>& map) {
  const int64_t phases = shape.up * shape.up, channels = shape.taps() * phases, rows = from.rows / shape.up;
  const int64_t columns = std::min(from.lanes, (shape.up == 1 ? shape.out_width : shape.width) - window.lane);
  const auto target = [&](int64_t c, int64_t row) {
    return map.pointer(window.n, window.group * channels + c, window.first_row / shape.up + row, window.lane);
  };
  const auto lanes = [&](int64_t row) {
    return Lanes<const A>{from.data + row * phases * from.pitch, from.channel_stride(), phases, from.pitch};
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < rows; ++row) {
      scatter_channels<V>(lanes(row), columns, channels, target(0, row), map.column_stride);
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t row = 0; row < rows; ++row) unstage_row<V>(lanes(row)(c), columns, target(c, row), map.column_stride);
  }
}

}  // namespace carafe

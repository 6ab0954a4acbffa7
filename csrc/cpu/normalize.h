// The kernel normaliser on staged buffers, and the way there from logits, the content encoder's raw output: it needs
// neither a pixel shuffle nor a normalised copy in memory.
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

// Turns the gradient to masks into that to logits, in place. `logits`, of the masks' form, is read by
// sigmoid_normalized alone.
template <class V, class A>
CARAFE_INLINE void normalize_backward(
    Normalizer normalizer, const Staged<A>& masks, const Staged<A>& logits, const Staged<A>& grad) {
  using Value = typename V::type;
  const Value zero = {};
  for (int64_t place = 0; place < grad.rows * grad.phases; ++place) {
    for (int64_t q = 0; q < grad.lanes; q += V::lanes) {
      const A* const kernel = masks.data + place * masks.pitch + q;
      A* const g = grad.data + place * grad.pitch + q;
      Value dot = {};
      if (normalizer != Normalizer::sigmoid) {
        for (int64_t tap = 0; tap < grad.channels; ++tap)
          dot += V::load(kernel + tap * masks.channel_stride()) * V::load(g + tap * grad.channel_stride());
      }
      for (int64_t tap = 0; tap < grad.channels; ++tap) {
        const Value mask = V::load(kernel + tap * masks.channel_stride());
        Value value = mask * (V::load(g + tap * grad.channel_stride()) - dot);
        if (normalizer == Normalizer::sigmoid) value = value * (1 - mask);
        if (normalizer == Normalizer::sigmoid_normalized) {  // d sigmoid = sigmoid(x) sigmoid(-x)
          const Value x = V::load(logits.data + tap * logits.channel_stride() + place * logits.pitch + q);
          value = value * sigmoid<V>(-x, zero);
        }
        V::store(g + tap * grad.channel_stride(), value);
      }
    }
  }
}

// Logits are (N, G k^2 up^2, H, W): channel (tap up + row phase) up + column phase. Each lane of them is a lane of
// staged masks already, so that the pixel shuffle costs nothing. For up == 1 or down == 1; `region` is that of the
// masks that they will be, and their buffers' phases are `up`.
struct LogitsLayout {
  int64_t up, phases, channel, channels, row, rows;  // `channels` and `rows` of the map from `channel` and `row` on

  template <class A>
  LogitsLayout(const Region& region, const Staged<A>& buffer)
      : up(buffer.phases),
        phases(up * up),
        channel(region.channel * phases),
        channels(buffer.channels * phases),
        row(region.row / up),
        rows(buffer.rows / up) {}

  // Where channel c of a row of the map goes, from a lane on.
  template <class A>
  CARAFE_INLINE auto lanes(const Staged<A>& buffer, int64_t row, int64_t lane) const {
    return [base = buffer.at(0, row * up) + lane, step = buffer.channel_stride(), pitch = buffer.pitch,
            phases = phases](int64_t c) CARAFE_ALWAYS_INLINE { return base + c / phases * step + c % phases * pitch; };
  }
};

template <class V, class T, class A>
CARAFE_INLINE void stage_logits(const Map<const T>& map, const Region& region, const Staged<A>& to) {
  const LogitsLayout at(region, to);
  const Inside inside(region, to);
  const int64_t begin = inside.begin, count = inside.count(0, at.up);
  const auto source = [&](int64_t c, int64_t row) {
    return map.pointer(region.n, at.channel + c, at.row + row, region.lane + begin);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < at.rows; ++row) {
      gather_channels<V>(source(0, row), map.column_stride, count, at.channels, at.lanes(to, row, begin));
    }
    return;
  }
  for (int64_t c = 0; c < at.channels; ++c) {
    for (int64_t row = 0; row < at.rows; ++row) {
      stage_row<V>(source(c, row), map.column_stride, count, at.lanes(to, row, begin)(c));
    }
  }
}

// The way back (no halo).
template <class V, class T, class A>
CARAFE_INLINE void unstage_logits(const Staged<A>& from, const Region& region, const Map<T>& map) {
  const LogitsLayout at(region, from);
  const int64_t columns = std::min(from.lanes, ceil_div(region.map_columns, at.up) - region.lane);
  const auto target = [&](int64_t c, int64_t row) {
    return map.pointer(region.n, at.channel + c, at.row + row, region.lane);
  };
  if (map.channel_stride == 1 && map.column_stride != 1) {
    for (int64_t row = 0; row < at.rows; ++row) {
      scatter_channels<V>(at.lanes(from, row, 0), columns, at.channels, target(0, row), map.column_stride);
    }
    return;
  }
  for (int64_t c = 0; c < at.channels; ++c) {
    for (int64_t row = 0; row < at.rows; ++row) {
      unstage_row<V>(at.lanes(from, row, 0)(c), columns, target(c, row), map.column_stride);
    }
  }
}

}  // namespace carafe

// The kernel normaliser on staged buffers: it needs no normalised copy in memory.
#pragma once

#include "../common/glibc.h"
#include "buffer.h"

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
  const int64_t step = m.channel_stride();
  for (int64_t place = 0; place < m.rows * m.phases; ++place) {
    for (int64_t q = begin; q < end; q += V::lanes) {
      A* const kernel = m.data + place * m.pitch + q;
      const bool softmax = normalizer == Normalizer::softmax, alone = normalizer == Normalizer::sigmoid;
      Value shift = {};
      if (!alone) {
        Value largest = V::load(kernel);
        for (int64_t tap = 1; tap < m.channels; ++tap) {
          const Value value = V::load(kernel + tap * step);
          largest = value > largest ? value : largest;
        }
        // The common factor e^-min(largest, 0) keeps a quotient of vanishing sigmoids from becoming 0 / 0.
        shift = softmax ? largest : largest < shift ? largest : shift;
      }
      Value sum = {};
      for (int64_t tap = 0; tap < m.channels; ++tap) {
        const Value logit = V::load(kernel + tap * step);
        const Value value = softmax ? exponential<V>(logit - shift) : sigmoid<V>(logit, shift);
        V::store(kernel + tap * step, value);
        sum += value;
      }
      if (alone) continue;
      const Value factor = 1 / sum;
      for (int64_t tap = 0; tap < m.channels; ++tap)
        V::store(kernel + tap * step, V::load(kernel + tap * step) * factor);
    }
  }
}

// Turns the gradient to masks into that to logits, in place; all buffers are of one form. `logits` is read by
// sigmoid_normalized alone.
template <class V, class A>
CARAFE_INLINE void normalize_backward(
    Normalizer normalizer, const Staged<A>& masks, const Staged<A>& logits, const Staged<A>& grad) {
  using Value = typename V::type;
  const int64_t step = grad.channel_stride();
  for (int64_t place = 0; place < grad.rows * grad.phases; ++place) {
    for (int64_t q = 0; q < grad.lanes; q += V::lanes) {
      const int64_t kernel = place * grad.pitch + q;
      A* const g = grad.data + kernel;
      Value dot = {};
      if (normalizer != Normalizer::sigmoid) {
        for (int64_t tap = 0; tap < grad.channels; ++tap)
          dot += V::load(masks.data + kernel + tap * step) * V::load(g + tap * step);
      }
      for (int64_t tap = 0; tap < grad.channels; ++tap) {
        const Value mask = V::load(masks.data + kernel + tap * step);
        Value value = mask * (V::load(g + tap * step) - dot);
        if (normalizer == Normalizer::sigmoid) value = value * (1 - mask);
        if (normalizer == Normalizer::sigmoid_normalized) {  // d sigmoid = sigmoid(x) sigmoid(-x)
          value = value * sigmoid<V>(-V::load(logits.data + kernel + tap * step), Value{});
        }
        V::store(g + tap * step, value);
      }
    }
  }
}

}  // namespace carafe

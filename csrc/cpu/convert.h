// Loads and stores of vectors of any dtype: half precision is float32 in registers (common/half.h has the arithmetic).
#pragma once

#include <cstring>

#include "../common/half.h"
#include "simd.h"

namespace carafe {

// half.h's conversions, for a vector of floats.
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

// Stores two vectors whose elements take turns: as two vectors or, in half precision, packed into one.
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

}  // namespace carafe

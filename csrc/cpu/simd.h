// Vectors of one instruction set's width, in the compilers' own vector extension, loads and stores of them from any
// dtype (half precision is float32 in registers, common/half.h has the arithmetic), and the blocks that loops over them
// fall into.
#pragma once

#include <algorithm>
#include <utility>

#include "../common/half.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CARAFE_X86
#ifndef __clang__
#define CARAFE_GCC_X86
#endif
#endif
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace carafe {

#define CARAFE_ALWAYS_INLINE __attribute__((always_inline))
#define CARAFE_INLINE inline CARAFE_ALWAYS_INLINE

constexpr int64_t kVectorBytes = 64;  // the widest, so that one plan serves every instruction set

template <class A, int Bytes>
struct Vector {
  typedef A element;
  typedef A type __attribute__((vector_size(Bytes)));
  typedef A unaligned __attribute__((vector_size(Bytes), aligned(sizeof(A)), may_alias));
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> index __attribute__((vector_size(Bytes)));
  typedef uint32_t words __attribute__((vector_size(Bytes)));
  typedef uint16_t halves __attribute__((vector_size(Bytes / 2)));
  static constexpr int64_t bytes = Bytes, lanes = Bytes / int64_t(sizeof(A));
  static constexpr auto all = std::make_integer_sequence<int64_t, lanes>();

  static CARAFE_INLINE type load(const A* address) { return *reinterpret_cast<const unaligned*>(address); }
  static CARAFE_INLINE void store(A* address, type value) { *reinterpret_cast<unaligned*>(address) = value; }
};

// Keeps a value that several products share in its register: GCC would rather load it again for each of two or three.
template <class V>
CARAFE_INLINE typename V::type shared(typename V::type value) {
#ifdef CARAFE_GCC_X86
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
#pragma GCC unroll 4
  for (int64_t round = 1; round < V::lanes; round *= 2) {
    typename V::type next[V::lanes];
#pragma GCC unroll 8
    for (int64_t i = 0; i < V::lanes / 2; ++i) {
      next[2 * i] = zip<V, 0>(rows[i], rows[i + V::lanes / 2], V::all);
      next[2 * i + 1] = zip<V, 1>(rows[i], rows[i + V::lanes / 2], V::all);
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < V::lanes; ++i) rows[i] = next[i];
  }
}

// half.h's conversions, for a vector of floats.
template <class V>
struct Words {
  typedef typename V::type real;
  typedef typename V::words bits;
  static CARAFE_INLINE bits to_bits(real value) { return (bits)value; }
  static CARAFE_INLINE real to_real(bits value) { return (real)value; }
};

// Whether the processors that take vectors of V convert float16 by instructions: AVX2's and AVX-512's all have F16C.
// Those give what half.h does, whatever becomes of subnormal floats, but for a NaN's payload.
template <class V, class T>
constexpr bool converts_halves = std::is_same_v<T, Half> &&
#if defined(CARAFE_X86)
                                 V::bytes >= 32;
#elif defined(__aarch64__)
                                 true;
#else
                                 false;
#endif

// These two are inlined into functions of the instruction set, but are none themselves: GCC would refuse intrinsics.
template <class V>
CARAFE_INLINE typename V::type widen_halves(typename V::halves values) {
#if defined(__aarch64__)
  return (typename V::type)vcvt_f32_f16(vreinterpret_f16_u16((uint16x4_t)values));
#elif defined(CARAFE_GCC_X86)
  typename V::type result;
  asm("vcvtph2ps %1, %0" : "=v"(result) : "v"(values));
  return result;
#elif defined(__clang__)
  typedef __fp16 Numbers __attribute__((vector_size(V::bytes / 2)));
  return __builtin_convertvector((Numbers)values, typename V::type);
#endif
}
template <class V>
CARAFE_INLINE typename V::halves narrow_to_halves(typename V::type values) {
#if defined(__aarch64__)
  return (typename V::halves)vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)values));
#elif defined(CARAFE_GCC_X86)
  typename V::halves result;
  asm("vcvtps2ph $0, %1, %0" : "=v"(result) : "v"(values));  // 0: to the nearest, ties to even
  return result;
#elif defined(__clang__)
  typedef __fp16 Numbers __attribute__((vector_size(V::bytes / 2)));
  return (typename V::halves) __builtin_convertvector(values, Numbers);
#endif
}

// The bits of half-precision numbers, each in a word of its own.
template <class V, class T>
CARAFE_INLINE typename V::words narrow_to_words(typename V::type values) {
  if constexpr (converts_halves<V, T>) {
    return __builtin_convertvector(narrow_to_halves<V>(values), typename V::words);
  } else {
    return T::template narrow<Words<V>>(values);
  }
}

template <class V, class T>
CARAFE_INLINE typename V::type load_widened(const T* from) {
  if constexpr (is_half_precision<T>) {
    typename V::halves values;
    memcpy(&values, from, sizeof values);
    if constexpr (converts_halves<V, T>) {
      return widen_halves<V>(values);
    } else {
      return T::template widen<Words<V>>(__builtin_convertvector(values, typename V::words));
    }
  } else {
    return V::load(from);
  }
}

template <class V, class T>
CARAFE_INLINE void store_narrowed(T* to, typename V::type value) {
  if constexpr (is_half_precision<T>) {
    typename V::halves values;
    if constexpr (converts_halves<V, T>) {
      values = narrow_to_halves<V>(value);
    } else {
      values = __builtin_convertvector(narrow_to_words<V, T>(value), typename V::halves);
    }
    memcpy(static_cast<void*>(to), &values, sizeof values);
  } else {
    V::store(to, value);
  }
}

// Stores two vectors whose elements take turns: as two vectors or, in half precision, packed into one.
template <class V, class T>
CARAFE_INLINE void store_pairs(T* to, typename V::type even, typename V::type odd) {
  if constexpr (is_half_precision<T>) {
    if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) std::swap(even, odd);  // the lower half comes second there
    const typename V::words both = narrow_to_words<V, T>(even) | narrow_to_words<V, T>(odd) << 16;
    memcpy(static_cast<void*>(to), &both, sizeof both);
  } else {
    V::store(to, zip<V, 0>(even, odd, V::all));
    V::store(to + V::lanes, zip<V, 1>(even, odd, V::all));
  }
}

// Loads two vectors' worth of elements that take turns: the even ones and the odd ones.
template <class V, class T>
CARAFE_INLINE void load_pairs(const T* from, typename V::type& even, typename V::type& odd) {
  if constexpr (std::is_same_v<T, BFloat16>) {  // half a word each, and the upper half of a float
    typename V::words both;
    memcpy(&both, from, sizeof both);
    even = (typename V::type)(both << 16);
    odd = (typename V::type)(both & 0xffff0000u);
    if constexpr (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__) std::swap(even, odd);
  } else {
    const auto first = shared<V>(load_widened<V>(from)), second = shared<V>(load_widened<V>(from + V::lanes));
    even = unzip<V, 0>(first, second, V::all);
    odd = unzip<V, 1>(first, second, V::all);
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

template <int Value>
using Constant = std::integral_constant<int, Value>;

// Calls body(size, place) for the blocks that 0 .. count - 1 fall into: as many as there are of the first size, then of
// the next. Sizes of 0 are left out; the last one is 1, or places may remain.
template <int... Sizes, class Body>
CARAFE_INLINE void for_each_block(int64_t count, const Body& body) {
  int64_t place = 0;
  const auto of_size = [&](auto size) CARAFE_ALWAYS_INLINE {
    if constexpr (size > 0) {
      for (; place + size <= count; place += size) body(size, place);
    }
  };
  (of_size(Constant<Sizes>()), ...);
}

// Calls body(vector, begin, end) for the lanes to go over by whole vectors, then, where half a vector holds what
// remains, for those to go over by half a one: on processors that take the widest in two turns it costs half. Worth it
// around whole passes over the channels; deeper inside, two versions of a loop cost each other registers.
template <class V, class Body>
CARAFE_INLINE void with_half_tail(int64_t begin, int64_t end, const Body& body) {
  if constexpr (V::bytes == kVectorBytes) {
    const int64_t rest = (end - begin) % V::lanes;
    if (rest > 0 && rest <= V::lanes / 2) {
      body(V(), begin, end - rest);
      return body(Vector<typename V::element, V::bytes / 2>(), end - rest, end);
    }
  }
  body(V(), begin, end);
}

}  // namespace carafe

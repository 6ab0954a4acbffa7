// The element types and their arithmetic type: sums of half-precision numbers are float32.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "shape.h"

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace carafe {

// How the conversions below see 32 bits: as one number here, as a vector of them in cpu/simd.h.
struct Word {
  using bits = uint32_t;
  using real = float;

  static CARAFE_HOST_DEVICE bits to_bits(real value) {
    bits cast;
    memcpy(&cast, &value, sizeof cast);
    return cast;
  }
  static CARAFE_HOST_DEVICE real to_real(bits value) {
    real cast;
    memcpy(&cast, &value, sizeof cast);
    return cast;
  }
};

struct BFloat16 {
  uint16_t bits;

  template <class W>
  static CARAFE_HOST_DEVICE typename W::real widen(typename W::bits bits) {
    return W::to_real(bits << 16);
  }

  // To the nearest, ties to even; the result is in the lower 16 bits.
  template <class W>
  static CARAFE_HOST_DEVICE typename W::bits narrow(typename W::real value) {
    const typename W::bits bits = W::to_bits(value);
    const typename W::bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bits & 0x7fffffffu) > 0x7f800000u ? (rounded & 0u) + 0x7fc0u : rounded;  // NaN stays one
  }
};

struct Half {
  uint16_t bits;

  // Without branches, so that it vectorises on every instruction set, and without subnormal floats, which a process may
  // flush to zero.
  template <class W>
  static CARAFE_HOST_DEVICE typename W::real widen(typename W::bits bits) {
    const typename W::bits magnitude = bits & 0x7fffu;
    const typename W::bits sign = (bits & 0x8000u) << 16;
    const typename W::bits normal = (magnitude << 13) + 0x38000000u;  // the exponent's bias goes from 15 to 127
    // The last place of 0.5 is 2^-24, that of a subnormal half.
    const typename W::bits subnormal = W::to_bits(W::to_real(magnitude | 0x3f000000u) - 0.5f);
    const typename W::bits special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
    const typename W::bits finite = magnitude < 0x400u ? subnormal : normal;
    return W::to_real(sign | (magnitude >= 0x7c00u ? special : finite));
  }

  template <class W>
  static CARAFE_HOST_DEVICE typename W::bits narrow(typename W::real value) {
    const typename W::bits bits = W::to_bits(value);
    const typename W::bits sign = (bits >> 16) & 0x8000u;
    const typename W::bits magnitude = bits & 0x7fffffffu;
    // Normal halves: the exponent's bias goes from 127 to 15, and a carry out of the fraction is a correct rounding up,
    // to infinity where it must be.
    const typename W::bits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 aligns the fraction with the half's and lets the addition do the rounding.
    const typename W::bits subnormal = W::to_bits(W::to_real(magnitude) + 0.5f) - 0x3f000000u;
    const typename W::bits infinite = (bits & 0u) + 0x7c00u;
    const typename W::bits special = magnitude > 0x7f800000u ? infinite + 0x200u : infinite;
    const typename W::bits finite = magnitude < 0x38800000u ? subnormal : normal;
    return sign | (magnitude >= 0x47800000u ? special : finite);
  }
};

template <class T>
constexpr bool is_half_precision = sizeof(T) == 2;

template <class T>
using accumulator_t = std::conditional_t<is_half_precision<T>, float, T>;

template <class T>
CARAFE_HOST_DEVICE accumulator_t<T> widen(T value) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) return __half2float(__ushort_as_half(value.bits));
#endif
  if constexpr (is_half_precision<T>) {
    return T::template widen<Word>(value.bits);
  } else {
    return value;
  }
}

template <class T>
CARAFE_HOST_DEVICE T narrow(accumulator_t<T> value) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, Half>) return {__half_as_ushort(__float2half_rn(value))};
  if constexpr (std::is_same_v<T, BFloat16>) return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#endif
  if constexpr (is_half_precision<T>) {
    return T{uint16_t(T::template narrow<Word>(value))};
  } else {
    return value;
  }
}

}  // namespace carafe

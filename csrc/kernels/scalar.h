// The element types and their arithmetic type: sums of half-precision numbers are float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "shape.h"

namespace carafe {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

template <class T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<Half> {
  using type = float;
};
template <>
struct Accumulator<BFloat16> {
  using type = float;
};
template <class T>
using accumulator_t = typename Accumulator<T>::type;

CARAFE_HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

CARAFE_HOST_DEVICE float bits_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

CARAFE_HOST_DEVICE float widen(float value) { return value; }
CARAFE_HOST_DEVICE double widen(double value) { return value; }
CARAFE_HOST_DEVICE float widen(BFloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

// Without branches, so that a row of them vectorises on every instruction set: the multiplication by 2^112 moves the
// exponent's bias from 15 to 127 and turns subnormal halves into normal floats.
CARAFE_HOST_DEVICE float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t finite = float_bits(bits_float(magnitude << 13) * bits_float(0x77800000u));
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinity and NaN
  return bits_float(sign | (magnitude >= 0x7c00u ? special : finite));
}

template <class T>
struct Narrow;

template <>
struct Narrow<float> {
  static CARAFE_HOST_DEVICE float from(float value) { return value; }
};
template <>
struct Narrow<double> {
  static CARAFE_HOST_DEVICE double from(double value) { return value; }
};

// To the nearest, ties to even.
template <>
struct Narrow<BFloat16> {
  static CARAFE_HOST_DEVICE BFloat16 from(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    return BFloat16{uint16_t(nan ? 0x7fc0u : rounded)};
  }
};

template <>
struct Narrow<Half> {
  static CARAFE_HOST_DEVICE Half from(float value) {
    const uint32_t bits = float_bits(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7fffffffu;
    // Normal halves: the exponent's bias goes from 127 to 15, and a carry out of the fraction is a correct rounding up,
    // to infinity where it must be.
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    // Subnormal halves: adding 0.5 aligns the fraction with the half's and lets the addition do the rounding.
    const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
    const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    return Half{uint16_t(sign | (magnitude >= 0x47800000u ? special : finite))};
  }
};

}  // namespace carafe

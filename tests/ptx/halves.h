// 16-bit floating point numbers, by their bits.
#pragma once

#include <cmath>

#include "machine.h"

namespace machine {

struct F16 {
  static INLINE float widen(uint16_t bits) { return static_cast<float>(cast<_Float16>(bits)); }
  static INLINE uint16_t narrow(double x) { return std::isnan(x) ? 0x7fff : cast<uint16_t>(static_cast<_Float16>(x)); }
  static INLINE uint16_t narrow_float(float x) {
    return std::isnan(x) ? 0x7fff : cast<uint16_t>(static_cast<_Float16>(x));
  }
};
struct BF16 {
  static INLINE float widen(uint16_t bits) { return cast<float>(uint32_t(bits) << 16); }
  static INLINE uint16_t narrow_float(float x) {
    const uint32_t bits = cast<uint32_t>(x);
    return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static INLINE uint16_t narrow(double x) {
    if (std::isnan(x)) return 0x7fff;
    float nearest = static_cast<float>(x);
    // To odd, for a second rounding.
    if (double(nearest) != x && std::isfinite(nearest) && !(cast<uint32_t>(nearest) & 1)) {
      const uint32_t bits = cast<uint32_t>(nearest);
      const bool outwards = std::fabs(x) > std::fabs(double(nearest));
      nearest = cast<float>(outwards ? bits + 1 : bits - 1);
    }
    return narrow_float(nearest);
  }
};

}  // namespace machine

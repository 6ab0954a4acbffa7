// Operations on registers alone.
#include <algorithm>
#include <cmath>

#include "halves.h"

namespace machine {
namespace {

enum Rounding { kNearest, kZero, kDown, kUp };

INLINE float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }

// To odd: so rounded, a double can be rounded again to any much shorter number as if from the exact value.
INLINE double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double bb = sum - a, error = (a - (sum - bb)) + (b - bb);
  if (error == 0 || (cast<uint64_t>(sum) & 1)) return sum;
  const uint64_t bits = cast<uint64_t>(sum);
  // The neighbour towards the exact sum; an error where the sum is zero there is none.
  return cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// A double, exact or rounded to odd, to float.
INLINE float round_to_float(double x, int rounding) {
  const float nearest = static_cast<float>(x);
  if (rounding == kNearest || std::isnan(x) || double(nearest) == x) return nearest;
  const float infinity = std::numeric_limits<float>::infinity();
  const bool above = double(nearest) > x;
  const float lower = above ? std::nextafter(nearest, -infinity) : nearest;
  const float upper = above ? nearest : std::nextafter(nearest, infinity);
  if (rounding == kDown) return lower;
  if (rounding == kUp) return upper;
  return x > 0 ? lower : upper;
}

INLINE float fma_rounded(float a, float b, float c, int rounding) {
  const double product = double(a) * double(b);
  if (product == 0 || c == 0 || !std::isfinite(product) || !std::isfinite(c)) {
    if (rounding == kDown && product == -double(c) && product == 0) {  // of zeros of different signs
      return std::signbit(product) == std::signbit(c) ? c : -0.f;
    }
    return round_to_float(product + double(c), rounding);
  }
  if (product == -double(c)) return rounding == kDown ? -0.f : 0.f;
  return round_to_float(add_to_odd(product, c), rounding);
}

template <class T>
INLINE T lesser(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b;
  } else {
    return a < b ? a : b;
  }
}
template <class T>
INLINE T greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && std::signbit(b)) ? a : b;
  } else {
    return a > b ? a : b;
  }
}

template <class H>
uint16_t narrow_to_zero(double x) {
  const uint16_t nearest = H::narrow(x);
  if (std::isnan(x) || std::isinf(x)) return nearest;
  return std::fabs(double(H::widen(nearest))) > std::fabs(x) ? nearest - 1 : nearest;
}

template <class H>
uint16_t half_operation(const char op, uint16_t a, uint16_t b, uint16_t c) {
  const double x = H::widen(a), y = H::widen(b), z = H::widen(c);
  switch (op) {
    case '+':
      return H::narrow(add_to_odd(x, y));
    case '-':
      return H::narrow(add_to_odd(x, -y));
    case '*':
      return H::narrow(x * y);
    case 'f':
      return H::narrow(x * y == 0 || z == 0 ? x * y + z : add_to_odd(x * y, z));
    case 'r': {  // fma, and zero for what is negative
      const uint16_t value = half_operation<H>('f', a, b, c);
      return std::isnan(H::widen(value)) ? 0x7fff : value & 0x8000 ? 0 : value;
    }
    case '<':
      return std::isnan(x) && std::isnan(y)                                                            ? 0x7fff
             : lesser(float(x), float(y)) == float(x) && !std::isnan(x) && (x != y || std::signbit(x)) ? a
             : std::isnan(y)                                                                           ? a
                                                                                                       : b;
    case '>':
      return std::isnan(x) && std::isnan(y)                                                             ? 0x7fff
             : greater(float(x), float(y)) == float(x) && !std::isnan(x) && (x != y || std::signbit(y)) ? a
             : std::isnan(y)                                                                            ? a
                                                                                                        : b;
    case 'l':
      return std::isnan(x) || std::isnan(y) ? 0x7fff : half_operation<H>('<', a, b, c);
    case 'g':
      return std::isnan(x) || std::isnan(y) ? 0x7fff : half_operation<H>('>', a, b, c);
    case 'n':
      return a ^ 0x8000;
    case 'a':
      return a & 0x7fff;
    case 'e':
      return H::narrow(std::exp2(x));
    case 't':
      return H::narrow(std::tanh(x));
  }
  return 0;
}

template <class H, char Op, bool Packed>
void half_op(Warp& w, const Ins& i) {
  const auto *const a = row<uint32_t>(w, i.x[1]), *const b = row<uint32_t>(w, i.x[2]),
                    *const c = row<uint32_t>(w, i.x[3]);
  each_active<uint32_t>(w, i.x[0], [&](int l) {
    uint32_t result = half_operation<H>(Op, a[l], b[l], c[l]);
    if (Packed) result |= uint32_t(half_operation<H>(Op, a[l] >> 16, b[l] >> 16, c[l] >> 16)) << 16;
    return result;
  });
}

template <class T>
T bit_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  const uint32_t last = std::min(position + length - 1, kBits - 1);
  const bool negative = std::is_signed_v<T> && length != 0 && (U(a) >> last & 1);
  U result = 0;
  for (uint32_t bit = 0; bit < kBits; ++bit) {
    const bool inside = bit < length && position + bit < kBits;
    result |= U(inside ? U(a) >> (position + bit) & 1 : negative) << bit;
  }
  return T(result);
}

template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  position &= 255, length &= 255;
  if (position >= kBits || length == 0) return b;
  const T field = length >= kBits ? ~T(0) : (T(1) << length) - 1;
  return (b & ~(field << position)) | ((a & field) << position);
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector, int mode) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  const auto byte = [&](int index) { return uint32_t(bytes >> (8 * (index & 7)) & 255); };
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const int s = selector & 3;
    uint32_t value = 0;
    switch (mode) {
      case 0: {
        const uint32_t nibble = selector >> (4 * k) & 15;
        value = byte(nibble & 7);
        if (nibble & 8) value = value & 128 ? 255 : 0;
        break;
      }
      case 1:
        value = byte(s + k);
        break;  // f4e
      case 2:
        value = byte(s - k);
        break;  // b4e
      case 3:
        value = byte(s);
        break;  // rc8
      case 4:
        value = byte(std::max(s, k));
        break;  // ecl
      case 5:
        value = byte(std::min(s, k));
        break;  // ecr
      case 6:
        value = byte((s & 1) * 2 + (k & 1));
        break;  // rc16
    }
    result |= value << (8 * k);
  }
  return result;
}

template <class T>
T divide(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(0) - a;
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<
      sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
      std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return T(Wide(a) * Wide(b) >> (sizeof(T) * 8));
}

template <class T>
T to_integer(double x, int rounding) {
  if (std::isnan(x)) return sizeof(T) == 8 ? T(uint64_t(1) << 63) : T(0);
  x = rounding == kNearest ? std::nearbyint(x)
      : rounding == kZero  ? std::trunc(x)
      : rounding == kDown  ? std::floor(x)
                           : std::ceil(x);
  if (x <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= double(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

double to_whole(double x, int rounding) {
  return rounding == kNearest ? std::nearbyint(x)
         : rounding == kZero  ? std::trunc(x)
         : rounding == kDown  ? std::floor(x)
                              : std::ceil(x);
}

float approximate_quotient(float a, float b) {
  const float size = std::fabs(b);
  if (size > 0x1p126f && !std::isinf(b))
    return std::isinf(a) || std::isnan(a) ? NAN : std::copysign(0.f, a) * std::copysign(1.f, b);
  return a / b;
}

// --------------------------------------------------------------------------------------------------------- operations

template <class T>
const char* const kName = "";
template <>
const char* const kName<uint8_t> = "u8";
template <>
const char* const kName<int8_t> = "s8";
template <>
const char* const kName<uint16_t> = "u16";
template <>
const char* const kName<int16_t> = "s16";
template <>
const char* const kName<uint32_t> = "u32";
template <>
const char* const kName<int32_t> = "s32";
template <>
const char* const kName<uint64_t> = "u64";
template <>
const char* const kName<int64_t> = "s64";
template <>
const char* const kName<float> = "f32";
template <>
const char* const kName<double> = "f64";

template <class T, class F>
INLINE void compare(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
  uint32_t bits = 0;
  LANES bits |= uint32_t(f(get<T>(a, l), get<T>(b, l))) << l;
  set_predicate(w, i.x[0], bits);
}

template <class T>
void add_comparisons() {
  const std::string type = kName<T>;
#define COMPARE(name, expression) OP("setp." name "." + type, (compare<T>(w, i, [](T a, T b) { return expression; })))
  COMPARE("eq", a == b);
  COMPARE("ne", (a < b || a > b));
  COMPARE("lt", a < b);
  COMPARE("le", a <= b);
  COMPARE("gt", a > b);
  COMPARE("ge", a >= b);
  if constexpr (std::is_floating_point_v<T>) {
    COMPARE("equ", !(a < b || a > b));
    COMPARE("neu", !(a == b));
    COMPARE("ltu", !(a >= b));
    COMPARE("leu", !(a > b));
    COMPARE("gtu", !(a <= b));
    COMPARE("geu", !(a < b));
    COMPARE("num", (a == a && b == b));
    COMPARE("nan", (a != a || b != b));
  }
#undef COMPARE
}

template <class T>
void add_bits() {  // of unsigned T
  const std::string bits = "b" + std::to_string(sizeof(T) * 8);
  OP("add." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a + b); })));
  OP("sub." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a - b); })));
  OP("mul.lo." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(uint64_t(a) * b); })));
  OP("mad.lo." + bits, (ternary<T, T>(w, i, [](T a, T b, T c) { return T(uint64_t(a) * b + c); })));
  OP("and." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a & b); })));
  OP("or." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a | b); })));
  OP("xor." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a ^ b); })));
  OP("not." + bits, (unary<T, T>(w, i, [](T a) { return T(~a); })));
  OP("cnot." + bits, (unary<T, T>(w, i, [](T a) { return T(a == 0); })));
  OP("neg." + bits, (unary<T, T>(w, i, [](T a) { return T(0 - a); })));
  OP("mov." + bits, (unary<T, T>(w, i, [](T a) { return a; })));
  OP("shl." + bits, {
    const auto* const a = row<T>(w, i.x[1]);
    const auto* const b = row<uint32_t>(w, i.x[2]);
    each<T>(w, i.x[0], [&](int l) {
      return b[l] >= sizeof(T) * 8 ? T(0) : T(get<T>(a, l) << (b[l] & (sizeof(T) * 8 - 1)));
    });
  });
  OP("selp." + bits, {
    const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
    const uint32_t p = w.preds[i.x[3]];
    each<T>(w, i.x[0], [&](int l) { return p >> l & 1 ? get<T>(a, l) : get<T>(b, l); });
  });
}

template <class T>
void add_integers() {
  const std::string type = kName<T>;
  constexpr uint32_t kBits = sizeof(T) * 8;
  OP("min." + type, (binary<T, T>(w, i, [](T a, T b) { return a < b ? a : b; })));
  OP("max." + type, (binary<T, T>(w, i, [](T a, T b) { return a > b ? a : b; })));
  OP("div." + type, (binary_active<T, T>(w, i, divide<T>)));
  OP("rem." + type, (binary_active<T, T>(w, i, remainder<T>)));
  OP("mul.hi." + type, (binary<T, T>(w, i, high_product<T>)));
  OP("mad.hi." + type, (ternary<T, T>(w, i, [](T a, T b, T c) {
       return T(std::make_unsigned_t<T>(high_product(a, b)) + std::make_unsigned_t<T>(c));
     })));
  OP("abs." + type,
     (unary<T, T>(w, i, [](T a) { return a < 0 ? T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a)) : a; })));
  OP("shr." + type, {
    const auto* const a = row<T>(w, i.x[1]);
    const auto* const b = row<uint32_t>(w, i.x[2]);
    each<T>(w, i.x[0], [&](int l) {
      return T(get<T>(a, l) >> (std::is_signed_v<T> && b[l] >= kBits ? kBits - 1 : b[l] & (kBits - 1))) *
             T(std::is_signed_v<T> || b[l] < kBits);
    });
  });
  if constexpr (sizeof(T) <= 4) {
    using Wide = std::conditional_t<
        sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
        std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
    OP("mul.wide." + type, (binary<T, Wide>(w, i, [](T a, T b) { return Wide(a) * Wide(b); })));
    OP("mad.wide." + type, {
      const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
      const auto* const c = row<Wide>(w, i.x[3]);
      using U = std::make_unsigned_t<Wide>;
      each<Wide>(w, i.x[0], [&](int l) { return Wide(U(Wide(get<T>(a, l)) * Wide(get<T>(b, l))) + U(c[l])); });
    });
  }
  if constexpr (sizeof(T) >= 4) {
    OP("bfe." + type, {
      const auto* const a = row<T>(w, i.x[1]);
      const auto *const b = row<uint32_t>(w, i.x[2]), *const c = row<uint32_t>(w, i.x[3]);
      each_active<T>(w, i.x[0], [&](int l) { return bit_field<T>(a[l], b[l], c[l]); });
    });
    OP("bfind." + type, (unary_active<T, uint32_t>(w, i, [](T a) {
         using U = std::make_unsigned_t<T>;
         const U x = a < 0 ? ~U(a) : U(a);
         return x == 0 ? ~0u : uint32_t(63 - __builtin_clzll(x));
       })));
    OP("bfind.shiftamt." + type, (unary_active<T, uint32_t>(w, i, [](T a) {
         using U = std::make_unsigned_t<T>;
         const U x = a < 0 ? ~U(a) : U(a);
         return x == 0 ? ~0u : uint32_t(kBits - 1 - (63 - __builtin_clzll(x)));
       })));
    OP("sad." + type, (ternary<T, T>(w, i, [](T a, T b, T c) { return T(c + (a > b ? a - b : b - a)); })));
  }
}

template <class T>
void add_words() {  // of unsigned T, 32 or 64 bits
  const std::string bits = "b" + std::to_string(sizeof(T) * 8);
  OP("popc." + bits, (unary_active<T, uint32_t>(w, i, [](T a) { return uint32_t(__builtin_popcountll(a)); })));
  OP("clz." + bits, (unary_active<T, uint32_t>(w, i, [](T a) {
       return a == 0 ? uint32_t(sizeof(T) * 8) : uint32_t(__builtin_clzll(a) - (64 - sizeof(T) * 8));
     })));
  OP("brev." + bits, (unary_active<T, T>(w, i, [](T a) {
       T result = 0;
       for (size_t k = 0; k < sizeof(T) * 8; ++k) result |= (a >> k & 1) << (sizeof(T) * 8 - 1 - k);
       return result;
     })));
  OP("bfi." + bits, {
    const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
    const auto *const c = row<uint32_t>(w, i.x[3]), *const d = row<uint32_t>(w, i.x[4]);
    each_active<T>(w, i.x[0], [&](int l) { return insert_bits<T>(a[l], b[l], c[l], d[l]); });
  });
}

template <class T>
void add_floats() {
  const std::string type = kName<T>;
  OP("add." + type, (binary<T, T>(w, i, [](T a, T b) { return a + b; })));
  OP("sub." + type, (binary<T, T>(w, i, [](T a, T b) { return a - b; })));
  OP("mul." + type, (binary<T, T>(w, i, [](T a, T b) { return a * b; })));
  OP("fma." + type, (ternary<T, T>(w, i, [](T a, T b, T c) { return std::fma(a, b, c); })));
  OP("div." + type, (binary<T, T>(w, i, [](T a, T b) { return a / b; })));
  OP("rcp." + type, (unary<T, T>(w, i, [](T a) { return T(1) / a; })));
  OP("sqrt." + type, (unary<T, T>(w, i, [](T a) { return std::sqrt(a); })));
  OP("rsqrt." + type, (unary<T, T>(w, i, [](T a) { return T(1 / std::sqrt(double(a))); })));
  OP("neg." + type, (unary<T, T>(w, i, [](T a) { return -a; })));
  OP("abs." + type, (unary<T, T>(w, i, [](T a) { return std::fabs(a); })));
  OP("min." + type, (binary<T, T>(w, i, lesser<T>)));
  OP("max." + type, (binary<T, T>(w, i, greater<T>)));
  OP("min.NaN." + type, (binary<T, T>(w, i, [](T a, T b) { return a != a || b != b ? T(NAN) : lesser(a, b); })));
  OP("max.NaN." + type, (binary<T, T>(w, i, [](T a, T b) { return a != a || b != b ? T(NAN) : greater(a, b); })));
  OP("copysign." + type, (binary<T, T>(w, i, [](T a, T b) { return std::copysign(b, a); })));
#define TEST(name, expression)               \
  OP("testp." name "." + type, {             \
    const auto* const r = row<T>(w, i.x[1]); \
    uint32_t bits = 0;                       \
    lanes(w.mask, [&](int l) {               \
      const T a = r[l];                      \
      bits |= uint32_t(expression) << l;     \
    });                                      \
    set_predicate(w, i.x[0], bits);          \
  })
  TEST("finite", std::isfinite(a));
  TEST("infinite", std::isinf(a));
  TEST("number", !std::isnan(a));
  TEST("notanumber", std::isnan(a));
  TEST("normal", std::isnormal(a));
  TEST("subnormal", (a != 0 && std::fabs(a) < std::numeric_limits<T>::min()));
#undef TEST
}

// float32 with a rounding (imm) other than to the nearest, or flushed (sign).
#define ROUNDED(name, expression)                                                             \
  OP(name, (ternary_active<float, float>(w, i, [&](float a, float b, float c) {               \
       if (i.sign & 1) a = flush(a), b = flush(b), c = flush(c);                              \
       const int r = int(i.imm);                                                              \
       (void)b, (void)c, (void)r;                                                             \
       float value = expression;                                                              \
       if (i.sign & 1) value = flush(value);                                                  \
       if (i.sign & 2) value = std::isnan(value) ? 0.f : std::min(std::max(value, 0.f), 1.f); \
       return value;                                                                          \
     })))

float divide_rounded(float a, float b, int rounding) {
  const double quotient = double(a) / double(b);
  if (rounding == kNearest || !std::isfinite(quotient)) return a / b;
  // To odd by the remainder's sign.
  const double error = -std::fma(quotient, double(b), -double(a));
  double odd = quotient;
  if (error != 0 && !(cast<uint64_t>(quotient) & 1)) {
    const bool outwards = (error > 0) == (double(a) > 0);
    odd = cast<double>(outwards ? cast<uint64_t>(quotient) + 1 : cast<uint64_t>(quotient) - 1);
  }
  return round_to_float(odd, rounding);
}

void add_rounded() {
  ROUNDED("add.x.f32", (a == -b ? a + b : round_to_float(add_to_odd(a, b), r)));
  ROUNDED("sub.x.f32", (a == b ? a - b : round_to_float(add_to_odd(a, -double(b)), r)));
  ROUNDED("mul.x.f32", round_to_float(double(a) * double(b), r));
  ROUNDED("fma.x.f32", fma_rounded(a, b, c, r));
  ROUNDED("div.x.f32", divide_rounded(a, b, r));
  ROUNDED("rcp.x.f32", divide_rounded(1, a, r));
  ROUNDED("sqrt.x.f32", std::sqrt(a));
  ROUNDED("div.approx.f32", approximate_quotient(a, b));
  ROUNDED("rcp.approx.f32", 1 / a);
  ROUNDED("sqrt.approx.f32", std::sqrt(a));
  ROUNDED("rsqrt.approx.f32", float(1 / std::sqrt(double(a))));
  ROUNDED("ex2.approx.f32", std::exp2(a));
  ROUNDED("lg2.approx.f32", std::log2(a));
  ROUNDED("sin.approx.f32", std::sin(a));
  ROUNDED("cos.approx.f32", std::cos(a));
  ROUNDED("tanh.approx.f32", std::tanh(a));
  ROUNDED("min.x.f32", lesser(a, b));
  ROUNDED("max.x.f32", greater(a, b));
  ROUNDED("neg.x.f32", -a);
  ROUNDED("abs.x.f32", std::fabs(a));
}

template <class D, class S>
void add_integer_conversion() {
  OP(std::string("cvt.") + kName<D> + "." + kName<S>, (unary<S, D>(w, i, [](S a) {
       // Sign-extended to the register, which may be wider.
       if constexpr (sizeof(D) < 4)
         return uint32_t(int32_t(D(a)));
       else
         return D(a);
     })));
  OP(std::string("cvt.sat.") + kName<D> + "." + kName<S>, (unary_active<S, D>(w, i, [](S a) {
       const __int128 x = a, low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
       const D y = D(x < low ? low : x > high ? high : x);
       if constexpr (sizeof(D) < 4)
         return uint32_t(int32_t(y));
       else
         return y;
     })));
}

template <class D>
void add_conversions_to() {
  add_integer_conversion<D, uint8_t>();
  add_integer_conversion<D, int8_t>();
  add_integer_conversion<D, uint16_t>();
  add_integer_conversion<D, int16_t>();
  add_integer_conversion<D, uint32_t>();
  add_integer_conversion<D, int32_t>();
  add_integer_conversion<D, uint64_t>();
  add_integer_conversion<D, int64_t>();
  const std::string type = kName<D>;
  const auto out = [](D y) {
    if constexpr (sizeof(D) < 4)
      return uint32_t(int32_t(y));
    else
      return y;
  };
  (void)out;
  OP("cvt." + type + ".f32",
     (unary_active<float, D>(w, i, [&](float a) { return to_integer<D>(i.sign & 1 ? flush(a) : a, int(i.imm)); })));
  OP("cvt." + type + ".f64", (unary_active<double, D>(w, i, [&](double a) { return to_integer<D>(a, int(i.imm)); })));
  OP("cvt." + type + ".f16",
     (unary_active<uint16_t, D>(w, i, [&](uint16_t a) { return to_integer<D>(F16::widen(a), int(i.imm)); })));
  OP("cvt." + type + ".bf16",
     (unary_active<uint16_t, D>(w, i, [&](uint16_t a) { return to_integer<D>(BF16::widen(a), int(i.imm)); })));
  OP("cvt.f32." + type, (unary<D, float>(w, i, [](D a) { return float(a); })));
  OP("cvt.f64." + type, (unary<D, double>(w, i, [](D a) { return double(a); })));
  OP("cvt.f16." + type, (unary_active<D, uint16_t>(w, i, [](D a) { return F16::narrow(double(a)); })));
  OP("cvt.bf16." + type, (unary_active<D, uint16_t>(w, i, [](D a) { return BF16::narrow(double(a)); })));
}

float saturated(float x, int sign) {
  if (sign & 1) x = flush(x);
  return sign & 2 ? (std::isnan(x) ? 0.f : std::min(std::max(x, 0.f), 1.f)) : x;
}

template <class H>
uint16_t narrow_as(float x, const Ins& i) {  // imm: the rounding; sign & 4: relu; sign & 8: satfinite
  uint16_t value = i.imm == kZero ? narrow_to_zero<H>(x) : H::narrow_float(x);
  if ((i.sign & 4) && !std::isnan(x) && (value & 0x8000)) value = 0;
  if ((i.sign & 2) && std::isnan(x)) value = 0;
  if (i.sign & 2) value = H::narrow_float(std::min(std::max(H::widen(value), 0.f), 1.f));
  if ((i.sign & 8) && std::isinf(H::widen(value))) value -= 1;
  return value;
}

template <class H>
void add_half(const std::string& type) {
#define HALF(name, op)                                      \
  add(std::string(name ".") + type, half_op<H, op, false>); \
  add(std::string(name ".") + type + "x2", half_op<H, op, true>)
  HALF("add", '+');
  HALF("sub", '-');
  HALF("mul", '*');
  HALF("fma", 'f');
  HALF("fma.relu", 'r');
  HALF("min", '<');
  HALF("max", '>');
  HALF("min.NaN", 'l');
  HALF("max.NaN", 'g');
  HALF("neg", 'n');
  HALF("abs", 'a');
  HALF("ex2.approx", 'e');
  HALF("tanh.approx", 't');
#undef HALF
  add("cvt.f32." + type, [](Warp& w, const Ins& i) {
    unary<uint16_t, float>(w, i, [&](uint16_t a) { return saturated(H::widen(a), i.sign); });
  });
  add("cvt.f64." + type,
      [](Warp& w, const Ins& i) { unary<uint16_t, double>(w, i, [&](uint16_t a) { return double(H::widen(a)); }); });
  add("cvt." + type + ".f32", [](Warp& w, const Ins& i) {
    if (i.imm == kNearest && i.sign == 0)
      unary<float, uint16_t>(w, i, H::narrow_float);
    else
      unary_active<float, uint16_t>(w, i, [&](float a) { return narrow_as<H>(a, i); });
  });
  add("cvt." + type + ".f64", [](Warp& w, const Ins& i) { unary_active<double, uint16_t>(w, i, H::narrow); });
  add("cvt." + type + "x2.f32", [](Warp& w, const Ins& i) {  // the first operand goes to the upper half
    binary_active<float, uint32_t>(
        w, i, [&](float a, float b) { return uint32_t(narrow_as<H>(a, i)) << 16 | narrow_as<H>(b, i); });
  });
  add("cvt." + type + "." + type, [](Warp& w, const Ins& i) {
    unary_active<uint16_t, uint16_t>(w, i, [&](uint16_t a) { return H::narrow(to_whole(H::widen(a), int(i.imm))); });
  });
#define COMPARE(name, expression)                                                        \
  add(std::string("setp." name ".") + type, [](Warp& w, const Ins& i) {                  \
    const auto *const x = row<uint16_t>(w, i.x[1]), *const y = row<uint16_t>(w, i.x[2]); \
    uint32_t bits = 0;                                                                   \
    lanes(w.mask, [&](int l) {                                                           \
      const float a = H::widen(x[l]), b = H::widen(y[l]);                                \
      bits |= uint32_t(expression) << l;                                                 \
    });                                                                                  \
    set_predicate(w, i.x[0], bits);                                                      \
  })
  COMPARE("eq", a == b);
  COMPARE("ne", (a < b || a > b));
  COMPARE("lt", a < b);
  COMPARE("le", a <= b);
  COMPARE("gt", a > b);
  COMPARE("ge", a >= b);
  COMPARE("equ", !(a < b || a > b));
  COMPARE("neu", !(a == b));
  COMPARE("ltu", !(a >= b));
  COMPARE("leu", !(a > b));
  COMPARE("gtu", !(a <= b));
  COMPARE("geu", !(a < b));
  COMPARE("num", (a == a && b == b));
  COMPARE("nan", (a != a || b != b));
#undef COMPARE
}

}  // namespace

void add_arithmetic() {
  add_bits<uint16_t>(), add_bits<uint32_t>(), add_bits<uint64_t>();
  add_integers<uint16_t>(), add_integers<int16_t>(), add_integers<uint32_t>(), add_integers<int32_t>();
  add_integers<uint64_t>(), add_integers<int64_t>();
  add_words<uint32_t>(), add_words<uint64_t>();
  add_floats<float>(), add_floats<double>();
  add_rounded();
  add_half<F16>("f16"), add_half<BF16>("bf16");
  add_comparisons<uint16_t>(), add_comparisons<int16_t>(), add_comparisons<uint32_t>(), add_comparisons<int32_t>();
  add_comparisons<uint64_t>(), add_comparisons<int64_t>(), add_comparisons<float>(), add_comparisons<double>();
  add_conversions_to<uint8_t>(), add_conversions_to<int8_t>(), add_conversions_to<uint16_t>();
  add_conversions_to<int16_t>(), add_conversions_to<uint32_t>(), add_conversions_to<int32_t>();
  add_conversions_to<uint64_t>(), add_conversions_to<int64_t>();
  OP("cvt.f64.f32", (unary<float, double>(w, i, [](float a) { return double(a); })));
  OP("cvt.f32.f64",
     (unary_active<double, float>(w, i, [&](double a) { return saturated(round_to_float(a, int(i.imm)), i.sign); })));
  OP("cvt.f32.f32", (unary_active<float, float>(w, i, [&](float a) { return saturated(a, i.sign); })));
  OP("cvt.whole.f32.f32",
     (unary_active<float, float>(w, i, [&](float a) { return saturated(float(to_whole(a, int(i.imm))), i.sign); })));
  OP("cvt.whole.f64.f64", (unary_active<double, double>(w, i, [&](double a) { return to_whole(a, int(i.imm)); })));
  OP("fma.ru.f64",
     (ternary_active<double, double>(w, i, [](double a, double b, double c) { return std::fma(a, b, c); })));
  OP("mov.pack2.b32",
     (binary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; })));
  OP("mov.pack2.b64", (binary<uint32_t, uint64_t>(w, i, [](uint32_t a, uint32_t b) { return a | uint64_t(b) << 32; })));
  OP("mov.pack4.b64", {
    const uint32_t* from[4];
    for (int k = 0; k < 4; ++k) from[k] = row<uint32_t>(w, i.x[1 + k]);
    each<uint64_t>(w, i.x[0], [&](int l) {
      return uint64_t(from[0][l] & 0xffff) | uint64_t(from[1][l] & 0xffff) << 16 | uint64_t(from[2][l] & 0xffff) << 32 |
             uint64_t(from[3][l] & 0xffff) << 48;
    });
  });
  OP("mov.unpack2.b32", {
    const auto* const a = row<uint32_t>(w, i.x[2]);
    uint32_t copy[kLanes];
    LANES copy[l] = a[l];
    each<uint32_t>(w, i.x[0], [&](int l) { return copy[l] & 0xffff; });
    each<uint32_t>(w, i.x[1], [&](int l) { return copy[l] >> 16; });
  });
  OP("mov.unpack2.b64", {
    const auto* const a = row<uint64_t>(w, i.x[2]);
    each<uint32_t>(w, i.x[0], [&](int l) { return uint32_t(a[l]); });
    each<uint32_t>(w, i.x[1], [&](int l) { return uint32_t(a[l] >> 32); });
  });
  OP("mov.unpack4.b64", {
    const auto* const a = row<uint64_t>(w, i.x[4]);
    for (int k = 0; k < 4; ++k) each<uint32_t>(w, i.x[k], [&](int l) { return uint32_t(a[l] >> (16 * k) & 0xffff); });
  });
  OP("prmt.b32", (ternary_active<uint32_t, uint32_t>(
                     w, i, [&](uint32_t a, uint32_t b, uint32_t c) { return permute(a, b, c, int(i.imm)); })));
  OP("lop3.b32", (ternary<uint32_t, uint32_t>(w, i, [&](uint32_t a, uint32_t b, uint32_t c) {
       uint32_t value = 0;
       for (int k = 0; k < 8; ++k) {
         if (i.imm >> k & 1) value |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
       }
       return value;
     })));
  OP("shf.l.wrap.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return uint32_t((uint64_t(b) << 32 | a) << (c & 31) >> 32);
     })));
  OP("shf.l.clamp.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return c >= 32 ? a : uint32_t((uint64_t(b) << 32 | a) << c >> 32);
     })));
  OP("shf.r.wrap.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return uint32_t((uint64_t(b) << 32 | a) >> (c & 31));
     })));
  OP("shf.r.clamp.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return c >= 32 ? b : uint32_t((uint64_t(b) << 32 | a) >> c);
     })));
  OP("mad24.lo.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return (a & 0xffffff) * (b & 0xffffff) + c;
     })));
  OP("mul24.lo.b32",
     (binary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); })));
  // Dot products of bytes: sign & 1, 2: whether those of the first and second operand have signs; imm: 4, or 2 for
  // halves with the lower bytes, 3 for halves with the upper ones.
  OP("dp.b32", (ternary<uint32_t, uint32_t>(w, i, [&](uint32_t a, uint32_t b, uint32_t c) {
       const auto part = [](uint32_t word, int bits, int index, bool negative) {
         const uint32_t value = word >> (bits * index) & ((1u << bits) - 1);
         return negative && value >> (bits - 1) ? value - (1u << bits) : value;
       };
       const bool first = i.sign & 1, second = i.sign & 2;
       uint32_t sum = c;
       for (int k = 0; k < (i.imm == 4 ? 4 : 2); ++k) {
         const uint32_t x = i.imm == 4 ? part(a, 8, k, first) : part(a, 16, k, first);
         sum += x * part(b, 8, i.imm == 3 ? k + 2 : k, second);
       }
       return sum;
     })));
  OP("and.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] & w.preds[i.x[2]]));
  OP("or.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] | w.preds[i.x[2]]));
  OP("xor.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] ^ w.preds[i.x[2]]));
  OP("not.pred", set_predicate(w, i.x[0], ~w.preds[i.x[1]]));
  OP("mov.pred", set_predicate(w, i.x[0], w.preds[i.x[1]]));
  OP("set.b32.pred", {  // all ones, or 1.0
    const uint32_t p = w.preds[i.x[1]];
    each<uint32_t>(w, i.x[0], [&](int l) { return p >> l & 1 ? uint32_t(i.imm) : 0u; });
  });
  // A register that may be read before it is written.
  OP("check.written", {
    const uint32_t missing = w.mask & ~w.written[i.x[0]];
    if (missing) {
      --w.current;
      do {
        ++w.current;
      } while (w.kernel->code[w.current].hidden);
      report(kUninitializedRegister, w, __builtin_ctz(missing), i.imm);
    }
  });
  OP("mark.written", w.written[i.x[0]] |= w.mask);
  OP("nop", (void)0);
  OP("trap", {
    report(kBadBarrier, w, __builtin_ctz(w.mask));
    ex.stop = true;
  });
}

}  // namespace machine

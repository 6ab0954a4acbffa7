// The conversions of half precision, those of one number at a time beside those of each instruction set's vectors,
// behind C functions, for ctypes; as a program, for an emulated processor, it compares the two.
#include <cstdio>
#include <vector>

#include "../../csrc/cpu/staging.h"

using namespace carafe;

namespace {

template <class T>
bool is_nan(T value) {
  return widen(value) != widen(value);
}
bool is_nan(float value) { return value != value; }

// In how many results the two differ; NaNs are one value.
template <class To, class Each>
int64_t count_differences(int64_t count, const To* found, const Each& each) {
  int64_t differences = 0;
  for (int64_t i = 0; i < count; ++i) {
    const To expected = each(i);
    differences += memcmp(&found[i], &expected, sizeof expected) != 0 && !(is_nan(found[i]) && is_nan(expected));
  }
  return differences;
}

template <class T, class Copy>
int64_t widen_all(const Copy& copy, int64_t count, const T* from, float* to) {
  copy(from, to, count);
  return count_differences(count, to, [&](int64_t i) { return widen(from[i]); });
}
template <class T, class Copy>
int64_t narrow_all(const Copy& copy, int64_t count, const float* from, T* to) {
  copy(to, from, count);
  return count_differences(count, to, [&](int64_t i) { return narrow<T>(from[i]); });
}
// The same where two vectors take turns.
template <class T, class Copy>
int64_t narrow_pairs(const Copy& copy, int64_t count, const float* from, T* to) {
  std::vector<float> even, odd;
  for (int64_t i = 0; i < count; i += 2) {
    even.push_back(from[i]);
    odd.push_back(from[i + 1]);
  }
  copy(to, count / 2, even.data(), odd.data());
  return count_differences(count, to, [&](int64_t i) { return narrow<T>(from[i]); });
}

}  // namespace

// Of one instruction set; `count` is even.
#define CONVERSIONS(path, Bytes, Target, type, T)                                                  \
  extern "C" Target int64_t widen_##type##_##path(int64_t count, const void* from, void* to) {     \
    const auto copy = [](const T* columns, float* lanes, int64_t count)                            \
                          Target { copy_row<Vector<float, Bytes>>(columns, 1, count, lanes); };    \
    return widen_all(copy, count, static_cast<const T*>(from), static_cast<float*>(to));           \
  }                                                                                                \
  extern "C" Target int64_t narrow_##type##_##path(int64_t count, const void* from, void* to) {    \
    const auto copy = [](T* columns, const float* lanes, int64_t count)                            \
                          Target { copy_row<Vector<float, Bytes>>(columns, 1, count, lanes); };    \
    return narrow_all(copy, count, static_cast<const float*>(from), static_cast<T*>(to));          \
  }                                                                                                \
  extern "C" Target int64_t pairs_##type##_##path(int64_t count, const void* from, void* to) {     \
    const auto copy = [](T* columns, int64_t count, const float* even, const float* odd)           \
                          Target { copy_pairs<Vector<float, Bytes>>(columns, count, even, odd); }; \
    return narrow_pairs(copy, count, static_cast<const float*>(from), static_cast<T*>(to));        \
  }
#define OF_BOTH(path, Bytes, Target)           \
  CONVERSIONS(path, Bytes, Target, half, Half) \
  CONVERSIONS(path, Bytes, Target, bfloat16, BFloat16)

OF_BOTH(baseline, 16, )
#ifdef CARAFE_X86
OF_BOTH(avx2, 32, __attribute__((target("avx2,fma,f16c"))))
OF_BOTH(avx512, 64, __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))))
extern "C" int has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
extern "C" int has_avx512() { return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
#else
extern "C" int has_avx2() { return 0; }
extern "C" int has_avx512() { return 0; }
#endif

int main() {
  std::vector<uint16_t> halves(65536);
  std::vector<float> floats(1 << 20), wide(halves.size());
  std::vector<uint16_t> narrow(floats.size());
  for (size_t i = 0; i < halves.size(); ++i) halves[i] = uint16_t(i);
  for (size_t i = 0; i < floats.size(); ++i) floats[i] = Word::to_real(uint32_t(i) * 4099u + 1u);
  int64_t differences = widen_half_baseline(halves.size(), halves.data(), wide.data());
  differences += narrow_half_baseline(floats.size(), floats.data(), narrow.data());
  differences += pairs_half_baseline(floats.size(), floats.data(), narrow.data());
  differences += widen_bfloat16_baseline(halves.size(), halves.data(), wide.data());
  differences += narrow_bfloat16_baseline(floats.size(), floats.data(), narrow.data());
  differences += pairs_bfloat16_baseline(floats.size(), floats.data(), narrow.data());
  printf("%lld\n", static_cast<long long>(differences));
}

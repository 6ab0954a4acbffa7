// The kernel normaliser's arithmetic (cpu/normalize.h has it for the CPU).
#pragma once

#include <cmath>

#include "../common/operators.h"

namespace carafe::gpu {

// A kernel's common terms: weight = f(logit, shift) * factor.
template <class A>
struct Statistics {
  A shift, factor;
};

// For divisors that are ordinary numbers (or not a number). On a GPU the exact division is a call.
CARAFE_HOST_DEVICE double quotient(double dividend, double divisor) { return dividend / divisor; }
CARAFE_HOST_DEVICE float quotient(float dividend, float divisor) {
#ifdef __CUDA_ARCH__
  return __fdividef(dividend, divisor);
#else
  return dividend / divisor;
#endif
}

CARAFE_HOST_DEVICE double exponential(double x) { return std::exp(x); }
// For weights, which are 1 at the most: what is lost is below float32's last place of that, and zero where it vanishes.
CARAFE_HOST_DEVICE float exponential(float x) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504f));
  return result;
#else
  return std::exp(x);
#endif
}

// log(sigmoid(x)), which neither overflows nor vanishes.
CARAFE_HOST_DEVICE float log_sigmoid(float x) {
#ifdef __CUDA_ARCH__
  return fminf(x, 0.0f) - __logf(1 + exponential(-fabsf(x)));
#else
  return std::fmin(x, 0.0f) - std::log1p(std::exp(-std::fabs(x)));
#endif
}

// sigmoid(x) e^-shift, which never overflows for shift = min(largest x, 0).
template <class A>
CARAFE_HOST_DEVICE A sigmoid(A x, A shift) {
  return quotient(exponential((x < 0 ? x : A(0)) - shift), exponential(x < 0 ? x : -x) + 1);
}

template <class A>
CARAFE_HOST_DEVICE A unscaled_weight(Normalizer normalizer, A logit, A shift) {
  return normalizer == Normalizer::none      ? logit
         : normalizer == Normalizer::softmax ? exponential(logit - shift)
                                             : sigmoid(logit, shift);
}

template <class A>
CARAFE_HOST_DEVICE A weight(Normalizer normalizer, A logit, const Statistics<A>& kernel) {
  return normalizer == Normalizer::none ? logit : unscaled_weight(normalizer, logit, kernel.shift) * kernel.factor;
}

}  // namespace carafe::gpu

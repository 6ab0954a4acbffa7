// What the CPU kernels compute: a call, of which each instruction set computes tiles.
#pragma once

#include <variant>

#include "../common/half.h"
#include "../common/normalizer.h"
#include "plan.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define CARAFE_X86
#endif

namespace carafe {

template <class T>
struct Reassemble {
  using element = T;
  Map<T> output;
  Map<const T> features;
  Kernels<T> kernels;
};

template <class T>
struct GradFeatures {
  using element = T;
  Map<T> grad;
  Map<const T> grad_output;
  Kernels<T> kernels;
};

template <class T>
struct GradKernels {
  using element = T;
  Map<T> grad;
  Map<const T> grad_output, features;
  Kernels<T> kernels;  // read where there is a normaliser
};

template <template <class> class... Operators>
using AnyOf = std::variant<Operators<double>..., Operators<float>..., Operators<Half>..., Operators<BFloat16>...>;
using Call = AnyOf<Reassemble, GradFeatures, GradKernels>;

// Computes tiles [begin, end) of a call, each in the source file of its name.
void run_baseline(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end);
#ifdef CARAFE_X86
void run_avx2(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end);
void run_avx512(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end);
#endif

}  // namespace carafe

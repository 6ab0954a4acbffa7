// Reassembly kernels in registers: a thread, or eight of them that share a kernel's taps, loads its logits once and
// normalises them.
#pragma once

#include "normalizer.h"
#include "tile.h"

namespace carafe::gpu {

// The weights of a call, or their gradient: masks, a kernel at every pixel of the output; or logits as the content
// encoder leaves them, the kernels of all phases at their site. Channel tap x phases + phase of a site has what lies at
// a pixel of the masks: the pixel shuffle is an index.
template <class T>
struct KernelMap {
  Image<T> image;
  bool from_logits;
  int tap_stride;
  int out_height, out_width;  // outputs that have a kernel
  int rows, columns;          // and the sites of these

  // The first tap of a kernel, or null where there is none.
  template <class G>
  __device__ T* kernel(int n, int group, int row, int column, int phase) const {
    const int i = row * G::kUp + phase / G::kUp, j = column * G::kUp + phase % G::kUp;
    if (row < 0 || column < 0 || i >= out_height || j >= out_width) return nullptr;
    T* const item = image.item(n);
    return from_logits ? item + image.offset(group * G::kTaps * G::kPhases + phase, row, column)
                       : item + image.offset(group * G::kTaps, i, j);
  }
};

// `wanted`: without the kernels of outputs that are not wanted, which logits may have.
template <class G, class T>
bool make_kernel_map(const Map<T>& map, const Shape& shape, Normalizer normalizer, bool wanted, KernelMap<T>* kernels) {
  const bool from_logits = normalizer != Normalizer::none && G::kUp > 1;
  const int64_t channels = shape.mask_channels() * (from_logits ? G::kPhases : 1);
  const int64_t height = from_logits ? shape.height : shape.out_height;
  const int64_t width = from_logits ? shape.width : shape.out_width;
  if (!make_image(map, channels, height, width, 1, 1, &kernels->image)) return false;
  kernels->from_logits = from_logits;
  kernels->tap_stride = kernels->image.channel_stride * (from_logits ? G::kPhases : 1);
  kernels->out_height = static_cast<int>(from_logits && !wanted ? shape.height * G::kUp : shape.out_height);
  kernels->out_width = static_cast<int>(from_logits && !wanted ? shape.width * G::kUp : shape.out_width);
  kernels->rows = static_cast<int>(ceil_div(kernels->out_height, G::kUp));
  kernels->columns = static_cast<int>(ceil_div(kernels->out_width, G::kUp));
  return true;
}

// Threads that share a kernel: where channels are neighbours in memory, so are the taps.
constexpr int kTapLanes = 8;

// A kernel that `Lanes` neighbouring threads share, tap i x Lanes + lane being one of the thread's.
template <class G, int Lanes>
struct OwnKernel {
  static constexpr int kOwn = (G::kTaps + Lanes - 1) / Lanes;
  float values[kOwn];

  __device__ __forceinline__ static int tap(int i, int lane) { return i * Lanes + lane; }
  __device__ __forceinline__ static bool has(int i, int lane) {
    return (i + 1) * Lanes <= G::kTaps || tap(i, lane) < G::kTaps;
  }

  template <class Function>
  __device__ __forceinline__ static void each(int lane, const Function& function) {
    CARAFE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      if (has(i, lane)) function(i, tap(i, lane));
    }
  }

  template <class Combine>
  __device__ __forceinline__ static float combine(float value, const Combine& function) {
    CARAFE_UNROLL
    for (int step = 1; step < Lanes; step *= 2) value = function(value, __shfl_xor_sync(~0u, value, step));
    return value;
  }

  // Zeros where `from` is null.
  template <class T>
  __device__ __forceinline__ void load(const T* from, int tap_stride, int lane) {
    CARAFE_UNROLL
    for (int i = 0; i < kOwn; ++i) values[i] = 0;
    if (from == nullptr) return;
    const T* at = from + lane * tap_stride;
    each(lane, [&](int i, int) {
      values[i] = widen(*at);
      at += Lanes * tap_stride;
    });
  }

  // From logits to weights.
  __device__ __forceinline__ void normalize(Normalizer normalizer, int lane) {
    if (normalizer == Normalizer::none) return;
    if (normalizer == Normalizer::sigmoid) {
      each(lane, [&](int i, int) { values[i] = sigmoid(values[i], 0.0f); });
      return;
    }
    float largest = values[0];  // every thread has at least one
    each(lane, [&](int i, int) { largest = fmaxf(largest, values[i]); });
    largest = combine(largest, [](float a, float b) { return fmaxf(a, b); });
    // The common factor e^-min(largest, 0) keeps a quotient of vanishing sigmoids from becoming 0 / 0.
    const float shift = normalizer == Normalizer::softmax ? largest : fminf(largest, 0.0f);
    if (normalizer == Normalizer::softmax) {
      each(lane, [&](int i, int) { values[i] = exponential(values[i] - shift); });
    } else {
      each(lane, [&](int i, int) { values[i] = sigmoid(values[i], shift); });
    }
    float sum = 0;
    each(lane, [&](int i, int) { sum += values[i]; });
    const float factor = quotient(1.0f, combine(sum, [](float a, float b) { return a + b; }));
    each(lane, [&](int i, int) { values[i] *= factor; });
  }
};

// Calls function(own, kernel, lane) for each of `Count` kernels, with what own_kernel(kernel) points at loaded and
// normalised.
template <class G, int Lanes, int Count, int Threads, class Pointer, class Function>
__device__ __forceinline__ void for_each_kernel(
    unsigned thread, int tap_stride, Normalizer normalizer, const Pointer& pointer, const Function& function) {
  constexpr int kRounds = (Count * Lanes + Threads - 1) / Threads;
  CARAFE_ROLLED
  for (int round = 0; round < kRounds; ++round) {
    const unsigned item = round * Threads + thread;
    const int kernel = static_cast<int>(item / Lanes), lane = static_cast<int>(item % Lanes);
    const bool exists = kernel < Count;
    if (Lanes == 1 && !exists) return;  // where threads exchange sums, all of a warp stay
    OwnKernel<G, Lanes> own;
    own.load(exists ? pointer(kernel) : nullptr, tap_stride, lane);
    own.normalize(normalizer, lane);
    if (exists) function(own, kernel, lane);
  }
}

// The weights of a rectangle of sites in shared memory: [tap][site][phase], a quad more for each tap so that the taps
// of a kernel lie in different banks.
template <class G, int Rows, int Columns>
struct StagedWeights {
  static constexpr int kSites = Rows * Columns;
  static constexpr int kTap = (kSites * G::kPhases + kQuad - 1) / kQuad * kQuad + kQuad;
  static constexpr int kSize = G::kTaps * kTap;

  // Of the sites from (row, column) on; zeros where there is no kernel.
  template <int Threads, class T>
  static __device__ __forceinline__ void stage(
      const KernelMap<const T>& kernels, Normalizer normalizer, int n, int group, int row, int column, unsigned thread,
      float* to) {
    const auto pointer = [&](int kernel) {
      const int site = kernel / G::kPhases, phase = kernel % G::kPhases;
      return kernels.template kernel<G>(n, group, row + site / Columns, column + site % Columns, phase);
    };
    const auto keep = [&](const auto& own, int kernel, int lane) {
      own.each(lane, [&](int i, int tap) { to[tap * kTap + kernel] = own.values[i]; });
    };
    constexpr int kCount = kSites * G::kPhases;
    if (kernels.image.channels_last) {
      for_each_kernel<G, kTapLanes, kCount, Threads>(thread, kernels.tap_stride, normalizer, pointer, keep);
    } else {
      for_each_kernel<G, 1, kCount, Threads>(thread, kernels.tap_stride, normalizer, pointer, keep);
    }
  }
};

}  // namespace carafe::gpu

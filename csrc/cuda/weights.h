// Reassembly kernels: a thread has the logits of one in registers, and normalises them there.
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

// A kernel in registers.
template <class G>
struct OwnKernel {
  float values[G::kTaps];

  template <class Function>
  __device__ __forceinline__ static void each(const Function& function) {
    CARAFE_UNROLL
    for (int tap = 0; tap < G::kTaps; ++tap) function(tap);
  }

  // From logits to weights: sigmoid is exp(log sigmoid), and sigmoid over its sum the softmax of that.
  __device__ __forceinline__ void normalize(Normalizer normalizer) {
    if (normalizer == Normalizer::none) return;
    if (normalizer != Normalizer::softmax) each([&](int tap) { values[tap] = log_sigmoid(values[tap]); });
    float largest = values[0];
    each([&](int tap) { largest = fmaxf(largest, values[tap]); });
    const float shift = normalizer == Normalizer::sigmoid ? 0 : largest;
    float sum = 0;
    each([&](int tap) { sum += values[tap] = exponential(values[tap] - shift); });
    const float factor = normalizer == Normalizer::sigmoid ? 1 : quotient(1.0f, sum);
    each([&](int tap) { values[tap] *= factor; });
  }
};

struct Site {
  int row, column;
};

// Moves the kernels of `Sites` sites, a thread of `Threads` having one of them, between registers and global memory.
// site(i) says where a site lies; kernel i is phase i % phases of site i / phases.
template <class G, int Sites, int Threads>
struct KernelTransfer {
  static constexpr int kCount = Sites * G::kPhases;
  static constexpr int kEach = (kCount * G::kTaps + Threads - 1) / Threads;
  static_assert(kCount <= Threads, "a thread has one kernel");

  template <class T, class Where>
  static __device__ __forceinline__ T* pointer(
      const KernelMap<T>& kernels, int n, int group, const Where& site, int kernel) {
    const Site at = site(kernel / G::kPhases);
    return kernels.template kernel<G>(n, group, at.row, at.column, kernel % G::kPhases);
  }

  // Where channels are neighbours in memory, so are a kernel's taps: neighbouring threads move these, and exchange them
  // through shared memory, of kCount x taps elements. Calls function(i, element of shared memory, pointer) for the
  // thread's elements; the pointer is null where there is no kernel.
  template <class T, class Where, class Function>
  static __device__ __forceinline__ void each_element(
      const KernelMap<T>& kernels, int n, int group, const Where& site, unsigned thread, const Function& function) {
    CARAFE_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const unsigned element = i * Threads + thread;
      if ((i + 1) * Threads > kCount * G::kTaps && element >= kCount * G::kTaps) continue;
      // A pixel of the masks has a kernel; one of the logits, those of all phases of a site, phase by phase for each
      // tap.
      if (G::kPhases > 1 && kernels.from_logits) {
        constexpr unsigned kChannels = G::kTaps * G::kPhases;
        T* const first = pointer(kernels, n, group, site, static_cast<int>(element / kChannels) * G::kPhases);
        function(i, element, first == nullptr ? nullptr : first + element % kChannels);
      } else {
        T* const first = pointer(kernels, n, group, site, static_cast<int>(element / G::kTaps));
        function(i, element, first == nullptr ? nullptr : first + element % G::kTaps);
      }
    }
  }
  // A tap of a kernel there.
  static __device__ __forceinline__ int element(bool from_logits, int kernel, int tap) {
    return G::kPhases > 1 && from_logits
               ? kernel / G::kPhases * G::kTaps * G::kPhases + tap * G::kPhases + kernel % G::kPhases
               : kernel * G::kTaps + tap;
  }

  // Zeros where there is no kernel. `exchange` may be written to again once every thread has come back.
  template <class T, class Where>
  static __device__ __forceinline__ OwnKernel<G> load(
      const KernelMap<const T>& kernels, int n, int group, const Where& site, unsigned thread, T* exchange) {
    OwnKernel<G> own = {};
    const int kernel = static_cast<int>(thread);
    if (kernels.image.channels_last) {
      T values[kEach];
      each_element(kernels, n, group, site, thread, [&](int i, unsigned, const T* from) {
        values[i] = from == nullptr ? T{} : *from;
      });
      each_element(
          kernels, n, group, site, thread, [&](int i, unsigned element, const T*) { exchange[element] = values[i]; });
      __syncthreads();
      if (kernel < kCount) {
        own.each([&](int tap) { own.values[tap] = widen(exchange[element(kernels.from_logits, kernel, tap)]); });
      }
      __syncthreads();
    } else if (kernel < kCount) {
      const T* from = pointer(kernels, n, group, site, kernel);
      if (from != nullptr) {
        own.each([&](int tap) {
          own.values[tap] = widen(*from);
          from += kernels.tap_stride;
        });
      }
    }
    return own;
  }

  // `exchange` must not be read or written by others.
  template <class T, class Where>
  static __device__ __forceinline__ void store(
      const KernelMap<T>& kernels, int n, int group, const Where& site, unsigned thread, T* exchange,
      const OwnKernel<G>& own) {
    const int kernel = static_cast<int>(thread);
    if (kernels.image.channels_last) {
      if (kernel < kCount) {
        own.each([&](int tap) { exchange[element(kernels.from_logits, kernel, tap)] = narrow<T>(own.values[tap]); });
      }
      __syncthreads();
      each_element(kernels, n, group, site, thread, [&](int, unsigned element, T* to) {
        if (to != nullptr) *to = exchange[element];
      });
    } else if (kernel < kCount) {
      T* to = pointer(kernels, n, group, site, kernel);
      if (to == nullptr) return;
      own.each([&](int tap) {
        *to = narrow<T>(own.values[tap]);
        to += kernels.tap_stride;
      });
    }
  }
};

// The weights of a rectangle of sites in shared memory: [tap][site][phase], a quad more for each tap so that the taps
// of a kernel lie in different banks.
template <class G, int Rows, int Columns>
struct StagedWeights {
  static constexpr int kSites = Rows * Columns;
  static constexpr int kTap = (kSites * G::kPhases + kQuad - 1) / kQuad * kQuad + kQuad;
  static constexpr int kSize = G::kTaps * kTap;

  // Of the sites from (row, column) on; zeros where there is no kernel.
  template <class T>
  static __device__ __forceinline__ void stage(
      const KernelMap<const T>& kernels, Normalizer normalizer, int n, int group, int row, int column, unsigned thread,
      float* to) {
    using Transfer = KernelTransfer<G, kSites, kThreads>;
    auto own = Transfer::load(
        kernels, n, group, [&](int site) { return Site{row + site / Columns, column + site % Columns}; }, thread,
        reinterpret_cast<T*>(to));
    if (thread >= Transfer::kCount) return;
    own.normalize(normalizer);
    own.each([&](int tap) { to[tap * kTap + thread] = own.values[tap]; });
  }
};

}  // namespace carafe::gpu

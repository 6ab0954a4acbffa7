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
  kernels->image.units =
      from_logits && is_aligned(map, map.channel_stride, map.row_stride, map.column_stride, G::kPhases);
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

// Moves the kernels of a rectangle of Rows x Columns sites, a thread of `Threads` having one of them, between registers
// and global memory. Kernel i is phase i % phases of site i / phases.
//
// Where channels are neighbours in memory, so are a kernel's taps: neighbouring threads move these, and exchange them
// through shared memory, pixel by pixel: of the masks, with a kernel each, or of the logits, with those of a site, tap
// by tap. Rows are half of the banks apart, for the two rows of phases that a warp reads at once.
template <class G, int Rows, int Columns, int Threads>
struct KernelTransfer {
  static constexpr int kSites = Rows * Columns, kCount = kSites * G::kPhases;
  static constexpr int kElements = kCount * G::kTaps;
  // Of runs that a thread moves, as many at a time as its registers allow.
  template <int Run>
  static constexpr int kRunsAtOnce = std::min((kElements / Run + Threads - 1) / Threads, 25);
  static constexpr int kAtOnce = kRunsAtOnce<1>;
  static constexpr int kRowPadding = G::kUp > 1 ? 16 : 0;
  static constexpr int kExchange = kElements + Rows * G::kUp * kRowPadding;
  static_assert(kCount <= Threads, "a thread has one kernel");

  template <class T>
  static __device__ __forceinline__ T* pointer(
      const KernelMap<T>& kernels, int n, int group, int row, int column, int kernel) {
    const int site = kernel / G::kPhases;
    return kernels.template kernel<G>(n, group, row + site / Columns, column + site % Columns, kernel % G::kPhases);
  }

  // Calls first(e, at, exists, pointer), then second(e, at, exists, pointer), for each of the thread's runs of so many
  // elements, as many at a time as its registers allow: where it lies in shared memory, and in global memory if it
  // exists.
  template <int Run, int Scale, int Channels, class T, class First, class Second>
  static __device__ __forceinline__ void each_run(
      const KernelMap<T>& kernels, T* item, int row, int column, unsigned thread, const First& first,
      const Second& second) {
    static_assert(Channels % Run == 0 && kRowPadding % Run == 0, "runs do not overlap");
    constexpr unsigned kPixel = Channels / Run, kRow = Columns * Scale * kPixel, kRuns = kElements / Run;
    constexpr int kOnce = kRunsAtOnce<Run>;
    const int height = Scale == G::kUp ? kernels.out_height : kernels.rows;
    const int width = Scale == G::kUp ? kernels.out_width : kernels.columns;
    T* const origin = item + kernels.image.offset(0, row * Scale, column * Scale);
    const auto visit = [&](unsigned run, int e, const auto& function) {
      if (kRuns % (kOnce * Threads) != 0 && run >= kRuns) return;
      const int i = static_cast<int>(run / kRow), rest = static_cast<int>(run % kRow);
      const int j = static_cast<int>(static_cast<unsigned>(rest) / kPixel), channel = (rest - j * int(kPixel)) * Run;
      const bool exists = static_cast<unsigned>(row * Scale + i) < static_cast<unsigned>(height) &&
                          static_cast<unsigned>(column * Scale + j) < static_cast<unsigned>(width);
      function(
          e, i * static_cast<int>(kRow * Run + kRowPadding) + rest * Run, exists,
          origin + (i * kernels.image.row_stride + j * kernels.image.column_stride + channel));
    };
    CARAFE_ROLLED
    for (unsigned run = thread; run < kRuns; run += kOnce * Threads) {
      CARAFE_UNROLL
      for (int e = 0; e < kOnce; ++e) visit(run + e * Threads, e, first);
      CARAFE_UNROLL
      for (int e = 0; e < kOnce; ++e) visit(run + e * Threads, e, second);
    }
  }
  template <int Run = 1, class T, class First, class Second>
  static __device__ __forceinline__ void each_element(
      const KernelMap<T>& kernels, int n, int group, int row, int column, unsigned thread, const First& first,
      const Second& second) {
    T* const item = kernels.image.item(n);
    constexpr int kChannels = G::kTaps * G::kPhases;
    if (Run > 1 || (G::kPhases > 1 && kernels.from_logits)) {
      each_run<Run, 1, kChannels>(kernels, item + group * kChannels, row, column, thread, first, second);
    } else if constexpr (Run == 1) {
      each_run<1, G::kUp, G::kTaps>(kernels, item + group * G::kTaps, row, column, thread, first, second);
    }
  }
  template <class Function>
  static __device__ __forceinline__ void by_runs(bool units, const Function& function) {
    if (G::kPhases > 1 && units) {
      function(std::integral_constant<int, G::kPhases>{});
    } else {
      function(std::integral_constant<int, 1>{});
    }
  }
  // The first tap of a kernel in shared memory; the next ones lie `step` on.
  static __device__ __forceinline__ int exchanged(bool from_logits, int kernel, int* step) {
    const int site = kernel / G::kPhases, phase = kernel % G::kPhases, i = site / Columns, j = site % Columns;
    const bool by_site = G::kPhases > 1 && from_logits;
    *step = by_site ? G::kPhases : 1;
    constexpr int kRow = Columns * G::kPhases * G::kTaps + kRowPadding;
    constexpr int kFineRow = Columns * G::kUp * G::kTaps + kRowPadding;
    return by_site ? i * kRow + j * G::kPhases * G::kTaps + phase
                   : (i * G::kUp + phase / G::kUp) * kFineRow + (j * G::kUp + phase % G::kUp) * G::kTaps;
  }

  // Zeros where there is no kernel. `exchange` may be written to again once every thread has come back.
  template <class T>
  static __device__ __forceinline__ OwnKernel<G> load(
      const KernelMap<const T>& kernels, int n, int group, int row, int column, unsigned thread, T* exchange) {
    OwnKernel<G> own = {};
    const int kernel = static_cast<int>(thread);
    if (kernels.image.channels_last) {
      by_runs(kernels.image.units, [&](auto number) {
        constexpr int kRun = decltype(number)::value;
        using Run = Vector<T, kRun>;
        Run runs[kRunsAtOnce<kRun>];
        each_element<kRun>(
            kernels, n, group, row, column, thread,
            [&](int e, int, bool exists, const T* from) { runs[e] = exists ? gpu::load<kRun>(from) : Run{}; },
            [&](int e, int at, bool, const T*) { gpu::store(exchange + at, runs[e]); });
      });
      __syncthreads();
      if (kernel < kCount && pointer(kernels, n, group, row, column, kernel) != nullptr) {
        int step;
        const T* from = exchange + exchanged(kernels.from_logits, kernel, &step);
        own.each([&](int tap) { own.values[tap] = widen(from[tap * step]); });
      }
      __syncthreads();
    } else if (kernel < kCount) {
      const T* from = pointer(kernels, n, group, row, column, kernel);
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
  template <class T>
  static __device__ __forceinline__ void store(
      const KernelMap<T>& kernels, int n, int group, int row, int column, unsigned thread, T* exchange,
      const OwnKernel<G>& own) {
    const int kernel = static_cast<int>(thread);
    if (kernels.image.channels_last) {
      if (kernel < kCount) {
        int step;
        T* const to = exchange + exchanged(kernels.from_logits, kernel, &step);
        own.each([&](int tap) { to[tap * step] = narrow<T>(own.values[tap]); });
      }
      __syncthreads();
      by_runs(kernels.image.units, [&](auto number) {
        constexpr int kRun = decltype(number)::value;
        each_element<kRun>(
            kernels, n, group, row, column, thread, [](int, int, bool, T*) {},
            [&](int, int at, bool exists, T* to) {
              if (exists) gpu::store(to, gpu::load<kRun>(exchange + at));
            });
      });
    } else if (kernel < kCount) {
      T* to = pointer(kernels, n, group, row, column, kernel);
      if (to == nullptr) return;
      own.each([&](int tap) {
        *to = narrow<T>(own.values[tap]);
        to += kernels.tap_stride;
      });
    }
  }
};

// The weights of a rectangle of sites in shared memory: [tap][site of a strip][strip][phase], so that threads that have
// neighbouring strips load from different banks; or, where a site has one, [tap][site].
template <class G, int Rows, int Columns>
struct StagedWeights {
  static constexpr int kSites = Rows * Columns;
  static constexpr int kTap = (kSites * G::kPhases + kQuad - 1) / kQuad * kQuad;
  static constexpr int kApart = G::kPhases > 1 ? kStrip : 1, kSite = kTap / kApart;  // from a strip's site to the next
  using Transfer = KernelTransfer<G, Rows, Columns, kThreads>;  // what it exchanges lies where the weights will
  static constexpr int kSize = std::max(G::kTaps * kTap, (Transfer::kExchange + kQuad - 1) / kQuad * kQuad);

  static __device__ __forceinline__ constexpr int at(int kernel) {
    const int site = kernel / G::kPhases;
    return site % kApart * kSite + site / kApart * G::kPhases + kernel % G::kPhases;
  }

  // Of the sites from (row, column) on; zeros where there is no kernel.
  template <class T>
  static __device__ __forceinline__ void stage(
      const KernelMap<const T>& kernels, Normalizer normalizer, int n, int group, int row, int column, unsigned thread,
      float* to) {
    auto own = Transfer::load(kernels, n, group, row, column, thread, reinterpret_cast<T*>(to));
    if (thread >= Transfer::kCount) return;
    own.normalize(normalizer);
    to += at(static_cast<int>(thread));
    own.each([&](int tap) { to[tap * kTap] = own.values[tap]; });
  }
};

}  // namespace carafe::gpu

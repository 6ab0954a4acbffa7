// The gradient to the weights of a tile, or to the logits that they come from: chunk after chunk of channels passes
// through shared memory, each thread keeping five taps of R phases of a site in registers. At the end the sums meet in
// shared memory, where the normaliser is differentiated and from where neighbours are written by neighbours.
#pragma once

#include "grid.h"

namespace carafe::gpu::general {

template <class T, int R>
struct GradKernelsBlock : Tiled {
  using A = accumulator_t<T>;
  static constexpr int kQuad = Patch::kQuad;
  static constexpr int kPhases = R;            // a thread's
  static constexpr int kTaps = 5;              // a thread's: k = 5 and 7 waste none and one of them
  static constexpr int kChannels = 4 * kQuad;  // of a chunk
  static constexpr int kInFlight = 2;
  static constexpr int kThreads = sizeof(A) == 4 ? 640 : 512;
  static constexpr int kResident = 1;
  static constexpr bool kSplits = false;  // a sum runs over all channels of a group
  struct State {
    A sums[kTaps][R];
  };

  Patch grad_patch;
  KernelView<T> grad;
  View<const T> grad_output, features;
  KernelView<const T> weights;  // the logits; unused without a normalizer

  void view(const GradKernels<T>& call) {
    grad = KernelView<T>::of(call.result, call.kernels.normalizer, call.shape);
    grad_output = View<const T>::of(call.grad_output, call.shape.group_channels());
    features = View<const T>::of(call.features, call.shape.group_channels());
    weights = KernelView<const T>::of(call.kernels.map, call.kernels.normalizer, call.shape);
  }
  void lay_out() {
    const int scale = sites.output_scale();
    patch = feature_patch(kChannels / kQuad);
    grad_patch = {grid.rows, grid.columns, scale, scale, kChannels / kQuad};
  }
  int64_t shared_size() const { return std::max(patch.size() + grad_patch.size(), kernels.size()); }
  int64_t threads() const {
    return int64_t(grid.rows) * grid.columns * ceil_div(sites.taps(), kTaps) * ceil_div(sites.phases(), R);
  }
  static int most_slots(int, bool) { return 1; }

  // Stage and accumulate in turns; gather, differentiate, write.
  CARAFE_HOST_DEVICE int steps() const { return 2 * grid.chunks + 3; }

  CARAFE_HOST_DEVICE void run(const Job& job, int step, int thread, State& state, A* shared) const {
    if (step == 0) state = State{};
    const int chunk = step / 2;
    if (chunk < grid.chunks) {
      step % 2 == 0 ? stage(job, chunk, thread, shared) : accumulate(thread, shared, state);
    } else if (step == 2 * grid.chunks) {
      gather(thread, state, shared);
    } else if (step == 2 * grid.chunks + 1) {
      if (weights.normalizer != Normalizer::none) differentiate(job, thread, shared);
    } else {
      for_each_weight<kInFlight>(
          grad, sites, kernels, job, thread, grid.threads,
          [shared](const Place<T>& place) { return shared[place.shared]; },
          [](const Place<T>& place, A value) {
            if (place.global) *place.global = narrow<T>(value);
          });
    }
  }

 private:
  struct Share {
    int row, column, site, first_tap, first_phase;
  };

  CARAFE_HOST_DEVICE Share share_of(int thread) const {
    const int site = thread % kernels.sites(), rest = thread / kernels.sites();
    const int phase_blocks = kernels.pitch / R;
    return {site / grid.columns, site % grid.columns, site, rest / phase_blocks * kTaps, rest % phase_blocks * R};
  }

  CARAFE_HOST_DEVICE void stage(const Job& job, int chunk, int thread, A* to) const {
    const int done = chunk * kChannels;
    stage_patch<kInFlight>(features, feature_window(job, done), patch, thread, grid.threads, to);
    const Window window = output_window(job, done, 0, 0);
    stage_patch<kInFlight>(grad_output, window, grad_patch, thread, grid.threads, to + patch.size());
  }

  CARAFE_HOST_DEVICE void accumulate(int thread, const A* staged, State& state) const {
    const Share own = share_of(thread);
    int feature[kTaps], gradient[R];  // offsets
    CARAFE_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      const int tap =
          own.first_tap + t < kernels.taps ? own.first_tap + t : own.first_tap;  // what is beyond is not used
      const int u = sites.by_kernel(tap), v = tap - u * sites.kernel;
      const int phase = sites.phase(u) * sites.feature_scale() + sites.phase(v);
      const int row = own.row + sites.before() + sites.shift(u), column = own.column + sites.before() + sites.shift(v);
      feature[t] = phase * patch.plane() + patch.offset(row, column);
    }
    CARAFE_UNROLL
    for (int r = 0; r < R; ++r) {
      const int phase = own.first_phase + r < kernels.phases ? own.first_phase + r : own.first_phase;
      gradient[r] =
          static_cast<int>(patch.size()) + phase * grad_patch.plane() + grad_patch.offset(own.row, own.column);
    }
    CARAFE_ROLLED
    for (int quad = 0; quad < kChannels; quad += kQuad) {
      Quad<A> dy[R];
      CARAFE_UNROLL
      for (int r = 0; r < R; ++r) dy[r] = load_quad(staged + gradient[r] + quad);
      CARAFE_UNROLL
      for (int t = 0; t < kTaps; ++t) {
        const Quad<A> x = load_quad(staged + feature[t] + quad);
        CARAFE_UNROLL
        for (int r = 0; r < R; ++r) {
          CARAFE_UNROLL
          for (int c = 0; c < kQuad; ++c) state.sums[t][r] += x.values[c] * dy[r].values[c];
        }
      }
    }
  }

  CARAFE_HOST_DEVICE void gather(int thread, const State& state, A* to) const {
    const Share own = share_of(thread);
    CARAFE_UNROLL
    for (int t = 0; t < kTaps; ++t) {
      if (own.first_tap + t >= kernels.taps) continue;
      A* const target = to + (own.first_tap + t) * kernels.tap_pitch() + own.site * kernels.pitch + own.first_phase;
      CARAFE_UNROLL
      for (int r = 0; r < R; ++r) target[r] = state.sums[t][r];
    }
  }

  // From weights to logits, in place: dz = w (dw - sum of w dw), times what the normaliser's other factors give.
  CARAFE_HOST_DEVICE void differentiate(const Job& job, int thread, A* sums) const {
    const Normalizer normalizer = weights.normalizer;
    const int step = kernels.tap_pitch();
    const int64_t tap_stride = weights.tap_stride(sites);
    CARAFE_ROLLED
    for (int kernel = thread; kernel < kernels.sites() * kernels.phases; kernel += grid.threads) {
      const int site = kernels.by_phases(kernel), phase = kernel - site * kernels.phases;
      const int row = kernels.by_columns(site), column = site - row * grid.columns;
      if (job.row + row >= sites.rows || job.column + column >= sites.columns) continue;
      const T* const from = weights.pointer(sites, job.n, job.group, 0, phase, job.row + row, job.column + column);
      const auto logit = [&](int tap) { return A(widen(from[tap * tap_stride])); };
      const Statistics<A> common = statistics<A>(normalizer, kernels.taps, logit);
      A* const grad = sums + site * kernels.pitch + phase;
      A dot = 0;
      if (normalizer != Normalizer::sigmoid) {
        CARAFE_ROLLED
        for (int tap = 0; tap < kernels.taps; ++tap) dot += weight(normalizer, logit(tap), common) * grad[tap * step];
      }
      CARAFE_ROLLED
      for (int tap = 0; tap < kernels.taps; ++tap) {
        const A x = logit(tap), w = weight(normalizer, x, common);
        A value = w * (grad[tap * step] - dot);
        if (normalizer != Normalizer::softmax) value *= sigmoid(-x, A(0));  // d sigmoid(x) = sigmoid(x) sigmoid(-x)
        grad[tap * step] = value;
      }
    }
  }
};

}  // namespace carafe::gpu::general

// The gradient to the features of a tile: the weights that lead to its sites are staged once, then the output's
// gradient passes through shared memory, channels by channels and phase row by phase row. A thread keeps four
// neighbouring sites and four channels in registers: what it loads serves all sites that a row of taps leads to.
#pragma once

#include "grid.h"

namespace carafe::gpu::general {

template <class T>
struct GradFeaturesBlock : Tiled {
  using A = accumulator_t<T>;
  static constexpr int kQuad = Patch::kQuad;
  static constexpr int kStrip = 4;  // a thread's sites
  static constexpr int kPhases = 1;
  static constexpr int kChannels = kQuad;  // a slot's
  static constexpr int kThreads = 128;
  static constexpr int kInFlight = 4;  // of few threads
  static constexpr int kResident = sizeof(A) == 4 ? 3 : 1;
  static constexpr bool kSplits = true;
  struct State {
    A sums[kStrip][kQuad];
  };

  View<T> grad;
  View<const T> grad_output;
  KernelView<const T> weights;

  void view(const GradFeatures<T>& call) {
    grad = View<T>::of(call.result, call.shape.group_channels());
    grad_output = View<const T>::of(call.grad_output, call.shape.group_channels());
    weights = KernelView<const T>::of(call.kernels.map, call.kernels.normalizer, call.shape);
  }
  void lay_out() {
    // Both phase columns of a row are staged together: they share the memory's sectors.
    patch = {grid.rows + sites.reach(), grid.columns + sites.reach(), 1, sites.output_scale(), grid.slots};
  }
  int64_t shared_size() const {
    const int64_t statistics = 2 * int64_t(patch.rows) * patch.columns * sites.phases();
    return patch.size() + int64_t(kernels.taps) * kernels.phases * kernels.sites() + statistics;
  }
  int64_t threads() const { return grid.rows * grid.columns / kStrip * grid.slots; }
  // Eight slots read 128 bytes of neighbouring channels without a conflict of banks.
  static int most_slots(int, bool) { return 8; }

  // Statistics, stage; then compute and stage in turns.
  CARAFE_HOST_DEVICE int steps() const { return 2 * grid.chunks * sites.output_scale() + 1; }

  CARAFE_HOST_DEVICE void run(const Job& job, int step, int thread, State& state, A* shared) const {
    A* const staged = shared + patch.size();
    A* const common = staged + kernels.taps * kernels.phases * kernels.sites();
    const int turn = step / 2 - 1;
    if (step == 0) {
      if (weights.normalizer != Normalizer::none) find_statistics(job, thread, common);
    } else if (step == 1) {
      stage_weights(job, thread, common, staged);
      stage_gradient(job, 0, thread, shared);
    } else if (step % 2 == 0) {
      compute(job, turn, thread, staged, shared, state);
    } else {
      stage_gradient(job, turn + 1, thread, shared);
    }
  }

 private:
  // Of all kernels that lead to the tile, those around it included.
  CARAFE_HOST_DEVICE void find_statistics(const Job& job, int thread, A* common) const {
    const int phases = sites.phases(), window = patch.rows * patch.columns;
    const int64_t tap_stride = weights.tap_stride(sites);
    CARAFE_ROLLED
    for (int kernel = thread; kernel < window * phases; kernel += grid.threads) {
      const int phase = patch.by_window(kernel), site = kernel - phase * window;
      const int i = patch.by_columns(site), j = site - i * patch.columns;
      const int row = job.row + i - sites.after(), column = job.column + j - sites.after();
      if (!sites.inside(row, column)) continue;
      const T* const logits = weights.pointer(sites, job.n, job.group, 0, phase, row, column);
      const Statistics<A> found =
          statistics<A>(weights.normalizer, sites.taps(), [&](int tap) { return widen(logits[tap * tap_stride]); });
      common[2 * kernel] = found.shift;
      common[2 * kernel + 1] = found.factor;
    }
  }

  // [tap][phase][site]: the weight with which a phase of the output, a shift away, reads the site.
  CARAFE_HOST_DEVICE void stage_weights(const Job& job, int thread, const A* common, A* to) const {
    const int tile = kernels.sites(), phases = sites.phases();
    const int items = sites.taps() * phases;
    const bool channels_last = weights.view.channels_last;
    struct Shifted {
      int tap, phase, i, j;  // of the tile's rectangle, a shift away
    };
    const auto source = [&](int one, int other) -> Shifted {
      const int site = channels_last ? other : one, item = channels_last ? one : other;
      const int tap = kernels.by_phases(item), u = sites.by_kernel(tap), i = kernels.by_columns(site);
      return {
          tap, item - tap * phases, i - sites.shift(u), site - i * grid.columns - sites.shift(tap - u * sites.kernel)};
    };
    distribute<kInFlight>(
        channels_last ? items : tile, channels_last ? tile : items, thread, grid.threads,
        [&](int one, int other) {
          const Shifted from = source(one, other);
          const int row = job.row + from.i, column = job.column + from.j;
          return sites.inside(row, column) && weights.has(sites, from.phase, row, column)
                     ? *weights.pointer(sites, job.n, job.group, from.tap, from.phase, row, column)
                     : T{};
        },
        [&](int one, int other, T loaded) {
          A value = widen(loaded);
          if (weights.normalizer != Normalizer::none) {
            const Shifted from = source(one, other);
            const int place = patch.by_window.divisor * from.phase + (from.i + sites.after()) * patch.columns + from.j +
                              sites.after();
            // Outside the map there is no kernel, and no gradient either.
            const int row = job.row + from.i, column = job.column + from.j;
            value = sites.inside(row, column)
                        ? weight(weights.normalizer, value, Statistics<A>{common[2 * place], common[2 * place + 1]})
                        : A(0);
          }
          to[(channels_last ? one : other) * tile + (channels_last ? other : one)] = value;
        });
  }

  CARAFE_HOST_DEVICE void stage_gradient(const Job& job, int turn, int thread, A* to) const {
    const int scale = sites.output_scale(), chunk = turn / scale;
    const Window window = output_window(job, chunk * patch.quads * kQuad, sites.after(), turn - chunk * scale);
    stage_patch<kInFlight>(grad_output, window, patch, thread, grid.threads, to);
  }

  CARAFE_HOST_DEVICE void compute(
      const Job& job, int turn, int thread, const A* weights_at, const A* staged, State& state) const {
    const int output_scale = sites.output_scale(), scale = sites.feature_scale();
    const int chunk = turn / output_scale, phase_row = turn - chunk * output_scale;
    const int strip = thread / grid.slots, slot = thread - strip * grid.slots;
    const int row = strip * kStrip / grid.columns, column = strip * kStrip - row * grid.columns;
    const int channel = (chunk * grid.slots + slot) * kQuad;
    if (job.row + row >= sites.height || job.column + column >= sites.width || channel >= job.channels) return;
    // Down, a tap leads to one phase of the features; up, features have one phase, and the sum goes on over the turns.
    CARAFE_ROLLED
    for (int i = 0; i < scale; ++i) {
      CARAFE_ROLLED
      for (int j = 0; j < scale; ++j) {
        if (phase_row == 0) state = State{};
        CARAFE_ROLLED
        for (int phase_column = 0; phase_column < output_scale; ++phase_column) {
          const A* const gradient = staged + phase_column * patch.plane() + slot * kQuad;
          add(weights_at, phase_row * output_scale + phase_column, gradient, strip, row, column, i, j, state);
        }
        if (phase_row == output_scale - 1) write(job, row, column, channel, i, j, state);
      }
    }
  }

  // The shares of one phase of the outputs in phase (phase_row, phase_column) of the strip's features.
  CARAFE_HOST_DEVICE void add(
      const A* weights_at, int output_phase, const A* gradient, int strip, int row, int column, int phase_row,
      int phase_column, State& state) const {
    const int scale = sites.feature_scale(), kernel = sites.kernel, tile = kernels.sites();
    const int first_u = (phase_row + kernel / 2) % scale, first_v = (phase_column + kernel / 2) % scale;
    const int tap_pitch = kernels.phases * tile, next_tap = scale * tap_pitch;
    CARAFE_ROLLED
    for (int u = first_u; u < kernel; u += scale) {
      const A* from = gradient + patch.offset(row + sites.after() - sites.shift(u), column + sites.after());
      const A* weight = weights_at + (u * kernel + first_v) * tap_pitch + output_phase * tile + strip * kStrip;
      // The taps of a row that lead to this phase column: each is one site further to the left than the one before.
      from -= sites.shift(first_v) * patch.pitch();
      CARAFE_ROLLED
      for (int left = (kernel - first_v + scale - 1) / scale; left > 0;) {
        const int taken = left >= 5 ? 5 : left >= 3 ? 3 : left;
        if (taken == 5) add_taps<5>(from, weight, next_tap, state);
        if (taken == 3) add_taps<3>(from, weight, next_tap, state);
        if (taken == 2) add_taps<2>(from, weight, next_tap, state);
        if (taken == 1) add_taps<1>(from, weight, next_tap, state);
        from -= taken * patch.pitch(), weight += taken * next_tap, left -= taken;
      }
    }
  }

  // Tap t of site p meets the gradient p - t sites from the strip's first one: what is loaded once serves all sites.
  template <int Taps>
  CARAFE_HOST_DEVICE void add_taps(const A* from, const A* weight, int next_tap, State& state) const {
    Quad<A> w[Taps];
    CARAFE_UNROLL
    for (int t = 0; t < Taps; ++t) w[t] = load_quad(weight + t * next_tap);
    CARAFE_UNROLL
    for (int s = 1 - Taps; s < kStrip; ++s) {
      const Quad<A> x = load_quad(from + s * patch.pitch());
      CARAFE_UNROLL
      for (int p = 0; p < kStrip; ++p) {
        const int t = p - s;
        if (t < 0 || t >= Taps) continue;
        CARAFE_UNROLL
        for (int c = 0; c < kQuad; ++c) state.sums[p][c] += w[t].values[p] * x.values[c];
      }
    }
  }

  CARAFE_HOST_DEVICE void write(
      const Job& job, int row, int column, int channel, int phase_row, int phase_column, const State& state) const {
    const int scale = sites.feature_scale();
    const int i = (job.row + row) * scale + phase_row, j = (job.column + column) * scale + phase_column;
    const int left = job.channels - channel;
    if (i >= sites.feature_height) return;
    T* const to = grad.map.pointer(job.n, job.first_channel + channel, i, j);
    if (grad.column_quads && scale == 1 && j + kStrip <= sites.feature_width) {
      CARAFE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        if (c >= left) continue;
        Quad<T> packed;
        CARAFE_UNROLL
        for (int p = 0; p < kStrip; ++p) packed.values[p] = narrow<T>(state.sums[p][c]);
        store_quad(to + c * grad.map.channel_stride, packed);
      }
      return;
    }
    CARAFE_UNROLL
    for (int p = 0; p < kStrip; ++p) {
      if (j + p * scale >= sites.feature_width) continue;
      write_quad(grad, to + p * scale * grad.map.column_stride, state.sums[p], left);
    }
  }
};

}  // namespace carafe::gpu::general

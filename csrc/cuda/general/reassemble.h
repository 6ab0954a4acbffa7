// Reassembly of a tile: the weights of its sites are staged once and normalised in place, then chunk after chunk of
// channels passes through shared memory, each thread keeping R phases of a site and eight channels in registers.
#pragma once

#include "grid.h"

namespace carafe::gpu::general {

template <class T, int R>
struct ReassembleBlock : Tiled {
  using A = accumulator_t<T>;
  static constexpr int kPhases = R;                       // of a site, that a thread takes at once
  static constexpr int kQuad = Patch::kQuad, kQuads = 2;  // a thread's channels: two quads, `slots` quads apart
  static constexpr int kChannels = kQuads * kQuad;        // a slot's
  static constexpr int kThreads = 256;
  static constexpr int kInFlight = R == 4 ? 1 : 2;  // as the registers allow
  static constexpr int kResident = sizeof(A) == 4 ? 3 : 1;
  static constexpr bool kSplits = true;  // the channels may be shared out among blocks
  struct State {};                       // nothing outlives a step

  View<T> output;
  View<const T> features;
  KernelView<const T> weights;

  void view(const Reassemble<T>& call) {
    output = View<T>::of(call.result, call.shape.group_channels());
    output.column_pairs = output.column_pairs && call.shape.out_width % 2 == 0;  // the last one may be half wanted
    features = View<const T>::of(call.features, call.shape.group_channels());
    weights = KernelView<const T>::of(call.kernels.map, call.kernels.normalizer, call.shape);
  }
  void lay_out() { patch = feature_patch(kQuads * grid.slots); }
  int64_t shared_size() const { return kernels.size() + patch.size(); }
  int64_t threads() const { return grid.rows * grid.columns * grid.slots; }
  // Eight slots write 128 bytes of neighbouring float32 channels and read as many without a conflict of banks.
  static int most_slots(int tile, bool channels_last) {
    return channels_last ? std::min(8, kThreads / tile) : kThreads / tile;
  }

  // Stage, normalise; then compute and stage in turns.
  CARAFE_HOST_DEVICE int steps() const { return 2 * grid.chunks + 1; }

  CARAFE_HOST_DEVICE void run(const Job& job, int step, int thread, State&, A* shared) const {
    A* const staged = shared + kernels.size();
    if (step == 0) {
      stage_weights(job, thread, shared);
      stage_features(job, 0, thread, staged);
    } else if (step == 1) {
      if (weights.normalizer != Normalizer::none) normalize(thread, shared);
    } else if (step % 2 == 0) {
      compute(job, step / 2 - 1, thread, shared, staged);
    } else {
      stage_features(job, step / 2, thread, staged);
    }
  }

 private:
  CARAFE_HOST_DEVICE void stage_weights(const Job& job, int thread, A* to) const {
    for_each_weight<kInFlight>(
        weights, sites, kernels, job, thread, grid.threads,
        [](const Place<const T>& place) { return place.global ? *place.global : T{}; },
        [to](const Place<const T>& place, T value) { to[place.shared] = widen(value); });
    // What fills the phases up to R is computed with, though not written.
    CARAFE_ROLLED
    for (int phase = kernels.phases; phase < kernels.pitch; ++phase) {
      CARAFE_ROLLED
      for (int item = thread; item < kernels.taps * kernels.sites(); item += grid.threads) {
        const int tap = item / kernels.sites(), site = item - tap * kernels.sites();
        to[tap * kernels.tap_pitch() + site * kernels.pitch + phase] = 0;
      }
    }
  }

  CARAFE_HOST_DEVICE void normalize(int thread, A* staged) const {
    CARAFE_ROLLED
    for (int kernel = thread; kernel < kernels.sites() * kernels.pitch; kernel += grid.threads) {
      A* const logits = staged + kernel;
      const int step = kernels.tap_pitch();
      const Statistics<A> common =
          statistics<A>(weights.normalizer, kernels.taps, [&](int tap) { return logits[tap * step]; });
      CARAFE_ROLLED
      for (int tap = 0; tap < kernels.taps; ++tap) {
        logits[tap * step] = weight(weights.normalizer, logits[tap * step], common);
      }
    }
  }

  CARAFE_HOST_DEVICE void stage_features(const Job& job, int chunk, int thread, A* to) const {
    const Window window = feature_window(job, chunk * patch.quads * kQuad);
    stage_patch<kInFlight>(features, window, patch, thread, grid.threads, to);
  }

  CARAFE_HOST_DEVICE void compute(const Job& job, int chunk, int thread, const A* kernels_at, const A* staged) const {
    // Neighbouring threads write neighbours in memory.
    const int site = output.channels_last ? thread / grid.slots : thread % kernels.sites();
    const int slot = output.channels_last ? thread % grid.slots : thread / kernels.sites();
    const int row = site / grid.columns, column = site % grid.columns;
    if (job.row + row >= sites.rows || job.column + column >= sites.columns) return;
    const int first_channel = (chunk * patch.quads + slot) * kQuad;
    if (first_channel >= job.channels) return;

    const int scale = sites.feature_scale(), plane = patch.plane(), tap_pitch = kernels.tap_pitch();
    const A* const own = staged + patch.offset(row, column) + slot * kQuad;
    // From a tap's column to the next one: to the next phase, or to the first phase of the next site.
    const int next_site = patch.pitch() - (scale - 1) * plane;
    const int first_phase = sites.phase(0), next_quad = grid.slots * kQuad;
    CARAFE_ROLLED
    for (int first = 0; first < kernels.phases; first += R) {
      A sums[R][kQuads * kQuad] = {};
      const A* weight = kernels_at + site * kernels.pitch + first;
      CARAFE_ROLLED
      for (int u = 0; u < sites.kernel; ++u) {
        const int patch_row = sites.shift(u) + sites.before();
        const A* feature = own + sites.phase(u) * scale * plane + patch.offset(patch_row, 0) + first_phase * plane;
        int phase = first_phase;
        CARAFE_ROLLED
        for (int v = 0; v < sites.kernel; ++v, weight += tap_pitch) {
          A w[R];
          if constexpr (R == 4) {
            const Quad<A> quad = load_quad(weight);
            CARAFE_UNROLL
            for (int r = 0; r < R; ++r) w[r] = quad.values[r];
          } else {
            w[0] = weight[0];
          }
          CARAFE_UNROLL
          for (int q = 0; q < kQuads; ++q) {
            const Quad<A> x = load_quad(feature + q * next_quad);
            CARAFE_UNROLL
            for (int r = 0; r < R; ++r) {
              CARAFE_UNROLL
              for (int c = 0; c < kQuad; ++c) sums[r][q * kQuad + c] += w[r] * x.values[c];
            }
          }
          const bool wraps = ++phase == scale;
          feature += wraps ? next_site : plane;
          phase = wraps ? 0 : phase;
        }
      }
      write(job, row, column, first, first_channel, sums);
    }
  }

  CARAFE_HOST_DEVICE void write(
      const Job& job, int row, int column, int first, int first_channel, const A (&sums)[R][kQuads * kQuad]) const {
    const int scale = sites.output_scale();
    CARAFE_UNROLL
    for (int q = 0; q < kQuads; ++q) {
      const int channel = first_channel + q * grid.slots * kQuad, left = job.channels - channel;
      CARAFE_UNROLL
      for (int r = 0; r < R; ++r) {
        const int phase = first + r;
        if (left <= 0 || phase >= scale * scale) continue;
        const int phase_row = sites.by_output_scale(phase), phase_column = phase - phase_row * scale;
        const int i = (job.row + row) * scale + phase_row, j = (job.column + column) * scale + phase_column;
        if (i >= sites.output_height || j >= sites.output_width) continue;
        T* const to = output.map.pointer(job.n, job.first_channel + channel, i, j);
        if (R == 4 && scale == 2 && output.column_pairs) {  // both columns at once
          if (r % 2 == 1) continue;
          CARAFE_UNROLL
          for (int c = 0; c < kQuad; ++c) {
            const A pair[2] = {sums[r][q * kQuad + c], sums[r + 1 < R ? r + 1 : r][q * kQuad + c]};
            if (c < left) write_pair(to + c * output.map.channel_stride, pair);
          }
        } else {
          write_quad(output, to, &sums[r][q * kQuad], left);
        }
      }
    }
  }
};

}  // namespace carafe::gpu::general

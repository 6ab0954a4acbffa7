// The weights of a block's sites in shared memory, staged from masks or from logits.
#pragma once

#include "../normalizer.h"
#include "sites.h"

namespace carafe::gpu::general {

// Statistics of the kernel whose logits are logit(0) .. logit(taps - 1).
template <class A, class Logit>
CARAFE_HOST_DEVICE Statistics<A> statistics(Normalizer normalizer, int taps, const Logit& logit) {
  if (normalizer == Normalizer::none || normalizer == Normalizer::sigmoid) return {A(0), A(1)};
  A largest = logit(0);
  CARAFE_ROLLED
  for (int tap = 1; tap < taps; ++tap) {
    const A value = logit(tap);
    largest = value > largest ? value : largest;
  }
  // The common factor e^-min(largest, 0) keeps a quotient of vanishing sigmoids from becoming 0 / 0.
  const A shift = normalizer == Normalizer::softmax || largest < 0 ? largest : A(0);
  A sum = 0;
  CARAFE_ROLLED
  for (int tap = 0; tap < taps; ++tap) sum += unscaled_weight(normalizer, logit(tap), shift);
  return {shift, quotient(A(1), sum)};
}

// The weights of a call, or their gradient, in global memory. Raw, channel (tap scale + phase row) scale + phase column
// of a site has what lies at a pixel of the masks: the pixel shuffle is an index.
template <class T>
struct KernelView {
  View<T> view;
  bool from_logits;
  Normalizer normalizer;
  int height, width;  // of the map, in pixels

  static KernelView of(const Map<T>& map, Normalizer normalizer, const Shape& shape) {
    const bool from_logits = normalizer != Normalizer::none && shape.up > 1;
    return {
        View<T>::of(map, 1), from_logits, normalizer, static_cast<int>(from_logits ? shape.height : shape.out_height),
        static_cast<int>(from_logits ? shape.width : shape.out_width)};
  }
  CARAFE_HOST_DEVICE int pixels_per_site(const Sites& sites) const { return from_logits ? 1 : sites.output_scale(); }
  CARAFE_HOST_DEVICE int channels_per_tap(const Sites& sites) const { return from_logits ? sites.phases() : 1; }

  // Whether a phase of a site that has outputs has its own, too: where the outputs that are wanted end, not all do.
  CARAFE_HOST_DEVICE bool has(const Sites& sites, int phase, int row, int column) const {
    const int scale = sites.output_scale(), phase_row = sites.by_output_scale(phase);
    return from_logits || (row * scale + phase_row < height && column * scale + phase - phase_row * scale < width);
  }
  // Of phase 0 .. phases - 1 of a site within the map.
  CARAFE_HOST_DEVICE T* pointer(const Sites& sites, int n, int group, int tap, int phase, int row, int column) const {
    const int channel = group * sites.taps() + tap;
    if (from_logits) return view.map.pointer(n, channel * sites.phases() + phase, row, column);
    const int scale = sites.output_scale(), phase_row = sites.by_output_scale(phase);
    return view.map.pointer(n, channel, row * scale + phase_row, column * scale + phase - phase_row * scale);
  }
  CARAFE_HOST_DEVICE int64_t tap_stride(const Sites& sites) const {
    return view.map.channel_stride * channels_per_tap(sites);
  }
};

// How weights lie in shared memory: [tap][site][phase], phases filled up to a multiple of the R that a thread takes at
// once. Four more words a tap keep a column of taps in different banks.
struct KernelLayout {
  int rows = 1, columns = 1;  // sites
  int taps = 1, phases = 1, pitch = 1;
  Divider by_fine_columns;
  Divider by_columns = Divider::by(columns), by_phases = Divider::by(phases);

  static KernelLayout of(const Sites& sites, int rows, int columns, int at_once) {
    const int phases = sites.phases(), pitch = (phases + at_once - 1) / at_once * at_once;
    return {rows, columns, sites.taps(), phases, pitch, Divider::by(columns * sites.output_scale())};
  }
  CARAFE_HOST_DEVICE int sites() const { return rows * columns; }
  CARAFE_HOST_DEVICE int tap_pitch() const { return sites() * pitch + 4; }
  CARAFE_HOST_DEVICE int64_t size() const { return int64_t(taps) * tap_pitch(); }
};

// Calls store(one, other, load(one, other)) for every pair, neighbouring threads with neighbouring ones: as many
// threads as there are ones make a team, and each team takes its share of the others, so that what depends on `one` is
// computed once. A thread issues InFlight loads before it waits for the first of them.
template <int InFlight, class Load, class Store>
CARAFE_HOST_DEVICE void distribute(
    int ones, int others, int thread, int threads, const Load& load, const Store& store) {
  const int team = ones < threads ? ones : threads, teams = threads / team;
  if (thread >= team * teams) return;
  CARAFE_ROLLED
  for (int one = thread % team; one < ones; one += team) {
    CARAFE_ROLLED
    for (int first = thread / team; first < others; first += InFlight * teams) {
      decltype(load(0, 0)) values[InFlight];
      CARAFE_UNROLL
      for (int b = 0; b < InFlight; ++b) {
        if (first + b * teams < others) values[b] = load(one, first + b * teams);
      }
      CARAFE_UNROLL
      for (int b = 0; b < InFlight; ++b) {
        if (first + b * teams < others) store(one, first + b * teams, values[b]);
      }
    }
  }
}

// A weight of a rectangle of sites: where it lies in shared and in global memory (null outside the map).
template <class T>
struct Place {
  int shared;
  T* global;
};

// Calls store(place, load(place)) for every weight of a rectangle of sites within the map.
template <int InFlight, class T, class Load, class Store>
CARAFE_HOST_DEVICE void for_each_weight(
    const KernelView<T>& weights, const Sites& sites, const KernelLayout& kernels, const Job& job, int thread,
    int threads, const Load& load, const Store& store) {
  const int scale = sites.output_scale();
  const int per_site = weights.pixels_per_site(sites), per_tap = weights.channels_per_tap(sites);
  const int columns = kernels.columns * per_site, pixels = kernels.rows * per_site * columns;
  const int channels = kernels.taps * per_tap;
  const bool channels_last = weights.view.channels_last;
  const auto place = [&](int one, int other) -> Place<T> {
    const int channel = channels_last ? one : other, pixel = channels_last ? other : one;
    const int i = weights.from_logits ? kernels.by_columns(pixel) : kernels.by_fine_columns(pixel),
              j = pixel - i * columns;
    const int row = weights.from_logits ? i : sites.by_output_scale(i),
              column = weights.from_logits ? j : sites.by_output_scale(j);
    const int tap = weights.from_logits ? kernels.by_phases(channel) : channel;
    const int phase =
        weights.from_logits ? channel - tap * per_tap : (i - row * per_site) * scale + j - column * per_site;
    const bool inside = job.row * per_site + i < weights.height && job.column * per_site + j < weights.width;
    return {
        tap * kernels.tap_pitch() + (row * kernels.columns + column) * kernels.pitch + phase,
        inside ? weights.view.map.pointer(
                     job.n, job.group * channels + channel, job.row * per_site + i, job.column * per_site + j)
               : nullptr};
  };
  distribute<InFlight>(
      channels_last ? channels : pixels, channels_last ? pixels : channels, thread, threads,
      [&](int one, int other) { return load(place(one, other)); },
      [&](int one, int other, auto value) { store(place(one, other), value); });
}

}  // namespace carafe::gpu::general

// Reassembly, and the gradient to the features of a call that goes down: a thread keeps all phases of two neighbouring
// sites and four channels in registers while the taps pass by.
#pragma once

#include "weights.h"

namespace carafe::gpu {

template <class T>
struct ReassembleCall {
  Image<T> output;
  Image<const T> features;
  KernelMap<const T> kernels;
  Normalizer normalizer;
  Tiling tiling;
};

template <class T, class G>
struct ReassembleTile {
  // A thread's channels: enough for the weights, which it loads for all of them, to be a small part of what it loads.
  static constexpr int kUnits = G::kUp > 1 && sizeof(T) == 4 ? 2 : 1;
  static constexpr int kOfLanes = kLanes * kUnit<T>, kChunk = kUnits * kOfLanes;
  using Patch = Window<
      G::kDown*(kTileRows - 1) + G::kSide, G::kDown*(kTileColumns - 1) + G::kSide, kLanes * kUnits, kUnit<T>,
      kStrip * G::kDown, kBanks<T>>;
  using Weights = StagedWeights<G, kTileRows, kTileColumns>;
  static constexpr int kBytes = Weights::kSize * int(sizeof(float)) + Patch::kSize * int(sizeof(T));
};

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 4) reassemble_tile(const __grid_constant__ ReassembleCall<T> call) {
  using Tile = ReassembleTile<T, G>;
  using Patch = typename Tile::Patch;
  using Weights = typename Tile::Weights;
  constexpr int kPhases = G::kPhases, kUp = G::kUp, kOfLanes = Tile::kOfLanes;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const weights = reinterpret_cast<float*>(shared);
  T* const patch = reinterpret_cast<T*>(weights + Weights::kSize);

  const unsigned thread = threadIdx.x;
  __shared__ Tiling::Job job;  // not in registers, which are scarcer
  if (thread == 0) job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
  __syncthreads();

  Weights::stage(call.kernels, call.normalizer, job.n, job.group, job.row, job.column, thread, weights);
  CARAFE_ROLLED
  for (int done = 0; done < job.channels; done += Tile::kChunk) {
    if (done > 0) __syncthreads();  // the patch has been read
    const int left = job.channels - done, wanted = left > kOfLanes ? Tile::kChunk : kOfLanes;
    stage<Patch, kUnit<T> == 4 ? 8 : 4>(
        call.features, call.features.item(job.n) + (job.first_channel + done) * call.features.channel_stride,
        job.row * G::kDown - G::kRadius, job.column * G::kDown - G::kRadius, left, renew(thread), kThreads, patch,
        wanted);
    __syncthreads();
    const Place place = Place::of(renew(thread), call.output.channels_last);
    const int i = (job.row + place.row) * kUp, j = (job.column + place.column) * kUp;
    const int first = done + place.lane * kUnit<T>;
    if (i >= call.output.height || j >= call.output.width || first >= job.channels) continue;  // to the barriers

    const auto compute = [&](auto units) {
      constexpr int kUnits = decltype(units)::value, kChannels = kUnits * kUnit<T>;
      float sums[kUnits][kUnit<T>][kUp][kStrip * kUp] = {};
      const float* weight = weights + Weights::at((place.row * kTileColumns + place.column) * kPhases);
      const T* pixel = patch + Patch::at(place.row * G::kDown, place.column * G::kDown) + place.lane * kUnit<T>;
      CARAFE_ROLLED
      for (int u = 0; u < G::kSide; ++u, pixel += Patch::kRow, weight += G::kSide * Weights::kTap) {
        // What is loaded of the features serves both sites; of the weights, all channels.
        CARAFE_UNROLL
        for (int x = 0; x < G::kDown * (kStrip - 1) + G::kSide; ++x) {
          Vector<float, kUnit<T>> feature[kUnits];
          CARAFE_UNROLL
          for (int q = 0; q < kUnits; ++q) feature[q] = load_wide<kUnit<T>>(pixel + Patch::at(0, x) + q * kOfLanes);
          CARAFE_UNROLL
          for (int s = 0; s < kStrip; ++s) {
            const int v = x - s * G::kDown;
            if (v < 0 || v >= G::kSide) continue;
            const auto w = load<kPhases>(weight + v * Weights::kTap + Weights::at(s * kPhases));
            CARAFE_UNROLL
            for (int p = 0; p < kPhases; ++p) {
              CARAFE_UNROLL
              for (int c = 0; c < kChannels; ++c) {
                sums[c / kUnit<T>][c % kUnit<T>][p / kUp][s * kUp + p % kUp] +=
                    w.values[p] * feature[c / kUnit<T>].values[c % kUnit<T>];
              }
            }
          }
        }
      }

      CARAFE_UNROLL
      for (int q = 0; q < kUnits; ++q) {
        const int channel = first + q * kOfLanes;
        write_pixels<G::kUp>(
            call.output, call.output.item(job.n) + call.output.offset(job.first_channel + channel, i, j), sums[q],
            job.channels - channel, call.output.height - i, call.output.width - j);
      }
    };
    if (wanted > kOfLanes) {
      compute(std::integral_constant<int, Tile::kUnits>{});
    } else {
      compute(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace carafe::gpu

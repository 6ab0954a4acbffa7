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
  static constexpr int kThreads = kTileSites / kStrip * kLanes<T>;
  static constexpr int kChunk = kLanes<T> * kQuad;
  using Patch = Window<G::kDown*(kTileRows - 1) + G::kSide, G::kDown*(kTileColumns - 1) + G::kSide, kLanes<T>>;
  using Weights = StagedWeights<G, kTileRows, kTileColumns>;
  static constexpr int kBytes = Weights::kSize * int(sizeof(float)) + Patch::kSize * int(sizeof(T));
};

template <class T, class G>
__global__ void __launch_bounds__(ReassembleTile<T, G>::kThreads, 640 / ReassembleTile<T, G>::kThreads)
    reassemble_tile(const __grid_constant__ ReassembleCall<T> call) {
  using Tile = ReassembleTile<T, G>;
  using Patch = typename Tile::Patch;
  using Weights = typename Tile::Weights;
  constexpr int kPhases = G::kPhases, kUp = G::kUp;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const weights = reinterpret_cast<float*>(shared);
  T* const patch = reinterpret_cast<T*>(weights + Weights::kSize);

  const unsigned thread = threadIdx.x;
  const auto job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
  const int lane = thread % kLanes<T>, strip = thread / kLanes<T>;
  const int row = strip / (kTileColumns / kStrip), column = strip % (kTileColumns / kStrip) * kStrip;
  const T* const features = call.features.item(job.n);
  T* const output = call.output.item(job.n);
  const int first_row = job.row * G::kDown - G::kRadius, first_column = job.column * G::kDown - G::kRadius;

  Weights::template stage<Tile::kThreads>(
      call.kernels, call.normalizer, job.n, job.group, job.row, job.column, thread, weights);
  CARAFE_ROLLED
  for (int done = 0; done < job.channels; done += Tile::kChunk) {
    if (done > 0) __syncthreads();  // the patch has been read
    stage<Patch, Tile::kThreads>(
        call.features, features + (job.first_channel + done) * call.features.channel_stride, first_row, first_column,
        job.channels - done, renew(thread), patch);
    __syncthreads();
    const int channel = done + lane * kQuad;
    const int i = (job.row + row) * kUp, j = (job.column + column) * kUp;
    if (i >= call.output.height || j >= call.output.width || channel >= job.channels) continue;

    float sums[kQuad][kUp][kStrip * kUp] = {};
    const float* weight = weights + (row * kTileColumns + column) * kPhases;
    const T* pixel = patch + Patch::at(row * G::kDown, column * G::kDown) + lane * kQuad;
    CARAFE_ROLLED
    for (int u = 0; u < G::kSide; ++u, pixel += Patch::kRow, weight += G::kSide * Weights::kTap) {
      // What is loaded of the features serves both sites; of the weights, all channels.
      CARAFE_UNROLL
      for (int x = 0; x < G::kDown * (kStrip - 1) + G::kSide; ++x) {
        const Quad<float> feature = load_wide(pixel + x * Patch::kPixel);
        CARAFE_UNROLL
        for (int s = 0; s < kStrip; ++s) {
          const int v = x - s * G::kDown;
          if (v < 0 || v >= G::kSide) continue;
          const auto w = load<kPhases>(weight + v * Weights::kTap + s * kPhases);
          CARAFE_UNROLL
          for (int p = 0; p < kPhases; ++p) {
            CARAFE_UNROLL
            for (int c = 0; c < kQuad; ++c) {
              sums[c][p / kUp][s * kUp + p % kUp] += w.values[p] * feature.values[c];
            }
          }
        }
      }
    }

    T* const to = output + call.output.offset(job.first_channel + channel, i, j);
    const int left = call.output.width - j;
    CARAFE_UNROLL
    for (int y = 0; y < kUp; ++y) {
      if (i + y >= call.output.height) continue;
      if (call.output.channels_last) {
        CARAFE_UNROLL
        for (int x = 0; x < kStrip * kUp; ++x) {
          const float values[kQuad] = {sums[0][y][x], sums[1][y][x], sums[2][y][x], sums[3][y][x]};
          if (x < left)
            write_channels(call.output, to + y * call.output.row_stride + x * call.output.column_stride, values);
        }
      } else {
        CARAFE_UNROLL
        for (int c = 0; c < kQuad; ++c) {
          write_run(call.output, to + c * call.output.channel_stride + y * call.output.row_stride, sums[c][y], left);
        }
      }
    }
  }
}

}  // namespace carafe::gpu

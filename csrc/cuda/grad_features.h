// The gradient to the features. Down: as the reassembly, from the tile of the output's gradient that leads to the
// features. Up: a block goes down a strip of the map, row after row of the output's gradient, and a thread keeps the
// K rows of features that the row leads to.
#pragma once

#include "weights.h"

namespace carafe::gpu {

template <class T>
struct GradFeaturesCall {
  Image<T> grad;
  Image<const T> grad_output;
  KernelMap<const T> kernels;
  Normalizer normalizer;
  const float* packed;  // up: the weights (pack_weights)
  Tiling tiling;
};

// Up: the weights of every site, normalised, as [item and group][row][tap][column][phase].
template <class G>
__device__ __forceinline__ int64_t packed_row(const int rows, const int columns, int item, int row) {
  return (int64_t(item) * rows + row) * G::kTaps * columns * G::kPhases;
}

template <class T>
struct PackCall {
  float* packed;
  KernelMap<const T> kernels;
  Normalizer normalizer;
  int groups;
  unsigned blocks_of_row;
};

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 3) pack_weights(const __grid_constant__ PackCall<T> call) {
  using Transfer = KernelTransfer<G, 1, kThreads / G::kPhases, kThreads>;
  __shared__ __align__(16) T exchange[Transfer::kExchange];
  const int columns = call.kernels.columns, rows = call.kernels.rows;
  const unsigned strip = blockIdx.x % call.blocks_of_row, above = blockIdx.x / call.blocks_of_row;
  const int row = static_cast<int>(above % rows), item = static_cast<int>(above / rows);
  const int first = static_cast<int>(strip * (kThreads / G::kPhases));
  auto own = Transfer::load(call.kernels, item / call.groups, item % call.groups, row, first, threadIdx.x, exchange);
  const int at = first * G::kPhases + static_cast<int>(threadIdx.x), pitch = columns * G::kPhases;
  if (at >= pitch) return;
  own.normalize(call.normalizer);
  float* const to = call.packed + packed_row<G>(rows, columns, item, row) + at;
  own.each([&](int tap) { to[tap * pitch] = own.values[tap]; });
}

template <class T, class G>
struct GradFeaturesStrip {
  static constexpr int kColumns = 16, kStripLanes = kThreads * kStrip / kColumns;
  static constexpr int kChunk = kStripLanes * kQuad;
  static constexpr int kSites = kColumns + G::kSide - 1;  // of a row, that lead to the strip
  using Patch = Window<G::kUp, kSites * G::kUp, kStripLanes, kQuad, kStrip * G::kUp, kBanks<T>>;
  // Of a tap's weights: first those of the sites with an even column; the others begin half of the banks on.
  static constexpr int kOdd = (kSites * G::kPhases / 2 + 15) / 32 * 32 + 16, kTap = 2 * kOdd;

  static __device__ __forceinline__ constexpr int at(int site) {
    return site % kStrip * kOdd + site / kStrip * G::kPhases;
  }
  static constexpr int kWeights = G::kTaps * kTap;
  static constexpr int kBytes = kWeights * int(sizeof(float)) + Patch::kSize * int(sizeof(T));
};

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 4)
    grad_features_strip(const __grid_constant__ GradFeaturesCall<T> call, int rows_of_block) {
  using Strip = GradFeaturesStrip<T, G>;
  using Patch = typename Strip::Patch;
  constexpr int kUp = G::kUp, kPhases = G::kPhases, kSide = G::kSide;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const weights = reinterpret_cast<float*>(shared);
  T* const patch = reinterpret_cast<T*>(weights + Strip::kWeights);

  const unsigned thread = threadIdx.x;
  __shared__ Tiling::Job job;  // not in registers, which are scarcer
  if (thread == 0) job = call.tiling.job(blockIdx.x, rows_of_block, Strip::kColumns);
  __syncthreads();
  constexpr unsigned kStrips = Strip::kColumns / kStrip, kStripLanes = Strip::kStripLanes;
  const bool channels_last = call.grad.channels_last;  // as in Place
  const int lane = static_cast<int>(channels_last ? thread % kStripLanes : thread / kStrips);
  const int strip = static_cast<int>(channels_last ? thread / kStripLanes : thread % kStrips) * kStrip;
  const int channel = lane * kQuad, column = job.column + strip;
  const T* const grad_output = call.grad_output.item(job.n) + job.first_channel * call.grad_output.channel_stride;
  T* to = call.grad.item(job.n) + call.grad.offset(job.first_channel + channel, job.row - 2 * G::kRadius, column);
  const int rows = call.kernels.rows, columns = call.kernels.columns;
  const int first_site = job.column - G::kRadius;
  const int end = min(job.row + rows_of_block, call.grad.height);

  float sums[kSide][kQuad][kStrip] = {};  // of the rows from row - radius on
  CARAFE_ROLLED
  for (int row = job.row - G::kRadius; row < end + G::kRadius; ++row) {
    if (row >= 0 && row < rows) {
      if (row > job.row - G::kRadius) __syncthreads();  // what was staged has been read
      const float* const packed = call.packed +
                                  packed_row<G>(rows, columns, job.n * call.tiling.groups + job.group, row) +
                                  first_site * kPhases;
      // A warp has a tap, a thread a site.
      constexpr int kWarps = kThreads / 32, kEach = 7;
      static_assert(Strip::kSites <= 32, "a thread has one");
      const int site = static_cast<int>(renew(thread) % 32), first_tap = static_cast<int>(renew(thread) / 32);
      const bool exists = first_site + site >= 0 && first_site + site < columns;
      const float* from = packed + (first_tap * columns + site) * kPhases;
      CARAFE_ROLLED
      for (int tap = first_tap; site < Strip::kSites && tap < G::kTaps; tap += kEach * kWarps) {
        Vector<float, kPhases> staged[kEach] = {};
        CARAFE_UNROLL
        for (int e = 0; e < kEach; ++e, from += kWarps * columns * kPhases) {
          if (exists && tap + e * kWarps < G::kTaps) staged[e] = load<kPhases>(from);
        }
        CARAFE_UNROLL
        for (int e = 0; e < kEach; ++e) {
          if (tap + e * kWarps < G::kTaps) {
            store_shared(weights + (tap + e * kWarps) * Strip::kTap + Strip::at(site), staged[e]);
          }
        }
      }
      stage<Patch, 8>(
          call.grad_output, grad_output, row * kUp, first_site * kUp, job.channels, renew(thread), kThreads, patch);
      __syncthreads();

      bool leads[kSide];  // to a row of the block's
      CARAFE_UNROLL
      for (int u = 0; u < kSide; ++u) {
        leads[u] = row + u - G::kRadius >= job.row && row + u - G::kRadius < end && channel < job.channels;
      }
      const float* const own_weights = weights + Strip::at(strip);
      const T* const pixels = patch + Patch::at(0, strip * kUp) + channel;
      CARAFE_UNROLL
      for (int x = 0; x < kStrip + kSide - 1; ++x) {  // sites, from radius before the strip on
        Vector<float, kQuad> gradient[kPhases];
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p)
          gradient[p] = load_wide<kQuad>(pixels + Patch::at(p / kUp, x * kUp + p % kUp));
        CARAFE_UNROLL
        for (int u = 0; u < kSide; ++u) {
          if (!leads[u]) continue;
          CARAFE_UNROLL
          for (int s = 0; s < kStrip; ++s) {
            const int v = kSide - 1 - x + s;
            if (v < 0 || v >= kSide) continue;
            const auto w = load<kPhases>(own_weights + (u * kSide + v) * Strip::kTap + Strip::at(x));
            CARAFE_UNROLL
            for (int p = 0; p < kPhases; ++p) {
              CARAFE_UNROLL
              for (int c = 0; c < kQuad; ++c) sums[u][c][s] += w.values[p] * gradient[p].values[c];
            }
          }
        }
      }
    }
    // No later row leads to the first of the rows.
    if (row - G::kRadius >= job.row && row - G::kRadius < end && channel < job.channels) {
      float first[kQuad][1][kStrip];
      CARAFE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        CARAFE_UNROLL
        for (int s = 0; s < kStrip; ++s) first[c][0][s] = sums[0][c][s];
      }
      write_pixels<1>(call.grad, to, first, job.channels - channel, 1, call.grad.width - column);
    }
    to += call.grad.row_stride;
    CARAFE_UNROLL
    for (int u = 0; u < kSide; ++u) {
      CARAFE_UNROLL
      for (int c = 0; c < kQuad; ++c) {
        CARAFE_UNROLL
        for (int s = 0; s < kStrip; ++s) sums[u][c][s] = u + 1 < kSide ? sums[u + 1 < kSide ? u + 1 : u][c][s] : 0;
      }
    }
  }
}

// Down: the sites that lead to a phase of a site lie kBefore before it to kAfter after it.
template <class T, class G>
struct GradFeaturesTile {
  static constexpr int kChunk = kLanes * kUnit<T>;
  static constexpr int kBefore = (G::kSide - 1 - G::kRadius) / G::kDown;
  static constexpr int kAfter = (G::kRadius + G::kDown - 1) / G::kDown;
  static constexpr int kRows = kTileRows + kBefore + kAfter, kColumns = kTileColumns + kBefore + kAfter;
  using Patch = Window<kRows, kColumns, kLanes, kUnit<T>, kStrip, kBanks<T>>;
  using Weights = StagedWeights<G, kRows, kColumns>;
  static constexpr int kBytes = Weights::kSize * int(sizeof(float)) + Patch::kSize * int(sizeof(T));
};

template <class T, class G>
__global__ void __launch_bounds__(kThreads, 4) grad_features_tile(const __grid_constant__ GradFeaturesCall<T> call) {
  using Tile = GradFeaturesTile<T, G>;
  using Patch = typename Tile::Patch;
  using Weights = typename Tile::Weights;
  constexpr int kDown = G::kDown, kReach = Tile::kBefore + Tile::kAfter, kChannels = kUnit<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  float* const weights = reinterpret_cast<float*>(shared);
  T* const patch = reinterpret_cast<T*>(weights + Weights::kSize);

  const unsigned thread = threadIdx.x;
  __shared__ Tiling::Job job;  // not in registers, which are scarcer
  if (thread == 0) job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
  __syncthreads();
  const auto [row, column, lane] = Place::of(thread, call.grad.channels_last);
  const T* const grad_output = call.grad_output.item(job.n);
  T* const grad = call.grad.item(job.n);
  const int first_row = job.row - Tile::kBefore, first_column = job.column - Tile::kBefore;

  Weights::stage(call.kernels, call.normalizer, job.n, job.group, first_row, first_column, thread, weights);
  CARAFE_ROLLED
  for (int done = 0; done < job.channels; done += Tile::kChunk) {
    if (done > 0) __syncthreads();  // the patch has been read
    stage<Patch, kUnit<T> == 4 ? 4 : 2>(
        call.grad_output, grad_output + (job.first_channel + done) * call.grad_output.channel_stride, first_row,
        first_column, job.channels - done, renew(thread), kThreads, patch);
    __syncthreads();
    const int channel = done + lane * kChannels;
    const int i = (job.row + row) * kDown, j = (job.column + column) * kDown;
    if (i < call.grad.height && j < call.grad.width && channel < job.channels) {  // every thread comes to the barriers

      float sums[kChannels][kDown][kStrip * kDown] = {};
      const float* const own_weights = weights + row * Tile::kColumns + column;
      const T* const pixels = patch + Patch::at(row, column) + lane * kChannels;
      CARAFE_UNROLL
      for (int y = 0; y <= kReach; ++y) {
        CARAFE_UNROLL
        for (int x = 0; x < kReach + kStrip; ++x) {
          const auto gradient = load_wide<kChannels>(pixels + Patch::at(y, x));
          CARAFE_UNROLL
          for (int p = 0; p < kDown; ++p) {
            // Feature p of a site is tap u of the output that lies `y - before` sites further on.
            const int u = p - (y - Tile::kBefore) * kDown + G::kRadius;
            if (u < 0 || u >= G::kSide) continue;
            CARAFE_UNROLL
            for (int q = 0; q < kStrip * kDown; ++q) {
              const int v = q - (x - Tile::kBefore) * kDown + G::kRadius;
              if (v < 0 || v >= G::kSide) continue;
              const float w = own_weights[(u * G::kSide + v) * Weights::kTap + y * Tile::kColumns + x];
              CARAFE_UNROLL
              for (int c = 0; c < kChannels; ++c) sums[c][p][q] += w * gradient.values[c];
            }
          }
        }
      }
      write_pixels<kDown>(
          call.grad, grad + call.grad.offset(job.first_channel + channel, i, j), sums, job.channels - channel,
          call.grad.height - i, call.grad.width - j);
    }
  }
}

}  // namespace carafe::gpu

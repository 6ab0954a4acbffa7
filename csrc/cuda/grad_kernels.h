// The gradient to the weights of a tile, or to the logits that they come from. A warp has a row of taps: a thread of it
// keeps those of two neighbouring sites, in all phases, while half of the channels pass by. Where the
// channels are split among blocks, their sums meet in a second pass, always in the same order.
#pragma once

#include "weights.h"

namespace carafe::gpu {

template <class T>
struct GradKernelsCall {
  KernelMap<T> grad;
  Image<const T> grad_output, features;
  KernelMap<const T> kernels;  // the logits; unused without a normalizer
  Normalizer normalizer;
  float* partial;  // of blocks that have a share of the channels: [split][item and group][row][tap][column][phase]
  Tiling tiling;
};

template <class T, class G>
struct GradKernelsTile {
  static constexpr int kParts = 2;  // threads that share the channels of a strip of sites
  static constexpr int kRowThreads = kTileSites / kStrip * kParts;  // of a row of taps: a warp
  // At the end a thread has a kernel.
  static constexpr int kThreads = std::max(kRowThreads * G::kSide, kTileSites* G::kPhases);
  static constexpr int kResident = 640 / kThreads;  // blocks of a multiprocessor
  static constexpr int kQuads = 128 / (kQuad * sizeof(T)), kChunk = kQuads * kQuad;
  using Patch = Window<
      G::kDown*(kTileRows - 1) + G::kSide, G::kDown*(kTileColumns - 1) + G::kSide, kQuads, kQuad, kStrip * G::kDown,
      kBanks<T>>;
  using GradPatch = Window<kTileRows * G::kUp, kTileColumns * G::kUp, kQuads, kQuad, kStrip * G::kUp, kBanks<T>>;
  using Sums = StagedWeights<G, kTileRows, kTileColumns>;
  static constexpr int kStaged = (Patch::kSize + GradPatch::kSize) * int(sizeof(T));
  static constexpr int kMeeting = G::kTaps * Sums::kTap * int(sizeof(float));
  using Transfer = KernelTransfer<G, kTileRows, kTileColumns, kThreads>;
  static constexpr int kExchanged = Transfer::kExchange * int(sizeof(T));
  static constexpr int kBytes = kStaged > kMeeting + kExchanged ? kStaged : kMeeting + kExchanged;
};

// From the gradient to a kernel's weights to that of its logits, in place; logits of no kernel are null.
template <class G, class T>
__device__ __forceinline__ void differentiate(
    Normalizer normalizer, const OwnKernel<G>& weights, const T* logits, int tap_stride, OwnKernel<G>& grad) {
  float dot = 0;  // d logit = w (d w - sum of w d w), times what the sigmoid's factor gives
  grad.each([&](int tap) { dot += weights.values[tap] * grad.values[tap]; });
  if (normalizer == Normalizer::sigmoid) dot = 0;
  grad.each([&](int tap) { grad.values[tap] = weights.values[tap] * (grad.values[tap] - dot); });
  if (normalizer == Normalizer::softmax || logits == nullptr) return;
  grad.each([&](int tap) {  // d log(sigmoid(x)) = sigmoid(-x)
    grad.values[tap] *= exponential(log_sigmoid(-widen(logits[tap * tap_stride])));
  });
}

// Writes the gradient to a rectangle of kernels, what add(kernel, grad) adds to zeros for each.
template <class Transfer, class G, class T, class Add>
__device__ __forceinline__ void finish_kernels(
    const GradKernelsCall<T>& call, int n, int group, int row, int column, unsigned thread, T* exchange,
    const Add& add) {
  OwnKernel<G> weights = {}, grad = {};
  if (call.normalizer != Normalizer::none) {
    weights = Transfer::load(call.kernels, n, group, row, column, thread, exchange);
    weights.normalize(call.normalizer);
  }
  if (thread < Transfer::kCount) {
    add(static_cast<int>(thread), grad);
    if (call.normalizer != Normalizer::none) {
      const T* const logits = Transfer::pointer(call.kernels, n, group, row, column, static_cast<int>(thread));
      differentiate(call.normalizer, weights, logits, call.kernels.tap_stride, grad);
    }
  }
  Transfer::store(call.grad, n, group, row, column, thread, exchange, grad);
}

template <class T, class G>
__global__ void __launch_bounds__(GradKernelsTile<T, G>::kThreads, GradKernelsTile<T, G>::kResident)
    grad_kernels_tile(const __grid_constant__ GradKernelsCall<T> call) {
  using Tile = GradKernelsTile<T, G>;
  using Patch = typename Tile::Patch;
  using GradPatch = typename Tile::GradPatch;
  using Sums = typename Tile::Sums;
  constexpr int kUp = G::kUp, kDown = G::kDown, kPhases = G::kPhases, kSide = G::kSide;
  constexpr int kAtOnce = sizeof(T) == 4 || kSide == 7 ? 4 : 8;  // as registers allow
  extern __shared__ __align__(16) unsigned char shared[];
  T* const patch = reinterpret_cast<T*>(shared);
  T* const grad_patch = patch + Patch::kSize;

  const unsigned thread = threadIdx.x;
  __shared__ Tiling::Job job;  // not in registers, which are scarcer
  if (thread == 0) job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
  __syncthreads();
  // A warp reads eight strips of a row at once, and with halves of both parts.
  static_assert(kTileColumns / kStrip == 8 && Tile::kParts == 2 && kTileRows == 2);
  const int column = thread % 8 * kStrip, part = thread / 8 % 2, row = thread / 16 % 2;
  const int u = thread / Tile::kRowThreads;
  const bool has_row = u < kSide;
  const T* const features = call.features.item(job.n);
  const T* const grad_output = call.grad_output.item(job.n);

  float sums[kStrip][kSide][kPhases] = {};
  const T* const pixels = patch + Patch::at(row * kDown + u, column * kDown) + part * (Tile::kChunk / Tile::kParts);
  const T* const gradients = grad_patch + GradPatch::at(row * kUp, column * kUp) + part * (Tile::kChunk / Tile::kParts);
  CARAFE_ROLLED
  for (int done = 0; done < job.channels; done += Tile::kChunk) {
    if (done > 0) __syncthreads();  // what was staged has been read
    const int channel = job.first_channel + done, left = job.channels - done;
    stage<Patch, kAtOnce>(
        call.features, features + channel * call.features.channel_stride, job.row * kDown - G::kRadius,
        job.column * kDown - G::kRadius, left, renew(thread), Tile::kThreads, patch);
    stage<GradPatch, kAtOnce>(
        call.grad_output, grad_output + channel * call.grad_output.channel_stride, job.row * kUp, job.column * kUp,
        left, renew(thread), Tile::kThreads, grad_patch);
    __syncthreads();
    CARAFE_ROLLED
    for (int quad = 0; quad < (has_row ? Tile::kChunk / Tile::kParts : 0); quad += kQuad) {
      constexpr int kFeatures = kDown * (kStrip - 1) + kSide;
      Vector<float, kQuad> feature[kFeatures];
      CARAFE_UNROLL
      for (int x = 0; x < kFeatures; ++x) feature[x] = load_wide<kQuad>(pixels + quad + Patch::at(0, x));
      CARAFE_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p) {
          const auto gradient = load_wide<kQuad>(gradients + quad + GradPatch::at(p / kUp, s * kUp + p % kUp));
          CARAFE_UNROLL
          for (int v = 0; v < kSide; ++v) {
            CARAFE_UNROLL
            for (int c = 0; c < kQuad; ++c) {
              sums[s][v][p] += gradient.values[c] * feature[s * kDown + v].values[c];
            }
          }
        }
      }
    }
  }
  CARAFE_UNROLL
  for (int s = 0; s < kStrip; ++s) {
    CARAFE_UNROLL
    for (int v = 0; v < kSide; ++v) {
      CARAFE_UNROLL
      for (int p = 0; p < kPhases; ++p) sums[s][v][p] += __shfl_xor_sync(~0u, sums[s][v][p], 8);
    }
  }

  // Of the first `left` sites; `to`: the first tap, `pitch` from the next; `site` from a site to the next.
  const auto write = [&](float* to, int pitch, int site, int left) {
    CARAFE_UNROLL
    for (int v = 0; v < kSide; ++v, to += pitch) {
      CARAFE_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        Vector<float, kPhases> own;
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p) own.values[p] = sums[s][v][p];
        if (s < left) store(to + s * site, own);
      }
    }
  };
  const bool writes = part == 0 && has_row;
  if (call.partial != nullptr) {
    const int rows = call.tiling.rows, columns = call.tiling.columns;
    const int64_t item = int64_t(job.split) * call.tiling.items + job.n * call.tiling.groups + job.group;
    const int i = job.row + row, j = job.column + column, pitch = columns * kPhases;
    float* const to = call.partial + ((item * rows + i) * G::kTaps + u * kSide) * pitch + j * kPhases;
    if (writes && i < rows) write(to, pitch, kPhases, columns - j);
    return;
  }

  __syncthreads();  // what was staged has been read
  float* const meeting = reinterpret_cast<float*>(shared);
  if (writes) {
    write(
        meeting + u * kSide * Sums::kTap + Sums::at((row * kTileColumns + column) * kPhases), Sums::kTap,
        Sums::at(kPhases), kStrip);
  }
  __syncthreads();
  finish_kernels<typename Tile::Transfer, G>(
      call, job.n, job.group, job.row, job.column, renew(thread), reinterpret_cast<T*>(meeting + G::kTaps * Sums::kTap),
      [&](int kernel, OwnKernel<G>& grad) {
        grad.each([&](int tap) { grad.values[tap] += meeting[tap * Sums::kTap + Sums::at(kernel)]; });
      });
}

// The second pass: a thread adds the splits' sums of a kernel. Small blocks, of which a small map has enough.
constexpr int kFinishThreads = 64;
template <class T, class G>
__global__ void __launch_bounds__(kFinishThreads, G::kSide == 7 ? 5 : 8)
    finish_splits(const __grid_constant__ GradKernelsCall<T> call, unsigned blocks_of_row) {
  using Transfer = KernelTransfer<G, 1, kFinishThreads / G::kPhases, kFinishThreads>;
  __shared__ __align__(16) T exchange[Transfer::kExchange];
  const int rows = call.tiling.rows, pitch = call.tiling.columns * G::kPhases;
  const unsigned strip = blockIdx.x % blocks_of_row, above = blockIdx.x / blocks_of_row;
  const int row = static_cast<int>(above % rows), item = static_cast<int>(above / rows);
  const int first = static_cast<int>(strip) * Transfer::kSites;
  finish_kernels<Transfer, G>(
      call, item / call.tiling.groups, item % call.tiling.groups, row, first, threadIdx.x, exchange,
      [&](int kernel, OwnKernel<G>& grad) {
        if (first * G::kPhases + kernel >= pitch) return;
        const float* at = call.partial + (int64_t(item) * rows + row) * G::kTaps * pitch + first * G::kPhases + kernel;
        CARAFE_ROLLED
        for (int s = 0; s < call.tiling.splits; ++s) {
          grad.each([&](int tap) { grad.values[tap] += at[tap * pitch]; });
          at += int64_t(call.tiling.items) * rows * G::kTaps * pitch;
        }
      });
}

}  // namespace carafe::gpu

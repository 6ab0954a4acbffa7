// The gradient to the weights of a tile, or to the logits that they come from. A warp has a row of taps: a thread of it
// keeps those of two neighbouring sites, in all phases, while every other quad of the channels passes by. Where the
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
  static constexpr int kThreads = kTileSites / kStrip * kParts * G::kSide;
  static constexpr int kResident = 640 / kThreads;  // blocks of a multiprocessor
  static constexpr int kChunk = kLanes<T> * kQuad;
  // Rows apart so that the quads that a warp reads at once lie in different banks: float32 reads eight at once, which
  // belong to four strips of a row; half precision sixteen, of two rows.
  static constexpr int row_padding(int columns) {
    const int row = columns * (kLanes<T> + 1);
    return sizeof(T) == 2 ? (24 - row % 16) % 16 : 0;
  }
  static constexpr int kRows = G::kDown * (kTileRows - 1) + G::kSide;
  static constexpr int kColumns = G::kDown * (kTileColumns - 1) + G::kSide;
  using Patch = Window<kRows, kColumns, kLanes<T>, G::kDown, row_padding((kColumns + G::kDown - 1) / G::kDown)>;
  using GradPatch = Window<kTileRows * G::kUp, kTileColumns * G::kUp, kLanes<T>, G::kUp, row_padding(kTileColumns)>;
  using Sums = StagedWeights<G, kTileRows, kTileColumns>;
  static constexpr int kStaged = (Patch::kSize + GradPatch::kSize) * int(sizeof(T));
  static constexpr int kBytes = kStaged > Sums::kSize* int(sizeof(float)) ? kStaged : Sums::kSize* int(sizeof(float));
};

// From the gradient to a kernel's weights, sum(tap), to the result, which `to` points at: to its logits, or to itself.
template <class G, int Lanes, class T, class Sum>
__device__ __forceinline__ void finish_kernel(
    const OwnKernel<G, Lanes>& weights, const T* logits, int logit_stride, Normalizer normalizer, int lane,
    const Sum& sum, T* to, int tap_stride) {
  float dot = 0;  // d logit = w (d w - sum of w d w), times what the normaliser's other factors give
  if (normalizer == Normalizer::softmax || normalizer == Normalizer::sigmoid_normalized) {
    weights.each(lane, [&](int i, int tap) { dot += weights.values[i] * sum(tap); });
    dot = weights.combine(dot, [](float a, float b) { return a + b; });
  }
  if (to == nullptr) return;
  if (normalizer == Normalizer::none) {
    weights.each(lane, [&](int, int tap) { to[tap * tap_stride] = narrow<T>(sum(tap)); });
  } else if (normalizer == Normalizer::softmax) {
    weights.each(lane, [&](int i, int tap) { to[tap * tap_stride] = narrow<T>(weights.values[i] * (sum(tap) - dot)); });
  } else {
    weights.each(lane, [&](int i, int tap) {
      const float slope = sigmoid(-widen(logits[tap * logit_stride]), 0.0f);  // d sigmoid(x) = sigmoid(x) sigmoid(-x)
      to[tap * tap_stride] = narrow<T>(weights.values[i] * (sum(tap) - dot) * slope);
    });
  }
}

// For `Count` kernels: kernel(i, &row, &column, &phase) says which, sum(i, tap) what the gradient to its weights is.
template <class G, int Count, int Threads, class T, class Kernel, class Sum>
__device__ __forceinline__ void finish_kernels(
    const GradKernelsCall<T>& call, int n, int group, unsigned thread, const Kernel& which, const Sum& sum) {
  const auto finish = [&](auto lanes) {
    constexpr int kTapsLanes = decltype(lanes)::value;
    const auto pointer = [&](const auto& map, int kernel) {
      int row, column, phase;
      which(kernel, &row, &column, &phase);
      return map.template kernel<G>(n, group, row, column, phase);
    };
    const auto logits = [&](int kernel) -> const T* {
      return call.normalizer == Normalizer::none ? nullptr : pointer(call.kernels, kernel);
    };
    for_each_kernel<G, kTapsLanes, Count, Threads>(
        thread, call.kernels.tap_stride, call.normalizer, logits, [&](const auto& own, int kernel, int lane) {
          finish_kernel<G, kTapsLanes, T>(
              own, logits(kernel), call.kernels.tap_stride, call.normalizer, lane,
              [&](int tap) { return sum(kernel, tap); }, pointer(call.grad, kernel), call.grad.tap_stride);
        });
  };
  if (call.grad.image.channels_last) {
    finish(std::integral_constant<int, kTapLanes>{});
  } else {
    finish(std::integral_constant<int, 1>{});
  }
}

template <class T, class G>
__global__ void __launch_bounds__(GradKernelsTile<T, G>::kThreads, GradKernelsTile<T, G>::kResident)
    grad_kernels_tile(const __grid_constant__ GradKernelsCall<T> call) {
  using Tile = GradKernelsTile<T, G>;
  using Patch = typename Tile::Patch;
  using GradPatch = typename Tile::GradPatch;
  using Sums = typename Tile::Sums;
  constexpr int kUp = G::kUp, kDown = G::kDown, kPhases = G::kPhases, kSide = G::kSide;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const patch = reinterpret_cast<T*>(shared);
  T* const grad_patch = patch + Patch::kSize;

  const unsigned thread = threadIdx.x;
  const auto job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
  const int part = thread % Tile::kParts, strip = thread / Tile::kParts % (kTileSites / kStrip);
  const int u = thread / 32;
  const int row = strip / (kTileColumns / kStrip), column = strip % (kTileColumns / kStrip) * kStrip;
  const T* const features = call.features.item(job.n);
  const T* const grad_output = call.grad_output.item(job.n);

  float sums[kStrip][kSide][kPhases] = {};
  const T* const pixels = patch + Patch::at(row * kDown + u, column * kDown) + part * kQuad;
  const T* const gradients = grad_patch + GradPatch::at(row * kUp, column * kUp) + part * kQuad;
  CARAFE_ROLLED
  for (int done = 0; done < job.channels; done += Tile::kChunk) {
    if (done > 0) __syncthreads();  // what was staged has been read
    const int channel = job.first_channel + done, left = job.channels - done;
    stage<Patch, Tile::kThreads>(
        call.features, features + channel * call.features.channel_stride, job.row * kDown - G::kRadius,
        job.column * kDown - G::kRadius, left, renew(thread), patch);
    stage<GradPatch, Tile::kThreads>(
        call.grad_output, grad_output + channel * call.grad_output.channel_stride, job.row * kUp, job.column * kUp,
        left, renew(thread), grad_patch);
    __syncthreads();
    CARAFE_ROLLED
    for (int quad = 0; quad < kLanes<T> * kQuad; quad += Tile::kParts * kQuad) {
      constexpr int kFeatures = kDown * (kStrip - 1) + kSide;
      Quad<float> feature[kFeatures];
      CARAFE_UNROLL
      for (int x = 0; x < kFeatures; ++x) feature[x] = load_wide(pixels + quad + Patch::at(0, x));
      CARAFE_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p) {
          const Quad<float> gradient = load_wide(gradients + quad + GradPatch::at(p / kUp, s * kUp + p % kUp));
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
      for (int p = 0; p < kPhases; ++p) sums[s][v][p] += __shfl_xor_sync(~0u, sums[s][v][p], 1);
    }
  }

  const int rows = call.tiling.rows, columns = call.tiling.columns;
  if (call.partial != nullptr) {
    const int64_t item = int64_t(job.split) * call.tiling.items + job.n * call.tiling.groups + job.group;
    const int i = job.row + row, j = job.column + column;
    float* const to = call.partial + ((item * rows + i) * G::kTaps + u * kSide) * columns * kPhases + j * kPhases;
    if (part != 0 || i >= rows) return;
    CARAFE_UNROLL
    for (int v = 0; v < kSide; ++v) {
      CARAFE_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        Vector<float, kPhases> own;
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p) own.values[p] = sums[s][v][p];
        if (j + s < columns) store(to + (v * columns + s) * kPhases, own);
      }
    }
    return;
  }

  __syncthreads();  // what was staged has been read
  float* const meeting = reinterpret_cast<float*>(shared);
  if (part == 0) {
    CARAFE_UNROLL
    for (int v = 0; v < kSide; ++v) {
      CARAFE_UNROLL
      for (int s = 0; s < kStrip; ++s) {
        Vector<float, kPhases> own;
        CARAFE_UNROLL
        for (int p = 0; p < kPhases; ++p) own.values[p] = sums[s][v][p];
        store(meeting + (u * kSide + v) * Sums::kTap + (row * kTileColumns + column + s) * kPhases, own);
      }
    }
  }
  __syncthreads();
  finish_kernels<G, kTileSites * kPhases, Tile::kThreads>(
      call, job.n, job.group, renew(thread),
      [&](int kernel, int* i, int* j, int* phase) {
        const int site = kernel / kPhases;
        *i = job.row + site / kTileColumns, *j = job.column + site % kTileColumns, *phase = kernel % kPhases;
      },
      [&](int kernel, int tap) { return meeting[tap * Sums::kTap + kernel]; });
}

constexpr int kFinishThreads = 128;

// The second pass: a thread adds the splits' sums of a kernel.
template <class T, class G>
__global__ void __launch_bounds__(kFinishThreads)
    finish_splits(const __grid_constant__ GradKernelsCall<T> call, unsigned blocks_of_row) {
  const int rows = call.tiling.rows, columns = call.tiling.columns;
  const unsigned strip = blockIdx.x % blocks_of_row, above = blockIdx.x / blocks_of_row;
  const int row = static_cast<int>(above % rows), item = static_cast<int>(above / rows);
  const int first = static_cast<int>(strip) * kFinishThreads;
  const int64_t split = int64_t(call.tiling.items) * rows * G::kTaps * columns * G::kPhases;
  const float* const from = call.partial + (int64_t(item) * rows + row) * G::kTaps * columns * G::kPhases + first;
  finish_kernels<G, kFinishThreads, kFinishThreads>(
      call, item / call.tiling.groups, item % call.tiling.groups, threadIdx.x,
      [&](int kernel, int* i, int* j, int* phase) {
        *i = row, *j = (first + kernel) / G::kPhases, *phase = (first + kernel) % G::kPhases;
      },
      [&](int kernel, int tap) {
        float sum = 0;
        if (first + kernel >= columns * G::kPhases) return sum;
        const float* at = from + tap * columns * G::kPhases + kernel;
        CARAFE_ROLLED
        for (int s = 0; s < call.tiling.splits; ++s, at += split) sum += *at;
        return sum;
      });
}

}  // namespace carafe::gpu

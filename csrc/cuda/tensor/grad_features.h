// The gradient to the features, going up, on tensor cores: a block goes down a strip of the map, row after row of the
// output's gradient; a warp keeps the K rows of features that a row leads to, of 16 channels and 8 columns:
//
//     sums[u][channel][column] += gradient[channel][site, phase] x weights of tap row u[site, phase][column]
#pragma once

#include "../weights.h"
#include "fragments.h"

namespace carafe::gpu::tensor {

// The weights of a row of sites, normalised and rounded to T, in the order in which a warp multiplies with them, for
// each `kColumns` columns of features. The thread of column g and t = lane % 4 has, of tap row u, the sites whose number
// is t modulo 4: the first and the second of them that lead to its column, in all phases.
template <class G>
struct Packed {
  static constexpr int kColumns = 8;
  static constexpr int kPhases = G::kPhases, kSide = G::kSide;
  static constexpr int kPad = (G::kRadius + 1) / 2 * 2;   // sites that are staged before the first column, and after
  static constexpr int kSites = kColumns + 2 * kPad;      // the last
  static constexpr int kSteps = kSites / 4;               // products: of four sites each
  static constexpr int kBefore = kPad - G::kRadius;       // of these lead to no column
  static constexpr int kSeconds = kSide <= 4 ? 0 : kSide == 5 ? 8 : 32;  // threads that have a second one
  static constexpr int kFirstRow = 32 * kPhases, kSecondRow = kSeconds * kPhases;
  static constexpr int kSize = kSide * (kFirstRow + kSecondRow);

  // Where the weights of tap (u, K - 1 - i), which join column g, lie: the i-th site that leads to it.
  static __device__ __forceinline__ constexpr int at(int u, int i, int g) {
    const int lane = 4 * g + (g + kBefore + i) % 4;
    return i < 4 ? u * kFirstRow + lane * kPhases
                 : kSide * kFirstRow + u * kSecondRow + (kSeconds == 8 ? g : lane) * kPhases;
  }
};

template <class T>
struct PackCall {
  T* packed;
  KernelMap<const T> kernels;
  Normalizer normalizer;
  int groups;
  int tiles;  // of Packed::kColumns columns, of a row
  unsigned blocks_of_row;
};

constexpr int kPackTiles = 3;  // of a block: as many as have at most 32 sites that lead to them

// Packs as [item and group][row][tile].
template <class T, class G>
__global__ void __launch_bounds__(kThreads, 3) pack_weights(const __grid_constant__ PackCall<T> call) {
  using Packed = tensor::Packed<G>;
  using Transfer = KernelTransfer<G, 1, kThreads / G::kPhases, kThreads>;
  constexpr int kColumns = kPackTiles * Packed::kColumns, kSide = G::kSide;
  static_assert(kColumns + kSide - 1 <= int(kThreads) / G::kPhases, "a thread has one kernel");
  constexpr int kPacked = kPackTiles * Packed::kSize, kExchange = Transfer::kExchange;
  constexpr int kShared = kExchange > kPacked ? kExchange : kPacked;
  __shared__ __align__(16) T shared[kShared];
  const unsigned thread = threadIdx.x;
  const int rows = call.kernels.rows;
  const unsigned above = blockIdx.x / call.blocks_of_row;
  const int tile = static_cast<int>(blockIdx.x % call.blocks_of_row) * kPackTiles;
  const int row = static_cast<int>(above % rows), item = static_cast<int>(above / rows);
  const int first = tile * Packed::kColumns - G::kRadius;
  auto own = Transfer::load(call.kernels, item / call.groups, item % call.groups, row, first, thread, shared);
  own.normalize(call.normalizer);
  const int site = static_cast<int>(thread) / G::kPhases, phase = static_cast<int>(thread) % G::kPhases;
  CARAFE_UNROLL
  for (int v = 0; v < kSide; ++v) {
    const int column = site + v - 2 * G::kRadius, g = column % Packed::kColumns;
    if (column < 0 || column >= kColumns) continue;
    T* const to = shared + column / Packed::kColumns * Packed::kSize + phase;
    CARAFE_UNROLL
    for (int u = 0; u < kSide; ++u) {
      to[Packed::at(u, kSide - 1 - v, g)] = narrow<T>(own.values[u * kSide + v]);
    }
  }
  if constexpr (kSide % 4 == 3) {  // a thread of each four has a site less
    for (unsigned i = thread; i < kColumns * kSide; i += kThreads) {
      const int column = static_cast<int>(i) % kColumns, u = static_cast<int>(i) / kColumns;
      store(
          shared + column / Packed::kColumns * Packed::kSize + Packed::at(u, kSide, column % Packed::kColumns),
          Vector<T, G::kPhases>{});
    }
  }
  __syncthreads();
  const int tiles = min(kPackTiles, call.tiles - tile);
  T* const to = call.packed + ((int64_t(item) * rows + row) * call.tiles + tile) * Packed::kSize;
  constexpr int kEach = kUnit<T>;
  static_assert(Packed::kSize % kEach == 0, "whole units");
  for (int i = static_cast<int>(thread) * kEach; i < tiles * Packed::kSize; i += kThreads * kEach) {
    store(to + i, load<kEach>(shared + i));
  }
}

template <class T>
struct GradFeaturesCall {
  Image<T> grad;
  Image<const T> grad_output;
  const T* packed;
  Tiling tiling;
  int rows, tiles;    // of packed weights
  int rows_of_block;  // of features
  int copied;         // neighbouring elements of the output's gradient that are one aligned access
};

template <class T, class G, bool ChannelsLast>
struct GradFeaturesStrip {
  using Weights = Packed<G>;
  static constexpr int kTiles = ChannelsLast ? 1 : 3, kParts = ChannelsLast ? 4 : 1;  // of warps
  static constexpr int kThreads = kTiles * kParts * 32;
  static constexpr int kColumns = kTiles * Weights::kColumns, kChunk = kParts * 16;
  static constexpr int kFine = (kColumns + 2 * Weights::kPad) * G::kUp;  // staged pixels of a row
  // A staged row of sites has two rows of pixels, [row][channel][column] or [row][column][channel]; eight neighbours of
  // the middle axis begin at different banks, an odd number of units apart.
  static constexpr int kMiddle = ChannelsLast ? kFine : kChunk, kInner = ChannelsLast ? kChunk : kFine;
  static constexpr int kPitch = (kInner / kUnit<T> | 1) * kUnit<T>;
  static constexpr int kPlane = kMiddle * kPitch, kStage = G::kUp * kPlane;
  static constexpr double kStaging = ChannelsLast ? 1.5 : 1.4;  // of the cost of computing a row (rows_of_strip)
  static constexpr int kStages = 4;  // rows that are in shared memory, or on their way
  static constexpr int kBytes = kStages * kStage * int(sizeof(T));
  static_assert(kInner % kUnit<T> == 0, "whole units");

  static __device__ __forceinline__ constexpr int at(int row, int channel, int column) {
    return row * kPlane + (ChannelsLast ? column * kPitch + channel : channel * kPitch + column);
  }
};

// Starts to copy so many elements from global to shared memory, the first `count` of them; zeros in place of the others.
template <int Elements, class T>
__device__ __forceinline__ void copy_async(T* to, const T* from, int count) {
  constexpr int kBytes = Elements * int(sizeof(T));
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const int bytes = count * int(sizeof(T));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(address), "l"(from), "r"(bytes), "n"(kBytes)
                 : "memory");
  }
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last ones.
template <int But>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(But) : "memory");
}

// Stages the rows of pixels of a row of sites, from (row, column) on; zeros where there is nothing.
template <class Strip, int Elements, class T>
__device__ __forceinline__ void copy_columns(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, T* to) {
  constexpr int kLanes = Elements == 4 ? 16 : 32;  // of a run of pixels
  constexpr int kCopies = Strip::kFine / Elements, kRuns = Strip::kThreads / kLanes;
  static_assert(kCopies <= kLanes, "a run at once");
  const int lane = static_cast<int>(thread) % kLanes * Elements, first = static_cast<int>(thread) / kLanes;
  const int left = column + lane < 0 ? 0 : min(max(image.width - column - lane, 0), Elements);
  const T* from = item + image.offset(first, row, column + lane);
  T* target = to + Strip::at(0, first, lane);
  if (lane >= Strip::kFine) return;
  CARAFE_UNROLL
  for (int channel = 0; channel < Strip::kChunk; channel += kRuns) {
    if (Strip::kChunk % kRuns != 0 && channel + first >= Strip::kChunk) break;
    CARAFE_UNROLL
    for (int y = 0; y < Strip::kStage / Strip::kPlane; ++y) {
      const bool inside = channel + first < channels && image.inside(row + y, 0);
      copy_async<Elements>(target + Strip::at(y, channel, 0), from + y * image.row_stride, inside ? left : 0);
    }
    from += kRuns * image.channel_stride;
  }
}
template <class Strip, class T>
__device__ __forceinline__ void copy_channels(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, T* to) {
  constexpr int kEach = kUnit<T>, kLanes = Strip::kChunk / kEach, kRuns = Strip::kThreads / kLanes;
  const int lane = static_cast<int>(thread) % kLanes * kEach, first = static_cast<int>(thread) / kLanes;
  const T* from = item + image.offset(lane, row, column + first);
  T* target = to + Strip::at(0, lane, first);
  CARAFE_UNROLL
  for (int j = 0; j < Strip::kFine; j += kRuns) {
    if (Strip::kFine % kRuns != 0 && j + first >= Strip::kFine) break;
    CARAFE_UNROLL
    for (int y = 0; y < Strip::kStage / Strip::kPlane; ++y) {
      const bool inside = lane < channels && image.inside(row + y, column + first + j);
      copy_async<kEach>(target + Strip::at(y, 0, j), from + y * image.row_stride, inside ? kEach : 0);
    }
    from += kRuns * image.column_stride;
  }
}
template <class Strip, class T>
__device__ __forceinline__ void copy_elements(
    const Image<const T>& image, const T* item, int row, int column, int channels, unsigned thread, T* to) {
  CARAFE_ROLLED
  for (int i = static_cast<int>(thread); i < Strip::kMiddle * Strip::kInner; i += Strip::kThreads) {
    const int middle = i / Strip::kInner, inner = i % Strip::kInner;
    const bool by_channels = Strip::kChunk == Strip::kInner;
    const int channel = by_channels ? inner : middle, j = by_channels ? middle : inner;
    CARAFE_UNROLL
    for (int y = 0; y < Strip::kStage / Strip::kPlane; ++y) {
      const bool inside = channel < channels && image.inside(row + y, column + j);
      to[Strip::at(y, channel, j)] = inside ? item[image.offset(channel, row + y, column + j)] : T{};
    }
  }
}

template <class T, class G, bool ChannelsLast>
__global__ void __launch_bounds__(GradFeaturesStrip<T, G, ChannelsLast>::kThreads, ChannelsLast ? 4 : G::kSide == 7 ? 5 : 6)
    grad_features_strip(const __grid_constant__ GradFeaturesCall<T> call) {
  using Strip = GradFeaturesStrip<T, G, ChannelsLast>;
  using Weights = typename Strip::Weights;
  constexpr int kSide = G::kSide, kSteps = Weights::kSteps;
  if constexpr (kAvailable) {
    extern __shared__ __align__(16) unsigned char shared[];
    T* const patch = reinterpret_cast<T*>(shared);
    __shared__ Tiling::Job job;  // not in registers, which are scarcer
    const unsigned thread = threadIdx.x;
    if (thread == 0) job = call.tiling.job(blockIdx.x, call.rows_of_block, Strip::kColumns);
    __syncthreads();

    const int warp = static_cast<int>(thread / 32), lane = static_cast<int>(thread % 32), g = lane / 4, t = lane % 4;
    const int tile = job.column / Weights::kColumns + warp % Strip::kTiles;
    const int channel = warp / Strip::kTiles * 16;
    const int end = min(job.row + call.rows_of_block, call.grad.height);  // of the features' rows,
    const int last = min(end + G::kRadius, call.rows);                    // and of those that lead to them
    int row = max(job.row - G::kRadius, 0);
    const bool computes = tile < call.tiles && channel < job.channels;

    const T* const item = call.grad_output.item(job.n) + job.first_channel * call.grad_output.channel_stride;
    const auto stage = [&](int which, T* to) {
      const int i = which * G::kUp, j = (job.column - Weights::kPad) * G::kUp;
      if (which < last) {
        if (ChannelsLast && call.copied > 1) {
          copy_channels<Strip>(call.grad_output, item, i, j, job.channels, thread, to);
        } else if (!ChannelsLast && call.copied == 4) {
          copy_columns<Strip, 4>(call.grad_output, item, i, j, job.channels, thread, to);
        } else if (!ChannelsLast && call.copied == 2) {
          copy_columns<Strip, 2>(call.grad_output, item, i, j, job.channels, thread, to);
        } else {
          copy_elements<Strip>(call.grad_output, item, i, j, job.channels, thread, to);
        }
      }
      end_copies();
    };
    CARAFE_ROLLED
    for (int s = 0; s + 1 < Strip::kStages; ++s) stage(row + s, patch + s * Strip::kStage);

    // Of a row's weights: those of each tap row.
    using Pair = Vector<uint32_t, 2>;
    struct Row {
      Pair first[kSide], second[kSide];
    };
    const T* weights =
        call.packed + ((int64_t(job.n * call.tiling.groups + job.group) * call.rows + row) * call.tiles + tile) *
                          Weights::kSize;
    // Where the first site that leads to the thread's column is among those of the products.
    const int begin = g + Weights::kBefore + (t - g - Weights::kBefore & 3), step = begin / 4;
    const bool has_second = Weights::kSeconds == 32 || (Weights::kSeconds == 8 && begin == g + Weights::kBefore);
    const auto load_row = [&](int which, const T* from) {
      Row loaded = {};
      CARAFE_UNROLL
      for (int u = 0; u < kSide; ++u) {
        const int leads_to = which + u - G::kRadius;
        if (!computes || which >= last || leads_to < job.row || leads_to >= end) continue;
        const auto* const words = reinterpret_cast<const uint32_t*>(from);
        loaded.first[u] = load<2>(words + (u * Weights::kFirstRow + lane * G::kPhases) / 2);
        if (has_second) {
          const int at = (Weights::kSeconds == 8 ? g : lane) * G::kPhases;
          loaded.second[u] = load<2>(words + (kSide * Weights::kFirstRow + u * Weights::kSecondRow + at) / 2);
        }
      }
      return loaded;
    };
    Row own = load_row(row, weights);

    // The rows of the matrices that the thread gives the addresses of.
    const int matrix = lane / 8, line = lane % 8;
    const int from =
        ChannelsLast
            ? Strip::at(matrix / 2, channel + matrix % 2 * 8, warp % Strip::kTiles * Weights::kColumns * G::kUp + line)
            : Strip::at(matrix / 2, channel + matrix % 2 * 8 + line, warp % Strip::kTiles * Weights::kColumns * G::kUp);
    int slot = 0, next_slot = (Strip::kStages - 1) * Strip::kStage;
    float sums[kSide][4] = {};  // of the rows from row - radius on
    CARAFE_ROLLED
    for (; row < end + G::kRadius; ++row) {
      if (row < last) {
        wait_for_copies<Strip::kStages - 2>();
        __syncthreads();  // the row is there, and the one before has been read
        stage(row + Strip::kStages - 1, patch + next_slot);
        next_slot = slot;
        weights += int64_t(call.tiles) * Weights::kSize;
        const Row next = load_row(row + 1, weights);
        uint32_t a[kSteps][4];
        CARAFE_UNROLL
        for (int j = 0; j < kSteps; ++j)
          load_matrices<4, ChannelsLast>(a[j], patch + slot + from + Strip::at(0, 0, 4 * G::kUp * j));
        CARAFE_UNROLL
        for (int j = 0; j < kSteps; ++j) {
          CARAFE_UNROLL
          for (int u = 0; u < kSide; ++u) {
            uint32_t b[2];
            CARAFE_UNROLL
            for (int r = 0; r < 2; ++r) {
              b[r] = step == j       ? own.first[u].values[r]
                     : step == j - 1 ? own.second[u].values[r]
                                     : 0;
            }
            multiply_add<T>(sums[u], a[j], b);
          }
        }
        own = next;
        slot = slot + Strip::kStage == Strip::kStages * Strip::kStage ? 0 : slot + Strip::kStage;
      }
      // No later row leads to the first of the rows.
      const int i = row - G::kRadius;
      if (computes && i >= job.row) {
        if (call.grad.channels_last && call.grad.units) {
          const uint32_t low = transpose(narrow_pair<T>(sums[0][0], sums[0][1]));
          const uint32_t high = transpose(narrow_pair<T>(sums[0][2], sums[0][3]));
          // Column g, two channels of the lower and two of the higher eight: neighbours exchange, for four of either.
          const bool odd = t % 2 != 0;
          const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
          const Pair four = {{odd ? other : low, odd ? high : other}};
          const int c = channel + (odd ? 8 : 0) + t / 2 * 4, j = tile * Weights::kColumns + g;
          if (c < job.channels && j < call.grad.width) {
            store(
                reinterpret_cast<uint32_t*>(
                    call.grad.item(job.n) + call.grad.offset(job.first_channel + c, i, j)),
                four);
          }
        } else {
          const int j = tile * Weights::kColumns + 2 * t;
          CARAFE_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int c = channel + half * 8 + g;
            const float run[2] = {sums[0][2 * half], sums[0][2 * half + 1]};
            if (c < job.channels) {
              write_run(
                  call.grad, call.grad.item(job.n) + call.grad.offset(job.first_channel + c, i, j), run,
                  call.grad.width - j);
            }
          }
        }
      }
      CARAFE_UNROLL
      for (int u = 0; u < kSide; ++u) {
        CARAFE_UNROLL
        for (int s = 0; s < 4; ++s) sums[u][s] = u + 1 < kSide ? sums[u + 1 < kSide ? u + 1 : u][s] : 0;
      }
    }
  }
}

}  // namespace carafe::gpu::tensor

// The gradient to the features, going up, on tensor cores: a block goes down a strip of the map, row after row of the
// output's gradient; a warp keeps the K rows of features that a row leads to, of 16 channels and 8 columns:
//
//     sums[u][channel][column] += gradient[channel][site, phase] x weights of tap row u[site, phase][column]
#pragma once

#include "../weights.h"
#include "fragments.h"

namespace carafe::gpu::tensor {

// The weights of a row of sites, normalised and rounded to T, in the order in which a warp multiplies with them: for
// each eight columns of features, for each tap row, for each product, whose depth is four sites in all phases, those of
// the threads that have a tap: thread (g, t) that which joins column g to site t of the four. What pads is zero.
template <class G>
struct Packed {
  static constexpr int kSide = G::kSide, kPhases = G::kPhases;
  static constexpr int kColumns = 8;
  static constexpr int kPad = (G::kRadius + 1) / 2 * 2;  // sites that are staged before the columns, and after
  static constexpr int kProducts = (kColumns + 2 * kPad) / 4;
  static constexpr int kRow = kSide == 5 ? 48 : kSide == 3 ? 32 : 64;  // of all phases, of a tap row: 128 bytes each 16
  static constexpr int kSize = kSide * kRow * kPhases;

  // The first of a product: each in as few lines of 128 bytes as can be.
  static __host__ __device__ constexpr int first(int product) {
    return product == 0 ? 0 : kSide == 5 ? 20 * product - 8 : product == kProducts - 1 ? 8 : 24 * product - 8;
  }
  // By which of the sites that lead to column g, in ascending order, thread (g, t) joins it; has() if it is one of
  // them.
  static __host__ __device__ constexpr int site(int product, int g, int t) {
    return 4 * product + t - g - (kPad - G::kRadius);
  }
  static __host__ __device__ constexpr bool has(int product, int g, int t) {
    return site(product, g, t) >= 0 && site(product, g, t) < kSide;
  }
  // The place of the i-th site that leads to column g, of tap v = K - 1 - i: a byte for each g.
  static __host__ __device__ constexpr uint64_t places(int i) {
    uint64_t all = 0;
    for (int product = 0; product < kProducts; ++product) {
      int place = first(product);
      for (int lane = 0; lane < 32; ++lane) {
        if (site(product, lane / 4, lane % 4) == i) all |= uint64_t(place) << (lane / 4 * 8);
        place += has(product, lane / 4, lane % 4);
      }
    }
    return all;
  }
  struct Places {
    uint64_t of[kSide] = {};
    constexpr Places() {
      for (int i = 0; i < kSide; ++i) of[i] = places(i);
    }
  };
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
  constexpr int kEach = kUnit<T>;
  static_assert(Packed::kSize % kEach == 0, "whole units");
  for (int i = static_cast<int>(thread) * kEach; i < kPacked; i += kThreads * kEach)
    store(shared + i, Vector<T, kEach>{});
  __syncthreads();
  const int site = static_cast<int>(thread) / G::kPhases, phase = static_cast<int>(thread) % G::kPhases;
  constexpr typename Packed::Places places;
  CARAFE_UNROLL
  for (int v = 0; v < kSide; ++v) {
    const int column = site + v - 2 * G::kRadius, g = column % Packed::kColumns;
    if (column < 0 || column >= kColumns) continue;
    const int place = static_cast<int>(places.of[kSide - 1 - v] >> (g * 8) & 255);
    T* const to = shared + column / Packed::kColumns * Packed::kSize + place * G::kPhases + phase;
    CARAFE_UNROLL
    for (int u = 0; u < kSide; ++u) to[u * Packed::kRow * G::kPhases] = narrow<T>(own.values[u * kSide + v]);
  }
  __syncthreads();
  const int tiles = min(kPackTiles, call.tiles - tile);
  T* const to = call.packed + ((int64_t(item) * rows + row) * call.tiles + tile) * Packed::kSize;
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
  static constexpr bool kChannelsLast = ChannelsLast;
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
  static constexpr int kStages = 4;                             // rows that are in shared memory, or on their way
  static constexpr int kBytes = kStages * kStage * int(sizeof(T));
  static_assert(kInner % kUnit<T> == 0, "whole units");

  static __device__ __forceinline__ constexpr int at(int row, int channel, int column) {
    return row * kPlane + (ChannelsLast ? column * kPitch + channel : channel * kPitch + column);
  }
};

// An address in shared memory that stays in a register, instead of being computed anew.
template <class T>
__device__ __forceinline__ uint32_t shared_address(const T* pointer) {
  return renew(static_cast<uint32_t>(__cvta_generic_to_shared(pointer)));
}

__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of copies but the last ones.
template <int But>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(But) : "memory");
}

// How a thread stages the rows of sites of a strip, one after the other: `Elements` neighbours at its place along the
// inner axis, and a walk along the middle one. Zeros where there is nothing.
template <class Strip, int Elements, class T>
struct Stager {
  static constexpr bool kLast = Strip::kChannelsLast;
  static constexpr int kNeeded = Strip::kInner / Elements;
  static constexpr int kLanes = kNeeded <= 8 ? 8 : kNeeded <= 16 ? 16 : 32;  // of the inner axis
  static constexpr int kApart = Strip::kThreads / kLanes;
  static constexpr int kSteps = (Strip::kMiddle + kApart - 1) / kApart;
  static_assert(kNeeded <= kLanes && Strip::kInner % Elements == 0, "all at once");
  const T* from;
  uint32_t to;
  int column;  // of its first place
  int count;   // of what is left of the middle axis

  __device__ __forceinline__ Stager(
      const Image<const T>& image, const T* item, int row, int first_column, int channels, unsigned thread, T* patch) {
    const int inner = static_cast<int>(thread) % kLanes * Elements, middle = static_cast<int>(thread) / kLanes;
    const int channel = kLast ? inner : middle;
    column = first_column + (kLast ? middle : inner);
    from = item + image.offset(channel, row, column);
    to = shared_address(patch + middle * Strip::kPitch + inner);
    count = inner >= Strip::kInner || channel >= channels ? 0 : kLast ? Strip::kMiddle : min(channels, Strip::kMiddle);
    count = static_cast<int>(renew(static_cast<unsigned>(count - middle)));
  }
  // The two rows of pixels from `row` on.
  __device__ __forceinline__ void stage(const Image<const T>& image, int row, int slot) {
    const bool above = image.inside(row, 0), below = image.inside(row + 1, 0);
    const T* source = from;
    CARAFE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const bool inside = image.inside(0, column + (kLast ? step * kApart : 0));
      if (step * kApart < count) {
        constexpr int kBytes = Elements * int(sizeof(T)), kSize = int(sizeof(T));
        copy_async<kBytes>(to + slot + step * kApart * Strip::kPitch * kSize, source, inside && above);
        copy_async<kBytes>(
            to + slot + (step * kApart * Strip::kPitch + Strip::kPlane) * kSize, source + image.row_stride,
            inside && below);
      }
      source += kApart * (kLast ? image.column_stride : image.channel_stride);
    }
    from += 2 * image.row_stride;
  }
};

// The same of any strides, an element at a time.
template <class Strip, class T>
struct Stager<Strip, 1, T> {
  const T* item;
  T* patch;
  int first_column, channels;
  unsigned thread;

  __device__ __forceinline__
  Stager(const Image<const T>&, const T* item, int, int first_column, int channels, unsigned thread, T* patch)
      : item(item), patch(patch), first_column(first_column), channels(channels), thread(thread) {}
  __device__ __forceinline__ void stage(const Image<const T>& image, int row, int slot) {
    CARAFE_ROLLED
    for (int i = static_cast<int>(thread); i < Strip::kMiddle * Strip::kInner; i += Strip::kThreads) {
      const int middle = i / Strip::kInner, inner = i % Strip::kInner;
      const int channel = Strip::kChannelsLast ? inner : middle;
      const int column = first_column + (Strip::kChannelsLast ? middle : inner);
      CARAFE_UNROLL
      for (int y = 0; y < 2; ++y) {
        const bool exists = channel < channels && image.inside(row + y, column);
        patch[slot / int(sizeof(T)) + y * Strip::kPlane + middle * Strip::kPitch + inner] =
            exists ? item[image.offset(channel, row + y, column)] : T{};
      }
    }
  }
};

template <class T, class G, bool ChannelsLast, int Elements>
__device__ __forceinline__ void march(const GradFeaturesCall<T>& call, T* patch) {
  using Strip = GradFeaturesStrip<T, G, ChannelsLast>;
  using Weights = typename Strip::Weights;
  constexpr int kSide = G::kSide, kRadius = G::kRadius, kProducts = Weights::kProducts;
  constexpr int kSlot = Strip::kStage * int(sizeof(T)), kLastSlot = (Strip::kStages - 1) * kSlot;
  const unsigned thread = threadIdx.x;
  const Tiling::Job job = call.tiling.job(blockIdx.x, call.rows_of_block, Strip::kColumns);
  const int warp = static_cast<int>(thread / 32), lane = static_cast<int>(thread % 32), g = lane / 4, t = lane % 4;
  const int tile = job.column / Weights::kColumns + warp % Strip::kTiles;
  const int channel = warp / Strip::kTiles * 16;
  const int end = min(job.row + call.rows_of_block, call.grad.height);  // of the features' rows,
  const int last = min(end + kRadius, call.rows);                       // and of those that lead to them
  int row = max(job.row - kRadius, 0);
  const bool computes = tile < call.tiles && channel < job.channels;

  if (job.channels < Strip::kChunk) {  // channels that are not there are multiplied, too
    for (unsigned i = thread * kUnit<T>; i < Strip::kStages * Strip::kStage; i += Strip::kThreads * kUnit<T>) {
      store(patch + i, Vector<T, kUnit<T>>{});
    }
    __syncthreads();
  }
  const auto& image = call.grad_output;
  Stager<Strip, Elements, T> stager(
      image, image.item(job.n) + job.first_channel * image.channel_stride, row * G::kUp,
      (job.column - Weights::kPad) * G::kUp, job.channels, thread, patch);
  CARAFE_ROLLED
  for (int s = 0; s + 1 < Strip::kStages; ++s) {
    if (row + s < last) stager.stage(image, (row + s) * G::kUp, s * kSlot);
    end_copies();
  }

  // The weights of a row: of each tap row, of each product. What leads to none of the block's rows is not loaded: what
  // was there before is multiplied instead, and the sum is not written.
  uint32_t b[kSide][kProducts][2] = {};
  const T* weights =
      call.packed +
      ((int64_t(job.n * call.tiling.groups + job.group) * call.rows + row) * call.tiles + tile) * Weights::kSize;
  const int pitch = call.tiles * Weights::kSize;
  bool has[kProducts];
  int place[kProducts];
  CARAFE_UNROLL
  for (int j = 0; j < kProducts; ++j) {
    has[j] = Weights::has(j, g, t);
    const unsigned before = __ballot_sync(~0u, has[j]) & ((1u << lane) - 1);
    place[j] = (Weights::first(j) + __popc(before)) * G::kPhases;
  }
  const auto load_weights = [&](int which) {
    const unsigned rows = which < last ? end - job.row : 0;
    CARAFE_UNROLL
    for (int u = 0; u < kSide; ++u) {
      if (static_cast<unsigned>(which - kRadius - job.row + u) >= rows) continue;
      CARAFE_UNROLL
      for (int j = 0; j < kProducts; ++j) {
        if (!has[j]) continue;
        const auto both =
            load<2>(reinterpret_cast<const uint32_t*>(weights + place[j] + u * Weights::kRow * G::kPhases));
        b[u][j][0] = both.values[0], b[u][j][1] = both.values[1];
      }
    }
    weights += pitch;
  };
  if (computes) load_weights(row);

  // The rows of the matrices that the thread gives the addresses of.
  const int matrix = lane / 8, line = lane % 8, fine = warp % Strip::kTiles * Weights::kColumns * G::kUp;
  const uint32_t matrices = shared_address(
      patch + (ChannelsLast ? Strip::at(matrix / 2, channel + matrix % 2 * 8, fine + line)
                            : Strip::at(matrix / 2, channel + matrix % 2 * 8 + line, fine)));
  // What the thread writes: two columns of channels g and g + 8, or, exchanged, four channels of column g.
  const bool exchanges = call.grad.channels_last && call.grad.units;
  const int written = channel + (exchanges ? t % 2 * 8 + t / 2 * 4 : g);
  const int column = tile * Weights::kColumns + (exchanges ? g : 2 * t);
  T* to = call.grad.item(job.n) + call.grad.offset(job.first_channel + written, job.row, column);

  int slot = 0, free_slot = kLastSlot;
  float sums[kSide][4] = {};  // of the rows from row - radius on
  CARAFE_ROLLED
  for (; row < end + kRadius; ++row) {
    if (row < last) {
      wait_for_copies<Strip::kStages - 2>();
      __syncthreads();  // the row is there, and the one before has been read
      const int next = row + Strip::kStages - 1;
      if (next < last) stager.stage(image, next * G::kUp, free_slot);
      end_copies();
      if (computes) {
        uint32_t a[kProducts][4];
        CARAFE_UNROLL
        for (int j = 0; j < kProducts; ++j) {
          load_matrices<4, ChannelsLast>(
              a[j], static_cast<const T*>(__cvta_shared_to_generic(matrices + slot)) + Strip::at(0, 0, 4 * G::kUp * j));
        }
        CARAFE_UNROLL
        for (int j = 0; j < kProducts; ++j) {
          CARAFE_UNROLL
          for (int u = 0; u < kSide; ++u) {
            multiply_add<T>(sums[u], a[j], b[u][j]);
          }
        }
        load_weights(row + 1);
      }
      free_slot = slot;
      slot = slot == kLastSlot ? 0 : slot + kSlot;
    }
    // No later row leads to the first of the rows.
    if (row - kRadius >= job.row && computes) {
      if (exchanges) {
        const uint32_t low = transpose(narrow_pair<T>(sums[0][0], sums[0][1]));
        const uint32_t high = transpose(narrow_pair<T>(sums[0][2], sums[0][3]));
        // Column g, two of the lower eight channels and two of the higher: a pair of threads has four of either.
        const bool odd = t % 2 != 0;
        const uint32_t other = __shfl_xor_sync(~0u, odd ? low : high, 1);
        const Vector<uint32_t, 2> four = {{odd ? other : low, odd ? high : other}};
        if (written < job.channels && column < call.grad.width) store(reinterpret_cast<uint32_t*>(to), four);
      } else {
        CARAFE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float run[2] = {sums[0][2 * half], sums[0][2 * half + 1]};
          if (written + half * 8 < job.channels) {
            write_run(call.grad, to + half * 8 * call.grad.channel_stride, run, call.grad.width - column);
          }
        }
      }
      to += call.grad.row_stride;
    }
    CARAFE_UNROLL
    for (int u = 0; u < kSide; ++u) {
      CARAFE_UNROLL
      for (int s = 0; s < 4; ++s) sums[u][s] = u + 1 < kSide ? sums[u + 1 < kSide ? u + 1 : u][s] : 0;
    }
  }
}

template <class T, class G, bool ChannelsLast>
__global__ void __launch_bounds__(
    GradFeaturesStrip<T, G, ChannelsLast>::kThreads, ChannelsLast ? (G::kSide == 7 ? 3 : 4) : (G::kSide == 7 ? 5 : 6))
    grad_features_strip(const __grid_constant__ GradFeaturesCall<T> call) {
  if constexpr (kAvailable) {
    extern __shared__ __align__(16) unsigned char shared[];
    T* const patch = reinterpret_cast<T*>(shared);
    if (call.copied == (ChannelsLast ? kUnit<T> : 4)) {
      march<T, G, ChannelsLast, ChannelsLast ? kUnit<T> : 4>(call, patch);
    } else if (!ChannelsLast && call.copied == 2) {
      if constexpr (!ChannelsLast) march<T, G, false, 2>(call, patch);
    } else {
      march<T, G, ChannelsLast, 1>(call, patch);
    }
  }
}

}  // namespace carafe::gpu::tensor

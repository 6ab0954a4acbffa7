// Reassembly going up, of halves: channels x pixels of a window, times pixels x outputs of a strip, on tensor cores.
#pragma once

#include "../weights.h"
#include "strip.h"

namespace carafe::gpu::tensor {

constexpr int kRunOfKernels = 4;  // elements of kernels that are one access (KernelMap::image.units): a tap's phases
constexpr int kRunOfColumns = 4;  // and columns of the output, where `wide` does not hold

template <class T>
struct ReassembleCall {
  Image<T> output;
  Image<const T> features;  // its runs are pairs
  KernelMap<const T> kernels;
  Normalizer normalizer;
  Tiling tiling;
  bool wide;  // kUnit columns of the output are one aligned access
};

// A tile's weights in shared memory: of each strip B, pixels of the window x outputs, a column after the other. Column
// n of a product is output n % 2 of a row of a site: n / 2 is the site's place. A warp has `Strips` strips, whose order
// is exchange_columns', of `Rows` rows of sites; the second begins in matrix kFirst of what their windows have
// together.
template <class T, class G, int Rows, int Strips>
struct StripWeights {
  using Strip = StripWindow<G::kSide, 4, Rows>;
  static constexpr int kStrips = kTileColumns / Strip::kSites;  // of a row
  static constexpr int kFirst = Rows > 1 ? Strip::kWidth / kMatrix : 0, kShift = Rows > 1 ? Strip::kWidth % kMatrix : 0;
  static constexpr int kMatrices = (G::kSide * Strip::kWidth + kShift + kMatrix - 1) / kMatrix;
  static constexpr int kColumn = kMatrices * kMatrix;    // an odd number of units, so that columns use all banks
  static constexpr int kProduct = kMatrix * kColumn;     // of a row of outputs of a strip
  static constexpr int kStrip = 2 * kProduct + kMatrix;  // so do strips that are written at once
  using Transfer = KernelTransfer<G, kTileRows, kTileColumns, kThreads>;
  static constexpr int kSize = std::max(kTileRows * kStrips * kStrip, Transfer::kExchange);
  static_assert(kMatrices % 2 == 1 && kShift % 2 == 0 && Strip::kSites == 4 && kStrips == 4 && G::kPhases == 4);
  static_assert(kThreads == kTileSites * G::kPhases, "a thread has a kernel");

  static __device__ __forceinline__ unsigned place(unsigned site, unsigned strip) {
    return Strips == 2 ? site / 2 + (site ^ strip) % 2 * 2 : site ^ strip;
  }

  // The thread's kernel. A warp has what may lie together in memory: of logits both rows of sites, of masks a row of
  // outputs; or of what is exchanged, for its banks, both rows of outputs of a row of sites.
  int row, column, y, x;
  static __device__ __forceinline__ StripWeights of(const KernelMap<const T>& kernels, unsigned thread) {
    const auto bit = [&](int from) { return static_cast<int>(thread >> from & 1); };
    const int column = static_cast<int>(thread % kTileColumns);
    if (kernels.image.channels_last) return {bit(6), column, bit(4), bit(5)};
    if (kernels.from_logits) return {bit(4), column, bit(6), bit(5)};
    return {bit(6), static_cast<int>(thread % 32 / 2), bit(5), bit(0)};
  }

  // Loads a kernel: into `values`, or where a kernel's taps are neighbours as they lie there into shared memory.
  static __device__ __forceinline__ void load(
      const ReassembleCall<T>& call, const Tiling::Job& job, unsigned thread, T (&values)[G::kTaps], T* exchange) {
    const KernelMap<const T>& kernels = call.kernels;
    if (!kernels.image.channels_last) {
      const auto own = of(kernels, thread);
      const auto least = [](int a, int b) { return a < b ? a : b; };
      // Beyond the map that of another output, as what is computed with it is not written.
      const int i = job.row + own.row, j = job.column + own.column;
      const T* from =
          kernels.image.item(job.n) +
          (kernels.from_logits ? kernels.image.offset(
                                     job.group * G::kTaps * G::kPhases + own.y * G::kUp + own.x,
                                     least(i, kernels.rows - 1), least(j, kernels.columns - 1))
                               : kernels.image.offset(
                                     job.group * G::kTaps, least(i * G::kUp + own.y, kernels.out_height - 1),
                                     least(j * G::kUp + own.x, kernels.out_width - 1)));
      const int64_t stride = kernels.tap_stride;
      CARAFE_UNROLL
      for (int tap = 0; tap < G::kTaps; ++tap, from += stride) values[tap] = *from;
    } else if (kernels.image.units) {  // a warp has eight sites of a row
      using Run = Vector<uint32_t, kRunOfKernels / 2>;
      constexpr int kSitesOfWarp = kTileSites * 32 / kThreads;
      const int lane = static_cast<int>(thread % 32), site = static_cast<int>(thread / 32) * kSitesOfWarp;
      const int i = job.row + site / kTileColumns, j = job.column + site % kTileColumns;
      const int left = i < kernels.rows ? kernels.columns - j : 0;
      const T* const from =
          kernels.image.item(job.n) + job.group * G::kTaps * G::kPhases + kernels.image.offset(0, i, j);
      const int64_t stride = kernels.image.column_stride;
      int step;
      T* const to = exchange + Transfer::exchanged(true, site * G::kPhases, &step);
      CARAFE_UNROLL
      for (int tap = lane; tap < G::kTaps; tap += 32) {
        Run runs[kSitesOfWarp];
        const T* at = from + tap * kRunOfKernels;
        CARAFE_UNROLL
        for (int e = 0; e < kSitesOfWarp; ++e) {
          runs[e] = {};
          if (e < left) runs[e] = *reinterpret_cast<const Run*>(at);
          at += stride;
        }
        CARAFE_UNROLL
        for (int e = 0; e < kSitesOfWarp; ++e) {
          *reinterpret_cast<Run*>(to + (e * G::kTaps + tap) * kRunOfKernels) = runs[e];
        }
      }
    } else {
      T elements[Transfer::kAtOnce];
      Transfer::each_element(
          kernels, job.n, job.group, job.row, job.column, thread,
          [&](int e, int, bool exists, const T* from) { elements[e] = exists ? *from : T{}; },
          [&](int e, int at, bool, const T*) { exchange[at] = elements[e]; });
    }
  }
  static __device__ __forceinline__ void collect(
      const ReassembleCall<T>& call, unsigned thread, T (&values)[G::kTaps], const T* exchange) {
    if (!call.kernels.image.channels_last) return;
    __syncthreads();
    const auto own = of(call.kernels, thread);
    int step;
    const int kernel = (own.row * kTileColumns + own.column) * G::kPhases + own.y * G::kUp + own.x;
    const T* const from = exchange + Transfer::exchanged(call.kernels.from_logits, kernel, &step);
    CARAFE_UNROLL
    for (int tap = 0; tap < G::kTaps; ++tap) values[tap] = from[tap * step];
    __syncthreads();
  }

  // Normalises a kernel and writes its column, which at site s begins with s zeros, in the second row kShift more.
  static __device__ __forceinline__ void write_column(
      const ReassembleCall<T>& call, const T (&values)[G::kTaps], unsigned thread, T* weights) {
    OwnKernel<G> kernel;
    kernel.each([&](int tap) { kernel.values[tap] = widen(values[tap]); });
    kernel.normalize(call.normalizer);
    const auto own = of(call.kernels, thread);
    const unsigned site = own.column % Strip::kSites, strip = own.column / Strip::kSites;
    T* const to = weights + (own.row * kStrips + strip) * kStrip + own.y * kProduct +
                  (place(site, strip) * G::kUp + own.x) * kColumn;
    const auto weight = [&](int w) {
      const int tap = Strip::tap(w, 0);
      return tap < 0 ? 0 : kernel.values[tap];
    };
    const unsigned odd = site % 2 ? 0x5432 : 0x7654;  // what is taken of two words
    uint32_t words[kColumn / 2], moved[kColumn / 2];
    CARAFE_UNROLL
    for (int i = 0; i < kColumn / 2; ++i) words[i] = narrow_pair<T>(weight(2 * i), weight(2 * i + 1));
    CARAFE_UNROLL
    for (int i = 0; i < kColumn / 2; ++i) {
      const auto word = [&](int at) { return at < 0 ? 0 : words[at]; };
      const auto of_row = [&](int at) { return kShift > 0 && own.row > 0 ? word(at - kShift / 2) : word(at); };
      moved[i] = site < 2 ? of_row(i) : of_row(i - 1);
    }
    CARAFE_UNROLL
    for (int i = kColumn / 2 - 1; i >= 0; --i) moved[i] = __byte_perm(i > 0 ? moved[i - 1] : 0, moved[i], odd);
    CARAFE_UNROLL
    for (int i = 0; i < kColumn / 2; i += kMatrix / 2) {
      const Vector<uint32_t, 4> row = {{moved[i], moved[i + 1], moved[i + 2], moved[i + 3]}};
      store_shared(reinterpret_cast<uint32_t*>(to) + i, row);
    }
  }
};

template <class T, class G, bool ChannelsLast>
struct ReassembleStrips {
  static constexpr int kChunk = 64;
  // Channels that are computed together, and as many of a block's are a multiple of: those of a product, or what lies
  // together in memory.
  static constexpr int kStep = ChannelsLast ? 32 : 16;
  // With contiguous maps a warp has all strips of a row, and writes them at once, in turns with another warp; or with
  // k = 7, as registers go, half of them. With others it has both rows of a strip, whose windows have most of their
  // pixels together.
  static constexpr int kRows = ChannelsLast ? 2 : 1, kStrips = ChannelsLast ? 1 : G::kSide > 5 ? 2 : 4;
  static constexpr int kTurns = kStrips == 4 ? 2 : 1;
  using Weights = StripWeights<T, G, kRows, kStrips>;
  using Strip = typename Weights::Strip;
  static_assert(kTileSites / (kRows * kStrips * Strip::kSites) * kTurns * 32 == kThreads);
  static constexpr int kLead = (G::kRadius + 1) / 2 * 2;  // columns before the tile, an even number
  using Pixels = Patch<Strip, kTileRows + G::kSide - 1, kTileColumns + 2 * kLead, kChunk>;
  // What a block takes for its weights, in steps of channels (Tiling::of).
  static constexpr double kPreparing = ChannelsLast ? 2 : 1.2;
  static constexpr int kResident = kStrips == 4 && G::kSide > 3 || G::kSide > 5 ? 4 : 5;  // blocks, as registers go
  static constexpr int kBytes = (Weights::kSize + Pixels::kSize) * int(sizeof(T));
};

// Writes a unit of channels of a pixel. Mixed, for an output whose channels are neighbours: positions 2t and 2t + 1 of
// the matrices 0 to 3 of 32 channels have channels 8t to 8t + 7, which a thread then has of a product.
template <bool Mixed>
__device__ __forceinline__ void write_unit(uint32_t* pixel, int unit, const Vector<uint32_t, 4>& words) {
  constexpr int kWords = kMatrix / 2;
  if constexpr (Mixed) {
    uint32_t* const to = pixel + unit / 4 * 4 * kWords + unit % 4;
    CARAFE_UNROLL
    for (int i = 0; i < 4; ++i) to[i * kWords] = words.values[i];
  } else {
    store_shared(pixel + unit * kWords, words);
  }
}

// Stages the patch that begins at (row, column), `units` of the `channels` that are left: zeros where there is nothing.
template <class Pixels, bool Mixed, class T>
__device__ __forceinline__ void stage_patch(
    const Image<const T>& image, const T* item, int row, int column, int channels, int units, unsigned thread, T* to) {
  constexpr int kWords = kMatrix / 2;
  using Words = Vector<uint32_t, kWords>;
  const auto join = [](T low, T high) {
    return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
  };
  if (image.channels_last) {  // neighbouring threads have neighbouring units
    constexpr int kUnits = Pixels::kChannels / kMatrix;
    constexpr int kAtOnce = Pixels::kRows > 6 ? Pixels::kRows / 2 : Pixels::kRows;  // rows, as registers go
    static_assert(Pixels::kRows % kAtOnce == 0);
    const auto walk = [&](const auto& read) {
      CARAFE_ROLLED
      for (int place = static_cast<int>(thread); place < Pixels::kColumns * kUnits; place += kThreads) {
        const int unit = place % kUnits, j = place / kUnits, left = channels - unit * kMatrix;
        if (unit >= units) continue;
        const bool inside = left > 0 && image.inside(0, column + j);
        const T* from = item + image.offset(unit * kMatrix, row, column + j);
        const int64_t stride = image.row_stride;
        uint32_t* target = reinterpret_cast<uint32_t*>(to + Pixels::at(0, j));
        CARAFE_ROLLED
        for (int first = 0; first < Pixels::kRows; first += kAtOnce) {
          Words words[kAtOnce];
          CARAFE_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            words[i] = {};
            if (inside && image.inside(row + first + i, 0)) read(words[i], from, left);
            from += stride;
          }
          CARAFE_UNROLL
          for (int i = 0; i < kAtOnce; ++i) write_unit<Mixed>(target + Pixels::at(i, 0) / 2, unit, words[i]);
          target += Pixels::at(kAtOnce, 0) / 2;
        }
      }
    };
    if (image.units) {
      walk([&](Words& words, const T* at, int) { words = load<kWords>(reinterpret_cast<const uint32_t*>(at)); });
    } else {
      walk([&](Words& words, const T* at, int left) {
        CARAFE_UNROLL
        for (int c = 0; c < kMatrix; c += 2) {
          if (c < left) words.values[c / 2] = join(at[c], c + 1 < left ? at[c + 1] : T{});
        }
      });
    }
  } else {  // neighbouring threads have neighbouring pairs of a row, and go through the channels
    constexpr int kPairs = Pixels::kRows * Pixels::kColumns / 2, kPass = kThreads / kPairs, kAtOnce = kPass > 1 ? 2 : 1;
    static_assert(kPass > 0 && Pixels::kColumns % 2 == 0);
    const int begin = static_cast<int>(thread) / kPairs, pair = static_cast<int>(thread) % kPairs;
    if (begin >= kPass) return;
    const int i = pair / (Pixels::kColumns / 2), j = pair % (Pixels::kColumns / 2) * 2;
    const bool first = image.inside(row + i, column + j), second = image.inside(row + i, column + j + 1);
    // Pixels of neighbouring pairs use every other bank; so half of the threads write the second pixel first.
    const int swapped = static_cast<int>(thread / 4 % 2);
    const unsigned low = swapped ? 0x7632 : 0x5410, high = swapped ? 0x5410 : 0x7632;
    uint32_t* const one = reinterpret_cast<uint32_t*>(to + Pixels::at(i, j + swapped));
    uint32_t* const other = reinterpret_cast<uint32_t*>(to + Pixels::at(i, j + 1 - swapped));
    const int most = (units + kPass - 1) / kPass;
    const int last = units < (begin + 1) * most ? units : (begin + 1) * most;
    const T* from = item + image.offset(begin * most * kMatrix, row + i, column + j);
    const int64_t stride = image.channel_stride;
    const auto walk = [&](const auto& read) {
      CARAFE_ROLLED
      for (int unit = begin * most; unit < last; unit += kAtOnce) {
        uint32_t pairs[kAtOnce][kMatrix] = {};
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          CARAFE_UNROLL
          for (int c = 0; c < kMatrix; ++c, from += stride)
            read(pairs[b][c], unit + b < last, (unit + b) * kMatrix + c);
        }
        CARAFE_UNROLL
        for (int b = 0; b < kAtOnce; ++b) {
          if (unit + b >= last) continue;
          Words first_words, other_words;
          CARAFE_UNROLL
          for (int c = 0; c < kMatrix; c += 2) {
            first_words.values[c / 2] = __byte_perm(pairs[b][c], pairs[b][c + 1], low);
            other_words.values[c / 2] = __byte_perm(pairs[b][c], pairs[b][c + 1], high);
          }
          write_unit<Mixed>(one, unit + b, first_words);
          write_unit<Mixed>(other, unit + b, other_words);
        }
      }
    };
    if (image.runs && first == second && channels == units * kMatrix) {
      walk([&](uint32_t& pair, bool exists, int) {
        if (first && exists) pair = *reinterpret_cast<const uint32_t*>(from);
      });
    } else {
      walk([&](uint32_t& pair, bool exists, int channel) {
        if (!exists || channel >= channels) return;
        pair = join(first ? *from : T{}, second ? from[image.column_stride] : T{});
      });
    }
  }
}

// Writes the first `left` of neighbours, packed.
template <int Words, class T>
__device__ __forceinline__ void write_packed(
    T* to, int stride, bool aligned, const Vector<uint32_t, Words>& words, int left) {
  if (aligned && left >= 2 * Words) {
    store(reinterpret_cast<uint32_t*>(to), words);
  } else if (left > 0) {
    CARAFE_UNROLL
    for (int i = 0; i < 2 * Words; ++i, to += stride) {
      if (i < left) to->bits = static_cast<uint16_t>(words.values[i / 2] >> i % 2 * 16);
    }
  }
}

// Where a thread writes in a product and the tile: what it has, or gets from others.
struct Place {
  int channel, column;

  // Its column of a product is output n of strip q; of it it gets, transposed, a unit of channels.
  static __device__ __forceinline__ Place of_pixel(unsigned lane, int q) {
    const int n = static_cast<int>(lane / 4);
    return {0, (q * 4 + ((n / 2) ^ q)) * 2 + n % 2};
  }
  // It has channel g of a product. Of `wide` outputs of 16 sites it gets those of the four sites of strip t. Of others
  // half as many, of channel g and of the one that shares a bit with it, so that as much lies together: the first of
  // them of an even channel, the last of an odd one. Of eight sites it gets those of two sites of strip t / 2.
  template <int Strips>
  static __device__ __forceinline__ Place of_columns(unsigned lane, bool wide) {
    const int channel = static_cast<int>(lane / 4), t = static_cast<int>(lane % 4);
    if (Strips == 2) return {channel, t * kRunOfColumns};
    return {wide ? channel : channel & ~1, t * 8 + (wide ? 0 : channel % 2 * kRunOfColumns)};
  }
};

__device__ __forceinline__ void exchange(bool swap, uint32_t& a, uint32_t& b) {
  const uint32_t first = swap ? b : a;
  b = swap ? a : b, a = first;
}

// A row of outputs of eight channels and all sites of a warp, of which a thread gets what it writes: of each of four
// strips q it has the two outputs of site t ^ q, of each of two those of site t % 2 * 2 + (t / 2 ^ q).
__device__ __forceinline__ void exchange_columns(uint32_t (&words)[4], unsigned lane, bool wide) {
  exchange(lane & 1, words[0], words[1]), exchange(lane & 1, words[2], words[3]);
  exchange(lane & 2, words[0], words[2]), exchange(lane & 2, words[1], words[3]);
  CARAFE_UNROLL
  for (int i = 1; i < 4; ++i) words[i] = __shfl_xor_sync(0xffffffffu, words[i], i);
  if (wide) return;
  const bool odd = lane & 4;
  exchange(odd, words[0], words[2]), exchange(odd, words[1], words[3]);
  words[2] = __shfl_xor_sync(0xffffffffu, words[2], 4), words[3] = __shfl_xor_sync(0xffffffffu, words[3], 4);
  exchange(odd, words[0], words[2]), exchange(odd, words[1], words[3]);
}
__device__ __forceinline__ void exchange_columns(uint32_t (&words)[2], unsigned lane, bool) {
  exchange(lane & 2, words[0], words[1]);
  words[1] = __shfl_xor_sync(0xffffffffu, words[1], 2);
}

// Writes them. `to`: the thread's first one; `channels` and `columns` are left from there.
template <int Strips, class T>
__device__ __forceinline__ void write_columns(
    const ReassembleCall<T>& call, const uint32_t (&words)[Strips], T* to, int channels, int columns) {
  const int stride = call.output.column_stride;
  if constexpr (Strips == 4) {
    if (call.wide) {
      if (channels > 0) write_packed<4>(to, stride, true, {words[0], words[1], words[2], words[3]}, columns);
      return;
    }
  }
  CARAFE_UNROLL
  for (int i = 0; i < Strips / 2; ++i) {
    if (channels > i) {
      write_packed<2>(
          to + i * call.output.channel_stride, stride, call.output.runs, {words[2 * i], words[2 * i + 1]}, columns);
    }
  }
}

template <class T, class G, bool ChannelsLast>
__global__ void __launch_bounds__(kThreads, ReassembleStrips<T, G, ChannelsLast>::kResident)
    reassemble_strips(const __grid_constant__ ReassembleCall<T> call) {
  if constexpr (kAvailable) {
    using Tile = ReassembleStrips<T, G, ChannelsLast>;
    using Pixels = typename Tile::Pixels;
    using Weights = typename Tile::Weights;
    using Strip = typename Tile::Strip;
    constexpr int kMatrices = Weights::kMatrices, kRows = Tile::kRows, kStrips = Tile::kStrips;
    extern __shared__ __align__(16) unsigned char shared[];
    T* const weights = reinterpret_cast<T*>(shared);
    T* const patch = weights + Weights::kSize;

    __shared__ Tiling::Job job;  // not in registers, which are scarcer
    if (threadIdx.x == 0) job = call.tiling.job(blockIdx.x, kTileRows, kTileColumns);
    __syncthreads();

    const auto stage = [&](int done) {
      const int channels = job.channels - done < Tile::kChunk ? job.channels - done : Tile::kChunk;
      const int units = (channels + Tile::kStep - 1) / Tile::kStep * (Tile::kStep / kMatrix);
      stage_patch<Pixels, ChannelsLast>(
          call.features, call.features.item(job.n) + (job.first_channel + done) * call.features.channel_stride,
          job.row - G::kRadius, job.column - Tile::kLead, channels, units, renew(threadIdx.x), patch);
    };
    {
      T values[G::kTaps];
      Weights::load(call, job, threadIdx.x, values, weights);
      stage(0);
      Weights::collect(call, threadIdx.x, values, weights);
      Weights::write_column(call, values, threadIdx.x, weights);
    }
    __syncthreads();

    const unsigned thread = renew(threadIdx.x), lane = thread % 32, warp = thread / 32;
    const int row = ChannelsLast ? 0 : static_cast<int>(warp / 2),
              strip = static_cast<int>(ChannelsLast ? warp : warp * kStrips % Weights::kStrips);
    constexpr int kProducts = kRows * kStrips * 2;  // of a warp, which has as many B
    uint32_t b[kRows][kStrips][2][kMatrices];
    const int matrix = static_cast<int>(lane) / kMatrix;                        // that the lane loads a row of
    const T* const columns_of_b = weights + lane % kMatrix * Weights::kColumn;  // and of which column
    const auto product = [&](int r, int q, int y) {
      return columns_of_b + (r * Weights::kStrips + q) * Weights::kStrip + y * Weights::kProduct;
    };
    {
      // Two matrices that follow one another have the registers that they are used in.
      CARAFE_UNROLL
      for (int m = 0; m < kMatrices; ++m) {
        const bool pair = m % 2 == 0 && m + 1 < kMatrices;
        if (m % 2 == 1) continue;
        CARAFE_UNROLL
        for (int i = 0; i < kProducts / (pair ? 2 : 4); ++i) {
          // Which of the products the lane's matrix is of, and which of the loaded one each is.
          const auto which = [&](int matrix) { return pair ? 2 * i + matrix / 2 : 4 * i + matrix; };
          const int own = which(matrix);
          const T* const from =
              ChannelsLast ? product(own / 2, strip, own % 2) : product(row, strip + own / 2, own % 2);
          uint32_t loaded[4];
          load_matrices<4, false>(loaded, from + (m + (pair ? matrix % 2 : 0)) * kMatrix);
          CARAFE_UNROLL
          for (int j = 0; j < 4; ++j) {
            b[ChannelsLast ? which(j) / 2 : 0][ChannelsLast ? 0 : which(j) / 2][which(j) % 2][m + (pair ? j % 2 : 0)] =
                loaded[j];
          }
        }
      }
    }
    const T* rows[(Strip::kMatrices + 1) / 2];  // what the lane loads of a window, at the first channel and strip
    CARAFE_UNROLL
    for (int m = 0; m < Strip::kMatrices; m += 2) {
      rows[m / 2] =
          patch + Pixels::at(row, strip * Strip::kSites + Tile::kLead - G::kRadius) +
          Pixels::channels_by_pixels(static_cast<int>(m + 1 < Strip::kMatrices ? lane : lane % 16), m * kMatrix);
    }
    // Packed sums of 16 channels and a strip: of each row of sites both rows of outputs, of channels g and g + 8.
    const auto multiply = [&](int channel, int q, uint32_t(&words)[kRows][2][2]) {
      float sums[kRows][2][4] = {};
      CARAFE_UNROLL
      for (int m = 0; m < Strip::kMatrices; m += 2) {
        const T* const from = rows[m / 2] + q * Strip::kSites * Pixels::kPixel + channel;
        uint32_t a[4] = {};
        if (m + 1 < Strip::kMatrices) {
          load_matrices<4, true>(a, from);
        } else {
          uint32_t last[2];
          load_matrices<2, true>(last, from);
          a[0] = last[0], a[1] = last[1];
        }
        CARAFE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const int own = m - r * Weights::kFirst;  // the row's matrix
          const bool first = own >= 0 && own < kMatrices, second = own + 1 >= 0 && own + 1 < kMatrices;
          CARAFE_UNROLL
          for (int y = 0; y < 2; ++y) {
            const auto& own_b = b[r][q][y];
            if (first && second) {
              multiply_add<T>(sums[r][y], a, {own_b[own], own_b[own + 1]});
            } else if (first) {
              multiply_add<T>(sums[r][y], {a[0], a[1]}, own_b[own]);
            } else if (second) {
              multiply_add<T>(sums[r][y], {a[2], a[3]}, own_b[own + 1]);
            }
          }
        }
      }
      CARAFE_UNROLL
      for (int r = 0; r < kRows; ++r) {
        CARAFE_UNROLL
        for (int y = 0; y < 2; ++y) {
          CARAFE_UNROLL
          for (int h = 0; h < 2; ++h) words[r][y][h] = narrow_pair<T>(sums[r][y][2 * h], sums[r][y][2 * h + 1]);
        }
      }
    };

    const Image<T>& image = call.output;
    const int i = (job.row + row) * G::kUp, height = image.height - i;  // rows that are left
    const int columns = image.width - job.column * G::kUp;
    T* const output = image.item(job.n) + image.offset(job.first_channel, i, job.column * G::kUp);
    CARAFE_ROLLED
    for (int done = 0;;) {
      const int end = job.channels - done < Tile::kChunk ? job.channels - done : Tile::kChunk;
      if (height > 0) {
        if constexpr (ChannelsLast) {
          const auto place = Place::of_pixel(lane, strip);
          T* const to = output + place.column * image.column_stride;
          CARAFE_ROLLED
          for (int channel = 0; channel < end; channel += Tile::kStep) {
            const int own = channel + static_cast<int>(lane % 4) * kMatrix;
            uint32_t words[2][kRows][2][2];  // of 16 channels, row, row of outputs, 8 of the channels
            multiply(channel, 0, words[0]), multiply(channel + 16, 0, words[1]);
            CARAFE_UNROLL
            for (int y = 0; y < kRows * 2; ++y) {
              Vector<uint32_t, 4> unit;
              CARAFE_UNROLL
              for (int m = 0; m < 4; ++m) unit.values[m] = transpose(words[m / 2][y / 2][y % 2][m % 2]);
              if (y < height && place.column < columns) {
                write_packed(
                    to + (y * image.row_stride + (done + own) * image.channel_stride), image.channel_stride,
                    image.units, unit, end - own);
              }
            }
          }
        } else {
          CARAFE_ROLLED
          for (int channel = static_cast<int>(warp % Tile::kTurns) * Tile::kStep; channel < end;
               channel += Tile::kTurns * Tile::kStep) {
            uint32_t words[kStrips][1][2][2], runs[2][2][kStrips];
            CARAFE_UNROLL
            for (int q = 0; q < kStrips; ++q) multiply(channel, q, words[q]);
            CARAFE_UNROLL
            for (int k = 0; k < 4; ++k) {
              CARAFE_UNROLL
              for (int q = 0; q < kStrips; ++q) runs[k / 2][k % 2][q] = words[q][0][k / 2][k % 2];
              exchange_columns(runs[k / 2][k % 2], lane, call.wide);
            }
            const auto place = Place::of_columns<kStrips>(renew(lane), call.wide);
            T* const to =
                output + image.offset(done + channel + place.channel, 0, strip * Strip::kSites * G::kUp + place.column);
            CARAFE_UNROLL
            for (int k = 0; k < 4; ++k) {
              const int y = k / 2, above = k % 2 * kMatrix;
              if (y < height) {
                write_columns(
                    call, runs[y][k % 2], to + (above * image.channel_stride + y * image.row_stride),
                    end - channel - above - place.channel, columns - strip * Strip::kSites * G::kUp - place.column);
              }
            }
          }
        }
      }
      done += Tile::kChunk;
      if (done >= job.channels) break;
      __syncthreads();  // the patch has been read
      stage(done);
      __syncthreads();
    }
  }
}

}  // namespace carafe::gpu::tensor

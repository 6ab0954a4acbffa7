// The gradient to the kernels going up, of halves, on tensor cores: the output's gradient at the outputs of four sites,
// outputs x channels, times the features of their windows, channels x pixels. docs/cuda.md draws it.
#pragma once

#include "../grad_kernels.h"
#include "fragments.h"

namespace carafe::gpu::tensor {

// What of a map lies in shared memory: rows, pixels, the channels of a pixel. Eight neighbouring pixels of a row use
// all banks once; with `Padding` elements more a row, so may those of several rows.
template <int Rows, int Columns, int Padding>
struct Staged {
  static constexpr int kRows = Rows, kColumns = Columns, kUnitChannels = 8, kUnits = 8;
  static constexpr int kChannels = kUnits * kUnitChannels;
  static constexpr int kPixel = (kUnits + 1) * kUnitChannels, kRow = Columns * kPixel + Padding;
  static constexpr int kSize = Rows * kRow;

  static __device__ __forceinline__ constexpr int at(int row, int column) { return row * kRow + column * kPixel; }
};

// Sixteen outputs, those of a quad of sites, are the rows of a product; eight pixels of a row of the features are its
// columns, of which a site has K as taps. So a quad is a row of four sites; for K = 7 it is 2 x 2, whose windows are
// eight pixels wide. A warp has a unit of 2 x 4 sites, which is two quads.
template <class T, class G>
struct GradKernelsProducts {
  static constexpr int kThreads = 256, kWarps = kThreads / 32;
  static constexpr int kQuads = 2, kUnitColumns = 4, kMostColumns = kWarps * kUnitColumns;
  static constexpr int kDepth = 16;  // channels of a product; splits may have half of one
  static constexpr int kQuadRows = G::kSide > 5 ? 2 : 1, kQuadColumns = 4 / kQuadRows;
  static constexpr int kTiles = kQuadRows - 1 + G::kSide;  // rows of features that are read, a product each
  // Columns of the patch before the tile's: an even number, since pairs of columns are staged. Where a quad's pixels
  // need not begin with its first tap, they begin with a column before.
  static constexpr int kBefore = (G::kRadius + 1) / 2 * 2;
  static constexpr int kSpare = kBefore - G::kRadius;
  static constexpr int kFirst = kQuadColumns + G::kSide - 1 + kSpare <= 8 ? kSpare : 0;  // the first tap's pixel
  static_assert(kQuadColumns + G::kSide - 1 + kFirst <= 8 && kUnitColumns * kTileRows == kQuads * 4);

  using Patch = Staged<kTileRows + G::kSide - 1, kMostColumns + 2 * kBefore, 8>;
  // A quad of 2 x 2 sites has eight outputs in two rows, which are half of the banks apart.
  using GradPatch = Staged<kTileRows * G::kUp, kMostColumns * G::kUp, kQuadRows == 2 ? 32 : 0>;
  static constexpr int kChunk = Patch::kChannels;
  static_assert(Patch::kRows % 2 == 0, "two rows are loaded at once");
  // Matrices of eight rows that a warp loads for its products.
  static constexpr int kLoads = kQuads * 4 + Patch::kRows * 2 * kQuadRows;

  // Products in shared memory, [warp][quad][row of features][output][pixel], such that 32 threads of one row of sites
  // read a tap of each kernel from different banks.
  static constexpr int kRun = kQuadRows == 1 ? 8 : 4;  // outputs that lie together
  static constexpr int kTile = 128 + 16 / kRun * 4;
  static constexpr int kQuad = kTiles * kTile + (kQuadRows == 1 ? 0 : 2);
  static constexpr int kUnit = (kQuads * kQuad + 15) / 32 * 32 + 16;
  static_assert(kUnit >= kQuads * kQuad);
  static __device__ __forceinline__ constexpr int at(int output, int pixel) {
    return output * 8 + output / kRun * 4 + pixel;
  }

  using Transfer = KernelTransfer<G, kTileRows, kMostColumns, kThreads>;
  static constexpr int kStaged = (Patch::kSize + GradPatch::kSize) * int(sizeof(T));
  static constexpr int kMeeting = kWarps * kUnit * int(sizeof(float));
  static constexpr int kBytes = std::max(kStaged, kMeeting + Transfer::kExchange * int(sizeof(T)));
};

__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Stages the first `columns` columns of a patch that begins at (row, column), of as many of its channels as products
// take: zeros where there is nothing. `channels` are left. Copies may be on their way (wait_for_copies). `Narrow`:
// half of a warp has the columns of most windows.
template <class Patch, unsigned Threads, bool Narrow, class T>
__device__ __forceinline__ void stage_patch(
    const Image<const T>& image, const T* item, int row, int column, int channels, int columns, unsigned thread,
    T* to) {
  constexpr int kUnit = Patch::kUnitChannels, kWords = kUnit / 2;
  if (image.channels_last && image.units) {  // neighbouring threads have neighbouring units
    const int first = static_cast<int>(thread % Patch::kUnits) * kUnit;
    if (first >= (channels + 15) / 16 * 16) return;
    CARAFE_ROLLED
    for (int j = static_cast<int>(thread / Patch::kUnits); j < columns; j += Threads / Patch::kUnits) {
      const bool inside = first < channels && image.inside(0, column + j);
      const T* const from = item + (inside ? image.offset(first, row, column + j) : 0);
      CARAFE_UNROLL
      for (int i = 0; i < Patch::kRows; ++i) {
        const bool exists = inside && image.inside(row + i, 0);
        const auto pixel = static_cast<uint32_t>(__cvta_generic_to_shared(to + Patch::at(i, j) + first));
        copy_async<16>(pixel, exists ? from + i * image.row_stride : item, exists);
      }
    }
  } else if (!image.channels_last && image.pairs) {
    // A warp has a unit, and a thread a pair of columns of it; of a narrow map, of every other row. Eight threads that
    // follow one another use all banks: they have four pairs, two pixels apart, of two rows; or eight pairs, of which
    // half are stored in reverse.
    constexpr int kStep = Narrow ? 2 : 1, kRows = Patch::kRows / kStep;
    static_assert(Threads == 32 * Patch::kUnits && Patch::kRows % kStep == 0);
    static_assert(!Narrow || Patch::kRow / kUnit % 2 == 1, "two rows use different banks");
    const int first = static_cast<int>(thread / 32) * kUnit, lane = static_cast<int>(thread % 32);
    if (first >= (channels + 15) / 16 * 16) return;
    const int i = Narrow ? lane % 2 : 0, stride = image.channel_stride / 2;
    const int reverse = Narrow ? 0 : lane / 4 % 2;
    const unsigned earlier = reverse ? 0x7632 : 0x5410, later = reverse ? 0x5410 : 0x7632;
    CARAFE_ROLLED
    for (int j = (Narrow ? lane / 2 : lane) * 2; j < columns; j += 64 / kStep) {
      const int left = image.inside(0, column + j) ? channels - first : 0;
      const auto* from =
          reinterpret_cast<const uint32_t*>(item + (left > 0 ? image.offset(first, row + i, column + j) : 0));
      uint32_t words[kRows][kUnit] = {};
      CARAFE_UNROLL
      for (int b = 0; b < kRows; ++b) {
        const uint32_t* at = from + b * kStep * (image.row_stride / 2);
        if (!image.inside(row + i + b * kStep, 0)) continue;
        if (left >= kUnit) {
          CARAFE_UNROLL
          for (int c = 0; c < kUnit; ++c, at += stride) words[b][c] = *at;
        } else {
          CARAFE_UNROLL
          for (int c = 0; c < kUnit; ++c, at += stride) {
            if (c < left) words[b][c] = *at;
          }
        }
      }
      CARAFE_UNROLL
      for (int b = 0; b < kRows; ++b) {
        Vector<uint32_t, kWords> one, other;
        CARAFE_UNROLL
        for (int c = 0; c < kWords; ++c) {
          one.values[c] = __byte_perm(words[b][2 * c], words[b][2 * c + 1], earlier);
          other.values[c] = __byte_perm(words[b][2 * c], words[b][2 * c + 1], later);
        }
        auto* const pixel = reinterpret_cast<uint32_t*>(to + Patch::at(i + b * kStep, j) + first);
        store_shared(pixel + reverse * (Patch::kPixel / 2), one);
        store_shared(pixel + (1 - reverse) * (Patch::kPixel / 2), other);
      }
    }
  } else {
    stage<Patch, 2>(image, item, row, column, channels, thread, Threads, to);
  }
}

// Adds the products of a warp's unit, of every `parts`-th sixteen channels from `part` on.
template <class T, class G>
__device__ __forceinline__ void add_products(
    const T* patch, const T* grad_patch, int unit, int part, int parts, int channels, int lane,
    float (&sums)[2][GradKernelsProducts<T, G>::kTiles][4]) {
  using Products = GradKernelsProducts<T, G>;
  using Patch = typename Products::Patch;
  using GradPatch = typename Products::GradPatch;
  constexpr int kDepth = Products::kDepth, kQuadRows = Products::kQuadRows, kQuadColumns = Products::kQuadColumns;
  constexpr int kOutputs = kQuadColumns * G::kUp;   // of a row of a quad
  constexpr int kWindows = kQuadRows == 1 ? 1 : 2;  // columns that quads begin at
  const int output = lane % 16;
  const T* gradients = grad_patch +
                       GradPatch::at(output / kOutputs, unit * Products::kUnitColumns * G::kUp + output % kOutputs) +
                       lane / 16 * 8 + part * kDepth;
  const T* pixels =
      patch + Patch::at(lane / 16, unit * Products::kUnitColumns + Products::kSpare - Products::kFirst + lane % 8) +
      lane / 8 % 2 * 8 + part * kDepth;
  CARAFE_ROLLED
  for (int done = part * kDepth; done < channels; done += parts * kDepth) {
    uint32_t outputs[2][4];
    CARAFE_UNROLL
    for (int q = 0; q < 2; ++q) {
      load_matrices<4, false>(
          outputs[q], gradients + (kWindows == 1 ? GradPatch::at(q * G::kUp, 0) : GradPatch::at(0, q * kOutputs)));
    }
    CARAFE_UNROLL
    for (int i = 0; i < Patch::kRows; i += 2) {
      CARAFE_UNROLL
      for (int w = 0; w < kWindows; ++w) {
        uint32_t features[4];
        load_matrices<4, false>(features, pixels + Patch::at(i, w * kQuadColumns));
        CARAFE_UNROLL
        for (int q = 0; q < 2; ++q) {
          CARAFE_UNROLL
          for (int h = 0; h < 2; ++h) {
            const int tile = kWindows == 1 ? i + h - q : i + h;
            if ((kWindows == 2 && q != w) || tile < 0 || tile >= Products::kTiles) continue;
            const uint32_t column[2] = {features[2 * h], features[2 * h + 1]};
            multiply_add<T>(sums[q][tile], outputs[q], column);
          }
        }
      }
    }
    gradients += parts * kDepth, pixels += parts * kDepth;
  }
}

// Without what lies beyond so many columns of sites.
template <class G, class T>
__device__ __forceinline__ void limit(KernelMap<T>& kernels, int columns) {
  kernels.columns = min(kernels.columns, columns);
  kernels.out_width = min(kernels.out_width, columns * G::kUp);
}

// A tile has `units` units of sites: one a warp, or the warps that have the same share the channels.
template <class T, class G>
__global__ void __launch_bounds__(
    GradKernelsProducts<T, G>::kThreads,
    G::kSide == 7 && 2 * GradKernelsProducts<T, G>::kBytes > kSharedOfMultiprocessor ? 1 : 2)
    grad_kernels_products(const __grid_constant__ GradKernelsCall<T> call, int units) {
  if constexpr (kAvailable) {
    using Products = GradKernelsProducts<T, G>;
    using Patch = typename Products::Patch;
    using GradPatch = typename Products::GradPatch;
    constexpr int kSide = G::kSide, kUp = G::kUp, kPhases = G::kPhases, kTiles = Products::kTiles;
    extern __shared__ __align__(16) unsigned char shared[];
    T* const patch = reinterpret_cast<T*>(shared);
    T* const grad_patch = patch + Patch::kSize;

    const unsigned thread = threadIdx.x;
    const int tile_columns = units * Products::kUnitColumns;
    __shared__ Tiling::Job job;  // not in registers, which are scarcer
    if (thread == 0) job = call.tiling.job(blockIdx.x, kTileRows, tile_columns);
    __syncthreads();
    const int warp = static_cast<int>(thread / 32), lane = static_cast<int>(thread % 32);
    const int parts = Products::kWarps / units, part = warp / units;

    float sums[Products::kQuads][kTiles][4] = {};
    CARAFE_ROLLED
    for (int done = 0; done < job.channels; done += Products::kChunk) {
      if (done > 0) __syncthreads();  // what was staged has been read
      const int channel = job.first_channel + done, left = job.channels - done;
      stage_patch<GradPatch, Products::kThreads, false>(
          call.grad_output, call.grad_output.item(job.n) + channel * call.grad_output.channel_stride, job.row * kUp,
          job.column * kUp, left, tile_columns * kUp, renew(thread), grad_patch);
      stage_patch<Patch, Products::kThreads, true>(
          call.features, call.features.item(job.n) + channel * call.features.channel_stride, job.row - G::kRadius,
          job.column - Products::kBefore, left, tile_columns + 2 * Products::kBefore, renew(thread), patch);
      wait_for_copies();
      __syncthreads();
      if (part < parts) {
        const int channels = left < Products::kChunk ? left : Products::kChunk;
        add_products<T, G>(patch, grad_patch, warp - part * units, part, parts, channels, lane, sums);
      }
    }

    __syncthreads();  // what was staged has been read
    float* const meeting = reinterpret_cast<float*>(shared);
    if (part < parts) {
      float* const to = meeting + warp * Products::kUnit + Products::at(lane / 4, lane % 4 * 2);
      CARAFE_UNROLL
      for (int q = 0; q < Products::kQuads; ++q) {
        CARAFE_UNROLL
        for (int j = 0; j < kTiles; ++j) {
          float* const tile = to + q * Products::kQuad + j * Products::kTile;
          store(tile, Vector<float, 2>{sums[q][j][0], sums[q][j][1]});
          store(tile + Products::at(8, 0), Vector<float, 2>{sums[q][j][2], sums[q][j][3]});
        }
      }
    }
    __syncthreads();

    const auto add = [&](int kernel, OwnKernel<G>& grad) {
      const int row = kernel / (Products::kMostColumns * kPhases), column = kernel / kPhases % Products::kMostColumns;
      const int y = kernel / kUp % kUp, x = kernel % kUp;
      const int unit = column / Products::kUnitColumns, j = column % Products::kQuadColumns;
      if (unit >= units) return;
      const bool tall = Products::kQuadRows == 2;
      const int quad = tall ? column / Products::kQuadColumns % 2 : row;
      const int output = ((tall ? row * kUp : 0) + y) * Products::kQuadColumns * kUp + j * kUp + x;
      const float* from = meeting + unit * Products::kUnit + quad * Products::kQuad +
                          (tall ? row * Products::kTile : 0) + Products::at(output, j + Products::kFirst);
      CARAFE_ROLLED
      for (int p = 0; p < parts; ++p) {
        grad.each([&](int tap) { grad.values[tap] += from[tap / kSide * Products::kTile + tap % kSide]; });
        from += units * Products::kUnit;
      }
    };
    const int rows = call.tiling.rows, columns = call.tiling.columns;
    if (call.partial != nullptr) {
      const int kernel = static_cast<int>(renew(thread));
      const int row = kernel / (Products::kMostColumns * kPhases), column = kernel / kPhases % Products::kMostColumns;
      const int i = job.row + row, j = job.column + column;
      if (column >= tile_columns || i >= rows || j >= columns) return;
      OwnKernel<G> grad = {};
      add(kernel, grad);
      const int64_t item = int64_t(job.split) * call.tiling.items + job.n * call.tiling.groups + job.group;
      float* const to =
          call.partial + (item * rows + i) * G::kTaps * columns * kPhases + j * kPhases + kernel % kPhases;
      grad.each([&](int tap) { to[tap * columns * kPhases] = grad.values[tap]; });
      return;
    }
    GradKernelsCall<T> own = call;  // without the sites of other tiles
    limit<G>(own.grad, job.column + tile_columns);
    limit<G>(own.kernels, job.column + tile_columns);
    finish_kernels<typename Products::Transfer, G>(
        own, job.n, job.group, job.row, job.column, renew(thread),
        reinterpret_cast<T*>(meeting + Products::kMeeting / int(sizeof(float))), add);
  }
}

}  // namespace carafe::gpu::tensor

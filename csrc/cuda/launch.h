// From a call to its kernels: those of the common cases, a block kernel of any geometry (general/), or a thread for
// each element. No torch here: tests launch the same kernels on an emulated device.
#pragma once

#include <cuda_runtime.h>

#include "general/calls.h"
#include "grad_features.h"
#include "grad_kernels.h"
#include "reassemble.h"
#include "tensor/grad_features.h"
#include "tensor/grad_kernels.h"
#include "tensor/reassemble.h"

namespace carafe::gpu {

// Where kernels go, and where their scratch memory comes from: allocate() returns memory of the device that stays as it
// is until the kernels that are launched now have run, aligned to 16 bytes.
struct Queue {
  int device;
  cudaStream_t stream;
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
};

using general::kMostBlocks;
constexpr int kStaticShared = 64;  // bytes of shared memory that a kernel takes beside what it is launched with

template <class Kernel, class... Arguments>
cudaError_t launch_kernel(
    const Queue& queue, Kernel kernel, int64_t blocks, int threads, int bytes, const Arguments&... arguments) {
  if (bytes + kStaticShared > general::kSharedDefault) {  // more than every GPU gives unasked
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(blocks), threads, bytes, queue.stream>>>(arguments...);
  return cudaGetLastError();
}

// What a launch asks of a device.
struct Device {
  int multiprocessors = 0;
  int shared = 0;  // bytes of shared memory that a block may have
  bool has_tensor_cores = false;

  bool fits(int bytes) const { return bytes + kStaticShared <= shared; }
};

inline cudaError_t inquire(const Queue& queue, Device* device) {
  int major = 0;
  const std::pair<cudaDeviceAttr, int*> attributes[] = {
      {cudaDevAttrMultiProcessorCount, &device->multiprocessors},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared},
      {cudaDevAttrComputeCapabilityMajor, &major}};
  for (const auto& [attribute, value] : attributes) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, queue.device)) return error;
  }
  device->has_tensor_cores = major >= tensor::kLeastMajor;
  return cudaSuccess;
}

// Elements of a row of packed weights, or of partial sums: offsets in it have 32 bits.
constexpr int64_t kMostOffset = (int64_t(1) << 31) - 1;
template <class G>
int64_t packed_row_size(int64_t columns) {
  return columns * G::kTaps * G::kPhases;
}

// See Tiling::of.
constexpr double kPreparing = 1 / 7.0;  // what a block takes for its weights, in chunks of channels
constexpr double kLeastBusy = 7 / 8.0;

// Each sets `found` to whether the call is one of its cases, and returns what the launch did.

template <class G, bool ChannelsLast, class T>
cudaError_t launch_tensor(const Reassemble<T>& call, const Queue& queue, const Device& device, bool* found) {
  using Tile = tensor::ReassembleStrips<T, G, ChannelsLast>;
  const Shape& shape = call.shape;
  const int64_t group = shape.group_channels();
  tensor::ReassembleCall<T> arguments = {};
  arguments.normalizer = call.kernels.normalizer;
  *found = device.fits(Tile::kBytes) &&
           make_image(
               call.result, shape.channels, shape.out_height, shape.out_width, group, tensor::kRunOfColumns,
               &arguments.output) &&
           make_image(call.features, shape.channels, shape.height, shape.width, group, 2, &arguments.features) &&
           make_kernel_map<G>(call.kernels.map, shape, arguments.normalizer, true, &arguments.kernels);
  if (!*found) return cudaSuccess;
  arguments.wide =
      is_aligned(call.result, call.result.column_stride, call.result.row_stride, call.result.channel_stride, kUnit<T>);
  arguments.tiling = Tiling::of(
      shape, arguments.kernels.rows, arguments.kernels.columns, kTileRows, kTileColumns, Tile::kStep,
      device.multiprocessors, Tile::kPreparing, 0);
  *found = arguments.tiling.blocks <= kMostBlocks;
  if (!*found) return cudaSuccess;
  return launch_kernel(
      queue, tensor::reassemble_strips<T, G, ChannelsLast>, arguments.tiling.blocks, kThreads, Tile::kBytes, arguments);
}

template <class G, class T>
cudaError_t launch_common(const Reassemble<T>& call, const Queue& queue, const Device& device, bool* found) {
  using Tile = ReassembleTile<T, G>;
  const Shape& shape = call.shape;
  const int64_t group = shape.group_channels();
  if constexpr (G::kUp == 2 && is_half_precision<T>) {
    if (device.has_tensor_cores) {
      const cudaError_t error = call.result.has_adjacent_channels()
                                    ? launch_tensor<G, true>(call, queue, device, found)
                                    : launch_tensor<G, false>(call, queue, device, found);
      if (*found || error != cudaSuccess) return error;
    }
  }
  ReassembleCall<T> arguments = {};
  arguments.normalizer = call.kernels.normalizer;
  *found =
      make_image(
          call.result, shape.channels, shape.out_height, shape.out_width, group, kStrip * G::kUp, &arguments.output) &&
      make_image(call.features, shape.channels, shape.height, shape.width, group, 1, &arguments.features) &&
      make_kernel_map<G>(call.kernels.map, shape, arguments.normalizer, true, &arguments.kernels) &&
      device.fits(Tile::kBytes);
  if (!*found) return cudaSuccess;
  arguments.tiling = Tiling::of(
      shape, arguments.kernels.rows, arguments.kernels.columns, kTileRows, kTileColumns, Tile::kOfLanes,
      device.multiprocessors, Tile::kUnits * kPreparing, 0, kLeastBusy, Tile::kUnits);
  *found = arguments.tiling.blocks <= kMostBlocks;
  if (!*found) return cudaSuccess;
  return launch_kernel(queue, reassemble_tile<T, G>, arguments.tiling.blocks, kThreads, Tile::kBytes, arguments);
}

// How many rows a block of the gradient to the features goes down. It stages K - 1 more than that, at `staging` of the
// cost of computing one; and a multiprocessor that has one block alone waits for memory half of the time.
inline int64_t rows_of_strip(int64_t rows, int64_t side, int64_t strips, int64_t multiprocessors, double staging = 1) {
  int64_t best = rows;
  double least = 0;
  for (int64_t count = rows;;) {  // as few rows as do for so many runs
    const int64_t runs = ceil_div(rows, count);
    count = ceil_div(rows, runs);
    const double busy = double(ceil_div(runs * strips, multiprocessors));
    const double time = (busy + 1) * (double(count) + staging * double(count + side - 1));
    if (least == 0 || time < least) least = time, best = count;
    if (count == 1) break;
    --count;
  }
  return best;
}

template <class G, bool ChannelsLast, class T>
cudaError_t launch_tensor(const GradFeatures<T>& call, const Queue& queue, const Device& device, bool* found) {
  using Strip = tensor::GradFeaturesStrip<T, G, ChannelsLast>;
  using Weights = typename Strip::Weights;
  const Shape& shape = call.shape;
  const Map<const T>& map = call.grad_output;
  const int64_t group = shape.group_channels();
  tensor::GradFeaturesCall<T> arguments = {};
  tensor::PackCall<T> pack = {};
  pack.normalizer = call.kernels.normalizer;
  *found = device.fits(Strip::kBytes) &&
           make_image(call.result, shape.channels, shape.height, shape.width, group, 2, &arguments.grad) &&
           make_image(map, shape.channels, shape.out_height, shape.out_width, group, 1, &arguments.grad_output) &&
           make_kernel_map<G>(call.kernels.map, shape, pack.normalizer, true, &pack.kernels);
  if (!*found) return cudaSuccess;
  const auto aligned = [&](int count) {
    return shape.out_width % count == 0 &&
           is_aligned(map, map.column_stride, map.row_stride, map.channel_stride, count);
  };
  arguments.copied = ChannelsLast ? (arguments.grad_output.units ? kUnit<T> : 1) : aligned(4) ? 4 : aligned(2) ? 2 : 1;
  const int64_t strips =
      ceil_div(shape.width, Strip::kColumns) * ceil_div(group, Strip::kChunk) * shape.groups * shape.batch;
  const int64_t rows = rows_of_strip(shape.height, G::kSide, strips, device.multiprocessors, Strip::kStaging);
  arguments.tiling =  // a chunk a block, as for any number of multiprocessors
      Tiling::of(shape, shape.height, shape.width, rows, Strip::kColumns, Strip::kChunk, kMostBlocks, 0, 0);
  arguments.rows_of_block = static_cast<int>(rows);
  arguments.rows = pack.kernels.rows;
  const int64_t tiles = ceil_div(shape.width, Weights::kColumns);
  pack.tiles = arguments.tiles = static_cast<int>(tiles);
  pack.groups = arguments.tiling.groups;
  pack.blocks_of_row = static_cast<unsigned>(ceil_div(tiles, tensor::kPackTiles));
  const int64_t all_rows = int64_t(arguments.rows) * arguments.tiling.items;
  *found = arguments.tiling.blocks <= kMostBlocks && all_rows * pack.blocks_of_row <= kMostBlocks;
  if (!*found) return cudaSuccess;
  pack.packed = static_cast<T*>(queue.allocate(queue.context, all_rows * tiles * Weights::kSize * int64_t(sizeof(T))));
  if (pack.packed == nullptr) return cudaErrorMemoryAllocation;
  arguments.packed = pack.packed;
  if (const cudaError_t error =
          launch_kernel(queue, tensor::pack_weights<T, G>, all_rows * pack.blocks_of_row, kThreads, 0, pack)) {
    return error;
  }
  return launch_kernel(
      queue, tensor::grad_features_strip<T, G, ChannelsLast>, arguments.tiling.blocks, Strip::kThreads, Strip::kBytes,
      arguments);
}

template <class G, class T>
cudaError_t launch_common(const GradFeatures<T>& call, const Queue& queue, const Device& device, bool* found) {
  if constexpr (G::kUp == 2 && is_half_precision<T>) {
    if (device.has_tensor_cores) {
      const cudaError_t error = call.grad_output.has_adjacent_channels()
                                    ? launch_tensor<G, true>(call, queue, device, found)
                                    : launch_tensor<G, false>(call, queue, device, found);
      if (*found || error != cudaSuccess) return error;
    }
  }
  const Shape& shape = call.shape;
  const int64_t group = shape.group_channels();
  using Tile = std::conditional_t<G::kUp == 1, GradFeaturesTile<T, G>, GradFeaturesStrip<T, G>>;
  GradFeaturesCall<T> arguments = {};
  arguments.normalizer = call.kernels.normalizer;
  *found =
      make_image(call.result, shape.channels, shape.height, shape.width, group, kStrip * G::kDown, &arguments.grad) &&
      make_image(
          call.grad_output, shape.channels, shape.out_height, shape.out_width, group, 1, &arguments.grad_output) &&
      make_kernel_map<G>(call.kernels.map, shape, arguments.normalizer, true, &arguments.kernels) &&
      device.fits(Tile::kBytes);
  if (!*found) return cudaSuccess;
  if constexpr (G::kUp == 1) {
    arguments.tiling = Tiling::of(
        shape, ceil_div(shape.height, G::kDown), ceil_div(shape.width, G::kDown), kTileRows, kTileColumns, Tile::kChunk,
        device.multiprocessors, kPreparing, 0);
    *found = arguments.tiling.blocks <= kMostBlocks;
    if (!*found) return cudaSuccess;
    return launch_kernel(queue, grad_features_tile<T, G>, arguments.tiling.blocks, kThreads, Tile::kBytes, arguments);
  } else {
    const int64_t strips =
        ceil_div(shape.width, Tile::kColumns) * ceil_div(group, Tile::kChunk) * shape.groups * shape.batch;
    const int64_t rows = rows_of_strip(shape.height, G::kSide, strips, device.multiprocessors);
    arguments.tiling =  // a chunk a block, as for any number of multiprocessors
        Tiling::of(shape, shape.height, shape.width, rows, Tile::kColumns, Tile::kChunk, kMostBlocks, 0, 0);
    PackCall<T> pack = {nullptr, arguments.kernels, arguments.normalizer, arguments.tiling.groups, 0};
    pack.blocks_of_row = static_cast<unsigned>(ceil_div(int64_t(arguments.kernels.columns) * G::kPhases, kThreads));
    const int64_t row_blocks = int64_t(pack.blocks_of_row) * arguments.kernels.rows * arguments.tiling.items;
    *found = arguments.tiling.blocks <= kMostBlocks && row_blocks <= kMostBlocks &&
             packed_row_size<G>(arguments.kernels.columns) <= kMostOffset;
    if (!*found) return cudaSuccess;
    const int64_t sites = int64_t(arguments.kernels.rows) * arguments.kernels.columns * arguments.tiling.items;
    pack.packed =
        static_cast<float*>(queue.allocate(queue.context, sites * G::kTaps * G::kPhases * int64_t(sizeof(float))));
    if (pack.packed == nullptr) return cudaErrorMemoryAllocation;
    arguments.packed = pack.packed;
    if (const cudaError_t error = launch_kernel(queue, pack_weights<T, G>, row_blocks, kThreads, 0, pack)) {
      return error;
    }
    return launch_kernel(
        queue, grad_features_strip<T, G>, arguments.tiling.blocks, kThreads, Tile::kBytes, arguments,
        static_cast<int>(rows));
  }
}

// How tensor::grad_kernels_products is cut: the sites of a tile, in units, and the shares of the channels, such that
// the busiest multiprocessor has least to do. That is counted in clocks, of shared memory and the L1 cache, which hand
// out 128 bytes, and of instructions, by what the model (benchmarks.gpu_model) says of the code as it is.
template <class Products, class G>
Tiling tile_products(
    const Shape& shape, int64_t rows, int64_t columns, bool channels_last, int64_t multiprocessors, int* units) {
  constexpr int64_t kShare = Products::kDepth / 2;
  constexpr double kLine = 128, kTaps = G::kTaps, kSecondLaunch = 1500;
  const int64_t most = ceil_div(shape.group_channels(), kShare), items = shape.batch * shape.groups;
  const int64_t tile_rows = ceil_div(rows, kTileRows);
  const auto busiest = [&](int64_t blocks) { return ceil_div(blocks, multiprocessors); };
  double least = 0;
  Tiling best = {};
  const auto consider = [&](int64_t width, int64_t share) {
    const double sites = double(width * Products::kUnitColumns);
    const double patch_rows = Products::Patch::kRows, grad_rows = Products::GradPatch::kRows;
    const double patch = 2 * (sites + 2 * Products::kBefore), grad = 2 * G::kUp * sites;  // bytes of a row
    const double staged = (patch_rows * patch + grad_rows * grad) / kLine;                // of a channel
    const double read = channels_last ? staged : patch_rows * (1 + patch / kLine) + grad_rows * (1 + grad / kLine);
    const double products = double(width) * Products::kLoads / Products::kDepth;
    const double channels = double(share * kShare);
    const int64_t splits = ceil_div(most, share), tile_columns = ceil_div(columns, width * Products::kUnitColumns);
    const int64_t blocks = tile_rows * tile_columns * items * splits;
    using Fixed = std::pair<double, double>;  // for each tap, to add up and to finish
    const Fixed fixed = splits > 1 ? Fixed{24, 20} : channels_last ? Fixed{40, 115} : Fixed{64, 88};
    const double moved = channels * (read + staged + products) + fixed.first * kTaps;
    const double issued = channels * staged * (channels_last ? 2 : 3.2) + fixed.second * kTaps;
    double time = double(busiest(blocks)) * std::max(moved, issued);
    if (splits > 1) {
      const int64_t finishing = rows * ceil_div(columns * G::kPhases, kFinishThreads) * items;
      time += double(ceil_div(busiest(finishing), 4)) * double(31 + 3 * splits) * kTaps + kSecondLaunch;
    }
    if (least != 0 && time >= least) return;
    const auto number = [](int64_t value) { return static_cast<int>(value); };
    least = time, *units = number(width);
    best = {
        number(rows),
        number(columns),
        number(tile_rows),
        number(tile_columns),
        number(items),
        number(shape.groups),
        number(shape.group_channels()),
        number(splits),
        number(share * kShare),
        blocks};
  };
  for (int64_t width = Products::kWarps; width >= 1; --width) {
    const int64_t tiles = tile_rows * ceil_div(columns, width * Products::kUnitColumns) * items;
    consider(width, most);
    for (const int64_t generations : {1, 2}) {
      const int64_t splits = std::min(most, generations * multiprocessors / tiles);
      if (splits > 1) consider(width, ceil_div(most, splits));
    }
  }
  return best;
}

template <class G, class T>
cudaError_t launch_common(const GradKernels<T>& call, const Queue& queue, const Device& device, bool* found) {
  using Tile = GradKernelsTile<T, G>;
  const Shape& shape = call.shape;
  const int64_t group = shape.group_channels();
  GradKernelsCall<T> arguments = {};
  arguments.normalizer = call.kernels.normalizer;
  *found = make_kernel_map<G>(call.result, shape, arguments.normalizer, false, &arguments.grad) &&
           make_image(
               call.grad_output, shape.channels, shape.out_height, shape.out_width, group, 1, &arguments.grad_output) &&
           make_image(call.features, shape.channels, shape.height, shape.width, group, 1, &arguments.features) &&
           (arguments.normalizer == Normalizer::none ||
            make_kernel_map<G>(call.kernels.map, shape, arguments.normalizer, false, &arguments.kernels));
  if (!*found) return cudaSuccess;
  const int rows = arguments.grad.rows, columns = arguments.grad.columns;
  const auto launch = [&](auto kernel, int threads, int bytes, const auto&... more) {
    const Tiling& tiling = arguments.tiling;
    const int64_t blocks_of_row = ceil_div(int64_t(columns) * G::kPhases, kFinishThreads);
    const int64_t row_blocks = blocks_of_row * rows * tiling.items;
    *found = tiling.blocks <= kMostBlocks && row_blocks <= kMostBlocks && packed_row_size<G>(columns) <= kMostOffset;
    if (!*found) return cudaSuccess;
    if (tiling.splits > 1) {
      const int64_t sums = int64_t(tiling.splits) * tiling.items * rows * columns * G::kTaps * G::kPhases;
      arguments.partial = static_cast<float*>(queue.allocate(queue.context, sums * int64_t(sizeof(float))));
      if (arguments.partial == nullptr) return cudaErrorMemoryAllocation;
    }
    const cudaError_t error = launch_kernel(queue, kernel, tiling.blocks, threads, bytes, arguments, more...);
    if (error != cudaSuccess || arguments.partial == nullptr) return error;
    return launch_kernel(
        queue, finish_splits<T, G>, row_blocks, kFinishThreads, 0, arguments, static_cast<unsigned>(blocks_of_row));
  };
  if constexpr (G::kUp > 1 && is_half_precision<T>) {
    using Products = tensor::GradKernelsProducts<T, G>;
    if (device.has_tensor_cores && device.fits(Products::kBytes)) {
      int units = 0;
      arguments.tiling = tile_products<Products, G>(
          shape, rows, columns, call.grad_output.has_adjacent_channels(), device.multiprocessors, &units);
      return launch(tensor::grad_kernels_products<T, G>, Products::kThreads, Products::kBytes, units);
    }
  }
  *found = device.fits(Tile::kBytes);
  if (!*found) return cudaSuccess;
  arguments.tiling = Tiling::of(
      shape, rows, columns, kTileRows, kTileColumns, Tile::kChunk, device.multiprocessors, kPreparing, 1, 1, 1,
      Tile::kThreads / 32);
  return launch(grad_kernels_tile<T, G>, Tile::kThreads, Tile::kBytes);
}

// The common cases: up or down by 2, k = 3, 5 or 7, not float64.
template <class Call>
cudaError_t launch_common(const Call& call, const Queue& queue, bool* found) {
  *found = false;
  if constexpr (!std::is_same_v<typename Call::type, double>) {
    const Shape& shape = call.shape;
    if (shape.group_channels() == 0 || shape.out_height == 0 || shape.out_width == 0) return cudaSuccess;
    Device device;
    if (const cudaError_t error = inquire(queue, &device)) return error;
    const auto is = [&](int side, int up, int down) {
      return shape.kernel == side && shape.up == up && shape.down == down;
    };
    if (is(5, 2, 1)) return launch_common<Geometry<5, 2, 1>>(call, queue, device, found);
    if (is(3, 2, 1)) return launch_common<Geometry<3, 2, 1>>(call, queue, device, found);
    if (is(7, 2, 1)) return launch_common<Geometry<7, 2, 1>>(call, queue, device, found);
    if (is(5, 1, 2)) return launch_common<Geometry<5, 1, 2>>(call, queue, device, found);
    if (is(3, 1, 2)) return launch_common<Geometry<3, 1, 2>>(call, queue, device, found);
    if (is(7, 1, 2)) return launch_common<Geometry<7, 1, 2>>(call, queue, device, found);
  }
  return cudaSuccess;
}

constexpr int64_t kBlocksThatLoop = 1 << 20;  // the general kernels' blocks, which take what more there is in turns

// The CUDA side of a block kernel (general/sites.h): its steps, and a barrier after each.
template <class Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kResident) run_block(const __grid_constant__ Block block) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ general::Job job;  // not in registers, which are scarcer
  typename Block::State state;
  const uint32_t blocks = block.grid.blocks;
  for (uint32_t index = blockIdx.x; index < blocks; index += gridDim.x) {
    if (threadIdx.x == 0) job = block.grid.job(index);
    __syncthreads();
    for (int step = 0; step < block.steps(); ++step) {
      int thread = static_cast<int>(threadIdx.x);
      asm volatile("" : "+r"(thread));  // or what follows from it for one step takes registers from all others
      block.run(job, step, thread, state, reinterpret_cast<typename Block::A*>(shared));
      __syncthreads();
    }
  }
}

// Launches the block kernel with the shared memory that every GPU gives a block, so that several blocks share a
// multiprocessor, and where that is not enough with all that this one gives.
template <class Call>
cudaError_t launch_block(const Call& call, const Queue& queue, bool* found) {
  cudaError_t error = cudaSuccess;
  const auto launch = [&](const auto& block) {
    using Block = std::decay_t<decltype(block)>;
    const auto bytes = static_cast<int>(block.grid.shared * sizeof(typename Block::A));
    const int64_t blocks = std::min<int64_t>(block.grid.blocks, kBlocksThatLoop);
    error = launch_kernel(queue, run_block<Block>, blocks, block.grid.threads, bytes, block);
  };
  *found = general::run_block(call, general::kSharedDefault - kStaticShared, launch);
  if (*found) return error;
  int most = 0;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device);
  if (error != cudaSuccess) return error;
  *found = general::run_block(call, most - kStaticShared, launch);
  return error;
}

constexpr int kElementThreads = 256;

// Computes every element of the result, of such a size, neighbouring threads on neighbouring addresses.
template <class Operator>
__global__ void __launch_bounds__(kElementThreads, 2)
    run_elements(const Operator call, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t count = batch * channels * height * width;
  const bool channels_last = call.result.channel_stride == 1 && channels > 1;
  for (int64_t index = int64_t(blockIdx.x) * kElementThreads + threadIdx.x; index < count;
       index += int64_t(gridDim.x) * kElementThreads) {
    int64_t rest = index, n, c, i, j;
    if (channels_last) {
      c = rest % channels, rest /= channels;
      j = rest % width, rest /= width;
      i = rest % height, n = rest / height;
    } else {
      j = rest % width, rest /= width;
      i = rest % height, rest /= height;
      c = rest % channels, n = rest / channels;
    }
    call.result.at(n, c, i, j) = call.element(n, c, i, j);
  }
}

// Launches what computes `call`, whose result is a map of such a size and has elements. cudaErrorNotSupported: with a
// normalizer, the kernels of a pixel must fit into a block's shared memory.
template <class Call>
cudaError_t launch(const Call& call, int64_t channels, int64_t height, int64_t width, const Queue& queue) {
  bool found = false;
  cudaError_t error = launch_common(call, queue, &found);
  if (found || error != cudaSuccess) return error;
  error = launch_block(call, queue, &found);
  if (found || error != cudaSuccess) return error;
  if (call.kernels.normalizer != Normalizer::none) return cudaErrorNotSupported;
  const int64_t count = call.shape.batch * channels * height * width;
  const int64_t blocks = std::min(ceil_div(count, kElementThreads), kBlocksThatLoop);
  return launch_kernel(
      queue, run_elements<Call>, blocks, kElementThreads, 0, call, call.shape.batch, channels, height, width);
}

template <class T>
cudaError_t launch(const Reassemble<T>& call, const Queue& queue) {
  return launch(call, call.shape.channels, call.shape.out_height, call.shape.out_width, queue);
}
template <class T>
cudaError_t launch(const GradFeatures<T>& call, const Queue& queue) {
  return launch(call, call.shape.channels, call.shape.height, call.shape.width, queue);
}
template <class T>
cudaError_t launch(const GradKernels<T>& call, const Queue& queue) {
  const Shape& shape = call.shape;
  const bool from_logits = call.kernels.normalizer != Normalizer::none && shape.up > 1;
  const int64_t phases = from_logits ? shape.up * shape.up : 1;
  return launch(
      call, shape.mask_channels() * phases, from_logits ? shape.height : shape.out_height,
      from_logits ? shape.width : shape.out_width, queue);
}

}  // namespace carafe::gpu

// How a call is cut into blocks, and a block into threads: one choice for the CUDA launcher and for the host.
#pragma once

#include <algorithm>

#include "kernels.h"
#include "patch.h"

namespace carafe::gpu::general {

struct Grid {
  int rows, columns;  // of a block's tile, in sites
  int slots;          // threads that share a tile's site, each with channels of its own
  int chunks;         // of channels, that a block takes one after another
  int threads;
  int64_t shared;                                    // elements of shared memory
  uint32_t tile_rows, tile_columns, splits, groups;  // blocks along each axis
  uint32_t blocks;                                   // in all
  int group_channels, split_channels;

  // Blocks that share weights, then blocks that share features follow one another, for the sake of the cache.
  CARAFE_HOST_DEVICE Job job(uint32_t index) const {
    const int first = static_cast<int>(index % splits) * split_channels;
    index /= splits;
    const int column = static_cast<int>(index % tile_columns) * columns;
    index /= tile_columns;
    const int row = static_cast<int>(index % tile_rows) * rows;
    index /= tile_rows;
    const int group = static_cast<int>(index % groups), n = static_cast<int>(index / groups);
    const int left = group_channels - first, channels = split_channels < left ? split_channels : left;
    return {n, group, row, column, group * group_channels + first, channels};
  }
};

constexpr int64_t kSharedDefault = 48 << 10;             // bytes of shared memory that every GPU gives a block unasked
constexpr int kGoodThreads = 128;                        // fewer in a block leave a multiprocessor idle
constexpr int64_t kMostBlocks = (int64_t(1) << 31) - 1;  // along the first axis of CUDA's grid
constexpr int64_t kManyBlocks = 1024;  // fill the largest GPU: weights are staged anew for every range of channels

// What every block kernel has: the sites of the call, how they are cut, and how what a block stages lies in shared
// memory. Its lay_out() follows from the sites and the grid, its shared_size() and threads() from all of them.
struct Tiled {
  Sites sites;
  Grid grid;
  KernelLayout kernels;
  Patch patch;

  Patch feature_patch(int quads) const {
    const int scale = sites.feature_scale();
    return {grid.rows + sites.reach(), grid.columns + sites.reach(), scale, scale, quads};
  }
  // What a patch holds from channel `done` of the job on: of the features,
  CARAFE_HOST_DEVICE Window feature_window(const Job& job, int done) const {
    const int row = job.row - sites.before(), column = job.column - sites.before();
    const int first = job.first_channel + done, left = job.channels - done, scale = sites.feature_scale();
    return {job.n, first, left, row, column, sites.feature_height, sites.feature_width, scale, 0};
  }
  // or of the output's gradient, with so many sites around the tile.
  CARAFE_HOST_DEVICE Window output_window(const Job& job, int done, int around, int phase_row) const {
    const int row = job.row - around, column = job.column - around;
    const int first = job.first_channel + done, left = job.channels - done, scale = sites.output_scale();
    return {job.n, first, left, row, column, sites.output_height, sites.output_width, scale, phase_row};
  }
};

// Cuts a call: the first tile that leaves a block enough threads, or the one with most of them; false where none fits.
template <class Block>
bool plan_tiles(const Shape& shape, bool channels_last, int64_t shared_bytes, Block* block) {
  constexpr int kTiles[][2] = {{4, 16}, {4, 8}, {2, 8}, {2, 4}, {1, 4}};
  const int64_t group_channels = shape.group_channels();
  Grid chosen = {};
  block->sites = make_sites(shape);
  const auto lay_out = [&](const Grid& grid) {
    block->grid = grid;
    block->kernels = KernelLayout::of(block->sites, grid.rows, grid.columns, Block::kPhases);
    block->lay_out();
  };
  for (const auto& tile : kTiles) {
    for (int slots = Block::most_slots(tile[0] * tile[1], channels_last); slots >= 1; slots /= 2) {
      if (slots > 1 && (slots / 2) * Block::kChannels >= group_channels) continue;  // half of them would do
      Grid grid = {};
      grid.rows = tile[0], grid.columns = tile[1], grid.slots = slots;
      lay_out(grid);
      const int64_t threads = block->threads(), shared = block->shared_size();
      const bool fits = threads <= Block::kThreads && shared * int64_t(sizeof(typename Block::A)) <= shared_bytes;
      if (!fits || threads <= chosen.threads) continue;
      grid.threads = static_cast<int>(threads), grid.shared = shared;
      chosen = grid;
      if (threads >= kGoodThreads) break;
    }
    if (chosen.threads >= kGoodThreads) break;
  }
  if (chosen.threads == 0) return false;
  const int64_t tile_rows = ceil_div(block->sites.height, chosen.rows);
  const int64_t tile_columns = ceil_div(block->sites.width, chosen.columns);
  const int64_t tiles = std::max<int64_t>(1, tile_rows * tile_columns * shape.groups * shape.batch);
  const int64_t chunk = int64_t(chosen.slots) * Block::kChannels;
  const int64_t chunks = std::max<int64_t>(1, ceil_div(group_channels, chunk));
  const int64_t wanted = Block::kSplits ? std::min(chunks, ceil_div(kManyBlocks, tiles)) : 1;
  const int64_t chunks_each = ceil_div(chunks, wanted), splits = ceil_div(chunks, chunks_each);
  if (tiles * splits > kMostBlocks) return false;
  chosen.tile_rows = static_cast<uint32_t>(tile_rows), chosen.tile_columns = static_cast<uint32_t>(tile_columns);
  chosen.splits = static_cast<uint32_t>(splits), chosen.groups = static_cast<uint32_t>(shape.groups);
  chosen.blocks = static_cast<uint32_t>(tiles * splits);
  chosen.chunks = static_cast<int>(chunks_each);
  chosen.group_channels = static_cast<int>(group_channels);
  chosen.split_channels = static_cast<int>(chunks_each * chunk);
  lay_out(chosen);
  return true;
}

}  // namespace carafe::gpu::general

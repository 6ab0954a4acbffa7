// The tiles of a call: one image, one group, a band of source rows, a range of lanes (buffer.h says what a lane is). A
// tile stages what it reads, computes, and writes only its own elements; each element's sum has one order, whatever the
// tiling, so the bits depend neither on the number of threads nor on their timing.
#pragma once

#include <variant>

#include "../common/operators.h"
#include "simd.h"

namespace carafe {

struct Plan {
  int64_t bands;         // of source rows, as equal as can be
  int64_t spans, lanes;  // spans of at most `lanes` lanes
  int64_t tiles;         // batch * groups * bands * spans
};

template <template <class> class... Operators>
using AnyOf = std::variant<Operators<double>..., Operators<float>..., Operators<Half>..., Operators<BFloat16>...>;
using Call = AnyOf<Reassemble, GradFeatures, GradKernels>;

// Computes tiles [begin, end) of a call, each in the source file of its name.
void run_baseline(const Plan& plan, const Call& call, int64_t begin, int64_t end);
#ifdef CARAFE_X86
void run_avx2(const Plan& plan, const Call& call, int64_t begin, int64_t end);
void run_avx512(const Plan& plan, const Call& call, int64_t begin, int64_t end);
#endif

struct Tile {
  int64_t n, group;
  int64_t row_begin, row_end;  // source rows
  int64_t lane_begin, lanes;
};

constexpr int64_t kMaxLanes = 192;          // of a span
constexpr int64_t kMaskBytes = 384 * 1024;  // staged masks of a band, to stay in the second-level cache
constexpr int64_t kMaxRows = 16;            // of a band
constexpr int64_t kChunk = 16;              // channels staged at a time

template <class A>
Plan plan_tiles(const Shape& shape, int64_t threads) {
  const int64_t vector = kVectorBytes / int64_t(sizeof(A));
  const int64_t all_lanes = std::max(ceil_div(shape.out_width, shape.up), ceil_div(shape.width, shape.down));
  Plan plan;
  plan.spans = ceil_div(all_lanes, kMaxLanes);
  plan.lanes = ceil_div(ceil_div(all_lanes, plan.spans), vector) * vector;
  plan.spans = ceil_div(all_lanes, plan.lanes);
  const int64_t outputs_a_row = ceil_div(shape.up, shape.down) * shape.up;
  const int64_t bytes_a_row = shape.taps() * outputs_a_row * plan.lanes * int64_t(sizeof(A));
  const int64_t most = std::clamp<int64_t>(kMaskBytes / bytes_a_row, 1, kMaxRows);
  // Threads take equal numbers of tiles.
  const int64_t tiles_a_band = std::max<int64_t>(1, shape.batch * shape.groups * plan.spans);
  plan.bands = ceil_div(shape.height, most);
  while (plan.bands < shape.height && plan.bands * tiles_a_band % threads != 0) ++plan.bands;
  plan.tiles = shape.batch * shape.groups * plan.bands * plan.spans;
  return plan;
}

inline Tile make_tile(const Shape& shape, const Plan& plan, int64_t index) {
  Tile tile;
  tile.lane_begin = index % plan.spans * plan.lanes;
  tile.lanes = plan.lanes;
  index /= plan.spans;
  tile.row_begin = index % plan.bands * shape.height / plan.bands;
  tile.row_end = (index % plan.bands + 1) * shape.height / plan.bands;
  index /= plan.bands;
  tile.group = index % shape.groups;
  tile.n = index / shape.groups;
  return tile;
}

// How many lanes of outputs that are wanted a tile has.
inline int64_t valid_lanes(const Shape& shape, const Tile& tile) {
  return std::clamp<int64_t>(ceil_div(shape.out_width, shape.up) - tile.lane_begin, 0, tile.lanes);
}

// Outputs [begin, end) of source rows [first, last), clipped to those that are wanted.
struct OutputRows {
  int64_t begin, end;
  OutputRows(const Shape& shape, int64_t first, int64_t last)
      : begin(std::min(shape.out_height, shape.first_output(std::max<int64_t>(first, 0)))),
        end(std::min(shape.out_height, shape.first_output(std::clamp<int64_t>(last, 0, shape.height)))) {}
  int64_t count() const { return std::max<int64_t>(0, end - begin); }
};

}  // namespace carafe

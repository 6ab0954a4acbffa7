// The gradient to features from staged cotangents and weights: vectors run along the row, a block of channels and taps
// stays in registers.
#pragma once

#include "loops.h"

namespace carafe {

// What every output sends to U neighbouring tap columns of a feature row, still in the lanes of the outputs: so all
// loads are aligned, and one cotangent serves U taps.
template <class V, int U, int C, class A>
CARAFE_INLINE void column_sums_block(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks, int64_t tap_step,
    const A* grad_output, int64_t channel_step, A* sums, int64_t column_step, int64_t sum_channel_step, int64_t begin,
    int64_t end) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      typename V::type cotangent[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) cotangent[c] = V::load(grad_output + c * channel_step + grad_offsets[t] + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        const typename V::type weight = shared<V>(V::load(masks + u * tap_step + mask_offsets[t] + q));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[u][c] += weight * cotangent[c];
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) V::store(sums + u * column_step + c * sum_channel_step + q, sum[u][c]);
    }
  }
}

template <class V, int C, class A>
CARAFE_INLINE void column_sums(
    int64_t columns, int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    int64_t tap_step, const A* grad_output, int64_t channel_step, const Staged<A>& sums, int64_t begin, int64_t end) {
  for_each_block<5, 3, 1>(columns, [&](auto taps, int64_t column) CARAFE_ALWAYS_INLINE {
    column_sums_block<V, taps, C>(
        contributions, mask_offsets, grad_offsets, masks + column * tap_step, tap_step, grad_output, channel_step,
        sums.data + column * sums.row_stride(), sums.row_stride(), sums.channel_stride(), begin, end);
  });
}

// Moves the sums of every tap column to the features' lanes and adds them up.
template <class V, class A>
CARAFE_INLINE void shift_columns(int64_t kernel, const A* sums, int64_t column_step, A* grad, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum = {};
    for (int64_t v = 0; v < kernel; ++v) sum += V::load(sums + v * column_step + q + kernel / 2 - v);
    V::store(grad + q, sum);
  }
}

// One row of gradients where the lane that a tap reaches depends on the output phase, or where there is one phase: the
// contributions (a mask lane and a cotangent lane each) of every tap and output phase, gathered.
template <class V, int C, class A>
CARAFE_INLINE void grad_features_block(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    const A* grad_output, int64_t channel_step, A* grad, int64_t grad_channel_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      const typename V::type weight = V::load(masks + mask_offsets[t] + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c] += weight * V::load(grad_output + c * channel_step + grad_offsets[t] + q);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) V::store(grad + c * grad_channel_step + q, sum[c]);
  }
}

// Downsampling by 2, two rows and both residues at a time, those of features that see the same outputs: a cotangent
// that is loaded serves up to four of them. `mask_offsets` has a place for each of the four, kAbsent where it gets
// nothing.
constexpr int kSquare = 4;
constexpr int64_t kAbsent = -1;  // no offset: only tap 0 lies within a few lanes of the start, and it shifts upwards

template <class V, int C, class A>
CARAFE_INLINE void grad_features_square(
    int64_t contributions, const int64_t* mask_offsets, const int64_t* grad_offsets, const A* masks,
    const A* grad_output, int64_t channel_step, A* grad, int64_t pitch, int64_t grad_channel_step, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[kSquare][C] = {};
    for (int64_t t = 0; t < contributions; ++t) {
      typename V::type cotangent[C];
      const A* from = grad_output + grad_offsets[t] + q;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c, from += channel_step) cotangent[c] = V::load(from);
#pragma GCC unroll 4
      for (int each = 0; each < kSquare; ++each) {
        const int64_t offset = mask_offsets[kSquare * t + each];
        if (offset == kAbsent) continue;
        typename V::type weight = V::load(masks + offset + q);
        if constexpr (C > 1) weight = shared<V>(weight);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[each][c] += weight * cotangent[c];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 4
      for (int each = 0; each < kSquare; ++each)
        V::store(grad + c * grad_channel_step + each * pitch + q, sum[each][c]);
    }
  }
}

inline bool by_squares(const Shape& shape) { return shape.up == 1 && shape.down == 2; }

// Whether gradients to features go by tap columns: then the lane that a tap reaches is the same for all phases of an
// output, and there are phases enough to make up for moving the sums.
inline bool by_columns(const Shape& shape) { return shape.down == 1 && shape.up > 1; }

constexpr int64_t kBlockChannels = 4;  // the most that grad_features_staged takes at a time

// How many outputs' taps reach one row of features, or one tap column of it, at most.
inline int64_t most_contributions(const Shape& shape) {
  return (by_columns(shape) ? shape.kernel : shape.taps()) * ceil_div(shape.up, shape.down) * shape.up;
}

// How many offsets the loops below list.
inline int64_t most_gradient_offsets(const Shape& shape) {
  const int64_t outputs_a_side = (shape.kernel + 2) / 2;
  return std::max(2 * most_contributions(shape), (1 + kSquare) * outputs_a_side * outputs_a_side);
}

// What the gradients of a tile's rows are computed from: `dx` from the channels of `dy` and the weights `m` of outputs
// `rows`. `sums` has room for a row of every tap column of kBlockChannels channels, zero in its halo; `offsets` for
// most_gradient_offsets().
template <class A>
struct FeatureGradient {
  const Shape& shape;
  const Tile& tile;
  const Staged<A>&dy, &m, &dx, &sums;
  int64_t* offsets;
  OutputRows rows{shape, tile.row_begin - shape.radius(), tile.row_end + shape.radius()};

  CARAFE_INLINE A* row(int64_t c, int64_t i) const {
    return dx.data + c * dx.channel_stride() + (i - tile.row_begin) * dx.row_stride();
  }

  // Calls visit(u, place, phase) for every output phase of every row that tap row u joins to feature row i.
  template <class Visit>
  CARAFE_INLINE void for_each_place(int64_t i, const Visit& visit) const {
    for (int64_t u = 0; u < shape.kernel; ++u) {
      const int64_t s = i - u + shape.radius();
      if (s < 0 || s >= shape.height) continue;
      const OutputRows own(shape, s, s + 1);
      for (int64_t row = own.begin; row < own.end; ++row) {
        for (int64_t phase = 0; phase < shape.up; ++phase) visit(u, (row - rows.begin) * shape.up + phase, phase);
      }
    }
  }
};

// Rows i and i + 1, both residues. Each sum in the order of its taps, as below.
template <class V, int BlockChannels, class A>
CARAFE_INLINE void grad_features_two_rows(const FeatureGradient<A>& job, int64_t i) {
  const Staged<A>&dy = job.dy, &m = job.m, &dx = job.dx;
  const int64_t k = job.shape.kernel, radius = job.shape.radius();
  int64_t* const mask_offsets = job.offsets;
  int64_t* const grad_offsets = job.offsets + kSquare * (most_gradient_offsets(job.shape) / (1 + kSquare));
  int64_t contributions = 0;
  const int64_t first = std::max(job.rows.begin, ceil_div(i + radius - k + 1, 2));
  for (int64_t o = std::min(job.rows.end - 1, (i + 1 + radius) / 2); o >= first; --o) {
    for (int64_t shift = floor_div(-radius, 2); shift <= floor_div(radius, 2); ++shift) {
      for (int64_t each = 0; each < kSquare; ++each) {
        const int64_t u = i + each / 2 - 2 * o + radius, v = 2 * shift + each % 2 + radius;
        const bool present = u >= 0 && u < k && v >= 0 && v < k;
        mask_offsets[kSquare * contributions + each] =
            present ? (u * k + v) * m.channel_stride() + (o - job.rows.begin) * m.pitch - shift : kAbsent;
      }
      grad_offsets[contributions++] = (o - job.rows.begin) * dy.pitch - shift;
    }
  }
  for_each_block<BlockChannels, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    grad_features_square<V, count>(
        contributions, mask_offsets, grad_offsets, m.data, dy.data + c * dy.channel_stride(), dy.channel_stride(),
        job.row(c, i), dx.pitch, dx.channel_stride(), job.tile.lanes);
  });
}

template <class V, int BlockChannels, class A>
CARAFE_INLINE void grad_features_by_columns(const FeatureGradient<A>& job, int64_t i) {
  const Staged<A>&dy = job.dy, &m = job.m, &sums = job.sums;
  const int64_t k = job.shape.kernel;
  int64_t* const mask_offsets = job.offsets;
  int64_t* const grad_offsets = job.offsets + most_contributions(job.shape);
  int64_t contributions = 0;
  job.for_each_place(i, [&](int64_t u, int64_t place, int64_t) CARAFE_ALWAYS_INLINE {
    mask_offsets[contributions] = u * k * m.channel_stride() + place * m.pitch;
    grad_offsets[contributions++] = place * dy.pitch;
  });
  // Sums are wanted in the halo, too; they stay zero where the map ends.
  const int64_t halo = ceil_div(job.shape.radius() + 1, V::lanes) * V::lanes;
  const bool last = (job.tile.lane_begin + job.tile.lanes) * job.shape.up >= job.shape.out_width;
  const int64_t begin = job.tile.lane_begin > 0 ? -halo : 0, end = job.tile.lanes + (last ? 0 : halo);
  for_each_block<BlockChannels, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    column_sums<V, count>(
        k, contributions, mask_offsets, grad_offsets, m.data, m.channel_stride(), dy.data + c * dy.channel_stride(),
        dy.channel_stride(), sums, begin, end);
    for (int64_t each = 0; each < count; ++each) {
      shift_columns<V>(
          k, sums.data + each * sums.channel_stride(), sums.row_stride(), job.row(c + each, i), job.tile.lanes);
    }
  });
}

template <class V, class A>
CARAFE_INLINE void grad_features_by_residues(const FeatureGradient<A>& job, int64_t i) {
  const Shape& shape = job.shape;
  const Staged<A>&dy = job.dy, &m = job.m, &dx = job.dx;
  int64_t* const mask_offsets = job.offsets;
  int64_t* const grad_offsets = job.offsets + most_contributions(shape);
  for (int64_t residue = 0; residue < shape.down; ++residue) {
    int64_t contributions = 0;
    job.for_each_place(i, [&](int64_t u, int64_t place, int64_t phase) CARAFE_ALWAYS_INLINE {
      for (int64_t v = 0; v < shape.kernel; ++v) {
        const LaneOffset at(phase * shape.down / shape.up + v - shape.radius(), shape.down);
        if (at.phase != residue) continue;
        mask_offsets[contributions] = (u * shape.kernel + v) * m.channel_stride() + place * m.pitch - at.lanes;
        grad_offsets[contributions++] = place * dy.pitch - at.lanes;
      }
    });
    for_each_block<8, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
      grad_features_block<V, count>(
          contributions, mask_offsets, grad_offsets, m.data, dy.data + c * dy.channel_stride(), dy.channel_stride(),
          job.row(c, i) + residue * dx.pitch, dx.channel_stride(), job.tile.lanes);
    });
  }
}

// All rows of the tile.
template <class V, bool ManyRegisters, class A>
CARAFE_INLINE void grad_features_staged(
    const Shape& shape, const Tile& tile, const Staged<A>& dy, const Staged<A>& m, const Staged<A>& dx,
    const Staged<A>& sums, int64_t* offsets) {
  constexpr int block_channels = ManyRegisters ? kBlockChannels : kBlockChannels / 2;
  const FeatureGradient<A> job{shape, tile, dy, m, dx, sums, offsets};
  for (int64_t i = tile.row_begin; i < tile.row_end; ++i) {
    if (by_squares(shape) && i + 1 < tile.row_end) {
      grad_features_two_rows<V, block_channels>(job, i++);
    } else if (by_columns(shape)) {
      grad_features_by_columns<V, block_channels>(job, i);
    } else {
      grad_features_by_residues<V>(job, i);
    }
  }
}

}  // namespace carafe

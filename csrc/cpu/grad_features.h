// The gradient to features from staged masks and gradients of outputs: vectors run along the row, a block of channels
// and taps stays in registers.
#pragma once

#include "reassemble.h"

namespace carafe {

// What outputs contribute to a row of features: offsets to each one's mask and to its gradient, from the row's lanes.
struct Contributions {
  int64_t *masks, *grads;
  int64_t count = 0;

  CARAFE_INLINE void add(int64_t mask, int64_t grad) {
    masks[count] = mask;
    grads[count++] = grad;
  }
};

// What every output sends to U neighbouring tap columns of a feature row, still in the lanes of the outputs: so all
// loads are aligned, and one gradient of an output serves U taps. The phases of `sums` are tap columns.
template <class V, int U, int C, class A>
CARAFE_INLINE void column_sums_block(
    const Contributions& contributions, const Lanes<A>& masks, const Lanes<A>& grad_output, const Lanes<A>& sums,
    int64_t begin, int64_t end) {
  for (int64_t q = begin; q < end; q += V::lanes) {
    typename V::type sum[U][C] = {};
    for (int64_t t = 0; t < contributions.count; ++t) {
      typename V::type outer[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) outer[c] = V::load(grad_output(c) + contributions.grads[t] + q);
#pragma GCC unroll 5
      for (int u = 0; u < U; ++u) {
        const typename V::type mask = shared<V>(V::load(masks(u) + contributions.masks[t] + q));
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[u][c] += mask * outer[c];
      }
    }
#pragma GCC unroll 5
    for (int u = 0; u < U; ++u) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) V::store(sums(c, u) + q, sum[u][c]);
    }
  }
}

template <class V, int C, class A>
CARAFE_INLINE void column_sums(
    int64_t columns, const Contributions& contributions, const Lanes<A>& masks, const Lanes<A>& grad_output,
    const Lanes<A>& sums, int64_t begin, int64_t end) {
  for_each_block<5, 3, 1>(columns, [&](auto taps, int64_t column) CARAFE_ALWAYS_INLINE {
    column_sums_block<V, taps, C>(contributions, masks.from(column), grad_output, sums.from(0, column), begin, end);
  });
}

// Moves the sums of every tap column to the features' lanes and adds them up.
template <class V, class A>
CARAFE_INLINE void shift_columns(int64_t kernel, const Lanes<A>& sums, A* grad, int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum = {};
    for (int64_t v = 0; v < kernel; ++v) sum += V::load(sums(0, v) + q + kernel / 2 - v);
    V::store(grad + q, sum);
  }
}

// One row of gradients where the lane that a tap reaches depends on the output phase, or where there is one phase: the
// contributions of every tap and output phase, gathered.
template <class V, int C, class A>
CARAFE_INLINE void grad_features_block(
    const Contributions& contributions, const A* masks, const Lanes<A>& grad_output, const Lanes<A>& grad,
    int64_t lanes) {
  for (int64_t q = 0; q < lanes; q += V::lanes) {
    typename V::type sum[C] = {};
    for (int64_t t = 0; t < contributions.count; ++t) {
      const typename V::type mask = V::load(masks + contributions.masks[t] + q);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c] += mask * V::load(grad_output(c) + contributions.grads[t] + q);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) V::store(grad(c) + q, sum[c]);
  }
}

// Downsampling by 2, two rows and both residues at a time, those of features that see the same outputs: a gradient that
// is loaded serves up to four of them, the phases of `grad`. Contributions have a mask for each of the four, kAbsent
// where it gets nothing.
constexpr int kSquare = 4;
// Not an offset: only tap 0 lies within a few lanes of the start, and it shifts upwards.
constexpr int64_t kAbsent = -1;

// The last vector steps back where `lanes` is no multiple.
template <class V, int C, class A, class Output>
CARAFE_INLINE void grad_features_square(
    const Contributions& contributions, const A* masks, const Lanes<A>& grad_output, const Output& grad,
    int64_t lanes) {
  for (int64_t next = 0; next < lanes; next += V::lanes) {
    const int64_t q = std::min(next, lanes - V::lanes);
    grad.template prefetch<V, kSquare, C>(q);
    typename V::type sum[C][kSquare] = {};
    for (int64_t t = 0; t < contributions.count; ++t) {
      typename V::type outer[C];
      const A* from = grad_output.data + contributions.grads[t] + q;
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c, from += grad_output.channel_step) outer[c] = V::load(from);
#pragma GCC unroll 4
      for (int each = 0; each < kSquare; ++each) {
        const int64_t offset = contributions.masks[kSquare * t + each];
        if (offset == kAbsent) continue;
        typename V::type mask = V::load(masks + offset + q);
        if constexpr (C > 1) mask = shared<V>(mask);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[c][each] += mask * outer[c];
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) grad.template put<V, kSquare>(c, q, sum[c]);
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

// What the gradients of a tile's rows are computed from: `dx` from the channels of `dy` and the masks `m` of outputs
// `rows`. `sums` has room for a row of every tap column of kBlockChannels channels, zero in its halo; `offsets` for
// most_gradient_offsets().
template <class A>
struct FeatureGradient {
  const Shape& shape;
  const Tile& tile;
  const Staged<A>&dy, &m, &dx, &sums;
  int64_t* offsets;
  OutputRows rows{shape, tile.row_begin - shape.radius(), tile.row_end + shape.radius()};

  CARAFE_INLINE Lanes<A> row(int64_t i) const { return dx.row(i - tile.row_begin); }

  // Room for the contributions of one row, or of two where `masks` of them share a gradient.
  CARAFE_INLINE Contributions contributions(int64_t masks = 1) const {
    const int64_t most = masks == 1 ? most_contributions(shape) : most_gradient_offsets(shape) / (1 + masks);
    return {offsets, offsets + masks * most};
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
template <class V, int BlockChannels, class A, class Output>
CARAFE_INLINE void grad_features_two_rows(const FeatureGradient<A>& job, int64_t i, const Output& grad, int64_t lanes) {
  const Staged<A>&dy = job.dy, &m = job.m;
  const int64_t k = job.shape.kernel, radius = job.shape.radius();
  Contributions contributions = job.contributions(kSquare);
  const int64_t first = std::max(job.rows.begin, ceil_div(i + radius - k + 1, 2));
  for (int64_t o = std::min(job.rows.end - 1, (i + 1 + radius) / 2); o >= first; --o) {
    for (int64_t shift = floor_div(-radius, 2); shift <= floor_div(radius, 2); ++shift) {
      for (int64_t each = 0; each < kSquare; ++each) {
        const int64_t u = i + each / 2 - 2 * o + radius, v = 2 * shift + each % 2 + radius;
        const bool present = u >= 0 && u < k && v >= 0 && v < k;
        contributions.masks[kSquare * contributions.count + each] =
            present ? (u * k + v) * m.channel_stride() + (o - job.rows.begin) * m.pitch - shift : kAbsent;
      }
      contributions.grads[contributions.count++] = (o - job.rows.begin) * dy.pitch - shift;
    }
  }
  for_each_block<BlockChannels, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    grad_features_square<V, count>(contributions, m.data, dy.row(0).from(c), grad.from(c), lanes);
  });
}

template <class V, int BlockChannels, class A>
CARAFE_INLINE void grad_features_by_columns(const FeatureGradient<A>& job, int64_t i) {
  const Staged<A>&dy = job.dy, &m = job.m;
  const int64_t k = job.shape.kernel;
  const Lanes<A> sums = job.sums.row(0);
  Contributions contributions = job.contributions();
  job.for_each_place(i, [&](int64_t u, int64_t place, int64_t) CARAFE_ALWAYS_INLINE {
    contributions.add(u * k * m.channel_stride() + place * m.pitch, place * dy.pitch);
  });
  // Sums are wanted in the halo, too; they stay zero where the map ends.
  const int64_t halo = ceil_div(job.shape.radius() + 1, V::lanes) * V::lanes;
  const bool last = (job.tile.lane_begin + job.tile.lanes) * job.shape.up >= job.shape.out_width;
  const int64_t begin = job.tile.lane_begin > 0 ? -halo : 0, end = job.tile.lanes + (last ? 0 : halo);
  for_each_block<BlockChannels, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
    column_sums<V, count>(k, contributions, m.row(0), dy.row(0).from(c), sums, begin, end);
    for (int64_t each = 0; each < count; ++each) {
      shift_columns<V>(k, sums.from(each), job.row(i)(c + each), job.tile.lanes);
    }
  });
}

template <class V, class A>
CARAFE_INLINE void grad_features_by_residues(const FeatureGradient<A>& job, int64_t i) {
  const Shape& shape = job.shape;
  const Staged<A>&dy = job.dy, &m = job.m;
  for (int64_t residue = 0; residue < shape.down; ++residue) {
    Contributions contributions = job.contributions();
    job.for_each_place(i, [&](int64_t u, int64_t place, int64_t phase) CARAFE_ALWAYS_INLINE {
      for (int64_t v = 0; v < shape.kernel; ++v) {
        const LaneOffset at(phase * shape.down / shape.up + v - shape.radius(), shape.down);
        if (at.phase != residue) continue;
        contributions.add(
            (u * shape.kernel + v) * m.channel_stride() + place * m.pitch - at.lanes, place * dy.pitch - at.lanes);
      }
    });
    for_each_block<8, 1>(dy.channels, [&](auto count, int64_t c) CARAFE_ALWAYS_INLINE {
      grad_features_block<V, count>(
          contributions, m.data, dy.row(0).from(c), job.row(i).from(c, residue), job.tile.lanes);
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
      grad_features_two_rows<V, block_channels>(job, i, target_of(dx, 2 * (i - tile.row_begin)), tile.lanes);
      ++i;
    } else if (by_columns(shape)) {
      grad_features_by_columns<V, block_channels>(job, i);
    } else {
      grad_features_by_residues<V>(job, i);
    }
  }
}

// Downsampling by 2 straight into `columns` of the map from the tile's first one on, two vectors at least, of the
// channels of dy and two rows at least.
template <class V, bool ManyRegisters, class T, class A>
CARAFE_INLINE void grad_features_direct(
    const Shape& shape, const Tile& tile, const Staged<A>& dy, const Staged<A>& m, const Map<T>& grad, int64_t columns,
    int64_t* offsets) {
  const FeatureGradient<A> job{shape, tile, dy, m, dy, dy, offsets};
  const int64_t lanes = ceil_div(columns, 2);
  for (int64_t place = tile.row_begin; place < tile.row_end; place += 2) {
    const int64_t i = std::min(place, tile.row_end - 2);
    const Target<T, 2> rows{grad.data + (i - tile.row_begin) * grad.row_stride, grad.channel_stride, grad.row_stride};
    const auto go = [&](const auto& target) CARAFE_ALWAYS_INLINE {
      grad_features_two_rows<V, ManyRegisters ? kBlockChannels : kBlockChannels / 2>(job, i, target, lanes);
    };
    columns % 2 ? go(CutTarget<T>{rows, lanes - V::lanes}) : go(rows);
  }
}

}  // namespace carafe

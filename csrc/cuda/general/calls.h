// From a call to a block kernel: one way for the CUDA launcher and for the host.
//
// run_block() calls run(block) and returns true, or returns false where the call has no block kernel: for a scale with
// both up and down above 1, and for kernels whose weights do not fit into `shared_bytes` of shared memory.
#pragma once

#include "grad_features.h"
#include "grad_kernels.h"
#include "reassemble.h"

namespace carafe::gpu::general {

// Indices along an axis are computed in 32 bits, offsets in 64.
inline bool has_block(const Shape& shape) {
  constexpr int64_t kMost = 64, kLongest = int64_t(1) << 30;
  const int64_t longest =
      std::max({shape.batch, shape.channels, shape.height, shape.width, shape.out_height, shape.out_width});
  return std::min(shape.up, shape.down) == 1 && std::max({shape.up, shape.down, shape.kernel}) <= kMost &&
         longest <= kLongest && shape.mask_channels() * shape.up * shape.up <= kLongest;
}

// The same for a kind of block.
template <class Block, class Operator, class Run>
bool run_block_of(const Operator& call, int64_t shared_bytes, const Run& run) {
  if (!has_block(call.shape)) return false;
  Block block = {};
  block.view(call);
  if (!plan_tiles(call.shape, call.result.has_adjacent_channels(), shared_bytes, &block)) return false;
  run(block);
  return true;
}

template <class T, class Run>
bool run_block(const Reassemble<T>& call, int64_t shared_bytes, const Run& run) {
  return call.shape.up == 1 ? run_block_of<ReassembleBlock<T, 1>>(call, shared_bytes, run)
                            : run_block_of<ReassembleBlock<T, 4>>(call, shared_bytes, run);
}

template <class T, class Run>
bool run_block(const GradFeatures<T>& call, int64_t shared_bytes, const Run& run) {
  return run_block_of<GradFeaturesBlock<T>>(call, shared_bytes, run);
}

// To masks (their map is not read) or logits, as the normaliser says.
template <class T, class Run>
bool run_block(const GradKernels<T>& call, int64_t shared_bytes, const Run& run) {
  constexpr int kAtOnce = std::is_same_v<T, double> ? 1 : 4;  // four are too many registers for double
  return call.shape.up == 1 ? run_block_of<GradKernelsBlock<T, 1>>(call, shared_bytes, run)
                            : run_block_of<GradKernelsBlock<T, kAtOnce>>(call, shared_bytes, run);
}

}  // namespace carafe::gpu::general

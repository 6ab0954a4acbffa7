// From maps to block kernels: one way for the CUDA launcher and for the host.
//
// Each function calls run(block) and returns true, or returns false where the call has no block kernel: for a scale
// with both up and down above 1, and for kernels whose weights do not fit into `shared_bytes` of shared memory.
#pragma once

#include "grad_features.h"
#include "grad_kernels.h"
#include "reassemble.h"

namespace carafe {
namespace gpu {

// The kernels of a call, or their gradient, as a block sees them.
template <class T>
KernelView<T> view_kernels(const Map<T>& map, Normalizer normalizer, const Shape& shape) {
  return {View<T>::of(map, 1), normalizer != Normalizer::none && shape.up > 1, normalizer};
}

// Indices along an axis are computed in 32 bits, offsets in 64.
inline bool has_block(const Shape& shape) {
  constexpr int64_t kMost = 64, kLongest = int64_t(1) << 30;
  const int64_t longest =
      std::max({shape.batch, shape.channels, shape.height, shape.width, shape.out_height, shape.out_width});
  return std::min(shape.up, shape.down) == 1 && std::max({shape.up, shape.down, shape.kernel}) <= kMost &&
         longest <= kLongest && shape.mask_channels() * shape.up * shape.up <= kLongest;
}

template <class Block>
bool plan_tiles(const Shape& shape, bool channels_last, int64_t shared_bytes, Block* block) {
  block->sites = make_sites(shape);
  if (!pick_tile<Block>(shape, block->sites, channels_last, shared_bytes, &block->grid)) return false;
  block->kernels = Block::kernels_of(block->sites, block->grid);
  block->patch = Block::patch_of(block->sites, block->grid);
  return true;
}

template <int R, class T, class Run>
bool reassemble_by(
    const Shape& shape, const Map<T>& output, const Map<const T>& features, const Kernels<T>& kernels,
    int64_t shared_bytes, const Run& run) {
  ReassembleBlock<T, R> block = {};
  block.output = View<T>::of(output, shape.group_channels());
  block.features = View<const T>::of(features, shape.group_channels());
  block.weights = view_kernels(kernels.map, kernels.normalizer, shape);
  if (!plan_tiles(shape, block.output.channels_last, shared_bytes, &block)) return false;
  run(block);
  return true;
}

template <class T, class Run>
bool reassemble(
    const Shape& shape, const Map<T>& output, const Map<const T>& features, const Kernels<T>& kernels,
    int64_t shared_bytes, const Run& run) {
  if (!has_block(shape)) return false;
  return shape.up == 1 ? reassemble_by<1>(shape, output, features, kernels, shared_bytes, run)
                       : reassemble_by<4>(shape, output, features, kernels, shared_bytes, run);
}

template <class T, class Run>
bool grad_features(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Kernels<T>& kernels,
    int64_t shared_bytes, const Run& run) {
  if (!has_block(shape)) return false;
  GradFeaturesBlock<T> block = {};
  block.grad = View<T>::of(grad, shape.group_channels());
  block.grad_output = View<const T>::of(grad_output, shape.group_channels());
  block.weights = view_kernels(kernels.map, kernels.normalizer, shape);
  if (!plan_tiles(shape, block.grad.channels_last, shared_bytes, &block)) return false;
  run(block);
  return true;
}

template <int R, class T, class Run>
bool grad_kernels_by(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
    const Kernels<T>& kernels, int64_t shared_bytes, const Run& run) {
  GradKernelsBlock<T, R> block = {};
  block.grad = view_kernels(grad, kernels.normalizer, shape);
  block.grad_output = View<const T>::of(grad_output, shape.group_channels());
  block.features = View<const T>::of(features, shape.group_channels());
  block.weights = view_kernels(kernels.map, kernels.normalizer, shape);
  if (!plan_tiles(shape, block.grad.view.channels_last, shared_bytes, &block)) return false;
  block.grad_patch = block.grad_patch_of(block.sites, block.grid);
  run(block);
  return true;
}

// Masks (their map is not read) or logits, as the normalizer says.
template <class T, class Run>
bool grad_kernels(
    const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
    const Kernels<T>& kernels, int64_t shared_bytes, const Run& run) {
  if (!has_block(shape)) return false;
  constexpr int kAtOnce = std::is_same_v<T, double> ? 1 : 4;  // four are too many registers for double
  return shape.up == 1 ? grad_kernels_by<1>(shape, grad, grad_output, features, kernels, shared_bytes, run)
                       : grad_kernels_by<kAtOnce>(shape, grad, grad_output, features, kernels, shared_bytes, run);
}

}  // namespace gpu
}  // namespace carafe

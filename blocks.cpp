// The CUDA block kernels on the host, behind C functions for ctypes: the very blocks that a GPU runs, a barrier's end
// being the end of a loop over the threads. Compiled by test_blocks.py with g++ alone.
#include <memory>
#include <vector>

#include "../../csrc/cuda/calls.h"

using namespace carafe;

namespace {

// How a map lies in memory: 0 contiguous, 1 with the last two axes swapped, 2 channels_last.
template <class T>
Map<T> map(T* data, int64_t c, int64_t h, int64_t w, int layout) {
  if (layout == 2) return {data, c * h * w, 1, w * c, c};
  return {data, c * h * w, h * w, layout == 1 ? 1 : w, layout == 1 ? h : 1};
}

struct RunOnHost {
  bool descending;

  template <class Block>
  void operator()(const Block& block) const {
    using A = typename Block::A;
    const int threads = block.grid.threads;
    std::vector<typename Block::State> states(threads);
    // As many elements as were asked for, aligned as a GPU aligns them, and not a number until they are staged.
    const std::unique_ptr<A, decltype(&free)> shared(
        static_cast<A*>(aligned_alloc(16, (block.grid.shared * sizeof(A) + 15) / 16 * 16)), &free);
    for (uint32_t index = 0; index < block.grid.blocks; ++index) {
      const gpu::Job job = block.grid.job(index);
      std::fill(shared.get(), shared.get() + block.grid.shared, A(NAN));
      for (int step = 0; step < block.steps(); ++step) {
        for (int i = 0; i < threads; ++i) {
          const int thread = descending ? threads - 1 - i : i;
          block.run(job, step, thread, states[thread], shared.get());
        }
      }
    }
  }
};

template <class T>
bool run(
    int op, int how, bool descending, const Shape& s, int layout, int64_t shared_bytes, T* output, const T* first,
    const T* second, const T* third) {
  const auto normalized = static_cast<Normalizer>(how);
  const bool from_logits = normalized != Normalizer::none && s.up > 1;
  const auto weights_map = [&](auto* data) {
    return from_logits ? map(data, s.mask_channels() * s.up * s.up, s.height, s.width, layout)
                       : map(data, s.mask_channels(), s.out_height, s.out_width, layout);
  };
  const auto fine_map = [&](auto* data) { return map(data, s.channels, s.out_height, s.out_width, layout); };
  const auto features_map = [&](auto* data) { return map(data, s.channels, s.height, s.width, layout); };
  const RunOnHost run{descending};
  if (op == 0) {
    const Kernels<T> kernels{weights_map(second), normalized};
    return gpu::run_block(Reassemble<T>{s, fine_map(output), features_map(first), kernels}, shared_bytes, run);
  }
  if (op == 1) {
    const Kernels<T> kernels{weights_map(second), normalized};
    return gpu::run_block(GradFeatures<T>{s, features_map(output), fine_map(first), kernels}, shared_bytes, run);
  }
  const Kernels<T> kernels{weights_map(third), normalized};
  return gpu::run_block(
      GradKernels<T>{s, weights_map(output), fine_map(first), features_map(second), kernels}, shared_bytes, run);
}

Shape make_shape(const int64_t* g) { return {g[0], g[1], g[2], g[3], g[8], g[9], g[4], g[5], g[6], g[7]}; }

template <class Function>
void with_dtype(int dtype, const Function& function) {
  if (dtype == 2) function(static_cast<Half*>(nullptr));
#ifndef CARAFE_HALF_ONLY  // the sanitizers take a minute for each of the types, and every type touches the same memory
  if (dtype == 0) function(static_cast<double*>(nullptr));
  if (dtype == 1) function(static_cast<float*>(nullptr));
  if (dtype == 3) function(static_cast<BFloat16*>(nullptr));
#endif
}

}  // namespace

extern "C" {

// op: 0 reassemble (features, weights), 1 gradient to features (grad, weights), 2 gradient to weights (grad, features,
// weights); how: 0 masks, 1 softmax, 2 sigmoid, 3 sigmoid_normalized of logits; dtype: 0 double, 1 float, 2 half,
// 3 bfloat16; geometry: n, c, h, w, k, groups, up, down, and the output's height and width, of what is wanted. Returns
// whether there is a block kernel.
bool block_run(
    int op, int how, int dtype, bool descending, const int64_t* geometry, int layout, int64_t shared_bytes,
    void* output, const void* first, const void* second, const void* third) {
  bool found = false;
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    found =
        run(op, how, descending, make_shape(geometry), layout, shared_bytes, static_cast<T*>(output),
            static_cast<const T*>(first), static_cast<const T*>(second), static_cast<const T*>(third));
  });
  return found;
}

// What the block kernel of a call is cut into: rows, columns, slots, chunks, threads, bytes of shared memory, blocks.
bool block_choice(
    int op, int dtype, const int64_t* geometry, bool channels_last, int64_t shared_bytes, int64_t* choice) {
  const Shape shape = make_shape(geometry);
  bool found = false;
  with_dtype(dtype, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    const auto choose = [&](auto block) {
      if (!gpu::has_block(shape) || !gpu::plan_tiles(shape, channels_last, shared_bytes, &block)) return;
      const gpu::Grid& grid = block.grid;
      const int64_t bytes = grid.shared * int64_t(sizeof(accumulator_t<T>));
      const int64_t values[] = {grid.rows, grid.columns, grid.slots, grid.chunks, grid.threads, bytes, grid.blocks};
      std::copy(std::begin(values), std::end(values), choice);
      found = true;
    };
    if (op == 0) shape.up == 1 ? choose(gpu::ReassembleBlock<T, 1>{}) : choose(gpu::ReassembleBlock<T, 4>{});
    if (op == 1) choose(gpu::GradFeaturesBlock<T>{});
    if (op == 2) shape.up == 1 ? choose(gpu::GradKernelsBlock<T, 1>{}) : choose(gpu::GradKernelsBlock<T, 4>{});
  });
  return found;
}
}

// Launches the operators on a GPU: block kernels (calls.h) where one fits the call, otherwise a thread computes one
// output element (common/operators.h). No torch here.
#pragma once

#include <cuda_runtime.h>

#include "calls.h"

namespace carafe::gpu {

constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it blocks loop; a grid's first axis admits 2^31 - 1
constexpr int64_t kSharedJob = 64;       // bytes that a block's job takes, and the alignment of what follows

struct Queue {
  int device;
  cudaStream_t stream;
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
};

// The CUDA side of a block kernel (sites.h): its steps, and a barrier after each.
template <class Block>
__global__ void __launch_bounds__(Block::kThreads, Block::kResident) run_block(const __grid_constant__ Block block) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ gpu::Job job;  // not in registers, which are scarcer
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

constexpr int kThreads = 256;

// Computes every element of the result, of such a size, neighbouring threads on neighbouring addresses.
template <class Operator>
__global__ void __launch_bounds__(kThreads, 2)
    run_elements(const Operator call, int64_t batch, int64_t channels, int64_t height, int64_t width) {
  const int64_t count = batch * channels * height * width;
  const bool channels_last = call.result.channel_stride == 1 && channels > 1;
  for (int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x; index < count;
       index += int64_t(gridDim.x) * kThreads) {
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

template <class T>
void result_size(const Reassemble<T>& call, int64_t* size) {
  const Shape& s = call.shape;
  size[0] = s.batch, size[1] = s.channels, size[2] = s.out_height, size[3] = s.out_width;
}
template <class T>
void result_size(const GradFeatures<T>& call, int64_t* size) {
  const Shape& s = call.shape;
  size[0] = s.batch, size[1] = s.channels, size[2] = s.height, size[3] = s.width;
}
template <class T>
void result_size(const GradKernels<T>& call, int64_t* size) {
  const Shape& s = call.shape;
  size[0] = s.batch, size[1] = s.mask_channels(), size[2] = s.out_height, size[3] = s.out_width;
}

template <class Operator>
cudaError_t launch(const Operator& call, const Queue& queue) {
  cudaError_t error = cudaSuccess;
  const auto launch_block = [&](const auto& block) {
    using Block = std::decay_t<decltype(block)>;
    const auto bytes = static_cast<int>(block.grid.shared * sizeof(typename Block::A));
    if (bytes > kSharedDefault - kSharedJob) {
      error = cudaFuncSetAttribute(run_block<Block>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
      if (error != cudaSuccess) return;
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(block.grid.blocks, kMaxBlocks));
    run_block<<<blocks, block.grid.threads, bytes, queue.stream>>>(block);
    error = cudaGetLastError();
  };
  if (run_block(call, kSharedDefault - kSharedJob, launch_block)) return error;
  int most = 0;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device);
  if (error != cudaSuccess) return error;
  if (run_block(call, most - kSharedJob, launch_block)) return error;
  if (call.kernels.normalizer != Normalizer::none) return cudaErrorInvalidValue;
  int64_t size[4];
  result_size(call, size);
  const int64_t blocks = std::min(ceil_div(size[0] * size[1] * size[2] * size[3], kThreads), kMaxBlocks);
  run_elements<<<static_cast<unsigned>(blocks), kThreads, 0, queue.stream>>>(call, size[0], size[1], size[2], size[3]);
  return cudaGetLastError();
}

}  // namespace carafe::gpu

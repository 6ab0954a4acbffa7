// Kernel launches on the current device and torch's current stream there.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <algorithm>

#include "../arguments.h"
#include "calls.h"

namespace carafe {

constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it blocks loop; a grid's first axis admits 2^31 - 1

constexpr int64_t kSharedJob = 64;  // bytes that a block's job takes, and the alignment of what follows

inline int current_device() {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  return device;
}

inline cudaStream_t current_stream() {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(current_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

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

struct LaunchBlock {
  template <class Block>
  void operator()(const Block& block) const {
    const auto bytes = static_cast<int>(block.grid.shared * sizeof(typename Block::A));
    if (bytes > gpu::kSharedDefault - kSharedJob) {
      STD_CUDA_CHECK(cudaFuncSetAttribute(run_block<Block>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(block.grid.blocks, kMaxBlocks));
    run_block<<<blocks, block.grid.threads, bytes, current_stream()>>>(block);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
};

// Calls launch(bytes) with the shared memory that every GPU gives a block, so that several blocks share a
// multiprocessor, and where that is not enough with all that this one gives. False where that is not enough either.
template <class Launch>
bool launch_block(const Launch& launch) {
  if (launch(gpu::kSharedDefault - kSharedJob)) return true;
  int most = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()));
  return launch(most - kSharedJob);
}

}  // namespace carafe

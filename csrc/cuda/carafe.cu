// The CUDA operators, on the current device and torch's current stream there: block kernels (calls.h) where one fits
// the call, otherwise a thread computes one output element (common/operators.h).
#include <Python.h>
#include <cuda_runtime.h>

#include "../arguments.h"
#include "calls.h"

namespace carafe {
namespace {

constexpr int64_t kMaxBlocks = 1 << 20;  // beyond it blocks loop; a grid's first axis admits 2^31 - 1

constexpr int64_t kSharedJob = 64;  // bytes that a block's job takes, and the alignment of what follows

int current_device() {
  int device = 0;
  CARAFE_CUDA_CHECK(cudaGetDevice(&device));
  return device;
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
      CARAFE_CUDA_CHECK(cudaFuncSetAttribute(run_block<Block>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    }
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(block.grid.blocks, kMaxBlocks));
    run_block<<<blocks, block.grid.threads, bytes, current_stream(current_device())>>>(block);
    CARAFE_CUDA_LAUNCH_CHECK();
  }
};

// Calls launch(bytes) with the shared memory that every GPU gives a block, so that several blocks share a
// multiprocessor, and where that is not enough with all that this one gives. False where that is not enough either.
template <class Launch>
bool launch_block(const Launch& launch) {
  if (launch(gpu::kSharedDefault - kSharedJob)) return true;
  int most = 0;
  CARAFE_CUDA_CHECK(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, current_device()));
  return launch(most - kSharedJob);
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

struct Cuda {
  template <class Operator>
  static void run(const Operator& call, const Tensor& result) {
    const auto guard = use_device(device_index(result));
    if (launch_block([&](int64_t bytes) { return gpu::run_block(call, bytes, LaunchBlock{}); })) return;
    CARAFE_CHECK(
        call.kernels.normalizer == Normalizer::none,
        "with a normalizer on CUDA, the kernels of a pixel must fit into a block's shared memory");
    const int64_t blocks = std::min(ceil_div(result.numel(), kThreads), kMaxBlocks);
    run_elements<<<static_cast<unsigned>(blocks), kThreads, 0, current_stream(current_device())>>>(
        call, result.size(0), result.size(1), result.size(2), result.size(3));
    CARAFE_CUDA_LAUNCH_CHECK();
  }
};

}  // namespace
}  // namespace carafe

CARAFE_LIBRARY_IMPL(carafe_plugin, CUDA, m) {
  m.impl("carafe", CARAFE_BOXED(carafe::reassemble<carafe::Cuda>));
  m.impl("_carafe_grad_features", CARAFE_BOXED(carafe::grad_features<carafe::Cuda>));
  m.impl("_carafe_grad_kernels", CARAFE_BOXED(carafe::grad_kernels<carafe::Cuda>));
}

// The GPU architectures that this library was compiled for, ascending, as nvcc counts them (800 for sm_80); 0 after the
// last. For Python (through ctypes).
extern "C" __attribute__((visibility("default"))) int carafe_cuda_architecture(int index) {
  constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
  constexpr int kCount = sizeof kArchitectures / sizeof *kArchitectures;
  return index >= 0 && index < kCount ? kArchitectures[index] : 0;
}

// Whether it has PTX of the last of them, which newer GPUs compile for themselves.
extern "C" __attribute__((visibility("default"))) int carafe_cuda_has_ptx() { return CARAFE_PTX; }

PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1};
  return PyModule_Create(&definition);
}

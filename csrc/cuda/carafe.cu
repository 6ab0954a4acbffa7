// The CUDA operators, on the current device and torch's current stream there (launch.h).
#include <Python.h>
#include <cuda_runtime.h>

#include <vector>

#include "../arguments.h"
#include "launch.h"

#pragma weak PyModule_Create2  // as in registration.cpp

namespace carafe {
namespace {

struct Scratch {
  const Tensor& beside;
  std::vector<Tensor> held;  // until the launches are queued: torch's allocator gives it to what follows them

  static void* allocate(void* context, int64_t bytes) {
    auto& scratch_of_call = *static_cast<Scratch*>(context);
    scratch_of_call.held.push_back(scratch(scratch_of_call.beside, bytes));
    return scratch_of_call.held.back().mutable_data_ptr();
  }
};

struct Cuda {
  template <class Operator>
  static void run(const Operator& call, const Tensor& result) {
    const auto guard = use_device(device_index(result));
    int device = 0;
    CARAFE_CUDA_CHECK(cudaGetDevice(&device));
    CARAFE_CUDA_CHECK(cudaGetLastError());  // of earlier work: not what the launches below are asked for
    Scratch memory{result, {}};
    const cudaError_t error = gpu::launch(call, {device, current_stream(device), Scratch::allocate, &memory});
    CARAFE_CHECK(
        error != cudaErrorNotSupported,
        "with a normalizer on CUDA, the kernels of a pixel must fit into a block's shared memory");
    CARAFE_CUDA_CHECK(error);
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

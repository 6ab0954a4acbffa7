// What these sources use of torch, under one set of names: LibTorch's stable ABI, from torch 2.10 on, or, with
// CARAFE_ATEN, the C++ API of the torch that this is compiled against, from 2.1 on. The only file that knows that
// there are two; the CUDA names are there for nvcc.
#pragma once

#include <array>
#include <cstdint>

#include "common/glibc.h"

#ifdef CARAFE_ATEN

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <torch/version.h>
#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>  // ATen's CUDAContext.h wants headers of cuBLAS and others, which a toolkit may lack
#endif

namespace carafe {

using at::get_num_threads;
using at::parallel_for;
using at::ScalarType;
using at::Tensor;
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 5
template <class T>
using Optional = c10::optional<T>;  // a class of its own before torch 2.4, and in schemas
#else
template <class T>
using Optional = std::optional<T>;
#endif

inline int64_t device_index(const Tensor& tensor) { return tensor.get_device(); }

inline Tensor empty_like(const Tensor& source, const std::array<int64_t, 4>& size, bool channels_last) {
  return at::empty(
      size, source.options(), channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

#ifdef __CUDACC__
inline Tensor scratch(const Tensor& beside, int64_t bytes) {
  return at::empty({bytes}, beside.options().dtype(ScalarType::Byte));
}

inline auto use_device(int64_t index) { return c10::cuda::CUDAGuard(static_cast<c10::DeviceIndex>(index)); }

inline cudaStream_t current_stream(int device) {
  return c10::cuda::getCurrentCUDAStream(static_cast<c10::DeviceIndex>(device)).stream();
}
#endif

}  // namespace carafe

#define CARAFE_CHECK TORCH_CHECK
#define CARAFE_LIBRARY TORCH_LIBRARY
#define CARAFE_LIBRARY_IMPL TORCH_LIBRARY_IMPL
#define CARAFE_BOXED(function) TORCH_FN(function)
#define CARAFE_CUDA_CHECK C10_CUDA_CHECK
#define CARAFE_CUDA_LAUNCH_CHECK C10_CUDA_KERNEL_LAUNCH_CHECK

#else

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#endif

namespace carafe {

using torch::headeronly::ScalarType;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
using torch::stable::Tensor;
template <class T>
using Optional = std::optional<T>;

inline int64_t device_index(const Tensor& tensor) { return tensor.get_device_index(); }

inline Tensor empty_like(const Tensor& source, const std::array<int64_t, 4>& size, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(
      {size.data(), size.size()}, source.scalar_type(), std::nullopt, source.device(), std::nullopt,
      channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

#ifdef __CUDACC__
// Memory on a tensor's device, from torch's allocator: for what the current stream runs before it is given back.
inline Tensor scratch(const Tensor& beside, int64_t bytes) {
  return torch::stable::empty({&bytes, 1}, ScalarType::Byte, std::nullopt, beside.device());
}

inline auto use_device(int64_t index) {
  return torch::stable::accelerator::DeviceGuard(static_cast<torch::stable::accelerator::DeviceIndex>(index));
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}
#endif

}  // namespace carafe

#define CARAFE_CHECK STD_TORCH_CHECK
#define CARAFE_LIBRARY STABLE_TORCH_LIBRARY
#define CARAFE_LIBRARY_IMPL STABLE_TORCH_LIBRARY_IMPL
#define CARAFE_BOXED(function) TORCH_BOX(&function)
#define CARAFE_CUDA_CHECK STD_CUDA_CHECK
#define CARAFE_CUDA_LAUNCH_CHECK STD_CUDA_KERNEL_LAUNCH_CHECK

#endif

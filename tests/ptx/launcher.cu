// The project's launcher behind a C function for ctypes. Linked with runtime.cpp in the place of the CUDA runtime, so
// that what it launches is executed on the CPU.
#include <new>

#include "cuda/launch.h"  // in the folder that -I names

using namespace carafe;

namespace {

template <class T>
Map<T> map(void* data, const int64_t* strides) {
  return {static_cast<T*>(data), strides[0], strides[1], strides[2], strides[3]};
}

template <class T>
cudaError_t run(
    int op, Normalizer normalizer, const Shape& s, const gpu::Queue& queue, void* const* data,
    const int64_t (*strides)[4]) {
  const auto input = [&](int index) { return map<const T>(data[index], strides[index]); };
  const Map<T> result = map<T>(data[0], strides[0]);
  if (op == 0) return gpu::launch(Reassemble<T>{s, result, input(1), {input(2), normalizer}}, queue);
  if (op == 1) return gpu::launch(GradFeatures<T>{s, result, input(1), {input(2), normalizer}}, queue);
  return gpu::launch(GradKernels<T>{s, result, input(1), input(2), {input(3), normalizer}}, queue);
}

}  // namespace

// op: 0 reassemble (features, kernels), 1 gradient to features (gradient, kernels), 2 gradient to kernels (gradient,
// features, kernels); the result comes before them in `data` and `strides`. dtype: 0 double, 1 float, 2 half,
// 3 bfloat16. geometry: the members of Shape.
extern "C" __attribute__((visibility("default"))) int launch(
    int op, int dtype, int normalizer, const int64_t* geometry, int device, void* stream,
    void* (*allocate)(void*, int64_t), void* context, void* const* data, const int64_t (*strides)[4]) {
  const int64_t* g = geometry;
  const Shape shape{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
  const gpu::Queue queue{device, static_cast<cudaStream_t>(stream), allocate, context};
  const auto how = static_cast<Normalizer>(normalizer);
  if (dtype == 0) return run<double>(op, how, shape, queue, data, strides);
  if (dtype == 1) return run<float>(op, how, shape, queue, data, strides);
  if (dtype == 2) return run<Half>(op, how, shape, queue, data, strides);
  return run<BFloat16>(op, how, shape, queue, data, strides);
}

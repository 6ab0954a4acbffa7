// The launcher of the CUDA kernels behind a C function for ctypes, over a runtime that runs nothing: runtime.cpp is
// linked in the place of CUDA's.
#include "../../csrc/cuda/launch.h"

using namespace carafe;

namespace {

int64_t allocations = 0;
bool lacking = false;

void* allocate(void*, int64_t) {
  ++allocations;
  static char memory[16];
  return lacking ? nullptr : memory;  // nothing reads or writes it
}

template <class T>
cudaError_t run(int op, Normalizer normalizer, const Shape& shape, const int64_t* strides, const gpu::Queue& queue) {
  alignas(16) static char memory[16];
  const auto map = [&](int which) {
    const int64_t* s = strides + 4 * which;
    return Map<T>{reinterpret_cast<T*>(memory), s[0], s[1], s[2], s[3]};
  };
  const auto read = [&](int which) {
    const Map<T> m = map(which);
    return Map<const T>{m.data, m.batch_stride, m.channel_stride, m.row_stride, m.column_stride};
  };
  if (op == 0) return gpu::launch(Reassemble<T>{shape, map(0), read(1), {read(2), normalizer}}, queue);
  if (op == 1) return gpu::launch(GradFeatures<T>{shape, map(0), read(1), {read(2), normalizer}}, queue);
  return gpu::launch(GradKernels<T>{shape, map(0), read(1), read(2), {read(3), normalizer}}, queue);
}

}  // namespace

// op: 0 reassemble (features, kernels), 1 gradient to features (gradient, kernels), 2 gradient to kernels (gradient,
// features, kernels), the result before them in `strides`. geometry: the members of Shape.
extern "C" int launch_call(
    int op, int half, int normalizer, const int64_t* geometry, const int64_t* strides, void* stream, int no_memory) {
  const int64_t* g = geometry;
  const Shape shape{g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
  const gpu::Queue queue{0, static_cast<cudaStream_t>(stream), allocate, nullptr};
  const auto how = static_cast<Normalizer>(normalizer);
  allocations = 0, lacking = no_memory != 0;
  return half ? run<Half>(op, how, shape, strides, queue) : run<float>(op, how, shape, strides, queue);
}

extern "C" int64_t allocation_count() { return allocations; }

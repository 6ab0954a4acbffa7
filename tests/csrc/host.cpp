// The torch-free kernel headers behind C functions, for ctypes. Compiled by test_kernels.py with g++ alone, once plain
// and once with the address and undefined-behaviour sanitizers.
#include "../../csrc/cpu/tiles.h"

using namespace carafe;

#ifndef REGISTERS
#define REGISTERS 16
#endif
CARAFE_TILES(baseline, 16, REGISTERS, )

namespace {

// How a map lies in memory: 0 contiguous, 1 with the last two axes swapped, 2 channels_last.
template <class T>
Map<T> map(T* data, int64_t c, int64_t h, int64_t w, int layout) {
  if (layout == 2) return {data, c * h * w, 1, w * c, c};
  return {data, c * h * w, h * w, layout == 1 ? 1 : w, layout == 1 ? h : 1};
}

// path: 0 element by element (masks only) of a result of that size, 1 row kernels.
template <class Operator>
void run_call(int path, const Operator& call, int64_t c, int64_t h, int64_t w) {
  if (path == 1) {
    const Plan plan = plan_tiles<accumulator_t<typename Operator::type>>(call.shape, 3);
    return run_baseline(plan, call, 0, plan.tiles);
  }
  for (int64_t b = 0; b < call.shape.batch; ++b)
    for (int64_t ch = 0; ch < c; ++ch)
      for (int64_t i = 0; i < h; ++i)
        for (int64_t j = 0; j < w; ++j) call.result.at(b, ch, i, j) = call.element(b, ch, i, j);
}

// op: 0 reassemble, 1 gradient to features, 2 gradient to kernels.
template <class T>
void run(
    int op, int path, Normalizer normalizer, const Shape& s, int layout, T* output, const T* first, const T* second,
    const T* third) {
  const int64_t m = s.mask_channels();
  const auto features_map = [&](auto* data) { return map(data, s.channels, s.height, s.width, layout); };
  const auto output_map = [&](auto* data) { return map(data, s.channels, s.out_height, s.out_width, layout); };
  const auto kernels_map = [&](auto* data) {
    return normalizer != Normalizer::none && s.up > 1 ? map(data, m * s.up * s.up, s.height, s.width, layout)
                                                      : map(data, m, s.out_height, s.out_width, layout);
  };
  const Kernels<T> kernels{kernels_map(op == 2 ? third : second), normalizer};
  if (op == 0) {
    run_call(
        path, Reassemble<T>{s, output_map(output), features_map(first), kernels}, s.channels, s.out_height,
        s.out_width);
  } else if (op == 1) {
    run_call(path, GradFeatures<T>{s, features_map(output), output_map(first), kernels}, s.channels, s.height, s.width);
  } else {
    const GradKernels<T> call{s, kernels_map(output), output_map(first), features_map(second), kernels};
    run_call(path, call, m, s.out_height, s.out_width);
  }
}

}  // namespace

extern "C" {

// normalizer: 0 none (masks), 1 softmax, 2 sigmoid, 3 sigmoid_normalized; dtype: 0 double, 1 float, 2 half, 3 bfloat16;
// geometry: n, c, h, w, k, groups, up, down, and the output's height and width, of what is wanted
void carafe_run(
    int op, int path, int normalizer, int dtype, const int64_t* g, int layout, void* output, const void* first,
    const void* second, const void* third) {
  const Shape s{g[0], g[1], g[2], g[3], g[8], g[9], g[4], g[5], g[6], g[7]};
  const auto call = [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    run(op, path, static_cast<Normalizer>(normalizer), s, layout, static_cast<T*>(output), static_cast<const T*>(first),
        static_cast<const T*>(second), static_cast<const T*>(third));
  };
  if (dtype == 1) call(static_cast<float*>(nullptr));
  if (dtype == 2) call(static_cast<Half*>(nullptr));
#ifndef FLOAT_AND_HALF  // the sanitizers take half a minute for two types; the others lie in memory as these
  if (dtype == 0) call(static_cast<double*>(nullptr));
  if (dtype == 3) call(static_cast<BFloat16*>(nullptr));
#endif
}

}  // extern "C"

extern "C" {

// The index of the last element of a map, as the kernels compute it.
int64_t last_offset(int64_t c, int64_t h, int64_t w) {
  char base = 0;
  const Map<char> m{&base, c * h * w, h * w, w, 1};
  return reinterpret_cast<intptr_t>(m.pointer(0, c - 1, h - 1, w - 1)) - reinterpret_cast<intptr_t>(&base);
}
int64_t source_index(int64_t output, int64_t up, int64_t down) {
  return Shape{0, 0, 0, 0, 0, 0, 1, 1, up, down}.source(output);
}
int64_t first_output(int64_t source, int64_t up, int64_t down) {
  return Shape{0, 0, 0, 0, 0, 0, 1, 1, up, down}.first_output(source);
}
}

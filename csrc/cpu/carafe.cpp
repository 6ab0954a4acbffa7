// The CPU operators: the row kernels of an instruction set chosen at run time (cpu/calls.h), and the element loop
// (common/element.h), through torch's own thread pool.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>
#include <exception>

#include "../arguments.h"
#include "../common/element.h"
#include "calls.h"

namespace carafe {
namespace {

enum class Path { plain, baseline, avx2, avx512 };
constexpr const char* kPathNames[] = {"plain", "baseline", "avx2", "avx512"};

#ifdef CARAFE_X86
Path best_path() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
    return Path::avx512;
  }
  return avx2 ? Path::avx2 : Path::baseline;
}
#else  // one path: the compiler's own target, which has NEON on 64-bit Arm
Path best_path() { return Path::baseline; }
#endif

// CARAFE_CPU_PATH forces a lower path than the machine's best: for tests, and to compare bits across machines.
Path choose_path() {
  const char* const wanted = std::getenv("CARAFE_CPU_PATH");
  const Path best = best_path();
  if (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, "auto") == 0) return best;
  for (int path = 0; path <= static_cast<int>(best); ++path) {
    if (std::strcmp(wanted, kPathNames[path]) == 0) return static_cast<Path>(path);
  }
  STD_TORCH_CHECK(
      false, "CARAFE_CPU_PATH must be auto or a path of this machine (plain to ", kPathNames[static_cast<int>(best)],
      "), got ", wanted);
}

Path current_path() {
  static const Path path = choose_path();
  return path;
}

// What computes tiles on that path, but for `plain`.
auto current_run() {
#ifdef CARAFE_X86
  if (current_path() == Path::avx512) return &run_avx512;
  if (current_path() == Path::avx2) return &run_avx2;
#endif
  return &run_baseline;
}

constexpr int64_t kMaxPhases = 64;

template <class Operator>
void run_by_rows(const Shape& shape, const Operator& call) {
  const auto run = current_run();
  const Plan plan = plan_tiles<accumulator_t<typename Operator::element>>(shape, torch::stable::get_num_threads());
  torch::stable::parallel_for(
      0, plan.tiles, 1, [&](int64_t begin, int64_t end) { run(shape, plan, call, begin, end); });
}

template <class T, class Element>
void run_by_element(const Map<T>& output, int64_t n, int64_t c, int64_t h, int64_t w, const Element& element) {
  torch::stable::parallel_for(0, n * c * h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t image = index / h / c, channel = index / h % c, i = index % h;
      for (int64_t j = 0; j < w; ++j) output.at(image, channel, i, j) = element(image, channel, i, j);
    }
  });
}

// The row kernels list every phase of the scale, up * down of them: 101/100 has too many for lists to pay. Logits are
// always taken by rows.
bool by_element(const Shape& shape, Normalizer normalizer) {
  if (normalizer != Normalizer::none) return false;
  return current_path() == Path::plain || shape.up > kMaxPhases || shape.down > kMaxPhases ||
         shape.up * shape.down > kMaxPhases;
}

struct Cpu {
  template <class T>
  static void reassemble(
      const Shape& shape, const Map<T>& output, const Map<const T>& features, const Kernels<T>& kernels) {
    if (by_element(shape, kernels.normalizer)) {
      return run_by_element(output, shape.batch, shape.channels, shape.out_height, shape.out_width, [&](auto... at) {
        return reassemble_element(shape, features, kernels.map, at...);
      });
    }
    run_by_rows(shape, Reassemble<T>{output, features, kernels});
  }

  template <class T>
  static void grad_features(
      const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Kernels<T>& kernels) {
    if (by_element(shape, kernels.normalizer)) {
      return run_by_element(grad, shape.batch, shape.channels, shape.height, shape.width, [&](auto... at) {
        return grad_features_element(shape, grad_output, kernels.map, at...);
      });
    }
    run_by_rows(shape, GradFeatures<T>{grad, grad_output, kernels});
  }

  template <class T>
  static void grad_kernels(
      const Shape& shape, const Map<T>& grad, const Map<const T>& grad_output, const Map<const T>& features,
      const Kernels<T>& kernels) {
    if (by_element(shape, kernels.normalizer)) {
      return run_by_element(
          grad, shape.batch, shape.mask_channels(), shape.out_height, shape.out_width,
          [&](auto... at) { return grad_masks_element(shape, grad_output, features, at...); });
    }
    run_by_rows(shape, GradKernels<T>{grad, grad_output, features, kernels});
  }
};

}  // namespace
}  // namespace carafe

// The path that this process takes, by name, for tests and benchmark reports (through ctypes, which no exception may
// cross); null where CARAFE_CPU_PATH names none of this machine.
extern "C" __attribute__((visibility("default"))) const char* carafe_cpu_path() {
  try {
    return carafe::kPathNames[static_cast<int>(carafe::current_path())];
  } catch (const std::exception&) {
    return nullptr;
  }
}

STABLE_TORCH_LIBRARY_IMPL(carafe_plugin, CPU, m) {
  m.impl("carafe", TORCH_BOX(&carafe::reassemble<carafe::Cpu>));
  m.impl("_carafe_grad_features", TORCH_BOX(&carafe::grad_features<carafe::Cpu>));
  m.impl("_carafe_grad_kernels", TORCH_BOX(&carafe::grad_kernels<carafe::Cpu>));
}

// The CPU operators: the row kernels (kernels/rows.h) compiled for several instruction sets, chosen at run time, and
// the element loop (kernels/element.h), through torch's own thread pool.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#include "../arguments.h"
#include "../kernels/element.h"
#include "../kernels/rows.h"

namespace carafe {
namespace {

enum class Path { plain, baseline, avx2, avx512 };
constexpr const char* kPathNames[] = {"plain", "baseline", "avx2", "avx512"};

#if defined(__x86_64__) && defined(__GNUC__)
#define CARAFE_AVX2 __attribute__((target("avx2,fma,f16c")))
#define CARAFE_AVX512 __attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")))
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
#define CARAFE_AVX2
#define CARAFE_AVX512
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

constexpr int64_t kMaxPhases = 64;

enum class Operator { reassemble, grad_features, grad_masks };

template <class I, Operator op, class T>
CARAFE_INLINE void run_tiles(
    const Shape& shape, const Plan& plan, const Map<T>& output, const Map<const T>& first, const Map<const T>& second,
    int64_t begin, int64_t end) {
  Scratch<accumulator_t<T>> scratch;
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = make_tile(shape, plan, index);
    if constexpr (op == Operator::reassemble) reassemble_tile<I>(shape, output, first, second, tile, scratch);
    if constexpr (op == Operator::grad_features) grad_features_tile<I>(shape, output, first, second, tile, scratch);
    if constexpr (op == Operator::grad_masks) grad_masks_tile<I>(shape, output, first, second, tile, scratch);
  }
}

template <Operator op, class T>
void run_baseline(
    const Shape& shape, const Plan& plan, const Map<T>& output, const Map<const T>& first, const Map<const T>& second,
    int64_t begin, int64_t end) {
  run_tiles<Isa<16, 16>, op>(shape, plan, output, first, second, begin, end);
}

template <Operator op, class T>
CARAFE_AVX2 void run_avx2(
    const Shape& shape, const Plan& plan, const Map<T>& output, const Map<const T>& first, const Map<const T>& second,
    int64_t begin, int64_t end) {
  run_tiles<Isa<32, 16>, op>(shape, plan, output, first, second, begin, end);
}

template <Operator op, class T>
CARAFE_AVX512 void run_avx512(
    const Shape& shape, const Plan& plan, const Map<T>& output, const Map<const T>& first, const Map<const T>& second,
    int64_t begin, int64_t end) {
  run_tiles<Isa<64, 32>, op>(shape, plan, output, first, second, begin, end);
}

template <Operator op, class T>
void run(const Shape& shape, const Map<T>& output, const Map<const T>& first, const Map<const T>& second) {
  const Path path = current_path();
  // The row kernels list every phase of the scale, up * down of them: 101/100 has too many for lists to pay.
  if (path == Path::plain || shape.up > kMaxPhases || shape.down > kMaxPhases || shape.up * shape.down > kMaxPhases) {
    const int64_t c = op == Operator::grad_masks ? shape.mask_channels() : shape.channels;
    const int64_t h = op == Operator::grad_features ? shape.height : shape.out_height;
    const int64_t w = op == Operator::grad_features ? shape.width : shape.out_width;
    torch::stable::parallel_for(0, shape.batch * c * h, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t n = index / h / c, channel = index / h % c, i = index % h;
        for (int64_t j = 0; j < w; ++j) {
          T& element = output.at(n, channel, i, j);
          if constexpr (op == Operator::reassemble)
            element = reassemble_element(shape, first, second, n, channel, i, j);
          if constexpr (op == Operator::grad_features)
            element = grad_features_element(shape, first, second, n, channel, i, j);
          if constexpr (op == Operator::grad_masks)
            element = grad_masks_element(shape, first, second, n, channel, i, j);
        }
      }
    });
    return;
  }
  const Plan plan = make_plan<accumulator_t<T>>(shape, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, plan.tiles, 1, [&](int64_t begin, int64_t end) {
    const auto tiles = path == Path::avx512 ? &run_avx512<op, T>
                       : path == Path::avx2 ? &run_avx2<op, T>
                                            : &run_baseline<op, T>;
    tiles(shape, plan, output, first, second, begin, end);
  });
}

struct Cpu {
  template <class T>
  static void reassemble(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& features,
      const Map<const T>& masks) {
    run<Operator::reassemble>(shape, output, features, masks);
  }

  template <class T>
  static void grad_features(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& grad_output,
      const Map<const T>& masks) {
    run<Operator::grad_features>(shape, output, grad_output, masks);
  }

  template <class T>
  static void grad_masks(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& grad_output,
      const Map<const T>& features) {
    run<Operator::grad_masks>(shape, output, grad_output, features);
  }
};

}  // namespace
}  // namespace carafe

// The path that this process takes, by name, for tests and benchmark reports (through ctypes).
extern "C" __attribute__((visibility("default"))) const char* carafe_cpu_path() {
  return carafe::kPathNames[static_cast<int>(carafe::current_path())];
}

STABLE_TORCH_LIBRARY_IMPL(carafe_plugin, CPU, m) {
  m.impl("carafe", TORCH_BOX(&carafe::carafe_impl<carafe::Cpu>));
  m.impl("_carafe_grad_features", TORCH_BOX(&carafe::grad_features_impl<carafe::Cpu>));
  m.impl("_carafe_grad_masks", TORCH_BOX(&carafe::grad_masks_impl<carafe::Cpu>));
}

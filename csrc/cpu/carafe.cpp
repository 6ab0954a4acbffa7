// The CPU operators: the row kernels (cpu/tiles.h) compiled for several instruction sets, chosen at run time, and
// the element loop (common/element.h), through torch's own thread pool.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <cstring>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "../arguments.h"
#include "../common/element.h"
#include "../logits.h"
#include "tiles.h"

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

// An allocation of this size is fresh memory from the system in every call (it is the most that glibc keeps), which
// then spends longer on its page faults than on our arithmetic. In huge pages there are 512 times fewer.
constexpr int64_t kFreshBytes = 32 << 20;

// CARAFE_HUGE_PAGES=0 does without: where a virtual machine hands free memory back to its host, huge pages that were
// free for some seconds may cost more than they save.
bool use_huge_pages() {
  static const bool use = [] {
    const char* const wanted = std::getenv("CARAFE_HUGE_PAGES");
    if (wanted == nullptr || *wanted == 0 || std::strcmp(wanted, "1") == 0) return true;
    STD_TORCH_CHECK(std::strcmp(wanted, "0") == 0, "CARAFE_HUGE_PAGES must be 0 or 1, got ", wanted);
    return false;
  }();
  return use;
}

template <class T>
void prepare(const Map<T>& fresh, int64_t elements) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t page = 2 << 20;
  if (!use_huge_pages() || elements * int64_t(sizeof(T)) < kFreshBytes) return;
  char* const data = reinterpret_cast<char*>(fresh.data);
  const int64_t head = (page - reinterpret_cast<intptr_t>(data) % page) % page;
  // Advice: where the system does not take it, nothing is lost.
  (void)madvise(data + head, (elements * int64_t(sizeof(T)) - head) / page * page, MADV_HUGEPAGE);
#endif
}

// What a call computes, tile by tile (and element by element where the path is `plain` and that exists).

template <class T>
struct Reassemble {
  using element = T;
  Map<T> output;
  Map<const T> features;
  Kernels<T> kernels;

  void begin(const Shape& s) const { prepare(output, s.batch * s.channels * s.out_height * s.out_width); }
  template <class I>
  void tile(const Shape& shape, const Tile& tile, Scratch<accumulator_t<T>>& scratch) const {
    reassemble_tile<I>(shape, output, features, kernels, tile, scratch);
  }
};

template <class T>
struct GradFeatures {
  using element = T;
  Map<T> grad;
  Map<const T> grad_output;
  Kernels<T> kernels;

  void begin(const Shape& s) const { prepare(grad, s.batch * s.channels * s.height * s.width); }
  template <class I>
  void tile(const Shape& shape, const Tile& tile, Scratch<accumulator_t<T>>& scratch) const {
    grad_features_tile<I>(shape, grad, grad_output, kernels, tile, scratch);
  }
};

template <class T>
struct GradWeights {
  using element = T;
  Map<T> grad;
  Map<const T> grad_output, features;
  Kernels<T> kernels;

  void begin(const Shape& s) const { prepare(grad, s.batch * s.mask_channels() * s.out_height * s.out_width); }
  template <class I>
  void tile(const Shape& shape, const Tile& tile, Scratch<accumulator_t<T>>& scratch) const {
    grad_kernels_tile<I>(shape, grad, grad_output, features, kernels, tile, scratch);
  }
};

struct Baseline : Isa<16, 16> {
  CARAFE_LOOPS()
};
struct Avx2 : Isa<32, 16> {
  CARAFE_LOOPS(CARAFE_AVX2)
};
struct Avx512 : Isa<64, 32> {
  CARAFE_LOOPS(CARAFE_AVX512)
};

template <class I, class Job>
void run_tiles(const Shape& shape, const Plan& plan, const Job& job, int64_t begin, int64_t end) {
  Scratch<accumulator_t<typename Job::element>> scratch;
  for (int64_t index = begin; index < end; ++index) {
    job.template tile<I>(shape, make_tile(shape, plan, index), scratch);
  }
}

template <class Job>
void run_by_rows(const Shape& shape, const Job& job) {
  const Path path = current_path();
  job.begin(shape);
  const Plan plan = plan_tiles<accumulator_t<typename Job::element>>(shape, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, plan.tiles, 1, [&](int64_t begin, int64_t end) {
    const auto tiles = path == Path::avx512 ? &run_tiles<Avx512, Job>
                       : path == Path::avx2 ? &run_tiles<Avx2, Job>
                                            : &run_tiles<Baseline, Job>;
    tiles(shape, plan, job, begin, end);
  });
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

// The row kernels list every phase of the scale, up * down of them: 101/100 has too many for lists to pay.
bool by_element(const Shape& shape) {
  return current_path() == Path::plain || shape.up > kMaxPhases || shape.down > kMaxPhases ||
         shape.up * shape.down > kMaxPhases;
}

struct Cpu {
  template <class T>
  static void reassemble(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& features,
      const Map<const T>& masks) {
    if (!by_element(shape)) return run_by_rows(shape, Reassemble<T>{output, features, {masks}});
    run_by_element(output, shape.batch, shape.channels, shape.out_height, shape.out_width, [&](auto... at) {
      return reassemble_element(shape, features, masks, at...);
    });
  }

  template <class T>
  static void grad_features(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& grad_output,
      const Map<const T>& masks) {
    if (!by_element(shape)) return run_by_rows(shape, GradFeatures<T>{output, grad_output, {masks}});
    run_by_element(output, shape.batch, shape.channels, shape.height, shape.width, [&](auto... at) {
      return grad_features_element(shape, grad_output, masks, at...);
    });
  }

  template <class T>
  static void grad_masks(
      const Tensor&, const Shape& shape, const Map<T>& output, const Map<const T>& grad_output,
      const Map<const T>& features) {
    if (!by_element(shape)) return run_by_rows(shape, GradWeights<T>{output, grad_output, features, {}});
    run_by_element(output, shape.batch, shape.mask_channels(), shape.out_height, shape.out_width, [&](auto... at) {
      return grad_masks_element(shape, grad_output, features, at...);
    });
  }

  // From logits: always by rows.

  template <class T>
  static void reassemble_logits(
      const Shape& shape, const Map<T>& output, const Map<const T>& features, const Kernels<T>& logits) {
    run_by_rows(shape, Reassemble<T>{output, features, logits});
  }

  template <class T>
  static void grad_features_logits(
      const Shape& shape, const Map<T>& output, const Map<const T>& grad_output, const Kernels<T>& logits) {
    run_by_rows(shape, GradFeatures<T>{output, grad_output, logits});
  }

  template <class T>
  static void grad_logits(
      const Shape& shape, const Map<T>& output, const Map<const T>& grad_output, const Map<const T>& features,
      const Kernels<T>& logits) {
    run_by_rows(shape, GradWeights<T>{output, grad_output, features, logits});
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
  m.impl("_carafe_logits", TORCH_BOX(&carafe::logits_impl<carafe::Cpu>));
  m.impl("_carafe_logits_grad_features", TORCH_BOX(&carafe::logits_grad_features_impl<carafe::Cpu>));
  m.impl("_carafe_logits_grad_logits", TORCH_BOX(&carafe::logits_grad_logits_impl<carafe::Cpu>));
}

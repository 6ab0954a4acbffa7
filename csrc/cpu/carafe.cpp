// The CPU operators: the row kernels of an instruction set chosen at run time (cpu/tiles.h), and the element loop
// (common/operators.h), through torch's own thread pool.
#include <cstdlib>
#include <cstring>
#include <exception>

#include "../arguments.h"
#include "plan.h"

namespace carafe {
namespace {

struct Path {
  const char* name;
  bool (*is_supported)();
  decltype(&run_baseline) run;  // null: element by element
};

// The slowest first; a processor that supports one supports those before it.
const Path kPaths[] = {
    {"plain", [] { return true; }, nullptr},
    {"baseline", [] { return true; }, &run_baseline},  // the compiler's own target, which has NEON on 64-bit Arm
#ifdef CARAFE_X86
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &run_avx2},
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
     },
     &run_avx512},
#endif
};

// CARAFE_CPU_PATH forces a lower path than the machine's best: for tests, and to compare bits across machines.
const Path& choose_path() {
  const char* const wanted = std::getenv("CARAFE_CPU_PATH");
  const Path* best = nullptr;
#ifdef CARAFE_X86
  __builtin_cpu_init();
#endif
  for (const Path& path : kPaths) {
    if (!path.is_supported()) break;
    if (wanted != nullptr && std::strcmp(wanted, path.name) == 0) return path;
    best = &path;
  }
  CARAFE_CHECK(
      wanted == nullptr || *wanted == 0 || std::strcmp(wanted, "auto") == 0,
      "CARAFE_CPU_PATH must be auto or a path of this machine (plain to ", best->name, "), got ", wanted);
  return *best;
}

const Path& current_path() {
  static const Path& path = choose_path();
  return path;
}

constexpr int64_t kMaxPhases = 64;

// The row kernels list every phase of the scale, up * down of them: 101/100 has too many for lists to pay. Logits are
// always taken by rows.
bool by_element(const Shape& shape, Normalizer normalizer) {
  if (normalizer != Normalizer::none) return false;
  return current_path().run == nullptr || shape.up > kMaxPhases || shape.down > kMaxPhases ||
         shape.up * shape.down > kMaxPhases;
}

struct Cpu {
  template <class Operator>
  static void run(const Operator& call, const Tensor& result) {
    if (by_element(call.shape, call.kernels.normalizer)) {
      const int64_t channels = result.size(1), height = result.size(2), width = result.size(3);
      parallel_for(0, result.size(0) * channels * height, 1, [&](int64_t begin, int64_t end) {
        for (int64_t index = begin; index < end; ++index) {
          const int64_t n = index / height / channels, c = index / height % channels, i = index % height;
          for (int64_t j = 0; j < width; ++j) call.result.at(n, c, i, j) = call.element(n, c, i, j);
        }
      });
      return;
    }
    const auto run = current_path().run == nullptr ? &run_baseline : current_path().run;
    const Plan plan = plan_tiles<accumulator_t<typename Operator::type>>(call.shape, get_num_threads());
    parallel_for(0, plan.tiles, 1, [&](int64_t begin, int64_t end) { run(plan, call, begin, end); });
  }
};

}  // namespace
}  // namespace carafe

// The path that this process takes, by name, for tests and benchmark reports (through ctypes, which no exception may
// cross); null where CARAFE_CPU_PATH names none of this machine.
extern "C" __attribute__((visibility("default"))) const char* carafe_cpu_path() {
  try {
    return carafe::current_path().name;
  } catch (const std::exception&) {
    return nullptr;
  }
}

CARAFE_LIBRARY_IMPL(carafe_plugin, CPU, m) {
  m.impl("carafe", CARAFE_BOXED(carafe::reassemble<carafe::Cpu>));
  m.impl("_carafe_grad_features", CARAFE_BOXED(carafe::grad_features<carafe::Cpu>));
  m.impl("_carafe_grad_kernels", CARAFE_BOXED(carafe::grad_kernels<carafe::Cpu>));
}

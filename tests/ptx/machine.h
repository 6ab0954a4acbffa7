// Executes PTX on the CPU, in the place of the CUDA runtime and a GPU: what ptx.py has parsed, over host memory, a warp
// of 32 lanes in lockstep, with the checks of racecheck, memcheck, initcheck and synccheck and the counts that a model
// of a GPU needs. Compiled with g++ alone. execution.cpp: warps, barriers, blocks; arithmetic.cpp: what is computed in
// registers; memory.cpp: what leaves them; runtime.cpp: the CUDA runtime, and what executor.py calls.
//
// Warps. Where lanes part they meet again at the first instruction that lies on all ways from there, as ptxas has it. A
// warp runs up to a barrier, then the next one does.
//
// Order. Each warp has a clock, which a barrier of the block or of the warp moves on, and knows of each other warp's
// clock as of the last barrier with it. An access is recorded as (clock, thread); two of different threads, one of them
// a write, are ordered where the later one's warp knows a later clock of the earlier one's. So a race is found
// whatever order the warps happen to run in. shfl.sync, vote.sync and the like order no memory (CUDA's guide says so).
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#define INLINE inline __attribute__((always_inline))
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < kLanes; ++l)

namespace machine {

constexpr int kLanes = 32;
constexpr uint32_t kAll = ~0u;
constexpr int kOperands = 14;
constexpr uint64_t kSharedWindow = uint64_t(1) << 60, kLocalWindow = uint64_t(2) << 60;
constexpr uint64_t kWindow = ~uint64_t(0) << 60;

struct Warp;
struct Ins;
using Run = void (*)(Warp&, const Ins&);

enum Kind : int32_t { kPlain, kBranch, kBranchIndexed, kExit, kBarrier };

// An instruction: operands are rows of registers, or numbers of predicates.
struct Ins {
  Run run;
  int32_t kind, predicate, negate, hidden;  // hidden: part of the instruction before it
  int32_t x[kOperands];
  int32_t n, size, sign, wide;  // of an access: elements, bytes of each, sign-extended, 64-bit address
  int32_t target, meets, line;  // meets: where the lanes that a branch parts are together again
  int64_t imm;
};

struct Count {
  uint64_t issued, lanes, sectors, global_wavefronts, wavefronts, ideal_wavefronts;  // the last two of shared memory
};

enum Problem : int32_t {
  kGlobalBounds,
  kSharedBounds,
  kLocalBounds,
  kParamBounds,
  kMisaligned,
  kUninitializedShared,
  kUninitializedGlobal,
  kUninitializedRegister,
  kSharedRace,
  kGlobalRace,
  kPendingCopy,
  kWriteToInput,
  kBarrierNotReached,
  kDivergentBarrier,
  kInactiveLane,
  kEndless,
  kBadBarrier,
  kLanesApart,
  kProblems
};

struct Finding {
  int32_t problem, kernel, instruction, launch;
  int64_t count;
  uint64_t block;
  int32_t thread, other;
  uint64_t address;
  int32_t bytes;
};

struct Constant {
  int32_t row, kind;  // 0: 32 bits, 1: 64 bits, 2: an address within the parameters, 3: an address of global memory
  uint64_t value;
};

struct Special {
  int32_t row, what;
};

struct Kernel {
  std::string name;
  std::vector<Ins> code;
  std::vector<Constant> constants;
  std::vector<Special> specials;
  std::vector<int32_t> tables;   // targets of indexed branches
  std::vector<int32_t> checked;  // rows of registers that may be read before they are written
  int32_t rows = 0, predicates = 0, static_shared = 0, local_bytes = 0, max_threads = 1024, min_blocks = 1;
  int32_t granule = 2;  // log2 of the bytes of shared memory that races are looked for by
  int32_t registers = 0, maximum_dynamic = 48 << 10;
  std::vector<int32_t> parameter_offsets, parameter_sizes;
  int32_t parameter_bytes = 0;
};

// Memory that a launch may touch.
struct Range {
  uint64_t low, high;
  int kind;                                            // 0 input, 1 result, 2 workspace, 3 the module's own
  int granule;                                         // log2 of bytes
  std::vector<uint8_t> initialized;                    // of a result or workspace
  std::vector<uint64_t> writer, reader, other_reader;  // of this launch; allocated when needed
  std::unique_ptr<uint8_t[]> owned;
};

struct Launch {
  int32_t kernel;
  uint32_t grid[3], block[3];
  uint64_t dynamic;
  int32_t status;
  uint64_t executed, instructions;
  std::vector<Count> counts;
};

struct Dim {
  unsigned x, y, z;
};

struct Executor {
  std::vector<std::unique_ptr<Kernel>> kernels;
  int (*find)(const char*) = nullptr;  // the number of a kernel, by its name
  std::unordered_map<const void*, std::string> stubs;
  std::vector<std::unique_ptr<Range>> ranges;  // by address
  std::vector<Finding> findings;
  std::unordered_map<uint64_t, size_t> finding_of;
  std::vector<std::unique_ptr<Launch>> launches;
  std::map<int, int> attributes;
  int64_t limit = int64_t(1) << 32;  // instructions of a warp
  uint64_t every = 1, first = 0;     // blocks that are executed
  bool checks = true, counting = true, descending = false;
  int fill = 0xff;  // of memory that has not been written: not a number, in every format
  int error = 0, fail_with = 0, fail_after = 0;
  bool stop = false;  // the launch, after what no execution can go on from
};
extern Executor ex;

struct Copy {  // cp.async that has not been waited for
  int lane;
  uint32_t to, bytes, group, read;
  uint64_t from;
  uint8_t data[16];
};

constexpr int32_t kNever = std::numeric_limits<int32_t>::max();

// Lanes that go on together, until they meet the others, who wait there.
struct Path {
  int32_t pc, end;
  uint32_t mask;
};

struct Block;

struct Warp {
  uint32_t* regs;
  uint32_t* preds;
  uint32_t* written;  // lanes of each row, where that is checked
  uint32_t mask;      // of the instruction being executed
  Block* block;
  const Kernel* kernel;
  Count* count;  // of the instruction being executed
  int index;
  uint32_t clock;
  uint32_t* known;  // of each warp's clock
  uint32_t alive;
  std::vector<Path> paths;  // the last is the one that is executed
  int32_t waits;            // barrier, or -1
  bool done;
  uint64_t steps;
  std::vector<Copy> copies;
  uint32_t groups[kLanes];
  uint8_t* local;
  int current;  // instruction
  uint32_t reduction;
  const Ins* waiting;
};

struct Arrival {
  int warp;
  std::vector<uint32_t> known;  // then, with what the warp itself has done up to then
};

struct Barrier {
  int arrived = 0, expected = 0;  // threads
  std::vector<Arrival> arrivals;  // of warps, waiting or not
  uint32_t population = 0;
  bool any = false, all = true;
};

struct Block {
  std::vector<uint8_t> shared;
  std::vector<uint32_t> writer, reader, other_reader;
  uint32_t shared_bytes;
  int granule;
  uint64_t index;
  Barrier barriers[16];
  std::vector<uint32_t> known;
  int warps, threads;
};

void report(Problem problem, const Warp& w, int lane, uint64_t address = 0, int bytes = 0, int other = -1);

// Where an address of global memory lies; null where nothing may be accessed.
Range* range_of(uint64_t address);

// Of the launch that is executed: where its parameters lie.
struct Parameters {
  uint64_t low, high;
};
extern Parameters parameters;

struct Operation {
  std::string name;
  Run run;
};
extern std::vector<Operation> operations;  // by the numbers that ptx.py writes

void add(const std::string& name, Run run);
void add_arithmetic();
void add_memory();

#define OP(name, ...)                   \
  add(name, [](Warp& w, const Ins& i) { \
    (void)w;                            \
    (void)i;                            \
    __VA_ARGS__;                        \
  })

// cudaError_t of the launch.
int launch_kernel(int number, Dim grid, Dim block, void* const* arguments, size_t dynamic);

// ---------------------------------------------------------------------------------------------------------- registers

template <class T>
struct Slot {
  using type = std::conditional_t<sizeof(T) == 8, T, std::conditional_t<sizeof(T) == 4, T, uint32_t>>;
};

template <class T>
INLINE typename Slot<T>::type* row(const Warp& w, int r) {
  return reinterpret_cast<typename Slot<T>::type*>(w.regs + size_t(r) * kLanes);
}

template <class T>
INLINE T get(const typename Slot<T>::type* r, int l) {
  return static_cast<T>(r[l]);
}

template <class D, class F>
INLINE void each(const Warp& w, int to, const F& f) {
  auto* const d = row<D>(w, to);
  const uint32_t m = w.mask;
  if (m == kAll) {
    LANES d[l] = static_cast<typename Slot<D>::type>(f(l));
  } else {
    typename Slot<D>::type t[kLanes];
    LANES t[l] = static_cast<typename Slot<D>::type>(f(l));
    LANES d[l] = m >> l & 1 ? t[l] : d[l];
  }
}

template <class F>
INLINE void lanes(uint32_t mask, const F& f) {
  for (; mask; mask &= mask - 1) f(__builtin_ctz(mask));
}

template <class D, class F>
INLINE void each_active(const Warp& w, int to, const F& f) {
  auto* const d = row<D>(w, to);
  lanes(w.mask, [&](int l) { d[l] = static_cast<typename Slot<D>::type>(f(l)); });
}

INLINE void set_predicate(const Warp& w, int to, uint32_t bits) {
  w.preds[to] = (w.preds[to] & ~w.mask) | (bits & w.mask);
}

template <class T, class U>
INLINE T cast(U value) {
  T result;
  static_assert(sizeof result == sizeof value);
  memcpy(&result, &value, sizeof result);
  return result;
}

template <class T, class D, class F>
INLINE void unary(Warp& w, const Ins& i, const F& f) {
  const auto* const a = row<T>(w, i.x[1]);
  each<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l)); });
}
template <class T, class D, class F>
INLINE void binary(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
  each<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l), get<T>(b, l)); });
}
template <class T, class D, class F>
INLINE void binary_active(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
  each_active<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l), get<T>(b, l)); });
}
template <class T, class D, class F>
INLINE void unary_active(Warp& w, const Ins& i, const F& f) {
  const auto* const a = row<T>(w, i.x[1]);
  each_active<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l)); });
}
template <class T, class D, class F>
INLINE void ternary(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]), *const c = row<T>(w, i.x[3]);
  each<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l), get<T>(b, l), get<T>(c, l)); });
}
template <class T, class D, class F>
INLINE void ternary_active(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]), *const c = row<T>(w, i.x[3]);
  each_active<D>(w, i.x[0], [&](int l) { return f(get<T>(a, l), get<T>(b, l), get<T>(c, l)); });
}

}  // namespace machine

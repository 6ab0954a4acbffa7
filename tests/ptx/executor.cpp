// Executes PTX on the CPU, in the place of the CUDA runtime and a GPU: what ptx.py has parsed, over host memory, a warp
// of 32 lanes in lockstep, with the checks of racecheck, memcheck, initcheck and synccheck and the counts that a model
// of a GPU needs. Compiled with g++ alone.
//
// Warps. Where lanes part they meet again at the first instruction that lies on all ways from there, as ptxas has it. A
// warp runs up to a barrier, then the next one does.
//
// Order. Each warp has a clock, which a barrier of the block or of the warp moves on, and knows of each other warp's
// clock as of the last barrier with it. An access is recorded as (clock, thread); two of different threads, one of them
// a write, are ordered where the later one's warp knows a later clock of the earlier one's. So a race is found
// whatever order the warps happen to run in. shfl.sync, vote.sync and the like order no memory (CUDA's guide says so).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <unordered_map>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define INLINE inline __attribute__((always_inline))
#define LANES _Pragma("GCC ivdep") for (int l = 0; l < kLanes; ++l)

namespace {

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
  uint64_t issued, lanes, sectors, cache_lines, wavefronts, ideal_wavefronts;
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
Executor ex;

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

void report(Problem problem, const Warp& w, int lane, uint64_t address = 0, int bytes = 0, int other = -1) {
  const int kernel = ex.launches.back()->kernel;
  const uint64_t key = uint64_t(problem) << 56 | uint64_t(kernel) << 32 | uint32_t(w.current);
  auto found = ex.finding_of.find(key);
  if (found == ex.finding_of.end()) {
    ex.finding_of[key] = ex.findings.size();
    ex.findings.push_back(
        {problem, kernel, w.current, int(ex.launches.size()) - 1, 1, w.block->index, w.index * kLanes + lane, other,
         address, bytes});
  } else {
    ++ex.findings[found->second].count;
  }
}

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

// --------------------------------------------------------------------------------------------------------- arithmetic

enum Rounding { kNearest, kZero, kDown, kUp };

INLINE float flush(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }

// To odd: so rounded, a double can be rounded again to any much shorter number as if from the exact value.
INLINE double add_to_odd(double a, double b) {
  const double sum = a + b;
  if (!std::isfinite(sum)) return sum;
  const double bb = sum - a, error = (a - (sum - bb)) + (b - bb);
  if (error == 0 || (cast<uint64_t>(sum) & 1)) return sum;
  const uint64_t bits = cast<uint64_t>(sum);
  // The neighbour towards the exact sum; an error where the sum is zero there is none.
  return cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// A double, exact or rounded to odd, to float.
INLINE float round_to_float(double x, int rounding) {
  const float nearest = static_cast<float>(x);
  if (rounding == kNearest || std::isnan(x) || double(nearest) == x) return nearest;
  const float infinity = std::numeric_limits<float>::infinity();
  const bool above = double(nearest) > x;
  const float lower = above ? std::nextafter(nearest, -infinity) : nearest;
  const float upper = above ? nearest : std::nextafter(nearest, infinity);
  if (rounding == kDown) return lower;
  if (rounding == kUp) return upper;
  return x > 0 ? lower : upper;
}

INLINE float fma_rounded(float a, float b, float c, int rounding) {
  const double product = double(a) * double(b);
  if (product == 0 || c == 0 || !std::isfinite(product) || !std::isfinite(c)) {
    if (rounding == kDown && product == -double(c) && product == 0) {  // of zeros of different signs
      return std::signbit(product) == std::signbit(c) ? c : -0.f;
    }
    return round_to_float(product + double(c), rounding);
  }
  if (product == -double(c)) return rounding == kDown ? -0.f : 0.f;
  return round_to_float(add_to_odd(product, c), rounding);
}

template <class T>
INLINE T lesser(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a < b || (a == b && std::signbit(a)) ? a : b;
  } else {
    return a < b ? a : b;
  }
}
template <class T>
INLINE T greater(T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(a) ? b : std::isnan(b) ? a : a > b || (a == b && std::signbit(b)) ? a : b;
  } else {
    return a > b ? a : b;
  }
}

// 16-bit floating point numbers, by their bits.
struct F16 {
  static INLINE float widen(uint16_t bits) { return static_cast<float>(cast<_Float16>(bits)); }
  static INLINE uint16_t narrow(double x) { return std::isnan(x) ? 0x7fff : cast<uint16_t>(static_cast<_Float16>(x)); }
  static INLINE uint16_t narrow_float(float x) {
    return std::isnan(x) ? 0x7fff : cast<uint16_t>(static_cast<_Float16>(x));
  }
};
struct BF16 {
  static INLINE float widen(uint16_t bits) { return cast<float>(uint32_t(bits) << 16); }
  static INLINE uint16_t narrow_float(float x) {
    const uint32_t bits = cast<uint32_t>(x);
    return std::isnan(x) ? 0x7fff : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }
  static INLINE uint16_t narrow(double x) {
    if (std::isnan(x)) return 0x7fff;
    float nearest = static_cast<float>(x);
    // To odd, for a second rounding.
    if (double(nearest) != x && std::isfinite(nearest) && !(cast<uint32_t>(nearest) & 1)) {
      const uint32_t bits = cast<uint32_t>(nearest);
      const bool outwards = std::fabs(x) > std::fabs(double(nearest));
      nearest = cast<float>(outwards ? bits + 1 : bits - 1);
    }
    return narrow_float(nearest);
  }
};

template <class H>
uint16_t narrow_to_zero(double x) {
  const uint16_t nearest = H::narrow(x);
  if (std::isnan(x) || std::isinf(x)) return nearest;
  return std::fabs(double(H::widen(nearest))) > std::fabs(x) ? nearest - 1 : nearest;
}

template <class H>
uint16_t half_operation(const char op, uint16_t a, uint16_t b, uint16_t c) {
  const double x = H::widen(a), y = H::widen(b), z = H::widen(c);
  switch (op) {
    case '+':
      return H::narrow(add_to_odd(x, y));
    case '-':
      return H::narrow(add_to_odd(x, -y));
    case '*':
      return H::narrow(x * y);
    case 'f':
      return H::narrow(x * y == 0 || z == 0 ? x * y + z : add_to_odd(x * y, z));
    case 'r': {  // fma, and zero for what is negative
      const uint16_t value = half_operation<H>('f', a, b, c);
      return std::isnan(H::widen(value)) ? 0x7fff : value & 0x8000 ? 0 : value;
    }
    case '<':
      return std::isnan(x) && std::isnan(y)                                                            ? 0x7fff
             : lesser(float(x), float(y)) == float(x) && !std::isnan(x) && (x != y || std::signbit(x)) ? a
             : std::isnan(y)                                                                           ? a
                                                                                                       : b;
    case '>':
      return std::isnan(x) && std::isnan(y)                                                             ? 0x7fff
             : greater(float(x), float(y)) == float(x) && !std::isnan(x) && (x != y || std::signbit(y)) ? a
             : std::isnan(y)                                                                            ? a
                                                                                                        : b;
    case 'l':
      return std::isnan(x) || std::isnan(y) ? 0x7fff : half_operation<H>('<', a, b, c);
    case 'g':
      return std::isnan(x) || std::isnan(y) ? 0x7fff : half_operation<H>('>', a, b, c);
    case 'n':
      return a ^ 0x8000;
    case 'a':
      return a & 0x7fff;
    case 'e':
      return H::narrow(std::exp2(x));
    case 't':
      return H::narrow(std::tanh(x));
  }
  return 0;
}

template <class H, char Op, bool Packed>
void half_op(Warp& w, const Ins& i) {
  const auto *const a = row<uint32_t>(w, i.x[1]), *const b = row<uint32_t>(w, i.x[2]),
                    *const c = row<uint32_t>(w, i.x[3]);
  each_active<uint32_t>(w, i.x[0], [&](int l) {
    uint32_t result = half_operation<H>(Op, a[l], b[l], c[l]);
    if (Packed) result |= uint32_t(half_operation<H>(Op, a[l] >> 16, b[l] >> 16, c[l] >> 16)) << 16;
    return result;
  });
}

template <class T>
T bit_field(T a, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  using U = std::make_unsigned_t<T>;
  position &= 255, length &= 255;
  const uint32_t last = std::min(position + length - 1, kBits - 1);
  const bool negative = std::is_signed_v<T> && length != 0 && (U(a) >> last & 1);
  U result = 0;
  for (uint32_t bit = 0; bit < kBits; ++bit) {
    const bool inside = bit < length && position + bit < kBits;
    result |= U(inside ? U(a) >> (position + bit) & 1 : negative) << bit;
  }
  return T(result);
}

template <class T>
T insert_bits(T a, T b, uint32_t position, uint32_t length) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  position &= 255, length &= 255;
  if (position >= kBits || length == 0) return b;
  const T field = length >= kBits ? ~T(0) : (T(1) << length) - 1;
  return (b & ~(field << position)) | ((a & field) << position);
}

uint32_t permute(uint32_t a, uint32_t b, uint32_t selector, int mode) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  const auto byte = [&](int index) { return uint32_t(bytes >> (8 * (index & 7)) & 255); };
  uint32_t result = 0;
  for (int k = 0; k < 4; ++k) {
    const int s = selector & 3;
    uint32_t value = 0;
    switch (mode) {
      case 0: {
        const uint32_t nibble = selector >> (4 * k) & 15;
        value = byte(nibble & 7);
        if (nibble & 8) value = value & 128 ? 255 : 0;
        break;
      }
      case 1:
        value = byte(s + k);
        break;  // f4e
      case 2:
        value = byte(s - k);
        break;  // b4e
      case 3:
        value = byte(s);
        break;  // rc8
      case 4:
        value = byte(std::max(s, k));
        break;  // ecl
      case 5:
        value = byte(std::min(s, k));
        break;  // ecr
      case 6:
        value = byte((s & 1) * 2 + (k & 1));
        break;  // rc16
    }
    result |= value << (8 * k);
  }
  return result;
}

template <class T>
T divide(T a, T b) {
  if (b == 0) return T(~T(0));
  if (std::is_signed_v<T> && b == T(-1)) return T(0) - a;
  return a / b;
}
template <class T>
T remainder(T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return 0;
  return a % b;
}

template <class T>
T high_product(T a, T b) {
  using Wide = std::conditional_t<
      sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
      std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return T(Wide(a) * Wide(b) >> (sizeof(T) * 8));
}

template <class T>
T to_integer(double x, int rounding) {
  if (std::isnan(x)) return sizeof(T) == 8 ? T(uint64_t(1) << 63) : T(0);
  x = rounding == kNearest ? std::nearbyint(x)
      : rounding == kZero  ? std::trunc(x)
      : rounding == kDown  ? std::floor(x)
                           : std::ceil(x);
  if (x <= double(std::numeric_limits<T>::min())) return std::numeric_limits<T>::min();
  if (x >= double(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

double to_whole(double x, int rounding) {
  return rounding == kNearest ? std::nearbyint(x)
         : rounding == kZero  ? std::trunc(x)
         : rounding == kDown  ? std::floor(x)
                              : std::ceil(x);
}

float approximate_quotient(float a, float b) {
  const float size = std::fabs(b);
  if (size > 0x1p126f && !std::isinf(b))
    return std::isinf(a) || std::isnan(a) ? NAN : std::copysign(0.f, a) * std::copysign(1.f, b);
  return a / b;
}

// ------------------------------------------------------------------------------------------------------------- memory

constexpr uint32_t kThreadBits = 10, kThreadMask = (1 << kThreadBits) - 1;
constexpr uint32_t kPendingClock = (1u << (32 - kThreadBits)) - 1;

INLINE uint32_t record_of(const Warp& w, int lane) {
  return w.clock << kThreadBits | uint32_t(w.index * kLanes + lane);
}

INLINE bool ordered(const Warp& w, uint32_t record, uint32_t thread) {
  const uint32_t other = record & kThreadMask, clock = record >> kThreadBits;
  if (clock == kPendingClock) return false;
  return other == thread || clock < w.known[other / kLanes];
}

void conflict(Warp& w, int lane, uint32_t record, uint32_t address, uint32_t bytes) {
  const bool pending = record >> kThreadBits == kPendingClock;
  report(pending ? kPendingCopy : kSharedRace, w, lane, address, bytes, record & kThreadMask);
}

INLINE void check_shared_read(Warp& w, int lane, uint32_t address, uint32_t bytes) {
  Block& b = *w.block;
  const uint32_t thread = w.index * kLanes + lane, record = record_of(w, lane);
  const uint32_t last = (address + bytes - 1) >> b.granule;
  bool raced = false, uninitialized = false;
  uint32_t with = 0;
  for (uint32_t g = address >> b.granule; g <= last; ++g) {
    const uint32_t written = b.writer[g];
    if (written == 0)
      uninitialized = true;
    else if (__builtin_expect(!ordered(w, written, thread), 0))
      raced = true, with = written;
    const uint32_t read = b.reader[g];
    if (read != record) {
      if ((read & kThreadMask) != thread) b.other_reader[g] = read;
      b.reader[g] = record;
    }
  }
  if (__builtin_expect(raced, 0)) conflict(w, lane, with, address, bytes);
  if (__builtin_expect(uninitialized, 0)) report(kUninitializedShared, w, lane, address, bytes);
}

INLINE void check_shared_write(Warp& w, int lane, uint32_t address, uint32_t bytes, uint32_t record) {
  Block& b = *w.block;
  const uint32_t thread = w.index * kLanes + lane;
  const uint32_t last = (address + bytes - 1) >> b.granule;
  bool raced = false;
  uint32_t with = 0;
  for (uint32_t g = address >> b.granule; g <= last; ++g) {
    for (const uint32_t before : {b.writer[g], b.reader[g], b.other_reader[g]}) {
      if (__builtin_expect(before != 0 && !ordered(w, before, thread), 0)) raced = true, with = before;
    }
    b.writer[g] = record;
  }
  if (__builtin_expect(raced, 0)) conflict(w, lane, with, address, bytes);
}

Range* range_of(uint64_t address) {
  auto after = std::upper_bound(
      ex.ranges.begin(), ex.ranges.end(), address, [](uint64_t a, const auto& r) { return a < r->low; });
  if (after == ex.ranges.begin()) return nullptr;
  Range* const range = std::prev(after)->get();
  return address < range->high ? range : nullptr;
}

INLINE uint64_t global_record(const Warp& w, uint32_t record) { return (w.block->index + 1) << 32 | record; }

INLINE bool globally_ordered(const Warp& w, uint64_t record, int lane) {
  if (record == 0) return true;
  return record >> 32 == w.block->index + 1 && ordered(w, uint32_t(record), w.index * kLanes + lane);
}

INLINE uint32_t pending_record_of(const Warp& w, int lane) {
  return kPendingClock << kThreadBits | uint32_t(w.index * kLanes + lane);
}

// Whether a lane may access these bytes; `range` is where the last access was. `pending`: a copy reads them until it is
// waited for.
INLINE bool may_access(
    Warp& w, int lane, uint64_t address, uint32_t bytes, bool write, Range*& range, bool pending = false) {
  if (!range || address < range->low || address >= range->high) range = range_of(address);
  if (!range || address + bytes > range->high) {
    report(kGlobalBounds, w, lane, address, bytes);
    return false;
  }
  if (write && range->kind == 0) {
    report(kWriteToInput, w, lane, address, bytes);
    return false;
  }
  if (address % bytes) report(kMisaligned, w, lane, address, bytes);
  if (range->kind == 0 || range->kind == 3 || !ex.checks) return true;
  const uint64_t first = (address - range->low) >> range->granule,
                 last = (address + bytes - 1 - range->low) >> range->granule;
  const size_t granules = ((range->high - range->low) >> range->granule) + 1;
  const uint64_t record = global_record(w, pending ? pending_record_of(w, lane) : record_of(w, lane));
  if (range->writer.empty()) range->writer.assign(granules, 0);
  bool raced = false, uninitialized = false;
  uint64_t with = 0;
  for (uint64_t g = first; g <= last; ++g) {
    if (!globally_ordered(w, range->writer[g], lane)) raced = true, with = range->writer[g];
    if (write) {
      if (!range->reader.empty()) {
        for (const uint64_t before : {range->reader[g], range->other_reader[g]}) {
          if (!globally_ordered(w, before, lane)) raced = true, with = before;
        }
      }
      range->writer[g] = record;
      range->initialized[g] = 1;
    } else {
      if (!range->initialized[g]) uninitialized = true;
      if (range->reader.empty()) range->reader.assign(granules, 0), range->other_reader.assign(granules, 0);
      if (range->reader[g] != record) {
        const uint64_t before = range->reader[g];
        const bool own = before >> 32 == record >> 32 && ((before ^ record) & kThreadMask) == 0;
        if (!own || uint32_t(before) >> kThreadBits == kPendingClock) range->other_reader[g] = before;
        range->reader[g] = record;
      }
    }
  }
  if (raced) report(kGlobalRace, w, lane, address, bytes, int(with & kThreadMask));
  if (uninitialized) report(kUninitializedGlobal, w, lane, address, bytes);
  return true;
}

// How many different numbers there are.
int distinct(uint64_t* values, int count) {
  bool ascending = true;
  for (int k = 1; k < count; ++k) ascending &= values[k - 1] <= values[k];
  if (!ascending) std::sort(values, values + count);
  return int(std::unique(values, values + count) - values);
}

void count_global(Warp& w, const uint64_t* address, uint32_t bytes) {
  uint64_t sectors[2 * kLanes], cache_lines[2 * kLanes];
  int n = 0;
  lanes(w.mask, [&](int l) {
    sectors[n] = address[l] / 32, cache_lines[n++] = address[l] / 128;
    if ((address[l] + bytes - 1) / 32 != address[l] / 32) {
      sectors[n] = (address[l] + bytes - 1) / 32, cache_lines[n++] = (address[l] + bytes - 1) / 128;
    }
  });
  w.count->sectors += distinct(sectors, n);
  w.count->cache_lines += distinct(cache_lines, n);
}

// Of 32 banks of 4 bytes: 64-bit accesses go by half warps, 128-bit ones by quarters, lanes of the same word share.
void count_shared(Warp& w, const uint32_t* address, uint32_t bytes) {
  const int parts = bytes <= 4 ? 1 : bytes == 8 ? 2 : 4, each = kLanes / parts;
  const uint32_t words = std::max(1u, bytes / 4);
  for (int part = 0; part < parts; ++part) {
    const uint32_t active = each == 32 ? w.mask : w.mask >> (part * each) & ((1u << each) - 1);
    if (!active) continue;
    uint32_t seen[32][8];
    uint8_t held[32] = {};
    int most = 1;
    lanes(active, [&](int l) {
      for (uint32_t k = 0; k < words; ++k) {
        const uint32_t word = address[part * each + l] / 4 + k, bank = word % 32;
        int at = 0;
        const int count = std::min<int>(held[bank], 8);
        while (at < count && seen[bank][at] != word) ++at;
        if (at < count) continue;
        if (held[bank] >= 8) {  // more than that is told apart by counting each
          most = std::max<int>(most, ++held[bank]);
          continue;
        }
        seen[bank][held[bank]++] = word;
        most = std::max<int>(most, held[bank]);
      }
    });
    w.count->wavefronts += most;
    ++w.count->ideal_wavefronts;
  }
}

INLINE void global_addresses(const Warp& w, int base, int64_t imm, uint64_t* address) {
  const auto* const from = row<uint64_t>(w, base);
  LANES address[l] = from[l] + uint64_t(imm);
}
INLINE void shared_addresses(const Warp& w, const Ins& i, int base, uint32_t* address) {
  if (i.wide) {
    const auto* const from = row<uint64_t>(w, base);
    LANES address[l] = uint32_t(from[l] + uint64_t(i.imm));
  } else {
    const auto* const from = row<uint32_t>(w, base);
    LANES address[l] = from[l] + uint32_t(i.imm);
  }
}

template <int Size>
INLINE void load_element(Warp& w, const Ins& i, int j, int lane, const uint8_t* from) {
  const int r = i.x[j];
  if constexpr (Size == 8) {
    uint64_t value;
    memcpy(&value, from, 8);
    row<uint64_t>(w, r)[lane] = value;
  } else if constexpr (Size == 4) {
    uint32_t value;
    memcpy(&value, from, 4);
    if (i.sign & 2)
      row<uint64_t>(w, r)[lane] = i.sign & 1 ? uint64_t(int64_t(int32_t(value))) : value;
    else
      row<uint32_t>(w, r)[lane] = value;
  } else {
    int64_t value;
    if constexpr (Size == 2) {
      uint16_t raw;
      memcpy(&raw, from, 2);
      value = i.sign & 1 ? int64_t(int16_t(raw)) : raw;
    } else {
      value = i.sign & 1 ? int64_t(int8_t(*from)) : *from;
    }
    if (i.sign & 2)
      row<uint64_t>(w, r)[lane] = uint64_t(value);
    else
      row<uint32_t>(w, r)[lane] = uint32_t(value);
  }
}
template <int Size>
INLINE void store_element(const Warp& w, const Ins& i, int j, int lane, uint8_t* to) {
  if constexpr (Size == 8)
    memcpy(to, &row<uint64_t>(w, i.x[j])[lane], 8);
  else
    memcpy(to, &row<uint32_t>(w, i.x[j])[lane], Size);
}

template <int Size>
INLINE void load_elements(Warp& w, const Ins& i, int lane, const uint8_t* from) {
  for (int j = 0; j < i.n; ++j)
    load_element<Size>(w, i, j, lane, from ? from + j * Size : reinterpret_cast<const uint8_t*>("\0\0\0\0\0\0\0"));
}
template <int Size>
INLINE void store_elements(Warp& w, const Ins& i, int lane, uint8_t* to) {
  for (int j = 0; j < i.n; ++j) store_element<Size>(w, i, j, lane, to + j * Size);
}

// The address is operand n of an access.
template <int Size>
void load_global(Warp& w, const Ins& i) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  const uint32_t bytes = Size * i.n;
  if (ex.counting) count_global(w, address, bytes);
  Range* range = nullptr;
  lanes(w.mask, [&](int l) {
    const bool fine = may_access(w, l, address[l], bytes, false, range);
    load_elements<Size>(w, i, l, fine ? reinterpret_cast<const uint8_t*>(address[l]) : nullptr);
  });
}
template <int Size>
void store_global(Warp& w, const Ins& i) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  const uint32_t bytes = Size * i.n;
  if (ex.counting) count_global(w, address, bytes);
  Range* range = nullptr;
  lanes(w.mask, [&](int l) {
    if (may_access(w, l, address[l], bytes, true, range))
      store_elements<Size>(w, i, l, reinterpret_cast<uint8_t*>(address[l]));
  });
}

INLINE bool in_shared(Warp& w, int lane, uint32_t address, uint32_t bytes) {
  if (__builtin_expect(uint64_t(address) + bytes > w.block->shared_bytes, 0)) {
    report(kSharedBounds, w, lane, address, bytes);
    return false;
  }
  if (__builtin_expect(address & (bytes - 1), 0)) report(kMisaligned, w, lane, address, bytes);
  return true;
}
template <int Size>
void load_shared(Warp& w, const Ins& i) {
  uint32_t address[kLanes];
  shared_addresses(w, i, i.x[i.n], address);
  const uint32_t bytes = Size * i.n;
  if (ex.counting) count_shared(w, address, bytes);
  const uint8_t* const shared = w.block->shared.data();
  lanes(w.mask, [&](int l) {
    const bool fine = in_shared(w, l, address[l], bytes);
    if (fine && ex.checks) check_shared_read(w, l, address[l], bytes);
    load_elements<Size>(w, i, l, fine ? shared + address[l] : nullptr);
  });
}
template <int Size>
void store_shared(Warp& w, const Ins& i) {
  uint32_t address[kLanes];
  shared_addresses(w, i, i.x[i.n], address);
  const uint32_t bytes = Size * i.n;
  if (ex.counting) count_shared(w, address, bytes);
  uint8_t* const shared = w.block->shared.data();
  lanes(w.mask, [&](int l) {
    if (!in_shared(w, l, address[l], bytes)) return;
    if (ex.checks) check_shared_write(w, l, address[l], bytes, record_of(w, l));
    store_elements<Size>(w, i, l, shared + address[l]);
  });
}

uint8_t* local_place(Warp& w, int lane, uint64_t address, uint32_t bytes) {
  address &= ~kWindow;
  if (address + bytes > uint64_t(w.kernel->local_bytes)) {
    report(kLocalBounds, w, lane, address, bytes);
    return nullptr;
  }
  if (address % bytes) report(kMisaligned, w, lane, address, bytes);
  return w.local + size_t(lane) * w.kernel->local_bytes + address;
}
template <int Size>
void load_local(Warp& w, const Ins& i) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  lanes(w.mask, [&](int l) { load_elements<Size>(w, i, l, local_place(w, l, address[l], Size * i.n)); });
}
template <int Size>
void store_local(Warp& w, const Ins& i) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  lanes(w.mask, [&](int l) {
    if (uint8_t* const to = local_place(w, l, address[l], Size * i.n)) store_elements<Size>(w, i, l, to);
  });
}

// Parameters lie in a range of their own, which `x[n + 1]` ... are not needed for: its bounds are the launch's.
struct Parameters {
  uint64_t low, high;
};
Parameters parameters;

template <int Size>
void load_param(Warp& w, const Ins& i) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  const uint32_t bytes = Size * i.n;
  lanes(w.mask, [&](int l) {
    const bool fine = address[l] >= parameters.low && address[l] + bytes <= parameters.high;
    if (!fine)
      report(kParamBounds, w, l, address[l] - parameters.low, bytes);
    else if (address[l] % bytes)
      report(kMisaligned, w, l, address[l], bytes);
    load_elements<Size>(w, i, l, fine ? reinterpret_cast<const uint8_t*>(address[l]) : nullptr);
  });
}

// Through generic addresses: lanes of each space in turn.
template <class Shared, class Local, class Param, class Global>
INLINE void by_space(
    Warp& w, const Ins& i, const Shared& shared, const Local& local, const Param& param, const Global& global) {
  uint64_t address[kLanes];
  global_addresses(w, i.x[i.n], i.imm, address);
  const uint32_t mask = w.mask;
  uint32_t of[4] = {};
  lanes(mask, [&](int l) {
    const uint64_t window = address[l] & kWindow;
    const bool parameter = address[l] >= parameters.low && address[l] < parameters.high;
    of[window == kSharedWindow ? 0 : window == kLocalWindow ? 1 : parameter ? 2 : 3] |= 1u << l;
  });
  if ((w.mask = of[0])) shared(w, i);
  if ((w.mask = of[1])) local(w, i);
  if ((w.mask = of[2])) param(w, i);
  if ((w.mask = of[3])) global(w, i);
  w.mask = mask;
}
template <int Size>
void load_generic(Warp& w, const Ins& i) {
  by_space(w, i, load_shared<Size>, load_local<Size>, load_param<Size>, load_global<Size>);
}
template <int Size>
void store_generic(Warp& w, const Ins& i) {
  by_space(w, i, store_shared<Size>, store_local<Size>, store_global<Size>, store_global<Size>);
}

// cp.async: x[0] to (shared), x[1] from (global), x[2] bytes to read, size bytes to write, sign: whether x[2] is given;
// target: the offset of x[1].
void copy_async(Warp& w, const Ins& i) {
  uint32_t to[kLanes];
  uint64_t from[kLanes];
  shared_addresses(w, i, i.x[0], to);
  global_addresses(w, i.x[1], i.target, from);
  const auto* const sizes = row<uint32_t>(w, i.x[2]);
  if (ex.counting) {
    count_shared(w, to, i.size);
    const uint32_t mask = w.mask;
    if (i.sign)
      lanes(mask, [&](int l) {
        if (sizes[l] == 0) w.mask &= ~(1u << l);
      });
    if (w.mask) count_global(w, from, i.size);
    w.mask = mask;
  }
  Range* range = nullptr;
  lanes(w.mask, [&](int l) {
    const uint32_t read = i.sign ? std::min<uint32_t>(sizes[l], i.size) : i.size;
    Copy copy = {l, to[l], uint32_t(i.size), w.groups[l], 0, from[l], {}};
    if (from[l] % i.size) report(kMisaligned, w, l, from[l], i.size);
    if (read != 0) {
      // A part is read as bytes: what follows it need not be there.
      bool fine = true;
      for (uint32_t byte = 0; byte < read && fine; byte += read == uint32_t(i.size) ? read : 1) {
        fine = may_access(w, l, from[l] + byte, read == uint32_t(i.size) ? read : 1, false, range, true);
      }
      if (fine) memcpy(copy.data, reinterpret_cast<const uint8_t*>(from[l]), copy.read = read);
    }
    if (!in_shared(w, l, to[l], i.size)) return;
    if (ex.checks) check_shared_write(w, l, to[l], i.size, pending_record_of(w, l));
    w.copies.push_back(copy);
  });
}

void commit_copies(Warp& w, const Ins&) {
  lanes(w.mask, [&](int l) { ++w.groups[l]; });
}

// What a copy has read may be written from now on.
void release_source(Warp& w, const Copy& copy) {
  if (copy.read == 0) return;
  Range* const range = range_of(copy.from);
  if (!range || range->reader.empty()) return;
  const uint64_t pending = global_record(w, pending_record_of(w, copy.lane));
  const uint64_t record = global_record(w, record_of(w, copy.lane));
  const uint64_t first = (copy.from - range->low) >> range->granule,
                 last = (copy.from + copy.read - 1 - range->low) >> range->granule;
  for (uint64_t g = first; g <= last; ++g) {
    if (range->reader[g] == pending) range->reader[g] = record;
    if (range->other_reader[g] == pending) range->other_reader[g] = record;
  }
}

void land_copies(Warp& w, bool all, uint32_t but) {
  Block& b = *w.block;
  size_t kept = 0;
  for (Copy& copy : w.copies) {
    const bool landed = (w.mask >> copy.lane & 1) && (all || copy.group + but < w.groups[copy.lane]);
    if (!landed) {
      w.copies[kept++] = copy;
      continue;
    }
    memcpy(b.shared.data() + copy.to, copy.data, copy.bytes);
    if (!ex.checks) continue;
    release_source(w, copy);
    for (uint32_t g = copy.to >> b.granule; g <= (copy.to + copy.bytes - 1) >> b.granule; ++g) {
      b.writer[g] = record_of(w, copy.lane);
    }
  }
  w.copies.resize(kept);
}
void wait_copies(Warp& w, const Ins& i) { land_copies(w, i.sign, uint32_t(i.imm)); }

// -------------------------------------------------------------------------------------------------- between the lanes

// Whether all lanes of the member mask are here.
bool together(Warp& w, const uint32_t* members) {
  bool fine = true;
  lanes(w.mask, [&](int l) { fine &= (members[l] & w.alive) == w.mask && (members[l] >> l & 1); });
  if (!fine) report(kInactiveLane, w, __builtin_ctz(w.mask));
  return fine;
}

// shfl.sync: x = to, from, lane, clamp, members; target: a predicate to set, or -1; sign: up, down, bfly, idx.
void shuffle(Warp& w, const Ins& i) {
  const auto *const a = row<uint32_t>(w, i.x[1]), *const b = row<uint32_t>(w, i.x[2]),
                    *const c = row<uint32_t>(w, i.x[3]);
  together(w, row<uint32_t>(w, i.x[4]));
  uint32_t value[kLanes], valid = 0;
  lanes(w.mask, [&](int l) {
    const int by = b[l] & 31, clamp = c[l] & 31, segment = c[l] >> 8 & 31;
    const int most = (l & segment) | (clamp & ~segment), least = l & segment;
    int j = 0;
    bool p = false;
    switch (i.sign) {
      case 0:
        j = l - by, p = j >= most;
        break;
      case 1:
        j = l + by, p = j <= most;
        break;
      case 2:
        j = l ^ by, p = j <= most;
        break;
      default:
        j = least | (by & ~segment), p = j <= most;
    }
    if (!p) j = l;
    if (!(w.mask >> j & 1)) report(kInactiveLane, w, l);
    value[l] = a[j];
    valid |= uint32_t(p) << l;
  });
  auto* const d = row<uint32_t>(w, i.x[0]);
  lanes(w.mask, [&](int l) { d[l] = value[l]; });
  if (i.target >= 0) set_predicate(w, i.target, valid);
}

void warp_barrier(Warp& w, const Ins& i) {
  if (together(w, row<uint32_t>(w, i.x[0])) && w.mask == w.alive) w.known[w.index] = ++w.clock;
}

// vote.sync: x = to, predicate, members; sign: all, any, uni, ballot; target: whether the predicate is negated.
void vote(Warp& w, const Ins& i) {
  together(w, row<uint32_t>(w, i.x[2]));
  const uint32_t bits = (i.target ? ~w.preds[i.x[1]] : w.preds[i.x[1]]) & w.mask;
  if (i.sign == 3) {
    each<uint32_t>(w, i.x[0], [&](int) { return bits; });
  } else {
    const bool value = i.sign == 0 ? bits == w.mask : i.sign == 1 ? bits != 0 : bits == w.mask || bits == 0;
    set_predicate(w, i.x[0], value ? kAll : 0);
  }
}

void active_mask(Warp& w, const Ins& i) {
  each<uint32_t>(w, i.x[0], [&](int) { return w.mask; });
}

// redux.sync: x = to, from, members; sign: add, min, max, and, or, xor, umin, umax
void reduce(Warp& w, const Ins& i) {
  together(w, row<uint32_t>(w, i.x[2]));
  const auto* const a = row<uint32_t>(w, i.x[1]);
  uint32_t value = a[__builtin_ctz(w.mask)];
  lanes(w.mask & (w.mask - 1), [&](int l) {
    const uint32_t x = a[l];
    switch (i.sign) {
      case 0:
        value += x;
        break;
      case 1:
        value = uint32_t(std::min(int32_t(value), int32_t(x)));
        break;
      case 2:
        value = uint32_t(std::max(int32_t(value), int32_t(x)));
        break;
      case 3:
        value &= x;
        break;
      case 4:
        value |= x;
        break;
      case 5:
        value ^= x;
        break;
      case 6:
        value = std::min(value, x);
        break;
      default:
        value = std::max(value, x);
    }
  });
  each<uint32_t>(w, i.x[0], [&](int) { return value; });
}

// ------------------------------------------------------------------------------------- matrices, held by a whole warp

// In an 8 x 8 matrix of 16-bit elements, lane l holds those of row l / 4 and columns 2 * (l % 4) and the next, in a
// register, the first in its lower half.
using Matrix = uint16_t[8][8];

void hold(const Matrix& matrix, bool transposed, uint32_t* to) {
  for (int l = 0; l < kLanes; ++l) {
    const int r = l / 4, c = 2 * (l % 4);
    to[l] =
        transposed ? matrix[c][r] | uint32_t(matrix[c + 1][r]) << 16 : matrix[r][c] | uint32_t(matrix[r][c + 1]) << 16;
  }
}
void gather(const uint32_t* from, Matrix& matrix) {
  for (int l = 0; l < kLanes; ++l) {
    matrix[l / 4][2 * (l % 4)] = uint16_t(from[l]), matrix[l / 4][2 * (l % 4) + 1] = uint16_t(from[l] >> 16);
  }
}

// Whether all 32 lanes are here; where they are not, the results are not a number.
bool whole(Warp& w, const int32_t* results, int count) {
  if (__builtin_expect(w.mask == kAll, 1)) return true;
  report(kLanesApart, w, __builtin_ctz(w.mask));
  for (int k = 0; k < count; ++k) each<uint32_t>(w, results[k], [](int) { return kAll; });
  return false;
}

// ldmatrix: n matrices to x[0] ..., the rows of matrix j at the addresses in x[n] of lanes 8 * j ...; sign: whether
// they are transposed. The lane that gives an address is the one that reads there.
void load_matrices(Warp& w, const Ins& i) {
  if (!whole(w, i.x, i.n)) return;
  uint32_t address[kLanes];
  shared_addresses(w, i, i.x[i.n], address);
  if (ex.counting) {
    w.mask = i.n == 4 ? kAll : (1u << (8 * i.n)) - 1;
    count_shared(w, address, 16);
    w.mask = kAll;
  }
  for (int j = 0; j < i.n; ++j) {
    Matrix matrix;
    for (int r = 0; r < 8; ++r) {
      const int l = 8 * j + r;
      const bool fine = in_shared(w, l, address[l], 16);
      if (fine && ex.checks) check_shared_read(w, l, address[l], 16);
      if (fine)
        memcpy(matrix[r], w.block->shared.data() + address[l], 16);
      else
        memset(matrix[r], 0, 16);
    }
    hold(matrix, i.sign, row<uint32_t>(w, i.x[j]));
  }
}

// movmatrix.trans: x = to, from.
void transpose_matrix(Warp& w, const Ins& i) {
  if (!whole(w, i.x, 1)) return;
  Matrix matrix;
  gather(row<uint32_t>(w, i.x[1]), matrix);
  hold(matrix, true, row<uint32_t>(w, i.x[0]));
}

// mma.m16n8k(8 * Steps), of 16-bit floats, in float32: D = A * B + C. x: 4 rows of D, 2 * Steps of A, Steps of B, 4 of
// C. Products are exact (but for bfloat16's beyond float32's range) and added one by one to C's element, each sum
// rounded to the nearest. A GPU adds several products at once, with fewer bits of those that are small beside others,
// and cuts off what is left: its last bits differ, and are specified by nobody.
template <class H, int Steps>
void multiply_matrices(Warp& w, const Ins& i) {
  if (!whole(w, i.x, 4)) return;
  const int32_t *const of_a = i.x + 4, *const of_b = of_a + 2 * Steps, *const of_c = of_b + Steps;
  float a[16][8 * Steps], b[8 * Steps][8], d[16][8];
  Matrix matrix;
  for (int step = 0; step < Steps; ++step) {
    for (int half = 0; half < 2; ++half) {  // the upper eight rows, the lower ones
      gather(row<uint32_t>(w, of_a[2 * step + half]), matrix);
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) a[8 * half + r][8 * step + c] = H::widen(matrix[r][c]);
      }
    }
    gather(row<uint32_t>(w, of_b[step]), matrix);  // by columns
    for (int r = 0; r < 8; ++r) {
      for (int c = 0; c < 8; ++c) b[8 * step + c][r] = H::widen(matrix[r][c]);
    }
  }
  for (int k = 0; k < 4; ++k) {
    const float* const c = row<float>(w, of_c[k]);
    for (int l = 0; l < kLanes; ++l) d[l / 4 + 8 * (k / 2)][2 * (l % 4) + k % 2] = c[l];
  }
  for (int r = 0; r < 16; ++r) {
    for (int k = 0; k < 8 * Steps; ++k) {
      for (int c = 0; c < 8; ++c) d[r][c] += a[r][k] * b[k][c];
    }
  }
  for (int k = 0; k < 4; ++k) {
    float* const to = row<float>(w, i.x[k]);
    for (int l = 0; l < kLanes; ++l) to[l] = d[l / 4 + 8 * (k / 2)][2 * (l % 4) + k % 2];
  }
}

// --------------------------------------------------------------------------------------------------------- operations

struct Operation {
  std::string name;
  Run run;
};
std::vector<Operation> operations;

void add(const std::string& name, Run run) { operations.push_back({name, run}); }

template <class T>
const char* const kName = "";
template <>
const char* const kName<uint8_t> = "u8";
template <>
const char* const kName<int8_t> = "s8";
template <>
const char* const kName<uint16_t> = "u16";
template <>
const char* const kName<int16_t> = "s16";
template <>
const char* const kName<uint32_t> = "u32";
template <>
const char* const kName<int32_t> = "s32";
template <>
const char* const kName<uint64_t> = "u64";
template <>
const char* const kName<int64_t> = "s64";
template <>
const char* const kName<float> = "f32";
template <>
const char* const kName<double> = "f64";

#define OP(name, ...)                   \
  add(name, [](Warp& w, const Ins& i) { \
    (void)w;                            \
    (void)i;                            \
    __VA_ARGS__;                        \
  })

template <class T, class F>
INLINE void compare(Warp& w, const Ins& i, const F& f) {
  const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
  uint32_t bits = 0;
  LANES bits |= uint32_t(f(get<T>(a, l), get<T>(b, l))) << l;
  set_predicate(w, i.x[0], bits);
}

template <class T>
void add_comparisons() {
  const std::string type = kName<T>;
#define COMPARE(name, expression) OP("setp." name "." + type, (compare<T>(w, i, [](T a, T b) { return expression; })))
  COMPARE("eq", a == b);
  COMPARE("ne", (a < b || a > b));
  COMPARE("lt", a < b);
  COMPARE("le", a <= b);
  COMPARE("gt", a > b);
  COMPARE("ge", a >= b);
  if constexpr (std::is_floating_point_v<T>) {
    COMPARE("equ", !(a < b || a > b));
    COMPARE("neu", !(a == b));
    COMPARE("ltu", !(a >= b));
    COMPARE("leu", !(a > b));
    COMPARE("gtu", !(a <= b));
    COMPARE("geu", !(a < b));
    COMPARE("num", (a == a && b == b));
    COMPARE("nan", (a != a || b != b));
  }
#undef COMPARE
}

template <class T>
void add_bits() {  // of unsigned T
  const std::string bits = "b" + std::to_string(sizeof(T) * 8);
  OP("add." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a + b); })));
  OP("sub." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a - b); })));
  OP("mul.lo." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(uint64_t(a) * b); })));
  OP("mad.lo." + bits, (ternary<T, T>(w, i, [](T a, T b, T c) { return T(uint64_t(a) * b + c); })));
  OP("and." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a & b); })));
  OP("or." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a | b); })));
  OP("xor." + bits, (binary<T, T>(w, i, [](T a, T b) { return T(a ^ b); })));
  OP("not." + bits, (unary<T, T>(w, i, [](T a) { return T(~a); })));
  OP("cnot." + bits, (unary<T, T>(w, i, [](T a) { return T(a == 0); })));
  OP("neg." + bits, (unary<T, T>(w, i, [](T a) { return T(0 - a); })));
  OP("mov." + bits, (unary<T, T>(w, i, [](T a) { return a; })));
  OP("shl." + bits, {
    const auto* const a = row<T>(w, i.x[1]);
    const auto* const b = row<uint32_t>(w, i.x[2]);
    each<T>(w, i.x[0], [&](int l) {
      return b[l] >= sizeof(T) * 8 ? T(0) : T(get<T>(a, l) << (b[l] & (sizeof(T) * 8 - 1)));
    });
  });
  OP("selp." + bits, {
    const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
    const uint32_t p = w.preds[i.x[3]];
    each<T>(w, i.x[0], [&](int l) { return p >> l & 1 ? get<T>(a, l) : get<T>(b, l); });
  });
}

template <class T>
void add_integers() {
  const std::string type = kName<T>;
  constexpr uint32_t kBits = sizeof(T) * 8;
  OP("min." + type, (binary<T, T>(w, i, [](T a, T b) { return a < b ? a : b; })));
  OP("max." + type, (binary<T, T>(w, i, [](T a, T b) { return a > b ? a : b; })));
  OP("div." + type, (binary_active<T, T>(w, i, divide<T>)));
  OP("rem." + type, (binary_active<T, T>(w, i, remainder<T>)));
  OP("mul.hi." + type, (binary<T, T>(w, i, high_product<T>)));
  OP("mad.hi." + type, (ternary<T, T>(w, i, [](T a, T b, T c) {
       return T(std::make_unsigned_t<T>(high_product(a, b)) + std::make_unsigned_t<T>(c));
     })));
  OP("abs." + type,
     (unary<T, T>(w, i, [](T a) { return a < 0 ? T(std::make_unsigned_t<T>(0) - std::make_unsigned_t<T>(a)) : a; })));
  OP("shr." + type, {
    const auto* const a = row<T>(w, i.x[1]);
    const auto* const b = row<uint32_t>(w, i.x[2]);
    each<T>(w, i.x[0], [&](int l) {
      return T(get<T>(a, l) >> (std::is_signed_v<T> && b[l] >= kBits ? kBits - 1 : b[l] & (kBits - 1))) *
             T(std::is_signed_v<T> || b[l] < kBits);
    });
  });
  if constexpr (sizeof(T) <= 4) {
    using Wide = std::conditional_t<
        sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
        std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>>;
    OP("mul.wide." + type, (binary<T, Wide>(w, i, [](T a, T b) { return Wide(a) * Wide(b); })));
    OP("mad.wide." + type, {
      const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
      const auto* const c = row<Wide>(w, i.x[3]);
      using U = std::make_unsigned_t<Wide>;
      each<Wide>(w, i.x[0], [&](int l) { return Wide(U(Wide(get<T>(a, l)) * Wide(get<T>(b, l))) + U(c[l])); });
    });
  }
  if constexpr (sizeof(T) >= 4) {
    OP("bfe." + type, {
      const auto* const a = row<T>(w, i.x[1]);
      const auto *const b = row<uint32_t>(w, i.x[2]), *const c = row<uint32_t>(w, i.x[3]);
      each_active<T>(w, i.x[0], [&](int l) { return bit_field<T>(a[l], b[l], c[l]); });
    });
    OP("bfind." + type, (unary_active<T, uint32_t>(w, i, [](T a) {
         using U = std::make_unsigned_t<T>;
         const U x = a < 0 ? ~U(a) : U(a);
         return x == 0 ? ~0u : uint32_t(63 - __builtin_clzll(x));
       })));
    OP("bfind.shiftamt." + type, (unary_active<T, uint32_t>(w, i, [](T a) {
         using U = std::make_unsigned_t<T>;
         const U x = a < 0 ? ~U(a) : U(a);
         return x == 0 ? ~0u : uint32_t(kBits - 1 - (63 - __builtin_clzll(x)));
       })));
    OP("sad." + type, (ternary<T, T>(w, i, [](T a, T b, T c) { return T(c + (a > b ? a - b : b - a)); })));
  }
}

template <class T>
void add_words() {  // of unsigned T, 32 or 64 bits
  const std::string bits = "b" + std::to_string(sizeof(T) * 8);
  OP("popc." + bits, (unary_active<T, uint32_t>(w, i, [](T a) { return uint32_t(__builtin_popcountll(a)); })));
  OP("clz." + bits, (unary_active<T, uint32_t>(w, i, [](T a) {
       return a == 0 ? uint32_t(sizeof(T) * 8) : uint32_t(__builtin_clzll(a) - (64 - sizeof(T) * 8));
     })));
  OP("brev." + bits, (unary_active<T, T>(w, i, [](T a) {
       T result = 0;
       for (size_t k = 0; k < sizeof(T) * 8; ++k) result |= (a >> k & 1) << (sizeof(T) * 8 - 1 - k);
       return result;
     })));
  OP("bfi." + bits, {
    const auto *const a = row<T>(w, i.x[1]), *const b = row<T>(w, i.x[2]);
    const auto *const c = row<uint32_t>(w, i.x[3]), *const d = row<uint32_t>(w, i.x[4]);
    each_active<T>(w, i.x[0], [&](int l) { return insert_bits<T>(a[l], b[l], c[l], d[l]); });
  });
}

template <class T>
void add_floats() {
  const std::string type = kName<T>;
  OP("add." + type, (binary<T, T>(w, i, [](T a, T b) { return a + b; })));
  OP("sub." + type, (binary<T, T>(w, i, [](T a, T b) { return a - b; })));
  OP("mul." + type, (binary<T, T>(w, i, [](T a, T b) { return a * b; })));
  OP("fma." + type, (ternary<T, T>(w, i, [](T a, T b, T c) { return std::fma(a, b, c); })));
  OP("div." + type, (binary<T, T>(w, i, [](T a, T b) { return a / b; })));
  OP("rcp." + type, (unary<T, T>(w, i, [](T a) { return T(1) / a; })));
  OP("sqrt." + type, (unary<T, T>(w, i, [](T a) { return std::sqrt(a); })));
  OP("rsqrt." + type, (unary<T, T>(w, i, [](T a) { return T(1 / std::sqrt(double(a))); })));
  OP("neg." + type, (unary<T, T>(w, i, [](T a) { return -a; })));
  OP("abs." + type, (unary<T, T>(w, i, [](T a) { return std::fabs(a); })));
  OP("min." + type, (binary<T, T>(w, i, lesser<T>)));
  OP("max." + type, (binary<T, T>(w, i, greater<T>)));
  OP("min.NaN." + type, (binary<T, T>(w, i, [](T a, T b) { return a != a || b != b ? T(NAN) : lesser(a, b); })));
  OP("max.NaN." + type, (binary<T, T>(w, i, [](T a, T b) { return a != a || b != b ? T(NAN) : greater(a, b); })));
  OP("copysign." + type, (binary<T, T>(w, i, [](T a, T b) { return std::copysign(b, a); })));
#define TEST(name, expression)               \
  OP("testp." name "." + type, {             \
    const auto* const r = row<T>(w, i.x[1]); \
    uint32_t bits = 0;                       \
    lanes(w.mask, [&](int l) {               \
      const T a = r[l];                      \
      bits |= uint32_t(expression) << l;     \
    });                                      \
    set_predicate(w, i.x[0], bits);          \
  })
  TEST("finite", std::isfinite(a));
  TEST("infinite", std::isinf(a));
  TEST("number", !std::isnan(a));
  TEST("notanumber", std::isnan(a));
  TEST("normal", std::isnormal(a));
  TEST("subnormal", (a != 0 && std::fabs(a) < std::numeric_limits<T>::min()));
#undef TEST
}

// float32 with a rounding (imm) other than to the nearest, or flushed (sign).
#define ROUNDED(name, expression)                                                             \
  OP(name, (ternary_active<float, float>(w, i, [&](float a, float b, float c) {               \
       if (i.sign & 1) a = flush(a), b = flush(b), c = flush(c);                              \
       const int r = int(i.imm);                                                              \
       (void)b, (void)c, (void)r;                                                             \
       float value = expression;                                                              \
       if (i.sign & 1) value = flush(value);                                                  \
       if (i.sign & 2) value = std::isnan(value) ? 0.f : std::min(std::max(value, 0.f), 1.f); \
       return value;                                                                          \
     })))

float divide_rounded(float a, float b, int rounding) {
  const double quotient = double(a) / double(b);
  if (rounding == kNearest || !std::isfinite(quotient)) return a / b;
  // To odd by the remainder's sign.
  const double error = -std::fma(quotient, double(b), -double(a));
  double odd = quotient;
  if (error != 0 && !(cast<uint64_t>(quotient) & 1)) {
    const bool outwards = (error > 0) == (double(a) > 0);
    odd = cast<double>(outwards ? cast<uint64_t>(quotient) + 1 : cast<uint64_t>(quotient) - 1);
  }
  return round_to_float(odd, rounding);
}

void add_rounded() {
  ROUNDED("add.x.f32", (a == -b ? a + b : round_to_float(add_to_odd(a, b), r)));
  ROUNDED("sub.x.f32", (a == b ? a - b : round_to_float(add_to_odd(a, -double(b)), r)));
  ROUNDED("mul.x.f32", round_to_float(double(a) * double(b), r));
  ROUNDED("fma.x.f32", fma_rounded(a, b, c, r));
  ROUNDED("div.x.f32", divide_rounded(a, b, r));
  ROUNDED("rcp.x.f32", divide_rounded(1, a, r));
  ROUNDED("sqrt.x.f32", std::sqrt(a));
  ROUNDED("div.approx.f32", approximate_quotient(a, b));
  ROUNDED("rcp.approx.f32", 1 / a);
  ROUNDED("sqrt.approx.f32", std::sqrt(a));
  ROUNDED("rsqrt.approx.f32", float(1 / std::sqrt(double(a))));
  ROUNDED("ex2.approx.f32", std::exp2(a));
  ROUNDED("lg2.approx.f32", std::log2(a));
  ROUNDED("sin.approx.f32", std::sin(a));
  ROUNDED("cos.approx.f32", std::cos(a));
  ROUNDED("tanh.approx.f32", std::tanh(a));
  ROUNDED("min.x.f32", lesser(a, b));
  ROUNDED("max.x.f32", greater(a, b));
  ROUNDED("neg.x.f32", -a);
  ROUNDED("abs.x.f32", std::fabs(a));
}

template <class D, class S>
void add_integer_conversion() {
  OP(std::string("cvt.") + kName<D> + "." + kName<S>, (unary<S, D>(w, i, [](S a) {
       // Sign-extended to the register, which may be wider.
       if constexpr (sizeof(D) < 4)
         return uint32_t(int32_t(D(a)));
       else
         return D(a);
     })));
  OP(std::string("cvt.sat.") + kName<D> + "." + kName<S>, (unary_active<S, D>(w, i, [](S a) {
       const __int128 x = a, low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
       const D y = D(x < low ? low : x > high ? high : x);
       if constexpr (sizeof(D) < 4)
         return uint32_t(int32_t(y));
       else
         return y;
     })));
}

template <class D>
void add_conversions_to() {
  add_integer_conversion<D, uint8_t>();
  add_integer_conversion<D, int8_t>();
  add_integer_conversion<D, uint16_t>();
  add_integer_conversion<D, int16_t>();
  add_integer_conversion<D, uint32_t>();
  add_integer_conversion<D, int32_t>();
  add_integer_conversion<D, uint64_t>();
  add_integer_conversion<D, int64_t>();
  const std::string type = kName<D>;
  const auto out = [](D y) {
    if constexpr (sizeof(D) < 4)
      return uint32_t(int32_t(y));
    else
      return y;
  };
  (void)out;
  OP("cvt." + type + ".f32",
     (unary_active<float, D>(w, i, [&](float a) { return to_integer<D>(i.sign & 1 ? flush(a) : a, int(i.imm)); })));
  OP("cvt." + type + ".f64", (unary_active<double, D>(w, i, [&](double a) { return to_integer<D>(a, int(i.imm)); })));
  OP("cvt." + type + ".f16",
     (unary_active<uint16_t, D>(w, i, [&](uint16_t a) { return to_integer<D>(F16::widen(a), int(i.imm)); })));
  OP("cvt." + type + ".bf16",
     (unary_active<uint16_t, D>(w, i, [&](uint16_t a) { return to_integer<D>(BF16::widen(a), int(i.imm)); })));
  OP("cvt.f32." + type, (unary<D, float>(w, i, [](D a) { return float(a); })));
  OP("cvt.f64." + type, (unary<D, double>(w, i, [](D a) { return double(a); })));
  OP("cvt.f16." + type, (unary_active<D, uint16_t>(w, i, [](D a) { return F16::narrow(double(a)); })));
  OP("cvt.bf16." + type, (unary_active<D, uint16_t>(w, i, [](D a) { return BF16::narrow(double(a)); })));
}

float saturated(float x, int sign) {
  if (sign & 1) x = flush(x);
  return sign & 2 ? (std::isnan(x) ? 0.f : std::min(std::max(x, 0.f), 1.f)) : x;
}

template <class H>
uint16_t narrow_as(float x, const Ins& i) {  // imm: the rounding; sign & 4: relu; sign & 8: satfinite
  uint16_t value = i.imm == kZero ? narrow_to_zero<H>(x) : H::narrow_float(x);
  if ((i.sign & 4) && !std::isnan(x) && (value & 0x8000)) value = 0;
  if ((i.sign & 2) && std::isnan(x)) value = 0;
  if (i.sign & 2) value = H::narrow_float(std::min(std::max(H::widen(value), 0.f), 1.f));
  if ((i.sign & 8) && std::isinf(H::widen(value))) value -= 1;
  return value;
}

template <class H>
void add_half(const std::string& type) {
#define HALF(name, op)                                      \
  add(std::string(name ".") + type, half_op<H, op, false>); \
  add(std::string(name ".") + type + "x2", half_op<H, op, true>)
  HALF("add", '+');
  HALF("sub", '-');
  HALF("mul", '*');
  HALF("fma", 'f');
  HALF("fma.relu", 'r');
  HALF("min", '<');
  HALF("max", '>');
  HALF("min.NaN", 'l');
  HALF("max.NaN", 'g');
  HALF("neg", 'n');
  HALF("abs", 'a');
  HALF("ex2.approx", 'e');
  HALF("tanh.approx", 't');
#undef HALF
  add("cvt.f32." + type, [](Warp& w, const Ins& i) {
    unary<uint16_t, float>(w, i, [&](uint16_t a) { return saturated(H::widen(a), i.sign); });
  });
  add("cvt.f64." + type,
      [](Warp& w, const Ins& i) { unary<uint16_t, double>(w, i, [&](uint16_t a) { return double(H::widen(a)); }); });
  add("cvt." + type + ".f32", [](Warp& w, const Ins& i) {
    if (i.imm == kNearest && i.sign == 0)
      unary<float, uint16_t>(w, i, H::narrow_float);
    else
      unary_active<float, uint16_t>(w, i, [&](float a) { return narrow_as<H>(a, i); });
  });
  add("cvt." + type + ".f64", [](Warp& w, const Ins& i) { unary_active<double, uint16_t>(w, i, H::narrow); });
  add("cvt." + type + "x2.f32", [](Warp& w, const Ins& i) {  // the first operand goes to the upper half
    binary_active<float, uint32_t>(
        w, i, [&](float a, float b) { return uint32_t(narrow_as<H>(a, i)) << 16 | narrow_as<H>(b, i); });
  });
  add("cvt." + type + "." + type, [](Warp& w, const Ins& i) {
    unary_active<uint16_t, uint16_t>(w, i, [&](uint16_t a) { return H::narrow(to_whole(H::widen(a), int(i.imm))); });
  });
#define COMPARE(name, expression)                                                        \
  add(std::string("setp." name ".") + type, [](Warp& w, const Ins& i) {                  \
    const auto *const x = row<uint16_t>(w, i.x[1]), *const y = row<uint16_t>(w, i.x[2]); \
    uint32_t bits = 0;                                                                   \
    lanes(w.mask, [&](int l) {                                                           \
      const float a = H::widen(x[l]), b = H::widen(y[l]);                                \
      bits |= uint32_t(expression) << l;                                                 \
    });                                                                                  \
    set_predicate(w, i.x[0], bits);                                                      \
  })
  COMPARE("eq", a == b);
  COMPARE("ne", (a < b || a > b));
  COMPARE("lt", a < b);
  COMPARE("le", a <= b);
  COMPARE("gt", a > b);
  COMPARE("ge", a >= b);
  COMPARE("equ", !(a < b || a > b));
  COMPARE("neu", !(a == b));
  COMPARE("ltu", !(a >= b));
  COMPARE("leu", !(a > b));
  COMPARE("gtu", !(a <= b));
  COMPARE("geu", !(a < b));
  COMPARE("num", (a == a && b == b));
  COMPARE("nan", (a != a || b != b));
#undef COMPARE
}

template <int Size>
void add_accesses() {
  const std::string bytes = std::to_string(Size);
  add("ld.global." + bytes, load_global<Size>);
  add("st.global." + bytes, store_global<Size>);
  add("ld.shared." + bytes, load_shared<Size>);
  add("st.shared." + bytes, store_shared<Size>);
  add("ld.local." + bytes, load_local<Size>);
  add("st.local." + bytes, store_local<Size>);
  add("ld.param." + bytes, load_param<Size>);
  add("ld.generic." + bytes, load_generic<Size>);
  add("st.generic." + bytes, store_generic<Size>);
}

void add_operations() {
  add_bits<uint16_t>(), add_bits<uint32_t>(), add_bits<uint64_t>();
  add_integers<uint16_t>(), add_integers<int16_t>(), add_integers<uint32_t>(), add_integers<int32_t>();
  add_integers<uint64_t>(), add_integers<int64_t>();
  add_words<uint32_t>(), add_words<uint64_t>();
  add_floats<float>(), add_floats<double>();
  add_rounded();
  add_half<F16>("f16"), add_half<BF16>("bf16");
  add_comparisons<uint16_t>(), add_comparisons<int16_t>(), add_comparisons<uint32_t>(), add_comparisons<int32_t>();
  add_comparisons<uint64_t>(), add_comparisons<int64_t>(), add_comparisons<float>(), add_comparisons<double>();
  add_conversions_to<uint8_t>(), add_conversions_to<int8_t>(), add_conversions_to<uint16_t>();
  add_conversions_to<int16_t>(), add_conversions_to<uint32_t>(), add_conversions_to<int32_t>();
  add_conversions_to<uint64_t>(), add_conversions_to<int64_t>();
  add_accesses<1>(), add_accesses<2>(), add_accesses<4>(), add_accesses<8>();
  OP("cvt.f64.f32", (unary<float, double>(w, i, [](float a) { return double(a); })));
  OP("cvt.f32.f64",
     (unary_active<double, float>(w, i, [&](double a) { return saturated(round_to_float(a, int(i.imm)), i.sign); })));
  OP("cvt.f32.f32", (unary_active<float, float>(w, i, [&](float a) { return saturated(a, i.sign); })));
  OP("cvt.whole.f32.f32",
     (unary_active<float, float>(w, i, [&](float a) { return saturated(float(to_whole(a, int(i.imm))), i.sign); })));
  OP("cvt.whole.f64.f64", (unary_active<double, double>(w, i, [&](double a) { return to_whole(a, int(i.imm)); })));
  OP("fma.ru.f64",
     (ternary_active<double, double>(w, i, [](double a, double b, double c) { return std::fma(a, b, c); })));
  OP("mov.pack2.b32",
     (binary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; })));
  OP("mov.pack2.b64", (binary<uint32_t, uint64_t>(w, i, [](uint32_t a, uint32_t b) { return a | uint64_t(b) << 32; })));
  OP("mov.pack4.b64", {
    const uint32_t* from[4];
    for (int k = 0; k < 4; ++k) from[k] = row<uint32_t>(w, i.x[1 + k]);
    each<uint64_t>(w, i.x[0], [&](int l) {
      return uint64_t(from[0][l] & 0xffff) | uint64_t(from[1][l] & 0xffff) << 16 | uint64_t(from[2][l] & 0xffff) << 32 |
             uint64_t(from[3][l] & 0xffff) << 48;
    });
  });
  OP("mov.unpack2.b32", {
    const auto* const a = row<uint32_t>(w, i.x[2]);
    uint32_t copy[kLanes];
    LANES copy[l] = a[l];
    each<uint32_t>(w, i.x[0], [&](int l) { return copy[l] & 0xffff; });
    each<uint32_t>(w, i.x[1], [&](int l) { return copy[l] >> 16; });
  });
  OP("mov.unpack2.b64", {
    const auto* const a = row<uint64_t>(w, i.x[2]);
    each<uint32_t>(w, i.x[0], [&](int l) { return uint32_t(a[l]); });
    each<uint32_t>(w, i.x[1], [&](int l) { return uint32_t(a[l] >> 32); });
  });
  OP("mov.unpack4.b64", {
    const auto* const a = row<uint64_t>(w, i.x[4]);
    for (int k = 0; k < 4; ++k) each<uint32_t>(w, i.x[k], [&](int l) { return uint32_t(a[l] >> (16 * k) & 0xffff); });
  });
  OP("prmt.b32", (ternary_active<uint32_t, uint32_t>(
                     w, i, [&](uint32_t a, uint32_t b, uint32_t c) { return permute(a, b, c, int(i.imm)); })));
  OP("lop3.b32", (ternary<uint32_t, uint32_t>(w, i, [&](uint32_t a, uint32_t b, uint32_t c) {
       uint32_t value = 0;
       for (int k = 0; k < 8; ++k) {
         if (i.imm >> k & 1) value |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
       }
       return value;
     })));
  OP("shf.l.wrap.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return uint32_t((uint64_t(b) << 32 | a) << (c & 31) >> 32);
     })));
  OP("shf.l.clamp.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return c >= 32 ? a : uint32_t((uint64_t(b) << 32 | a) << c >> 32);
     })));
  OP("shf.r.wrap.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return uint32_t((uint64_t(b) << 32 | a) >> (c & 31));
     })));
  OP("shf.r.clamp.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return c >= 32 ? b : uint32_t((uint64_t(b) << 32 | a) >> c);
     })));
  OP("mad24.lo.b32", (ternary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b, uint32_t c) {
       return (a & 0xffffff) * (b & 0xffffff) + c;
     })));
  OP("mul24.lo.b32",
     (binary<uint32_t, uint32_t>(w, i, [](uint32_t a, uint32_t b) { return (a & 0xffffff) * (b & 0xffffff); })));
  // Dot products of bytes: sign & 1, 2: whether those of the first and second operand have signs; imm: 4, or 2 for
  // halves with the lower bytes, 3 for halves with the upper ones.
  OP("dp.b32", (ternary<uint32_t, uint32_t>(w, i, [&](uint32_t a, uint32_t b, uint32_t c) {
       const auto part = [](uint32_t word, int bits, int index, bool negative) {
         const uint32_t value = word >> (bits * index) & ((1u << bits) - 1);
         return negative && value >> (bits - 1) ? value - (1u << bits) : value;
       };
       const bool first = i.sign & 1, second = i.sign & 2;
       uint32_t sum = c;
       for (int k = 0; k < (i.imm == 4 ? 4 : 2); ++k) {
         const uint32_t x = i.imm == 4 ? part(a, 8, k, first) : part(a, 16, k, first);
         sum += x * part(b, 8, i.imm == 3 ? k + 2 : k, second);
       }
       return sum;
     })));
  OP("and.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] & w.preds[i.x[2]]));
  OP("or.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] | w.preds[i.x[2]]));
  OP("xor.pred", set_predicate(w, i.x[0], w.preds[i.x[1]] ^ w.preds[i.x[2]]));
  OP("not.pred", set_predicate(w, i.x[0], ~w.preds[i.x[1]]));
  OP("mov.pred", set_predicate(w, i.x[0], w.preds[i.x[1]]));
  OP("set.b32.pred", {  // all ones, or 1.0
    const uint32_t p = w.preds[i.x[1]];
    each<uint32_t>(w, i.x[0], [&](int l) { return p >> l & 1 ? uint32_t(i.imm) : 0u; });
  });
  OP("cvta.shared.b64", (unary<uint64_t, uint64_t>(w, i, [](uint64_t a) { return a | kSharedWindow; })));
  OP("cvta.local.b64", (unary<uint64_t, uint64_t>(w, i, [](uint64_t a) { return a | kLocalWindow; })));
  OP("cvta.to.shared.b64", (unary<uint64_t, uint64_t>(w, i, [](uint64_t a) { return a & ~kWindow; })));
  OP("cvta.to.local.b64", (unary<uint64_t, uint64_t>(w, i, [](uint64_t a) { return a & ~kWindow; })));
  OP("isspacep.shared", {
    const auto* const a = row<uint64_t>(w, i.x[1]);
    uint32_t bits = 0;
    lanes(w.mask, [&](int l) { bits |= uint32_t((a[l] & kWindow) == kSharedWindow) << l; });
    set_predicate(w, i.x[0], bits);
  });
  // A register that may be read before it is written.
  OP("check.written", {
    const uint32_t missing = w.mask & ~w.written[i.x[0]];
    if (missing) {
      --w.current;
      do {
        ++w.current;
      } while (w.kernel->code[w.current].hidden);
      report(kUninitializedRegister, w, __builtin_ctz(missing), i.imm);
    }
  });
  OP("mark.written", w.written[i.x[0]] |= w.mask);
  OP("nop", (void)0);
  add("cp.async", copy_async);
  add("cp.async.commit_group", commit_copies);
  add("cp.async.wait_group", wait_copies);
  add("ldmatrix", load_matrices);
  add("movmatrix", transpose_matrix);
  add("mma.m16n8k8.f16", multiply_matrices<F16, 1>);
  add("mma.m16n8k16.f16", multiply_matrices<F16, 2>);
  add("mma.m16n8k8.bf16", multiply_matrices<BF16, 1>);
  add("mma.m16n8k16.bf16", multiply_matrices<BF16, 2>);
  add("shfl.sync", shuffle);
  add("bar.warp.sync", warp_barrier);
  add("vote.sync", vote);
  add("activemask", active_mask);
  add("redux.sync", reduce);
  OP("trap", {
    report(kBadBarrier, w, __builtin_ctz(w.mask));
    ex.stop = true;
  });
}

// ---------------------------------------------------------------------------------------------------------- execution

struct Run_ {  // of a block
  Block block;
  std::vector<Warp> warps;
  std::vector<uint32_t> registers, predicates, written;
  std::vector<uint8_t> local;
};

void release(Run_& run, Barrier& barrier) {
  // Who waits learns of everybody who has arrived.
  const size_t count = size_t(run.block.warps);
  std::vector<uint32_t> joined(count, 0);
  for (const Arrival& arrival : barrier.arrivals) {
    for (size_t k = 0; k < count; ++k) joined[k] = std::max(joined[k], arrival.known[k]);
  }
  for (const Arrival& arrival : barrier.arrivals) {
    Warp& w = run.warps[size_t(arrival.warp)];
    if (w.waits < 0 || &run.block.barriers[w.waits] != &barrier) continue;  // bar.arrive does not wait
    for (size_t k = 0; k < count; ++k) w.known[k] = std::max(w.known[k], joined[k]);
    w.known[w.index] = ++w.clock;
    w.waits = -1;
    const Ins& i = *w.waiting;
    if (i.sign) {  // bar.red
      const uint32_t mask = w.mask;
      w.mask = w.alive;
      if (i.sign == 1) set_predicate(w, i.x[0], barrier.all ? kAll : 0);
      if (i.sign == 2) set_predicate(w, i.x[0], barrier.any ? kAll : 0);
      if (i.sign == 3) each<uint32_t>(w, i.x[0], [&](int) { return barrier.population; });
      w.mask = mask;
    }
  }
  barrier = Barrier{};
}

// bar: x[1] number, x[2] threads or a row of 0 where all; sign: sync, red.and, red.or, red.popc; n: 1 for arrive;
// x[3] the predicate of a reduction, size whether it is negated.
bool arrive(Run_& run, Warp& w, const Ins& i, uint32_t mask) {
  const int lane = __builtin_ctz(mask);
  if (mask != w.alive) {
    report(kDivergentBarrier, w, lane);
    ex.stop = true;
    return true;
  }
  const uint32_t id = row<uint32_t>(w, i.x[1])[lane], wanted = row<uint32_t>(w, i.x[2])[lane];
  if (id >= 16 || wanted % kLanes || wanted > uint32_t(run.block.warps * kLanes)) {
    report(kBadBarrier, w, lane, id, wanted);
    ex.stop = true;
    return true;
  }
  Barrier& barrier = run.block.barriers[id];
  const int expected = wanted ? int(wanted) : run.block.warps * kLanes;
  if (barrier.arrived && barrier.expected != expected) {
    report(kBadBarrier, w, lane, id, wanted);
    ex.stop = true;
    return true;
  }
  barrier.expected = expected;
  barrier.arrived += kLanes;
  barrier.arrivals.push_back({w.index, std::vector<uint32_t>(w.known, w.known + run.block.warps)});
  barrier.arrivals.back().known[size_t(w.index)] = w.clock + 1;
  if (i.sign) {
    const uint32_t bits = (i.size ? ~w.preds[i.x[3]] : w.preds[i.x[3]]) & mask;
    barrier.any |= bits != 0, barrier.all &= bits == mask, barrier.population += __builtin_popcount(bits);
  }
  if (i.n) {  // arrive: what is done later is not ordered by it
    if (barrier.arrived == expected) {
      release(run, barrier);
    }
    ++w.clock, w.known[w.index] = w.clock;
    return false;
  }
  w.waits = int(id), w.waiting = &i;
  if (barrier.arrived == expected) {
    release(run, barrier);
    return false;
  }
  return true;
}

// Up to where it waits or ends.
void run_warp(Run_& run, Warp& w, std::vector<Count>& counts) {
  const Ins* const code = w.kernel->code.data();
  while (!w.paths.empty() && !ex.stop) {
    const int32_t end = w.paths.back().end;
    int32_t pc = w.paths.back().pc;
    uint32_t mask = w.paths.back().mask & w.alive;
    // The lanes of this path part, and meet again at `meets`, or where the path itself ends.
    const auto part = [&](int32_t meets) {
      if (meets == end)
        w.paths.pop_back();
      else
        w.paths.back().pc = meets;
    };
    const auto go = [&](uint32_t who, int32_t at, int32_t meets) {
      if (who && at != meets) w.paths.push_back({at, meets, who});
    };
    for (;;) {
      if (__builtin_expect(pc == end || mask == 0, 0)) {
        w.paths.pop_back();
        break;
      }
      const Ins& i = code[pc];
      uint32_t active = mask;
      if (i.predicate >= 0) active &= i.negate ? ~w.preds[i.predicate] : w.preds[i.predicate];
      Count& count = counts[size_t(pc)];
      ++count.issued;
      count.lanes += uint64_t(__builtin_popcount(active));
      ++w.steps;
      w.current = pc;
      if (__builtin_expect(i.kind == kPlain, 1)) {
        if (active) {
          w.mask = active;
          w.count = &count;
          i.run(w, i);
        }
        ++pc;
        continue;
      }
      if (__builtin_expect(int64_t(w.steps) > ex.limit || ex.stop, 0)) {
        if (!ex.stop) report(kEndless, w, __builtin_ctz(mask));
        ex.stop = true;
        return;
      }
      if (i.kind == kBranch) {
        if (active == mask) {
          pc = i.target;
        } else if (active == 0) {
          ++pc;
        } else {
          part(i.meets);
          go(active, i.target, i.meets);
          go(mask & ~active, pc + 1, i.meets);
          break;
        }
      } else if (i.kind == kBranchIndexed) {
        const auto* const index = row<uint32_t>(w, i.x[0]);
        std::map<int32_t, uint32_t, std::greater<int32_t>> to;
        if (mask & ~active) to[pc + 1] = mask & ~active;
        lanes(active, [&](int l) {
          const uint32_t at = uint32_t(i.target) + std::min<uint32_t>(index[l], uint32_t(i.n - 1));
          to[w.kernel->tables[at]] |= 1u << l;
        });
        if (to.size() == 1) {
          pc = to.begin()->first;
          continue;
        }
        part(i.meets);
        for (const auto& [at, who] : to) go(who, at, i.meets);
        break;
      } else if (i.kind == kExit) {
        w.alive &= ~active;
        mask &= ~active;
        ++pc;
      } else {
        ++pc;
        if (active == 0) continue;
        w.paths.back().pc = pc;
        w.mask = active;
        if (arrive(run, w, i, active)) return;
      }
    }
  }
  if (!w.alive) w.done = true;
}

void fill_special(Warp& w, const Launch& launch, const Special& special, uint64_t block) {
  const uint32_t* const g = launch.grid;
  const uint32_t* const b = launch.block;
  auto* const to = row<uint32_t>(w, special.row);
  for (int l = 0; l < kLanes; ++l) {
    const uint32_t t = uint32_t(w.index * kLanes + l);
    uint32_t value = 0;
    switch (special.what) {
      case 0:
        value = t % b[0];
        break;
      case 1:
        value = t / b[0] % b[1];
        break;
      case 2:
        value = t / b[0] / b[1];
        break;
      case 3:
        value = b[0];
        break;
      case 4:
        value = b[1];
        break;
      case 5:
        value = b[2];
        break;
      case 6:
        value = uint32_t(block % g[0]);
        break;
      case 7:
        value = uint32_t(block / g[0] % g[1]);
        break;
      case 8:
        value = uint32_t(block / g[0] / g[1]);
        break;
      case 9:
        value = g[0];
        break;
      case 10:
        value = g[1];
        break;
      case 11:
        value = g[2];
        break;
      case 12:
        value = uint32_t(l);
        break;
      case 13:
        value = uint32_t(w.index);
        break;
      case 14:
        value = 1u << l;
        break;
      case 15:
        value = (1u << l) - 1;
        break;
      case 16:
        value = (2u << l) - 1;
        break;
      case 17:
        value = ~((2u << l) - 1);
        break;
      case 18:
        value = ~((1u << l) - 1);
        break;
      case 19:
        value = uint32_t(launch.dynamic);
        break;
      case 20:
        value = uint32_t(launch.dynamic) + uint32_t(w.kernel->static_shared);
        break;
    }
    to[l] = value;
  }
}

void execute(const Kernel& kernel, Launch& launch, const std::vector<uint64_t>& parameter_words) {
  parameters = {
      reinterpret_cast<uint64_t>(parameter_words.data()),
      reinterpret_cast<uint64_t>(parameter_words.data()) + uint64_t(kernel.parameter_bytes)};
  for (auto& range : ex.ranges) {
    std::fill(range->writer.begin(), range->writer.end(), 0);
    std::fill(range->reader.begin(), range->reader.end(), 0);
    std::fill(range->other_reader.begin(), range->other_reader.end(), 0);
  }
  const int threads = int(launch.block[0] * launch.block[1] * launch.block[2]);
  const int count = (threads + kLanes - 1) / kLanes;
  Run_ run;
  Block& b = run.block;
  b.warps = count, b.threads = threads, b.granule = kernel.granule;
  b.shared_bytes = uint32_t(kernel.static_shared + launch.dynamic);
  b.shared.resize(b.shared_bytes + 16);
  const size_t granules = (b.shared_bytes >> b.granule) + 1;
  b.known.resize(size_t(count) * count);
  // One more row than there are registers, as alignment.
  run.registers.assign(size_t(count) * kernel.rows * kLanes + 16, 0);
  uint32_t* const first =
      reinterpret_cast<uint32_t*>((reinterpret_cast<uintptr_t>(run.registers.data()) + 63) / 64 * 64);
  run.predicates.assign(size_t(count) * kernel.predicates, 0);
  run.local.assign(size_t(count) * kLanes * kernel.local_bytes, uint8_t(ex.fill));
  const bool check_registers = !kernel.checked.empty();
  const size_t watched = size_t(kernel.rows + kernel.predicates);  // predicates are numbered after the rows
  if (check_registers) run.written.assign(count * watched, 0);
  run.warps.resize(count);
  for (int k = 0; k < count; ++k) {
    Warp& w = run.warps[k];
    w = Warp{};
    w.regs = first + size_t(k) * kernel.rows * kLanes;
    w.preds = run.predicates.data() + size_t(k) * kernel.predicates;
    w.written = check_registers ? run.written.data() + k * watched : nullptr;
    w.block = &b, w.kernel = &kernel, w.index = k;
    w.known = b.known.data() + size_t(k) * count;
    w.local = run.local.data() + size_t(k) * kLanes * kernel.local_bytes;
    for (const Constant& c : kernel.constants) {
      const uint64_t value = c.kind == 2 ? parameters.low + c.value : c.value;
      if (c.kind == 0)
        std::fill_n(row<uint32_t>(w, c.row), kLanes, uint32_t(value));
      else
        std::fill_n(row<uint64_t>(w, c.row), kLanes, value);
    }
    w.preds[1] = kAll;
  }
  const uint64_t blocks = uint64_t(launch.grid[0]) * launch.grid[1] * launch.grid[2];
  for (uint64_t n = ex.first; n < blocks && !ex.stop; n += ex.every) {
    const uint64_t index = ex.descending ? blocks - 1 - n : n;
    b.index = index;
    std::fill(b.shared.begin(), b.shared.end(), uint8_t(ex.fill));
    if (ex.checks) {
      b.writer.assign(granules, 0), b.reader.assign(granules, 0), b.other_reader.assign(granules, 0);
    }
    for (Barrier& barrier : b.barriers) barrier = Barrier{};
    std::fill(b.known.begin(), b.known.end(), 1);
    if (check_registers) std::fill(run.written.begin(), run.written.end(), 0);
    for (Warp& w : run.warps) {
      const int live = std::min(kLanes, threads - w.index * kLanes);
      w.alive = live == kLanes ? kAll : (1u << live) - 1;
      w.clock = 1, w.waits = -1, w.done = false, w.steps = 0;
      w.copies.clear();
      std::fill_n(w.groups, kLanes, 0);
      w.paths.assign(1, Path{0, kNever, w.alive});
      for (const Special& special : kernel.specials) fill_special(w, launch, special, index);
    }
    for (bool moved = true; moved && !ex.stop;) {
      moved = false;
      for (int k = 0; k < count && !ex.stop; ++k) {
        Warp& w = run.warps[ex.descending ? count - 1 - k : k];
        if (w.done || w.waits >= 0) continue;
        run_warp(run, w, launch.counts);
        moved = true;
      }
    }
    for (Warp& w : run.warps) {
      launch.instructions += w.steps;
      if (ex.stop || w.waits < 0) continue;
      w.current = int(w.waiting - kernel.code.data());
      report(kBarrierNotReached, w, __builtin_ctz(w.alive));
      ex.stop = true;
    }
    ++launch.executed;
  }
}

int launch_kernel(int number, Dim grid, Dim block, void* const* arguments, size_t dynamic) {
  Kernel& kernel = *ex.kernels[size_t(number)];
  auto launch = std::make_unique<Launch>();
  *launch = Launch{number, {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, dynamic, 0, 0, 0, {}};
  const auto attribute = [](int what) { return uint64_t(ex.attributes[what]); };
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  int status = 0;
  if (ex.fail_with && ex.fail_after-- <= 0)
    status = ex.fail_with;
  else if (
      threads == 0 || grid.x == 0 || grid.y == 0 || grid.z == 0 || threads > attribute(1) || block.x > attribute(2) ||
      block.y > attribute(3) || block.z > attribute(4) || grid.x > attribute(5) || grid.y > attribute(6) ||
      grid.z > attribute(7)) {
    status = 9;  // cudaErrorInvalidConfiguration
  } else if (threads > uint64_t(kernel.max_threads)) {
    status = 701;  // cudaErrorLaunchOutOfResources
  } else if (
      dynamic > uint64_t(kernel.maximum_dynamic) ||
      (kernel.maximum_dynamic <= (48 << 10) && dynamic + uint64_t(kernel.static_shared) > (48 << 10))) {
    status = 1;  // cudaErrorInvalidValue
  }
  launch->status = status;
  launch->counts.assign(kernel.code.size(), Count{});
  Launch& kept = *launch;
  ex.launches.push_back(std::move(launch));
  if (status == 0) {
    std::vector<uint64_t> words(size_t(kernel.parameter_bytes) / 8 + 1, 0);
    for (size_t k = 0; k < kernel.parameter_offsets.size(); ++k) {
      memcpy(
          reinterpret_cast<char*>(words.data()) + kernel.parameter_offsets[k], arguments[k],
          size_t(kernel.parameter_sizes[k]));
    }
    ex.stop = false;
    execute(kernel, kept, words);
    if (ex.stop) status = kept.status = 719;  // cudaErrorLaunchFailure
  }
  if (status) ex.error = status;
  return status;
}

struct Configuration {
  Dim grid, block;
  size_t shared;
  void* stream;
};
std::vector<Configuration> configurations;

int kernel_of(const void* stub) {
  auto name = ex.stubs.find(stub);
  return name == ex.stubs.end() || !ex.find ? -1 : ex.find(name->second.c_str());
}

int fail(int error) {
  ex.error = error;
  return error;
}

}  // namespace

// --------------------------------------------------------------------------------------------------- for the launcher

EXPORT void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT char __cudaInitModule(void**) { return 0; }
EXPORT void __cudaRegisterFunction(
    void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  ex.stubs[stub] = name;
}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  if (configurations.empty()) return fail(52);
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return 0;
}
EXPORT int __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return 0;
}
EXPORT int cudaLaunchKernel(const void* stub, Dim grid, Dim block, void** arguments, size_t shared, void*) {
  const int kernel = kernel_of(stub);
  return kernel < 0 ? fail(98) : launch_kernel(kernel, grid, block, arguments, shared);
}
EXPORT int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}
struct LaunchConfiguration {
  Dim grid, block;
  size_t shared;
  void* stream;
  void* attributes;
  unsigned attribute_count;
};
EXPORT int cudaLaunchKernelExC(const LaunchConfiguration* how, const void* stub, void** arguments) {
  return cudaLaunchKernel(stub, how->grid, how->block, arguments, how->shared, how->stream);
}
EXPORT int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
EXPORT int cudaSetDevice(int device) { return device == 0 ? 0 : fail(101); }
EXPORT int cudaGetDeviceCount(int* count) {
  *count = 1;
  return 0;
}
EXPORT int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  auto found = ex.attributes.find(attribute);
  if (device != 0) return fail(101);
  if (found == ex.attributes.end()) {
    fprintf(stderr, "executor: the device has no value for attribute %d\n", attribute);
    return fail(1);
  }
  *value = found->second;
  return 0;
}
EXPORT int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  const int number = kernel_of(stub);
  if (number < 0) return fail(98);
  Kernel& kernel = *ex.kernels[size_t(number)];
  if (attribute == 8) {
    if (value < 0 || value + kernel.static_shared > ex.attributes[97]) return fail(1);
    kernel.maximum_dynamic = std::max(value, 48 << 10);
  }
  return 0;
}
EXPORT int cudaFuncSetCacheConfig(const void*, int) { return 0; }
struct FunctionAttributes {
  size_t shared_bytes, constant_bytes, local_bytes;
  int max_threads, registers, ptx_version, binary_version, cache_mode, max_dynamic, carveout, rest[16];
};
int registers_of(const Kernel& kernel) {
  if (kernel.registers) return kernel.registers;
  return std::min(255, 65536 / (kernel.max_threads * std::max(1, kernel.min_blocks)) / 8 * 8);
}
EXPORT int cudaFuncGetAttributes(FunctionAttributes* attributes, const void* stub) {
  const int number = kernel_of(stub);
  if (number < 0) return fail(98);
  const Kernel& kernel = *ex.kernels[size_t(number)];
  memset(attributes, 0, offsetof(FunctionAttributes, rest));
  attributes->shared_bytes = size_t(kernel.static_shared), attributes->local_bytes = size_t(kernel.local_bytes);
  attributes->max_threads = kernel.max_threads, attributes->registers = registers_of(kernel);
  attributes->ptx_version = attributes->binary_version = ex.attributes[75] * 10 + ex.attributes[76];
  attributes->max_dynamic = kernel.maximum_dynamic;
  return 0;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int* blocks, const void* stub, int threads, size_t dynamic, unsigned) {
  const int number = kernel_of(stub);
  if (number < 0) return fail(98);
  const Kernel& kernel = *ex.kernels[size_t(number)];
  if (threads <= 0 || threads > kernel.max_threads) return fail(1);
  const int warps = (threads + kLanes - 1) / kLanes;
  const int64_t shared = (int64_t(dynamic) + kernel.static_shared + ex.attributes[111] + 127) / 128 * 128;
  const int warp_registers = (registers_of(kernel) * kLanes + 255) / 256 * 256;
  int most = ex.attributes[106];
  most = std::min(most, ex.attributes[39] / (warps * kLanes));
  most = std::min<int>(most, int(ex.attributes[81] / std::max<int64_t>(1, shared)));
  most = std::min(most, ex.attributes[82] / (warp_registers * warps));
  *blocks = most;
  return 0;
}
EXPORT int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* stub, int threads, size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, stub, threads, dynamic, 0);
}
EXPORT int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  Range* const range = range_of(reinterpret_cast<uint64_t>(to));
  if (!range || reinterpret_cast<uint64_t>(to) + bytes > range->high || range->kind == 0) return fail(1);
  memset(to, value, bytes);
  const uint64_t at = reinterpret_cast<uint64_t>(to) - range->low;
  for (uint64_t g = at >> range->granule; bytes && g <= (at + bytes - 1) >> range->granule; ++g) {
    if (g < range->initialized.size()) range->initialized[g] = 1;
  }
  return 0;
}
EXPORT int cudaPeekAtLastError() { return ex.error; }
EXPORT int cudaGetLastError() {
  const int error = ex.error;
  ex.error = 0;
  return error;
}
EXPORT const char* cudaGetErrorName(int error) {
  switch (error) {
    case 0:
      return "cudaSuccess";
    case 1:
      return "cudaErrorInvalidValue";
    case 2:
      return "cudaErrorMemoryAllocation";
    case 9:
      return "cudaErrorInvalidConfiguration";
    case 98:
      return "cudaErrorInvalidDeviceFunction";
    case 101:
      return "cudaErrorInvalidDevice";
    case 209:
      return "cudaErrorNoKernelImageForDevice";
    case 701:
      return "cudaErrorLaunchOutOfResources";
    case 719:
      return "cudaErrorLaunchFailure";
    default:
      return "another CUDA error";
  }
}
EXPORT const char* cudaGetErrorString(int error) { return cudaGetErrorName(error); }

// ----------------------------------------------------------------------------------------------------------- for
// ptx.py

EXPORT int ptx_operations() {
  if (operations.empty()) add_operations();
  return int(operations.size());
}
EXPORT const char* ptx_operation(int index) { return operations[size_t(index)].name.c_str(); }

// header: rows, predicates, static shared, local bytes, most threads, fewest blocks, granule, parameter bytes.
EXPORT int ptx_add_kernel(
    const char* name, const int32_t* header, const int64_t* code, int instructions, const int64_t* constants,
    int constant_count, const int32_t* specials, int special_count, const int32_t* tables, int table_count,
    const int32_t* parameter_offsets, const int32_t* parameter_sizes, int parameter_count, const int32_t* checked,
    int checked_count) {
  auto kernel = std::make_unique<Kernel>();
  Kernel& k = *kernel;
  k.name = name;
  k.rows = header[0], k.predicates = header[1], k.static_shared = header[2], k.local_bytes = header[3];
  k.max_threads = header[4], k.min_blocks = header[5], k.granule = header[6], k.parameter_bytes = header[7];
  constexpr int kWords = 13 + kOperands;
  for (int n = 0; n < instructions; ++n, code += kWords) {
    Ins i = {};
    i.run = code[0] < 0 ? nullptr : operations[size_t(code[0])].run;
    const auto at = [&](int index) { return static_cast<int32_t>(code[index]); };
    i.kind = at(1), i.predicate = at(2), i.negate = at(3), i.hidden = at(4);
    i.n = at(5), i.size = at(6), i.sign = at(7), i.wide = at(8), i.target = at(9), i.line = at(10), i.imm = code[11];
    i.meets = code[12] < 0 ? kNever : at(12);
    for (int o = 0; o < kOperands; ++o) i.x[o] = at(13 + o);
    k.code.push_back(i);
  }
  for (int n = 0; n < constant_count; ++n) {
    k.constants.push_back({int32_t(constants[3 * n]), int32_t(constants[3 * n + 1]), uint64_t(constants[3 * n + 2])});
  }
  for (int n = 0; n < special_count; ++n) k.specials.push_back({specials[2 * n], specials[2 * n + 1]});
  k.tables.assign(tables, tables + table_count);
  k.parameter_offsets.assign(parameter_offsets, parameter_offsets + parameter_count);
  k.parameter_sizes.assign(parameter_sizes, parameter_sizes + parameter_count);
  k.checked.assign(checked, checked + checked_count);
  const int index = int(ex.kernels.size());
  ex.kernels.push_back(std::move(kernel));
  return index;
}

EXPORT void ptx_find_kernels(int (*find)(const char*)) { ex.find = find; }
EXPORT void ptx_drop_kernel(int index) { *ex.kernels[size_t(index)] = Kernel{}; }
EXPORT void ptx_set_registers(int kernel, int registers) { ex.kernels[size_t(kernel)]->registers = registers; }

EXPORT void ptx_attribute(int attribute, int value) { ex.attributes[attribute] = value; }

// limit: instructions of a warp; every, first: the blocks that are executed.
EXPORT void ptx_options(
    int64_t limit, uint64_t every, uint64_t first, int checks, int counting, int descending, int fill) {
  ex.limit = limit, ex.every = every, ex.first = first;
  ex.checks = checks, ex.counting = counting, ex.descending = descending, ex.fill = fill;
}
EXPORT void ptx_fail(int error, int after) { ex.fail_with = error, ex.fail_after = after; }

EXPORT void ptx_reset() {
  ex.ranges.erase(
      std::remove_if(ex.ranges.begin(), ex.ranges.end(), [](const auto& range) { return range->kind != 3; }),
      ex.ranges.end());
  ex.findings.clear(), ex.finding_of.clear(), ex.launches.clear(), configurations.clear();
  ex.error = 0, ex.fail_with = 0;
  for (auto& kernel : ex.kernels) kernel->maximum_dynamic = 48 << 10;
}

EXPORT void ptx_range(uint64_t low, uint64_t bytes, int kind, int granule) {
  auto range = std::make_unique<Range>();
  range->low = low, range->high = low + bytes, range->kind = kind, range->granule = granule;
  if (kind == 1 || kind == 2) range->initialized.assign((bytes >> granule) + 1, 0);
  auto after =
      std::upper_bound(ex.ranges.begin(), ex.ranges.end(), low, [](uint64_t a, const auto& r) { return a < r->low; });
  ex.ranges.insert(after, std::move(range));
}

// The allocator of a launch's workspace: its context is how many bytes it may give, in all.
EXPORT void* ptx_allocate(void* context, int64_t bytes) {
  auto* const left = static_cast<int64_t*>(context);
  if (bytes < 0 || bytes > *left) return nullptr;
  *left -= bytes;
  if (ex.first == ~uint64_t(0)) return reinterpret_cast<void*>(uint64_t(1) << 45);  // nothing is executed
  std::unique_ptr<uint8_t[]> memory(new uint8_t[size_t(bytes) + 512]);
  memset(memory.get(), ex.fill, size_t(bytes) + 512);
  const uint64_t low = (reinterpret_cast<uint64_t>(memory.get()) + 511) / 512 * 512;
  ptx_range(low, uint64_t(bytes), 2, 1);
  for (auto& range : ex.ranges) {
    if (range->low == low && range->kind == 2) range->owned = std::move(memory);
  }
  return reinterpret_cast<void*>(low);
}

EXPORT int ptx_launch(
    int kernel, const uint32_t* grid, const uint32_t* block, void* const* arguments, uint64_t dynamic) {
  return launch_kernel(kernel, {grid[0], grid[1], grid[2]}, {block[0], block[1], block[2]}, arguments, dynamic);
}
EXPORT int ptx_findings() { return int(ex.findings.size()); }
EXPORT const Finding* ptx_finding(int index) { return &ex.findings[size_t(index)]; }
EXPORT int ptx_launches() { return int(ex.launches.size()); }
// numbers: kernel, grid, block, dynamic, status, blocks executed, instructions
EXPORT const Count* ptx_launched(int index, int64_t* numbers) {
  const Launch& l = *ex.launches[size_t(index)];
  const int64_t values[] = {
      l.kernel,
      l.grid[0],
      l.grid[1],
      l.grid[2],
      l.block[0],
      l.block[1],
      l.block[2],
      int64_t(l.dynamic),
      l.status,
      int64_t(l.executed),
      int64_t(l.instructions)};
  std::copy(std::begin(values), std::end(values), numbers);
  return l.counts.data();
}

// How many granules of a result or workspace have been written.
EXPORT int64_t ptx_written(uint64_t low) {
  const Range* const range = range_of(low);
  return range ? int64_t(std::count(range->initialized.begin(), range->initialized.end(), 1)) : -1;
}

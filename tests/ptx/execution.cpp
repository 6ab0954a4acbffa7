// A launch: its blocks one after another, each block's warps up to the next barrier, lanes that part and meet again.
#include <algorithm>
#include <functional>

#include "machine.h"

namespace machine {

Executor ex;
Parameters parameters;
std::vector<Operation> operations;

void add(const std::string& name, Run run) { operations.push_back({name, run}); }

void report(Problem problem, const Warp& w, int lane, uint64_t address, int bytes, int other) {
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

namespace {

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

}  // namespace

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

}  // namespace machine

// Memory: accesses, their checks and their counts; asynchronous copies; what lanes hand to each other without it, and
// matrices, which a whole warp holds.
#include <algorithm>
#include <functional>

#include "halves.h"

namespace machine {

Range* range_of(uint64_t address) {
  auto after = std::upper_bound(
      ex.ranges.begin(), ex.ranges.end(), address, [](uint64_t a, const auto& r) { return a < r->low; });
  if (after == ex.ranges.begin()) return nullptr;
  Range* const range = std::prev(after)->get();
  return address < range->high ? range : nullptr;
}

namespace {

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

// Wavefronts of a warp's access, and how many there are without conflicts. Of 32 banks of 4 bytes: 64-bit accesses go
// by half warps, 128-bit ones by quarters, and lanes of the same word share.
struct Wavefronts {
  uint64_t count = 0, ideal = 0;
};

template <class Address>
Wavefronts wavefronts_of(uint32_t mask, const Address* address, uint32_t bytes) {
  const int parts = bytes <= 4 ? 1 : std::min(8u, bytes / 4), each = kLanes / parts;
  const uint32_t words = std::max(1u, bytes / 4);
  Wavefronts found;
  for (int part = 0; part < parts; ++part) {
    const uint32_t active = each == 32 ? mask : mask >> (part * each) & ((1u << each) - 1);
    if (!active) continue;
    Address seen[32][32];
    uint8_t held[32] = {};
    int most = 1;
    lanes(active, [&](int l) {
      for (uint32_t k = 0; k < words; ++k) {
        const Address word = address[part * each + l] / 4 + k;
        const int bank = int(word % 32);
        int at = 0;
        while (at < held[bank] && seen[bank][at] != word) ++at;
        if (at < held[bank]) continue;
        seen[bank][held[bank]++] = word;
        most = std::max<int>(most, held[bank]);
      }
    });
    found.count += uint64_t(most);
    ++found.ideal;
  }
  return found;
}

void count_sectors(Warp& w, const uint64_t* address, uint32_t bytes) {
  uint64_t sectors[2 * kLanes];
  int n = 0;
  lanes(w.mask, [&](int l) {
    sectors[n++] = address[l] / 32;
    if ((address[l] + bytes - 1) / 32 != address[l] / 32) sectors[n++] = (address[l] + bytes - 1) / 32;
  });
  w.count->sectors += uint64_t(distinct(sectors, n));
}

// The L1 cache hands out what shared memory does, by the same banks, whichever lines it is of.
void count_global(Warp& w, const uint64_t* address, uint32_t bytes) {
  count_sectors(w, address, bytes);
  w.count->global_wavefronts += wavefronts_of(w.mask, address, bytes).count;
}

void count_shared(Warp& w, const uint32_t* address, uint32_t bytes) {
  const Wavefronts found = wavefronts_of(w.mask, address, bytes);
  w.count->wavefronts += found.count, w.count->ideal_wavefronts += found.ideal;
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
    if (w.mask) count_sectors(w, from, i.size);  // its wavefronts are those of the writes
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

// Of an 8 x 8 matrix of 16-bit elements, lane l has those of row l / 4 and columns 2 * (l % 4) and the next, in a
// register, the first in its lower half.
using Matrix = uint16_t[8][8];

// To the lanes' registers, and back.
void hold(const Matrix& matrix, bool transposed, uint32_t* to) {
  for (int l = 0; l < kLanes; ++l) {
    const int r = l / 4, c = 2 * (l % 4);
    to[l] =
        transposed ? matrix[c][r] | uint32_t(matrix[c + 1][r]) << 16 : matrix[r][c] | uint32_t(matrix[r][c + 1]) << 16;
  }
}
void gather(const uint32_t* from, bool transposed, Matrix& matrix) {
  for (int l = 0; l < kLanes; ++l) {
    const int r = l / 4, c = 2 * (l % 4);
    (transposed ? matrix[c][r] : matrix[r][c]) = uint16_t(from[l]);
    (transposed ? matrix[c + 1][r] : matrix[r][c + 1]) = uint16_t(from[l] >> 16);
  }
}

// Whether all 32 lanes are here; where they are not, the results are not a number.
bool whole(Warp& w, const int32_t* results, int count) {
  if (__builtin_expect(w.mask == kAll, 1)) return true;
  report(kLanesApart, w, __builtin_ctz(w.mask));
  for (int k = 0; k < count; ++k) each<uint32_t>(w, results[k], [](int) { return kAll; });
  return false;
}

// The addresses of n matrices' rows: those of matrix j by lanes 8 * j to 8 * j + 7.
void row_addresses(Warp& w, const Ins& i, uint32_t* address) {
  shared_addresses(w, i, i.x[i.n], address);
  if (!ex.counting) return;
  w.mask = i.n == 4 ? kAll : (1u << (8 * i.n)) - 1;
  count_shared(w, address, 16);
  w.mask = kAll;
}

// ldmatrix: n matrices to x[0] ..., the addresses in x[n]; sign: whether they are transposed. The lane that gives an
// address is the one that reads there.
void load_matrices(Warp& w, const Ins& i) {
  if (!whole(w, i.x, i.n)) return;
  uint32_t address[kLanes];
  row_addresses(w, i, address);
  for (int j = 0; j < i.n; ++j) {
    Matrix matrix = {};
    for (int r = 0; r < 8; ++r) {
      const int l = 8 * j + r;
      if (!in_shared(w, l, address[l], 16)) continue;
      if (ex.checks) check_shared_read(w, l, address[l], 16);
      memcpy(matrix[r], w.block->shared.data() + address[l], 16);
    }
    hold(matrix, i.sign, row<uint32_t>(w, i.x[j]));
  }
}

// stmatrix, likewise: from x[0] ...
void store_matrices(Warp& w, const Ins& i) {
  if (!whole(w, i.x, 0)) return;
  uint32_t address[kLanes];
  row_addresses(w, i, address);
  for (int j = 0; j < i.n; ++j) {
    Matrix matrix;
    gather(row<uint32_t>(w, i.x[j]), i.sign, matrix);
    for (int r = 0; r < 8; ++r) {
      const int l = 8 * j + r;
      if (!in_shared(w, l, address[l], 16)) continue;
      if (ex.checks) check_shared_write(w, l, address[l], 16, record_of(w, l));
      memcpy(w.block->shared.data() + address[l], matrix[r], 16);
    }
  }
}

// movmatrix.trans: x = to, from.
void transpose_matrix(Warp& w, const Ins& i) {
  if (!whole(w, i.x, 1)) return;
  Matrix matrix;
  gather(row<uint32_t>(w, i.x[1]), false, matrix);
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
      gather(row<uint32_t>(w, of_a[2 * step + half]), false, matrix);
      for (int r = 0; r < 8; ++r) {
        for (int c = 0; c < 8; ++c) a[8 * half + r][8 * step + c] = H::widen(matrix[r][c]);
      }
    }
    gather(row<uint32_t>(w, of_b[step]), false, matrix);  // by columns
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

}  // namespace

void add_memory() {
  add_accesses<1>(), add_accesses<2>(), add_accesses<4>(), add_accesses<8>();
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
  add("cp.async", copy_async);
  add("cp.async.commit_group", commit_copies);
  add("cp.async.wait_group", wait_copies);
  add("ldmatrix", load_matrices);
  add("stmatrix", store_matrices);
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
}

}  // namespace machine

// In the place of the CUDA runtime: what a program that nvcc has compiled calls of it; and what executor.py calls.
#include <algorithm>
#include <cstddef>
#include <cstdio>

#include "machine.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

using namespace machine;

namespace {

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
  if (operations.empty()) add_arithmetic(), add_memory();
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

// What a program compiled by nvcc calls of CUDA's runtime, for tests of the launcher: launches are noted and nothing
// runs, and any call can be made to fail.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct Dim {
  unsigned x, y, z;
};

struct Launch {
  int64_t grid[3], block[3], shared, allowed;
  void* stream;
  int call;  // its number among all calls of the runtime
  int64_t name;
};

namespace {

// Of the kernels, by their host functions: the address of a C string. Kernels are registered before what stands here at
// file scope would be ready.
std::map<const void*, int64_t>& names() {
  static std::map<const void*, int64_t> known;
  return known;
}

std::map<const void*, int64_t> allowed;
std::vector<Launch> launches;
Dim pending_grid, pending_block;
size_t pending_shared;
void* pending_stream;
int calls = 0, failing = -1, error_code = 0, last_error = 0, most_shared = 0, allocations = 0;

constexpr int kDefault = 48 << 10;

// The result of a call of the runtime, as they come.
int next() { return last_error = calls++ == failing ? error_code : 0; }

}  // namespace

extern "C" {

// shared: bytes of shared memory that a block may have on request
void start_over(int fail_at, int code, int shared) {
  calls = allocations = 0, failing = fail_at, error_code = code, last_error = 0, most_shared = shared;
  launches.clear(), allowed.clear();
}

// The allocator of a launch's workspace; its context: whether it has any.
void* allocate(const bool* has_memory, int64_t) {
  ++allocations;
  static char memory[16];
  return *has_memory ? memory : nullptr;  // nothing reads or writes it
}

int call_count() { return calls; }
int allocation_count() { return allocations; }
int launch_count() { return static_cast<int>(launches.size()); }
const Launch* launch_at(int index) { return &launches[index]; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names()[stub] = reinterpret_cast<int64_t>(name);
}

unsigned __cudaPushCallConfiguration(Dim grid, Dim block, size_t shared, void* stream) {
  pending_grid = grid, pending_block = block, pending_shared = shared, pending_stream = stream;
  return 0;
}
int __cudaPopCallConfiguration(Dim* grid, Dim* block, size_t* shared, void* stream) {
  *grid = pending_grid, *block = pending_block, *shared = pending_shared, *static_cast<void**>(stream) = pending_stream;
  return 0;
}
int __cudaGetKernel(const void** kernel, const void* stub) {
  *kernel = stub;
  return 0;
}
int cudaLaunchKernel(const void* stub, Dim grid, Dim block, void**, size_t shared, void* stream) {
  const int number = calls;
  const auto found = allowed.find(stub);
  launches.push_back(
      {{grid.x, grid.y, grid.z},
       {block.x, block.y, block.z},
       static_cast<int64_t>(shared),
       found == allowed.end() ? kDefault : found->second,
       stream,
       number,
       names()[stub]});
  return next();
}
int __cudaLaunchKernel(const void* kernel, Dim grid, Dim block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

// A kernel's launch that failed is told by this, once.
int cudaGetLastError() {
  if (last_error) {
    const int told = last_error;
    last_error = 0;
    return told;
  }
  return next();
}
int cudaPeekAtLastError() { return last_error; }

int cudaFuncSetAttribute(const void* stub, int attribute, int value) {
  if (attribute == 8) allowed[stub] = value;  // cudaFuncAttributeMaxDynamicSharedMemorySize
  return next();
}
int cudaFuncSetCacheConfig(const void*, int) { return next(); }

int cudaDeviceGetAttribute(int* value, int attribute, int) {
  constexpr int kMultiprocessors = 16, kSharedOptIn = 97;
  *value = attribute == kMultiprocessors ? 132 : attribute == kSharedOptIn ? most_shared : attribute == 75 ? 9 : 0;
  return next();
}
}

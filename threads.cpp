// Threads in the place of torch's pool, which is OpenMP's: ThreadSanitizer does not see how that waits, and would find
// a race wherever a call follows another. Linked into the library, they serve instead of torch's; the shares are the
// same.
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = kThreads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(
    int64_t begin, int64_t end, int64_t grain_size, void (*function)(int64_t, int64_t, void*), void* context) {
  const int64_t share = std::max((end - begin + kThreads - 1) / kThreads, std::max<int64_t>(grain_size, 1));
  std::vector<std::thread> threads;
  for (; begin < end; begin += share) threads.emplace_back(function, begin, std::min(begin + share, end), context);
  for (std::thread& thread : threads) thread.join();
  return AOTI_TORCH_SUCCESS;
}

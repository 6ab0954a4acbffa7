// The kernels for AVX-512.
#include "tiles.h"

#ifdef CARAFE_X86

namespace carafe {
namespace {

struct Avx512 : Isa<64, 32> {
  CARAFE_LOOPS(__attribute__((target("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c"))))
};

}  // namespace

void run_avx512(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end) {
  run_tiles<Avx512>(shape, plan, call, begin, end);
}

}  // namespace carafe

#endif

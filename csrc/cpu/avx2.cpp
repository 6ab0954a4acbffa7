// The kernels for AVX2.
#include "tiles.h"

#ifdef CARAFE_X86

namespace carafe {
namespace {

struct Avx2 : Isa<32, 16> {
  CARAFE_LOOPS(__attribute__((target("avx2,fma,f16c"))))
};

}  // namespace

void run_avx2(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end) {
  run_tiles<Avx2>(shape, plan, call, begin, end);
}

}  // namespace carafe

#endif

// The kernels for the compiler's own target, which has SSE2 on x86-64 and NEON on 64-bit Arm.
#include "tiles.h"

namespace carafe {
namespace {

struct Baseline : Isa<16, 16> {
  CARAFE_LOOPS()
};

}  // namespace

void run_baseline(const Shape& shape, const Plan& plan, const Call& call, int64_t begin, int64_t end) {
  run_tiles<Baseline>(shape, plan, call, begin, end);
}

}  // namespace carafe

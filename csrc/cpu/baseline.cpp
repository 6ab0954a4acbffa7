// The kernels for the compiler's own target, which has SSE2 on x86-64 and NEON on 64-bit Arm.
#include "tiles.h"

CARAFE_TILES(baseline, 16, 16, )
